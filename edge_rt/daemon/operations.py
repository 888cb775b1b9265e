"""What each operation of the protocol does in the daemon; those that need the model are passed on to the worker."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_rt import __version__
from edge_rt.daemon import feedback, protocol, saves
from edge_rt.daemon.frames import MAX_DEPTH, Message
from edge_rt.daemon.protocol import Request
from edge_rt.daemon.sessions import Known
from edge_rt.errors import ProtocolError
from edge_rt.types import PRIORITIES

if TYPE_CHECKING:
    from edge_rt.daemon.channel import Channel
    from edge_rt.daemon.hosted import Hosted

_WHILE_DRAINING = ("hello", "status", "metrics", "cancel", "ack", "resume", "close_session")


def run(connection: Channel, request: Request, size: int) -> None:
    """Carry out a request. Raises ProtocolError."""
    if connection.server.draining and request.op not in _WHILE_DRAINING:
        raise ProtocolError("draining", "the daemon is about to end; ask again when it is back")
    _RUN[request.op](connection, request, size)


def _hello(connection: Channel, request: Request, size: int) -> None:
    common = set(request.fields["versions"]) & set(protocol.VERSIONS)
    if not common:
        raise ProtocolError("unsupported_version", "none of these versions is known here", supported=list(protocol.VERSIONS))
    connection.greet(request.fields.get("key"))
    config = connection.server.config
    limits = {**config.limits._asdict(), "frame_depth": MAX_DEPTH, "credits": config.credits}
    limits |= {"keep_sessions": config.keep_sessions, "resume_within": config.resume_within}
    connection.answer(
        request.id,
        {"version": max(common), "server": f"edge-rt/{__version__}", "capabilities": sorted(protocol.OPS), "limits": limits},
    )


# ---- passed on -------------------------------------------------------------------------------------------------------


def _pass_on(
    connection: Channel, request: Request, size: int, hosted: Hosted, command: Message,
    then: Callable[[Message], Message | None] = lambda found: found,
) -> None:  # fmt: skip
    """Let a model's worker answer; ``then`` makes the answer of what it says."""
    number = request.id
    assert number is not None, "only ack has none"

    def took(message: Message) -> None:
        connection.done(number)
        if "ok" in message:
            connection.answer(number, then(message["ok"]) or {})
        else:
            connection.refuse(number, _error(message["error"]))

    connection.begin(number, size)
    _passed(connection, number, hosted, connection.server.call(_user(connection), hosted, command, took))


def _passed(connection: Channel, number: int, hosted: Hosted, command: int) -> None:
    """A request is with a model, as a command of this number; who leaves takes it back, if it has not begun."""
    if number in connection.waiting:  # else it was answered at once
        connection.withdraw[number] = partial(hosted.supervisor.withdraw, command)


def _error(found: Message) -> ProtocolError:
    """The worker's error, to be passed on."""
    rest = dict(found)
    return ProtocolError(rest.pop("code"), rest.pop("message"), **rest)


def _hosted(connection: Channel, request: Request) -> Hosted:
    """The model that a request names, or the default. Raises ProtocolError: no_model."""
    return connection.server.models.find(request.fields.get("model"))


def _tokenize(connection: Channel, request: Request, size: int) -> None:
    fields = {name: value for name, value in request.fields.items() if name != "model"}
    _pass_on(connection, request, size, _hosted(connection, request), {"op": request.op, **fields})


def _reload_rules(connection: Channel, request: Request, size: int) -> None:
    _operator(connection)
    first, *_ = connection.server.models.loaded() or [_hosted(connection, request)]
    _pass_on(connection, request, size, first, {"op": "reload_rules"})
    connection.server.reload_rules(but=first)


# ---- sessions --------------------------------------------------------------------------------------------------------


def _session(connection: Channel, request: Request) -> Known:
    """The session that a request names, idle and in its worker. Raises ProtocolError."""
    server, one = connection.server, _known(connection, request)
    if one.busy:
        raise ProtocolError("busy", "the session answers another request; wait for it, cancel it, or open another session")
    if request.fields.get("model", one.hosted.name) not in one.hosted.names:
        raise ProtocolError("option", f"the session is of the model {one.hosted.name}; leave the model out, or open another session")
    if server.models.known(one.hosted) and one.epoch == one.hosted.supervisor.epoch:
        return one
    source = one.last_save
    if not server.models.known(one.hosted):
        raise ProtocolError("session_lost", "the session ended with its model, which was unloaded or replaced; open another")
    if source is None and one.used:
        lost = {"code": "session_lost", "message": "the session was lost with its model, and never saved; open another"}
        raise _error(one.explained(lost))
    how = {"op": "open_session"} if source is None else {"op": "restore_session", "path": str(source)}
    command = {**how, "session": one.id, "owner": str(one.user), "context": one.context}
    server.call(one.user, one.hosted, command, partial(_restored, one, source), awaits=False)
    one.epoch = one.hosted.supervisor.epoch
    return one


