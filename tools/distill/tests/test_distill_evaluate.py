"""Measures against their definitions, standard errors against resampling, and the composite score against its formula."""

from __future__ import annotations

import math
import types

import pytest
import torch
from edge_rt_distill.evaluate import evaluator
from edge_rt_distill.evaluate.evaluator import WEIGHTS, Context, Evaluator, Quick, Score, Task, load_evaluator, scorer
from edge_rt_distill.evaluate.measures import Counts, count, difference, divergence, summarise
from edge_rt_distill.model.architecture import Architecture, LayerShape
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.divergence import Final, compare
from edge_rt_distill.model.generate import Rollout
from edge_rt_distill.stages.teachers import CachingTeacher, LiveTeacher

from edge_rt.errors import DataError, OptionError

VOCABULARY = 40


class Sequence:
    def __init__(self, tokens: list[int], begin: int = 2) -> None:
        self.tokens, self.targets = tokens, [i >= begin for i in range(len(tokens))]


def decoder(seed: int, vocabulary: int = VOCABULARY) -> Decoder:
    torch.manual_seed(seed)
    layers = (LayerShape(2, 1, 16),) * 2
    return Decoder(Architecture("llama", vocabulary, 8, 4, layers, True, 1e-5, 1e4, "interleaved", 64)).requires_grad_(False)


def sequences(count: int = 7) -> list[Sequence]:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 12, (count,), generator=draw).tolist()
    return [Sequence(torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()) for length in lengths]


def test_measures_are_their_definitions():
    student, teacher, found = decoder(1), decoder(2), sequences()
    kl, same, ours, theirs = [], [], [], []
    for one in found:
        tokens = torch.tensor([one.tokens])
        log_q, log_p = (torch.log_softmax(model.logits(model(tokens).hidden)[0].double(), -1) for model in (student, teacher))
        for t in range(2, len(one.tokens)):
            p, q = log_p[t - 1], log_q[t - 1]
            kl.append(float((p.exp() * (p - q)).sum()))
            same.append(float(p.argmax() == q.argmax()))
            ours.append(-float(q[one.tokens[t]]))
            theirs.append(-float(p[one.tokens[t]]))
    measures = divergence(student, teacher, found, batch_tokens=20)
    n = len(kl)
    assert measures.tokens == n
    assert measures.sequences == 7
    assert measures.kl == pytest.approx(sum(kl) / n, rel=1e-5)
    assert measures.top1 == pytest.approx(sum(same) / n)
    assert measures.perplexity_student == pytest.approx(math.exp(sum(ours) / n), rel=1e-5)
    assert measures.perplexity_ratio == pytest.approx(math.exp((sum(ours) - sum(theirs)) / n), rel=1e-5)


def test_batches_and_what_keeps_the_teachers_states_change_nothing():
    student, teacher, found = decoder(1), decoder(2), sequences()
    expected = divergence(student, teacher, found, batch_tokens=1)
    for view in (teacher, LiveTeacher(teacher), CachingTeacher(teacher)):
        assert divergence(student, view, found, batch_tokens=1000) == pytest.approx(expected, rel=1e-3, abs=1e-4)
    counts = count(student, teacher, [*found, Sequence([1, 2], 5)], batch_tokens=50)
    assert counts.number.tolist() == [len(one.tokens) - 2 for one in found]  # in their order, without what has no target


def test_a_model_is_no_distance_from_itself():
    measures = divergence(decoder(1), decoder(1), sequences())
    assert abs(measures.kl) < 1e-6
    assert (measures.top1, measures.top1_error) == (1, 0)
    assert measures.perplexity_ratio == pytest.approx(1)


def test_chunks_do_not_change_a_comparison():
    draw = torch.Generator().manual_seed(0)
    hidden, heads = torch.randn(2, 11, 8, generator=draw), torch.randn(2, VOCABULARY, 8, generator=draw)
    labels = torch.randint(VOCABULARY, (11,), generator=draw)
    student, teacher = (Final(hidden[i], heads[i]) for i in range(2))
    whole = compare(student, teacher, labels)
    torch.testing.assert_close(compare(student, teacher, labels, 3), whole)


def test_standard_errors_are_the_spread_of_repeated_samples():
    """Sequences with a level of their own, so that positions are not independent."""
    draw = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        number = torch.randint(10, 60, (30,), generator=draw).double()
        level = torch.randn(30, generator=draw, dtype=torch.float64) * 0.5 + 2
        kl = number * level + number.sqrt() * torch.randn(30, generator=draw, dtype=torch.float64) * 0.3
        found = summarise(Counts(number, kl, number / 2, number * 0.1, number * 0.0, number))
        means.append(found.kl)
        errors.append(found.kl_error)
    assert float(torch.tensor(means).std()) == pytest.approx(sum(errors) / len(errors), rel=0.1)
    assert found.perplexity_ratio == pytest.approx(math.exp(0.1))
    assert math.isinf(summarise(Counts(*torch.ones(6, 1).double())).kl_error)


