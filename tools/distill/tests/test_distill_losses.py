"""Losses against their formulas written out in full, with gradients; and what each must be when student and teacher are the same."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from edge_rt_distill.losses import attention, behaviour, hidden
from edge_rt_distill.losses.balance import balance
from edge_rt_distill.losses.token import (
    TokenOptions,
    token_logprobs,
    token_loss,
)
from edge_rt_distill.model.architecture import Architecture, LayerShape
from edge_rt_distill.model.divergence import Final
from edge_rt_distill.model.rows import fill
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_rt.errors import OptionError

N, D, V = 7, 5, 23
SMALL = TokenOptions(chunk=3)
OPTIONS = {
    "forward": SMALL,
    "reverse": SMALL._replace(kind="reverse"),
    "skewed": SMALL._replace(kind="skewed"),
    "taid": SMALL._replace(kind="taid", mix=0.6),
    "with true tokens": SMALL._replace(kind="reverse", cross_entropy=0.5),
    "decoupled": SMALL._replace(head=4),
    "decoupled, all of it": SMALL._replace(head=4, beta=0.7, ranking=0.3, cross_entropy=0.5, least=0.01),
    "decoupled, skewed": SMALL._replace(kind="skewed", head=4, floor=0.3),
}


class Case:
    """Random student and teacher in double precision; ``same``: the student is the teacher."""

    def __init__(self, seed: int = 0, same: bool = False, dtype: torch.dtype = torch.float64) -> None:
        draw = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        self.teacher = Final(normal(N, D) * 2, normal(V, D))
        self.hidden = (self.teacher.hidden.clone() if same else normal(N, D)).requires_grad_()
        self.weight = (self.teacher.head.clone() if same else normal(V, D)).requires_grad_()
        self.weights = torch.rand(N, generator=draw, dtype=torch.float64).to(dtype)
        self.weights[2] = 0
        self.labels = torch.randint(V, (N,), generator=draw)
        self.prior = torch.log_softmax(normal(V), -1)

    def loss(self, options: TokenOptions, teacher: Final | None = None) -> Tensor:
        return token_loss(
            self.hidden, self.weight, teacher or self.teacher, weights=self.weights, labels=self.labels, prior=self.prior, options=options
        ).loss

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def divergence(kind: str, p: Tensor, q: Tensor, options: TokenOptions) -> Tensor:
    if kind == "taid":
        p = torch.softmax((1 - options.mix) * q.detach().log() + options.mix * p.log(), -1)
    if kind == "reverse":
        p, q = q, p
    if kind == "skewed":
        q = options.alpha * p + (1 - options.alpha) * q
    return (p * (p / q).log()).sum(-1)


def written_out(case: Case, options: TokenOptions) -> Tensor:
    """The loss as the module's text has it, by autograd, one row at a time."""
    rows = []
    for n in range(N):
        p, q = torch.softmax(case.teacher.head @ case.teacher.hidden[n], -1), torch.softmax(case.weight @ case.hidden[n], -1)
        if not options.head:
            loss = divergence(options.kind, p, q, options)
        else:
            order = p.argsort(descending=True)
            top, rest = order[: options.head], order[options.head :]
            buckets_p, buckets_q = (torch.cat((x[top], x[rest].sum()[None])) for x in (p, q))
            loss = divergence(options.kind, buckets_p, buckets_q, options)
            p_tail, q_tail = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
            u = 1 + (p[rest].log() - case.prior[rest]).abs().clamp(max=options.clip) * (p[rest] > options.least)
            inside = (u * (p_tail * (p_tail / q_tail).log() - p_tail + q_tail)).sum()
            loss = loss + options.beta * max(float(p[rest].sum()), options.floor) * inside
            leads = [min(float((p[a] / p[b]).log()), 1.0) - (q[a] / q[b]).log() for a, b in itertools.pairwise(top)]
            loss = loss + options.ranking * torch.stack(leads).clamp(min=0).mean()
        rows.append(loss - options.cross_entropy * q[case.labels[n]].log())
    return (torch.stack(rows) * case.weights).sum() / case.weights.sum()


@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_are_those_of_the_formula(name):
    case = Case()
    found, expected = case.loss(OPTIONS[name]), written_out(case, OPTIONS[name])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    for ours, naive in zip(case.gradients(3 * found), case.gradients(3 * expected), strict=True):
        torch.testing.assert_close(ours, naive, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "taid"])  # there the target moves with the student
