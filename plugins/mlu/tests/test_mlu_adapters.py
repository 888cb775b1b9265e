"""LoRA adapters on the torch engine: what ggml computes with them, sequence by sequence in any company; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import edge_rt_mlu
import numpy as np
import pytest

import edge_rt
from edge_rt.core.gguf.lora import open_lora
from edge_rt.hooks import AppliesAdapters, EngineOptions, ModelFile, SequenceBatch, UnsupportedModel, open_ggml_engine
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing.engine_helpers import feed, tokens_of
from edge_rt.testing.random_models import LINEAR, write_random_adapter, write_random_model
from edge_rt.types import Delta

torch = pytest.importorskip("torch", reason="the engine's logic is tested on CPU PyTorch, which is not installed here")

from edge_rt_mlu.engine import TorchEngine  # noqa: E402
from edge_rt_mlu.factory import TorchFactory  # noqa: E402

WITH_ENDS = LINEAR + r"|output\.weight|token_embd\.weight"
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {}),
    "f16": ("llama", {"type": "F16"}, {"type": "F16"}),
    "q8_0 factors": ("llama", {}, {"type": "Q8_0", "rank": 32}),
    "no alpha": ("llama", {"bias": True}, {"alpha": None}),
    "fused": ("llama", {"fused_qkv": True, "bias": True}, {}),
    "some weights": ("llama", {}, {"target": r"blk\.1\.(attn_k|attn_v|ffn_up)\.weight"}),
    "ends": ("llama", {"tied": False}, {"target": WITH_ENDS}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {"head_dim": 32}, {"rank": 3, "alpha": 5.0}),
    "experts": ("qwen3moe", {}, {}),
}
"""Architecture, measures, and measures of the adapters."""


@contextmanager
def opened(folder: Path, kind: str, n: int = 2, **extra: Any) -> Iterator[tuple[TorchEngine, Any, list[int]]]:
    """The torch engine, ggml's, and the numbers of n adapters, which are the same for both."""
    architecture, measures, of_adapter = MODELS[kind]
    # ggml's plain attention: its flash attention rounds more, up to four times as far from either.
    options = EngineOptions(context=256, threads=1, extra={"ggml.transposed_values": True})
    with ExitStack() as stack:
        file = stack.enter_context(ModelFile.open(write_random_model(folder / "model.gguf", architecture, **measures)))
        paths = [write_random_adapter(folder / f"{seed}.gguf", file.header, seed=seed, **of_adapter) for seed in range(1, n + 1)]
        files = [open_lora(path, file.header) for path in paths]
        for lora in files:
            stack.callback(lora.file.close)
        ours = stack.enter_context(closing(TorchFactory().open(file, options._replace(extra=extra))))
        ggml = stack.enter_context(closing(open_ggml_engine(file, options)))
        assert isinstance(ours, TorchEngine)
        assert isinstance(ours, AppliesAdapters)
        numbers = [ours.open_adapter(lora) for lora in files]
        assert numbers == [ggml.open_adapter(lora) for lora in files]
        yield ours, ggml, numbers


def adapted(engine: Any, adapter: int | None, scale: float = 1.0) -> int:
    sequence: int = engine.new_sequence()
    engine.adapt(sequence, adapter, scale)
    return sequence


