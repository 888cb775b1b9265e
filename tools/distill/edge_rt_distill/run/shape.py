"""The step that cuts: from the diagnosis and the budget to a student with the teacher's weights, repaired by least squares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, cast

from edge_rt_distill.data.batches import batches
from edge_rt_distill.evaluate.measures import divergence, measured
from edge_rt_distill.files import write_file
from edge_rt_distill.model import snapshot
from edge_rt_distill.model.architecture import Architecture
from edge_rt_distill.model.divergence import reference
from edge_rt_distill.model.rows import Rows, TokenSequence, beginning, count_tokens
from edge_rt_distill.run.config import Config, StudentConfig
from edge_rt_distill.run.mixture import Mixed, held_out
from edge_rt_distill.run.steps import Place, Step
from edge_rt_distill.run.workshop import Workshop
from edge_rt_distill.surgery.apply import apply
from edge_rt_distill.surgery.cost import cost_of
from edge_rt_distill.surgery.cut import Cut, student_architecture, whole
from edge_rt_distill.surgery.evidence import Evidence, read_evidence
from edge_rt_distill.surgery.explain import explain, explain_measured, explain_repair
from edge_rt_distill.surgery.options import PARTS, Budget, PlanOptions
from edge_rt_distill.surgery.plan import candidates
from edge_rt_distill.surgery.probe import calibrated, of_each_layer, select
from edge_rt_distill.surgery.repair import repair

STUDENT, CUT = "student", "cut.json"
_PROBED = 2048
"""Tokens on which cuts are compared."""


def cut_step(shop: Workshop) -> Step:
    """Cuts the teacher: ``student`` (a snapshot), ``cut.json`` with every decision and its reason, ``cut.txt`` for people."""
    config = shop.config.student
    learning = shop.config.distil
    settings = {
        **asdict(config), "seed": shop.config.run.seed, "length": shop.config.data.length, "batch": learning.batch_tokens,
        "held_out": learning.held_out, "weights": shop.config.data.weights,
    }  # fmt: skip

    def run(place: Place) -> Mapping[str, Any]:
        teacher = shop.taught.model
        sequences = Mixed(shop, place).once(shop.config.run.seed)
        text, cut = _choose(shop, place, sequences)
        student, kept = apply(teacher, cut), held_out(shop, place.need("data"))
        unrepaired = {}
        if config.repair_tokens and cut != whole(teacher.architecture):
            unrepaired = {"unrepaired": measured(divergence(student, shop.seen, kept))}
            place.told("repairs", 0, 0)
            some = some_batches(sequences, config.repair_tokens, shop.config)
            text.append(explain_repair(repair(student, teacher, cut, some, told=partial(place.told, "repairs"))))
        found = divergence(student, shop.seen, kept)
        snapshot.save(place.folder / STUDENT, student, shop.taught.tokeniser)
        write_file(place.folder / CUT, json.dumps(cut.to_json(), indent=1))
        write_file(place.folder / "cut.txt", "\n\n".join(text) + "\n")
        parameters = student_architecture(teacher.architecture, cut).parameters()
        share = parameters / shop.teacher.model.architecture.parameters()
        return {"parameters": parameters, "share": share, **measured(found), **unrepaired}

    return Step("cut", run, settings, ("data", "rollouts", "vocabulary", "diagnose"))


def _choose(shop: Workshop, place: Place, sequences: list[TokenSequence]) -> tuple[list[str], Cut]:
    """What was decided and why, and the cut that loses least when it is made."""
    teacher, config, budget = shop.taught.model, shop.config.student, _budget(shop)
    if budget == Budget() and not (config.drop or config.ffn):
        return ["Nothing is cut: the budget allows all layers as they are."], whole(teacher.architecture)
    evidence: Evidence = read_evidence(place.need("diagnose") / "diagnosis.npz", teacher.architecture)
    probed = reference(teacher, some_batches(sequences, _PROBED, shop.config))
    options = plan_options(config, teacher.architecture)
    if options.widths == "free" and "ffn" in options.allow:
        evidence = of_each_layer(evidence, teacher, probed, told=partial(place.told, "tries each layer"))
    evidence = calibrated(evidence, teacher, probed, options, told=partial(place.told, "tries small cuts"))
    found = select(
        teacher, candidates(evidence, teacher.architecture, budget, options, most=6), probed,
        told=partial(place.told, "compares cuts"),
    )  # fmt: skip
    return [explain_measured(found), explain(found[0].cut, teacher.architecture)], found[0].cut


def _budget(shop: Workshop) -> Budget:
    """What layers may take. The file's shares are of the whole teacher's; tokens that are left out have made it smaller already."""
    config = shop.config.student
    before, now = (cost_of(one.model.architecture) for one in (shop.teacher, shop.taught))
    parameters = config.parameters * before.parameters / now.parameters
    speed = before.time / now.time / config.speed if config.speed else 1.0
    return Budget(parameters=parameters if parameters < 1 else None, speed=speed if speed < 1 else None)


def plan_options(config: StudentConfig, teacher: Architecture) -> PlanOptions:
    """How a plan of this teacher is made."""
    by_name = {"depth": ("depth",), "width": ("ffn",), "heads": ("heads", "groups"), "hidden": ("hidden",), "sharing": ()}
    allowed = tuple(part for part in PARTS if any(part in by_name[method] for method in config.methods))
    automatic = "equal" if teacher.qk_norm or config.ffn else "free"
    return PlanOptions(
        allow=allowed, drop=tuple(config.drop) or None, ffn=config.ffn or None, share=config.share if "sharing" in config.methods else 0,
        merge=tuple((one, one + 1) for one in config.merge), channels="grouped" if config.grouped else "exact",
        widths=cast("Any", automatic if config.widths == "auto" else config.widths),
    )  # fmt: skip


def some_batches(sequences: list[TokenSequence], tokens: int, config: Config) -> list[Rows]:
    """Batches of the first sequences that have so many tokens together."""
    return list(batches(beginning(sequences, tokens, count_tokens), config.distil.batch_tokens, config.run.seed, 0))
