"""One line of JSONL -> one sample. Every way in which it can be wrong has its sentence."""

from __future__ import annotations

import json
from typing import Any

from edge_rt.hooks import DataError
from edge_rt_distill.data.checks import check_checks
from edge_rt_distill.data.samples import Message, Sample, make_sample

ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant"}
SPLITS = {"train": "train", "training": "train", "evaluation": "evaluation", "validation": "evaluation", "test": "evaluation"}
_ANSWERS = ("response", "completion", "answer")


def parse(text: str, *, file: str = "", line: int = 0) -> Sample:
    """The sample of a line. Raises ``DataError`` with the reason, without file and line: the reader knows them."""
    try:
        record = json.loads(text)
    except RecursionError:
        raise DataError("not JSON: nested too deep") from None
    except ValueError as error:  # JSONDecodeError, and a number with thousands of digits
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else "a number is too long"
        raise DataError(f"not JSON: {reason}") from None
    if not isinstance(record, dict):
        raise DataError(f"a JSON object is needed, not {_kind(record)}")
    if isinstance(record.get("body"), dict):  # a line of OpenAI's batch format: the request is inside
        record = {**{key: value for key, value in record.items() if key != "body"}, **record["body"]}
    messages, passage = _content(record)
    known = {key: _string(record, key) for key in ("domain", "language", "source")}
    known["licence"] = _string(record, "licence") or _string(record, "license")
    split = _string(record, "split") or "train"
    if split not in SPLITS:
        raise DataError(f"split is {split!r}; choose train or evaluation")
    checks = record.get("checks", [])
    check_checks(checks)
    if checks and not any(message.role == "user" for message in messages):
        raise DataError("checks belong to a question, and this has none")
    return make_sample(messages, passage, split=SPLITS[split], checks=tuple(checks), file=file, line=line, **known)


def _content(record: dict[str, Any]) -> tuple[tuple[Message, ...], str]:
    """The messages or the text of a record."""
    kinds = [key for key in ("messages", "prompt", "text") if key in record]
    if len(kinds) != 1:
        found = ", ".join(kinds) or "none of them"
        raise DataError(f"exactly one of messages, prompt and text is needed; there is {found}")
    if kinds == ["text"]:
        return (), _filled(record["text"], "text")
    listed = record["messages"] if kinds == ["messages"] else record["prompt"]
    messages = _messages(listed) if isinstance(listed, list) else [Message("user", _filled(listed, kinds[0]))]
    if kinds == ["messages"] and not isinstance(listed, list):
        raise DataError(f"messages is a list, not {_kind(listed)}")
    if kinds == ["prompt"]:
        if system := _string(record, "system"):
            messages.insert(0, Message("system", system))
        answer = next((record[key] for key in _ANSWERS if key in record), None)
        if answer is not None:
            messages.append(Message("assistant", _filled(answer, "response")))
    _check_order(messages)
    return tuple(messages), ""


def _messages(listed: list[Any]) -> list[Message]:
    messages = []
    for index, item in enumerate(listed, 1):
        if not isinstance(item, dict):
            raise DataError(f"message {index} is {_kind(item)}, not an object with role and content")
        role = item.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"message {index} has the role {role!r}; known are system, user and assistant")
        if item.get("tool_calls"):
            raise DataError(f"message {index} calls a tool; only text is learnt from")
        content = item.get("content")
        if isinstance(content, list):
            content = "".join(_part(part, index) for part in content)
        messages.append(Message(ROLES[role], _filled(content, f"the content of message {index}")))
    return messages


def _part(part: Any, index: int) -> str:
    """The text of a part, in OpenAI's list form of a content."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    raise DataError(f"message {index} has a part that is not text; only text is learnt from")


def _check_order(messages: list[Message]) -> None:
    """A system message only at the beginning, then questions and answers in turn, a question first."""
    turns = [message.role for message in messages]
    if turns and turns[0] == "system":
        turns = turns[1:]
    for index, role in enumerate(turns):
        if role != ("user", "assistant")[index % 2]:
            raise DataError(f"turn {index + 1} is of {role}; questions and answers take turns, a user first")
    if not turns:
        raise DataError("no message of a user")


def _filled(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {_kind(value)}, not a string")
    return _sound(value, what, empty=False)


def _string(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{key} is {_kind(value)}, not a string")
    return _sound(value, key, empty=True)


def _sound(text: str, what: str, empty: bool) -> str:
    """``text`` if UTF-8 can hold it (JSON can name half a pair of surrogates) and a tokenizer reads it to its end."""
    if not empty and not text.strip():
        raise DataError(f"{what} is empty")
    if "\0" in text:
        raise DataError(f"{what} has a zero character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{what} has half a surrogate pair, which is no character")
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
