"""A command's options, declared as the attributes of its class, and the argparse parser that is built from them.

A command is a subclass of Command whose docstring is its help. The same attributes are read by mypy as typed values, by ``parse``, by
``--help`` and by `tools/generate_cli_doc.py`. This module is imported before every model is opened, so it imports little, and its
classes are no dataclasses: generating the code of one takes about a millisecond.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

from edge_rt.catalog import DEFAULT
from edge_rt.errors import OptionError
from edge_rt.types import SamplingParams

T = TypeVar("T")
C = TypeVar("C", bound="Command")

WRONG_USAGE = 2
REQUIRED: Any = object()
"""The default of an argument that must be given."""


class Spec(NamedTuple):
    """One option. Without ``flags`` it is an argument by position. ``low``, ``high``: inclusive limits."""

    default: Any
    help: str
    flags: tuple[str, ...] = ()
    metavar: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def long(self) -> str:
        """The flag that messages name; the metavar of an argument."""
        return next((flag for flag in self.flags if flag.startswith("--")), self.metavar)

    @property
    def shown_default(self) -> bool:
        """False for defaults that mean "not given"."""
        return not any(self.default is nothing for nothing in (None, False, (), "", REQUIRED))


def option(default: T, flags: str, help: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()) -> T:
    """Declare an option by its flags, which may end in a metavar ("-n --max-tokens N"). Typed as the value, so that mypy checks its use."""
    words = flags.split()
    metavar = "" if words[-1].startswith("-") else words.pop()
    spec: Any = Spec(default, help, tuple(words), metavar, low, high, choices)
    return spec  # type: ignore[no-any-return]


def argument(default: Any = REQUIRED, *, help: str, metavar: str) -> Any:
    """Declare an argument by position. Without a default it is required; the last one may be a tuple, which takes all remaining words."""
    return Spec(default, help, (), metavar)


class Command:
    """Base of commands and of the groups of options they share. The class holds Specs, an instance holds values."""

    def __init__(self, **values: Any) -> None:
        for name, (spec, _) in specs(type(self)).items():
            value = values.pop(name, spec.default)
            if value is REQUIRED:
                raise TypeError(f"{name} is required")
            setattr(self, name, value)
        if values:
            raise TypeError(f"no such option: {', '.join(values)}")

    def run(self) -> int:
        """Carry the command out and return the exit status."""
        raise NotImplementedError


def specs(kind: type[Command]) -> dict[str, tuple[Spec, str]]:
    """Attribute name -> (Spec, annotation) in the order of the help: arguments, the command's own options, then those of each group."""
    found: dict[str, tuple[Spec, str]] = {}
    for owner in kind.__mro__[:-1]:
        for name, annotation in owner.__annotations__.items():
            found.setdefault(name, (vars(owner)[name], annotation))
    return dict(sorted(found.items(), key=lambda entry: bool(entry[1][0].flags)))


def help_text(kind: type[Command]) -> str:
    """A command's docstring without its indentation."""
    from inspect import cleandoc

    return cleandoc(kind.__doc__ or "")


def usage(name: str, kind: type[Command]) -> str:
    """The command with its arguments, for example ``edge-rt run [PROMPT] [OPTIONS]``."""
    found = (spec for spec, _ in specs(kind).values() if not spec.flags)
    words = (spec.metavar if spec.default is REQUIRED else f"[{spec.metavar}]" for spec in found)
    return " ".join(["edge-rt", name, *words, "[OPTIONS]"])


# ---- groups of options that several commands share -------------------------------------------------------------------

_S = SamplingParams()


class ModelOptions(Command):
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


class PostOptions(Command):
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


class JsonOption(Command):
    """Output for programs."""

    json: bool = option(False, "--json", "Write JSON on standard output.")


# ---- reading a command line ------------------------------------------------------------------------------------------


def parse(name: str, kind: type[C], words: Sequence[str]) -> C:
    """The options on the command line ``edge-rt NAME WORDS``. Raises SystemExit: 0 after ``--help``, 2 for wrong usage."""
    return kind(**_Parser(name, kind).values(words))


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """80 columns. (Without a width argparse imports shutil to ask for the terminal's, and that for every option that is added.)"""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=80)


