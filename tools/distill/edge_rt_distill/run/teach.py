"""Steps that teach: what the teacher answers is sampled and scored, then the student goes through the four levels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from edge_rt_distill.behaviour.examples import Example, Pair
from edge_rt_distill.behaviour.rewards import load_reward, reward
from edge_rt_distill.behaviour.rollouts import Choice, Sampling, Trajectory, imitation, pairs, trajectories
from edge_rt_distill.data.batches import batches, question
from edge_rt_distill.data.samples import Sample
from edge_rt_distill.diagnose.diagnosis import Diagnosis
from edge_rt_distill.evaluate.evaluator import Context, Score, Task, load_evaluator, scorer
from edge_rt_distill.evaluate.measures import divergence, measured
from edge_rt_distill.files import write_file
from edge_rt_distill.losses.attention import match_heads, priorities
from edge_rt_distill.losses.token import Kind, TokenOptions
from edge_rt_distill.model import snapshot
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.precision import Precision, best
from edge_rt_distill.model.rows import TokenSequence
from edge_rt_distill.run.config import Config, DistilConfig
from edge_rt_distill.run.mixture import Mixed, held_out
from edge_rt_distill.run.shape import CUT, STUDENT
from edge_rt_distill.run.steps import Place, Step
from edge_rt_distill.run.workshop import HELD_OUT, TRAIN, Workshop, read_back
from edge_rt_distill.stages.gate import PATIENCE, Gate
from edge_rt_distill.stages.levels import LEVELS as STANDARD
from edge_rt_distill.stages.levels import Level
from edge_rt_distill.stages.material import Answers, Material
from edge_rt_distill.stages.state import LevelResult
from edge_rt_distill.stages.trainer import Event, Options, train
from edge_rt_distill.surgery.cut import Cut
from edge_rt_distill.surgery.reparam import Form, attach, fold

ANSWERS, RESULTS = "answers.jsonl", "levels.json"
TEACHING = ("data", "rollouts", "vocabulary", "diagnose", "cut", "answers")
"""Steps that teaching needs."""


def answers_step(shop: Workshop) -> Step:
    """The teacher's answers to the questions of the samples, several to each, with what they were rewarded: ``answers.jsonl``."""
    config = shop.config.behaviour
    settings = {**asdict(config), "teacher": shop.teacher_stamp, "seed": shop.config.run.seed, "wanted": _wanted(shop.config)}

    def run(place: Place) -> Mapping[str, Any]:
        if not _wanted(shop.config):
            write_file(place.folder / ANSWERS, "")
            return {"answers": 0}
        samples = [one for one in read_back(place.need("data") / TRAIN) if one.prompt]
        samples = sorted(samples, key=lambda one: one.id)[: config.prompts]
        found = trajectories(
            shop.taught.model, shop.taught.tokeniser, samples, _sampling(shop.config), file=place.folder / ANSWERS,
            origin=shop.teacher.digest, score=load_reward(config.reward),
            told=partial(place.told, "the teacher answers"),
        )  # fmt: skip
        rewards = [one.reward for one in found]
        return {"answers": len(found), "reward": sum(rewards) / len(rewards), "ended": sum(one.ended for one in found) / len(found)}

    return Step("answers", run, settings, ("data", "vocabulary"))


def _wanted(config: Config) -> bool:
    return config.distil.behaviour.tokens > 0


def _sampling(config: Config) -> Sampling:
    one = config.behaviour
    return Sampling(one.per_prompt, one.tokens, one.temperature, seed=config.run.seed, reward=one.reward)


def distil_step(shop: Workshop) -> Step:
    """Takes the student through the levels: ``student``, ``levels.json`` with how each ended, ``log.jsonl`` with every step."""
    config = shop.config
    settings = {**asdict(config.distil), "side": config.student.side_rank, "seed": config.run.seed, "length": config.data.length}

    def run(place: Place) -> Mapping[str, Any]:
        student, results = teach(shop, place, levels(config.distil))
        found = measured(divergence(student, shop.seen, held_out(shop, place.need("data"))))
        snapshot.save(place.folder / STUDENT, student, shop.taught.tokeniser)
        write_file(place.folder / RESULTS, json.dumps([one._asdict() for one in results], indent=1))
        return {"gates open": sum(one.opened for one in results), "levels": len(results), **found}

    return Step("distil", run, settings, TEACHING)


