"""The layers of a decoder graph: products, attention, feed-forward and mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.graph import adapters
from edge_rt.core.graph.builder import GraphBuilder, c, wants_flash
from edge_rt.core.graph.config import TOGETHER, Rope
from edge_rt.core.weights.repack import BLOCK, offsets_name
from edge_rt.native import ggml

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edge_rt.core.graph.builder import GraphBuilder, KVView, SlotInputs, SlotShape, Weights
    from edge_rt.core.graph.config import FusedTensors, ModelConfig


def embed(b: GraphBuilder) -> int:
    """Token embeddings [E, T]."""
    rows = int(c.get_rows(b.ctx, b.weights.require("token_embd.weight"), b.inputs.tokens))
    return adapters.add_embeddings(b, adapters.adapter_runs(b.shapes, [shape.tokens for shape in b.shapes]), rows)


def multiply(b: GraphBuilder, weight: int, x: int, *names: str) -> int:
    """``weight`` x, with what compensation and adapters add: the weights of these names, one below the other, are in it."""
    y = int(c.mul_mat(b.ctx, weight, x))
    apart = tuple(map(offsets_name, names))
    if (more := b.weights.get(apart[0]) if len(apart) == 1 else b.weights.joined(apart)) is not None:
        y = int(c.add(b.ctx, y, offsets_product(b.ctx, more, x)))
    counts = adapters.counts(b.shapes, x)
    y = adapters.add_compensation_terms(b, counts, y, x, names)
    return adapters.add_lora_terms(b, adapters.adapter_runs(b.shapes, counts), y, x, names)


def rms_norm(b: GraphBuilder, x: int, name: str) -> int:
    """x / rms(x) * w over the fastest dimension; without w where it is all ones."""
    normed = int(c.rms_norm(b.ctx, x, b.config.eps))
    return normed if name in b.config.fused.folded else int(c.mul(b.ctx, normed, b.weights.require(name)))


def linear(b: GraphBuilder, x: int, name: str) -> int:
    """W x (+ b if the model has one)."""
    y = multiply(b, b.weights.require(f"{name}.weight"), x, f"{name}.weight")
    bias = b.weights.get(f"{name}.bias")
    return adapters.add_bias(b, int(c.add(b.ctx, y, bias) if bias else y), (f"{name}.weight",))


def rope(b: GraphBuilder, x: int, mode: int, factors: int | None) -> int:
    """Rotate x [D, heads, T] by its positions; ``factors`` [D/2] divides the frequencies (Llama 3)."""
    r: Rope = b.config.rope
    return int(
        c.rope_ext(
            b.ctx, x, b.inputs.positions, factors, r.dims, mode, r.original_context,
            r.base, r.scale, r.ext_factor, r.attn_factor, r.beta_fast, r.beta_slow,
        )
    )  # fmt: skip


def linear_joined(b: GraphBuilder, x: int, prefix: str, names: tuple[str, ...]) -> int | None:
    """Several products of one x as one: [sum of widths, T]; None where they are to stay apart, or do not lie side by side."""
    one, weights = joined(b.weights, b.config.fused, prefix, names), weight_names(prefix, names)
    if one is None:
        return None
    y = multiply(b, one.weight, x, *weights)
    return adapters.add_bias(b, int(c.add(b.ctx, y, one.bias) if one.bias else y), weights)


def project_qkv(b: GraphBuilder, x: int, prefix: str) -> tuple[int, int, int]:
    """Queries [D, H, T], keys and values [D, G, T] before rotation, in as few products as the weights' places in memory allow."""
    n_head, n_kv = b.config.n_head, b.config.n_head_kv
    y = _fused_qkv(b, x, prefix) or linear_joined(b, x, prefix, TOGETHER[0])
    if y is not None:
        return b.heads(y, 0, n_head), b.heads(y, n_head, n_kv), b.heads(y, n_head + n_kv, n_kv)
    k = b.heads(linear(b, x, f"{prefix}.attn_k"), 0, n_kv)
    y = linear_joined(b, x, prefix, NEIGHBOURS)
    if y is not None:
        return b.heads(y, 0, n_head), k, b.heads(y, n_head, n_kv)
    return b.heads(linear(b, x, f"{prefix}.attn_q"), 0, n_head), k, b.heads(linear(b, x, f"{prefix}.attn_v"), 0, n_kv)


