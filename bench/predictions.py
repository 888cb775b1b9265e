"""What the compiler's cost model predicts for this machine, beside what is measured: models, precisions, threads and context lengths."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import edge_rt
from bench import models
from bench.results import Result, Settings
from bench.timing import Spread
from edge_rt.compiler import cost, measure
from edge_rt.compiler.here import here
from edge_rt.compiler.shape import read_shape
from edge_rt.compiler.target import Target
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.plugin_host.registry import Registry

WITHIN = 0.2
MEDIUM = {"n_layer": 32, "n_embd": 960, "n_head": 15, "n_head_kv": 5, "head_dim": 64, "n_ff": 2560, "n_vocab": 49152}
"""The measures of SmolLM2-360M."""
LARGE = {"n_layer": 22, "n_embd": 2048, "n_head": 32, "n_head_kv": 4, "head_dim": 64, "n_ff": 5632, "n_vocab": 32000}
"""Those of TinyLlama-1.1B."""
KINDS = ("Q4_0", "Q8_0")
ROUNDS = 3
CONTEXTS = (128, 1024, 2048)
PROMPTS = (32, 256, 1024)


class Point(NamedTuple):
    """One figure: what it is of, what was predicted and what was measured (both in ``unit``), and what the model says limits it."""

    name: str
    unit: str
    predicted: float
    measured: float
    bound: str

    @property
    def ratio(self) -> float:
        """Predicted by measured."""
        return self.predicted / self.measured


def run(settings: Settings) -> list[Result]:
    """Every point, and how many of them are within a fifth."""
    points: list[Point] = []
    for name, kind, path in _models(settings):
        points += _points(f"{name} {kind}", path, settings)
    results = [_result(point, settings.quick) for point in points]
    off = [abs(point.ratio - 1.0) for point in points]
    within = sum(one <= WITHIN for one in off)
    shown = f"{within} of {len(points)} within 20 %; median {statistics.median(off):.0%} off, worst {max(off):.0%}"
    ok = None if settings.quick else within == len(points)
    results.append(Result("predictions within 20 %", "all of them", "", [], ok=ok, shown=shown))
    return results


def _models(settings: Settings) -> Iterator[tuple[str, str, Path]]:
    sizes = {"360M": MEDIUM, "1.1B": LARGE}
    for kind in settings.pick(KINDS, KINDS[:1]):
        yield "135M", kind, models.smollm2(settings, kind)
        for name, measures in settings.pick(sizes, {"small": models.SMALL}).items():
            yield name, kind, models.random(kind, measures)


def _points(name: str, path: Path, settings: Settings) -> Iterator[Point]:
    """Those of one file. Everything is measured in a few rounds, one after the other, and the best of each counts, as in calibration:
    what else the machine does lasts for seconds, and only ever slows down.
    """
    contexts, prompts = settings.pick(CONTEXTS, CONTEXTS[:1]), settings.pick(PROMPTS, PROMPTS[:1])
    threads = sorted({1, settings.threads})
    with ModelFile.open(path) as file:
        shape = read_shape(file.header)
    target: Target = here(Registry.load(entry_points=False), shape, threads)
    seconds: dict[tuple[str, int, int], float] = {}
    saved: bytes | None = None
    for _ in range(settings.pick(ROUNDS, 1)):
        for n in reversed(threads):
            with closing(edge_rt.open(path, context=max(*contexts, *prompts) + 256, threads=n, device="cpu")) as model:
                engine = model.engine
                sequence = measure.filled(engine, max(contexts)) if saved is None else engine.import_sequence(saved)
                saved = saved or engine.export_sequence(sequence)
                for context in reversed(contexts):
                    _least(seconds, ("token", n, context), 1.0 / measure.rate(engine, sequence, context))
                engine.free_sequence(sequence)
                for prompt in prompts:
                    _least(seconds, ("first", n, prompt), measure.first_token(engine, prompt))
    for (what, n, size), taken in seconds.items():
        of = f"{name}, {n} thread{'s' * (n > 1)}"
        if what == "token":
            token = cost.decode(shape, target, size, n)
            yield Point(f"{of}, at {size} cells", "tokens/s", 1.0 / token.seconds, 1.0 / taken, token.bound)
        else:
            first = cost.first_token(shape, target, size, n)
            yield Point(f"{of}, first token of {size}", "s", first.seconds, taken, first.bound)


def _least(seconds: dict[tuple[str, int, int], float], key: tuple[str, int, int], taken: float) -> None:
    seconds[key] = min(taken, seconds.get(key, taken))


def _result(point: Point, quick: bool) -> Result:
    return Result(
        name=f"{point.name} ({point.bound})",
        requirement="0.8 to 1.2 × measured",
        unit=point.unit,
        ours=[point.predicted],
        peers={"measured": [point.measured]},
        ratios={"measured": Spread(point.ratio, 0.0)},
        ok=None if quick else abs(point.ratio - 1.0) <= WITHIN,
    )
