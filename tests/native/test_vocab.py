"""The vocabulary binding against llama-cpp-python's own, and what must not crash the process."""

import ctypes
import gc
import logging
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from edge_rt.errors import AbiMismatch, ModelFileError, NativeError, OptionError
from edge_rt.native import libs, llama
from edge_rt.native.llama import Vocab

TEXTS = (
    "Hello, world!", " leading and trailing ", "", " ", "\n\n\t x\r\n", "你好，世界。今天天气很好。",
    "🙂👩‍👩‍👧‍👦🇩🇪", "e\u0301 n\u0303 \u0928\u0940",
    "def f(x):\n    return x ** 2  # 平方\n", "a\0b", "1234567890 3.14e-10", "<|im_start|>user\nhi<|im_end|>\n", "\ufeffBOM \u200b zero",
    "The quick brown fox. " * 200, "x" * 5000,
)  # fmt: skip


@pytest.fixture(scope="module")
def vocab(smollm2):
    vocab = Vocab.load(smollm2)
    yield vocab
    vocab.close()


@pytest.fixture(scope="module")
def reference(smollm2):
    import llama_cpp

    model = llama_cpp.Llama(str(smollm2), vocab_only=True, verbose=False)
    libs.install_native_log()
    yield model
    model.close()


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("text", TEXTS)
def test_tokens_equal_those_of_llama_cpp_python(vocab, reference, text, special):
    tokens = vocab.tokenize(text, special=special)
    assert tokens == reference.tokenize(text.encode(), add_bos=False, special=special)
    assert vocab.detokenize(tokens, special=True) == text.encode()
    assert b"".join(vocab.piece(t, special=True) for t in tokens) == text.encode()


def test_what_the_metadata_says(vocab, reference):
    assert (vocab.n_tokens, vocab.kind, vocab.train_context) == (49152, "bpe", reference._model.n_ctx_train())
    assert (vocab.bos, vocab.eos, vocab.nl) == (reference.token_bos(), reference.token_eos(), reference.token_nl())
    assert vocab.add_bos is False
    assert "<|im_start|>" in vocab.chat_template()
    assert vocab.chat_template("no such variant") is None
    assert vocab.metadata("tokenizer.ggml.pre") == "smollm"
    assert vocab.metadata("no.such.key") is None
    assert len(vocab.metadata("tokenizer.chat_template")) > 256  # longer than the first buffer


def test_control_tokens_stand_for_no_text(vocab):
    start = vocab.tokenize("<|im_start|>", special=True)
    assert len(start) == 1
    assert vocab.is_control(start[0])
    assert vocab.piece(start[0]) == b""
    assert vocab.piece(start[0], special=True) == b"<|im_start|>"
    assert vocab.detokenize([*start, *vocab.tokenize("hi")]) == b"hi"
    assert "<|im_end|>" in vocab.control_texts()
    assert not vocab.is_control(vocab.tokenize("hi")[0])
    assert vocab.eos in vocab.eog_tokens()
    assert all(vocab.is_eog(t) for t in vocab.eog_tokens())
    assert not vocab.is_eog(vocab.tokenize("hi")[0])


def test_bos_is_added_once(vocab):
    plain = vocab.tokenize("hi")
    assert vocab.tokenize("hi", bos=True) == [vocab.bos, *plain]
    assert vocab.tokenize("hi", bos=False) == plain
    vocab.add_bos = True  # as another model's metadata would say
    try:
        assert vocab.tokenize("hi") == [vocab.bos, *plain]
        assert vocab.tokenize("") == [vocab.bos]
        assert vocab.tokenize("<|im_start|>", special=True) == [vocab.bos]
    finally:
        vocab.add_bos = False


@pytest.mark.parametrize("token", [-1, 49152, 2**31 - 1, 2**40])
def test_a_token_out_of_range_is_an_option_error(vocab, token):
    for call in (vocab.piece, vocab.is_eog, vocab.is_control):
        with pytest.raises(OptionError, match="out of range"):
            call(token)
    with pytest.raises(OptionError):
        vocab.detokenize([1, token, 2])


