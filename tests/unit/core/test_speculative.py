"""N-gram drafts: what they propose, that they forget, and that they fall silent where they fail."""

import random
import time

from hypothesis import given
from hypothesis import strategies as st

from edge_rt.core.generate.speculative import LONGEST, LOOK_BACK, MAX_PAUSE, RETRY, NgramDrafter, Worth


def drafter(tokens):
    made = NgramDrafter()
    made.extend(tokens)
    return made


def reference(tokens):
    """Where the text goes on: the longest agreement up to LONGEST, then the latest."""
    best = (0, 0)
    for at in range(len(tokens) - 2, 0, -1):
        length = 0
        while length < LONGEST and at - length >= 0 and tokens[at - length] == tokens[len(tokens) - 1 - length]:
            length += 1
        if length >= 2 and length > best[1]:
            best = (at + 1, length)
    return best


def test_it_proposes_what_followed_before():
    assert drafter([1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4]).draft(3) == [5, 6, 9]


def test_a_longer_agreement_wins_over_a_later_one():
    assert drafter([1, 2, 3, 4, 50, 9, 3, 4, 60, 1, 2, 3, 4]).draft(1) == [50]


def test_of_equal_agreements_the_latest_wins():
    assert drafter([1, 2, 3, 4, 50, 1, 2, 3, 4, 60, 1, 2, 3, 4]).draft(1) == [60]


def test_a_loop_is_continued_past_the_end():
    assert drafter([7, 8, 7, 8, 7, 8]).draft(5) == [7, 8, 7, 8, 7]
    assert drafter([5] * 6).draft(4) == [5] * 4


def test_nothing_known_nothing_proposed():
    for tokens in ([], [1], [1, 2], [1, 2, 3, 4], [1, 2, 3, 9, 3]):
        assert drafter(tokens).draft(4) == []
    assert drafter([1, 2, 3, 1, 2]).draft(0) == []


def test_weak_agreements_make_short_drafts():
    assert len(drafter([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]).draft(9)) == 2
    assert len(drafter([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]).draft(9)) == 4
    assert len(drafter([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4]).draft(9)) == 9


@given(st.lists(st.integers(0, 3), max_size=LOOK_BACK))
def test_the_match_is_the_reference(tokens):
    made = drafter(tokens)
    assert (made._match() if len(tokens) > 2 else (0, 0)) == (reference(tokens) if len(tokens) > 2 else (0, 0))


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 45), st.lists(st.integers(0, 3), max_size=10))
def test_truncating_is_as_if_the_rest_had_never_been(tokens, length, more):
    made = drafter(tokens)
    made.truncate(length)
    fresh = drafter(tokens[:length])
    assert (made._last, list(made._earlier), list(made._tokens)) == (fresh._last, list(fresh._earlier), list(fresh._tokens))
    made.extend(more)
    fresh.extend(more)
    assert made.draft(8) == fresh.draft(8)
    assert len(made) == min(length, len(tokens)) + len(more)


def spent(text, max_tokens=8):
    """(steps, drafted tokens, accepted tokens) of decoding a text after its first half."""
    made, at, steps, drafted, accepted = drafter(text[: len(text) // 2]), len(text) // 2, 0, 0, 0
    while at < len(text):
        made.extend([text[at]])
        at, steps = at + 1, steps + 1
        draft = made.draft(min(max_tokens, len(text) - at))
        drafted += len(draft)
        for token in draft:
            if at < len(text) and text[at] == token:
                made.extend([token])
                at, accepted = at + 1, accepted + 1
            else:
                break
    return steps, drafted, accepted


def test_repeated_text_takes_few_steps():
    passage = random.Random(0).sample(range(1000), 200)
    steps, drafted, accepted = spent([*passage, 5000, *passage])
    assert steps < 40
    assert accepted == drafted  # the text is what the draft says


def test_misleading_text_is_left_alone():
    """Pairs recur all the time and never go on as before: the worst case for n-grams."""
    rng = random.Random(1)
    text = []
    for i in range(2000):
        text += [rng.randrange(3), 3 + rng.randrange(3), 1000 + i]
    steps, drafted, accepted = spent(text)
    assert steps == len(text) - len(text) // 2 - accepted
    assert drafted < 0.1 * steps


def test_it_recovers_after_a_pause():
    made = drafter([1, 2, 3, 4, 5, 6])
    for i in range(20):  # fail often
        made.extend([1, 2])
        made.draft(4)
        made.extend([100 + i])
    passage = list(range(10, 10 + 2 * MAX_PAUSE))
    made.extend(passage)
    made.extend([7777, *passage[:4]])
    assert made.draft(4)[:2] == passage[4:6]


def test_a_draft_costs_the_same_at_any_length():
    def seconds(n):
        made = drafter([1, 2] * (n // 2))
        start = time.perf_counter()
        for _ in range(200):
            made.draft(8)
        return time.perf_counter() - start

    assert min(seconds(50_000) for _ in range(3)) < 10 * min(seconds(500) for _ in range(3))


def measured(single, row, right, steps=200):
    """What was learnt where a step takes ``single`` seconds and ``row`` more for each drafted token, of which so many in ten are right."""
    worth = Worth()
    for i in range(steps):
        worth.took(1, single)
        worth.took(5, single + 4 * row)
        worth.judged(i % 10 < right)
    return worth


def test_drafts_are_as_long_as_pays():
    assert measured(0.05, 0.0001, 9).most(16) > 8  # bound by memory: rows cost next to nothing
    assert measured(0.05, 0.01, 9).most(16) in range(2, 8)
    assert measured(0.05, 0.045, 9).most(16) in (0, 1)  # bound by arithmetic: each row is a step
    assert measured(0.05, 0.01, 2).most(16) <= 1


def test_the_best_length_has_the_most_tokens_a_second():
    for row in (0.001, 0.004, 0.02, 0.06):
        for right in (1, 4, 7, 9):
            worth = measured(0.05, row, right)
            chance = worth._right
            rates = [sum(chance**i for i in range(m + 1)) / (0.05 + m * row) for m in range(17)]
            best = worth.most(16)
            assert best == 0 or abs(rates[best] - max(rates)) < 0.01 * max(rates)


def test_what_does_not_pay_is_tried_again_now_and_then():
    worth = measured(0.05, 0.06, 1)
    lengths = [worth.most(8) for _ in range(4 * RETRY)]
    assert lengths.count(1) == 4
    assert set(lengths) == {0, 1}


def test_one_slow_step_changes_little():
    worth = measured(0.05, 0.001, 9)
    before = worth.most(16)
    worth.took(5, 10.0)
    assert worth.most(16) >= before // 2


def test_before_anything_is_known_drafts_are_not_limited():
    assert Worth().most(7) == 7
