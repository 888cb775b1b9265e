"""The typer application, built from the commands' options: help, completion, messages about wrong usage, plugin commands.

typer is used to read a line, not to run a command: a built-in command's callback notes the command and its options, and main.py
carries them out, so that errors and Ctrl-C are treated in one place. Commands that plugins add run inside typer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Annotated, Any, Optional

import typer

from edge_rt import __version__
from edge_rt.cli.options import REQUIRED, Spec, specs

HELP = """Run language models on edge devices.

\b
  edge-rt pull smollm2            fetch a small model
  edge-rt run "Why is the sky blue?"
  edge-rt chat -m model.gguf
"""

ANNOTATIONS: Mapping[str, Any] = {
    "str": str,
    "str | None": Optional[str],  # noqa: UP045 - typer on Python 3.10 wants it so
    "int": int,
    "int | None": Optional[int],  # noqa: UP045
    "float": float,
    "float | None": Optional[float],  # noqa: UP045
    "bool": bool,
    "tuple[str, ...]": list[str],
}

Parsed = tuple[Any, Any]
"""A command's module and its options."""


def parse(words: list[str], commands: Mapping[str, str]) -> Parsed | int:
    """Read a line: a command and its options, or the exit status where typer (or a plugin's command) has done what was asked."""
    parsed: list[Parsed] = []
    app = build(commands, lambda command, options: parsed.append((command, options)))
    if not words or words[0] not in commands:
        _add_plugin_commands(app)
    try:
        app(args=words, prog_name="edge-rt")
    except SystemExit as end:
        if parsed:
            return parsed[0]
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    raise AssertionError("typer returned without an exit status")


def build(commands: Mapping[str, str], found: Callable[[Any, Any], None]) -> typer.Typer:
    """The application; ``found`` is called with the module and the options of the command on the line."""
    app = typer.Typer(
        help=HELP, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
    )

    @app.callback(invoke_without_command=True, no_args_is_help=True)
    def top(version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False) -> None:
        if version:
            typer.echo(f"edge-rt {__version__}")
            raise typer.Exit

    for name, path in commands.items():
        module = import_module(path)
        app.command(name, help=module.HELP)(_callback(module, found))
    return app


def _callback(module: Any, found: Callable[[Any, Any], None]) -> Callable[..., None]:
    """A function with one typed parameter per option, which is how typer learns what a command takes."""

    def callback(**values: Any) -> None:
        found(module, module.Options(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}))

    parameters = [_parameter(name, spec, annotation) for name, (spec, annotation) in specs(module.Options).items()]
    callback.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    callback.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return callback


def _parameter(name: str, spec: Spec, annotation: str) -> inspect.Parameter:
    info: Any
    if spec.flags:
        info = typer.Option(*spec.flags, help=spec.help, metavar=spec.metavar or None, show_default=spec.shown_default)
    else:
        info = typer.Argument(help=spec.help, metavar=spec.metavar, show_default=False)
    default: Any = spec.default
    if default is REQUIRED:
        default = inspect.Parameter.empty
    elif default == ():
        default = []
    typed: Any = Annotated[ANNOTATIONS[annotation], info]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=typed)


def _add_plugin_commands(app: typer.Typer) -> None:
    """Let plugins add their commands; the registry reports one that fails, and the others stay."""
    from edge_rt.plugin_host.registry import Registry

    Registry.load().add_cli_commands(app)
