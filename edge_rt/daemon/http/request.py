"""OpenAI's requests as the protocol's ``generate``: every field checked, what cannot be done refused, what is harmless left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edge_rt.daemon import protocol
from edge_rt.daemon.http.errors import wrong

SAME: Mapping[str, str] = {
    "temperature": "number", "top_p": "number", "seed": "integer", "presence_penalty": "number", "frequency_penalty": "number",
    "logit_bias": "map",
}  # fmt: skip
"""Fields that are options of the protocol, under the same name."""
RANGES = {"temperature": (0, 2), "top_p": (0, 1), "presence_penalty": (-2, 2), "frequency_penalty": (-2, 2)}
"""OpenAI's."""
BOTH: Mapping[str, str] = {**SAME, "model": "text", "stream": "flag", "stream_options": "map", "max_tokens": "integer", "edge_rt": "map"}
CHAT: Mapping[str, str] = {
    **BOTH, "messages": "maps!", "max_completion_tokens": "integer", "logprobs": "flag", "top_logprobs": "integer", "tools": "maps",
    "response_format": "map",
}  # fmt: skip
COMPLETION: Mapping[str, str] = {**BOTH, "logprobs": "integer"}
"""Kinds of fields, as the protocol's; ``stop``, ``prompt`` and ``tool_choice`` may be of several."""
STREAM: Mapping[str, str] = {"include_usage": "flag", "continuous_usage_stats": "flag", "include_obfuscation": "flag"}
"""Fields of ``stream_options``. ``continuous_usage_stats`` is vLLM's."""

ONLY: Mapping[str, Sequence[Any]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "parallel_tool_calls": (True,), "modalities": (["text"],),
    "functions": ([],), "function_call": ("none",), "store": (False,),
}  # fmt: skip
"""Fields that may be given if their value asks for nothing that is not done here."""
IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prediction")
"""Fields that change nothing in the answer."""

_NAMED_BY_OPENAI = ("max_tokens", "stop", "json_schema", "logprobs", "tools", *SAME)
EXTENSIONS: Mapping[str, str] = {
    "session": "text", "priority": "text", **{name: kind for name, kind in protocol.OPTIONS.items() if name not in _NAMED_BY_OPENAI},
}  # fmt: skip
"""Fields of ``edge_rt``: options of the protocol that OpenAI has no name for."""

ROLES: Mapping[str, str] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
MOST_RIVALS = 20


class Asked(NamedTuple):
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


