"""What corrections cost in the running model, as data, and the choice of one candidate a site within a budget of bytes and time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from edge_rt.hooks import OptionError
from edge_rt_distill.model.decoder import GROUPS

MIXES = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
"""Shares of the byte budget in the price of a candidate that are tried, the rest being time's."""


@dataclass(frozen=True)
class Costs:
    """Microseconds that a decode step of one token gets longer by: ``node`` for each further node of the graph.

    ``gigabytes_per_second``: at which corrections' bytes are read. ``nodes``: ``rank`` and ``table`` of a site; of all sites that share an
    input once: ``inner``, the product with their stacked ``low_a`` and centroids, ``offsets`` if a table has some, ``bias``.
    """

    node: float = 3.5
    gigabytes_per_second: float = 12.0
    nodes: Mapping[str, int] = field(default_factory=lambda: {"inner": 1, "offsets": 1, "rank": 2, "table": 3, "bias": 1})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Costs:
        """Costs as measured on a device. Raises OptionError for unknown names and for values that are not positive."""
        names = {"node", "gigabytes_per_second", "nodes"}
        if unknown := set(data) - names | set(data.get("nodes", {})) - set(cls().nodes):
            raise OptionError(f"costs have no {sorted(unknown)[0]!r}; choose from {', '.join(sorted(names | set(cls().nodes)))}")
        costs = cls(**{**data, "nodes": {**cls().nodes, **data.get("nodes", {})}})
        if not (costs.node >= 0 and costs.gigabytes_per_second > 0):
            raise OptionError("costs must be positive numbers; measure them on the device, or leave them out")
        return costs

    def microseconds(self, kinds: Iterable[Sequence[str]], size: int) -> float:
        """Of corrections at sites that share an input: each site's kinds (``rank 8``, ``table 16``, ``bias``), and their bytes together.

        A table counts with offsets, though spherical ones have none.
        """
        words = [[kind.split()[0] for kind in one] for one in kinds]
        found = [word for one in words for word in one if word != "bias"]
        once = {"inner": bool(found), "offsets": "table" in found, "bias": any("bias" in one for one in words)}
        count = sum(self.nodes[word] for word in found) + sum(self.nodes[name] for name, there in once.items() if there)
        return self.node * count + size / (self.gigabytes_per_second * 1e3)

    def of_all(self, chosen: Mapping[str, tuple[Sequence[str], int]]) -> float:
        """Of a model's corrections, each site's kinds and bytes."""
        groups: dict[tuple[str, int], list[tuple[Sequence[str], int]]] = {}
        for site, one in chosen.items():
            groups.setdefault(group_of(site), []).append(one)
        return sum(self.microseconds([kinds for kinds, _ in ones], sum(size for _, size in ones)) for ones in groups.values())


def group_of(site: str) -> tuple[str, int]:
    """The same for sites that share their input: layer, and number in `GROUPS`."""
    _, layer, name = site.split(".")
    return layer, next(number for number, group in enumerate(GROUPS) if name in group)


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
    gain: float


def select(candidates: Sequence[Candidate], budget: Budget, costs: Costs) -> dict[str, Candidate]:
    """At most one candidate a site, within both limits, for the largest sum of gains: by site.

    A knapsack with choices: from nothing, the step to another candidate with the most gain for its price is taken until none fits. The
    price is a mix of the shares of both limits; the best of several mixes is kept. Candidates without gain are never taken.
    """
    useful = [one for one in candidates if one.gain > 0 and one.bytes <= budget.bytes]
    found = [_Selection(useful, budget, costs, mix).run() for mix in MIXES]
    return max(found, key=lambda taken: sum(one.gain for one in taken.values()))


class _Selection:
    """One greedy way through the candidates."""

    def __init__(self, candidates: Sequence[Candidate], budget: Budget, costs: Costs, mix: float) -> None:
        self.candidates, self.budget, self.costs, self.mix = candidates, budget, costs, mix
        self.taken: dict[tuple[str, int], dict[str, Candidate]] = {}
        self.size, self.time = 0, 0.0

    def run(self) -> dict[str, Candidate]:
        """Take steps until none is left that gains and fits."""
        left = [(one, group_of(one.site)) for one in self.candidates]
        while True:
            steps = [(worth, one, group) for one, group in left if (worth := self._worth(one, group)) > 0]
            if not steps:
                return {site: one for ones in self.taken.values() for site, one in ones.items()}
            _, best, group = max(steps, key=lambda step: step[0])
            size, time = self._more(best, group)
            self.size, self.time = self.size + size, self.time + time
            self.taken.setdefault(group, {})[best.site] = best

    def _worth(self, one: Candidate, group: tuple[str, int]) -> float:
        """Gain for the price of a step; 0 if it does not fit, or gains nothing."""
        now = self.taken.get(group, {}).get(one.site)
        gain = one.gain - (now.gain if now else 0.0)
        if gain <= 0:
            return 0.0
        size, time = self._more(one, group)
        if self.size + size > self.budget.bytes or self.time + time > self.budget.microseconds:
            return 0.0
        price = self.mix * size / max(self.budget.bytes, 1) + (1 - self.mix) * time / max(self.budget.microseconds, 1e-9)
        return gain / max(price, 1e-9)

    def _more(self, one: Candidate, group: tuple[str, int]) -> tuple[int, float]:
        """Bytes and microseconds that a step adds; less than nothing where a smaller form takes the place of a larger."""
        before = self.taken.get(group, {})
        after = {**before, one.site: one}
        return sum(x.bytes for x in after.values()) - sum(x.bytes for x in before.values()), self._time(after) - self._time(before)

    def _time(self, ones: Mapping[str, Candidate]) -> float:
        return self.costs.microseconds([one.kinds for one in ones.values()], sum(one.bytes for one in ones.values()))
