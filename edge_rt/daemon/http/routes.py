"""The paths of the HTTP side (docs/http.md) and what each does.

Evaluation tools (lm-evaluation-harness, ``local-completions``) use ``echo`` with ``logprobs`` and ``max_tokens`` of 0 or 1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from edge_rt import __version__
from edge_rt.daemon import protocol
from edge_rt.daemon.http import openai
from edge_rt.daemon.http.connection import Exchange, HttpConnection, Route
from edge_rt.daemon.http.openai import MAX_LOGPROBS, MIN_LOGPROB, TRY_AGAIN, ApiError, check_body, ignored_headers, invalid_field
from edge_rt.daemon.metrics import CONTEXT, PROMETHEUS_TYPE, prometheus_text
from edge_rt.daemon.supervisor import now
from edge_rt.errors import ProtocolError
from edge_rt.types import singles

if TYPE_CHECKING:
    from edge_rt.daemon.config import HttpConfig
    from edge_rt.daemon.http.openai import GenerateRequest, Json
    from edge_rt.daemon.models import ManagedModel
    from edge_rt.daemon.operations import Operations
    from edge_rt.daemon.protocol import Message

MEMORY_SECONDS = 0.5  # how long an answer waits for the workers to say what they hold
MAX_EMBEDDING_TEXTS = 2048  # OpenAI's limit of one request
MAX_SCORE_TEXTS = 256
TOKENIZE_FIELDS: Mapping[str, str] = {"prompt": "text!", "add_special_tokens": "flag", "model": "text"}
DETOKENIZE_FIELDS: Mapping[str, str] = {"tokens": "ids!", "model": "text"}
EMBEDDING_FIELDS: Mapping[str, str] = {"model": "text", "encoding_format": "text", "dimensions": "integer", "edge_rt": "map"}
EMBEDDING_EXTENSIONS: Mapping[str, str] = {"pooling": "text", "normalize": "flag", "truncate": "flag"}
"""Fields of ``edge_rt``. ``truncate``: the client knows that the model was trained for fewer dimensions."""
SCORE_FIELDS: Mapping[str, str] = {
    "model": "text", "prompt": "text", "messages": "maps", "continuations": "texts!", "top_logprobs": "integer",
}  # fmt: skip


# ---- which model -----------------------------------------------------------------------------------------------------


def display_name(hosted: ManagedModel, adapter: str | None) -> str:
    """The name of a model, or of a model with an adapter, which clients see as one more model."""
    return hosted.name if adapter is None else f"{hosted.name}:{adapter}"


def find_model(server: Operations, name: str | None) -> tuple[ManagedModel, str | None]:
    """The model that a request names, or the default, and the adapter in ``NAME:ADAPTER``. Raises ApiError, ProtocolError: no_model."""
    try:
        return server.models.find(name), None
    except ProtocolError as error:
        if name is None or not server.models.names:
            raise
        model, _, adapter = name.rpartition(":")
        with suppress(ProtocolError):
            if model and adapter in (found := server.models.find(model)).adapters:
                return found, adapter
        message = f"there is no model {name!r:.80} here; name one of {server.models.names}"
        raise ApiError(404, message, "model_not_found", param="model") from error


def find_ready_model(server: Operations, name: str | None) -> tuple[ManagedModel, str | None]:
    """The same, if it can answer soon. Raises ApiError while it is being opened and nobody waits for it yet."""
    hosted, adapter = find_model(server, name)
    worker = hosted.supervisor.status()
    if worker["state"] in ("starting", "waiting") and hosted.idle and not server.draining:
        share = f" {100 * worker['done'] // worker['total']} %" if worker.get("total") else ""
        message = f"the model is being opened ({worker.get('phase', worker['state'])}{share}); ask again a little later"
        raise ApiError(503, message, "model_loading", headers=TRY_AGAIN)
    return hosted, adapter


def require_no_adapter(found: tuple[ManagedModel, str | None], what: str) -> ManagedModel:
    """A model for ``what`` there is only without an adapter. Raises ApiError if one was named."""
    hosted, adapter = found
    if adapter is not None:
        raise invalid_field("model", f"{what} a model without an adapter; name {hosted.name}")
    return hosted


def _model_entry(hosted: ManagedModel, adapter: str | None = None) -> Json:
    try:
        created = int(Path(hosted.spec.model if adapter is None else hosted.adapters[adapter]).stat().st_mtime)
    except OSError:
        created = 0  # it was moved away
    found = {"id": display_name(hosted, adapter), "object": "model", "created": created, "owned_by": "edge-rt"}
    return found if adapter is None else {**found, "parent": hosted.name}


def _list_models(exchange: Exchange) -> None:
    found = [_model_entry(one, adapter) for one in exchange.server.models for adapter in (None, *one.adapters)]
    exchange.connection.respond_json({"object": "list", "data": found})


def _send_model(exchange: Exchange) -> None:
    exchange.connection.respond_json(_model_entry(*find_model(exchange.server, unquote(exchange.path.removeprefix("/v1/models/")))))


# ---- status ----------------------------------------------------------------------------------------------------------


def _send_preflight(exchange: Exchange) -> None:
    exchange.connection.preflight()


def _send_health(exchange: Exchange) -> None:
    """200 if a request would be answered now, or as soon as the model is back in memory; else the phase."""
    server = exchange.server
    status, worker = server.health(), server.models.find().supervisor.status() if server.models.default else {}
    found = {"status": status, **{name: worker[name] for name in ("reason", "phase", "done", "total") if worker.get(name)}}
    ready = status in ("ready", "asleep")
    exchange.connection.respond_json(found, 200 if ready else 503, () if ready else TRY_AGAIN)


def _with_memory(exchange: Exchange, send: Callable[[dict[str, Message]], None]) -> None:
    """``send`` with the bytes of each model whose worker says so soon. Not at all if the client leaves before."""
    server = exchange.server

    async def go_on() -> None:
        memory = await server.models.memory(MEMORY_SECONDS)
        if waiting:
            send(memory)

    waiting = [exchange]
    exchange.left = waiting.clear
    server.tasks.spawn(go_on())


def _send_metrics(exchange: Exchange) -> None:
    server = exchange.server

    def send(memory: Mapping[str, Message]) -> None:
        ready = server.health() in ("ready", "asleep")
        text = prometheus_text(server.status(), server.counters(), server.metrics, memory, ready=ready)
        exchange.connection.respond(200, text.encode(), PROMETHEUS_TYPE)

    _with_memory(exchange, send)


def _send_status(exchange: Exchange) -> None:
    """Answer with all of it, as docs/http.md has it; with the sessions of the user who asks, and nobody else's."""
    server, connection = exchange.server, exchange.connection

    def send(memory: Mapping[str, Message]) -> None:
        recent, counts, at = server.metrics.recent, server.counters(), now()
        counts["context"] = {kind: counts["context"].get(kind, 0) for kind in CONTEXT}
        names = {session: name for (user, _, name), session in connection.names.items() if user == connection.user}
        own = []
        for one in server.sessions.by_user(connection.known_user):
            said = memory.get(one.hosted.name, {}).get("by_session", {}).get(one.id, {})
            held = {name: said.get(name) for name in ("cells", "bytes", "parked")}
            own.append({"name": names.get(one.id), "model": one.hosted.name, "busy": one.busy, **held})
        found = {
            **server.status(),
            "counts": counts,
            "throughput": {"tokens_per_second": round(recent.rate(at), 2), "by_second": recent.by_second(at)},
            "memory": {model: {name: value for name, value in found.items() if name != "by_session"} for model, found in memory.items()},
            "sessions": {"open": len(server.sessions), "own": own},
        }
        connection.respond_json(found, headers=(("Cache-Control", "no-store"),))

    _with_memory(exchange, send)


