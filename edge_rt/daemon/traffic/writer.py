"""The thread that redacts and writes recorded traffic: serving never waits for it, and what it has no time for is left out and counted."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from queue import SimpleQueue

from edge_rt.daemon.traffic.file import TraceFile, cannot
from edge_rt.daemon.traffic.lines import Feedback, Lines, Recorded, Unfit
from edge_rt.errors import EdgeError, OptionError

QUEUE_BYTES = 16 << 20
"""Of requests that wait to be written."""
RETRY_SECONDS = 5.0
"""Until it is tried again, after a file could not be written."""
RESULTS = ("recorded", "left_out", "dropped_queue", "dropped_redaction", "dropped_form", "dropped_disk", "dropped_end")
"""What becomes of a request: written; left out by sampling; dropped as the queue was full, redaction failed, OpenAI's API cannot ask it,
the file cannot be written, or the daemon ended before.
"""


class Writer:
    """``put``, then ``close``. ``counts``: by ``RESULTS``. ``paused``: why nothing can be written now, "" if it can."""

    def __init__(self, file: TraceFile, lines: Lines, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OptionError if the file cannot be written."""
        self._file, self._lines, self._clock = file, lines, clock
        self.counts: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))  # all at once: it is read while others count
        self.paused = ""
        self.queued = 0
        """Bytes of what waits."""
        self._retry = 0.0
        self._said = ""
        self._lock = threading.Lock()
        self._ending = False
        self._queue: SimpleQueue[tuple[Recorded | Feedback, int, Callable[[str], object]] | None] = SimpleQueue()
        try:
            file.ready()
        except OSError as error:
            raise cannot(file.path, error) from error
        self._thread = threading.Thread(target=self._run, name="edge-rt traffic", daemon=True)
        self._thread.start()

    def count(self, result: str) -> None:
        """Note what became of a request."""
        with self._lock:
            self.counts[result] += 1

    def put(self, one: Recorded | Feedback, size: int, then: Callable[[str], object] = lambda result: None) -> None:
        """Have it written, if it has room. ``size``: its bytes, about. ``then`` is called with what became of it, one of ``RESULTS``, on
        any thread; not once the daemon has to end.
        """
        with self._lock:
            fits = self.queued + size <= QUEUE_BYTES
            self.queued += size if fits else 0
        if fits:
            self._queue.put((one, size, then))
        else:
            self.count("dropped_queue")
            then("dropped_queue")

    def close(self, seconds: float) -> None:
        """Write what waits, as far as that is done in some seconds."""
        self._queue.put(None)
        self._thread.join(seconds)
        self._ending = True  # what is under way is the last
        self._thread.join(1.0)
        if left := self.counts["dropped_end"]:
            _log().warning("%d requests were not recorded: the daemon had to end", left)

    def _run(self) -> None:
        while (found := self._queue.get()) is not None:
            one, size, then = found
            result = "dropped_end" if self._ending else self._write(one)
            self.count(result)
            with self._lock:
                self.queued -= size
            if not self._ending:
                then(result)
        self._file.close()

    def _write(self, one: Recorded | Feedback) -> str:
        """What became of it."""
        if self.paused and self._clock() < self._retry:
            return "dropped_disk"
        try:
            if self._file.ready():
                self._lines.forget()
        except (OSError, OptionError) as error:
            return self._pause(error)
        try:
            line = self._lines.line(one)
        except Unfit:
            return "dropped_form"
        except Exception as error:  # whatever it was: nothing is written that was not redacted
            self._say(f"a request was not recorded: {_safe(error)}")
            return "dropped_redaction"
        try:
            self._file.append(line)
        except OSError as error:
            return self._pause(error)
        self._lines.written(one)
        if self.paused:
            self.paused = ""
            self._say(f"traffic is recorded again; {self.counts['dropped_disk']} requests were dropped so far")
        return "recorded"

    def _pause(self, error: OSError | OptionError) -> str:
        self.paused = str(cannot(self._file.path, error) if isinstance(error, OSError) else error)
        self._retry = self._clock() + RETRY_SECONDS
        self._say(f"{self.paused}; requests are not recorded until that is mended")
        return "dropped_disk"

    def _say(self, text: str) -> None:
        """In the log, once for what is the same again and again."""
        if text != self._said:
            self._said = text
            _log().warning("%s", text)


def _safe(error: Exception) -> str:
    """An error without what it may quote: edge-rt's own do not, when text is to be concealed."""
    return str(error) if isinstance(error, EdgeError) else type(error).__name__


def _log() -> logging.Logger:
    return logging.getLogger("edge_rt.daemon")
