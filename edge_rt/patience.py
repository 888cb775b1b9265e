"""Asking what may take long or never answer: drivers, and the programs that come with them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")

PATIENCE = 0.008
"""Seconds that ``Latest`` waits: TellsHealth allows ten milliseconds."""


class Patient:
    """Calls functions on a thread of their own, and waits for a while. One that hangs keeps its thread; until it is back none is begun."""

    def __init__(self, what: str) -> None:
        """``what``: whom is asked, for messages."""
        self._what = what
        self._lock = threading.Lock()
        self._running: threading.Thread | None = None

    def ask(self, function: Callable[[], T], seconds: float) -> T:
        """What the function returns or raises. Raises TimeoutError if it takes longer, or an earlier one still does."""
        box: list[Any] = []

        def run() -> None:
            try:
                box.append((True, function()))
            except BaseException as error:
                box.append((False, error))

        until = time.monotonic() + seconds
        if not self._lock.acquire(timeout=seconds):
            raise TimeoutError(f"{self._what} did not answer within {seconds:g} s")
        try:
            if self._running is not None:
                self._running.join(max(0.0, until - time.monotonic()))
            if self._running is None or not self._running.is_alive():
                self._running = threading.Thread(target=run, name=f"edge-rt-{self._what}", daemon=True)
                self._running.start()
                self._running.join(max(0.0, until - time.monotonic()))
        finally:
            self._lock.release()
        if not box:
            raise TimeoutError(f"{self._what} did not answer within {seconds:g} s")
        good, value = box[0]
        if not good:
            raise value
        found: T = value
        return found


class Latest(Generic[T]):
    """The last answer of a function that takes its time: asked again, on a thread, when the answer is older than ``every`` seconds."""

    def __init__(self, function: Callable[[], T], nothing: T, every: float = 1.0) -> None:
        """``nothing``: the answer where the function raises, and before it has answered. Nothing is asked yet."""
        self._function, self._nothing, self._every = function, nothing, every
        self._lock = threading.Lock()
        self._running: threading.Thread | None = None
        self._answer, self._at = nothing, -float("inf")

    def get(self) -> T:
        """The last answer; waits at most PATIENCE for a fresh one. Never raises."""
        with self._lock:
            if time.monotonic() - self._at < self._every:
                return self._answer
            thread = self._running
            if thread is None or not thread.is_alive():
                thread = threading.Thread(target=self._run, name="edge-rt-health", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # no more threads, or the interpreter ends
                    return self._answer
                self._running = thread
        thread.join(PATIENCE)
        return self._answer

    def _run(self) -> None:
        try:
            answer = self._function()
        except Exception:  # whoever looks at health gets nothing; the probe says why
            answer = self._nothing
        self._answer, self._at = answer, time.monotonic()
