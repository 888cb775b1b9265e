"""A line of recorded traffic: a request as a body of OpenAI's API, which asks the same again, and what became of it; or feedback."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edge_rt.daemon.http import request
from edge_rt.daemon.http.answer import REASONS
from edge_rt.daemon.http.tool_calls import Call, ToolCalls
from edge_rt.daemon.traffic.redaction import Redaction
from edge_rt.errors import EdgeError

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
FIELDS = ("model", "prompt", "messages", "options", "priority")
"""Of ``generate``, which a request asks by; the others are the connection's."""
VARIANT = 12
"""Hexadecimal digits by which forms of prompts are told apart."""
SESSIONS = 1024
"""Sessions whose requests are known to go on from others; of one that was forgotten the next request is written whole."""


class Unfit(Exception):
    """OpenAI's API cannot ask this."""


class Recorded(NamedTuple):
    """A request that has ended. ``at``: seconds since the recording began, ``cancel_after``, ``first_token`` and ``total`` since it came.

    ``session``: its id, which is not written. ``reason``: of the event ``done``. ``stop``: the stop text that was met. ``text``: of the
    answer, None if it was not kept. ``template``: of the model, "" if that is not known. ``rules``: how often each post-processor did
    something.
    """

    at: float
    fields: Mapping[str, Any]
    client: str
    session: str | None
    status: str
    code: str | None
    reason: str | None
    stop: str | None
    prompt_tokens: int | None
    completion_tokens: int
    first_token: float | None
    total: float
    cancel_after: float | None
    text: str | None
    template: str = ""
    rules: Mapping[str, int] = {}


class Feedback(NamedTuple):
    """What somebody says of an answer: the ``fields`` of the operation ``feedback``. ``at`` and ``template`` as of ``Recorded``."""

    at: float
    fields: Mapping[str, Any]
    client: str
    template: str


class Lines:
    """Of one file."""

    def __init__(self, redaction: Redaction, answers: bool) -> None:
        self._redaction, self._answers = redaction, answers
        self._conversations = Conversations()

    def forget(self) -> None:
        """A file begins: what is in it does not go on from what is in others."""
        self._conversations.forget()

    def line(self, one: Recorded | Feedback) -> bytes:
        """Raises Unfit, and whatever the redaction does."""
        record = self._feedback(one) if isinstance(one, Feedback) else self._request(one)
        return as_line({name: value for name, value in record.items() if value is not None})

    def _feedback(self, one: Feedback) -> dict[str, Any]:
        told = self._redaction.value(one.fields)
        return {"at": round(one.at, 3), "client": one.client, "variant": variant(one.template, one.fields), "feedback": told}

    def _request(self, one: Recorded) -> dict[str, Any]:
        fields, session = one.fields, None
        if one.session is not None and "messages" in fields:
            session, messages = self._conversations.placed(one.session, fields["messages"])
            fields = {**fields, "messages": messages}
        told = redacted(fields, self._redaction)
        path, body = as_body(told)
        names = _asked(path, body, told).tools
        return {
            "at": round(one.at, 3), "path": path, "session": session, "client": one.client, "cancel_after": _milli(one.cancel_after),
            "variant": variant(one.template, one.fields), "request": body, "outcome": _outcome(one, names),
            "answer": self._redaction.text(one.text, _following(one)) if self._answers and one.text else None,
        }  # fmt: skip

    def written(self, one: Recorded | Feedback) -> None:
        """The line is in the file: what the session asks next may go on from it."""
        if isinstance(one, Recorded) and one.session is not None and "messages" in one.fields:
            self._conversations.written(one.session, one.fields["messages"])


