"""The same model? Logits bit for bit where the same kernels run, and greedy tokens on real prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import models
from bench.contenders import AUTO, OFF, ON, Contender, Ours, Peer, PeerSetting
from bench.results import Result, Settings
from edge_rt.core.weights import repack

_CONTEXT = 1024
_SAME_KERNELS = ("F16", "Q4_1", "Q4_0")
_CLOSE = 1e-3
PROMPTS = {
    "question": "Why is the sky blue? Explain it to a child.",
    "list": "List ten things to check before a long drive, each with a short reason.",
    "code": "Write a Python function that sorts a list with bubble sort, and explain each line.",
    "story": "Write a short story about a lighthouse keeper who finds a letter.",
    "summary": "Summarise in three sentences: An edge gateway sits between machines and the network. It collects what sensors report,"
    " decides locally what is urgent, and sends the rest on when the line is free. When the line is down it must go on working.",
    "arithmetic": "A train leaves at 9:40 and arrives at 13:05. How long does it travel? Show each step.",
}


def run(settings: Settings) -> list[Result]:
    """Compare logits of four types, then greedy answers of three."""
    results: list[Result] = []
    for kind in ("F16", "Q4_1", "Q4_0", "Q8_0"):
        results += _logits(settings, models.smollm2(settings, kind), kind)
    for kind in ("Q4_0", "Q4_1", "Q8_0"):
        if time.monotonic() > settings.deadline:
            results.append(Result(f"greedy tokens, {kind}", "all", "tokens", [], ok=False, shown="not measured: out of time"))
            continue
        results += _greedy(settings, models.smollm2(settings, kind), kind)
    return results


# ---- logits ----------------------------------------------------------------------------------------------------------


def _logits(settings: Settings, path: Path, kind: str) -> Iterator[Result]:
    """Against libllama with the kernels we run: flash attention, except where decoding over transposed values is faster."""
    ours = _ours(path, kind)
    try:
        prompt = ours.model.prompt_tokens([{"role": "user", "content": " ".join(PROMPTS.values())}])
        for stage, flash in (("prefill", ON), ("decode", ours.decode_flash)):
            parts = [prompt] if stage == "prefill" else [[token] for token in prompt[: settings.pick(200, 20)]]
            # F16 is never packed here; libllama gives it kernels of its own where the CPU has AMX.
            peer = Peer(path, PeerSetting(settings.threads, flash, repack=kind != "F16"), _CONTEXT)
            try:
                error, identical = _difference(ours, peer, parts)
            finally:
                peer.close()
            ours.truncate(0)
            must = kind in _SAME_KERNELS
            yield Result(
                name=f"logits, {stage}, {kind}",
                requirement="identical bits" if must else f"mean relative error < {_CLOSE:g}",
                unit="mean relative error",
                ours=[error],
                ok=identical if must else error < _CLOSE,
                shown="identical bits" if identical else f"mean relative error {error:.1e}",
                notes=[f"{sum(map(len, parts))} tokens, libllama with {peer.setting}"],
            )
    finally:
        ours.close()


def _ours(path: Path, kind: str) -> Ours:
    """With the kernels that libllama has: Q4_1 it packs for AMX alone."""
    return Ours(path, _CONTEXT, pack=kind != "Q4_1" or "AMX" in repack.layouts())


def _difference(ours: Contender, peer: Contender, parts: Sequence[Sequence[int]]) -> tuple[float, bool]:
    """(mean relative error, identical to the last bit) over all logits of all tokens."""
    difference = size = 0.0
    identical = True
    for part in parts:
        a, b = ours.feed_all(part), peer.feed_all(part)
        identical &= bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))
        difference += float(np.abs(a - b).sum(dtype=np.float64))
        size += float(np.abs(b).sum(dtype=np.float64))
    return difference / size, identical


# ---- greedy answers --------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """Greedy tokens, and at each by how much the best logit beat the second."""

    tokens: list[int]
    margins: list[float]


def agreement(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), len(ours))


def _answer(contender: Contender, prompt: Sequence[int], count: int, *, one_by_one: bool = False) -> Answer:
    """Feed a prompt (at once or token by token) and decode greedily, beyond the end of the answer if it comes early."""
    contender.truncate(0)
    logits: Any = None
    for part in [[token] for token in prompt] if one_by_one else [prompt]:
        logits = contender.feed(part)
    tokens, margins = [], []
    for _ in range(count):
        second, best = np.partition(logits, -2)[-2:]
        tokens.append(int(logits.argmax()))
        margins.append(float(best - second))
        logits = contender.feed([tokens[-1]])
    return Answer(tokens, margins)


def _greedy(settings: Settings, path: Path, kind: str) -> Iterator[Result]:
    """Answers to real prompts: with the same kernels throughout, which must agree, and as each program runs by default.

    Where we decode over transposed values, prefill and decode round differently, as in no setting of libllama: there the prompts are
    fed token by token for the first comparison. By default a near tie may then fall the other way: the margin at the first difference
    tells a tie from an error, and so does how often libllama's own two settings agree.
    """
    count = settings.pick(200, 12)
    names = list(PROMPTS)[: settings.pick(len(PROMPTS), 2)]
    ours = _ours(path, kind)
    try:
        prompts = {name: ours.model.prompt_tokens([{"role": "user", "content": PROMPTS[name]}]) for name in names}
        flash, one_by_one = ours.decode_flash, ours.decode_flash == OFF
        fed = {n: _answer(ours, p, count, one_by_one=one_by_one) for n, p in prompts.items()}
        usual = {n: _answer(ours, p, count) for n, p in prompts.items()}
    finally:
        ours.close()
    same = _libllama(settings, path, prompts, count, flash, one_by_one=one_by_one)
    default = _libllama(settings, path, prompts, count, AUTO)
    plain = _libllama(settings, path, prompts, count, OFF)
    yield _agreement(f"greedy tokens, {kind}, with the same kernels", fed, same, count, f"{count} of {count}")
    yield _agreement(f"greedy tokens, {kind}, against libllama's default", usual, default, count)
    yield _agreement(f"greedy tokens, {kind}, libllama's default against libllama without flash attention", default, plain, count)


def _libllama(
    settings: Settings, path: Path, prompts: Mapping[str, Sequence[int]], count: int, flash: int, *, one_by_one: bool = False
) -> dict[str, Answer]:
    peer = Peer(path, PeerSetting(settings.threads, flash), _CONTEXT)
    try:
        return {name: _answer(peer, prompt, count, one_by_one=one_by_one) for name, prompt in prompts.items()}
    finally:
        peer.close()


def _agreement(name: str, ours: Mapping[str, Answer], theirs: Mapping[str, Answer], count: int, requirement: str = "") -> Result:
    agreed = {prompt: agreement(answer.tokens, theirs[prompt].tokens) for prompt, answer in ours.items()}
    notes = [
        f"{prompt}: {n} of {count} agree, then the best two logits are {theirs[prompt].margins[n]:.4f} apart"
        f" (median {np.median(theirs[prompt].margins):.2f})"
        for prompt, n in agreed.items()
        if n < count
    ]
    whole = sum(n == count for n in agreed.values())
    return Result(
        name=name,
        requirement=requirement,
        unit="tokens that agree",
        ours=[float(n) for n in agreed.values()],
        ok=whole == len(agreed) if requirement else None,
        shown=f"{whole} of {len(agreed)} prompts agree on all {count} tokens",
        notes=notes,
    )
