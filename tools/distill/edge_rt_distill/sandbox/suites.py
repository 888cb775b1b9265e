"""Suites: files of items, one a line, read and checked as a whole; those that ship with the tool are one a domain."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_rt.hooks import DataError
from edge_rt_distill.data.json_lines import json_lines, read_text
from edge_rt_distill.sandbox.items import Item, parse
from edge_rt_distill.sandbox.judging import chance, judge_answer, judge_turns
from edge_rt_distill.sandbox.metrics import DOMAINS, METRICS

FOLDER = Path(__file__).parent / "suites"


class Suite(NamedTuple):
    """``name``: of its domain. ``items`` in the order of the file."""

    name: str
    items: tuple[Item, ...]


def built_in(names: Sequence[str] = DOMAINS) -> list[Suite]:
    """Suites that ship with the tool. Raises DataError for one that does not."""
    unknown = [name for name in names if name not in DOMAINS]
    if unknown:
        raise DataError(f"no suite is named {unknown[0]}; choose of {', '.join(DOMAINS)}, or name a file")
    return [read_suite(FOLDER / f"{name}.jsonl") for name in names]


def read_suite(path: Path) -> Suite:
    """A suite from JSONL, an item a line, or YAML, a list of items. Raises DataError with the first mistake, its line and the reason."""
    items: list[Item] = []
    for place, record in _yaml(path) if path.suffix in (".yaml", ".yml") else _json(path):
        try:
            items.append(parse(record))
        except DataError as error:
            raise DataError(f"{path}, {place}: {error}") from None
    twice = [id for id, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise DataError(f"{path}: there are two items {twice[0]}; each has an id of its own")
    if not items:
        raise DataError(f"{path} has no items")
    return Suite(path.stem, tuple(items))


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    return ((f"line {number}", record) for number, record in json_lines(path))


def _yaml(path: Path) -> Iterator[tuple[str, Any]]:
    """Items with the lines they begin on."""
    import yaml

    try:
        node = yaml.compose(text := read_text(path), yaml.SafeLoader)
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(node, yaml.SequenceNode):
        raise DataError(f"{path} has no list of items; write each as `- id: ...`")
    return ((f"line {one.start_mark.line + 1}", record) for one, record in zip(node.value, found, strict=True))


class Told(NamedTuple):
    """How an item's examples are told apart by its metric: the least value of a good answer, the largest of a bad one."""

    item: Item
    good: float
    bad: float


def examples(items: Sequence[Item]) -> list[Told]:
    """Of every item that has examples."""
    found = []
    for item in items:
        if not item.good:
            continue
        values = [[judge_turns(item, one) if item.turns else judge_answer(item, one[0]) for one in some] for some in (item.good, item.bad)]
        found.append(Told(item, min(values[0]), max(values[1])))
    return found


class Validation(NamedTuple):
    """Of a metric: its ``items``, and how many of those with ``examples`` it tells ``apart``."""

    items: int
    examples: int
    apart: int


def validations(suites: Sequence[Suite]) -> dict[str, Validation]:
    """Of every metric."""
    items = [item for suite in suites for item in suite.items]
    judged = examples(items)
    return {
        name: Validation(
            sum(item.metric == name for item in items), sum(one.item.metric == name for one in judged),
            sum(one.item.metric == name and one.good > one.bad for one in judged),
        )
        for name in METRICS
    }  # fmt: skip


def faults(suite: Suite) -> list[str]:
    """What an author should mend: examples that the checks do not tell apart, metrics without items, questions asked twice."""
    judged = examples(suite.items)
    found = [f"{one.item.id}: a good answer is worth {one.good:.2f}" for one in judged if one.good < 0.99]
    found += [f"{one.item.id}: a bad answer is worth {one.bad:.2f}" for one in judged if one.bad > 0.7]
    found += [f"{item.id}: silence is worth {chance(item):.2f}" for item in suite.items if item.good and chance(item) > 0.7]
    asked = Counter(json.dumps([item.messages or item.options, item.asks, [turn.content for turn in item.turns]]) for item in suite.items)
    found += [f"a question is asked {count} times: {question[:100]}" for question, count in asked.items() if count > 1]
    return found
