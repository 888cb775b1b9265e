"""Records what a teacher does on samples: its answers, the sizes of its activations, its attention.

Each function works in batches, keeps every finished shard (shards.py) and returns the record it added; recorded.py reads them back.
``domain`` is that of the samples: record each domain by itself. ``told(done, total)`` counts samples and may stop it by raising.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edge_rt.hooks import DataError, OptionError, UnsupportedModel
from edge_rt_distill.library.catalogue import Record
from edge_rt_distill.library.measure import each_output, measure
from edge_rt_distill.library.shards import Merged, Part, digest_of, record_shards
from edge_rt_distill.library.store import Library
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.generate import Rollout, generate
from edge_rt_distill.model.load import Teacher
from edge_rt_distill.progress import Told, quiet

MAP = 64
"""Rows and columns of a recorded attention map at most."""
_MAP_BYTES = 256 << 20

Scorer = Callable[[str, str, bool], "float | None"]
"""Scores an answer: (sample id, its text, whether it ended by itself) -> higher is better, None: cannot be scored."""


class Tokens(Protocol):
    """What records are made of: ``model.rows.TokenSequence`` (one sample may be several, in order), ``Prompt``, ``errors.Case``."""

    @property
    def sample(self) -> str:
        """Id of the sample."""
        ...

    @property
    def tokens(self) -> Sequence[int]:
        """Its tokens."""
        ...


class Prompt(NamedTuple):
    """A question as tokens, in the model's template, to be answered."""

    sample: str
    tokens: Sequence[int]


class Answers(NamedTuple):
    """How answers are made.

    ``tokens``: of an answer, at most. ``top``: candidates kept of each position. ``rollouts``: answers to each prompt.
    ``batch``: prompts answered side by side. ``shard``: prompts kept at a time.
    """

    tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top: int = 32
    rollouts: int = 1
    seed: int = 0
    batch: int = 16
    shard: int = 32


def tool_version() -> str:
    """The version of this tool that records say."""
    try:
        return importlib.metadata.version("edge-rt-distill")
    except importlib.metadata.PackageNotFoundError:  # run from its folder
        return "source"


# ---- trajectories ----------------------------------------------------------------------------------------------------


def record_trajectories(
    library: Library, teacher: Teacher, prompts: Sequence[Prompt], *, domain: str = "", options: Answers = Answers(),  # noqa: B008
    score: Scorer | None = None, scored_by: str = "", told: Told = quiet,
) -> Record:  # fmt: skip
    """Let the teacher answer prompts; keep tokens, log-probabilities, the likeliest candidates, tail mass, entropy and timings.

    Log-probabilities are of the whole distribution at temperature 1, in nats, whatever temperature chose the tokens.
    ``scored_by``: names what ``score`` is, as a resumed recording must have the same. The record's score is the mean.
    Raises DataError without prompts, OptionError for prompts that leave no room for an answer.
    """
    if options.rollouts < 1 or options.tokens < 1 or options.top < 1:
        raise OptionError("an answer has one token or more, of which one candidate or more is kept; raise rollouts, tokens or top")
    drafted = draft("trajectories", teacher, domain, options.seed, prompts, {**options._asdict(), "scored_by": scored_by})

    def work(indices: range, tell: Told) -> Part:
        found = [found for i in indices for found in [prompts[i]] * options.rollouts]
        rollouts, timings = _answer(teacher, [prompt.tokens for prompt in found], options, indices.start, tell)
        return _keep_answers(library, teacher, found, rollouts, timings, options.top, score, indices.start)

    return record_shards(library, drafted, len(prompts), options.shard, work, _merge_answers, told)


