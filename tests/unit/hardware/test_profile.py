"""What a profile takes from the files of a system, and what decides how it is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_rt.hardware.sensors import TYPICAL_CACHE, last_level, slows_down_at, thread_counts
from edge_rt.hardware.topology import cpu_topology
from edge_rt.testing import system_trees as trees


@pytest.mark.parametrize(("most", "numbers"), [(1, (1,)), (2, (2, 1)), (4, (4, 1, 2)), (16, (16, 1, 2, 8))])
def test_all_and_one_thread_are_measured_first(most: int, numbers: tuple[int, ...]) -> None:
    assert thread_counts(most) == numbers


def test_a_cache_that_clusters_share_counts_once(tmp_path: Path) -> None:
    assert last_level(cpu_topology(trees.phone(tmp_path / "phone"))) == 4 << 20
    assert last_level(cpu_topology(trees.x86_hybrid(tmp_path / "x86"))) == 25 << 20
    chiplets = [trees.Kind(range(16), trees.x86("AMD EPYC"), caches=[(2, "1024K", 1), (3, "32768K", 8)])]
    assert last_level(cpu_topology(trees.cpus(tmp_path / "epyc", chiplets))) == 64 << 20
    assert last_level(()) == TYPICAL_CACHE


def test_a_part_of_the_cores_has_the_whole_cache(tmp_path: Path) -> None:
    root = trees.write(trees.phone(tmp_path), {"proc/self/status": "Cpus_allowed_list:\t6-7"})
    assert last_level(cpu_topology(root)) == 4 << 20


def test_it_slows_down_at_the_lowest_passive_trip_of_its_zones(tmp_path: Path) -> None:
    trees.write(tmp_path, trees.thermal_zone(0, "gpu", 40, 110, passive=60) | trees.thermal_zone(1, "cpu-0", 40, 110, passive=85))
    trees.write(tmp_path, trees.thermal_zone(2, "cpu-1", 40, 110, passive=95) | trees.thermal_zone(3, "cpu-2", 40, 110, passive=0))
    assert slows_down_at(tmp_path) == 85


def test_intels_sensors_say_where_they_throttle(tmp_path: Path) -> None:
    trees.write(tmp_path, {"sys/class/hwmon/hwmon0/name": "coretemp", "sys/class/hwmon/hwmon0/temp1_crit": 100_000})
    assert slows_down_at(tmp_path) == 100


def test_a_critical_temperature_is_no_limit_to_plan_with(tmp_path: Path) -> None:
    assert slows_down_at(trees.raspberry_pi_4(tmp_path)) is None
    assert slows_down_at(tmp_path / "none") is None
