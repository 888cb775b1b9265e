"""The evaluation suites on four models of which it is known how good they are: whether they are ordered rightly, and the same twice."""

from __future__ import annotations

import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

from bench import models
from bench.processes import reach_tool
from bench.results import Result, Settings, kept

ZEROED = 15
"""The layer that the damaged one lacks, of 30."""
WHOLE, DAMAGED = "F16", f"Q4_0 with layer {ZEROED} of 30 zeroed"
MODELS = (WHOLE, "Q8_0", "Q4_0", DAMAGED)
"""From the best to the worst."""
AGAIN = "Q4_0"
"""Asked twice."""
MOST = 600
"""Seconds that a model may take."""


def run(settings: Settings) -> list[Result]:
    """What each scores and kept, and whether each is worse than the one before it. Results stay beside those of the benchmark, for
    `edge-rt eval report`.
    """
    reach_tool()
    from edge_rt_distill.sandbox.suites import DOMAINS, built_in

    suites = built_in(settings.pick(DOMAINS, DOMAINS[:1]))
    out = kept(settings, "sandbox")
    found = {name: _asked(_file(settings, name), name, suites, out) for name in MODELS}
    again = _asked(_file(settings, AGAIN), f"{AGAIN} again", suites, out)
    apart = sum(one != other for one, other in zip(found[AGAIN].outcomes, again.outcomes, strict=True))
    twice = Result(
        f"sandbox: {AGAIN}, twice", "the same results", "", [float(apart)], ok=apart == 0,
        shown=f"{apart} of {len(again.outcomes)} items answered otherwise",
    )  # fmt: skip
    return [*_scored(found, suites), *_ordered(found, suites), twice]


def _file(settings: Settings, name: str) -> Path:
    return models.without_layer(settings, "Q4_0", ZEROED) if name == DAMAGED else models.smollm2(settings, name)


def _asked(path: Path, name: str, suites: Any, out: Path) -> Any:
    from edge_rt_distill.sandbox.engines import open_engine
    from edge_rt_distill.sandbox.running import run as ask
    from edge_rt_distill.sandbox.running import write_results

    with closing(open_engine(str(path))) as engine:
        results = ask(engine, suites)
    write_results(out / f"{name}.json", results)
    return results


def _scored(found: dict[str, Any], suites: Any) -> list[Result]:
    """Score, what was kept of the best, and seconds."""
    from edge_rt_distill.sandbox.scores import compare, scores

    results = []
    for name, one in found.items():
        whole = compare(found[WHOLE], one, suites).whole
        score = scores(one, suites)["all"]
        said = f"score {score}; kept {whole.retention} ({whole.counted} of {whole.cells} cells count); {one.seconds:.0f} s"
        results.append(Result(f"sandbox: {name}", f"at most {MOST} s", "", [score.value], ok=one.seconds <= MOST, shown=said))
    return results


def _ordered(found: dict[str, Any], suites: Any) -> list[Result]:
    """Each beside the next: it must not surely be worse."""
    from edge_rt_distill.sandbox.scores import difference

    results = []
    for better, worse in itertools.pairwise(MODELS):
        lost = difference(found[worse], found[better], suites)
        sure = "surely better" if lost.low > 0 else "within noise"
        said = f"{lost}: {better} is {sure}"
        results.append(Result(f"sandbox: {better} over {worse}", "not surely worse", "", [lost.value], ok=lost.high >= 0, shown=said))
    return results
