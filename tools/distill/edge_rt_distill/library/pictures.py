"""Pictures for the report, as SVG that stands inside a page: no files, no scripts, its text and lines in the colour of the text around."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from edge_rt_distill import plots

Array = npt.NDArray[np.floating[Any]]

_CELL = 32


def draw(title: str, width: float, height: float, plot: Callable[[Figure], object]) -> str:
    """What ``plot`` draws on a figure, as SVG in the page's own ink: a page may be light or dark. ``title``: for who cannot see it."""
    with plots.style(text_parse_math=False, figure_facecolor="none", axes_facecolor="none", savefig_facecolor="none", legend_frameon=False):
        figure = Figure(figsize=(width, height), layout="constrained")
        plot(figure)
        return plots.svg(figure, title).replace(plots.INK, "currentColor")


def _image(figure: Figure, axes: Axes, values: Array, label: str, **options: Any) -> None:
    shown = axes.imshow(values, aspect="auto", interpolation="none", origin="upper", **options)
    bar = figure.colorbar(shown, ax=axes, label=label)
    if "norm" in options:
        _plain_logarithm(bar.ax.yaxis)


def _plain_logarithm(axis: Axis) -> None:
    """Labels as text: matplotlib's own for logarithms are formulas, which are off so that names may have dollar signs."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter())


def activation_maps(rms: Array, largest: Array) -> str:
    """RMS and largest magnitude of the residual stream [L + 1, P], both on a logarithmic scale."""

    def plot(figure: Figure) -> None:
        for axes, values, title in zip(figure.subplots(1, 2), (rms, largest), ("root mean square", "largest magnitude"), strict=True):
            low, high = max(float(values.min()), 1e-6), max(float(values.max()), 2e-6)
            _image(figure, axes, np.maximum(values, 1e-6), "", cmap="viridis", norm=LogNorm(low, high))
            axes.set(title=title, xlabel="position", ylabel="layer entry")

    return draw("Size of the residual stream by layer and position", 10, 3.2, plot)


def attention_series(maps: Array) -> str:
    """Every layer's (across) and head's (down) map [L, H, n, n], of the square root of what is attended, so that little is seen too."""
    layers, heads, n, _ = maps.shape
    step = -(-n // _CELL)
    edges = np.arange(0, n, step)
    small = np.add.reduceat(np.maximum.reduceat(maps.astype(np.float32), edges, axis=2), edges, axis=3)
    cell = small.shape[-1]
    framed = np.full((heads, cell + 1, layers, cell + 1), np.nan, np.float32)
    framed[:, :cell, :, :cell] = np.sqrt(np.minimum(small, 1.0)).transpose(1, 2, 0, 3)

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        axes.imshow(framed.reshape(heads * (cell + 1), -1), aspect="equal", interpolation="none", cmap="viridis", vmin=0, vmax=1)
        every = max(1, layers // 15)
        axes.set_xticks(np.arange(0, layers, every) * (cell + 1) + cell / 2, [str(i) for i in range(0, layers, every)])
        axes.set_yticks(np.arange(heads) * (cell + 1) + cell / 2, [str(i) for i in range(heads)])
        axes.set(xlabel="layer", ylabel="head")

    width = min(14.0, 2.0 + 0.4 * layers)
    return draw("Attention by layer and head", width, max(1.5, 0.8 + (width - 0.8) * heads / layers), plot)


def histograms(title: str, label: str, series: Mapping[str, Array], log: bool = False) -> str:
    """How values are spread, one line for each series. ``log``: a logarithmic axis of values."""

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        values = np.concatenate([*series.values()]).astype(float)
        low, high = float(values.min()), float(values.max())
        if log:
            low = max(low, 1e-8)
            edges = np.geomspace(low, max(high, low * 2), 41)
            axes.set_xscale("log")
            _plain_logarithm(axes.xaxis)
        else:
            edges = np.linspace(low, max(high, low + 1e-6), 41)
        for (key, one), colour in zip(series.items(), cycle(plots.COLOURS)):
            counts, _ = np.histogram(np.clip(one, edges[0], edges[-1]), edges)
            axes.stairs(counts / max(1, len(one)), edges, color=colour, label=key or "all", linewidth=1.4)
        axes.set(title=title, xlabel=label, ylabel="share of tokens")
        axes.legend()

    return draw(title, 5.4, 3.2, plot)


def scores(series: Mapping[str, Sequence[float]]) -> str:
    """Scores of answers by domain: each a point, and their mean."""

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (values, colour) in enumerate(zip(series.values(), cycle(plots.COLOURS))):
            spread = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(values, place + spread, ".", color=colour, alpha=0.5)
            axes.plot([float(np.mean(values))] * 2, [place - 0.35, place + 0.35], color=colour, linewidth=2.5)
        axes.set_yticks(range(len(series)), [key or "all" for key in series])
        axes.set(title="score by domain", xlabel="score")

    return draw("Score of answers by domain", 5.4, 1.2 + 0.4 * len(series), plot)


def carried(layers: Sequence[float], heads: Array) -> str:
    """What each layer [L] and head [L, H] added to a wrong answer, in nats; heads that were not left out are NaN and empty."""

    def plot(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        colours = [plots.COLOURS[1] if value > 0 else plots.COLOURS[0] for value in layers]
        left.bar(range(len(layers)), layers, color=colours)
        left.axhline(0, color=plots.INK, linewidth=0.6)
        left.set(title="without the layer", xlabel="layer", ylabel="fall, nats")
        limit = float(np.nanmax(np.abs(heads))) if np.isfinite(heads).any() else 1.0
        _image(figure, right, heads.T, "nats", cmap="coolwarm", vmin=-max(limit, 1e-9), vmax=max(limit, 1e-9))
        right.set(title="without the head", xlabel="layer", ylabel="head")

    return draw("What layers and heads added to the wrong answer", 9, 2.6, plot)
