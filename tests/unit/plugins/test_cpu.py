"""The CPU device on this machine, and what it reads from the files of others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_rt.hooks import Offer
from edge_rt.plugins import cpu
from edge_rt.testing.conformance import DeviceConformance

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9R14
flags\t\t: fpu sse4_2 avx f16c fma avx2 avx512f avx512_vnni nonsense

processor\t: 1
model name\t: another
flags\t\t: amx_int8
"""
PI_5 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes fphp asimdhp asimdrdm asimddp
CPU implementer\t: 0x41

processor\t: 1
Features\t: sve

Revision\t: d04170
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""


class TestCpu(DeviceConformance):
    @pytest.fixture
    def device(self) -> cpu.Cpu:
        return cpu.Cpu()

    def test_it_is_always_there(self) -> None:
        offer = cpu.Cpu().probe()
        assert isinstance(offer, Offer)
        assert (offer.score, offer.engines, offer.basis) == (10, ("ggml", "llama_cpp", "*"), "measured")
        assert "CPU" in offer.description


def read(tmp_path: Path, cpuinfo: str, board: bytes | None = None) -> tuple[str, tuple[str, ...]]:
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text(cpuinfo)
    if board is not None:
        (tmp_path / "proc/device-tree/model").write_bytes(board)
    return cpu._proc(tmp_path)


def test_x86(tmp_path: Path) -> None:
    assert read(tmp_path, EPYC) == ("AMD EPYC 9R14", ("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512_vnni"))


def test_arm_boards_have_their_name_elsewhere(tmp_path: Path) -> None:
    assert read(tmp_path, PI_5, b"Raspberry Pi 5 Model B Rev 1.0\0") == ("Raspberry Pi 5 Model B Rev 1.0", ("neon", "fp16", "dotprod"))
    (tmp_path / "proc/device-tree/model").unlink()
    assert cpu._proc(tmp_path) == ("", ("neon", "fp16", "dotprod"))


def test_no_proc(tmp_path: Path) -> None:
    assert cpu._proc(tmp_path / "none") == ("", ())


def test_macos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sysctl = tmp_path / "sysctl"
    sysctl.write_text(
        "#!/bin/sh\necho 'machdep.cpu.brand_string: Apple M2'\necho 'hw.optional.AdvSIMD: 1'\n"
        "echo 'hw.optional.arm.FEAT_DotProd: 1'\necho 'hw.optional.arm.FEAT_SME: 0'\n"
    )
    sysctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert cpu._macos() == ("Apple M2", ("neon", "dotprod"))


def test_memory_is_what_the_cgroup_allows(tmp_path: Path) -> None:
    limit, none = tmp_path / "limit", tmp_path / "max"
    limit.write_text("1000000\n")
    none.write_text("max\n")
    assert cpu._memory([tmp_path / "missing", none, limit]) == 1_000_000
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert cpu._memory([none]) == total
    limit.write_text(str(total * 8))  # version 1 says "no limit" with a huge number
    assert cpu._memory([limit]) == total
