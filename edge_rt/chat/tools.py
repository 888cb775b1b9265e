"""Tool schemas, tool calls and their results on the way to a chat template.

Many templates have a place for them, and each its own idea of it. So the template is tried: it runs with marks for the names of the
functions and for the results, and what comes out says what it leaves out. If that is a schema, the schemas are written into the
system message (or, where a template knows no such role, into the first message of the user) in a plain form, and so are calls and
results: the form of Hermes and Qwen, which small models have seen most. Nothing is left out silently.

What the model makes of it is text: a call it answers with is not parsed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from edge_rt.errors import ConstraintError, OptionError
from edge_rt.types import Message

Tools = Sequence[Mapping[str, Any]]
Render = Callable[[Sequence[Message], Tools | None], str]

FORM = '{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'
"""A tool schema, as OpenAI has it."""

NO_PLACE = "the model's chat template has no place for tools: they are written into the messages, but it may not know how to call them"
"""Said once where the schemas had to be written out."""

_NAME = re.compile(r"[\w.:/-]{1,128}")


class RenderedTools(NamedTuple):
    """What to give the template. ``written``: the schemas, where they are a part of a message; then ``tools`` is None."""

    messages: Sequence[Message]
    tools: Tools | None
    written: str = ""


def checked(tools: Tools) -> list[dict[str, Any]]:
    """The schemas as plain JSON values. Raises OptionError for what is none."""
    if not isinstance(tools, (list, tuple)):
        raise OptionError(f"tools are {type(tools).__name__}; give a list of schemas {FORM}")
    names = set()
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(function, Mapping):
            raise OptionError(f"tool {i} is no function schema; give it as {FORM}")
        name = function.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise OptionError(f"tool {i} has the name {name!r:.80}; give it one of letters, digits and _ . : / -")
        if name in names:
            raise OptionError(f"two tools are called {name}; give each its own name")
        names.add(name)
        if not isinstance(function.get("description", ""), str):
            raise OptionError(f"the description of the tool {name} is no text; write what it does")
        if not isinstance(function.get("parameters", {}), Mapping):
            form = '{"type": "object", "properties": {...}}'
            raise OptionError(f"the parameters of the tool {name} are no JSON schema; give one such as {form}")
    try:
        plain: list[dict[str, Any]] = json.loads(json.dumps(list(tools), default=dict, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"the tools cannot be written as JSON ({error}); give texts, numbers, lists and mappings") from error
    return plain


def place(messages: Sequence[Message], tools: Tools, render: Render, *, native: bool) -> RenderedTools:
    """The way in which the template leaves out the least. ``native``: it mentions tools.

    Raises OptionError where no way shows the schemas, ConstraintError where the template refuses the messages.
    """
    tools = checked(tools)
    messages = [_with_objects(i, message) for i, message in enumerate(messages)]
    marked = _marked(messages, tools)
    best: Callable[[Sequence[Message], Tools], RenderedTools] | None = None
    most, refusal = (-1, -1), None
    for way in (*(_NATIVE if native or not tools else ()), *_WRITTEN):
        if way is _WRITTEN[0] and native and best is None:
            break  # a template that knows tools and refuses these says what it wants
        try:
            text = render(*way(marked.messages, marked.tools)[:2])
        except ConstraintError as error:
            refusal = refusal or error
            continue
        shown = sum(mark in text for mark in marked.schemas), sum(mark in text for mark in marked.others)
        if shown > most:
            best, most = way, shown
        if shown == (len(marked.schemas), len(marked.others)):
            break
    if best is None:
        assert refusal is not None, "there is a way to try"
        raise refusal
    if most[0] < len(tools):
        raise OptionError("the model's chat template leaves the tools out; use a model made for tools, or write them into a message")
    return best(messages, tools)


# ---- ways ------------------------------------------------------------------------------------------------------------


def _as_they_are(messages: Sequence[Message], tools: Tools) -> RenderedTools:
    return RenderedTools(messages, tools or None)


def _with_empty_texts(messages: Sequence[Message], tools: Tools) -> RenderedTools:
    """Some templates want a text beside calls."""
    return RenderedTools([{**m, "content": m.get("content") or ""} if m.get("tool_calls") else m for m in messages], tools or None)


def _without_texts(messages: Sequence[Message], tools: Tools) -> RenderedTools:
    """Others want none."""
    return RenderedTools([{**m, "content": m.get("content") or None} if m.get("tool_calls") else m for m in messages], tools or None)


def _written(messages: Sequence[Message], tools: Tools) -> RenderedTools:
    """Schemas in the system message, calls in the answers."""
    written, plain = _block(tools), [_without_calls(message) for message in messages]
    if written and plain[0]["role"] in ("system", "developer"):
        plain[0] = {**plain[0], "content": f"{_text(plain[0])}\n\n{written}".lstrip()}
    elif written:
        plain.insert(0, {"role": "system", "content": written})
    return RenderedTools(plain, None, written)


def _written_without_roles(messages: Sequence[Message], tools: Tools) -> RenderedTools:
    """Schemas in the first message of the user, results in messages of the user, who must not speak twice in a row."""
    written, before = _block(tools), ""
    plain: list[dict[str, Any]] = []
    for message in map(_without_calls, messages):
        role = message["role"]
        if role == "tool":
            said = f"<tool_response>\n{_text(message)}\n</tool_response>"
            message = {"role": "user", "content": f"{plain.pop()['content']}\n{said}" if before == "tool" else said}
        plain.append(message)
        before = role
    first = next((i for i, message in enumerate(plain) if message["role"] == "user"), None)
    if first is None:
        return _written(messages, tools)
    if written:
        plain[first] = {**plain[first], "content": f"{written}\n\n{_text(plain[first])}"}
    return RenderedTools(plain, None, written)


def _text(message: Message) -> str:
    """A message's text. Raises OptionError."""
    content = message.get("content")
    if content is not None and not isinstance(content, str):
        raise OptionError(f"a message has content of type {type(content).__name__}; give it as text")
    return content or ""


