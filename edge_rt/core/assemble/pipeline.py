"""Chains post-processors: each takes the text of the one before, and at the end of the stream they are flushed in order.

A post-processor that raises, or returns something that is no text, is out. If it fails closed the stream stops: PluginError, and
nothing more comes out. Otherwise the text it had taken and not given back goes on without it, as far as that is known, and a
notice says so. It is known while the processor has given back its input unchanged so far: one that has rewritten anything may
have held back what only it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edge_rt.errors import PluginError

MAX_PENDING = 4096  # characters; who holds back more is not just waiting


class Transducer(Protocol):
    """An incremental text transducer; see ``edge_rt.hooks.PostProcessor`` for the contract."""

    def feed(self, text: str) -> str:
        """Take more text and return what can no longer change."""
        ...

    def flush(self) -> str:
        """The stream ended: return the rest."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """A post-processor of one stream. ``fails_closed``: better no text than unprocessed text."""

    name: str
    processor: Transducer
    fails_closed: bool = False


class Pipeline:
    """One stream. ``notices`` collects what a person should know: processors that were left out."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = list(stages)
        self._pending: dict[Stage, str | None] = dict.fromkeys(stages, "")  # taken and not given back; None: not known
        self._ended = False
        self.notices: list[str] = []

    @property
    def held(self) -> tuple[tuple[str, int | None], ...]:
        """For each processor still in: its name and the characters it holds back (None: not known)."""
        pending = ((stage.name, self._pending[stage]) for stage in self._stages)
        return tuple((name, None if text is None else len(text)) for name, text in pending)

    def feed(self, text: str) -> str:
        """Take more text and return what came through. Raises PluginError if a processor that fails closed failed."""
        if self._ended:
            return ""
        for stage in tuple(self._stages):
            if not text:
                break
            text = self._feed(stage, text)
        return text

    def flush(self) -> str:
        """The stream ended: everything still inside. A second call returns nothing. Raises PluginError as ``feed`` does."""
        if self._ended:
            return ""
        text = ""
        for stage in tuple(self._stages):
            text = self._feed(stage, text) if text else ""
            if stage in self._stages:
                text += self._flush(stage)
        self._ended = True
        return text

    def _feed(self, stage: Stage, text: str) -> str:
        before = self._pending[stage]
        result, failure = _attempt(lambda: stage.processor.feed(text))
        if failure is not None:
            return self._leave_out(stage, failure, before, text)
        if before is not None:
            rest = (before + text)[len(result) :] if (before + text).startswith(result) else None
            self._pending[stage] = rest if rest is not None and len(rest) <= MAX_PENDING else None
        return result

    def _flush(self, stage: Stage) -> str:
        result, failure = _attempt(stage.processor.flush)
        return result if failure is None else self._leave_out(stage, failure, self._pending[stage], "")

    def _leave_out(self, stage: Stage, failure: str, before: str | None, text: str) -> str:
        """A processor failed: stop the stream, or go on without it. Returns the text it should have processed."""
        if stage.fails_closed:
            self._ended = True
            raise PluginError(f"post-processor {stage.name} failed and the stream must not go on without it: {failure}")
        self._stages.remove(stage)
        lost = "; text it held back may be missing" if before is None else ""
        self.notices.append(f"post-processor {stage.name} failed and was left out from there on: {failure}{lost}")
        return (before or "") + text


def _attempt(call: Callable[[], str]) -> tuple[str, str | None]:
    """The result of a plugin's method, or why there is none: whatever it raises is its failure, not ours."""
    try:
        result = call()
    except Exception as error:
        return "", str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
    if not isinstance(result, str):
        return "", f"it returned {type(result).__name__}, not text"
    return result, None
