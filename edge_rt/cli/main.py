"""The command line `edge-rt`: which command, what becomes of an error, and with which status the process ends.

A command is a module with ``HELP``, a class ``Options`` (see types.py) and ``run(options) -> int``; COMMANDS is the list.
The time until `edge-rt run` opens its model counts, so this module and types.py import little, and typer only when
``quick_parse`` does not understand the line.

Status: 0 done; 1 the user can mend it; 2 wrong usage; 3 a bug (a report is written); 130 interrupted; 141 standard output closed.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from edge_rt.cli import interrupts
from edge_rt.errors import OptionError

COMMANDS = {
    "run": "edge_rt.cli.run",
    "chat": "edge_rt.cli.chat",
    "embed": "edge_rt.cli.embed",
    "post": "edge_rt.cli.post",
    "rules": "edge_rt.cli.rules",
    "pull": "edge_rt.cli.pull",
    "models": "edge_rt.cli.models",
    "inspect": "edge_rt.cli.inspect_model",
    "plan": "edge_rt.cli.plan",
    "compile": "edge_rt.cli.compile",
    "context": "edge_rt.cli.context",
    "plugins": "edge_rt.cli.plugins",
    "doctor": "edge_rt.cli.doctor",
    "bench": "edge_rt.cli.bench",
    "serve": "edge_rt.cli.serve",
}

SUCCESS, USER_ERROR, BUG, INTERRUPTED, OUTPUT_CLOSED = 0, 1, 3, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if level := os.environ.get("EDGE_RT_LOG"):
            _log(level)
        # Until a command runs there is nothing to put in order: an interrupt during the imports ends the process at once.
        with QuietInterrupts():
            start = _command(words)
        interrupts.remember()
        return start()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return INTERRUPTED if interrupts.pending() else _status(error, words)


def _log(level: str) -> None:
    """Show on standard error what edge-rt and the native libraries log."""
    import logging

    if level.lower() not in ("debug", "info", "warning", "error"):
        raise OptionError(f"EDGE_RT_LOG takes debug, info, warning or error and not {level!r}")
    logging.basicConfig(level=level.upper(), format="%(levelname)s %(name)s: %(message)s")


def _command(words: list[str]) -> Callable[[], int]:
    """What carries out the line, with everything imported that it needs before it opens a model."""
    if words == ["--version"]:
        return _version
    if not words or words[0] not in COMMANDS or "_EDGE_RT_COMPLETE" in os.environ:
        return lambda: _by_typer(words)  # help, completion, a plugin's command: these run inside typer
    from edge_rt.cli.options import quick_parse

    command = import_module(COMMANDS[words[0]])
    options = quick_parse(command.Options, words[1:])
    if options is None:
        return lambda: _by_typer(words)
    return lambda: _run(command, options)


def _by_typer(words: list[str]) -> int:
    from edge_rt.cli.typer_app import parse

    parsed = parse(words, COMMANDS)
    return parsed if isinstance(parsed, int) else _run(*parsed)


def _run(command: Any, options: Any) -> int:
    from edge_rt.cli.options import check

    check(options)
    status: int = command.run(options)
    return status


def _version() -> int:
    from edge_rt import __version__
    from edge_rt.cli.output import write

    write(f"edge-rt {__version__}\n")
    return SUCCESS


class QuietInterrupts:
    """While it lasts, Ctrl-C ends the process with status 130 and without a traceback."""

    def __enter__(self) -> None:
        try:
            self.before = signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        except ValueError:  # not the main thread: a test, an embedding
            self.before = None

    def __exit__(self, *_: object) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)


def _status(error: Exception, words: list[str]) -> int:
    """Tell the person about an error and return the exit status for it."""
    from edge_rt.cli.output import OutputClosed, say
    from edge_rt.errors import Cancelled, UserError

    if isinstance(error, OutputClosed):
        return OUTPUT_CLOSED
    if isinstance(error, Cancelled):
        return INTERRUPTED
    if isinstance(error, UserError):
        say(f"error: {error}")
        return USER_ERROR
    from edge_rt.cli.report import write_report

    say(f"error: {type(error).__name__}: {error}")
    say(write_report(error, words[0] if words and words[0] in COMMANDS else ""))
    return BUG


if __name__ == "__main__":
    sys.exit(main())
