"""The default model finds a fact in what pruning left of a long text, because it was asked for before the pass."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edge_rt
from edge_rt.core.context.pruning import ASKED, plan
from edge_rt.core.engine import Part
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.runtime import Model

_WHO = ("The baker", "A fisherman", "Her aunt", "The old teacher", "Our neighbour", "A young sailor", "The gardener", "His cousin")
_DID = ("walked along", "looked across", "remembered", "wrote a letter about", "drew a picture of", "told a story about", "went back to")
_WHAT = ("the river", "the harbour", "the market", "the snowy hills", "the railway bridge", "the orchard", "the empty square", "the mill")
_WHEN = ("before breakfast", "in the rain", "after the long winter", "on a quiet Sunday", "while the bells were ringing")
_FACT = "The pass key is {0}. Remember it. {0} is the pass key. "
_QUESTION = "\nWhat is the pass key? The pass key is"


def story(seed: int, sentences: int) -> list[str]:
    """Sentences of which none says anything."""
    rng = random.Random(seed)
    return [f"{rng.choice(_WHO)} {rng.choice(_DID)} {rng.choice(_WHAT)} {rng.choice(_WHEN)}. " for _ in range(sentences)]


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[Model]:
    with edge_rt.open(smollm2, context=2048) as opened:
        yield opened


@pytest.mark.parametrize(("depth", "key"), [(0.2, "48213"), (0.5, "70954"), (0.8, "31627")])
def test_a_fact_is_found_in_a_fifth_of_the_cells(model: Model, depth: float, key: str) -> None:
    """Query-aware: the question is fed before the pass. The newest fifth alone does not hold the fact, so pruning must have kept it."""
    engine = model.engine
    assert isinstance(engine, GgmlEngine)
    text = story(int(key), 100)
    text.insert(int(depth * len(text)), _FACT.format(key))
    context, question = model.tokenize("".join(text), bos=False), model.tokenize(_QUESTION, bos=False)
    assert 1000 < len(context) < 2000
    sequence = engine.new_sequence()
    engine.step([Part(sequence, context, "none")])
    answers = {}
    for method in ("defensive", "window"):
        fork = engine.fork_sequence(sequence, len(context))
        engine.watch(fork, ASKED.queries)
        engine.step([Part(fork, question[:-1], "none")])
        chosen = plan(len(context) // 5, asked=True, since=len(question))
        engine.prune(fork, chosen.keep, first=chosen.first, last=chosen.last, method=method)
        tokens = question[-1:]
        found: list[int] = []
        for _ in range(8):
            (logits,) = engine.step([Part(fork, tokens)])
            assert logits is not None
            tokens = [int(np.argmax(np.asarray(logits[0])))]
            found += tokens
        answers[method] = model.detokenize(found)
        engine.free_sequence(fork)
    engine.free_sequence(sequence)
    assert key in answers["defensive"], answers
    assert key not in answers["window"], "the fact was among the newest cells, so this proves nothing"