# ---- the built-in page -----------------------------------------------------------------------------------------------

_PAGE_FOLDER = Path(__file__).parent / "page"
_PAGE_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # fmt: skip
POINTER = (
    b"edge-rt speaks OpenAI's API here: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models. Also /health and /metrics.\n"
)
PAGE_PREFIX = "/page/"
_PAGE_POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
))  # fmt: skip
"""Nothing from elsewhere, nothing inline, and no text that becomes HTML: what a model writes stays text."""
_PAGE_HEADERS = (
    ("Content-Security-Policy", _PAGE_POLICY), ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"), ("Cross-Origin-Resource-Policy", "same-origin"), ("Cache-Control", "no-cache"),
)  # fmt: skip


class _PageFile(NamedTuple):
    body: bytes
    kind: str
    tag: str


@cache
def _page_files() -> dict[str, _PageFile]:
    bodies = {path.name: path.read_bytes() for path in sorted(_PAGE_FOLDER.iterdir()) if path.suffix in _PAGE_TYPES}
    return {
        name: _PageFile(body, _PAGE_TYPES[Path(name).suffix], f'"{hashlib.sha256(body).hexdigest()[:16]}"') for name, body in bodies.items()
    }  # fmt: skip


def _send_root(exchange: Exchange) -> None:
    """The page for a browser; for anybody else a line of text."""
    if "text/html" in exchange.headers.get("accept", ""):
        _send_file(exchange, _page_files()["index.html"], ("Vary", "Accept"))
    else:
        exchange.connection.respond(200, POINTER, "text/plain; charset=utf-8", (("Vary", "Accept"),))


