"""Fetches one file over HTTP(S) or from ``file://``: resumable, checked, and complete or absent.

Bytes go to ``NAME.part``; beside it ``NAME.part.tag`` keeps the server's validator (ETag or Last-Modified), so that a later
run goes on only with the same file. The finished file appears under its name by one rename, after its checksum was right.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edge_rt.errors import DownloadError

if TYPE_CHECKING:
    from urllib.request import Request

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