_NATIVE = (_as_they_are, _with_empty_texts, _without_texts)
_WRITTEN = (_written, _written_without_roles)


def _block(tools: Tools) -> str:
    """The schemas as text, with how to call them."""
    if not tools:
        return ""
    schemas = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return (
        f"# Tools\n\nYou can call functions. Their schemas, one a line:\n<tools>\n{schemas}\n</tools>\n"
        'To call one, answer with its name and its arguments:\n<tool_call>\n{"name": "...", "arguments": {...}}\n</tool_call>'
    )


def _without_calls(message: Message) -> dict[str, Any]:
    """A message with its calls written out in its text."""
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    written = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False, default=dict)}\n</tool_call>" for call in _calls(0, message)]
    if written:
        rest["content"] = "\n".join(filter(None, [_text(message), *written]))
    return rest


# ---- calls and marks -------------------------------------------------------------------------------------------------


def _calls(i: int, message: Message) -> Iterator[dict[str, Any]]:
    """Name and arguments of each call of message ``i``. Raises OptionError for what is none."""
    calls = message.get("tool_calls") or ()
    for call in calls if isinstance(calls, (list, tuple)) else (calls,):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not _NAME.fullmatch(function["name"]):
            form = '{"type": "function", "function": {"name": "...", "arguments": {...}}}'
            raise OptionError(f"message {i} has a tool call that is none; give it as {form}")
        yield {"name": function["name"], "arguments": function.get("arguments", {})}


def _with_objects(i: int, message: Message) -> Message:
    """OpenAI's arguments are JSON in a text; templates want the value."""
    calls = list(_calls(i, message))
    if not calls:
        return message
    for call in calls:
        if isinstance(call["arguments"], str):
            try:
                call["arguments"] = json.loads(call["arguments"])
            except (ValueError, RecursionError):
                continue  # what the model wrote is no JSON: it stays the text it was
    return {**message, "tool_calls": [
        {**given, "function": {**given["function"], **call}} for given, call in zip(message["tool_calls"], calls, strict=True)
    ]}  # fmt: skip


class _Marked(NamedTuple):
    """Messages and tools with marks, and which of them stand for schemas and which for calls and results."""

    messages: list[Message]
    tools: list[dict[str, Any]]
    schemas: list[str]
    others: list[str]


def _marked(messages: Sequence[Message], tools: Sequence[dict[str, Any]]) -> _Marked:
    """The same with a mark, a word that does not occur, in place of each function's name and of each result."""
    everything = repr((messages, tools))
    stem = next(stem for n in count() if (stem := f"mark{n}x") not in everything)
    marks = (f"{stem}{n}x" for n in count())
    found = _Marked([], [], [], [])
    for tool in tools:
        found.schemas.append(next(marks))
        found.tools.append({**tool, "function": {**tool["function"], "name": found.schemas[-1]}})
    for message in messages:
        if calls := message.get("tool_calls"):
            names = [next(marks) for _ in calls]
            found.others.extend(names)
            message = {**message, "tool_calls": [
                {**call, "function": {**call["function"], "name": name}} for call, name in zip(calls, names, strict=True)
            ]}  # fmt: skip
        if message["role"] == "tool" and isinstance(message.get("content"), str) and message["content"].strip():
            found.others.append(next(marks))
            message = {**message, "content": found.others[-1]}
        found.messages.append(message)
    return found
