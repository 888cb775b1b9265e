"""``edge-rt eval``: the commands. What takes long to load is loaded when a command runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from edge_rt_distill.sandbox.scores import Comparison, Kept
    from edge_rt_distill.sandbox.suites import Suite
    from edge_rt_distill.sandbox.weights import Weights

HELP = """Measure what a model kept: eight domains, sixteen metrics, English and Chinese.

\b
  edge-rt eval run smollm2 -o teacher.json              ask every item of the suites
  edge-rt eval run student.gguf -o student.json
  edge-rt eval run http://127.0.0.1:8080 -o served.json   a daemon, or any server with OpenAI's API
  edge-rt eval compare teacher.json student.json        what was kept, with intervals
  edge-rt eval report teacher.json student.json         a page with pictures and both answers to each item
  edge-rt eval check mine.jsonl                         whether a suite of your own is sound
"""
_SUITES = typer.Option("--suite", "-s", metavar="NAME|FILE", help="A domain, or a file of your own; all domains if left out. Repeatable.")
_WEIGHTS = typer.Option("--weights", metavar="FILE", help="TOML with [metrics], [domains] and [floors], see docs/evaluation.md.")
_MODEL = typer.Argument(metavar="MODEL", help="A GGUF, a name from `edge-rt models`, a folder of Hugging Face's, or a server's address.")
_ENGINE = typer.Option("--engine", help="Who runs a GGUF, e.g. llama_cpp; edge-rt if left out.")
_NAME = typer.Option("--served-as", metavar="NAME", help="Which of the server's models; its first if left out.")
_KEY = typer.Option("--key-file", metavar="FILE", help="Holds the server's key.")
_SPLIT = typer.Option("--split", help="Items that may steer training (steer), those that only judge (sealed), or all.")


def add(app: typer.Typer) -> None:
    """Add ``eval`` to the command line."""
    commands = typer.Typer(name="eval", help=HELP, no_args_is_help=True, rich_markup_mode=None)
    commands.command("run")(run)
    commands.command("compare")(compare)
    commands.command("report")(report)
    commands.command("judge")(judge)
    commands.command("export")(export)
    commands.command("check")(check)
    commands.command("metrics")(metrics)
    app.add_typer(commands)


def run(
    model: Annotated[str, _MODEL],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the results.")] = Path("results.json"),
    suite: Annotated[Optional[list[str]], _SUITES] = None,  # noqa: UP045
    split: Annotated[str, _SPLIT] = "steer",
    engine: Annotated[Optional[str], _ENGINE] = None,  # noqa: UP045
    served_as: Annotated[Optional[str], _NAME] = None,  # noqa: UP045
    key_file: Annotated[Optional[Path], _KEY] = None,  # noqa: UP045
) -> None:
    """Ask a model every item, write what it said and what that is worth, and print its scores."""
    from contextlib import closing
    from functools import partial

    from edge_rt_distill.run.progress import Shown
    from edge_rt_distill.sandbox.engines import open_engine
    from edge_rt_distill.sandbox.running import run as ask
    from edge_rt_distill.sandbox.running import write_results
    from edge_rt_distill.sandbox.scores import scores

    _split(split)
    suites, shown = _suites(suite), Shown()
    with closing(open_engine(model, engine=engine, model=served_as, key_file=key_file)) as one:
        try:
            results = ask(one, suites, split, told=partial(shown, "eval", "asks"))
        finally:
            shown.close()
    write_results(output, results)
    typer.echo(f"{len(results.outcomes)} items in {results.seconds:.0f} s; results in {output}")
    if results.left_out:
        typer.echo(f"{results.left_out} items compare options, and the server gives no likelihoods: they are left out")
    typer.echo()
    for name, found in scores(results, suites).items():
        typer.echo(f"{name:14} {found}")


def compare(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="Results of the teacher.")],
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="Results of the student.")],
    suite: Annotated[Optional[list[str]], _SUITES] = None,  # noqa: UP045
    least: Annotated[float, typer.Option("--min-retention", min=0, max=2, help="Exit with 1 if less was kept.")] = 0.0,
    weights: Annotated[Optional[Path], _WEIGHTS] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Say what a student kept of its teacher by metric and domain, with intervals of 95 %; chance counts as nothing."""
    from edge_rt_distill.sandbox.running import read_results
    from edge_rt_distill.sandbox.scores import compare as compared
    from edge_rt_distill.sandbox.scores import fails, notes, told

    left, right, suites = read_results(teacher), read_results(student), _suites(suite)
    given = _weights(weights, suites)
    found = compared(left, right, suites, given.of)
    reasons = fails(found, least, given.floors) if least else []
    if as_json:
        typer.echo(json.dumps({**told(found), "fails": reasons}, indent=1))
    else:
        _table(found)
        for note in notes(left, right):
            typer.echo(note)
        for reason in reasons:
            typer.echo(f"FAIL: {reason}")
    if reasons:
        raise typer.Exit(1)


