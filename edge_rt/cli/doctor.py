"""`edge-rt doctor` and `edge-rt plugins`: what edge-rt found on this machine and whether it works; and reports of bugs."""

from __future__ import annotations

import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_rt import __version__, model_hub
from edge_rt.cli.options import JsonOption, option
from edge_rt.cli.output import table, write, write_json
from edge_rt.config import available_cpus, cache_dir, models_dir, packed_dir
from edge_rt.errors import EdgeError
from edge_rt.hardware.profile import FIGURES
from edge_rt.hooks import HasProfile, Refusal
from edge_rt.model_hub import format_size
from edge_rt.plugin_host.guard import PluginDevice
from edge_rt.plugin_host.registry import Registry

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_HEALTH_INTERVAL = 0.02
"""Seconds between two readings of a device: some of its meters are counters, whose difference is the power."""
_GIGA = 1e9
_BY_NAME = {
    "embedders": ("embedder", "Embedders for --embedder"),
    "post_processors": ("post-processor", "Post-processors for --post"),
}
"""What users choose by name: key in the JSON of `edge-rt plugins` -> kind of offer, title."""


class DoctorCommand(JsonOption):
    """Show what edge-rt found on this machine.

    Versions, the native library, processors, memory, devices, plugins, cache.
    Every device says how it is now, and what its figures rest on: measured on this device, simulated, or projected from data sheets.
    The exit status is 1 if no model can run here.

    Examples:
      edge-rt doctor
      edge-rt doctor --probe
      edge-rt doctor --json > report.json
      edge-rt doctor --rules rules.toml
    """

    probe: bool = option(False, "--probe", "Measure how fast each device is: takes all of it for half a second.")
    rules: str | None = option(None, "--rules FILE", "Look at these rules for post-processors too.")

    def run(self) -> int:
        found = facts(self.rules, self.probe)
        if self.json:
            write_json(found, indent=2)
        else:
            write(_text(found))
        return 1 if found["problems"] else 0


class PluginsCommand(JsonOption):
    """List plugins and what they offer.

    One that does not work is listed with the reason.

    Examples:
      edge-rt plugins
      edge-rt plugins --json
    """

    def run(self) -> int:
        found = plugin_facts(_load_plugins())
        if self.json:
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


# ---- facts -----------------------------------------------------------------------------------------------------------


def _load_plugins() -> Registry:
    """The installed plugins. Broken ones, which the registry logs, are not logged: these commands list them."""
    logging.getLogger("edge_rt.plugins").setLevel(logging.ERROR)
    return Registry.load()


def facts(rules: str | None = None, probe: bool = False) -> dict[str, Any]:
    """What `edge-rt doctor` shows; sizes in bytes. ``rules``: a rule file to check. ``probe``: measure the speed of devices.

    ``problems`` lists what keeps every model from running, or the rules from being used.
    """
    import psutil

    from edge_rt.cli.post import rule_facts
    from edge_rt.core.weights.repack import layouts
    from edge_rt.native import abi

    registry, library, memory = _load_plugins(), abi.report(), psutil.virtual_memory()
    found: dict[str, Any] = {
        "versions": versions(),
        "library": {
            "file": library.library,
            "ggml": library.ggml_version,
            "commit": library.ggml_commit,
            "known": list(abi.KNOWN_VERSIONS),
            "features": list(library.cpu_features),
            "layouts": [] if library.problem else list(layouts()),
            "verdict": library.problem or "as expected",
        },
        "processors": {
            "machine": platform.machine(), "installed": os.cpu_count(), "available": available_cpus(), "load": _load(),
        },
        "memory": {
            "total": memory.total, "available": memory.available, "cgroup_limit": _cgroup_limit(memory.total), "lockable": _lockable(),
        },
        "devices": devices(registry, probe),
        "plugins": plugin_facts(registry)["plugins"],
        "cache": {
            "folder": str(cache_dir()),
            "writable": _is_writable(cache_dir()),
            "models": _size(models_dir()),
            "packed": _size(packed_dir()),
            "installed": [model.name for model in model_hub.installed_models()],
        },
        "rules": rule_facts(rules, registry) if rules is not None else None,
    }  # fmt: skip
    problems = [] if any(device["usable"] for device in found["devices"]) else ["no device can be used"]
    if not registry.engines():
        problems.append("no engine is installed")
    if not library.library:
        problems.append(found["library"]["verdict"])
    if found["rules"] and not found["rules"]["ok"]:
        problems.append(f"the rules cannot be used: {found['rules']['message']}")
    return {**found, "problems": problems}


