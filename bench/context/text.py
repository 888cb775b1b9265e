"""Real English prose that every Python brings along.

The prose is the Python language reference (``pydoc_data``) and the docstrings of the standard library, so it differs a little from one
version of Python to the next: scores are compared within one run, never across machines.
"""

from __future__ import annotations

import ast
import importlib
import random
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

ENOUGH = 400_000
"""Characters of prose after which no further source is read."""
_SHORTEST, _LONGEST = 80, 1200  # characters of a paragraph
_ENDS = (".", "!", "?", ":", ")")


# ---- real prose ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def prose() -> tuple[str, ...]:
    """Paragraphs of real English text in the order they were written, at least 100,000 characters, none twice.

    Raises RuntimeError where Python was installed without its reference and without the sources of its library.
    """
    found: dict[str, None] = {}  # a set that keeps the order
    size = 0
    for document in _documents():
        for paragraph in paragraphs(document):
            if paragraph not in found:
                found[paragraph] = None
                size += len(paragraph)
        if size > ENOUGH:
            break
    if size < 100_000:
        raise RuntimeError(f"this Python brings only {size} characters of prose; install its standard library's sources and pydoc topics")
    return tuple(found)


def paragraphs(document: str) -> Iterator[str]:
    """The paragraphs that are prose, each on one line: no headings, code, grammar or tables."""
    for block in re.split(r"\n\s*\n", document):
        lines = block.split("\n")
        if lines[0].startswith("   ") and not block.lstrip().startswith(("*", "-")):  # code is indented
            continue
        text = " ".join(block.split()).lstrip("*- ")
        letters = sum(c.isalpha() or c == " " for c in text)
        if _SHORTEST <= len(text) <= _LONGEST and letters >= 0.9 * len(text) and text.endswith(_ENDS) and text[0].isupper():
            yield text


def _documents() -> Iterator[str]:
    """Long texts: the language reference, a chapter at a time, then the library's docstrings, a module at a time."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        topics = {}
    yield "\n\n".join(topics[name] for name in sorted(topics))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield "\n\n".join(_docstrings(path.read_text(encoding="utf-8", errors="replace")))


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            yield textwrap.dedent(text)


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph; joined by spaces they are the paragraph."""
    return re.split(r"(?<=[.!?]) (?=[A-Z“\"])", paragraph)


def run_of_prose(rng: random.Random) -> Iterator[str]:
    """Paragraphs from a random place on, endlessly: after the last comes the first."""
    all_of_it = prose()
    start = rng.randrange(len(all_of_it))
    while True:
        yield from all_of_it[start:]
        start = 0
