"""An item of a suite: one question, the metric it belongs to, and how an answer to it is judged. Parsed from JSON, each mistake by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from edge_rt.hooks import DataError
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.data.checks import check_checks
from edge_rt_distill.sandbox.metrics import METRICS

Check = Mapping[str, Any]
Message = Mapping[str, str]
SPLITS = ("steer", "sealed")
"""What training may be steered by, and what only ever judges the end."""


class Turn(NamedTuple):
    """What the user says, and what the answer is checked by."""

    content: str
    checks: tuple[Check, ...] = ()


class Item(NamedTuple):
    """See ``FORMS`` for which fields an item of a form has. ``right``: the number of the right option. ``good``, ``bad``: answers that a
    metric has to tell apart, one to each turn; they validate it and are never shown to a model."""

    id: str
    metric: str
    language: str
    form: str
    source: str
    licence: str
    split: str = "steer"
    messages: tuple[Message, ...] = ()
    text: str = ""
    options: tuple[str, ...] = ()
    right: int = 0
    asks: tuple[str, ...] = ()
    turns: tuple[Turn, ...] = ()
    checks: tuple[Check, ...] = ()
    tokens: int = 96
    good: tuple[tuple[Answer, ...], ...] = ()
    bad: tuple[tuple[Answer, ...], ...] = ()


_ALWAYS = {"id", "metric", "language", "form", "source", "licence", "split"}
_FIELDS: Mapping[str, set[str]] = {
    "choice": {"messages", "text", "options", "right", "passage"},
    "answer": {"messages", "checks", "tokens", "good", "bad", "passage"},
    "turns": {"system", "turns", "tokens", "good", "bad"},
    "variants": {"asks", "options", "right"},
}
_EXAMPLES = ("good", "bad")


def parse(record: Any) -> Item:
    """The item of a JSON value. Raises DataError with the reason; the reader knows file and line."""
    if not isinstance(record, dict):
        raise DataError("an item is a JSON object")
    known = {key: _text(record, key) for key in ("id", "metric", "language", "form", "source", "licence")}
    split = record.get("split", SPLITS[0])
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", known["id"]):
        raise DataError(f"id is {known['id']!r}; give small letters, digits and dashes")
    if known["metric"] not in METRICS:
        raise DataError(f"metric is {known['metric']!r}; choose one of {', '.join(METRICS)}")
    form = known["form"]
    if form not in METRICS[known["metric"]].forms:
        raise DataError(f"form is {form!r}; items of {known['metric']} are {' or '.join(METRICS[known['metric']].forms)}")
    if split not in SPLITS:
        raise DataError(f"split is {split!r}; choose {' or '.join(SPLITS)}")
    unknown = sorted(record.keys() - _ALWAYS - _FIELDS[form])
    if unknown:
        raise DataError(f"an item of the form {form} has no {unknown[0]!r}; it has {', '.join(sorted(_FIELDS[form]))}")
    item = Item(known["id"], known["metric"], known["language"], form, known["source"], known["licence"], split)
    return _READERS[form](record, item)


def _choice(record: Mapping[str, Any], item: Item) -> Item:
    if ("messages" in record) == ("text" in record):
        raise DataError("a choice continues either messages or a text; give one of them")
    if "text" in record:
        item = item._replace(text=_text(record, "text", empty=True))
    else:
        item = item._replace(messages=_messages(record))
    return _with_options(record, item)


def _answer(record: Mapping[str, Any], item: Item) -> Item:
    passage = _text(record, "passage") if "passage" in record else ""
    checks = _checks(record.get("checks"), passage)
    if not checks:
        raise DataError("an answer is judged by checks; give some")
    item = item._replace(messages=_messages(record), checks=checks, tokens=_count(record, "tokens", item.tokens))
    good, bad = (tuple((one,) for one in _examples(record.get(key), key)) for key in _EXAMPLES)
    return item._replace(good=good, bad=bad)


def _turns(record: Mapping[str, Any], item: Item) -> Item:
    listed = record.get("turns")
    if not isinstance(listed, list) or len(listed) < 2 or not all(isinstance(one, dict) for one in listed):
        raise DataError("turns is a list of two or more objects with content and checks")
    turns = []
    for number, one in enumerate(listed):
        agreed = [check for check in one.get("checks", []) if isinstance(check, dict) and check.get("kind") == "agrees"]
        others = [check for check in one.get("checks", []) if check not in agreed]
        turns.append(Turn(_text(one, "content"), (*_checks(others, ""), *(_agreement(check, number) for check in agreed))))
    if not any(turn.checks for turn in turns):
        raise DataError("no turn has checks; give some to one")
    system = ({"role": "system", "content": _text(record, "system")},) if "system" in record else ()
    good, bad = (_conversations(record.get(key), key, len(turns)) for key in _EXAMPLES)
    return item._replace(messages=system, turns=tuple(turns), tokens=_count(record, "tokens", item.tokens), good=good, bad=bad)


def _conversations(listed: Any, key: str, turns: int) -> tuple[tuple[Answer, ...], ...]:
    if not isinstance(listed, list) or not listed or not all(isinstance(one, list) and len(one) == turns for one in listed):
        raise DataError(f"{key} is a list of conversations, each a list of {turns} answers")
    return tuple(tuple(_examples(one, key)) for one in listed)


def _examples(listed: Any, key: str) -> list[Answer]:
    """Answers as texts, or as ``{"text": ..., "ended": false}`` where they were cut off."""
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{key} is a list of answers")
    found = []
    for one in listed:
        record = one if isinstance(one, dict) else {"text": one}
        if not isinstance(record.get("text"), str) or not isinstance(record.get("ended", True), bool):
            raise DataError(f"{key} has {one!r}; give a text, or an object with text and ended")
        found.append(Answer(record["text"], record.get("ended", True)))
    return found


def _agreement(check: Mapping[str, Any], number: int) -> Check:
    """``{"kind": "agrees", "turn": 0, "options": [...]}``: the answer names the same option first as that of the turn did."""
    turn, options = check.get("turn"), check.get("options")
    if not isinstance(turn, int) or not 0 <= turn < number or not isinstance(options, list) or len(options) < 2:
        raise DataError("the check agrees has an earlier turn, counted from 0, and two or more options")
    return {"kind": "agrees", "turn": turn, "options": [str(one) for one in options], "weight": float(check.get("weight", 1))}


def _variants(record: Mapping[str, Any], item: Item) -> Item:
    asks = tuple(_texts(record, "asks"))
    if len(asks) < 3 or len(set(asks)) < len(asks):
        raise DataError("asks is a list of three or more wordings, all different")
    return _with_options(record, item._replace(asks=asks))


_READERS = {"choice": _choice, "answer": _answer, "turns": _turns, "variants": _variants}


def _with_options(record: Mapping[str, Any], item: Item) -> Item:
    options, right = tuple(_texts(record, "options")), record.get("right")
    if not 2 <= len(options) <= 6 or len(set(options)) < len(options):
        raise DataError("options is a list of two to six texts, all different")
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(options):
        raise DataError(f"right is the number of the right option, counted from 0; it is {right!r}")
    return item._replace(options=options, right=right)


def _messages(record: Mapping[str, Any]) -> tuple[Message, ...]:
    """Messages of system, users and assistants in turn, a user last; ``{passage}`` stands for the item's passage."""
    listed = record.get("messages")
    if not isinstance(listed, list) or not listed or not all(isinstance(one, dict) for one in listed):
        raise DataError("messages is a list of objects with role and content")
    passage = record.get("passage", "")
    found = [{"role": _text(one, "role"), "content": _text(one, "content").replace("{passage}", passage)} for one in listed]
    roles = [one["role"] for one in found]
    talk = roles[1:] if roles[0] == "system" else roles
    if not talk or any(role != ("user", "assistant")[place % 2] for place, role in enumerate(talk)) or talk[-1] != "user":
        raise DataError("messages are of a system, if there is one, then of user and assistant in turn, a user first and last")
    if passage and not any(passage in one["content"] for one in found):
        raise DataError("there is a passage, and no message has {passage}")
    return tuple(found)


def _checks(listed: Any, passage: str) -> tuple[Check, ...]:
    """Checks, those that want the passage with it."""
    if isinstance(listed, list):
        listed = [{**one, "passage": passage} if isinstance(one, dict) and one.get("kind") == "supported" else one for one in listed]
    check_checks(listed)
    return tuple(listed)


def _text(record: Mapping[str, Any], key: str, empty: bool = False) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not (empty or value.strip()) or "\0" in value:
        raise DataError(f"{key} is {value!r}; give a text")
    return value


def _texts(record: Mapping[str, Any], key: str) -> Sequence[str]:
    value = record.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise DataError(f"{key} is a list of texts")
    return value


def _count(record: Mapping[str, Any], key: str, usual: int) -> int:
    value = record.get(key, usual)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 4096:
        raise DataError(f"{key} is {value!r}; give 1 to 4096")
    return value
