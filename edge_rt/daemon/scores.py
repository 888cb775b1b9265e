"""Texts to score in the worker, as ``Readings`` read them: how likely the model finds each token behind those before it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.generate.scoring import LOGITS_CHUNK, Scored, scoring
from edge_rt.daemon.account import Need
from edge_rt.daemon.frames import Message
from edge_rt.errors import ContextOverflow, OptionError

if TYPE_CHECKING:
    from edge_rt.core.generate.scoring import Rivals
    from edge_rt.model import Model

MOST_TOP = 20
"""Rivals of a token that may be told."""


class _Unit(NamedTuple):
    """``before`` is read once for all the ``continuations``."""

    before: list[int]
    continuations: list[list[int]]

    @property
    def longest(self) -> int:
        return max(map(len, self.continuations))


class Scoring:
    """A request for scores: of continuations of one prompt or messages, or of whole texts, each from its second token on."""

    advice = "score shorter texts, or let the daemon use more memory"

    def __init__(self, model: Model, command: Message) -> None:
        """Raises OptionError."""
        self._model, self._command = model, command
        self._top, self._beyond, self._pieces = command.get("top", 0), command.get("beyond", False), command.get("pieces", False)
        if not 0 <= self._top <= MOST_TOP:
            raise OptionError(f"top is {self._top}; the likeliest 0 to {MOST_TOP} tokens can be told")
        self._whole: Sequence[str | list[int]] = command.get("texts") or command.get("tokens") or ()
        self._units: list[_Unit] = []
        self._steps: Generator[Scored | None, int, None] | None = None
        self._found: list[Scored] = []

    @property
    def units(self) -> int:
        """How many events there will be."""
        return len(self._whole) or 1

    def prepare(self) -> bool:
        """Tokenise a text, or the prompt with all continuations. Raises ContextOverflow, OptionError."""
        model, command = self._model, self._command
        if self._whole:
            text = self._whole[len(self._units)]
            tokens = model.tokenize(text) if isinstance(text, str) else list(text)
            unit = _Unit(tokens[:1], [tokens[1:]])
        else:
            unit = _Unit(*model.continuations(command["prompt"] if "prompt" in command else command["messages"], command["continuations"]))
        if not unit.before:
            raise OptionError(f"text {len(self._units) + 1} is empty and has no likelihood; leave it out")
        cells, most = len(unit.before) + unit.longest, model.info.max_context
        if cells > most:
            raise ContextOverflow(f"text {len(self._units) + 1} has {cells} tokens and the context {most}; divide it", cells, most)
        self._units.append(unit)
        return len(self._units) == self.units

    def need(self, unit: int) -> Need:
        """While a continuation is read, the prompt stays for the next."""
        one = self._units[unit]
        cells = len(one.before) * (2 if len(one.continuations) > 1 else 1) + one.longest
        return Need(cells, cells, rows=min(LOGITS_CHUNK, one.longest))

    def begin(self, unit: int) -> None:
        """Raises OptionError."""
        before, continuations = self._units[unit]
        model = self._model
        self._steps = scoring(model.engine, before, continuations, top=self._top, beyond=self._beyond, relieve=model.prefixes.clear)
        self._found = []
        next(self._steps)

    def read(self, unit: int, room: int) -> Message | None:
        """A piece; the event when that was the last. Raises what ``scoring`` raises."""
        assert self._steps is not None, "begin comes first"
        found = self._steps.send(room)
        one = self._units[unit]
        if found is not None:
            self._found.append(found)
        if len(self._found) < len(one.continuations):
            return None
        self.close()
        return {
            "event": "scored",
            "index": unit,
            "scores": [self._told(one, *found) for found in zip(one.continuations, self._found, strict=True)],
        }

    def _told(self, unit: _Unit, tokens: Sequence[int], found: Scored) -> Message:
        """What was found of a continuation. ``pieces``: the bytes of its tokens; ``first``: of a whole text's first, which has no score."""
        told: Message = {"tokens": list(tokens), "logprobs": found.logprobs.tolist()}
        if self._top:
            told["top"] = list(map(self._shown, found.top))
        if self._beyond:
            told["beyond"] = self._shown(found.beyond)
        if self._pieces:
            told["pieces"] = list(map(self._piece, tokens))
            if self._whole:
                told["first"] = self._piece(unit.before[0])
        return told

    def _shown(self, rivals: Rivals) -> list[list[int | float | bytes]]:
        return [[token, logprob, self._piece(token)] if self._pieces else [token, logprob] for token, logprob in rivals]

    def _piece(self, token: int) -> bytes:
        return self._model.vocab.piece(token, special=True)

    def close(self) -> None:
        """Free the cells."""
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def answer(self) -> Message:
        """After the last event."""
        return {"tokens": sum(len(one.before) + sum(map(len, one.continuations)) for one in self._units)}
