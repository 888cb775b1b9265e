"""The operations of the protocol. Those that need a model are forwarded to its worker."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt import __version__
from edge_rt.daemon import protocol
from edge_rt.daemon.address import notify_systemd
from edge_rt.daemon.connection import ClientConnection, EventStream, TokenBucket
from edge_rt.daemon.metrics import Metrics, count_finished
from edge_rt.daemon.models import ManagedModel, ModelManager, default_memory_budget, model_name
from edge_rt.daemon.protocol import MAX_DEPTH, Message, Request
from edge_rt.daemon.sessions import (
    ClientSession,
    SessionRegistry,
    delete_saved_session,
    list_saved_sessions,
    no_saved_session,
    saved_session_path,
)
from edge_rt.daemon.supervisor import ReplyHandler, TaskSet, WorkerSpec, now
from edge_rt.errors import EdgeError, ProtocolError
from edge_rt.types import PRIORITIES

if TYPE_CHECKING:
    from edge_rt.daemon.config import Config, Limits
    from edge_rt.daemon.recording import Recorder

TOO_MANY = "there are too many connections; close one, or come back later"
FAULTS, DEAF_SECONDS = 200, 1.0
"""Refused requests per second of one user above which a connection is not read for a while after each, and the longest such pause."""
RATINGS = (-1, 0, 1)
_WHILE_DRAINING = ("hello", "status", "metrics", "cancel", "ack", "resume", "close_session")
_FEEDBACK_ERRORS = {
    "dropped_queue": ("limit", "there is no room for more that is to be recorded; send the feedback again a little later"),
    "dropped_redaction": ("failed", "the feedback could not be redacted, and is not recorded as it is; the daemon's log says more"),
    "dropped_form": ("failed", "the feedback has numbers that JSON has not; leave them out"),
    "dropped_disk": ("failed", "the file of recorded traffic cannot be written; the daemon's status says why"),
}
"""Code and message of the errors by ``RESULTS`` of recording/trace.py. ``dropped_end`` has none: nobody is connected any more."""


class UserQuotas:
    """Limits per user and in total on pending ``requests`` and on ``held`` bytes of incomplete or unanswered requests."""

    def __init__(self, limits: Limits) -> None:
        self.requests = self.held = 0
        self._limits = limits
        self._requests: Counter[int] = Counter()
        self._held: Counter[int] = Counter()

    def begin(self, user: int) -> None:
        """Count a request until ``end``. Raises ProtocolError: limit for this user, busy for all."""
        if self._requests[user] >= (most := self._limits.requests_per_user):
            raise ProtocolError("limit", f"a user may have {most} requests under way; wait for one")
        if self.requests >= self._limits.requests:
            raise ProtocolError("busy", "as many requests are under way as may be; ask again a little later")
        self.requests += 1
        self._requests[user] += 1

    def end(self, user: int) -> None:
        self.requests -= 1
        self._requests[user] -= 1
        if not self._requests[user]:
            del self._requests[user]

    def hold(self, user: int, more: int) -> None:
        """Add bytes to those held for a user; a negative number releases them. Raises ProtocolError: limit."""
        if more > 0 and self._held[user] + more > (most := self._limits.held_bytes_per_user):
            raise ProtocolError("limit", f"a user may have {most:,} bytes of requests that were not answered yet; wait for some")
        if more > 0 and self.held + more > self._limits.held_bytes:
            raise ProtocolError("limit", "the daemon holds as much of requests as it may; ask again a little later")
        self.held += more
        self._held[user] += more
        if not self._held[user]:
            del self._held[user]

    def move(self, held: int, before: int, after: int) -> None:
        """Move held bytes from one user to another. Raises ProtocolError: limit, and then nothing is moved."""
        self.hold(before, -held)
        try:
            self.hold(after, held)
        except ProtocolError:
            self.hold(before, held)
            raise


class ModelLoader:
    """Loads and unloads models for clients, one at a time. ``spec`` makes the worker's specification of a model that a client names."""

    def __init__(self, models: ModelManager, spec: Callable[[str, dict[str, Any]], WorkerSpec], tasks: TaskSet) -> None:
        self._models, self._spec, self._tasks = models, spec, tasks
        self._task: asyncio.Task[None] | None = None

    def load(self, connection: ClientConnection, request: Request, model: str, options: dict[str, Any]) -> None:
        """Load a model and make it the default. The request is answered when the worker starts. Raises ProtocolError, ModelFileError."""
        spec = self._spec(model, options)
        before = self._models.find_named(model_name(model, spec))

        async def work() -> Message:
            if before is not None:
                await self._models.unload(before)
            self._models.load(self._models.add_default(model, spec))
            return {"model": spec.model}

        self._begin(connection, request, before, work)

    def unload(self, connection: ClientConnection, request: Request, hosted: ManagedModel) -> None:
        """End a model's worker and remove the model. Raises ProtocolError: busy."""

        async def work() -> Message:
            await self._models.unload(hosted)
            self._models.forget(hosted)
            return {}

        self._begin(connection, request, hosted, work)

    def _begin(
        self, connection: ClientConnection, request: Request, hosted: ManagedModel | None, work: Callable[[], Awaitable[Message]]
    ) -> None:
        """Raises ProtocolError while the model has pending requests or another model is being loaded or unloaded."""
        if (hosted is not None and not hosted.idle) or (self._task is not None and not self._task.done()):
            raise ProtocolError("busy", "requests are under way; wait for them, or cancel them")

        async def answer() -> None:
            try:
                found = await work()
            except Exception as error:
                if not isinstance(error, EdgeError):
                    logging.getLogger("edge_rt.daemon").error("%s failed", request.op, exc_info=error)
                connection.refuse(request.id, error)
            else:
                connection.answer(request.id, found)

        self._task = self._tasks.spawn(answer())


