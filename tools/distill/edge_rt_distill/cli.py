"""``edge-rt distill``: the commands. Torch is loaded when a command runs, not when ``edge-rt`` lists them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from edge_rt_distill.feedback import commands as feedback
from edge_rt_distill.library import commands as library
from edge_rt_distill.replay import commands as replay
from edge_rt_distill.sandbox import commands as sandbox

if TYPE_CHECKING:
    from edge_rt_distill.run.pipeline import Planned

HELP = """Make a small INT4 student of a large teacher.

\b
  edge-rt distill init my.toml      a file that says what to do, with every setting explained
  edge-rt distill run my.toml       do it; interrupted, the same command goes on
  edge-rt distill status my.toml    what is done, and what it found
  edge-rt distill library ls DIR    what is recorded of teachers
"""
_FILE = typer.Argument(metavar="FILE", help="The run: a TOML file, see `edge-rt distill init`.")


def add_commands(app: typer.Typer) -> None:
    """Add ``distill``, ``eval``, ``replay`` and ``feedback`` to the command line."""
    distill = typer.Typer(name="distill", help=HELP, no_args_is_help=True, rich_markup_mode=None)
    distill.command("init")(init)
    distill.command("run")(run)
    distill.command("ablate")(ablate)
    distill.command("status")(status)
    distill.command("report")(report)
    library.add(distill)
    app.add_typer(distill)
    sandbox.add(app)
    replay.add(app)
    feedback.add(app)


def init(
    file: Annotated[Path, _FILE], force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False
) -> None:
    """Write a run's file: the demo, with every setting explained."""
    from edge_rt.hooks import OptionError
    from edge_rt_distill.files import write_file
    from edge_rt_distill.run.config import Config, to_toml

    if file.exists() and not force:
        raise OptionError(f"{file} is there already; choose another name, or replace it with --force")
    write_file(file, to_toml(Config()))
    typer.echo(f"{file} is written; change what you like and run `edge-rt distill run {file}`")


def run(
    file: Annotated[Path, _FILE],
    until: Annotated[Optional[str], typer.Option("--until", metavar="STEP", help="Stop behind this step.")] = None,  # noqa: UP045
    as_json: Annotated[bool, typer.Option("--json", help="Print what each step found as JSON.")] = False,
) -> None:
    """Do a run, or go on with it: what is done and has not changed is not done again."""
    from edge_rt_distill.run.pipeline import steps

    _do(file, steps, until, as_json)


def ablate(file: Annotated[Path, _FILE], as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Teach the same cut by no level, one, two, three and all four, with as many tokens each, and say what each adds."""
    from edge_rt_distill.run.pipeline import ablation

    _do(file, ablation, None, as_json)


def _do(file: Path, planning: Planned, until: str | None, as_json: bool) -> None:
    from edge_rt_distill.run.pipeline import run_file
    from edge_rt_distill.run.progress import Shown

    shown = Shown()
    try:
        done = run_file(file, until=until, told=shown, planning=planning)
    finally:
        shown.close()
    if as_json:
        typer.echo(json.dumps([{**one._asdict(), "files": sorted(one.files)} for one in done], ensure_ascii=False, default=str))
        return
    for one in done:
        typer.echo(f"{one.name:12} {one.seconds:8.1f} s  {_short(one.summary)}")


def report(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")] = Path("distill-report.md"),
) -> None:
    """Write one page of Markdown about runs: what became of the teacher, how the levels ended, what each adds.

    What the page says of other runs already stays.
    """
    from edge_rt_distill.run.report import write_report

    typer.echo(f"wrote {write_report(files, output)}")


def status(file: Annotated[Path, _FILE]) -> None:
    """Say what of a run is done, and what it found."""
    from edge_rt_distill.run.pipeline import state

    for name, done, current in state(file):
        again = "" if current else "(to be done again: settings or the teacher have changed) "
        typer.echo(f"{name:12} {'not done' if done is None else f'{done.seconds:8.1f} s  {again}{_short(done.summary)}'}")


def _short(summary: object) -> str:
    """The numbers and short texts of a summary in a line."""
    items = summary.items() if isinstance(summary, dict) else ()
    plain = [(key, f"{value:.4g}" if isinstance(value, float) else value) for key, value in items if not isinstance(value, (dict, list))]
    return ", ".join(f"{key} {value}" for key, value in plain)[:120]
