"""Who is asked: a server over HTTP in OpenAI's form, or a model in this process. What goes wrong with a request is an outcome of it."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from edge_rt.hooks import EdgeError, UserError
from edge_rt_distill.addresses import read_address

if TYPE_CHECKING:
    import httpx2

    from edge_rt import Model

Hear = Callable[[str, "int | None"], None]
"""Is told of each piece when it comes, on any thread: its text, and how many tokens the answer has so far, None where that is not said."""


class Question(NamedTuple):
    """A request as it is asked. ``body``: with the whole conversation. ``session``: that it belongs to, by a name of this run."""

    path: str
    body: Mapping[str, Any]
    session: str | None = None


class Ending(NamedTuple):
    """What is said at an answer's end. ``prompt_seconds``: for which the prompt was read. None: not said."""

    finish_reason: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_seconds: float | None = None


class Failed(Exception):
    """A request has no answer: ``code`` is the server's, ``connection``, or ``protocol`` for an answer that is none. ``wait``: seconds
    for which the server asks its client to stay away.
    """

    def __init__(self, code: str, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.code, self.wait = code, wait


class Facts(NamedTuple):
    """``name``: who answers, for people. ``daemon``: it is edge-rt's. ``pid``: of its process, None: not known, or not on this machine.
    ``worker``: of the process with the default model."""

    name: str
    daemon: bool = False
    pid: int | None = None
    worker: int | None = None


class Target(Protocol):
    """One who answers. ``left_out``: fields of requests that it does not know, and of how many requests each was left out."""

    left_out: Counter[str]

    async def look(self) -> Facts:
        """Who it is, just now. Raises UserError if it does not answer."""
        ...

    async def ask(self, question: Question, hear: Hear) -> Ending:
        """The answer, piece by piece. Cancelled, it ends the request as a client does that goes away. Raises Failed."""
        ...

    async def close(self) -> None:
        """Let go of it."""
        ...


# ---- over HTTP -----------------------------------------------------------------------------------------------------------------------

_STREAM: Mapping[str, Mapping[str, bool]] = {
    "edge-rt": {"include_usage": True, "continuous_usage_stats": True}, "vllm": {"include_usage": True, "continuous_usage_stats": True},
}  # fmt: skip
"""``stream_options`` by who owns the models; others may refuse a field they do not know."""
_USUAL = {"include_usage": True}


class Server:
    """An endpoint in OpenAI's form at ``http://HOST:PORT``, ``https://...`` or ``unix:/PATH``; make it in a running loop, and close it.

    ``model``: put in place of every request's. Raises OptionError.
    """

    def __init__(self, url: str, *, key: str | None = None, model: str | None = None) -> None:
        import httpx2

        self._url, self._model = url.rstrip("/").removesuffix("/v1"), model
        base, socket, self._here = read_address(url)
        self.left_out: Counter[str] = Counter()
        self._owner, self._known = "", ""
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(
            transport=httpx2.AsyncHTTPTransport(uds=socket, limits=limits) if socket else None,
            base_url=base,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=None,  # the driver's own, over all of a request
            limits=limits,
            trust_env=not self._here,  # a proxy stands before others only
        )

    async def look(self) -> Facts:
        """See Target."""
        try:
            return await self._look()
        except (LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{self._url} does not say as OpenAI's servers do which models it has ({error!r}); see --url") from error

    async def _look(self) -> Facts:
        listed = (await self._get("/v1/models")).get("data") or [{}]
        self._owner, self._known = str(listed[0].get("owned_by", "")), str(listed[0].get("id", ""))
        name = f"{self._owner or 'a server'} at {self._url}, model {self._model or self._known}"
        if self._owner != "edge-rt":
            return Facts(name)
        status = await self._get("/edge-rt/status")
        pids = (status["server"]["pid"], status["worker"]["pid"]) if self._here else (None, None)
        return Facts(name.replace("edge-rt", f"edge-rt {status['server']['version']}", 1), True, *pids)

    async def _get(self, path: str) -> dict[str, Any]:
        import httpx2

        try:
            answer = await self._client.get(path, timeout=10)
            if answer.status_code in (404, 405):  # a server may do without
                return {}
            if answer.status_code != 200:
                said = f"HTTP {answer.status_code} ({_said(answer.content)})"
                raise UserError(f"{self._url}{path} answers with {said}; see --url and --key-file")
            found = answer.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise UserError(f"nobody answers at {self._url}{path} ({error!r}); start the server, or let --start do it") from error
        return found if isinstance(found, dict) else {}

    async def ask(self, question: Question, hear: Hear) -> Ending:
        """See Target."""
        import httpx2

        body = self._adapted(question)
        try:
            async with self._client.stream("POST", question.path, json=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    raise _refusal(response.status_code, response.content, response.headers.get("retry-after", ""))
                return await _listen(response, hear)
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise Failed("connection", repr(error)) from error

    def _adapted(self, question: Question) -> dict[str, Any]:
        """The body for this server."""
        body = {**question.body, "stream": True, "stream_options": _STREAM.get(self._owner, _USUAL)}
        if self._model or (self._owner != "edge-rt" and "model" not in body):
            body["model"] = self._model or self._known
        if self._owner == "edge-rt":
            own = body.get("edge_rt") or {}
            if question.session and isinstance(own, dict):
                body["edge_rt"] = {**own, "session": question.session}
        elif body.pop("edge_rt", None):
            self.left_out["edge_rt"] += 1
        return body

    async def close(self) -> None:
        """See Target."""
        await self._client.aclose()


def _said(content: bytes) -> str:
    return " ".join(content.decode(errors="replace").split())[:200]


def _refusal(status: int, content: bytes, wait: str) -> Failed:
    """The error of an answer other than 200. ``wait``: its Retry-After; one that is a date is not followed."""
    try:
        record = json.loads(content)
    except ValueError:
        record = None
    found = _error(record, status) or Failed(f"http_{status}", _said(content))
    found.wait = float(wait) if wait.isdecimal() else 0.0
    return found


def _error(record: Any, status: int) -> Failed | None:
    """``{"error": {...}}`` in OpenAI's form. Codes that are numbers are HTTP's."""
    error = record.get("error") if isinstance(record, dict) else None
    if not error:
        return None
    named = error if isinstance(error, dict) else {"message": str(error)}
    code = next((named[name] for name in ("code", "type") if isinstance(named.get(name), str) and named[name]), f"http_{status}")
    return Failed(code, str(named.get("message", error)))


async def _listen(response: httpx2.Response, hear: Hear) -> Ending:
    """Tells the pieces of a stream. Raises Failed."""
    ending, complete = Ending(""), False
    async for data in _events(response.aiter_bytes()):
        if data == b"[DONE]":
            complete = True
            break
        try:
            chunk = json.loads(data)
            if error := _error(chunk, response.status_code):
                raise error
            ending = _take(chunk, ending, hear)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise Failed("protocol", f"a chunk that cannot be read ({error!r}): {_said(data)}") from error
    if not (complete or ending.finish_reason):
        kind = response.headers.get("content-type", "")
        if "event-stream" not in kind:
            raise Failed("protocol", f"the answer is no stream of events but {kind or 'of no type'}")
        raise Failed("connection", "the stream ended in the middle of the answer")
    return ending


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of server-sent events. They are cut at line ends before they are text: a character may come in two pieces."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _take(chunk: Mapping[str, Any], ending: Ending, hear: Hear) -> Ending:
    """Tell what a chunk has of the answer; what is known of its end after it."""
    usage, timings = chunk.get("usage") or {}, chunk.get("timings") or {}
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or {}
        functions = [one["function"] for one in delta.get("tool_calls") or ()]
        called = "".join((one.get("name") or "") + (one.get("arguments") or "") for one in functions)
        text = (choice.get("text") or "") + (delta.get("content") or "") + called
        if text or delta.get("reasoning_content"):
            hear(text if not choice.get("index") else "", usage.get("completion_tokens"))  # of several answers the first
        ending = ending._replace(finish_reason=choice.get("finish_reason") or ending.finish_reason)
    if usage:
        ending = ending._replace(prompt_tokens=usage.get("prompt_tokens"), completion_tokens=usage.get("completion_tokens"))
    if "prompt_ms" in timings:  # llama-server's
        ending = ending._replace(prompt_seconds=timings["prompt_ms"] / 1000)
    if own := (chunk.get("edge_rt") or {}).get("timings"):
        ending = ending._replace(prompt_seconds=own["prompt"])
    return ending


# ---- in this process -----------------------------------------------------------------------------------------------------------------

_OPTIONS = (
    "max_tokens", "stop", "logprobs", "tools", "temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "top_k", "min_p",
    "typical_p", "repeat_penalty", "repeat_last_n", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "grammar",
    "json_schema", "speculate", "post", "ignore_eos", "context",
)  # fmt: skip
"""Options of a session's ``generate`` that a body, or its map ``edge_rt``, may have."""
_HARMLESS = ("messages", "prompt", "model", "user", "metadata", "stream", "session", "priority")
_REASONS = {"end_of_generation": "stop", "stop_string": "stop", "cancelled": "cancelled"}


class InProcess:
    """A GGUF in edge-rt, or with ``engine="llama_cpp"`` in llama.cpp, in this process. It answers one at a time, the others wait."""

    def __init__(self, path: Path, *, engine: str | None = None, context: int | None = None) -> None:
        """Raises what ``edge_rt.open`` raises."""
        import edge_rt

        self.left_out: Counter[str] = Counter()
        self._model: Model = edge_rt.open(path, engine=engine, context=context)
        self._name = path.name
        self._turn = asyncio.Lock()

    async def look(self) -> Facts:
        """See Target."""
        return Facts(f"{self._model.info.engine} in this process, model {self._name}", pid=os.getpid())

    async def ask(self, question: Question, hear: Hear) -> Ending:
        """See Target. What prompts share is not computed again, as their cells stay with the model."""
        prompt = question.body["messages"] if "messages" in question.body else question.body["prompt"]
        try:
            options = self._options(question.body)
            async with self._turn:
                with self._model.session() as session:
                    answering = asyncio.ensure_future(asyncio.to_thread(_answer, partial(session.generate, prompt, **options), hear))
                    try:
                        return await asyncio.shield(answering)
                    except asyncio.CancelledError:
                        while not answering.done():  # again and again: one that comes before the first step is forgotten
                            session.cancel()
                            await asyncio.wait([answering], timeout=0.05)
                        raise
        except (EdgeError, TypeError, ValueError, AttributeError, LookupError) as error:  # a body may hold anything
            raise Failed(type(error).__name__, str(error)) from error

    def _options(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Of ``generate``; what it has not is left out and counted."""
        given = {**{name: value for name, value in body.items() if name != "edge_rt"}, **body.get("edge_rt", {})}
        if "max_completion_tokens" in given:
            given["max_tokens"] = given.pop("max_completion_tokens")
        form = given.pop("response_format", {})
        if form.get("type") == "json_object":
            given["json_schema"] = {"type": "object"}
        elif form.get("type") == "json_schema":
            given["json_schema"] = form.get("json_schema", {}).get("schema")
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        self.left_out.update(name for name, value in given.items() if name not in (*_OPTIONS, *_HARMLESS) and value is not None)
        return {name: given[name] for name in _OPTIONS if given.get(name) is not None}

    async def close(self) -> None:
        """See Target."""
        self._model.close()


def _answer(generate: Callable[[], Iterable[Any]], hear: Hear) -> Ending:
    """Tells the events of a session, on a thread of its own. Raises what ``generate`` raises."""
    tokens = 0
    for event in generate():
        if hasattr(event, "text"):  # of what happens, only pieces of the answer have it
            tokens += len(event.tokens) + event.concealed
            if event.text:
                hear(event.text, tokens)
    usage = event.usage  # the last one sums up
    return Ending(_REASONS.get(event.reason, "length"), usage.prompt_tokens, usage.completion_tokens, event.timings.prompt)
