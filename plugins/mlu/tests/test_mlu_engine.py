"""The torch engine on CPU PyTorch: the engine protocol, and the same logits as edge-rt's own engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_rt.hooks import Engine, EngineOptions, ModelFile, open_ggml_engine
from edge_rt.testing.engine_conformance import EngineConformance
from edge_rt.testing.engine_helpers import feed, feed_new, tokens_of

torch = pytest.importorskip("torch", reason="the engine's logic is tested on CPU PyTorch, which is not installed here")

from edge_rt_mlu.factory import TorchFactory  # noqa: E402

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases": ("llama", {"bias": True, "tied": False}),
    "llama 3 factors": ("llama", {"rope_freqs": [1.0, 2.0, 4.0, 8.0] * 2}),
    "fused": ("llama", {"fused_qkv": True}),
    "linear scaling": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "yarn": ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_context": 128}}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "one head": ("llama", {"n_head": 2, "n_head_kv": 1}),
    "F16": ("llama", {"type": "F16"}),
    "BF16": ("llama", {"type": "BF16"}),
    "mixtral": ("llama", {"n_expert": 4, "n_expert_used": 2}),
    "qwen3moe": ("qwen3moe", {"n_expert": 8, "n_expert_used": 3, "n_ff_exp": 32, "head_dim": 32}),
    "deep": ("llama", {"n_layer": 3, "bias": True}),
    "experts apart": ("qwen3moe", {"n_layer": 3}),
    "one expert": ("qwen3moe", {"n_expert": 2, "n_expert_used": 1}),
}
"""Architecture and measures by what is special about them."""

PLAIN = {"ggml.transposed_values": True}
"""ggml's plain attention: its flash attention rounds more, and which of the two it takes depends on what is faster here."""

PROMPT = "The quick brown fox jumps over the lazy dog. Water boils at"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from edge_rt.testing.random_models import write_random_model

    folder = tmp_path_factory.mktemp("models")
    found: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in found:
            architecture, measures = MODELS[kind]
            found[kind] = write_random_model(folder / f"{len(found)}.gguf", architecture, context=640, **measures)
        return found[kind]

    return make


class _Conformance(EngineConformance):
    kind = "llama"

    @pytest.fixture
    def engine_factory(self) -> TorchFactory:
        return TorchFactory()

    @pytest.fixture
    def model(self, written: Callable[[str], Path]) -> Iterator[ModelFile]:
        with ModelFile.open(written(self.kind)) as model:
            yield model


class TestLlama(_Conformance):
    """Single precision; keys and values are rounded to half precision, as in edge-rt's own engine."""


class TestQwen3(_Conformance):
    kind = "qwen3"


class TestYarn(_Conformance):
    kind = "yarn"


class TestMixtral(_Conformance):
    kind = "mixtral"


class TestQwen3Moe(_Conformance):
    kind = "qwen3moe"


class TestBfloat16(_Conformance):
    """What a card computes in, as far as a CPU has it: sums are rounded to 8 bits, so divisions of the same tokens differ more."""

    options = EngineOptions(context=640, threads=1, extra={"torch.dtype": "bfloat16"})
    tolerance = 5e-2


class TestFloat16(_Conformance):
    options = EngineOptions(context=640, threads=1, extra={"torch.dtype": "float16"})
    tolerance = 1e-2