def test_gradients_are_those_of_finite_differences(name):
    case = Case(1)
    assert torch.autograd.gradcheck(
        lambda h, w: token_loss(
            h, w, case.teacher, weights=case.weights, labels=case.labels, prior=case.prior, options=OPTIONS[name]
        ).loss,
        (case.hidden, case.weight),
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name in OPTIONS if "true" not in name and "all" not in name])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(name):
    case = Case(same=True)
    loss = case.loss(OPTIONS[name])
    assert abs(float(loss.detach())) < 1e-12
    assert max(float(g.abs().max()) for g in case.gradients(loss)) < 1e-12


@pytest.mark.parametrize("name", OPTIONS)
def test_chunks_do_not_change_what_comes_out(name):
    cases = [Case(2, dtype=torch.float32) for _ in range(3)]
    losses = [case.loss(OPTIONS[name]._replace(chunk=chunk)) for case, chunk in zip(cases, (1, 4, 0), strict=True)]
    gradients = [case.gradients(loss) for case, loss in zip(cases, losses, strict=True)]
    for loss, pair in zip(losses[1:], gradients[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pair, gradients[0], rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 30.0]), head=st.sampled_from([0, 1, 5, 22, 40]))
def test_plain_and_decoupled_add_up_whatever_the_distributions(seed, scale, head):
    """With beta 1, no floor and no prior the decoupled form is the KL itself, of sharp and of flat distributions; never negative."""
    case = Case(seed, dtype=torch.float32)
    case.teacher = Final(case.teacher.hidden * scale, case.teacher.head)
    plain = token_loss(case.hidden, case.weight, case.teacher, options=TokenOptions())
    split = token_loss(case.hidden, case.weight, case.teacher, options=TokenOptions(head=head, floor=0.0))
    torch.testing.assert_close(split.loss, plain.loss, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(case.gradients(split.loss), case.gradients(plain.loss), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    weighted = token_loss(case.hidden, case.weight, case.teacher, prior=case.prior, options=TokenOptions(head=head))
    assert float(weighted.loss.detach()) > -1e-6
    assert all(bool(torch.isfinite(g).all()) for g in case.gradients(weighted.loss))


def test_top_tokens_and_the_mass_of_all_others_are_all_that_counts_without_a_tail_term():
    case = Case(3)
    logprobs = torch.log_softmax(case.teacher.hidden @ case.teacher.head.T, -1)
    top = logprobs.topk(4, -1).indices

    def buckets(of: Tensor) -> Tensor:
        likely = of.exp().gather(-1, top)
        return torch.cat((likely, 1 - likely.sum(-1, keepdim=True)), -1)

    p, q = buckets(logprobs), buckets(torch.log_softmax(case.hidden @ case.weight.T, -1))
    exact = ((p * (p / q).log()).sum(-1) * case.weights).sum() / case.weights.sum()
    ours = case.loss(TokenOptions(head=4, beta=0.0))
    torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(case.gradients(ours), case.gradients(exact), rtol=1e-6, atol=1e-10)


def test_positions_that_do_not_count_change_nothing_and_none_at_all_is_a_loss_of_zero():
    case = Case(4)
    before = case.loss(SMALL)
    with torch.no_grad():
        case.hidden[2] += 100
    assert case.loss(SMALL).equal(before)
    nothing = token_loss(case.hidden, case.weight, case.teacher, weights=torch.zeros(N))
    assert float(nothing.loss.detach()) == 0
    nothing.loss.backward()
    assert not case.hidden.grad.any()


def test_a_frozen_head_costs_no_gradient_and_no_gradient_is_made_when_none_is_wanted():
    case = Case(5)
    case.weight.requires_grad_(False)
    case.loss(SMALL).backward()
    assert case.weight.grad is None
    assert case.hidden.grad is not None
    with torch.no_grad():
        assert not case.loss(SMALL).requires_grad


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (TokenOptions(kind="backward"), "backward"),
        (TokenOptions(alpha=1.0), "alpha"),
        (TokenOptions(head=-1), "head"),
        (TokenOptions(beta=math.nan), "beta"),
        (TokenOptions(ranking=1.0), "top"),
        (TokenOptions(head=1, ranking=1.0), "two"),
        (TokenOptions(cross_entropy=1.0), "labels"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, word):
    case = Case()
    with pytest.raises(OptionError, match=word):
        token_loss(case.hidden, case.weight, case.teacher, options=options)


def test_log_probabilities_of_tokens():
    case = Case(6)
    found = token_logprobs(case.hidden, case.weight, case.labels, chunk=2)
    expected = torch.log_softmax(case.hidden @ case.weight.T, -1)[torch.arange(N), case.labels]
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda h, w: token_logprobs(h, w, case.labels, 2), (case.hidden, case.weight))


# ---- hidden ------------------------------------------------------------------------------------------------------------------------------


def architecture(*sources: tuple[int, ...], heads: int = 4) -> Architecture:
    layers = tuple(LayerShape(heads, 2, 16, one) for one in sources)
    return Architecture("llama", V, 16, 4, layers, True, 1e-5, 1e4, "interleaved", 64)


@pytest.mark.parametrize(
    ("sources", "layers", "expected"),
    [
        (((),) * 24, 24, [(6, 6), (12, 12), (18, 18), (24, 24)]),
        (tuple((i,) for i in range(30) if i not in (14, 20)), 30, [(8, 8), (15, 14), (22, 20), (30, 28)]),
        (((0,), (1, 2), (3,)), 5, [(1, 1), (3, 2), (5, 3)]),  # 4 is dropped: the last state still matches the last
        (((),) * 12, 24, [(6, 3), (12, 6), (18, 9), (24, 12)]),  # not recorded
        (((0,),), 4, [(4, 1)]),
    ],
)
def test_states_are_matched_by_where_layers_came_from(sources, layers, expected):
    assert hidden.match_states(architecture(*sources), layers) == expected


def test_depths_outside_the_model_are_refused():
    with pytest.raises(OptionError, match="depths"):
        hidden.match_states(architecture(()), 4, [1.5])


def test_hidden_loss_is_the_weighted_cosine_without_position_0():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 4, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    w, d = torch.rand(2, 4, generator=draw, dtype=torch.float64), torch.rand(6, generator=draw, dtype=torch.float64)
    w[1, 3] = 0
    expected, total = 0.0, 0.0
    for i in range(2):
        for t in range(1, 4):
            cosine = (d * a[i, t] * b[i, t]).sum() / ((d * a[i, t] ** 2).sum() * (d * b[i, t] ** 2).sum()).sqrt()
            expected, total = expected + float(w[i, t] * (1 - cosine)), total + float(w[i, t])
    assert float(hidden.hidden_loss(a, b, w, d)) == pytest.approx(expected / total)
    huge = a.clone()
    huge[:, 0] *= 1e6
    assert float(hidden.hidden_loss(huge, b, w, d)) == pytest.approx(expected / total)
    assert abs(float(hidden.hidden_loss(b, b, w, d))) < 1e-12
    assert torch.autograd.gradcheck(lambda x: hidden.hidden_loss(x, b, w, d), (a.requires_grad_(),))


def test_dimensions_weigh_the_less_the_more_they_vary():
    draw = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 2.0, 100.0, 1.0, 0.0])
    states = torch.randn(3, 500, 5, generator=draw) * spread + 7
    states[:, 0] = 1e5
    found = hidden.inverse_variance(states, hidden.without_first(torch.ones(3, 500)))
    assert float(found.mean()) == pytest.approx(1, rel=1e-5)
    assert float(found[0] / found[1]) == pytest.approx(4, rel=0.1)
    assert float(found[0] / found[2]) == pytest.approx(1e4, rel=0.1)
    assert float(found[4] / found[0]) == pytest.approx(1000, rel=0.2)  # one that does not move at all: capped


