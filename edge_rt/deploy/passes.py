"""The passes that fit a model to a target: what they look at, their order, and each pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.gguf.reader import Header
from edge_rt.core.graph.config import TOGETHER
from edge_rt.core.weights.streaming import SLOTS
from edge_rt.core.weights.units import unit_name
from edge_rt.deploy import cost
from edge_rt.deploy.cost import LEAST, ModelShape, read_shape
from edge_rt.deploy.plan import Gain, Pass, Plan, PowerSetting
from edge_rt.deploy.sensitivity import BASE, Group, Sensitive
from edge_rt.deploy.target import Target
from edge_rt.errors import OptionError

if TYPE_CHECKING:
    from edge_rt.deploy.folding import Norm
    from edge_rt.deploy.sensitivity import Sensitive

# What passes look at, and the order in which they decide.
#
# A pass is a pure function from a plan to a plan (edge_rt/deploy/plan.py has both). It works out its gain with the cost model, and adds
# that to the plan: what is printed is what was decided by.

PROMPT, CONTEXT = 256, 1024
"""What gains are worked out for, where the goals say nothing: tokens of a prompt, cells of a context."""


class Goals(NamedTuple):
    """What is asked for. None: nothing.

    ``memory``: bytes of a process at most. ``power``: watts of the board at most. ``latency``: seconds at most that one step takes, which
    is how long others wait beside a long prompt. ``context``: cells. ``quality``: KL divergence to the source at most, nats a token.
    ``weights``: bytes of the model's weights at most.
    """

    memory: int | None = None
    power: float | None = None
    latency: float | None = None
    context: int | None = None
    quality: float | None = None
    weights: int | None = None


class Situation(NamedTuple):
    """What a pass may look at: the source's header, the target, the goals, how sensitive groups of weights are, if measured, and what
    its norms are, if they were looked at (``folding.norms``). ``corrections``: bytes of a compensation that is applied, 0 for none.
    """

    header: Header
    target: Target
    goals: Goals
    sensitivities: Sequence[Sensitive] = ()
    norms: Sequence[Norm] = ()
    corrections: int = 0

    def shape(self, plan: Plan) -> ModelShape:
        """The model's shape as the plan has it."""
        return read_shape(self.header, plan.types, self.target.packed if plan.pack else (), joined=plan.joined, folded=plan.folded)

    @property
    def context(self) -> int:
        """Cells that are planned for."""
        return self.goals.context or min(CONTEXT, self.shape(Plan("")).config.train_context)

    def threads(self, plan: Plan) -> int:
        """Threads that are planned with."""
        return plan.threads or self.target.threads

    def token(self, plan: Plan) -> float:
        """Seconds a token at the end of the context."""
        shape = self.shape(plan)
        computing = cost.decode(shape, self.target, self.context, self.threads(plan), plan.key_type)
        return max(computing.seconds, cost.streaming(shape, self.target, plan.memory))

    def first(self, plan: Plan) -> float:
        """Seconds to the first token, from nothing in memory where the storage's speed is known."""
        shape, n = self.shape(plan), self.threads(plan)
        cold = cost.first_token_cold(shape, self.target, PROMPT, n, plan.chunk)
        return (cold or cost.first_token(shape, self.target, PROMPT, n, plan.chunk)).seconds

    def memory(self, plan: Plan) -> cost.Memory:
        """Bytes of the process, with weights streamed by the plan's budget."""
        held = cost.memory(self.shape(plan), self.target, self.context, plan.chunk, plan.key_type)
        if not plan.types:  # of weights that get other types, corrections are left out
            held = held._replace(process=held.process + self.corrections)
        return held if plan.memory is None else held._replace(weights=min(held.weights, plan.memory))


def gained(before: Plan, after: Plan, situation: Situation, by: str, what: str, quality: float | None = None) -> Plan:
    """``after`` with a gain added: what it does, and what the cost model says of it."""
    ratios = (
        situation.first(before) / situation.first(after),
        situation.token(before) / situation.token(after),
        situation.memory(before).total / situation.memory(after).total,
    )
    return after._replace(gains=(*after.gains, Gain(by, what, *ratios, quality)))


def threads_told(n: int) -> str:
    """So many threads, in words."""
    return f"{n} thread{'s' * (n != 1)}"


def decide(situation: Situation, passes: Iterable[Pass]) -> Plan:
    """A plan through all passes, one after the other. Raises OptionError for goals that cannot be met."""
    plan = Plan(situation.target.name, context=situation.goals.context)
    for one in passes:
        plan = one.apply(plan, situation)
    return plan


def built_in() -> Sequence[Pass]:
    """Ours, in their order: what is in the file, how it lies there, how it is run. What can be one depends on its types."""

    return (PRECISION, FUSION, LAYOUT, PIPELINE, POWER)


