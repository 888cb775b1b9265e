"""A cold start: the model's pages are on disk. Time to open it, read a prompt of 32 tokens and have the first token."""

from __future__ import annotations

from bench import models, pages
from bench.peers import DEFAULT
from bench.processes import run_program
from bench.results import OURS, Bound, Result, Settings, compare
from bench.timing import interleave, spread

_PROMPT = 32


def run(settings: Settings) -> list[Result]:
    """Every sample drops the pages and starts a process."""
    path = models.large(settings)
    pack = models.packed(path)
    read: list[float] = []

    def ours() -> float:
        pages.drop(path, pack)
        seconds = float(run_program("ours.py", path, _PROMPT, 0)["first_token"])
        read.append(pages.resident(pack) * pack.stat().st_size + pages.resident(path) * path.stat().st_size)
        return seconds

    def theirs() -> float:
        pages.drop(path, pack)
        return float(run_program("peer.py", path, _PROMPT, 0, settings.threads, "default")["first_token"])

    rounds = settings.pick(5, 2)
    samples = interleave({OURS: ours, DEFAULT: theirs}, rounds=rounds, most=settings.pick(9, 2), deadline=settings.deadline)
    pages.warm(path, pack)
    compute = spread([float(run_program("ours.py", path, _PROMPT, 0)["first_token"]) for _ in range(3)]).median
    rate, size = pages.bandwidth(pack), spread(read).median
    floor = max(size / rate, compute)
    distance = spread(samples[OURS]).median / floor
    facts = [
        f"{path.stat().st_size / 1e9:.2f} GB of random Q4_0 weights",
        f"{size / 1e9:.2f} GB in memory afterwards; the disk reads {rate / 1e9:.2f} GB/s; the same with warm pages takes {compute:.2f} s",
    ]
    return [
        compare("cold start to first token", "s", samples, [Bound(DEFAULT, "at most", 0.6)], facts),
        Result(
            name="cold start, distance to the floor",
            requirement="",
            unit="times max(bytes / bandwidth, compute)",
            ours=[distance],
            shown=f"{distance:.2f} × max({size / rate:.2f} s reading, {compute:.2f} s computing)",
        ),
    ]
