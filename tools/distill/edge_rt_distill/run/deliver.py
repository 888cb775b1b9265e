"""Steps that deliver: the student in INT4, corrected, written, and checked in the runtimes that will run it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch

from edge_rt.hooks import NativeError
from edge_rt_distill.compensate import choose as corrections
from edge_rt_distill.compensate import files as side_files
from edge_rt_distill.compensate.report import as_json, table
from edge_rt_distill.data.batches import batches
from edge_rt_distill.evaluate.measures import divergence, measured
from edge_rt_distill.export import export
from edge_rt_distill.files import write_file
from edge_rt_distill.model import snapshot
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.load import read_gguf
from edge_rt_distill.model.rows import beginning, count_tokens
from edge_rt_distill.portable import portable
from edge_rt_distill.quantise import qat
from edge_rt_distill.quantise.matrices import Encoded, Method, Quantised, QuantiseOptions, quantise_model
from edge_rt_distill.run.corrected import budget_of, options_of, write_corrected
from edge_rt_distill.run.mixture import Mixed, held_out
from edge_rt_distill.run.running import against, from_stock, run_logits
from edge_rt_distill.run.shape import STUDENT
from edge_rt_distill.run.steps import Place, Step
from edge_rt_distill.run.teach import clear_training, paced, token_options, training_options, unigram
from edge_rt_distill.run.workshop import Workshop
from edge_rt_distill.stages.gate import Gate
from edge_rt_distill.stages.levels import Level
from edge_rt_distill.stages.material import Material
from edge_rt_distill.stages.trainer import train

QUANTISED = "quantised.gguf"


def quantise_step(shop: Workshop) -> Step:
    """Quantises the student: ``quantised.gguf``."""
    config = shop.config
    settings = {**asdict(config.quantise), "seed": config.run.seed, "length": config.data.length, "batch": config.distil.batch_tokens}

    def run(place: Place) -> Mapping[str, Any]:
        student = portable(snapshot.read(place.need("distil") / STUDENT)[0])
        mixed = Mixed(shop, place)
        how: dict[str, Encoded] = {}
        if config.quantise.type != "F16":
            options = QuantiseOptions(config.quantise.type, config.quantise.embedding, method=cast(Method, config.quantise.method))
            some = beginning(mixed.once(config.run.seed + 1), config.quantise.calibration_tokens, count_tokens)
            calibration = [one.tokens for one in some]
            found = quantise_model(student, calibration, options, partial(place.told, "layers"))
            how = found.tensors
            if config.quantise.aware_tokens:
                how |= _aware(shop, place, student, found, mixed)
        target = place.folder / QUANTISED
        export(
            target, student, shop.taught.tokeniser, matrices=config.quantise.type, embedding=config.quantise.embedding, how=how,
            name=config.name, provenance=_provenance(shop, student),
            told=partial(place.told, "bytes written"),
        )  # fmt: skip
        clear_training(place.folder)
        kept = held_out(shop, place.need("data"))
        written = read_gguf(target)
        return {"bytes": target.stat().st_size, **measured(divergence(written, shop.seen, kept))}

    return Step("quantise", run, settings, ("data", "rollouts", "vocabulary", "distil"))


def _aware(shop: Workshop, place: Place, student: Decoder, start: Quantised, mixed: Mixed) -> dict[str, Encoded]:
    """A last phase of training that computes with what the file will hold, from what was quantised; the bytes then, but for the head's."""
    config = shop.config
    with torch.no_grad():
        student.head_weight.copy_(start.model.head_weight)
    student.requires_grad_(True)
    qat.attach(student, config.quantise.type, scales="fixed", start=start.tensors)
    steps, every = paced(config.quantise.aware_tokens, config.distil)
    level = Level(
        "token", {"token": 1.0}, Gate(1e-9), steps=steps, every=every, learning_rate=config.quantise.aware_rate,
        frozen=("token_embd.*", "output.*"), token=token_options(config.distil),
    )  # fmt: skip
    material = Material(
        epoch=mixed.batches(config.distil.batch_tokens, config.run.seed + 1),
        held_out=list(batches(held_out(shop, place.need("data")), config.distil.batch_tokens, 0, 0)),
        prior=unigram(mixed.all, student.architecture.vocabulary), seed=config.run.seed,
    )  # fmt: skip
    train(
        student, shop.seen, material, training_options(config, place.folder / "training"), levels=[level],
        told=lambda event: place.told(f"trains on the grid: {event.message}", event.step, event.steps),
    )  # fmt: skip
    return qat.detach(student)