# What a graph does in fewer nodes: products with the same input as one, and norms without their scales.
#
# Products: one product converts its input once, and threads meet once behind it; on the other hand kernels do not reach the same with each
# shape. The cost model says which is less, for each kind of product, on the target; the ratio that is printed is that of these products,
# for a prompt and an answer as long. Layout then lays the weights side by side.
#
# Norms: a norm whose scale can go into the weights behind it without a bit changing, and those that are all ones anyway (folding.py).

_SLOWER = 0.85
"""Products stay apart only where together they take less than this part of what one takes: measurements of kernels that agree may differ
by as much (calibrate.py), and one product has less to do in any case.
"""


def _apply_fusion(plan: Plan, situation: Situation) -> Plan:
    """Decide which products become one, then which norms are folded."""
    after, words = _products(plan, situation)
    after = after._replace(folded=tuple(norm.name for norm in situation.norms if not _lacking(norm, plan, situation)))
    if situation.norms:
        words.append(_norms_told(after, plan, situation))
    return gained(plan, after, situation, "fusion", "; ".join(words) or "nothing in this model shares an input")


def _products(plan: Plan, situation: Situation) -> tuple[Plan, list[str]]:
    """The plan with what becomes one product, and that in words with the gain of each against several."""
    kinds = {"|".join(names): ", ".join(names) for names in TOGETHER}
    after = plan._replace(joined=tuple(kinds))
    possible = {product.name for product in situation.shape(after).products}
    after, words = after._replace(joined=tuple(kind for kind in kinds if kind in possible)), []
    for kind in after.joined or ():
        apart = after._replace(joined=tuple(one for one in after.joined or () if one != kind))
        gain = _seconds(apart, situation, kind) / _seconds(after, situation, kind)
        words.append(f"{kinds[kind]} {'one product' if gain >= _SLOWER else 'apart, as one product'} ({gain:.4g}x)")
        if gain < _SLOWER:
            after = apart
    return after, words


def _seconds(plan: Plan, situation: Situation, kind: str) -> float:
    """Seconds that a kind of product takes, as one or as several, for a prompt and an answer as long."""
    shape, target, n = situation.shape(plan), situation.target, situation.threads(plan)
    prompt, token = (cost.products(shape, target, tokens, n, {kind, *kind.split("|")}) for tokens in (PROMPT, 1))
    return prompt.seconds + PROMPT * token.seconds


def _lacking(norm: Norm, plan: Plan, situation: Situation) -> str:
    """Why a norm is not folded, "" if it is."""
    if norm.ones or norm.lacks:
        return norm.lacks
    if situation.target.profile.kind != "cpu":
        return "weights behind them whose kernels, on a card, round inputs as they like"
    changed = [name for name in norm.weights if name in plan.types]
    return "weights behind them that get another type" if changed else ""


def _norms_told(after: Plan, plan: Plan, situation: Situation) -> str:
    total, ones = len(situation.norms), sum(norm.ones for norm in situation.norms)
    told = f"{len(after.folded) or 'none'} of {total} norms folded"
    if ones and ones < len(after.folded):
        told += f" ({ones} are ones)"
    reasons = Counter(reason for norm in situation.norms if (reason := _lacking(norm, plan, situation)))
    return ", ".join([told, *(f"{n} have {reason}" for reason, n in reasons.most_common())])


FUSION = Pass("fusion", "products with one input as one, norms without scales where that is exact", _apply_fusion)


# Where weights lie: in the order in which a step touches them, aligned, and packed where the target has kernels for that.

PAGE = 4096
_BLOCK = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_norm", "attn_k_norm", "attn_output", "ffn_norm", "ffn_gate_inp",
    "ffn_gate", "ffn_up", "ffn_gate_exps", "ffn_up_exps", "ffn_down", "ffn_down_exps",
)  # fmt: skip
"""Parts of a block as the graph touches them: what shares its input side by side."""


def first_touch(names: Collection[str]) -> tuple[str, ...]:
    """Tensors in the order in which a forward pass touches them: embedding, blocks, norm, head; weights before their biases."""

    def key(name: str) -> tuple[int, int, bool, int, str]:
        unit, _, part = unit_name(name), *name.rpartition(".")[::2]
        where = {"embedding": 0, "norm": 2, "head": 3}.get(unit, 1)
        number = int(unit.removeprefix("blk.")) if where == 1 and unit.removeprefix("blk.").isdecimal() else 0
        kind = name.split(".")[2] if where == 1 and name.count(".") >= 3 else ""
        # A norm between weights that are one product would part them: biases and norms of a block's parts come behind its weights.
        return where, number, part == "bias", _BLOCK.index(kind) if kind in _BLOCK else len(_BLOCK), name

    return tuple(sorted(names, key=key))