def test_odd_arguments(vocab):
    with pytest.raises(OptionError, match=r"surrogate pair \(U\+D800\)"):
        vocab.tokenize("ab\ud800c")
    with pytest.raises(OptionError, match="integers"):
        vocab.detokenize(["a"])
    assert vocab.detokenize([]) == b""
    tokens = np.array(vocab.tokenize("numpy integers"), np.int64)
    assert vocab.detokenize(tokens) == b"numpy integers"
    assert vocab.piece(tokens[0]) == b"numpy"


def test_detokenising_is_linear(vocab):
    import time

    tokens = vocab.tokenize("word " * 20_000)

    def seconds(n):
        start = time.perf_counter()
        vocab.detokenize(tokens[:n])
        return time.perf_counter() - start

    short, long = (min(seconds(n) for _ in range(5)) for n in (2_000, 20_000))
    assert long < 40 * short + 0.002  # ten times the tokens; quadratic would be a hundred times the time


def test_closed_vocabularies_refuse_and_their_handle_is_freed_once(smollm2, monkeypatch):
    freed = []
    monkeypatch.setattr(llama.c, "model_free", freed.append)
    vocab = Vocab.load(smollm2)
    keeper = vocab.keep_alive
    vocab.close()
    vocab.close()
    for call in (lambda: vocab.tokenize("a"), lambda: vocab.piece(1000), vocab.chat_template, lambda: vocab.pointer):
        with pytest.raises(NativeError, match="closed"):
            call()
    assert freed == []  # a sampler still uses the model
    del keeper
    gc.collect()
    assert len(freed) == 1


def test_adopting_keeps_the_owner_and_frees_nothing(reference, monkeypatch):
    freed = []
    monkeypatch.setattr(llama.c, "model_free", freed.append)
    adopted = Vocab.adopt(reference._model.model, reference)
    assert adopted.tokenize("adopted") == reference.tokenize(b"adopted", add_bos=False)
    assert adopted.keep_alive[1] is reference
    adopted.close()
    del adopted
    gc.collect()
    assert freed == []
    with pytest.raises(NativeError):
        Vocab.adopt(0, None)


def test_loading_in_a_thread_while_python_runs(smollm2):
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(Vocab.load(smollm2)))
    thread.start()
    turns = 0
    while thread.is_alive():
        turns += 1
    thread.join()
    assert turns > 1000  # the GIL was free
    assert loaded[0].tokenize("ok")


def test_files_that_are_no_models_name_the_reason(tmp_path, smollm2):
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "text.gguf").write_text("just some text, nothing more")
    (tmp_path / "cut.gguf").write_bytes(smollm2.read_bytes()[:100_000])
    for name, reason in (("none.gguf", "No such file"), (".", "magic"), ("empty.gguf", "magic"), ("text.gguf", "magic"), ("cut.gguf", "")):
        with pytest.raises(ModelFileError, match=f"{name}.*{reason}") as error:
            Vocab.load(tmp_path / name)
        assert "no reason" not in str(error.value)
    with pytest.raises(ModelFileError, match="NUL"):
        Vocab.load("a\0b")


# ---- the library itself ----------------------------------------------------------------------------------------------


def test_the_abi_check_accepts_this_library_and_refuses_others(monkeypatch):
    llama.check_llama_abi.cache_clear()
    llama.check_llama_abi()
    monkeypatch.setattr(llama, "KNOWN_VERSIONS", ("0.1.2",))
    llama.check_llama_abi.cache_clear()
    with pytest.raises(AbiMismatch, match=r"ggml 0\.25\.3.*0\.1\.2"):
        llama.check_llama_abi()
    llama.check_llama_abi.cache_clear()


