"""``edge-rt eval``: the commands. What takes long to load is loaded when a command runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from edge_rt_distill.sandbox.scores import Comparison, Kept
    from edge_rt_distill.sandbox.suites import Suite

HELP = """Measure what a model kept: eight domains, sixteen metrics, English and Chinese.

\b
  edge-rt eval run smollm2 -o teacher.json              ask every item of the suites
  edge-rt eval run student.gguf -o student.json
  edge-rt eval compare teacher.json student.json        what was kept, with intervals
  edge-rt eval report teacher.json student.json         a page with pictures and both answers to each item
  edge-rt eval check mine.jsonl                         whether a suite of your own is sound
"""
_SUITES = typer.Option("--suite", "-s", metavar="NAME|FILE", help="A domain, or a file of your own; all domains if left out. Repeatable.")
_SPLIT = typer.Option("--split", help="Items that may steer training (steer), those that only judge (sealed), or all.")


def add(app: typer.Typer) -> None:
    """Add ``eval`` to the command line."""
    commands = typer.Typer(name="eval", help=HELP, no_args_is_help=True, rich_markup_mode=None)
    commands.command("run")(run)
    commands.command("compare")(compare)
    commands.command("report")(report)
    commands.command("check")(check)
    commands.command("metrics")(metrics)
    app.add_typer(commands)


def run(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF, or a name from `edge-rt models`.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the results.")] = Path("results.json"),
    suite: Annotated[Optional[list[str]], _SUITES] = None,  # noqa: UP045
    split: Annotated[str, _SPLIT] = "steer",
    engine: Annotated[Optional[str], typer.Option("--engine", help="Who runs it, e.g. llama_cpp; edge-rt if left out.")] = None,  # noqa: UP045
) -> None:
    """Ask a model every item, write what it said and what that is worth, and print its scores."""
    from contextlib import closing
    from functools import partial

    from edge_rt.hooks import OptionError, resolve_model
    from edge_rt_distill.run.progress import Shown
    from edge_rt_distill.sandbox.engines import InProcess
    from edge_rt_distill.sandbox.running import SPLITS, write_results
    from edge_rt_distill.sandbox.running import run as ask
    from edge_rt_distill.sandbox.scores import scores

    if split not in SPLITS:
        raise OptionError(f"no split is named {split}; choose {', '.join(SPLITS)}")
    suites, shown = _suites(suite), Shown()
    with closing(InProcess(resolve_model(Path(model)), engine=engine)) as one:
        try:
            results = ask(one, suites, split, told=partial(shown, "eval", "asks"))
        finally:
            shown.close()
    write_results(output, results)
    typer.echo(f"{len(results.outcomes)} items in {results.seconds:.0f} s; results in {output}\n")
    for name, found in scores(results, suites).items():
        typer.echo(f"{name:14} {found}")


def compare(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="Results of the teacher.")],
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="Results of the student.")],
    suite: Annotated[Optional[list[str]], _SUITES] = None,  # noqa: UP045
    least: Annotated[float, typer.Option("--min-retention", min=0, max=2, help="Exit with 1 if less was kept.")] = 0.0,
) -> None:
    """Say what a student kept of its teacher by metric and domain, with intervals of 95 %; chance counts as nothing."""
    from edge_rt_distill.sandbox.running import read_results
    from edge_rt_distill.sandbox.scores import OTHER_PROMPTS, fails
    from edge_rt_distill.sandbox.scores import compare as compared

    left, right = read_results(teacher), read_results(student)
    found = compared(left, right, _suites(suite))
    _table(found)
    if left.facts.template != right.facts.template:
        typer.echo(OTHER_PROMPTS)
    reasons = fails(found, least) if least else []
    for reason in reasons:
        typer.echo(f"FAIL: {reason}")
    if reasons:
        raise typer.Exit(1)


def report(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="Results of the teacher.")],
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="Results of the student.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")] = Path("report.html"),
    suite: Annotated[Optional[list[str]], _SUITES] = None,  # noqa: UP045
) -> None:
    """Write a page of HTML: what was kept by metric and domain, pictures, and each item with both answers, the worst losses first."""
    from edge_rt_distill.sandbox.report import write_report
    from edge_rt_distill.sandbox.running import read_results

    write_report(read_results(teacher), read_results(student), _suites(suite), output)
    typer.echo(f"wrote {output}")


def check(files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Suites: JSONL, an item a line.")]) -> None:
    """Say whether suites are sound: their form, and whether the checks of each item tell its good answers from its bad ones."""
    from edge_rt_distill.sandbox.suites import faults, read_suite

    found = 0
    for file in files:
        suite = read_suite(file)
        mistakes = faults(suite)
        found += len(mistakes)
        typer.echo(f"{file}: {len(suite.items)} items, {len(mistakes)} faults")
        for mistake in mistakes:
            typer.echo(f"  {mistake}")
    if found:
        raise typer.Exit(1)


def metrics() -> None:
    """List the metrics: what each measures, how, what it cannot see, and how well it tells crafted answers apart."""
    from edge_rt_distill.sandbox.metrics import FORMS, METRICS
    from edge_rt_distill.sandbox.suites import built_in, validations

    known = validations(built_in())
    for name, metric in METRICS.items():
        one = known[name]
        apart = f", {one.apart} of {one.examples} told apart" if one.examples else ""
        typer.echo(f"{name} ({', '.join(metric.forms)}; {one.items} items{apart})\n  {metric.what}\n  {metric.limits}")
    for name, how in FORMS.items():
        typer.echo(f"{name}: {how}")


def _suites(named: Sequence[str] | None) -> list[Suite]:
    from edge_rt_distill.sandbox.suites import built_in, read_suite

    files = [Path(name) for name in named or () if Path(name).suffix]
    names = [name for name in named or () if not Path(name).suffix]
    return [*(built_in(names) if named and names else [] if named else built_in()), *map(read_suite, files)]


def _table(found: Comparison) -> None:
    typer.echo(f"{'':14} {'teacher':24} {'student':24} {'kept':24} cells that count")
    for name, one in (("all", found.whole), *found.metrics.items(), *found.domains.items()):
        typer.echo(f"{name:14} {one.teacher!s:24} {one.student!s:24} {_retained(one):24} {one.counted} of {one.cells}")


def _retained(one: Kept) -> str:
    return "(teacher at chance)" if one.retention is None else str(one.retention)
