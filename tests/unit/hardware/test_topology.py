"""The clusters of well-known machines, and of trees where something is missing, malformed or not for this process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from edge_rt import hooks
from edge_rt.hardware.system_files import cpu_quota
from edge_rt.hardware.topology import allowed_cpus, board_name, cpu_topology
from edge_rt.hooks import Cache, Cores
from edge_rt.testing import system_trees as trees

CPU = "sys/devices/system/cpu"


def brief(clusters: tuple[Cores, ...]) -> list[tuple[str, int, tuple[int, ...], float | None]]:
    return [(one.name, one.number, one.cpus, one.clock) for one in clusters]


def test_raspberry_pi_4(tmp_path: Path) -> None:
    root = trees.raspberry_pi_4(tmp_path)
    caches = (Cache(1, 32 << 10, 1), Cache(2, 1 << 20, 4))
    assert cpu_topology(root) == (Cores("Cortex-A72", 4, (0, 1, 2, 3), ("neon",), 1.5e9, caches),)
    assert board_name(root) == "Raspberry Pi Compute Module 4 Rev 1.0"


def test_raspberry_pi_5(tmp_path: Path) -> None:
    caches = (Cache(1, 64 << 10, 1), Cache(2, 512 << 10, 1), Cache(3, 2 << 20, 4))
    features = ("neon", "fp16", "dotprod")
    assert cpu_topology(trees.raspberry_pi_5(tmp_path)) == (Cores("Cortex-A76", 4, (0, 1, 2, 3), features, 2.4e9, caches),)


def test_a_phone_has_its_fastest_cluster_first(tmp_path: Path) -> None:
    found = cpu_topology(trees.phone(tmp_path))
    assert brief(found) == [
        ("Cortex-X1", 1, (7,), 2.8416e9),
        ("Cortex-A78", 3, (4, 5, 6), 2.4192e9),
        ("Cortex-A55", 4, (0, 1, 2, 3), 1.8048e9),
    ]
    assert [one.caches[-1] for one in found] == [Cache(3, 4 << 20, 8)] * 3, "they share the last level"


def test_x86_hybrid(tmp_path: Path) -> None:
    found = cpu_topology(trees.x86_hybrid(tmp_path))
    model = "12th Gen Intel(R) Core(TM) i7-12700"
    assert brief(found) == [
        (f"{model}, performance cores", 8, tuple(range(16)), 4.9e9),  # the favoured two are no kind of their own
        (f"{model}, efficiency cores", 4, (16, 17, 18, 19), 3.6e9),
    ]
    assert found[0].caches == (Cache(1, 48 << 10, 1), Cache(2, 1280 << 10, 1), Cache(3, 25 << 20, 12))
    assert found[1].caches[1] == Cache(2, 2 << 20, 4)
    assert "avx_vnni" in found[0].features


def test_virtual_machine(tmp_path: Path) -> None:
    (cores,) = cpu_topology(trees.virtual_machine(tmp_path))
    assert (cores.name, cores.number, cores.clock, cores.caches[-1]) == ("AMD EPYC", 2, None, Cache(3, 32 << 20, 2))


def test_nothing_to_read(tmp_path: Path) -> None:
    assert cpu_topology(tmp_path) == cpu_topology(tmp_path / "none") == ()
    assert (allowed_cpus(tmp_path), cpu_quota(tmp_path), board_name(tmp_path)) == ((), None, "")


def test_this_machine() -> None:
    if not Path("/proc/cpuinfo").exists():
        pytest.skip("only Linux describes its CPUs in files")
    found = hooks.cpu_topology()
    cpus = [n for cores in found for n in cores.cpus]
    assert sorted(cpus) == sorted(os.sched_getaffinity(0))
    assert all(1 <= cores.number <= len(cores.cpus) and cores.name for cores in found)


# ---- what decides where a core belongs -------------------------------------------------------------------------------


def test_one_model_in_two_clusters_is_told_apart_by_speed(tmp_path: Path) -> None:
    gold = trees.arm(0x804, trees.A76_FEATURES, 0x51)
    silver = trees.Kind(range(4), trees.arm(0x805, trees.A76_FEATURES, 0x51), 1785.6, 400)
    kinds = [silver, trees.Kind(range(4, 7), gold, 2419.2, 870), trees.Kind([7], gold, 2841.6, 1024)]
    found = brief(cpu_topology(trees.cpus(tmp_path, kinds)))
    assert [(name, number) for name, number, _, _ in found] == [("Kryo 4xx Gold", 1), ("Kryo 4xx Gold", 3), ("Kryo 4xx Silver", 4)]


def test_a_model_says_more_than_a_clock(tmp_path: Path) -> None:
    small = trees.Kind(range(2), trees.arm(0xD03, trees.A53_FEATURES), 1896)
    large = trees.Kind(range(2, 6), trees.arm(0xD09, trees.A53_FEATURES), 1800)
    assert [one.name for one in cpu_topology(trees.cpus(tmp_path, [small, large]))] == ["Cortex-A73", "Cortex-A53"]


def test_cores_with_more_cache_are_a_kind_of_their_own(tmp_path: Path) -> None:
    model = trees.x86("AMD Ryzen 9 7950X3D")
    kinds = [trees.Kind(range(8), model, 5250, caches=[(3, "96M", 8)]), trees.Kind(range(8, 16), model, 5600, caches=[(3, "32M", 8)])]
    assert [one.caches for one in cpu_topology(trees.cpus(tmp_path, kinds))] == [(Cache(3, 32 << 20, 8),), (Cache(3, 96 << 20, 8),)]


def test_an_unknown_core_has_its_numbers_for_a_name(tmp_path: Path) -> None:
    (cores,) = cpu_topology(trees.cpus(tmp_path, [trees.Kind(range(2), trees.arm(0xABC, "asimd", 0x7))]))
    assert cores.name == "ARM core 0xabc of implementer 0x07"


# ---- what this process may use ---------------------------------------------------------------------------------------


def test_only_what_the_affinity_allows(tmp_path: Path) -> None:
    root = trees.write(trees.phone(tmp_path), {"proc/self/status": "Name:\tpython\nCpus_allowed_list:\t0-1,7"})
    assert [(one.name, one.cpus) for one in cpu_topology(root)] == [("Cortex-X1", (7,)), ("Cortex-A55", (0, 1))]
    assert cpu_topology(root)[1].caches[-1].shared_by == 8, "the others still use the cache"
    trees.write(root, {"proc/thread-self/status": "Cpus_allowed_list:\t5"})  # a pinned thread
    assert [one.cpus for one in cpu_topology(root)] == [(5,)]


def test_offline_cpus_are_left_out(tmp_path: Path) -> None:
    root = trees.write(trees.raspberry_pi_5(tmp_path), {f"{CPU}/online": "0,2-3"})
    assert brief(cpu_topology(root)) == [("Cortex-A76", 3, (0, 2, 3), 2.4e9)]


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"sys/fs/cgroup/cpu.max": "200000 100000"}, 2),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"sys/fs/cgroup/cpu.max": "nonsense"}, None),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/x", "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "400000"}, None),
        (
            {
                "proc/self/cgroup": "4:cpuacct,cpu:/x",
                "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "400000",
                "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        ({"proc/self/cgroup": "0::/../../etc", "sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
    ],
)
def test_the_least_quota_of_all_groups_above_counts(tmp_path: Path, files: dict[str, object], quota: int | None) -> None:
    assert cpu_quota(trees.write(tmp_path, files)) == quota


def test_a_quota_is_spent_on_the_fastest_cores(tmp_path: Path) -> None:
    root = trees.write(trees.phone(tmp_path), {"sys/fs/cgroup/cpu.max": "200000 100000"})
    assert [(one.name, one.number, len(one.cpus)) for one in cpu_topology(root)] == [("Cortex-X1", 1, 1), ("Cortex-A78", 1, 3)]


# ---- what is broken --------------------------------------------------------------------------------------------------


def test_half_a_tree(tmp_path: Path) -> None:
    root = trees.phone(tmp_path)
    shutil.rmtree(root / "sys")  # some containers show no more
    assert [(one.name, one.number) for one in cpu_topology(root)] == [("Cortex-X1", 1), ("Cortex-A78", 3), ("Cortex-A55", 4)]
    shutil.rmtree(root / "proc")
    root = trees.raspberry_pi_4(tmp_path)
    (root / "proc/cpuinfo").unlink()
    assert brief(cpu_topology(root)) == [("CPU", 4, (0, 1, 2, 3), 1.5e9)]


@pytest.mark.parametrize("nonsense", ["", "-", "\0", "9" * 30, "0-99999999999", "0-", "a-b", "-1", "1-0", "0x", "\N{SUPERSCRIPT TWO}"])
def test_nonsense_in_any_file_is_survived(tmp_path: Path, nonsense: str) -> None:
    root = trees.raspberry_pi_5(tmp_path)
    whole = cpu_topology(root)
    for path in [path for path in root.rglob("*") if path.is_file()]:
        before = path.read_bytes()
        path.write_text(nonsense)
        assert sum(one.number for one in cpu_topology(root)) == 4, path
        path.write_bytes(before)
    assert cpu_topology(root) == whole
