"""The table of predictions as a picture: bars by target, as SVG, which needs no library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import ceil, floor, log10

from edge_rt.deploy.cost import Prediction

_WIDTH, _LABEL, _VALUE, _ROW, _TOP, _GAP = 760, 170, 180, 26, 58, 46
_COLOURS = {"bandwidth": "#3b6ea5", "compute": "#c4651f", "overhead": "#7a7a7a", "storage": "#7b519d", "": "#2e8b57"}
"""By what limits; a measured bar says nothing of that."""


def svg(rows: Sequence[Prediction], title: str) -> str:
    """Two groups of bars on logarithmic scales: tokens a second, and seconds to the first token."""
    context = f"at {rows[0].context:,} cells" if rows else ""
    prompt = f"of a prompt of {rows[0].prompt:,} tokens" if rows else ""
    height = 2 * (_ROW * len(rows) + _TOP) + _GAP + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    x = 10.0
    for bound, colour in _COLOURS.items():
        parts.append(f'<rect x="{x:.0f}" y="28" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14:.0f}" y="37">{bound or "measured"}</text>')
        x += 100
    rate = _bars(rows, _TOP, f"tokens/s {context}", lambda row: row.rate, lambda row: row.rate_bound, lambda v: f"{v:.3g}")
    top = 2 * _TOP + _ROW * len(rows) + _GAP - _TOP
    first = _bars(rows, top, f"seconds to the first token {prompt}", lambda row: row.first, lambda row: row.first_bound, _seconds)
    return "\n".join([*parts, *rate, *first, "</svg>"]) + "\n"


def _seconds(value: float) -> str:
    return f"{value:.3g} s"


def _bars(
    rows: Sequence[Prediction],
    top: float,
    title: str,
    value: Callable[[Prediction], float],
    bound: Callable[[Prediction], str],
    shown: Callable[[float], str],
) -> list[str]:
    values = [value(row) for row in rows] or [1.0]
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    low, high = (low - 1, high) if low >= high or min(values) < 1.5 * 10**low else (low, high)
    room = _WIDTH - _LABEL - _VALUE

    def at(number: float) -> float:
        return room * (log10(number) - low) / (high - low)

    parts = [f'<text x="10" y="{top + 14:.0f}" font-weight="bold">{escape(title)}</text>']
    bottom = top + 24 + _ROW * len(rows)
    for power in range(low, high + 1):
        x = _LABEL + at(10.0**power)
        parts.append(f'<line x1="{x:.1f}" y1="{top + 20:.0f}" x2="{x:.1f}" y2="{bottom:.0f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 12:.0f}" fill="#666666" text-anchor="middle">{10.0**power:g}</text>')
    for i, row in enumerate(rows):
        y = top + 24 + _ROW * i
        name = row.target if row.threads == 1 else f"{row.target}, {row.threads} threads"
        word = "measured" if row.measured else f"predicted, {bound(row)}"
        parts.append(f'<text x="10" y="{y + 15:.0f}">{escape(name)}</text>')
        colour = _COLOURS["" if row.measured else bound(row)]
        parts.append(f'<rect x="{_LABEL}" y="{y + 3:.0f}" width="{max(1.0, at(value(row))):.1f}" height="{_ROW - 8}" fill="{colour}"/>')
        parts.append(f'<text x="{_LABEL + at(value(row)) + 6:.1f}" y="{y + 15:.0f}">{shown(value(row))} ({word})</text>')
    return parts
