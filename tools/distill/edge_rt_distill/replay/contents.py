"""What generated traces ask: questions of the evaluation suites and demo samples, conversations, long prompts with a fact in them, attacks.

Of the suites only items that may steer (docs/evaluation.md): what is sealed judges the end and nothing else.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from edge_rt_distill.data.samples import demo
from edge_rt_distill.sandbox.items import Item
from edge_rt_distill.sandbox.suites import built_in, read_suite

LANGUAGES: Mapping[str, tuple[str, ...]] = {"en": ("en",), "zh": ("zh",), "both": ("en", "zh")}
ATTACKS = Path(__file__).with_name("adversarial.jsonl")
"""A suite (docs/evaluation.md) whose users try to break format, language or rules, or to have their instructions told."""
TURNS = (3, 8)
"""How many a conversation has at least and at most."""
LETTERS: Mapping[str, float] = {"en": 4.0, "zh": 1.0}
"""Of a token, roughly. A vocabulary without Chinese takes two or three tokens for a character."""
_ANSWER = 96
"""Tokens of an answer where nothing says how many it needs."""


class Ask(NamedTuple):
    """Messages that are new, checks of the answer, and how many tokens it may have."""

    messages: tuple[Mapping[str, Any], ...]
    checks: tuple[Mapping[str, Any], ...] = ()
    tokens: int = _ANSWER


def deck(items: Sequence[Any], dice: random.Random) -> Iterator[Any]:
    """Items without end: all of them in a random order, then again in another."""
    while True:
        yield from dice.sample(items, len(items))


@cache
def _items(language: str) -> tuple[Item, ...]:
    return tuple(item for suite in built_in() for item in suite.items if item.split == "steer" and item.language == language)


def questions(languages: Sequence[str]) -> list[Ask]:
    """Of the suites and the demo samples, each on its own."""
    found = [_ask(item) for language in languages for item in _items(language) if item.form == "answer"]
    samples = [sample for sample in demo().samples if sample.language in languages and sample.prompt]
    return found + [Ask(tuple(message._asdict() for message in sample.prompt), tuple(sample.checks)) for sample in samples]


def attacks(languages: Sequence[str]) -> list[Ask]:
    """Each with checks of what a robust answer holds."""
    return [_ask(item) for item in read_suite(ATTACKS).items if item.language in languages]


def _ask(item: Item) -> Ask:
    return Ask(item.messages, item.checks, item.tokens)


def conversation(language: str, dice: random.Random) -> list[Ask]:
    """The turns of a user who tells something, asks of other things, and comes back to it.

    The first and the last of a conversation of the suites, with questions of other items between them.
    """
    frame = dice.choice([item for item in _items(language) if item.form == "turns"])
    own = [Ask((_user(turn.content),), _without_agreement(turn.checks), frame.tokens) for turn in frame.turns]
    own[0] = own[0]._replace(messages=(*frame.messages, *own[0].messages))
    fillers = [_ask(item) for item in _items(language) if item.form == "answer" and len(item.messages) == 1]
    least, most = TURNS
    more = dice.sample(fillers, max(0, dice.randint(least, most) - len(own)))
    return [own[0], *more, *own[1:]]


def _without_agreement(checks: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """Without checks that compare an answer with an earlier one, as those of a trace see one answer."""
    return tuple(check for check in checks if check["kind"] != "agrees")


def _user(content: str) -> Mapping[str, str]:
    return {"role": "user", "content": content}


# ---- long prompts --------------------------------------------------------------------------------------------------------------------

_NAMES: Mapping[str, tuple[str, ...]] = {
    "en": ("Odile", "Bertram", "Ingrid", "Casimir", "Philippa", "Leopold", "Ramona", "Sigrid"),
    "zh": ("欧阳慧", "司马青", "诸葛云", "上官雪", "慕容海", "端木兰", "令狐山", "夏侯明"),
}
_THINGS: Mapping[str, tuple[str, ...]] = {
    "en": ("lanterns", "ladders", "violins", "barometers", "hammocks", "umbrellas", "telescopes", "saddles"),
    "zh": ("灯笼", "梯子", "小提琴", "气压计", "吊床", "雨伞", "望远镜", "马鞍"),
}
_TEXTS: Mapping[str, Mapping[str, str]] = {
    "en": {
        "before": "Read these notes. One question about them comes at the end.",
        "locker": "By the way, the locker of {name} opens with the number {number}.",
        "order": "By the way, {name} has ordered some {thing}.",
        "which": "Which number opens the locker of {name}? Reply with the number only.",
        "what": "Sum up in one sentence all the things that {name} has ordered.",
    },
    "zh": {
        "before": "请阅读以下笔记，最后有一个关于它们的问题。",
        "locker": "顺便说一句，{name}的储物柜密码是{number}。",
        "order": "顺便说一句，{name}订购了一些{thing}。",
        "which": "{name}的储物柜密码是多少？只回答数字。",
        "what": "用一句话概括{name}订购的所有东西。",
    },
}


@cache
def _paragraphs(language: str) -> tuple[str, ...]:
    """What the demo samples and the suites say, as paragraphs."""
    said = [sample.content for sample in demo().samples if sample.language == language]
    asked = [message["content"] for item in _items(language) for message in item.messages if item.form == "answer"]
    return tuple(dict.fromkeys(said + asked))


def long_prompt(language: str, tokens: int, dice: random.Random) -> Ask:
    """A prompt of about so many tokens: paragraphs in a random order with one fact to find, or three to sum up, at random places."""
    texts, name = _TEXTS[language], dice.choice(_NAMES[language])
    if dice.random() < 0.5:
        number = dice.randint(1000, 9999)
        facts, question = [texts["locker"].format(name=name, number=number)], texts["which"]
        checks: tuple[Mapping[str, Any], ...] = ({"kind": "number", "equals": number},)
    else:
        things = dice.sample(_THINGS[language], 3)
        facts, question = [texts["order"].format(name=name, thing=thing) for thing in things], texts["what"]
        checks = ({"kind": "contains", "all": things},)
    room = int(tokens * LETTERS[language]) - sum(map(len, (texts["before"], question, *facts)))
    parts: list[str] = []
    for paragraph in deck(_paragraphs(language), dice):
        if room <= 0:
            break
        parts.append(paragraph[:room])
        room -= len(parts[-1]) + 2
    for fact in facts:
        parts.insert(dice.randint(0, len(parts)), fact)
    return Ask((_user("\n\n".join([texts["before"], *parts, question.format(name=name)])),), checks, 64)
