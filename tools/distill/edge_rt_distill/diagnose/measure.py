"""The parts of a diagnosis, each a function of the model, the sequences and the options that gives arrays and plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from edge_rt_distill.diagnose.activations import Activations, Spread
from edge_rt_distill.diagnose.attention import MEASURES, measures
from edge_rt_distill.diagnose.heads import ChannelImportance, HeadImportance, HiddenActivation, HiddenImportance, channel_activation, table
from edge_rt_distill.diagnose.layers import BlockInfluence, all_removals, greedy, removal_kl
from edge_rt_distill.diagnose.options import Options
from edge_rt_distill.diagnose.parts import Array, Part
from edge_rt_distill.diagnose.passes import backward, inputs, walk
from edge_rt_distill.diagnose.paths import trace
from edge_rt_distill.diagnose.rows import in_rows
from edge_rt_distill.diagnose.sensitivity import Fisher, fisher
from edge_rt_distill.model.decoder import GROUPS, Decoder
from edge_rt_distill.model.rows import Rows, TokenSequence, beginning, count_tokens, rows_of
from edge_rt_distill.progress import Told

_MAPS_BYTES = 128 << 20
"""Attention maps of a layer, with what is made of them, may take about three times as much."""
_STREAM = ("mean_square", "largest", "kurtosis")
_KEY_TOKENS = 12
"""Tokens of a sequence that are named in its trace."""


class Task(NamedTuple):
    """What a part is made of. ``before``: the parts done before it, by name."""

    model: Decoder
    sequences: Sequence[TokenSequence]
    options: Options
    told: Told
    before: Mapping[str, Part]


def numbers(values: Tensor) -> Array:
    """As numpy has them, in float32."""
    found: Array = values.detach().to(torch.float32).numpy()
    return found


def look(task: Task) -> Part:
    """One walk through the layers: activations, attention, block influence, and importance by size."""
    model, count = task.model, len(task.sequences)
    heads = max(layer.heads for layer in model.architecture.layers)
    batches = list(in_rows(task.sequences, task.options.batch_tokens, square=_MAPS_BYTES // (4 * heads)))
    acts, sizes, influence = Activations(model, batches[0].tokens.shape[1]), HiddenActivation(model), BlockInfluence(model)
    attention = torch.full((count, len(model.layers), heads, len(MEASURES)), float("nan"))
    now: list[Rows] = [batches[0]]
    with inputs([*acts.watch(model, lambda: now[0]), *sizes.watch(model, lambda: now[0])]):
        for number, rows in enumerate(batches):
            now[0] = rows
            for step in walk(model, rows.tokens, attention=True):
                acts.add(step, rows)
                influence.add(step, rows)
                assert step.attention is not None
                attention[list(rows.numbers), step.layer, : step.attention.shape[1]] = measures(step.attention, rows, task.options.far)
                last = step.exit
            with torch.no_grad():
                sizes.add(model.output_norm(last), rows)
            task.told(number + 1, len(batches))
    spreads = {site: moments.spread() for site, moments in acts.sites.items()}
    stream = [moments.spread() for moments in acts.stream]
    channels = [spreads[f"blk.{number}.ffn_down"].channels for number in range(len(model.layers))]
    arrays = {
        **{f"attention_{name}": numbers(attention[..., place].mean(0)) for place, name in enumerate(MEASURES)},
        "block_influence": numbers(influence.mean()), "ffn_channels_activation": numbers(channel_activation(model, channels)),
        "hidden_activation": numbers(sizes.activation(model)), "stream_positions": numbers(acts.by_position),
        **{f"stream_{name}": np.array([getattr(one, name) for one in stream], np.float32) for name in _STREAM},
        **{f"input_mean_square.{site}": numbers(spread.channels) for site, spread in spreads.items()},
    }  # fmt: skip
    return Part(arrays, {"sites": _site_facts(spreads), "massive": [one._asdict() for one in acts.massive()]})


def _site_facts(spreads: Mapping[str, Spread]) -> list[dict[str, Any]]:
    shared = {group[0]: group for group in GROUPS}
    found = []
    for site, spread in spreads.items():
        _, layer, name = site.split(".")
        facts = spread._asdict()
        del facts["channels"]
        found.append({"layer": int(layer), "matrices": list(shared[name]), **facts})
    return found


def gradients(task: Task) -> Part:
    """One pass forward and back: heads, channels, hidden dimensions, the loss, and the Fisher information of the text's own tokens."""
    model, count = task.model, len(task.sequences)
    batches = list(in_rows(task.sequences, task.options.batch_tokens))
    now: list[Rows] = [batches[0]]
    current: Callable[[], Rows] = lambda: now[0]  # noqa: E731 (typed)
    heads, channels, hidden = HeadImportance(model, count), ChannelImportance(model), HiddenImportance(model)
    own = Fisher(model) if task.options.fisher == "text" else None
    watched = [*heads.watch(model, current), *channels.watch(model, current), *hidden.watch(model, current)]
    watched += own.watch(model) if own is not None else []
    loss = torch.zeros(count, dtype=torch.float64)
    for number, rows in enumerate(batches):
        now[0] = rows
        found = backward(model, rows, watched)
        hidden.add(found.embeddings, found.gradient, rows)
        loss[list(rows.numbers)] = found.loss
        if own is not None:
            own.add(rows)
        task.told(number + 1, len(batches))
    arrays = {
        "heads": numbers(heads.heads()), "kv_groups": numbers(heads.groups()), "heads_by_sequence": numbers(heads.by_sequence.abs()),
        "ffn_channels_taylor": numbers(channels.taylor()), "hidden_taylor": numbers(hidden.taylor()), "loss": loss.numpy(),
    }  # fmt: skip
    return Part(arrays, {} if own is None else {"fisher": own.traces()})


