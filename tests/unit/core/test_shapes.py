"""A graph is built only over tensors that are there, in their shapes, and none of which it would ignore."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.gguf.reader import Header, TensorInfo
from edge_rt.core.graph.config import ModelConfig, check_shapes, read_config
from edge_rt.core.graph.decoder import FAMILIES
from edge_rt.errors import ModelFileError, UnsupportedModel

VARIANTS: list[dict[str, Any]] = [
    *({"architecture": architecture} for architecture in FAMILIES),
    {"tied": False, "bias": True, "rope_freqs": [1.0] * 8},
    {"fused_qkv": True, "bias": True},
    {"n_expert": 4, "n_expert_used": 2, "n_ff_exp": 32},
    {"architecture": "qwen3", "head_dim": 32, "tied": False},
]


@pytest.fixture(params=VARIANTS, ids=lambda variant: "-".join(map(str, variant.values())))
def model(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> tuple[dict[str, TensorInfo], ModelConfig]:
    with ModelFile.open(random_model(**request.param)) as file:
        return dict(file.header.tensors), read_config(file.header)


def check(tensors: dict[str, TensorInfo], config: ModelConfig) -> None:
    check_shapes(tensors, config, FAMILIES[config.architecture])


def reshaped(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    return TensorInfo(info.name, shape, info.type, info.type_name, info.offset, info.nbytes)


def test_sound_models_pass(model: tuple[dict[str, TensorInfo], ModelConfig]) -> None:
    tensors, config = model
    check(tensors, config)
    check({name: reshaped(info, (*info.shape, 1)) for name, info in tensors.items() if len(info.shape) < 4}, config)


def test_every_tensor_is_checked(model: tuple[dict[str, TensorInfo], ModelConfig]) -> None:
    """Another shape is refused for each; one that is missing is refused unless it is optional."""
    tensors, config = model
    for name, info in tensors.items():
        for shape in ((info.shape[0] + 32, *info.shape[1:]), (*info.shape, 2)):
            with pytest.raises(ModelFileError, match="has the shape"):
                check(tensors | {name: reshaped(info, shape)}, config)
        rest = {other: tensors[other] for other in tensors if other != name}
        if name.endswith(".bias") or name in ("output.weight", "rope_freqs.weight"):
            check(rest, config)
        else:
            with pytest.raises(ModelFileError, match="lacks the tensor"):
                check(rest, config)


@pytest.mark.parametrize("name", ["blk.0.attn_q.scale", "blk.2.attn_norm.weight", "blk.0.ffn_gate_shexp.weight", "something.weight"])
def test_nothing_is_ignored(name: str, random_model: Callable[..., Path]) -> None:
    with ModelFile.open(random_model()) as file:
        tensors, config = dict(file.header.tensors), read_config(file.header)
    extra = reshaped(tensors["output_norm.weight"], (64,))
    with pytest.raises(UnsupportedModel, match=name):
        check(tensors | {name: extra}, config)


def header_with(path: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> ModelConfig:
    """What is read of a deci whose metadata says something else."""
    said = {f"deci.{key}": value for key, value in values.items()}
    with ModelFile.open(path) as file:
        get = Header.get
        monkeypatch.setattr(Header, "get", lambda self, key, default=None: said[key] if key in said else get(self, key, default))
        try:
            return read_config(file.header)
        finally:
            monkeypatch.undo()


def test_blocks_may_differ_in_their_feed_forward_network_alone(random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = random_model("deci", n_ff=(64, 160))
    with ModelFile.open(path) as file:
        config = read_config(file.header)
        check(dict(file.header.tensors), config)
        assert config.n_ff == 160
    assert header_with(path, monkeypatch, **{"attention.head_count_kv": [2, 2], "attention.head_count": [4, 4]}).n_head_kv == 2
    for value, refused, said in (
        ([64], ModelFileError, "is of 1 blocks"), ([64, -1], ModelFileError, "is -1"), ([64, "160"], ModelFileError, "is 160"),
        ([0, 160], UnsupportedModel, "has no feed_forward_length"),
    ):  # fmt: skip
        with pytest.raises(refused, match=said):
            header_with(path, monkeypatch, feed_forward_length=value)
    with pytest.raises(UnsupportedModel, match="differs from layer to layer"):
        header_with(path, monkeypatch, **{"feed_forward_length": [64, 160], "attention.head_count_kv": [2, 4]})
