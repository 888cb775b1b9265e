"""What a diagnosis measures, against finite differences, direct computation and models in which something is dead."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from edge_rt_distill.diagnose import heads, layers, sensitivity
from edge_rt_distill.diagnose.activations import Activations
from edge_rt_distill.diagnose.attention import MEASURES, measures
from edge_rt_distill.diagnose.passes import Watch, backward, inputs, walk
from edge_rt_distill.diagnose.paths import Rollout, token_paths, trace
from edge_rt_distill.diagnose.rows import Labels, checked, in_rows, mixed
from edge_rt_distill.model.architecture import Architecture, LayerShape
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.divergence import reference
from edge_rt_distill.model.rows import Rows, TokenSequence, beginning, rows_of

from edge_rt.hooks import DataError, OptionError

VOCABULARY, HEADS, KV, FFN = 61, 4, 2, 24


def decoder(depth: int = 3, seed: int = 0) -> Decoder:
    shapes = tuple(LayerShape(HEADS, KV, FFN) for _ in range(depth))
    model = Decoder(Architecture("llama", VOCABULARY, 32, 8, shapes, True, 1e-5, 1e4, "interleaved", 128))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model.eval().requires_grad_(False)


def some(count: int = 5, seed: int = 1) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        length = 6 + 3 * number
        tokens = torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()
        found.append(TokenSequence(tokens, [place >= 3 for place in range(length)], f"s{number}"))
    return found


def alone(one: TokenSequence) -> Rows:
    return rows_of([one])


def loss(model: Decoder, one: TokenSequence, **options: object) -> torch.Tensor:
    """The summed loss of one sequence, written out plainly."""
    logits = model.logits(model(torch.tensor([one.tokens]), **options).hidden)[0]  # type: ignore[arg-type]
    at = [t for t in range(len(one.tokens) - 1) if one.targets[t + 1]]
    return F.cross_entropy(logits[at], torch.tensor(one.tokens)[[t + 1 for t in at]], reduction="sum")


def test_rows_hold_every_sequence_once_with_the_mask_of_what_is_predicted() -> None:
    sequences = some()
    seen = {}
    for rows in in_rows(sequences, 40):
        assert rows.tokens.numel() <= 40
        for row, number in enumerate(rows.numbers):
            one = sequences[number]
            assert rows.tokens[row, : rows.lengths[row]].tolist() == one.tokens
            assert rows.mask[row].nonzero().flatten().tolist() == [t for t in range(len(one.tokens) - 1) if one.targets[t + 1]]
            assert rows.real[row].sum() == len(one.tokens)
            seen[number] = True
    assert len(seen) == len(sequences)
    assert all(len(rows.numbers) == 1 or rows.tokens.shape[1] ** 2 * len(rows.numbers) <= 150 for rows in in_rows(sequences, 1000, 150))


def test_sequences_that_do_not_fit_the_model_are_refused_with_their_sample() -> None:
    with pytest.raises(DataError, match="s9 has token 61"):
        checked([TokenSequence([1, VOCABULARY], [False, True], "s9")], VOCABULARY)
    with pytest.raises(DataError, match="2 tokens and 1 targets"):
        checked([TokenSequence([1, 2], [True], "a")], VOCABULARY)
    with pytest.raises(DataError, match="no sample has a token"):
        checked([TokenSequence([1, 2], [True, False], "a"), TokenSequence([], [], "b")], VOCABULARY)
    assert len(checked([*some(), TokenSequence([3], [True], "short")], VOCABULARY)) == 5


def test_a_small_budget_takes_the_beginning_of_a_large_one_and_something_of_each_domain() -> None:
    names = [f"{domain}{n}" for domain, many in (("a", 20), ("b", 2), ("c", 2)) for n in range(many)]
    sequences = [TokenSequence([1, 2, 3, 4], [True] * 4, name) for name in names]
    labels = {one.sample: Labels(one.sample[0], "en") for one in sequences}
    order = mixed(sequences, 5, labels)
    size = lambda one: len(one.tokens)  # noqa: E731
    small, large = (beginning(order, tokens, size) for tokens in (12, 40))
    assert [one.sample[0] for one in small] == ["a", "b", "c"]
    assert large[:3] == small
    assert len(large) == 10
    assert sorted(one.sample for one in order) == sorted(labels)
    both = {one.sample: Labels(one.sample[0], ("en", "zh")[int(one.sample[1:]) % 2]) for one in sequences}
    first = [both[one.sample] for one in mixed(sequences, 5, both)]
    assert first[:6] == [Labels(*pair.split()) for pair in ("a en", "b zh", "c en", "a zh", "b en", "c zh")]
    assert mixed([], 5, {}) == []
    assert mixed(sequences, 6, labels) != order
    assert len(beginning(order, 1, size)) == 1
    assert beginning(order, 10**9, size) == order


def test_backward_gives_the_loss_and_the_gradient_by_the_embeddings_and_leaves_parameters_alone() -> None:
    model, sequences = decoder(), some()
    model.requires_grad_(True)
    (rows,) = in_rows(sequences, 1000)
    found = backward(model, rows)
    for row, number in enumerate(rows.numbers):
        assert float(found.loss[row]) == pytest.approx(float(loss(model, sequences[number]).detach()), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    embeddings = model.token_embd(rows.tokens).detach().requires_grad_()
    logits = model.logits(model.run(embeddings).hidden)
    total = (F.cross_entropy(logits[:, :-1].transpose(1, 2), rows.tokens[:, 1:], reduction="none") * rows.mask[:, :-1]).sum()
    (direct,) = torch.autograd.grad(total, embeddings)
    torch.testing.assert_close(found.gradient, direct)
    signed = token_paths(found.embeddings, found.gradient, rows)
    assert float(signed[-1, rows.lengths[-1] :].abs().sum()) == 0


def test_head_importance_is_the_derivative_of_the_loss_by_the_heads_mask() -> None:
    model, sequences = decoder().double(), some(2)
    importance = heads.HeadImportance(model, 2)
    for rows in in_rows(sequences, 1000):
        backward(model, rows, importance.watch(model, lambda rows=rows: rows))
    step = 1e-5
    for number, one in enumerate(sequences):
        predictions = sum(one.targets[1:])
        for layer, head in ((0, 0), (1, 3), (2, 1)):
            mask = torch.ones(3, HEADS, dtype=torch.float64)
            mask[layer, head] += step
            above = loss(model, one, head_mask=mask)
            mask[layer, head] -= 2 * step
            slope = float(above - loss(model, one, head_mask=mask)) / (2 * step) / predictions
            assert float(importance.by_sequence[number, layer, head]) == pytest.approx(slope, rel=1e-4, abs=1e-7)
    torch.testing.assert_close(importance.groups(), importance.heads().view(3, KV, -1).sum(-1))


def test_channel_importance_is_the_summed_weight_times_gradient_of_what_reads_it() -> None:
    model, sequences = decoder(), some(3)
    importance = heads.ChannelImportance(model)
    for rows in in_rows(sequences, 30):
        backward(model, rows, importance.watch(model, lambda rows=rows: rows))
    weight = model.linear("blk.1.ffn_down").weight
    weight.requires_grad_()
    wanted = torch.zeros(FFN)
    for one in sequences:
        (gradient,) = torch.autograd.grad(loss(model, one) / sum(one.targets[1:]), weight)
        wanted += (weight * gradient).sum(0).abs() / 3
    torch.testing.assert_close(importance.taylor()[1], wanted.detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("length", [5, 40])
def test_fisher_is_the_squared_gradient_of_each_sequence(length: int) -> None:
    """Short sequences go by the Gram matrices, long ones by the gradient itself."""
    model = decoder()
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for _ in range(3)]
    sequences = [TokenSequence(one, [True] * length) for one in tokens]
    found = sensitivity.fisher(model, list(in_rows(sequences, 1000)), sampled=False)
    assert set(found) == set(model.sites())
    for site in ("blk.0.attn_k", "blk.1.ffn_gate", "blk.2.ffn_down"):
        weight = model.linear(site).weight.requires_grad_()
        total = sum(float(torch.autograd.grad(loss(model, one), weight)[0].square().sum()) for one in sequences)
        assert found[site] == pytest.approx(total / (3 * (length - 1)), rel=1e-4)


def test_true_fisher_is_of_the_model_and_seeded_and_predicts_the_divergence_of_a_disturbance() -> None:
    model = decoder()
    model.token_embd.weight *= 3
    generator = torch.Generator().manual_seed(8)
    sequences = [TokenSequence(torch.randint(0, VOCABULARY, (24,), generator=generator).tolist(), [True] * 24, str(n)) for n in range(24)]
    batches = list(in_rows(sequences, 600))
    one, again, other = (sensitivity.fisher(model, batches, sampled=True, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one != other
    site, deviation = "blk.1.attn_output", 3e-3
    weight = model.linear(site).weight
    kept, moved = weight.clone(), []
    for _ in range(6):
        whole = reference(model, batches)
        weight += deviation * torch.randn(weight.shape, generator=generator)
        moved.append(whole.kl(model))
        weight.copy_(kept)
    assert sum(moved) / len(moved) == pytest.approx(deviation**2 / 2 * one[site], rel=0.3)


def test_removal_is_measured_as_direct_computation_says() -> None:
    model, sequences = decoder(), some()
    removals = layers.all_removals(model, halves=True)
    found = layers.removal_kl(model, list(in_rows(sequences, 50)), removals, len(sequences))
    assert len(removals) == 9
    wanted = torch.zeros(len(removals), len(sequences), dtype=torch.float64)
    for row, (kind, layer) in enumerate(removals):
        other, skip = decoder(), ()
        if kind == "layer":
            skip = (layer,)
        else:
            other.linear(f"blk.{layer}.{'attn_output' if kind == 'attention' else 'ffn_down'}").weight.zero_()
        for number, one in enumerate(sequences):
            tokens = torch.tensor([one.tokens])
            p = model.logits(model(tokens).hidden).double().log_softmax(-1)
            q = other.logits(other(tokens, skip=skip).hidden).double().log_softmax(-1)
            each = (p.exp() * (p - q)).sum(-1)[0]
            wanted[row, number] = sum(each[t] for t in range(len(one.tokens) - 1) if one.targets[t + 1])
    torch.testing.assert_close(found.sums, wanted, rtol=1e-3, atol=1e-5)
    assert found.counts.tolist() == [sum(one.targets[1:]) for one in sequences]
    torch.testing.assert_close(found.mean(), wanted.sum(1) / found.counts.sum(), rtol=1e-3, atol=1e-5)
    assert (found.error() > 0).all()


def test_greedy_removal_gives_the_divergence_of_all_that_is_gone() -> None:
    model, sequences = decoder(5), some()
    batches = list(in_rows(sequences, 1000))
    alone_kl = layers.removal_kl(model, batches, layers.all_removals(model, False), 5).mean()
    seen: list[tuple[int, int]] = []
    order = layers.greedy(model, batches, alone_kl, 3, 5, told=lambda done, total: seen.append((done, total)))
    assert order[0] == (int(alone_kl.argmin()), float(alone_kl.min()))
    for steps in (2, 3):
        gone = [one.layer for one in order[:steps]]
        rest = [layer for layer in range(5) if layer not in gone[:-1]]
        tried = {layer: _kl_without(model, batches[0], [*gone[:-1], layer]) for layer in rest}
        assert min(tried, key=lambda layer: tried[layer]) == gone[-1]
        assert order[steps - 1].kl == pytest.approx(tried[gone[-1]], rel=1e-3)
    assert all(done <= total for done, total in seen)
    assert layers.greedy(model, batches, alone_kl, 0, 5) == []


def _kl_without(model: Decoder, rows: Rows, gone: list[int]) -> float:
    return reference(model, [rows]).kl(model, skip=gone)


def test_what_is_dead_ranks_last() -> None:
    """A head that adds nothing, a channel nobody reads, a layer that passes all on, a hidden dimension without weights."""
    model, sequences = decoder(), some()
    model.linear("blk.1.attn_output").weight[:, 16:24] = 0  # head 2
    model.linear("blk.0.ffn_down").weight[:, 7] = 0
    model.linear("blk.2.attn_output").weight.zero_()
    model.linear("blk.2.ffn_down").weight.zero_()
    for name, parameter in model.named_parameters():
        if name.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_gate.weight", "ffn_up.weight", "token_embd.weight")):
            parameter[:, 5] = 0
    (rows,) = in_rows(sequences, 1000)
    head, channel, hidden = heads.HeadImportance(model, 5), heads.ChannelImportance(model), heads.HiddenImportance(model)
    watched: list[Watch] = [*(one for each in (head, channel, hidden) for one in each.watch(model, lambda: rows))]
    found = backward(model, rows, watched)
    hidden.add(found.embeddings, found.gradient, rows)
    acts, sizes, influence = Activations(model, rows.tokens.shape[1]), heads.HiddenActivation(model), layers.BlockInfluence(model)
    with inputs([*acts.watch(model, lambda: rows), *sizes.watch(model, lambda: rows)]):
        for step in walk(model, rows.tokens):
            acts.add(step, rows)
            influence.add(step, rows)
    sizes.add(model(rows.tokens).hidden, rows)
    assert float(head.heads()[1, 2]) == 0 < float(head.heads()[0].min())
    squares = [acts.sites[f"blk.{n}.ffn_down"].spread().channels for n in range(3)]
    for measured in (channel.taylor(), heads.channel_activation(model, squares)):
        assert int(measured[0].argmin()) == 7
        assert float(measured[0, 7]) == 0 < float(measured[1].min())
    for each in (hidden.taylor(), sizes.activation(model)):
        assert int(each.argmin()) == 5
    removed = layers.removal_kl(model, [rows], layers.all_removals(model, False), 5).mean()
    assert int(removed.argmin()) == 2
    assert float(removed[2]) == pytest.approx(0, abs=1e-6)
    assert int(influence.mean().argmin()) == 2
    assert float(influence.mean()[2]) == pytest.approx(0, abs=1e-6)


def test_activations_are_described_as_they_are() -> None:
    model, sequences = decoder(), some(3)
    model.token_embd.weight[sequences[2].tokens[0], 9] = 5e5
    rows = rows_of(sequences, [2, 0])
    acts = Activations(model, rows.tokens.shape[1])
    with inputs(acts.watch(model, lambda: rows)):
        for step in walk(model, rows.tokens):
            acts.add(step, rows)
    entry = model.token_embd(rows.tokens)[rows.real]
    assert (acts.massive()[0].layer, acts.massive()[0].position, acts.massive()[0].channel, acts.massive()[0].met) == (-1, 0, 9, 1)
    assert acts.massive()[0].value == pytest.approx(5e5)
    assert float(acts.by_position[0, 0]) == pytest.approx(5e5)
    kept = torch.cat([model.token_embd(rows.tokens)[n, 1 : rows.lengths[n]] for n in range(2)])
    spread = acts.stream[0].spread()
    assert spread.mean_square == pytest.approx(float(kept.square().mean()), rel=1e-5)
    centred = kept - kept.mean()
    assert spread.kurtosis == pytest.approx(float(centred.pow(4).mean() / centred.pow(2).mean() ** 2), rel=1e-4)
    site = acts.sites["blk.0.attn_q"].spread()
    normed = model.layers[0].get_submodule("attn_norm")(entry)
    assert site.largest == pytest.approx(float(normed.abs().max()), rel=1e-5)
    torch.testing.assert_close(site.channels.float(), normed.square().mean(0), rtol=1e-4, atol=1e-7)


def test_attention_is_described_as_it_is() -> None:
    rows = Rows(torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0.0, 1, 1, 0]]), torch.tensor([4]), (0,))
    sink = torch.zeros(4, 4)
    sink[:, 0] = 1
    even = torch.ones(4, 4).tril() / torch.arange(1, 5)[:, None]
    self_only = torch.eye(4)
    found = measures(torch.stack([sink, even, self_only])[None], rows, far=1)
    assert found[0, 0].tolist() == [0, 0, 1, 0]
    entropy, distance, first, far = found[0, 1].tolist()
    assert entropy == pytest.approx((math.log(2) + math.log(3) + math.log(4)) / 3)
    assert first == pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    assert far == pytest.approx((1 / 4) / 3)  # query 3 looks at key 1
    assert distance == pytest.approx((0 + 1 / 3 + 3 / 4) / 3 / (1 - first))
    assert found[0, 2].tolist() == [0, 0, 0, 0]
    assert len(MEASURES) == found.shape[-1]


def test_rollout_follows_attention_to_its_source() -> None:
    attention = torch.zeros(1, 2, 4, 4)
    attention[:, :, torch.arange(4), [0, 1, 1, 1]] = 1  # everybody looks at position 1
    rollout = Rollout()
    rollout.add(attention)
    rollout.add(attention)
    flow = rollout.flow(torch.tensor([[0.0, 0, 0, 1]]))
    assert flow[2].tolist() == [[0, 0, 0, 1]]
    assert flow[1].tolist() == [[0, 0.5, 0, 0.5]]
    assert flow[0].tolist() == [[0, 0.75, 0, 0.25]]
    sink = torch.zeros(1, 2, 4, 4)
    sink[..., 0] = 1  # nothing but the sink: what is there stays
    rollout = Rollout()
    rollout.add(sink)
    assert rollout.flow(torch.tensor([[0.0, 0, 0, 1]]))[0].tolist() == [[0, 0, 0, 1]]


def test_a_trace_has_a_weight_for_each_position_and_none_for_a_dead_head() -> None:
    model = decoder()
    model.linear("blk.1.attn_output").weight[:, :8] = 0
    rows = rows_of(some(), [4, 2, 0])
    found = trace(model, rows)
    assert found.heads.shape == (3, HEADS)
    assert float(found.heads[1, 0]) == 0 == float(found.heads.min())
    assert float(found.heads.mean()) == pytest.approx(1)
    torch.testing.assert_close(found.positions.sum(1), torch.ones(3))
    assert float(found.positions[:, 0].abs().sum()) == 0
    assert float(found.positions[~rows.real].abs().sum()) == 0


def test_values_that_are_no_numbers_are_reported_with_their_layer() -> None:
    model = decoder()
    model.linear("blk.1.ffn_up").weight[3, 3] = float("nan")
    (rows,) = in_rows(some(), 1000)
    with pytest.raises(DataError, match=r"layer 1 of the teacher gives values that are no numbers"):
        list(walk(model, rows.tokens))
    with pytest.raises(DataError, match="layer 1 of the teacher"):
        backward(model, rows)
    other = decoder()
    other.output_norm.weight[0] = float("inf")
    with pytest.raises(DataError, match="output"):
        backward(other, rows)


def test_a_model_that_shares_layers_is_refused() -> None:
    from edge_rt_distill.diagnose.passes import check_own_parameters

    architecture = replace(decoder().architecture, parameters_of=(0, 1, 0))
    with pytest.raises(OptionError, match="share parameters"):
        check_own_parameters(Decoder(architecture))
