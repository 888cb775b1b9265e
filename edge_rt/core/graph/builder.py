"""The parts every decoder graph is made of. One ``GraphBuilder`` builds the graphs of one step shape.

Notation beside tensors: shapes in ggml order (fastest first); T tokens in the step, t tokens of one sequence, N cells attended,
H heads, G key-value heads, D head size, E embedding width, KV = G*D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from edge_rt.core.graph import adapters, layers
from edge_rt.core.graph.config import TOGETHER, ModelConfig, Rope
from edge_rt.core.weights.repack import offsets_name
from edge_rt.native import ggml

if TYPE_CHECKING:
    from edge_rt.core.weights.error_correction import Corrections

c = ggml.c


class Weights(Protocol):
    """Where a graph finds its weights."""

    def get(self, name: str) -> int | None:
        """Address of a weight tensor, None if the model has none of that name."""
        ...

    def require(self, name: str) -> int:
        """The same, or ModelFileError."""
        ...

    def joined(self, names: tuple[str, ...]) -> int | None:
        """One tensor over the rows of several that lie side by side, None if they do not. Weights with offsets and without never do."""
        ...

    @property
    def centred(self) -> bool:
        """Whether some lie as Q4_0 and offsets."""
        ...

    @property
    def corrections(self) -> Corrections | None:
        """What compensates for their quantisation, None without."""
        ...


class KVView(NamedTuple):
    """One sequence's cache as tensors: per layer keys [D, capacity, G] and values the same or, ``transposed``, [capacity, D, G].

    ``queries``: per layer the ring [D*H, window] that keeps its last queries; none where nobody watches. ``address`` and ``size``: of the
    memory that all of it is in. Of a stack (layers.py) it is the first, and the others, ``members`` in all, follow ``apart`` bytes from
    each other; a member is known by the id of its own view. ``offloaded``: some layers are on a device, and so it is in no stack.
    """

    keys: tuple[int, ...]
    values: tuple[int, ...]
    capacity: int
    key_type: int
    transposed: bool
    queries: tuple[int, ...] = ()
    window: int = 0
    address: int = 0
    size: int = 0
    apart: int = 0
    members: tuple[int, ...] = ()
    offloaded: bool = False


class SlotShape(NamedTuple):
    """One sequence's share of a step: t tokens, N cells attended (a multiple of 256), rows of logits wanted, and its adapter.

    Or that of a stack of several ``sequences``, with a token and a row for each. ``traits``: what the device it may come to can do.
    """

    tokens: int
    cells: int
    rows: int
    adapter: adapters.Applied | None = None
    sequences: int = 1
    traits: layers.Traits = layers.ALL

    @property
    def together(self) -> bool:
        """Whether the tokens go through attention together (prefill) or one by one (decode)."""
        if self.tokens > 1 and not self.traits.each:
            return self.sequences == 1
        return self.sequences == 1 and (self.tokens >= layers.FLASH_FROM or self.tokens > max(1, self.rows))


class SlotInputs(NamedTuple):
    """Input tensors of one sequence: cell of each token [t], element of each transposed value [t*KV] (0: by cell), mask [N, t].

    ``columns``: where the last queries go in the ring [min(t, window)] (0: nobody watches).
    Of a stack: the row of each key [G, S], where a head's rows are its cells, element of each transposed value [KV, S], mask [N, 1, 1, S].
    """

    cells: int
    elements: int
    mask: int
    columns: int = 0


class Inputs(NamedTuple):
    """Input tensors of a step: token ids [T], positions [T], rows that get logits [R] (None: all rows)."""

    tokens: int
    positions: int
    rows: int | None
    slots: list[SlotInputs]


class GraphSegment(NamedTuple):
    """A graph that touches one unit of weights, or all from one on; ``unit`` names it, the first. ``far``: it runs on the device."""

    graph: int
    unit: str
    far: bool = False


class Beyond(NamedTuple):
    """What a graph goes on with on a device, from a ``unit`` on: twins of the inputs there, and of the hidden states that come in
    (``arriving`` [E, T], copied from ``leaving`` before it runs).
    """

    unit: str
    weights: Weights
    inputs: Inputs
    leaving: int
    arriving: int


@dataclass(slots=True)
class GraphBuilder:
    """Builds segments in ``ctx``. ``split`` starts a new graph at every unit, so that units can be paged between graphs.

    ``buffers``: over the memory of each stack, by its members. ``beyond``: where a device takes over, with one graph, of ``far_size``
    nodes, for all the rest.
    """

    ctx: int
    hyper: ModelConfig
    weights: Weights
    inputs: Inputs
    shapes: Sequence[SlotShape]
    caches: Sequence[KVView]
    graph_size: int
    split: bool = False
    borders: Sequence[int] = ()
    buffers: Mapping[tuple[int, ...], int] = field(default_factory=dict)
    beyond: Beyond | None = None
    far_size: int = 0
    segments: list[GraphSegment] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    masks: dict[int, int] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """T."""
        return sum(shape.tokens for shape in self.shapes)

    def begin(self, unit: str) -> None:
        """Start the first graph, or in split mode one more."""
        if self.split or not self.segments:
            self.masks.clear()  # what one graph computed does not outlive it
            self.segments.append(GraphSegment(c.new_graph_custom(self.ctx, self.graph_size, False), unit))

    def border(self, x: int, unit: str) -> int:
        """Carry x [E, T] over a unit border: itself, or in split mode a copy that outlives the graph that made it."""
        if self.beyond and unit == self.beyond.unit:
            return self._cross(x, self.beyond)
        if not self.split:
            return x
        width, rows = self.hyper.n_embd, int(ggml.fields(x).ne[1])
        kept = int(c.view_2d(self.ctx, self.borders[len(self.segments) % 2], width, rows, 4 * width, 0))
        self.expand(c.cpy(self.ctx, x, kept))
        self.begin(unit)
        return kept

    def _cross(self, x: int, beyond: Beyond) -> int:
        """Leave the host: x goes to where it is copied from, and the rest of the graph is one that starts with the copy."""
        width, rows = self.hyper.n_embd, int(ggml.fields(x).ne[1])
        self.expand(c.cpy(self.ctx, x, c.view_2d(self.ctx, beyond.leaving, width, rows, 4 * width, 0)))
        self.masks.clear()
        self.segments.append(GraphSegment(c.new_graph_custom(self.ctx, self.far_size, False), beyond.unit, far=True))
        self.split, self.inputs, self.weights = False, beyond.inputs, beyond.weights
        return int(c.view_2d(self.ctx, beyond.arriving, width, rows, 4 * width, 0))

    def expand(self, tensor: int) -> None:
        """Make a tensor part of the current graph, in call order."""
        c.build_forward_expand(self.segments[-1].graph, tensor)

    # ---- layers ------------------------------------------------------------------------------------------------------

    def embed(self) -> int:
        """Token embeddings [E, T]."""
        rows = int(c.get_rows(self.ctx, self.weights.require("token_embd.weight"), self.inputs.tokens))
        return adapters.add_embeddings(self, adapters.adapter_runs(self.shapes, [shape.tokens for shape in self.shapes]), rows)

    def product(self, weight: int, x: int, *names: str) -> int:
        """``weight`` x, with what compensation and adapters add: the weights of these names, one below the other, are in it."""
        y = int(c.mul_mat(self.ctx, weight, x))
        apart = tuple(map(offsets_name, names))
        if (more := self.weights.get(apart[0]) if len(apart) == 1 else self.weights.joined(apart)) is not None:
            y = int(c.add(self.ctx, y, layers.product(self.ctx, more, x)))
        counts = adapters.counts(self.shapes, x)
        y = adapters.add_compensation_terms(self, counts, y, x, names)
        return adapters.add_lora_terms(self, adapters.adapter_runs(self.shapes, counts), y, x, names)

    def rms_norm(self, x: int, name: str) -> int:
        """x / rms(x) * w over the fastest dimension; without w where it is all ones."""
        normed = int(c.rms_norm(self.ctx, x, self.hyper.eps))
        return normed if name in self.hyper.fused.folded else int(c.mul(self.ctx, normed, self.weights.require(name)))

    def linear(self, x: int, name: str) -> int:
        """W x (+ b if the model has one)."""
        y = self.product(self.weights.require(f"{name}.weight"), x, f"{name}.weight")
        bias = self.weights.get(f"{name}.bias")
        return adapters.add_bias(self, int(c.add(self.ctx, y, bias) if bias else y), (f"{name}.weight",))

    def rope(self, x: int, mode: int, factors: int | None) -> int:
        """Rotate x [D, heads, T] by its positions; ``factors`` [D/2] divides the frequencies (Llama 3)."""
        r: Rope = self.hyper.rope
        return int(
            c.rope_ext(
                self.ctx, x, self.inputs.positions, factors, r.dims, mode, r.original_context,
                r.base, r.scale, r.ext_factor, r.attn_factor, r.beta_fast, r.beta_slow,
            )
        )  # fmt: skip

    def linears(self, x: int, prefix: str, names: tuple[str, ...]) -> int | None:
        """Several products of one x as one: [sum of widths, T]; None where they are to stay apart, or do not lie side by side."""
        one, weights = layers.joined(self.weights, self.hyper.fused, prefix, names), layers.weight_names(prefix, names)
        if one is None:
            return None
        y = self.product(one.weight, x, *weights)
        return adapters.add_bias(self, int(c.add(self.ctx, y, one.bias) if one.bias else y), weights)

    def heads(self, x: int, first: int, count: int) -> int:
        """Heads [D, count, T] out of contiguous x [W, T] or [D, heads, T], from head ``first`` on."""
        size, shape = 4 * self.hyper.head_dim, ggml.fields(x).ne
        row = 4 * shape[0] * shape[1] * shape[2] // self.n_tokens
        return int(c.view_3d(self.ctx, x, self.hyper.head_dim, count, self.n_tokens, size, row, first * size))

    def qkv(self, x: int, prefix: str) -> tuple[int, int, int]:
        """Queries [D, H, T], keys and values [D, G, T] before rotation, in as few products as the weights' places in memory allow."""
        n_head, n_kv = self.hyper.n_head, self.hyper.n_head_kv
        y = self._fused(x, prefix) or self.linears(x, prefix, TOGETHER[0])
        if y is not None:
            return self.heads(y, 0, n_head), self.heads(y, n_head, n_kv), self.heads(y, n_head + n_kv, n_kv)
        k = self.heads(self.linear(x, f"{prefix}.attn_k"), 0, n_kv)
        y = self.linears(x, prefix, layers.NEIGHBOURS)
        if y is not None:
            return self.heads(y, 0, n_head), k, self.heads(y, n_head, n_kv)
        return self.heads(self.linear(x, f"{prefix}.attn_q"), 0, n_head), k, self.heads(self.linear(x, f"{prefix}.attn_v"), 0, n_kv)

    def _fused(self, x: int, prefix: str) -> int | None:
        """The product with weights that are one tensor in the file."""
        if not self.weights.get(f"{prefix}.attn_qkv.weight"):
            return None
        y = self.linear(x, f"{prefix}.attn_qkv")
        if not self.weights.get(f"{prefix}.attn_qkv.bias") and self.weights.get(f"{prefix}.attn_q.bias"):
            parts = [self.weights.require(f"{prefix}.attn_{p}.bias") for p in "qkv"]
            y = c.add(self.ctx, y, c.concat(self.ctx, c.concat(self.ctx, parts[0], parts[1], 0), parts[2], 0))
        return y

    def beside(self, q: int, k: int) -> int | None:
        """Queries and keys as one tensor [D, H+G, T], None if they are not parts of one in this order."""
        a, b = ggml.fields(q), ggml.fields(k)
        if not a.view_src or a.src[0] != b.src[0] or b.view_offs != a.view_offs + a.ne[1] * a.nb[1]:
            return None
        heads, offset = self.hyper.n_head + self.hyper.n_head_kv, a.view_offs - ggml.fields(a.src[0]).view_offs
        return int(c.view_3d(self.ctx, a.src[0], self.hyper.head_dim, heads, self.n_tokens, a.nb[1], a.nb[2], offset))

    def store(self, layer: int, k: int, v: int) -> None:
        """Write keys [D, G, T] and values [D, G, T] of every sequence into its own cache."""
        kv, first = self.hyper.kv_width, 0
        for shape, slot, cache in zip(self.shapes, self.inputs.slots, self.caches, strict=True):
            if cache.members:
                layers.store(self, layer, k, v, first, shape, slot, cache)
                first += shape.tokens
                continue
            self.expand(c.set_rows(self.ctx, cache.keys[layer], self._by_head(k, first, shape.tokens), slot.cells))
            if cache.transposed:
                token = int(ggml.fields(v).nb[2])
                own = c.view_2d(self.ctx, v, kv, shape.tokens, token, token * first)
                v_elements = c.reshape_2d(self.ctx, c.cont(self.ctx, own) if shape.tokens > 1 else own, 1, kv * shape.tokens)
                by_element = c.reshape_2d(self.ctx, cache.values[layer], 1, cache.capacity * kv)
                self.expand(c.set_rows(self.ctx, by_element, v_elements, slot.elements))
            else:
                self.expand(c.set_rows(self.ctx, cache.values[layer], self._by_head(v, first, shape.tokens), slot.cells))
            first += shape.tokens

    def keep_queries(self, layer: int, q: int) -> None:
        """Write the last of the rotated queries [D, H, T] of every watched sequence into its ring."""
        width, row, first = self.hyper.n_head * self.hyper.head_dim, int(ggml.fields(q).nb[2]), 0
        for shape, slot, cache in zip(self.shapes, self.inputs.slots, self.caches, strict=True):
            first += shape.tokens
            if cache.window:
                n = min(shape.tokens, cache.window)
                last = c.view_2d(self.ctx, q, width, n, row, row * (first - n))
                self.expand(c.set_rows(self.ctx, cache.queries[layer], last, slot.columns))

    def _by_head(self, x: int, first: int, tokens: int) -> int:
        """Some tokens of keys or values [D, G, T], head by head: [D, tokens, G]."""
        nb = ggml.fields(x).nb
        return int(c.view_3d(self.ctx, x, self.hyper.head_dim, tokens, self.hyper.n_head_kv, nb[2], nb[1], nb[2] * first))

    def queries(self, q: int, first: int, tokens: int) -> int:
        """Some tokens of queries [D, H, T]: [D, H, tokens]."""
        nb = ggml.fields(q).nb
        return int(c.view_3d(self.ctx, q, self.hyper.head_dim, self.hyper.n_head, tokens, nb[1], nb[2], nb[2] * first))

    def attend(self, layer: int, q: int) -> int:
        """Attention of queries [D, H, T], each sequence over its own cells; returns [H*D, T]."""
        first, outputs = 0, []
        for shape, slot, cache in zip(self.shapes, self.inputs.slots, self.caches, strict=True):
            if cache.members:
                outputs.append(layers.attend_stacked(self, layer, q, first, shape, slot, cache))
            else:
                own = self.queries(q, first, shape.tokens) if len(self.shapes) > 1 else q
                outputs.append(layers.attend(self, layer, own, shape, slot, cache))
            first += shape.tokens
        return self.side_by_side(outputs)

    def side_by_side(self, columns: Sequence[int]) -> int:
        """Join [E, a], [E, b], ... to [E, a + b + ...]."""
        joined = columns[0]
        for column in columns[1:]:
            joined = c.concat(self.ctx, joined, column, 1)
        return joined

    def wanted_rows(self, x: int) -> int:
        """Keep only the rows that get logits."""
        return x if self.inputs.rows is None else int(c.get_rows(self.ctx, x, self.inputs.rows))

    def swiglu(self, x: int, prefix: str) -> int:
        """down(silu(gate x) * up x)."""
        both = self.linears(x, prefix, TOGETHER[1])
        if both is not None:
            return self.linear(c.swiglu(self.ctx, both), f"{prefix}.ffn_down")
        up, gate = self.linear(x, f"{prefix}.ffn_up"), self.linear(x, f"{prefix}.ffn_gate")
        return self.linear(c.swiglu_split(self.ctx, gate, up), f"{prefix}.ffn_down")

    def hidden(self, x: int) -> int:
        """The last hidden states [E, R], normalised, as the graph's output."""
        x = self.rms_norm(x, "output_norm.weight")
        c.set_output(x)
        self.expand(x)
        return x

    def head(self, x: int) -> int:
        """Logits [V, R] from the last hidden states."""
        x = self.rms_norm(x, "output_norm.weight")
        output = self.weights.get("output.weight")
        # A tied head is no other weight: no adapter changes it.
        logits = self.product(output, x, "output.weight") if output else c.mul_mat(self.ctx, self.weights.require("token_embd.weight"), x)
        if bias := self.weights.get("output.bias"):
            logits = c.add(self.ctx, logits, bias)
        c.set_output(logits)
        self.expand(logits)
        return int(logits)
