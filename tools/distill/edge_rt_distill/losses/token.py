"""Level 1, tokens: how far the student's distribution of the next token is from the teacher's, over the whole vocabulary.

The distributions are made and compared a few positions at a time, and the gradient with respect to the student's last hidden states and
to its head is worked out in the same pass: no logits of a whole batch ever exist, and none is computed twice. (The naive graph of 2,048
positions over 49,152 tokens holds several times 400 MB and reads each many times.)

Divergences between the teacher's p and the student's q:

- ``forward``: KL(p||q) (Hinton et al. 2015, arXiv:1503.02531);
- ``reverse``: KL(q||p) (MiniLLM, Gu et al. 2023, arXiv:2306.08543);
- ``skewed``: KL(p || a p + (1 - a) q) (DistiLLM, Ko et al. 2024, arXiv:2402.03898);
- ``taid``: KL(p_t||q), p_t between student and teacher in logits (TAID, Shing et al. 2025, arXiv:2501.16937); ``mix`` is t.

With ``head`` = K the loss is decoupled, after KL(p||q) = KL of [top K, tail as one] + tail mass x KL inside the tail. In the second term
the mass, small where the teacher is sure, is replaced by ``beta * max(mass, floor)``, and inside it a candidate that the teacher separates
from its unigram prior weighs u = 1 + min(|log p - log prior|, clip), where p > ``least``; u = 1 elsewhere. Weights inside a KL would move
its minimum to q ~ u p: so each candidate counts with u (p log(p/q) - p + q), which is never negative, is 0 where p = q, and sums to the KL
where u = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edge_rt.hooks import OptionError
from edge_rt_distill.model.divergence import Final
from edge_rt_distill.model.logits import pieces
from edge_rt_distill.model.precision import Head

Kind = Literal["forward", "reverse", "skewed", "taid"]
PARTS = ("divergence", "tail", "ranking", "cross_entropy")
RANK_MARGIN = 1.0  # nats: a lead of the teacher's that is larger need not be larger in the student


class TokenOptions(NamedTuple):
    """How teacher and student are compared.

    ``kind``: the divergence (in a decoupled loss: of the head). ``alpha``: the skew. ``mix``: TAID's t, 0 (student) to 1 (teacher).
    ``head``: K of the decoupled form, 0 for the plain one; with it ``beta``, ``floor``, ``clip``, ``least`` as the module explains.
    ``ranking``: weight of a hinge on neighbours in the teacher's order of the top K: max(0, min(lead of p, 1) - lead of q), in nats.
    ``cross_entropy``: weight of the negative log-likelihood of the true tokens. ``chunk``: positions at a time, 0: as many as fit.
    """

    kind: Kind = "forward"
    alpha: float = 0.1
    mix: float = 1.0
    head: int = 0
    beta: float = 1.0
    floor: float = 0.02
    clip: float = 4.0
    least: float = 1e-5
    ranking: float = 0.0
    cross_entropy: float = 0.0
    chunk: int = 0


class TokenLoss(NamedTuple):
    """``loss``: scalar, differentiable. ``parts``: its addends by name (PARTS), detached and not yet weighted, in nats a token."""

    loss: Tensor
    parts: dict[str, Tensor]


class _Work(NamedTuple):
    """What a chunk needs besides the student: all of N rows."""

    teacher: Final | None
    weights: Tensor
    labels: Tensor | None
    prior: Tensor | None
    options: TokenOptions
    theirs: Head | None


def check_options(options: TokenOptions) -> None:
    """Raises OptionError for values that contradict each other or are out of range."""
    if options.kind not in KINDS:
        raise OptionError(f"no divergence is named {options.kind!r}; choose one of {', '.join(KINDS)}")
    if not 0 <= options.alpha < 1 or not 0 <= options.mix <= 1:
        raise OptionError(f"alpha = {options.alpha} and mix = {options.mix} are shares; give 0 <= alpha < 1 and 0 <= mix <= 1")
    if options.head < 0 or options.chunk < 0:
        raise OptionError(f"head = {options.head} and chunk = {options.chunk} are counts; give 0 or more")
    negative = [name for name in ("beta", "floor", "clip", "least", "ranking", "cross_entropy") if not getattr(options, name) >= 0]
    if negative:
        raise OptionError(f"{negative[0]} = {getattr(options, negative[0])} would reward what is wrong; give 0 or more")
    if options.ranking and options.head == 1:
        raise OptionError("a ranking needs two tokens; set head to 2 or more")


def token_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: Final | None,
    *,
    weights: Tensor | None = None,
    labels: Tensor | None = None,
    prior: Tensor | None = None,
    options: TokenOptions = TokenOptions(),  # noqa: B008 (immutable)
) -> TokenLoss:
    """The weighted mean over N positions of the loss that ``options`` describes.

    ``hidden`` [N, D]: the student's states behind its final norm; ``weight`` [V, D]: its head (of a tied model the embedding, which gets
    its gradient). ``teacher``: None for cross-entropy alone. ``weights`` [N]: of the positions, not negative; positions of weight 0 cost
    nothing. ``labels`` [N]: the true next tokens, wanted with ``cross_entropy``. ``prior`` [V]: log of the unigram distribution.
    Both first derivatives are exact; there are no second ones. Raises OptionError.
    """
    check_options(options)
    if options.cross_entropy and labels is None:
        raise OptionError("cross-entropy needs the true tokens; pass labels, or set cross_entropy to 0")
    if options.ranking and not options.head:
        raise OptionError("a ranking is of the teacher's top tokens; set head to how many")
    row_weights = torch.ones_like(hidden[:, 0]) if weights is None else weights.to(hidden.dtype)
    counted = (row_weights > 0).nonzero().squeeze(-1)
    if len(counted) < len(row_weights):
        teacher = None if teacher is None else teacher._replace(hidden=teacher.hidden[counted])
        hidden, row_weights, labels = hidden[counted], row_weights[counted], None if labels is None else labels[counted]
    if len(counted) == 0:
        return TokenLoss(hidden.sum() * 0, {name: hidden.new_zeros(()) for name in PARTS})
    theirs = None if teacher is None else Head.of(teacher.head, teacher.rest)
    work = _Work(teacher, row_weights / row_weights.sum(), labels, prior, options, theirs)
    loss, parts = _Fused.apply(hidden, weight, work, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return TokenLoss(loss, dict(zip(PARTS, parts.unbind(), strict=True)))


class _Fused(torch.autograd.Function):
    """Loss and its gradients in one pass over chunks of positions; backward only scales what forward kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, work: _Work, with_gradient: bool) -> tuple[Tensor, Tensor]:
        head = Head.of(weight)
        with torch.autocast("cpu", enabled=False):  # logits may be rounded, what is made of them is not
            return _Fused.compute(ctx, hidden, head, work, [with_gradient and ctx.needs_input_grad[i] for i in range(2)])

    @staticmethod
    def compute(ctx: Any, hidden: Tensor, head: Head, work: _Work, wanted: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Chunk by chunk. ``wanted``: whether the gradients of hidden states and head are."""
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight = torch.zeros(head.weight.shape, dtype=hidden.dtype) if wanted[1] else None
        parts = torch.zeros(len(PARTS), dtype=torch.float64)
        for rows in pieces(len(hidden), len(head.weight), hidden.element_size(), work.options.chunk):
            columns, gradient = _chunk(head.logits(hidden[rows]), work, rows)
            parts += work.weights[rows].double() @ columns.double()
            gradient *= work.weights[rows, None]
            if to_hidden is not None:
                to_hidden[rows] = head.back(gradient)
            if to_weight is not None:
                to_weight += head.of_weight(gradient, hidden[rows])
        ctx.save_for_backward(to_hidden, to_weight)
        scale = parts.new_tensor((1.0, work.options.beta, work.options.ranking, work.options.cross_entropy))
        parts_out = parts.to(hidden)
        ctx.mark_non_differentiable(parts_out)
        return (parts @ scale).to(hidden), parts_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if kept is None else kept * gradients[0] for kept in ctx.saved_tensors), None, None)


def _chunk(logits: Tensor, work: _Work, rows: slice) -> tuple[Tensor, Tensor]:
    """(PARTS of each row [C, 4], gradient of the loss of each row with respect to its logits [C, V]). ``logits`` is overwritten."""
    labels = None if work.labels is None else work.labels[rows]
    if work.teacher is not None:
        assert work.theirs is not None
        theirs = work.theirs.logits(work.teacher.hidden[rows])
        if work.options.head:
            index = theirs.topk(min(work.options.head, theirs.shape[-1] - 1), sorted=True).indices
            buckets, inside = _split(theirs, index)
            return _decoupled(logits, index, buckets, inside, labels, work)
        theirs = torch.log_softmax(theirs, -1)
    else:
        theirs = None
    log_q = torch.log_softmax(logits, -1)
    zero = log_q.new_zeros(len(log_q))
    divergence, gradient = (zero, logits.zero_()) if theirs is None else KINDS[work.options.kind](theirs, log_q, work.options)
    unlikeliness = zero
    if labels is not None and work.options.cross_entropy:
        unlikeliness = -log_q.gather(-1, labels[:, None]).squeeze(-1)
        gradient.add_(log_q.exp_(), alpha=work.options.cross_entropy)
        _subtract_at(gradient, labels, work.options.cross_entropy)
    return torch.stack((divergence, zero, zero, unlikeliness), -1), gradient


def _subtract_at(gradient: Tensor, labels: Tensor, amount: float) -> None:
    gradient.scatter_add_(-1, labels[:, None], gradient.new_full((len(labels), 1), -amount))


# ---- divergences: (log p, log q, options) -> (rows [C], gradient with respect to q's logits [C, M]); log p may be overwritten --------


def _forward(log_p: Tensor, log_q: Tensor, options: TokenOptions) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    rows = _dot(p, log_p.sub_(log_q))
    return rows, torch.exp(log_q, out=log_p).sub_(p)


def _reverse(log_p: Tensor, log_q: Tensor, options: TokenOptions) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    difference = torch.sub(log_q, log_p, out=log_p)
    rows = _dot(q, difference)
    return rows, difference.sub_(rows[:, None]).mul_(q)


def _skewed(log_p: Tensor, log_q: Tensor, options: TokenOptions) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    mixed = (p * options.alpha).add_(q, alpha=1 - options.alpha).clamp_(min=torch.finfo(p.dtype).tiny)
    rows = _dot(p, log_p.sub_(mixed.log()))
    ratio = p.div_(mixed).mul_(1 - options.alpha)
    return rows, torch.sub(_dot(q, ratio)[:, None], ratio, out=ratio).mul_(q)


def _taid(log_p: Tensor, log_q: Tensor, options: TokenOptions) -> tuple[Tensor, Tensor]:
    between = log_p.mul_(options.mix).add_(log_q, alpha=1 - options.mix)
    return _forward(torch.log_softmax(between, -1), log_q, options)


KINDS: dict[str, Callable[[Tensor, Tensor, TokenOptions], tuple[Tensor, Tensor]]] = {
    "forward": _forward,
    "reverse": _reverse,
    "skewed": _skewed,
    "taid": _taid,
}


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Row by row, without a matrix in between."""
    return torch.bmm(left[:, None], right[:, :, None])[:, 0, 0]


# ---- the decoupled form ----------------------------------------------------------------------------------------------------------------


def _split(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probabilities of [the tokens at ``index``, all others as one] [C, K + 1], of the others among themselves [C, V]).

    ``logits`` becomes the second. What is in the head gets a log-probability there that is finite, so that differences of two are 0 and
    not NaN, and whose exponential is 0.
    """
    head = logits.gather(-1, index)
    inside = logits.scatter_(-1, index, torch.finfo(logits.dtype).min / 4)
    mass = inside.logsumexp(-1, keepdim=True)
    return torch.log_softmax(torch.cat((head, mass), -1), -1), inside.sub_(mass)


def _decoupled(logits: Tensor, index: Tensor, log_p: Tensor, p_inside: Tensor, labels: Tensor | None, work: _Work) -> tuple[Tensor, Tensor]:
    """As ``_chunk``. ``log_p`` [C, K + 1]: the teacher's buckets. ``p_inside`` [C, V]: its tail."""
    options = work.options
    true_logit = None if labels is None else logits.gather(-1, labels[:, None]).squeeze(-1)
    total = logits.logsumexp(-1) if true_logit is not None and options.cross_entropy else None
    log_q, q_inside = _split(logits, index)
    mass = log_p[:, -1].exp()
    unlikeliness = ranking = tail = log_q.new_zeros(len(log_q))
    lead_p = (log_p[:, :-2] - log_p[:, 1:-1]).clamp_(max=RANK_MARGIN)
    log_mass = log_p[:, -1:].clone()
    divergence, buckets = KINDS[options.kind](log_p, log_q, options)
    if options.ranking:
        ranking = _rank(lead_p, log_q, buckets, options.ranking)
    if total is not None and true_logit is not None:
        unlikeliness = total - true_logit
        buckets = buckets.add(log_q.exp(), alpha=options.cross_entropy)
    if not options.beta:
        gradient = q_inside.exp_().mul_(buckets[:, -1:])
    else:
        factor = mass.clamp(min=options.floor)
        tail, gradient, q = _inside(p_inside, q_inside, _separation(p_inside, log_mass, work))
        tail = tail * factor
        gradient = gradient.mul_(options.beta * factor[:, None]).add_(q.mul_(buckets[:, -1:]))
    gradient.scatter_(-1, index, buckets[:, :-1])
    if total is not None and labels is not None:
        _subtract_at(gradient, labels, options.cross_entropy)
    return torch.stack((divergence, tail, ranking, unlikeliness), -1), gradient


def _separation(p_inside: Tensor, log_mass: Tensor, work: _Work) -> Tensor | None:
    """u [C, V] of the module's text; None for 1 everywhere."""
    if work.prior is None or not work.options.clip:
        return None
    log_p = p_inside + log_mass
    unlikely = log_p <= (math.log(work.options.least) if work.options.least else -math.inf)
    return log_p.sub_(work.prior.to(log_p)).abs_().clamp_(max=work.options.clip).masked_fill_(unlikely, 0).add_(1)


def _inside(log_p: Tensor, log_q: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(sum of u (p log(p/q) - p + q) [C], gradient with respect to the tail's logits [C, V], q [C, V])."""
    p, q = log_p.exp(), log_q.exp()
    apart = log_p.sub_(log_q)  # log p - log q
    difference = torch.sub(q, p, out=log_q)
    if u is None:
        return _dot(p, apart), difference, q
    weighted = difference.mul_(u)
    excess = weighted.sum(-1)
    rows = _dot(p.mul_(u), apart) + excess
    return rows, weighted.sub_(q * excess[:, None]), q


def _rank(lead_p: Tensor, log_q: Tensor, buckets: Tensor, factor: float) -> Tensor:
    """Mean over neighbours of max(0, lead of the teacher - lead of the student) [C]; its gradient is added to ``buckets``."""
    short = (lead_p - (log_q[:, :-2] - log_q[:, 1:-1])).clamp_(min=0)
    pairs = short.shape[-1]
    active = (short > 0).to(short) * (factor / pairs)
    buckets[:, :-2] -= active
    buckets[:, 1:-1] += active
    return short.mean(-1)


# ---- log-probabilities of given tokens ---------------------------------------------------------------------------------------------------


def token_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 0) -> Tensor:
    """log q(label) of each position [N], differentiable, with memory for a chunk of positions; backward computes the logits again.

    ``hidden`` [N, D], ``weight`` [V, D], ``labels`` [N].
    """
    result: Tensor = _LogProbs.apply(hidden, weight, labels, chunk)  # type: ignore[no-untyped-call]
    return result


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        ctx.chunk, ctx.head = chunk, Head.of(weight)
        found = hidden.new_empty(len(hidden))
        with torch.autocast("cpu", enabled=False):
            for rows in pieces(len(hidden), len(weight), hidden.element_size(), chunk):
                logits = ctx.head.logits(hidden[rows])
                found[rows] = logits.gather(-1, labels[rows, None]).squeeze(-1) - logits.logsumexp(-1)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels = ctx.saved_tensors
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        head: Head = ctx.head
        for rows in pieces(len(hidden), len(weight), hidden.element_size(), ctx.chunk):
            gradient = torch.softmax(head.logits(hidden[rows]), -1).neg_()
            gradient.scatter_add_(-1, labels[rows, None], gradient.new_ones((len(gradient), 1)))
            gradient *= gradients[0][rows, None]
            if to_hidden is not None:
                to_hidden[rows] = head.back(gradient)
            if to_weight is not None:
                to_weight += head.of_weight(gradient, hidden[rows])
        return to_hidden, to_weight, None, None
