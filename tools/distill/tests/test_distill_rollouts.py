"""Rollouts, what is chosen of them, and a run that was stopped: the same in the end."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from edge_rt_distill.behaviour.conversations import QUESTION, before_question, made_up
from edge_rt_distill.behaviour.examples import Example, check, example
from edge_rt_distill.behaviour.rewards import Reward
from edge_rt_distill.behaviour.rollouts import (
    Choice,
    Sampling,
    Trajectory,
    format_tokens,
    imitation,
    pairs,
    seed_of,
    trajectories,
)
from edge_rt_distill.data.batches import turn_end
from edge_rt_distill.data.samples import Message, Sample, make_sample
from edge_rt_distill.model.load import Teacher, load

from edge_rt.hooks import DataError, OptionError

SAMPLING = Sampling(per_prompt=3, tokens=12, temperature=1.5, seed=7, rows=6)  # two prompts side by side
SAMPLES = [make_sample([Message("user", question)]) for question in ("Hi", "What is it?", "你好", "Name one.")]


@pytest.fixture(scope="module")
def teacher(tiny: Path) -> Teacher:
    return load(tiny)


def roll(teacher: Teacher, samples: list[Sample] = SAMPLES, **more: object) -> list[Trajectory]:
    return trajectories(teacher.model, teacher.tokeniser, samples, SAMPLING, **more)  # type: ignore[arg-type]


def test_equal_calls_give_equal_answers_in_whatever_order_the_samples_come(teacher: Teacher) -> None:
    found = roll(teacher)
    assert [(one.sample, one.number) for one in found] == [(sample.id, number) for sample in SAMPLES for number in range(3)]
    assert roll(teacher, SAMPLES[::-1]) == [one for sample in SAMPLES[::-1] for one in found if one.sample == sample.id]
    assert len({tuple(one.answer) for one in found[:3]}) > 1
    assert seed_of(1, "a") != seed_of(1, "b")
    assert all(1 <= len(one.answer) <= 12 and one.logprob < 0 and 0 <= one.reward <= 1 for one in found)
    other = trajectories(teacher.model, teacher.tokeniser, SAMPLES, dataclasses.replace(SAMPLING, seed=8))
    assert [one.answer for one in other] != [one.answer for one in found]


def test_a_run_stopped_at_any_byte_goes_on_to_the_same_result(teacher: Teacher, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "rollouts.jsonl"
    whole = roll(teacher, file=file, origin="digest")
    data = file.read_bytes()
    assert json.loads(data.splitlines()[0])["origin"] == "digest"
    for cut in [0, 10, *range(200, len(data), 997), len(data) - 1, len(data)]:
        file.write_bytes(data[:cut])
        assert roll(teacher, file=file, origin="digest") == whole
        assert roll(teacher, file=file, origin="digest", sample_with=forbidden) == whole  # all of it is in the file


def forbidden(*_: object, **__: object) -> list[object]:
    raise AssertionError("sampled again")


def test_a_file_of_other_settings_or_damaged_is_refused(teacher: Teacher, tmp_path: Path) -> None:
    file = tmp_path / "rollouts.jsonl"
    roll(teacher, SAMPLES[:1], file=file, origin="one")
    with pytest.raises(DataError, match=r"other settings \(origin\); delete it"):
        roll(teacher, SAMPLES[:1], file=file, origin="two")
    with pytest.raises(DataError, match=r"other settings \(samples\)"):
        roll(teacher, SAMPLES[1:], file=file, origin="one")
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b"garbage\n" + lines[1])
    with pytest.raises(DataError, match="line 2: not a record"):
        roll(teacher, SAMPLES[:1], file=file, origin="one")
    file.write_bytes(lines[0] + b'{"sample": "x"}\n')
    with pytest.raises(DataError, match="lacks 'number'"):
        roll(teacher, SAMPLES[:1], file=file, origin="one")
    with pytest.raises(DataError, match="cannot be used"):
        roll(teacher, SAMPLES[:1], file=file / "below", origin="one")


def test_what_asks_nothing_or_does_not_fit_is_left_out_or_refused(teacher: Teacher) -> None:
    long = make_sample([Message("user", "word " * 5000)])
    assert {one.sample for one in roll(teacher, [SAMPLES[0], long, make_sample(text="A passage.")])} == {SAMPLES[0].id}
    for samples, message in (([long], "fits into"), ([make_sample(text="A passage.")], "none of them asks")):
        with pytest.raises(DataError, match=message):
            roll(teacher, samples)
    for wrong in ({"per_prompt": 0}, {"temperature": 0.0}, {"tokens": 0}, {"top_k": -1}):
        with pytest.raises(OptionError):
            Sampling(**wrong)  # type: ignore[arg-type]
    for wrong in ({"quantile": 1.0}, {"margin": 0.0}, {"sharpness": 0.0}, {"heavier": math.inf}):
        with pytest.raises(OptionError):
            Choice(**wrong)


def test_rewards_come_from_the_function_given(teacher: Teacher) -> None:
    found = roll(teacher, score=lambda sample, answer, ended: Reward(min(1.0, len(answer) / 100), {"length": 1.0}))
    assert [one.reward for one in found] == [min(1.0, len(one.text) / 100) for one in found]


def answer(sample: str, number: int, tokens: list[int], reward: float, ended: bool = True) -> Trajectory:
    return Trajectory(sample, number, 0, [5, 6], tokens, "", ended, -1.0, reward)


def test_the_better_half_is_imitated_with_weights_by_how_much_better(teacher: Teacher) -> None:
    tokeniser = teacher.tokeniser
    end = turn_end(tokeniser)
    comma, letter = tokeniser.encode(",")[0], tokeniser.encode("x")[0]
    found = [
        answer("a", 0, [letter, comma, end], 1.0),
        answer("a", 1, [letter, comma, end], 1.0),  # the same words: once
        answer("a", 2, [letter], 0.1, ended=False),
        answer("b", 0, [letter, letter, end], 0.9),
        answer("b", 1, [letter, end], 0.9),
        answer("c", 0, [comma, end], 0.5),
    ]
    made = imitation(found, tokeniser, Choice(quantile=0.4, threshold=0.6))
    assert [(one.sample, one.reward) for one in made] == [("a", 1.0), ("b", 0.9), ("b", 0.9)]
    first, second, _ = made
    for one in made:
        check(one)
    assert first.tokens == [5, 6, letter, comma, end]
    assert first.targets == [False, False, True, True, True]
    assert first.weights[2] > second.weights[2]  # further above the mean of its prompt
    assert first.weights[3] == first.weights[4] == pytest.approx(2 * first.weights[2])
    assert sum(one.weights[2] for one in made) / 3 == pytest.approx(1)
    assert [one.reward for one in imitation(found, tokeniser, Choice(quantile=0.9))] == [1.0]
    assert imitation(found[5:], tokeniser, Choice()) == [] == imitation([], tokeniser, Choice())


def test_pairs_are_the_best_against_the_worst_where_the_margin_is_large_enough(teacher: Teacher) -> None:
    found = [
        answer("a", 0, [9], 0.2),
        answer("a", 1, [10], 0.9),
        answer("a", 2, [11], 0.5),
        answer("b", 0, [9], 0.8),
        answer("b", 1, [10], 0.9),
        answer("c", 0, [9], 0.5),
        answer("c", 1, [10], 0.0),  # far apart, but the better one is not good
    ]
    (pair,) = pairs(found, teacher.tokeniser, Choice(margin=0.2))
    assert (pair.chosen.tokens[-1], pair.rejected.tokens[-1]) == (10, 9)
    assert pair.margin == pytest.approx(0.7)
    assert len(pairs(found, teacher.tokeniser, Choice(margin=0.05))) == 2


def test_format_is_punctuation_brackets_and_line_ends(teacher: Teacher) -> None:
    tokeniser = teacher.tokeniser
    marks, words = tokeniser.encode("{,\n"), tokeniser.encode("a7")
    assert format_tokens(tokeniser, [*marks, *words]) == {*marks, turn_end(tokeniser)}


def test_an_example_that_cannot_be_learnt_from_is_refused() -> None:
    for prompt, words, weight in (([], [1], 1.0), ([1], [], 1.0), ([1], [2], math.nan), ([1], [2], -1.0)):
        with pytest.raises(DataError):
            example(prompt, words, weight=weight)
    for wrong in (
        Example([1, 2], [False], [0.0, 1.0]),
        Example([1, 2], [True, True], [1.0, 1.0]),
        Example([1, 2], [False, False], [0.0, 0.0]),
        Example([1, 2], [False, True], [0.0, math.inf]),
    ):
        with pytest.raises(DataError):
            check(wrong)


def test_a_teacher_makes_up_what_a_user_would_ask_and_answers_it(teacher: Teacher) -> None:
    tokeniser, seen = teacher.tokeniser, list[tuple[int, int]]()
    found = made_up(teacher, 96, 10, seed=3, told=lambda done, most: seen.append((done, most)))
    assert found == made_up(teacher, 96, 10, seed=3) != made_up(teacher, 96, 10, seed=4)
    assert 1 < len(found) < 96, "a random teacher ends some questions in time"
    assert [one.role for one in found[0].messages] == ["user", "assistant"]
    assert all(one.source == "the teacher itself" and message.content for one in found for message in one.messages)
    assert max(len(tokeniser.encode(one.answer)) for one in found) <= 3 * 10, "bytes that are no text are written as three"
    assert seen[-1][0] <= seen[-1][1]
    assert seen == sorted(seen, key=lambda one: one[0] / one[1])
    assert len(tokeniser.encode(found[0].prompt[0].content)) < 3 * QUESTION


def test_a_question_begins_behind_what_the_template_says(smollm2: Path, teacher: Teacher) -> None:
    tokeniser = load(smollm2).tokeniser
    said = tokeniser.decode(before_question(tokeniser), special=True)
    assert said.startswith("<|im_start|>system\n")
    assert said.endswith("<|im_start|>user\n")
    bare = SimpleNamespace(chat=lambda messages, answer: [ord(messages[0]["content"])], end=1, encode=lambda text: [2], decode=str)
    with pytest.raises(OptionError, match=r"set data\.chats to 0"):
        made_up(teacher._replace(tokeniser=bare), 1, 1)  # type: ignore[arg-type]
