"""From a card that is found to an answer: the cuda plugin with its driver, and a backend CUDA of libggml, simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from edge_rt_cuda.device import CudaDevice
from edge_rt_cuda.engine import RESERVED, CudaFactory
from edge_rt_cuda.nvml import Card

import edge_rt
from edge_rt.core import sequences
from edge_rt.hooks import Offer, hookimpl
from edge_rt.native import devices
from edge_rt.plugin_host.registry import Registry
from edge_rt.types import Delta

MEMORY = 1 << 28


class _Nvml:
    """Shows one card, which has the address of the second simulated device."""

    def card(self, index: int, seconds: float) -> Card:
        return Card("Simulated", "0000:02:00.0", MEMORY, (8, 6), 10240, 1e9, 1e9, 384, 300.0, 95.0, (4, 16), False)

    def free(self, index: int, seconds: float) -> int:
        return RESERVED + MEMORY


class _Plugin:
    """The cuda plugin on a machine with a driver and one card."""

    EDGE_RT_API = 1

    def __init__(self, root: Path) -> None:
        self.root, self.nvml = root, _Nvml()

    @hookimpl
    def edge_rt_devices(self) -> list[Any]:
        return [CudaDevice(0, self.nvml, root=self.root, backends=lambda: {"cuda"})]  # type: ignore[arg-type]

    @hookimpl
    def edge_rt_engines(self) -> list[Any]:
        return [CudaFactory(self.nvml)]  # type: ignore[arg-type]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Registry:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Registry.load(entry_points=False, plugins={"simulated": _Plugin(tmp_path)})


@pytest.fixture
def cuda(_built_simulator: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A libggml with a backend CUDA."""
    monkeypatch.setenv("SIM_NAME", "CUDA")
    devices.registered()
    devices.load(str(_built_simulator))
    yield
    devices.unload("CUDA")


def test_the_best_device_is_found_and_answers_as_the_cpu_does(
    registry: Registry, cuda: None, random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequences, "autotune_v_layout", lambda *_: False)  # else by time, and with other bits
    path, answers = random_model("llama", n_layer=4), []
    assert isinstance(registry.probe("cuda:0"), Offer)
    for device, engine in (("cpu", "ggml"), (None, "ggml_cuda")):
        with edge_rt.open(path, device=device, registry=registry, context=256, pack=False) as model, model.session() as session:
            events = session.generate("Hello", max_tokens=20, temperature=0.0, ignore_eos=True)
            answers.append("".join(event.text for event in events if isinstance(event, Delta)))
            info, report = model.info, model.memory()
            assert info.engine == engine
            if device is None:
                assert info.device == "cuda:0"
                assert info.offloaded == ("blk.0", "blk.1", "blk.2", "blk.3", "norm", "head")
                assert 0 < report.device < MEMORY
            else:
                assert (info.offloaded, report.device) == ((), 0)
    assert answers[0] == answers[1] != ""
