"""The command line `edge-rt`: finds the command, runs it, reports errors and sets the exit status.

Exit status: 0 success; 1 an error that the user can correct; 2 wrong usage; 3 a bug (a report is written); 130 interrupted;
141 standard output was closed. Start-up time counts, so a command's module is imported only when that command is run, and typer, in which
plugins define their commands, only for a command that is none of edge-rt's own and for shell completion.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from edge_rt.cli import interrupts
from edge_rt.errors import OptionError

if TYPE_CHECKING:
    from edge_rt.cli.options import Command

COMMANDS = {
    "run": ("run", "RunCommand", "Answer one prompt."),
    "chat": ("chat", "ChatCommand", "Talk with a model."),
    "embed": ("run", "EmbedCommand", "Embed texts: numbers that lie close for texts of close meaning."),
    "post": ("post", "PostCommand", "Post-process a text."),
    "rules": ("post", "RulesCommand", "Check rules for post-processors."),
    "pull": ("models", "PullCommand", "Fetch a model into the cache."),
    "models": ("models", "ModelsCommand", "List models by name."),
    "inspect": ("models", "InspectCommand", "Show what a model file holds."),
    "plan": ("compile", "PlanCommand", "Predict how fast a model runs on a device."),
    "compile": ("compile", "CompileCommand", "Fit a model to a device."),
    "context": ("context", "ContextCommand", "Show a conversation's segments, their grades and what makes them."),
    "plugins": ("doctor", "PluginsCommand", "List plugins and what they offer."),
    "doctor": ("doctor", "DoctorCommand", "Show what edge-rt found on this machine."),
    "bench": ("bench", "BenchCommand", "Measure a model's speed here."),
    "serve": ("serve", "ServeCommand", "Serve a model to other programs on this machine."),
}
"""Name -> module, class, and the first line of its help: `edge-rt --help` imports no command."""

SUCCESS, USER_ERROR, BUG, INTERRUPTED, OUTPUT_CLOSED = 0, 1, 3, 130, 141

USAGE = "edge-rt [OPTIONS] COMMAND [ARGS]..."
HELP = f"""Usage: {USAGE}

  Run language models on edge devices.

    edge-rt pull smollm2            fetch a small model
    edge-rt run "Why is the sky blue?"
    edge-rt chat -m model.gguf

Options:
  --version             Show the version and exit.
  --install-completion  Install completion for the current shell.
  --show-completion     Show completion for the current shell, to copy it or
                        customize the installation.
  -h, --help            Show this message and exit.

Commands:
"""
_COMPLETE = "_EDGE_RT_COMPLETE"
"""Set in the environment by the completion scripts that typer writes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if level := os.environ.get("EDGE_RT_LOG"):
            _enable_logging(level)
        # Until a command runs there is nothing to clean up: an interrupt during the imports ends the process at once.
        with interrupts.ending(INTERRUPTED):
            start = _command(words)
        interrupts.remember()
        return start()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:  # raised by argparse and typer, after help too
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        return INTERRUPTED if interrupts.pending() else _report(error, words)


def _enable_logging(level: str) -> None:
    """Write the log of edge-rt and the native libraries to standard error."""
    import logging

    if level.lower() not in ("debug", "info", "warning", "error"):
        raise OptionError(f"EDGE_RT_LOG takes debug, info, warning or error and not {level!r}")
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")


def _command(words: list[str]) -> Callable[[], int]:
    """The function that runs a command line; everything it needs before it opens a model is imported. Raises SystemExit, OptionError."""
    if not words or words[0] not in COMMANDS or _COMPLETE in os.environ:
        return lambda: _run_other(words)
    from edge_rt.cli.options import parse

    return parse(words[0], command_class(words[0]), words[1:]).run


def command_class(name: str) -> type[Command]:
    """The class of one of edge-rt's own commands. Imports its module."""
    module, attribute, _ = COMMANDS[name]
    kind: type[Command] = getattr(import_module(f"edge_rt.cli.{module}"), attribute)
    return kind


def _report(error: Exception, words: list[str]) -> int:
    """Report an error on standard error and return the exit status for it."""
    from edge_rt.cli.output import OutputClosed, write_stderr
    from edge_rt.errors import Cancelled, UserError

    if isinstance(error, OutputClosed):
        return OUTPUT_CLOSED
    if isinstance(error, Cancelled):
        return INTERRUPTED
    if isinstance(error, UserError):
        write_stderr(f"error: {error}")
        return USER_ERROR
    from edge_rt.cli.doctor import write_report

    write_stderr(f"error: {type(error).__name__}: {error}")
    write_stderr(write_report(error, words[0] if words and words[0] in COMMANDS else ""))
    return BUG


# ---- help, version, commands of plugins, shell completion ------------------------------------------------------------


def _run_other(words: list[str]) -> int:
    """Run a command line that does not begin with one of edge-rt's own commands, or complete one. Raises SystemExit."""
    from edge_rt import __version__
    from edge_rt.cli.options import WRONG_USAGE, report_wrong_usage, similar
    from edge_rt.cli.output import table, write

    first = words[0] if words else ""
    if first == "--version":
        write(f"edge-rt {__version__}\n")
        return SUCCESS
    completing = _COMPLETE in os.environ or first in ("--install-completion", "--show-completion")
    if first.startswith("-") and not completing and first not in ("-h", "--help"):
        report_wrong_usage(USAGE, "edge-rt", f"No such option: {first}")
    app, commands = _typer_app(own_commands=completing)
    if completing or first in commands:
        app(args=words, prog_name="edge-rt")  # raises SystemExit
    if first and not first.startswith("-"):
        near = similar(first, [*COMMANDS, *commands])
        report_wrong_usage(USAGE, "edge-rt", f"No such command '{first}'." + (f" Did you mean '{near[0]}'?" if near else ""))
    rows = [*((name, summary) for name, (_, _, summary) in COMMANDS.items()), *commands.items()]
    write(HELP + table(rows, "  "))
    return SUCCESS if first else WRONG_USAGE


def _typer_app(own_commands: bool) -> tuple[Any, dict[str, str]]:
    """The typer application with the commands of plugins, and the first line of help of each; (None, {}) if no plugin has commands.

    ``own_commands`` adds edge-rt's own commands by name and options, which is what shell completion needs; they do nothing.
    """
    from edge_rt.plugin_host.registry import Registry

    registry = Registry.load()
    if not own_commands and not any("edge_rt_cli_commands" in plugin.hooks for plugin in registry.plugins):
        return None, {}
    import typer

    names = {"help_option_names": ["-h", "--help"]}
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, context_settings=names)
    app.callback()(lambda: None)  # without a callback typer makes an only command the whole application
    for name in COMMANDS if own_commands else ():
        app.command(name)(_completed(command_class(name)))
    registry.add_cli_commands(app)
    commands = typer.main.get_group(app).commands
    return app, {name: command.get_short_help_str(100) for name, command in commands.items()}


def _completed(kind: type[Command]) -> Callable[..., None]:
    """A function with a parameter for each option, from which typer learns what it can complete."""
    import inspect

    import typer

    from edge_rt.cli.options import help_text, specs

    def nothing(**values: object) -> None:
        """Never called."""

    nothing.__doc__ = help_text(kind)
    parameters = []
    for name, (spec, annotation) in specs(kind).items():
        default = typer.Option(None, *spec.flags, help=spec.help) if spec.flags else typer.Argument(None, help=spec.help)
        kind_of_value = bool if annotation == "bool" else str
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind_of_value))
    nothing.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return nothing


if __name__ == "__main__":
    sys.exit(main())
