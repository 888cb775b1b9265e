"""OpenAI's API in terms of the protocol: errors, bodies and requests in, completions and tool calls out.

Every field of a request is checked; what cannot be done is refused, what changes nothing is ignored and named in a header.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from edge_rt import __version__
from edge_rt.daemon import protocol
from edge_rt.daemon.protocol import MAX_DEPTH, Message
from edge_rt.errors import UserError

TRY_AGAIN = (("Retry-After", "1"),)

STATUS: Mapping[str, tuple[int, str]] = {
    "bad_request": (400, "invalid_value"),
    "option": (400, "invalid_value"),
    "constraint": (400, "invalid_value"),
    "plugin": (400, "invalid_value"),
    "context_overflow": (400, "context_length_exceeded"),
    "context": (400, "context_length_exceeded"),
    "not_recording": (400, "not_recording"),
    "frame_too_long": (413, "request_too_large"),
    "not_allowed": (403, "not_allowed"),
    "limit": (429, "rate_limit_exceeded"),
    "busy": (429, "rate_limit_exceeded"),
    "draining": (503, "draining"),
    "no_model": (503, "no_model"),
    "unloaded": (503, "no_model"),
    "model_file": (503, "model_file"),
    "worker_died": (503, "worker_died"),
    "worker_hung": (503, "worker_hung"),
    "session_lost": (503, "session_lost"),
    "cancelled": (503, "cancelled"),
    "out_of_memory": (503, "out_of_memory"),
}
"""The status and OpenAI's code, where there is one, of the protocol's codes; any other is 500 and keeps its name."""

_ERROR_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(UserError):
    """An answer that is an error. ``more``: further fields of the body."""

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, headers: tuple[tuple[str, str], ...] = (), **more: Any
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param, self.headers, self.more = status, code, param, headers, more

    def body(self) -> dict[str, Any]:
        kind = _ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code, **self.more}}


def invalid_field(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field of the body that cannot be."""
    return ApiError(400, message, code, param=param)


def to_api_error(error: BaseException) -> ApiError:
    return error if isinstance(error, ApiError) else from_protocol(protocol.describe_error(error))


def from_protocol(found: Message) -> ApiError:
    rest = dict(found)
    own, message = rest.pop("code"), rest.pop("message")
    status, code = STATUS.get(own, (500, own))
    headers: tuple[tuple[str, str], ...] = ()
    if status in (429, 503):
        headers = (("Retry-After", str(max(1, math.ceil(rest.pop("retry_after", 1))))),)
    return ApiError(status, message, code, headers=headers, **rest)


_MAX_BODY_DEPTH = MAX_DEPTH - 2  # what is passed on to the worker is in two more maps
_INTEGER_RANGE = range(-(1 << 63), 1 << 63)  # what a frame can hold


def parse_body(body: bytes) -> dict[str, Any]:
    """Decode a JSON object that a frame of the protocol can hold. Raises ApiError: malformed_json."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise _malformed("the body is not UTF-8") from None
    except ValueError as error:
        raise _malformed(f"the body is no JSON: {error}") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(found, dict):
        raise _malformed("the body is JSON and no map; give a map with the request's fields")
    if protocol.depth(found) > _MAX_BODY_DEPTH:
        raise _too_deep()
    _check_value(found)
    return found


def _check_value(value: Any) -> None:
    """Raises ApiError for a text or number at any depth that MessagePack cannot encode."""
    if isinstance(value, dict):
        _check_value(list(value))
        _check_value(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            _check_value(one)
    elif isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise _malformed("a text has half of a surrogate pair in it; write the character itself") from None
    elif (isinstance(value, float) and not math.isfinite(value)) or (isinstance(value, int) and value not in _INTEGER_RANGE):
        raise _malformed("a number is too large")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _too_deep() -> ApiError:
    return _malformed(f"the body has more than {_MAX_BODY_DEPTH} maps and lists in each other")


def _malformed(message: str) -> ApiError:
    return ApiError(400, message, "malformed_json")


SAME_FIELDS: Mapping[str, str] = {
    "temperature": "number", "top_p": "number", "seed": "integer", "presence_penalty": "number", "frequency_penalty": "number",
    "logit_bias": "map",
}  # fmt: skip
"""Fields that are options of the protocol, under the same name."""
RANGES = {"temperature": (0, 2), "top_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}  # OpenAI's
COMMON_FIELDS: Mapping[str, str] = {
    **SAME_FIELDS,
    "model": "text",
    "stream": "flag",
    "stream_options": "map",
    "max_tokens": "integer",
    "edge_rt": "map",
}
CHAT_FIELDS: Mapping[str, str] = {
    **COMMON_FIELDS, "messages": "maps!", "max_completion_tokens": "integer", "logprobs": "flag", "top_logprobs": "integer",
    "tools": "maps", "response_format": "map",
}  # fmt: skip
COMPLETION_FIELDS: Mapping[str, str] = {**COMMON_FIELDS, "logprobs": "integer"}
"""Kinds of fields, as the protocol's; ``stop``, ``prompt`` and ``tool_choice`` may be of several."""
STREAM_FIELDS: Mapping[str, str] = {"include_usage": "flag", "continuous_usage_stats": "flag", "include_obfuscation": "flag"}
"""Fields of ``stream_options``. ``continuous_usage_stats`` is vLLM's."""

