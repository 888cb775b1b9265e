"""Ctrl-C while a model opens. Python raises KeyboardInterrupt wherever it is: a callback from C swallows it, an import in C may turn
it into an ImportError, which looks like a broken plugin. So it is remembered until the model is open.
"""

from __future__ import annotations

import contextlib
import signal

_seen: list[int] = []


def remember() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt, and ``pending`` tells that it did."""
    with contextlib.suppress(ValueError):  # not the main thread: a test, an embedding
        signal.signal(signal.SIGINT, _raise)


def pending() -> bool:
    """Whether Ctrl-C came since ``remember``: whatever went wrong after it is its consequence."""
    return bool(_seen)


def forget() -> None:
    """The model is open: Ctrl-C is Python's own again. Raises KeyboardInterrupt if one was raised meanwhile and got lost."""
    lost = pending()
    _seen.clear()
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if lost:
        raise KeyboardInterrupt


def _raise(number: int, _frame: object) -> None:
    _seen.append(number)
    raise KeyboardInterrupt
