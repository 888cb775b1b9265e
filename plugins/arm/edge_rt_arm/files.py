"""Reads the small files of /sys and /proc: what is missing, unreadable (Android hides much) or malformed is None, never an exception."""

from __future__ import annotations

from pathlib import Path


def read_text(path: Path) -> str | None:
    """What a file says, without surrounding white space and the zero bytes of device trees."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \n\t")
    except (OSError, ValueError):
        return None


def read_int(path: Path) -> int | None:
    """A whole number, decimal or ``0x...``."""
    try:
        return int(read_text(path) or "", 0)
    except ValueError:
        return None


def folders(parent: Path, prefix: str) -> list[Path]:
    """What is in a folder and called ``prefix`` and a number, by that number."""
    try:
        found = [path for path in parent.iterdir() if path.name.startswith(prefix) and path.name[len(prefix) :].isdecimal()]
    except OSError:
        return []
    return sorted(found, key=lambda path: int(path.name[len(prefix) :]))
