"""What surgery does, as data: which parts of the teacher the student keeps, and why. Written as JSON, read by ``apply``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from edge_rt.hooks import OptionError
from edge_rt_distill.model.architecture import Architecture, LayerShape

Merge = Literal["laco", "average"]
"""How layers become one: by LaCo's sum of differences (Yang et al. 2024, arXiv:2402.11187), or as their mean."""
Share = Literal["important", "average"]
"""What layers that share parameters get: those of the one that matters most, or the mean."""


@dataclass(frozen=True)
class LayerCut:
    """A layer of the student. All numbers are the teacher's, ascending.

    ``sources``: layers it is made of. ``groups``: key-value heads kept. ``heads``: query heads kept, the same number of each group.
    ``channels``: of the feed-forward part. ``like``: the student's layer whose parameters it uses, None for its own.
    ``importance``: which of those that share parameters matters most. ``reason``: why this layer is as it is.
    """

    sources: tuple[int, ...]
    groups: tuple[int, ...]
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    like: int | None = None
    importance: float = 1.0
    reason: str = ""


@dataclass(frozen=True)
class Cost:
    """What a model takes, projected and not measured.

    ``parameters``: numbers, shared ones once. ``bytes``: of the exported file's tensors. ``time``: of decoding a token, in bytes that
    could be read from memory meanwhile; only the relation of two such times means something.
    """

    parameters: int
    bytes: int
    time: float


@dataclass(frozen=True)
class Choice:
    """A way to meet the budget that was compared: the student's sizes (of ``ffn`` the mean), and the predicted divergence by its causes."""

    name: str
    layers: int
    groups: int
    heads: int
    ffn: int
    width: int
    losses: Mapping[str, float]

    @property
    def loss(self) -> float:
        """The whole predicted divergence in nats a token, before any repair or training."""
        return sum(self.losses.values())