class TestApart(_Conformance):
    """On a device whose memory the host cannot touch, and with two of its three blocks in the host's memory."""

    kind = "deep"
    options = EngineOptions(context=640, threads=1, device="mlu:0", extra={"torch.dtype": "float32"})

    @pytest.fixture(autouse=True)
    def _device(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        from edge_rt_mlu import adapters, apart, simulated

        simulated.install(monkeypatch, tmp_path, "torch_mlu", "mlu", place="meta")
        monkeypatch.setattr(adapters, "tried", lambda adapter, timeout: 2)  # importing PyTorch in a process of its own takes seconds
        with apart.apart():
            yield

    @pytest.fixture
    def engine(self, engine_factory: TorchFactory, model: ModelFile) -> Iterator[Engine]:
        from edge_rt_mlu.placement import weight_bytes

        blocks, rest = weight_bytes(model, 4)
        with closing(engine_factory.open(model, self.options._replace(memory=rest + 2 * blocks[0]))) as engine:
            assert engine.info.offloaded == ("embedding", "blk.0", "norm", "head")
            yield engine


class TestExpertsApart(TestApart):
    kind = "experts apart"


def test_the_device_apart_refuses_tensors_of_the_host() -> None:
    from edge_rt_mlu import apart

    with apart.apart() as device:
        there, here = torch.ones(2, 3, device=device), torch.ones(2, 3)
        assert there.device.type == "meta"
        with pytest.raises(RuntimeError, match="tensors of the host and of the device"):
            there + here
        with pytest.raises(RuntimeError):
            there.numpy()
        there[0] = 5.0
        there[1, 1:] = here.to(device)[0, :2] * 3
        assert (there + there.T.contiguous().T).cpu().tolist() == [[10.0, 10.0, 10.0], [2.0, 6.0, 6.0]]


# ---- the same model --------------------------------------------------------------------------------------------------


def divergence(got: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Mean Kullback-Leibler divergence of distributions given as logits [n, V], in nats."""
    p, q = (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True) for logits in (expected.astype(float), got.astype(float)))
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_ggml(written: Callable[[str], Path], kind: str) -> None:
    """Float weights: what differs is the order of sums, and what both round to half precision in the cache. KL < 1e-5 nats.

    With BF16 weights ggml rounds what it multiplies them with to BF16 too, the torch engine does not: KL < 1e-3.
    """
    options = EngineOptions(context=256, threads=1, extra=PLAIN)
    with (
        ModelFile.open(written(kind)) as file,
        closing(TorchFactory().open(file, options)) as ours,
        closing(open_ggml_engine(file, options)) as ggml,
    ):
        tokens = tokens_of(ours, 120)
        got, expected = feed_new(ours, tokens), feed_new(ggml, tokens)
        assert divergence(got, expected) < (1e-3 if kind == "BF16" else 1e-5)
        assert (got.argmax(1) == expected.argmax(1)).mean() > 0.97


@pytest.mark.parametrize(
    ("family", "kind", "most"),
    [*(("llama", kind, 0.01) for kind in ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K")), ("qwen3moe", "Q4_0", 0.03), ("qwen3moe", "Q6_K", 0.03)],
)
def test_quantised_weights_are_dequantised(tmp_path: Path, family: str, kind: str, most: float) -> None:
    """ggml also rounds what it multiplies them with, to 8 bits: KL < 0.01 nats here, where other weights would give 1 and more; and where
    that sends a token to another expert, which here happens to few, it differs more.
    """
    from edge_rt.testing.random_models import write_random_model

    path = write_random_model(tmp_path / "q.gguf", family, type=kind, n_embd=256, n_ff=256, n_head=4, n_head_kv=2)
    options = EngineOptions(context=256, threads=1, pack=False, extra=PLAIN)
    with ModelFile.open(path) as file:
        found = []
        for engine in (TorchFactory().open(file, options), open_ggml_engine(file, options)):
            with closing(engine):
                found.append(feed_new(engine, tokens_of(engine, 60)))
    assert divergence(*found) < most


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mixtral", "qwen3moe"])
def test_greedy_tokens_are_those_of_ggml(written: Callable[[str], Path], kind: str) -> None:
    """But where ggml's two likeliest are as good as equal: then rounding decides, which is not the same from one CPU to the next."""
    options, close = EngineOptions(context=256, threads=1, extra=PLAIN), 0
    with (
        ModelFile.open(written(kind)) as file,
        closing(TorchFactory().open(file, options)) as ours,
        closing(open_ggml_engine(file, options)) as ggml,
    ):
        tokens, (a, b) = tokens_of(ours, 16), (ours.new_sequence(), ggml.new_sequence())
        for _ in range(64):
            (got,), (expected,) = (feed(engine, sequence, tokens, want="last") for engine, sequence in ((ours, a), (ggml, b)))
            if got.argmax() != expected.argmax():
                second, first = np.sort(expected)[-2:]
                assert first - second < 0.02
                close += 1
            tokens = [int(expected.argmax())]
    assert close <= 2


# ---- a real model ----------------------------------------------------------------------------------------------------


def smollm2() -> Path | None:
    """SmolLM2-135M-Instruct (Q4_1), if it is here."""
    given = os.environ.get("EDGE_RT_TEST_MODEL") or Path.home() / ".cache/edge-rt/models/SmolLM2-135M-Instruct.Q4_1.gguf"
    return Path(given) if Path(given).is_file() else None


@pytest.mark.skipif(smollm2() is None, reason="SmolLM2 is not here; `edge-rt pull smollm2` fetches it")
def test_smollm2_writes_what_it_writes_on_ggml() -> None:
    """The weights are Q4_1. ggml rounds what it multiplies them with to 8 bits, the torch engine does not: KL < 0.02 nats."""
    import edge_rt

    path = smollm2()
    assert path is not None
    with edge_rt.open(path) as model:
        prompt = model.tokenize(PROMPT)
    options, rows, answers = EngineOptions(context=256, threads=2), [], []
    with ModelFile.open(path) as file:
        for engine in (TorchFactory().open(file, options), open_ggml_engine(file, options)):
            with closing(engine):
                sequence = engine.new_sequence()
                rows.append(feed(engine, sequence, prompt))
                answer = [int(rows[-1][-1].argmax())]
                while len(answer) < 20:
                    answer.append(int(feed(engine, sequence, answer[-1:], want="last")[-1].argmax()))
                answers.append(answer)
    assert divergence(*rows) < 0.02
    assert answers[0] == answers[1]
