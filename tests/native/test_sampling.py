"""Sampling against llama.cpp's own chain, each parameter's effect, and logits nobody should have to sample from."""

import ctypes
import time

import numpy as np
import pytest

from edge_rt.core.generate.sampler import Sampler, check_params
from edge_rt.core.generate.scoring import token_logprobs
from edge_rt.errors import ConstraintError, NativeError, OptionError
from edge_rt.native import libs
from edge_rt.native.llama import Vocab
from edge_rt.structured.grammar import compile_constraint
from edge_rt.types import SamplingParams

OFF = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=1)


@pytest.fixture(scope="module")
def vocab(smollm2):
    return Vocab.load(smollm2)


@pytest.fixture(scope="module")
def logits(vocab):
    """Rows that look like a model's: most tokens unlikely, a few likely."""
    rng = np.random.default_rng(0)
    rows = rng.normal(-2, 3, (60, vocab.n_tokens)).astype(np.float32)
    rows[np.arange(60)[:, None], rng.integers(0, vocab.n_tokens, (60, 20))] += rng.uniform(5, 12, (60, 20)).astype(np.float32)
    return rows


def few(vocab, values):
    """Logits where only these tokens are possible."""
    row = np.full(vocab.n_tokens, -np.inf, np.float32)
    for token, value in values.items():
        row[token] = value
    return row


def draw(sampler, rows):
    tokens = []
    for row in rows:
        tokens.append(sampler.sample(row))
        sampler.accept(tokens[-1])
    return tokens


def drawn(vocab, params, row, n=300):
    """The tokens drawn from one row."""
    sampler = Sampler(vocab, params)
    found = {sampler.sample(row) for _ in range(n)}
    sampler.close()
    return found


# ---- against llama.cpp -----------------------------------------------------------------------------------------------


def llama_cpp_tokens(vocab, params, rows):
    """What llama.cpp's common_sampler would choose, with llama-cpp-python's bindings."""
    import llama_cpp as lc

    libs.install_native_log()
    n, p = vocab.n_tokens, params
    chain = lc.llama_sampler_chain_init(lc.llama_sampler_chain_default_params())
    biases = (lc.llama_logit_bias * len(p.logit_bias))(*(lc.llama_logit_bias(t, b) for t, b in p.logit_bias.items()))
    breakers = (ctypes.c_char_p * 4)(b"\n", b":", b'"', b"*")
    dry = (p.dry_multiplier, p.dry_base, p.dry_allowed_length, 2048)  # -1: the whole context
    for stage in (
        lc.llama_sampler_init_logit_bias(n, len(biases), biases),
        lc.llama_sampler_init_penalties(n, p.repeat_last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty),
        lc.llama_sampler_init_dry(vocab.pointer, *dry, breakers, 4),
        lc.llama_sampler_init_top_k(p.top_k),
        lc.llama_sampler_init_typical(p.typical_p, 0),
        lc.llama_sampler_init_top_p(p.top_p, 0),
        lc.llama_sampler_init_min_p(p.min_p, 0),
        lc.llama_sampler_init_temp(p.temperature),
        lc.llama_sampler_init_dist(p.seed),
    ):
        lc.llama_sampler_chain_add(chain, stage)
    tokens = []
    for row in rows:
        data = (lc.llama_token_data * n)()
        view = np.frombuffer(data, np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)]))
        view["id"], view["logit"] = np.arange(n), row
        array = lc.llama_token_data_array(data, n, -1, False)
        lc.llama_sampler_apply(chain, ctypes.byref(array))
        tokens.append(array.data[array.selected].id)
        lc.llama_sampler_accept(chain, tokens[-1])
    lc.llama_sampler_free(chain)
    return tokens