def _apply_layout(plan: Plan, situation: Situation) -> Plan:
    """Order and alignment of the file, and whether there are packed weights.

    Packed weights lie in a file of their own. Each tensor of the GGUF begins a page, unless that would part what is to be one product.
    """
    shape = situation.shape(plan)
    packed = [name for name in shape.types if name in situation.target.packed]
    beside = any("|" in product.name and product.type not in situation.target.packed for product in shape.products)
    after = plan._replace(order=first_touch(situation.header.tensors), alignment=LEAST if beside else PAGE, pack=bool(packed))
    what = f"{len(after.order)} tensors in the order of first touch, "
    what += f"packed: {', '.join(packed)}" if packed else "none packed, as the target has no kernels for these types"
    return gained(plan, after, situation, "layout", what)


LAYOUT = Pass("layout", "order by first touch, alignment, packed weights", _apply_layout)


# How a model is run: threads, tokens of a prompt fed at once, what is read ahead, what is kept in memory, what is on the accelerator.

CHUNKS = (512, 256, 128, 64)
_WORTH, _WORTH_PROMPT, _WORTH_CHUNK = 1.03, 1.15, 1.15
"""What more threads must gain for tokens or for prompts to be taken, as they cost others something; and smaller chunks, which the model
knows less well.
"""
_AHEAD_SECONDS = 0.05
_LEAST_AHEAD, _MOST_AHEAD = 2 << 20, 64 << 20
_SHORT = 0.5
"""A model that takes more of a device's memory than this may have its pages taken by others: units are locked up to this share."""


def _apply_pipeline(plan: Plan, situation: Situation) -> Plan:
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
    cells = held.cells / shape.config.n_layer
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


PIPELINE = Pass("pipeline", "threads, chunk, reading ahead, locking, streaming, layers on the accelerator", _apply_pipeline)


# What can be kept up: threads and their share of the time under a power cap, and the temperature that is to be held.

MARGIN = 5.0
"""Degrees below the temperature from which the device slows itself down: firmware gives up more speed than the margin costs."""


def _apply_power(plan: Plan, situation: Situation) -> Plan:
    """Choose threads by tokens a second that are sustained under the cap, not by those of the first second. Raises OptionError."""
    profile, cap = situation.target.profile, situation.goals.power
    celsius = None if profile.hottest is None else profile.hottest - MARGIN
    if cap is None:
        return plan._replace(power=PowerSetting(None, celsius, situation.threads(plan)))
    if profile.idle_power is None or profile.power is None:
        raise OptionError(f"--power cannot be planned for {situation.target.name}: what it draws is not known; leave it out")
    if cap <= profile.idle_power:
        raise OptionError(f"--power {cap:g} is no more than {situation.target.name} draws at rest ({profile.idle_power:g} W); raise it")
    numbers = range(1, situation.target.threads + 1)
    rate, threads, duty = max(sustained(plan._replace(threads=n), situation, cap) for n in numbers)
    burst, _, _ = sustained(plan, situation, cap)
    own = threads if profile.kind == "cpu" and threads < situation.target.threads else 0
    after = plan._replace(threads=own, power=PowerSetting(cap, celsius, threads, round(duty, 3)))
    of = threads_told(threads) if profile.kind == "cpu" else "the card"
    what = f"{cap:g} W held by {of} at work {duty:.0%} of the time: {rate:.1f} tokens/s sustained"
    return after._replace(gains=(*after.gains, Gain("power", what, token=rate / burst)))


def sustained(plan: Plan, situation: Situation, cap: float) -> tuple[float, int, float]:
    """(tokens a second, threads, share of the time at work) that a plan's threads keep up under a cap of so many watts."""
    n, idle = situation.threads(plan), situation.target.profile.idle_power or 0.0
    watts = cost.power(situation.target, n) or 0.0
    duty = min(1.0, (cap - idle) / max(watts - idle, 1e-9))
    return duty / situation.token(plan), n, duty


POWER = Pass("power", "threads, their share of the time and a temperature that can be kept up", _apply_power)


# Which type each weight gets: the least divergence that a number of bytes buys, by sensitivities that were measured.
#
# Each step up of a group (to the next type on its lower convex hull of divergence over bytes) saves some divergence a byte; the best steps
# are taken until the bytes are spent, or the divergence that is asked for is reached: the greedy solution of the Lagrangian relaxation.