def _fused_qkv(b: GraphBuilder, x: int, prefix: str) -> int | None:
    """The product with weights that are one tensor in the file."""
    if not b.weights.get(f"{prefix}.attn_qkv.weight"):
        return None
    y = linear(b, x, f"{prefix}.attn_qkv")
    if not b.weights.get(f"{prefix}.attn_qkv.bias") and b.weights.get(f"{prefix}.attn_q.bias"):
        parts = [b.weights.require(f"{prefix}.attn_{p}.bias") for p in "qkv"]
        y = c.add(b.ctx, y, c.concat(b.ctx, c.concat(b.ctx, parts[0], parts[1], 0), parts[2], 0))
    return y


def store_kv(b: GraphBuilder, layer: int, k: int, v: int) -> None:
    """Write keys [D, G, T] and values [D, G, T] of every sequence into its own cache."""
    kv, first = b.config.kv_width, 0
    for shape, slot, cache in zip(b.shapes, b.inputs.slots, b.caches, strict=True):
        if cache.members:
            _store_stacked(b, layer, k, v, first, shape, slot, cache)
            first += shape.tokens
            continue
        b.expand(c.set_rows(b.ctx, cache.keys[layer], b.by_head(k, first, shape.tokens), slot.cells))
        if cache.transposed:
            token = int(ggml.fields(v).nb[2])
            own = c.view_2d(b.ctx, v, kv, shape.tokens, token, token * first)
            v_elements = c.reshape_2d(b.ctx, c.cont(b.ctx, own) if shape.tokens > 1 else own, 1, kv * shape.tokens)
            by_element = c.reshape_2d(b.ctx, cache.values[layer], 1, cache.capacity * kv)
            b.expand(c.set_rows(b.ctx, by_element, v_elements, slot.elements))
        else:
            b.expand(c.set_rows(b.ctx, cache.values[layer], b.by_head(v, first, shape.tokens), slot.cells))
        first += shape.tokens


def keep_queries(b: GraphBuilder, layer: int, q: int) -> None:
    """Write the last of the rotated queries [D, H, T] of every watched sequence into its ring."""
    width, row, first = b.config.n_head * b.config.head_dim, int(ggml.fields(q).nb[2]), 0
    for shape, slot, cache in zip(b.shapes, b.inputs.slots, b.caches, strict=True):
        first += shape.tokens
        if cache.window:
            n = min(shape.tokens, cache.window)
            last = c.view_2d(b.ctx, q, width, n, row, row * (first - n))
            b.expand(c.set_rows(b.ctx, cache.queries[layer], last, slot.columns))


def attend(b: GraphBuilder, layer: int, q: int) -> int:
    """Attention of queries [D, H, T], each sequence over its own cells; returns [H*D, T]."""
    first, outputs = 0, []
    for shape, slot, cache in zip(b.shapes, b.inputs.slots, b.caches, strict=True):
        if cache.members:
            outputs.append(attend_stacked(b, layer, q, first, shape, slot, cache))
        else:
            own = b.queries(q, first, shape.tokens) if len(b.shapes) > 1 else q
            outputs.append(_attend_one(b, layer, own, shape, slot, cache))
        first += shape.tokens
    return b.side_by_side(outputs)


def swiglu(b: GraphBuilder, x: int, prefix: str) -> int:
    """down(silu(gate x) * up x)."""
    both = linear_joined(b, x, prefix, TOGETHER[1])
    if both is not None:
        return linear(b, c.swiglu(b.ctx, both), f"{prefix}.ffn_down")
    up, gate = linear(b, x, f"{prefix}.ffn_up"), linear(b, x, f"{prefix}.ffn_gate")
    return linear(b, c.swiglu_split(b.ctx, gate, up), f"{prefix}.ffn_down")


def last_hidden(b: GraphBuilder, x: int) -> int:
    """The last hidden states [E, R], normalised, as the graph's output."""
    x = rms_norm(b, x, "output_norm.weight")
    c.set_output(x)
    b.expand(x)
    return x


def logits_head(b: GraphBuilder, x: int) -> int:
    """Logits [V, R] from the last hidden states."""
    x = rms_norm(b, x, "output_norm.weight")
    output = b.weights.get("output.weight")
    # A tied head is no other weight: no adapter changes it.
    logits = multiply(b, output, x, "output.weight") if output else c.mul_mat(b.ctx, b.weights.require("token_embd.weight"), x)
    if bias := b.weights.get("output.bias"):
        logits = c.add(b.ctx, logits, bias)
    c.set_output(logits)
    b.expand(logits)
    return int(logits)


