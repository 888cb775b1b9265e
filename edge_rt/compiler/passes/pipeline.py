"""How a model is run: threads, tokens of a prompt fed at once, what is read ahead, what is kept in memory, what is on the accelerator."""

from __future__ import annotations

from edge_rt.compiler import cost
from edge_rt.compiler.plan import PROMPT, Situation, gained, threads_told
from edge_rt.compiler.shape import ModelShape
from edge_rt.core.weights.streaming import SLOTS
from edge_rt.deployment import Pass, Plan
from edge_rt.errors import OptionError

CHUNKS = (512, 256, 128, 64)
_WORTH, _WORTH_PROMPT, _WORTH_CHUNK = 1.03, 1.15, 1.15
"""What more threads must gain for tokens or for prompts to be taken, as they cost others something; and smaller chunks, which the model
knows less well.
"""
_AHEAD_SECONDS = 0.05
_LEAST_AHEAD, _MOST_AHEAD = 2 << 20, 64 << 20
_SHORT = 0.5
"""A model that takes more of a device's memory than this may have its pages taken by others: units are locked up to this share."""


def apply(plan: Plan, situation: Situation) -> Plan:
    """Decide in this order: threads, chunk, what fits, what is locked, what is read ahead. Raises OptionError for a memory limit that
    nothing fits in.
    """
    target = situation.target
    threads = _threads(plan, situation)
    after = plan._replace(threads=threads if target.profile.kind == "cpu" and threads < target.threads else 0)
    after = after._replace(chunk=_chunk(after, situation))
    after = _fitted(after, situation)
    if target.profile.kind != "cpu":
        after = after._replace(layers=_layers(after, situation))
    after = after._replace(prefetch=_ahead(situation), locked=_locked(after, situation))
    return gained(plan, after, situation, "pipeline", _told(after, situation))


def _threads(plan: Plan, situation: Situation) -> int:
    """The fewest with which neither a prompt nor a token takes longer than with any other number, to within a few percent; if there is no
    such number, that with which a prompt and an answer as long take the least.
    """
    shape, times = situation.shape(plan), {}
    for n in range(1, situation.target.threads + 1):
        times[n] = cost.first_token(shape, situation.target, PROMPT, n).seconds, situation.token(plan._replace(threads=n))
    prompt, token = (min(parts) for parts in zip(*times.values(), strict=True))
    enough = (n for n, one in times.items() if one[0] <= prompt * _WORTH_PROMPT and one[1] <= token * _WORTH)
    return next(enough, min(times, key=lambda n: times[n][0] + PROMPT * times[n][1]))


def _chunk(plan: Plan, situation: Situation) -> int:
    """The largest that is worth it and takes no longer than the latency that is asked for. Raises OptionError if none does."""
    times = {}
    for chunk in CHUNKS:
        step = cost.prefill(situation.shape(plan), situation.target, chunk, situation.threads(plan), chunk).seconds
        times[chunk] = step / chunk
        wanted = situation.goals.latency
        if wanted is not None and step > wanted:
            times.pop(chunk)
    if not times:
        raise OptionError(
            f"--latency {situation.goals.latency:g} is less than {CHUNKS[-1]} tokens of a prompt take on {situation.target.name}; "
            "raise it, or choose a faster target or a smaller model"
        )
    best = min(times.values())
    return max(chunk for chunk, seconds in times.items() if seconds <= best * _WORTH_CHUNK)


def _fitted(plan: Plan, situation: Situation) -> Plan:
    """The plan with chunk, key type and streamed weights such that it fits the memory. Raises OptionError."""
    limit = min(situation.goals.memory or situation.target.profile.memory, situation.target.profile.memory)
    if situation.memory(plan).total <= limit:
        return plan
    for chunk in (plan.chunk, *(one for one in CHUNKS if one < plan.chunk)):
        smaller = plan._replace(chunk=chunk)
        if situation.memory(smaller).total <= limit:
            return smaller
    smaller = plan._replace(chunk=CHUNKS[-1])
    if situation.target.profile.kind != "cpu":
        return smaller  # what does not fit stays with the host: ``layers``
    held = situation.memory(smaller)
    budget = limit - (held.total - held.weights)
    shape = situation.shape(plan)
    if budget < least_streamed(shape):
        needed = -(-(held.total - held.weights + least_streamed(shape)) // (1 << 20))
        raise OptionError(
            f"{limit >> 20}M is less than this model needs with {situation.context} cells of context; "
            f"give --memory {needed}M, or fewer cells with --context"
        )
    return smaller._replace(memory=budget)


def least_streamed(shape: ModelShape) -> int:
    """Bytes of weights that must be in memory when the rest is streamed: the norm, and the slots of the largest unit and a little more."""
    return shape.units.get("norm", 0) + (SLOTS + 1) * max(shape.units.values())


def _layers(plan: Plan, situation: Situation) -> int:
    """Blocks whose weights and cells fit the accelerator, beside compute buffers; one more than all is the head too."""
    shape, held = situation.shape(plan), situation.memory(plan)
    room = float(min(situation.goals.memory or situation.target.profile.memory, situation.target.profile.memory))
    room -= held.compute + held.process
    cells = held.cells / shape.hyper.n_layer
    layers = 0
    for name, nbytes in reversed(list(shape.units.items())):  # the last blocks first, as llama.cpp does: then only one border is crossed
        if name in ("embedding", "norm"):
            continue
        room -= nbytes + (cells if name.startswith("blk.") else 0)
        if room < 0:
            break
        layers += 1
    return layers


def _ahead(situation: Situation) -> int:
    """So much that the storage is busy for a few hundredths of a second whatever the reader does, in whole megabytes."""
    rate = situation.target.profile.storage
    wanted = (rate or 0.0) * _AHEAD_SECONDS
    return int(min(_MOST_AHEAD, max(_LEAST_AHEAD, wanted))) >> 20 << 20


def _locked(plan: Plan, situation: Situation) -> tuple[str, ...]:
    """None, where memory is plenty; else units in the order of the forward pass, as many as may stay. Under a budget the pager locks."""
    if plan.memory is not None or situation.target.profile.kind != "cpu":
        return ()
    memory = situation.target.profile.memory
    if situation.memory(plan).total <= _SHORT * memory:
        return ()
    found, room = [], int(_SHORT * memory)
    for name, nbytes in situation.shape(plan).units.items():
        if name != "embedding" and nbytes <= room:
            found.append(name)
            room -= nbytes
    return tuple(found)


def _told(plan: Plan, situation: Situation) -> str:
    words = ["one card" if plan.layers is not None else threads_told(situation.threads(plan)), f"prompts in pieces of {plan.chunk}"]
    words.append(f"{plan.prefetch >> 20}M read ahead")
    if plan.memory is not None:
        words.append(f"{plan.memory >> 20}M of weights resident, the rest streamed")
    if plan.locked:
        words.append(f"{len(plan.locked)} units locked")
    if plan.layers is not None:
        words.append(f"{plan.layers} units on the accelerator")
    return ", ".join(words)


PASS = Pass("pipeline", "threads, chunk, reading ahead, locking, streaming, layers on the accelerator", apply)
