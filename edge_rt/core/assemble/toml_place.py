"""Reads TOML, and finds the line that a value of it is on.

``tomllib`` says the line of a mistake in the writing, and nothing of where a value was that is well written and wrong. That is found
without a grammar of our own: the value is on the first line with which the beginning of the file, cut there, has it.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from edge_rt.core.assemble.rules import Place
from edge_rt.errors import RuleError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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

    The value's statement is the first with which the file, ended there, has it; the item of a list is found by counting commas.
    """
    while place and not has(parse(text), place):
        place = place[:-1]
    if not place:
        return None
    starts = _statements(text)
    low, high = 0, len(starts) - 1  # of the first low statements none has it, of the first high one
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if has(parse(text[: starts[middle]]), place) else (middle, high)
    start, end = starts[low], starts[high]
    if isinstance(place[-1], int) and has(parse(text[:end]), (*place[:-1], 0)) and not text[start:end].lstrip().startswith("[["):
        start = _item(text, start, end, place[-1])
    return text.count("\n", 0, start) + 1


_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|' r"'''.*?'{3,5}|" r'"(?:\\.|[^"\\\n])*"|' r"'[^'\n]*'|#[^\n]*|[\[\]{},=\n]", re.DOTALL
)
"""What brackets and ends of lines may hide in, brackets and ends of lines."""


def _statements(text: str) -> list[int]:
    """Where each key with its value, each header, comment and empty line begins, and the end of the text."""
    starts, depth = [0], 0
    for token in _TOKEN.finditer(text):
        depth += (token[0] in "[{") - (token[0] in "]}")
        if token[0] == "\n" and not depth:
            starts.append(token.end())
    return starts if starts[-1] == len(text) else [*starts, len(text)]


def _item(text: str, start: int, end: int, index: int) -> int:
    """Where the item of that index begins in the list that is a statement's value."""
    depth, value = 0, False
    for token in _TOKEN.finditer(text, start, end):
        value = value or token[0] == "="
        depth += value * ((token[0] in "[{") - (token[0] in "]}"))
        if (depth == 1 and token[0] in "[,") and index >= 0:
            index -= 1
            if index < 0:
                found = re.compile(r"(?:\s|#[^\n]*)*").match(text, token.end())
                return found.end() if found else token.end()
    return start


def has(values: Any, place: Place) -> bool:
    """Whether there is a value at a place."""
    for key in place:
        try:
            values = values[key]
        except (KeyError, IndexError, TypeError):
            return False
    return True
