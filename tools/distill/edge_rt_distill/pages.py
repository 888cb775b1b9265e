"""Pages of HTML that load nothing and run nothing: their frame, their tables, text that is no markup."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title><style>
:root { color-scheme: light dark; --line: #8886; --ink: #1a1a1a; --paper: #fff; --for: 214, 69, 65; --against: 60, 120, 216 }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e4e4; --paper: #16181c; --for: 240, 110, 100; --against: 100, 160, 250 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top }
td:first-child, td:nth-child(2) { white-space: nowrap }
td.number { text-align: right; font-variant-numeric: tabular-nums }
svg { max-width: 100%; height: auto } svg image { image-rendering: pixelated }
code, .tokens { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere }
.tokens { white-space: pre-wrap; border: 1px solid var(--line); padding: .6rem; margin: .5rem 0 }
.answer { border-bottom: 2px solid currentColor }
.for { background: rgba(var(--for), var(--a)) } .against { background: rgba(var(--against), var(--a)) }
details { margin: .5rem 0 } .note { opacity: .75 }
</style></head><body>
BODY
</body></html>
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A page of parts that are markup."""
    start, middle, end = re.split("TITLE|BODY", _PAGE)
    return "".join((start, text(title), middle, "\n".join(parts), end))


def text(value: object) -> str:
    """Anything as text of the page; nothing in it is markup."""
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers stand to the right."""
    cells = "".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{text(name)}</th>' for name in head)}</tr>{cells}</table>"


def _cell(value: object) -> str:
    return f'<td class="number">{text(value)}</td>' if isinstance(value, int | float) else f"<td>{text(value)}</td>"
