"""The context policy ``refuse``: a prompt that does not fit is an error that says by how much, never a silent cut."""

from __future__ import annotations

from collections.abc import Sequence

from edge_rt.hooks import ContextError, ContextPolicy, hookimpl

EDGE_RT_API = 1


class Refuse:
    """Refuses every prompt that does not fit."""

    name = "refuse"

    def fit(self, tokens: Sequence[int], allowed: int) -> Sequence[int]:
        """Return ``tokens`` if they fit. Raises ContextError."""
        if len(tokens) > allowed:
            raise ContextError(f"the prompt has {len(tokens)} tokens and the context leaves room for {allowed}; shorten it or raise --ctx")
        return tokens


@hookimpl
def edge_rt_context_policies() -> list[ContextPolicy]:
    """One policy, ``refuse``."""
    return [Refuse()]
