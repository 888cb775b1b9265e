"""Chains post-processors, each with a time limit: each takes the text of the one before, and all are ended in order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Protocol

from edge_rt.errors import PluginError
from edge_rt.postprocess.protocol import CountsWork, HandlesCut, HoldsText, PostProcessor
from edge_rt.types import PostUse

# A post-processor on a thread of its own, so that one that stalls holds up nobody for long.
#
# Python cannot end a thread: the stalled one is left behind, and ends when what it waits for does. Nor can anything be done while C code
# keeps the interpreter's lock, as a regular expression that goes back and forth does.

PATIENCE = 2.0
"""Seconds that one call may take."""


class Stalled(Exception):
    """A post-processor did not come back in time."""


class Quit(Exception):
    """A post-processor raised what ends a program."""


class TimeoutWrapper:
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


# Chains post-processors: each takes the text of the one before, and at the end of the stream they are ended in order.
#
# A post-processor that raises, stalls, or returns something that is no text, is out. If it fails closed the stream stops: PluginError,
# and nothing more comes out. Otherwise the text it had taken and not given back goes on without it, as far as that is known, and a notice
# says so. It is known of one that tells what it holds, and of any other while it has given back its input unchanged. What was raised may
# quote the text, so it is told only of those whose text nothing is to conceal any more.

MAX_PENDING = 4096  # characters; who holds back more is not just waiting


class Transducer(Protocol):
    """An incremental text transducer; see ``edge_rt.hooks.PostProcessor`` for the contract."""

    def feed(self, text: str) -> str:
        """Take more text and return what can no longer change."""
        ...

    def flush(self) -> str:
        """The text is complete: return the rest."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A post-processor of one stream. ``fails_closed``: better no text than text it has not seen. ``plugin``: to blame."""

    name: str
    processor: Transducer
    fails_closed: bool = False
    plugin: str = ""


class _Running:
    """A stage at work: what it was fed and has not given back (``pending``, None: not known), and the most that was."""

    __slots__ = ("feed", "left_out", "most_held", "pending", "stage", "tells")

    def __init__(self, stage: Stage) -> None:
        self.stage, self.feed = stage, stage.processor.feed
        self.tells = stage.processor if isinstance(stage.processor, HoldsText) else None
        self.pending: str | None = ""
        self.most_held = 0
        self.left_out = False

    def note(self, text: str, result: str) -> None:
        """It took a text and gave a result."""
        if self.tells is not None:
            pending: str | None = _checked(self.tells.held)
        elif self.pending is None:
            return
        else:
            whole = self.pending + text
            pending = whole[len(result) :] if whole.startswith(result) else None
        if pending is not None and len(pending) > self.most_held:
            self.most_held = len(pending)
        self.pending = pending if pending is not None and len(pending) <= MAX_PENDING else None

    def use(self) -> PostUse:
        """What it did."""
        processor = self.stage.processor
        counts = dict(processor.counts) if isinstance(processor, CountsWork) else {}
        held = self.most_held if self.pending is not None else None
        return PostUse(self.stage.name, MappingProxyType(counts), held, self.left_out, self.stage.fails_closed)