def test_what_two_students_share_is_no_noise():
    draw = torch.Generator().manual_seed(0)
    number, kl = torch.full((50,), 20.0).double(), torch.rand(50, generator=draw).double() * 40
    left, right = (Counts(number, kl + extra, number, number, number, number) for extra in (2.0, 0.0))
    mean, error = difference(left, right)
    assert mean == pytest.approx(0.1)
    assert error < 1e-9 < summarise(left).kl_error
    with pytest.raises(OptionError, match="same sequences"):
        difference(left, Counts(number[1:], *right[1:]))


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(DataError, match="no position"):
        divergence(decoder(1), decoder(2), [Sequence([1, 2, 3], 9)])
    with pytest.raises(OptionError, match="50 tokens"):
        divergence(decoder(1, 50), decoder(2), sequences())


# ---- the composite score -----------------------------------------------------------------------------------------------------------------


def context(monkeypatch: pytest.MonkeyPatch, ours: list[Rollout], theirs: list[Rollout], rewards: bool = True) -> tuple[Context, list[str]]:
    """Answers that are given, by the student (which trains) and the teacher."""
    asked: list[str] = []

    def answered(model: Decoder, prompts: list[list[int]], **how: object) -> list[Rollout]:
        assert how["temperature"] == 0
        asked.append("student" if model.token_embd.weight.requires_grad else "teacher")
        return ours if asked[-1] == "student" else theirs

    monkeypatch.setattr(evaluator, "generate", answered)
    tasks = [Task([1, 2], (lambda text, ended: float("7" in text and ended)) if rewards else None) for _ in ours]
    return Context(sequences(), tasks, end=0, decode=lambda tokens: " ".join(map(str, tokens))), asked


def rollout(*tokens: int) -> Rollout:
    return Rollout(list(tokens), [0.0] * len(tokens), tokens[-1] == 0)


def test_the_score_is_its_formula(monkeypatch):
    ours = [rollout(7, 0), rollout(7, 5), rollout(4, 0), rollout(*[3] * 30, 0)]
    theirs = [rollout(7, 0), rollout(7, 0), rollout(7, 7, 0), rollout(7, 7, 0)]
    student, teacher = decoder(1).requires_grad_(), decoder(2)
    found, asked = context(monkeypatch, ours, theirs)
    quick = Quick()
    score = quick.score(student, teacher, found)
    measures = divergence(student, teacher, found.sequences)
    expected = {
        "fidelity": math.exp(-measures.kl), "agreement": measures.top1, "perplexity": min(1, 1 / measures.perplexity_ratio),
        "stop": 2 / 4, "reward": 1 / 4,
    }  # fmt: skip
    assert score.parts == pytest.approx(expected)
    assert score.value == pytest.approx(sum(WEIGHTS[name] * value for name, value in expected.items()))
    assert quick.score(student, teacher, found) == score
    assert asked == ["student", "teacher", "student"]  # the teacher is asked once


def test_parts_that_nothing_is_known_of_are_left_out(monkeypatch):
    student, teacher = decoder(1).requires_grad_(), decoder(2)
    assert set(Quick().score(student, teacher, Context(sequences())).parts) == {"fidelity", "agreement", "perplexity"}
    found, _ = context(monkeypatch, [rollout(5)], [rollout(5)])
    assert "stop" not in Quick().score(student, teacher, found).parts  # the teacher does not end it either
    found, _ = context(monkeypatch, [rollout(5, 0)], [rollout(5, 0)], rewards=False)
    parts = Quick().score(student, teacher, found).parts
    assert "reward" not in parts
    assert parts["stop"] == 1
    with pytest.raises(OptionError, match="weight"):
        Quick(dict.fromkeys(WEIGHTS, 0.0)).score(student, teacher, Context(sequences()))


def test_the_teacher_itself_scores_1_with_its_own_answers():
    teacher = decoder(2)
    score = Quick().score(decoder(2), teacher, Context(sequences(), [Task([1, 2, 3])], tokens=8, end=5))
    assert score.value == pytest.approx(1, abs=1e-5)


def test_an_evaluator_can_be_the_users_own(monkeypatch):
    class Mine:
        def score(self, student: Decoder, teacher: Decoder, context: Context) -> Score:
            return Score(0.25, {"mine": 0.25})

    module = types.ModuleType("my_evaluators")
    module.Mine, module.made, module.nothing, module.number = Mine, Mine(), object(), 3  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "my_evaluators", module)
    assert isinstance(load_evaluator("quick"), Quick)
    for name in ("my_evaluators:Mine", "my_evaluators:made"):
        found = load_evaluator(name)
        assert isinstance(found, Evaluator)
        assert scorer(found, decoder(2), Context([]))(decoder(1)) == Score(0.25, {"mine": 0.25})
    for name, word in (
        ("slow", "MODULE:ATTRIBUTE"), ("my_evaluators:nothing", "no method score"), ("my_evaluators:other", "no other"),
        ("no_such_module:x", "PYTHONPATH"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=word):
            load_evaluator(name)


@pytest.mark.parametrize("value", [math.nan, 1.5, -0.1, "high", None])
def test_a_score_that_is_none_is_refused(value):
    class Wrong:
        def score(self, student: Decoder, teacher: Decoder, context: Context) -> Score:
            return Score(value, {})

    with pytest.raises(OptionError, match="from 0 to 1"):
        scorer(Wrong(), decoder(2), Context([]), "mine")(decoder(1))
