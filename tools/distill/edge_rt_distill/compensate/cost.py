"""What corrections cost in the running model, as data, and the choice of one candidate a site within a budget of bytes and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from edge_rt.hooks import OptionError

MIXES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Shares of the byte budget in the price of a candidate that are tried, the rest being time's."""


@dataclass(frozen=True)
class Costs:
    """Microseconds that a decode step of one token gets longer by: ``node`` for each further node of the graph.

    ``gigabytes_per_second``: at which corrections' bytes are read. ``nodes``: of each kind (a table's offsets are one of them).
    """

    node: float = 3.0
    gigabytes_per_second: float = 12.0
    nodes: Mapping[str, int] = field(default_factory=lambda: {"bias": 1, "table": 5, "rank": 3})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Costs:
        """Costs as measured on a device. Raises OptionError for unknown names and for values that are not positive."""
        names = {"node", "gigabytes_per_second", "nodes"}
        if unknown := set(data) - names:
            raise OptionError(f"costs have no {sorted(unknown)[0]!r}; choose from {', '.join(sorted(names))}")
        costs = cls(**{**data, "nodes": {**cls().nodes, **data.get("nodes", {})}})
        if not (costs.node >= 0 and costs.gigabytes_per_second > 0):
            raise OptionError("costs must be positive numbers; measure them on the device, or leave them out")
        return costs

    def microseconds(self, kinds: Iterable[str], size: int) -> float:
        """Of a correction of these kinds (``rank 8``, ``table 16``, ``bias``) that takes ``size`` bytes."""
        return self.node * sum(self.nodes[kind.split()[0]] for kind in kinds) + size / (self.gigabytes_per_second * 1e3)


class Budget(NamedTuple):
    """The most that all corrections of a model may take, in bytes of the file and microseconds of a decode step."""

    bytes: int
    microseconds: float

    @classmethod
    def share(cls, file_bytes: int, step_microseconds: float, *, of_bytes: float = 0.03, of_time: float = 0.04) -> Budget:
        """Shares of a file of this size and of a step of this length."""
        return cls(int(file_bytes * of_bytes), step_microseconds * of_time)


class Candidate(NamedTuple):
    """A form that a site's correction may have. ``gain``: the estimated fall of the KL, nats a token."""

    site: str
    kinds: tuple[str, ...]
    bytes: int
    microseconds: float
    gain: float


def select(candidates: Sequence[Candidate], budget: Budget) -> dict[str, Candidate]:
    """At most one candidate a site, within both limits, for the largest sum of gains: by site.

    A knapsack with choices: from nothing, the step to another candidate with the most gain for its price is taken until none fits. The
    price is a mix of the shares of both limits; the best of several mixes is kept. Candidates without gain are never taken.
    """
    useful = [one for one in candidates if one.gain > 0]
    return max((_greedy(useful, budget, mix) for mix in MIXES), key=lambda found: sum(one.gain for one in found.values()), default={})


def _greedy(candidates: Sequence[Candidate], budget: Budget, mix: float) -> dict[str, Candidate]:
    taken: dict[str, Candidate] = {}
    left_bytes, left_time = float(budget.bytes), budget.microseconds

    def price(size: float, time: float) -> float:
        return mix * size / max(budget.bytes, 1) + (1 - mix) * time / max(budget.microseconds, 1e-9)

    while True:
        best: tuple[float, Candidate] | None = None
        for one in candidates:
            now = taken.get(one.site)
            gain = one.gain - (now.gain if now else 0.0)
            size, time = one.bytes - (now.bytes if now else 0), one.microseconds - (now.microseconds if now else 0.0)
            if gain > 0 and size <= left_bytes and time <= left_time:
                worth = gain / max(price(size, time), 1e-12)
                if best is None or worth > best[0]:
                    best = (worth, one)
        if best is None:
            return taken
        now = taken.get(best[1].site)
        left_bytes -= best[1].bytes - (now.bytes if now else 0)
        left_time -= best[1].microseconds - (now.microseconds if now else 0.0)
        taken[best[1].site] = best[1]