def chat(body: Mapping[str, Any]) -> Asked:
    """A request for ``/v1/chat/completions``. Raises ApiError, ProtocolError."""
    given, rest = checked(body, CHAT, ("stop", "tool_choice"))
    options = _options(given, rest)
    if "max_completion_tokens" in given:
        if given.get("max_tokens", given["max_completion_tokens"]) != given["max_completion_tokens"]:
            raise wrong("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        options["max_tokens"] = given["max_completion_tokens"]
    rivals = _rivals(given)
    names = _tools(given.get("tools", []), rest.get("tool_choice"), options)
    _response_format(given.get("response_format", {}), options)
    if names and "json_schema" in options:
        raise wrong("response_format", "a response format leaves no room for a call; give tools or a response_format")
    fields = {"messages": messages_of(given["messages"])}
    return _asked(body, given, fields, options, chat=True, rivals=rivals, tools=names)


def completion(body: Mapping[str, Any]) -> Asked:
    """A request for ``/v1/completions``. Raises ApiError, ProtocolError."""
    given, rest = checked(body, COMPLETION, ("stop", "prompt"))
    field, prompts = _texts("prompt", rest.get("prompt"))
    if len(prompts) != 1 or prompts[0] == []:
        raise wrong("prompt", "the prompt is not one text; give a text or its tokens, or a list with one of them", "invalid_type")
    fields = {"prompt" if field == "texts" else field: prompts[0]}
    return _asked(body, given, fields, _options(given, rest), chat=False, rivals=given.get("logprobs"))


def _asked(
    body: Mapping[str, Any], given: dict[str, Any], fields: dict[str, Any], options: dict[str, Any], *, rivals: int | None, **more: Any
) -> Asked:
    """The request, with what both kinds have."""
    if rivals is not None:
        if not 0 <= rivals <= MOST_RIVALS:
            raise wrong("top_logprobs" if more["chat"] else "logprobs", f"log-probabilities can be of 0 to {MOST_RIVALS} tokens")
        options["logprobs"], fields["pieces"] = max(1, rivals), True
    extensions = protocol.fields(given.get("edge_rt", {}), EXTENSIONS, "edge_rt")
    session, priority = extensions.pop("session", None), extensions.pop("priority", None)
    if session is not None and not 1 <= len(session) <= 256:
        raise wrong("edge_rt.session", "the name of a session has 1 to 256 characters")
    if priority is not None:
        fields["priority"] = priority
    stream_options = protocol.fields(given.get("stream_options", {}), STREAM, "stream_options")
    if stream_options and not given.get("stream"):
        raise wrong("stream_options", "stream_options are only for a stream; set stream too")
    return Asked(
        fields={**fields, "options": {**options, **extensions}, **({"model": given["model"]} if "model" in given else {})},
        rivals=rivals,
        model=given.get("model"),
        stream=given.get("stream", False),
        include_usage=stream_options.get("include_usage", False),
        usage_so_far=stream_options.get("continuous_usage_stats", False),
        session=session,
        ignored=tuple(name for name in IGNORED if body.get(name) is not None),
        **more,
    )


# ---- fields ----------------------------------------------------------------------------------------------------------


def checked(body: Mapping[str, Any], kinds: Mapping[str, str], others: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
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
                raise wrong(name, f"{name} is not {kind.shown}", "invalid_type")
            given[name] = value
        elif name not in ONLY:
            raise wrong(name, f"there is no field {name:.80} here; leave it out", "unknown_parameter")
        elif not any(value == one and type(value) is type(one) for one in ONLY[name]):
            raise wrong(name, f"{name} can only be {ONLY[name][0]!r} here; leave it out", "unsupported_value")
    for name in kinds:
        if kinds[name].endswith("!") and name not in given:
            raise wrong(name, f"there is no {name}; give {protocol.KINDS[kinds[name].rstrip('!')].shown}", "missing_required_parameter")
    return given, rest


def texts_of(name: str, given: Any, most: int) -> tuple[str, list[Any]]:
    """The field ``name``, of at most so many texts: see ``_texts``. Raises ApiError."""
    found, texts = _texts(name, given)
    if not 1 <= len(texts) <= most:
        raise wrong(name, f"there are {len(texts)} texts; give 1 to {most}")
    return found, texts


def _texts(name: str, given: Any) -> tuple[str, list[Any]]:
    """A text, texts, tokens of one text, or of several; as ``texts`` or ``tokens``, in a list of their texts. Raises ApiError."""
    texts = [given] if isinstance(given, str) else given
    if protocol.KINDS["ids"].fits(texts) and texts:
        texts = [texts]
    found = next((field for field, kind in (("texts", "texts"), ("tokens", "id lists")) if protocol.KINDS[kind].fits(texts)), None)
    if found is None:
        raise wrong(name, f"the {name} is neither a text, nor tokens, nor a list of either", "invalid_type")
    return found, texts


def _options(given: Mapping[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Options that both kinds of requests have."""
    found = {name: given[name] for name in ("max_tokens", *SAME) if name in given}
    for name, (least, most) in RANGES.items():
        if name in found and not least <= found[name] <= most:
            raise wrong(name, f"{name} is {found[name]}; give {least} to {most}")
    if (stop := rest.get("stop")) is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if not protocol.KINDS["texts"].fits(stops):
            raise wrong("stop", "stop is neither a text nor a list of texts", "invalid_type")
        found["stop"] = stops
    return found


def _rivals(given: Mapping[str, Any]) -> int | None:
    if given.get("logprobs"):
        return int(given.get("top_logprobs", 0))
    if given.get("top_logprobs"):
        raise wrong("top_logprobs", "top_logprobs are only told with logprobs; set logprobs too")
    return None


def _tools(tools: list[Any], choice: Any, options: dict[str, Any]) -> frozenset[str]:
    """Offer functions; their names. What they are is checked where they go to the template."""
    if choice not in (None, "none", "auto"):
        message = "tool_choice can be auto or none here: no model can be bound to a call"
        raise wrong("tool_choice", message, "unsupported_value")
    if not tools or choice == "none":
        return frozenset()
    options["tools"] = tools
    functions = [tool.get("function") for tool in tools]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return frozenset(name for name in names if isinstance(name, str))


def _response_format(given: Mapping[str, Any], options: dict[str, Any]) -> None:
    kind = given.get("type", "text")
    if kind == "json_object":
        options["json_schema"] = {"type": "object"}
    elif kind == "json_schema":
        found = given.get("json_schema")
        if not isinstance(found, dict) or not isinstance(found.get("schema"), dict):
            raise wrong("response_format", 'the response format has no schema; give {"json_schema": {"name": ..., "schema": {...}}}')
        options["json_schema"] = found["schema"]
    elif kind != "text":
        raise wrong("response_format", "the type of response_format is none; choose from text, json_object, json_schema")


# ---- messages --------------------------------------------------------------------------------------------------------


def messages_of(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as chat templates have them. Raises ApiError."""
    return [_message(i, message) for i, message in enumerate(given)]


def _message(i: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """A message as chat templates have it: its content one text."""
    where = f"messages[{i}]"
    found = {name: value for name, value in given.items() if value is not None and name != "annotations"}
    role = found.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(f"{where}.role", f"message {i} has no role of {', '.join(ROLES)}")
    for name, value in found.items():
        if name not in ("role", "content", "name", "tool_calls", "tool_call_id"):
            raise wrong(f"{where}.{name:.80}", f"a message has no {name:.80} here; leave it out", "unknown_parameter")
        if name in ("name", "tool_call_id") and not isinstance(value, str):
            raise wrong(f"{where}.{name}", f"{name} of message {i} is not a text", "invalid_type")
    found["role"] = ROLES[role]
    calls = found.get("tool_calls")
    if calls is not None:
        _check_calls(where, calls)
    if "content" in found:
        found["content"] = _content(where, found["content"])
    elif calls:
        found["content"] = None
    else:
        raise wrong(f"{where}.content", f"message {i} has no content; give a text", "missing_required_parameter")
    return found


def _content(where: str, content: Any) -> str:
    """The text of a content, which may be in parts."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise wrong(f"{where}.content", "content is neither a text nor a list of parts", "invalid_type")
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(f"{where}.content", 'a part of the content is no text; only {"type": "text", "text": ...} can be read here')
    return "".join(part["text"] for part in parts)


def _check_calls(where: str, calls: Any) -> None:
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not all(isinstance(function.get(name), str) for name in ("name", "arguments")):
            form = '{"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}'
            raise wrong(f"{where}.tool_calls", f"tool_calls are not as {form}", "invalid_type")


def through(asked: Asked, model: str, adapter: str) -> Asked:
    """The request as one for a model with an adapter. Raises ApiError if ``edge_rt`` names another."""
    options = asked.fields["options"]
    if options.get("adapter", adapter) != adapter:
        raise wrong("edge_rt.adapter", "the model and edge_rt.adapter name different adapters; give one of them")
    return asked._replace(fields={**asked.fields, "model": model, "options": {**options, "adapter": adapter}})


def headers(ignored: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Of the answer: which fields of the request changed nothing."""
    return (("Edge-RT-Ignored", ", ".join(ignored)),) if ignored else ()
