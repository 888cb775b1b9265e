"""Tasks, conversations, what is kept and how it is scored: the same for a seed, true to their lengths, and never given away."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bench.context.conversations import TONGUES, conversation, conversations
from bench.context.conversing import REQUIRED, results
from bench.context.everyday import reply, talk
from bench.context.facts import FACTS
from bench.context.methods import by_chance, by_grade, by_place
from bench.context.prompt import SINKS, Prompt, kept
from bench.context.runner import Score, by_method, in_rounds, table, verdict, versus
from bench.context.score import any_found, difference, holds, interval, share_found
from bench.context.sessions import RECALLING, SLIDING
from bench.context.tasks import KINDS, REPORTING, TUNING, tasks
from bench.context.text import paragraphs, prose, sentences
from bench.context.tuning import FIXED, WIDEST, Text, search, share_kept
from edge_rt.core.context.grading import Features
from edge_rt.core.context.history import segments

_HAN = re.compile(r"[\u4e00-\u9fff]")


def words(text: str) -> int:
    """Tokens, more or less: words, and Chinese characters."""
    return len(re.findall(r"[A-Za-z0-9]+|[^\sA-Za-z0-9]", text))


# ---- text ------------------------------------------------------------------------------------------------------------


def test_prose_is_real_text_and_no_code() -> None:
    found = prose()
    assert sum(map(len, found)) > 100_000
    assert len(set(found)) == len(found)
    assert not any("\n" in paragraph or ">>>" in paragraph for paragraph in found)


def test_paragraphs_leave_out_headings_code_and_grammar() -> None:
    text = "This is a paragraph that is long enough to be taken for prose, since it goes on\nover two lines."
    document = f"Heading\n*******\n\n{text}\n\n   x = [1, 2, 3]\n   y = x\n\n{'a ::= b | c [d] ' * 9}."
    assert list(paragraphs(document)) == [text.replace("\n", " ")]


def test_sentences_are_the_paragraph() -> None:
    assert sentences("It is 3.5 m long. Is it? Yes.") == ["It is 3.5 m long.", "Is it?", "Yes."]
    assert all(" ".join(sentences(paragraph)) == paragraph for paragraph in prose()[:200])


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_a_seed_always_gives_the_same_tasks_and_another_seed_others() -> None:
    assert list(tasks(3, 900, words)) == list(tasks(3, 900, words))
    assert {task.context for task in tasks(3, 900, words)}.isdisjoint(task.context for task in tasks(4, 900, words))
    assert set(TUNING).isdisjoint(REPORTING)


@pytest.mark.parametrize("length", [900, 2000])
def test_tasks_have_the_length_asked_for(length: int) -> None:
    for seed in range(8):
        for task in tasks(seed, length, words):
            assert words(f"{task.context}\n\n{task.question}") == pytest.approx(length, rel=0.05)


def test_every_answer_is_in_the_text_and_stands_only_in_statements() -> None:
    """Taken away with its statements, nothing of it is left, so whoever evicts them cannot answer."""
    stated = re.compile(
        r"(Remember|The value of|The (name|code|color|phone|manager|summer|favorite|birthday)|special animals|The market was)"
    )
    for seed in range(8):
        for task in tasks(seed, 1500, words):
            assert task.answers
            for answer in task.answers:
                said = [s for paragraph in task.context.split("\n\n") for s in sentences(paragraph) if holds(s, answer)]
                assert said
                assert all(stated.search(sentence) for sentence in said)
                assert not holds(task.question, answer)


def test_tasks_of_one_text_follow_each_other_and_kinds_can_be_chosen() -> None:
    found = list(tasks(1, 900, words))
    assert {task.kind for task in found} == set(KINDS)
    contexts = [task.context for task in found]
    assert sum(a != b for a, b in pairwise(contexts)) == len(set(contexts)) - 1
    assert {task.kind for task in tasks(1, 900, words, ("words",))} == {"words"}


def test_single_facts_stand_at_all_depths() -> None:
    depths = sorted(task.depth for seed in range(10) for task in tasks(seed, 900, words, ("single",)))
    assert depths[0] < 0.15
    assert depths[-1] > 0.8
    assert all(b - a < 0.3 for a, b in pairwise(depths))


def test_a_variable_is_known_before_it_is_used() -> None:
    for seed in range(8):
        links = list(tasks(seed, 900, words, ("variables",)))
        assert [task.depth for task in links] == sorted(task.depth for task in links)
        assert links[0].answers[0].isdigit()


def test_the_word_asked_for_is_the_most_frequent() -> None:
    (task,) = tasks(5, 900, words, ("words",))
    names = re.findall(r"The market was visited by (\w+)\.", task.context)
    assert names.count(task.answers[0]) == 8
    assert all(names.count(name) == 1 for name in set(names) - set(task.answers))


def test_a_text_too_short_for_its_statements_is_refused() -> None:
    with pytest.raises(ValueError, match="give more"):
        list(tasks(0, 150, words))


def test_tasks_have_their_length_in_the_models_tokens(smollm2: Path) -> None:
    from edge_rt.native.llama import Vocab

    vocab = Vocab.load(smollm2)
    try:

        def count(text: str) -> int:
            return len(vocab.tokenize(text, bos=False))

        for length in (1000, 4000):
            for task in tasks(7, length, count):
                assert count(f"{task.context}\n\n{task.question}") == pytest.approx(length, rel=0.05)
        for tongue in TONGUES:
            said = conversation(7, tongue, 2500, count).messages
            assert sum(count(message["content"]) + 5 for message in said) == pytest.approx(2500, rel=0.05)
    finally:
        vocab.close()


# ---- conversations -----------------------------------------------------------------------------------------------------


def test_fifty_conversations_differ_and_come_back_the_same() -> None:
    found = list(conversations(range(51), 600, words))
    assert found == list(conversations(range(51), 600, words))
    assert len({str(one.messages) for one in found}) == 51
    assert {one.tongue for one in found} == {"en", "zh", "mixed"}


def test_the_fact_stands_at_the_head_and_nowhere_else() -> None:
    for one in conversations(range(30), 600, words):
        assert [message["role"] for message in one.messages] == ["system", *["user", "assistant"] * (len(one.messages) // 2 - 1), "user"]
        assert any_found(one.messages[1]["content"], one.accepted)
        assert not any(any_found(message["content"], one.accepted) for message in (one.messages[0], *one.messages[2:]))
        assert not any_found(one.opening, one.accepted)


def test_no_value_of_a_fact_is_part_of_small_talk() -> None:
    rng = random.Random(1)
    for language in ("en", "zh"):
        said = " ".join(talk(rng, language, 4) + reply(rng, language) for _ in range(300))
        values = [value for fact in FACTS[language] for value in fact.values.split("|")]
        assert not [value for value in values if holds(said, value)]


def test_languages_are_what_they_are_called() -> None:
    by_tongue = {tongue: conversation(4, tongue, 600, words).messages for tongue in TONGUES}
    chinese = {tongue: [bool(_HAN.search(m["content"])) for m in messages[1:]] for tongue, messages in by_tongue.items()}
    assert not any(chinese["en"])
    assert all(chinese["zh"])
    assert 0.3 < sum(chinese["mixed"]) / len(chinese["mixed"]) < 0.7


@pytest.mark.parametrize(("right", "met"), [(18, True), (17, False)])
def test_the_requirement_is_judged_by_what_sessions_answer(right: int, met: bool) -> None:
    def scores(method: str, share: float, right: int) -> list[Score]:
        return [Score(method, share, "en", 1280, seed, float(seed < right), "") for seed in range(20)]

    held = [*scores("full", 1.0, 20), *scores(RECALLING, 0.2, right), *scores(SLIDING, 0.2, 0)]
    found = results(held, [one for method in ("newest", "random", "graded") for one in scores(method, 0.2, 5)])
    judged = [one for one in found if one.requirement]
    assert [(one.name, one.ok) for one in judged] == [("conversations, all", met), ("conversations, en", met)]
    assert all(f"{REQUIRED:g}" in one.requirement and f"{right / 20:.2f}" in one.shown for one in judged)


# ---- tuning ------------------------------------------------------------------------------------------------------------


def test_a_search_finds_what_tells_answers_from_the_rest_within_its_bounds() -> None:
    telling, misleading, fixed = (Features._fields.index(name) for name in ("places", "quotes", *FIXED))
    points = np.zeros((40, len(Features._fields)))
    points[::8, telling] = 0.5  # paragraphs with an answer
    points[1::8, misleading] = 0.6
    points[:, fixed] = np.linspace(0, 0.1, 40)
    text = Text(points, np.full(40, 10), tuple((i,) for i in range(0, 40, 8)))
    start = np.ones(len(Features._fields))
    found = search([text], start)
    assert share_kept([text], start) < share_kept([text], found)
    assert found[fixed] == 1.0
    assert (found / start <= WIDEST).all()
    assert (found / start >= 1 / WIDEST).all()


# ---- what is kept ------------------------------------------------------------------------------------------------------


def prompt(*texts: str, head: int = 0) -> Prompt:
    """A prompt whose tokens are numbered: 0 to ``head``, then ten for each text."""
    found = segments([{"role": "user", "content": text} for text in texts])
    parts = [list(range(head + 10 * i, head + 10 * i + 10)) for i in range(len(texts))]
    return Prompt(list(range(head)), found, parts, [999], 5, 1)


_TEXTS = ("Hello.", "On 3 May 2024 Alice Johnson paid 45.90 EUR to Acme Ltd.", "Thanks a lot!", "Nice.", "Fine.", "Well.", "Yes.", "So.")


@pytest.mark.parametrize("rank", [by_place, by_chance, by_grade])
@pytest.mark.parametrize("budget", [20, 33, 79, 200])
def test_every_rank_keeps_the_same_number_and_what_is_protected(rank: object, budget: int) -> None:
    one = prompt(*_TEXTS, head=6)
    found = kept(one, budget, rank)  # type: ignore[arg-type]
    assert len(found) == min(budget, 86)
    assert found == sorted(found)
    newest = budget // 10
    assert set(range(6)) <= set(found)
    assert set(range(86 - newest, 86)) <= set(found)


def test_the_newest_are_sinks_and_a_sliding_window() -> None:
    assert kept(prompt(*_TEXTS), 30, by_place) == [*range(SINKS), *range(80 - 26, 80)]


def test_the_best_graded_segment_stays_whole() -> None:
    assert set(range(10, 20)) <= set(kept(prompt(*_TEXTS), 20, by_grade))


def test_random_is_random_by_seed_and_the_same_again() -> None:
    one, other = prompt(*_TEXTS), prompt(*_TEXTS)._replace(seed=2)
    assert kept(one, 30, by_chance) == kept(one, 30, by_chance)
    assert by_chance(one) != by_chance(other)


def test_a_budget_smaller_than_what_is_protected_is_refused() -> None:
    with pytest.raises(ValueError, match="give more"):
        kept(prompt(*_TEXTS, head=30), 20, by_place)


# ---- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "held"),
    [
        (" 12345.", "12345", True),
        ("123456", "12345", False),
        ("a12345", "12345", False),
        ("１２３４５", "12345", True),
        ("the OTTER, and", "otter", True),
        ("evergreen", "green", False),
        ("密码是48213。", "48213", True),
        ("是银色的", "银色", True),
        ("", "x", False),
        ("11th of May", "11th", True),
        ("a+b", "a+b", True),
    ],
)
def test_what_an_answer_holds(answer: str, text: str, held: bool) -> None:
    assert holds(answer, text) is held


def test_shares_and_alternatives() -> None:
    assert share_found("the otter and the falcon", ["otter", "camel"]) == 0.5
    assert any_found("the otter", ["camel", "otter"]) == 1.0
    assert any_found("the fox", ["camel", "otter"]) == 0.0
    with pytest.raises(ValueError, match="no answer"):
        share_found("x", [])


def test_an_interval_holds_the_mean_and_narrows_with_more_groups() -> None:
    few, many = ({i: [float(i % 2)] for i in range(n)} for n in (10, 1000))
    assert interval(few).mean == interval(many).mean == 0.5
    assert interval(few).low < interval(many).low < 0.5 < interval(many).high < interval(few).high
    assert interval(few) == interval(few)
    with pytest.raises(ValueError, match="nothing"):
        interval({})


def test_items_of_one_text_count_as_one_draw() -> None:
    """A hundred items of two texts are no surer than two items."""
    together = interval({0: [0.0] * 50, 1: [1.0] * 50})
    assert (together.low, together.high) == (0.0, 1.0)


def test_differences_are_taken_item_by_item() -> None:
    """Seeds differ far more than methods do; in pairs the small difference is still seen."""
    rng = random.Random(2)
    ours: dict[Hashable, list[float]] = {i: [rng.random()] for i in range(40)}
    theirs: dict[Hashable, list[float]] = {i: [values[0] - 0.05 - 0.01 * rng.random()] for i, values in ours.items()}
    found = difference(ours, theirs)
    assert 0.05 < found.low < found.mean < found.high < 0.06
    assert verdict(found) == "better"
    assert verdict(difference(theirs, ours)) == "worse"
    assert verdict(difference(ours, ours)) == "no difference shown"
    with pytest.raises(ValueError, match="other items"):
        difference(ours, {1: [0.0]})


def test_few_groups_are_too_few_to_tell() -> None:
    assert verdict(difference({0: [1.0]}, {0: [0.0]})) == "too few to tell"


# ---- running -----------------------------------------------------------------------------------------------------------


def score(method: str, seed: int, value: float, budget: float = 0.2) -> Score:
    return Score(method, budget, "keys", 1000, seed, value, "")


def test_tables_take_a_budget_and_what_takes_no_notice_of_it() -> None:
    scores = [score("full", 1, 1.0, 1.0), score("graded", 1, 0.5), score("graded", 1, 0.0, 0.1), score("graded", 2, 1.0)]
    groups = by_method(scores, 0.2)
    assert groups == {"full": {(1000, 1): [1.0]}, "graded": {(1000, 1): [0.5], (1000, 2): [1.0]}}
    found = table("x", groups, "graded")
    assert found.ours == [0.5, 1.0]
    assert found.peers == {"full": [1.0]}
    assert "graded 0.75" in found.shown
    assert found.notes == ["2 items of 2 seeds and lengths"]


def test_a_comparison_says_by_how_much() -> None:
    groups = by_method([score(method, seed, value) for seed in range(9) for method, value in (("graded", 1.0), ("newest", 0.5))], 0.2)
    assert versus("x", groups, "graded", "newest").shown == "graded - newest: +0.50 [+0.50, +0.50], better"


def test_no_round_begins_after_the_deadline_but_the_first_two() -> None:
    started = []

    def one(seed: int) -> list[Score]:
        started.append(seed)
        return [score("graded", seed, 1.0)]

    assert len(in_rounds(map(one, range(9)), deadline=0.0)) == 2
    assert len(in_rounds(map(one, range(9)), deadline=float("inf"))) == 9
