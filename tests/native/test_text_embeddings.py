"""Embeddings of texts: libllama's own, bit for bit where the order of additions is the same, however a text is divided."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from bits import random_tokens, same_bits
from reference import _QUIET

import edge_rt
from edge_rt.core.engine import EmbedsText, Engine, SequenceBatch
from edge_rt.core.generate.scoring import TextReader, finished, tokens_of
from edge_rt.core.ggml_engine import GgmlEngine
from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.errors import ContextOverflow, OptionError
from edge_rt.hooks import EngineOptions

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-f32": ("llama", {"type": "F32"}),
    "llama-f16": ("llama", {"type": "F16"}),
    "llama-q4_0": ("llama", {"type": "Q4_0"}),
    "llama-q8_0": ("llama", {"type": "Q8_0"}),
    "llama-untied": ("llama", {"tied": False, "output_type": "Q8_0"}),
    "llama-yarn": ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_context": 128}}),
    "llama-experts": ("llama", {"n_expert": 4, "n_expert_used": 2}),
    "deci": ("deci", {"n_ff": (64, 96)}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3moe": ("qwen3moe", {}),
}
NONE, MEAN, CLS, LAST = range(4)  # enum llama_pooling_type


def libllamas(path: Path, tokens: Sequence[int], pooling: int) -> Any:
    """libllama's embeddings: float32 [n_tokens, n_embd] with pooling NONE, else [n_embd]. Not normalised."""
    llama.llama_log_set(_QUIET, ctypes.c_void_p(0))
    model_params = llama.llama_model_default_params()
    model_params.use_extra_bufts = False  # where a CPU has AMX, its kernels would take the weights, and they add up in another order
    model = llama.llama_model_load_from_file(str(path).encode(), model_params)
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type, params.embeddings, params.pooling_type = 1, True, pooling
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
            batch.seq_id[i][0] = 0
        assert llama.llama_decode(context, batch) == 0
        width = llama.llama_model_n_embd(model)
        if pooling == NONE:
            return np.ctypeslib.as_array(llama.llama_get_embeddings(context), shape=(len(tokens), width)).copy()
        return np.ctypeslib.as_array(llama.llama_get_embeddings_seq(context, 0), shape=(width,)).copy()
    finally:
        llama.llama_batch_free(batch)
        llama.llama_free(context)
        llama.llama_model_free(model)


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[GgmlEngine]:
    """An engine on one thread, with libllama's plain kernels."""
    given = {"threads": 1, "context": 512, "pack": False, "extra": {"ggml.transposed_values": False}, **options}
    with ModelFile.open(path) as file, closing(GgmlEngine(file, EngineOptions(**given))) as engine:
        yield engine


