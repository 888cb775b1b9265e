"""What the user asks of surgery: the budget, and any part of the student fixed by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edge_rt.hooks import OptionError
from edge_rt_distill.surgery.cost import CostModel
from edge_rt_distill.surgery.cut import Cost, Merge, Share

PARTS = ("depth", "ffn", "heads", "groups", "hidden")
"""What may be cut: whole layers, feed-forward channels, query heads of each key-value head, key-value heads, residual dimensions."""


@dataclass(frozen=True)
class Budget:
    """Upper limits; None for none. Up to 1 (and any float below 1) it is a share of the teacher's, above it a number.

    ``parameters``: numbers, those of the embedding included. ``speed``: the time to decode a token as a share of the teacher's, projected.
    ``bytes``: of the exported file.
    """

    parameters: float | None = None
    speed: float | None = None
    bytes: float | None = None

    def __post_init__(self) -> None:
        for name in ("parameters", "speed", "bytes"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise OptionError(f"the budget of {name} is {value!r}; give a share of the teacher's, as 0.8, or a number above 1")
        if self.speed is not None and self.speed > 1:
            raise OptionError(f"the budget of speed is {self.speed}; it is a share of the teacher's time, so give at most 1")

    def limits(self, teacher: Cost) -> dict[str, float]:
        """The limits as numbers, by the name of a cost."""
        own = {"parameters": self.parameters, "time": self.speed, "bytes": self.bytes}
        return {
            name: value * getattr(teacher, name) if value <= 1 else value for name, value in own.items() if value is not None
        }  # fmt: skip


@dataclass(frozen=True)
class PlanOptions:
    """How a plan is made. None: the plan decides.

    ``allow``: parts that may be cut. ``multiple``: widths that are cut become multiples of it: 32 for blocks of Q4_0, 256 for K-quants.
    ``channels``, ``dimensions``: keep the most important ones one by one (``exact``), or whole groups of 32 (``grouped``): then blocks of
    an already quantised teacher stay blocks and lose nothing again. ``least``: the smallest share of any part that may be left.
    ``widths``: as many channels in each layer (``equal``), or fewer where they are missed least (``free``). ``protect``: layers that stay,
    None for the first and the last.
    By hand: ``drop`` (layers, or how many), ``merge`` (each a tuple of neighbouring layers that become one), ``ffn``, ``groups``,
    ``heads`` (in each group), ``width``, ``share`` (pairs of the teacher's layers that use one layer's parameters, or how many pairs).
    """

    allow: tuple[str, ...] = PARTS
    multiple: int = 32
    channels: Literal["exact", "grouped"] = "exact"
    dimensions: Literal["exact", "grouped"] = "exact"
    least: float = 0.5
    widths: Literal["equal", "free"] = "equal"
    protect: tuple[int, ...] | None = None
    drop: tuple[int, ...] | int | None = None
    merge: tuple[tuple[int, ...], ...] = ()
    merge_by: Merge = "laco"
    ffn: int | None = None
    groups: int | None = None
    heads: int | None = None
    width: int | None = None
    share: tuple[tuple[int, int], ...] | int = 0
    share_by: Share = "important"
    cost: CostModel = field(default_factory=CostModel)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.allow) - set(PARTS))
        if unknown:
            raise OptionError(f"{unknown[0]!r} cannot be cut; allow any of {', '.join(PARTS)}")
        if self.multiple < 1 or not 0 < self.least <= 1:
            raise OptionError(f"multiple is {self.multiple} and least {self.least}; give a number from 1 and a share above 0 up to 1")
        choices = {
            "channels": ("exact", "grouped"),
            "dimensions": ("exact", "grouped"),
            "widths": ("equal", "free"),
            "merge_by": ("laco", "average"),
            "share_by": ("important", "average"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if isinstance(self.share, int) and self.share < 0:
            raise OptionError(f"{self.share} pairs of layers cannot share; give a number from 0")
        for name in ("ffn", "groups", "heads", "width"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise OptionError(f"{name} is {value!r}; give a whole number from 1, or leave it out")
