"""What there is over HTTP, and what each path does."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from edge_rt.daemon.http import answer, body, embeddings, facts, feedback, files, metrics, models, request, scores, tokens
from edge_rt.daemon.http.errors import TRY_AGAIN, ApiError
from edge_rt.errors import ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.frames import Message
    from edge_rt.daemon.hosted import Hosted
    from edge_rt.daemon.http.connection import HttpConnection
    from edge_rt.daemon.http.request import Asked
    from edge_rt.daemon.server import Server


class Exchange:
    """A request and its answer. ``headers``: names in lower case. ``heard`` takes what the daemon says of it."""

    def __init__(self, connection: HttpConnection, path: str, body: bytes, headers: Mapping[str, str]) -> None:
        self.connection, self.path, self.body, self.headers = connection, path, body, headers
        self.heard: Callable[[Message], None] = lambda message: None
        self.left: Callable[[], None] = lambda: None
        """Called if the client is gone before the answer."""

    @property
    def server(self) -> Server:
        """The daemon."""
        return self.connection.server


class Route(NamedTuple):
    """``path``: what it is called in metrics. ``work`` answers, now or later; raises ApiError, ProtocolError."""

    path: str
    method: str
    work: Callable[[Exchange], None]
    needs_key: bool = True


def find(method: str, path: str) -> Route:
    """Raises ApiError: there is no such path, or not with this method."""
    known = [route for route in ROUTES if re.fullmatch(re.sub(r"\{\w+\}", ".+", route.path), path)]
    for route in known:
        if route.method == method or (method == "HEAD" and route.method == "GET"):
            return route
    if known:
        allowed = ", ".join(route.method for route in known)
        raise ApiError(405, f"{path:.200} takes {allowed} and not {method:.20}", "method_not_allowed", headers=(("Allow", allowed),))
    raise ApiError(404, f"there is nothing at {method:.20} {path:.200}; see docs/http.md", "unknown_url")


# ---- facts -----------------------------------------------------------------------------------------------------------


def _preflight(exchange: Exchange) -> None:
    exchange.connection.preflight()


def _health(exchange: Exchange) -> None:
    """200 if a request would be answered now, or as soon as the model is back in memory; else the phase."""
    server = exchange.server
    status, worker = server.health(), server.models.find().supervisor.status() if server.models.default else {}
    found = {"status": status, **{name: worker[name] for name in ("reason", "phase", "done", "total") if worker.get(name)}}
    ready = status in ("ready", "asleep")
    exchange.connection.respond_json(found, 200 if ready else 503, () if ready else TRY_AGAIN)


def _metrics(exchange: Exchange) -> None:
    """With what the workers hold, if they say so soon."""
    facts.with_memory(
        exchange, lambda memory: exchange.connection.respond(200, metrics.text(exchange.server, memory).encode(), metrics.TYPE)
    )


def _shown(hosted: Hosted, adapter: str | None = None) -> dict[str, Any]:
    try:
        created = int(Path(hosted.spec.model if adapter is None else hosted.adapters[adapter]).stat().st_mtime)
    except OSError:
        created = 0  # it was moved away
    found = {"id": models.called(hosted, adapter), "object": "model", "created": created, "owned_by": "edge-rt"}
    return found if adapter is None else {**found, "parent": hosted.name}


def _models(exchange: Exchange) -> None:
    found = [_shown(one, adapter) for one in exchange.server.models for adapter in (None, *one.adapters)]
    exchange.connection.respond_json({"object": "list", "data": found})


def _one_model(exchange: Exchange) -> None:
    exchange.connection.respond_json(_shown(*models.named(exchange.server, unquote(exchange.path.removeprefix("/v1/models/")))))


def _embeddings(exchange: Exchange) -> None:
    asked = embeddings.read(body.parse(exchange.body))
    hosted = models.bare(models.answering(exchange.server, asked.model), "embeddings come from")
    embeddings.Embedding(exchange, asked, hosted.name).start()


def _score(exchange: Exchange, asked: scores.Asked, *, echo: bool) -> None:
    hosted = models.bare(models.answering(exchange.server, asked.model), "scores come from")
    scores.Scores(exchange, asked, hosted.name, echo=echo).start()


def _scores(exchange: Exchange) -> None:
    _score(exchange, scores.read_score(body.parse(exchange.body)), echo=False)


def _complete(exchange: Exchange) -> None:
    given = body.parse(exchange.body)
    if scores.echoes(given):
        _score(exchange, scores.read_echo(given), echo=True)
    else:
        _generate(exchange, request.completion(given))


# ---- generation ------------------------------------------------------------------------------------------------------


def _chat(exchange: Exchange) -> None:
    _generate(exchange, request.chat(body.parse(exchange.body)))


def _generate(exchange: Exchange, asked: Asked) -> None:
    hosted, adapter = models.answering(exchange.server, asked.model)
    if adapter is not None:
        asked = request.through(asked, hosted.name, adapter)
    _Generation(exchange, asked, hosted.name, models.called(hosted, adapter), request.headers(asked.ignored)).start()


class _Generation:
    """One generation, from the request to the end of its answer."""

    def __init__(self, exchange: Exchange, asked: Asked, model: str, called: str, headers: tuple[tuple[str, str], ...]) -> None:
        """``called``: what the model is called in the answer."""
        self._exchange, self._asked, self._headers = exchange, asked, headers
        self._connection = exchange.connection
        self._model, self._answer = model, answer.Answer(asked, called)
        self._begun = False

    def start(self) -> None:
        """Raises ProtocolError."""
        if self._asked.session is None:
            self._run({})
            return
        session = self._connection.names.get(self._session_name, "")
        try:
            self._run({"session": session})
        except ProtocolError as error:
            if error.code not in ("no_such_session", "session_lost"):
                raise
            if error.code == "session_lost":
                self._close(session)
            self._exchange.heard = self._opened
            self._connection.run("open_session", {"keep": True, "model": self._model}, 0)

    @property
    def _user(self) -> int:
        assert self._connection.user is not None, "nobody else comes as far as this"
        return self._connection.user

    @property
    def _session_name(self) -> tuple[int, str, str]:
        assert self._asked.session is not None, "there is one"
        return self._user, self._model, self._asked.session

    def _close(self, session: str) -> None:
        sessions = self._exchange.server.sessions
        sessions.close(sessions.get(session, self._user, self._connection))

    def _opened(self, message: Message) -> None:
        """There is a session now, for this request and those that name it later."""
        names, own = self._connection.names, message["ok"]["session"]
        for name in [name for name, session in names.items() if session not in self._exchange.server.sessions]:
            del names[name]
        session = names.setdefault(self._session_name, own)
        if session != own:  # another request has named it meanwhile
            self._close(own)
        self._run({"session": session})

    def _run(self, session: Message) -> None:
        self._exchange.heard = self._heard
        self._connection.run("generate", {**self._asked.fields, **session}, len(self._exchange.body))

    def _heard(self, message: Message) -> None:
        """An event, or the end."""
        chunks = self._answer.event(message) if "event" in message else []
        if not self._asked.stream:
            if "event" not in message:
                self._connection.respond_json(self._answer.whole(), headers=self._headers)
            return
        if message.get("event") == "queued":
            self._connection.comment(f"queued: {message['reason']}", self._headers)
            return
        if not self._begun:
            self._begun = True
            chunks = self._answer.begin() + chunks
        for chunk in chunks:
            self._connection.stream(json.dumps(chunk, ensure_ascii=False, separators=(",", ":")), self._headers)
        if "event" not in message:
            self._connection.stream("[DONE]")
            self._connection.stream_end()


ROUTES = (
    Route("/", "GET", files.root, needs_key=False),
    Route(f"{files.PREFIX}{{file}}", "GET", files.part, needs_key=False),
    Route("/health", "GET", _health, needs_key=False),
    Route("/metrics", "GET", _metrics),
    Route("/edge-rt/status", "GET", facts.status),
    Route("/v1/models", "GET", _models),
    Route("/v1/models/{model}", "GET", _one_model),
    Route("/v1/chat/completions", "POST", _chat),
    Route("/v1/completions", "POST", _complete),
    Route("/edge-rt/score", "POST", _scores),
    Route("/edge-rt/feedback", "POST", feedback.give),
    Route("/v1/embeddings", "POST", _embeddings),
    Route("/tokenize", "POST", tokens.tokenize),
    Route("/detokenize", "POST", tokens.detokenize),
    Route("/tokenizer_info", "GET", tokens.info),
)
PREFLIGHT = Route("preflight", "OPTIONS", _preflight, needs_key=False)
