"""The decoder in torch is the model that edge-rt and llama.cpp run; snapshots are what transformers reads."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from edge_rt_distill.model import snapshot
from edge_rt_distill.model.architecture import Architecture
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.generate import _draw, generate
from edge_rt_distill.model.load import load, read_gguf, tensors
from edge_rt_distill.model.tokens import Tokeniser, write_vocabulary

import edge_rt
from edge_rt.errors import ModelFileError, OptionError, UnsupportedModel
from edge_rt.testing.random_models import write_random_model

TOKENS = [5, 17, 99, 3, 42, 8, 120, 77, 5, 31]
KINDS = {
    "llama": {"architecture": "llama", "n_head": 4, "n_head_kv": 2},
    "wide heads": {"architecture": "llama", "n_head": 4, "n_head_kv": 1, "head_dim": 32, "tied": False},
    "linear rope": {"architecture": "llama", "rope_scaling": {"type": "linear", "factor": 2.0, "original_context": 256}},
    "factors": {"architecture": "llama", "rope_freqs": [1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]},
    "qwen2": {"architecture": "qwen2", "tied": False},
    "qwen3": {"architecture": "qwen3", "head_dim": 32},
    "quantised": {"architecture": "llama", "type": "Q4_0", "embedding_type": "Q8_0"},
}


@pytest.fixture(params=KINDS)
def any_model(request, tmp_path) -> Path:
    return write_random_model(tmp_path / "model.gguf", n_layer=2, **{"type": "F32", **KINDS[request.param]})


def logits(model: Decoder, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model.logits(model(torch.tensor([tokens])).hidden)[0].numpy()


def test_logits_are_those_of_the_runtime(any_model, request):
    with edge_rt.open(any_model, pack=False) as running:
        expected = running.logits(TOKENS)
    found = logits(load(any_model).model, TOKENS)
    # The runtime rounds what meets quantised weights to 8 bits, and keys and values to half floats.
    most = 5e-2 if "quantised" in request.node.name else 2e-3
    assert np.abs(found - expected).max() < most * np.abs(expected).max()


def test_a_snapshot_gives_the_same_model_back(any_model, tmp_path):
    teacher = load(any_model)
    if teacher.model.architecture.rope_factors:
        with pytest.raises(UnsupportedModel, match="factors"):
            snapshot.save(tmp_path / "snapshot", teacher.model, teacher.tokeniser)
        return
    snapshot.save(tmp_path / "snapshot", teacher.model, teacher.tokeniser)
    again = load(tmp_path / "snapshot")
    for (name, one), other in zip(tensors(teacher.model).items(), tensors(again.model).values(), strict=True):
        assert torch.equal(one, other), name
    assert again.model.architecture == teacher.model.architecture
    assert again.digest == load(tmp_path / "snapshot").digest != teacher.digest
    text = "Two words, 数字 12."
    assert again.tokeniser.encode(text) == teacher.tokeniser.encode(text)
    assert again.tokeniser.decode(again.tokeniser.encode(text)) == text


def test_transformers_reads_a_snapshot_and_we_read_what_it_writes(any_model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed; pip install 'edge-rt-distill[test]'")
    teacher = load(any_model)
    if teacher.model.architecture.rope_factors:
        pytest.skip("a snapshot cannot say factors of rotation")
    snapshot.save(tmp_path / "snapshot", teacher.model, teacher.tokeniser)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "snapshot", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(logits(teacher.model, TOKENS) - expected).max() < 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    again = load(tmp_path / "theirs", vocabulary=any_model)
    assert np.abs(logits(again.model, TOKENS) - expected).max() < 1e-3


def test_an_architecture_survives_json_and_counts_its_parameters(any_model):
    model = read_gguf(any_model)
    a = model.architecture
    assert Architecture.from_json(json.loads(json.dumps(a.to_json()))) == a
    assert a.parameters() == sum(one.numel() for one in model.parameters())
    with pytest.raises(UnsupportedModel, match="version"):
        Architecture.from_json({"family": "llama"})


def test_shared_layers_are_one_module(tiny):
    a = read_gguf(tiny).architecture
    model = Decoder(replace(a, layers=a.layers * 2, parameters_of=(0, 1, 0, 1)))
    assert model.architecture.parameters() == sum(one.numel() for one in model.parameters()) == a.parameters()
    assert model.layers[2] is model.layers[0]
    assert (len(model.sites()), len(tensors(model))) == (14, 2 + 4 * 9)


def test_states_maps_masks_and_skipping(tiny):
    model = load(tiny).model
    tokens = torch.tensor([TOKENS])
    with torch.no_grad():
        plain = model(tokens)
        full = model(tokens, states=(0, 1, 2), attention=(0, 1))
        assert torch.allclose(full.hidden, plain.hidden, atol=1e-5)
        assert torch.equal(full.states[0], model.token_embd(tokens))
        assert torch.allclose(model.output_norm(full.states[2]), full.hidden)
        assert full.attention[1].shape == (1, 4, 10, 10)
        assert torch.allclose(full.attention[0].sum(-1), torch.ones(1, 4, 10), atol=1e-5)
        assert torch.equal(full.attention[0].triu(1), torch.zeros(1, 4, 10, 10))
        assert torch.equal(model(tokens, head_mask=torch.ones(2, 4)).hidden, plain.hidden)
        assert not torch.allclose(model(tokens, head_mask=torch.tensor([[1.0, 0, 1, 1], [1, 1, 1, 1]])).hidden, plain.hidden)
        one = model(tokens, skip=(1,), states=(1, 2))
        assert torch.equal(one.states[1], one.states[2])


def test_answers_are_the_models_own_and_always_the_same(tiny):
    teacher = load(tiny)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
    greedy = generate(teacher.model, prompts, tokens=6, temperature=0, batch=2)
    for prompt, answer in zip(prompts, greedy, strict=True):  # padding and caches change nothing: step by step without either
        tokens = list(prompt)
        for token, logprob in zip(answer.tokens, answer.logprobs, strict=True):
            found = torch.log_softmax(torch.from_numpy(logits(teacher.model, tokens)[-1]), -1)
            assert int(found.argmax()) == token
            assert abs(float(found[token]) - logprob) < 1e-4
            tokens.append(token)
    drawn = generate(teacher.model, prompts, tokens=6, seed=3)
    assert drawn == generate(teacher.model, prompts, tokens=6, seed=3)
    assert [one.tokens for one in drawn] != [one.tokens for one in generate(teacher.model, prompts, tokens=6, seed=4)]
    ended = generate(teacher.model, prompts[:1], tokens=6, temperature=0, end=greedy[0].tokens[2])
    assert (ended[0].tokens, ended[0].ended) == (greedy[0].tokens[: greedy[0].tokens.index(greedy[0].tokens[2]) + 1], True)
    with pytest.raises(OptionError, match="0 tokens cannot be answered"):
        generate(teacher.model, [[]], tokens=1)


def test_who_is_beside_an_answer_does_not_change_it(tiny):
    """Rows close up and others join, after ends at any place."""
    teacher = load(tiny)
    dice = random.Random(0)
    prompts = [[dice.randrange(1, 256) for _ in range(dice.randrange(1, 12))] for _ in range(23)]
    reports = []
    for how in ({"temperature": 0.0}, {"seed": 5, "temperature": 3.0}):
        end = generate(teacher.model, prompts[:1], tokens=4, **how)[0].tokens[3]
        lone = generate(teacher.model, prompts, tokens=20, batch=1, end=end, **how)
        beside = generate(teacher.model, prompts, tokens=20, batch=5, end=end, told=lambda *now: reports.append(now), **how)
        assert [one.tokens for one in beside] == [one.tokens for one in lone]
        assert [one.ended for one in beside] == [one.ended for one in lone]
        assert len({len(one.tokens) for one in beside}) > 1, "all ended at once"
        for one, other in zip(beside, lone, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert reports[-1] == (23, 23)
        assert reports == sorted(reports)
        reports.clear()


def test_a_draw_is_the_first_token_at_which_the_sum_passes_the_number():
    torch.manual_seed(0)
    scores = torch.randn(64, 1000) * 4
    generators = [torch.Generator().manual_seed(i) for i in range(64)]
    numbers = torch.tensor([torch.rand(1, generator=torch.Generator().manual_seed(i), dtype=torch.float64).item() for i in range(64)])
    sums = scores.double().softmax(-1).cumsum(-1)
    expected = [int(torch.searchsorted(one, number, right=True)) for one, number in zip(sums, numbers, strict=True)]
    assert _draw(scores, 1.0, generators, 0)[:, 0].tolist() == expected
    allowed = scores.topk(3).indices
    drawn = _draw(scores, 1.0, generators, 3)
    assert bool((drawn == allowed).any(-1).all())


def test_draws_follow_the_distribution(tiny):
    model = load(tiny).model
    with torch.no_grad():
        model.token_embd.weight *= 4  # a distribution with some likely tokens
    expected = np.exp(torch.log_softmax(torch.from_numpy(logits(model, [5])[-1]), -1).numpy())
    found = np.bincount([one.tokens[0] for one in generate(model, [[5]] * 4000, tokens=1, batch=500)], minlength=len(expected)) / 4000
    likely = expected.argmax()
    assert abs(found[likely] - expected[likely]) < 4 * (expected[likely] / 4000) ** 0.5
    top = {one.tokens[0] for one in generate(model, [[5]] * 200, tokens=1, top_k=2)}
    assert top <= set(np.argsort(expected)[-2:])


def test_a_snapshot_keeps_layers_of_different_widths(tmp_path):
    teacher = load(write_random_model(tmp_path / "a.gguf", "deci", n_ff=(64, 160)))
    snapshot.save(tmp_path / "snapshot", teacher.model, teacher.tokeniser)
    again, _ = snapshot.read(tmp_path / "snapshot")
    assert again.architecture == teacher.model.architecture
    assert json.loads((tmp_path / "snapshot" / "config.json").read_text())["intermediate_size"] == [64, 160]
    for name, tensor in tensors(teacher.model).items():
        assert torch.equal(tensors(again)[name], tensor), name


def test_a_vocabulary_alone_tokenises(tiny, tmp_path):
    write_vocabulary(tiny, tmp_path / "vocabulary.gguf")
    messages = [{"role": "user", "content": "Hello"}]
    alone, whole = Tokeniser(tmp_path / "vocabulary.gguf"), Tokeniser(tiny)
    assert alone.chat(messages, answer=True) == whole.chat(messages, answer=True)
    assert (alone.size, alone.end) == (whole.size, whole.end)
    assert (tmp_path / "vocabulary.gguf").stat().st_size < tiny.stat().st_size


def test_what_cannot_be_taught_is_told(tmp_path):
    experts = write_random_model(tmp_path / "experts.gguf", "llama", n_expert=4, n_expert_used=2)
    yarn = write_random_model(tmp_path / "yarn.gguf", "llama", rope_scaling={"type": "yarn", "factor": 4.0, "original_context": 128})
    gemma = write_random_model(tmp_path / "gemma.gguf", "gemma")
    for path, reason in ((experts, "experts"), (yarn, "YaRN"), (gemma, "architecture gemma")):
        with pytest.raises(UnsupportedModel, match=reason):
            load(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelFileError, match=r"config\.json does not exist"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UnsupportedModel, match="type bert"):
        load(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelFileError, match="does not say 'num_attention_heads'"):
        load(tmp_path / "empty")


def test_damaged_folders_are_told(tiny, tmp_path):
    teacher, folder = load(tiny), tmp_path / "snapshot"
    snapshot.save(folder, teacher.model, teacher.tokeniser)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelFileError, match="cannot be read"):
        load(folder)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "vocabulary.gguf").unlink()
    with pytest.raises(ModelFileError, match="has no vocabulary"):
        load(folder)
    other = write_random_model(tmp_path / "other.gguf", "llama", n_vocab=600)
    with pytest.raises(ModelFileError, match="another tokeniser"):
        load(folder, vocabulary=other)
