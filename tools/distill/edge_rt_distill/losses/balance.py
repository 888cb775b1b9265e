"""Terms of different units in one sum: each is scaled by a detached ratio to the size of a reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor

Name = TypeVar("Name", bound=str)

LARGEST = 1e3
"""No term is scaled up by more, so that the last rounding errors of one that is solved are not trained on."""


def balance(terms: Mapping[Name, Tensor], weights: Mapping[Name, float], reference: float) -> tuple[Tensor, dict[Name, float]]:
    """(sum of weight x scale x term, the scales), with scale = ``reference`` / |term| as a number, so that no gradient flows through it.

    Each term then has ``weight`` times the reference's size, and its own direction (as DistillKit and multi-task losses do by hand).
    ``terms``: scalars, at least one. ``reference``: the size of the leading term, not negative.
    """
    scales = {name: min(LARGEST, reference / max(abs(float(term.detach())), 1e-12)) for name, term in terms.items()}
    addends = [weights[name] * scales[name] * term for name, term in terms.items()]
    return sum(addends[1:], addends[0]), scales
