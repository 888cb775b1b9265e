"""Scripted conversations: a fact at the head, small talk many times longer than the window, then the question.

``mixed`` changes between English and Chinese from turn to turn; the question is in the language of the fact, because SmolLM2-135M does
not carry an answer from one into the other. It answers far better when its answer is begun for it, so each conversation has an opening.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from bench.context.everyday import Language, reply, talk
from bench.context.facts import FACTS
from edge_rt.types import Message

Tongue = Literal["en", "zh", "mixed"]
TONGUES: tuple[Tongue, ...] = ("en", "zh", "mixed")

_SYSTEM = "You are a helpful assistant."
_REMEMBERED: dict[Language, str] = {"en": "I will remember that.", "zh": "好的，我记住了。"}
_AROUND = 10  # tokens of a chat template around two messages


class Conversation(NamedTuple):
    """``messages`` begin with a system prompt and end with the question.

    The answer begins with ``opening``; one of ``accepted`` must be in what follows.
    """

    tongue: Tongue
    seed: int
    messages: tuple[Message, ...]
    opening: str
    accepted: tuple[str, ...]


def conversations(seeds: Sequence[int], length: int, count: Callable[[str], int]) -> Iterator[Conversation]:
    """A conversation for each seed, the languages in turn, of ``length`` tokens as ``count`` counts them, within 5 %."""
    for seed in seeds:
        yield conversation(seed, TONGUES[seed % len(TONGUES)], length, count)


def conversation(seed: int, tongue: Tongue, length: int, count: Callable[[str], int]) -> Conversation:
    """One conversation. Raises ValueError where the length is too small for a fact and some turns."""
    rng = random.Random(f"{tongue} {seed}")
    language: Language = tongue if tongue != "mixed" else rng.choice(("en", "zh"))
    fact = FACTS[language][seed // len(TONGUES) % len(FACTS[language])]
    value = fact.value(rng)
    head = [fact.statement.format(value), _REMEMBERED[language]]
    room = length - sum(map(count, (_SYSTEM, *head, fact.question, fact.opening))) - 2 * _AROUND
    if room < length / 2:
        raise ValueError(f"{length} tokens are too few for a conversation; give more")
    texts = [*head, *_turns(rng, tongue, room, count), fact.question]
    said = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return Conversation(tongue, seed, ({"role": "system", "content": _SYSTEM}, *said), fact.opening, (value,))


def _turns(rng: random.Random, tongue: Tongue, room: int, count: Callable[[str], int]) -> list[str]:
    """Small talk and replies of about ``room`` tokens; the last turns are shorter, to meet it."""
    found: list[str] = []
    languages: tuple[Language, ...] = ("en", "zh") if tongue == "mixed" else (tongue,)
    for language in itertools.cycle(languages):
        for sentences in (4, 2, 1):
            turn = [talk(rng, language, sentences), reply(rng, language)]
            size = sum(map(count, turn)) + _AROUND
            if size <= room:
                found += turn
                room -= size
                break
        else:
            return found
    raise AssertionError("a cycle goes on endlessly")
