"""Which packed layout ggml's kernels take for each type of weights, by a core's instructions.

The table is ``ggml_repack_get_optimal_repack_type`` of ggml-cpu/repack.cpp, ggml 0.25.3 (llama-cpp-python 0.3.36), for ARM. A layout RxB
interleaves R rows in runs of B bytes. tools/test_arm.sh runs each on an emulated core that takes it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

SVE_BYTES = 32
"""Bytes of an SVE vector for which there are SVE kernels (QK8_0): other lengths take the layouts of i8mm."""


class Choice(NamedTuple):
    """A type of weights, the layout it takes with ``needs``, and how many rows a matrix must be a multiple of."""

    type: str
    needs: str
    layout: str
    rows: int


CHOICES = (
    Choice("Q4_0", "sve256", "8x8", 8),
    Choice("Q4_0", "i8mm", "4x8", 4),
    Choice("Q4_0", "dotprod", "4x4", 4),
    Choice("Q8_0", "i8mm", "4x8", 4),
    Choice("Q8_0", "dotprod", "4x4", 4),
    Choice("Q4_K", "i8mm", "8x8", 8),
    Choice("Q4_K", "dotprod", "8x4", 8),
    Choice("Q5_K", "i8mm", "8x8", 8),
    Choice("Q5_K", "dotprod", "8x4", 8),
    Choice("Q6_K", "i8mm", "8x8", 8),
    Choice("Q6_K", "dotprod", "8x4", 8),
    Choice("IQ4_NL", "dotprod", "4x4", 4),
    Choice("MXFP4", "dotprod", "4x4", 4),
    Choice("Q1_0", "i8mm", "4x8", 4),
    Choice("Q1_0", "dotprod", "4x4", 4),
)
"""Best first. Q4_1, Q5_0, Q5_1, Q2_K and Q3_K have no packed kernels on ARM; neither has a core without dot products (Cortex-A72)."""


def packed_layouts(features: Collection[str], vector_bytes: int = 0) -> dict[str, str]:
    """Type -> layout, for a matrix with a multiple of 8 rows. ``features``: our names; ``vector_bytes``: of an SVE vector, 0 without."""
    if "neon" not in features:
        return {}
    can = set(features) - {"sve256"}
    if {"sve", "i8mm"} <= can and vector_bytes == SVE_BYTES:
        can.add("sve256")
    found: dict[str, str] = {}
    for choice in CHOICES:
        if choice.needs in can:
            found.setdefault(choice.type, choice.layout)
    return found
