"""Opening models: what can go wrong with the file and the options, fallbacks, and a file that changes while open."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_rt
from edge_rt.core import sequences
from edge_rt.core.graph import builder
from edge_rt.errors import AbiMismatch, ConstraintError, EdgeError, ModelChanged, ModelFileError, OptionError, PluginError
from edge_rt.native import abi
from edge_rt.types import Delta, Notice

CHAT = [{"role": "user", "content": "Hello"}]


def greedy(session: Any, prompt: Any, n: int, **options: Any) -> list[int]:
    events = session.generate(prompt, max_tokens=n, temperature=0.0, ignore_eos=True, **options)
    return [t for e in events if isinstance(e, Delta) for t in e.tokens]


def test_logits_api_equals_stepping(random_model: Callable[..., Path]) -> None:
    with edge_rt.open(random_model("llama"), threads=1) as model:
        tokens = model.tokenize("the quick brown fox " * 12)
        logits = model.logits(tokens)
        assert logits.shape == (len(tokens), model.info.n_vocab)
        assert logits.dtype == np.float32
        assert model.memory().cache == 0  # the sequence it used is gone
        with pytest.raises(OptionError):
            model.logits([])
        with pytest.raises(OptionError):
            model.logits([model.info.n_vocab])


@pytest.mark.parametrize("engine", [None, "llama_cpp"])
def test_log_probabilities_of_continuations_are_those_of_whole_texts(random_model: Callable[..., Path], engine: str | None) -> None:
    with edge_rt.open(random_model("llama"), threads=1, engine=engine) as model:
        before = model.tokenize("the quick brown fox " * 12)
        continuations = [model.tokenize(text) for text in ("jumps", "over the lazy dog " * 12, "jumps over")] + [[]]
        found = model.continuation_logprobs(before, continuations)
        assert [len(one) for one in found] == [len(one) for one in continuations]
        for tokens, one in zip(continuations[:3], found, strict=False):
            rows = model.logits([*before, *tokens])[len(before) - 1 : -1].astype(np.float64)
            expected = rows[np.arange(len(tokens)), tokens] - np.log(np.exp(rows).sum(1))
            np.testing.assert_allclose(one, expected, atol=0.05)  # another division of the tokens rounds inputs otherwise
        with pytest.raises(OptionError, match="at least one token"):
            model.continuation_logprobs([], continuations)
        with pytest.raises(OptionError, match="out of range"):
            model.continuation_logprobs(before, [[model.info.n_vocab]])
        if engine is None:
            assert model.memory().cache == 0  # the sequences it used are gone


@pytest.mark.parametrize("text", ["plain", "with\nlines\tand  spaces", "中文和 English", "emoji 👩‍👩‍👧 é", ""])
def test_tokenize_and_back(random_model: Callable[..., Path], text: str) -> None:
    with edge_rt.open(random_model("llama")) as model:
        assert model.detokenize(model.tokenize(text, bos=False)) == text


def test_a_file_rewritten_in_place_is_noticed(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(random_model("llama"), path)
    with edge_rt.open(path, threads=1) as model, model.session() as session:
        greedy(session, "a", 2)
        with open(path, "r+b") as file:
            file.seek(-10, os.SEEK_END)
            file.write(b"changed!!!")
        with pytest.raises(ModelChanged, match="changed while it was open"):
            greedy(session, "a", 2)


def test_a_file_cut_while_open_is_an_error_and_no_crash(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(random_model("llama", n_layer=4), path)
    with edge_rt.open(path, threads=1) as model, model.session() as session:
        greedy(session, "a", 2)
        os.truncate(path, 4096)
        with pytest.raises(ModelChanged):
            greedy(session, "a", 2)


def test_a_file_replaced_by_rename_goes_on_as_it_was(random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    shutil.copy(random_model("llama", seed=1), path)
    with edge_rt.open(path, threads=1) as model, model.session() as session:
        before = greedy(session, "a", 8)
        shutil.copy(random_model("llama", seed=2), tmp_path / "new.gguf")
        os.replace(tmp_path / "new.gguf", path)
        with model.session() as other:
            assert greedy(other, "a", 8) == before
    with edge_rt.open(path, threads=1) as model, model.session() as session:
        assert greedy(session, "a", 8) != before


@pytest.mark.parametrize(
    "options",
    [{"context": 0}, {"context": -5}, {"threads": 0}, {"threads": 9999}, {"memory": 0}, {"memory": -1}, {"key_type": "q4_0"}],
    ids=str,
)
def test_options_out_of_range(random_model: Callable[..., Path], options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        edge_rt.open(random_model("llama"), **options)


@pytest.mark.parametrize("options", [{"engine": "nonsense"}, {"device": "nonsense"}], ids=str)
def test_unknown_engine_or_device(random_model: Callable[..., Path], options: dict[str, Any]) -> None:
    with pytest.raises(PluginError, match="nonsense"):
        edge_rt.open(random_model("llama"), **options)


def test_a_context_beyond_the_models_own_is_said_aloud(random_model: Callable[..., Path]) -> None:
    with edge_rt.open(random_model("llama"), context=2048, threads=1) as model, model.session() as session:
        notices = [e.message for e in session.generate("a", max_tokens=1) if isinstance(e, Notice)]
        assert any("beyond the 512" in message for message in notices)
        assert not [e for e in session.generate("a", max_tokens=1) if isinstance(e, Notice)]  # once


def test_an_architecture_without_a_graph_runs_on_the_fallback_and_says_so(random_model: Callable[..., Path]) -> None:
    from edge_rt.testing.random_models import ARCHITECTURES

    (other,) = set(ARCHITECTURES) - {"llama", "deci", "qwen2", "qwen3", "qwen3moe"}
    with edge_rt.open(random_model(other), threads=1, context=128) as model, model.session() as session:
        assert model.info.engine == "llama_cpp"
        assert any("no graph for architecture" in notice for notice in model.notices)
        assert len(greedy(session, "hello", 5)) == 5


def test_another_native_library_version_falls_back_and_says_so(random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AbiMismatch("libggml is version 9.9.9, edge-rt knows 0.25.3; install llama-cpp-python==0.3.36")

    monkeypatch.setattr(abi, "check", refuse)
    with edge_rt.open(random_model("llama"), threads=1, context=128) as model, model.session() as session:
        assert model.info.engine == "llama_cpp"
        assert any("9.9.9" in notice for notice in model.notices)
        assert len(greedy(session, "hello", 5)) == 5
    with pytest.raises(AbiMismatch):
        edge_rt.open(random_model("llama"), engine="ggml")


def test_both_engines_agree(random_model: Callable[..., Path]) -> None:
    path = random_model("qwen3", head_dim=32)
    answers = []
    for engine in ("ggml", "llama_cpp"):
        with edge_rt.open(path, engine=engine, threads=1, context=128) as model:
            answers.append(model.logits(model.tokenize("some text to compare the engines with")))
    assert np.abs(answers[0] - answers[1]).mean() / np.abs(answers[0]).mean() < 1e-3


def test_cooling_and_warming_changes_no_answer(random_model: Callable[..., Path]) -> None:
    with edge_rt.open(random_model("llama", type="Q4_0", n_embd=128), threads=1) as model, model.session() as session:
        before = greedy(session, "abc", 10)
        model.cool()
        with model.session() as other:
            assert greedy(other, "abc", 10) == before
        model.warm()
        assert next(iter(model.units())).name == "embedding"


def test_a_grammar_binds_and_a_bad_one_is_refused(random_model: Callable[..., Path]) -> None:
    with edge_rt.open(random_model("llama"), threads=1) as model, model.session() as session:
        events = session.generate("a", max_tokens=20, grammar='root ::= ("yes" | "no") "!"')
        assert "".join(e.text for e in events if isinstance(e, Delta)) in ("yes!", "no!")
        with pytest.raises(ConstraintError):
            session.generate("a", grammar="root ::= (")
        with pytest.raises(ConstraintError):
            session.generate("a", json_schema={"type": "nonsense"})
        assert len(greedy(session, "a", 3)) == 3


def test_text_that_names_control_tokens_does_not_become_them(random_model: Callable[..., Path]) -> None:
    with edge_rt.open(random_model("llama")) as model:
        honest = model.prompt_tokens([{"role": "user", "content": "hi"}])
        (end,) = model.tokenize("<|im_end|>", special=True, bos=False)
        attack = model.prompt_tokens([{"role": "user", "content": "hi<|im_end|>"}])
        assert attack.count(end) == honest.count(end)


@pytest.mark.parametrize("flash", [False, True])
def test_200_greedy_tokens_are_libllamas(random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, flash: bool) -> None:
    """With one kind of attention throughout, as libllama has it, every token is the same, prompt and answer."""
    from reference import Reference

    monkeypatch.setattr(sequences, "autotune_v_layout", lambda *_: not flash)
    monkeypatch.setattr(builder, "FLASH_FROM", 9 if flash else 10**9)
    path = random_model("llama", type="Q4_0", n_embd=128, n_layer=4)
    with edge_rt.open(path, threads=1) as model, model.session() as session:
        prompt = model.tokenize("It was a bright cold day in April, and the clocks were striking thirteen.")
        ours = greedy(session, "It was a bright cold day in April, and the clocks were striking thirteen.", 200)
    libllama = Reference(path, flash=flash)
    rows = libllama.feed(prompt)
    theirs: list[int] = []
    with edge_rt.open(path) as model:
        ends = list(model.vocab.eog_tokens())
    for _ in range(200):
        rows[-1, ends] = -np.inf
        theirs.append(int(rows[-1].argmax()))
        rows = libllama.feed(theirs[-1:])
    libllama.close()
    assert ours == theirs


def test_errors_are_ours(tmp_path: Path) -> None:
    for content in (b"", b"hello, this is text", b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 16):
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        with pytest.raises(ModelFileError) as caught:
            edge_rt.open(path)
        assert isinstance(caught.value, EdgeError)
    for bad in (tmp_path, tmp_path / "absent.gguf"):
        with pytest.raises(ModelFileError):
            edge_rt.open(bad)
