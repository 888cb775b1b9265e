"""Texts that are read and not continued (embeddings and scores), a piece at a time between the steps of generations.

One text is read at a time, so that its cells are all the memory this takes. Requests take turns text by text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.generate.scoring import LOGITS_CHUNK, Scored, TextReader, finished, pooling_of, scoring, tokens_of
from edge_rt.daemon.protocol import Message
from edge_rt.daemon.worker.memory import MemoryRequest, Reservation
from edge_rt.daemon.worker.requests import ActiveRequest, QueueCallbacks, QueuedRequest
from edge_rt.errors import Cancelled, ContextOverflow, OptionError

if TYPE_CHECKING:
    from edge_rt.core.generate.scoring import Rivals
    from edge_rt.daemon.worker.memory import MemoryBudget
    from edge_rt.daemon.worker.requests import AdmissionQueue
    from edge_rt.model import Model

CHARACTERS_AT_ONCE = 1 << 14  # of texts that are tokenised between two steps; a longer text is tokenised whole
MAX_TOP = 20  # rivals of a token that may be told


class ReadJob:
    """One request to read texts, unit by unit: an event each. ``begin``, ``read`` and ``close`` are called with the engine's lock."""

    advice = ""  # what to do if a unit never fits into memory

    def __init__(self, model: Model, request: ActiveRequest, command: Message) -> None:
        self.model, self.request, self.command = model, request, command
        self.prepared = False  # all texts are tokenised
        self.notified = False  # the client knows that it waits for memory
        self.done = 0  # units

    @property
    def units(self) -> int:
        raise NotImplementedError

    def prepare(self) -> bool:
        """Tokenise some, so that those who generate need not wait for many; True when all are. Raises what is wrong with them."""
        raise NotImplementedError

    def need(self, unit: int) -> MemoryRequest:
        raise NotImplementedError

    def begin(self, unit: int) -> None:
        """Raises OutOfMemory, OptionError."""
        raise NotImplementedError

    def read(self, unit: int, room: int) -> Message | None:
        """Read at most so many tokens further; the unit's event, if that was all. Raises what the engine does."""
        raise NotImplementedError

    def close(self) -> None:
        """Free the cells."""
        raise NotImplementedError

    def answer(self) -> Message:
        """After the last event."""
        raise NotImplementedError


class EmbedJob(ReadJob):
    """Embeddings of texts. ``reader`` serves all such requests."""

    advice = "embed a shorter text, or let the daemon use more memory"

    def __init__(self, model: Model, request: ActiveRequest, command: Message, reader: TextReader) -> None:
        """Raises OptionError."""
        super().__init__(model, request, command)
        self._reader = reader
        self._pooling = pooling_of(model.file.header, command.get("pooling"))
        self._texts: Sequence[str | Sequence[int]] = command.get("texts") or command["tokens"]
        self._tokens: list[list[int]] = []
        self._width = 0

    @property
    def units(self) -> int:
        return len(self._texts)

    def prepare(self) -> bool:
        model, seen = self.model, 0
        while len(self._tokens) < len(self._texts) and seen < CHARACTERS_AT_ONCE:
            text = self._texts[len(self._tokens)]
            self._tokens.append(tokens_of(model.vocab, text, len(self._tokens), model.info.max_context))
            seen += len(text)
        return len(self._tokens) == len(self._texts)

    def need(self, unit: int) -> MemoryRequest:
        return MemoryRequest(len(self._tokens[unit]), len(self._tokens[unit]))

    def begin(self, unit: int) -> None:
        self._reader.begin(self._tokens[unit], self._pooling)

    def read(self, unit: int, room: int) -> Message | None:
        pooled = self._reader.read(room)
        if pooled is None:
            return None
        normalize, dimensions = self.command.get("normalize", True), self.command.get("dimensions")
        vector = finished(pooled, normalize=normalize, dimensions=dimensions)
        self._width = len(vector)
        return {"event": "embedding", "index": unit, "embedding": vector.tolist(), "tokens": len(self._tokens[unit])}

    def close(self) -> None:
        self._reader.close()

    def answer(self) -> Message:
        return {"pooling": self._pooling, "dimensions": self._width, "tokens": sum(map(len, self._tokens))}