# The second part of a product with weights that lie as Q4_0 and offsets; what they are is told in core/weights/repack.py.

NODES = 8
"""Tensors that it adds to a graph at most."""


def sums(ctx: int, x: int, width: int) -> int:
    """Sums of 32 neighbours each in x [in, T]: [width, max(T, 2)], filled up with zeros.

    Of two columns at least: one alone would be multiplied by another kernel, which adds up in another order, and is slower where rows
    are short.
    """
    fields = ggml.fields(x)
    blocks, columns = int(fields.ne[0]) // BLOCK, int(fields.ne[1])
    if fields.nb[1] != 4 * fields.ne[0]:
        x = c.cont(ctx, x)
    found = c.sum_rows(ctx, c.reshape_2d(ctx, x, BLOCK, blocks * columns))
    found = c.reshape_2d(ctx, found, blocks, columns)
    if width == blocks and columns > 1:
        return int(found)
    return int(c.pad(ctx, found, width - blocks, max(0, 2 - columns), 0, 0))


def offsets_product(ctx: int, offsets: int, x: int) -> int:
    """Offsets [width, out] times the sums of x [in, T]: [out, T]."""
    width, rows = (int(n) for n in ggml.fields(offsets).ne[:2])
    found = c.mul_mat(ctx, offsets, sums(ctx, x, width))
    return int(found if ggml.fields(x).ne[1] > 1 else c.view_2d(ctx, found, rows, 1, 4 * rows, 0))


# Which products a block is made of: those that share an input are one where their weights lie side by side.

NEIGHBOURS = ("attn_q", "attn_v")
"""They lie side by side in most files: names are sorted, and attn_output comes before."""


class Joined(NamedTuple):
    """Several weights, one below the other, as one tensor, and their biases, None if they have none."""

    weight: int
    bias: int | None