def close(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> None:
    """Sums in another order, of what both round to half precision in the cache; another adapter would be a hundred times as far off."""
    assert np.abs(a - b).mean() / np.abs(b).mean() < 4e-3


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_ggml(tmp_path: Path, kind: str) -> None:
    with opened(tmp_path, kind, 1) as (ours, ggml, (number,)):
        tokens = tokens_of(ours, 56)
        sequences = adapted(ours, number, 0.7), adapted(ggml, number, 0.7)
        plain = ours.new_sequence()
        for part in (tokens[:30], tokens[30:50], *([token] for token in tokens[50:])):
            got, expected = (feed(engine, sequence, part) for engine, sequence in zip((ours, ggml), sequences, strict=True))
            close(got, expected)
            assert np.abs(got - feed(ours, plain, part)).max() > 1e-2, "the adapter changes next to nothing"


@pytest.mark.parametrize("kind", ["llama", "fused", "ends", "qwen3", "experts"])
def test_none_and_several_adapters_in_one_step_are_each_as_with_ggml_alone(tmp_path: Path, kind: str) -> None:
    with opened(tmp_path, kind) as (ours, ggml, (a, b)):
        bindings = [(a, 1.0), (None, 1.0), (b, 1.0), (a, 1.0), (a, 0.5), (None, 1.0), (b, -1.0)]
        texts = [tokens_of(ours, n, seed=n) for n in (21, 30, 4, 3, 12, 1, 11)]
        alone = [feed(ggml, adapted(ggml, *binding), text) for binding, text in zip(bindings, texts, strict=True)]
        for want in ("all", "last"):
            parts = [SequenceBatch(adapted(ours, *binding), text, want) for binding, text in zip(bindings, texts, strict=True)]  # type: ignore[arg-type]
            for expected, found in zip(alone, ours.step(parts), strict=True):
                close(np.array(found), expected if want == "all" else expected[-1:])
        wants = ["none", "last", "all", "none", "all", "last", "none"]
        some = [SequenceBatch(adapted(ours, *binding), text, want) for binding, text, want in zip(bindings, texts, wants, strict=True)]  # type: ignore[arg-type]
        for want, expected, found in zip(wants, alone, ours.step(some), strict=True):
            assert (found is None) == (want == "none")
            if found is not None:
                close(np.array(found), expected if want == "all" else expected[-1:])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision(tmp_path: Path, dtype: str) -> None:
    """What a card computes in. Of bfloat16 8 bits are left."""
    with opened(tmp_path, "ends", 1, **{"torch.dtype": dtype}) as (ours, ggml, (number,)):
        tokens = tokens_of(ours, 40)
        got, expected = (feed(engine, adapted(engine, number), tokens) for engine in (ours, ggml))
        assert np.abs(got - expected).mean() / np.abs(expected).mean() < (0.01 if dtype == "float16" else 0.06)


def test_applied_no_times_and_of_zeros_it_changes_no_bit(tmp_path: Path) -> None:
    with opened(tmp_path, "llama", 1) as (ours, _, (number,)):
        tokens = tokens_of(ours, 30)
        expected = feed(ours, ours.new_sequence(), tokens)
        for sequence in (adapted(ours, number, 0.0), adapted(ours, None)):
            assert np.array_equal(feed(ours, sequence, tokens), expected)


def test_a_weight_that_no_adapter_can_change_is_refused(tmp_path: Path) -> None:
    with ModelFile.open(write_random_model(tmp_path / "model.gguf", "qwen3moe")) as file:
        path = write_random_adapter(tmp_path / "a.gguf", file.header, target=r"blk\.0\.ffn_gate_inp\.weight")
        lora = open_lora(path, file.header)
        with lora.file, closing(TorchFactory().open(file, EngineOptions())) as engine:
            assert isinstance(engine, TorchEngine)
            with pytest.raises(UnsupportedModel, match=r"lets no adapter change blk.0.ffn_gate_inp.weight; run it with"):
                engine.open_adapter(lora)
            with pytest.raises(KeyError):
                engine.adapt(engine.new_sequence(), 1)


def test_its_memory_is_reported_and_given_back(tmp_path: Path) -> None:
    with opened(tmp_path, "llama", 2) as (ours, _, numbers):
        factors = sum(ours._adapters[number].nbytes for number in numbers)
        with ModelFile.open(tmp_path / "1.gguf") as adapter:
            assert factors == 2 * sum(info.nbytes for info in adapter.header.tensors.values())
        before = ours.memory().weights_mapped
        ours.close()
        assert before - ours.memory().weights_mapped == factors


def answer(model: edge_rt.Model, adapter: str | None) -> str:
    events = model.session().generate("once upon", temperature=0.0, max_tokens=12, adapter=adapter)
    return "".join(event.text for event in events if isinstance(event, Delta))


def test_requests_choose_their_adapter_by_name(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", "llama", seed=3)
    with ModelFile.open(path) as file:
        adapter = write_random_adapter(tmp_path / "a.gguf", file.header, gain=1.0)
    registry = Registry.load(plugins={"mlu": edge_rt_mlu})
    with (
        edge_rt.open(path, engine="torch", registry=registry, adapters={"tuned": adapter}) as ours,
        edge_rt.open(path, adapters={"tuned": adapter}) as ggml,
    ):
        assert answer(ours, "tuned") == answer(ggml, "tuned") != answer(ours, None) == answer(ggml, None)
