"""What passes look at, and the order in which they decide.

A pass is a pure function from a plan to a plan (edge_rt/deployment.py has both). It works out what it gains with the cost model, and adds
that to the plan: what is printed is what was decided by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.compiler import cost
from edge_rt.compiler.shape import ModelShape, read_shape
from edge_rt.compiler.target import Target
from edge_rt.core.gguf.reader import Header
from edge_rt.deployment import Gain, Pass, Plan

if TYPE_CHECKING:
    from edge_rt.compiler.folding import Norm
    from edge_rt.compiler.sensitivity import Sensitive

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
        return self.goals.context or min(CONTEXT, self.shape(Plan("")).hyper.train_context)

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
    from edge_rt.compiler.passes import fusion, layout, pipeline, power, precision

    return (precision.PASS, fusion.PASS, layout.PASS, pipeline.PASS, power.PASS)
