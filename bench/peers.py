"""The two peers of every speed benchmark: libllama as it comes, and in the best setting that a sweep finds on the spot."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llama_cpp import llama_cpp

from bench.contenders import OFF, ON, Contender, Measure, Ours, Peer, PeerSetting
from bench.results import OURS, Settings

DEFAULT, BEST = "default", "best"


class LineUp(NamedTuple):
    """Contenders that have been fed the prompt, ready to measure; ``notes`` name the settings."""

    contenders: dict[str, Contender]
    notes: list[str]


def thread_counts(cpus: int) -> list[int]:
    """All counts up to four CPUs, then powers of two and the number of CPUs."""
    return sorted({n for n in range(1, cpus + 1) if cpus <= 4 or n & (n - 1) == 0} | {cpus})


@contextlib.contextmanager
def line_up(path: Path, settings: Settings, prompt: Sequence[int], context: int, measure: Measure) -> Iterator[LineUp]:
    """Open ours and both peers and feed them the prompt. ``measure`` (seconds, of a contender so prepared) picks the best peer."""
    ours = Ours(path, context)
    with contextlib.ExitStack() as stack:
        stack.callback(ours.close)
        default = Peer(path, PeerSetting(settings.threads), context)
        stack.callback(default.close)
        for contender in (ours, default):
            contender.feed(prompt)
        best, tried = _sweep(path, settings, prompt, context, measure)
        stack.callback(best.close)
        notes = [f"best peer: {best.setting} (of {tried} settings)"]
        yield LineUp({OURS: ours, DEFAULT: default, BEST: best}, [*notes, *ours.model.notices])


def _sweep(path: Path, settings: Settings, prompt: Sequence[int], context: int, measure: Measure) -> tuple[Peer, int]:
    """The fastest of flash attention x repacking x threads; at last the winner read instead of mapped. Also: how many were tried."""
    mapped = llama_cpp.LLAMA_LOAD_MODE_MMAP
    first = [PeerSetting(settings.threads, flash, repack, mapped) for repack in (True, False) for flash in (ON, OFF)]
    best: Peer | None = None
    fastest, tried = float("inf"), 0
    for stage in ("mapped", "read"):
        candidates = first
        if stage == "read":
            assert best is not None, "the first stage tries at least one setting"
            candidates = [replace(best.setting, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE)]
        for candidate in candidates:
            counts = settings.pick(thread_counts(settings.threads), [settings.threads]) if stage == "mapped" else [candidate.threads]
            peer = Peer(path, replace(candidate, threads=settings.threads), context)
            peer.feed(prompt)
            found, threads = _fastest_threads(peer, counts, measure)
            tried += len(counts)
            if found >= fastest:
                peer.close()
                continue
            if best is not None:
                best.close()
            peer.use_threads(threads)
            best, fastest = peer, found
    assert best is not None, "some setting is the fastest"
    return best, tried


def _fastest_threads(peer: Peer, counts: Sequence[int], measure: Measure) -> tuple[float, int]:
    """(seconds, threads) of the fastest thread count."""
    found = []
    for threads in counts:
        peer.use_threads(threads)
        found.append((min(measure(peer), measure(peer)), threads))
    return min(found)
