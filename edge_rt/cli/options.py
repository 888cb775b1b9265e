"""The command line's options, defined once: a class a command, each attribute with its flags and its help.

From the same attributes come the typer application (`typer_app.py`: help, completion, messages about wrong usage), the generated
documentation (`tools/generate_cli_doc.py`) and ``quick_parse`` below. Importing typer takes longer than everything else
`edge-rt run` does before it opens the model, so a command line that is plainly right is read here without it; whatever
``quick_parse`` does not understand (``--help``, a misspelt flag, a value of the wrong type) goes to typer, which says so properly.
(For the same reason these are no dataclasses: generating the code of one takes about a millisecond.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from edge_rt.errors import OptionError
from edge_rt.model_hub import DEFAULT
from edge_rt.types import SamplingParams

T = TypeVar("T")
C = TypeVar("C", bound="CommandOptions")

CONVERTERS: Mapping[str, Callable[[str], Any]] = {
    "str": str,
    "str | None": str,
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
    "tuple[str, ...]": str,
}
"""What an attribute's annotation (a string, by the __future__ import) makes of the text on the command line; bool takes no text."""

REQUIRED: Any = object()
"""The default of an argument that must be given."""


class Spec(NamedTuple):
    """An option as the command line sees it. No flags: an argument by position. ``low``/``high``: inclusive limits."""

    default: Any
    help: str
    flags: tuple[str, ...] = ()
    metavar: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def long(self) -> str:
        """The flag as messages name it."""
        return next((flag for flag in self.flags if flag.startswith("--")), self.metavar)

    @property
    def shown_default(self) -> bool:
        """Whether the default tells a person something."""
        return not any(self.default is nothing for nothing in (None, False, (), "", REQUIRED))


def option(default: T, flags: str, help: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()) -> T:
    """An option set by ``flags``, which may end in a metavar ("-n --max-tokens N"); typed as its value, so that mypy checks its use."""
    words = flags.split()
    metavar = "" if words[-1].startswith("-") else words.pop()
    spec: Any = Spec(default, help, tuple(words), metavar, low, high, choices)
    return spec  # type: ignore[no-any-return]


def argument(default: Any = REQUIRED, *, help: str, metavar: str) -> Any:
    """An option set by position; required without a default. The last may be a tuple of all words that are left."""
    return Spec(default, help, (), metavar)


class CommandOptions:
    """Base of every command's options. An instance has the values, the class has the Specs."""

    def __init__(self, **values: Any) -> None:
        for name, (spec, _) in specs(type(self)).items():
            value = values.pop(name, spec.default)
            if value is REQUIRED:
                raise TypeError(f"{name} is required")
            setattr(self, name, value)
        if values:
            raise TypeError(f"no such option: {', '.join(values)}")


def specs(kind: type) -> dict[str, tuple[Spec, str]]:
    """Name -> (Spec, annotation), as a person should read them: positions, the command's own options, then each group's."""
    found: dict[str, tuple[Spec, str]] = {}
    for owner in kind.__mro__[:-1]:
        for name, annotation in owner.__annotations__.items():
            found.setdefault(name, (vars(owner)[name], annotation))
    return dict(sorted(found.items(), key=lambda entry: bool(entry[1][0].flags)))


# ---- groups of options that several commands share -------------------------------------------------------------------

_S = SamplingParams()


class ModelOptions(CommandOptions):
    """Which model, and how it is opened."""

    model: str = option(DEFAULT, "-m --model MODEL", "GGUF file, or a name from `edge-rt models`.")
    ctx: int | None = option(None, "-c --ctx --ctx-size N", "Context in tokens; the model's own if left out.", low=1)
    threads: int | None = option(None, "-t --threads N", "Threads; chosen by what is free if left out.", low=1)
    memory: str | None = option(None, "--memory SIZE", "Weights held in memory at most, as 500M or 1.5G; the rest is streamed.")
    no_pack: bool = option(False, "--no-pack", "Run straight from the GGUF, without packed weights in the cache.")
    key_type: str | None = option(
        None, "--key-type --cache-type-k TYPE", "Type of cached keys: f16 or q8_0; f16 if left out.", choices=("f16", "q8_0")
    )
    compensation: str | None = option(
        None, "--compensation auto|off|FILE", "Corrections of the model's quantisation; those of the file beside it, if any, if left out."
    )
    engine: str | None = option(None, "--engine NAME", "Engine; the best that can run the model if left out.")
    device: str | None = option(None, "--device NAME", "Device, as `edge-rt doctor` names it; the best if left out.")
    power: float | None = option(None, "--power WATTS", "Hold the whole device to so many watts, on average, by computing less.", low=0)
    celsius: float | None = option(None, "--celsius DEGREES", "Hold the device to this temperature by computing less.", low=0)
    verbose: bool = option(False, "-v --verbose", "Say on standard error how long what took.")


class PostOptions(CommandOptions):
    """How text is post-processed."""

    post: str | None = option(None, "--post A,B", "Post-processors, in this order, see `edge-rt plugins`; those of the rules if left out.")
    rules: str | None = option(None, "--rules FILE", "Rules for post-processors, see docs/postprocessing.md.")
    rule: tuple[str, ...] = option((), "--rule KEY=VALUE", "Set one rule, as redaction.action='\"hash\"'. May be given several times.")