def test_least_squares_finds_the_projection_there_is():
    draw = torch.Generator().manual_seed(0)
    a, p = torch.randn(200, 4, generator=draw), torch.randn(4, 6, generator=draw)
    weights = torch.ones(200)
    b = a @ p
    b[7] += 1e3
    weights[7] = 0
    found = hidden.least_squares(a, b, weights, 1e-9)
    torch.testing.assert_close(found, p, rtol=1e-4, atol=1e-4)
    assert float(hidden.hidden_loss(a[None, 10:], b[None, 10:], torch.ones(1, 190), torch.ones(6), found)) < 1e-6


# ---- attention ---------------------------------------------------------------------------------------------------------------------------


def maps(seed: int, heads: int = 3, length: int = 5) -> Tensor:
    scores = torch.randn(2, heads, length, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -math.inf).softmax(-1)


def test_attention_loss_is_its_formula():
    ours, theirs = maps(0), maps(1)
    w = torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 0.5, 0, 0]], dtype=torch.float64)
    importance = torch.rand(2, 5, generator=torch.Generator().manual_seed(3))
    heads = attention.priorities(torch.tensor([1.0, 3.0, 0.0]))
    torch.testing.assert_close(heads, torch.tensor([0.25, 0.75, 0.0]), rtol=1e-4, atol=1e-5)
    expected = 0.0
    for b in range(2):
        for t in range(2, 5):
            for h in range(3):
                p, q = theirs[b, h, t, 1 : t + 1], ours[b, h, t, 1 : t + 1]
                p, q = p / p.sum(), q / q.sum()
                far = 1 + 2.0 * (t - torch.arange(1, t + 1)).float().log1p() / math.log(5)
                rows = (importance[b, 1 : t + 1] * far * (p * (p / q).log() - p + q)).sum()
                expected += float(w[b, t] * heads[h] * rows)
    keys = attention.key_weights(5, importance, 2.0)
    assert float(attention.attention_loss(ours, theirs, w, heads, keys)) == pytest.approx(expected / 2.5, rel=1e-6)
    assert abs(float(attention.attention_loss(ours, ours, w, heads, keys))) < 1e-12


