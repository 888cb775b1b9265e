"""A model compiled for a device: a directory with a plan, a GGUF and packed weights, and how it is opened by the plan.

    plan.json      the decisions, where the model came from, and checksums of the other files
    model.gguf     the weights in the order in which they are used; stock llama.cpp reads it too
    model.pack     packed weights, where the target's layouts could be made
    model.compensation.gguf  what compensates for quantisation, where the model had that

The compiler (``edge_rt/compiler``) makes plans and writes directories; this module is what both it and the runtime know of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.errors import ModelFileError

if TYPE_CHECKING:
    from edge_rt.core.engine import EngineOptions

PLAN, MODEL, PACKED, COMPENSATION = "plan.json", "model.gguf", "model.pack", "model.compensation.gguf"
FORMAT = 1


class Gain(NamedTuple):
    """What a pass did: in words, and what it is predicted to gain.

    Ratios of before by after for seconds (``first``: to the first token from nothing in memory, ``token``: of each token) and of bytes in
    memory, more than 1 is better; 1 where it changes nothing. ``quality``: KL divergence to the source model, in nats a token, if known.
    """

    by: str
    what: str
    first: float = 1.0
    token: float = 1.0
    memory: float = 1.0
    quality: float | None = None


class PowerSetting(NamedTuple):
    """What to hold: watts at most and degrees Celsius at most (None: any); and what to begin with, threads and their share of the time."""

    watts: float | None = None
    celsius: float | None = None
    threads: int = 0
    duty: float = 1.0


class Plan(NamedTuple):
    """The decisions about one model on one target. A pass returns another plan (``_replace``) with its gain added.

    ``types``: ggml type names of tensors that get another than in the source. ``order``: names of all tensors, as they will lie in the
    file, () as in the source. ``alignment``: of each tensor in the file, bytes. ``joined``: what becomes one product, as
    ``attn_q|attn_k|attn_v``; None: whatever lies side by side. ``folded``: norms whose scales are ones in the file, since they were, or
    were multiplied into the weights behind them, so that nothing is multiplied with them. ``pack``: whether packed weights are used.
    ``chunk``: tokens of a prompt fed at once. ``prefetch``: bytes asked of the storage ahead of what is being read. ``threads``: at most,
    0: any; as many of them as are free. ``layers``: on the accelerator, None without one. ``locked``: units that stay in memory.
    ``memory``: bytes of weights that may be resident, the rest is streamed; None: all. ``context``: cells of a sequence, None: the
    model's own. ``key_type``: of cached keys.
    """

    target: str
    types: Mapping[str, str] = MappingProxyType({})
    order: tuple[str, ...] = ()
    alignment: int = 32
    joined: tuple[str, ...] | None = None
    folded: tuple[str, ...] = ()
    pack: bool = True
    chunk: int = 512
    prefetch: int = 8 << 20
    threads: int = 0
    layers: int | None = None
    locked: tuple[str, ...] = ()
    memory: int | None = None
    context: int | None = None
    key_type: str = "f16"
    power: PowerSetting = PowerSetting()
    gains: tuple[Gain, ...] = ()


class Pass(NamedTuple):
    """A pass of the compiler: a pure function from a plan to a plan. ``apply`` gets the plan and the situation
    (edge_rt/deploy/passes.py: the model's shape, the target and what is asked for), and raises OptionError for what cannot be had.
    """

    name: str
    description: str
    apply: Callable[[Plan, Any], Plan]


class Deployed(NamedTuple):
    """A directory that was opened: its plan, its files, and what ``plan.json`` says of where it came from."""

    folder: Path
    plan: Plan
    files: Mapping[str, str]
    provenance: Mapping[str, Any]

    @property
    def model(self) -> Path:
        """The GGUF file."""
        return self.folder / MODEL


def follow(deployed: Deployed | None, given: EngineOptions) -> EngineOptions:
    """Options by the plan of a directory, if it is one, where the caller gave none of his own. What it says of power is for ``limits``, and
    an accelerator itself takes as many blocks as fit it then.
    """
    if deployed is None:
        return given
    plan = deployed.plan
    own: dict[str, Any] = {"ggml.chunk": plan.chunk, "ggml.prefetch": plan.prefetch, "ggml.locked": plan.locked}
    own["ggml.folded"] = plan.folded
    if plan.joined is not None:
        own["ggml.joined"] = plan.joined
    if plan.threads:
        own["ggml.most_threads"] = plan.threads
    return given._replace(
        context=given.context or plan.context,
        memory=given.memory or plan.memory,
        pack=given.pack and plan.pack,
        key_type=given.key_type if given.key_type != "f16" else plan.key_type,  # type: ignore[arg-type]  # checked when it was read
        extra=MappingProxyType({**own, **given.extra}),
    )


def find(path: str | os.PathLike[str]) -> Deployed | None:
    """The deployable directory at a path; None for a file, or for any other directory. Raises ModelFileError for a damaged plan."""
    folder = Path(path)
    if not folder.is_dir() or not (folder / PLAN).is_file():
        return None
    return read(folder)


def read(folder: Path) -> Deployed:
    """Read a directory's plan. Raises ModelFileError with the file, and the line where that is known."""
    path = folder / PLAN
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelFileError(f"{path} cannot be read: {reason}; compile the model again") from error
    if not isinstance(found, dict) or "format" not in found:
        raise ModelFileError(f"{path} is no plan; compile the model again")
    if found["format"] != FORMAT:
        raise ModelFileError(f"{path} is a plan of format {found['format']} and this version reads {FORMAT}; compile the model again")
    files, provenance = found.get("files", {}), found.get("provenance", {})
    if not isinstance(files, dict) or MODEL not in files or not isinstance(provenance, dict):
        raise ModelFileError(f"{path} names no {MODEL}; compile the model again")
    plan = _plan(found.get("plan"), path)
    if plan.key_type not in ("f16", "q8_0"):
        raise ModelFileError(f"{path}: key_type is {plan.key_type!r}, and may be f16 or q8_0; compile the model again")
    return Deployed(folder, plan, files, provenance)


def _plan(found: Any, path: Path) -> Plan:
    """A plan from its fields. Raises ModelFileError for a field of a wrong kind."""
    if not isinstance(found, dict):
        raise ModelFileError(f"{path} has no decisions; compile the model again")
    plan: dict[str, Any] = {}
    for name, value in found.items():
        if name not in _KINDS:
            raise ModelFileError(f"{path}: there is no decision {name}; compile the model again with this version")
        if isinstance(value, bool) != (_KINDS[name] is bool) or not isinstance(value, _KINDS[name]):
            raise ModelFileError(f"{path}: {name} has a value of a wrong kind; compile the model again")
        if isinstance(value, list) and name != "gains" and not all(isinstance(one, str) for one in value):
            raise ModelFileError(f"{path}: {name} lists something else than names; compile the model again")
        low, high = _LIMITS.get(name, (0, 1 << 62))
        if isinstance(value, int) and not low <= value <= high:
            raise ModelFileError(f"{path}: {name} is {value}, and may be {low} to {high}; compile the model again")
        plan[name] = tuple(value) if isinstance(value, list) else value
    try:
        plan["gains"] = tuple(Gain(**gain) for gain in found.get("gains", ()))
        plan["power"] = PowerSetting(**found.get("power", {}))
        return Plan(**plan)
    except TypeError as error:
        raise ModelFileError(f"{path}: the plan lacks something ({error}); compile the model again") from error


_KINDS: Mapping[str, Any] = {
    "target": str, "types": dict, "order": list, "alignment": int, "joined": list, "folded": list, "pack": bool, "chunk": int,
    "prefetch": int, "threads": int, "layers": int, "locked": list, "memory": int, "context": int, "key_type": str, "power": dict,
    "gains": list,
}  # fmt: skip


_LIMITS = {"chunk": (1, 1 << 16), "prefetch": (4096, 1 << 32), "memory": (1, 1 << 62), "context": (1, 1 << 31), "threads": (0, 512)}


def to_json(plan: Plan, files: Mapping[str, str], provenance: Mapping[str, Any]) -> str:
    """What ``plan.json`` holds; ``read`` gives the same plan. JSON: a reader of TOML takes a tenth of an opening."""
    decisions = {**plan._asdict(), "types": dict(plan.types), "power": _known(plan.power), "gains": [_known(gain) for gain in plan.gains]}
    found = {"format": FORMAT, "plan": {name: value for name, value in decisions.items() if value is not None}}
    return json.dumps({**found, "files": dict(files), "provenance": dict(provenance)}, indent=1, ensure_ascii=False) + "\n"


def _known(fields: Gain | PowerSetting) -> dict[str, Any]:
    return {name: value for name, value in fields._asdict().items() if value is not None}
