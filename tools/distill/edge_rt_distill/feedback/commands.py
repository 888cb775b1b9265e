"""``edge-rt feedback``: the commands. What takes long to load is loaded when a command runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from edge_rt_distill.data.samples import Sample
    from edge_rt_distill.sandbox.suites import Suite

HELP = """Let what users made of answers teach the next student.

\b
  edge-rt feedback give said.json --url http://127.0.0.1:8080 --rating -1 --correction "Refunds take 14 days."
  edge-rt feedback mine traffic.jsonl -o hard.jsonl
  edge-rt feedback propose run.toml hard.jsonl --traffic traffic.jsonl -o next.toml
  edge-rt feedback drift traffic.jsonl -o drift.html
"""
_HELD_OUT = typer.Option("--held-out", metavar="FILE", help="Samples that are measured on, e.g. a run's data/held_out.jsonl. Repeatable.")
_COMPARISONS = typer.Option("--comparison", metavar="FILE", help="Of `eval compare --json` or `replay compare --json`. Repeatable.")
_SUITES = typer.Option("--suite", "-s", metavar="FILE", help="A suite of your own, beside those that ship with the tool. Repeatable.")


def add(app: typer.Typer) -> None:
    """Add ``feedback`` to the command line."""
    commands = typer.Typer(name="feedback", help=HELP, no_args_is_help=True, rich_markup_mode=None)
    commands.command("give")(give)
    commands.command("mine")(mine)
    commands.command("propose")(propose)
    commands.command("drift")(drift)
    app.add_typer(commands)


def give(
    file: Annotated[str, typer.Argument(metavar="FILE", help='{"messages": [...], "answer": "..."}, or one a line; - is standard input.')],
    url: Annotated[str, typer.Option("--url", help="The daemon: http://HOST:PORT or unix:/PATH.")],
    rating: Annotated[Optional[int], typer.Option("--rating", min=-1, max=1, help="-1: bad, 0: neither, 1: good.")] = None,  # noqa: UP045
    correction: Annotated[Optional[str], typer.Option("--correction", metavar="TEXT", help="What should have been answered.")] = None,  # noqa: UP045
    comment: Annotated[Optional[str], typer.Option("--comment", metavar="TEXT", help="Anything else.")] = None,  # noqa: UP045
    key_file: Annotated[Optional[Path], typer.Option("--key-file", metavar="FILE", help="The daemon's key: its first line.")] = None,  # noqa: UP045
) -> None:
    """Say what an answer was worth, to a daemon that records traffic. It redacts what it writes."""
    from edge_rt.hooks import UserError
    from edge_rt_distill.data.json_lines import read_text
    from edge_rt_distill.feedback.giving import give as send
    from edge_rt_distill.feedback.giving import read_answers

    text, where = (sys.stdin.read(), "standard input") if file == "-" else (read_text(Path(file)), file)
    said = {"rating": rating, "correction": correction, "comment": comment}
    given = {name: value for name, value in said.items() if value is not None}
    answers = [{**one, **given} for one in read_answers(text, where)]
    recorded = 0
    try:
        for _ in send(url, key_file, answers):
            recorded += 1
    except UserError:
        if recorded:
            typer.echo(f"recorded: the first {recorded} of {len(answers)} answers")
        raise
    typer.echo("recorded" if recorded == 1 else f"recorded: {recorded} answers")


def mine(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE...", help="Recorded traffic.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write samples: JSONL.")] = Path("hard.jsonl"),
    held_out: Annotated[Optional[list[Path]], _HELD_OUT] = None,  # noqa: UP045
    suite: Annotated[Optional[list[Path]], _SUITES] = None,  # noqa: UP045
) -> None:
    """Write the hard cases of traffic as samples, those first that hurt most; nothing that leaks into what is measured on."""
    from collections import Counter

    from edge_rt_distill.feedback.mining import Found, write_hard
    from edge_rt_distill.feedback.mining import mine as mined
    from edge_rt_distill.feedback.signals import cases
    from edge_rt_distill.replay.trace import read_trace

    read = [(path, read_trace(path, of_requests=False)) for path in traces]
    found = [Found(case, path.name, str(trace.about.get("begun", ""))) for path, trace in read for case in cases(trace)]
    for kind, count in Counter(one.case.kind for one in found).items():
        typer.echo(f"{kind}: {count}")
    result = mined(found, _held_out(held_out), _suites(suite))
    for reason, count in result.left_out.items():
        typer.echo(f"left out {count}: {reason}")
    write_hard(output, result)
    corrected = sum(bool(one.sample.text or one.sample.answer) for one in result.hard)
    typer.echo(f"wrote {output}: {len(result.hard)} hard cases of {len(found)} signals, {corrected} with a correction")


def propose(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run before: TOML.")],
    hard: Annotated[Path, typer.Argument(metavar="HARD", help="Hard cases, of `edge-rt feedback mine`.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write, beside RUN.")] = Path("next.toml"),
    traffic: Annotated[Optional[list[Path]], typer.Option("--traffic", metavar="TRACE", help="Recorded traffic. Repeatable.")] = None,  # noqa: UP045
    comparison: Annotated[Optional[list[Path]], _COMPARISONS] = None,  # noqa: UP045
    held_out: Annotated[Optional[list[Path]], _HELD_OUT] = None,  # noqa: UP045
    suite: Annotated[Optional[list[Path]], _SUITES] = None,  # noqa: UP045
) -> None:
    """Write the next run's file, with why before each change; and say whether compensation is to be calibrated anew."""
    from edge_rt.hooks import OptionError
    from edge_rt_distill.data.samples import read_samples
    from edge_rt_distill.feedback import proposing
    from edge_rt_distill.feedback.mining import traffic_samples
    from edge_rt_distill.feedback.signals import question
    from edge_rt_distill.files import write_file
    from edge_rt_distill.replay.trace import read_trace
    from edge_rt_distill.run.workshop import write_samples

    if output.resolve().parent != run.resolve().parent or output.resolve() == run.resolve():
        raise OptionError(f"{output} is not beside {run}, whose paths are meant from there; write another file in that folder")
    base, sets = proposing.read_base(run)
    cases = read_samples([hard], policy="stop", minimum=1).samples
    texts = [question(one) for path in traffic or () for one in read_trace(path).requests]
    name = ""
    if texts:
        measured = proposing.drifted([one for some in sets.values() for one in some], texts)
        typer.echo(f"calibrate compensation anew? {measured}")
        if measured.anew:
            kept = traffic_samples(texts, [*_held_out(held_out), *_asked(suite)])
            path = output.with_name(f"{output.stem}-traffic.jsonl")
            write_samples(path, kept)
            name = proposing.relative(path, output)
            typer.echo(f"wrote {path}: {len(kept)} texts of {len(texts)} requests, to calibrate with")
    compared = [proposing.read_comparison(one) for one in comparison or ()]
    found = proposing.propose(base, sets, (proposing.relative(hard, output), cases), name, compared)
    write_file(output, proposing.written(found))
    for setting, why in found.why.items():
        typer.echo(f"{setting}: {why}")
    if found.left:
        typer.echo(f"fell short too, and no setting of a run is known to change it: {', '.join(found.left)}")
    typer.echo(f"wrote {output}; do it with `edge-rt distill run {output}`")


