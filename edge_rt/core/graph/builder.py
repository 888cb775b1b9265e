"""The state of a graph while it is built: weights, inputs, caches, and the segments made so far. Its layers are in layers.py.

Notation beside tensors: shapes in ggml order (fastest first); T tokens in the step, t tokens of one sequence, N cells attended,
H heads, G key-value heads, D head size, E embedding width, KV = G*D.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from edge_rt.core.graph.config import ModelConfig
from edge_rt.core.weights.lora import AppliedLora
from edge_rt.native import ggml

if TYPE_CHECKING:
    from edge_rt.core.weights.error_correction import Corrections

c = ggml.c


FLASH_FROM = 9
"""Tokens of one sequence from which they go through attention together. Fewer go one by one if all are to have logits, as drafts are."""
TILES_FROM = 64
"""Tokens from which ggml's flash attention takes many queries at once. Up to there it goes query by query, which is as slow for each as
it is when decoding: 63 tokens behind 1,500 cells took ten times as long as 64 (135M, one thread, AVX-512).
"""


class AttentionSupport(NamedTuple):
    """What attention may ask of all devices that a step runs on. ``flash``: flash attention over heads of this size; ``each``: with
    another mask for every head, by which several tokens go one by one.
    """

    flash: bool = True
    each: bool = True


FULL_SUPPORT = AttentionSupport()


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
    adapter: AppliedLora | None = None
    sequences: int = 1
    traits: AttentionSupport = FULL_SUPPORT

    @property
    def together(self) -> bool:
        """Whether the tokens go through attention together (prefill) or one by one (decode)."""
        if self.tokens > 1 and not self.traits.each:
            return self.sequences == 1
        return self.sequences == 1 and (self.tokens >= FLASH_FROM or self.tokens > max(1, self.rows))


def wants_flash(shape: SlotShape, cache: KVView) -> bool:
    """Flash attention and its half-precision mask, or matmuls over transposed values and a float32 mask."""
    return not cache.transposed or (shape.sequences == 1 and shape.tokens >= TILES_FROM and shape.traits.flash)


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
    config: ModelConfig
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
        width, rows = self.config.n_embd, int(ggml.fields(x).ne[1])
        kept = int(c.view_2d(self.ctx, self.borders[len(self.segments) % 2], width, rows, 4 * width, 0))
        self.expand(c.cpy(self.ctx, x, kept))
        self.begin(unit)
        return kept

    def _cross(self, x: int, beyond: Beyond) -> int:
        """Leave the host: x goes to where it is copied from, and the rest of the graph is one that starts with the copy."""
        width, rows = self.config.n_embd, int(ggml.fields(x).ne[1])
        self.expand(c.cpy(self.ctx, x, c.view_2d(self.ctx, beyond.leaving, width, rows, 4 * width, 0)))
        self.masks.clear()
        self.segments.append(GraphSegment(c.new_graph_custom(self.ctx, self.far_size, False), beyond.unit, far=True))
        self.split, self.inputs, self.weights = False, beyond.inputs, beyond.weights
        return int(c.view_2d(self.ctx, beyond.arriving, width, rows, 4 * width, 0))

    def expand(self, tensor: int) -> None:
        """Make a tensor part of the current graph, in call order."""
        c.build_forward_expand(self.segments[-1].graph, tensor)

    def heads(self, x: int, first: int, count: int) -> int:
        """Heads [D, count, T] out of contiguous x [W, T] or [D, heads, T], from head ``first`` on."""
        size, shape = 4 * self.config.head_dim, ggml.fields(x).ne
        row = 4 * shape[0] * shape[1] * shape[2] // self.n_tokens
        return int(c.view_3d(self.ctx, x, self.config.head_dim, count, self.n_tokens, size, row, first * size))

    def beside(self, q: int, k: int) -> int | None:
        """Queries and keys as one tensor [D, H+G, T], None if they are not parts of one in this order."""
        a, b = ggml.fields(q), ggml.fields(k)
        if not a.view_src or a.src[0] != b.src[0] or b.view_offs != a.view_offs + a.ne[1] * a.nb[1]:
            return None
        heads, offset = self.config.n_head + self.config.n_head_kv, a.view_offs - ggml.fields(a.src[0]).view_offs
        return int(c.view_3d(self.ctx, a.src[0], self.config.head_dim, heads, self.n_tokens, a.nb[1], a.nb[2], offset))

    def by_head(self, x: int, first: int, tokens: int) -> int:
        """Some tokens of keys or values [D, G, T], head by head: [D, tokens, G]."""
        nb = ggml.fields(x).nb
        return int(c.view_3d(self.ctx, x, self.config.head_dim, tokens, self.config.n_head_kv, nb[2], nb[1], nb[2] * first))

    def queries(self, q: int, first: int, tokens: int) -> int:
        """Some tokens of queries [D, H, T]: [D, H, tokens]."""
        nb = ggml.fields(q).nb
        return int(c.view_3d(self.ctx, q, self.config.head_dim, self.config.n_head, tokens, nb[1], nb[2], nb[2] * first))

    def side_by_side(self, columns: Sequence[int]) -> int:
        """Join [E, a], [E, b], ... to [E, a + b + ...]."""
        joined = columns[0]
        for column in columns[1:]:
            joined = c.concat(self.ctx, joined, column, 1)
        return joined

    def wanted_rows(self, x: int) -> int:
        """Keep only the rows that get logits."""
        return x if self.inputs.rows is None else int(c.get_rows(self.ctx, x, self.inputs.rows))
