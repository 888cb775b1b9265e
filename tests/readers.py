"""Requests to read texts, as the worker's readings take them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from edge_rt.daemon.worker.memory import MemoryBudget, SessionStore
from edge_rt.daemon.worker.read_jobs import ReadJobs
from edge_rt.daemon.worker.requests import AdmissionQueue


def unlimited(model: Any) -> MemoryBudget:
    """A budget of memory of which there is enough."""
    return MemoryBudget(model, SessionStore(model, lambda message: None), None)


class Asks:
    """Requests of one model, with what is said of each. ``op``: what is asked unless another is named."""

    def __init__(self, model: Any, op: str) -> None:
        self.model, self.op = model, op
        self.said: dict[str, list[Any]] = {}
        self.ended: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}
        budget = unlimited(model)
        self.work = ReadJobs(model, budget, AdmissionQueue(budget, lambda short: None), self.say, self.end)

    def end(self, command: dict[str, Any], error: Exception | None, answer: dict[str, Any]) -> None:
        self.ended[command["id"]] = error or answer

    def say(self, asked: Any, message: dict[str, Any]) -> None:
        assert asked.credits > 0
        asked.credits -= 1
        self.said[asked.id].append(message)

    def add(self, name: str, op: str = "", credits: int = 10**6, **command: Any) -> None:
        self.said[name], self.asked[name] = [], SimpleNamespace(id=name, credits=credits, cancelled=False)
        self.work.add(self.asked[name], {"id": name, "op": op or self.op, **command})

    def finish(self, room: int = 64) -> None:
        while self.work.step(room):
            pass
        assert self.model.memory().cache == 0, "nothing is left behind"
