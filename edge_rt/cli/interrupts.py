"""Ctrl-C while a model opens. Python raises KeyboardInterrupt wherever it is; in a callback from C, say, it is swallowed there."""

from __future__ import annotations

import contextlib
import signal

_seen: list[int] = []


def remember() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, and it is remembered that it did."""
    with contextlib.suppress(ValueError):  # not the main thread: a test, an embedding
        signal.signal(signal.SIGINT, _raise)


def raise_swallowed() -> None:
    """Raise KeyboardInterrupt if one was raised since ``remember`` and got lost on the way."""
    if _seen:
        _seen.clear()
        raise KeyboardInterrupt


def _raise(number: int, _frame: object) -> None:
    _seen.append(number)
    raise KeyboardInterrupt
