"""`edge-rt plan` and `edge-rt compile`: predict how a model runs on a device, and fit it to the device."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_rt import sizes
from edge_rt.cli.options import JsonOption, argument, option
from edge_rt.cli.output import ProgressBar, say, table, write, write_json
from edge_rt.errors import OptionError, UserError
from edge_rt.sizes import shown

if TYPE_CHECKING:
    from edge_rt.compiler.cost import Prediction
    from edge_rt.compiler.plan import Goals, Situation
    from edge_rt.compiler.sensitivity import Sensitive
    from edge_rt.compiler.shape import ModelShape
    from edge_rt.compiler.target import Target
    from edge_rt.core.load.compensation import Compensation
    from edge_rt.core.load.model_file import ModelFile
    from edge_rt.deployment import Deployed, Plan
    from edge_rt.registry import Registry


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
        from edge_rt.catalog import resolve
        from edge_rt.compiler.shape import read_shape
        from edge_rt.core.load.model_file import ModelFile
        from edge_rt.registry import Registry

        registry = Registry.load()
        path = resolve(self.file)
        with ModelFile.open(path) as model:
            shape = read_shape(model.header)
        rows = predictions(self, shape, registry)
        if self.measure:
            rows.insert(1 if rows and rows[0].target == "auto" else 0, _measured(self, path))
        if self.plot is not None:
            _draw(Path(self.plot), rows, path.name)
        if self.json:
            write_json({"model": str(path), **_facts(shape), "rows": [_record(row) for row in rows]}, indent=2)
            return 0
        say(f"{path.name}: {shape.parameters / 1e6:.0f} million weights a token, {shown(shape.weights)}, mostly {next(iter(shape.types))}")
        write(table([_TITLES, *(_row(row) for row in rows)]))
        return 0


def predictions(options: PlanCommand, shape: ModelShape, registry: Registry) -> list[Prediction]:
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


def _measured(options: PlanCommand, path: Path) -> Prediction:
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
    held = "" if row.memory is None else shown(row.memory.total) + ("" if row.fits else ", too much")
    return (
        row.target, str(row.threads), _seconds(row.first), row.first_bound, _seconds(row.first_cold), row.cold_bound or "",
        f"{row.rate:.1f}" if row.rate < 1000 else f"{row.rate:.0f}", row.rate_bound, held,
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
        from edge_rt import compensating
        from edge_rt.catalog import resolve
        from edge_rt.compiler import folding
        from edge_rt.compiler import target as targets
        from edge_rt.compiler.plan import Situation, built_in, decide
        from edge_rt.core.load.model_file import ModelFile
        from edge_rt.registry import Registry

        registry = Registry.load()
        path = resolve(self.file)
        with ModelFile.open(path) as source, ExitStack() as undo:
            corrected = compensating.opened(path, source, self.compensation or "auto", undo)
            here = self.target == targets.AUTO
            target = _here(registry, source) if here else targets.load(self.target, registry.compiler_targets())
            norms = folding.norms(source) if corrected is None else folding.kept_for_compensation(folding.norms(source))
            size = 0 if corrected is None else corrected.size
            situation = Situation(source.header, target, _goals(self), _sensitivities(self, source), norms, size)
            plan = decide(situation, [*built_in(), *registry.compiler_passes()])
            deployed, copied = None, _fitting(corrected, plan)
            if not self.dry_run:
                from edge_rt.compiler.writer import write as write_directory

                folder = Path(self.output or f"{path.stem}-{target.name}")
                progress = ProgressBar()
                try:
                    deployed = write_directory(source, target, plan, folder, here=here, progress=progress, compensation=copied)
                finally:
                    progress.finish()
            _show(self, plan, situation, deployed)
        return 0


def _fitting(corrected: Compensation | None, plan: Plan) -> Compensation | None:
    """What compensates for the quantisation of the compiled model; what the plan makes useless is left out, aloud."""
    if corrected is not None and plan.types:
        many = f"{len(plan.types)} weights that it was made for get other types"
        say(f"note: the compensation {corrected.file.path} is left out, as {many}; make one for the compiled model")
        return None
    return corrected


def _here(registry: Registry, source: ModelFile) -> Target:
    from edge_rt.compiler.here import here
    from edge_rt.compiler.shape import read_shape

    shape = read_shape(source.header)
    apart = read_shape(source.header, joined=())  # what is decided by was timed, either way
    return here(registry, shape._replace(products=(*shape.products, *apart.products)))


def _sensitivities(options: CompileCommand, source: ModelFile) -> Sequence[Sensitive]:
    """Measured where types are to be chosen."""
    if options.quality is None and options.weights is None:
        if options.calibration is not None:
            raise OptionError("--calibration is of use only with --quality or --weights; add one of them")
        return ()
    from edge_rt.compiler import sensitivity
    from edge_rt.compiler.passes.precision import TYPES
    from edge_rt.config import available_cpus

    tokens = sensitivity.calibration(source, None if options.calibration is None else Path(options.calibration))
    progress = ProgressBar()
    try:
        return sensitivity.measure(source, tokens, TYPES, available_cpus(), lambda done, total: progress("measuring", done, total))
    finally:
        progress.finish()


def _goals(options: CompileCommand) -> Goals:
    from edge_rt import sizes
    from edge_rt.compiler.plan import Goals

    memory = None if options.memory is None else sizes.parse(options.memory, "--memory")
    weights = None if options.weights is None else sizes.parse(options.weights, "--weights")
    return Goals(memory, options.power, options.latency, options.context, options.quality, weights)


def _show(options: CompileCommand, plan: Plan, situation: Situation, deployed: Deployed | None) -> None:
    held = situation.memory(plan)
    predicted = {"first_token": situation.first(plan), "tokens_per_second": 1.0 / situation.token(plan), "memory": held.total}
    if options.json:
        gains = [gain._asdict() for gain in plan.gains]
        decisions = {**plan._asdict(), "power": plan.power._asdict(), "types": dict(plan.types), "gains": gains}
        write_json({"output": None if deployed is None else str(deployed.folder), "plan": decisions, "predicted": predicted}, indent=2)
        return
    rows = [(gain.by, _ratio(gain.first), _ratio(gain.token), _ratio(gain.memory), gain.what) for gain in plan.gains]
    write(table([("PASS", "FIRST TOKEN", "TOKENS/S", "MEMORY", "DECIDED"), *rows]))
    say(
        f"predicted: first token after {predicted['first_token']:.2f} s, {predicted['tokens_per_second']:.1f} tokens/s "
        f"with {situation.context} cells, {shown(held.total)}"
    )
    if deployed is not None:
        say(f"wrote {deployed.folder}; run it with `edge-rt run -m {deployed.folder}`")


def _ratio(gain: float) -> str:
    return "" if abs(gain - 1.0) < 0.0005 else f"{gain:.3g}x"