def test_a_shifted_field_is_noticed():
    good = llama.c.model_default_params()
    assert llama._params_problem(good) is None
    for field, value in (("n_gpu_layers", 0), ("use_extra_bufts", False), ("devices", 4096), ("load_mtp", True)):
        shifted = llama.c.model_default_params()
        setattr(shifted, field, value)
        assert field in llama._params_problem(shifted)
    assert ctypes.sizeof(llama.TokenData) == 12


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_log_lines_reach_logging_joined_and_at_their_level(caplog):
    with caplog.at_level(logging.DEBUG, "edge_rt.native"):
        libs._on_log(2, b"loading", None)
        libs._on_log(5, b" ..", None)
        libs._on_log(5, b". done\nand more\n", None)
        libs._on_log(3, b"careful\n", None)
        libs._on_log(4, b"bro\xffken\n", None)
        libs._on_log(1, b"\n", None)
        libs._on_log(2, None, None)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", "loading ... done"), ("INFO", "and more"), ("WARNING", "careful"), ("ERROR", "bro\ufffdken"),
    ]  # fmt: skip
    assert libs.recent_native_errors()[-1] == "bro\ufffdken"


def test_errors_are_collected_per_thread():
    with libs.collect_errors() as mine:
        libs._on_log(4, b"half a line", None)
        thread = threading.Thread(target=libs._on_log, args=(4, b"another thread\n", None))
        thread.start()
        thread.join()
    assert mine == ["half a line"]
    assert "another thread" in libs.recent_native_errors()


def test_nothing_native_is_printed(smollm2):
    script = "import sys; from edge_rt.native.llama import Vocab; v = Vocab.load(sys.argv[1]); print(len(v.tokenize('hello')))"
    result = subprocess.run([sys.executable, "-c", script, str(smollm2)], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("1\n", "")


def test_importing_loads_nothing_native():
    script = """
        import sys, edge_rt.native.llama, edge_rt.native.libs as libs
        assert libs.libraries.cache_info().currsize == 0
        assert not {"numpy", "llama_cpp", "jinja2"} & set(sys.modules), sorted(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


# ---- long texts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recursive_pre(tmp_path_factory):
    """A byte vocabulary whose pre-tokeniser libllama runs through std::regex."""
    from gguf import GGUFWriter, TokenType

    path = tmp_path_factory.mktemp("vocab") / "tekken.gguf"
    bytes_ = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in bytes_] + [chr(256 + n) for n in range(256 - len(bytes_))]
    writer = GGUFWriter(path, "llama")
    for name in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{name}", 64)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list([*letters, "<|stop|>", "<unk>"])
    writer.add_token_types([TokenType.NORMAL] * 256 + [TokenType.CONTROL, TokenType.UNKNOWN])
    writer.add_token_merges(["a a"])
    for id_ in ("bos", "eos"):
        writer.add_uint32(f"tokenizer.ggml.{id_}_token_id", 256)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_long_word_does_not_overflow_the_native_stack(recursive_pre):
    """Without cutting, 26,000 letters in a row end the process here with SIGSEGV."""
    script = """
        import sys
        from edge_rt.native.llama import Vocab
        v = Vocab.load(sys.argv[1])
        for text in ("b" * 100_000, "1" * 100_000, "!" * 100_000, "\\n" * 100_000, "é" * 100_000):
            assert v.detokenize(v.tokenize(text, bos=False)).decode() == text
        text = "x" * 990 + "<|stop|>" * 30_000
        assert v.tokenize(text, special=True, bos=False).count(256) == 30_000
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(recursive_pre)], check=True)


def test_cuts_fall_between_words():
    from edge_rt.native.llama import chunks

    text = "some words, and more words. " * 200
    parts = list(chunks(text, 100, ()))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 100
    assert all(part.startswith(" ") and part[1].isalnum() for part in parts[1:])
    parts = list(chunks("x" * 95 + "<name>" + "y" * 300, 100, ("<name>",)))
    assert parts[:2] == ["x" * 95, "<name>" + "y" * 94]
