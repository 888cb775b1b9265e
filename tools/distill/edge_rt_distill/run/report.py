"""What runs found, as one page of Markdown: every figure with the command that makes it."""

from __future__ import annotations

import itertools
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from edge_rt.hooks import DataError, available_cpus, cpu_processors
from edge_rt_distill.files import write_file
from edge_rt_distill.run.ablate import VARIANTS
from edge_rt_distill.run.config import Config, read
from edge_rt_distill.run.pipeline import ablation, steps, workshop
from edge_rt_distill.run.steps import Done, read_done

Row = Sequence[object]
_ADDED = ("the cut alone", "+ token", "+ hidden", "+ attention", "+ behaviour: all")
_MARK = "<!-- Made by `edge-rt distill report`. -->"
_INTRO = (
    "Held-out samples are of the same kinds as those learnt from and share nothing with them. KL (teacher to student) is in nats a "
    "token, top-1 the share of positions at which both find the same token likeliest, and perplexity is the student's by the "
    "teacher's. A student with fewer tokens is compared where both have read the same text, each in its own tokens: what its teacher "
    "says of one that is gone counts for the one that it is written with first, and perplexity is that of the text."
)


def write_report(files: Sequence[Path], out: Path) -> Path:
    """Write the page about some runs. What an earlier report there says of others stays: a run may have been done on another machine.

    Raises DataError for a run of which nothing is done and for a file that is no report, OSError.
    """
    sections = _sections(out) | {file.stem: "\n".join(_run(file)) for file in files}
    write_file(out, "\n".join(["# Students, as they were distilled\n", f"{_MARK}\n", f"{_INTRO}\n", *sections.values()]))
    return out


def _sections(page: Path) -> dict[str, str]:
    """What a report says of each run, by name; nothing where there is none yet."""
    if not page.exists():
        return {}
    text = page.read_text(encoding="utf-8")
    if _MARK not in text:
        raise DataError(f"{page} is not a report of runs and would be lost; name another file with --output")
    parts = ["## " + one for one in text.split("\n## ")[1:]]
    return {one.splitlines()[0].removeprefix("## "): one.rstrip("\n") + "\n" for one in parts}


def _machine() -> str:
    processor = next(cpu_processors(), None)
    return f"{available_cpus()} CPUs, {(processor and processor.model) or platform.machine()}"


def _run(file: Path) -> Iterator[str]:
    shop = workshop(file)
    names = dict.fromkeys(one.name for one in (*steps(shop), *ablation(shop)))
    found = {name: read_done(shop.folder / name) for name in names}
    done = {name: one for name, one in found.items() if one is not None}
    if not done:
        raise DataError(f"nothing of {file} is done yet; run `edge-rt distill run {file}` first")
    yield f"## {file.stem}\n"
    yield _intro(file)
    yield f"The settings that are not the usual ones: {_said(read(file))}.\n"
    yield from _student(done, shop.folder)
    yield from _levels(done, shop.folder)
    yield from _ablation(done, file)
    yield f"Times are of {_machine()}; other work may have shared it.\n"
    total = sum(one.seconds for one in done.values())
    yield _table(("step", "seconds"), [*((name, f"{one.seconds:.0f}") for name, one in done.items()), ("all", f"{total:.0f}")])


def _intro(file: Path) -> str:
    """What a run's file says of itself: the comment that it begins with, the commands in it as code."""
    lines = [line[1:] for line in itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())]
    words = " ".join(line.strip() for line in lines if not line.startswith("  "))
    commands = [line.strip() for line in lines if line.startswith("  ")] or [f"edge-rt distill run {file.name}"]
    return (f"{words}\n\n" if words else "") + "\n".join(["```sh", *commands, "```\n"])


def _said(config: Config) -> str:
    """The settings that are not the usual ones."""
    return ", ".join(_changes(config, Config(), "")) or "none"


def _changes(config: Any, usual: Any, prefix: str) -> Iterator[str]:
    for one in fields(config):
        value, standard = getattr(config, one.name), getattr(usual, one.name)
        if not one.metadata:
            yield from _changes(value, standard, f"{prefix}{one.name}.")
        elif value != standard:
            yield f"`{prefix}{one.name} = {json.dumps(value)}`"


def _student(done: Mapping[str, Done], folder: Path) -> Iterator[str]:
    """What became of the teacher on the way, and the file."""
    fewer, cut, taught, quantised = (
        done[name].summary if name in done else {} for name in ("vocabulary", "cut", "distil", "quantise")
    )  # fmt: skip
    verified = folder / "verify" / "verify.json"
    facts = json.loads(verified.read_text(encoding="utf-8")) if "verify" in done else {}
    through = (
        ("fewer tokens and nothing else", fewer), ("cut", cut.get("unrepaired")), ("cut and repaired", cut), ("after the levels", taught),
        ("quantised", quantised), ("in the runtime, compensation off", facts.get("off")),
        ("in the runtime, corrected", facts.get("corrected")),
    )  # fmt: skip
    rows = [
        (name, f"{one['kl']:.4f}", f"{one['top1']:.3f}", f"{one['perplexity_ratio']:.3f}") for name, one in through if one and "kl" in one
    ]  # fmt: skip
    if rows:
        yield _table(("", "KL", "top-1", "perplexity"), rows)
    if cut:
        yield f"{cut['parameters']:,} parameters, {cut['share']:.1%} of the teacher's."
    if "tokens" in fewer:
        yield f"{fewer['tokens']:,} tokens, {fewer['share']:.0%} of the teacher's, which make held-out texts {fewer['longer']:.1%} longer."
    if facts:
        side = f", corrections {facts['compensation bytes']:,}" if "compensation" in facts else ""
        apart = facts["kl from stock llama.cpp"]
        yield f"The file has {facts['bytes']:,} bytes{side}; without corrections stock llama.cpp is {apart:.2g} nats away.\n"


def _levels(done: Mapping[str, Done], folder: Path) -> Iterator[str]:
    if "distil" not in done:
        return
    results = json.loads((folder / "distil" / "levels.json").read_text(encoding="utf-8"))
    rows = [
        (
            one["name"], "open" if one["opened"] else "**FAIL**", one["ended_by"], one["steps"], _error(one["before"], one["name"]),
            _error(one["errors"], one["name"]), one["reason"],
        )
        for one in results
    ]  # fmt: skip
    if rows:
        yield _table(("level", "gate", "ended by its", "steps", "held-out error before", "after", "why the gate is shut"), rows)


def _error(errors: Mapping[str, float], name: str) -> str:
    return f"{errors[name]:.4f}" if name in errors else ""


def _ablation(done: Mapping[str, Done], file: Path) -> Iterator[str]:
    rows: list[Row] = []
    for name, count in VARIANTS.items():
        if name in done:
            one = done[name].summary
            kl = f"{one['kl']:.4f} ± {one['kl error']:.4f}"
            rows.append((_ADDED[count], one["tokens"], kl, f"{one['top1']:.3f}", f"{one['perplexity_ratio']:.3f}", f"{one['score']:.4f}"))
    if rows:
        yield f"What each level adds, at equal tokens (`edge-rt distill ablate {file.name}`):\n"
        yield _table(("levels", "tokens", "KL", "top-1", "perplexity", "score"), rows)


def _table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines) + "\n"
