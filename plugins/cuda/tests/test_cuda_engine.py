"""The engine ``ggml_cuda``: which accelerator it asks the ggml engine for. The engine itself is tested on a simulated accelerator."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from edge_rt_cuda import engine as module
from edge_rt_cuda.engine import RESERVED, CudaFactory
from edge_rt_cuda.nvml import Nvml
from simulated_nvml import NvmlError, SimulatedNvml, card

from edge_rt.hooks import Accelerator, EngineOptions, ModelFile, NativeError, OptionError, OutOfMemory, Refusal
from edge_rt.testing.engine_helpers import Opening, note_openings
from edge_rt.testing.random_models import write_random_model

FREE = 22500 << 20


@pytest.fixture
def model(tmp_path: Path) -> Any:
    with ModelFile.open(write_random_model(tmp_path / "tiny.gguf", "llama")) as file:
        yield file


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Opening]:
    """What the ggml engine is opened with."""
    return note_openings(monkeypatch, module)


def factory(*cards: dict[str, Any], **more: Any) -> CudaFactory:
    return CudaFactory(Nvml(SimulatedNvml(*(cards or (card(),)), **more)))


def test_it_asks_for_the_chosen_card_by_its_address(model: ModelFile, asked: list[Opening]) -> None:
    """CUDA may number cards by their speed, NVML numbers them by address."""
    two = card(nvmlDeviceGetPciInfo=SimpleNamespace(busId=b"00000001:0A:00.0"))
    options = EngineOptions(device="cuda:1")
    assert factory(card(), two).open(model, options) is asked[0]
    assert asked == [(model, options, {"accelerator": Accelerator("CUDA", FREE - RESERVED, 1, "0001:0a:00.0"), "name": "ggml_cuda"})]


@pytest.mark.parametrize(("limit", "memory"), [(1 << 30, 1 << 30), (1 << 40, FREE - RESERVED)])
def test_memory_can_be_limited(model: ModelFile, asked: list[Opening], limit: int, memory: int) -> None:
    factory().open(model, EngineOptions(device="cuda:0", extra={"ggml_cuda.memory": limit}))
    assert asked[0].more["accelerator"].memory == memory


@pytest.mark.parametrize("limit", [0, -5, "1G", 1.5, True])
def test_limits_that_are_none(model: ModelFile, limit: object) -> None:
    with pytest.raises(OptionError, match=r"ggml_cuda\.memory"):
        factory().open(model, EngineOptions(device="cuda:0", extra={"ggml_cuda.memory": limit}))


def test_a_full_card(model: ModelFile) -> None:
    full = card(nvmlDeviceGetMemoryInfo=SimpleNamespace(total=24 << 30, free=300 << 20, used=23 << 30))
    with pytest.raises(OutOfMemory, match="cuda:0 has 300 MB free"):
        factory(full).open(model, EngineOptions(device="cuda:0"))


def test_a_driver_that_is_gone(model: ModelFile) -> None:
    with pytest.raises(NativeError, match="cuda:0 cannot be used: the NVIDIA driver is installed and not loaded; run"):
        factory(init=NvmlError(9)).open(model, EngineOptions(device="cuda:0"))


def test_what_it_supports(model: ModelFile, tmp_path: Path) -> None:
    assert factory().supports(model, EngineOptions(device="cuda:0")) == 20.0
    assert isinstance(factory().supports(model, EngineOptions(device="cpu")), Refusal)
    with ModelFile.open(write_random_model(tmp_path / "other.gguf", "gemma")) as other:
        assert isinstance(factory().supports(other, EngineOptions(device="cuda:0")), Refusal)


def test_without_the_backend_the_engine_says_so(model: ModelFile) -> None:
    """On this libggml, which has no CUDA: what a user sees who removed it after the probe."""
    with pytest.raises(OptionError, match="this libggml has no backend CUDA"):
        factory().open(model, EngineOptions(device="cuda:0", threads=1))
