"""First steps of a run: samples that are read, freed of duplicates, split without leaks; texts that the teacher writes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from edge_rt.hooks import DataError, OptionError
from edge_rt_distill.behaviour.conversations import made_up
from edge_rt_distill.data.dedupe import deduplicate
from edge_rt_distill.data.samples import Problem, Sample, can_be_read, demo, make_sample, read_samples
from edge_rt_distill.data.sources import docstrings, packages, technical_text
from edge_rt_distill.data.splits import leaks, split
from edge_rt_distill.evaluate.measures import count, measured, summarise
from edge_rt_distill.files import write_file
from edge_rt_distill.model.generate import generate
from edge_rt_distill.model.vocabulary import choose, read_merges, with_fewer, write_fewer
from edge_rt_distill.run.mixture import check_weights, held_out, write_sets
from edge_rt_distill.run.steps import Place, Step
from edge_rt_distill.run.workshop import FEWER, HELD_OUT, KEPT, ROLLOUTS, TRAIN, Workshop, read_back, stamps, write_samples
from edge_rt_distill.stages.teachers import LiveTeacher, ReadingTeacher

BUILT_IN: Mapping[str, Callable[[], Sequence[Sample]]] = {
    "demo": lambda: demo().samples, "technical": technical_text, "docstrings": docstrings, "packages": packages,
}  # fmt: skip
"""Samples that an entry of ``data.samples`` may name instead of a file."""
_OPENING = 4
"""Tokens of a text that the teacher goes on from: few, so that what follows is its own."""


def data_step(shop: Workshop) -> Step:
    """Reads the samples: ``train.jsonl``, ``held_out.jsonl`` and ``data.json``, which says what was left out and why."""
    config = shop.config.data
    files = [[name, stamps(shop.path(name)) if name not in BUILT_IN else None] for name in config.samples]
    settings = {
        "samples": config.samples, "policy": config.policy, "held_out": config.held_out, "length": config.length,
        "seed": shop.config.run.seed, "files": files,
    }  # fmt: skip

    def run(place: Place) -> Mapping[str, Any]:
        check_weights(config)
        sets, problems = _read(shop, place)
        samples = [one for some in sets for one in some]
        kept = deduplicate(samples)
        train, apart = split(kept.samples, held_out=config.held_out, seed=shop.config.run.seed)
        leaking = {one.evaluation for one in leaks(train, apart)}
        apart = [one for one in apart if one.id not in leaking]
        if not train or not apart:
            raise DataError(
                f"of {len(samples)} samples {len(train)} are left to learn from and {len(apart)} to measure on, and both need some; "
                "add samples, or set data.held_out higher"
            )
        write_samples(place.folder / TRAIN, train)
        write_samples(place.folder / HELD_OUT, apart)
        write_sets(place.folder, sets)
        summary = {
            "read": len(samples), "broken": [str(one) for one in problems[:100]], "duplicates": len(samples) - len(kept.samples),
            "leaks": len(leaking), "train": _counted(train), "held_out": _counted(apart),
        }  # fmt: skip
        write_file(place.folder / "data.json", json.dumps(summary, ensure_ascii=False, indent=1))
        return summary

    return Step("data", run, settings)


def _read(shop: Workshop, place: Place) -> tuple[list[Sequence[Sample]], list[Problem]]:
    """The samples of each entry, and what was broken."""
    sets: list[Sequence[Sample]] = []
    problems: list[Problem] = []
    for name in shop.config.data.samples:
        if name in BUILT_IN:
            sets.append(BUILT_IN[name]())
            continue
        found = read_samples([shop.path(name)], policy="stop" if shop.config.data.policy == "stop" else "skip", minimum=1)
        for problem in found.problems:
            place.log({"event": "broken", "problem": str(problem)})
        sets.append(found.samples)
        problems += found.problems
    if problems:
        place.told(f"{len(problems)} broken lines were left out, the first: {problems[0]}", 0, 0)
    return sets, problems


def _counted(samples: Sequence[Sample]) -> dict[str, Any]:
    """How many there are, by domain, language and source."""
    kinds = {name: dict(Counter(getattr(one, name) for one in samples)) for name in ("domain", "language", "source")}
    return {"samples": len(samples), **kinds}


def rollouts_step(shop: Workshop) -> Step:
    """Texts that the teacher writes from the first few tokens of samples (sequence-level distillation, Kim and Rush 2016,
    arXiv:1606.07947), and conversations that it makes up: ``rollouts.jsonl``.
    """
    config = shop.config.data
    settings = {
        "count": config.rollouts, "chats": config.chats, "tokens": config.rollout_tokens, "teacher": shop.teacher_stamp,
        "seed": shop.config.run.seed,
    }  # fmt: skip

    def run(place: Place) -> Mapping[str, Any]:
        found = [*_continued(shop, place), *_conversations(shop, place)]
        write_samples(place.folder / ROLLOUTS, deduplicate(found).samples)
        return {"texts": len(found)}

    return Step("rollouts", run, settings, ("data",))


def _conversations(shop: Workshop, place: Place) -> list[Sample]:
    config = shop.config.data
    if not config.chats:
        return []
    told = partial(place.told, "the teacher makes up conversations")
    return made_up(shop.teacher, config.chats, config.rollout_tokens, seed=shop.config.run.seed, told=told)


def _continued(shop: Workshop, place: Place) -> list[Sample]:
    config, teacher = shop.config.data, shop.teacher
    if not config.rollouts:
        return []
    prompts = _openings(shop, place)
    answers = generate(
        teacher.model, prompts, tokens=config.rollout_tokens, seed=shop.config.run.seed, end=teacher.tokeniser.end, batch=32,
        told=partial(place.told, "the teacher writes"),
    )  # fmt: skip
    texts = [teacher.tokeniser.decode([*prompt, *one.tokens]) for prompt, one in zip(prompts, answers, strict=True)]
    return [make_sample(text=text, source="the teacher itself", domain="general") for text in texts if can_be_read(text)]


def vocabulary_step(shop: Workshop) -> Step:
    """Leaves tokens out that the samples do not need: ``vocabulary.gguf`` with the others, ``kept.json``."""
    share = shop.config.student.vocabulary
    settings = {"share": share, "teacher": shop.teacher_stamp, "measured on": [shop.config.data.weights, shop.config.distil.held_out]}

    def run(place: Place) -> Mapping[str, Any]:
        if share == 1:
            write_file(place.folder / KEPT, "null")
            return {"share": 1.0}
        teacher = shop.teacher
        merges = read_merges(teacher.tokeniser.source)
        samples = [*read_back(place.need("data") / TRAIN), *read_back(place.need("rollouts") / ROLLOUTS)]
        counts = Counter(token for one in samples for token in teacher.tokeniser.encode(one.content))
        kept = choose(merges, counts, share)
        write_fewer(teacher.tokeniser.source, merges, kept, place.folder / FEWER)
        write_file(place.folder / KEPT, json.dumps(kept))
        fewer = with_fewer(teacher, merges, kept, place.folder / FEWER)
        sequences = held_out(shop, place.need("data"), fewer.teacher.tokeniser)
        found = count(fewer.teacher.model, ReadingTeacher(LiveTeacher(teacher.model), teacher.tokeniser, fewer), sequences)
        written = sum(sum(one.targets[1:]) for one in sequences)
        longer = written / float(found.tokens.sum()) - 1
        return {"tokens": len(kept), "share": len(kept) / len(merges.tokens), **measured(summarise(found)), "longer": longer}

    return Step("vocabulary", run, settings, ("data", "rollouts"))


def _openings(shop: Workshop, place: Place) -> list[list[int]]:
    """What the teacher goes on from: the beginnings of training sequences, as many as texts are wanted, each another place."""
    sequences = [one.tokens for one in shop.sequences(shop.teacher.tokeniser, place.need("data") / TRAIN) if len(one.tokens) > _OPENING]
    if not sequences:
        raise OptionError("there is nothing for the teacher to go on from; add samples, or set data.rollouts to 0")
    wanted, found = shop.config.data.rollouts, []
    for i in range(wanted):
        tokens = sequences[i % len(sequences)]
        at = (i // len(sequences)) * 37 % max(1, len(tokens) - _OPENING)
        found.append(tokens[at : at + _OPENING])
    return found