def compensate_step(shop: Workshop) -> Step:
    """Finds corrections of the quantised student: ``compensation.json`` and ``.txt`` say which and why."""
    config = shop.config
    settings = {**asdict(config.compensate), "seed": config.run.seed}

    def run(place: Place) -> Mapping[str, Any]:
        source = place.need("quantise") / QUANTISED
        if not config.compensate.bytes:
            write_file(place.folder / "compensation.txt", "No corrections: their budget is 0.\n")
            return {"sites": 0}
        reference = portable(snapshot.read(place.need("distil") / STUDENT)[0])
        quantised = read_gguf(source)
        budget = budget_of(source, len(reference.layers), config.compensate)
        sequences = [one.tokens for one in beginning(Mixed(shop, place).once(config.run.seed + 1), config.compensate.tokens, count_tokens)]
        apart = max(1, len(sequences) // 8)  # of the training data: what is held out of the run judges only in the end
        found = corrections.choose(
            reference, quantised, sequences[apart:], sequences[:apart], budget, options_of(config.compensate, config.run.seed), place.told
        )
        write_file(place.folder / "compensation.json", json.dumps(as_json(found), indent=1, default=str))
        write_file(place.folder / "compensation.txt", table(found) + "\n")
        write_corrected(
            source, place.folder / f"{config.name}.gguf", found, shop.taught.tokeniser, _provenance(shop, quantised),
            biases_in_model=config.compensate.biases_in_model,
        )  # fmt: skip
        kl = {"kl without": found.kl_none, "kl with": found.kl}
        return {"sites": len(found.compensation), "bytes": found.bytes, "microseconds": found.microseconds, **kl}

    return Step("compensate", run, settings, ("data", "rollouts", "vocabulary", "distil", "quantise"))


def _provenance(shop: Workshop, model: Decoder) -> dict[str, str | int]:
    return {"teacher": shop.teacher.digest, "parameters": model.architecture.parameters()}


_MISREAD = 0.01
"""Nats between two runtimes, beyond which one of them reads the file wrongly."""


def verify_step(shop: Workshop) -> Step:
    """Runs what was written in edge-rt and in stock llama.cpp, and measures it against the teacher: ``verify.json``."""
    settings = {"held_out": shop.config.distil.held_out, "length": shop.config.data.length}

    def run(place: Place) -> Mapping[str, Any]:
        corrected = place.need("compensate") / f"{shop.config.name}.gguf"
        model = corrected if corrected.exists() else place.need("quantise") / QUANTISED
        has_side = side_files.side_path(model).exists()
        sequences = held_out(shop, place.need("data"))
        found: dict[str, Any] = {"file": str(model.relative_to(shop.folder)), "bytes": model.stat().st_size}
        for name, applied in (("off", "off"), ("corrected", "auto"))[: 1 + has_side]:
            logits = run_logits(model, sequences, compensation=applied, told=partial(place.told, f"runs it, compensation {applied}"))
            found[name] = measured(against(shop.seen, sequences, logits))
        if has_side:
            side = side_files.side_path(model)
            found |= {"compensation": str(side.relative_to(shop.folder)), "compensation bytes": side.stat().st_size}
        found["kl from stock llama.cpp"] = from_stock(model, sequences[:4])
        write_file(place.folder / "verify.json", json.dumps(found, indent=1))
        if found["kl from stock llama.cpp"] > _MISREAD:
            raise NativeError(f"{model} says other things in edge-rt than in stock llama.cpp; report this with the file's header")
        return {"file": found["file"], "bytes": found["bytes"], **found.get("corrected", found["off"])}

    return Step("verify", run, settings, ("data", "vocabulary", "quantise", "compensate"))