def fisher_part(task: Task) -> Part:
    """The Fisher information of each matrix."""
    if task.options.fisher == "text":
        return Part({}, {"fisher": task.before["gradients"].facts["fisher"]})
    batches = list(in_rows(task.sequences, task.options.batch_tokens))
    return Part({}, {"fisher": fisher(task.model, batches, sampled=True, seed=task.options.seed, told=task.told)})


def removal(task: Task) -> Part:
    """The divergence without each layer, on fewer tokens."""
    kept = beginning(task.sequences, task.options.removal_tokens, count_tokens)
    batches = list(in_rows(kept, min(512, task.options.batch_tokens)))
    found = removal_kl(task.model, batches, all_removals(task.model, task.options.halves), len(task.sequences), told=task.told)
    mean, error = found.mean(), found.error()
    depth = len(task.model.layers)
    arrays: dict[str, Array] = {"removal_sums": found.sums.numpy(), "removal_counts": found.counts.numpy()}
    for kind, name in (("layer", "layer_kl"), ("attention", "attention_kl"), ("ffn", "ffn_kl")):
        rows = [row for row, one in enumerate(found.removals) if one.kind == kind]
        if rows:
            arrays[name], arrays[f"{name}_error"] = numbers(mean[rows]), numbers(error[rows])
    assert len(arrays["layer_kl"]) == depth
    return Part(arrays, {"tokens": sum(len(one.tokens) for one in kept), "predictions": int(found.counts.sum()), "sequences": len(kept)})


def order(task: Task) -> Part:
    """Layers in the order in which they can go."""
    kept = beginning(task.sequences, task.options.removal_tokens, count_tokens)
    batches = list(in_rows(kept, min(512, task.options.batch_tokens)))
    first = torch.from_numpy(task.before["removal"].arrays["layer_kl"])
    found = greedy(task.model, batches, first, task.options.order, len(task.sequences), candidates=task.options.candidates, told=task.told)
    return Part({
        "drop_order": np.array([one.layer for one in found], np.int64), "drop_kl": np.array([one.kl for one in found], np.float32),
    }, {})  # fmt: skip


def paths(task: Task) -> Part:
    """Key tokens of some sequences, and which heads brought them."""
    kept = list(task.sequences[: task.options.paths])
    rows = []
    traces: list[dict[str, Any]] = []
    for number, one in enumerate(kept):
        found = trace(task.model, rows_of([one]))
        rows.append(found.heads)
        first = next(place for place in range(1, len(one.targets)) if one.targets[place])
        weights, owed, flow = (values[0].tolist() for values in (found.positions, found.owed, found.flow))
        top = found.positions[0].argsort(descending=True, stable=True)[:_KEY_TOKENS].tolist()
        traces.append({
            "sample": one.sample, "tokens": list(one.tokens), "answer": first, "weights": [round(value, 6) for value in weights],
            "key": [{"position": p, "token": one.tokens[p], "weight": weights[p], "owed": owed[p], "flow": flow[p]} for p in top],
        })  # fmt: skip
        task.told(number + 1, len(kept))
    return Part({"path_heads": numbers(table(torch.stack(rows).mean(0)))}, {"traces": traces})


PARTS: dict[str, tuple[Callable[[Task], Part], tuple[str, ...]]] = {
    "activations": (look, ("batch_tokens", "far")),
    "gradients": (gradients, ("batch_tokens", "fisher")),
    "fisher": (fisher_part, ("batch_tokens", "fisher", "seed")),
    "removal": (removal, ("batch_tokens", "removal_tokens", "halves")),
    "order": (order, ("batch_tokens", "removal_tokens", "order", "candidates")),
    "paths": (paths, ("paths",)),
}
"""By name what makes it, and which options it depends on, in the order in which they are made."""
