"""What the library records of a teacher, against the teacher itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from edge_rt_distill.library import snapshots
from edge_rt_distill.library.attribution import Aim, explain_answer
from edge_rt_distill.library.care import verify
from edge_rt_distill.library.catalogue import Query, Record
from edge_rt_distill.library.errors import failures, improbable, record_errors
from edge_rt_distill.library.record import (
    Answers,
    Prompt,
    attention_maps,
    record_activations,
    record_attention,
    record_trajectories,
)
from edge_rt_distill.library.recorded import activations, attention, errors, trajectories
from edge_rt_distill.library.store import Library
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.generate import generate
from edge_rt_distill.model.load import Teacher, load
from edge_rt_distill.model.rows import grouped

from edge_rt.hooks import Cancelled, DataError, OptionError, UserError


class Row(NamedTuple):
    sample: str
    tokens: list[int]
    targets: list[bool]


@pytest.fixture(scope="module")
def teacher(tiny: Path) -> Teacher:
    return load(tiny)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library.open(tmp_path / "library", create=True)


@pytest.fixture(scope="module")
def rows(teacher: Teacher) -> list[Row]:
    source = torch.Generator().manual_seed(5)
    made = []
    for i in range(9):
        length = 3 + int(torch.randint(0, 40, (1,), generator=source))
        tokens = torch.randint(3, teacher.model.architecture.vocabulary, (length,), generator=source).tolist()
        made.append(Row(f"sample-{i // 2}", tokens, [t >= 2 for t in range(length)]))
    return made


def truth(model: Decoder, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [T, V], one sequence at a time and in float64."""
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens])).hidden[0]).double().log_softmax(-1)


def stop_after(samples: int) -> Callable[[int, int], None]:
    def told(done: int, total: int) -> None:
        if done >= samples:
            raise Cancelled("stopped by the test")

    return told


def test_trajectories_are_what_the_teacher_says(library: Library, teacher: Teacher, rows: list[Row]) -> None:
    prompts = [Prompt(f"p{i}", row.tokens) for i, row in enumerate(rows)]
    options = Answers(tokens=7, top=4, rollouts=2, temperature=0.8, seed=3, batch=4, shard=4)
    steps: list[tuple[int, int]] = []
    score = lambda sample, text, ended: 0.25 if sample == "p0" else None if sample == "p1" else 0.75  # noqa: E731
    record = record_trajectories(
        library, teacher, prompts, domain="finance", options=options, score=score, told=lambda *step: steps.append(step)
    )
    found = list(trajectories(library, record))
    assert [(one.sample, one.rollout) for one in found] == [(f"p{i}", j) for i in range(9) for j in range(2)]
    for one in found:
        logp = truth(teacher.model, one.prompt + one.answer)[len(one.prompt) - 1 : -1]
        assert one.prompt == list(prompts[int(one.sample[1:])].tokens)
        np.testing.assert_allclose(one.logprobs, logp[range(len(one.answer)), one.answer], atol=2e-5)
        best = logp.topk(4)
        np.testing.assert_allclose(one.top_logprobs, best.values, atol=2e-5)
        assert (one.top_ids == best.indices.numpy()).all()
        np.testing.assert_allclose(np.exp(one.top_logprobs).sum(-1) + one.tail, 1.0, atol=1e-5)
        np.testing.assert_allclose(one.entropy, -(logp.exp() * logp).sum(-1), atol=1e-4)
        assert one.text == teacher.tokeniser.decode(one.answer)
        assert one.facts["batch_tokens"] >= len(one.answer)
        assert one.facts["batch_seconds"] > 0
    assert found[0].answer != found[1].answer
    assert record.score == pytest.approx((0.25 * 2 + 0.75 * 14) / 16)
    assert record.facts["tokens"] == sum(len(one.answer) for one in found)
    assert record.facts["mean_logprob"] == pytest.approx(np.mean(np.concatenate([one.logprobs for one in found])), abs=1e-5)
    assert record.seed == 3
    assert steps[-1] == (9, 9)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert next(library.find(Query("trajectories", teacher.digest, "finance", low=0.6))) == record


def test_greedy_answers_are_generated_ones(library: Library, teacher: Teacher, rows: list[Row]) -> None:
    record = record_trajectories(library, teacher, [Prompt("p", rows[0].tokens)], options=Answers(tokens=5))
    one = next(trajectories(library, record))
    made = generate(teacher.model, [rows[0].tokens], tokens=5, temperature=0.0, end=teacher.tokeniser.end)[0]
    assert one.answer == made.tokens
    assert record.score is None
    np.testing.assert_allclose(one.logprobs, made.logprobs, atol=1e-4)