class _ScoreUnit(NamedTuple):
    """``before`` is read once for all the ``continuations``."""

    before: list[int]
    continuations: list[list[int]]

    @property
    def longest(self) -> int:
        return max(map(len, self.continuations))


class ScoreJob(ReadJob):
    """Scores of continuations of one prompt or messages, or of whole texts, each from its second token on."""

    advice = "score shorter texts, or let the daemon use more memory"

    def __init__(self, model: Model, request: ActiveRequest, command: Message) -> None:
        """Raises OptionError."""
        super().__init__(model, request, command)
        self._top, self._beyond, self._pieces = command.get("top", 0), command.get("beyond", False), command.get("pieces", False)
        if not 0 <= self._top <= MAX_TOP:
            raise OptionError(f"top is {self._top}; the likeliest 0 to {MAX_TOP} tokens can be told")
        self._whole: Sequence[str | list[int]] = command.get("texts") or command.get("tokens") or ()
        self._units: list[_ScoreUnit] = []
        self._steps: Generator[Scored | None, int, None] | None = None
        self._found: list[Scored] = []

    @property
    def units(self) -> int:
        return len(self._whole) or 1

    def prepare(self) -> bool:
        model, command = self.model, self.command
        if self._whole:
            text = self._whole[len(self._units)]
            tokens = model.tokenize(text) if isinstance(text, str) else list(text)
            unit = _ScoreUnit(tokens[:1], [tokens[1:]])
        else:
            prompt = command["prompt"] if "prompt" in command else command["messages"]
            unit = _ScoreUnit(*model.continuations(prompt, command["continuations"]))
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
        before, continuations = self._units[unit]
        relieve = self.model.prefixes.clear
        self._steps = scoring(self.model.engine, before, continuations, top=self._top, beyond=self._beyond, relieve=relieve)
        self._found = []
        next(self._steps)

    def read(self, unit: int, room: int) -> Message | None:
        assert self._steps is not None, "begin comes first"
        found = self._steps.send(room)
        one = self._units[unit]
        if found is not None:
            self._found.append(found)
        if len(self._found) < len(one.continuations):
            return None
        self.close()
        scores = [self._as_message(one, *found) for found in zip(one.continuations, self._found, strict=True)]
        return {"event": "scored", "index": unit, "scores": scores}

    def _as_message(self, unit: _ScoreUnit, tokens: Sequence[int], found: Scored) -> Message:
        """Of a continuation. ``pieces``: the bytes of its tokens; ``first``: of a whole text's first, which has no score."""
        message: Message = {"tokens": list(tokens), "logprobs": found.logprobs.tolist()}
        if self._top:
            message["top"] = list(map(self._show_rivals, found.top))
        if self._beyond:
            message["beyond"] = self._show_rivals(found.beyond)
        if self._pieces:
            message["pieces"] = list(map(self._piece, tokens))
            if self._whole:
                message["first"] = self._piece(unit.before[0])
        return message

    def _show_rivals(self, rivals: Rivals) -> list[list[int | float | bytes]]:
        return [[token, logprob, self._piece(token)] if self._pieces else [token, logprob] for token, logprob in rivals]

    def _piece(self, token: int) -> bytes:
        return self.model.vocab.piece(token, special=True)

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def answer(self) -> Message:
        return {"tokens": sum(len(one.before) + sum(map(len, one.continuations)) for one in self._units)}


