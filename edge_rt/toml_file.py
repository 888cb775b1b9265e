"""Reads TOML, and finds the line that a value of it is on.

``tomllib`` says the line of a mistake in the writing, and nothing of where a value was that is well written and wrong. That is found
without a grammar of our own: the value is on the first line with which the beginning of the file, cut there, has it.
"""

from __future__ import annotations

import re
import sys
from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from edge_rt.errors import OptionError, RuleError
from edge_rt.postprocess.rules import Place, Rules

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


T = TypeVar("T")


def read_toml(path: Path, what: str, read: Callable[[Rules], T]) -> T:
    """What ``read`` makes of a TOML file; keys it does not ask for are mistakes. ``what``: the file in a word, for messages.

    Raises OptionError for a file that cannot be read, RuleError with the line of a value that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error)).lower()
        raise OptionError(f"the {what} {path} cannot be read: {reason}") from error
    try:
        table = Rules(parse(text), folder=path.parent)
        found = read(table)
        table.finish()
    except RuleError as error:
        line = error.line if error.line is not None else line_of(text, error.place)
        raise RuleError(error.reason, place=error.place, file=str(path), line=line) from error
    return found


def parse(text: str) -> dict[str, Any]:
    """The file's tables. Raises RuleError with the line of a mistake."""
    try:
        tables: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        reason, _, where = str(error).partition(" (at ")
        line = re.match(r"line (\d+)", where)
        at = int(line[1]) if line else text.count("\n") + 1
        raise RuleError(f"it is not TOML: {reason[:1].lower()}{reason[1:]}", line=at) from error
    except RecursionError as error:
        raise RuleError("it has too many lists and tables in each other; give one with fewer") from error
    except ValueError as error:  # Python reads numbers up to a length
        raise RuleError("it has a number of too many digits; give a smaller one") from error
    return tables


def line_of(text: str, place: Place) -> int | None:
    """The line, from 1, of the value at a place in a file that ``parse`` takes; of the table around it if it is not there.

    The value's statement is the first with which the file, ended there, has it; in lists and inline tables the same is tried at commas.
    """
    while place and not has(parse(text), place):
        place = place[:-1]
    if not place:
        return None
    starts = _statements(text)
    number = bisect_left(starts, True, 1, len(starts) - 1, key=lambda end: has(parse(text[:end]), place))
    return text.count("\n", 0, _inside(text, starts[number - 1], starts[number], place)) + 1


_TOKEN = re.compile(r'"""(?:\\.|[^\\])*?"{3,5}|' r"'''.*?'{3,5}|" r'"(?:\\.|[^"\\\n])*"|' r"'[^'\n]*'|#[^\n]*|[\[\]{},=\n]", re.DOTALL)
"""What brackets and ends of lines may hide in, brackets and ends of lines."""


def _statements(text: str) -> list[int]:
    """Where each key with its value, each header, comment and empty line begins, and the end of the text."""
    starts, depth = [0], 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if token[0] == "\n" and not depth:
            starts.append(token.end())
    return starts if starts[-1] == len(text) else [*starts, len(text)]


_CLOSING = {"[": "]", "{": "}"}


def _inside(text: str, start: int, end: int, place: Place) -> int:
    """Where the value begins in its statement: behind the last bracket or comma where the file, all brackets closed, does not have it."""
    if text[start:end].lstrip().startswith("["):
        return start  # a header
    ends, closing = [(start, "")], ""
    for token in _TOKEN.finditer(text, start, end):
        if token[0] in _CLOSING:
            closing = _CLOSING[token[0]] + closing
            ends.append((token.end(), closing))
        elif token[0] in "]},":
            ends.append((token.start(), closing))
            closing = closing[token[0] != "," :]
    first = bisect_left(ends, True, 1, key=lambda one: has(parse(text[: one[0]] + one[1]), place))
    if not 1 < first < len(ends):
        return start
    found = re.compile(r"(?:[\s,]|#[^\n]*)*").match(text, ends[first - 1][0])
    return found.end() if found else start


def has(values: Any, place: Place) -> bool:
    """Whether there is a value at a place."""
    for key in place:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True