class _Parser(argparse.ArgumentParser):
    """The parser of one command."""

    def __init__(self, name: str, kind: type[Command]) -> None:
        super().__init__(
            f"edge-rt {name}", usage(name, kind), allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=_Formatter
        )
        self._kind, self._specs = kind, specs(kind)
        self._flags: dict[str, str] = {"-h": "", "--help": ""}  # flag -> the long flag of an option that takes a value, "" for a switch
        for key, (spec, annotation) in self._specs.items():
            self._add(key, spec, annotation)
            self._flags.update(dict.fromkeys(spec.flags, "" if annotation == "bool" else spec.long))

    def _add(self, key: str, spec: Spec, annotation: str) -> None:
        shown = spec.help.replace("%", "%%") + (f" [default: {spec.default}]" if spec.shown_default else "")
        kind = next((kind for kind in (int, float) if annotation.startswith(kind.__name__)), str)
        many = annotation.startswith("tuple")
        if annotation == "bool":
            self.add_argument(*spec.flags, dest=key, action="store_true", help=shown)
        elif spec.flags:
            self.add_argument(*spec.flags, dest=key, action="append" if many else "store", type=kind, metavar=spec.metavar, help=shown)
        else:
            nargs: Any = "*" if many else None if spec.default is REQUIRED else "?"
            self.add_argument(key, nargs=nargs, type=kind, metavar=spec.metavar, help=shown)

    def values(self, words: Sequence[str]) -> dict[str, Any]:
        """The values that were given, by attribute."""
        options, arguments = self._split(words)
        found = vars(self.parse_args([*options, *(["--", *arguments] if arguments else [])]))
        return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}

    def _split(self, words: Sequence[str]) -> tuple[list[str], list[str]]:
        """Options, with each value joined to its flag as ``--flag=value``, and arguments.

        argparse alone takes a value that begins with a dash (``--stop --``) for an option, and cannot collect arguments that stand
        between options.
        """
        options: list[str] = []
        arguments: list[str] = []
        rest = iter(words)
        for word in rest:
            if word == "--":
                arguments += rest
            elif word == "-" or not word.startswith("-"):
                arguments.append(word)
            else:
                options += self._option(word, rest)
        return options, arguments

    def _option(self, word: str, rest: Iterator[str]) -> Iterator[str]:
        """One word that begins with a dash, as argparse reads it without doubt; the value of its option is taken from ``rest``."""
        while word not in self._flags and self._flags.get(word[:2]) == "":  # -vn5 is -v -n5
            yield word[:2]
            word = f"-{word[2:]}"
        if long := self._flags.get(word):
            text = next(rest, None)
            yield word if text is None else f"{long}={text}"
        elif long := self._flags.get(word[:2]):
            yield f"{long}={word[2:]}"
        elif (flag := word.partition("=")[0]) in self._flags:
            yield word
        else:
            self.error(f"no such option: {flag}{similar(flag, self._flags)}")

    def format_help(self) -> str:
        """The help; paragraphs of the description are filled, but for those with indented lines, such as examples."""
        from textwrap import fill

        self.description = "\n\n".join(text if "\n  " in text else fill(text, 80) for text in help_text(self._kind).split("\n\n"))
        return super().format_help()

    def print_help(self, file: Any = None) -> None:
        """Write the help to standard output."""
        from edge_rt.cli.output import write

        write(self.format_help())

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the line. Raises SystemExit."""
        wrong_usage(self.usage or "", self.prog, message)


def similar(word: str, known: Iterable[str]) -> str:
    """A hint at what may be meant by a misspelt word, to be put behind a message; empty where nothing is like it."""
    from difflib import get_close_matches

    found = get_close_matches(word, known)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def wrong_usage(usage: str, command: str, message: str) -> NoReturn:
    """Say on standard error what is wrong with a command line. Raises SystemExit."""
    from edge_rt.cli.output import say

    say(f"Usage: {usage}\nTry '{command} --help' for help.\n\nError: {message}")
    raise SystemExit(WRONG_USAGE)


def check(options: Command) -> None:
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
