"""A command's options, declared as attributes of its class, and the argparse parser that is built from them.

A command is a subclass of ``Command`` whose docstring is its help. mypy reads the declarations as typed values; ``parse``, ``--help`` and
`tools/generate_cli_doc.py` read them as ``Spec``. This module is imported before every model is opened, so it imports little, and its
classes are no dataclasses: generating the code of one takes about a millisecond.
"""

from __future__ import annotations

import argparse
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, TypeVar

from edge_rt.errors import OptionError
from edge_rt.model_hub import DEFAULT
from edge_rt.types import SamplingParams

T = TypeVar("T")
C = TypeVar("C", bound="Command")

WRONG_USAGE = 2
_MARK = "\0"
"""Stands before a value in what argparse gets; no command line can hold it."""
REQUIRED: Any = object()
"""The default of an argument that must be given."""


class Spec(NamedTuple):
    """One option, or without ``flags`` an argument by position. ``low`` and ``high`` are inclusive limits."""

    default: Any
    help: str
    flags: tuple[str, ...] = ()
    metavar: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def shown_default(self) -> bool:
        """Whether help shows the default; False for defaults that mean "not given"."""
        return not any(self.default is absent for absent in (None, False, (), "", REQUIRED))


def option(default: T, flags: str, help: str, *, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()) -> T:
    """Declare an option by its flags, which may end in a metavar: "-n --max-tokens N". A tuple as default: it may be given repeatedly."""
    words = flags.split()
    metavar = "" if words[-1].startswith("-") else words.pop()
    spec: Any = Spec(default, help, tuple(words), metavar, low, high, choices)
    return spec  # type: ignore[no-any-return]  # typed as its value, so that mypy checks how it is used


def argument(default: Any = REQUIRED, *, help: str, metavar: str) -> Any:
    """Declare an argument by position, required if it has no default. A tuple as default takes all remaining words."""
    return Spec(default, help, (), metavar)


class Command(ABC):
    """A command, or a group of options that commands share. The class holds Specs, an instance made by ``parse`` their values."""

    @abstractmethod
    def run(self) -> int:
        """Carry the command out. Returns the exit status; raises UserError for what the user can correct."""


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
    arguments = (spec for spec, _ in specs(kind).values() if not spec.flags)
    words = (spec.metavar if spec.default is REQUIRED else f"[{spec.metavar}]" for spec in arguments)
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
    temperature: float = option(_S.temperature, "--temp X", "Temperature; 0 always takes the likeliest token.", low=0)
    top_k: int = option(_S.top_k, "--top-k N", "Choose among the N likeliest tokens; 0: all.", low=0)
    top_p: float = option(_S.top_p, "--top-p X", "Choose among the likeliest tokens that add up to X; 1: all.", low=0, high=1)
    min_p: float = option(_S.min_p, "--min-p X", "Leave out tokens less likely than X times the likeliest; 0: none.", low=0, high=1)
    typical_p: float = option(_S.typical_p, "--typical X", "Locally typical sampling; 1: off.", low=0, high=1)
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


# ---- parsing ---------------------------------------------------------------------------------------------------------


def parse(name: str, kind: type[C], words: Sequence[str]) -> C:
    """The command with the options that follow ``edge-rt NAME``.

    Raises SystemExit, with status 0 after ``--help`` and 2 for wrong usage, and OptionError for a value outside its limits.
    """
    parser = _Parser(name, kind)
    command = kind()
    values = vars(parser.parse_args(parser.marked(words)))
    for key, (spec, _) in specs(kind).items():
        value = values.get(key, spec.default)
        _check(spec, value)
        setattr(command, key, tuple(value) if isinstance(value, list) else value)
    return command


def _check(spec: Spec, value: Any) -> None:
    """Raise OptionError for a value outside its option's limits."""
    name = next((flag for flag in spec.flags if flag.startswith("--")), spec.metavar)
    if spec.choices and value not in (None, *spec.choices):
        raise OptionError(f"{name} takes {' or '.join(spec.choices)} and not {value!r}")
    if not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise OptionError(f"{name} takes a finite number and not {value}")
    if (spec.low is not None and value < spec.low) or (spec.high is not None and value > spec.high):
        limits = f"of at least {spec.low}" if spec.high is None else f"from {spec.low} to {spec.high}"
        raise OptionError(f"{name} takes a number {limits} and not {value}")


def _formatter(prog: str, width: int = 80) -> argparse.HelpFormatter:
    """Help at a given width. (Left to itself, argparse asks for the terminal's width, and imports shutil, at every option it adds.)"""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=width)


