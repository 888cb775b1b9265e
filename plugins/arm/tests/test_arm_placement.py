"""Where threads go on processors with cores of unlike speed, and which packed layouts cores take."""

from __future__ import annotations

import shutil
from pathlib import Path

import arm_trees as trees
import pytest
from edge_rt_arm.layouts import CHOICES, packed_layouts
from edge_rt_arm.placement import Placement, place, speed

from edge_rt.hooks import Cores, cpu_topology
from edge_rt.testing import system_trees


def machine(*clusters: tuple[int, float]) -> Placement:
    """The placement for clusters of (cores, speed of each)."""
    cores, first = [], 0
    for number, _ in clusters:
        cores.append(Cores("core", number, tuple(range(first, first + number))))
        first += number
    return place(cores, [each for _, each in clusters])


@pytest.mark.parametrize(
    ("clusters", "cpus", "threads"),
    [
        ([(4, 1024)], (), 4),  # Raspberry Pi
        ([(4, 1024), (4, 397)], (0, 1, 2, 3), 4),  # RK3588: 8 x 397 < 4 x 1024
        ([(1, 1024), (3, 810), (4, 230)], (0, 1, 2, 3), 4),  # Snapdragon 888
        ([(2, 1024), (6, 450)], (), 8),  # Helio G85: 8 x 450 > 2 x 1024, so the many slow ones help
        ([(1, 1024), (1, 100)], (0,), 1),
        ([(1, 3.0), (7, 3.0)], (), 8),
    ],
)
def test_slow_cores_are_used_where_they_help(clusters: list[tuple[int, float]], cpus: tuple[int, ...], threads: int) -> None:
    assert machine(*clusters) == Placement(cpus, threads)


def test_nothing_is_known() -> None:
    assert place((), ()) == Placement((), 0)


def test_speed_is_the_kernels_capacity(tmp_path: Path) -> None:
    root = trees.snapdragon(tmp_path)
    assert [speed(root, cores) for cores in cpu_topology(root)] == [1024, 608, 608, 205]


def test_without_capacities_cores_in_order_count_less_than_their_clock(tmp_path: Path) -> None:
    root = system_trees.phone(tmp_path)
    for folder in (root / trees.CPU).glob("cpu*"):
        (folder / "cpu_capacity").unlink()
    clusters = cpu_topology(root)
    speeds = [speed(root, cores) for cores in clusters]
    assert speeds == pytest.approx([2.8416, 2.4192, 0.4 * 1.8048])
    assert place(clusters, speeds).cpus == (4, 5, 6, 7)


def test_without_capacities_and_clocks_all_cores_are_used(tmp_path: Path) -> None:
    root = trees.graviton_3(tmp_path)
    assert place(cpu_topology(root), [speed(root, cores) for cores in cpu_topology(root)]) == Placement((), 4)
    shutil.rmtree(root / "sys")
    assert place(cpu_topology(root), [1.0]).threads == 4


# ---- packed layouts --------------------------------------------------------------------------------------------------


def test_a_core_without_dot_products_has_none() -> None:
    assert packed_layouts({"neon", "fp16"}) == {}
    assert packed_layouts({"avx2", "dotprod"}) == {}, "not an ARM core"


def test_sve_has_a_layout_of_its_own_at_256_bits_alone() -> None:
    sve = {"neon", "dotprod", "i8mm", "sve"}
    assert [packed_layouts(sve, length)["Q4_0"] for length in (16, 32, 64, 0)] == ["4x8", "8x8", "4x8", "4x8"]
    assert packed_layouts({"neon", "dotprod", "sve"}, 32)["Q4_0"] == "4x4", "its kernels need i8mm too"


def test_best_comes_first() -> None:
    for kind in {choice.type for choice in CHOICES}:
        needs = [choice.needs for choice in CHOICES if choice.type == kind]
        assert needs == sorted(needs, key=("sve256", "i8mm", "dotprod").index)
