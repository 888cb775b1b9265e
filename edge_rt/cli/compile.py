"""`edge-rt plan` and `edge-rt compile`: predict how a model runs on a device, and fit it to the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import edge_rt
from edge_rt import error_correction
from edge_rt.cli.options import JsonOption, argument, option
from edge_rt.cli.output import ProgressBar, table, write, write_json, write_stderr
from edge_rt.config import available_cpus
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.core.weights.error_correction import Compensation
from edge_rt.deploy import folding, sensitivity
from edge_rt.deploy import target as targets
from edge_rt.deploy.cost import ModelShape, Prediction, predict, read_shape
from edge_rt.deploy.passes import TYPES, Goals, Situation, built_in, decide
from edge_rt.deploy.plan import Deployed, Plan
from edge_rt.deploy.plot import svg
from edge_rt.deploy.writer import write as write_directory
from edge_rt.errors import OptionError, UserError
from edge_rt.model_hub import format_size, parse_size, resolve_model
from edge_rt.plugin_host.registry import Registry

_TITLES = ("TARGET", "THREADS", "FIRST TOKEN", "", "COLD", "", "TOKENS/S", "", "MEMORY", "J/TOKEN", "ROW")


class PlanCommand(JsonOption):
    """Predict how fast a model runs on a device.

    Time to the first token, tokens a second, memory and energy, and what limits each: reading weights from memory (bandwidth), arithmetic
    (compute), what each step costs beside its work (overhead), or reading the file (storage).
    The target auto is this machine, whose kernels are timed once for the model's shapes; the others are described in files.

    Examples:
      edge-rt plan smollm2 --all-targets
      edge-rt plan model.gguf --target rpi-5 --context 4096
      edge-rt plan model.gguf --measure
      edge-rt plan smollm2 --all-targets --plot plan.svg
    """

    file: str = argument(metavar="MODEL", help="GGUF file, or a name from `edge-rt models`.")
    target: tuple[str, ...] = option((), "-t --target NAME", "Target by name or .toml file, auto if left out. May be given several times.")
    all_targets: bool = option(False, "--all-targets", "All targets, auto first.")
    context: int = option(1024, "-c --context N", "Cells of context at whose end tokens are counted.", low=1, high=1 << 24)
    prompt: int = option(256, "-p --prompt N", "Tokens of the prompt before the first token.", low=1, high=1 << 24)
    threads: int | None = option(None, "--threads N", "Threads; all cores of the target if left out.", low=1, high=512)
    measure: bool = option(False, "--measure", "Run the model here too, and show what was measured beside what was predicted.")
    plot: str | None = option(None, "--plot FILE.svg", "Draw the table as a picture.")

    def run(self) -> int:
        path = resolve_model(self.file)
        with ModelFile.open(path) as model:
            shape = read_shape(model.header)
        rows = predictions(self, shape, Registry.load())
        if self.measure:
            rows.insert(1 if rows and rows[0].target == "auto" else 0, _measured(self, path))
        if self.plot is not None:
            _draw(Path(self.plot), rows, path.name)
        if self.json:
            facts = {
                "parameters": shape.parameters,
                "weights": shape.weights,
                "streamed": round(shape.streamed),
                "cell_bytes": shape.cell_bytes(),
                "types": dict(shape.types),
                "units": dict(shape.units),
            }
            write_json({"model": str(path), **facts, "rows": [_record(row) for row in rows]}, indent=2)
            return 0
        size, main_type = format_size(shape.weights), next(iter(shape.types))
        write_stderr(f"{path.name}: {shape.parameters / 1e6:.0f} million weights a token, {size}, mostly {main_type}")
        write(table([_TITLES, *(_row(row) for row in rows)]))
        return 0


def predictions(options: PlanCommand, shape: ModelShape, registry: Registry) -> list[Prediction]:
    """One prediction for each target that the options name. Raises OptionError."""
    more = registry.compiler_targets()
    if options.all_targets and options.target:
        raise OptionError("--target and --all-targets contradict each other; give one of them")
    rows = []
    for name in [targets.AUTO, *targets.names(more)] if options.all_targets else options.target or [targets.AUTO]:
        threads = options.threads
        if name == targets.AUTO:
            target = _this_machine(registry, shape, [threads] if threads else [])
        else:
            target = targets.load(name, more)
            threads = None if threads is None else min(threads, target.threads)
        rows.append(predict(shape, target, context=options.context, prompt=options.prompt, threads=threads))
    return rows


def _this_machine(registry: Registry, shape: ModelShape, threads: Sequence[int] = ()) -> targets.Target:
    from edge_rt.deploy.calibrate import here  # imports NumPy

    return here(registry, shape, threads)


def _measured(options: PlanCommand, path: Path) -> Prediction:
    """The row for the model as it runs on this machine."""
    from edge_rt.deploy.calibrate import measure

    threads = options.threads or available_cpus()
    cells = max(options.context, options.prompt) + 64
    with edge_rt.open(path, context=cells, threads=threads, device="cpu") as model:
        return measure(model.engine, "here", context=options.context, prompt=options.prompt, threads=threads)


def _draw(path: Path, rows: Sequence[Prediction], title: str) -> None:
    try:
        path.write_text(svg(rows, title), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {(error.strerror or str(error)).lower()}") from error


def _record(row: Prediction) -> dict[str, Any]:
    """A row as JSON, in seconds, bytes and joules."""
    return {**row._asdict(), "memory": None if row.memory is None else {**row.memory._asdict(), "total": row.memory.total}}


def _row(row: Prediction) -> tuple[str, ...]:
    memory = "" if row.memory is None else format_size(row.memory.total) + ("" if row.fits else ", too much")
    return (
        row.target, str(row.threads), _seconds(row.first), row.first_bound, _seconds(row.first_cold), row.cold_bound or "",
        f"{row.rate:.1f}" if row.rate < 1000 else f"{row.rate:.0f}", row.rate_bound, memory,
        "" if row.energy is None else f"{row.energy:.2g}", "measured" if row.measured else f"predicted ({row.basis})",
    )  # fmt: skip


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


# ---- edge-rt compile ---------------------------------------------------------------------------------------------------


class CompileCommand(JsonOption):
    """Fit a model to a device.

    Writes a directory with the weights as the device is best served with them, and a plan: how many threads, what is read ahead, what stays
    in memory. `edge-rt run -m DIRECTORY` follows the plan. What each pass decided is printed with what it is predicted to gain.
    The target auto is this machine. For others the directory is copied there, with weights packed as that CPU's kernels want them.

    Examples:
      edge-rt compile smollm2 --target auto
      edge-rt compile model.gguf --target rpi-5 --power 6 --output model-rpi-5
      edge-rt compile model-f16.gguf --target rpi-5 --weights 80M
      edge-rt compile model.gguf --target rpi-cm4 --memory 500M --dry-run
    """

    file: str = argument(metavar="MODEL", help="GGUF file, or a name from `edge-rt models`.")
    target: str = option("auto", "-t --target NAME", "Target by name, see `edge-rt plan`, or a .toml file.")
    output: str | None = option(None, "-o --output DIRECTORY", "Where to write; MODEL-TARGET here if left out.")
    memory: str | None = option(None, "--memory SIZE", "Bytes the process may take, as 500M; what the target has if left out.")
    power: float | None = option(None, "--power WATTS", "Watts the board may draw for long.", low=0.001)
    latency: float | None = option(None, "--latency SECONDS", "How long a piece of a prompt may keep others waiting.", low=0.001)
    context: int | None = option(None, "-c --context N", "Cells of context to plan for.", low=1, high=1 << 24)
    quality: float | None = option(
        None, "--quality KL", "Requantise by sensitivity: divergence to the model as it is, nats a token at most.", low=0.0
    )
    weights: str | None = option(None, "--weights SIZE", "Requantise by sensitivity: bytes of the weights at most, as 80M.")
    calibration: str | None = option(None, "--calibration FILE", "Text that sensitivities are measured on; our own if left out.")
    compensation: str | None = option(
        None, "--compensation auto|off|FILE", "Corrections that are copied along; those of the file beside the model, if any, if left out."
    )
    dry_run: bool = option(False, "--dry-run", "Decide and print, write nothing.")

    def run(self) -> int:
        registry = Registry.load()
        path = resolve_model(self.file)
        with ModelFile.open(path) as source, ExitStack() as undo:
            compensation = error_correction.opened(path, source, self.compensation or "auto", undo)
            here = self.target == targets.AUTO
            if here:
                shape, apart = read_shape(source.header), read_shape(source.header, joined=())
                # Passes decide whether products are joined, so both ways are timed.
                target = _this_machine(registry, shape._replace(products=(*shape.products, *apart.products)))
            else:
                target = targets.load(self.target, registry.compiler_targets())
            norms = folding.norms(source)
            if compensation is not None:
                norms = folding.kept_for_compensation(norms)
            size = 0 if compensation is None else compensation.size
            situation = Situation(source.header, target, _goals(self), _sensitivities(self, source), norms, size)
            plan = decide(situation, [*built_in(), *registry.compiler_passes()])
            deployed, copied = None, _compensation_to_copy(compensation, plan)
            if not self.dry_run:
                folder = Path(self.output or f"{path.stem}-{target.name}")
                with ProgressBar() as progress:
                    deployed = write_directory(source, target, plan, folder, here=here, progress=progress, compensation=copied)
            _show(self, plan, situation, deployed)
        return 0


def _compensation_to_copy(compensation: Compensation | None, plan: Plan) -> Compensation | None:
    """The model's compensation; None, with a note, if the plan changes types of weights and so makes it useless."""
    if compensation is not None and plan.types:
        changed = f"{len(plan.types)} weights that it was made for get other types"
        write_stderr(f"note: the compensation {compensation.file.path} is left out, as {changed}; make one for the compiled model")
        return None
    return compensation


