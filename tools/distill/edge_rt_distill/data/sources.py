"""General text that is on every machine this tool runs on: Python's own documentation, and that in the source of libraries."""

from __future__ import annotations

import ast
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from edge_rt.hooks import DataError
from edge_rt_distill.data.samples import Sample, make_sample
from edge_rt_distill.data.text import passages

LICENCE = "PSF-2.0"
PACKAGES: Mapping[str, str] = {"numpy": "BSD-3-Clause", "torch": "BSD-3-Clause"}
"""Packages that this tool needs, with their licences."""
SHORTEST = 200
"""Letters of the docstrings that are text: shorter ones name what they stand on once more."""
_LEFT_OUT = frozenset(("idlelib", "lib2to3", "pydoc_data", "site-packages", "dist-packages", "test", "tests", "turtledemo"))
"""Folders of programs, tests and what others installed; ``technical_text`` has pydoc_data."""
_PYTHON = ".".join(map(str, sys.version_info[:3]))


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
    texts = ((f"pydoc_data.topics, {topic}", text) for topic, text in sorted(topics.items()))
    return _samples(texts, passage, f"CPython {_PYTHON}", LICENCE)


def docstrings(passage: int = 1500) -> list[Sample]:
    """English text of every CPython (about 1.2 MB): what its library's source says of modules, classes and functions, none of it run.

    Those of a module that follow each other stand in passages of at most ``passage`` letters. It depends on Python's version as
    ``technical_text``. Raises ``DataError`` where a distribution left the source out.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    found = _samples(_documented(library), passage, f"CPython {_PYTHON}", LICENCE)
    if not found:
        raise DataError(
            f"{library} has no source that docstrings could be taken from; install Python's full standard library, "
            "or name text files of your own"
        )
    return found


def packages(passage: int = 1500) -> list[Sample]:
    """The docstrings of numpy and torch (about 6 MB), read as those of ``docstrings``; they depend on the versions that are installed."""
    found: list[Sample] = []
    for name, licence in PACKAGES.items():
        spec = importlib.util.find_spec(name)
        for folder in (spec and spec.submodule_search_locations) or ():
            found += _samples(_documented(Path(folder)), passage, f"{name} {version(name)}", licence)
    return found


def _samples(texts: Iterable[tuple[str, str]], passage: int, work: str, licence: str) -> list[Sample]:
    """Passages of texts of a work, with where in it each is from. Some texts quote the same paragraphs: those stand there once."""
    samples: dict[str, Sample] = {}
    for origin, text in texts:
        for number, piece in enumerate(passages(text, passage), 1):
            source = f"{work}, {origin}, passage {number}"
            sample = make_sample(text=piece, domain="general", language="en", source=source, licence=licence)
            samples.setdefault(sample.id, sample)
    return list(samples.values())


def _documented(library: Path) -> Iterator[tuple[str, str]]:
    """The modules of a folder that have docstrings, with them."""
    for file in sorted(library.rglob("*.py")):
        place = file.relative_to(library)
        if not _LEFT_OUT.intersection(place.parts) and (text := _documentation(file)):
            yield str(place), text


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