TYPES = ("Q2_K", "Q3_K", "Q4_0", "IQ4_NL", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1", "Q6_K", "Q8_0", "F16")
"""What a weight may become, if its rows can be filled with blocks of it."""


class Step(NamedTuple):
    """A group from one type to a larger one: bytes more, divergence less."""

    group: Group
    type_name: str
    nbytes: int
    saves: float

    @property
    def worth(self) -> float:
        """Divergence saved by each byte."""
        return self.saves / self.nbytes


def _apply_precision(plan: Plan, situation: Situation) -> Plan:
    """Types by sensitivity, if they were measured; the source's own otherwise. Raises OptionError for a budget that is too small."""
    if not situation.sensitivities:
        return plan
    goals = situation.goals
    rest = _rest(situation)
    budget = None if goals.weights is None else goals.weights - rest
    if budget is None and goals.quality is None:
        budget = uniform_bytes(situation.sensitivities)
    chosen = choose(situation.sensitivities, budget, goals.quality)
    if goals.quality is not None and (reached := predicted(situation.sensitivities, chosen)) > goals.quality:
        raise OptionError(f"--quality {goals.quality:g} is not reached: {reached:.3g} is the best in these bytes; raise it or --weights")
    types = {}
    for one in situation.sensitivities:
        for name in one.group.tensors:
            if situation.header.tensors[name].type_name != chosen[one.group.name]:
                types[name] = chosen[one.group.name]
    after = plan._replace(types={**plan.types, **types})
    shape = situation.shape(after)
    mixed = ", ".join(f"{name} {nbytes / shape.weights:.0%}" for name, nbytes in shape.types.items())
    quality = predicted(situation.sensitivities, chosen)
    return gained(plan, after, situation, "precision", f"{mixed} of {shape.weights >> 20}M, KL {quality:.3g} predicted", quality)


def _rest(situation: Situation) -> int:
    """Bytes of what keeps its type: norms, biases."""
    grouped = {name for one in situation.sensitivities for name in one.group.tensors}
    return sum(info.nbytes for name, info in situation.header.tensors.items() if name not in grouped)


def uniform_bytes(found: Sequence[Sensitive]) -> int:
    """Bytes of all groups in the base type."""
    return sum(one.group.nbytes(BASE) for one in found)


def predicted(found: Sequence[Sensitive], chosen: Mapping[str, str]) -> float:
    """The divergence of a choice: that of its parts, added up."""
    return sum(one.divergence[chosen[one.group.name]] for one in found)


def choose(found: Sequence[Sensitive], budget: int | None, quality: float | None) -> dict[str, str]:
    """A type for each group by name, within bytes, or as few bytes as reach a divergence. Raises OptionError if the least is too much."""
    hulls = {one.group.name: _hull(one) for one in found}
    chosen = {name: hull[0][0] for name, hull in hulls.items()}
    spent = sum(one.group.nbytes(chosen[one.group.name]) for one in found)
    if budget is not None and spent > budget:
        raise OptionError(f"the weights take {spent >> 20}M at least, and {budget >> 20}M are allowed; raise --weights")
    left = sum(one.divergence[chosen[one.group.name]] for one in found)
    for step in sorted((step for one in found for step in _steps(one, hulls[one.group.name])), key=lambda step: -step.worth):
        if quality is not None and left <= quality:
            break
        if budget is not None and spent + step.nbytes > budget:
            continue
        if not _follows(chosen[step.group.name], step.type_name, hulls[step.group.name]):
            continue  # the step before it did not fit
        chosen[step.group.name] = step.type_name
        spent, left = spent + step.nbytes, left - step.saves
    return chosen


def _hull(one: Sensitive) -> list[tuple[str, int, float]]:
    """(type, bytes, divergence) of the types that are the best for some price of a byte, smallest first: the lower convex hull."""
    points = sorted(((name, one.group.nbytes(name), value) for name, value in one.divergence.items()), key=lambda p: (p[1], p[2]))
    hull: list[tuple[str, int, float]] = []
    for point in points:
        if hull and point[2] >= hull[-1][2]:
            continue  # larger and no better
        if hull and point[1] == hull[-1][1]:
            hull.pop()
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: tuple[str, int, float], b: tuple[str, int, float]) -> float:
    return (a[2] - b[2]) / (b[1] - a[1])


def _steps(one: Sensitive, hull: Sequence[tuple[str, int, float]]) -> list[Step]:
    return [Step(one.group, b[0], b[1] - a[1], a[2] - b[2]) for a, b in pairwise(hull)]


def _follows(current: str, wanted: str, hull: Sequence[tuple[str, int, float]]) -> bool:
    names = [name for name, _, _ in hull]
    return names.index(wanted) == names.index(current) + 1


PRECISION = Pass("precision", "a type for each weight, by measured sensitivity", _apply_precision)
