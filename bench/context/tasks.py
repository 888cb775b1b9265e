"""Retrieval tasks in the style of RULER (Hsieh et al., 2024): statements hidden in real prose, and questions about them.

Kinds, as far as SmolLM2-135M can do them with its whole cache:
``single``: one fact at a depth that goes evenly through the text; ``keys``: one of six facts is asked for; ``values``: all three values
of one key are asked for at once, a third of the score each; ``variables``: one link of a chain X1 = 12345, X2 = X1, X3 = X2;
``words``: who is named most often in sentences of one form.
Beyond the model: a chain followed to its end in one question, the most common words of a list, keys that differ in a name alone.

Tasks of one seed and length share few texts, so that few have to be read: one for ``single``, one for ``keys`` and ``variables``,
one for ``values`` and ``words``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from bench.context.facts import FACTS, code
from bench.context.score import holds
from bench.context.text import run_of_prose, sentences

KINDS = ("single", "keys", "values", "variables", "words")
TUNING, REPORTING = range(1000), range(1000, 2000)
"""Seeds to choose weights and settings on, and seeds whose scores are reported."""

_ANIMALS = ("otter", "falcon", "badger", "beaver", "hedgehog", "penguin", "camel", "walrus")
_THINGS = ("window", "garden", "bottle", "candle", "ladder", "pillow", "basket", "hammer", "saddle", "violin", "anchor", "carpet")
_VISITORS = ("Carol", "Simon", "Peter", "Julia", "Martin", "Sophie")
_GOLDEN = 0.6180339887498949  # its multiples modulo 1 go evenly through 0 to 1
_TRIES = 40  # sentences tried to fill the last gap of a text


class Task(NamedTuple):
    """``context``, blank lines between its paragraphs, is ``length`` tokens together with the question, which ends in a cue.

    All ``answers`` are wanted. ``depth``: where the first statement that the answer needs stands, 0 the beginning, 1 the end.
    ``limit``: tokens of an answer.
    """

    kind: str
    length: int
    seed: int
    context: str
    question: str
    answers: tuple[str, ...]
    depth: float
    limit: int


class _Asked(NamedTuple):
    """A question and the statement that answers it, by its index."""

    kind: str
    question: str
    answers: tuple[str, ...]
    statement: int
    limit: int


class _Plan(NamedTuple):
    """What to hide in a text, where (rising depths) and what to ask."""

    statements: list[str]
    depths: list[float]
    asked: list[_Asked]


def tasks(seed: int, length: int, count: Callable[[str], int], kinds: Sequence[str] = KINDS) -> Iterator[Task]:
    """The tasks of a seed, those of one text together. ``length`` is tokens as ``count`` counts them, met within 5 %.

    Raises ValueError where the length is too small for the statements.
    """
    for name, plan in _PLANS.items():
        rng = random.Random(f"{name} {seed} {length}")
        hidden = plan(rng, seed)
        asked = [one for one in hidden.asked if one.kind in kinds]
        if not asked:
            continue
        room = length - sum(count(f"{text} ") for text in hidden.statements) - max(count(one.question) for one in hidden.asked)
        if room < length / 4:
            raise ValueError(f"{length} tokens are too few for {len(hidden.statements)} statements in a text; give more")
        answers = {answer for one in hidden.asked for answer in one.answers}
        paragraphs = _filled(rng, room, count, answers)
        context, depths = _hidden(paragraphs, hidden)
        for one in asked:
            yield Task(one.kind, length, seed, context, one.question, one.answers, depths[one.statement], one.limit)


def _filled(rng: random.Random, room: int, count: Callable[[str], int], answers: Iterable[str]) -> list[list[str]]:
    """Paragraphs of prose, as sentences, of about ``room`` tokens. Those that hold an answer are left out."""
    found: list[list[str]] = []
    tries = 0
    for paragraph in run_of_prose(rng):
        if any(holds(paragraph, answer) for answer in answers):
            continue
        taken: list[str] = []
        for sentence in sentences(paragraph):
            size = count(f"{sentence} ")
            if size > room:
                tries += 1
                break
            taken.append(sentence)
            room -= size
        if taken:
            found.append(taken)
        if tries >= _TRIES or room < 8:
            return found
    raise AssertionError("prose goes on endlessly")


def _hidden(paragraphs: list[list[str]], plan: _Plan) -> tuple[str, list[float]]:
    """The text with each statement after the sentence at its depth, and the depths in characters."""
    gaps = [(i, j + 1) for i, paragraph in enumerate(paragraphs) for j in range(len(paragraph))]
    for statement, depth in reversed(list(zip(plan.statements, plan.depths, strict=True))):  # from the end: earlier places stay
        i, j = gaps[min(int(depth * len(gaps)), len(gaps) - 1)]
        paragraphs[i].insert(j, statement)
    context = "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)
    return context, [context.index(statement) / len(context) for statement in plan.statements]


# ---- what is hidden and asked ----------------------------------------------------------------------------------------


def _depths(rng: random.Random, number: int) -> list[float]:
    return sorted(rng.random() for _ in range(number))


def _single(rng: random.Random, seed: int) -> _Plan:
    fact = FACTS["en"][seed % len(FACTS["en"])]
    value = fact.value(rng)
    asked = _Asked("single", f"{fact.question} {fact.opening}", (value,), 0, 10)
    return _Plan([fact.statement.format(value)], [seed * _GOLDEN % 1], [asked])


def _several(rng: random.Random, _seed: int) -> _Plan:
    """Six facts and a chain of three variables between them, which goes forward: a variable is known before it is used."""
    found: list[tuple[str, _Asked]] = []
    for fact in rng.sample(FACTS["en"], 6):
        value = fact.value(rng)
        found.append((fact.statement.format(value), _Asked("keys", f"{fact.question} {fact.opening}", (value,), 0, 10)))
    value = code(rng)
    for place, thing in zip(sorted(rng.sample(range(9), 3)), rng.sample(_THINGS, 3), strict=True):
        asked = _Asked("variables", f"What is the value of {thing}? The value of {thing} is", (value,), 0, 8)
        found.insert(place, (f"The value of {thing} is {value}. Remember, the value of {thing} is {value}.", asked))
        value = thing
    return _Plan([text for text, _ in found], _depths(rng, 9), [one._replace(statement=i) for i, (_, one) in enumerate(found)])


def _gathered(rng: random.Random, _seed: int) -> _Plan:
    """Three values of one key, and visitors one of whom comes far more often than the others."""
    animals = tuple(rng.sample(_ANIMALS, 3))
    frequent, *others = rng.sample(_VISITORS, len(_VISITORS))
    statements = [f"One of the special animals is the {animal}. The {animal} is one of the special animals." for animal in animals]
    statements += [f"The market was visited by {name}." for name in [frequent] * 8 + others]
    rng.shuffle(statements)
    first = {text: next(i for i, statement in enumerate(statements) if text in statement) for text in (*animals, frequent)}
    values = "What are the three special animals? The three special animals are the"
    words = "Who visited the market most often? The market was visited by"
    asked = [
        _Asked("values", values, animals, min(first[animal] for animal in animals), 20),
        _Asked("words", words, (frequent,), first[frequent], 5),
    ]
    return _Plan(statements, _depths(rng, len(statements)), asked)


_PLANS: dict[str, Callable[[random.Random, int], _Plan]] = {"single": _single, "several": _several, "gathered": _gathered}