def _send_page_file(exchange: Exchange) -> None:
    found = _page_files().get(exchange.path.removeprefix(PAGE_PREFIX))
    if found is None:
        raise ApiError(404, f"the page has no file {exchange.path:.200}", "unknown_url")
    _send_file(exchange, found)


def _send_file(exchange: Exchange, file: _PageFile, *more: tuple[str, str]) -> None:
    headers = (*_PAGE_HEADERS, ("ETag", file.tag), *more)
    tags = [tag.strip().removeprefix("W/") for tag in exchange.headers.get("if-none-match", "").split(",")]
    if file.tag in tags:
        exchange.connection.respond(304, b"", "", headers)
    else:
        exchange.connection.respond(200, file.body, file.kind, headers)


# ---- tokens, as vLLM's server has them, and feedback -----------------------------------------------------------------


def _tokenize(exchange: Exchange) -> None:
    """The tokens of a prompt; names of control tokens in it are those tokens."""
    given, _ = check_body(exchange.json(), TOKENIZE_FIELDS, ())
    fields = {"text": given["prompt"], "special": True, **({} if given.get("add_special_tokens", True) else {"bos": False})}

    def show(found: Message) -> Json:
        return {"tokens": found["tokens"], "count": len(found["tokens"])}

    _ask_tokenizer(exchange, "tokenize", fields, given.get("model"), show)


def _detokenize(exchange: Exchange) -> None:
    given, _ = check_body(exchange.json(), DETOKENIZE_FIELDS, ())
    _ask_tokenizer(exchange, "detokenize", {"tokens": given["tokens"]}, given.get("model"), lambda found: {"prompt": found["text"]})


def _tokenizer_info(exchange: Exchange) -> None:
    """Of the default model: the names of the tokens that begin and end texts, and its chat template."""
    names = {"bos_token": "bos", "eos_token": "eos", "chat_template": "template", "vocab_size": "tokens"}
    _ask_tokenizer(exchange, "tokenizer", {}, None, lambda found: {name: found[own] for name, own in names.items()})