def test_attention_loss_pulls_the_student_to_the_teacher_and_nowhere_else():
    scores = torch.zeros(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    theirs, causal = maps(5, 1, 6)[:1], torch.ones(6, 6, dtype=torch.bool).tril()
    keys = attention.key_weights(6, torch.tensor([[1.0, 5, 1, 1, 9, 1]]))
    optimiser = torch.optim.Adam([scores], 0.3)
    for _ in range(120):
        ours = scores.masked_fill(~causal, -math.inf).softmax(-1)
        loss = attention.attention_loss(ours, theirs, torch.ones(1, 6), torch.ones(1), keys)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 1e-5  # weights of keys do not move where the minimum is
    torch.testing.assert_close(
        ours[0, 0, 5, 1:] / ours[0, 0, 5, 1:].sum(), theirs[0, 0, 5, 1:] / theirs[0, 0, 5, 1:].sum(), rtol=0.01, atol=1e-3
    )


def test_heads_are_matched_by_the_table_of_the_cut():
    teacher = architecture((), (), (), ())
    student = architecture((0,), (2, 3), heads=2)
    found = attention.match_heads(student, teacher, [1, 0], [(0, 3), (1, 2)])
    assert found == [(0, 0, (0, 3)), (1, 2, (1, 2))]
    assert attention.match_heads(architecture((0,), (1,)), teacher) == [(0, 0, (0, 1, 2, 3)), (1, 1, (0, 1, 2, 3))]
    for layers, heads, word in (([0], None, "table"), ([2], None, "layer 2"), ([0], [(0, 4), (0, 1)], "table")):
        with pytest.raises(OptionError, match=word):
            attention.match_heads(student, teacher, layers, heads)


# ---- behaviour and balance ---------------------------------------------------------------------------------------------------------------


def test_imitation_weighs_each_token_and_predicts_from_the_one_before():
    case = Case(7)
    batch = fill([[3, 1, 4, 2], [9, 2]], [[0, 0, 1.0, 3.0], [0, 0.5]])
    states = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logprobs = torch.log_softmax(states @ case.weight.T, -1)
    expected = -(logprobs[0, 1, 4] + 3 * logprobs[0, 2, 2] + 0.5 * logprobs[1, 0, 2]) / 4.5
    torch.testing.assert_close(behaviour.imitation_loss(states, case.weight, batch), expected)
    sums = behaviour.answer_logprobs(states, case.weight, batch)
    torch.testing.assert_close(sums, torch.stack((logprobs[0, 1, 4] + 3 * logprobs[0, 2, 2], 0.5 * logprobs[1, 0, 2])))


def test_preference_is_log_2_at_the_teacher_and_falls_as_the_better_answer_gains():
    at = torch.tensor([[-3.0, -5.0], [-4.0, -2.0]])
    assert float(behaviour.preference_loss(at, at)) == pytest.approx(math.log(2))
    moved = at.clone().requires_grad_()
    loss = behaviour.preference_loss(moved, at, 0.5)
    loss.backward()
    assert (moved.grad[0] < 0).all()
    assert (moved.grad[1] > 0).all()
    better = behaviour.preference_loss(at + torch.tensor([[1.0], [-1.0]]), at, 0.5)
    torch.testing.assert_close(better, F.softplus(torch.tensor(-1.0)))


def test_terms_are_balanced_by_numbers_without_gradient():
    x = torch.tensor(3.0, requires_grad=True)
    total, scales = balance({"token": 0.5 * x, "hidden": 100 * x, "solved": 0 * x}, {"token": 1.0, "hidden": 0.2, "solved": 1.0}, 1.5)
    assert scales["token"] == pytest.approx(1)
    assert scales["hidden"] == pytest.approx(1.5 / 300)
    assert float(total.detach()) == pytest.approx(1.5 + 0.2 * 1.5)
    total.backward()
    assert float(x.grad) == pytest.approx(0.5 + 0.2 * 100 * 1.5 / 300)
