"""``edge-rt replay``: the commands. What takes long to load is loaded when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from edge_rt_distill.replay import compare_commands

if TYPE_CHECKING:
    from edge_rt_distill.replay.targets import Target

HELP = """Send recorded or made-up traffic to an engine, and record what its service is like.

\b
  edge-rt replay make bursty -o trace.jsonl --requests 500 --rate 2
  edge-rt replay show trace.jsonl
  edge-rt replay run trace.jsonl --url http://127.0.0.1:8080 -o results.json
  edge-rt replay run trace.jsonl --model smollm2 --engine llama_cpp --concurrency 4
  edge-rt replay compare old.json new.json --trace trace.jsonl
"""
_TRACE = typer.Argument(metavar="TRACE", help="A trace, or a list of OpenAI requests: JSONL.")


def add(app: typer.Typer) -> None:
    """Add ``replay`` to the command line."""
    commands = typer.Typer(name="replay", help=HELP, no_args_is_help=True, rich_markup_mode=None)
    commands.command("make")(make)
    commands.command("import")(import_)
    commands.command("show")(show)
    commands.command("run")(run)
    compare_commands.add(commands)
    app.add_typer(commands)


def make(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="steady, bursty, long-context, multi-turn, adversarial or mixed.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the trace.")] = Path("trace.jsonl"),
    requests: Annotated[int, typer.Option("--requests", min=1, help="How many.")] = 200,
    rate: Annotated[float, typer.Option("--rate", help="The mean of requests a second.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Another seed is other traffic of the kind.")] = 0,
    language: Annotated[str, typer.Option("--language", help="en, zh or both.")] = "both",
    longest: Annotated[float, typer.Option("--longest", metavar="K", help="Thousands of tokens of the longest long prompt.")] = 4.0,
) -> None:
    """Write a trace of made-up traffic, whose answers can be checked; the same options write the same trace."""
    from edge_rt_distill.replay.generators import GENERATORS, Wanted
    from edge_rt_distill.replay.generators import make as drawn
    from edge_rt_distill.replay.trace import write_trace

    trace = drawn(kind, Wanted(requests, rate, seed, language, longest))
    write_trace(output, trace)
    typer.echo(f"wrote {output}: {len(trace.requests)} requests in {trace.requests[-1].at:.0f} s, {GENERATORS[kind].what}")


def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="OpenAI requests: bodies or batch files, JSONL; or traces.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the trace.")] = Path("trace.jsonl"),
    rate: Annotated[Optional[float], typer.Option("--rate", help="Requests a second; else a trace's own times, and one of others.")] = None,  # noqa: UP045
) -> None:
    """Write a trace of requests that are there already. Those of a file are of the kind that is the file's name."""
    from edge_rt.hooks import OptionError
    from edge_rt_distill.replay.summaries import joined
    from edge_rt_distill.replay.trace import read_trace, write_trace

    if rate is not None and not rate > 0:
        raise OptionError(f"--rate is {rate:g}; give requests a second, above 0")
    trace = joined([(file.stem, read_trace(file)) for file in files], rate)
    write_trace(output, trace)
    typer.echo(f"wrote {output}: {len(trace.requests)} requests in {trace.requests[-1].at:.0f} s")


def show(trace: Annotated[Path, _TRACE]) -> None:
    """Say what is in a trace."""
    from edge_rt_distill.replay.summaries import described
    from edge_rt_distill.replay.trace import read_trace

    for line in described(read_trace(trace)):
        typer.echo(line)


def run(
    trace: Annotated[Path, _TRACE],
    url: Annotated[Optional[str], typer.Option("--url", help="Ask the server at http://HOST:PORT or unix:/PATH.")] = None,  # noqa: UP045
    model: Annotated[Optional[str], typer.Option("--model", "-m", help="Ask a GGUF in this process, by file or name.")] = None,  # noqa: UP045
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the results.")] = Path("results.json"),
    engine: Annotated[Optional[str], typer.Option("--engine", help="Who runs --model: ggml (usual) or llama_cpp.")] = None,  # noqa: UP045
    context: Annotated[Optional[int], typer.Option("--ctx", min=1, help="Cells of --model; else its own.")] = None,  # noqa: UP045
    served_as: Annotated[Optional[str], typer.Option("--served-as", metavar="NAME", help="Ask the server for this model.")] = None,  # noqa: UP045
    key_file: Annotated[Optional[Path], typer.Option("--key-file", metavar="FILE", help="The server's key: its first line.")] = None,  # noqa: UP045
    speed: Annotated[float, typer.Option("--speed", help="Send at the trace's times, so many times as fast.")] = 1.0,
    concurrency: Annotated[Optional[int], typer.Option("--concurrency", min=1, max=64, help="Send the next when one ends.")] = None,  # noqa: UP045
    limit: Annotated[Optional[int], typer.Option("--limit", min=1, help="Send only the first so many.")] = None,  # noqa: UP045
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds after which a request has failed.")] = 300.0,
    fault: Annotated[Optional[list[str]], typer.Option("--fault", metavar="SECONDS:WHAT", help="Do this meanwhile. Repeatable.")] = None,  # noqa: UP045
    start: Annotated[Optional[str], typer.Option("--start", metavar="COMMAND", help="Start the server, and stop it after.")] = None,  # noqa: UP045
    start_within: Annotated[float, typer.Option("--start-within", help="Seconds that the server has to answer.")] = 120.0,
    pid: Annotated[Optional[int], typer.Option("--pid", help="The server's process, if it does not say it.")] = None,  # noqa: UP045
) -> None:
    """Send a trace and record what the service was like. Ctrl-C ends it early and keeps what was measured."""
    import asyncio

    from edge_rt.hooks import OptionError, resolve_model
    from edge_rt_distill.addresses import read_key
    from edge_rt_distill.replay.driving import Load
    from edge_rt_distill.replay.faults import parse
    from edge_rt_distill.replay.results import write_results
    from edge_rt_distill.replay.running import summary, whole
    from edge_rt_distill.replay.targets import InProcess, Server
    from edge_rt_distill.replay.trace import read_trace

    if (url is None) == (model is None):
        raise OptionError("name one that is to be asked: --url of a server, or --model")
    if model is not None and (start or served_as or key_file or pid):
        raise OptionError("--start, --served-as, --key-file and --pid are for a server; name it with --url")
    if url is not None and (engine or context):
        raise OptionError("--engine and --ctx are for --model; a server has its own")
    if not speed > 0 or (speed != 1 and concurrency):
        raise OptionError("--speed is above 0, and without --concurrency, which has no times")
    if output.is_dir():
        raise OptionError(f"{output} is a folder; name a file in it")
    requests, planned = read_trace(trace).requests[:limit], [parse(one) for one in fault or ()]

    def target() -> Target:
        if model is not None:
            return InProcess(resolve_model(Path(model)), engine=engine, context=context)
        return Server(url or "", key=None if key_file is None else read_key(key_file), model=served_as)

    load = Load(concurrency, speed, timeout)
    results = asyncio.run(whole(target, requests, load, faults=planned, pid=pid, start=start, within=start_within))
    write_results(output, results)
    for line in summary(results):
        typer.echo(line)
    typer.echo(f"results in {output}")
    if results.about["unfinished"] or results.about["unsent"]:
        raise typer.Exit(130)
