"""What a benchmark is asked and what it answers, and how answers are kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from bench.timing import WIDE, Spread, ratios, spread

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
OURS = "edge-rt"


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    ``quick`` proves that everything runs, with figures that mean nothing. ``threads``: CPUs to use. ``deadline``: when no further
    round begins (``time.monotonic``). ``model``: SmolLM2-135M-Instruct Q4_1, None fetches it. ``memory_group``: directory of a memory
    cgroup in which groups may be made. ``items``: how many texts, conversations, secrets, faults or turns a benchmark uses, None: its own
    number. ``minutes``: how long the daemon is soaked. ``peer_python``: a Python that has llama-server, ``ik_python``: one that
    has ik-llama-cpp-python. ``llama_server``: the
    program itself. ``student``: a file that was distilled of SmolLM2, None: that of the demo run. ``harness_python``: a Python that has
    lm_eval.
    """

    quick: bool
    threads: int
    deadline: float
    model: Path | None = None
    memory_group: Path | None = None
    items: int | None = None
    minutes: float | None = None
    peer_python: Path | None = None
    ik_python: Path | None = None
    llama_server: Path | None = None
    student: Path | None = None
    harness_python: Path | None = None

    def pick(self, full: T, quick: T) -> T:
        """One of two values."""
        return quick if self.quick else full


def kept(settings: Settings, name: str) -> Path:
    """A folder for what a benchmark measured, beside its results; a quick one has its own."""
    folder = settings.pick(RESULTS, RESULTS / "quick") / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True, slots=True)
class Bound:
    """What the ratio ours / ``peer`` must be."""

    peer: str
    kind: Literal["at least", "at most"]
    value: float

    def holds(self, ratio: float) -> bool:
        """Is it?"""
        return ratio >= self.value if self.kind == "at least" else ratio <= self.value

    def __str__(self) -> str:
        sign = "≥" if self.kind == "at least" else "≤"
        return f"{sign} {self.value:g} × {self.peer}"


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement. ``ratios`` are ours / peer. ``shown`` says in words what is no ratio. ``ok`` None: nothing is required."""

    name: str
    requirement: str
    unit: str
    ours: list[float]
    peers: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, Spread] = field(default_factory=dict)
    ok: bool | None = None
    shown: str = ""
    notes: list[str] = field(default_factory=list)


def compare(
    name: str, unit: str, samples: Mapping[str, Sequence[float]], bounds: Sequence[Bound] = (), notes: Sequence[str] = ()
) -> Result:
    """Judge interleaved samples, ours under ``OURS``. Raises KeyError for a bound on a peer that was not measured."""
    ours = list(samples[OURS])
    peers = {peer: list(values) for peer, values in samples.items() if peer != OURS}
    found = {peer: spread(ratios(ours, values)) for peer, values in peers.items()}
    wide = [f"ratio to {peer} still spread by {r.spread:.0%}" for peer, r in found.items() if r.spread > WIDE]
    return Result(
        name=name,
        requirement=", ".join(map(str, bounds)),
        unit=unit,
        ours=ours,
        peers=peers,
        ratios=found,
        ok=all(bound.holds(found[bound.peer].median) for bound in bounds) if bounds else None,
        notes=[*notes, *wide],
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def to_json(benchmark: str, results: Sequence[Result], machine: Mapping[str, str], *, quick: bool, when: str) -> dict[str, Any]:
    """What is stored of one benchmark."""
    return {"benchmark": benchmark, "quick": quick, "when": when, "machine": dict(machine), "results": [asdict(r) for r in results]}


def from_json(stored: Mapping[str, Any]) -> list[Result]:
    """The results in a stored benchmark."""
    return [Result(**{**r, "ratios": {peer: Spread(**s) for peer, s in r["ratios"].items()}}) for r in stored["results"]]


def save(path: Path, stored: Any) -> None:
    """Write JSON; the folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_all(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """Stored benchmarks by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
