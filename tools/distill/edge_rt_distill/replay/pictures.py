"""Pictures of runs, as SVG in the page's own ink: what happened when, how times are spread, what prompts of some length cost."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from edge_rt_distill import plots
from edge_rt_distill.library.pictures import draw
from edge_rt_distill.replay.columns import Floats, Run

_BINS = 120
"""Spans of time of a timeline; none shorter than a second."""


def timeline(name: str, run: Run) -> str:
    """Requests on their way, tokens a second and memory over time; faults are lines down."""
    found = [("on their way", _on_their_way(run)), ("tokens/s", _tokens(run)), ("memory, MB", _memory(run))]
    known = [(label, series) for label, series in found if len(series[0])]

    def plot(figure: Figure) -> None:
        rows = figure.subplots(len(known), 1, sharex=True)
        for (label, series), axes, colour in zip(known, rows, plots.COLOURS[: len(known)], strict=True):
            axes.plot(*series, color=colour, linewidth=1.2, drawstyle="steps-post")
            axes.set(ylabel=label)
            axes.set_ylim(bottom=0)
            for fault in run.results.faults:
                axes.axvline(fault.at, color=plots.COLOURS[5], linewidth=1.0, linestyle="--")
        for fault in run.results.faults:
            figure.axes[0].text(
                fault.at, 1.0, fault.what, transform=figure.axes[0].get_xaxis_transform(), va="bottom", color=plots.COLOURS[5]
            )
        figure.axes[-1].set(xlabel="seconds after the begin")
        figure.suptitle(name, x=0.01, ha="left")

    return draw(f"What happened when: {name}", 10, 0.6 + 1.5 * len(known), plot)


def spread(runs: Mapping[str, Run]) -> str:
    """Which share of first tokens, and of times between tokens, came within how long."""
    first = {name: _distribution(one.first, np.ones(len(one.first))) for name, one in runs.items()}
    gaps = {name: _distribution(one.gaps.seconds, one.gaps.tokens) for name, one in runs.items()}

    def plot(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, series, label in ((left, first, "seconds to the first token"), (right, gaps, "seconds between tokens")):
            for (name, line), colour in zip(series.items(), cycle(plots.COLOURS)):
                axes.plot(*line, color=colour, label=name, linewidth=1.4)
            axes.set(xlabel=label, ylim=(0, 1.02))
            if not any(len(values) for values, _ in series.values()):
                continue  # nothing to be logarithmic about
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # the usual labels are formulas, which are off
            axes.xaxis.set_minor_locator(NullLocator())
        left.set(ylabel="share")
        figure.legend(*right.get_legend_handles_labels(), loc="outside upper left")

    return draw("How times to the first token and between tokens are spread", 10, 3.2, plot)


def by_prompt(runs: Mapping[str, Run]) -> str:
    """Time to the first token and speed after it, by the length of the prompt; a point is a request."""

    def plot(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for (name, run), colour in zip(runs.items(), cycle(plots.COLOURS)):
            with np.errstate(divide="ignore"):
                speed = 1 / np.where(run.pace > 0, run.pace, np.nan)
            left.plot(run.prompt, run.first, ".", color=colour, label=name, alpha=0.6)
            right.plot(run.prompt, speed, ".", color=colour, label=name, alpha=0.6)
        left.set(xlabel="prompt tokens", ylabel="seconds to the first token", ylim=(0, None))
        right.set(xlabel="prompt tokens", ylabel="tokens a second after it", ylim=(0, None))
        figure.legend(*right.get_legend_handles_labels(), loc="outside upper left")

    return draw("Time to the first token and speed by length of the prompt", 10, 3.2, plot)


def _on_their_way(run: Run) -> tuple[Floats, Floats]:
    changes = np.array(sorted([(one.sent, 1.0) for one in run.outcomes] + [(one.ended, -1.0) for one in run.outcomes]))
    return changes[:, 0], np.cumsum(changes[:, 1])


def _tokens(run: Run) -> tuple[Floats, Floats]:
    pieces = [piece for one in run.outcomes for piece in one.pieces]
    counts = np.array([count for one in run.outcomes for count in one.tokens], dtype=np.float64)
    last = max(one.ended for one in run.outcomes)
    edges = np.linspace(0, max(last, 1.0), max(1, min(_BINS, int(last))) + 1)
    told, _ = np.histogram(pieces, edges, weights=counts)
    rate = told / np.diff(edges)
    return edges, np.append(rate, rate[-1:])


def _memory(run: Run) -> tuple[Floats, Floats]:
    known = np.array([(one.at, one.memory / 1e6) for one in run.results.readings if one.memory is not None]).reshape(-1, 2)
    return known[:, 0], known[:, 1]


def _distribution(values: Floats, weights: Floats) -> tuple[Floats, Floats]:
    known = ~np.isnan(values)
    order = np.argsort(values[known], kind="stable")
    share = np.cumsum(weights[known][order])
    return np.maximum(values[known][order], 1e-4), share / share[-1:]