FIXED_VALUES: Mapping[str, Sequence[Any]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "parallel_tool_calls": (True,), "modalities": (["text"],),
    "functions": ([],), "function_call": ("none",), "store": (False,),
}  # fmt: skip
"""Fields that may be given if their value asks for nothing that is not done here."""
IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prediction")
"""Fields that change nothing in the answer."""

_NAMED_BY_OPENAI = ("max_tokens", "stop", "json_schema", "logprobs", "tools", *SAME_FIELDS)
EXTENSION_FIELDS: Mapping[str, str] = {
    "session": "text", "priority": "text", **{name: kind for name, kind in protocol.OPTIONS.items() if name not in _NAMED_BY_OPENAI},
}  # fmt: skip
"""Fields of ``edge_rt``: options of the protocol that OpenAI has no name for."""

ROLES: Mapping[str, str] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MAX_LOGPROBS = 20


class GenerateRequest(NamedTuple):
    """A request that was checked. ``fields``: of ``generate``. ``rivals``: to be shown with each token, None without log-probabilities.

    ``include_usage``: in a chunk of its own; ``usage_so_far``: and in each before.
    ``tools``: names of functions that may be called. ``session``: the client's name for it. ``ignored``: fields that were.
    """

    fields: dict[str, Any]
    chat: bool
    model: str | None = None
    stream: bool = False
    include_usage: bool = False
    usage_so_far: bool = False
    rivals: int | None = None
    tools: frozenset[str] = frozenset()
    session: str | None = None
    ignored: tuple[str, ...] = ()