@pytest.mark.parametrize(
    "change",
    [
        {}, {"temperature": 0.0}, {"temperature": 2.0}, {"top_k": 0}, {"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.5}, {"typical_p": 0.4},
        {"repeat_penalty": 1.5}, {"frequency_penalty": 0.7, "presence_penalty": 0.4}, {"repeat_penalty": 1.3, "repeat_last_n": 3},
        {"dry_multiplier": 2.0, "dry_allowed_length": 1}, {"logit_bias": {5: 20.0, 7: -3.0}}, {"seed": 77},
        {"top_k": 300, "top_p": 0.99, "min_p": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_tokens_equal_llama_cpp(vocab, logits, change):
    params = SamplingParams(seed=42)._replace(**change)
    rows = np.concatenate([logits[:20]] * 3)  # repeats: penalties have something to do
    sampler = Sampler(vocab, params)
    assert draw(sampler, rows) == llama_cpp_tokens(vocab, params, rows)
    sampler.close()


# ---- one parameter at a time -----------------------------------------------------------------------------------------


def test_greedy_takes_the_likeliest_and_the_lowest_of_equals(vocab):
    row = few(vocab, {10: 1.0, 900: 5.0, 40000: 5.0})
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=-1.0), SamplingParams(temperature=0, repeat_penalty=1.01)):
        assert Sampler(vocab, params).sample(row) == 900


def test_the_cuts_leave_what_they_say(vocab):
    row = few(vocab, {1: 4.0, 2: 3.0, 3: 2.0, 4: 1.0, 5: -5.0})
    p = np.exp([4.0, 3, 2, 1, -5]) / np.exp([4.0, 3, 2, 1, -5]).sum()
    assert drawn(vocab, OFF._replace(top_k=2), row) == {1, 2}
    assert drawn(vocab, OFF._replace(top_k=1), row) == {1}
    assert drawn(vocab, OFF._replace(top_p=float(p[0] + p[1] - 0.01)), row) == {1, 2}
    assert drawn(vocab, OFF._replace(top_p=0.0), row) == {1}
    assert drawn(vocab, OFF._replace(min_p=float(np.exp(-2.5))), row) == {1, 2, 3}
    assert drawn(vocab, OFF._replace(min_p=1.0), row) == {1}
    assert drawn(vocab, OFF, row) == {1, 2, 3, 4}
    assert len(drawn(vocab, OFF._replace(typical_p=0.2), row)) == 1


def test_temperature_flattens(vocab):
    row = few(vocab, {1: 3.0, 2: 0.0})

    def share(temperature):
        sampler = Sampler(vocab, OFF._replace(temperature=temperature))
        return sum(sampler.sample(row) == 1 for _ in range(2000)) / 2000

    for temperature in (0.5, 1.0, 4.0):
        assert share(temperature) == pytest.approx(1 / (1 + np.exp(-3.0 / temperature)), abs=0.03)


def test_penalties_and_bias_push_tokens_away(vocab):
    row = few(vocab, {1: 3.0, 2: 2.5})
    for change in ({"repeat_penalty": 1.5}, {"frequency_penalty": 1.0}, {"presence_penalty": 1.0}, {"logit_bias": {1: -1.0}}):
        sampler = Sampler(vocab, SamplingParams(temperature=0, **change))
        sampler.accept(1)
        assert sampler.sample(row) == 2, change
    assert drawn(vocab, OFF._replace(logit_bias={1: float("-inf")}), row) == {2}


def test_penalties_look_back_only_so_far_and_into_the_prompt(vocab):
    row = few(vocab, {1: 3.0, 2: 2.5})
    sampler = Sampler(vocab, SamplingParams(temperature=0, repeat_penalty=2.0, repeat_last_n=2))
    sampler.accept(1, prompt=True)
    assert sampler.sample(row) == 2
    for token in (7, 8):
        sampler.accept(token)
    assert sampler.sample(row) == 1
    everything = Sampler(vocab, SamplingParams(temperature=0, repeat_penalty=2.0, repeat_last_n=-1), context=100)
    for token in (1, *range(10, 90)):
        everything.accept(token)
    assert everything.sample(row) == 2
    assert Sampler(vocab, SamplingParams(temperature=0, repeat_penalty=2.0, repeat_last_n=0)).sample(row) == 1


def test_dry_breaks_a_loop(vocab):
    loop = vocab.tokenize("one two three one two three one two")
    row = few(vocab, {vocab.tokenize(" three")[0]: 5.0, vocab.tokenize(" four")[0]: 3.0})
    for multiplier, expected in ((0.0, " three"), (2.0, " four")):
        sampler = Sampler(vocab, SamplingParams(temperature=0, dry_multiplier=multiplier))
        for token in loop:
            sampler.accept(token, prompt=True)
        assert sampler.sample(row) == vocab.tokenize(expected)[0]


def test_a_window_of_two_billion_costs_no_memory(vocab):
    sampler = Sampler(vocab, SamplingParams(repeat_penalty=1.1, repeat_last_n=2**31 - 1, dry_multiplier=1.0, dry_penalty_last_n=2**31 - 1))
    sampler.accept(5)
    sampler.close()


def test_ends_can_be_banned(vocab):
    row = few(vocab, {vocab.eos: 9.0, 500: 1.0})
    assert Sampler(vocab, SamplingParams(temperature=0)).sample(row) == vocab.eos
    assert Sampler(vocab, SamplingParams(temperature=0), ban_eog=True).sample(row) == 500


# ---- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [{}, {5: -1.0, 7: -float("inf")}, {5: -0.0}, {9: 0.5}], ids=["none", "lower", "zero", "higher"])
def test_the_short_way_past_biases_takes_what_the_samplers_take(vocab, bias, monkeypatch):
    """The likeliest token is the choice where biases only take away, and not from it; among equals, too."""
    params = SamplingParams(temperature=0, logit_bias=bias)
    rows = np.random.default_rng(0).integers(0, 3, (60, vocab.n_tokens)).astype(np.float32)
    rows[:, [5, 7, 9, *vocab.eog_tokens()]] += np.random.default_rng(1).integers(0, 4, (60, 1)).astype(np.float32)
    quick, slow = Sampler(vocab, params, ban_eog=True), Sampler(vocab, params, ban_eog=True)
    monkeypatch.setattr(slow, "_lowered", None)
    expected = [slow.sample(row) for row in rows]
    assert [quick.sample(row) for row in rows] == expected
    assert len(set(expected)) > 4
    quick.close()
    with pytest.raises(NativeError, match="closed"):
        quick.sample(rows[0])


def test_the_seed_decides(vocab, logits):
    first = draw(Sampler(vocab, SamplingParams(seed=5)), logits)
    assert draw(Sampler(vocab, SamplingParams(seed=5)), logits) == first
    assert draw(Sampler(vocab, SamplingParams(seed=6)), logits) != first
    fresh = [Sampler(vocab, SamplingParams(seed=seed)) for seed in (None, -1, 2**32 - 1)]
    assert len({sampler.seed for sampler in fresh}) == 3
    again = Sampler(vocab, SamplingParams(seed=fresh[0].seed))
    assert draw(fresh[0], logits) == draw(again, logits)  # the reported seed is the one used


def test_reset_and_clone(vocab, logits):
    params = SamplingParams(seed=5, repeat_penalty=1.3, top_k=0)
    sampler = Sampler(vocab, params)
    whole = draw(sampler, logits)
    sampler.reset()
    assert draw(sampler, logits[:30]) == whole[:30]
    copy = sampler.clone()
    sampler.close()
    sampler.close()
    assert draw(copy, logits[30:]) == whole[30:]
    with pytest.raises(NativeError, match="closed"):
        sampler.sample(logits[0])


def test_a_verified_draft_gives_the_tokens_of_single_steps(vocab, logits):
    """The rows of a step with drafts are sampled in sequence, up to the first that differs; the next step goes on there."""
    params = SamplingParams(seed=9, repeat_penalty=1.2, temperature=1.5)
    plain = draw(Sampler(vocab, params), logits)
    sampler, tokens, rng = Sampler(vocab, params), [], np.random.default_rng(3)
    while len(tokens) < len(logits):
        draft = [t if rng.random() < 0.6 else 0 for t in plain[len(tokens) : len(tokens) + 4]]  # right as often as not
        for row, drafted in zip(logits[len(tokens) : len(tokens) + len(draft) + 1], [*draft, None], strict=False):
            tokens.append(sampler.sample(row))
            sampler.accept(tokens[-1])
            if tokens[-1] != drafted:
                break
    assert tokens == plain


def test_closing_the_vocabulary_does_not_pull_it_from_under_a_sampler(smollm2, logits):
    own = Vocab.load(smollm2)
    sampler = Sampler(own, SamplingParams(seed=1), compile_constraint(own, "root ::= [a-z ]+", None))
    own.close()
    token = sampler.sample(logits[0])
    sampler.accept(token)
    sampler.close()


# ---- what must not crash ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [SamplingParams(temperature=0), SamplingParams(), SamplingParams(typical_p=0.5), OFF._replace(top_p=0.5)]
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_broken_logits_are_a_native_error(vocab, logits, params, value):
    row = logits[0].copy()
    row[1234] = value
    with pytest.raises(NativeError, match="1234"):
        Sampler(vocab, params).sample(row)
    with pytest.raises(NativeError, match="-inf"):
        Sampler(vocab, params).sample(np.full_like(row, -np.inf))
    with pytest.raises(NativeError, match="shape"):
        Sampler(vocab, params).sample(row[:100])


@pytest.mark.parametrize(
    "change", [{}, {"typical_p": 0.9}, {"top_k": 0, "typical_p": 0.9}, {"top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"temperature": 1e-5}]
)
def test_extreme_but_sound_logits(vocab, change):
    params = SamplingParams(seed=1)._replace(**change)
    assert drawn(vocab, params, few(vocab, {77: 3.0}), 5) == {77}
    wide = np.linspace(-1e4, 1e4, vocab.n_tokens, dtype=np.float32)
    assert min(drawn(vocab, params, wide, 20)) > vocab.n_tokens - 100
    assert drawn(vocab, params, np.zeros(vocab.n_tokens, np.float32), 5) <= set(range(vocab.n_tokens))


def test_all_tokens_banned(vocab):
    sampler = Sampler(vocab, OFF._replace(logit_bias={1: float("-inf"), 2: float("-inf")}))
    with pytest.raises(ConstraintError, match="banned"):
        sampler.sample(few(vocab, {1: 1.0, 2: 2.0}))


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_k": 1.5},
        {"top_k": -2},
        {"top_k": True},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"min_p": 2},
        {"typical_p": -1},
        {"repeat_penalty": 0.0},
        {"repeat_penalty": float("inf")},
        {"repeat_last_n": -2},
        {"repeat_last_n": 2**31},
        {"frequency_penalty": float("nan")},
        {"presence_penalty": None},
        {"dry_multiplier": -1.0},
        {"dry_base": 0.5},
        {"dry_allowed_length": -1},
        {"dry_penalty_last_n": -5},
        {"seed": -2},
        {"seed": 2**32},
        {"seed": 1.5},
        {"logit_bias": {49152: 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {1: float("inf")}},
        {"logit_bias": {1: 1e9}},
        {"logit_bias": {1: "x"}},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_named(vocab, change):
    ((name, _),) = change.items()
    with pytest.raises(OptionError, match=f"^{name}.*allowed"):
        Sampler(vocab, SamplingParams()._replace(**change))


def test_good_parameters_pass(vocab):
    for change in ({}, {"top_k": -1}, {"top_k": np.int64(5)}, {"temperature": np.float32(0.5)}, {"seed": np.int64(3)}, {"top_p": 1}):
        check_params(SamplingParams()._replace(**change), vocab.n_tokens)


def test_tokens_out_of_range_are_not_accepted(vocab):
    sampler = Sampler(vocab, SamplingParams(repeat_penalty=1.1))
    for token in (-1, vocab.n_tokens):
        with pytest.raises(OptionError, match="out of range"):
            sampler.accept(token)


# ---- log-probabilities and cost --------------------------------------------------------------------------------------


def test_logprobs(vocab, logits):
    row = logits[0].astype(np.float64)
    expected = row - row.max() - np.log(np.exp(row - row.max()).sum())
    own, top = token_logprobs(logits[0], 123, 5)
    assert own == pytest.approx(expected[123], abs=1e-5)
    assert [t for t, _ in top] == list(np.argsort(-row, kind="stable")[:5])
    assert [p for _, p in top] == pytest.approx(sorted(expected)[::-1][:5], abs=1e-5)
    assert token_logprobs(logits[0], 123, 0) == (own, ())
    assert len(token_logprobs(logits[0], 123, 10**6)[1]) == vocab.n_tokens


def test_logprobs_of_odd_logits(vocab):
    row = few(vocab, {3: 1e4, 5: 1e4, 9: -1e4})
    own, top = token_logprobs(row, 5, 3)
    assert own == pytest.approx(np.log(0.5))
    assert [t for t, _ in top] == [3, 5, 9]  # equals in the order of their numbers
    assert token_logprobs(row, 7, 1)[0] == -np.inf
    for value in (np.nan, np.inf):
        row[8] = value
        with pytest.raises(NativeError):
            token_logprobs(row, 5, 1)
    with pytest.raises(OptionError):
        token_logprobs(row, -1, 1)
    with pytest.raises(OptionError):
        token_logprobs(row, 1, -1)


def test_a_token_costs_little(vocab, logits):
    """Generous bounds: 57 and 4 microseconds were measured."""
    for params, bound in ((SamplingParams(seed=1), 1e-3), (SamplingParams(temperature=0), 3e-4)):
        sampler, times = Sampler(vocab, params), []
        for row in logits:
            start = time.perf_counter()
            sampler.sample(row)
            times.append(time.perf_counter() - start)
        assert min(times) < bound


@pytest.mark.parametrize("params", [
    {}, {"repeat_penalty": 1.5, "repeat_last_n": 7}, {"frequency_penalty": 0.7, "repeat_last_n": -1},
    {"dry_multiplier": 0.8, "dry_penalty_last_n": 5},
    {"presence_penalty": 1.0, "repeat_last_n": 3, "dry_multiplier": 2.0, "dry_penalty_last_n": 20},
])  # fmt: skip
@pytest.mark.parametrize("length", [0, 1, 3, 6, 90])
def test_a_prompt_read_at_once_is_one_accepted_token_by_token(vocab, params, length):
    rng = np.random.default_rng(length)
    prompt = list(map(int, rng.integers(0, 12, length)))
    samplers = [Sampler(vocab, SamplingParams(temperature=0.9, seed=5, **params), context=64) for _ in range(2)]
    samplers[0].read(prompt)
    for token in prompt:
        samplers[1].accept(token, prompt=True)
    drawn = []
    for sampler in samplers:
        drawn.append([])
        for step in range(12):
            row = np.random.default_rng(step).standard_normal(vocab.n_tokens).astype(np.float32)
            row[:12] += 4
            drawn[-1].append(sampler.sample(row))
            sampler.accept(drawn[-1][-1])
        sampler.close()
    assert drawn[0] == drawn[1]


def test_a_prompt_with_a_token_out_of_range_is_refused(vocab):
    sampler = Sampler(vocab, SamplingParams())
    for bad in ([1, vocab.n_tokens], [-1, 2]):
        with pytest.raises(OptionError, match="out of range"):
            sampler.read(bad)
