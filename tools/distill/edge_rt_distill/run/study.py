"""Steps that look at the teacher: what it does on the samples goes into the library, what its parts are worth into a diagnosis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from edge_rt.hooks import DataError
from edge_rt_distill.behaviour.rewards import reward
from edge_rt_distill.data.batches import question
from edge_rt_distill.data.samples import Sample
from edge_rt_distill.diagnose.diagnosis import diagnose
from edge_rt_distill.diagnose.options import Options
from edge_rt_distill.diagnose.report import write as write_page
from edge_rt_distill.diagnose.rows import Labels
from edge_rt_distill.files import write_file
from edge_rt_distill.library import errors, record, recorded, snapshots
from edge_rt_distill.library.store import Library
from edge_rt_distill.model.rows import TokenSequence
from edge_rt_distill.progress import Told
from edge_rt_distill.run.steps import Place, Step
from edge_rt_distill.run.workshop import TRAIN, Workshop, read_back

_MAPS = 2
"""Samples of a domain whose attention maps are kept."""
_HEADS = 16
"""Heads that are left out in turn to explain an error."""


def library_step(shop: Workshop) -> Step:
    """Records the teacher into the library, domain by domain: answers, activations, attention, errors; and its parameters, once."""
    config = shop.config.library
    settings = {**asdict(config), "teacher": shop.teacher_stamp, "seed": shop.config.run.seed}

    def run(place: Place) -> Mapping[str, Any]:
        library = Library.open(shop.library_folder, create=True)
        samples = [one for one in read_back(place.need("data") / TRAIN) if one.messages]
        samples = sorted(samples, key=lambda one: one.id)[: config.samples or None]  # by content: of all domains
        records: list[str] = []
        if config.snapshot:
            place.told("keeps the parameters", 0, 0)
            records.append(snapshots.store(library, shop.teacher).id)
        summary: dict[str, Any] = {"samples": len(samples)}
        sequences = shop.sequences(shop.teacher.tokeniser, place.need("data") / TRAIN)
        for domain in sorted({one.domain for one in samples}):
            own = [one for one in samples if one.domain == domain]
            made, summary[f"score of {domain}"] = _record(shop, library, domain, own, sequences, place)
            records += made
        write_file(place.folder / "records.txt", "\n".join(records))
        return {**summary, "records": len(records)}

    return Step("library", run, settings, ("data",))


def _record(
    shop: Workshop, library: Library, domain: str, samples: Sequence[Sample], sequences: Sequence[TokenSequence], place: Place
) -> tuple[list[str], float | None]:
    """The records made of a domain, and the mean score of the teacher's answers there. Where none of them fails its checks, references
    that the teacher finds improbable are its errors.
    """
    teacher, config = shop.teacher, shop.config.library
    by_id = {one.id: one for one in samples}

    def told(what: str) -> Told:
        return partial(place.told, f"{domain}: {what}")

    def score(sample: str, text: str, ended: bool) -> float:
        return reward(by_id[sample], text, ended).value

    def failed(sample: str, text: str, ended: bool) -> list[str]:
        return [name for name, value in reward(by_id[sample], text, ended).parts.items() if value < 0.5]

    prompts = [record.Prompt(one.id, question(one, teacher.tokeniser)) for one in samples if one.prompt]
    room = teacher.model.architecture.context - config.answer_tokens
    prompts = [one for one in prompts if len(one.tokens) <= room]
    sequences = [one for one in sequences if one.sample in by_id]
    made, mean, cases = [], None, list[errors.Case]()
    if prompts:
        options = record.Answers(tokens=config.answer_tokens, seed=shop.config.run.seed)
        answers = record.record_trajectories(
            library, teacher, prompts, domain=domain, options=options, score=score, scored_by="checks", told=told("answers")
        )
        made, mean = [answers], answers.score
        cases = errors.failures(recorded.trajectories(library, answers), failed)[: config.errors]
    if config.errors and not cases and sequences:
        cases = errors.improbable(teacher.model, sequences, told=told("improbable references"))[: config.errors]
    if cases:
        made.append(errors.record_errors(library, teacher, cases, domain=domain, heads=_HEADS, told=told("errors explained")))
    if sequences:
        made.append(record.record_activations(library, teacher, sequences, domain=domain, told=told("activations")))
        made.append(record.record_attention(library, teacher, sequences[:_MAPS], domain=domain, told=told("attention")))
    return [one.id for one in made], mean


def diagnose_step(shop: Workshop) -> Step:
    """Measures what of the teacher carries the value on the samples: ``diagnosis.json``, ``diagnosis.npz``, ``diagnosis.html``."""
    options = Options(**asdict(shop.config.diagnose), seed=shop.config.run.seed)
    settings = {**asdict(options), "teacher": shop.teacher_stamp, "length": shop.config.data.length}

    def run(place: Place) -> Mapping[str, Any]:
        train = place.need("data") / TRAIN
        labels = {one.id: Labels(one.domain, one.language) for one in read_back(train)}
        sequences = shop.sequences(shop.teacher.tokeniser, train)
        if not sequences:
            raise DataError("there is no sequence to diagnose the teacher on; add samples")
        found = diagnose(
            shop.teacher, sequences, options, lambda part, done, total: place.told(f"measures {part}", done, total),
            folder=place.folder, labels=labels,
        )  # fmt: skip
        write_page(found, place.folder / "diagnosis.html", f"Diagnosis of {shop.teacher_path.name}")
        _clear(place.folder / "parts")
        return {"findings": len(found.findings), **{f"{one.rank}": one.explanation for one in found.findings[:3]}}

    return Step("diagnose", run, settings, ("data",))


def _clear(folder: Path) -> None:
    """Parts are for resuming; what is done needs them no more."""
    for path in folder.glob("*"):
        path.unlink()
    folder.rmdir()
