"""Ctrl-C, by phase of the process: while it starts, while a model opens, and while an answer is made."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

_seen: list[int] = []


@contextmanager
def _handler(handle: Callable[[int, Any], object]) -> Iterator[None]:
    """Call a function at Ctrl-C. Does nothing outside the main thread, which alone may set handlers."""
    try:
        before = signal.signal(signal.SIGINT, handle)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def ending(status: int) -> AbstractContextManager[None]:
    """Let Ctrl-C end the process with a status and without a traceback."""
    return _handler(lambda *_: os._exit(status))


# While a model opens, KeyboardInterrupt alone is not enough: it is raised at whatever Python executes, a callback from C swallows it, and
# an import in C may turn it into an ImportError, which looks like a broken plugin. So it is remembered until the model is open.


def remember() -> None:
    """From now on Ctrl-C raises KeyboardInterrupt and is remembered for ``pending``."""
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGINT, _raise)


def pending() -> bool:
    """Whether Ctrl-C came since ``remember``; a later error is then taken for its consequence."""
    return bool(_seen)


def forget() -> None:
    """Restore Python's own handler. Raises KeyboardInterrupt if one was raised since ``remember`` and got lost."""
    lost = pending()
    _seen.clear()
    with suppress(ValueError):
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if lost:
        raise KeyboardInterrupt


def _raise(number: int, _frame: object) -> None:
    _seen.append(number)
    raise KeyboardInterrupt


@contextmanager
def cancelling(cancel: Callable[[], None]) -> Iterator[list[int]]:
    """Let the first Ctrl-C call ``cancel`` and the second raise KeyboardInterrupt. Yields a list that is empty until the first."""
    seen: list[int] = []

    def handle(number: int, frame: object) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt
        cancel()

    with _handler(handle):
        yield seen
