"""What a graph does in fewer nodes: products with the same input as one, and norms without their scales.

Products: one product converts its input once, and threads meet once behind it; on the other hand kernels do not reach the same with each
shape. The cost model says which is less, for each kind of product, on the target; the ratio that is printed is that of these products,
for a prompt and an answer as long. Layout then lays the weights side by side.

Norms: a norm whose scale can go into the weights behind it without a bit changing, and those that are all ones anyway (folding.py).
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from edge_rt.compiler import cost
from edge_rt.compiler.plan import PROMPT, Situation, gained
from edge_rt.core.graph.config import TOGETHER
from edge_rt.deployment import Pass, Plan

if TYPE_CHECKING:
    from edge_rt.compiler.folding import Norm

_SLOWER = 0.85
"""Products stay apart only where together they take less than this part of what one takes: measurements of kernels that agree may differ
by as much (calibrate.py), and one product has less to do in any case.
"""


def apply(plan: Plan, situation: Situation) -> Plan:
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


PASS = Pass("fusion", "products with one input as one, norms without scales where that is exact", apply)