def _restored(one: Known, source: Path | None, message: Message) -> None:
    """After the worker had left or died; if that failed, what is asked of the session says so.

    A file that cannot be read is not tried again. If it was the worker that failed, the next request tries again.
    """
    if "ok" in message:
        return
    one.epoch = -1
    if source is not None and message["error"]["code"] in ("session_file", "session_mismatch"):
        one.lose(source, message["error"]["message"])


def _known(connection: Channel, request: Request) -> Known:
    return connection.server.sessions.get(request.fields["session"], _user(connection), connection)


def _user(connection: Channel) -> int:
    assert connection.user is not None, "nobody else comes as far as this"
    return connection.user


def _new(connection: Channel, request: Request, size: int, hosted: Hosted, make: Callable[[Known], Message], **more: Any) -> None:
    """A session that the worker makes; it is forgotten if that fails, or the client is gone by then."""
    server = connection.server
    one = server.sessions.add(_user(connection), hosted, request.fields.get("keep", False), connection, **more)
    number = request.id
    assert number is not None, "only ack has none"

    def took(message: Message) -> None:
        connection.done(number)
        if "ok" in message:
            connection.answer(number, {**message["ok"], "session": one.id})
        else:
            server.sessions.close(one)
            connection.refuse(number, _error(message["error"]))

    try:
        connection.begin(number, size)
        _passed(connection, number, hosted, server.call(one.user, hosted, make(one), took))
        one.epoch = hosted.supervisor.epoch  # of the worker that the call may just have started
    except ProtocolError:
        server.sessions.close(one)
        raise


def _open_session(connection: Channel, request: Request, size: int) -> None:
    context, hosted = request.fields.get("context"), _hosted(connection, request)

    def opening(one: Known) -> Message:
        return {"op": "open_session", "session": one.id, "owner": str(one.user), "context": context}

    _new(connection, request, size, hosted, opening, context=context)


def _clone_session(connection: Channel, request: Request, size: int) -> None:
    source = _session(connection, request)
    own = {"context": source.context, "used": source.used}
    _new(connection, request, size, source.hosted, lambda one: {"op": "clone_session", "session": source.id, "new": one.id}, **own)


def _restore_session(connection: Channel, request: Request, size: int) -> None:
    path = _saved(connection, request)
    if not path.exists():
        raise saves.nothing_saved(request.fields["name"])
    command = {"op": "restore_session", "path": str(path), "owner": str(_user(connection))}
    _new(connection, request, size, _hosted(connection, request), lambda one: {**command, "session": one.id}, saved=path, used=True)


def _save_session(connection: Channel, request: Request, size: int) -> None:
    path, most = _saved(connection, request), connection.server.config.limits.saved_per_user
    if not path.exists() and len(_saves(connection)) >= most:
        raise ProtocolError("limit", f"a user may have {most} saved sessions; delete one, or save under a name that has one")
    one = _session(connection, request)

    def saved(found: Message) -> Message:
        connection.server.sessions.saved(one, path)
        return found

    _pass_on(connection, request, size, one.hosted, {"op": "save_session", "session": one.id, "path": str(path)}, saved)


def _list_saved(connection: Channel, request: Request, size: int) -> None:
    connection.answer(request.id, {"saved": [one._asdict() for one in _saves(connection)]})


def _delete_saved(connection: Channel, request: Request, size: int) -> None:
    path = _saved(connection, request)
    saves.delete(path, request.fields["name"])
    connection.server.sessions.unsaved(path)
    connection.answer(request.id, {})


def _saved(connection: Channel, request: Request) -> Path:
    return saves.file_of(connection.server.config.state, _user(connection), request.fields["name"])


def _saves(connection: Channel) -> list[saves.Save]:
    return saves.saves_of(connection.server.config.state, _user(connection))


def _close_session(connection: Channel, request: Request, size: int) -> None:
    connection.server.sessions.close(_known(connection, request))
    connection.answer(request.id, {})


# ---- generation ------------------------------------------------------------------------------------------------------


