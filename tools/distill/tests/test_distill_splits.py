"""De-duplication, splits without anything shared, and the search for leaks, in both languages."""

from __future__ import annotations

import random

import pytest
from edge_rt_distill.data.dedupe import deduplicate, near_pairs, shingles, similarity
from edge_rt_distill.data.samples import Message, Sample, demo, make_sample
from edge_rt_distill.data.splits import grams, leaks, split, tied
from edge_rt_distill.data.text import units
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.hooks import DataError

ENGLISH = "The pump stopped at nine because the filter was blocked by sand, and the operator cleaned it and started again within the hour."
CHINESE = "水泵九点停机，原因是滤网被沙子堵塞，操作员清理以后在一个小时之内重新启动了设备，并且把经过写进了交接班记录。"
WORDS = [f"word{number}" for number in range(2000)]


def chat(question: str, answer: str) -> Sample:
    return make_sample([Message("user", question), Message("assistant", answer)])


def random_text(dice: random.Random, length: int = 40) -> str:
    return " ".join(dice.choice(WORDS) for _ in range(length))


def test_equal_but_for_case_and_width_is_exact_and_a_changed_word_is_near() -> None:
    texts = [
        ENGLISH,
        ENGLISH.upper() + "！",
        ENGLISH.replace("nine", "ten"),
        CHINESE,
        CHINESE.replace("九", "十"),
        "Something else entirely.",
    ]
    found = deduplicate([make_sample(text=text) for text in texts])
    assert [one.text for one in found.samples] == [ENGLISH, CHINESE, "Something else entirely."]
    assert len(found.exact) == 1
    assert len(found.near) == 2
    assert all(0.6 <= one.similarity < 1 for one in found.near)
    assert str(found) == "3 samples kept, 1 exact and 2 near duplicates dropped"
    assert {one.kept for one in found.near} == {make_sample(text=ENGLISH).id, make_sample(text=CHINESE).id}


def test_min_hash_finds_the_pairs_that_measuring_all_pairs_finds() -> None:
    dice = random.Random(1)
    texts = []
    for _ in range(30):
        words = random_text(dice).split()
        texts.append(" ".join(words))
        for at in dice.sample(range(len(words)), dice.randint(1, 4)):
            words[at] = "changed"
        texts.append(" ".join(words))
    sets = [shingles(text) for text in texts]
    every = {
        (i, j) for i in range(len(sets)) for j in range(i + 1, len(sets)) if similarity(sets[i], sets[j]) >= 0.65
    }  # a pair at .6 itself is missed once in eighty
    assert 10 < len(every) < 30, len(every)
    assert {pair[:2] for pair in near_pairs(sets, 0.65)} == every


def test_a_crowd_of_copies_is_one_sample_and_texts_without_words_are_compared_too() -> None:
    crowd = [make_sample(text=f"{ENGLISH} {CHINESE} {number}") for number in range(120)]
    assert len(deduplicate(crowd).samples) == 1
    assert len(tied(crowd)) == 1
    marks = deduplicate([make_sample(text="!!!"), make_sample(text="???")])
    assert len(marks.samples) + len(marks.near) == 2


@given(st.integers(0, 1000), st.floats(0.05, 0.6))
@settings(max_examples=25, deadline=None)
def test_a_split_is_the_same_each_time_in_any_order_and_shares_nothing(seed: int, held_out: float) -> None:
    dice = random.Random(seed)
    samples = [chat(random_text(dice, 8), random_text(dice, 30)) for _ in range(40)]
    samples += [chat(one.messages[0].content, random_text(dice, 30)) for one in samples[:5]]  # the same question
    samples += [make_sample(text=one.messages[1].content + " and a bit more") for one in samples[5:10]]  # nearly the same text
    samples += [make_sample(text=f"{random_text(dice)} {' '.join(units(one.content)[8:24])}") for one in samples[10:15]]  # a quotation
    train, evaluation = split(samples, held_out=held_out, seed=seed)
    assert train
    assert evaluation
    assert len(train) + len(evaluation) == len(samples)
    assert leaks(train, evaluation) == []
    assert all(one.split == "train" for one in train)
    questions = {one.prompt for one in train if one.prompt}
    assert not any(one.prompt in questions for one in evaluation if one.prompt)
    dice.shuffle(samples)
    again = split(samples, held_out=held_out, seed=seed)
    assert {one.id for one in again[1]} == {one.id for one in evaluation}


def test_adding_samples_moves_no_other_and_the_share_is_about_what_was_asked_for() -> None:
    dice = random.Random(3)
    samples = [make_sample(text=random_text(dice)) for _ in range(400)]
    small, large = split(samples[:200], held_out=0.2)[1], split(samples, held_out=0.2)[1]
    assert {one.id for one in small} == {one.id for one in large} & {one.id for one in samples[:200]}
    assert 0.14 < len(large) / 400 < 0.26
    assert {one.id for one in split(samples, held_out=0.2, seed=1)[1]} != {one.id for one in large}


def test_what_is_marked_for_evaluation_stays_there_with_its_near_duplicates() -> None:
    dice = random.Random(4)
    marked = make_sample(text=ENGLISH)._replace(split="evaluation")
    samples = [marked, make_sample(text=ENGLISH.replace("nine", "ten")), *(make_sample(text=random_text(dice)) for _ in range(20))]
    assert {samples[0].id, samples[1].id} <= {one.id for one in split(samples, held_out=0.01)[1]}


def test_what_cannot_be_split_says_why() -> None:
    same = [make_sample(text=ENGLISH), make_sample(text=ENGLISH + " Indeed.")]
    other = [make_sample(text=text)._replace(split="evaluation") for text in (ENGLISH, CHINESE)]
    for samples, held_out, message in (
        (same, 0.1, "repeat one another"),
        (other, 0.1, "none is left to train on"),
        (other, 1.0, "held_out"),
    ):
        with pytest.raises(DataError, match=f"{message}.*;|held_out is 1.0; "):
            split(samples, held_out=held_out)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_a_planted_quotation_is_found_and_reported(text: str) -> None:
    quoted = " ".join(units(text)[:14])
    train = [make_sample(text=text), chat("Short?", "Yes.")]
    evaluation = [
        chat("What happened?", f"{quoted}, zebra."),
        chat("Short?", "Yes."),
        chat("Unrelated?", "Nothing in common with it at all."),
    ]
    found = leaks(train, evaluation)
    assert [(one.evaluation, one.train) for one in found] == [(evaluation[1].id, train[1].id), (evaluation[0].id, train[0].id)]
    assert (found[0].share, found[1].shared, found[1].total) == (1.0, 2, 3)
    assert leaks(train, evaluation[2:]) == []


def test_the_system_message_is_a_setting_and_no_leak() -> None:
    told = Message("system", ENGLISH)
    first = make_sample([told, Message("user", "One?"), Message("assistant", "First.")])
    second = make_sample([told, Message("user", "Two?"), Message("assistant", "Second.")])
    assert leaks([first], [second]) == []
    assert grams(first) == [("one", "first")]


def test_the_demo_set_repeats_nothing_and_splits_without_a_leak() -> None:
    samples = demo().samples
    found = deduplicate(samples)
    assert found.exact == found.near == []
    assert all(len(group) == 1 for group in tied(samples))
    train, evaluation = split(samples)
    assert leaks(train, evaluation) == []
    assert 8 <= len(evaluation) <= 30
    assert {one.language for one in evaluation} == {"en", "zh"}
