"""The context policies ``strict``, ``slide`` and ``graded`` (edge_rt/core/context/eviction.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from edge_rt import hooks
from edge_rt.hooks import ContextPolicy, hookimpl

EDGE_RT_API = 1

POLICIES = {
    "strict": "nothing leaves: what does not fit is an error",
    "slide": "the oldest segments leave first",
    "graded": "the segments that say least leave first, and come back when a question is close to them",
}


def _keep(name: str) -> Callable[[Sequence[hooks.Candidate], int], list[int]]:
    """A policy's function, imported when it is first needed: most prompts fit."""

    def keep(candidates: Sequence[hooks.Candidate], budget: int) -> list[int]:
        chosen: list[int] = getattr(hooks, f"keep_{name}")(candidates, budget)
        return chosen

    return keep


@hookimpl
def edge_rt_context_policies() -> Iterable[ContextPolicy]:
    """Three policies."""
    return [ContextPolicy(name, _keep(name), description, recalls=name == "graded") for name, description in POLICIES.items()]
