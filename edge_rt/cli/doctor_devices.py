"""What `edge-rt doctor` shows of each device: whether it can be used, what it is like, and how it is now."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edge_rt.errors import EdgeError
from edge_rt.model_hub import format_size
from edge_rt.profile_check import FIGURES

if TYPE_CHECKING:
    from edge_rt.device_profile import Profile
    from edge_rt.plugin_host.guard import PluginDevice
    from edge_rt.plugin_host.registry import Registry

_APART = 0.02
"""Seconds between two looks at a device: some of its meters are counters, which tell the power by their change."""
_GIGA = 1e9


def devices(registry: Registry, probe: bool) -> list[dict[str, Any]]:
    """Each device as JSON. ``health``: None if it does not say. ``profile``: None if it does not say, or was not asked (``probe``); why it
    could not say is in ``profile_error``, ``health_error``."""
    from edge_rt.hooks import HasProfile, Refusal

    found = []
    for name, device in registry.devices().items():
        answer = registry.probe(name)
        usable = not isinstance(answer, Refusal)
        one = {"name": name, "plugin": device.plugin, "usable": usable, **answer._asdict()}
        if usable:
            one |= _health(device) | {"has_profile": isinstance(device.device, HasProfile), "profile": None, "profile_error": None}
            if probe:
                one |= _profile(device)
        found.append(one)
    return found


def _health(device: PluginDevice) -> dict[str, Any]:
    try:
        if device.health() is None:
            return {"health": None, "health_error": None}
        time.sleep(_APART)
        health = device.health()
    except EdgeError as error:
        return {"health": None, "health_error": str(error)}
    return {"health": health._asdict() if health is not None else None, "health_error": None}


def _profile(device: PluginDevice) -> dict[str, Any]:
    try:
        profile = device.profile()
    except EdgeError as error:
        return {"profile": None, "profile_error": str(error)}
    return {"profile": _as_json(profile) if profile is not None else None, "profile_error": None}


def _as_json(profile: Profile) -> dict[str, Any]:
    """With a basis for each field, and threads as text: JSON has no other keys."""
    return {
        **profile._asdict(),
        "cores": [{**cores._asdict(), "caches": [cache._asdict() for cache in cores.caches]} for cores in profile.cores],
        "bandwidth": {str(threads): rate for threads, rate in profile.bandwidth.items()},
        "operations": dict(profile.operations),
        "basis": {field: profile.basis.get(field, "unknown") for field in FIGURES},
    }


# ---- as text ---------------------------------------------------------------------------------------------------------


def device_rows(device: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The lines of a device: its name and a text."""
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
        yield "now", ", ".join(_now(health)) or "its sensors say nothing"
        if health["throttled"]:
            yield "slowed down", "; ".join(health["throttled"])


def _now(health: Mapping[str, Any]) -> Iterator[str]:
    if health["temperature"] is not None:
        yield f"{health['temperature']:.1f} degrees Celsius"
    if health["power"] is not None:
        yield f"{health['power']:.1f} W"
    if health["clock"] is not None:
        most = f" of {health['most'] / _GIGA:.2f}" if health["most"] is not None else ""
        yield f"{health['clock'] / _GIGA:.2f}{most} GHz"


def _profile_rows(device: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    profile = device["profile"]
    if device["profile_error"]:
        yield "profile", device["profile_error"]
    elif profile is None:
        yield "profile", "edge-rt doctor --probe measures it" if device["has_profile"] else "it does not say"
    else:
        told = [(field, text) for field in FIGURES for text in _shown(field, profile[field])]
        yield from ((field.replace("_", " "), f"{text} ({profile['basis'][field]})") for field, text in told)
        # The processor's memory is the host's: there is no link to tell of.
        unknown = [field for field in FIGURES if field not in dict(told) and not (field == "link" and profile["kind"] == "cpu")]
        if unknown:
            yield "unknown", ", ".join(field.replace("_", " ") for field in unknown)


def _shown(field: str, value: Any) -> Iterator[str]:
    """A figure for people, a line each; none for one that is not known."""
    if not value:
        return
    if field == "cores":
        yield from map(_cores, value)
    elif field == "bandwidth":
        yield ", ".join(f"{_rate(rate)} by {threads} {'thread' if threads == '1' else 'threads'}" for threads, rate in value.items())
    elif field == "operations":
        yield ", ".join(f"{kind} {rate / _GIGA:.4g} Gop/s" for kind, rate in value.items())
    elif field == "memory":
        yield format_size(value)
    elif field in ("storage", "link"):
        yield _rate(value)
    else:
        yield f"{value:g} {'degrees Celsius' if field == 'hottest' else 'W'}"


def _rate(value: float) -> str:
    return f"{format_size(value)}/s"


def _cores(cores: Mapping[str, Any]) -> str:
    clock = f" at {cores['clock'] / _GIGA:.2f} GHz" if cores["clock"] is not None else ""
    caches = ", ".join(f"L{cache['level']} {_binary(cache['size'])}{_shared(cache)}" for cache in cores["caches"])
    cpus = f", CPUs {_ranges(cores['cpus'])}" if cores["cpus"] else ""
    return f"{cores['number']} x {cores['name']}{clock}{cpus}" + (f", {caches}" if caches else "")


def _shared(cache: Mapping[str, Any]) -> str:
    return f" for {cache['shared_by']}" if cache["shared_by"] > 1 else ""


def _binary(count: int) -> str:
    """Bytes of a cache, as makers of processors write them: 32 KiB."""
    return f"{count / (1 << 20):g} MiB" if count >= 1 << 20 else f"{count / (1 << 10):g} KiB"


def _ranges(numbers: Sequence[int]) -> str:
    """0-3,8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
