"""Pictures of measures, as SVG text to stand in a page: heat maps, bars, curves. No window is opened; matplotlib's state stays as it was.

Labels are text, not outlines, in whatever font the reader has: a Chinese name shows where the machine that drew it has no Chinese font.
Margins are therefore reckoned from the labels' characters.
"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

INK, FAINT = "#333333", "#dddddd"
COLOURS = ("#4c8ed9", "#d9734c", "#3fa66b", "#b06ad4", "#c2a11d", "#d4587f", "#3aa6b0", "#8c8c8c")
"""Told apart on white and on black."""
FONTS = "'DejaVu Sans', 'Noto Sans', 'Noto Sans CJK SC', 'Source Han Sans SC', 'PingFang SC', 'Microsoft YaHei', sans-serif"
"""What a reader's machine shows text with: the first of these that it has, by character."""
_SIZE, _TITLE = 9, 11
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "edge-rt", "font.family": ["DejaVu Sans"], "font.size": _SIZE, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK, "axes.spines.top": False, "axes.spines.right": False,
}  # fmt: skip
_POINTS = 72.0
_NAMED = 40
"""So many ticks have room for a name each."""


class Axes(NamedTuple):
    """What stands around a picture: title, labels of the axes, names along them (() numbers them), and the picture's size in inches."""

    title: str
    x: str = ""
    y: str = ""
    x_names: Sequence[str] = ()
    y_names: Sequence[str] = ()
    width: float = 7.5
    height: float = 0.0


