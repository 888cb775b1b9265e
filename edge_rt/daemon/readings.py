"""Texts that are read and not continued, in the worker: a piece at a time, between the steps of those who generate.

One text is read at a time, whoever's it is, so that one text's cells are all the memory this takes. Requests take turns text by text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edge_rt.core.generate.scoring import TextReader
from edge_rt.daemon.account import Need, Promise
from edge_rt.daemon.admission import Asker, Waiting
from edge_rt.daemon.embeddings import Embedding
from edge_rt.daemon.frames import Message
from edge_rt.daemon.scores import Scoring
from edge_rt.errors import Cancelled

if TYPE_CHECKING:
    from edge_rt.daemon.account import Account
    from edge_rt.daemon.admission import Line
    from edge_rt.daemon.generations import Asked
    from edge_rt.model import Model

Say = Callable[["Asked", Message], object]
"""Sends an event of a request, which takes one of its credits."""
Ended = Callable[[Message, "Exception | None", Message], None]
"""Told once for each command: with what went wrong, or with the answer."""


class Work(Protocol):
    """What a request wants of its texts, unit by unit: an event each. ``begin``, ``read`` and ``close`` hold the engine's lock.

    ``advice``: what to do if a unit never fits into memory.
    """

    advice: str

    @property
    def units(self) -> int:
        """How many there are."""
        ...

    def prepare(self) -> bool:
        """Tokenise some, so that those who generate need not wait for many; True when all are. Raises what is wrong with them."""
        ...

    def need(self, unit: int) -> Need:
        """What reading one takes."""
        ...

    def begin(self, unit: int) -> None:
        """Start with one. Raises OutOfMemory."""
        ...

    def read(self, unit: int, room: int) -> Message | None:
        """Read at most so many tokens further; its event, if that was all. Raises what the engine does."""
        ...

    def close(self) -> None:
        """Free the cells."""
        ...

    def answer(self) -> Message:
        """After the last event."""
        ...


@dataclass(eq=False)
class _Request:
    """A command under way. ``ready``: its texts are tokenised. ``done``: units of it. ``told``: that it waits for memory."""

    asked: Asked
    command: Message
    work: Work
    ready: bool = False
    told: bool = False
    done: int = 0


class Readings:
    """All requests to read texts with one model. Not thread-safe: one thread adds and steps."""

    def __init__(self, model: Model, account: Account, line: Line, say: Say, ended: Ended) -> None:
        """``line``: in which texts wait for memory, as generations do."""
        self._model, self._account, self._line, self._say, self._ended = model, account, line, say, ended
        self._requests: deque[_Request] = deque()
        self._reader: TextReader | None = None
        self._turn: _Request | None = None  # of which a unit waits for memory, or has it: one at a time
        self._waiting: Waiting | None = None
        self._promise: Promise | None = None
        self._reading = False
        self._holds: Work | None = None  # whose cells may be left for its next unit

    def add(self, asked: Asked, command: Message) -> None:
        """Take up a request. Raises OptionError."""
        self._requests.append(_Request(asked, command, _WORK[command["op"]](self, command)))

    def _embedding(self, command: Message) -> Work:
        self._reader = self._reader or TextReader(self._model.engine, self._model.prefixes.clear)
        return Embedding(self._model, command, self._reader)

    def _scoring(self, command: Message) -> Work:
        return Scoring(self._model, command)

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

    def _next(self) -> _Request | None:
        """Whose turn it is: the first that may send what is made for it."""
        return next((one for one in self._requests if one.asked.credits > 0), None)

    def _stop_cancelled(self) -> bool:
        gone = [one for one in self._requests if one.asked.cancelled]
        for one in gone:
            self._end(one, Cancelled("the request was cancelled"))
        return bool(gone)

    def _ask(self, one: _Request) -> None:
        """A unit's turn has come: it begins when there is memory for it, in one line with those who generate."""
        asked = one.asked
        self._turn = one
        self._waiting = Waiting(
            one.command, [], {}, one.work.need(one.done), None, lambda: asked.credits > 0, lambda: asked.cancelled,
            asker=Asker(self._start, self._refuse, self._queued), told=one.told, advice=one.work.advice,
        )  # fmt: skip
        self._line.add(self._waiting)
        self._line.admit()

    def _start(self, waiting: Waiting, room: int | None) -> None:
        account, self._waiting = self._account, None
        self._promise = Promise(waiting.need, None, account.bytes(waiting.need, None) if account.limited else 0)
        account.promises.append(self._promise)

    def _refuse(self, waiting: Waiting, error: Exception) -> None:
        self._waiting = None
        if self._turn is not None:
            self._end(self._turn, error)

    def _queued(self, waiting: Waiting, event: Message) -> None:
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

    def _read(self, one: _Request, room: int) -> None:
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

    def _made(self, one: _Request, event: Message) -> None:
        one.done += 1
        self._say(one.asked, event)
        if one.done == one.work.units:
            self._end(one, None)
        else:
            self._requests.remove(one)
            self._requests.append(one)
            self._line.admit()  # the unit's memory is free; the next may have no credits to ask for it

    def _end(self, one: _Request, error: Exception | None) -> None:
        self._requests.remove(one)
        if one is self._turn:
            self._rest()
        self._ended(one.command, error, one.work.answer() if error is None else {})

    def _rest(self) -> None:
        """Read no further, and free the cells."""
        self._leave_line()
        self._turn, self._reading = None, False
        self._unpromise()
        if self._holds is not None:
            with self._model.lock:
                self._holds.close()
            self._holds = None


_WORK: Mapping[str, Callable[[Readings, Message], Work]] = {"embed": Readings._embedding, "score": Readings._scoring}
