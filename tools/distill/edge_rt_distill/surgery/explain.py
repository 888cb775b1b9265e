"""A cut and its repair as text for people, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from edge_rt_distill.model.architecture import Architecture
from edge_rt_distill.surgery.cut import Cut, runs, student_architecture
from edge_rt_distill.surgery.probe import Measured
from edge_rt_distill.surgery.repair import Repair


def explain(cut: Cut, teacher: Architecture) -> str:
    """What the student keeps, what it takes, and why: three tables."""
    student = student_architecture(teacher, cut)
    rows = [(name, _number(old), _number(new), _share(new, old)) for name, old, new in _sizes(cut, teacher, student)]
    parts = [table(("", "teacher", "student", "share"), rows)]
    if cut.reasons:
        parts.append("\n".join(f"- {reason}" for reason in cut.reasons))
    layers = [
        (str(i), runs(one.sources), runs(one.groups), runs(one.heads), str(len(one.channels)), one.reason)
        for i, one in enumerate(cut.layers)
    ]
    parts.append(table(("layer", "teacher's", "key-value heads", "heads", "channels", "why"), layers))
    if cut.dropped:
        parts.append(table(("dropped", "why"), [(str(layer), reason) for layer, reason in sorted(cut.dropped.items())]))
    compared = [one for one in (cut.chosen, *cut.others) if one is not None]
    if len(compared) > 1:
        sizes = [(one.layers, one.groups, one.groups * one.heads, one.ffn, one.width) for one in compared]
        found = [(one.name, *map(str, size), f"{one.loss:.3g}") for one, size in zip(compared, sizes, strict=True)]
        parts.append(table(("cuts", "layers", "key-value heads", "heads", "channels", "width", "predicted nats"), found))
    return "\n\n".join(parts) + "\n"


def explain_repair(repair: Repair) -> str:
    """What least-squares repair did to each matrix."""
    said = f"Divergence on passages kept apart: {repair.before:.4g} nats before, {repair.after:.4g} after"
    said += "; undone, as it did not help.\n" if repair.undone else ".\n"
    rows = [
        (one.site, f"{one.before:.3g}", f"{one.after:.3g}", "" if one.ridge is None else f"{one.ridge:g}", one.note) for one in repair.sites
    ]
    return said + "\n" + table(("site", "error before", "after", "ridge", ""), rows) + "\n"


def explain_measured(found: Sequence[Measured]) -> str:
    """Cuts that were made and measured, beside what was predicted."""
    rows = [(one.cut.chosen.name if one.cut.chosen else "by hand", f"{one.predicted:.3g}", f"{one.divergence:.3g}") for one in found]
    return table(("cuts", "predicted nats", "measured nats"), rows) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of even width."""
    lines = [head, *rows]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]
    made = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([made[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *made[1:]])


def _sizes(cut: Cut, teacher: Architecture, student: Architecture) -> list[tuple[str, float, float]]:
    old, new = (a.layers[a.owner(0)] for a in (teacher, student))
    channels = [fmean(shape.ffn for shape in a.layers) for a in (teacher, student)]
    found: list[tuple[str, float, float]] = [
        ("layers", len(teacher.layers), len(student.layers)), ("width", teacher.width, student.width),
        ("key-value heads", old.kv_heads, new.kv_heads), ("heads", old.heads, new.heads), ("channels", channels[0], channels[1]),
    ]  # fmt: skip
    if cut.teacher_cost is not None and cut.cost is not None:
        names = (("parameters", "parameters"), ("bytes of the file (projected)", "bytes"), ("time of a token (projected)", "time"))
        found += [(said, getattr(cut.teacher_cost, name), getattr(cut.cost, name)) for said, name in names]
    else:
        found.append(("parameters", teacher.parameters(), student.parameters()))
    return [(name, float(a), float(b)) for name, a, b in found]


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _share(new: float, old: float) -> str:
    return f"{new / old:.1%}" if old else ""
