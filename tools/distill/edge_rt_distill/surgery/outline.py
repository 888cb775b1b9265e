"""Which layers a student has: dropped, merged, or sharing parameters; the choices between which the plan searches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edge_rt.hooks import OptionError
from edge_rt_distill.model.architecture import Architecture
from edge_rt_distill.surgery.evidence import Evidence
from edge_rt_distill.surgery.options import PlanOptions
from edge_rt_distill.surgery.predict import Depth, removal, removal_loss


class Outline(NamedTuple):
    """``layers``: the source layers of each of the student's. ``pairs``: places in it, a later layer and the earlier one it shares with.

    ``loss``: predicted, of dropping ``gone`` and merging ``merged``; ``share_loss`` of sharing.
    """

    layers: tuple[tuple[int, ...], ...]
    gone: tuple[int, ...]
    merged: tuple[tuple[int, ...], ...]
    pairs: tuple[tuple[int, int], ...]
    loss: float
    share_loss: float

    @property
    def shared(self) -> int:
        """Layers without parameters of their own."""
        return len(self.pairs)


def outlines(found: Evidence, architecture: Architecture, options: PlanOptions) -> list[Outline]:
    """Every depth that may be chosen. Raises OptionError for layers that do not exist, or that two options claim."""
    count = len(architecture.layers)
    merged = _merged(options.merge, count)
    given = tuple(i for pair in options.share for i in pair) if isinstance(options.share, tuple) else ()
    _exist((*given, *(options.protect or ())), count)
    inside = [i for one in merged for i in one]
    made: list[Outline] = []
    room = 0
    for depth in _depths(found, options, count, frozenset((*inside, *given))):
        layers = _layers(count, depth, merged)
        pairs = _pairs(found, options.share, layers)
        room = max(room, len(pairs))
        if isinstance(options.share, int) and len(pairs) < options.share:
            continue
        loss = depth.loss + sum(_merge_loss(found, one) for one in merged)
        made.append(Outline(layers, depth.gone, merged, pairs, loss, sum(_share_loss(found, layers, pair) for pair in pairs)))
    if not made:
        raise OptionError(f"{options.share} pairs of layers cannot share, the students that may be have room for {room}; ask for fewer")
    return made


def _depths(found: Evidence, options: PlanOptions, count: int, claimed: frozenset[int]) -> list[Depth]:
    if isinstance(options.drop, tuple):
        _exist(options.drop, count)
        twice = sorted(set(options.drop) & claimed)
        if twice or len(set(options.drop)) < len(options.drop):
            raise OptionError(f"layer {(twice or sorted(options.drop))[0]} is dropped and used elsewhere, or dropped twice; name it once")
        if len(options.drop) >= count:
            raise OptionError("all layers are dropped; keep at least one")
        return [Depth(tuple(options.drop), found.scale("depth") * removal_loss(found, options.drop))]
    stay = claimed | frozenset((0, count - 1) if options.protect is None else options.protect)
    if options.drop is not None:
        steps = removal(found, options.drop, stay)
        if options.drop < 0 or len(steps) <= options.drop:
            raise OptionError(f"{options.drop} layers cannot be dropped, at most {len(steps) - 1} may go; drop fewer, or protect fewer")
        return [steps[options.drop]]
    most = count - max(1, -(-int(count * options.least * 1000) // 1000)) if "depth" in options.allow else 0
    return removal(found, most, stay)


def _merged(merge: Sequence[tuple[int, ...]], count: int) -> tuple[tuple[int, ...], ...]:
    seen: set[int] = set()
    for one in merge:
        if not isinstance(one, tuple) or len(one) < 2 or list(one) != list(range(one[0], one[0] + len(one))):
            raise OptionError(f"layers {one} cannot be merged; name two or more neighbours, ascending")
        _exist(one, count)
        if seen & set(one):
            raise OptionError(f"layer {min(seen & set(one))} is merged twice; name it once")
        seen |= set(one)
    return tuple(sorted(merge))


def _exist(layers: Sequence[int], count: int) -> None:
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise OptionError(f"the teacher has no layer {layer!r}; name layers from 0 to {count - 1}")


def _layers(count: int, depth: Depth, merged: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    first = {one[0]: one for one in merged}
    later = {i for one in merged for i in one[1:]}
    return tuple(first.get(i, (i,)) for i in range(count) if i not in later and i not in depth.gone)


def _merge_loss(found: Evidence, merged: tuple[int, ...]) -> float:
    """As if all but the most important of them were dropped: no merge should be worse, and how much better it is must be measured."""
    rest = sorted(merged, key=lambda i: found.layer_kl[i])[:-1]
    return found.scale("depth") * removal_loss(found, rest)


def _pairs(found: Evidence, share: tuple[tuple[int, int], ...] | int, layers: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, int], ...]:
    """Pairs of places (later, earlier). By hand: of the teacher's layers. As a number: the cheapest disjoint neighbours, not the ends,
    as many as there is room for.
    """
    place = {source: i for i, one in enumerate(layers) for source in one}
    if isinstance(share, tuple):
        pairs = []
        for pair in share:
            if len(pair) != 2 or len({place.get(i) for i in pair}) != 2:
                raise OptionError(f"layers {pair} cannot share parameters; name two that are different layers of the student")
            pairs.append((max(place[i] for i in pair), min(place[i] for i in pair)))
        if len({later for later, _ in pairs}) < len(pairs) or {later for later, _ in pairs} & {earlier for _, earlier in pairs}:
            raise OptionError(
                "a layer stands in several pairs of layers that share; name for each later layer one earlier layer with its own"
            )
        return tuple(sorted(pairs))
    losses = [_share_loss(found, layers, (i + 1, i)) for i in range(1, len(layers) - 2)]
    return tuple((i + 2, i + 1) for i in _apart(losses, share))


def _apart(losses: Sequence[float], count: int) -> tuple[int, ...]:
    """``count`` numbers, no two of them neighbours, whose losses have the least sum; as many as there are if there are fewer."""
    before: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by how many are chosen: the best among all but the last
    now = dict(before)
    for i, loss in enumerate(losses):
        with_it = {k + 1: (total + loss, (*chosen, i)) for k, (total, chosen) in before.items() if k < count}
        before = dict(now)
        for k, one in with_it.items():
            if k not in now or one < now[k]:
                now[k] = one
    return now[max(now)][1]


def _share_loss(found: Evidence, layers: tuple[tuple[int, ...], ...], pair: tuple[int, int]) -> float:
    """As if the less important of the two were dropped: what a wrong layer does instead is not better than nothing, before training."""
    return found.scale("depth") * min(sum(float(found.layer_kl[i]) for i in layers[place]) for place in pair)