def _ask_tokenizer(exchange: Exchange, op: str, fields: Message, model: str | None, show: Callable[[Message], Json]) -> None:
    hosted, _ = find_model(exchange.server, model)
    exchange.run(op, {**fields, "model": hosted.name}, lambda message: exchange.connection.respond_json(show(message["ok"])))


def _record_feedback(exchange: Exchange) -> None:
    """Answer when it is recorded."""
    fields, _ = check_body(exchange.json(), protocol.OPS["feedback"], ())
    if "model" in fields:
        fields["model"] = require_no_adapter(find_model(exchange.server, fields["model"]), "feedback is of").name
    exchange.run("feedback", fields, lambda message: exchange.connection.respond_json({"object": "edge_rt.feedback"}))


# ---- embeddings ------------------------------------------------------------------------------------------------------


class EmbeddingRequest(NamedTuple):
    """A request that was checked. ``fields``: of ``embed``. ``dimensions``: what the model must have, if that was asked for."""

    fields: dict[str, Any]
    model: str | None
    base64: bool
    dimensions: int | None
    ignored: tuple[str, ...]


def parse_embedding_request(body: Mapping[str, Any]) -> EmbeddingRequest:
    """A request for ``/v1/embeddings``. Raises ApiError, ProtocolError."""
    given, rest = check_body(body, EMBEDDING_FIELDS, ("input",))
    form = given.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise invalid_field("encoding_format", "encoding_format is float or base64")
    extensions = protocol.check_fields(given.get("edge_rt", {}), EMBEDDING_EXTENSIONS, "edge_rt")
    truncate, dimensions = extensions.pop("truncate", False), given.get("dimensions")
    if dimensions is not None and dimensions < 1:
        raise invalid_field("dimensions", f"dimensions is {dimensions}; give 1 or more")
    if rest.get("input") is None:
        raise invalid_field("input", "there is no input; give a text or a list of texts", "missing_required_parameter")
    name, texts = openai.parse_texts("input", rest["input"], MAX_EMBEDDING_TEXTS)
    for i, text in enumerate(texts):
        if not text:
            raise invalid_field("input", f"text {i + 1} is empty and has no embedding; leave it out")
    fields = {name: texts, **extensions}
    if truncate and dimensions is not None:
        fields["dimensions"], dimensions = dimensions, None
    return EmbeddingRequest(fields, given.get("model"), form == "base64", dimensions, openai.ignored_fields(body))


class _EmbeddingAnswer:
    """One request, until its answer. Each embedding is kept as it will be written: Python's numbers would take three times the memory."""

    def __init__(self, exchange: Exchange) -> None:
        self._connection, self._asked = exchange.connection, parse_embedding_request(exchange.json())
        self._model = require_no_adapter(find_ready_model(exchange.server, self._asked.model), "embeddings come from").name
        self._data: list[str] = []
        self._tokens = 0
        exchange.run("embed", {**self._asked.fields, "model": self._model}, self._on_message)

    def _on_message(self, message: Message) -> None:
        """An embedding, or the end. Raises ApiError, ProtocolError."""
        if "event" not in message:
            self._connection.respond(200, self._answer(), "application/json", ignored_headers(self._asked.ignored))
            return
        if message["event"] != "embedding":  # it waits for memory, which is nothing to tell in an answer that is whole
            return
        row, wanted = message["embedding"], self._asked.dimensions
        if wanted is not None and wanted != len(row):
            said = "fewer mean something only if it was trained for them (Matryoshka); say so with edge_rt.truncate"
            reason = f"an embedding of this model has {len(row)} numbers and not {wanted}; {said}"
            raise invalid_field("dimensions", reason, "unsupported_value")
        written = json.dumps(pack_base64(row) if self._asked.base64 else singles(row), separators=(",", ":"))
        self._connection.hold_answer(len(written))
        self._data.append(f'{{"object":"embedding","index":{message["index"]},"embedding":{written}}}')
        self._tokens += message["tokens"]

    def _answer(self) -> bytes:
        usage = {"prompt_tokens": self._tokens, "total_tokens": self._tokens}
        rest = json.dumps({"model": self._model, "usage": usage}, ensure_ascii=False, separators=(",", ":"))
        return f'{{"object":"list","data":[{",".join(self._data)}],{rest[1:]}'.encode()


