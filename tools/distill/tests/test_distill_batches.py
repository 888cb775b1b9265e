"""Sequences and batches: what counts, what goes into a batch, and going on where a run stopped."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from edge_rt_distill.data.batches import batches, encode, mix, plan, turn_end
from edge_rt_distill.data.samples import Message, make_sample
from edge_rt_distill.model.rows import TokenSequence, fill, rows_of
from edge_rt_distill.model.tokens import Tokeniser
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.hooks import DataError

END = 1


class Letters:
    """One token a character; a conversation is ROLE text END, 2 and 3 being the roles. ``moody``: past answers lose a letter."""

    end, size = END, 300

    def __init__(self, moody: bool = False) -> None:
        self.moody = moody

    def encode(self, text: str, special: bool = False) -> list[int]:
        return [min(299, 10 + ord(letter)) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(token - 10) for token in ids if token >= 10)

    def chat(self, messages: list[dict[str, str]], answer: bool) -> list[int]:
        found = []
        for index, message in enumerate(messages):
            content = message["content"][1:] if self.moody and index < len(messages) - 1 else message["content"]
            found += [2 if message["role"] == "user" else 3, *self.encode(content), END, 0]
        return found + [3] * answer


def conversation(*turns: str) -> list[Message]:
    return [Message(("user", "assistant")[index % 2], turn) for index, turn in enumerate(turns)]


def counted(item: TokenSequence) -> list[int]:
    return [token for token, counts in zip(item.tokens, item.targets, strict=True) if counts]


def test_of_a_conversation_the_answers_and_their_ends_count() -> None:
    letters = Letters()
    sample = make_sample(conversation("ab", "cd", "e", "f"))
    (item,) = encode([sample], letters, 100)
    assert counted(item) == [*letters.encode("cd"), END, *letters.encode("f"), END]
    assert item.tokens == letters.chat([{"role": m.role, "content": m.content} for m in sample.messages], False)[:-1]
    assert item.sample == sample.id


def test_a_template_that_changes_past_turns_gives_one_sequence_an_answer() -> None:
    items = encode([make_sample(conversation("ab", "cd", "ef", "gh"))], Letters(moody=True), 100)
    assert [counted(item) for item in items] == [[*Letters().encode(answer), END] for answer in ("cd", "gh")]
    assert items[1].tokens[1:2] == Letters().encode("b")  # as the model sees it when it answers


def test_of_a_text_all_but_the_first_token_counts_and_long_ones_are_cut() -> None:
    said: list[str] = []
    samples = [make_sample(text="abcdefg"), make_sample(conversation("q" * 20, "a")), make_sample(conversation("q", "a" * 20))]
    items = encode([*samples, make_sample(conversation("only a prompt"))], Letters(), 4, told=said.append)
    assert [Letters().decode(item.tokens) for item in items[:2]] == ["abcd", "efg"]
    assert items[1].targets == [False, True, True]
    assert len(items) == 2
    assert "3 left out" in said[0]
    assert "cut at 4" in said[0]
    assert counted(encode(samples[2:], Letters(), 8)[0]) == Letters().encode("aaa")


def test_what_cannot_be_encoded_says_why() -> None:
    wrong = Letters()
    wrong.size = 50
    with pytest.raises(DataError, match="vocabulary of 50; the tokenizer is another model's"):
        encode([make_sample(text="abc")], wrong, 10)
    with pytest.raises(DataError, match="none of 1 samples"):
        encode([make_sample(conversation("q"))], Letters(), 10)
    with pytest.raises(DataError, match="at least 2"):
        encode([make_sample(text="abc")], Letters(), 1)


def test_the_models_own_tokeniser_counts_the_answer_with_its_end(tiny: Path) -> None:
    tokeniser = Tokeniser(tiny)
    sample = make_sample(conversation("Hi there", "Good day", "And now", "Nothing"))
    (item,) = encode([sample], tokeniser, 400)
    end = turn_end(tokeniser)
    assert tokeniser.piece(end) == "<|im_end|>"  # the vocabulary calls <|endoftext|> the end of a turn
    assert tokeniser.end == end
    assert item.tokens[-1] == end
    assert counted(item).count(end) == 2
    assert tokeniser.decode(counted(item)).replace(" ", "") == "GooddayNothing"


def test_a_batch_is_filled_and_masked_by_position() -> None:
    sequences = [TokenSequence([1, 1], [False, True]), TokenSequence([2, 2], [False, True]), TokenSequence([5, 0, 7], [False, False, True])]
    found = rows_of(sequences, [2, 0])
    assert torch.equal(found.tokens, torch.tensor([[5, 0, 7], [1, 1, 0]]))
    assert (found.lengths.tolist(), found.numbers) == ([3, 2], (2, 0))
    assert torch.equal(found.mask, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert found.real.tolist() == [[True, True, True], [True, True, False]]
    assert found.labels.tolist() == [[0, 7, 0], [1, 0, 0]]
    assert torch.equal(fill([[5, 0, 7], [1, 1]]).mask, torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    with pytest.raises(DataError, match="2 tokens and 1 targets"):
        rows_of([TokenSequence([1, 2], [False], "a")])


@given(st.lists(st.integers(2, 60), min_size=1, max_size=120), st.integers(1, 200), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_plan_has_every_sequence_once_within_its_bounds_and_the_same_each_time(
    lengths: list[int], room: int, seed: int, epoch: int
) -> None:
    found = plan(lengths, room, seed, epoch)
    assert sorted(index for rows in found for index in rows) == list(range(len(lengths)))
    assert all(len(rows) == 1 or len(rows) * max(lengths[index] for index in rows) <= room for rows in found)
    assert plan(lengths, room, seed, epoch) == found


@given(st.integers(0, 100), st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_a_run_goes_on_where_it_stopped(seed: int, start: int) -> None:
    dice = random.Random(seed)
    items = [TokenSequence([dice.randrange(99) for _ in range(length)], [False] + [True] * (length - 1)) for length in range(2, 60)]
    whole = list(batches(items, 128, seed, 1))
    rest = list(batches(items, 128, seed, 1, start))
    assert len(rest) == max(0, len(whole) - start)
    assert all(
        torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask) for one, other in zip(rest, whole[start:], strict=True)
    )
    assert [one.numbers for one in batches(items, 128, seed, 2)] != [one.numbers for one in whole]


def test_rows_of_a_batch_are_alike_in_length() -> None:
    dice = random.Random(0)
    lengths = [dice.randint(10, 250) for _ in range(1000)]
    found = plan(lengths, 2048, 0, 0)
    filled = sum(len(rows) * max(lengths[index] for index in rows) for rows in found)
    assert sum(lengths) / filled > 0.93


def test_a_mixture_keeps_its_shares_tells_them_and_goes_on_where_the_epoch_before_ended() -> None:
    sources = {
        name: [TokenSequence([9] * 10, [False] + [True] * 9, f"{name}{i}") for i in range(count)] for name, count in (("a", 100), ("b", 7))
    }
    found = mix(sources, {"a": 3, "b": 1}, 400, seed=1)
    assert {name: (share.tokens, share.targets, share.sequences) for name, share in found.shares.items()} == {
        "a": (300, 270, 30),
        "b": (100, 90, 10),
    }
    assert found.shares["a"].wanted == 0.75
    assert found.shares["b"].passes == pytest.approx(10 / 7)
    assert found == mix(sources, {"a": 3, "b": 1}, 400, seed=1)
    following = [mix(sources, {"a": 3, "b": 1}, 400, seed=1, epoch=epoch).sequences for epoch in range(3)]
    firsts = [item.sample for epoch in following for item in epoch if item.sample.startswith("a")]
    assert len(firsts) == len(set(firsts)) == 90  # nothing twice before all was seen
    for wrong, message in (({"a": 1}, "name the same"), ({"a": 0, "b": 0}, "not all zero"), ({"a": -1, "b": 3}, "not negative")):
        with pytest.raises(DataError, match=message):
            mix(sources, wrong, 100, seed=0)
    with pytest.raises(DataError, match="source b is empty"):
        mix({**sources, "b": []}, {"a": 1, "b": 1}, 100, seed=0)
