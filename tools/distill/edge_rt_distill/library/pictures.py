"""Pictures for the report, as SVG that stands inside a page: no files, no scripts, its text and lines in the colour of the text around."""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Array = npt.NDArray[np.floating[Any]]

_INK = "#010203"
"""Drawn so, and then replaced by the page's own colour: a page may be light or dark."""
_STYLE: Mapping[str, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "font.family": "sans-serif", "axes.titlesize": 10,
    "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
_COLOURS = ("#4c8ed9", "#d9734c", "#3fa66b", "#b06ad4", "#c2a11d", "#d4587f", "#3aa6b0", "#8c8c8c")
"""Told apart on white and on black."""
_CELL = 32


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    style: Any = dict(_STYLE)
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # The page's fonts draw the text; matplotlib's own, by which it guesses widths, lack many scripts.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def draw(name: str, title: str, width: float, height: float, plot: Callable[[Figure], object]) -> str:
    """What ``plot`` draws on a figure, as SVG. ``name``: unique in the page. ``title``: what it shows, for who cannot see it."""
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(width, height), layout="constrained")
        plot(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for before in ('id="', "url(#", 'href="#'):  # several pictures in one page must not name the same thing
        svg = svg.replace(before, f"{before}{name}-")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1)


def _image(figure: Figure, axes: Axes, values: Array, label: str, **options: Any) -> None:
    shown = axes.imshow(values, aspect="auto", interpolation="none", origin="upper", **options)
    bar = figure.colorbar(shown, ax=axes, label=label)
    if "norm" in options:
        _plain_logarithm(bar.ax.yaxis)


def _plain_logarithm(axis: Axis) -> None:
    """Labels as text: matplotlib's own for logarithms are formulas, which are off so that names may have dollar signs."""
    from matplotlib.ticker import LogFormatter

    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter())


def activation_maps(name: str, rms: Array, largest: Array) -> str:
    """RMS and largest magnitude of the residual stream [L + 1, P], both on a logarithmic scale."""
    from matplotlib.colors import LogNorm

    def plot(figure: Figure) -> None:
        for axes, values, title in zip(figure.subplots(1, 2), (rms, largest), ("root mean square", "largest magnitude"), strict=True):
            low, high = max(float(values.min()), 1e-6), max(float(values.max()), 2e-6)
            _image(figure, axes, np.maximum(values, 1e-6), "", cmap="viridis", norm=LogNorm(low, high))
            axes.set(title=title, xlabel="position", ylabel="layer entry")

    return draw(name, "Size of the residual stream by layer and position", 10, 3.2, plot)


def attention_series(name: str, maps: Array) -> str:
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
    return draw(name, "Attention by layer and head", width, max(1.5, 0.8 + (width - 0.8) * heads / layers), plot)


def histograms(name: str, title: str, label: str, series: Mapping[str, Array], log: bool = False) -> str:
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
        for place, (key, one) in enumerate(series.items()):
            counts, _ = np.histogram(np.clip(one, edges[0], edges[-1]), edges)
            axes.stairs(counts / max(1, len(one)), edges, color=_COLOURS[place % len(_COLOURS)], label=key or "all", linewidth=1.4)
        axes.set(title=title, xlabel=label, ylabel="share of tokens")
        axes.legend()

    return draw(name, title, 5.4, 3.2, plot)


def scores(name: str, series: Mapping[str, Sequence[float]]) -> str:
    """Scores of answers by domain: each a point, and their mean."""

    def plot(figure: Figure) -> None:
        axes = figure.subplots()
        for place, values in enumerate(series.values()):
            colour = _COLOURS[place % len(_COLOURS)]
            spread = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(values, place + spread, ".", color=colour, alpha=0.5)
            axes.plot([float(np.mean(values))] * 2, [place - 0.35, place + 0.35], color=colour, linewidth=2.5)
        axes.set_yticks(range(len(series)), [key or "all" for key in series])
        axes.set(title="score by domain", xlabel="score")

    return draw(name, "Score of answers by domain", 5.4, 1.2 + 0.4 * len(series), plot)


def carried(name: str, layers: Sequence[float], heads: Array) -> str:
    """What each layer [L] and head [L, H] added to a wrong answer, in nats; heads that were not left out are NaN and empty."""

    def plot(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        colours = [_COLOURS[1] if value > 0 else _COLOURS[0] for value in layers]
        left.bar(range(len(layers)), layers, color=colours)
        left.axhline(0, color=_INK, linewidth=0.6)
        left.set(title="without the layer", xlabel="layer", ylabel="fall, nats")
        limit = float(np.nanmax(np.abs(heads))) if np.isfinite(heads).any() else 1.0
        _image(figure, right, heads.T, "nats", cmap="coolwarm", vmin=-max(limit, 1e-9), vmax=max(limit, 1e-9))
        right.set(title="without the head", xlabel="layer", ylabel="head")

    return draw(name, "What layers and heads added to the wrong answer", 9, 2.6, plot)