def as_line(record: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8, with the end of the line. Raises Unfit for numbers that JSON has not."""
    try:
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise Unfit(str(error)) from error
    return text.encode(errors="backslashreplace") + b"\n"  # a half of a surrogate pair becomes JSON's escape


def variant(template: str, fields: Mapping[str, Any]) -> str | None:
    """12 hexadecimal digits that tell one form of prompt from others: of the model's chat template and what the system message says.

    None for a text, which has no form, and where the template is not known.
    """
    if "messages" not in fields or not template:
        return None
    system = [message.get("content") for message in fields["messages"] if message.get("role") == "system"]
    return hashlib.sha256(json.dumps([template, system], sort_keys=True).encode()).hexdigest()[:VARIANT]


def redacted(fields: Mapping[str, Any], redaction: Redaction) -> dict[str, Any]:
    """Fields of ``generate`` as they may be written. Numbers among the options are as they were: seeds look like anything."""
    told = {name: redaction.value(value) for name, value in fields.items() if name != "options"}
    options: Mapping[str, Any] = fields.get("options", {})
    return {**told, "options": {name: one if isinstance(one, (int, float)) else redaction.value(one) for name, one in options.items()}}


def as_body(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The path and the body by which OpenAI's API asks for what ``generate`` does with these fields, if it can: see ``_asked``."""
    options = {name: value for name, value in fields.get("options", {}).items() if value is not None}
    chat = "messages" in fields
    body = {name: fields[name] for name in ("model", "messages", "prompt") if name in fields}
    body |= {name: options.pop(name) for name in ("max_tokens", "stop", "tools", *request.SAME) if name in options}
    if rivals := options.pop("logprobs", 0):
        body |= {"logprobs": True, "top_logprobs": rivals} if chat else {"logprobs": rivals}
    if chat and "json_schema" in options:
        schema = options.pop("json_schema")
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if "priority" in fields:
        options["priority"] = fields["priority"]
    return CHAT if chat else COMPLETION, {**body, "edge_rt": options} if options else body


def _asked(path: str, body: Mapping[str, Any], fields: Mapping[str, Any]) -> request.Asked:
    """What the body asks. Raises Unfit if that is something else than the fields do."""
    try:
        asked = (request.chat if path == CHAT else request.completion)(body)
    except EdgeError as error:
        raise Unfit(str(error)) from error
    if _plain(asked.fields) != _plain(fields):
        raise Unfit("it would ask something else")
    return asked


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields without those that say nothing: null, no tools, no log-probabilities."""
    found = {name: fields[name] for name in FIELDS if name in fields}
    options = found.get("options", {}).items()
    found["options"] = {name: one for name, one in options if one is not None and (one or name not in ("tools", "logprobs"))}
    if "messages" in found:
        found["messages"] = [{name: one for name, one in message.items() if one is not None} for message in found["messages"]]
    return found


def _outcome(one: Recorded, names: frozenset[str]) -> dict[str, Any]:
    """What became of it, as far as it is known. ``names``: of the functions that were offered."""
    finish = REASONS.get(one.reason) if one.reason is not None else None
    if one.reason == "end_of_generation" and any(isinstance(piece, Call) for piece in ToolCalls(names).feed(one.text or "")):
        finish = "tool_calls"
    found = {
        "status": one.status, "code": one.code, "finish_reason": finish, "prompt_tokens": one.prompt_tokens,
        "completion_tokens": one.completion_tokens, "first_token": _milli(one.first_token), "total": _milli(one.total),
        "rules": dict(one.rules) or None,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _following(one: Recorded) -> str | None:
    """None if the answer came to its end; else what is known to follow where it was cut off."""
    if one.reason == "end_of_generation":
        return None
    return one.stop or ""


class Conversations:
    """Which requests of sessions go on from others: of these only the messages that are new are written, as the trace's form has it.

    Clients send the whole conversation each time. A request goes on from one that was written if its messages are those, then an answer,
    and then more; any other begins a conversation of its own.
    """

    def __init__(self) -> None:
        self._written: OrderedDict[str, tuple[str, int, bytes]] = OrderedDict()  # by session: alias, messages, their hash
        self._names = 0

    def placed(self, session: str, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Mapping[str, Any]]]:
        """The conversation's alias, and the messages that are to be written."""
        alias, count, before = self._written.get(session, ("", 0, b""))
        if count and len(messages) > count + 1 and messages[count].get("role") == "assistant" and _hash(messages[:count]) == before:
            return alias, list(messages[count + 1 :])
        return f"s{self._names + 1}", list(messages)

    def written(self, session: str, messages: Sequence[Mapping[str, Any]]) -> None:
        """What ``placed`` said of these messages was written."""
        alias, _ = self.placed(session, messages)
        if alias == f"s{self._names + 1}":
            self._names += 1
        self._written[session] = (alias, len(messages), _hash(messages))
        self._written.move_to_end(session)
        if len(self._written) > SESSIONS:
            self._written.popitem(last=False)

    def forget(self) -> None:
        """Nothing of what was written can be gone on from. Names are not used again."""
        self._written.clear()


def _hash(messages: Sequence[Mapping[str, Any]]) -> bytes:
    return hashlib.sha256(repr(messages).encode(errors="surrogatepass")).digest()