def _converter(annotation: str) -> Callable[[str], int | float | str]:
    """The function from a marked word to a value of an annotated type."""
    kind: Any = {"int": int, "float": float}.get(annotation.partition(" ")[0], str)
    noun = "integer" if kind is int else "number"

    def convert(text: str) -> int | float | str:
        try:
            return kind(text[1:])  # type: ignore[no-any-return]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[1:]!r} is not a valid {noun}") from None

    return convert


class _Parser(argparse.ArgumentParser):
    """The parser of one command."""

    def __init__(self, name: str, kind: type[Command]) -> None:
        super().__init__(f"edge-rt {name}", usage(name, kind), allow_abbrev=False, formatter_class=_formatter)
        self._kind = kind
        self._takes_value = {"-h": False, "--help": False}  # by flag
        for key, (spec, annotation) in specs(kind).items():
            self._takes_value.update(dict.fromkeys(spec.flags, annotation != "bool"))
            shown = spec.help.replace("%", "%%") + (f" [default: {spec.default}]" if spec.shown_default else "")
            many = isinstance(spec.default, tuple)
            settings: dict[str, Any] = {"type": _converter(annotation), "metavar": spec.metavar, "help": shown}
            if annotation == "bool":
                self.add_argument(*spec.flags, dest=key, action="store_true", help=shown)
            elif spec.flags:
                self.add_argument(*spec.flags, dest=key, default=argparse.SUPPRESS, action="append" if many else "store", **settings)
            else:
                self.add_argument(key, nargs="*" if many else None if spec.default is REQUIRED else "?", **settings)

    def marked(self, words: Sequence[str]) -> list[str]:
        """The same command line with values joined to their flags, arguments last, and a mark before each value and argument.

        By itself argparse takes a value that begins with a dash (``--stop --x``) for an option, loses a value that is ``--``, and cannot
        collect arguments that stand between options.
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
        return [*options, *(_MARK + word for word in arguments)]

    def _option(self, word: str, rest: Iterator[str]) -> Iterator[str]:
        """One word that begins with a dash, normalised; a value that stands apart is taken from ``rest``."""
        while word not in self._takes_value and self._takes_value.get(word[:2]) is False:  # -vn5 is -v -n5
            yield word[:2]
            word = f"-{word[2:]}"
        flag, equals, text = word.partition("=")
        if flag not in self._takes_value and self._takes_value.get(word[:2]):
            yield f"{word[:2]}={_MARK}{word[2:]}"
        elif flag not in self._takes_value:
            near = ", ".join(similar(flag, self._takes_value))
            self.error(f"No such option: {flag}" + (f" (Possible options: {near})" if near else ""))
        elif equals and not self._takes_value[flag]:
            self.error(f"Option '{flag}' does not take a value.")
        elif not self._takes_value[flag]:
            yield flag
        elif equals:
            yield f"{flag}={_MARK}{text}"
        elif (value := next(rest, None)) is not None:
            yield f"{flag}={_MARK}{value}"
        else:
            self.error(f"Option '{flag}' requires an argument.")

    def format_help(self) -> str:
        """The help, as wide as the terminal and at most 80 columns. Paragraphs are filled, but for those with indented lines."""
        from functools import partial
        from shutil import get_terminal_size
        from textwrap import fill

        width = max(min(get_terminal_size().columns, 80) - 2, 50)
        self.formatter_class = partial(_formatter, width=width)
        paragraphs = help_text(self._kind).split("\n\n")
        self.description = "\n\n".join(text if "\n  " in text else fill(text, width) for text in paragraphs)
        return super().format_help()

    def print_help(self, file: Any = None) -> None:
        """Write the help to standard output."""
        from edge_rt.cli.output import write

        write(self.format_help())

    def error(self, message: str) -> NoReturn:
        """Report wrong usage and exit. argparse calls this too."""
        report_wrong_usage(self.usage or "", self.prog, message.replace(_MARK, ""))


def similar(word: str, known: Iterable[str]) -> list[str]:
    """The known words that a misspelt one is like, likeliest first."""
    from difflib import get_close_matches

    return get_close_matches(word, known)


def report_wrong_usage(usage: str, command: str, message: str) -> NoReturn:
    """Say on standard error what is wrong with a command line. Raises SystemExit."""
    from edge_rt.cli.output import write_stderr

    write_stderr(f"Usage: {usage}\nTry '{command} -h' for help.\n\nError: {message}")
    raise SystemExit(WRONG_USAGE)