def parse_chat(body: Mapping[str, Any]) -> GenerateRequest:
    """A request for ``/v1/chat/completions``. Raises ApiError, ProtocolError."""
    given, rest = check_body(body, CHAT_FIELDS, ("stop", "tool_choice"))
    options = _parse_options(given, rest)
    if "max_completion_tokens" in given:
        if given.get("max_tokens", given["max_completion_tokens"]) != given["max_completion_tokens"]:
            raise invalid_field("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        options["max_tokens"] = given["max_completion_tokens"]
    rivals = _parse_top_logprobs(given)
    names = _parse_tools(given.get("tools", []), rest.get("tool_choice"), options)
    _parse_response_format(given.get("response_format", {}), options)
    if names and "json_schema" in options:
        raise invalid_field("response_format", "a response format leaves no room for a call; give tools or a response_format")
    fields = {"messages": normalize_messages(given["messages"])}
    return _build_request(body, given, fields, options, chat=True, rivals=rivals, tools=names)


def parse_completion(body: Mapping[str, Any]) -> GenerateRequest:
    """A request for ``/v1/completions``. Raises ApiError, ProtocolError."""
    given, rest = check_body(body, COMPLETION_FIELDS, ("stop", "prompt"))
    field, prompts = _texts_or_tokens("prompt", rest.get("prompt"))
    if len(prompts) != 1 or prompts[0] == []:
        raise invalid_field("prompt", "the prompt is not one text; give a text or its tokens, or a list with one of them", "invalid_type")
    fields = {"prompt" if field == "texts" else field: prompts[0]}
    return _build_request(body, given, fields, _parse_options(given, rest), chat=False, rivals=given.get("logprobs"))


def _build_request(
    body: Mapping[str, Any], given: dict[str, Any], fields: dict[str, Any], options: dict[str, Any], *, rivals: int | None, **more: Any
) -> GenerateRequest:
    if rivals is not None:
        if not 0 <= rivals <= MAX_LOGPROBS:
            raise invalid_field("top_logprobs" if more["chat"] else "logprobs", f"log-probabilities can be of 0 to {MAX_LOGPROBS} tokens")
        options["logprobs"], fields["pieces"] = max(1, rivals), True
    extensions = protocol.check_fields(given.get("edge_rt", {}), EXTENSION_FIELDS, "edge_rt")
    session, priority = extensions.pop("session", None), extensions.pop("priority", None)
    if session is not None and not 1 <= len(session) <= 256:
        raise invalid_field("edge_rt.session", "the name of a session has 1 to 256 characters")
    if priority is not None:
        fields["priority"] = priority
    stream_options = protocol.check_fields(given.get("stream_options", {}), STREAM_FIELDS, "stream_options")
    if stream_options and not given.get("stream"):
        raise invalid_field("stream_options", "stream_options are only for a stream; set stream too")
    return GenerateRequest(
        fields={**fields, "options": {**options, **extensions}, **({"model": given["model"]} if "model" in given else {})},
        rivals=rivals,
        model=given.get("model"),
        stream=given.get("stream", False),
        include_usage=stream_options.get("include_usage", False),
        usage_so_far=stream_options.get("continuous_usage_stats", False),
        session=session,
        ignored=ignored_fields(body),
        **more,
    )


# ---- fields ----------------------------------------------------------------------------------------------------------


def check_body(body: Mapping[str, Any], kinds: Mapping[str, str], others: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields that are not null: those of a kind, and the ``others``. Raises ApiError."""
    given: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in IGNORED:
            continue
        if name in others:
            rest[name] = value
        elif name in kinds:
            kind = protocol.KINDS[kinds[name].rstrip("!")]
            if not kind.fits(value):
                raise invalid_field(name, f"{name} is not {kind.shown}", "invalid_type")
            given[name] = value
        elif name not in FIXED_VALUES:
            raise invalid_field(name, f"there is no field {name:.80} here; leave it out", "unknown_parameter")
        elif not any(value == one and type(value) is type(one) for one in FIXED_VALUES[name]):
            raise invalid_field(name, f"{name} can only be {FIXED_VALUES[name][0]!r} here; leave it out", "unsupported_value")
    for name in kinds:
        if kinds[name].endswith("!") and name not in given:
            raise invalid_field(
                name, f"there is no {name}; give {protocol.KINDS[kinds[name].rstrip('!')].shown}", "missing_required_parameter"
            )
    return given, rest


def parse_texts(name: str, given: Any, most: int) -> tuple[str, list[Any]]:
    """The field ``name``, of at most so many texts: see ``_texts``. Raises ApiError."""
    found, texts = _texts_or_tokens(name, given)
    if not 1 <= len(texts) <= most:
        raise invalid_field(name, f"there are {len(texts)} texts; give 1 to {most}")
    return found, texts


def _texts_or_tokens(name: str, given: Any) -> tuple[str, list[Any]]:
    """A text, texts, tokens of one text, or of several; as ``texts`` or ``tokens``, in a list of their texts. Raises ApiError."""
    texts = [given] if isinstance(given, str) else given
    if protocol.KINDS["ids"].fits(texts) and texts:
        texts = [texts]
    found = next((field for field, kind in (("texts", "texts"), ("tokens", "id lists")) if protocol.KINDS[kind].fits(texts)), None)
    if found is None:
        raise invalid_field(name, f"the {name} is neither a text, nor tokens, nor a list of either", "invalid_type")
    return found, texts


def _parse_options(given: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: given[name] for name in ("max_tokens", *SAME_FIELDS) if name in given}
    for name, (least, most) in RANGES.items():
        if name in found and not least <= found[name] <= most:
            raise invalid_field(name, f"{name} is {found[name]}; give {least} to {most}")
    if (stop := rest.get("stop")) is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if not protocol.KINDS["texts"].fits(stops):
            raise invalid_field("stop", "stop is neither a text nor a list of texts", "invalid_type")
        found["stop"] = stops
    return found


def _parse_top_logprobs(given: Mapping[str, Any]) -> int | None:
    if given.get("logprobs"):
        return int(given.get("top_logprobs", 0))
    if given.get("top_logprobs"):
        raise invalid_field("top_logprobs", "top_logprobs are only told with logprobs; set logprobs too")
    return None


def _parse_tools(tools: list[Any], choice: Any, options: dict[str, Any]) -> frozenset[str]:
    """Offer functions; their names. What they are is checked where they go to the template."""
    if choice not in (None, "none", "auto"):
        message = "tool_choice can be auto or none here: no model can be bound to a call"
        raise invalid_field("tool_choice", message, "unsupported_value")
    if not tools or choice == "none":
        return frozenset()
    options["tools"] = tools
    functions = [tool.get("function") for tool in tools]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return frozenset(name for name in names if isinstance(name, str))


def _parse_response_format(given: Mapping[str, Any], options: dict[str, Any]) -> None:
    kind = given.get("type", "text")
    if kind == "json_object":
        options["json_schema"] = {"type": "object"}
    elif kind == "json_schema":
        found = given.get("json_schema")
        if not isinstance(found, dict) or not isinstance(found.get("schema"), dict):
            raise invalid_field(
                "response_format", 'the response format has no schema; give {"json_schema": {"name": ..., "schema": {...}}}'
            )
        options["json_schema"] = found["schema"]
    elif kind != "text":
        raise invalid_field("response_format", "the type of response_format is none; choose from text, json_object, json_schema")


# ---- messages --------------------------------------------------------------------------------------------------------


def normalize_messages(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates have them. Raises ApiError."""
    return [_normalize_message(i, message) for i, message in enumerate(given)]


def _normalize_message(i: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates have it: its content one text."""
    where = f"messages[{i}]"
    found = {name: value for name, value in given.items() if value is not None and name != "annotations"}
    role = found.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid_field(f"{where}.role", f"message {i} has no role of {', '.join(ROLES)}")
    for name, value in found.items():
        if name not in ("role", "content", "name", "tool_calls", "tool_call_id"):
            raise invalid_field(f"{where}.{name:.80}", f"a message has no {name:.80} here; leave it out", "unknown_parameter")
        if name in ("name", "tool_call_id") and not isinstance(value, str):
            raise invalid_field(f"{where}.{name}", f"{name} of message {i} is not a text", "invalid_type")
    found["role"] = ROLES[role]
    calls = found.get("tool_calls")
    if calls is not None:
        _check_tool_calls(where, calls)
    if "content" in found:
        found["content"] = _normalize_content(where, found["content"])
    elif calls:
        found["content"] = None
    else:
        raise invalid_field(f"{where}.content", f"message {i} has no content; give a text", "missing_required_parameter")
    return found


def _normalize_content(where: str, content: Any) -> str:
    """The text of a content, which may be in parts."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise invalid_field(f"{where}.content", "content is neither a text nor a list of parts", "invalid_type")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise invalid_field(f"{where}.content", 'a part of the content is no text; only {"type": "text", "text": ...} can be read here')
    return "".join(part["text"] for part in parts)


def _check_tool_calls(where: str, calls: Any) -> None:
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not all(isinstance(function.get(name), str) for name in ("name", "arguments")):
            form = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}'
            raise invalid_field(f"{where}.tool_calls", f"tool_calls are not as {form}", "invalid_type")


def with_adapter(asked: GenerateRequest, model: str, adapter: str) -> GenerateRequest:
    """The request as one for a model with an adapter. Raises ApiError if ``edge_rt`` names another."""
    options = asked.fields["options"]
    if options.get("adapter", adapter) != adapter:
        raise invalid_field("edge_rt.adapter", "the model and edge_rt.adapter name different adapters; give one of them")
    return asked._replace(fields={**asked.fields, "model": model, "options": {**options, "adapter": adapter}})


def ignored_fields(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the fields that changed nothing."""
    return tuple(name for name in IGNORED if body.get(name) is not None)


def ignored_headers(ignored: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Of the answer: which fields of the request changed nothing."""
    return (("Edge-RT-Ignored", ", ".join(ignored)),) if ignored else ()


BEGIN, END = "<tool_call>", "</tool_call>"


class ToolCall(NamedTuple):
    """A call. ``arguments``: JSON, as OpenAI's API has it."""

    name: str
    arguments: str


class ToolCallParser:
    """One answer: text in as it comes, text and calls out. Of text, only what may belong to a call is held back."""

    def __init__(self, names: Collection[str]) -> None:
        """``names``: of the functions that were offered; if there are none, all is text."""
        self._names = names
        self._held = ""
        self.found = 0  # calls so far

    def feed(self, text: str) -> list[str | ToolCall]:
        """Take text; what is certain now, in order."""
        if not self._names:
            return [text] if text else []
        self._held += text
        out: list[str | ToolCall] = []
        while self._held:
            start = self._held.find(BEGIN)
            if start < 0:
                certain = _certain_length(self._held)
                out += [self._held[:certain]] if certain else []
                self._held = self._held[certain:]
                break
            before = len(self._held[:start].rstrip())
            if before:
                out.append(self._held[:before])
                self._held, start = self._held[before:], start - before
            end = self._held.find(END, start)
            if end < 0:
                break
            whole, self._held = self._held[: end + len(END)], self._held[end + len(END) :]
            call = self._call(whole[start + len(BEGIN) : end])
            self.found += call is not None
            out.append(call or whole)
        return out

    def flush(self) -> list[str | ToolCall]:
        """What is left at the end. Blanks after a call are none of the answer."""
        held, self._held = self._held, ""
        return [] if not held or (self.found and not held.strip()) else [held]

    def _call(self, text: str) -> ToolCall | None:
        try:
            found: Any = json.loads(text)
        except (ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or not isinstance(found.get("arguments"), dict):
            return None
        name = found.get("name")
        if not isinstance(name, str) or name not in self._names:
            return None
        return ToolCall(name, json.dumps(found["arguments"], ensure_ascii=False))


def _certain_length(text: str) -> int:
    """How much of a text without a whole ``BEGIN`` cannot belong to one or to the blanks before it."""
    for n in range(min(len(BEGIN) - 1, len(text)), 0, -1):
        if text.endswith(BEGIN[:n]):
            return len(text[:-n].rstrip())
    return len(text.rstrip())


Json = dict[str, Any]

FINISH_REASONS = {"end_of_generation": "stop", "stop_string": "stop", "max_tokens": "length", "context_full": "length"}
MIN_LOGPROB = -9999.0  # what OpenAI says for minus infinity, which JSON has not


class CompletionBuilder:
    """One answer. ``add_event`` for each event of the generation in order; ``completion`` after the last."""

    def __init__(self, asked: GenerateRequest, model: str) -> None:
        self._asked = asked
        self._calls = ToolCallParser(asked.tools)
        self._kind = ("chat.completion" if asked.chat else "text_completion") + (".chunk" if asked.stream and asked.chat else "")
        self._head = {
            "id": ("chatcmpl-" if asked.chat else "cmpl-") + secrets.token_hex(12), "object": self._kind,
            "created": int(time.time()), "model": model, "system_fingerprint": f"edge-rt-{__version__}",
        }  # fmt: skip
        self._text: list[str] = []
        self._called: list[Json] = []
        self._logprobs: list[Json] = []
        self._offset = 0
        self._notices: list[str] = []
        self._tokens = {"prompt_tokens": 0, "completion_tokens": 0}  # so far
        self._done: Json = {}

    def first_chunks(self) -> list[Json]:
        return [self._chunk({"role": "assistant", "content": ""})] if self._asked.chat else []

    def add_event(self, message: Mapping[str, Any]) -> list[Json]:
        """Take an event; the chunks it makes. Raises ApiError if the generation was broken off."""
        kind = message["event"]
        if kind == "prompt":
            self._tokens["prompt_tokens"] = message["total"]
        elif kind == "notice":
            self._notices.append(message["message"])
        elif kind == "delta":
            self._tokens["completion_tokens"] += len(message["tokens"]) + message.get("concealed", 0)
            return list(self._delta(message))
        elif kind == "done":
            return self._finish(dict(message))
        return []

    def completion(self) -> Json:
        text, reason = "".join(self._text), self._reason
        logprobs = self._format_logprobs(self._logprobs) if self._asked.rivals is not None else None
        choice: Json = {"index": 0, "logprobs": logprobs, "finish_reason": reason}
        if self._asked.chat:
            message: Json = {"role": "assistant", "content": text if text or not self._called else None, "refusal": None}
            if self._called:
                message["tool_calls"] = self._called
            choice["message"] = message
        else:
            choice["text"] = text
        return {**self._head, "choices": [choice], "usage": self._usage(), "edge_rt": self._extensions()}

    # ---- events ------------------------------------------------------------------------------------------------------

    def _delta(self, message: Mapping[str, Any]) -> Iterator[Json]:
        entries = [self._entry(entry) for entry in message.get("logprobs", ())] if self._asked.rivals is not None else []
        if not self._asked.stream:
            self._logprobs += entries
            entries = []
        for piece in self._calls.feed(message["text"]):
            yield self._piece(piece, entries)
            entries = []  # once
        if entries:
            yield self._piece("", entries)

    def _piece(self, piece: str | ToolCall, entries: list[Json]) -> Json:
        if isinstance(piece, str):
            if not self._asked.stream:
                self._text.append(piece)
            return self._chunk({"content": piece}, entries)
        function = {"name": piece.name, "arguments": piece.arguments}
        call: Json = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        index = len(self._called)
        self._called.append(call)
        return self._chunk({"tool_calls": [{"index": index, **call}]}, entries)

    def _finish(self, done: Json) -> list[Json]:
        if done["reason"] == "cancelled":  # not by the client, who would not be there to be told
            raise from_protocol({"code": "draining", "message": "the daemon is about to end; ask again when it is back"})
        self._done = done
        chunks = [self._piece(piece, []) for piece in self._calls.flush()]
        chunks.append({**self._chunk({}, reason=self._reason), "edge_rt": self._extensions()})
        if self._asked.include_usage:
            chunks.append({**self._head, "choices": [], "usage": self._usage()})
        return chunks

    def _chunk(self, delta: Json, entries: list[Json] | None = None, reason: str | None = None) -> Json:
        choice: Json = {"index": 0, "logprobs": self._format_logprobs(entries) if entries else None, "finish_reason": reason}
        if self._asked.chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        chunk = {**self._head, "choices": [choice]}
        if not self._asked.include_usage:
            return chunk
        return {**chunk, "usage": {**self._tokens, "total_tokens": sum(self._tokens.values())} if self._asked.usage_so_far else None}

    # ---- parts -------------------------------------------------------------------------------------------------------

    @property
    def _reason(self) -> str:
        return "tool_calls" if self._called and self._done["reason"] == "end_of_generation" else FINISH_REASONS[self._done["reason"]]

    def _usage(self) -> Json:
        usage = self._done["usage"]
        prompt, completion = usage["prompt_tokens"], usage["completion_tokens"]
        return {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": usage["reused_tokens"]},
        }  # fmt: skip

    def _extensions(self) -> Json:
        """What OpenAI's answer has no place for."""
        found = {name: self._done[name] for name in ("reason", "stop", "seed", "timings", "context", "post", "rules", "answer")}
        return {**found, "usage": self._done["usage"], "notices": self._notices}

    def _entry(self, given: Mapping[str, Any]) -> Json:
        rivals = self._asked.rivals or 0
        top = [_logprob_entry(piece, logprob) for piece, (_, logprob) in zip(given["top_pieces"], given["top"], strict=True)]
        return {**_logprob_entry(given["piece"], given["logprob"]), "top_logprobs": top[:rivals]}

    def _format_logprobs(self, entries: list[Json]) -> Json:
        if self._asked.chat:
            return {"content": entries, "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{one["token"]: one["logprob"] for one in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }


def _logprob_entry(piece: bytes, logprob: float | None) -> Json:
    return {"token": piece.decode(errors="replace"), "logprob": MIN_LOGPROB if logprob is None else logprob, "bytes": list(piece)}
