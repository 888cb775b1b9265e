"""`edge-rt doctor`: what edge-rt found on this machine, and what stands in its way."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from edge_rt.cli.doctor_devices import device_rows, devices
from edge_rt.cli.options import JsonOption, option
from edge_rt.cli.output import table, write, write_json
from edge_rt.model_hub import format_size

HELP = """Show what edge-rt found on this machine.

Versions, the native library, processors, memory, devices, plugins, cache.
Every device says how it is now, and what its figures rest on: measured on this device, simulated, or projected from data sheets.
The exit status is 1 if no model can run here.

\b
Examples:
  edge-rt doctor
  edge-rt doctor --probe
  edge-rt doctor --json > report.json
  edge-rt doctor --rules rules.toml
"""


class Options(JsonOption):
    """The command's options."""

    probe: bool = option(False, "--probe", "Measure how fast each device is: takes all of it for half a second.")
    rules: str | None = option(None, "--rules FILE", "Look at these rules for post-processors too.")


def run(options: Options) -> int:
    """Look and print."""
    found = facts(options.rules, options.probe)
    if options.json:
        write_json(found, indent=2)
    else:
        write(_text(found))
    return 1 if found["problems"] else 0


def facts(rules: str | None = None, probe: bool = False) -> dict[str, Any]:
    """Everything the command shows; ``problems`` are what keeps every model from running, or the rules from being used. Sizes in bytes.

    ``probe``: measure how fast devices are.
    """
    from edge_rt.cli.plugins import facts as plugin_facts
    from edge_rt.cli.plugins import silence_warnings
    from edge_rt.cli.report import versions
    from edge_rt.cli.rules import facts as rule_facts
    from edge_rt.plugin_host.registry import Registry

    silence_warnings()
    registry = Registry.load()
    found: dict[str, Any] = {
        "versions": versions(),
        "library": _library(),
        "processors": _processors(),
        "memory": _memory(),
        "devices": devices(registry, probe),
        "plugins": plugin_facts(registry)["plugins"],
        "cache": _cache(),
        "rules": rule_facts(rules, registry) if rules is not None else None,
    }
    usable = [device["name"] for device in found["devices"] if device["usable"]]
    problems = [] if usable else ["no device can be used"]
    if not registry.engines():
        problems.append("no engine is installed")
    if not found["library"]["file"]:
        problems.append(found["library"]["verdict"])
    if found["rules"] and not found["rules"]["ok"]:
        problems.append(f"the rules cannot be used: {found['rules']['message']}")
    return {**found, "problems": problems}


def _library() -> dict[str, Any]:
    from edge_rt.core.weights.repack import layouts
    from edge_rt.native import abi

    report = abi.report()
    return {
        "file": report.library,
        "ggml": report.ggml_version,
        "commit": report.ggml_commit,
        "known": list(abi.KNOWN_VERSIONS),
        "features": list(report.cpu_features),
        "layouts": [] if report.problem else list(layouts()),
        "verdict": report.problem or "as expected",
    }


def _processors() -> dict[str, Any]:
    import platform

    from edge_rt.config import available_cpus

    return {"machine": platform.machine(), "installed": os.cpu_count(), "available": available_cpus(), "load": _load()}


def _load() -> float | None:
    """Processes that ran or waited, over the last minute; None where the system cannot say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def _memory() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    return {"total": memory.total, "available": memory.available, "cgroup_limit": _cgroup_limit(memory.total), "lockable": _lockable()}


def _cgroup_limit(total: int) -> int | None:
    """The cgroup's limit in bytes, None without one (a version 1 cgroup says so with a huge number)."""
    for path in _CGROUP_LIMITS:
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):
            continue
        return limit if limit < total else None
    return None


def _lockable() -> int | None:
    """Bytes this process may lock in memory, which --memory needs; None: no limit, or unknown."""
    try:
        import resource
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _cache() -> dict[str, Any]:
    from edge_rt import model_hub
    from edge_rt.config import cache_dir, models_dir, packed_dir

    folder = cache_dir()
    return {
        "folder": str(folder),
        "writable": _writable(folder),
        "models": _bytes(models_dir()),
        "packed": _bytes(packed_dir()),
        "installed": [model.name for model in model_hub.installed_models()],
    }


def _writable(folder: Path) -> bool:
    """Whether a file can really be made there (permission bits say little on a read-only file system, or to root)."""
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


# ---- as text ---------------------------------------------------------------------------------------------------------


def _text(found: dict[str, Any]) -> str:
    library, cpus, memory, cache = (found[key] for key in ("library", "processors", "memory", "cache"))
    sections: dict[str, list[tuple[str, ...]]] = {
        "Versions": list(found["versions"].items()),
        "Native library": [
            ("folder", library["file"] or "not found"),
            ("ggml", f"{library['ggml']} ({library['commit']}); known: {', '.join(library['known'])}"),
            ("verdict", library["verdict"]),
            ("built for", ", ".join(library["features"]) or "nothing beyond the baseline"),
            ("packs for", ", ".join(library["layouts"]) or "nothing: it runs weights as they are in the file"),
        ],
        "Processors": [
            ("machine", cpus["machine"]),
            ("available", f"{cpus['available']} of {cpus['installed']}"),
            ("load", f"{cpus['load']:.2f}" if cpus["load"] is not None else "unknown"),
        ],
        "Memory": [
            ("available", f"{format_size(memory['available'])} of {format_size(memory['total'])}"),
            ("cgroup limit", format_size(memory["cgroup_limit"]) if memory["cgroup_limit"] is not None else "none"),
            ("lockable", format_size(memory["lockable"]) if memory["lockable"] is not None else "no limit"),
        ],
        "Devices": [row for device in found["devices"] for row in device_rows(device)],
        "Plugins": [(plugin["name"], plugin["state"], plugin["reason"] or ", ".join(plugin["offers"])) for plugin in found["plugins"]],
        "Cache": [
            ("folder", cache["folder"] + ("" if cache["writable"] else "  NOT WRITABLE: set EDGE_RT_CACHE to another folder")),
            ("models", f"{format_size(cache['models'])}: {', '.join(cache['installed']) or 'none; edge-rt pull smollm2 fetches one'}"),
            ("packed weights", format_size(cache["packed"])),
        ],
        "Rules": _rule_rows(found["rules"]),
        "Problems": [(problem,) for problem in found["problems"]],
    }
    return "\n".join(f"{title}\n{table(rows, '  ')}" for title, rows in sections.items() if rows)


def _rule_rows(rules: dict[str, Any] | None) -> list[tuple[str, ...]]:
    if rules is None:
        return []
    if not rules["ok"]:
        return [("wrong", rules["message"])]
    rows = [("file", rules["file"]), ("version", rules["version"]), ("pipeline", ", ".join(one["name"] for one in rules["pipeline"]))]
    return [*rows, *(("names", file) for file in rules["files"])]
