"""`edge-rt rules check`: whether a rule file is right, and where it is not."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from edge_rt.cli.options import JsonOption, argument
from edge_rt.cli.output import table, write, write_json
from edge_rt.errors import EdgeError, OptionError, RuleError, UserError

if TYPE_CHECKING:
    from edge_rt.plugin_host.registry import Registry

HELP = """Check rules for post-processors.

Everything is compiled as for an answer. The first mistake is shown with its line, and the exit status is 1.

\b
Examples:
  edge-rt rules check rules.toml
  edge-rt rules check rules.toml --json | jq .line
"""


class Options(JsonOption):
    """The command's options."""

    action: str = argument(metavar="check", help="What to do: check.")
    file: str = argument(metavar="FILE", help="The rule file.")


def run(options: Options) -> int:
    """Check and print."""
    if options.action != "check":
        raise OptionError(f"edge-rt rules has no action {options.action!r}; write edge-rt rules check FILE")
    from edge_rt.plugin_host.registry import Registry

    found = facts(options.file, Registry.load())
    if options.json:
        write_json(found, indent=2)
        return 0 if found["ok"] else 1
    if not found["ok"]:
        raise UserError(found["message"])
    rows = [("POST-PROCESSOR", "IF IT FAILS"), *((one["name"], one["if_it_fails"]) for one in found["pipeline"])]
    write(f"{found['file']} is right, version {found['version']}, compiled in {found['milliseconds']} ms.\n" + table(rows))
    if found["files"]:
        write(f"It names {', '.join(found['files'])}.\n")
    return 0


def facts(file: str, registry: Registry) -> dict[str, Any]:
    """What a rule file says, or what is wrong with it."""
    from edge_rt.postprocess.rules import RuleFile

    started = time.perf_counter()
    try:
        book = RuleFile(file, registry, watch=False)
    except EdgeError as error:
        line, reason = (error.line, error.reason) if isinstance(error, RuleError) else (None, str(error))
        return {"file": file, "ok": False, "line": line, "reason": reason, "message": str(error)}
    rules = book.current
    return {
        "file": file,
        "ok": True,
        "version": rules.version,
        "milliseconds": round((time.perf_counter() - started) * 1000, 1),
        "pipeline": [{"name": name, "if_it_fails": "the stream stops" if rules.fails_closed(name) else "left out"} for name in rules.order],
        "files": [str(path) for path in rules.files],
    }
