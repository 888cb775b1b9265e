"""The choice of types: the least divergence for bytes, or the least bytes for a divergence."""

from __future__ import annotations

import itertools
import random

import pytest

from edge_rt.deploy import passes
from edge_rt.deploy.sensitivity import Group, Sensitive, fitting
from edge_rt.errors import OptionError

TYPES = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q8_0")
ERRORS = {"Q4_0": 1.0, "IQ4_NL": 0.8, "Q4_1": 0.7, "Q5_0": 0.25, "Q8_0": 0.004}


def groups(sensitivities: list[float]) -> list[Sensitive]:
    return [
        Sensitive(Group(f"group {i}", (f"t{i}",), 256 * 32 * (1 + i % 3), 256), {kind: value * ERRORS[kind] for kind in TYPES})
        for i, value in enumerate(sensitivities)
    ]


def spent(found: list[Sensitive], chosen: dict[str, str]) -> int:
    return sum(one.group.nbytes(chosen[one.group.name]) for one in found)


def test_the_most_sensitive_get_the_bytes() -> None:
    found = groups([0.001, 5.0, 0.002, 0.003])
    budget = passes.uniform_bytes(found) + found[1].group.nbytes("Q8_0") - found[1].group.nbytes("Q4_0")
    chosen = passes.choose(found, budget, None)
    assert chosen["group 1"] == "Q8_0"
    assert spent(found, chosen) <= budget


def test_of_equal_bytes_the_better_type_is_taken() -> None:
    found = groups([1.0, 2.0, 3.0])
    chosen = passes.choose(found, passes.uniform_bytes(found), None)
    assert set(chosen.values()) == {"IQ4_NL"}  # as large as Q4_0
    uniform = {one.group.name: "Q4_0" for one in found}
    assert passes.predicted(found, chosen) < passes.predicted(found, uniform)
    assert spent(found, chosen) == spent(found, uniform)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_within_the_bytes_is_much_better(seed: int) -> None:
    """Greedy on hulls is optimal but for the last step, which may not fit."""
    chance = random.Random(seed)
    found = groups([10 ** chance.uniform(-3, 0) for _ in range(4)])
    least = spent(found, {one.group.name: "Q4_0" for one in found})
    budget = int(least * chance.uniform(1.0, 1.8))
    mine = passes.predicted(found, passes.choose(found, budget, None))
    names = [one.group.name for one in found]
    every = (dict(zip(names, kinds, strict=True)) for kinds in itertools.product(TYPES, repeat=len(names)))
    best = min(passes.predicted(found, chosen) for chosen in every if spent(found, chosen) <= budget)
    largest_step = max(max(one.divergence.values()) for one in found)
    assert best <= mine <= best + largest_step


@pytest.mark.parametrize("quality", [1.0, 0.3, 0.01])
def test_a_divergence_is_reached_with_few_bytes(quality: float) -> None:
    found = groups([0.5, 1.0, 0.01, 0.2])
    chosen = passes.choose(found, None, quality)
    assert passes.predicted(found, chosen) <= quality
    uniform = {one.group.name: "Q8_0" for one in found}
    assert spent(found, chosen) < spent(found, uniform)


def test_too_few_bytes_are_told() -> None:
    found = groups([1.0])
    with pytest.raises(OptionError, match="raise --weights"):
        passes.choose(found, 10, None)


def test_types_are_those_whose_blocks_fill_the_rows() -> None:
    assert fitting(Group("a", ("t",), 576, 576), ("Q4_0", "Q4_K", "Q8_0", "F16")) == ["Q4_0", "Q8_0", "F16"]
    assert fitting(Group("a", ("t",), 512, 512), ("Q4_K", "Q8_0")) == ["Q4_K", "Q8_0"]
