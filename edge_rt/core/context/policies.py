"""The built-in policies: which candidates stay when not all fit. Pure functions of the candidates and a budget of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from edge_rt.core.context.candidates import Candidate
from edge_rt.errors import ContextOverflow


def keep_strict(candidates: Sequence[Candidate], budget: int) -> list[int]:
    """All, or ContextOverflow."""
    total = sum(candidate.tokens for candidate in candidates)
    if total > budget:
        message = f"the prompt has {total} tokens and the context leaves room for {budget}; shorten it, raise --ctx or use --policy graded"
        raise ContextOverflow(message, total, budget)
    return list(range(len(candidates)))


def keep_slide(candidates: Sequence[Candidate], budget: int) -> list[int]:
    """What is protected, and of the rest the newest, without a hole. Raises ContextOverflow."""
    kept, room = _protected(candidates, budget)
    for i in reversed(range(len(candidates))):
        if i in kept:
            continue
        room -= candidates[i].tokens
        if room < 0:
            break
        kept.add(i)
    return sorted(kept)


def keep_graded(candidates: Sequence[Candidate], budget: int) -> list[int]:
    """What is protected; of the rest the lowest scores leave, of equal ones the oldest, until all fits. Raises ContextOverflow."""
    kept, room = _protected(candidates, budget)
    rest = [i for i in range(len(candidates)) if i not in kept]
    room -= sum(candidates[i].tokens for i in rest)
    for i in sorted(rest, key=lambda i: candidates[i].score):  # stable: of equals the oldest first
        if room >= 0:
            kept.add(i)
        else:
            room += candidates[i].tokens
    return sorted(kept)


def _protected(candidates: Sequence[Candidate], budget: int) -> tuple[set[int], int]:
    """What must stay, and the room it leaves. Raises ContextOverflow, which says what is too large."""
    kept = {i for i, candidate in enumerate(candidates) if candidate.protections}
    needed = sum(candidates[i].tokens for i in kept)
    if needed > budget:
        sizes: Counter[str] = Counter()
        for i in kept:
            sizes[candidates[i].protections[0]] += candidates[i].tokens
        what = ", ".join(f"{name} {tokens}" for name, tokens in sizes.most_common())
        message = f"what must stay in the context has {needed} tokens ({what}) and there is room for {budget}; shorten it or raise --ctx"
        raise ContextOverflow(message, needed, budget)
    return kept, budget - needed
