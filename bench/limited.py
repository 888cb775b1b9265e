"""Decoding with memory for half the weights: ours with ``memory=``, stock libllama from its mapping, in the same memory cgroup."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from bench import models, pages
from bench.processes import memory_limit, run_program
from bench.results import OURS, Bound, Result, Settings, compare
from bench.timing import interleave, spread

_PROMPT = 8
_MARGIN = 48 << 20
"""Bytes the group may hold beyond half the weights and the larger program's private memory: page tables, buffers of the kernel."""
_STOCK = "stock mmap"


def run(settings: Settings) -> list[Result]:
    """Without ``--memory-group`` only ours is measured, and only against the floor: nothing else limits stock libllama."""
    path = models.large(settings)
    pack, tokens, budget = models.packed(path), settings.pick(12, 4), path.stat().st_size // 2
    free = {name: _run(settings, name, path, pack, tokens, None, []) for name in (OURS, _STOCK)}
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], _STOCK: []}

    def measure(name: str, prefix: list[str]) -> float:
        found = _run(settings, name, path, pack, tokens, budget, prefix)
        if name == OURS:
            found["rate"] = pages.bandwidth(pack)  # disks shared with others change their speed: each run has its own bound
        runs[name].append(found)
        return 1.0 / float(found["decode"])

    names = [OURS, _STOCK] if settings.memory_group else [OURS]
    rounds = settings.pick(4, 2)
    limit = budget + max(int(found["private_end"]) for found in free.values()) + _MARGIN
    with contextlib.ExitStack() as stack:
        prefix = stack.enter_context(memory_limit(settings.memory_group, limit)) if settings.memory_group else []
        contenders = {name: (lambda name=name: measure(name, prefix)) for name in names}
        samples = interleave(contenders, rounds=rounds, most=settings.pick(6, 2), deadline=settings.deadline)
    facts = [f"weights {path.stat().st_size / 1e9:.2f} GB, budget {budget / 1e9:.2f} GB"]
    for name in names:
        read = spread([float(found["decode_read"]) for found in runs[name][1:]]).median / tokens
        facts.append(f"{name} reads {read / 1e9:.2f} GB from disk a token")
    if settings.memory_group:
        facts.append(f"both in a cgroup of {limit / 1e9:.2f} GB")
        bounds = [Bound(_STOCK, "at least", 2.0)]
    else:
        facts.append("stock libllama was not measured: give --memory-group a directory in which memory cgroups may be made")
        bounds = []
    return [
        compare("decode with memory for half the weights", "tokens/s", samples, bounds, facts),
        _floor(runs[OURS], float(free[OURS]["decode"]), tokens),
    ]


def _run(settings: Settings, name: str, path: Path, pack: Path, tokens: int, budget: int | None, prefix: list[str]) -> dict[str, Any]:
    """One process of a contender; under a budget from dropped pages, so that every page is charged to the process that reads it."""
    if budget is not None:
        pages.drop(path, pack)
    if name == OURS:
        return run_program("ours.py", path, _PROMPT, tokens, *([budget] if budget else []), prefix=prefix)
    return run_program("peer.py", path, _PROMPT, tokens, settings.threads, "mapped", prefix=prefix)


def _floor(runs: list[dict[str, Any]], compute: float, tokens: int) -> Result:
    """How near to the fastest possible: reading what does not fit, for every token, or computing, whichever takes longer."""
    streamed = int(runs[0]["streamed"])
    shares = [max(streamed / float(found["rate"]), compute) / float(found["decode"]) for found in runs[1:]]
    rate = spread([float(found["rate"]) for found in runs[1:]]).median
    share = spread(shares).median
    return Result(
        name="decode with memory for half the weights, share of the possible",
        requirement="",
        unit="max(bytes not resident / bandwidth, compute) / time a token",
        ours=shares,
        shown=f"{share:.0%} of the possible ({streamed / 1e9:.2f} GB a token at {rate / 1e9:.2f} GB/s, or {compute * 1e3:.0f} ms)",
        notes=[f"{runs[-1]['read'] / 1e9:.2f} GB read in all for the prompt and {tokens} tokens"],
    )