def versions() -> dict[str, str]:
    """Versions by name. Loads no native library."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"edge-rt": __version__, "Python": platform.python_version(), "platform": platform.platform()}
    for package in ("llama-cpp-python", "gguf", "numpy", "pluggy", "typer"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _load() -> float | None:
    """Processes that wait for a processor, as a mean of the last minute; None on systems that do not count them."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def _cgroup_limit(total: int) -> int | None:
    """The cgroup's limit in bytes, None without one (which a version 1 cgroup reports as a huge number)."""
    for path in _CGROUP_LIMITS:
        try:
            limit = int(Path(path).read_text())
        except (OSError, ValueError):
            continue
        return limit if limit < total else None
    return None


def _lockable() -> int | None:
    """Bytes this process may lock in memory, which --memory needs; None for no limit, and on systems without one."""
    try:
        import resource
    except ImportError:
        return None
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is_writable(folder: Path) -> bool:
    """Whether a file can be created there. Permission bits do not tell on a read-only file system, or for root."""
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def plugin_facts(registry: Registry) -> dict[str, Any]:
    """Plugins with their states and offers. Collects the offers of each, since that is where a plugin may fail."""
    kinds: dict[str, Mapping[str, Any]] = {
        "device": registry.devices(),
        "engine": registry.engines(),
        "context policy": registry.context_policies(),
        "grader": registry.graders(),
        "embedder": registry.embedders(),
        "post-processor": registry.post_processors(),
    }
    offers = [(item.plugin, f"{kind} {name}") for kind, items in kinds.items() for name, item in items.items()]
    plugins = [{**one._asdict(), "offers": [offer for plugin, offer in offers if plugin == one.name]} for one in registry.plugins]
    by_name = {
        key: [{"name": name, "description": item.description} for name, item in kinds[kind].items()] for key, (kind, _) in _BY_NAME.items()
    }
    return {"plugins": plugins, **by_name}


def devices(registry: Registry, probe: bool) -> list[dict[str, Any]]:
    """Each device as JSON, with its profile only if ``probe`` is set.

    ``health`` and ``profile`` are None where the device has none or fails; ``health_error`` and ``profile_error`` are the failures.
    """
    found = []
    for name, device in registry.devices().items():
        answer = registry.probe(name)
        one = {"name": name, "plugin": device.plugin, "usable": not isinstance(answer, Refusal), **answer._asdict()}
        if one["usable"]:
            one |= _result("health", _health, device)
            one |= {"has_profile": isinstance(device.device, HasProfile), "profile": None, "profile_error": None}
            if probe:
                one |= _result("profile", _profile, device)
        found.append(one)
    return found


def _result(key: str, read: Callable[[PluginDevice], dict[str, Any] | None], device: PluginDevice) -> dict[str, Any]:
    try:
        return {key: read(device), f"{key}_error": None}
    except EdgeError as error:
        return {key: None, f"{key}_error": str(error)}


def _health(device: PluginDevice) -> dict[str, Any] | None:
    if device.health() is None:
        return None
    time.sleep(_HEALTH_INTERVAL)
    health = device.health()
    return None if health is None else health._asdict()


def _profile(device: PluginDevice) -> dict[str, Any] | None:
    """With a basis for each figure, and numbers of threads as text: JSON has no other keys."""
    profile = device.profile()
    if profile is None:
        return None
    return {
        **profile._asdict(),
        "cores": [{**cores._asdict(), "caches": [cache._asdict() for cache in cores.caches]} for cores in profile.cores],
        "bandwidth": {str(threads): rate for threads, rate in profile.bandwidth.items()},
        "operations": dict(profile.operations),
        "basis": {field: profile.basis.get(field, "unknown") for field in FIGURES},
    }


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
        "Rules": _rule_rows(found["rules"]) if found["rules"] else [],
        "Problems": [(problem,) for problem in found["problems"]],
    }
    return "\n".join(f"{title}\n{table(rows, '  ')}" for title, rows in sections.items() if rows)


def _rule_rows(rules: dict[str, Any]) -> list[tuple[str, ...]]:
    if not rules["ok"]:
        return [("wrong", rules["message"])]
    pipeline = ", ".join(one["name"] for one in rules["pipeline"])
    rows = [("file", rules["file"]), ("version", rules["version"]), ("pipeline", pipeline)]
    return [*rows, *(("names", file) for file in rules["files"])]


