"""Writes what code knows into the docs of the distillation tool; with --check only says whether they are current.

The settings of a run into docs/distill.md, metrics and checks into docs/evaluation.md, metrics of replays into docs/replay.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools" / "distill"))


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


def metrics() -> str:
    """Every metric: what it measures, by which forms, what it cannot see, and how its examples are told apart."""
    from edge_rt_distill.sandbox.metrics import FORMS, METRICS
    from edge_rt_distill.sandbox.suites import built_in, validations

    known = validations(built_in())
    lines = ["| metric | what it measures | forms | items | crafted answers told apart | what it cannot see |", "|---|---|---|---|---|---|"]
    for name, metric in METRICS.items():
        one = known[name]
        apart = f"{one.apart} of {one.examples}" if one.examples else ""
        lines.append(f"| {name} | {metric.what} | {', '.join(metric.forms)} | {one.items} | {apart} | {metric.limits} |")
    return "\n".join([*lines, "", *(f"- **{name}**: {how}" for name, how in FORMS.items()), ""])


def service_metrics() -> str:
    """Every metric of a replay: what it is, its unit and better direction, how it is compared and what it cannot see; ways of comparing."""
    from edge_rt_distill.replay.measures import COMPARED, METRICS

    lines = ["| metric | what it is | unit | better | compared | what it cannot see |", "|---|---|---|---|---|---|"]
    for name, one in METRICS.items():
        lines.append(f"| `{name}` | {one.what} | {one.unit} | {one.better} | {one.compared} | {one.limits} |")
    return "\n".join([*lines, "", *(f"- **{name}**: {how}" for name, how in COMPARED.items()), ""])


def checks() -> str:
    """Every kind of check, its arguments and what it holds."""
    from edge_rt_distill.data.checks import KINDS

    lines = ["| check | arguments | holds if |", "|---|---|---|"]
    for name, kind in KINDS.items():
        arguments = [f"`{key}`" for key in kind.needs] + [f"`{key}` (optional)" for key in kind.may]
        lines.append(f"| `{name}` | {', '.join(arguments)} | {' '.join((kind.apply.__doc__ or '').split()).replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, ""])


WRITTEN = {
    "settings": ("distill.md", settings), "metrics": ("evaluation.md", metrics), "checks": ("evaluation.md", checks),
    "service metrics": ("replay.md", service_metrics),
}  # fmt: skip
"""Mark in a page -> the page, and what stands there."""


def main() -> int:
    """Write the pages, or check them."""
    old = []
    for mark, (page, written) in WRITTEN.items():
        target = ROOT / "docs" / page
        text = target.read_text(encoding="utf-8")
        begin, end = f"<!-- {mark}: written by `make docs` -->", f"<!-- end of the {mark} -->"
        new = f"{text[: text.index(begin) + len(begin)]}\n\n{written()}\n{text[text.index(end) :]}"
        if "--check" not in sys.argv[1:]:
            target.write_text(new, encoding="utf-8")
        elif text != new:
            old.append(str(target))
    for page in dict.fromkeys(old):
        print(f"{page} is not current; run `make docs`", file=sys.stderr)
    return 1 if old else 0


if __name__ == "__main__":
    sys.exit(main())