def pack_base64(row: Sequence[float]) -> str:
    """As OpenAI packs it: single precision, little-endian, in base64."""
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()


# ---- scores ----------------------------------------------------------------------------------------------------------


class ScoreRequest(NamedTuple):
    """A request that was checked. ``fields``: of ``score``. ``rivals``: to be shown with each token. ``more``: a token behind each text."""

    fields: dict[str, Any]
    model: str | None
    rivals: int
    more: bool = False
    ignored: tuple[str, ...] = ()


def parse_echo(body: Mapping[str, Any]) -> ScoreRequest:
    """A request for ``/v1/completions`` with ``echo``. Raises ApiError."""
    others = {name: value for name, value in body.items() if name != "echo"}
    given, rest = check_body(others, openai.COMPLETION_FIELDS, ("stop", "prompt"))
    rivals, most = given.get("logprobs"), given.get("max_tokens", 16)
    if rivals is None:
        raise invalid_field("echo", "echo is for scoring a prompt; set logprobs too, or leave echo out", "unsupported_value")
    if given.get("stream"):
        raise invalid_field("stream", "what is scored comes as a whole; leave stream out", "unsupported_value")
    if most not in (0, 1) or (most == 1 and given.get("temperature", 1) != 0):
        raise invalid_field("max_tokens", "with echo, max_tokens is 0, or 1 at temperature 0", "unsupported_value")
    name, prompts = openai.parse_texts("prompt", rest.get("prompt"), MAX_SCORE_TEXTS)
    if not all(prompts):
        raise invalid_field("prompt", "one of the prompts is empty and has no likelihood; leave it out", "invalid_type")
    fields = {name: prompts, "top": _check_top_logprobs("logprobs", rivals), "beyond": most == 1, "pieces": True}
    return ScoreRequest(fields, given.get("model"), rivals, most == 1, openai.ignored_fields(body))


def parse_score_request(body: Mapping[str, Any]) -> ScoreRequest:
    """A request for ``/edge-rt/score``. Raises ApiError."""
    given, _ = check_body(body, SCORE_FIELDS, ())
    if ("prompt" in given) == ("messages" in given):
        raise invalid_field("prompt", "continuations continue a prompt or messages; give one of them", "missing_required_parameter")
    if not 1 <= len(given["continuations"]) <= MAX_SCORE_TEXTS:
        raise invalid_field("continuations", f"there are {len(given['continuations'])} continuations; give 1 to {MAX_SCORE_TEXTS}")
    rivals = _check_top_logprobs("top_logprobs", given.get("top_logprobs", 0))
    before = {"prompt": given["prompt"]} if "prompt" in given else {"messages": openai.normalize_messages(given["messages"])}
    return ScoreRequest({**before, "continuations": given["continuations"], "top": rivals, "pieces": True}, given.get("model"), rivals)


def _check_top_logprobs(name: str, given: int) -> int:
    if not 0 <= given <= MAX_LOGPROBS:
        raise invalid_field(name, f"log-probabilities can be of 0 to {MAX_LOGPROBS} tokens")
    return given


