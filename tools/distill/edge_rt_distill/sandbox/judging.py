"""What an item's answer is worth, 0 to 1: of checks, or of the likelihoods of options."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from functools import cache

from edge_rt_distill.data.answers import Answer
from edge_rt_distill.data.checks import mean, score, worth
from edge_rt_distill.data.content_checks import chosen
from edge_rt_distill.sandbox.items import Check, Item


def judge_answer(item: Item, answer: Answer) -> float:
    """Of an item of the form answer."""
    return worth(item.checks, answer)


def judge_turns(item: Item, answers: Sequence[Answer]) -> float:
    """Of an item of the form turns; ``answers``: one to each turn."""
    found = []
    for turn, answer in zip(item.turns, answers, strict=True):
        found += [(float(check.get("weight", 1)), _in_turn(check, answer, answers)) for check in turn.checks]
    return mean(found)


def judge_choice(item: Item, likelihoods: Sequence[float]) -> float:
    """Of an item of the form choice: whether the right option is the likeliest. ``likelihoods``: nats, by ``comparable``."""
    return float(likeliest(likelihoods) == item.right)


def likeliest(likelihoods: Sequence[float]) -> int:
    """The number of the likeliest; of equals the first."""
    return max(range(len(likelihoods)), key=lambda at: likelihoods[at])


def judge_variants(choices: Sequence[int]) -> float:
    """Of an item of the form variants: the share of wordings at which the commonest ``choices`` was made."""
    return Counter(choices).most_common(1)[0][1] / len(choices)


def comparable(item: Item, option: str, nats: float) -> float:
    """A continuation's log-likelihood ``nats`` as options are compared by: its sum behind a text, the mean a byte behind messages."""
    return nats if item.form == "choice" and not item.messages else nats / max(1, len(option.encode()))


def _in_turn(check: Check, answer: Answer, answers: Sequence[Answer]) -> float:
    if check["kind"] != "agrees":
        return score(check, answer)
    before = chosen(answers[check["turn"]].text, check["options"])
    return float(before is not None and chosen(answer.text, check["options"]) == before)


def chance(item: Item) -> float:
    """What an answer without any knowledge is worth: of choices a random one, of answers silence."""
    if item.form == "choice":
        return 1 / len(item.options)
    if item.form == "variants":
        return _agreement(len(item.asks), len(item.options))
    silence = Answer("", True)
    return judge_turns(item, [silence] * len(item.turns)) if item.turns else judge_answer(item, silence)


@cache
def _agreement(asks: int, options: int) -> float:
    """The expected share of the commonest of so many random choices."""
    drawn = [judge_variants(one) for one in itertools.product(range(options), repeat=asks)]
    return sum(drawn) / len(drawn)
