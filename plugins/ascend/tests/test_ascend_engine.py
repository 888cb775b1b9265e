"""The engine ``ggml_cann``: which accelerator it asks the ggml engine for. The engine itself is tested on a simulated accelerator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from edge_rt_ascend import engine as module
from edge_rt_ascend.engine import RESERVED, CannFactory

from edge_rt.hooks import Accelerator, EngineOptions, ModelFile, OptionError, OutOfMemory, Refusal
from edge_rt.testing.engine_helpers import Opening, note_openings
from edge_rt.testing.random_models import write_random_model


class _Npu:
    """NPU 6, which CANN sees as its second."""

    def __init__(self, free: int) -> None:
        self._free = free

    def index(self) -> int:
        return 1

    def free(self, seconds: float) -> int:
        return self._free


def factory(free: int = 60 << 30) -> CannFactory:
    def device(number: int) -> Any:
        assert number == 6
        return _Npu(free)

    return CannFactory(device)


def opened(folder: Path, **measures: Any) -> ModelFile:
    return ModelFile.open(write_random_model(folder / "tiny.gguf", measures.pop("architecture", "llama"), **measures))


@pytest.fixture
def model(tmp_path: Path) -> Iterator[ModelFile]:
    with opened(tmp_path) as file:
        yield file


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Opening]:
    """What the ggml engine is opened with."""
    return note_openings(monkeypatch, module)


def test_it_asks_for_the_chosen_npu_by_canns_number(model: ModelFile, asked: list[Opening]) -> None:
    options = EngineOptions(device="ascend:6")
    assert factory().open(model, options) is asked[0]
    assert asked == [(model, options, {"accelerator": Accelerator("CANN", (60 << 30) - RESERVED, 1), "name": "ggml_cann"})]


def test_memory_can_be_limited(model: ModelFile, asked: list[Opening]) -> None:
    factory().open(model, EngineOptions(device="ascend:6", extra={"ggml_cann.memory": 1 << 30}))
    assert asked[0].more["accelerator"].memory == 1 << 30
    with pytest.raises(OptionError, match=r"ggml_cann\.memory"):
        factory().open(model, EngineOptions(device="ascend:6", extra={"ggml_cann.memory": "1G"}))


def test_a_full_npu(model: ModelFile) -> None:
    with pytest.raises(OutOfMemory, match="ascend:6 has 900 MB free"):
        factory(900 << 20).open(model, EngineOptions(device="ascend:6"))


@pytest.mark.parametrize(
    ("measures", "options", "reason"),
    [
        ({"type": "F16"}, {}, None),
        ({"type": "Q4_0", "embedding_type": "Q4_1", "output_type": "Q8_0", "tied": False}, {}, None),
        ({"type": "Q4_0", "embedding_type": "Q4_1"}, {}, "no kernel for Q4_1 (token_embd.weight)"),
        ({"type": "Q4_1"}, {}, "no kernel for Q4_1"),
        ({"type": "Q4_K", "n_embd": 256, "n_ff": 512}, {}, "no kernel for Q4_K"),
        ({"architecture": "gemma"}, {}, "no graph"),
        ({"type": "F16"}, {"device": "cpu"}, "drives Ascend NPUs"),
        ({"type": "F16"}, {"key_type": "q8_0"}, "cannot keep keys as q8_0"),
    ],
)
def test_what_it_supports(tmp_path: Path, measures: dict[str, Any], options: dict[str, Any], reason: str | None) -> None:
    with opened(tmp_path, **measures) as file:
        answer = factory().supports(file, EngineOptions(**{"device": "ascend:6", **options}))
    if reason is None:
        assert answer == 20.0
    else:
        assert isinstance(answer, Refusal)
        assert reason in answer.reason
        assert answer.remedy


def test_without_the_backend_the_engine_says_so(model: ModelFile) -> None:
    with pytest.raises(OptionError, match="this libggml has no backend CANN"):
        factory().open(model, EngineOptions(device="ascend:6", threads=1))
