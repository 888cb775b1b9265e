"""A quantised model with its corrections, as files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from edge_rt.hooks import ModelFile, compensation_fingerprint
from edge_rt_distill.compensate import files as side_files
from edge_rt_distill.compensate.choose import Options, Result
from edge_rt_distill.compensate.cost import Budget, Costs
from edge_rt_distill.compensate.tune import Schedule
from edge_rt_distill.export import export
from edge_rt_distill.model.load import read_gguf, tensors
from edge_rt_distill.model.tokens import Tokeniser
from edge_rt_distill.quantise.matrices import Encoded
from edge_rt_distill.run.config import CompensateConfig

_NODES, _GIGABYTES_PER_SECOND = 12, 24.0
"""Of a layer in the runtime's graph, about; at which a step reads weights. SmolLM2 in Q4_0 then takes 6.2 ms, where 5.9 were measured."""


def budget_of(path: Path, layers: int, config: CompensateConfig) -> Budget:
    """What corrections of a model file may take. A step's time is projected, not measured: a run that is resumed decides the same."""
    costs, size = Costs(), path.stat().st_size
    step = size / (_GIGABYTES_PER_SECOND * 1e3) + _NODES * layers * costs.node
    return Budget.share(size, step, of_bytes=config.bytes, of_time=config.time)


def options_of(config: CompensateConfig, seed: int) -> Options:
    """How corrections are chosen and trained."""
    base = Options()
    schedule = replace(base.tuning or Schedule(), seed=seed, norm_rate=config.norm_rate)
    steps = max(1, config.tune_tokens // schedule.batch_tokens)
    tuning = replace(schedule, steps=steps, every=max(1, min(schedule.every, steps // 4))) if config.tune_tokens else None
    return replace(base, tuning=tuning)


def write_corrected(
    source: Path, target: Path, found: Result, tokeniser: Tokeniser, provenance: Mapping[str, str | int], *, biases_in_model: bool = False
) -> None:
    """Write a model again, matrix by matrix the same bytes, with the norms that tuning changed; its side file; and the low rank part as
    an adapter for stock llama.cpp, ``STEM.lora.gguf``. ``biases_in_model``: biases become tensors of the model, which stock llama.cpp adds
    too. Raises UserError where they cannot be written, UnsupportedModel for biases of a model that llama.cpp reads none of.
    """
    model, storage = read_gguf(source), Options().forms.storage
    with torch.no_grad():
        for name, weight in found.norms.items():
            tensors(model)[name].copy_(weight)
    rest, biases = found.compensation, dict[str, torch.Tensor]()
    if biases_in_model:
        rest, biases = side_files.without_biases(rest), side_files.bias_tensors(rest)
    export(target, model, tokeniser, how=raw_tensors(source), biases=biases, name=target.stem, provenance=provenance)
    if rest:
        family = model.architecture.family
        side_files.write_side_file(side_files.side_path(target), rest, architecture=family, model=fingerprint(target), storage=storage)
        side_files.write_lora(target.with_name(f"{target.stem}.lora.gguf"), rest, architecture=family, storage=storage)


def raw_tensors(path: Path) -> dict[str, Encoded]:
    """The matrices of a GGUF as they lie in it."""
    file = ModelFile.open(path)
    try:
        found = {}
        for name, info in file.header.tensors.items():
            if len(info.shape) == 2:
                raw = np.frombuffer(file.map, np.uint8, info.nbytes, info.offset).copy()
                found[name] = Encoded(info.type_name, raw.reshape(info.shape[1], -1))
        return found
    finally:
        file.close()


def fingerprint(path: Path) -> str:
    """By which a side file knows its model."""
    file = ModelFile.open(path)
    try:
        return compensation_fingerprint(file)
    finally:
        file.close()