def _generate(connection: Channel, request: Request, size: int) -> None:
    fields = request.fields
    if len(fields.keys() & {"prompt", "tokens", "messages"}) != 1:
        raise ProtocolError("bad_request", "generate takes a prompt, its tokens, or messages; give one of them")
    if "tokens" in fields and fields.get("options", {}).get("tools"):
        raise ProtocolError("option", "tools go through the chat template and tokens do not; give messages")
    if fields.get("priority", "normal") not in PRIORITIES:
        raise ProtocolError("option", f"the priority is none; choose from {', '.join(PRIORITIES)}")
    protocol.options(fields.get("options", {}))
    session = _session(connection, request) if "session" in fields else None
    hosted = session.hosted if session is not None else _hosted(connection, request)
    rest = {name: value for name, value in fields.items() if name not in ("resumable", "model")}
    command = {"op": "generate", "owner": str(_user(connection)), **rest}
    connection.server.generate(connection, request, size, hosted, command, session)
    if session is not None:
        session.used = True


def _embed(connection: Channel, request: Request, size: int) -> None:
    fields = request.fields
    if ("texts" in fields) == ("tokens" in fields):
        raise ProtocolError("bad_request", "embed takes texts, or tokens of each; give one of them")
    if not fields.get("texts", fields.get("tokens")):
        raise ProtocolError("option", "there is nothing to embed; give a text")
    _read_texts(connection, request, size)


def _score(connection: Channel, request: Request, size: int) -> None:
    fields = request.fields
    given = [name for name in ("texts", "tokens", "prompt", "messages") if name in fields]
    if len(given) != 1 or ("continuations" in fields) != (given[0] in ("prompt", "messages")):
        raise ProtocolError("bad_request", "score takes texts, or tokens of each, or a prompt or messages with continuations")
    if not fields.get("continuations", fields[given[0]]) or fields.get("messages") == []:
        raise ProtocolError("option", "there is nothing to score; give a text")
    _read_texts(connection, request, size)


def _read_texts(connection: Channel, request: Request, size: int) -> None:
    """What the model reads and does not continue."""
    hosted = _hosted(connection, request)
    command = {"op": request.op, **{name: value for name, value in request.fields.items() if name != "model"}}
    connection.server.generate(connection, request, size, hosted, command, None)


def _cancel(connection: Channel, request: Request, size: int) -> None:
    stream = connection.streams.get(request.fields["request"])
    if stream is not None and not stream.ended and not stream.cancelled:
        stream.cancelled = True  # once: the worker need not hear it again and again
        stream.left()
        stream.hosted.supervisor.cancel(stream.number)
    connection.answer(request.id, {"found": stream is not None})


def _resume(connection: Channel, request: Request, size: int) -> None:
    connection.server.resume(connection, request)


def _ack(connection: Channel, request: Request, size: int) -> None:
    connection.server.acknowledge(connection, request.fields["stream"], request.fields["seq"])


# ---- the daemon ------------------------------------------------------------------------------------------------------


def _status(connection: Channel, request: Request, size: int) -> None:
    connection.answer(request.id, connection.server.status())


def _metrics(connection: Channel, request: Request, size: int) -> None:
    connection.answer(request.id, connection.server.metrics())


def _load_model(connection: Channel, request: Request, size: int) -> None:
    _operator(connection)
    options = protocol.fields(request.fields.get("options", {}), protocol.MODEL_OPTIONS, "the options", "option")
    connection.server.exchange.load(connection, request, request.fields["model"], options)


def _unload_model(connection: Channel, request: Request, size: int) -> None:
    _operator(connection)
    connection.server.exchange.unload(connection, request, _hosted(connection, request))


def _operator(connection: Channel) -> None:
    """Raises ProtocolError for who may use the daemon and not change it."""
    if connection.user not in (os.getuid(), 0):
        raise ProtocolError("not_permitted", "only the daemon's own user and root may do that")


_RUN: dict[str, Callable[[Channel, Request, int], None]] = {
    "hello": _hello,
    "open_session": _open_session,
    "close_session": _close_session,
    "clone_session": _clone_session,
    "save_session": _save_session,
    "restore_session": _restore_session,
    "list_saved": _list_saved,
    "delete_saved": _delete_saved,
    "generate": _generate,
    "embed": _embed,
    "score": _score,
    "feedback": feedback.give,
    "cancel": _cancel,
    "resume": _resume,
    "ack": _ack,
    "tokenize": _tokenize,
    "detokenize": _tokenize,
    "tokenizer": _tokenize,
    "status": _status,
    "metrics": _metrics,
    "reload_rules": _reload_rules,
    "load_model": _load_model,
    "unload_model": _unload_model,
}