def heat_map(values: ArrayLike, axes: Axes, *, log: bool = False, unit: str = "", limits: tuple[float, float] | None = None) -> str:
    """A table [rows, columns] as colours, row 0 on top. NaN is left white; with ``log`` so is what is not positive.

    ``limits``: values of the lightest and darkest colour; None: the least and greatest there are.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    shown = np.where(np.isfinite(table) & ((table > 0) | (not log)), table, np.nan)
    low, high = limits or ((float(np.nanmin(shown)), float(np.nanmax(shown))) if np.isfinite(shown).any() else (1.0, 10.0))
    if high <= low:
        high = low * 10 if log and low > 0 else low + 1.0
    height = axes.height or min(7.0, max(1.6, 0.17 * len(table) + 0.9))
    with style():
        figure, plot = _figure(axes, height, right=1.2)
        norm = LogNorm(low, high) if log else Normalize(low, high)
        image = plot.imshow(shown, aspect="auto", cmap="YlGnBu", norm=norm, interpolation="nearest")
        plot.spines[:].set_visible(False)
        place = plot.get_position()
        bar = figure.colorbar(image, cax=figure.add_axes((place.x1 + 0.015, place.y0, 0.013, place.height)))
        bar.outline.set_visible(False)
        bar.set_label(unit)
        _ticks(plot, axes, table.shape[1], len(table))
        return svg(figure, axes.title)


def bars(
    values: Mapping[str, ArrayLike], axes: Axes, *, errors: ArrayLike | None = None, log: bool = False, mark: Iterable[int] = ()
) -> str:
    """Bars side by side: series by name, one bar of each at every place. What is not finite has no bar.

    ``errors``: half a whisker's length at each place, of the first series. ``mark``: places whose first bar is of another colour.
    """
    rows = {name: np.asarray(value, dtype=np.float64) for name, value in values.items()}
    count = max((len(row) for row in rows.values()), default=0)
    with style():
        figure, plot = _figure(axes, axes.height or 2.6)
        wide = 0.8 / max(1, len(rows))
        for number, (name, row) in enumerate(rows.items()):
            at = np.arange(len(row)) - 0.4 + wide * (number + 0.5)
            drawn = plot.bar(at, np.where(np.isfinite(row), row, 0.0), wide, color=COLOURS[number % len(COLOURS)], label=name)
            if number == 0:
                for place in mark:
                    drawn[place].set_color(COLOURS[1])
                if errors is not None:
                    half = np.nan_to_num(np.asarray(errors, dtype=np.float64))
                    plot.errorbar(at, np.nan_to_num(row), half, fmt="none", ecolor=INK, elinewidth=0.8)
        _frame(plot, log, positive=any((row > 0).any() for row in rows.values()))
        plot.set_xlim(-0.6, count - 0.4)
        _ticks(plot, axes, count, None)
        if len(rows) > 1:
            plot.legend(frameon=False, fontsize=_SIZE - 1)
        return svg(figure, axes.title)


def curves(series: Mapping[str, tuple[ArrayLike, ArrayLike]], axes: Axes, *, log: bool = False, log_x: bool = False) -> str:
    """Lines by name, each of places and values; points that are not finite leave a gap."""
    with style():
        figure, plot = _figure(axes, axes.height or 2.8)
        positive = False
        for number, (name, (at, values)) in enumerate(series.items()):
            row = np.asarray(values, dtype=np.float64)
            row = np.where(np.isfinite(row), row, np.nan)
            positive = positive or bool((row > 0).any())
            line = ("-", "--", ":")[number // len(COLOURS) % 3]
            dot = "o" if len(row) < 25 else None
            plot.plot(np.asarray(at), row, line, color=COLOURS[number % len(COLOURS)], label=name, linewidth=1.4, marker=dot, markersize=3)
        _frame(plot, log, positive)
        if log_x and any((np.asarray(at) > 0).any() for at, _ in series.values()):
            plot.set_xscale("log")
        if axes.x_names:
            _ticks(plot, axes, len(axes.x_names), None)
        if len(series) > 1:
            plot.legend(frameon=False, fontsize=_SIZE - 1, ncols=1 + len(series) // 7)
        return svg(figure, axes.title)


def radar(series: Mapping[str, ArrayLike], axes: Axes) -> str:
    """Values from 0 (the middle) to 1 along a spoke each, ``axes.x_names`` around; series by name."""
    angles = np.linspace(0, 2 * np.pi, len(axes.x_names), endpoint=False)
    with style():
        figure = Figure(figsize=(axes.width, axes.height or 5.0))
        FigureCanvasSVG(figure)
        plot: Any = figure.add_subplot(projection="polar")
        plot.set_title(axes.title, loc="left", fontsize=_TITLE)
        plot.set_theta_offset(np.pi / 2)
        plot.set_theta_direction(-1)
        plot.set_ylim(0, 1)
        plot.set_yticks((0.25, 0.5, 0.75, 1.0), labels=())
        plot.set_xticks(angles, axes.x_names)
        plot.grid(color=FAINT, linewidth=0.6)
        for number, (name, values) in enumerate(series.items()):
            row = np.clip(np.nan_to_num(np.asarray(values, dtype=np.float64)), 0, 1)
            colour = COLOURS[number % len(COLOURS)]
            plot.plot(np.append(angles, angles[:1]), np.append(row, row[:1]), color=colour, linewidth=1.4, label=name)
            plot.fill(angles, row, color=colour, alpha=0.12)
        plot.legend(frameon=False, fontsize=_SIZE - 1, loc="lower left", bbox_to_anchor=(1.05, 0.0))
        return svg(figure, axes.title)


def _frame(plot: Any, log: bool, positive: bool) -> None:
    if log and positive:
        plot.set_yscale("log")
    plot.grid(axis="y", color=FAINT, linewidth=0.6)
    plot.set_axisbelow(True)


def _figure(axes: Axes, height: float, right: float = 0.15) -> tuple[Figure, Any]:
    """A figure with one plot whose margins have room for the names; ``right``: inches beside it."""
    turned = _turned(axes.x_names)
    left = 0.55 + max((_inches(name) for name in _few(axes.y_names)), default=0.25)
    below = 0.5 + (max((_inches(name) for name in axes.x_names), default=0.0) if turned else 0.1)
    total = height + below + 0.35
    figure = Figure(figsize=(axes.width, total))
    FigureCanvasSVG(figure)
    left = min(left, axes.width / 2)
    plot = figure.add_axes((left / axes.width, below / total, (axes.width - left - right) / axes.width, height / total))
    plot.set_title(axes.title, loc="left", fontsize=_TITLE)
    plot.set_xlabel(axes.x)
    plot.set_ylabel(axes.y)
    return figure, plot


def _ticks(plot: Any, axes: Axes, columns: int, rows: int | None) -> None:
    for count, names, axis in ((columns, axes.x_names, plot.xaxis), (rows, axes.y_names, plot.yaxis)):
        if count is None:
            continue
        every = max(1, -(-count // (_NAMED if names else 16)))
        at = list(range(0, count, every))
        axis.set_ticks(at, [names[place] for place in at] if len(names) == count else [str(place) for place in at])
        axis.set_tick_params(length=2)
    if _turned(axes.x_names):
        plot.tick_params(axis="x", rotation=90)


def _turned(names: Sequence[str]) -> bool:
    """Names that are too long to stand side by side."""
    return sum(map(_inches, names)) > 5


def _few(names: Sequence[str]) -> Sequence[str]:
    return names[:: max(1, -(-len(names) // _NAMED))]


def _inches(text: str) -> float:
    """How much room a text takes: a Chinese character is about as wide as high, a Latin one two thirds of that."""
    return sum(1.05 if unicodedata.east_asian_width(letter) in "WF" else 0.64 for letter in text) * _SIZE / _POINTS


@contextmanager
def style(**more: Any) -> Iterator[None]:
    """While open, figures look as all of the tool's do. ``more``: matplotlib's settings by name, dots as underscores."""
    changed: Any = {**_STYLE, **{name.replace("_", ".", 1): value for name, value in more.items()}}
    with matplotlib.rc_context(changed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's font shows it
        yield


def svg(figure: Figure, title: str) -> str:
    """The figure without the XML prologue, its ids made the page's only ones. ``title``: what it shows, for who cannot see it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", text)  # made of its content: two scales of one colouring would have the same
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    text = re.sub(r'\bid="', f'id="{mark}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}-", text)
    text = re.sub(r"(font(?:-family)?:[^;\"]*?)'DejaVu Sans'(?:, [^;\"]*)?", lambda found: found[1] + FONTS, text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{_quoted(title)}" ', 1)


def _quoted(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
