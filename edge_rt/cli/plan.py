"""`edge-rt plan`: what a model would do on a device, worked out before it is there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_rt.cli.options import JsonOption, argument, option
from edge_rt.cli.output import say, table, write, write_json
from edge_rt.errors import OptionError, UserError
from edge_rt.model_hub import format_size

if TYPE_CHECKING:
    from edge_rt.compiler.cost import Prediction
    from edge_rt.compiler.shape import ModelShape
    from edge_rt.plugin_host.registry import Registry

HELP = """Predict how fast a model runs on a device.

Time to the first token, tokens a second, memory and energy, and what limits each: reading weights from memory (bandwidth), arithmetic
(compute), what each step costs beside its work (overhead), or reading the file (storage).
The target auto is this machine, whose kernels are timed once for the model's shapes; the others are described in files.

\b
Examples:
  edge-rt plan smollm2 --all-targets
  edge-rt plan model.gguf --target rpi-5 --context 4096
  edge-rt plan model.gguf --measure
  edge-rt plan smollm2 --all-targets --plot plan.svg
"""


class Options(JsonOption):
    """The command's options."""

    file: str = argument(metavar="MODEL", help="GGUF file, or a name from `edge-rt models`.")
    target: tuple[str, ...] = option((), "-t --target NAME", "Target by name or .toml file, auto if left out. May be given several times.")
    all_targets: bool = option(False, "--all-targets", "All targets, auto first.")
    context: int = option(1024, "-c --context N", "Cells of context at whose end tokens are counted.", low=1, high=1 << 24)
    prompt: int = option(256, "-p --prompt N", "Tokens of the prompt before the first token.", low=1, high=1 << 24)
    threads: int | None = option(None, "--threads N", "Threads; all cores of the target if left out.", low=1, high=512)
    measure: bool = option(False, "--measure", "Run the model here too, and show what was measured beside what was predicted.")
    plot: str | None = option(None, "--plot FILE.svg", "Draw the table as a picture.")


def run(options: Options) -> int:
    """Predict and print."""
    from edge_rt.compiler.shape import read_shape
    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.model_hub import resolve_model
    from edge_rt.plugin_host.registry import Registry

    registry = Registry.load()
    path = resolve_model(options.file)
    with ModelFile.open(path) as model:
        shape = read_shape(model.header)
    rows = predictions(options, shape, registry)
    if options.measure:
        rows.insert(1 if rows and rows[0].target == "auto" else 0, _measured(options, path))
    if options.plot is not None:
        _draw(Path(options.plot), rows, path.name)
    if options.json:
        write_json({"model": str(path), **_facts(shape), "rows": [_record(row) for row in rows]}, indent=2)
        return 0
    say(
        f"{path.name}: {shape.parameters / 1e6:.0f} million weights a token, {format_size(shape.weights)}, mostly {next(iter(shape.types))}"
    )
    write(table([_TITLES, *(_row(row) for row in rows)]))
    return 0


def predictions(options: Options, shape: ModelShape, registry: Registry) -> list[Prediction]:
    """A row for each target asked for. Raises OptionError."""
    from edge_rt.compiler import target as targets
    from edge_rt.compiler.cost import predict
    from edge_rt.compiler.here import here

    more = registry.compiler_targets()
    if options.all_targets and options.target:
        raise OptionError("--target and --all-targets contradict each other; give one of them")
    asked: Sequence[str] = [targets.AUTO, *targets.names(more)] if options.all_targets else options.target or [targets.AUTO]
    rows = []
    for name in asked:
        threads = [options.threads] if options.threads else []
        target = here(registry, shape, threads) if name == targets.AUTO else targets.load(name, more)
        own = None if options.threads is None else min(options.threads, target.threads) if name != targets.AUTO else options.threads
        rows.append(predict(shape, target, context=options.context, prompt=options.prompt, threads=own))
    return rows


def _measured(options: Options, path: Path) -> Prediction:
    """The model run here."""
    import edge_rt
    from edge_rt.compiler.measure import measure
    from edge_rt.config import available_cpus

    threads = options.threads or available_cpus()
    room = max(options.context, options.prompt) + 64
    with edge_rt.open(path, context=room, threads=threads, device="cpu") as model:
        return measure(model.engine, "here", context=options.context, prompt=options.prompt, threads=threads)


def _draw(path: Path, rows: Sequence[Prediction], title: str) -> None:
    from edge_rt.compiler.plot import svg

    try:
        path.write_text(svg(rows, title), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error


def _facts(shape: ModelShape) -> dict[str, Any]:
    return {
        "parameters": shape.parameters,
        "weights": shape.weights,
        "streamed": round(shape.streamed),
        "cell_bytes": shape.cell_bytes(),
        "types": dict(shape.types),
        "units": dict(shape.units),
    }


def _record(row: Prediction) -> dict[str, Any]:
    """A row for programs: seconds, bytes, joules."""
    found = row._asdict()
    found["memory"] = None if row.memory is None else {**row.memory._asdict(), "total": row.memory.total}
    return found


_TITLES = ("TARGET", "THREADS", "FIRST TOKEN", "", "COLD", "", "TOKENS/S", "", "MEMORY", "J/TOKEN", "ROW")


def _row(row: Prediction) -> tuple[str, ...]:
    held = "" if row.memory is None else format_size(row.memory.total) + ("" if row.fits else ", too much")
    return (
        row.target, str(row.threads), _seconds(row.first), row.first_bound, _seconds(row.first_cold), row.cold_bound or "",
        f"{row.rate:.1f}" if row.rate < 1000 else f"{row.rate:.0f}", row.rate_bound, held,
        "" if row.energy is None else f"{row.energy:.2g}", "measured" if row.measured else f"predicted ({row.basis})",
    )  # fmt: skip


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