def weight_names(prefix: str, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the weights of parts of a block."""
    return tuple(f"{prefix}.{part}.weight" for part in parts)


def joined(weights: Weights, fused: FusedTensors, prefix: str, parts: tuple[str, ...]) -> Joined | None:
    """Several weights of a block as one; None where they are to stay apart, or do not lie side by side."""
    if fused.joined is not None and "|".join(parts) not in fused.joined:
        return None
    weight = weights.joined(weight_names(prefix, parts))
    biases = tuple(f"{prefix}.{part}.bias" for part in parts)
    bias = weights.joined(biases)
    if weight is None or (bias is None and any(weights.get(name) for name in biases)):
        return None
    return Joined(weight, bias)


def of_block(weights: Weights, config: ModelConfig, prefix: str) -> Iterator[tuple[str, ...]]:
    """Names of the weights of each product of a block but those of experts, as ``GraphBuilder`` makes them."""
    qkv, gate_up = TOGETHER
    if weights.get(f"{prefix}.attn_qkv.weight"):
        attention: tuple[tuple[str, ...], ...] = (("attn_qkv",),)
    elif joined(weights, config.fused, prefix, qkv):
        attention = (qkv,)
    elif joined(weights, config.fused, prefix, NEIGHBOURS):
        attention = (("attn_k",), NEIGHBOURS)
    else:
        attention = tuple((part,) for part in qkv)
    fed: tuple[tuple[str, ...], ...] = ()
    if not config.n_expert:
        fed = (gate_up,) if joined(weights, config.fused, prefix, gate_up) else tuple((part,) for part in gate_up)
        fed = (*fed, ("ffn_down",))
    for parts in (*attention, ("attn_output",), *fed):
        yield weight_names(prefix, parts)


# Attention of one sequence's queries over its cells: flash attention, or products with keys and with transposed values.


def _attend_one(b: GraphBuilder, layer: int, q: int, shape: SlotShape, slot: SlotInputs, cache: KVView) -> int:
    """Attention of one sequence's queries [D, H, t] over its cells; returns [H*D, t]."""
    h, ctx = b.config, b.ctx
    key = c.row_size(cache.key_type, h.head_dim)
    k = c.view_3d(ctx, cache.keys[layer], h.head_dim, shape.cells, h.n_head_kv, key, key * cache.capacity, 0)  # [D, N, G]
    v = _values(b, layer, shape, cache)
    if shape.together and not wants_flash(shape, cache):
        return matmuls(b, q, k, v, slot.mask)
    if shape.together:
        rows = c.cont(ctx, c.transpose(ctx, v)) if cache.transposed else v  # [D, N, G]
        return flash(b, q, k, rows, slot.mask, shape.tokens)
    # Each token as if alone: a product over several queries may add up in another order, and drafts must not change a bit.
    if not cache.transposed:
        return flash(b, q, k, v, slot.mask, 1) if shape.tokens == 1 else _flash_each(b, q, k, v, slot.mask, shape)
    columns, row = [], 4 * shape.cells
    for i in range(shape.tokens):
        mask = c.view_2d(ctx, slot.mask, shape.cells, 1, row, row * i)
        columns.append(matmuls(b, b.queries(q, i, 1), k, v, mask))
    return b.side_by_side(columns)


def _values(b: GraphBuilder, layer: int, shape: SlotShape, cache: KVView) -> int:
    """Cached values by head: [D, N, G], or [N, D, G] where they are transposed."""
    h = b.config
    if cache.transposed:
        row = 2 * cache.capacity
        return int(c.view_3d(b.ctx, cache.values[layer], shape.cells, h.head_dim, h.n_head_kv, row, row * h.head_dim, 0))
    row = 2 * h.head_dim
    return int(c.view_3d(b.ctx, cache.values[layer], h.head_dim, shape.cells, h.n_head_kv, row, row * cache.capacity, 0))


def flash(b: GraphBuilder, q: int, k: int, v: int, mask: int, columns: int) -> int:
    """Flash attention of queries [D, H, t, S] over keys and values [D, N, G, S], t or S 1; returns [H*D, columns]."""
    h, ctx = b.config, b.ctx
    out = c.flash_attn_ext(ctx, c.permute(ctx, q, 0, 2, 1, 3), k, v, mask, h.attention_scale, 0.0, 0.0)  # [D, H, t, S]
    c.prec_set_acc(out, ggml.PRECISION_F32)
    return int(c.reshape_2d(ctx, out, h.n_head * h.head_dim, columns))


def _flash_each(b: GraphBuilder, q: int, k: int, v: int, mask: int, shape: SlotShape) -> int:
    """The same for several tokens, each exactly as if alone: the tokens of a group's heads count as so many heads of one token."""
    h, ctx, n = b.config, b.ctx, shape.tokens
    group, nb = h.n_head // h.n_head_kv, ggml.fields(q).nb
    size = 4 * h.head_dim
    by_token = c.view_4d(ctx, q, h.head_dim, group, h.n_head_kv, n, size, size * group, nb[2], 0)
    by_group = c.cont(ctx, c.permute(ctx, by_token, 0, 1, 3, 2))  # [D, group, tokens, G]
    heads = c.reshape_3d(ctx, by_group, h.head_dim, 1, h.n_head * n)
    out = c.flash_attn_ext(ctx, heads, k, v, _mask_each(b, mask, group, shape), h.attention_scale, 0.0, 0.0)
    c.prec_set_acc(out, ggml.PRECISION_F32)
    by_group = c.view_4d(ctx, out, h.head_dim, group, n, h.n_head_kv, size, size * group, size * group * n, 0)
    by_token = c.cont(ctx, c.permute(ctx, by_group, 0, 1, 3, 2))
    return int(c.reshape_2d(ctx, by_token, h.n_head * h.head_dim, n))


def _mask_each(b: GraphBuilder, mask: int, group: int, shape: SlotShape) -> int:
    """A mask [N, t] as [N, 1, t * group], each row as often as a group has heads; made once for all layers."""
    found = b.masks.get(mask)
    if found is None:
        rows = c.reshape_3d(b.ctx, mask, shape.cells, 1, shape.tokens)
        repeated = c.repeat_4d(b.ctx, rows, shape.cells, group, shape.tokens, 1)
        found = b.masks[mask] = int(c.reshape_3d(b.ctx, repeated, shape.cells, 1, group * shape.tokens))
    return found


def matmuls(b: GraphBuilder, q: int, k: int, v: int, mask: int) -> int:
    """Attention of queries [D, H, t, S] over keys [D, N, G, S] and transposed values [N, D, G, S], t or S 1; returns [H*D, t*S].

    Several queries of the heads that share a key go through one product with it: 5 % faster for eight behind 1,900 cells, 15 % for four.
    """
    h, ctx = b.config, b.ctx
    tokens, sequences = ggml.fields(q).ne[2:4]
    q = c.permute(ctx, q, 0, 2, 1, 3)  # [D, t, H, S]
    if tokens == 1:
        weights = c.soft_max_ext(ctx, _scores(b, k, q), mask, h.attention_scale, 0.0)  # [N, 1, H, S]
        return int(c.reshape_2d(ctx, c.mul_mat(ctx, v, weights), h.n_head * h.head_dim, sequences))
    shared, cells = tokens * (h.n_head // h.n_head_kv), ggml.fields(k).ne[1]
    scores = _scores(b, k, c.reshape_3d(ctx, c.cont(ctx, q), h.head_dim, shared, h.n_head_kv))
    weights = c.soft_max_ext(ctx, c.reshape_3d(ctx, scores, cells, tokens, h.n_head), mask, h.attention_scale, 0.0)
    out = c.mul_mat(ctx, v, c.reshape_3d(ctx, weights, cells, shared, h.n_head_kv))
    by_token = c.permute(ctx, c.reshape_3d(ctx, out, h.head_dim, tokens, h.n_head), 0, 2, 1, 3)
    return int(c.cont_2d(ctx, by_token, h.n_head * h.head_dim, tokens))


def _scores(b: GraphBuilder, k: int, q: int) -> int:
    """Products of keys [D, N, ...] and queries [D, ...], added up in single precision wherever they are computed."""
    scores = int(c.mul_mat(b.ctx, k, q))
    c.prec_set_acc(scores, ggml.PRECISION_F32)
    return scores


# Sequences that decode one token each, as one: their caches lie at equal distances, so that one operation serves them all.
#
# Each still goes over its own cells with the kernels, and so to the bits, that it would go with alone. But products of many small matrices
# are one operation of ggml's, whose threads meet after each: a layer of eight sequences takes 17 operations instead of 59, and threads
# divide the heads of all among them, not those of one.

SPLIT_FROM = 512
"""Cells from which on ggml's flash attention divides those of one query among threads, and adds up in another order than for several."""


def runs(shapes: Sequence[SlotShape], caches: Sequence[KVView]) -> list[tuple[int, int]]:
    """First and last of each run of sequences that can be one stack; a sequence that goes alone is a run of its own."""
    found: list[tuple[int, int]] = []
    for i, (shape, cache) in enumerate(zip(shapes, caches, strict=True)):
        if found and _fits(shape, cache):
            first, last = found[-1]
            apart = cache.address - caches[last].address
            before = apart if first == last else caches[last].address - caches[last - 1].address
            equal = (cache.capacity, shape.adapter) == (caches[last].capacity, shapes[last].adapter)
            if _fits(shapes[last], caches[last]) and equal and apart == before > 0:
                found[-1] = (first, i)
                continue
        found.append((i, i))
    return found


def _fits(shape: SlotShape, cache: KVView) -> bool:
    """Whether a sequence has one token, and comes to the same bits in a stack."""
    exact = cache.transposed or cache.key_type != ggml.TYPE_F16 or shape.cells < SPLIT_FROM
    return shape.tokens == shape.rows == 1 and not cache.window and not cache.offloaded and exact


def joined_caches(caches: Sequence[KVView]) -> KVView:
    """Caches of one capacity at equal distances as one."""
    first, second = caches[:2]
    return first._replace(apart=second.address - first.address, members=tuple(map(id, caches)))


def span(stack: KVView) -> tuple[int, int]:
    """Address and size of the memory that a stack's tensors are in."""
    return stack.address, stack.apart * (len(stack.members) - 1) + stack.size


def _store_stacked(b: GraphBuilder, layer: int, k: int, v: int, first: int, shape: SlotShape, slot: SlotInputs, stack: KVView) -> None:
    """Write keys and values [D, G, T], of columns from ``first`` on, each into its own cache."""
    head, kv, n = b.config.head_dim, b.config.kv_width, shape.sequences
    for x, tensors, indices in (
        (k, stack.keys, slot.cells),
        (v, stack.values, slot.elements if stack.transposed else slot.cells),
    ):
        nb = ggml.fields(x).nb
        elements = stack.transposed and x == v
        width, rows, row = (1, kv, 4) if elements else (head, b.config.n_head_kv, nb[1])
        own = c.view_3d(b.ctx, x, width, rows, n, row, nb[2], nb[2] * first)
        b.expand(c.set_rows(b.ctx, _over(b, tensors[layer], (width, rows * stack.capacity, n), stack), own, indices))


def attend_stacked(b: GraphBuilder, layer: int, q: int, first: int, shape: SlotShape, slot: SlotInputs, stack: KVView) -> int:
    """Attention of queries [D, H, T], of columns from ``first`` on, each over its own cells; returns [H*D, S]."""
    h, n = b.config, shape.sequences
    nb = ggml.fields(q).nb
    own = c.view_4d(b.ctx, q, h.head_dim, h.n_head, 1, n, nb[1], nb[2], nb[2], nb[2] * first)  # [D, H, 1, S]
    by_cell = (h.head_dim, shape.cells, h.n_head_kv, n)
    k = _over(b, stack.keys[layer], by_cell, stack)
    v = _over(b, stack.values[layer], (shape.cells, h.head_dim, h.n_head_kv, n) if stack.transposed else by_cell, stack)
    return matmuls(b, own, k, v, slot.mask) if stack.transposed else flash(b, own, k, v, slot.mask, n)


def _over(b: GraphBuilder, tensor: int, shape: tuple[int, ...], stack: KVView) -> int:
    """A tensor like that of the first cache, its last dimension the sequences. No view: those stay within what they are of."""
    own = ggml.fields(tensor)
    found = ggml.new_tensor(b.ctx, own.type, shape)
    fields = ggml.fields(found)
    if len(shape) == 4:
        fields.nb[1], fields.nb[2] = own.nb[1], own.nb[2]
    fields.nb[len(shape) - 1] = stack.apart
    for dimension in range(len(shape), 4):
        fields.nb[dimension] = stack.apart * shape[-1]
    ggml.place(found, b.buffers[stack.members], ggml.data_address(tensor))
    return found


# Mixture of experts with softmax routing (Mixtral, Qwen3-MoE): only the experts a token chose are read.

_SMALLEST_F16 = 6.103515625e-5  # llama.cpp's floor under the sum of weights


def experts(b: GraphBuilder, x: int, prefix: str) -> int:
    """Feed x [E, T] through its top experts and add them by normalised weight, in llama.cpp's order of operations.

    The chosen experts [n_expert_used, T] become an output, so that the residency manager learns what was touched.
    """
    h, ctx, rows = b.config, b.ctx, int(ggml.fields(x).ne[1])
    logits = c.mul_mat(ctx, b.weights.require(f"{prefix}.ffn_gate_inp.weight"), x)  # [n_expert, T]
    probabilities = c.soft_max(ctx, logits)
    chosen = c.argsort_top_k(ctx, probabilities, h.n_expert_used)  # [used, T]
    if not b.segments[-1].far:  # there all experts are in memory
        picked = c.cont(ctx, chosen)
        c.set_output(picked)
        b.expand(picked)
        b.experts.append(picked)
    weights = c.get_rows(ctx, c.reshape_3d(ctx, probabilities, 1, h.n_expert, rows), chosen)  # [1, used, T]
    weights = c.reshape_2d(ctx, weights, h.n_expert_used, rows)
    total = c.clamp(ctx, c.sum_rows(ctx, weights), _SMALLEST_F16, float("inf"))
    weights = c.reshape_3d(ctx, c.div(ctx, weights, total), 1, h.n_expert_used, rows)
    b.expand(weights)

    x = c.reshape_3d(ctx, x, h.n_embd, 1, rows)
    up = c.mul_mat_id(ctx, b.weights.require(f"{prefix}.ffn_up_exps.weight"), x, chosen)  # [n_ff, used, T]
    gate = c.mul_mat_id(ctx, b.weights.require(f"{prefix}.ffn_gate_exps.weight"), x, chosen)
    hidden = c.swiglu_split(ctx, gate, up)
    out = c.mul_mat_id(ctx, b.weights.require(f"{prefix}.ffn_down_exps.weight"), hidden, chosen)  # [E, used, T]
    out = c.mul(ctx, out, weights)
    b.expand(out)
    row, token = 4 * h.n_embd, 4 * h.n_embd * h.n_expert_used
    parts = [c.view_2d(ctx, out, h.n_embd, rows, token, row * i) for i in range(h.n_expert_used)]
    joined = parts[0]
    for part in parts[1:]:
        joined = c.add(ctx, joined, part)
    return int(joined if len(parts) > 1 else c.cont(ctx, joined))
