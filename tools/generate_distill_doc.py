"""Writes the settings of a run into docs/distill.md from the data classes that check them; with --check only says whether it is current."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "distill.md"
sys.path.insert(0, str(ROOT / "tools" / "distill"))
BEGIN, END = "<!-- settings: written by `make docs` -->", "<!-- end of the settings -->"


def settings() -> str:
    """Every table of the file, as Markdown."""
    from edge_rt_distill.run.config import Config

    return "\n".join(_tables(Config(), ""))


def _tables(values: Any, name: str) -> Iterator[str]:
    own = [one for one in fields(values) if one.metadata]
    if own:
        yield f"### {f'`[{name}]`' if name else 'At the top'}\n"
        yield "| | | |\n|---|---|---|"
        yield from (f"| `{one.name}` | {_help(one.metadata)} | `{json.dumps(getattr(values, one.name))}` |" for one in own)
        yield ""
    for one in fields(values):
        if not one.metadata:
            yield from _tables(getattr(values, one.name), f"{name}.{one.name}".lstrip("."))


def _help(metadata: Any) -> str:
    choices = f" One of {', '.join(f'`{choice}`' for choice in metadata['choices'])}." if metadata["choices"] else ""
    return f"{metadata['help']}{choices}"


def main() -> int:
    """Write the page, or check it."""
    text = TARGET.read_text(encoding="utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    new = f"{text[:start]}\n\n{settings()}\n{text[end:]}"
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(new, encoding="utf-8")
        return 0
    if text == new:
        return 0
    print(f"{TARGET} is not current; run `make docs`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
