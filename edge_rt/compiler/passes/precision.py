"""Which type each weight gets: the least divergence that a number of bytes buys, by sensitivities that were measured.

Each step up of a group (to the next type on its lower convex hull of divergence over bytes) saves so much divergence a byte; the best steps
are taken until the bytes are spent, or the divergence that is asked for is reached: the greedy solution of the Lagrangian relaxation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from edge_rt.compiler.plan import Situation, gained
from edge_rt.compiler.sensitivity import BASE, Group, Sensitive
from edge_rt.deployment import Pass, Plan
from edge_rt.errors import OptionError

TYPES = ("Q2_K", "Q3_K", "Q4_0", "IQ4_NL", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0", "F16")
"""What a weight may become, if its rows can be filled with blocks of it."""


class Step(NamedTuple):
    """A group from one type to a larger one: bytes more, divergence less."""

    group: Group
    type_name: str
    nbytes: int
    saves: float

    @property
    def worth(self) -> float:
        """Divergence saved by each byte."""
        return self.saves / self.nbytes


def apply(plan: Plan, situation: Situation) -> Plan:
    """Types by sensitivity, if they were measured; the source's own otherwise. Raises OptionError for a budget that is too small."""
    if not situation.sensitivities:
        return plan
    goals = situation.goals
    rest = _rest(situation)
    budget = None if goals.weights is None else goals.weights - rest
    if budget is None and goals.quality is None:
        budget = uniform_bytes(situation.sensitivities)
    chosen = choose(situation.sensitivities, budget, goals.quality)
    if goals.quality is not None and (reached := predicted(situation.sensitivities, chosen)) > goals.quality:
        raise OptionError(f"--quality {goals.quality:g} is not reached: {reached:.3g} is the best in these bytes; raise it or --weights")
    types = {}
    for one in situation.sensitivities:
        for name in one.group.tensors:
            if situation.header.tensors[name].type_name != chosen[one.group.name]:
                types[name] = chosen[one.group.name]
    after = plan._replace(types={**plan.types, **types})
    shape = situation.shape(after)
    mixed = ", ".join(f"{name} {nbytes / shape.weights:.0%}" for name, nbytes in shape.types.items())
    quality = predicted(situation.sensitivities, chosen)
    return gained(plan, after, situation, "precision", f"{mixed} of {shape.weights >> 20}M, KL {quality:.3g} predicted", quality)


def _rest(situation: Situation) -> int:
    """Bytes of what keeps its type: norms, biases."""
    grouped = {name for one in situation.sensitivities for name in one.group.tensors}
    return sum(info.nbytes for name, info in situation.header.tensors.items() if name not in grouped)


def uniform_bytes(found: Sequence[Sensitive]) -> int:
    """Bytes of all groups in the base type."""
    return sum(one.group.nbytes(BASE) for one in found)


def predicted(found: Sequence[Sensitive], chosen: Mapping[str, str]) -> float:
    """The divergence of a choice: that of its parts, added up."""
    return sum(one.divergence[chosen[one.group.name]] for one in found)


def choose(found: Sequence[Sensitive], budget: int | None, quality: float | None) -> dict[str, str]:
    """A type for each group by name, within bytes, or as few bytes as reach a divergence. Raises OptionError if the least is too much."""
    hulls = {one.group.name: _hull(one) for one in found}
    chosen = {name: hull[0][0] for name, hull in hulls.items()}
    spent = sum(one.group.nbytes(chosen[one.group.name]) for one in found)
    if budget is not None and spent > budget:
        raise OptionError(f"the weights take {spent >> 20}M at least, and {budget >> 20}M are allowed; raise --weights")
    left = sum(one.divergence[chosen[one.group.name]] for one in found)
    for step in sorted((step for one in found for step in _steps(one, hulls[one.group.name])), key=lambda step: -step.worth):
        if quality is not None and left <= quality:
            break
        if budget is not None and spent + step.nbytes > budget:
            continue
        if not _follows(chosen[step.group.name], step.type_name, hulls[step.group.name]):
            continue  # the step before it did not fit
        chosen[step.group.name] = step.type_name
        spent, left = spent + step.nbytes, left - step.saves
    return chosen


def _hull(one: Sensitive) -> list[tuple[str, int, float]]:
    """(type, bytes, divergence) of the types that are the best for some price of a byte, smallest first: the lower convex hull."""
    points = sorted(((name, one.group.nbytes(name), value) for name, value in one.divergence.items()), key=lambda p: (p[1], p[2]))
    hull: list[tuple[str, int, float]] = []
    for point in points:
        if hull and point[2] >= hull[-1][2]:
            continue  # larger and no better
        if hull and point[1] == hull[-1][1]:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[str, int, float], b: tuple[str, int, float]) -> float:
    return (a[2] - b[2]) / (b[1] - a[1])


def _steps(one: Sensitive, hull: Sequence[tuple[str, int, float]]) -> list[Step]:
    return [Step(one.group, b[0], b[1] - a[1], a[2] - b[2]) for a, b in pairwise(hull)]


def _follows(current: str, wanted: str, hull: Sequence[tuple[str, int, float]]) -> bool:
    names = [name for name, _, _ in hull]
    return names.index(wanted) == names.index(current) + 1


PASS = Pass("precision", "a type for each weight, by measured sensitivity", apply)
