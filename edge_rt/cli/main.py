"""The command line `edge-rt`: finds the command, runs it, reports errors and sets the exit status.

Exit status: 0 success; 1 an error that the user can correct; 2 wrong usage; 3 a bug (a report is written); 130 interrupted;
141 standard output was closed. Start-up time counts, so a command's module is imported only when that command is asked for, and typer,
which plugins declare their commands with, only for a command that is none of edge-rt's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from edge_rt.cli import interrupts
from edge_rt.errors import OptionError

if TYPE_CHECKING:
    import typer

    from edge_rt.cli.options import Command

COMMANDS = {
    "run": ("edge_rt.cli.run", "RunCommand"),
    "chat": ("edge_rt.cli.chat", "ChatCommand"),
    "embed": ("edge_rt.cli.run", "EmbedCommand"),
    "post": ("edge_rt.cli.post", "PostCommand"),
    "rules": ("edge_rt.cli.post", "RulesCommand"),
    "pull": ("edge_rt.cli.models", "PullCommand"),
    "models": ("edge_rt.cli.models", "ModelsCommand"),
    "inspect": ("edge_rt.cli.models", "InspectCommand"),
    "plan": ("edge_rt.cli.compile", "PlanCommand"),
    "compile": ("edge_rt.cli.compile", "CompileCommand"),
    "context": ("edge_rt.cli.context", "ContextCommand"),
    "plugins": ("edge_rt.cli.doctor", "PluginsCommand"),
    "doctor": ("edge_rt.cli.doctor", "DoctorCommand"),
    "bench": ("edge_rt.cli.bench", "BenchCommand"),
    "serve": ("edge_rt.cli.serve", "ServeCommand"),
}
"""Name -> module and class."""

SUCCESS, USER_ERROR, WRONG_USAGE, BUG, INTERRUPTED, OUTPUT_CLOSED = 0, 1, 2, 3, 130, 141

USAGE = "edge-rt [OPTIONS] COMMAND [ARGS]..."
HEAD = f"""Usage: {USAGE}

Run language models on edge devices.

  edge-rt pull smollm2            fetch a small model
  edge-rt run "Why is the sky blue?"
  edge-rt chat -m model.gguf

Options:
  --version   Show the version and exit.
  -h, --help  Show this message and exit.

Commands:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if level := os.environ.get("EDGE_RT_LOG"):
            _log(level)
        # Nothing needs to be put in order before a command runs: an interrupt during the imports ends the process at once.
        with interrupts.ending(INTERRUPTED):
            start = _command(words)
        interrupts.remember()
        return start()
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:  # argparse and typer end so, after help too
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception as error:
        return INTERRUPTED if interrupts.pending() else _status(error, words)


def _log(level: str) -> None:
    """Log what edge-rt and the native libraries say on standard error."""
    import logging

    if level.lower() not in ("debug", "info", "warning", "error"):
        raise OptionError(f"EDGE_RT_LOG takes debug, info, warning or error and not {level!r}")
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")


def _command(words: list[str]) -> Callable[[], int]:
    """What carries out the line, with everything imported that it needs before it opens a model. Raises SystemExit for wrong usage."""
    name = words[0] if words else ""
    if name not in COMMANDS:
        return lambda: _other(words)
    kind = command_class(name)
    from edge_rt.cli.options import check, parse

    options = parse(name, kind, words[1:])

    def run() -> int:
        check(options)
        return options.run()

    return run


def command_class(name: str) -> type[Command]:
    """The class of one of edge-rt's own commands; imports its module."""
    module, attribute = COMMANDS[name]
    kind: type[Command] = getattr(import_module(module), attribute)
    return kind


# ---- help, version and the commands of plugins -----------------------------------------------------------------------


def _other(words: list[str]) -> int:
    """A line that does not begin with one of edge-rt's own commands."""
    from edge_rt import __version__
    from edge_rt.cli.options import similar, wrong_usage
    from edge_rt.cli.output import say, write

    if not words:
        say(HEAD + _list())
        return WRONG_USAGE
    if words[0] in ("-h", "--help"):
        write(HEAD + _list() + "\n")
    elif words[0] == "--version":
        write(f"edge-rt {__version__}\n")
    elif words[0].startswith("-"):
        wrong_usage(USAGE, "edge-rt", f"no such option: {words[0]}")
    else:
        app, names = _plugin_app()
        if words[0] not in names:
            wrong_usage(USAGE, "edge-rt", f"no such command: {words[0]}{similar(words[0], [*COMMANDS, *names])}")
        app(args=words, prog_name="edge-rt")
    return SUCCESS


def _list() -> str:
    """Every command with the first line of its help; those of plugins last."""
    rows = [*((name, command_class(name).__doc__ or "") for name in COMMANDS), *_plugin_app()[1].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text.partition(chr(10))[0]}".rstrip() for name, text in rows)


def _plugin_app() -> tuple[typer.Typer, dict[str, str]]:
    """The application that plugins add their commands to, and these commands' names with their help."""
    import typer

    from edge_rt.registry import Registry

    app = typer.Typer(
        rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip
    app.callback()(lambda: None)  # without a callback typer makes an only command the whole application
    Registry.load().add_cli_commands(app)
    group = typer.main.get_group(app)
    return app, {name: group.commands[name].get_short_help_str(100) for name in group.commands}


# ---- errors ----------------------------------------------------------------------------------------------------------


def _status(error: Exception, words: list[str]) -> int:
    """Report an error on standard error and return the exit status for it."""
    from edge_rt.cli.output import OutputClosed, say
    from edge_rt.errors import Cancelled, UserError

    if isinstance(error, OutputClosed):
        return OUTPUT_CLOSED
    if isinstance(error, Cancelled):
        return INTERRUPTED
    if isinstance(error, UserError):
        say(f"error: {error}")
        return USER_ERROR
    from edge_rt.cli.doctor import write_report

    say(f"error: {type(error).__name__}: {error}")
    say(write_report(error, words[0] if words and words[0] in COMMANDS else ""))
    return BUG


if __name__ == "__main__":
    sys.exit(main())