class GenerationOptions(PostOptions):
    """How text is made."""

    max_tokens: int | None = option(None, "-n --max-tokens --n-predict N", "Tokens to make; until the model stops if left out.", low=1)
    stop: tuple[str, ...] = option((), "--stop TEXT", "Stop before this text. May be given several times.")
    temp: float = option(_S.temperature, "--temp X", "Temperature; 0 always takes the likeliest token.", low=0)
    top_k: int = option(_S.top_k, "--top-k N", "Choose among the N likeliest tokens; 0: all.", low=0)
    top_p: float = option(_S.top_p, "--top-p X", "Choose among the likeliest tokens that add up to X; 1: all.", low=0, high=1)
    min_p: float = option(_S.min_p, "--min-p X", "Leave out tokens less likely than X times the likeliest; 0: none.", low=0, high=1)
    typical: float = option(_S.typical_p, "--typical X", "Locally typical sampling; 1: off.", low=0, high=1)
    repeat_penalty: float = option(_S.repeat_penalty, "--repeat-penalty X", "Penalty for repeating tokens; 1: none.", low=0)
    repeat_last_n: int = option(_S.repeat_last_n, "--repeat-last-n N", "Tokens the penalties look back; -1: the context.", low=-1)
    presence_penalty: float = option(_S.presence_penalty, "--presence-penalty X", "Penalty for tokens that occurred.")
    frequency_penalty: float = option(_S.frequency_penalty, "--frequency-penalty X", "Penalty by how often a token occurred.")
    dry_multiplier: float = option(_S.dry_multiplier, "--dry-multiplier X", "Strength of DRY against repeated passages; 0: off.", low=0)
    dry_base: float = option(_S.dry_base, "--dry-base X", "Base of DRY.")
    dry_allowed_length: int = option(_S.dry_allowed_length, "--dry-allowed-length N", "Length of repetition DRY allows.", low=0)
    dry_penalty_last_n: int = option(_S.dry_penalty_last_n, "--dry-penalty-last-n N", "Tokens DRY looks back; -1: the context.", low=-1)
    seed: int | None = option(None, "-s --seed N", "Seed; a fresh one if left out, which --json and -v show.", low=0, high=2**32 - 2)
    logit_bias: tuple[str, ...] = option((), "-l --logit-bias TOKEN±X", "Make a token id likelier or less so, as 42+1.5 or 42-inf.")
    grammar: str | None = option(None, "--grammar GBNF", "Grammar the answer must follow, or @FILE.")
    grammar_file: str | None = option(None, "--grammar-file FILE", "Read the grammar from a file.")
    json_schema: str | None = option(None, "-j --json-schema JSON", "JSON schema the answer must follow, or @FILE.")
    tools: str | None = option(None, "--tools FILE", "Schemas of functions the model may call, as a JSON list in OpenAI's form.")
    adapter: str | None = option(None, "--adapter FILE[:SCALE]", "LoRA adapter of the model, as GGUF, applied SCALE times; 1 if left out.")
    embedder: str | None = option(None, "--embedder NAME", "Embedder to recall by, see `edge-rt plugins`; the model's own if left out.")
    policy: str = option("graded", "--policy NAME", "What leaves a context that gets short: strict (nothing), slide or graded.")
    prune: str | None = option(
        None, "--prune BUDGET", "Prune the cache head by head to so many cells, to a size as 64M, or to a share as 25%."
    )
    prune_every: int = option(0, "--prune-every N", "With --prune: also after every N tokens of the answer. 0: not then.", low=0)
    speculate: int = option(0, "--speculate N", "Draft up to N tokens a step by look-up; never changes the result. 0: off.", low=0, high=64)
    ignore_eos: bool = option(False, "--ignore-eos", "Go on when the model would stop.")


class JsonOption(CommandOptions):
    """Output for programs."""

    json: bool = option(False, "--json", "Write JSON on standard output.")


# ---- reading a command line ------------------------------------------------------------------------------------------


def quick_parse(kind: type[C], argv: Sequence[str]) -> C | None:
    """Read ``argv`` into ``kind``, or None if any of it is not plainly right: typer then reads it again and says what is wrong."""
    options = specs(kind)
    by_flag = {flag: name for name, (spec, _) in options.items() for flag in spec.flags}
    positions = [name for name, (spec, _) in options.items() if not spec.flags]
    values: dict[str, Any] = {}
    rest, words = list(argv), []
    while rest:
        word = rest.pop(0)
        if word == "--":
            words += rest
            break
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        flag, equals, text = word.partition("=")
        name = by_flag.get(flag)
        if name is None or (equals and not flag.startswith("--")):
            return None
        annotation = options[name][1]
        if annotation == "bool":
            if equals:
                return None
            values[name] = True
            continue
        if not equals and not rest:
            return None
        try:
            value = CONVERTERS[annotation](text if equals else rest.pop(0))
        except ValueError:
            return None
        values[name] = (*values.get(name, ()), value) if annotation == "tuple[str, ...]" else value
    given: dict[str, Any] = dict(zip(positions, words, strict=False))
    if positions and options[positions[-1]][1] == "tuple[str, ...]":
        given[positions[-1]] = tuple(words[len(positions) - 1 :])
    elif len(words) > len(positions):
        return None
    if any(options[name][0].default is REQUIRED for name in positions[len(words) :]):
        return None
    return kind(**values, **given)


def check(options: CommandOptions) -> None:
    """Raise OptionError for the first value outside its option's limits."""
    for name, (spec, _) in specs(type(options)).items():
        value = getattr(options, name)
        if value is None:
            continue
        if spec.choices and value not in spec.choices:
            raise OptionError(f"{spec.long} takes {' or '.join(spec.choices)} and not {value!r}")
        if not isinstance(value, (int, float)):
            continue
        if not math.isfinite(value):
            raise OptionError(f"{spec.long} takes a finite number and not {value}")
        if (spec.low is not None and value < spec.low) or (spec.high is not None and value > spec.high):
            raise OptionError(f"{spec.long} takes a number {_limits(spec)} and not {value}")


def _limits(spec: Spec) -> str:
    if spec.high is None:
        return f"of at least {spec.low}"
    return f"from {spec.low} to {spec.high}"