def teach(shop: Workshop, place: Place, planned: Sequence[Level], to_limit: bool = False) -> tuple[Decoder, list[LevelResult]]:
    """The cut student after some levels, as plain matrices, and how the levels ended. ``to_limit``: open gates end none of them.

    Resumes what is in the place, and clears it of checkpoints when it is done.
    """
    config, results = shop.config, list[LevelResult]()
    student, _ = snapshot.read(place.need("cut") / STUDENT)
    student.requires_grad_(True)
    if config.student.side_rank:
        attach(student, Form("low_rank", rank=config.student.side_rank, seed=config.run.seed))
    if planned:
        material = _material(shop, place, student)
        possible = [one for one in (_possible(level, material, place) for level in planned) if one is not None]
        results = train(
            student, shop.seen, material, training_options(config, place.folder / "training", to_limit),
            levels=possible, scorer=score_of(shop, place), told=lambda event: _tell(place, event),
        )  # fmt: skip
    fold(student)
    clear_training(place.folder)
    return student, results


def training_options(config: Config, folder: Path, to_limit: bool = False) -> Options:
    """How is trained in a folder."""
    said = config.distil.precision
    return Options(folder, to_limit=to_limit, precision=best() if said == "auto" else cast(Precision, said))


def clear_training(folder: Path) -> None:
    """Keep what training logged; its checkpoints, several times the student's size, are for resuming."""
    training = folder / "training"
    if (training / "log.jsonl").exists():
        (training / "log.jsonl").rename(folder / "log.jsonl")
    if training.exists():
        shutil.rmtree(training)


def levels(config: DistilConfig) -> list[Level]:
    """The levels of a run: the standard ones with what the file says of each; a level without tokens is left out."""
    found = []
    for standard in STANDARD:
        said = getattr(config, standard.name)
        if said.tokens:
            steps, every = paced(said.tokens, config)
            found.append(
                standard._replace(
                    gate=Gate(said.threshold or standard.gate.threshold), steps=steps, every=every, learning_rate=said.learning_rate,
                    frozen=("token_embd.*", "output.*") if config.freeze_embedding else (), score_patience=config.patience,
                    token=token_options(config),
                )
            )  # fmt: skip
    return found


def token_options(config: DistilConfig) -> TokenOptions:
    """Those of the token term: the standard ones, with what a run says of them."""
    standard = STANDARD[0].token._replace(kind=cast(Kind, config.divergence), cross_entropy=config.cross_entropy)
    if config.top_k:
        return standard._replace(head=config.top_k, beta=0.0)
    return standard if config.decoupled else standard._replace(head=0)