def test_a_stopped_recording_goes_on_to_the_same(library: Library, tmp_path: Path, teacher: Teacher, rows: list[Row]) -> None:
    prompts = [Prompt(f"p{i}", row.tokens) for i, row in enumerate(rows)]
    options = Answers(tokens=4, temperature=1.0, seed=1, batch=2, shard=2)
    with pytest.raises(Cancelled):
        record_trajectories(library, teacher, prompts, options=options, told=stop_after(5))
    assert library.entries() == []
    parts = sorted(path.name for path in library.unfinished.glob("*/*"))
    assert parts == ["00000000.json", "00000002.json", "begun.json"]
    times = {path: path.stat().st_mtime_ns for path in library.unfinished.glob("*/0*")}
    with pytest.raises(Cancelled):
        record_trajectories(library, teacher, prompts, options=options, told=stop_after(7))
    assert {path: path.stat().st_mtime_ns for path in times} == times
    went_on = record_trajectories(library, teacher, prompts, options=options)
    fresh = Library.open(tmp_path / "fresh", create=True)
    at_once = record_trajectories(fresh, teacher, prompts, options=options)
    arrays = [{name: digest for name, digest in one.objects.items() if name.endswith("npz")} for one in (went_on, at_once)]
    assert arrays[0] == arrays[1]  # the lines have timings
    assert len(arrays[0]) == 5
    assert list(library.unfinished.iterdir()) == []
    assert verify(library) == []


KILLED = """
import os, signal, sys, torch
from edge_rt_distill.library.record import Answers, Prompt, record_trajectories
from edge_rt_distill.library.store import Library
from edge_rt_distill.model.load import load
torch.set_num_threads(1)
def told(done, total):
    if done >= 3:
        os.kill(os.getpid(), signal.SIGKILL)
prompts = [Prompt(f"p{i}", [5 + i, 9, 17]) for i in range(4)]
record_trajectories(Library.open(sys.argv[1]), load(sys.argv[2]), prompts, options=Answers(tokens=3, batch=1, shard=2), told=told)
"""


def test_a_killed_recording_goes_on(library: Library, tiny: Path, teacher: Teacher) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(library.folder), str(tiny)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert verify(library) == []
    assert library.entries() == []
    kept = {path.name: path.read_bytes() for path in library.unfinished.glob("*/0*.json")}
    assert list(kept) == ["00000000.json"]
    prompts = [Prompt(f"p{i}", [5 + i, 9, 17]) for i in range(4)]
    record = record_trajectories(library, teacher, prompts, options=Answers(tokens=3, batch=1, shard=2))
    first = json.loads(kept["00000000.json"])["objects"]
    assert len(first) == 2
    assert first.items() <= record.objects.items()
    assert [one.sample for one in trajectories(library, record)] == ["p0", "p1", "p2", "p3"]


def test_a_record_of_another_kind_and_damaged_ones_are_refused(library: Library, teacher: Teacher, rows: list[Row]) -> None:
    record = record_activations(library, teacher, rows)
    with pytest.raises(DataError, match="of kind activations"):
        next(trajectories(library, record))
    path = library.path(record.objects["activations.npz"])
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(300)
    with pytest.raises(DataError, match="damaged"):
        activations(library, record)
    path.unlink()
    with pytest.raises(DataError, match="gone"):
        activations(library, record)


def test_activation_maps(library: Library, teacher: Teacher, rows: list[Row]) -> None:
    found = activations(library, record_activations(library, teacher, rows, positions=20, shard=4, batch_tokens=70))
    assert found.rms.shape == (3, 20)
    states = [teacher.model(torch.tensor([row.tokens[:20]]), states=range(3)).states for row in rows]
    for layer in range(3):
        for position in (0, 2, 19):
            these = torch.stack([one[layer][0, position] for one in states if one[layer].shape[1] > position])
            assert found.rms[layer, position] == pytest.approx(float(these.square().mean().sqrt()), rel=1e-5)
            assert found.max[layer, position] == pytest.approx(float(these.abs().max()), rel=1e-5)
            assert found.sequences[position] == len(these)


