"""Checks of an answer that a program can make, as data: ``{"kind": "list", "items": 3}``. Each gives 0 (failed) to 1 (held).

In the manner of IFEval (Zhou et al. 2023, arXiv 2311.07911): what is asked for can be verified from the answer alone, offline and the
same way each time. Graded where being close is worth something (a length, a share of required texts), so that of two answers that
both fail the better one is seen. ``KINDS`` is the whole list; ``score`` applies one check and ``check_checks`` refuses what is none.
Limits: a check sees letters, not meaning. ``contains`` passes an answer that denies what it names; combine checks.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from edge_rt.hooks import DataError
from edge_rt_distill.data.answers import Answer, Kind, has, plain
from edge_rt_distill.data.content_checks import CONTENT
from edge_rt_distill.data.text import language_of, script_of, sentences, units


def ends(answer: Answer, _: Mapping[str, Any]) -> float:
    """The model ended its turn by itself."""
    return float(answer.ended)


def not_empty(answer: Answer, _: Mapping[str, Any]) -> float:
    """There is a word, number or character in it, not only spaces and punctuation."""
    return float(bool(units(answer.text)))


LOOSE = 0.1
"""The share of repeated n-grams that is no fault. People's texts have .005 at n = 4, looping models .4 and more (Welleck et al. 2020,
arXiv 1908.04319, table 2); lists and short answers with a term in each line lie between."""
_RUN = re.compile(r"(.{1,24}?)\1{7,}", re.DOTALL)


def no_loops(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """No repetition: the share of n-grams (``n`` units, 4 unless said) that occurred before, and nothing eight times in a row.

    1 up to ``LOOSE``, 0 from a half (rep-n of Welleck et al. 2020, arXiv 1908.04319). Rules of lines (----) are no loops.
    """
    if any(re.search(r"[^\s\-=_*.|#0~]", run.group(1)) for run in _RUN.finditer(answer.text)):
        return 0.0
    size, found = int(arguments.get("n", 4)), units(answer.text)
    grams = Counter(tuple(found[at : at + size]) for at in range(len(found) - size + 1))
    repeated = 1 - len(grams) / total if (total := sum(grams.values())) else 0.0
    return min(1.0, max(0.0, (0.5 - repeated) / (0.5 - LOOSE)))


def language(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """Written in the script of the language ``is`` (data/text.py: de, fr and en look the same). Figures alone are of any language."""
    found = language_of(answer.text)
    return float(not found or found == script_of(arguments["is"]))


_COUNTS: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(units(text)),
    "characters": lambda text: len(text.strip()),
    "sentences": lambda text: len(sentences(text)),
    "paragraphs": lambda text: len([part for part in re.split(r"\n\s*\n", text) if part.strip()]),
}


def length(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """Between ``min`` and ``max`` of ``unit`` (words, a Chinese character being one; characters, sentences, paragraphs).

    Outside it falls in proportion: half of ``min`` and one and a half of ``max`` give .5.
    """
    return _within(_COUNTS[arguments["unit"]](answer.text), arguments.get("min"), arguments.get("max"))


def _within(count: int, least: int | None, most: int | None) -> float:
    if least is not None and count < least:
        return count / least
    if most is not None and count > most:
        return max(0.0, 1 - (count - most) / most) if most else 0.0
    return 1.0


_ITEM = re.compile(
    r"^[ \t]*(?:(?P<bullet>[-*•·–])[ \t]+"
    r"|(?P<number>\d{1,2}[.)、．:]|[(（]\d{1,2}[)）]|[一二三四五六七八九十]{1,3}、)[ \t]*)\S",
    re.MULTILINE,
)


def listed(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """A list: lines with a bullet or number, ``items`` of them (or ``min`` to ``max``); ``numbered``: only numbers count."""
    numbered = arguments.get("numbered", False)
    count = sum(1 for item in _ITEM.finditer(answer.text) if item.group("number") or not numbered)
    exact = arguments.get("items")
    least, most = (exact, exact) if exact is not None else (arguments.get("min", 1), arguments.get("max"))
    return _within(count, least, most)


_FENCE = re.compile(r"\A\s*```(?:json|JSON)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


def json_(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """Nothing but JSON (a fence of code around it is fine), of ``type`` (object, array), an object with all ``keys``.

    Half for JSON of the type, half for the share of the keys; a quarter where text stands around an object or array.
    """
    text = fence.group(1) if (fence := _FENCE.match(answer.text)) else answer.text
    value, whole = _json(text.strip()), True
    if value is None:
        inside = re.search(r"[{\[].*[}\]]", text, re.DOTALL)
        value, whole = _json(inside.group()) if inside else None, False
    wanted = {"object": dict, "array": list}.get(arguments.get("type", ""), (dict, list))
    if value is None or not isinstance(value[0], wanted):
        return 0.0
    keys = arguments.get("keys", [])
    present = sum(isinstance(value[0], dict) and key in value[0] for key in keys) / len(keys) if keys else 1.0
    return (0.5 + 0.5 * present) * (1.0 if whole else 0.25)


def _json(text: str) -> tuple[Any] | None:
    """The value in a tuple, for null is a value too."""
    try:
        return (json.loads(text),)
    except (ValueError, RecursionError):
        return None


def contains(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """The share of the texts ``all`` that it has, times whether it has one of ``any``."""
    every, some = arguments.get("all", []), arguments.get("any", [])
    share = sum(has(answer.text, part) for part in every) / len(every) if every else 1.0
    return share * (not some or any(has(answer.text, part) for part in some))


def excludes(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """None of ``texts`` occurs."""
    return float(not any(has(answer.text, part) for part in arguments["texts"]))


_NUMBER = re.compile(
    r"(?<![\w.,])(?P<sign>[-−])?(?P<value>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(?P<scale>\s*(?:thousand|million|billion|[千万亿])(?![a-z]))?"
    r"|(?P<value2>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?)(?P<scale2>\s*(?:thousand|million|billion|[千万亿])(?![a-z]))?"
)
_SCALES = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "千": 1e3, "万": 1e4, "亿": 1e8}


def _numbers(text: str) -> list[tuple[float, ...]]:
    """Every number in ``text``: its value, and what it is with the word behind it ("1.2 million", "3万")."""
    found: list[tuple[float, ...]] = []
    for match in _NUMBER.finditer(plain(text)):
        written, scale = match.group("value") or match.group("value2"), (match.group("scale") or match.group("scale2") or "").strip()
        value = float(written.replace(",", "")) * (-1 if match.group("sign") else 1)
        found.append((value, value * _SCALES[scale]) if scale else (value,))
    return found


def number(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """A number in it equals ``equals``, give or take ``tolerance`` (absolute; 1e-9 of it unless said). ``which``: any, first or last.

    Reads 1,250.5 and 1250.5, -3 and "1.2 million"; 3万 and 3亿. Not numbers in words, nor 1.250,5.
    """
    wanted = float(arguments["equals"])
    near = float(arguments.get("tolerance", 1e-9 * max(1.0, abs(wanted))))
    found = _numbers(answer.text)
    chosen = {"any": found, "first": found[:1], "last": found[-1:]}[arguments.get("which", "any")]
    return float(any(abs(value - wanted) <= near for values in chosen for value in values))


def starts_with(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """Begins with ``text``, case and width aside."""
    return float(plain(answer.text).lstrip().startswith(plain(arguments["text"])))


def ends_with(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """Closes with ``text``, case and width aside."""
    return float(plain(answer.text).rstrip().endswith(plain(arguments["text"])))


def choice(answer: Answer, arguments: Mapping[str, Any]) -> float:
    """Nothing but one of ``options``, and of them ``is`` where that is known. A half where the answer only begins with it."""
    given = plain(answer.text).strip(" \n\t.。!！\"'“”*`")
    options = [arguments["is"]] if "is" in arguments else arguments["options"]
    if any(given == plain(option) for option in options):
        return 1.0
    return 0.5 * any(re.match(re.escape(plain(option)) + r"(?![a-z0-9])", given) is not None for option in options)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


_TYPES: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str) and bool(value),
    "texts": lambda value: isinstance(value, list) and bool(value) and all(isinstance(item, str) and item for item in value),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300,
    "count": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "true or false": lambda value: isinstance(value, bool),
    "words, characters, sentences or paragraphs": lambda value: isinstance(value, str) and value in _COUNTS,
    "object or array": lambda value: value in ("object", "array"),
    "any, first or last": lambda value: value in ("any", "first", "last"),
    "formal or plain": lambda value: value in ("formal", "plain"),
    "share": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1,
    "positive count": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1,
    "regular expression": lambda value: isinstance(value, str) and bool(value) and _compiles(value),
}
_BOUNDS = {"min": "count", "max": "count"}
KINDS: dict[str, Kind] = {
    "ends": Kind(ends, {}, {}),
    "not_empty": Kind(not_empty, {}, {}),
    "no_loops": Kind(no_loops, {}, {"n": "count"}),
    "language": Kind(language, {"is": "text"}, {}),
    "length": Kind(length, {"unit": "words, characters, sentences or paragraphs"}, _BOUNDS, ("min", "max")),
    "list": Kind(listed, {}, {"items": "count", "numbered": "true or false", **_BOUNDS}),
    "json": Kind(json_, {}, {"type": "object or array", "keys": "texts"}),
    "contains": Kind(contains, {}, {"all": "texts", "any": "texts"}, ("all", "any")),
    "excludes": Kind(excludes, {"texts": "texts"}, {}),
    "number": Kind(number, {"equals": "number"}, {"tolerance": "number", "which": "any, first or last"}),
    "starts_with": Kind(starts_with, {"text": "text"}, {}),
    "ends_with": Kind(ends_with, {"text": "text"}, {}),
    "choice": Kind(choice, {"options": "texts"}, {"is": "text"}),
    **CONTENT,
}


def check_checks(checks: Any) -> None:
    """Raises ``DataError`` if ``checks`` is no list of checks, with the first fault."""
    if not isinstance(checks, list) or not all(isinstance(item, dict) for item in checks):
        raise DataError('checks is a list of objects like {"kind": "ends"}')
    for item in checks:
        name = item.get("kind")
        if not isinstance(name, str) or name not in KINDS:
            raise DataError(f"check {name!r} is not known; the kinds are {', '.join(sorted(KINDS))}")
        kind = KINDS[name]
        allowed = {**kind.needs, **kind.may, "weight": "number"}
        for key, value in item.items():
            if key != "kind" and key not in allowed:
                raise DataError(f"check {name} has no {key!r}; it takes {', '.join(sorted(allowed))}")
            if key != "kind" and not _TYPES[allowed[key]](value):
                raise DataError(f"check {name}: {key} is {value!r}; it must be {allowed[key]}")
        if missing := [key for key in kind.needs if key not in item]:
            raise DataError(f"check {name} needs {missing[0]!r}")
        if kind.one_of and not any(key in item for key in kind.one_of):
            raise DataError(f"check {name} needs {' or '.join(kind.one_of)}")
        if item.get("min", 0) > item.get("max", math.inf):
            raise DataError(f"check {name}: min is above max")
        if item.get("weight", 1) < 0 or item.get("tolerance", 0) < 0 or item.get("n", 1) < 1:
            raise DataError(f"check {name}: weight and tolerance are not negative, and n is at least 1")


def score(check: Mapping[str, Any], answer: Answer) -> float:
    """What ``answer`` gets for ``check`` (one that ``check_checks`` has passed), 0 to 1."""
    return float(KINDS[check["kind"]].apply(answer, check))


def worth(checks: Iterable[Mapping[str, Any]], answer: Answer) -> float:
    """The mean of what ``answer`` gets for each of ``checks``, by their weights (1 unless said); 0 without any weight."""
    return mean((float(check.get("weight", 1)), score(check, answer)) for check in checks)


def mean(weighted: Iterable[tuple[float, float]]) -> float:
    """Of values, each behind its weight; 0 without any weight."""
    found = list(weighted)
    total = sum(weight for weight, _ in found)
    return sum(weight * value for weight, value in found) / total if total else 0.0