def _sensitivities(options: CompileCommand, source: ModelFile) -> Sequence[sensitivity.Sensitive]:
    """Sensitivities of the weights, measured if the goals need them. Raises OptionError."""
    if options.quality is None and options.weights is None:
        if options.calibration is not None:
            raise OptionError("--calibration is of use only with --quality or --weights; add one of them")
        return ()
    tokens = sensitivity.calibration(source, None if options.calibration is None else Path(options.calibration))
    with ProgressBar() as progress:
        return sensitivity.measure(source, tokens, TYPES, available_cpus(), lambda done, total: progress("measuring", done, total))


def _goals(options: CompileCommand) -> Goals:
    memory = None if options.memory is None else parse_size(options.memory, "--memory")
    weights = None if options.weights is None else parse_size(options.weights, "--weights")
    return Goals(memory, options.power, options.latency, options.context, options.quality, weights)


def _show(options: CompileCommand, plan: Plan, situation: Situation, deployed: Deployed | None) -> None:
    first, rate, memory = situation.first(plan), 1.0 / situation.token(plan), situation.memory(plan).total
    if options.json:
        gains = [gain._asdict() for gain in plan.gains]
        decisions = {**plan._asdict(), "power": plan.power._asdict(), "types": dict(plan.types), "gains": gains}
        predicted = {"first_token": first, "tokens_per_second": rate, "memory": memory}
        write_json({"output": None if deployed is None else str(deployed.folder), "plan": decisions, "predicted": predicted}, indent=2)
        return
    rows = [(gain.by, _ratio(gain.first), _ratio(gain.token), _ratio(gain.memory), gain.what) for gain in plan.gains]
    write(table([("PASS", "FIRST TOKEN", "TOKENS/S", "MEMORY", "DECIDED"), *rows]))
    write_stderr(f"predicted: first token after {first:.2f} s, {rate:.1f} tokens/s with {situation.context} cells, {format_size(memory)}")
    if deployed is not None:
        write_stderr(f"wrote {deployed.folder}; run it with `edge-rt run -m {deployed.folder}`")


def _ratio(gain: float) -> str:
    return "" if abs(gain - 1.0) < 0.0005 else f"{gain:.3g}x"
