"""What a run learns from and is measured on: its samples and what the teacher wrote, in the shares that its file asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from edge_rt.hooks import OptionError
from edge_rt_distill.data.batches import Mixture, batches, mix
from edge_rt_distill.data.samples import Sample
from edge_rt_distill.files import write_file
from edge_rt_distill.model.rows import Rows, TokenSequence, count_tokens
from edge_rt_distill.model.tokens import Tokeniser
from edge_rt_distill.run.config import DataConfig
from edge_rt_distill.run.steps import Place
from edge_rt_distill.run.workshop import HELD_OUT, ROLLOUTS, TRAIN, Workshop, shuffled

SETS = "sets.json"
"""Beside the samples: the ids of those that each entry of ``data.samples`` gave, in its order."""
WRITTEN = "what the teacher writes"


def write_sets(folder: Path, sets: Sequence[Sequence[Sample]]) -> None:
    """Remember which samples came from which entry. Raises UserError."""
    write_file(folder / SETS, json.dumps([[one.id for one in some] for some in sets]))


def check_weights(config: DataConfig) -> None:
    """Raises OptionError if there is not one for everything that is learnt from."""
    names = _sources(config)
    if config.weights and (len(config.weights) != len(names) or len(set(names)) < len(names) or not any(config.weights)):
        raise OptionError(f"data.weights has {len(config.weights)} numbers; give one, not all 0, for each of {', '.join(names)}")


def _sources(config: DataConfig) -> list[str]:
    """All that is learnt from, as ``data.weights`` has them."""
    return [*config.samples, *([WRITTEN] if config.rollouts or config.chats else [])]


class Mixed:
    """Sequences to learn from, epoch by epoch: all of them, or with ``data.weights`` as many tokens in those shares."""

    def __init__(self, shop: Workshop, place: Place) -> None:
        config = shop.config.data
        names, tokeniser = _sources(config), shop.taught.tokeniser
        own = shop.sequences(tokeniser, place.need("data") / TRAIN)
        written = shop.sequences(tokeniser, place.need("rollouts") / ROLLOUTS) if WRITTEN in names else []
        self.all = own + written
        self.weights: Mapping[str, float] = {}
        self.sources: Mapping[str, list[TokenSequence]] = {}
        if config.weights:
            groups = dict(zip(names, (*_grouped(place.need("data"), own), written), strict=False))
            self.weights = {name: weight for name, weight in zip(names, config.weights, strict=True) if weight}
            self.sources = {name: groups[name] for name in self.weights}

    def epoch(self, number: int) -> list[TokenSequence]:
        """What is learnt from then."""
        return self.mixture(number).sequences if self.weights else self.all

    def once(self, seed: int) -> list[TokenSequence]:
        """The first epoch's, none of them twice, in an order of ``seed``: whoever sets some apart shares none with the rest."""
        return shuffled(list({id(one): one for one in self.epoch(0)}.values()), seed)

    def mixture(self, number: int) -> Mixture:
        """The same with what each source gave, where there are weights: as many tokens as all sources have together. Raises DataError
        for a source that has a weight and no samples.
        """
        tokens = sum(count_tokens(one) for some in self.sources.values() for one in some)
        return mix(self.sources, self.weights, tokens, seed=0, epoch=number)

    def batches(self, batch_tokens: int, seed: int) -> Callable[[int, int], Iterator[Rows]]:
        """(epoch, batch) -> the batches from there on, as training wants them."""
        return lambda number, start: batches(self.epoch(number), batch_tokens, seed, number, start)


def held_out(shop: Workshop, data: Path, tokeniser: Tokeniser | None = None) -> list[TokenSequence]:
    """The sequences that students are measured on: some of all kinds, with ``data.weights`` in those shares as far as there are any.

    ``tokeniser``: another than the student's will be.
    """
    config, count = shop.config.data, shop.config.distil.held_out
    found = shuffled(shop.sequences(tokeniser or shop.taught.tokeniser, data / HELD_OUT), 0)
    weights = config.weights[: len(config.samples)]
    if not any(weights):
        return found[:count]
    chosen: list[TokenSequence] = []
    for weight, some in zip(weights, _grouped(data, found), strict=True):
        chosen += some[: round(count * weight / sum(weights))]
    return shuffled(chosen, 0)


def _grouped(data: Path, sequences: Sequence[TokenSequence]) -> list[list[TokenSequence]]:
    """By the entry of ``data.samples`` that they came from; of two that have the same text, the first."""
    sets = json.loads((data / SETS).read_text(encoding="utf-8"))
    owner = {sample: number for number, ids in reversed(list(enumerate(sets))) for sample in ids}
    found: list[list[TokenSequence]] = [[] for _ in sets]
    for one in sequences:
        found[owner[one.sample]].append(one)
    return found
