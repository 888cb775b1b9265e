"""The default model finds a fact in what pruning left of a long text, because it was asked for before the pass."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import edge_rt
from edge_rt.core.engine import SequenceBatch
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.kv.pruning import ASKED, plan
from edge_rt.model import Model

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


@pytest.mark.parametrize(
    ("depth", "key"),
    [(0.2, "48213"), pytest.param(0.5, "70954", marks=pytest.mark.soak), pytest.param(0.8, "31627", marks=pytest.mark.soak)],
)
def test_a_fact_is_found_in_a_fifth_of_the_cells(model: Model, depth: float, key: str) -> None:
    """Query-aware: the question is fed before the pass. The newest fifth alone does not hold the fact, so pruning must have kept it."""
    engine = model.engine
    assert isinstance(engine, GgmlEngine)
    text = story(int(key), 100)
    text.insert(int(depth * len(text)), _FACT.format(key))
    context, question = model.tokenize("".join(text), bos=False), model.tokenize(_QUESTION, bos=False)
    assert 1000 < len(context) < 2000
    sequence = engine.new_sequence()
    engine.step([SequenceBatch(sequence, context, "none")])
    answers = {}
    for method in ("defensive", "window"):
        fork = engine.fork_sequence(sequence, len(context))
        engine.watch(fork, ASKED.queries)
        engine.step([SequenceBatch(fork, question[:-1], "none")])
        chosen = plan(len(context) // 5, asked=True, since=len(question))
        engine.prune(fork, chosen.keep, first=chosen.first, last=chosen.last, method=method)
        tokens = question[-1:]
        found: list[int] = []
        for _ in range(8):
            (logits,) = engine.step([SequenceBatch(fork, tokens)])
            assert logits is not None
            tokens = [int(np.argmax(np.asarray(logits[0])))]
            found += tokens
        answers[method] = model.detokenize(found)
        engine.free_sequence(fork)
    engine.free_sequence(sequence)
    assert key in answers["defensive"], answers
    assert key not in answers["window"], "the fact was among the newest cells, so this proves nothing"


def test_a_prompt_longer_than_the_context_through_the_program(smollm2: Path, tmp_path: Path) -> None:
    """Read chunk by chunk, each pruned for the question at the end: the fact is in the first of them."""
    text = story(5, 110)
    text.insert(8, _FACT.format("59317"))
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("".join(text) + _QUESTION)
    command = [sys.executable, "-m", "edge_rt.cli.main", "run", "-m", str(smollm2), "--raw", "--json", "--temp", "0", "-n", "8"]
    command += ["-c", "1024", "--prune", "400", "-f", str(prompt)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=240, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    use, usage = events[-1]["context"], events[-1]["usage"]
    assert usage["prompt_tokens"] == usage["computed_tokens"] > 1300
    assert "59317" in "".join(event["text"] for event in events if event["event"] == "delta")
    assert use["used"] <= 450
    assert use["pruned_cells"] == use["missing_cells"] > 800
    assert use["released_bytes"] > 0
    assert use["evicted_tokens"] == use["absent_tokens"] == 0
    assert any("cells were pruned" in event["message"] for event in events if event["event"] == "notice")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prune", "lots"], "--prune takes cells as 1024, a size as 64M or a share as 25%, and not 'lots'"),
        (["--prune", "x%"], "--prune takes cells as 1024"),
        (["--prune", "150%"], "a pruning budget of 1.5 share is out of range; give up to 1"),
        (["--prune", "0"], "a pruning budget of 0 cells is out of range"),
        (["--prune-every", "9"], "--prune-every says when to prune and --prune how far; give both"),
    ],
)
def test_budgets_that_are_none(smollm2: Path, words: list[str], message: str) -> None:
    command = [sys.executable, "-m", "edge_rt.cli.main", "run", "-m", str(smollm2), *words, "Hi"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=240, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    assert message in done.stderr