class Pipeline:
    """One stream. ``notices`` collects what a person should know: processors that were left out. ``rules``: the version they follow."""

    def __init__(self, stages: Sequence[Stage], rules: str = "") -> None:
        self._all = [_Running(stage) for stage in stages]
        last = max((i for i, stage in enumerate(stages) if stage.fails_closed), default=-1)
        self._concealing, self._others = self._all[: last + 1], self._all[last + 1 :]
        self._safe: list[str] | None = [] if stages else None
        self._ended = False
        self.rules = rules
        self.notices: list[str] = []

    @property
    def conceals(self) -> bool:
        """Whether what the model wrote must not be known but through the pipeline: not from token ids either."""
        return bool(self._concealing)

    @property
    def text(self) -> str | None:
        """All that came in so far, as the last processor that conceals left it: for a conversation to go on from. None: not kept."""
        return "".join(self._safe) if self._safe is not None else None

    def forget(self) -> None:
        """Keep none of the text, for a stream that may have no end: ``text`` is None."""
        self._safe = None

    @property
    def held(self) -> tuple[tuple[str, int | None], ...]:
        """For each processor still in: its name and the characters it holds back (None: not known)."""
        return tuple((one.stage.name, None if one.pending is None else len(one.pending)) for one in self._all if not one.left_out)

    def use(self) -> tuple[PostUse, ...]:
        """What each processor did."""
        return tuple(one.use() for one in self._all)

    def feed(self, text: str) -> str:
        """Take more text and return what came through. Raises PluginError if a processor that fails closed failed."""
        if self._ended:
            return ""
        text = self._through(self._concealing, text)
        self._keep(text)
        return self._through(self._others, text)

    def flush(self) -> str:
        """The text is complete: everything still inside. A second call returns nothing. Raises PluginError as ``feed`` does."""
        return self._finish(None)

    def cut(self, following: str) -> str:
        """The text was cut off (see ``HandlesCut``): everything of it that may be said. Raises PluginError as ``feed`` does."""
        return self._finish(following)

    def _finish(self, following: str | None) -> str:
        if self._ended:
            return ""
        text = self._through_end(self._concealing, "", following)
        self._keep(text)
        text = self._through_end(self._others, text, following)
        self._ended = True
        return text

    def _keep(self, text: str) -> None:
        if self._safe is not None:
            self._safe.append(text)

    def _through(self, stages: list[_Running], text: str) -> str:
        for one in stages:
            if not text:
                break
            if not one.left_out:
                text = self._feed(one, text)
        return text

    def _through_end(self, stages: list[_Running], text: str, following: str | None) -> str:
        for one in stages:
            text = self._feed(one, text) if text and not one.left_out else text
            if not one.left_out:
                text += self._end(one, following)
        return text

    def _feed(self, one: _Running, text: str) -> str:
        try:
            result = _checked(one.feed(text))
            one.note(text, result)
        except Exception as error:  # whatever a plugin raises is its failure, not ours
            return self._leave_out(one, error, text)
        except BaseException:  # an interrupt: what it left of the processor's work cannot be trusted
            self._ended = True
            raise
        return result

    def _end(self, one: _Running, following: str | None) -> str:
        processor = one.stage.processor
        try:
            return _checked(processor.cut(following) if following is not None and isinstance(processor, HandlesCut) else processor.flush())
        except Exception as error:
            return self._leave_out(one, error, "")
        except BaseException:
            self._ended = True
            raise

    def _leave_out(self, one: _Running, error: Exception, text: str) -> str:
        """A processor failed: stop the stream, or go on without it. Returns the text it should have processed."""
        stage, pending = one.stage, one.pending
        by = f"post-processor {stage.name}" + (f" of plugin {stage.plugin}" if stage.plugin not in ("", stage.name) else "")
        reason = f"{type(error).__name__}{_where(error)}"
        if stage.fails_closed:
            self._ended = True
            # Nor is the exception chained: a log that shows it would show the text.
            raise PluginError(f"{by} failed and the stream must not go on without it: {reason}") from None
        one.left_out = True
        if one not in self._concealing:
            reason = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
        lost = "; text it held back may be missing" if pending is None else ""
        self.notices.append(f"{by} failed and was left out from there on: {reason}{lost}")
        return (pending or "") + text


def _checked(text: str) -> str:
    """What a processor gave, if it is text. Raises TypeError."""
    if not isinstance(text, str):
        raise TypeError(f"it gave {type(text).__name__}, not text")
    return text


def _where(error: Exception) -> str:
    """The line of code that raised, which says nothing of the text."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        found = f" at line {trace.tb_lineno} of {trace.tb_frame.f_code.co_filename.rpartition('/')[2]}"
        trace = trace.tb_next
    return found