@dataclass(frozen=True)
class Cut:
    """All of a student's layers, and the dimensions of the residual stream that are kept.

    ``dropped``: layers of the teacher that are in none of the student's, each with the reason. ``chosen``: what ``plan`` predicted of
    this cut, and ``others`` of ways it did not take; None and () in a cut made by hand. ``reasons``: sentences for the whole.
    """

    layers: tuple[LayerCut, ...]
    hidden: tuple[int, ...]
    merge: Merge = "laco"
    share: Share = "important"
    dropped: Mapping[int, str] | None = None
    teacher_cost: Cost | None = None
    cost: Cost | None = None
    chosen: Choice | None = None
    others: tuple[Choice, ...] = ()
    reasons: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is kept is written as runs, ``0-31 64-95``."""
        data = asdict(self)
        data["hidden"] = runs(self.hidden)
        for one in data["layers"]:
            for name in ("groups", "heads", "channels"):
                one[name] = runs(one[name])
        data["dropped"] = None if self.dropped is None else {str(k): v for k, v in self.dropped.items()}
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Cut:
        """The inverse of ``to_json``, after a round through JSON. Raises OptionError for anything else."""
        try:
            layers = tuple(_layer(one) for one in data["layers"])
            dropped = data["dropped"]
            cut = cls(
                layers=layers, hidden=numbers(data["hidden"]), merge=data["merge"], share=data["share"],
                dropped=None if dropped is None else {int(k): str(v) for k, v in dropped.items()},
                teacher_cost=_cost(data["teacher_cost"]), cost=_cost(data["cost"]),
                chosen=None if data["chosen"] is None else Choice(**data["chosen"]),
                others=tuple(Choice(**one) for one in data["others"]), reasons=tuple(data["reasons"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise OptionError(f"this is no cut that this version knows ({error}); plan it again") from None
        if cut.merge not in get_args(Merge) or cut.share not in get_args(Share):
            raise OptionError(f"a cut cannot merge by {cut.merge!r} or share by {cut.share!r}; plan it again")
        return cut


def runs(values: Iterable[int]) -> str:
    """Ascending numbers as runs: ``0-31 64 70-95``."""
    found: list[list[int]] = []
    for value in values:
        if found and found[-1][1] == value - 1:
            found[-1][1] = value
        else:
            found.append([value, value])
    return " ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)


def numbers(text: str) -> tuple[int, ...]:
    """The inverse of ``runs``. Raises ValueError."""
    found: list[int] = []
    for part in text.split():
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _layer(data: Mapping[str, Any]) -> LayerCut:
    kept = {name: numbers(data[name]) for name in ("groups", "heads", "channels")}
    return LayerCut(**{**data, "sources": tuple(data["sources"]), **kept})


def _cost(data: Mapping[str, Any] | None) -> Cost | None:
    return None if data is None else Cost(**data)


def whole(architecture: Architecture) -> Cut:
    """The cut that removes nothing. Layers that share parameters in the teacher get their own."""
    layers = []
    for i in range(len(architecture.layers)):
        shape = architecture.layers[architecture.owner(i)]
        layers.append(LayerCut((i,), tuple(range(shape.kv_heads)), tuple(range(shape.heads)), tuple(range(shape.ffn))))
    return Cut(tuple(layers), tuple(range(architecture.width)), dropped={})


def student_architecture(teacher: Architecture, cut: Cut) -> Architecture:
    """The architecture a cut leads to. Raises OptionError for a cut that does not fit the teacher.

    RMSNorm's mean runs over fewer dimensions afterwards: its epsilon grows with it, so that a removed zero changes nothing.
    """
    check(teacher, cut)
    shapes = tuple(LayerShape(len(one.heads), len(one.groups), len(one.channels), one.sources) for one in cut.layers)
    owners = tuple(i if one.like is None else one.like for i, one in enumerate(cut.layers))
    width = len(cut.hidden)
    return replace(
        teacher, layers=shapes, width=width, norm_epsilon=teacher.norm_epsilon * teacher.width / width,
        parameters_of=owners if any(owner != i for i, owner in enumerate(owners)) else (),
    )  # fmt: skip


def check(teacher: Architecture, cut: Cut) -> None:
    """Raise OptionError where a cut names what the teacher does not have, or leads to no decoder."""
    if not cut.layers:
        raise OptionError("a student needs at least one layer; keep one")
    _ascending(cut.hidden, teacher.width, "dimensions of the residual stream")
    before = -1
    for i, one in enumerate(cut.layers):
        _ascending(one.sources, len(teacher.layers), f"source layers of the student's layer {i}")
        if one.sources[0] <= before:
            raise OptionError(
                f"the student's layer {i} is made of layer {one.sources[0]}, which an earlier one is made of; order the layers"
            )
        before = one.sources[-1]
        _check_layer(teacher, cut, i)


def _check_layer(teacher: Architecture, cut: Cut, i: int) -> None:
    one = cut.layers[i]
    shapes = {(s.heads, s.kv_heads, s.ffn) for s in (teacher.layers[teacher.owner(source)] for source in one.sources)}
    if len(shapes) > 1:
        raise OptionError(f"layers {runs(one.sources)} have different sizes and cannot become one; drop all but one of them instead")
    heads, groups, ffn = shapes.pop()
    _ascending(one.groups, groups, f"key-value heads of layer {i}")
    _ascending(one.heads, heads, f"heads of layer {i}")
    _ascending(one.channels, ffn, f"feed-forward channels of layer {i}")
    by_group = heads_by_group(one.heads, heads // groups)
    if set(by_group) != set(one.groups) or len({len(found) for found in by_group.values()}) != 1:
        raise OptionError(f"layer {i}: each key-value head that is kept needs the same number of query heads, and no other may have any")
    if one.like is not None:
        other = cut.layers[one.like] if 0 <= one.like < i else None
        if other is None or other.like is not None:
            raise OptionError(f"layer {i} cannot share the parameters of layer {one.like}; name an earlier layer that has its own")
        if (other.groups, other.heads, other.channels) != (one.groups, one.heads, one.channels):
            raise OptionError(f"layers {one.like} and {i} keep different parts and cannot share parameters; let them keep the same")


def heads_by_group(heads: Sequence[int], each: int) -> dict[int, list[int]]:
    """Query heads by the key-value head they use, where the teacher has ``each`` of them for one."""
    found: dict[int, list[int]] = {}
    for head in heads:
        found.setdefault(head // each, []).append(head)
    return found


def _ascending(values: Sequence[int], size: int, what: str) -> None:
    if not values:
        raise OptionError(f"none of the {what} is left; keep one")
    if values[0] < 0 or values[-1] >= size or any(a >= b for a, b in pairwise(values)):
        raise OptionError(f"the {what} must be ascending numbers below {size}; correct the cut")
