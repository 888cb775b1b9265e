"""``edge-rt replay compare``, ``report`` and ``metrics``. What takes long to load is loaded when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from edge_rt_distill.replay.results import Results
    from edge_rt_distill.replay.trace import Trace

_FIRST = typer.Option("--slo-first", min=0, help="Seconds in which the first token is wanted.")
_BETWEEN = typer.Option("--slo-between", min=0, help="Seconds in which 99 % of a request's further tokens are wanted.")
_TRACE = typer.Option("--trace", metavar="TRACE", help="What was replayed, for what only it knows: kinds, temperatures, prompts.")
_LEAST = typer.Option("--min-retention", min=0, max=1, help="What is to be kept of every metric.")


def add(commands: typer.Typer) -> None:
    """Add them to ``edge-rt replay``."""
    commands.command("compare")(compare)
    commands.command("report")(report)
    commands.command("metrics")(metrics)


def compare(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="Results, or a folder of them: one for each load.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="Results of the same trace and load, or a folder of them.")],
    least: Annotated[float, _LEAST] = 0.95,
    first: Annotated[float, _FIRST] = 2.0,
    between: Annotated[float, _BETWEEN] = 0.2,
    trace: Annotated[Optional[Path], _TRACE] = None,  # noqa: UP045
    json_file: Annotated[Optional[Path], typer.Option("--json", metavar="FILE", help="Also write it as JSON.")] = None,  # noqa: UP045
) -> None:
    """Say what a candidate kept of a baseline's service, metric by metric, and why where it is less than wanted.

    Exits with 1 if a metric surely falls short: if its whole interval of 95 % does.
    """
    import json

    from edge_rt_distill.files import write_file
    from edge_rt_distill.replay import words
    from edge_rt_distill.replay.columns import Slo
    from edge_rt_distill.replay.comparing import compare as compared
    from edge_rt_distill.replay.comparing import pairs

    known = _trace(trace)
    found = [compared(*pair, Slo(first, between), known, least) for pair in pairs(_read(baseline), _read(candidate))]
    for one in found:
        typer.echo("\n".join([*words.report(one), ""]))
    if json_file is not None:
        write_file(json_file, json.dumps([words.record(one) for one in found], ensure_ascii=False, indent=1, allow_nan=False))
    short = [f"{name} ({one.pair[0].results.load})" for one in found for name in one.short]
    typer.echo(f"surely below {least:.1%}: {', '.join(short)}" if short else f"nothing is surely below {least:.1%}")
    if short:
        raise typer.Exit(1)


def report(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Results; the others are compared with the first.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")] = Path("report.html"),
    least: Annotated[float, _LEAST] = 0.95,
    first: Annotated[float, _FIRST] = 2.0,
    between: Annotated[float, _BETWEEN] = 0.2,
    trace: Annotated[Optional[Path], _TRACE] = None,  # noqa: UP045
) -> None:
    """Write a page of HTML: what each run's service was, pictures, and what was kept, with the worst requests side by side."""
    from edge_rt_distill.files import write_file
    from edge_rt_distill.replay.columns import Slo
    from edge_rt_distill.replay.page import render
    from edge_rt_distill.replay.results import read_results

    write_file(output, render([read_results(one) for one in results], Slo(first, between), _trace(trace), least))
    typer.echo(f"wrote {output}")


def metrics() -> None:
    """List the metrics: what each is, its unit, how it is compared, what it cannot see."""
    from edge_rt_distill.replay.measures import COMPARED, METRICS

    for name, metric in METRICS.items():
        typer.echo(f"{name} ({metric.unit}, {metric.better} is better, {metric.compared})\n  {metric.what}\n  {metric.limits}")
    for name, how in COMPARED.items():
        typer.echo(f"{name}: {how}")


def _read(path: Path) -> list[Results]:
    from edge_rt.hooks import DataError
    from edge_rt_distill.replay.results import read_results

    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"the folder {path} has no results (*.json); write some with `edge-rt replay run TRACE -o FILE`")
    return [read_results(one) for one in files]


def _trace(path: Path | None) -> Trace | None:
    from edge_rt_distill.replay.trace import read_trace

    return None if path is None else read_trace(path)
