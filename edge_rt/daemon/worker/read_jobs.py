"""Texts that are read and not continued (embeddings and scores), a piece at a time between the steps of generations.

One text is read at a time, so that its cells are all the memory this takes. Requests take turns text by text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from edge_rt.core.generate.scoring import LOGITS_CHUNK, Scored, TextReader, finished, pooling_of, scoring, tokens_of
from edge_rt.daemon.protocol import Message
from edge_rt.daemon.worker.memory import MemoryRequest, Reservation
from edge_rt.daemon.worker.requests import QueueCallbacks, QueuedRequest
from edge_rt.errors import Cancelled, ContextOverflow, OptionError

if TYPE_CHECKING:
    from edge_rt.core.generate.scoring import Rivals
    from edge_rt.daemon.worker.memory import MemoryBudget
    from edge_rt.daemon.worker.requests import ActiveRequest, AdmissionQueue
    from edge_rt.model import Model

CHARACTERS_AT_ONCE = 1 << 14  # characters of texts that are tokenised between two steps; a longer text is tokenised whole


class EmbedJob:
    """A request for embeddings of texts. ``reader`` serves all such requests."""

    advice = "embed a shorter text, or let the daemon use more memory"

    def __init__(self, model: Model, command: Message, reader: TextReader) -> None:
        """Raises OptionError."""
        self._model, self._command, self._reader = model, command, reader
        self._pooling = pooling_of(model.file.header, command.get("pooling"))
        self._texts: Sequence[str | Sequence[int]] = command.get("texts") or command["tokens"]
        self._tokens: list[list[int]] = []
        self._width = 0

    @property
    def units(self) -> int:
        return len(self._texts)

    def prepare(self) -> bool:
        """Tokenise some of the texts; True when all are. Raises what ``tokens_of`` does."""
        model, seen = self._model, 0
        while len(self._tokens) < len(self._texts) and seen < CHARACTERS_AT_ONCE:
            text = self._texts[len(self._tokens)]
            self._tokens.append(tokens_of(model.vocab, text, len(self._tokens), model.info.max_context))
            seen += len(text)
        return len(self._tokens) == len(self._texts)

    def need(self, unit: int) -> MemoryRequest:
        return MemoryRequest(len(self._tokens[unit]), len(self._tokens[unit]))

    def begin(self, unit: int) -> None:
        """Raises OutOfMemory."""
        self._reader.begin(self._tokens[unit], self._pooling)

    def read(self, unit: int, room: int) -> Message | None:
        """A piece of the text; its event when that was the last. Raises what the engine does, OptionError."""
        pooled = self._reader.read(room)
        if pooled is None:
            return None
        command = self._command
        vector = finished(pooled, normalize=command.get("normalize", True), dimensions=command.get("dimensions"))
        self._width = len(vector)
        return {"event": "embedding", "index": unit, "embedding": vector.tolist(), "tokens": len(self._tokens[unit])}

    def close(self) -> None:
        self._reader.close()

    def answer(self) -> Message:
        return {"pooling": self._pooling, "dimensions": self._width, "tokens": sum(map(len, self._tokens))}


MAX_TOP = 20  # rivals of a token that may be told


class _Unit(NamedTuple):
    """``before`` is read once for all the ``continuations``."""

    before: list[int]
    continuations: list[list[int]]

    @property
    def longest(self) -> int:
        return max(map(len, self.continuations))


class ScoreJob:
    """A request for scores: of continuations of one prompt or messages, or of whole texts, each from its second token on."""

    advice = "score shorter texts, or let the daemon use more memory"

    def __init__(self, model: Model, command: Message) -> None:
        """Raises OptionError."""
        self._model, self._command = model, command
        self._top, self._beyond, self._pieces = command.get("top", 0), command.get("beyond", False), command.get("pieces", False)
        if not 0 <= self._top <= MAX_TOP:
            raise OptionError(f"top is {self._top}; the likeliest 0 to {MAX_TOP} tokens can be told")
        self._whole: Sequence[str | list[int]] = command.get("texts") or command.get("tokens") or ()
        self._units: list[_Unit] = []
        self._steps: Generator[Scored | None, int, None] | None = None
        self._found: list[Scored] = []

    @property
    def units(self) -> int:
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

    def need(self, unit: int) -> MemoryRequest:
        """While a continuation is read, the prompt stays for the next."""
        one = self._units[unit]
        cells = len(one.before) * (2 if len(one.continuations) > 1 else 1) + one.longest
        return MemoryRequest(cells, cells, rows=min(LOGITS_CHUNK, one.longest))

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
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def answer(self) -> Message:
        return {"tokens": sum(len(one.before) + sum(map(len, one.continuations)) for one in self._units)}


SendEvent = Callable[["ActiveRequest", Message], object]  # sends an event of a request, which takes one of its credits
ReportEnd = Callable[[Message, "Exception | None", Message], None]  # told once for each command: with what went wrong, or with the answer


class ReadJob(Protocol):
    """What a request wants of its texts, unit by unit: an event each. ``begin``, ``read`` and ``close`` hold the engine's lock.

    ``advice``: what to do if a unit never fits into memory.
    """

    advice: str

    @property
    def units(self) -> int: ...

    def prepare(self) -> bool:
        """Tokenise some, so that those who generate need not wait for many; True when all are. Raises what is wrong with them."""
        ...

    def need(self, unit: int) -> MemoryRequest: ...

    def begin(self, unit: int) -> None:
        """Start with one. Raises OutOfMemory."""
        ...

    def read(self, unit: int, room: int) -> Message | None:
        """Read at most so many tokens further; its event, if that was all. Raises what the engine does."""
        ...

    def close(self) -> None: ...

    def answer(self) -> Message: ...


@dataclass(eq=False)
class _ActiveJob:
    """A command under way. ``ready``: its texts are tokenised. ``done``: units of it. ``told``: that it waits for memory."""

    asked: ActiveRequest
    command: Message
    work: ReadJob
    ready: bool = False
    told: bool = False
    done: int = 0


class ReadJobs:
    """All requests to read texts with one model. Not thread-safe: one thread adds and steps."""

    def __init__(self, model: Model, account: MemoryBudget, line: AdmissionQueue, say: SendEvent, ended: ReportEnd) -> None:
        """``line``: in which texts wait for memory, as generations do."""
        self._model, self._account, self._line, self._say, self._ended = model, account, line, say, ended
        self._requests: deque[_ActiveJob] = deque()
        self._reader: TextReader | None = None
        self._turn: _ActiveJob | None = None  # of which a unit waits for memory, or has it: one at a time
        self._waiting: QueuedRequest | None = None
        self._promise: Reservation | None = None
        self._reading = False
        self._holds: ReadJob | None = None  # whose cells may be left for its next unit

    def add(self, asked: ActiveRequest, command: Message) -> None:
        """Take up a request. Raises OptionError."""
        self._requests.append(_ActiveJob(asked, command, _WORK[command["op"]](self, command)))

    def _embedding(self, command: Message) -> ReadJob:
        self._reader = self._reader or TextReader(self._model.engine, self._model.prefixes.clear)
        return EmbedJob(self._model, command, self._reader)

    def _scoring(self, command: Message) -> ReadJob:
        return ScoreJob(self._model, command)

    def step(self, room: int) -> bool:
        """Do a piece of the work, with at most ``room`` tokens for the engine; False if there is none that could be done."""
        moved = self._stop_cancelled()
        self._let_pass()
        one = self._turn or self._next()
        if one is None:
            self._rest()
        if one is None or not room:
            return moved
        try:
            if not one.ready:
                one.ready = one.work.prepare()
                return True
            if self._turn is None:
                self._ask(one)
            if self._promise is None:
                return moved  # those who hold the memory go on, and some end
            self._read(one, room)
        except Exception as error:
            self._rest()
            self._end(one, error)
        return True

    def _next(self) -> _ActiveJob | None:
        """Whose turn it is: the first that may send what is made for it."""
        return next((one for one in self._requests if one.asked.credits > 0), None)

    def _stop_cancelled(self) -> bool:
        gone = [one for one in self._requests if one.asked.cancelled]
        for one in gone:
            self._end(one, Cancelled("the request was cancelled"))
        return bool(gone)

    def _ask(self, one: _ActiveJob) -> None:
        """A unit's turn has come: it begins when there is memory for it, in one line with those who generate."""
        asked = one.asked
        self._turn = one
        self._waiting = QueuedRequest(
            one.command, [], {}, one.work.need(one.done), None, lambda: asked.credits > 0, lambda: asked.cancelled,
            asker=QueueCallbacks(self._start, self._refuse, self._queued), told=one.told, advice=one.work.advice,
        )  # fmt: skip
        self._line.add(self._waiting)
        self._line.admit()

    def _start(self, waiting: QueuedRequest, room: int | None) -> None:
        account, self._waiting = self._account, None
        self._promise = Reservation(waiting.need, None, account.bytes(waiting.need, None) if account.limited else 0)
        account.promises.append(self._promise)

    def _refuse(self, waiting: QueuedRequest, error: Exception) -> None:
        self._waiting = None
        if self._turn is not None:
            self._end(self._turn, error)

    def _queued(self, waiting: QueuedRequest, event: Message) -> None:
        if self._turn is not None:
            self._turn.told = True  # for all of its units
            self._say(self._turn.asked, event)

    def _let_pass(self) -> None:
        """Whose unit waits and may send nothing holds up nobody."""
        if self._waiting is not None and not self._waiting.ready():
            self._leave_line()
            self._turn = None

    def _leave_line(self) -> None:
        if self._waiting is not None:
            self._line.withdraw(self._waiting)
            self._waiting = None

    def _read(self, one: _ActiveJob, room: int) -> None:
        """A piece of the next unit. Raises what the engine does."""
        with self._model.lock:
            if not self._reading:
                if self._holds is not None and type(self._holds) is not type(one.work):
                    self._holds.close()
                self._holds = one.work
                one.work.begin(one.done)
                self._reading = True
            event = one.work.read(one.done, room)
        if event is not None:
            self._turn, self._reading = None, False
            self._unpromise()
            self._made(one, event)

    def _unpromise(self) -> None:
        if self._promise is not None:
            self._account.promises.remove(self._promise)
            self._promise = None

    def _made(self, one: _ActiveJob, event: Message) -> None:
        one.done += 1
        self._say(one.asked, event)
        if one.done == one.work.units:
            self._end(one, None)
        else:
            self._requests.remove(one)
            self._requests.append(one)
            self._line.admit()  # the unit's memory is free; the next may have no credits to ask for it

    def _end(self, one: _ActiveJob, error: Exception | None) -> None:
        self._requests.remove(one)
        if one is self._turn:
            self._rest()
        self._ended(one.command, error, one.work.answer() if error is None else {})

    def _rest(self) -> None:
        self._leave_line()
        self._turn, self._reading = None, False
        self._unpromise()
        if self._holds is not None:
            with self._model.lock:
                self._holds.close()
            self._holds = None


_WORK: Mapping[str, Callable[[ReadJobs, Message], ReadJob]] = {"embed": ReadJobs._embedding, "score": ReadJobs._scoring}