class _ScoreAnswer:
    """One request for scores, until its answer. ``echo``: as OpenAI's first models had it."""

    def __init__(self, exchange: Exchange, asked: ScoreRequest, *, echo: bool) -> None:
        self._connection, self._asked, self._echo = exchange.connection, asked, echo
        self._model = require_no_adapter(find_ready_model(exchange.server, asked.model), "scores come from").name
        self._scores: list[Message] = []
        exchange.run("score", {**asked.fields, "model": self._model}, self._on_message)

    def _on_message(self, message: Message) -> None:
        if message.get("event") == "scored":
            self._scores += message["scores"]
        elif "event" not in message:
            self._connection.respond_json(self._answer(message["ok"]["tokens"]), headers=ignored_headers(self._asked.ignored))

    def _answer(self, tokens: int) -> Json:
        more = len(self._scores) if self._asked.more else 0
        usage = {"prompt_tokens": tokens, "completion_tokens": more, "total_tokens": tokens + more}
        if self._echo:
            head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "system_fingerprint": f"edge-rt-{__version__}"}
            choices = [self._choice(index, one) for index, one in enumerate(self._scores)]
            return {**head, "created": int(time.time()), "model": self._model, "choices": choices, "usage": usage}
        data = [{"index": index, **self._scored(one)} for index, one in enumerate(self._scores)]
        return {"object": "edge_rt.scores", "model": self._model, "data": data, "usage": usage}

    def _scored(self, score: Message) -> Json:
        pieces, logprobs = list(map(_decode, score["pieces"])), list(map(_finite, score["logprobs"]))
        found = {"tokens": score["tokens"], "pieces": pieces, "logprobs": logprobs}
        return {**found, "top_logprobs": [_top_logprobs(one) for one in score["top"]]} if self._asked.rivals else found

    def _choice(self, index: int, score: Message) -> Json:
        """As OpenAI's completions had it: the first token's log-probability is null, for nothing is before it."""
        pieces = [score["first"], *score["pieces"]]
        logprobs: list[float | None] = [None, *map(_finite, score["logprobs"])]
        rivals: list[Json | None] = [None, *map(_top_logprobs, score.get("top", ()))]
        if self._asked.more:
            _, logprob, piece = score["beyond"][0]
            pieces.append(piece)
            logprobs.append(_finite(logprob))
            rivals.append(_top_logprobs(score["beyond"][: self._asked.rivals]))
        texts = list(map(_decode, pieces))
        *offsets, _ = accumulate(map(len, texts), initial=0)
        shown = {
            "tokens": texts, "token_logprobs": logprobs, "top_logprobs": rivals if self._asked.rivals else None, "text_offset": offsets,
        }  # fmt: skip
        text = b"".join(pieces).decode(errors="replace")
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": "length"}


def _finite(logprob: float) -> float:
    """JSON has no minus infinity."""
    return max(logprob, MIN_LOGPROB)


def _top_logprobs(rivals: Sequence[Sequence[Any]]) -> dict[str, float]:
    return {_decode(piece): _finite(logprob) for _, logprob, piece in reversed(rivals)}  # of tokens that look alike the likeliest stays


def _decode(piece: bytes) -> str:
    return piece.decode(errors="replace")


def _score(exchange: Exchange) -> None:
    _ScoreAnswer(exchange, parse_score_request(exchange.json()), echo=False)


# ---- generation ------------------------------------------------------------------------------------------------------


def _complete(exchange: Exchange) -> None:
    body = exchange.json()
    if body.get("echo") is True:
        _ScoreAnswer(exchange, parse_echo(body), echo=True)
    else:
        _generate(exchange, openai.parse_completion(body))


def _chat(exchange: Exchange) -> None:
    _generate(exchange, openai.parse_chat(exchange.json()))


def _generate(exchange: Exchange, asked: GenerateRequest) -> None:
    hosted, adapter = find_ready_model(exchange.server, asked.model)
    if adapter is not None:
        asked = openai.with_adapter(asked, hosted.name, adapter)
    GenerationAnswer(exchange, asked, hosted.name, display_name(hosted, adapter)).start()


