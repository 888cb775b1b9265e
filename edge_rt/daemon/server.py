"""The daemon: its sockets, its clients, and what they share. It runs in an asyncio loop and needs neither NumPy nor a native library."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_rt import __version__
from edge_rt.daemon import address as addresses
from edge_rt.daemon.address import Listener
from edge_rt.daemon.bucket import Bucket
from edge_rt.daemon.channel import Channel
from edge_rt.daemon.config import Config, Http
from edge_rt.daemon.connection import Connection
from edge_rt.daemon.door import Door
from edge_rt.daemon.exchange import Exchange
from edge_rt.daemon.frames import Message
from edge_rt.daemon.hosted import Hosted
from edge_rt.daemon.measures import Measures, count_done
from edge_rt.daemon.models import Models, check_name, most_of_what_is_free
from edge_rt.daemon.process import Ended, Took
from edge_rt.daemon.sessions import Known, Sessions
from edge_rt.daemon.shares import Shares
from edge_rt.daemon.streams import Stream
from edge_rt.daemon.supervisor import Spec
from edge_rt.daemon.tasks import Tasks
from edge_rt.errors import ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.protocol import Request
    from edge_rt.daemon.traffic.recorder import Recorder

TOO_MANY = "there are too many connections; close one, or come back later"
FAULTS, DEAF_SECONDS = 200, 1.0
"""Refused requests of a user a second from which on its connections are not heard for a while after each, and for how long at most."""
CANCEL_SECONDS = 2.0
"""Seconds that requests have to end after they were cancelled because the daemon ends."""


class Server:
    """``listen``, then ``drain`` or ``close``."""

    def __init__(self, config: Config, recorder: Recorder | None = None) -> None:
        self.config, self.recorder = config, recorder
        self.models = Models(
            config.memory or most_of_what_is_free(), config.hung_after, config.cool_after, config.wait_for_memory,
            config.state, self._changed, self._told,
        )  # fmt: skip
        self.sessions = Sessions(config.limits.sessions_per_user, config.keep_sessions, self._forget_session)
        self.draining = False
        self._connections: set[Channel] = set()
        self._streams: dict[str, Stream] = {}  # that can be resumed, by token
        self._running: set[Stream] = set()
        self.shares = Shares(config.limits)
        self._listeners: list[tuple[Listener, Door]] = []
        self._faults: dict[int, Bucket] = {}  # by user
        self.counts = {what: Counter[str]() for what in ("requests", "http", "errors", "connections", "tokens", "context")}
        """How often what happened, since the start."""
        if recorder is not None:
            self.counts["recording"] = recorder.counts
        self.measures = Measures()
        self._started = time.time()
        self.tasks = Tasks()
        self.exchange = Exchange(self.models, self.spec, self.tasks)

    @staticmethod
    def now() -> float:
        """Seconds on the loop's clock."""
        return asyncio.get_running_loop().time()

    async def listen(self, listeners: Sequence[Listener]) -> None:
        """Let clients in, and load the model of the configuration."""
        speaks: dict[bool, Callable[[], Channel]] = {False: partial(Connection, self)}
        if any(one.http for one in listeners):
            from edge_rt.daemon.http.connection import HttpConnection

            speaks[True] = partial(HttpConnection, self, self.config.http or Http(), {})
        for one in listeners:
            one.socket.setblocking(False)
            limits = self.config.limits
            self._listeners.append((one, Door(one.socket, speaks[one.http], limits.connections_per_second, limits.connections)))
        for name, (model, options) in self.config.models.items():
            self.models.know(name, self.spec(model, options))
        if self.config.model is not None:
            spec = self.spec(self.config.model, self.config.model_options)
            check_name(self.config.model, spec, self.config.models)
            self.models.load(self.models.know_default(self.config.model, spec))

    def spec(self, model: str, options: dict[str, Any]) -> Spec:
        """What a worker is to open. Raises ModelFileError if there is no such model."""
        from edge_rt.model_hub import resolve_model

        return Spec(str(resolve_model(model).absolute()), options, self.config.rules)

    # ---- clients -----------------------------------------------------------------------------------------------------

    def enter(self, connection: Channel, user: int | None) -> None:
        """A client has connected. Raises ProtocolError if it may not stay."""
        self.count("connections", "all")
        if user is None or (user >= 0 and user not in self.config.users):
            self.count("errors", "not_allowed")
            raise ProtocolError("not_allowed", "you may not use this daemon; whoever runs it can add you to its users")
        if self.draining or len(self._connections) >= self.config.limits.connections or self._crowded(user):
            self.count("errors", "limit")
            raise ProtocolError("limit", TOO_MANY)
        connection.user = user
        self._connections.add(connection)

    def become(self, connection: Channel, user: int) -> None:
        """A client has shown which user it is, for its next requests. Raises ProtocolError: limit."""
        if user != connection.user:
            if self._crowded(user):
                raise ProtocolError("limit", TOO_MANY)
            if connection.user is not None:
                self.shares.move(connection.held, connection.user, user)
            connection.user = user

    def _crowded(self, user: int) -> bool:
        return sum(one.user == user for one in self._connections) >= self.config.limits.connections_per_user

    def fault(self, user: int | None) -> float:
        """A client has asked for what cannot be. Returns seconds for which it is not heard: more than 0 if its user does so often."""
        if user is None:
            return 0.0
        if user not in self._faults:
            self._faults[user] = Bucket(FAULTS, 2 * FAULTS, self.now())
        return self._faults[user].owe(self.now(), DEAF_SECONDS)

    def left(self, connection: Channel) -> None:
        """A client has gone: nobody works for it any more, unless it may come back for a stream."""
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        self.hold(connection, -connection.held)
        for stream in list(connection.streams.values()):
            stream.connection = None
            if stream.token is None or self.draining:
                self._abandon(stream)
            else:
                stream.expiry = asyncio.get_running_loop().call_later(self.config.resume_within, self._abandon, stream)
        connection.streams.clear()
        for withdraw in list(connection.withdraw.values()):
            withdraw()
        self.sessions.left(connection)

    def hold(self, connection: Channel, more: int) -> None:
        """A client's bytes are held, or (less than 0) no more. Raises ProtocolError: limit."""
        if connection.user is not None:  # else it was not let in, and nothing of it is kept
            self.shares.hold(connection.user, more)
            connection.held += more

    def count(self, what: str, kind: str, more: int = 1) -> None:
        """Note that something happened."""
        self.counts[what][kind] += more

    # ---- the worker --------------------------------------------------------------------------------------------------

    def call(self, user: int, hosted: Hosted, command: Message, took: Took, *, awaits: bool = True) -> int:
        """Let a model's worker answer a user; see ``Models.call``. Raises ProtocolError."""
        self.shares.begin(user)

        def answered(message: Message) -> None:
            if "event" not in message:
                self.shares.end(user)
            took(message)

        try:
            return self.models.call(hosted, command, answered, awaits=awaits)
        except BaseException:
            self.shares.end(user)
            raise

    def _forget_session(self, one: Known) -> None:
        if one.epoch == one.hosted.supervisor.epoch:
            one.hosted.supervisor.tell({"op": "close_session", "session": one.id})

    # ---- streams -----------------------------------------------------------------------------------------------------

    def generate(
        self, connection: Channel, request: Request, size: int, hosted: Hosted, command: Message, session: Known | None
    ) -> None:  # fmt: skip
        """Start a generation, or whatever else answers with events. Raises ProtocolError."""
        assert request.id is not None, "only ack has none"
        assert connection.user is not None, "nobody else comes as far as this"
        number, credits = request.id, self.config.credits
        resumable = request.fields.get("resumable", False)
        stream = Stream(connection.user, resumable, credits, lambda events: self._credit(stream, events))
        if self.recorder is not None and request.op == "generate":
            stream.taken = self.recorder.take(connection, request.fields, size, hosted, session)
        stream.hosted = hosted
        try:
            connection.begin(number, size)
            stream.number = self.call(connection.user, hosted, {**command, "credits": credits}, partial(self._streamed, stream, session))
        except ProtocolError as error:
            if stream.taken is not None:
                stream.taken.ended(error.code)
            raise
        connection.waiting.discard(number)
        stream.request, stream.connection, stream.moved = number, connection, self.now()
        connection.streams[number] = stream
        self._running.add(stream)
        if session is not None:
            session.busy = True
        if stream.token is not None:
            self._streams[stream.token] = stream
            connection.send({"id": number, "event": "stream", "stream": stream.token})

    def _credit(self, stream: Stream, events: int) -> None:
        stream.hosted.supervisor.tell({"op": "resume", "request": stream.number, "events": events})

    def _streamed(self, stream: Stream, session: Known | None, message: Message) -> None:
        """The worker says something of a generation."""
        if session is not None and "error" in message:
            message = {**message, "error": session.explained(message["error"])}
        if stream.taken is not None:
            stream.taken.heard(message)
        if message.get("event") == "delta":
            self.measures.tokens(stream, len(message["tokens"]) + message.get("concealed", 0), self.now())
        elif message.get("event") == "embedding":
            self.count("tokens", "embedded_tokens", message["tokens"])
        elif message.get("event") == "scored":
            self.count("tokens", "scored_tokens", sum(len(one["tokens"]) for one in message["scores"]))
        elif message.get("event") == "done":
            count_done(self.counts, message)
        sent = stream.add(message)
        connection = stream.connection
        if connection is not None:
            connection.deliver(stream, sent)
        if stream.ended:
            self._running.discard(stream)
            if session is not None:
                session.busy = False
            if "error" in message:
                self.count("errors", message["error"]["code"])
            self._settle(stream)

    def _settle(self, stream: Stream) -> None:
        """Forget a stream of which nothing more will be asked."""
        if not stream.over:
            return
        if stream.connection is not None:
            stream.connection.streams.pop(stream.request, None)
            stream.connection.done(stream.request)
        if stream.token is not None:
            self._streams.pop(stream.token, None)
        if stream.expiry is not None:
            stream.expiry.cancel()

    def _abandon(self, stream: Stream) -> None:
        """Nobody will come for a stream any more."""
        stream.left()
        if stream.token is not None:
            self._streams.pop(stream.token, None)
        if not stream.ended:
            stream.hosted.supervisor.cancel(stream.number, drop=True)

    def resume(self, connection: Channel, request: Request) -> None:
        """Go on with a stream on another connection. Raises ProtocolError."""
        assert request.id is not None, "only ack has none"
        stream = self._stream(connection, request.fields["stream"])
        if stream is None:
            raise ProtocolError("no_such_stream", "there is no such stream, or not any more; ask anew")
        if connection is not stream.connection:
            connection.begin(request.id, 0)
            connection.waiting.discard(request.id)
        held = stream.after(request.fields["after"])
        before = stream.connection
        if before is not None:  # it does not know yet that it is gone
            before.streams.pop(stream.request, None)
            before.done(stream.request)
            before.refuse(stream.request, ProtocolError("moved", "the stream goes on elsewhere"))
        if stream.expiry is not None:
            stream.expiry.cancel()
        stream.connection, stream.request = connection, request.id
        connection.streams[request.id] = stream
        for message in held:
            connection.send({**message, "id": request.id})
        if stream.over:  # the client has it all, and wants to hear so
            connection.answer(request.id, {})
            self._settle(stream)

    def acknowledge(self, connection: Channel, token: str, seq: int) -> None:
        """A client has the events of a stream up to this one."""
        stream = self._stream(connection, token)
        if stream is not None:
            stream.acknowledge(seq)
            self._settle(stream)

    def _stream(self, connection: Channel, token: str) -> Stream | None:
        stream = self._streams.get(token)
        return stream if stream is not None and stream.user == connection.user else None

    # ---- facts -------------------------------------------------------------------------------------------------------

    def status(self) -> Message:
        """What is the case now."""
        models = self.models.status()
        default = next((one for one in models if one["default"]), None)
        rules = [one.supervisor.rules for one in (*self.models.loaded(), *self.models) if one.supervisor.rules is not None]
        return {
            "server": {"version": __version__, "pid": os.getpid(), "uptime": time.time() - self._started, "draining": self.draining,
                       "connections": len(self._connections), "sessions": len(self.sessions), "requests": self.shares.requests,
                       "held_bytes": self.shares.held, "memory": self.models.budget, "memory_free": self.models.free},
            "worker": default["worker"] if default else {"state": "none", "reason": "", "pid": None, "deaths": 0},
            "model": default and default["model"],
            "models": models,
            "rules": rules[0] if rules else None,
            "recording": self.recorder.status() if self.recorder is not None else None,
        }  # fmt: skip

    def health(self) -> str:
        """What the default model is at, in a word: ``asleep`` is one that comes into memory with its next request."""
        if self.draining:
            return "draining"
        state = self.models.find().supervisor.state if self.models.default else None
        return "none" if state is None else "asleep" if state == "none" else state

    def metrics(self) -> Message:
        """Counts since the start."""
        return {
            **{what: dict(counts) for what, counts in self.counts.items()},
            "worker_deaths": self.models.deaths, "evictions": self.models.evictions, "uptime": time.time() - self._started,
        }  # fmt: skip

    def _changed(self, hosted: Hosted) -> None:
        """A worker's state is another."""
        worker = hosted.supervisor
        said = f"worker {worker.state}" + (f": {worker.reason}" if worker.reason else "")
        logging.getLogger("edge_rt.daemon").info(said)
        addresses.notify(f"STATUS={said}")

    def _told(self, hosted: Hosted, message: Message) -> None:
        """A worker says something of a session: it was parked, from where it can be restored if the worker is no more."""
        if "parked" in message:
            self.sessions.parked(message["parked"], Path(message["path"]))

    def reload_rules(self, but: Hosted | None = None) -> None:
        """Read the rules again, all have the same file; whether that could be is in the status. ``but``: who is asked already."""
        for one in self.models.loaded():  # others read them when they start
            if one is but:
                continue
            one.supervisor.call({"op": "reload_rules"}, lambda message: None)

    # ---- the end -----------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Let nobody in, and let what is under way come to its end, for a while."""
        self.draining = True
        addresses.notify("STOPPING=1")
        self.stop_listening()
        for stream in [one for one in self._running if one.connection is None]:
            self._abandon(stream)
        await self._quiet(self.config.drain_seconds)
        for stream in list(self._running):
            stream.hosted.supervisor.cancel(stream.number)
        await self._quiet(CANCEL_SECONDS)

    async def _quiet(self, seconds: float) -> None:
        until = self.now() + seconds
        while (self.shares.requests or self.tasks) and self.now() < until:
            await asyncio.sleep(0.02)

    def stop_listening(self) -> None:
        """Let nobody in any more."""
        for one, door in self._listeners:
            door.close()
            one.close()
        self._listeners.clear()

    async def close(self) -> None:
        """End everything."""
        self.draining = True
        self.stop_listening()
        await self.models.close(Ended("draining", "the daemon has ended; ask again when it is back"))
        for connection in list(self._connections):
            connection.close()
        until = self.now() + 1.0
        while self._connections and self.now() < until:
            await asyncio.sleep(0.01)
