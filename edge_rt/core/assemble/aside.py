"""A post-processor on a thread of its own, so that one that stalls holds up nobody for long.

Python cannot end a thread: the stalled one is left behind, and ends when what it waits for does. Nor can anything be done while C code
keeps the interpreter's lock, as a regular expression that goes back and forth does.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial

from edge_rt.core.assemble.post_processor import CountsWork, HandlesCut, HoldsText, PostProcessor

PATIENCE = 2.0
"""Seconds that one call may take."""


class Stalled(Exception):
    """A post-processor did not come back in time."""


class Quit(Exception):
    """A post-processor raised what ends a program."""


class Aside:
    """Passes calls on to a post-processor's own thread and waits for the result. Raises Stalled, Quit, and what the processor raises."""

    def __init__(self, processor: PostProcessor, patience: float = PATIENCE) -> None:
        self._processor, self._patience = processor, patience
        self._calls: queue.SimpleQueue[Callable[[], str] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._tells = processor if isinstance(processor, HoldsText) else None  # asking takes longer than a call
        self._counted = processor if isinstance(processor, CountsWork) else None
        if self._tells is not None:
            self.held = ""
        self.counts: Mapping[str, int] = {}

    def feed(self, text: str) -> str:
        """Take more text and return what can no longer change."""
        return self._ask(partial(self._processor.feed, text))

    def flush(self) -> str:
        """The text is complete: return the rest."""
        return self._ask(self._processor.flush)

    def cut(self, following: str) -> str:
        """The text ends in the middle: return the rest."""
        processor = self._processor
        return self._ask(partial(processor.cut, following) if isinstance(processor, HandlesCut) else processor.flush)

    def _ask(self, call: Callable[[], str]) -> str:
        """What a call gives. (A call must not refer to this object, or the thread would keep it from being dropped.)"""
        if self._thread is None:
            self._thread = threading.Thread(target=_work, args=(self._calls, self._results), name="edge-rt post-processor", daemon=True)
            self._thread.start()
        self._calls.put(call)
        try:
            result = self._results.get(timeout=self._patience)
        except queue.Empty:
            raise Stalled(f"it did not come back within {self._patience:g} seconds") from None
        if isinstance(result, Exception):
            raise result
        if self._tells is not None:
            self.held = self._tells.held
        if self._counted is not None:
            self.counts = self._counted.counts
        return result

    def __del__(self) -> None:
        self._calls.put(None)


def _work(calls: queue.SimpleQueue[Callable[[], str] | None], results: queue.SimpleQueue[str | Exception]) -> None:
    """Make calls until there is None. Not a method, for the same reason."""
    while (call := calls.get()) is not None:
        try:
            results.put(call())
        except Exception as error:
            results.put(error)
        except BaseException as error:  # else it would end this thread, and its message, the text perhaps, be written to standard error
            results.put(Quit(f"it raised {type(error).__name__}"))