def paced(tokens: int, config: DistilConfig) -> tuple[int, int]:
    """(steps, steps between evaluations) that some tokens make: as many evaluations at least as a gate waits for."""
    steps = max(1, tokens // config.batch_tokens)
    return steps, max(1, min(steps // PATIENCE, config.evaluate_every // config.batch_tokens))


def _possible(level: Level, material: Material, place: Place) -> Level | None:
    """The level without the terms that there is nothing to learn from, which is told; None where nothing is left to be judged on."""
    there = {"imitation": material.examples, "preference": material.pairs, "on_policy": material.prompts}
    missing = [term for term in level.terms if not there.get(term, True)]
    if level.name == "behaviour" and not material.held_out_examples:
        place.told("level behaviour is left out: no answer of the teacher is good enough to be judged on; see [behaviour]", 0, 0)
        place.log({"event": "left out", "level": level.name, "reason": "no held-out answers"})
        return None
    for term in missing:
        place.told(f"level {level.name}: nothing to learn from for {term}, which is left out", 0, 0)
        place.log({"event": "left out", "level": level.name, "term": term})
    return level._replace(terms={term: weight for term, weight in level.terms.items() if term not in missing})


def _material(shop: Workshop, place: Place, student: Decoder) -> Material:
    """What the levels learn from and are judged on."""
    config, teacher = shop.config, shop.taught
    mixed = Mixed(shop, place)
    if mixed.weights:
        place.log({"event": "mixture", **{name: share._asdict() for name, share in mixed.mixture(0).shares.items()}})
    learnt, kept, better = _answered(shop, place)
    diagnosis = Diagnosis.read(place.need("diagnose"))
    cut = Cut.from_json(json.loads((place.need("cut") / CUT).read_text(encoding="utf-8")))
    heads = match_heads(student.architecture, teacher.model.architecture, heads=[one.heads for one in cut.layers])
    importance = torch.from_numpy(diagnosis.arrays["path_heads"])
    prompts = [question(one, teacher.tokeniser) for one in _asking(place)]
    return Material(
        epoch=mixed.batches(config.distil.batch_tokens, config.run.seed),
        held_out=list(batches(held_out(shop, place.need("data")), config.distil.batch_tokens, 0, 0)), examples=learnt,
        held_out_examples=kept, pairs=better,
        prompts=prompts, answers=Answers(100, 1.0, teacher.tokeniser.end), prior=unigram(mixed.all, teacher.model.architecture.vocabulary),
        heads=heads, head_importance={one.student: priorities(importance[one.teacher][list(one.heads)]) for one in heads},
        seed=config.run.seed,
    )  # fmt: skip


def _asking(place: Place) -> list[Sample]:
    return [one for one in read_back(place.need("data") / TRAIN) if one.prompt]


def _answered(shop: Workshop, place: Place) -> tuple[list[Example], list[Example], list[Pair]]:
    """Answers to imitate, others to be judged on (of other questions), and pairs of a better and a worse."""
    lines = (place.need("answers") / ANSWERS).read_text(encoding="utf-8").splitlines()
    found = [Trajectory.from_json(one) for one in map(json.loads, lines) if "prompt" in one]
    apart = {one.sample for one in found if int(one.sample, 16) % 8 == 0}
    choice, tokeniser = Choice(), shop.taught.tokeniser
    learnt = [one for one in found if one.sample not in apart]
    judged = [one for one in found if one.sample in apart]
    return imitation(learnt, tokeniser, choice), imitation(judged, tokeniser, choice), pairs(learnt, tokeniser, choice)


def unigram(sequences: Sequence[TokenSequence], vocabulary: int) -> Tensor:
    """Log of the unigram distribution [V] of some sequences, one added to every count."""
    counts = torch.ones(vocabulary)
    for one in sequences:
        counts += torch.bincount(torch.tensor(one.tokens), minlength=vocabulary)
    return (counts / counts.sum()).log()


def score_of(shop: Workshop, place: Place) -> Callable[[Decoder], Score]:
    """The composite score of a student: on held-out sequences, and on answers to held-out questions."""
    config, teacher = shop.config, shop.taught
    asked = [one for one in read_back(place.need("data") / HELD_OUT) if one.prompt][: config.distil.asked]
    tasks = [Task(question(one, teacher.tokeniser), _rewarded(one)) for one in asked]
    context = Context(
        held_out(shop, place.need("data")), tasks, tokens=config.behaviour.tokens, end=teacher.tokeniser.end,
        decode=teacher.tokeniser.decode, seen=shop.seen, tokeniser=teacher.tokeniser,
    )  # fmt: skip
    name = config.distil.evaluator
    return scorer(load_evaluator(name), teacher.model, context, name)


def _rewarded(sample: Sample) -> Callable[[str, bool], float]:
    return lambda text, ended: reward(sample, text, ended).value


def _tell(place: Place, event: Event) -> None:
    if event.kind == "step":
        place.told(f"level {event.level}: {event.message}", event.step, event.steps)
    else:
        place.told(f"level {event.level}: {event.message}", 0, 0)
        place.log({"event": event.kind, **event.values})
