"""`edge-rt plugins`: what is installed, and what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from edge_rt.cli.options import JsonOption
from edge_rt.cli.output import table, write, write_json

if TYPE_CHECKING:
    from edge_rt.plugin_host.registry import Registry

HELP = """List plugins and what they offer.

One that does not work is listed with the reason.

\b
Examples:
  edge-rt plugins
  edge-rt plugins --json
"""

_BY_NAME = {
    "embedders": ("embedder", "Embedders for --embedder"),
    "post_processors": ("post-processor", "Post-processors for --post"),
}
"""Key in the JSON output -> kind, title: what a request or a model is given by name."""


class Options(JsonOption):
    """The command's options."""


def run(options: Options) -> int:
    """List."""
    from edge_rt.plugin_host.registry import Registry

    silence_warnings()
    found = facts(Registry.load())
    if options.json:
        write_json(found, indent=2)
        return 0
    rows = [("PLUGIN", "FROM", "STATE", "OFFERS")]
    for plugin in found["plugins"]:
        source = f"{plugin['distribution']} {plugin['version']}".strip()
        rows.append((plugin["name"], source, plugin["state"], plugin["reason"] or ", ".join(plugin["offers"])))
    write(table(rows))
    for key, (_, title) in _BY_NAME.items():
        if found[key]:
            write(f"\n{title}:\n" + table([(one["name"], one["description"]) for one in found[key]], "  "))
    return 0


def silence_warnings() -> None:
    """What the registry would log of broken plugins, this command shows."""
    import logging

    logging.getLogger("edge_rt.plugins").setLevel(logging.ERROR)


def facts(registry: Registry) -> dict[str, Any]:
    """Plugins with their states and offers. Asks each for its offers, since that is where it may fail."""
    kinds: dict[str, Mapping[str, Any]] = {
        "device": registry.devices(),
        "engine": registry.engines(),
        "context policy": registry.context_policies(),
        "grader": registry.graders(),
        "embedder": registry.embedders(),
        "post-processor": registry.post_processors(),
    }
    plugins = [{**status._asdict(), "offers": list(_offers(status.name, kinds))} for status in registry.plugins]
    return {"plugins": plugins, **{key: _described(kinds[kind]) for key, (kind, _) in _BY_NAME.items()}}


def _described(items: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"name": name, "description": item.description} for name, item in items.items()]


def _offers(plugin: str, kinds: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    return (f"{kind} {name}" for kind, items in kinds.items() for name, item in items.items() if item.plugin == plugin)
