"""What a decoder is made of, as data: read from a teacher, changed by surgery, written by export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edge_rt.hooks import UnsupportedModel

Rotation = Literal["interleaved", "halves"]
"""Which elements of a head rotate together: neighbours (GGUF's llama family) or element i with i + head/2 (qwen, and Hugging Face)."""
FAMILIES: Mapping[str, Rotation] = {"llama": "interleaved", "deci": "interleaved", "qwen2": "halves", "qwen3": "halves"}
"""GGUF's names of the architectures that can be taught here, and how they rotate. ``deci``: a llama whose layers differ in size."""


@dataclass(frozen=True)
class LayerShape:
    """A layer's sizes. ``sources``: the teacher's layers it came from, several when merged, () in a teacher."""

    heads: int
    kv_heads: int
    ffn: int
    sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Sizes of a pre-norm decoder: x += attention(norm(x)); x += ffn(norm(x)), as llama and qwen are.

    ``head``: elements of a head. ``rope_factors``: [head/2] divisors of the rotation's frequencies, () for none.
    ``rope_scale``: positions are divided by it (linear scaling). ``parameters_of``: layer i computes with the parameters of layer
    ``parameters_of[i]``; () when each has its own.
    """

    family: str
    vocabulary: int
    width: int
    head: int
    layers: tuple[LayerShape, ...]
    tied: bool
    norm_epsilon: float
    rope_base: float
    rope: Rotation
    context: int
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_factors: tuple[float, ...] = ()
    rope_scale: float = 1.0
    parameters_of: tuple[int, ...] = ()

    @property
    def even(self) -> bool:
        """Whether all layers have the same sizes."""
        return len({(one.heads, one.kv_heads, one.ffn) for one in self.layers}) == 1

    @property
    def same_heads(self) -> bool:
        """Whether all layers have as many heads, of either kind."""
        return len({(one.heads, one.kv_heads) for one in self.layers}) == 1

    def owner(self, layer: int) -> int:
        """The layer whose parameters a layer computes with."""
        return self.parameters_of[layer] if self.parameters_of else layer

    def layer_parameters(self, layer: int) -> int:
        """Numbers in a layer's own tensors."""
        shape = self.layers[layer]
        q, kv = shape.heads * self.head, shape.kv_heads * self.head
        biases = q + 2 * kv if self.qkv_bias else 0
        norms = 2 * self.width + (2 * self.head if self.qk_norm else 0)
        return self.width * (2 * q + 2 * kv + 3 * shape.ffn) + biases + norms

    def parameters(self) -> int:
        """Numbers in the model, each counted once however many layers share it."""
        own = sorted({self.owner(i) for i in range(len(self.layers))})
        return self.vocabulary * self.width * (1 if self.tied else 2) + self.width + sum(map(self.layer_parameters, own))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Architecture:
        """The inverse of ``to_json``, after a round through JSON. Raises UnsupportedModel for data of another version."""
        try:
            layers = tuple(LayerShape(**{**one, "sources": tuple(one["sources"])}) for one in data["layers"])
            tuples = {name: tuple(data[name]) for name in ("rope_factors", "parameters_of")}
            return cls(**{**data, "layers": layers, **tuples})
        except (KeyError, TypeError) as error:
            raise UnsupportedModel(f"this is no architecture that this version knows ({error}); make it again") from None
