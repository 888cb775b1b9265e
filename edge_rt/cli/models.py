"""`edge-rt models`: what `-m` takes by name."""

from __future__ import annotations

from edge_rt.cli.options import JsonOption
from edge_rt.cli.output import table, write, write_json
from edge_rt.model_hub import format_size

HELP = """List models by name.

Those in the cache, and those that `edge-rt pull` can fetch.

\b
Examples:
  edge-rt models
  edge-rt models --json
"""


class Options(JsonOption):
    """The command's options."""


def run(options: Options) -> int:
    """List."""
    from edge_rt import model_hub

    here = model_hub.installed_models()
    absent = [known for known in model_hub.CATALOG if known.name not in {model.name for model in here}]
    if options.json:
        installed = [{"name": m.name, "path": str(m.path), "size": m.size, "known": m.known is not None} for m in here]
        available = [known._asdict() for known in absent]
        write_json({"installed": installed, "available": available}, indent=2)
        return 0
    rows = [(model.name, format_size(model.size), str(model.path)) for model in here]
    rows += [
        (known.name, format_size(known.size), f"not here; edge-rt pull {known.name}  ({known.summary}, {known.licence})")
        for known in absent
    ]
    write(table(rows))
    return 0