def test_attention_maps_stay_distributions(library: Library, teacher: Teacher) -> None:
    source = torch.Generator().manual_seed(1)
    long = torch.randint(3, 200, (150,), generator=source).tolist()
    record = record_attention(library, teacher, [Row("long", long, []), Row("short", long[:10], [])], domain="d")
    one, two = attention(library, record)
    assert (one.sample, two.sample) == ("long", "short")
    assert one.maps.shape == (2, 4, 64, 64)
    assert two.maps.shape == (2, 4, 10, 10)
    full = teacher.model(torch.tensor([long[:10]]), attention=(0, 1)).attention
    np.testing.assert_allclose(two.maps, torch.stack([full[0][0], full[1][0]]), atol=1e-3)
    np.testing.assert_allclose(one.maps.astype(np.float32).sum(-1), 1.0, atol=5e-3)
    full = teacher.model(torch.tensor([long]), attention=(1,)).attention[1][0]
    i, j = 40, 12
    block = full[:, one.edges[i] : one.edges[i + 1], one.edges[j] : one.edges[j + 1]]
    np.testing.assert_allclose(one.maps[1, :, i, j], block.sum(-1).mean(-1), rtol=2e-3)
    np.testing.assert_allclose(one.first[1], full[:, :, 0].mean(-1), rtol=1e-4)
    p = full[2].double()
    assert one.entropy[1, 2] == pytest.approx(float(-(p * (p + 1e-300).log()).sum(-1).mean()), rel=1e-4)
    distance = sum(p[q, k] * (q - k) for q in range(150) for k in range(q)) / 150
    assert one.distance[1, 2] == pytest.approx(float(distance), rel=1e-4)