def drift(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Traces, results of `eval run` or of `replay run`; in order.")],
    output: Annotated[Optional[Path], typer.Option("--output", "-o", metavar="FILE", help="Write a page of HTML.")] = None,  # noqa: UP045
    window: Annotated[str, typer.Option("--window", help="hour, day or week; as fits if left out.")] = "",
    suite: Annotated[Optional[list[Path]], _SUITES] = None,  # noqa: UP045
) -> None:
    """Show each metric over time, by form of prompt, and whether the last window differs from those before."""
    from edge_rt_distill.feedback import drift as drifting

    found = drifting.lines(drifting.read(files, _suites(suite), window))
    table = [list(drifting.HEAD), *drifting.rows(found)]
    widths = [max(len(row[column]) for row in table) for column in range(len(drifting.HEAD))]
    for row in table:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if output is not None:
        drifting.write_page(output, found)
        typer.echo(f"wrote {output}")


def _held_out(files: Sequence[Path] | None) -> list[Sample]:
    from edge_rt_distill.data.samples import read_samples

    return read_samples(list(files), policy="stop", minimum=1).samples if files else []


def _suites(files: Sequence[Path] | None) -> list[Suite]:
    from edge_rt_distill.sandbox.suites import built_in, read_suite

    return [*built_in(), *map(read_suite, files or ())]


def _asked(files: Sequence[Path] | None) -> list[Sample]:
    from edge_rt_distill.feedback.mining import asked

    return list(asked(_suites(files)))
