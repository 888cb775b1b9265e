"""Where servers are: URLs, or sockets as ``unix:/PATH``; and the keys that they want."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from edge_rt.hooks import OptionError


class Address(NamedTuple):
    """``base``: the URL that paths are appended to. ``socket``: the file it is asked through, or None. ``here``: it is on this machine."""

    base: str
    socket: str | None
    here: bool


def is_address(text: str) -> bool:
    """Whether a text names a server, and not a file or a model."""
    return text.startswith(("http://", "https://", "unix:"))


def read_address(text: str) -> Address:
    """``http://HOST:PORT``, with or without ``/v1``, or ``unix:/PATH``. Raises OptionError."""
    if text.startswith("unix:") and (socket := text.removeprefix("unix:").removeprefix("//")):
        return Address("http://localhost", socket, True)
    place = urlsplit(text)
    if place.scheme not in ("http", "https") or not place.netloc:
        raise OptionError(f"the address is {text!r}; give http://HOST:PORT or unix:/PATH")
    return Address(text.rstrip("/").removesuffix("/v1"), None, place.hostname in ("localhost", "127.0.0.1", "::1"))


def read_key(path: Path) -> str:
    """The first line of a file. Raises OptionError."""
    try:
        key = path.read_text(encoding="ascii").split("\n")[0].strip()
    except (OSError, ValueError) as error:
        raise OptionError(f"the key in {path} cannot be read ({error}); name a file with a key in its first line") from error
    if not key:
        raise OptionError(f"{path} has no key in its first line; write one there")
    return key