class ReadJobs:
    """All requests to read texts with one model. Not thread-safe: one thread adds and steps."""

    def __init__(
        self, model: Model, budget: MemoryBudget, queue: AdmissionQueue, send_event: Callable[[ActiveRequest, Message], object],
        ended: Callable[[Message, Exception | None, Message], None],
    ) -> None:  # fmt: skip
        """``queue``: in which texts wait for memory, as generations do. ``ended`` is called once for each command, with what went wrong
        or the answer.
        """
        self._model, self._budget, self._queue, self._send_event, self._ended = model, budget, queue, send_event, ended
        self._callbacks = QueueCallbacks(self._start, self._refuse, self._send_queued)
        self._jobs: deque[ReadJob] = deque()
        self._reader: TextReader | None = None
        self._current: ReadJob | None = None  # of which a unit waits for memory, or has it: one at a time
        self._waiting: QueuedRequest | None = None
        self._reservation: Reservation | None = None
        self._reading = False
        self._holds: ReadJob | None = None  # whose cells may be left for its next unit

    def add(self, request: ActiveRequest, command: Message) -> None:
        """Take up a request. Raises OptionError."""
        if command["op"] == "embed":
            self._reader = self._reader or TextReader(self._model.engine, self._model.prefixes.clear)
            self._jobs.append(EmbedJob(self._model, request, command, self._reader))
        else:
            self._jobs.append(ScoreJob(self._model, request, command))

    def step(self, room: int) -> bool:
        """Do a piece of the work, with at most ``room`` tokens for the engine; False if there is none that could be done."""
        cancelled = [job for job in self._jobs if job.request.cancelled]
        for job in cancelled:
            self._end(job, Cancelled("the request was cancelled"))
        if self._waiting is not None and not self._waiting.ready():  # whose unit waits and may send nothing holds up nobody
            self._leave_queue()
            self._current = None
        one = self._current or next((job for job in self._jobs if job.request.credits > 0), None)
        if one is None:
            self._rest()
        if one is None or not room:
            return bool(cancelled)
        try:
            if not one.prepared:
                one.prepared = one.prepare()
                return True
            if self._current is None:
                self._enqueue(one)
            if self._reservation is None:
                return bool(cancelled)  # those who hold the memory go on, and some end
            self._read(one, room)
        except Exception as error:
            self._rest()
            self._end(one, error)
        return True

    def _enqueue(self, job: ReadJob) -> None:
        """A unit's turn has come: it begins when there is memory for it, in one queue with those who generate."""
        request = job.request
        self._current = job
        self._waiting = QueuedRequest(
            job.command, job.need(job.done), None, self._callbacks, lambda: request.credits > 0, lambda: request.cancelled,
            advice=job.advice, notified=job.notified,
        )  # fmt: skip
        self._queue.add(self._waiting)
        self._queue.admit()

    def _start(self, waiting: QueuedRequest, room: int | None) -> None:
        budget, self._waiting = self._budget, None
        self._reservation = Reservation(waiting.need, None, budget.bytes(waiting.need, None) if budget.limited else 0)
        budget.reservations.append(self._reservation)

    def _refuse(self, waiting: QueuedRequest, error: Exception) -> None:
        self._waiting = None
        if self._current is not None:
            self._end(self._current, error)

    def _send_queued(self, waiting: QueuedRequest, event: Message) -> None:
        if self._current is not None:
            self._current.notified = True  # for all of its units
            self._send_event(self._current.request, event)

    def _leave_queue(self) -> None:
        if self._waiting is not None:
            self._queue.withdraw(self._waiting)
            self._waiting = None

    def _read(self, job: ReadJob, room: int) -> None:
        """A piece of the next unit. Raises what the engine does."""
        with self._model.lock:
            if not self._reading:
                if self._holds is not None and type(self._holds) is not type(job):
                    self._holds.close()
                self._holds = job
                job.begin(job.done)
                self._reading = True
            event = job.read(job.done, room)
        if event is None:
            return
        self._current, self._reading = None, False
        self._release()
        job.done += 1
        self._send_event(job.request, event)
        if job.done == job.units:
            self._end(job, None)
        else:
            self._jobs.remove(job)
            self._jobs.append(job)
            self._queue.admit()  # the unit's memory is free; the next may have no credits to ask for it

    def _release(self) -> None:
        if self._reservation is not None:
            self._budget.reservations.remove(self._reservation)
            self._reservation = None

    def _end(self, job: ReadJob, error: Exception | None) -> None:
        self._jobs.remove(job)
        if job is self._current:
            self._rest()
        self._ended(job.command, error, job.answer() if error is None else {})

    def _rest(self) -> None:
        """Read no further, and free the cells."""
        self._leave_queue()
        self._current, self._reading = None, False
        self._release()
        if self._holds is not None:
            with self._model.lock:
                self._holds.close()
            self._holds = None