def _answer(
    teacher: Teacher, prompts: Sequence[Sequence[int]], options: Answers, start: int, tell: Told
) -> tuple[list[Rollout], list[dict[str, Any]]]:
    """Answers in order, and of each how long its batch took, how much that was, and its first member, which names it."""
    rollouts: dict[int, Rollout] = {}
    timings: dict[int, dict[str, Any]] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for chosen in (by_length[i : i + options.batch] for i in range(0, len(by_length), options.batch)):
        began = time.perf_counter()
        made = generate(
            teacher.model, [prompts[i] for i in chosen], tokens=options.tokens, temperature=options.temperature,
            seed=options.seed * 1_000_003 + start + chosen[0], end=teacher.tokeniser.end, top_k=options.top_k, batch=options.batch,
        )  # fmt: skip
        seconds = round(time.perf_counter() - began, 6)
        rollouts.update(zip(chosen, made, strict=True))
        count = sum(len(rollout.tokens) for rollout in made)
        timing = {"first": chosen[0], "batch": len(chosen), "batch_tokens": count, "batch_seconds": seconds}
        timings.update(dict.fromkeys(chosen, timing))
        tell(len(rollouts) // options.rollouts, len(prompts) // options.rollouts)
    order = range(len(prompts))
    return [rollouts[i] for i in order], [timings[i] for i in order]


def _keep_answers(
    library: Library, teacher: Teacher, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], timings: Sequence[Mapping[str, Any]],
    top: int, score: Scorer | None, start: int,
) -> Part:  # fmt: skip
    """Measure a shard's answers and put them into the library."""
    rows = [[*prompt.tokens, *rollout.tokens] for prompt, rollout in zip(prompts, rollouts, strict=True)]
    said = {}
    for i, out in each_output(teacher.model, rows, 2048, told=quiet):
        first = len(prompts[i].tokens)
        said[i] = measure(teacher.model, out.hidden[first - 1 : -1], torch.tensor(rows[i][first:]), top)
    lines = []
    for i, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True)):
        text = teacher.tokeniser.decode(rollout.tokens)
        lines.append({
            "sample": prompt.sample, "rollout": sum(prompts[j].sample == prompt.sample for j in range(i)), "prompt": len(prompt.tokens),
            "answer": len(rollout.tokens), "ended": rollout.ended, "text": text,
            "score": None if score is None else score(prompt.sample, text, rollout.ended),
            "logprob": float(said[i].chosen.double().sum()), **timings[i],
        })  # fmt: skip
    columns = [torch.cat(column).numpy() for column in zip(*(said[i] for i in range(len(rows))), strict=True)]
    chosen, ids, best, tail, entropy = columns
    arrays = {
        "tokens": np.array([token for row in rows for token in row], np.int32), "logprobs": chosen, "top_ids": ids.astype(np.int32),
        "top_logprobs": best, "tail": tail, "entropy": entropy,
    }  # fmt: skip
    objects = {
        f"trajectories-{start:08d}.npz": library.put(npz(arrays)),
        f"trajectories-{start:08d}.jsonl": library.put(jsonl(lines)),
    }
    scores = [line["score"] for line in lines if line["score"] is not None]
    sums = {"entropy": float(entropy.sum()), "tail": float(tail.sum()), "logprob": float(chosen.sum()), "score": float(sum(scores))}
    counts = {"rollouts": len(rows), "tokens": len(chosen), "ended": sum(rollout.ended for rollout in rollouts), "scored": len(scores)}
    seconds = {timing["first"]: timing["batch_seconds"] for timing in timings}  # each batch once
    return Part(objects, {**sums, **counts, "seconds": sum(seconds.values())})


def _merge_answers(parts: Sequence[Part]) -> Merged:
    total = {name: sum(part.facts[name] for part in parts) for name in parts[0].facts}
    means = {f"mean_{name}": total[name] / total["tokens"] for name in ("entropy", "tail", "logprob")}
    facts = {**{name: total[name] for name in ("rollouts", "tokens", "ended", "scored", "seconds")}, **means}
    return Merged(_objects(parts), facts, total["score"] / total["scored"] if total["scored"] else None)


# ---- activations -----------------------------------------------------------------------------------------------------


def record_activations(
    library: Library, teacher: Teacher, sequences: Sequence[Tokens], *, domain: str = "", positions: int = 256, batch_tokens: int = 1024,
    shard: int = 64, told: Told = quiet,
) -> Record:  # fmt: skip
    """Keep how large the residual stream is: ``rms`` and ``max`` [L + 1, P] by layer entry (the last row: behind the last) and position.

    ``rms``: root of the mean square over dimensions and sequences; ``max``: the largest magnitude of any; ``sequences`` [P]: how many
    reach the position. Only the first ``positions`` of a sequence count. Raises DataError without sequences or for an empty one.
    """
    layers = len(teacher.model.layers) + 1
    drafted = draft("activations", teacher, domain, None, sequences, {"positions": positions, "shard": shard})

    def work(indices: range, tell: Told) -> Part:
        rows = [list(sequences[i].tokens)[:positions] for i in indices]
        squares, largest = np.zeros((layers, positions)), np.zeros((layers, positions))
        count = np.zeros(positions, np.int64)
        for i, out in each_output(teacher.model, rows, batch_tokens, states=range(layers), told=tell):
            states = torch.stack([out.states[layer] for layer in range(layers)])  # [L + 1, T, D]
            squares[:, : len(rows[i])] += states.double().square().mean(-1).numpy()
            np.maximum(largest[:, : len(rows[i])], states.abs().amax(-1).numpy(), out=largest[:, : len(rows[i])])
            count[: len(rows[i])] += 1
        return Part({"sums": library.put(npz({"squares": squares, "max": largest, "sequences": count}))}, {"sequences": len(rows)})

    def merge(parts: Sequence[Part]) -> Merged:
        sums = [unpack(library.read(part.objects["sums"])) for part in parts]
        count: npt.NDArray[np.int64] = np.sum([one["sequences"] for one in sums], axis=0)
        reached = int((count > 0).sum())
        squares = np.sum([one["squares"] for one in sums], axis=0)[:, :reached] / count[:reached]
        largest = np.max([one["max"] for one in sums], axis=0)[:, :reached]
        arrays = {"rms": np.sqrt(squares).astype(np.float32), "max": largest.astype(np.float32), "sequences": count[:reached]}
        facts = {"sequences": sum(part.facts["sequences"] for part in parts), "positions": reached, "max": float(largest.max())}
        return Merged({"activations.npz": library.put(npz(arrays))}, facts)

    return record_shards(library, drafted, len(sequences), shard, work, merge, told)


