"""What every engine checks before a step changes anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edge_rt.errors import ContextError, OptionError

if TYPE_CHECKING:
    from edge_rt.core.engine import EngineInfo, Part


def check_parts(parts: Sequence[Part], length: Callable[[int], int], info: EngineInfo) -> None:
    """Refuse a step that an engine cannot take. ``length``: gives the cells of a sequence, and raises what the engine raises for none.

    Raises OptionError for a sequence that is named twice and for tokens that no vocabulary of this size has, ContextError for a sequence
    that would outgrow the context.
    """
    seen: set[int] = set()
    for part in parts:
        if part.sequence in seen:
            raise OptionError("a step names the same sequence twice; join its tokens into one part")
        seen.add(part.sequence)
        check_fits(length(part.sequence) + len(part.tokens), info)
        check_tokens(part.tokens, info)


def check_tokens(tokens: Sequence[int], info: EngineInfo) -> None:
    """Raise OptionError for tokens that no vocabulary of this size has."""
    if min(tokens, default=0) < 0 or max(tokens, default=0) >= info.n_vocab:
        raise OptionError(f"a token id is outside the vocabulary of {info.n_vocab}; tokenize with this model")


def check_fits(cells: int, info: EngineInfo) -> None:
    """Raise ContextError if a sequence of so many cells would outgrow the context."""
    if cells > info.max_context:
        raise ContextError(f"{cells} tokens do not fit a context of {info.max_context}; shorten the prompt or raise --ctx")
