"""Asks an engine every item of some suites and judges what it says; results are a file that can be compared."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_rt.hooks import DataError
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.files import write_file
from edge_rt_distill.progress import Told, quiet
from edge_rt_distill.sandbox.engines import Engine, Facts
from edge_rt_distill.sandbox.items import Item, Message
from edge_rt_distill.sandbox.judging import comparable, judge_answer, judge_choice, judge_turns, judge_variants, likeliest
from edge_rt_distill.sandbox.suites import Suite

VERSION = 1
SPLITS: Mapping[str, tuple[str, ...]] = {"steer": ("steer",), "sealed": ("sealed",), "all": ("steer", "sealed")}


class Outcome(NamedTuple):
    """What became of an item. ``value``: 0 to 1. ``said``: the answers, or what was chosen of each question's options."""

    domain: str
    item: str
    value: float
    said: tuple[Any, ...]


class Results(NamedTuple):
    """All outcomes of a model. ``suites``: a digest of each, which two results that are compared share. ``left_out``: items that its engine
    could not be asked, because it gives no likelihoods. ``judge``: who graded the answers in place of the items' checks, "" for the checks.
    """

    facts: Facts
    suites: Mapping[str, str]
    outcomes: tuple[Outcome, ...]
    seconds: float
    left_out: int = 0
    judge: str = ""


def run(engine: Engine, suites: Sequence[Suite], split: str = "steer", told: Told = quiet) -> Results:
    """Ask everything that the engine can be asked. ``told``: items done, and all; it may stop the run by raising. Raises DataError if
    nothing is left to ask, what the engine raises.
    """
    begun = time.perf_counter()
    wanted = [(suite.name, item) for suite in suites for item in suite.items if item.split in SPLITS[split]]
    asked = [one for one in wanted if engine.scores or not one[1].options]
    if not asked:
        raise DataError("there is nothing to ask: no item of the split, or only options to an engine that gives no likelihoods")
    outcomes = []
    for done, (domain, item) in enumerate(asked, 1):
        value, said = _ASK[item.form](engine, item)
        outcomes.append(Outcome(domain, item.id, value, said))
        told(done, len(asked))
    seconds, digests = time.perf_counter() - begun, {suite.name: digest(suite) for suite in suites}
    return Results(engine.facts, digests, tuple(outcomes), seconds, len(wanted) - len(asked))


def digest(suite: Suite) -> str:
    """Of what is asked and how it is judged."""
    return hashlib.sha256(json.dumps([item._asdict() for item in suite.items], sort_keys=True).encode()).hexdigest()[:16]


def _choice(engine: Engine, item: Item) -> tuple[float, tuple[Any, ...]]:
    found = _compared(engine, item, item.messages or item.text)
    return judge_choice(item, found), (likeliest(found),)


def _variants(engine: Engine, item: Item) -> tuple[float, tuple[Any, ...]]:
    chosen = [likeliest(_compared(engine, item, [{"role": "user", "content": ask}])) for ask in item.asks]
    return judge_variants(chosen), tuple(chosen)


def _answer(engine: Engine, item: Item) -> tuple[float, tuple[Any, ...]]:
    given = engine.answer(item.messages, item.tokens)
    return judge_answer(item, given), (given.text,)


def _turns(engine: Engine, item: Item) -> tuple[float, tuple[Any, ...]]:
    talk: list[Message] = list(item.messages)
    answers: list[Answer] = []
    for turn in item.turns:
        talk.append({"role": "user", "content": turn.content})
        answers.append(engine.answer(talk, item.tokens))
        talk.append({"role": "assistant", "content": answers[-1].text or " "})
    return judge_turns(item, answers), tuple(one.text for one in answers)


_ASK: Mapping[str, Callable[[Engine, Item], tuple[float, tuple[Any, ...]]]] = {
    "choice": _choice, "answer": _answer, "turns": _turns, "variants": _variants,
}  # fmt: skip


def _compared(engine: Engine, item: Item, before: str | Sequence[Message]) -> list[float]:
    nats = engine.likelihoods(before, item.options)
    return [comparable(item, option, one) for option, one in zip(item.options, nats, strict=True)]


def write_results(path: Path, results: Results) -> None:
    """Raises UserError."""
    record = {
        "version": VERSION, **results.facts._asdict(), "suites": dict(results.suites), "seconds": round(results.seconds, 1),
        "left_out": results.left_out, "judge": results.judge,
        "outcomes": [one._asdict() for one in results.outcomes],
    }  # fmt: skip
    write_file(path, json.dumps(record, ensure_ascii=False, indent=1))


def read_results(path: Path) -> Results:
    """Raises DataError for what is no file of results."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["version"] != VERSION:
            raise DataError(f"{path} has results of version {record['version']}, and this tool reads {VERSION}; evaluate the model again")
        outcomes = tuple(Outcome(one["domain"], one["item"], float(one["value"]), tuple(one["said"])) for one in record["outcomes"])
        facts = Facts(record["model"], record["engine"], record["template"])
        seconds, left_out, judge = float(record["seconds"]), int(record.get("left_out", 0)), str(record.get("judge", ""))
        return Results(facts, dict(record["suites"]), outcomes, seconds, left_out, judge)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of results ({error!r}); write one with `edge-rt eval run MODEL -o FILE`") from error
