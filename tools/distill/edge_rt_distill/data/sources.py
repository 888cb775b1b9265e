"""General text that is on every machine this tool runs on: Python's own documentation, and that in its library's source."""

from __future__ import annotations

import ast
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from edge_rt.hooks import DataError
from edge_rt_distill.data.samples import Sample, make_sample
from edge_rt_distill.data.text import passages

LICENCE = "PSF-2.0"
SHORTEST = 200
"""Letters of the docstrings that are text: shorter ones name what they stand on once more."""
_LEFT_OUT = frozenset(("idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "test", "tests", "turtledemo"))
"""Folders of programs, tests and what others installed; ``technical_text`` has pydoc_data."""


def technical_text(passage: int = 1500) -> list[Sample]:
    """English technical text of every CPython (``pydoc_data.topics``, about 460 kB), in passages of at most ``passage`` letters.

    It depends on Python's version, so the version is in each sample's source. Raises ``DataError`` where a distribution left it out.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python has no pydoc_data.topics, which the general text is taken from; install Python's full standard library, "
            "or name text files of your own"
        ) from None
    return _samples(((f"pydoc_data.topics, {topic}", text) for topic, text in sorted(topics.items())), passage)


def docstrings(passage: int = 1500) -> list[Sample]:
    """English text of every CPython (about 1.2 MB): what its library's source says of modules, classes and functions, none of it run.

    Those of a module that follow each other stand in passages of at most ``passage`` letters. It depends on Python's version as
    ``technical_text``. Raises ``DataError`` where a distribution left the source out.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    found = _samples(((str(file.relative_to(library)), text) for file in _modules(library) if (text := _documentation(file))), passage)
    if not found:
        raise DataError(
            f"{library} has no source that docstrings could be taken from; install Python's full standard library, "
            "or name text files of your own"
        )
    return found


def _samples(texts: Iterator[tuple[str, str]], passage: int) -> list[Sample]:
    """Passages of texts with where each is from. Some texts quote the same paragraphs: those stand there once."""
    version = ".".join(map(str, sys.version_info[:3]))
    samples: dict[str, Sample] = {}
    for origin, text in texts:
        for number, piece in enumerate(passages(text, passage), 1):
            source = f"CPython {version}, {origin}, passage {number}"
            sample = make_sample(text=piece, domain="general", language="en", source=source, licence=LICENCE)
            samples.setdefault(sample.id, sample)
    return list(samples.values())


def _modules(library: Path) -> Iterator[Path]:
    for file in sorted(library.rglob("*.py")):
        if not _LEFT_OUT.intersection(file.relative_to(library).parts):
            yield file


def _documentation(file: Path) -> str:
    """The docstrings of a module in the order of its source, long ones only and each once; "" for source that is none."""
    try:
        with warnings.catch_warnings():  # of escapes in old source
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # templates and examples of what does not parse
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    places = sorted((one for one in ast.walk(tree) if isinstance(one, documented)), key=lambda one: getattr(one, "lineno", 0))
    texts = (ast.get_docstring(one) or "" for one in places)
    return "\n\n".join(dict.fromkeys(text for text in texts if len(text) >= SHORTEST))