def test_attention_by_few_layers_at_once_is_the_same(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = list(range(5, 60))
    at_once = attention_maps(teacher.model, tokens, 16)
    monkeypatch.setattr("edge_rt_distill.library.record._MAP_BYTES", 1)
    for name, values in attention_maps(teacher.model, tokens, 16).items():
        np.testing.assert_allclose(values, at_once[name], rtol=1e-5, atol=1e-3 if name == "maps" else 1e-6)


def one_head_model(tiny: Path, layer: int, head: int) -> Decoder:
    """A model in which all that is written into the residual stream comes from one head, and that strongly."""
    model = load(tiny).model
    size = model.architecture.head
    for i, block in enumerate(model.layers):
        block.ffn_down.weight.data.zero_()
        for j in range(4):
            columns = block.attn_output.weight.data[:, j * size : (j + 1) * size]
            columns.mul_(30.0 if (i, j) == (layer, head) else 0.0)
    return model


def test_attribution_finds_the_one_head_that_matters(tiny: Path) -> None:
    model = one_head_model(tiny, 1, 2)
    tokens = [5, 17, 40, 9, 33, 21, 60]
    likely = truth(model, tokens)[3:6].argmax(-1).tolist()
    found = explain_answer(model, tokens, Aim([3, 4, 5], likely), heads=None)
    flat = np.array(found.heads, float)
    assert np.unravel_index(np.abs(flat).argmax(), flat.shape) == (1, 2)
    assert abs(flat[1, 2]) > 0.5
    flat[1, 2] = 0.0
    assert np.abs(flat).max() < 1e-4  # the others are nothing
    assert abs(found.layers[1]) > 0.5
    assert found.layers[1] == pytest.approx(found.heads[1][2], abs=1e-4)
    assert abs(found.layers[0]) < 1e-4
    gradients = np.abs(np.array(found.head_gradients))
    assert gradients.argmax() == 1 * 4 + 2
    without = one_head_model(tiny, 0, 9)  # no head at all
    fall = found.value - float(truth(without, tokens)[[3, 4, 5], likely].sum())
    assert found.heads[1][2] == pytest.approx(fall, abs=1e-4)
    chosen = explain_answer(model, tokens, Aim([3, 4, 5], likely), heads=1)
    assert chosen.heads[1][2] == found.heads[1][2]
    assert sum(value is not None for row in chosen.heads for value in row) == 1
    assert found.tokens[6] == 0.0  # what comes after the answer's last prediction cannot matter


def test_gradient_by_input_is_the_slope(teacher: Teacher) -> None:
    tokens, aim = [5, 17, 40, 9, 33, 21, 60], Aim([4, 5], [7, 9], [33, 21])
    found = explain_answer(teacher.model, tokens, aim, heads=0)
    embedded = teacher.model.token_embd(torch.tensor([tokens]))

    def value(scale: torch.Tensor) -> float:
        logp = teacher.model.logits(teacher.model.run(embedded * scale[:, None]).hidden[0]).double().log_softmax(-1)
        return float((logp[[4, 5], [7, 9]] - logp[[4, 5], [33, 21]]).sum())

    assert found.value == pytest.approx(value(torch.ones(7)), abs=1e-4)
    for t in range(7):
        step = 0.01 * torch.eye(7)[t]
        assert found.tokens[t] == pytest.approx((value(1 + step) - value(1 - step)) / 0.02, abs=5e-3)
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    for wrong in (Aim([], []), Aim([7], [1])):
        with pytest.raises(DataError):
            explain_answer(teacher.model, tokens, wrong)


def test_error_cases(library: Library, teacher: Teacher, rows: list[Row]) -> None:
    answered = record_trajectories(library, teacher, [Prompt(f"p{i}", row.tokens) for i, row in enumerate(rows)], options=Answers(tokens=3))
    check = lambda sample, text, ended: ["format: no number", "too short"] if sample in ("p1", "p3") else []  # noqa: E731
    cases = failures(trajectories(library, answered), check)
    assert [case.sample for case in cases] == ["p1", "p3"]
    means = [float(np.mean([truth(teacher.model, r.tokens)[t - 1, r.tokens[t]] for t in range(2, len(r.tokens))])) for r in rows]
    limit = sum(sorted(means)[3:5]) / 2
    unlikely = improbable(teacher.model, rows, below=limit)
    assert [case.tokens for case in unlikely] == [row.tokens for row, mean in zip(rows, means, strict=True) if mean < limit]
    assert len(unlikely) == 4
    with pytest.raises(Cancelled):
        record_errors(library, teacher, [*cases, *unlikely], domain="d", heads=3, told=stop_after(3))
    record = record_errors(library, teacher, [*cases, *unlikely], domain="d", heads=3)
    assert record.facts["cases"] == 6
    assert record.facts["reasons"]["format"] == 2
    found = list(errors(library, record))
    first = found[0]
    assert first["reasons"] == ["format: no number", "too short"]
    assert len(first["pieces"]) == len(first["token_scores"]) == len(first["tokens"])
    logp = truth(teacher.model, first["tokens"])
    at = range(first["first"] - 1, len(first["tokens"]) - 1)
    assert first["value"] == pytest.approx(float(logp[at, first["tokens"][first["first"] :]].sum()), abs=1e-3)
    assert first["right"] is None
    assert sum(value is not None for row in first["heads"] for value in row) == 3
    for case in found[2:]:
        logp = truth(teacher.model, case["tokens"])
        assert case["wrong"] == logp[case["positions"]].argmax(-1).tolist()
        assert case["right"] == [case["tokens"][position + 1] for position in case["positions"]]
        assert case["value"] > 0
        assert len(case["positions"]) <= 8
    assert verify(library) == []


def test_snapshots_are_stored_once_and_come_back(library: Library, tmp_path: Path, tiny: Path, teacher: Teacher) -> None:
    record = snapshots.store(library, teacher, score=0.5)
    objects = sum(len(list(folder.iterdir())) for folder in library.objects.iterdir())
    assert snapshots.store(library, teacher, score=0.5) == record
    changed = load(tiny)
    changed.model.output_norm.weight.data += 1.0
    other = snapshots.store(library, changed._replace(digest="12" * 32))
    same = set(record.objects.values()) & set(other.objects.values())
    assert len(same) == len(record.objects) - 1  # all but the weights
    assert sum(len(list(folder.iterdir())) for folder in library.objects.iterdir()) == objects + 1
    back = snapshots.restore(library, record, tmp_path / "out")
    assert back.digest == teacher.digest
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], value)
    with pytest.raises(OptionError, match="is there already"):
        snapshots.export(library, record, tmp_path / "out")
    used = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    snapshots.restore(library, record, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == used
    path = library.path(record.objects["model.safetensors"])
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"xxxx")
    with pytest.raises(DataError, match="damaged"):
        snapshots.export(library, record, tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["library", "out"]
    assert not list(library.incoming.iterdir())
    with pytest.raises(DataError, match="holds no model"):
        snapshots.export(library, Record("errors", "ab"), tmp_path / "new")


def test_a_full_disk_adds_no_snapshot(library: Library, teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*arguments: object, **named: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("edge_rt_distill.model.snapshot.save_file", full)
    with pytest.raises(UserError, match="No space left"):
        snapshots.store(library, teacher)
    assert library.entries() == []
    assert list(library.incoming.iterdir()) == []


def test_what_cannot_be_recorded(library: Library, teacher: Teacher, rows: list[Row]) -> None:
    for recorder in (record_activations, record_attention, record_trajectories):
        with pytest.raises(DataError, match="no samples"):
            recorder(library, teacher, [])
        with pytest.raises(DataError, match="sample empty has no tokens"):
            recorder(library, teacher, [Row("empty", [], [])])
    with pytest.raises(OptionError):
        record_trajectories(library, teacher, [Prompt("p", [1] * 100_000)])
    with pytest.raises(OptionError):
        record_trajectories(library, teacher, [Prompt("p", [1])], options=Answers(rollouts=0))
    with pytest.raises(OptionError):
        record_attention(library, teacher, rows, size=65)
    with pytest.raises(DataError):
        improbable(teacher.model, [Row("empty", [], [])])


def test_batches_hold_what_they_may() -> None:
    lengths = [5, 1, 9, 3, 3, 100, 2]
    found = list(grouped(lengths, 12))
    assert sorted(i for batch in found for i in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 12 for batch in found)
    assert found[-1] == [5]
