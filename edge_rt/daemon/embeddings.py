"""Embeddings in the worker: texts are read a piece at a time, between the steps of those who generate.

One text is read at a time, whoever's it is, so that one text's cells are all the memory this takes. Requests take turns text by text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge_rt.core.decode.embedding import Pooling, TextReader, finished, pooling_of, tokens_of
from edge_rt.daemon.account import Need, Promise
from edge_rt.daemon.admission import Asker, Waiting
from edge_rt.daemon.frames import Message
from edge_rt.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_rt.core.decode.embedding import Vector
    from edge_rt.daemon.account import Account
    from edge_rt.daemon.admission import Line
    from edge_rt.daemon.generations import Asked
    from edge_rt.runtime import Model

AT_ONCE = 1 << 14
"""Characters of texts that are tokenised between two steps; a longer text is tokenised whole."""
_ADVICE = "embed a shorter text, or let the daemon use more memory"

Say = Callable[["Asked", Message], object]
"""Sends an event of a request, which takes one of its credits."""
Ended = Callable[[Message, "Exception | None", Message], None]
"""Told once for each command: with what went wrong, or with the answer."""


@dataclass(eq=False)
class _Request:
    """A command under way. ``told``: that it waits for memory.

    ``tokens``: of the texts that were tokenised so far; when those are all, ``done`` counts embeddings.
    """

    asked: Asked
    command: Message
    pooling: Pooling
    texts: Sequence[str | Sequence[int]]
    tokens: list[list[int]] = field(default_factory=list)
    told: bool = False
    done: int = 0
    width: int = 0


class Embeddings:
    """All requests for embeddings of one model. Not thread-safe: one thread adds and steps."""

    def __init__(self, model: Model, account: Account, line: Line, say: Say, ended: Ended) -> None:
        """``line``: in which texts wait for memory, as generations do."""
        self._model, self._account, self._line, self._say, self._ended = model, account, line, say, ended
        self._requests: deque[_Request] = deque()
        self._reader: TextReader | None = None
        self._turn: _Request | None = None  # of which a text waits for memory, or has it: one at a time
        self._waiting: Waiting | None = None
        self._promise: Promise | None = None
        self._reading = False

    def add(self, asked: Asked, command: Message) -> None:
        """Take up a request. Raises OptionError."""
        pooling = pooling_of(self._model.file.header, command.get("pooling"))
        self._reader = self._reader or TextReader(self._model.engine, self._model.prefixes.clear)
        self._requests.append(_Request(asked, command, pooling, command.get("texts") or command["tokens"]))

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
            if len(one.tokens) < len(one.texts):
                self._tokenize(one)
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

    def _tokenize(self, one: _Request) -> None:
        """Some of the texts, so that those who generate need not wait for many. Raises what ``tokens_of`` does."""
        model, seen = self._model, 0
        while len(one.tokens) < len(one.texts) and seen < AT_ONCE:
            text = one.texts[len(one.tokens)]
            one.tokens.append(tokens_of(model.vocab, text, len(one.tokens), model.info.max_context))
            seen += len(text)

    def _ask(self, one: _Request) -> None:
        """A text's turn has come: it begins when there is memory for it, in one line with those who generate."""
        tokens, asked = one.tokens[one.done], one.asked
        self._turn = one
        self._waiting = Waiting(
            one.command, tokens, {}, Need(len(tokens), len(tokens)), None, lambda: asked.credits > 0, lambda: asked.cancelled,
            asker=Asker(self._start, self._refuse, self._queued), told=one.told, advice=_ADVICE,
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
            self._turn.told = True  # for all of its texts
            self._say(self._turn.asked, event)

    def _let_pass(self) -> None:
        """Whose text waits and may send nothing holds up nobody."""
        if self._waiting is not None and not self._waiting.ready():
            self._leave_line()
            self._turn = None

    def _leave_line(self) -> None:
        if self._waiting is not None:
            self._line.withdraw(self._waiting)
            self._waiting = None

    def _read(self, one: _Request, room: int) -> None:
        """A piece of the next text. Raises what the engine does."""
        assert self._reader is not None, "it was made with the first request"
        with self._model.lock:
            if not self._reading:
                self._reader.begin(one.tokens[one.done], one.pooling)
                self._reading = True
            pooled = self._reader.read(room)
        if pooled is not None:
            self._turn, self._reading = None, False
            self._unpromise()
            self._made(one, pooled)

    def _unpromise(self) -> None:
        if self._promise is not None:
            self._account.promises.remove(self._promise)
            self._promise = None

    def _made(self, one: _Request, pooled: Vector) -> None:
        command = one.command
        vector = finished(pooled, normalize=command.get("normalize", True), dimensions=command.get("dimensions"))
        index, one.done, one.width = one.done, one.done + 1, len(vector)
        self._say(one.asked, {"event": "embedding", "index": index, "embedding": vector.tolist(), "tokens": len(one.tokens[index])})
        if one.done == len(one.texts):
            self._end(one, None)
        else:
            self._requests.remove(one)
            self._requests.append(one)
            self._line.admit()  # the text's memory is free; the next may have no credits to ask for it

    def _end(self, one: _Request, error: Exception | None) -> None:
        self._requests.remove(one)
        if one is self._turn:
            self._rest()
        answer = {"pooling": one.pooling, "dimensions": one.width, "tokens": sum(map(len, one.tokens))} if error is None else {}
        self._ended(one.command, error, answer)

    def _rest(self) -> None:
        """Read no further, and free the cells."""
        self._leave_line()
        self._turn, self._reading = None, False
        self._unpromise()
        if self._reader is not None:
            with self._model.lock:
                self._reader.close()
