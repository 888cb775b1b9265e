"""What a business cares about: weights of metrics and domains, and how much of a metric must be kept whatever else is. A file of TOML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edge_rt.hooks import Rules, read_toml
from edge_rt_distill.sandbox.metrics import METRICS

FLOORS: Mapping[str, float] = {"safety": 0.9, "stopping": 0.9}
"""Metrics of which a student must keep this much, unless a file says otherwise."""


class Weights(NamedTuple):
    """``of``: weights of metrics and domains by name, 1 if left out: a cell has its metric's times its domain's. ``floors`` by metric."""

    of: Mapping[str, float] = {}
    floors: Mapping[str, float] = FLOORS


def read_weights(path: Path, domains: Sequence[str]) -> Weights:
    """``[metrics]``, ``[domains]`` and ``[floors]`` of a file. ``domains``: that there are. Raises OptionError, RuleError with the line."""

    def read(table: Rules) -> Weights:
        weights = {**_numbers(table, "metrics", list(METRICS), 1000.0), **_numbers(table, "domains", domains, 1000.0)}
        return Weights(weights, {**FLOORS, **_numbers(table, "floors", list(METRICS), 1.0)})

    return read_toml(path, "file of weights", read)


def _numbers(table: Rules, name: str, known: Sequence[str], most: float) -> dict[str, float]:
    part, found = table.table(name), {}
    for key in part.keys():  # noqa: SIM118 - it is no mapping
        if key not in known:
            raise part.error(f"there is no {key} among the {name}; choose of {', '.join(known)}", key)
        found[key] = part.number(key, 1.0, 0.0, most)
    return found
