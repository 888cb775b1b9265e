"""Where a run is: plain data, in checkpoints as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from edge_rt_distill.stages.gate import GateState

NOT_EVALUATED = GateState()


class LevelResult(NamedTuple):
    """How a level ended. ``opened``: whether its gate did. ``ended_by``: ``gate``, ``limit`` or ``score``. ``kept``: the step whose
    weights it handed on. ``before``, ``errors``: held-out errors when it began, and of what it handed on."""

    name: str
    opened: bool
    ended_by: str
    reason: str
    steps: int
    kept: int
    tokens: int
    before: dict[str, float]
    errors: dict[str, float]
    score: float | None

    def __str__(self) -> str:
        verdict = "gate open" if self.opened else f"FAIL: {self.reason}"
        return f"level {self.name}: {verdict} ({self.steps} steps, ended by its {self.ended_by})"


@dataclass
class Best:
    """The best evaluation of a level. ``value``: the composite score where that ends the level, else minus the level's error."""

    value: float
    step: int
    errors: dict[str, float]
    score: float | None


@dataclass
class State:
    """``level`` counts in the list of levels, ``step`` and ``batches`` within the level, ``tokens`` (that were trained on) too.

    ``epoch``, ``place``: where in the data. ``begun``: the level's guides are fitted and its first errors are known. ``opened``: its gate
    was open once. ``stale``: evaluations since ``best``. ``recent``: losses. ``ended``: errors that earlier levels ended with.
    ``log``: length of the log in bytes.
    """

    level: int = 0
    step: int = 0
    batches: int = 0
    tokens: int = 0
    epoch: int = 0
    place: int = 0
    begun: bool = False
    opened: bool = False
    stale: int = 0
    gate: GateState = NOT_EVALUATED
    before: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    score: float | None = None
    best: Best | None = None
    recent: list[float] = field(default_factory=list)
    ended: dict[str, float] = field(default_factory=dict)
    done: list[LevelResult] = field(default_factory=list)
    log: int = 0

    def to_json(self) -> str:
        """As text; numbers come back to the bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> State:
        """The inverse of ``to_json``."""
        data: dict[str, Any] = json.loads(text)
        best = None if data["best"] is None else Best(**data["best"])
        done = [LevelResult(*one) for one in data["done"]]
        return cls(**{**data, "gate": GateState(*data["gate"]), "best": best, "done": done})

    def next_level(self, result: LevelResult) -> State:
        """At the beginning of the next level."""
        ended = {**self.ended, result.name: result.errors[result.name]}
        return State(self.level + 1, epoch=self.epoch, place=self.place, ended=ended, done=[*self.done, result], log=self.log)
