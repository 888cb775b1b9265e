"""`edge-rt compile`: fits a model to a device, and writes a directory that runs there by a plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.cli.options import JsonOption, argument, option
from edge_rt.cli.output import ProgressBar, say, table, write, write_json
from edge_rt.errors import OptionError
from edge_rt.model_hub import format_size

if TYPE_CHECKING:
    from edge_rt.compiler.plan import Goals, Situation
    from edge_rt.compiler.sensitivity import Sensitive
    from edge_rt.compiler.target import Target
    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.core.weights.error_correction import Compensation
    from edge_rt.deployment import Deployed, Plan
    from edge_rt.plugin_host.registry import Registry

HELP = """Fit a model to a device.

Writes a directory with the weights as the device is best served with them, and a plan: how many threads, what is read ahead, what stays
in memory. `edge-rt run -m DIRECTORY` follows the plan. What each pass decided is printed with what it is predicted to gain.
The target auto is this machine. For others the directory is copied there, with weights packed as that CPU's kernels want them.

\b
Examples:
  edge-rt compile smollm2 --target auto
  edge-rt compile model.gguf --target rpi-5 --power 6 --output model-rpi-5
  edge-rt compile model-f16.gguf --target rpi-5 --weights 80M
  edge-rt compile model.gguf --target rpi-cm4 --memory 500M --dry-run
"""


class Options(JsonOption):
    """The command's options."""

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


def run(options: Options) -> int:
    """Decide, write and print."""
    from edge_rt import error_correction
    from edge_rt.compiler import folding
    from edge_rt.compiler import target as targets
    from edge_rt.compiler.plan import Situation, built_in, decide
    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.model_hub import resolve_model
    from edge_rt.plugin_host.registry import Registry

    registry = Registry.load()
    path = resolve_model(options.file)
    with ModelFile.open(path) as source, ExitStack() as undo:
        corrected = error_correction.opened(path, source, options.compensation or "auto", undo)
        here = options.target == targets.AUTO
        target = _here(registry, source) if here else targets.load(options.target, registry.compiler_targets())
        norms = folding.norms(source) if corrected is None else folding.kept_for_compensation(folding.norms(source))
        size = 0 if corrected is None else corrected.size
        situation = Situation(source.header, target, _goals(options), _sensitivities(options, source), norms, size)
        plan = decide(situation, [*built_in(), *registry.compiler_passes()])
        deployed, copied = None, _fitting(corrected, plan)
        if not options.dry_run:
            from edge_rt.compiler.writer import write as write_directory

            folder = Path(options.output or f"{path.stem}-{target.name}")
            progress = ProgressBar()
            try:
                deployed = write_directory(source, target, plan, folder, here=here, progress=progress, compensation=copied)
            finally:
                progress.finish()
        _show(options, plan, situation, deployed)
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


def _sensitivities(options: Options, source: ModelFile) -> Sequence[Sensitive]:
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


def _goals(options: Options) -> Goals:
    from edge_rt import model_hub
    from edge_rt.compiler.plan import Goals

    memory = None if options.memory is None else model_hub.parse_size(options.memory, "--memory")
    weights = None if options.weights is None else model_hub.parse_size(options.weights, "--weights")
    return Goals(memory, options.power, options.latency, options.context, options.quality, weights)


def _show(options: Options, plan: Plan, situation: Situation, deployed: Deployed | None) -> None:
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
        f"with {situation.context} cells, {format_size(held.total)}"
    )
    if deployed is not None:
        say(f"wrote {deployed.folder}; run it with `edge-rt run -m {deployed.folder}`")


def _ratio(gain: float) -> str:
    return "" if abs(gain - 1.0) < 0.0005 else f"{gain:.3g}x"
