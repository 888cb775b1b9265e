"""Random models: sound files that libllama runs, with logits that depend on the context, and the same file for the same arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.validate import check_hyperparameters, check_vocabulary
from edge_rt.errors import OptionError
from edge_rt.testing.random_models import ARCHITECTURES, WEIGHT_TYPES, random_tensor, write_random_model

TEXT = "The answer is é 世界 that\n\nit  will\t<b>hold</b> 🙂"

VARIANTS: list[dict[str, Any]] = [
    *({"architecture": architecture} for architecture in ARCHITECTURES),
    *({"type": type_name, "n_embd": 256, "n_ff": 256} for type_name in WEIGHT_TYPES),
    {"architecture": "llama", "n_expert": 4, "n_expert_used": 2, "type": "Q8_0"},
    {"architecture": "qwen3moe", "n_expert": 6, "n_expert_used": 3, "n_ff_exp": 32, "type": "Q4_0"},
    {"architecture": "llama", "bias": True},
    {"architecture": "llama", "fused_qkv": True, "bias": True},
    {"architecture": "qwen3", "head_dim": 32, "n_head_kv": 4, "tied": False, "alignment": 4096},
    {"type": "Q4_0", "embedding_type": "F16", "output_type": "Q8_0", "tied": False},
    {"vocabulary": "spm"},
    {"n_vocab": 1000},
    {"rope_scaling": {"type": "linear", "factor": 2}},
    {"rope_scaling": {"type": "yarn", "factor": 4, "original_context": 128}},
    {"rope_freqs": [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0]},
]


def label(variant: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in variant.values()).replace(" ", "")


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_libllama_runs_it(variant: dict[str, Any], tmp_path: Path) -> None:
    import llama_cpp

    path = write_random_model(tmp_path / "model.gguf", **variant)
    with ModelFile.open(path) as file:
        check_vocabulary(file.header)
        check_hyperparameters(file.header)
        assert file.header.architecture == variant.get("architecture", "llama")
        assert file.header.alignment == variant.get("alignment", 32)
    model = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)
    try:
        tokens = model.tokenize(TEXT.encode(), add_bos=False, special=True)
        assert model.detokenize(tokens).decode().removeprefix(" ") == TEXT  # SentencePiece puts a space in front
        logits = evaluate(model, tokens)
        assert logits.shape == (len(tokens), variant.get("n_vocab", model.n_vocab()))
        assert np.isfinite(logits).all()
        assert 1.0 < logits.std(axis=1).mean() < 3.0
        assert np.abs(np.diff(logits, axis=0)).mean(axis=1).min() > 0.2, "neighbouring tokens have the same logits"
        shorter = evaluate(model, tokens[4:])
        assert np.abs(shorter[-1] - logits[-1]).mean() > 0.05, "the beginning of the context makes no difference"
    finally:
        model.close()


def evaluate(model: Any, tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    model.reset()
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)], dtype=np.float32)


def test_control_tokens_and_template(tmp_path: Path) -> None:
    import llama_cpp

    model = llama_cpp.Llama(str(write_random_model(tmp_path / "m.gguf")), vocab_only=True, verbose=False)
    try:
        marked = model.tokenize(b"<|im_start|>user\nhello<|im_end|>", add_bos=False, special=True)
        assert marked[0] == model.token_bos() == 1
        assert marked[-1] == model.token_eos() == 2
        assert 1 not in model.tokenize(b"<|im_start|>", add_bos=False, special=False)
        assert len(model.tokenize(b" hello", add_bos=False)) == 1, "merges are not applied"
        assert "<|im_start|>" in model.metadata["tokenizer.chat_template"]
    finally:
        model.close()


def test_same_arguments_same_file(tmp_path: Path) -> None:
    def content(name: str, seed: int) -> bytes:
        return write_random_model(tmp_path / name, seed=seed, type="Q4_K", n_embd=256, n_ff=256).read_bytes()

    assert content("a", 5) == content("b", 5)
    assert content("a", 5) != content("c", 6)


@pytest.mark.parametrize("type_name", [name for name in WEIGHT_TYPES if name != "F32"])
def test_weights_have_the_spread_asked_for(type_name: str) -> None:
    import gguf

    raw = random_tensor("w", (1024, 256), type_name, 0.05, 0.0, seed=1)
    weights = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    assert weights.shape == (256, 1024)
    assert weights.std() == pytest.approx(0.05, rel=0.02)
    assert abs(weights.mean()) < 0.002


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"architecture": "phi2"}, "phi2"),
        ({"type": "IQ1_S"}, "IQ1_S"),
        ({"type": "Q4_K"}, "multiple of the Q4_K block"),
        ({"n_ff": 100, "type": "Q4_0"}, "blk.0.ffn_down.weight has rows of 100"),
        ({"n_head": 4, "n_head_kv": 3}, "cannot share"),
        ({"head_dim": 7}, "size 7"),
        ({"n_vocab": 100}, "n_vocab is 100"),
        ({"architecture": "qwen2", "n_expert": 4, "n_expert_used": 2}, "no experts"),
        ({"n_expert": 4}, "0 of 4"),
        ({"n_expert": 2, "n_expert_used": 3}, "3 of 2"),
        ({"rope_freqs": [1.0]}, "rope_freqs has 1"),
        ({"rope_scaling": {"type": "magic", "factor": 2}}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn"}}, "positive factor"),
    ],
)
def test_refuses_what_does_not_fit(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=words):
        write_random_model(tmp_path / "m.gguf", **arguments)
    assert not (tmp_path / "m.gguf").exists()