class GenerationAnswer:
    """One generation, from the request to the end of its answer."""

    def __init__(self, exchange: Exchange, asked: GenerateRequest, model: str, shown_name: str) -> None:
        """``shown_name``: what the model is called in the answer."""
        self._exchange, self._asked, self._headers = exchange, asked, ignored_headers(asked.ignored)
        self._connection = exchange.connection
        self._model, self._builder = model, openai.CompletionBuilder(asked, shown_name)
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
            self._exchange.heard = self._on_session
            self._connection.run("open_session", {"keep": True, "model": self._model}, 0)

    @property
    def _session_name(self) -> tuple[int, str, str]:
        assert self._asked.session is not None, "there is one"
        return self._connection.known_user, self._model, self._asked.session

    def _close(self, session: str) -> None:
        sessions = self._exchange.server.sessions
        sessions.close(sessions.get(session, self._connection.known_user, self._connection))

    def _on_session(self, message: Message) -> None:
        """There is a session now, for this request and those that name it later."""
        names, own = self._connection.names, message["ok"]["session"]
        for name in [name for name, session in names.items() if session not in self._exchange.server.sessions]:
            del names[name]
        session = names.setdefault(self._session_name, own)
        if session != own:  # another request has named it meanwhile
            self._close(own)
        self._run({"session": session})

    def _run(self, session: Message) -> None:
        self._exchange.run("generate", {**self._asked.fields, **session}, self._on_message)

    def _on_message(self, message: Message) -> None:
        """An event, or the end."""
        ended = "event" not in message
        chunks = [] if ended else self._builder.add_event(message)
        if not self._asked.stream:
            if ended:
                self._connection.respond_json(self._builder.completion(), headers=self._headers)
            return
        if message.get("event") == "queued":
            self._connection.comment(f"queued: {message['reason']}", self._headers)
            return
        if not self._begun:
            self._begun = True
            chunks = self._builder.first_chunks() + chunks
        for chunk in chunks:
            self._connection.stream(json.dumps(chunk, ensure_ascii=False, separators=(",", ":")), self._headers)
        if ended:
            self._connection.stream("[DONE]")
            self._connection.stream_end()


# ---- routing ---------------------------------------------------------------------------------------------------------

ROUTES = (
    Route("/", "GET", _send_root, needs_key=False),
    Route(f"{PAGE_PREFIX}{{file}}", "GET", _send_page_file, needs_key=False),
    Route("/health", "GET", _send_health, needs_key=False),
    Route("/metrics", "GET", _send_metrics),
    Route("/edge-rt/status", "GET", _send_status),
    Route("/v1/models", "GET", _list_models),
    Route("/v1/models/{model}", "GET", _send_model),
    Route("/v1/chat/completions", "POST", _chat),
    Route("/v1/completions", "POST", _complete),
    Route("/edge-rt/score", "POST", _score),
    Route("/edge-rt/feedback", "POST", _record_feedback),
    Route("/v1/embeddings", "POST", _EmbeddingAnswer),
    Route("/tokenize", "POST", _tokenize),
    Route("/detokenize", "POST", _detokenize),
    Route("/tokenizer_info", "GET", _tokenizer_info),
)
PREFLIGHT = Route("preflight", "OPTIONS", _send_preflight, needs_key=False)


def find_route(method: str, path: str) -> Route:
    """Raises ApiError: there is no such path, or not with this method."""
    known = [route for route in ROUTES if re.fullmatch(re.sub(r"\{\w+\}", ".+", route.path), path)]
    for route in known:
        if route.method == method or (method == "HEAD" and route.method == "GET"):
            return route
    if known:
        allowed = ", ".join(route.method for route in known)
        raise ApiError(405, f"{path:.200} takes {allowed} and not {method:.20}", "method_not_allowed", headers=(("Allow", allowed),))
    raise ApiError(404, f"there is nothing at {method:.20} {path:.200}; see docs/http.md", "unknown_url")


def connection_factory(server: Operations, http: HttpConfig) -> Callable[[], HttpConnection]:
    """Makes the connection of each client; the names that clients give to sessions are of all connections."""
    return partial(HttpConnection, server, http, {}, find_route, PREFLIGHT)