class Call(NamedTuple):
    """A request with its connection, and its ``size`` in bytes."""

    connection: ClientConnection
    request: Request
    size: int

    @property
    def fields(self) -> Mapping[str, Any]:
        return self.request.fields

    @property
    def number(self) -> int:
        assert self.request.id is not None, "only ack has none"
        return self.request.id

    @property
    def user(self) -> int:
        return self.connection.known_user

    def answer(self, result: Message) -> None:
        self.connection.answer(self.request.id, result)

    def without(self, *names: str) -> Message:
        return {name: value for name, value in self.fields.items() if name not in names}


class Operations:
    """The state that clients share, and one method ``_do_OP`` per operation of the protocol."""

    def __init__(self, config: Config, recorder: Recorder | None = None) -> None:
        self.config, self.recorder, self.draining = config, recorder, False
        self.models = ModelManager(
            config.memory or default_memory_budget(), config.hung_after, config.cool_after, config.wait_for_memory, config.state,
            self._on_worker_state, self._on_parked,
        )  # fmt: skip
        self.sessions = SessionRegistry(config.limits.sessions_per_user, config.keep_sessions, self._close_in_worker)
        self.quotas = UserQuotas(config.limits)
        self.metrics = Metrics()
        self.counts = {what: Counter[str]() for what in ("requests", "http", "errors", "connections", "tokens", "context")}
        """Counters since the start, by topic and kind."""
        if recorder is not None:
            self.counts["recording"] = recorder.counts
        self.tasks = TaskSet()
        self._loader = ModelLoader(self.models, self.worker_spec, self.tasks)
        self._connections: set[ClientConnection] = set()
        self._streams: dict[str, EventStream] = {}  # resumable ones by token
        self._running: set[EventStream] = set()
        self._faults: dict[int, TokenBucket] = {}  # by user
        self._started = time.time()

    def worker_spec(self, model: str, options: dict[str, Any]) -> WorkerSpec:
        """Raises ModelFileError if there is no such model."""
        from edge_rt.model_hub import resolve_model

        return WorkerSpec(str(resolve_model(model).absolute()), options, self.config.rules)

    def _on_worker_state(self, hosted: ManagedModel) -> None:
        worker = hosted.supervisor
        said = f"worker {worker.state}" + (f": {worker.reason}" if worker.reason else "")
        logging.getLogger("edge_rt.daemon").info(said)
        notify_systemd(f"STATUS={said}")

    def _on_parked(self, hosted: ManagedModel, message: Message) -> None:
        """A worker has parked a session in a file, from which another worker can restore it."""
        if "parked" in message:
            self.sessions.note_parked(message["parked"], Path(message["path"]))

    # ---- connections -------------------------------------------------------------------------------------------------

    def enter(self, connection: ClientConnection, user: int | None) -> None:
        """Admit a new connection. Raises ProtocolError: not_allowed, limit."""
        self.count("connections", "all")
        if user is None or (user >= 0 and user not in self.config.users):
            self.count("errors", "not_allowed")
            raise ProtocolError("not_allowed", "you may not use this daemon; whoever runs it can add you to its users")
        if self.draining or len(self._connections) >= self.config.limits.connections or self._is_crowded(user):
            self.count("errors", "limit")
            raise ProtocolError("limit", TOO_MANY)
        connection.user = user
        self._connections.add(connection)

    def change_user(self, connection: ClientConnection, user: int) -> None:
        """Attribute a connection to the user of the key that it has sent. Raises ProtocolError: limit."""
        if user != connection.user:
            if self._is_crowded(user):
                raise ProtocolError("limit", TOO_MANY)
            if connection.user is not None:
                self.quotas.move(connection.held, connection.user, user)
            connection.user = user

    def _is_crowded(self, user: int) -> bool:
        return sum(one.user == user for one in self._connections) >= self.config.limits.connections_per_user

    def penalty(self, user: int | None) -> float:
        """Count a refused request. Returns the seconds for which the connection is not to be read, 0 unless the user has many of them."""
        if user is None:
            return 0.0
        if user not in self._faults:
            self._faults[user] = TokenBucket(FAULTS, 2 * FAULTS, now())
        return self._faults[user].overdraw(now(), DEAF_SECONDS)

    def leave(self, connection: ClientConnection) -> None:
        """A connection was lost: end its requests, except for resumable streams."""
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
        self.sessions.leave(connection)

    def hold(self, connection: ClientConnection, more: int) -> None:
        """Add bytes to those held for a connection; a negative number releases them. Raises ProtocolError: limit."""
        if connection.user is not None:  # else it was refused, and nothing is held for it
            self.quotas.hold(connection.user, more)
            connection.held += more

    def count(self, what: str, kind: str, more: int = 1) -> None:
        self.counts[what][kind] += more

    # ---- requests ----------------------------------------------------------------------------------------------------

    def run(self, connection: ClientConnection, request: Request, size: int) -> None:
        """Execute a request. Raises EdgeError."""
        self.count("requests", request.op)
        if self.draining and request.op not in _WHILE_DRAINING:
            raise ProtocolError("draining", "the daemon is about to end; ask again when it is back")
        work: Callable[[Call], None] = getattr(self, f"_do_{request.op}")
        work(Call(connection, request, size))

    def _do_hello(self, call: Call) -> None:
        common = set(call.fields["versions"]) & set(protocol.VERSIONS)
        if not common:
            raise ProtocolError("unsupported_version", "none of these versions is known here", supported=list(protocol.VERSIONS))
        call.connection.greet(call.fields.get("key"))
        limits = {**self.config.limits._asdict(), "frame_depth": MAX_DEPTH, "credits": self.config.credits}
        limits |= {"keep_sessions": self.config.keep_sessions, "resume_within": self.config.resume_within}
        call.answer(
            {"version": max(common), "server": f"edge-rt/{__version__}", "capabilities": sorted(protocol.OPS), "limits": limits}
        )  # fmt: skip

    def _call_worker(self, user: int, hosted: ManagedModel, command: Message, handle: ReplyHandler, *, awaits: bool = True) -> int:
        """``ModelManager.call``, counted in the user's quota. Raises ProtocolError."""
        self.quotas.begin(user)

        def answered(message: Message) -> None:
            if "event" not in message:
                self.quotas.end(user)
            handle(message)

        try:
            return self.models.call(hosted, command, answered, awaits=awaits)
        except BaseException:
            self.quotas.end(user)
            raise

    def _forward(
        self, call: Call, hosted: ManagedModel, command: Message, then: Callable[[Message], Message] = lambda found: found,
        failed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Forward a request to a model's worker. ``then`` converts the worker's result to the answer; ``failed`` is called on an error."""
        connection, number = call.connection, call.number

        def answered(message: Message) -> None:
            connection.done(number)
            if "ok" in message:
                connection.answer(number, then(message["ok"]))
            else:
                failed()
                connection.refuse(number, _protocol_error(message["error"]))

        connection.begin(number, call.size)
        command_number = self._call_worker(call.user, hosted, command, answered)
        if number in connection.waiting:  # else it was answered already. A lost connection withdraws it, if it has not been sent
            connection.withdraw[number] = partial(hosted.supervisor.withdraw, command_number)

    def _find_model(self, call: Call) -> ManagedModel:
        """The model that a request names, by default the daemon's default. Raises ProtocolError: no_model."""
        return self.models.find(call.fields.get("model"))

    def _do_tokenize(self, call: Call) -> None:
        self._forward(call, self._find_model(call), {"op": call.request.op, **call.without("model")})

    _do_detokenize = _do_tokenizer = _do_tokenize

    def _do_reload_rules(self, call: Call) -> None:
        _require_operator(call)
        first, *_ = self.models.loaded() or [self._find_model(call)]
        self._forward(call, first, {"op": "reload_rules"})
        self.reload_rules(but=first)

    def reload_rules(self, but: ManagedModel | None = None) -> None:
        """Make all workers ``but`` one reload the rules. Errors appear in the status."""
        for one in self.models.loaded():  # other workers read the rules when they start
            if one is not but:
                one.supervisor.call({"op": "reload_rules"}, lambda message: None)

    # ---- sessions ----------------------------------------------------------------------------------------------------

    def _find_session(self, call: Call) -> ClientSession:
        """The idle session that a request names, restored in its worker if need be. Raises ProtocolError."""
        one = self.sessions.get(call.fields["session"], call.user, call.connection)
        if one.busy:
            raise ProtocolError("busy", "the session answers another request; wait for it, cancel it, or open another session")
        if call.fields.get("model", one.hosted.name) not in one.hosted.names:
            raise ProtocolError("option", f"the session is of the model {one.hosted.name}; leave the model out, or open another session")
        if not self.models.is_known(one.hosted):
            raise ProtocolError("session_lost", "the session ended with its model, which was unloaded or replaced; open another")
        if one.epoch != one.hosted.supervisor.epoch:
            self._restore_in_worker(one)
        return one

    def _restore_in_worker(self, one: ClientSession) -> None:
        """Open or restore a session in a worker that was started after the one that had it. Raises ProtocolError.

        A file that cannot be read is not tried again. If the worker fails meanwhile, the session's next request tries again.
        """
        source = one.last_save
        if source is None and one.used:
            lost = {"code": "session_lost", "message": "the session was lost with its model, and never saved; open another"}
            raise _protocol_error(one.explain(lost))

        def answered(message: Message) -> None:
            if "ok" not in message:
                one.epoch = -1
                if source is not None and message["error"]["code"] in ("session_file", "session_mismatch"):
                    one.mark_lost(source, message["error"]["message"])

        how = {"op": "open_session"} if source is None else {"op": "restore_session", "path": str(source)}
        command = {**how, "session": one.id, "owner": str(one.user), "context": one.context}
        self._call_worker(one.user, one.hosted, command, answered, awaits=False)
        one.epoch = one.hosted.supervisor.epoch

    def _close_in_worker(self, one: ClientSession) -> None:
        if one.epoch == one.hosted.supervisor.epoch:
            one.hosted.supervisor.tell({"op": "close_session", "session": one.id})

    def _new_session(self, call: Call, hosted: ManagedModel, make: Callable[[ClientSession], Message], **more: Any) -> None:
        """A session that the worker makes; it is forgotten if that fails."""
        one = self.sessions.add(call.user, hosted, call.fields.get("keep", False), call.connection, **more)
        try:
            self._forward(call, hosted, make(one), lambda found: {**found, "session": one.id}, lambda: self.sessions.close(one))
        except ProtocolError:
            self.sessions.close(one)
            raise
        one.epoch = hosted.supervisor.epoch  # of the worker that the call may just have started

    def _do_open_session(self, call: Call) -> None:
        context = call.fields.get("context")

        def make(one: ClientSession) -> Message:
            return {"op": "open_session", "session": one.id, "owner": str(one.user), "context": context}

        self._new_session(call, self._find_model(call), make, context=context)

    def _do_clone_session(self, call: Call) -> None:
        source = self._find_session(call)
        command = {"op": "clone_session", "session": source.id}
        self._new_session(call, source.hosted, lambda one: {**command, "new": one.id}, context=source.context, used=source.used)

    def _do_restore_session(self, call: Call) -> None:
        path = self._saved_path(call)
        if not path.exists():
            raise no_saved_session(call.fields["name"])
        command = {"op": "restore_session", "path": str(path), "owner": str(call.user)}
        self._new_session(call, self._find_model(call), lambda one: {**command, "session": one.id}, saved=path, used=True)

    def _do_save_session(self, call: Call) -> None:
        path, most = self._saved_path(call), self.config.limits.saved_per_user
        if not path.exists() and len(list_saved_sessions(self.config.state, call.user)) >= most:
            raise ProtocolError("limit", f"a user may have {most} saved sessions; delete one, or save under a name that has one")
        one = self._find_session(call)

        def note_saved(found: Message) -> Message:
            self.sessions.note_saved(one, path)
            return found

        self._forward(call, one.hosted, {"op": "save_session", "session": one.id, "path": str(path)}, note_saved)

    def _do_list_saved(self, call: Call) -> None:
        call.answer({"saved": [one._asdict() for one in list_saved_sessions(self.config.state, call.user)]})

    def _do_delete_saved(self, call: Call) -> None:
        path = self._saved_path(call)
        delete_saved_session(path, call.fields["name"])
        self.sessions.note_deleted(path)
        call.answer({})

    def _saved_path(self, call: Call) -> Path:
        return saved_session_path(self.config.state, call.user, call.fields["name"])

    def _do_close_session(self, call: Call) -> None:
        self.sessions.close(self.sessions.get(call.fields["session"], call.user, call.connection))
        call.answer({})

    # ---- streams of events -------------------------------------------------------------------------------------------

    def _do_generate(self, call: Call) -> None:
        fields = call.fields
        if len(fields.keys() & {"prompt", "tokens", "messages"}) != 1:
            raise ProtocolError("bad_request", "generate takes a prompt, its tokens, or messages; give one of them")
        if "tokens" in fields and fields.get("options", {}).get("tools"):
            raise ProtocolError("option", "tools go through the chat template and tokens do not; give messages")
        if fields.get("priority", "normal") not in PRIORITIES:
            raise ProtocolError("option", f"the priority is none; choose from {', '.join(PRIORITIES)}")
        protocol.check_options(fields.get("options", {}))
        session = self._find_session(call) if "session" in fields else None
        hosted = session.hosted if session is not None else self._find_model(call)
        self._start_stream(call, hosted, {"op": "generate", "owner": str(call.user), **call.without("resumable", "model")}, session)
        if session is not None:
            session.used = True

    def _do_embed(self, call: Call) -> None:
        fields = call.fields
        if ("texts" in fields) == ("tokens" in fields):
            raise ProtocolError("bad_request", "embed takes texts, or tokens of each; give one of them")
        if not fields.get("texts", fields.get("tokens")):
            raise ProtocolError("option", "there is nothing to embed; give a text")
        self._start_stream(call, self._find_model(call), {"op": "embed", **call.without("model")}, None)

    def _do_score(self, call: Call) -> None:
        fields = call.fields
        given = [name for name in ("texts", "tokens", "prompt", "messages") if name in fields]
        if len(given) != 1 or ("continuations" in fields) != (given[0] in ("prompt", "messages")):
            raise ProtocolError("bad_request", "score takes texts, or tokens of each, or a prompt or messages with continuations")
        if not fields.get("continuations", fields[given[0]]) or fields.get("messages") == []:
            raise ProtocolError("option", "there is nothing to score; give a text")
        self._start_stream(call, self._find_model(call), {"op": "score", **call.without("model")}, None)

    def _start_stream(self, call: Call, hosted: ManagedModel, command: Message, session: ClientSession | None) -> None:
        """Forward a request that is answered by a stream of events. Raises ProtocolError."""
        connection, number, credits = call.connection, call.number, self.config.credits
        stream = EventStream(call.user, hosted, credits, resumable=call.fields.get("resumable", False))
        if self.recorder is not None and call.request.op == "generate":
            stream.observer = self.recorder.start(connection, call.fields, call.size, hosted, session)
        try:
            connection.begin(number, call.size)
            on_message = partial(self._on_stream_message, stream, session)
            stream.number = self._call_worker(call.user, hosted, {**command, "credits": credits}, on_message)
        except ProtocolError as error:
            if stream.observer is not None:
                stream.observer.finish(error.code)
            raise
        connection.waiting.discard(number)
        stream.request, stream.connection, stream.last_token = number, connection, now()
        connection.streams[number] = stream
        self._running.add(stream)
        if session is not None:
            session.busy = True
        if stream.token is not None:
            self._streams[stream.token] = stream
            connection.send({"id": number, "event": "stream", "stream": stream.token})

    def _on_stream_message(self, stream: EventStream, session: ClientSession | None, message: Message) -> None:
        """Count, record and deliver an event or the answer from a worker."""
        if session is not None and "error" in message:
            message = {**message, "error": session.explain(message["error"])}
        if stream.observer is not None:
            stream.observer.on_message(message)
        match message.get("event"):
            case "delta":
                self.metrics.count_tokens(stream, len(message["tokens"]) + message.get("concealed", 0), now())
            case "embedding":
                self.count("tokens", "embedded_tokens", message["tokens"])
            case "scored":
                self.count("tokens", "scored_tokens", sum(len(one["tokens"]) for one in message["scores"]))
            case "done":
                count_finished(self.counts, message)
        message = stream.add(message)
        if stream.connection is not None:
            stream.connection.deliver(stream, message)
        if stream.ended:
            self._running.discard(stream)
            if session is not None:
                session.busy = False
            if "error" in message:
                self.count("errors", message["error"]["code"])
            self._forget_finished(stream)

    def _forget_finished(self, stream: EventStream) -> None:
        """Remove a stream once it has ended and all its events are acknowledged."""
        if not stream.finished:
            return
        if stream.connection is not None:
            stream.connection.streams.pop(stream.request, None)
            stream.connection.done(stream.request)
        if stream.token is not None:
            self._streams.pop(stream.token, None)
        if stream.expiry is not None:
            stream.expiry.cancel()

    def _abandon(self, stream: EventStream) -> None:
        """End a stream that no client will read any further."""
        stream.on_left()
        if stream.token is not None:
            self._streams.pop(stream.token, None)
        if not stream.ended:
            stream.hosted.supervisor.cancel(stream.number, drop=True)

    def _do_cancel(self, call: Call) -> None:
        stream = call.connection.streams.get(call.fields["request"])
        if stream is not None and not stream.ended and not stream.cancelled:
            stream.cancelled = True
            stream.on_left()
            stream.hosted.supervisor.cancel(stream.number)
        call.answer({"found": stream is not None})

    def _do_resume(self, call: Call) -> None:
        """Continue a stream, usually on another connection."""
        connection, number, stream = call.connection, call.number, self._find_stream(call)
        if stream is None:
            raise ProtocolError("no_such_stream", "there is no such stream, or not any more; ask anew")
        if connection is not stream.connection:
            connection.begin(number, 0)
            connection.waiting.discard(number)
        held = stream.events_after(call.fields["after"])
        before = stream.connection
        if before is not None:  # its end was not noticed yet, or the stream is moved while it is read
            before.streams.pop(stream.request, None)
            before.done(stream.request)
            before.refuse(stream.request, ProtocolError("moved", "the stream goes on elsewhere"))
        if stream.expiry is not None:
            stream.expiry.cancel()
        stream.connection, stream.request = connection, number
        connection.streams[number] = stream
        for message in held:
            connection.send({**message, "id": number})
        if stream.finished:  # the client had acknowledged the answer already
            call.answer({})
            self._forget_finished(stream)

    def _do_ack(self, call: Call) -> None:
        if (stream := self._find_stream(call)) is not None:
            stream.acknowledge(call.fields["seq"])
            self._forget_finished(stream)

    def _find_stream(self, call: Call) -> EventStream | None:
        """The stream that a request names by its token, None if it is unknown or another user's."""
        stream = self._streams.get(call.fields["stream"])
        return stream if stream is not None and stream.user == call.connection.user else None

    # ---- feedback ----------------------------------------------------------------------------------------------------

    def _do_feedback(self, call: Call) -> None:
        """Record feedback. The request is answered when it is written."""
        if self.recorder is None:
            raise ProtocolError("not_recording", "the daemon records nothing, so feedback has no place; start it with --record FILE")
        fields, connection, number = _check_feedback(call.fields), call.connection, call.number
        template = self._find_model(call).template if "model" in fields or self.models.default else ""
        loop = asyncio.get_running_loop()

        def finish(result: str) -> None:
            connection.done(number)
            if result == "recorded":
                connection.answer(number, {})
            else:
                connection.refuse(number, ProtocolError(*_FEEDBACK_ERRORS[result]))

        connection.begin(number, call.size)
        self.recorder.feedback(connection, fields, call.size, template, lambda result: loop.call_soon_threadsafe(finish, result))

    # ---- the daemon --------------------------------------------------------------------------------------------------

    def _do_status(self, call: Call) -> None:
        call.answer(self.status())

    def _do_metrics(self, call: Call) -> None:
        call.answer(self.counters())

    def _do_load_model(self, call: Call) -> None:
        _require_operator(call)
        options = protocol.check_fields(call.fields.get("options", {}), protocol.MODEL_OPTIONS, "the options", "option")
        self._loader.load(call.connection, call.request, call.fields["model"], options)

    def _do_unload_model(self, call: Call) -> None:
        _require_operator(call)
        self._loader.unload(call.connection, call.request, self._find_model(call))

    def status(self) -> Message:
        models = self.models.status()
        default = next((one for one in models if one["default"]), None)
        rules = [one.supervisor.rules for one in (*self.models.loaded(), *self.models) if one.supervisor.rules is not None]
        return {
            "server": {"version": __version__, "pid": os.getpid(), "uptime": time.time() - self._started, "draining": self.draining,
                       "connections": len(self._connections), "sessions": len(self.sessions), "requests": self.quotas.requests,
                       "held_bytes": self.quotas.held, "memory": self.models.budget, "memory_free": self.models.free},
            "worker": default["worker"] if default else {"state": "none", "reason": "", "pid": None, "deaths": 0},
            "model": default and default["model"],
            "models": models,
            "rules": rules[0] if rules else None,
            "recording": self.recorder.status() if self.recorder is not None else None,
        }  # fmt: skip

    def health(self) -> str:
        """``draining``, or the state of the default model: ``none`` without one, ``asleep`` if its next request loads it."""
        if self.draining:
            return "draining"
        state = self.models.find().supervisor.state if self.models.default else None
        return "none" if state is None else "asleep" if state == "none" else state

    def counters(self) -> Message:
        return {
            **{what: dict(counts) for what, counts in self.counts.items()},
            "worker_deaths": self.models.deaths, "evictions": self.models.evictions, "uptime": time.time() - self._started,
        }  # fmt: skip


def _protocol_error(found: Message) -> ProtocolError:
    rest = dict(found)
    return ProtocolError(rest.pop("code"), rest.pop("message"), **rest)


def _require_operator(call: Call) -> None:
    """Raises ProtocolError: not_permitted, unless the user is root or the daemon's own."""
    if call.connection.user not in (os.getuid(), 0):
        raise ProtocolError("not_permitted", "only the daemon's own user and root may do that")


def _check_feedback(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Validate feedback; its messages are normalised. Raises ProtocolError."""
    from edge_rt.daemon.http.openai import normalize_messages

    if ("prompt" in fields) == ("messages" in fields):
        raise ProtocolError("bad_request", "feedback is of an answer to a prompt or to messages; give one of them")
    if not fields.keys() & {"rating", "correction", "comment"}:
        raise ProtocolError("bad_request", "feedback says something of the answer; give a rating, a correction or a comment")
    if fields.get("rating", 0) not in RATINGS:
        raise ProtocolError("option", f"the rating is {fields['rating']}; give -1, 0 or 1")
    if not fields.get("prompt", fields.get("messages")):
        raise ProtocolError("option", "what was answered is empty; give the prompt or the messages")
    if "messages" not in fields:
        return fields
    try:
        return {**fields, "messages": normalize_messages(fields["messages"])}
    except EdgeError as error:
        raise ProtocolError("bad_request", str(error)) from error
