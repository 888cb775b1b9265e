"""Pairs of texts of close meaning, far from those of other pairs, and what lies closest to what."""

from __future__ import annotations

from collections.abc import Sequence

PAIRS = (
    ("The cat sleeps on the sofa.", "A kitten is napping on the couch."),
    ("Stock markets fell sharply on Monday.", "Share prices dropped steeply at the start of the week."),
    ("Boil the pasta for ten minutes in salted water.", "Cook the noodles in water with salt for ten minutes."),
    ("The spacecraft entered orbit around Mars.", "The probe is now circling the red planet."),
)


def closest(rows: Sequence[Sequence[float]]) -> list[int]:
    """For each embedding, all of length 1, which other one is closest by cosine."""

    def cosine(i: int, j: int) -> float:
        return sum(x * y for x, y in zip(rows[i], rows[j], strict=True))

    return [max((j for j in range(len(rows)) if j != i), key=lambda j, i=i: cosine(i, j)) for i in range(len(rows))]