def report(
    teacher: Annotated[Path, typer.Argument(metavar="TEACHER", help="Results of the teacher.")],
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="Results of the student.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")] = Path("report.html"),
    suite: Annotated[Optional[list[str]], _SUITES] = None,  # noqa: UP045
    weights: Annotated[Optional[Path], _WEIGHTS] = None,  # noqa: UP045
) -> None:
    """Write a page of HTML: what was kept by metric and domain, pictures, and each item with both answers, the worst losses first."""
    from edge_rt_distill.sandbox.report import write_report
    from edge_rt_distill.sandbox.running import read_results

    suites = _suites(suite)
    write_report(read_results(teacher), read_results(student), suites, output, _weights(weights, suites).of)
    typer.echo(f"wrote {output}")


def judge(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="Results whose answers are to be graded.")],
    by: Annotated[str, typer.Option("--by", metavar="MODEL|MODULE:ATTRIBUTE", help="The judge: a model as for `eval run`, or your own.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")] = Path("judged.json"),
    suite: Annotated[Optional[list[str]], _SUITES] = None,  # noqa: UP045
    validate: Annotated[bool, typer.Option("--validate", help="Say how many crafted answers it tells apart, and grade nothing.")] = False,
) -> None:
    """Let a judge grade free answers, in place of the items' checks. Choices stay as they are."""
    from functools import partial

    from edge_rt_distill.run.progress import Shown
    from edge_rt_distill.sandbox.judges import judged, opened
    from edge_rt_distill.sandbox.judges import validate as validated
    from edge_rt_distill.sandbox.running import read_results, write_results

    suites, shown = _suites(suite), Shown()
    found = read_results(results)
    with opened(by) as one:
        try:
            if validate:
                agreement = validated(suites, one, told=partial(shown, "eval", "judges examples"))
            else:
                graded = judged(found, suites, one, told=partial(shown, "eval", "judges"))
        finally:
            shown.close()
    if validate:
        typer.echo(f"{one.name} tells {agreement.apart} of {agreement.items} items' good answers from the bad ones")
    else:
        write_results(output, graded)
        typer.echo(f"graded by {one.name}; results in {output}")


def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to write; the harness's --include_path.")],
    suite: Annotated[Optional[list[str]], _SUITES] = None,  # noqa: UP045
    split: Annotated[str, _SPLIT] = "steer",
) -> None:
    """Write suites as tasks of lm-evaluation-harness."""
    from edge_rt_distill.sandbox.harness import export as write

    done = write(_suites(suite), folder, _split(split))
    for name, items in done.tasks.items():
        typer.echo(f"{name:32} {items} items")
    typer.echo(f"{done.left_out} items of conversations and of wordings have no place in the harness; group edge_rt has all tasks")


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


def _split(name: str) -> Sequence[str]:
    """The splits of items that a name stands for. Raises OptionError."""
    from edge_rt.hooks import OptionError
    from edge_rt_distill.sandbox.running import SPLITS

    if name not in SPLITS:
        raise OptionError(f"no split is named {name}; choose {', '.join(SPLITS)}")
    return SPLITS[name]


def _weights(file: Path | None, suites: Sequence[Suite]) -> Weights:
    from edge_rt_distill.sandbox.weights import Weights, read_weights

    return Weights() if file is None else read_weights(file, [suite.name for suite in suites])


def _table(found: Comparison) -> None:
    typer.echo(f"{'':14} {'teacher':24} {'student':24} {'kept':24} cells that count")
    for name, one in (("all", found.whole), *found.metrics.items(), *found.domains.items()):
        typer.echo(f"{name:14} {one.teacher!s:24} {one.student!s:24} {_retained(one):24} {one.counted} of {one.cells}")


def _retained(one: Kept) -> str:
    return "(teacher at chance)" if one.retention is None else str(one.retention)
