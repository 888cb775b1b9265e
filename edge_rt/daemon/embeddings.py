"""Embeddings in the worker: texts are read a piece at a time, between the steps of those who generate.

One text is read at a time, whoever's it is, so that one text's cells are all the memory this takes. Requests take turns text by text.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edge_rt.core.decode.embedding import Pooling, TextReader, finished, pooling_of, tokens_of
from edge_rt.daemon import admission
from edge_rt.daemon.account import Need, Promise
from edge_rt.daemon.frames import Message
from edge_rt.errors import Cancelled, ProtocolError
from edge_rt.sizes import shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edge_rt.core.decode.embedding import Vector
    from edge_rt.daemon.account import Account
    from edge_rt.daemon.generations import Asked
    from edge_rt.runtime import Model

AT_ONCE = 1 << 14
"""Characters of texts that are tokenised between two steps; a longer text is tokenised whole."""

Say = Callable[["Asked", Message], object]
"""Sends an event of a request, which takes one of its credits."""
Ended = Callable[[Message, "Exception | None", Message], None]
"""Told once for each command: with what went wrong, or with the answer."""


@dataclass(eq=False)
class _Request:
    """A command under way. ``tokens``: of the texts that were tokenised so far; when those are all, ``done`` counts embeddings."""

    asked: Asked
    command: Message
    pooling: Pooling
    texts: Sequence[str | Sequence[int]]
    tokens: list[list[int]] = field(default_factory=list)
    done: int = 0
    width: int = 0


class Embeddings:
    """All requests for embeddings of one model. Not thread-safe: one thread adds and steps."""

    def __init__(self, model: Model, account: Account, say: Say, ended: Ended, short: Callable[[int], None] = lambda short: None) -> None:
        """``short`` tells the daemon by how many bytes the allowance is too small for a text."""
        self._model, self._account, self._say, self._ended, self._short = model, account, say, ended, short
        self.due: float | None = None
        """When ``step`` is to be called at the latest, on the monotonic clock: a text that waits for a larger allowance is refused then."""
        self._requests: deque[_Request] = deque()
        self._reader: TextReader | None = None
        self._reading: _Request | None = None
        self._promise: Promise | None = None

    def add(self, asked: Asked, command: Message) -> None:
        """Take up a request. Raises OptionError."""
        pooling = pooling_of(self._model.file.header, command.get("pooling"))
        self._reader = self._reader or TextReader(self._model.engine, self._model.prefixes.clear)
        self._requests.append(_Request(asked, command, pooling, command.get("texts") or command["tokens"]))

    def allowed(self) -> None:
        """The allowance was set, for a text too that hoped for more of it."""
        if self.due is not None:
            self.due = 0.0

    def step(self, room: int) -> bool:
        """Do a piece of the work, with at most ``room`` tokens for the engine; False if there is none that could be done."""
        moved = self._stop_cancelled()
        one = self._reading or self._next()
        if one is None:
            self._rest()
        if one is None or not room:
            return moved
        try:
            if len(one.tokens) < len(one.texts):
                self._tokenize(one)
            elif self._reading is not None or self._has_room(len(one.tokens[one.done])):
                self._read(one, room)
            else:
                return moved  # those who hold the memory go on, and some end
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

    def _has_room(self, tokens: int) -> bool:
        """Whether there is memory for a text now: it is promised then. Raises ProtocolError: out_of_memory if there will never be."""
        account, need = self._account, Need(tokens, tokens)
        if account.limited:
            if not account.free_for(need, None):
                if account.promises:
                    return False
                needed, missing = account.bytes(need, None), account.missing(need, None)
                if self._hopes(missing):
                    return False
                available = max(0, needed - missing)
                raise ProtocolError(
                    "out_of_memory",
                    f"a text of {tokens} tokens needs {shown(needed)} of memory and can have {shown(available)}; embed a shorter one",
                    needed=needed, available=available,
                )  # fmt: skip
            self.due = None
            self._promise = Promise(need, None, account.bytes(need, None))
            account.promises.append(self._promise)
        return True

    def _hopes(self, missing: int) -> bool:
        """Whether the daemon may allow more yet, which it is asked for once."""
        if self.due is None:
            self.due = time.monotonic() + admission.PATIENCE
            self._short(missing)
        return time.monotonic() < self.due

    def _read(self, one: _Request, room: int) -> None:
        """A piece of the next text. Raises what the engine does."""
        assert self._reader is not None, "it was made with the first request"
        with self._model.lock:
            if self._reading is None:
                self._reader.begin(one.tokens[one.done], one.pooling)
                self._reading = one
            pooled = self._reader.read(room)
        if pooled is not None:
            self._reading = None
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

    def _end(self, one: _Request, error: Exception | None) -> None:
        self._requests.remove(one)
        self.due = None
        if one is self._reading:
            self._rest()
        answer = {"pooling": one.pooling, "dimensions": one.width, "tokens": sum(map(len, one.tokens))} if error is None else {}
        self._ended(one.command, error, answer)

    def _rest(self) -> None:
        """Read no further, and free the cells."""
        self._reading = None
        self._unpromise()
        if self._reader is not None:
            with self._model.lock:
                self._reader.close()
