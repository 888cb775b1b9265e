"""How far something is that takes long: whoever does it tells whoever asked for it, who may stop it by raising ``Cancelled``."""

from __future__ import annotations

from collections.abc import Callable

Told = Callable[[int, int], None]
"""Told what is done, and of how much."""
PartTold = Callable[[str, int, int], None]
"""Told the name of a part, what is done of it, and of how much; 0 of 0: not known."""


def quiet(*_: object) -> None:
    """Tells nobody."""
