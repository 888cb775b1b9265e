"""Cases become hard cases: samples that the next student is taught by, those first that hurt most, none that a score is measured on.

A line is a sample (data/samples.py): a correction is the assistant's answer, and without one the question stands alone, for the teacher to
answer. Its ``source`` is ``feedback``, and its map ``feedback`` says by which signals it was found, how often, when, and to which forms of
prompt, so that one can be traced, and taken out by deleting its line. Texts are as redacted as the trace was.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from edge_rt.hooks import DataError
from edge_rt_distill.data.dedupe import NEAR, deduplicate, near_pairs, shingles
from edge_rt_distill.data.records import parse
from edge_rt_distill.data.samples import Sample, can_be_read, make_sample
from edge_rt_distill.data.splits import leaks
from edge_rt_distill.feedback.signals import Case
from edge_rt_distill.files import write_file
from edge_rt_distill.sandbox.suites import Suite

SOURCE = "feedback"


class Found(NamedTuple):
    """A case and where it was: the trace's name, and when it began, RFC 3339, "" if it does not say."""

    case: Case
    trace: str
    begun: str

    @property
    def moment(self) -> float:
        """Seconds since 1970, or since the trace's begin if nobody knows when that was."""
        return self.case.at + (moment(self.begun) if self.begun else 0.0)

    @property
    def when(self) -> str:
        """RFC 3339, or seconds after the trace's begin."""
        if not self.begun:
            return f"{self.case.at:.0f} s"
        return datetime.fromtimestamp(self.moment, timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def moment(begun: str) -> float:
    """Seconds since 1970 of a header's time, which was checked when it was read."""
    return datetime.fromisoformat(begun.replace("Z", "+00:00")).timestamp()


class HardCase(NamedTuple):
    """``sample``: what is learnt from. ``weight``: of all its cases together. ``cases``: those that are of it, the earliest first."""

    sample: Sample
    weight: float
    cases: tuple[Found, ...]


class Mined(NamedTuple):
    """``left_out``: how many cases were, by the reason."""

    hard: list[HardCase]
    left_out: Mapping[str, int]


def mine(found: Sequence[Found], held_out: Sequence[Sample], suites: Sequence[Suite]) -> Mined:
    """Hard cases, the heaviest first. ``held_out`` and the items of ``suites`` are what scores are measured on: what leaks there is left
    out.
    """
    left_out: Counter[str] = Counter()
    usable: list[tuple[Found, Sample]] = []
    for one in found:
        try:
            usable.append((one, _sample(one.case)))
        except DataError as error:
            left_out[str(error)] += 1
    # Of cases that are alike the first stands for all: one that somebody corrected, and of these the latest.
    usable.sort(key=lambda pair: (not pair[0].case.correction, -pair[0].case.weight, -pair[0].moment))
    groups = _merged(usable)
    near = leaking([sample for sample, _ in groups], [*held_out, *asked(suites)])
    hard = []
    for number, (sample, cases) in enumerate(groups):
        if number in near:
            left_out["they are near to what a score is measured on"] += len(cases)
        else:
            hard.append(HardCase(sample, sum(one.case.weight for one in cases), tuple(sorted(cases, key=lambda one: one.moment))))
    hard.sort(key=lambda one: (-one.weight, -len(one.cases), one.sample.id))
    return Mined(hard, dict(left_out))


def _sample(case: Case) -> Sample:
    """What is learnt of a case. Raises DataError with the reason if nothing can be."""
    if case.prompt:
        if not case.correction:
            raise DataError("a text to be continued has no question for the teacher, and no correction was given")
        return make_sample(text=case.prompt + case.correction, source=SOURCE)
    if not case.messages:
        raise DataError("the answers before it in its session were not recorded (answers = true in [record])")
    messages = [dict(one) for one in case.messages]
    if any(one.get("role") == "tool" or one.get("tool_calls") for one in messages):
        raise DataError("tools were called, and only text is learnt from")
    if messages[-1].get("role") != "user":
        raise DataError("its last message is not a user's")
    answer = [{"role": "assistant", "content": case.correction}] if case.correction else []
    return parse(json.dumps({"messages": [*messages, *answer], "source": SOURCE}))


def _merged(usable: Sequence[tuple[Found, Sample]]) -> list[tuple[Sample, list[Found]]]:
    """Samples whose questions are not near to each other, each with all its cases."""
    questions = [make_sample(sample.prompt, sample.text) for _, sample in usable]
    found = deduplicate(questions)
    into = {one.dropped: one.kept for one in (*found.exact, *found.near) if one.dropped != one.kept}
    groups: dict[str, tuple[Sample, list[Found]]] = {}
    for question, (one, sample) in zip(questions, usable, strict=True):
        place = question.id
        while place in into:
            place = into[place]
        groups.setdefault(place, (sample, []))[1].append(one)
    return list(groups.values())


def leaking(samples: Sequence[Sample], measured: Sequence[Sample]) -> set[int]:
    """The numbers of those that share a run of words with what is ``measured`` on, or that ask nearly the same."""
    shared = {leak.evaluation for leak in leaks(measured, samples)}
    questions = [make_sample(one.prompt, one.text) for one in (*samples, *measured)]
    pairs = near_pairs([shingles(one.content) for one in questions], NEAR)
    near = {first for first, second, _ in pairs if first < len(samples) <= second}
    return near | {number for number, one in enumerate(samples) if one.id in shared}


def asked(suites: Iterable[Suite]) -> Iterator[Sample]:
    """Every text of the items, each as a passage."""
    for suite in suites:
        for item in suite.items:
            spoken = [one["content"] for one in item.messages] + [one.content for one in item.turns]
            yield from (make_sample(text=text) for text in (item.text, *item.options, *item.asks, *spoken) if text.strip())


def write_hard(path: Path, mined: Mined) -> None:
    """Write hard cases as samples that ``read_samples`` reads. Raises DataError if there are none, UserError if they cannot be written."""
    if not mined.hard:
        raise DataError("no hard case is left; record more traffic, or have more feedback given")
    write_file(path, "".join(json.dumps(_record(one), ensure_ascii=False) + "\n" for one in mined.hard))


def _record(one: HardCase) -> dict[str, Any]:
    sample, cases = one.sample, [found.case for found in one.cases]
    content: dict[str, Any] = {"messages": [message._asdict() for message in sample.messages]} if sample.messages else {"text": sample.text}
    provenance = {
        "id": sample.id, "signals": dict(Counter(case.kind for case in cases)), "times": len(cases), "weight": round(one.weight, 3),
        "first": one.cases[0].when, "last": one.cases[-1].when, "variants": sorted({case.variant for case in cases if case.variant}),
        "traces": sorted({found.trace for found in one.cases}),
    }  # fmt: skip
    corrections = {case.correction for case in cases if case.correction}
    if len(corrections) > 1:
        provenance["other_corrections"] = len(corrections) - 1
    return {**content, "language": sample.language, "source": SOURCE, SOURCE: provenance}


def traffic_samples(texts: Iterable[str], measured: Sequence[Sample]) -> list[Sample]:
    """What users wrote, as passages that statistics can be taken of, each once; without what leaks into what is ``measured`` on."""
    passages = deduplicate([make_sample(text=text, source="traffic") for text in texts if can_be_read(text)]).samples
    near = leaking(passages, measured)
    return [one for number, one in enumerate(passages) if number not in near]
