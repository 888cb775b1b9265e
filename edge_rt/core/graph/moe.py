"""Mixture of experts with softmax routing (Mixtral, Qwen3-MoE): only the experts a token chose are read."""

from __future__ import annotations

from edge_rt.core.graph.common import Builder, c
from edge_rt.native import ggml

_SMALLEST_F16 = 6.103515625e-5  # llama.cpp's floor under the sum of weights


def experts(b: Builder, x: int, prefix: str) -> int:
    """Feed x [E, T] through its top experts and add them by normalised weight, in llama.cpp's order of operations.

    The chosen experts [n_expert_used, T] become an output, so that the residency manager learns what was touched.
    """
    h, ctx, rows = b.hyper, b.ctx, int(ggml.fields(x).ne[1])
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
