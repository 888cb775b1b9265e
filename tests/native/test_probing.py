"""Measuring this machine: figures that can be true, within their time, and nothing left behind."""

from __future__ import annotations

import itertools
import os
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from edge_rt.errors import OutOfMemory
from edge_rt.hardware import probe
from edge_rt.hardware.sensors import cpu_profile
from edge_rt.native import ggml, memory
from edge_rt.testing import system_trees as trees


def test_memory_bandwidth() -> None:
    found = probe.memory_bandwidth((2, 1), 8 << 20)
    assert list(found) in ([1, 2], [2]), "rising; what there was no time for is left out"
    # From an emulated core to a server's: outside, units are wrong.
    assert all(1e6 < rate < 2e12 for rate in found.values())


def test_every_byte_is_read_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    read: dict[int, list[tuple[int, int]]] = {}
    original = probe._plain

    def noted(type_: int, shape: tuple[int, int], address: int):  # type: ignore[no-untyped-def]
        read.setdefault(type_, []).append((address, ggml.c.row_size(type_, shape[0]) * shape[1]))
        return original(type_, shape, address)

    monkeypatch.setattr(probe, "_plain", noted)
    probe.memory_bandwidth((3, 1), 16 << 20, 0.05)
    assert list(read) == [ggml.TYPE_F16, ggml.TYPE_F32]
    for spans in read.values():
        assert len(spans) >= 6, "two for each thread: what one has just read is in its cache"
        assert sum(size for _, size in spans) >= 0.9 * (64 << 20)
        assert all(a + size == b for (a, size), (b, _) in itertools.pairwise(spans)), "apart, and without gaps"


def test_memory_that_is_read_is_really_there() -> None:
    with probe._pages(8 << 20, 2) as address:
        assert memory.resident_bytes(address, 8 << 20) == 8 << 20


def test_operations_of_each_type() -> None:
    found = probe.operations(2)
    assert list(found) == ["int8", "f16", "f32"]
    assert all(1e6 < rate < 1e15 for rate in found.values())


@pytest.mark.parametrize(("one", "columns"), [(1.0, 1), (0.005, 3), (1e-6, probe._COLUMNS)])
def test_a_slow_machine_is_given_less_to_do(monkeypatch: pytest.MonkeyPatch, one: float, columns: int) -> None:
    made: list[int] = []
    original = probe._product

    def noted(stack: ExitStack, weight: int, shape: tuple[int, int], columns: int) -> int:
        made.append(columns)
        return original(stack, weight, shape, columns)

    monkeypatch.setattr(probe, "_product", noted)
    monkeypatch.setattr(probe, "_undisturbed", lambda *_: one)  # seconds of a product with one column
    rate = probe._rate(ggml.TYPE_F32, 2, 0.03)
    assert made == [1, columns, columns]
    assert rate == pytest.approx(2 * 2.0 * 1024 * 1024 * columns / one)


def test_a_system_without_more_threads_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(OutOfMemory, match="close other programs"):
        probe.memory_bandwidth((2, 1), 1 << 20)


# ---- storage ---------------------------------------------------------------------------------------------------------


def test_storage_is_read_past_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(os.urandom(8 << 20))
    (tmp_path / "small").write_bytes(b"x" * 100)
    with open(file, "rb+") as out:
        os.fsync(out.fileno())
    rate = probe.storage_bandwidth([tmp_path / "none", tmp_path])
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        assert rate is None, "this file system reads through the page cache alone"
    else:
        assert rate is not None
        assert 1e4 < rate < 1e12


def test_storage_without_a_file_large_enough(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 1000)
    assert probe.storage_bandwidth([tmp_path]) is None
    assert probe.storage_bandwidth([]) is None


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_a_profile_says_what_each_figure_rests_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = trees.raspberry_pi_4(tmp_path)
    found = cpu_profile("cpu", 1 << 30, folders=[], root=root)
    assert (found.name, found.kind, found.memory, found.storage, found.link) == ("cpu", "cpu", 1 << 30, None, None)
    assert [cores.name for cores in found.cores] == ["Cortex-A72"]
    assert max(found.bandwidth) == 4, "as many threads as the recorded machine has cores"
    assert found.hottest == 80, "no file of a Raspberry Pi says so: it is documented"
    measured = dict.fromkeys(("cores", "memory", "bandwidth", "operations"), "measured")
    assert found.basis == {**measured, "hottest": "projected"}
    assert capfd.readouterr() == ("", ""), "the library says nothing of the weights it packs"


def test_a_system_that_says_nothing_still_has_cores(tmp_path: Path) -> None:
    found = cpu_profile("arm", 1 << 30, folders=[], root=tmp_path)
    assert found.cores[0].number >= 1
    assert found.hottest is None
    assert "hottest" not in found.basis


def test_memory_that_is_short_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    original = memory.map_large
    monkeypatch.setattr(memory, "map_large", lambda size: taken.append(size) or original(size))  # type: ignore[func-returns-value]
    monkeypatch.setattr(probe, "_available", lambda: 40 << 20)
    assert probe.memory_bandwidth((2, 1), 1 << 30, 0.02)
    monkeypatch.setattr(probe, "_available", lambda: 0)
    assert probe.memory_bandwidth((2, 1), 1 << 30, 0.02)
    assert taken[0] <= 10 << 20
    assert taken[1] <= 1 << 20