@pytest.fixture(params=MODELS, ids=list(MODELS))
def model(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> Path:
    architecture, measures = MODELS[request.param]
    return random_model(architecture, **measures)


def hidden(engine: Any, tokens: Sequence[int], wanted: Any = "all", sequence: int | None = None) -> Any:
    own = engine.new_sequence() if sequence is None else sequence
    (rows,) = engine.hidden([SequenceBatch(own, tokens, wanted)])
    found = None if rows is None else np.array(rows)
    if sequence is None:
        engine.free_sequence(own)
    return found


# ---- hidden states ---------------------------------------------------------------------------------------------------


def test_hidden_states_are_libllamas_bit_for_bit(model: Path) -> None:
    with opened(model) as engine:
        assert isinstance(engine, EmbedsText)
        tokens = random_tokens(engine, 40)
        every = hidden(engine, tokens)
        same_bits(every, libllamas(model, tokens, NONE))
        same_bits(every[-1], libllamas(model, tokens, LAST))
        same_bits(every[0], libllamas(model, tokens, CLS))


@pytest.mark.parametrize("transposed", [False, True], ids=["by-cell", "transposed"])
def test_steps_and_hidden_states_do_not_disturb_each_other(random_model: Callable[..., Path], transposed: bool) -> None:
    """A decode step repeats the graph of the one before, in place: what comes between must not be taken for it."""
    with opened(random_model(), extra={"ggml.transposed_values": transposed}) as engine:
        tokens = random_tokens(engine, 24)
        plain, mixed = engine.new_sequence(), engine.new_sequence()
        for i, token in enumerate(tokens):
            (expected,) = engine.step([SequenceBatch(plain, [token], "all")])
            kept = np.array(expected)
            (found,) = engine.step([SequenceBatch(mixed, [token], "all")])
            same_bits(np.array(found), kept)
            if i % 3 == 0:
                hidden(engine, tokens[: i + 1])
                again = engine.fork_sequence(mixed, i)
                hidden(engine, [token], "last", again)
                engine.free_sequence(again)


@pytest.mark.parametrize("tied", [False, True])
def test_streamed_weights_give_the_same_bits(random_model: Callable[..., Path], tied: bool) -> None:
    path = random_model("llama", n_embd=256, n_ff=512, n_layer=6, tied=tied, type="Q8_0")
    with opened(path) as whole:
        tokens = random_tokens(whole, 60)
        expected, dense = hidden(whole, tokens), sum(unit.size for unit in whole.units() if not unit.sparse)
    with opened(path, memory=dense * 3 // 4) as streamed:
        assert streamed.pager is not None
        assert streamed.pager.streams
        for _ in range(3):
            same_bits(hidden(streamed, tokens), expected)
            logits = feed_all(streamed, tokens)
    with opened(path) as whole:
        same_bits(feed_all(whole, tokens), logits)


def feed_all(engine: GgmlEngine, tokens: list[int]) -> Any:
    (logits,) = engine.step([SequenceBatch(engine.new_sequence(), tokens, "all")])
    return np.array(logits)


# ---- whole texts -----------------------------------------------------------------------------------------------------


def read(engine: Engine, tokens: Sequence[int], pooling: Any, pieces: Sequence[int] = (512,)) -> Any:
    """A text's pooled hidden states, read in pieces of these sizes, the last one again and again."""
    reader, sizes = TextReader(engine), [*pieces]
    reader.begin(tokens, pooling)
    found = None
    while found is None:
        found = reader.read(sizes.pop(0) if len(sizes) > 1 else sizes[0])
    reader.close()
    return found


def test_poolings_are_libllamas(model: Path) -> None:
    with opened(model) as engine:
        tokens = random_tokens(engine, 40)
        same_bits(read(engine, tokens, "last"), libllamas(model, tokens, LAST))
        # libllama adds up float32 in the order of a matrix product; we in float64.
        theirs = libllamas(model, tokens, MEAN)
        np.testing.assert_allclose(read(engine, tokens, "mean"), theirs, rtol=0, atol=2e-6)
        # One token goes through other kernels than forty.
        np.testing.assert_allclose(read(engine, tokens, "cls"), libllamas(model, tokens, CLS), rtol=0, atol=0.02)


@pytest.mark.parametrize("pieces", [[1], [7, 1, 300, 50], [64], [512, 8]], ids=str)
def test_however_a_text_is_divided(random_model: Callable[..., Path], pieces: list[int]) -> None:
    """Attention of few tokens and of many adds up in different orders: rounding, and nothing else (tests/unit: exactly nothing)."""
    with opened(random_model("llama", context=1024), context=1024) as engine:
        tokens = random_tokens(engine, 600)
        for pooling in ("mean", "last", "cls"):
            expected, found = (finished(read(engine, tokens, pooling, sizes)) for sizes in ([512], pieces))
            assert float(expected @ found) > 1 - 1e-4


TEXTS = ["the river and the sea", "a", "the sea and the river " * 30, "hello world", "hello  world", "<|im_end|>", "東京"]


@pytest.mark.parametrize("engine", ["ggml", "llama_cpp"])
def test_the_order_and_the_company_of_texts_change_nothing(random_model: Callable[..., Path], engine: str) -> None:
    with edge_rt.open(random_model("qwen3"), engine=engine, threads=1) as model:
        found = model.embed(TEXTS)
        assert found.shape == (len(TEXTS), model.info.n_embd)
        assert found.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
        order = [4, 2, 0, 6, 5, 3, 1]
        np.testing.assert_array_equal(model.embed([TEXTS[i] for i in order]), found[order])
        for i, text in enumerate(TEXTS):
            np.testing.assert_array_equal(model.embed([text])[0], found[i])
        assert len({row.tobytes() for row in found}) == len(TEXTS)
        assert model.embed([]).shape == (0, model.info.n_embd)
        assert model.memory().cache == 0 or engine == "llama_cpp", "nothing is left behind"


def test_beside_a_session_that_generates(random_model: Callable[..., Path]) -> None:
    options: Any = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with edge_rt.open(random_model("qwen2"), threads=1) as model:
        with model.session() as session:
            expected = [event for event in session.generate("the river", **options) if hasattr(event, "tokens")]
        alone = model.embed(TEXTS)
        with model.session() as session:
            found = []
            for event in session.generate("the river", **options):
                np.testing.assert_array_equal(model.embed(TEXTS[:3]), alone[:3])
                found += [event] if hasattr(event, "tokens") else []
        assert found == expected


def test_both_engines_agree(random_model: Callable[..., Path]) -> None:
    path = random_model("llama", pooling_type=LAST, add_eos=True, context=1024)
    texts = [*TEXTS, [7, 300, 41, 5] * 200]  # the last in several chunks
    with edge_rt.open(path, threads=1, pack=False) as ours, edge_rt.open(path, engine="llama_cpp", threads=1, pack=False) as theirs:
        for pooling in (None, "mean", "cls"):
            np.testing.assert_allclose(ours.embed(texts, pooling=pooling), theirs.embed(texts, pooling=pooling), atol=5e-3)


def test_the_fallback_still_writes_after_it_embedded(random_model: Callable[..., Path]) -> None:
    with edge_rt.open(random_model("gemma"), threads=1) as model:
        assert model.info.engine == "llama_cpp"
        before = model.logits([1, 5, 9])
        assert np.isfinite(model.embed(["the river"])).all()
        np.testing.assert_array_equal(model.logits([1, 5, 9]), before)


# ---- what the file says ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", ["bpe", "spm"])
@pytest.mark.parametrize("add_eos", [False, True])
def test_tokens_are_those_of_llama_cpps_embedding(random_model: Callable[..., Path], vocabulary: str, add_eos: bool) -> None:
    path = random_model("llama", vocabulary=vocabulary, add_eos=add_eos)
    native = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    with edge_rt.open(path, threads=1) as model, closing(native):
        for text in TEXTS:
            buffer = (llama.llama_token * 512)()
            data = text.encode()
            n = llama.llama_tokenize(llama.llama_model_get_vocab(native._model.model), data, len(data), buffer, 512, True, True)
            expected = buffer[:n]
            found = tokens_of(model.vocab, text, 0, 512)
            if expected[-2:] == [model.vocab.eos] * 2:  # it warns that this is seldom meant
                expected = expected[:-1]
            assert found == expected
        assert (tokens_of(model.vocab, "hello", 0, 512)[-1] == model.vocab.eos) is add_eos


@pytest.mark.parametrize(("kind", "pooling"), [(None, "mean"), (0, "mean"), (1, "mean"), (2, "cls"), (3, "last")])
def test_the_files_pooling_and_another(random_model: Callable[..., Path], kind: int | None, pooling: str) -> None:
    with edge_rt.open(random_model("qwen3", pooling_type=kind), threads=1) as model:
        found = {name: model.embed(["the river"], pooling=name) for name in ("mean", "cls", "last")}
        np.testing.assert_array_equal(model.embed(["the river"]), found[pooling])
        assert len({one.tobytes() for one in found.values()}) == 3
        raw = model.embed(["the river"], normalize=False)
        assert abs(float(np.linalg.norm(raw)) - 1) > 0.1
        np.testing.assert_allclose(raw / np.linalg.norm(raw), found[pooling], atol=1e-6)


def test_what_has_no_embedding_is_refused(random_model: Callable[..., Path]) -> None:
    with edge_rt.open(random_model("qwen3", pooling_type=4), threads=1, context=64) as model:
        with pytest.raises(OptionError, match="ranks texts"):
            model.embed(["a"])
        with pytest.raises(OptionError, match="no pooling max; choose from mean, cls, last"):
            model.embed(["a"], pooling="max")
        for texts, which in (([""], 1), (["a", ""], 2), (["a", "b", []], 3)):
            with pytest.raises(OptionError, match=f"text {which} is empty"):
                model.embed(texts, pooling="mean")
        for bad in ([-1], [1, model.info.n_vocab]):
            with pytest.raises(OptionError, match="text 1 has a token outside"):
                model.embed([bad], pooling="mean")
        assert model.embed([[5] * 64], pooling="mean").shape[0] == 1
        with pytest.raises(ContextOverflow, match="text 2 has 65 tokens and the context 64") as caught:
            model.embed(["a", [5] * 65], pooling="mean")
        assert (caught.value.needed, caught.value.available) == (65, 64)
        assert model.memory().cache == 0
    with edge_rt.open(random_model("qwen3", pooling_type=9), threads=1) as model, pytest.raises(OptionError, match="not known"):
        model.embed(["a"])
