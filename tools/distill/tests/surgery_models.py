"""Small random decoders of each family, and evidence about them, for the tests of surgery."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from edge_rt_distill.model.architecture import FAMILIES, Architecture, LayerShape
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.divergence import reference
from edge_rt_distill.model.load import frozen
from edge_rt_distill.model.rows import Rows, fill
from edge_rt_distill.surgery.evidence import Evidence, evidence

VOCABULARY = 61


def random_architecture(family: str = "llama", layers: int = 4, **changed: Any) -> Architecture:
    """Four layers, 64 wide, 8 heads of 8 for 4 key-value heads, 96 channels."""
    sizes: dict[str, Any] = {
        "family": family, "vocabulary": VOCABULARY, "width": 64, "head": 8, "layers": (LayerShape(8, 4, 96),) * layers,
        "tied": family != "qwen2", "norm_epsilon": 1e-5, "rope_base": 1e4, "rope": FAMILIES[family], "context": 64,
        "qkv_bias": family == "qwen2", "qk_norm": family == "qwen3",
    }  # fmt: skip
    return Architecture(**{**sizes, **changed})


def random_decoder(family: str = "llama", layers: int = 4, seed: int = 0, **changed: Any) -> Decoder:
    """A teacher with random weights whose layers all matter; norms and biases are random too."""
    torch.manual_seed(seed)
    model = Decoder(random_architecture(family, layers, **changed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape))
            elif name.startswith(("token_embd", "output")):
                parameter.copy_(0.5 * torch.randn(parameter.shape))
            else:
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return frozen(model)


def random_tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    """[rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def passages(tokens: torch.Tensor) -> Rows:
    """Passages of equal length [B, T], in which every prediction counts."""
    return fill(tokens.tolist())


def divergence(student: Decoder, teacher: Decoder, batches: Sequence[Rows]) -> float:
    """Nats a token."""
    return reference(teacher, batches).kl(student)


def random_evidence(architecture: Architecture, seed: int = 0, **given: Any) -> Evidence:
    """Importance at random, but for what is given."""
    draw = np.random.default_rng(seed)
    shape, layers = architecture.layers[0], len(architecture.layers)
    arrays = {
        "layer_kl": draw.uniform(0.05, 1, layers), "heads": draw.exponential(1, (layers, shape.heads)),
        "ffn_channels": draw.exponential(1, (layers, shape.ffn)), "hidden": draw.exponential(1, architecture.width),
    }  # fmt: skip
    return evidence({**arrays, **given}, architecture)


def logits(model: Decoder, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """[B, T, V]."""
    with torch.no_grad():
        return model.logits(model(tokens, **options).hidden)
