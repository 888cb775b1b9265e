"""Finds the entry points of one group among the installed distributions, in about a millisecond.

``importlib.metadata`` does the same, but importing it takes 20-30 ms (it pulls in email, zipfile and csv), which is a large share
of the time from process start to first token. What it finds in ordinary directories is found here by reading the same files;
for anything else (an archive on the path, a finder of its own kind) it is asked after all.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

OWN_DISTRIBUTION = "edge-rt"


class EntryPoint(NamedTuple):
    """``name = value`` in a distribution's entry_points.txt; ``value`` is ``module`` or ``module:attribute``."""

    name: str
    value: str
    distribution: str
    version: str

    def load(self) -> object:
        """Import what it names. Raises whatever the import raises, AttributeError if the attribute is not there."""
        module, _, attributes = self.value.partition(":")
        loaded: object = importlib.import_module(module.strip())
        for attribute in filter(None, attributes.strip().split(".")):
            loaded = getattr(loaded, attribute)
        return loaded


def find(group: str, path: Sequence[str] | None = None) -> list[EntryPoint]:
    """Entry points of ``group`` on ``path`` (default: ``sys.path``), sorted by distribution and name.

    Of two versions of a distribution, the first on the path counts.
    """
    path = sys.path if path is None else path
    found = _from_metadata(group, path) if _needs_metadata(path) else _from_directories(group, path)
    return sorted(found, key=lambda point: (point.distribution, point.name))


def with_built_ins(group: str, built_ins: Mapping[str, str], *, others: bool) -> list[EntryPoint]:
    """This distribution's entry points first (``built_ins``, name to module, where it is not installed), then, if wanted, the others'."""
    from edge_rt import __version__

    found = find(group) if others else []
    own = {name: EntryPoint(name, module, OWN_DISTRIBUTION, __version__) for name, module in built_ins.items()}
    own |= {point.name: point for point in found if point.distribution == OWN_DISTRIBUTION}
    return [*own.values(), *(point for point in found if point.distribution != OWN_DISTRIBUTION)]


def _needs_metadata(path: Iterable[str]) -> bool:
    """Is there anything on the path that is not a directory, or a finder that brings distributions from elsewhere?"""
    own_finders = any(hasattr(finder, "find_distributions") and finder.__module__ != _PATH_FINDER for finder in map(_class, sys.meta_path))
    return own_finders or any(os.path.isfile(entry) for entry in path)


_PATH_FINDER = "_frozen_importlib_external"


def _class(finder: object) -> type:
    return finder if isinstance(finder, type) else type(finder)


def _from_metadata(group: str, path: Sequence[str]) -> list[EntryPoint]:
    """The slow way, for what is not in plain directories."""
    from importlib import metadata

    found, seen = [], set()
    for distribution in metadata.distributions(path=list(path)):
        name = distribution.metadata["Name"]
        if name is None or _normalise(name) in seen:
            continue
        seen.add(_normalise(name))
        found += [
            EntryPoint(point.name, _without_extras(point.value), name, distribution.version)
            for point in distribution.entry_points
            if point.group == group
        ]
    return found


def _from_directories(group: str, path: Iterable[str]) -> list[EntryPoint]:
    found, seen = [], set()
    for entry in path:
        try:
            names = sorted(name for name in os.listdir(entry or ".") if name.endswith((".dist-info", ".egg-info")))
        except OSError:  # not there, or not ours to read: Python's own import skips it too
            continue
        for name in names:
            key = _normalise(name.rpartition(".")[0].partition("-")[0])
            if key not in seen:
                seen.add(key)
                found += _from_directory(group, os.path.join(entry, name))
    return found


def _from_directory(group: str, directory: str) -> list[EntryPoint]:
    """Entry points of one dist-info or egg-info directory."""
    try:
        with open(os.path.join(directory, "entry_points.txt"), encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):  # most distributions have none; an egg-info may be a file
        return []
    pairs = _parse(text, group)
    if not pairs:
        return []
    name, version = _identity(directory)
    return [EntryPoint(point, value, name, version) for point, value in pairs]


def _parse(text: str, group: str) -> list[tuple[str, str]]:
    """(name, value) pairs of one section of an entry_points.txt."""
    pairs, section = [], ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif section == group and "=" in line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            pairs.append((name.strip(), _without_extras(value)))
    return pairs


def _without_extras(value: str) -> str:
    """``module:attribute [extra]`` without the extra."""
    return value.partition("[")[0].strip()


def _identity(directory: str) -> tuple[str, str]:
    """Name and version from the metadata's header; from the directory's name where that cannot be read."""
    fields: dict[str, str] = {}
    for file_name in ("METADATA", "PKG-INFO"):
        try:
            with open(os.path.join(directory, file_name), encoding="utf-8", errors="replace") as file:
                for line in file:
                    if not line.strip():  # the header ends at the first empty line
                        break
                    key, _, value = line.partition(":")
                    fields.setdefault(key.lower(), value.strip())
        except OSError:
            continue
        break
    name, _, version = os.path.basename(directory).rpartition(".")[0].partition("-")
    return fields.get("name", name), fields.get("version", version)


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()
