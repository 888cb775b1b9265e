"""``edge-rt arm``: what this board is, which kernels its cores take, and whether it is throttled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer

from edge_rt.hooks import Refusal
from edge_rt_arm.device import Arm, describe
from edge_rt_arm.firmware import Answer, Firmware
from edge_rt_arm.layouts import packed_layouts

_REBUILD = "CMAKE_ARGS=-DGGML_NATIVE=ON pip install --force-reinstall --no-binary :all: llama-cpp-python==0.3.36"


def add(app: typer.Typer) -> None:
    """Add the command."""

    @app.command("arm", help="Show what this ARM board or phone is, which packed kernels it takes, and whether it is throttled.")
    def arm(as_json: bool = typer.Option(False, "--json", help="Write JSON on standard output.")) -> None:
        found = facts(Path("/"), Firmware())
        typer.echo(json.dumps(found, indent=2) if as_json else as_text(found))
        if "refused" in found:
            raise typer.Exit(1)


def facts(root: Path, firmware: Firmware) -> dict[str, Any]:
    """Everything the command shows."""
    device = Arm(root, firmware)
    answer = device.probe()
    if isinstance(answer, Refusal):
        return {"refused": f"{answer.reason}; {answer.remedy}"}
    seen = device.facts()
    built = library(seen.features, seen.vector_bytes)
    told = firmware.refresh() if seen.board and seen.board.is_raspberry else Answer()
    health = device.health()
    figures = seen.board.figures if seen.board else None
    return {
        "board": describe(seen),
        "cores": [cores._asdict() | {"caches": [cache._asdict() for cache in cores.caches]} for cores in seen.clusters],
        "features": list(seen.features),
        "layouts": packed_layouts(seen.features, built.get("vector_bytes", 0) or seen.vector_bytes),
        "threads": seen.placement.threads,
        "cpus": list(seen.placement.cpus),
        "figures": figures._asdict() if figures else None,
        "health": health._asdict(),
        "since_start": list(told.throttling.past) if told.throttling else None,
        "library": built,
    }


def library(features: tuple[str, ...], vector_bytes: int) -> dict[str, Any]:
    """What the installed libggml was built for, and the layouts it lacks on this processor for want of it."""
    from edge_rt.hooks import NativeError, ggml_features, ggml_vector_length

    names = {"fp16_va": "fp16", "matmul_int8": "i8mm"}
    try:
        built = [names.get(name, name) for name in ggml_features()]
        vector_bytes = ggml_vector_length() or vector_bytes  # the kernel's files do not say everywhere
    except NativeError as error:
        return {"problem": str(error)}
    used = [name for name in built if name in features]
    has = packed_layouts(used, vector_bytes)
    lost = {kind: name for kind, name in packed_layouts(features, vector_bytes).items() if has.get(kind) != name}
    unknown = [name for name in built if name in ("dotprod", "i8mm", "sve", "sme", "fp16") and name not in features]
    return {"built_for": built, "vector_bytes": vector_bytes, "lost": lost, "cannot_run": unknown}


def as_text(found: dict[str, Any]) -> str:
    """The same for people."""
    if "refused" in found:
        return f"refused  {found['refused']}"
    health, built = found["health"], found["library"]
    temperature = "unknown" if health["temperature"] is None else f"{health['temperature']:.1f} °C"
    slows = f"; slowed down from {found['figures']['slows']:g} °C" if found["figures"] else ""
    packed = ", ".join(f"{kind} {layout}" for kind, layout in found["layouts"].items())
    rows = [
        ("board", found["board"]),
        *(("cores", _cores(cores)) for cores in found["cores"]),
        ("features", ", ".join(found["features"])),
        ("packed", packed or "nothing: these cores have no dot products"),
        ("threads", f"{found['threads']}" + (f", on CPUs {', '.join(map(str, found['cpus']))}" if found["cpus"] else "")),
        ("temperature", temperature + slows),
        ("power", "unknown" if health["power"] is None else f"{health['power']:.1f} W"),
        ("throttled", "; ".join(health["throttled"]) or "no"),
    ]
    if found["since_start"] is not None:
        rows.append(("since start", "; ".join(found["since_start"]) or "never throttled"))
    rows += _library_rows(built)
    return "\n".join(f"{name:<12} {value}" for name, value in rows)


def _cores(cores: dict[str, Any]) -> str:
    clock = f" at {cores['clock'] / 1e9:.2f} GHz" if cores["clock"] else ""
    caches = ", ".join(f"L{cache['level']} {cache['size'] >> 10} KB" for cache in cores["caches"])
    return f"{cores['number']} x {cores['name']}{clock}" + (f", {caches}" if caches else "")


def _library_rows(built: dict[str, Any]) -> list[tuple[str, str]]:
    if "problem" in built:
        return [("library", built["problem"])]
    rows = [("library", f"built for {', '.join(built['built_for'])}")]
    if built["cannot_run"]:
        wrong = ", ".join(built["cannot_run"])
        rows.append(("", f"this processor has no {wrong}: the library may crash; build it here: {_REBUILD}"))
    if built["lost"]:
        lost = ", ".join(f"{kind} {layout}" for kind, layout in built["lost"].items())
        rows.append(("", f"it was not built for this processor and lacks {lost}; build it here: {_REBUILD}"))
    return rows