# ---- attention -------------------------------------------------------------------------------------------------------


def record_attention(
    library: Library, teacher: Teacher, sequences: Sequence[Tokens], *, domain: str = "", size: int = MAP, told: Told = quiet
) -> Record:
    """Keep each layer's and head's attention of chosen samples, down-sampled to at most ``size`` (64) rows and columns.

    Blocks of keys are added and blocks of queries averaged, so every row stays a distribution. With each map stand, over the full
    map's rows, ``entropy`` (nats), ``distance`` (tokens) and ``first`` (share on position 0), [L, H].
    Raises DataError without sequences or for an empty one, UnsupportedModel where layers differ in heads.
    """
    if not 1 <= size <= MAP:
        raise OptionError(f"an attention map has between 1 and {MAP} rows and not {size}")
    uniform_heads(teacher.model)
    drafted = draft("attention", teacher, domain, None, sequences, {"size": size})

    def work(indices: range, tell: Told) -> Part:
        tokens = list(sequences[indices.start].tokens)
        arrays = {"tokens": np.array(tokens, np.int32), **attention_maps(teacher.model, tokens, size)}
        return Part({f"attention-{indices.start:08d}.npz": library.put(npz(arrays))}, {"sample": sequences[indices.start].sample})

    def merge(parts: Sequence[Part]) -> Merged:
        facts = {"samples": [part.facts["sample"] for part in parts]}
        return Merged(_objects(parts), facts)

    return record_shards(library, drafted, len(sequences), 1, work, merge, told)


@torch.no_grad()
def attention_maps(model: Decoder, tokens: Sequence[int], size: int) -> dict[str, np.ndarray[Any, Any]]:
    """Of one sequence [T] what recorded.Maps holds: ``maps`` float16 [L, H, n, n], ``edges`` [n + 1] of blocks, measures [L, H].

    As many layers at once as fit 256 MB, as the full maps are T x T.
    """
    length, heads = len(tokens), uniform_heads(model)
    at_once = max(1, _MAP_BYTES // (4 * heads * length * length))
    layers, n = len(model.layers), min(size, length)
    edges = np.linspace(0, length, n + 1).astype(np.int64)
    block = torch.from_numpy(np.repeat(np.arange(n), np.diff(edges)))
    widths = torch.from_numpy(np.diff(edges)).float()
    away = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0).float()
    found: dict[str, list[Tensor]] = {"maps": [], "entropy": [], "distance": [], "first": []}
    row = torch.tensor([list(tokens)])
    for start in range(0, layers, at_once):
        chosen = range(start, min(start + at_once, layers))
        out = model(row, attention=chosen)
        for layer in chosen:
            full = out.attention[layer][0]  # [H, T, T]
            keys = torch.zeros(heads, length, n).index_add_(2, block, full)
            found["maps"].append((torch.zeros(heads, n, n).index_add_(1, block, keys) / widths[:, None]).half())
            found["entropy"].append(-torch.special.xlogy(full, full).sum(-1).mean(-1))
            found["distance"].append((full * away).sum(-1).mean(-1))
            found["first"].append(full[:, :, 0].mean(-1))
    return {"edges": edges.astype(np.int32), **{name: torch.stack(parts).numpy() for name, parts in found.items()}}


def uniform_heads(model: Decoder) -> int:
    """The heads of every layer. Raises UnsupportedModel where layers differ."""
    if not model.architecture.same_heads:
        raise UnsupportedModel("this model's layers differ in their number of heads, so heads cannot be compared; use its teacher")
    return model.architecture.layers[0].heads


# ---- in common -------------------------------------------------------------------------------------------------------


def draft(
    kind: str, teacher: Teacher, domain: str, seed: int | None, items: Sequence[Tokens], arguments: Mapping[str, Any]
) -> Record:  # fmt: skip
    """What is to be recorded. Raises DataError for an item without tokens."""
    for item in items:
        if not item.tokens:
            raise DataError(f"sample {item.sample} has no tokens; leave it out")
    samples = digest_of([item.sample, list(item.tokens)] for item in items)
    said = {**arguments, "samples": samples, "count": len(items), "origin": teacher.origin.name}
    return Record(kind, teacher.digest, domain, version=tool_version(), seed=seed, arguments=said)


def _objects(parts: Sequence[Part]) -> dict[str, str]:
    return {name: digest for part in parts for name, digest in part.objects.items()}


def npz(arrays: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """Arrays as a compressed .npz. Equal arrays are equal bytes: its entries have no times."""
    out = io.BytesIO()
    named: dict[str, Any] = dict(arrays)
    np.savez_compressed(out, **named)
    return out.getvalue()


def unpack(data: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays in a .npz."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def jsonl(lines: Iterable[Mapping[str, Any]]) -> bytes:
    """One JSON value a line, in UTF-8."""
    return b"".join(json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass") + b"\n" for line in lines)