def device_rows(device: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The lines of a device, each as name and text; the name only in the first."""
    if not device["usable"]:
        return [(device["name"], f"refused: {device['reason']}"), *([("", device["remedy"])] if device["remedy"] else [])]
    return [
        (device["name"], f"{device['description']}, {format_size(device['memory_bytes'])}; score {device['score']:g}, {device['basis']}"),
        ("", f"engines {', '.join(device['engines'])}; features {', '.join(device['features']) or 'none stated'}"),
        *(("", f"{title:<11} {text}") for title, text in (*_health_rows(device), *_profile_rows(device))),
    ]


def _health_rows(device: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    health = device["health"]
    if device["health_error"]:
        yield "now", device["health_error"]
    elif health is None:
        yield "now", "it does not say"
    else:
        now = [f"{health['temperature']:.1f} degrees Celsius"] if health["temperature"] is not None else []
        now += [f"{health['power']:.1f} W"] if health["power"] is not None else []
        if health["clock"] is not None:
            highest = f" of {health['most'] / _GIGA:.2f}" if health["most"] is not None else ""
            now.append(f"{health['clock'] / _GIGA:.2f}{highest} GHz")
        yield "now", ", ".join(now) or "its sensors say nothing"
        if health["throttled"]:
            yield "slowed down", "; ".join(health["throttled"])


def _profile_rows(device: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    profile = device["profile"]
    if device["profile_error"]:
        yield "profile", device["profile_error"]
    elif profile is None:
        yield "profile", "edge-rt doctor --probe measures it" if device["has_profile"] else "it does not say"
    else:
        unknown = []
        for field in FIGURES:
            if lines := _figure(field, profile[field]):
                yield from ((field.replace("_", " "), f"{text} ({profile['basis'][field]})") for text in lines)
            elif not (field == "link" and profile["kind"] == "cpu"):  # the processor's memory is the host's: it has no link
                unknown.append(field.replace("_", " "))
        if unknown:
            yield "unknown", ", ".join(unknown)


def _figure(field: str, value: Any) -> list[str]:
    """The lines for a figure of a profile; none if it is not known."""
    if not value:
        return []
    if field == "cores":
        return [_cores(cores) for cores in value]
    if field == "bandwidth":
        rates = ((format_size(rate), threads, "thread" if threads == "1" else "threads") for threads, rate in value.items())
        return [", ".join(f"{rate}/s by {threads} {noun}" for rate, threads, noun in rates)]
    if field == "operations":
        return [", ".join(f"{kind} {rate / _GIGA:.4g} Gop/s" for kind, rate in value.items())]
    if field == "memory":
        return [format_size(value)]
    return [f"{format_size(value)}/s" if field in ("storage", "link") else f"{value:g} {'degrees Celsius' if field == 'hottest' else 'W'}"]


def _cores(cores: Mapping[str, Any]) -> str:
    text = f"{cores['number']} x {cores['name']}" + (f" at {cores['clock'] / _GIGA:.2f} GHz" if cores["clock"] is not None else "")
    text += f", CPUs {_ranges(cores['cpus'])}" if cores["cpus"] else ""
    for cache in cores["caches"]:
        size = cache["size"]  # in binary units, as makers of processors write it
        text += f", L{cache['level']} " + (f"{size / (1 << 20):g} MiB" if size >= 1 << 20 else f"{size / (1 << 10):g} KiB")
        text += f" for {cache['shared_by']}" if cache["shared_by"] > 1 else ""
    return text


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in ascending order as text such as ``0-3,8``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


# ---- reports of bugs -------------------------------------------------------------------------------------------------


def write_report(error: BaseException, command: str) -> str:
    """Write a file with what a developer needs, and nothing that the user typed. Returns the sentence that says where it is.

    Where no file can be written, the sentence carries the report.
    """
    import traceback

    lines = {**versions(), "command": command or "(none of edge-rt's own)"}
    text = "".join(f"{name}: {value}\n" for name, value in lines.items()) + "\n" + "".join(traceback.format_exception(error))
    name = f"edge-rt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    problems = []
    for folder in (cache_dir() / "reports", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as problem:
            problems.append(f"{folder}: {problem.strerror}")
        else:
            return f"This is a bug in edge-rt or in a library it uses. A report is in {folder / name}"
    return f"This is a bug in edge-rt or in a library it uses. No report could be written ({'; '.join(problems)}):\n{text}"
