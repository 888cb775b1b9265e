"""Memory that runs out while a sequence is read: what can be freed is, and the work is tried once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from edge_rt.errors import OutOfMemory

_T = TypeVar("_T")
Relieve = Callable[[], bool]
"""Frees memory, if it can; whether it did."""


def relieved(relieve: Relieve, work: Callable[[], _T], untouched: Callable[[], bool] = lambda: True) -> _T:
    """What ``work`` gives, tried again where memory could be freed and the first attempt has left nothing behind (``untouched``)."""
    try:
        return work()
    except OutOfMemory:
        if not untouched() or not relieve():
            raise
        return work()
