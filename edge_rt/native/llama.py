"""Cuts long texts for pre-tokenisers that libllama runs through std::regex, which recurses on the native stack.

One or two calls a character, 325 bytes each: 26,000 letters in a row overflow 8 MiB and kill the process (measured with the
patterns of falcon, deepseek, tekken, gpt-4o, llama4 and the default one). Such texts are tokenised ``CHUNK`` characters at a time."""

from __future__ import annotations

import array
import ctypes as C
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache

from edge_rt.errors import AbiMismatch, ModelFileError, NativeError, OptionError
from edge_rt.native import ggml, libs
from edge_rt.native.abi import KNOWN_VERSIONS
from edge_rt.native.libs import Bindings

CHUNK = 1000  # characters: less than 1 MiB of stack, which the smallest thread stacks have

ITERATIVE = frozenset((
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4",
    "glm5", "gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling",
    "starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2", "qwen2", "deepseek-r1-qwen", "kormo",
    "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "qwen35", "grok-2", "kimi-k2", "gemma4", "laguna",
))  # fmt: skip
"""Values of tokenizer.ggml.pre whose patterns libllama matches with loops of its own. All others of kind bpe are cut."""


def chunks(text: str, size: int, names: tuple[str, ...]) -> Iterator[str]:
    """Cut a text into pieces of at most ``size`` characters, where possible before the space between two words.

    There most pre-tokenisers cut too, so that the tokens stay the same. No cut falls inside one of ``names``.
    """
    start = 0
    while len(text) - start > size:
        cut = limit = start + size
        while (cut := text.rfind(" ", start + size // 2, cut)) > 0:
            if text[cut - 1].isalnum() and text[cut + 1].isalnum():
                break
        if cut < 0:
            cut = limit
        for name in names:
            at = text.find(name, max(start + 1, cut - len(name) + 1), cut + len(name) - 1)
            if at >= 0:  # the first name in the way; longer ones come first in ``names``
                cut = at
                break
        yield text[start:cut]
        start = cut
    yield text[start:]


# libllama: the vocabulary of a model. Prototypes are those of llama.cpp at ggml 0.25.3 (llama-cpp-python 0.3.36).
#
# A ``Vocab`` opens a model file with ``vocab_only``: tokens, merges and metadata are read, weights are not. libllama aborts the
# process, or lets a C++ exception through, on what it calls misuse (a token out of range, a missing BOS); everything that reaches
# it here has been checked.

P, I32, U32, I64, SIZE, F32, BOOL, STR = C.c_void_p, C.c_int32, C.c_uint32, C.c_int64, C.c_size_t, C.c_float, C.c_bool, C.c_char_p

LOAD_MODE_NONE = 0
ATTR_UNKNOWN, ATTR_CONTROL, ATTR_USER_DEFINED = 1, 8, 16
KINDS = ("none", "spm", "bpe", "wpm", "ugm", "rwkv", "plamo2", "test")  # enum llama_vocab_type
AT_ONCE = 2**14  # numbers taken from a buffer in one go
MAX_TEXT = 2**29  # bytes: lengths are int32_t, and the buffer takes 4 bytes a token


class ModelParams(C.Structure):
    """struct llama_model_params, passed and returned by value."""

    _fields_ = (
        ("devices", P), ("tensor_buft_overrides", P), ("n_gpu_layers", I32), ("split_mode", C.c_int), ("load_mode", C.c_int),
        ("lazy_mode", C.c_int), ("main_gpu", I32), ("tensor_split", P), ("progress_callback", P), ("progress_user_data", P),
        ("kv_overrides", P), ("vocab_only", BOOL), ("check_tensors", BOOL), ("use_extra_bufts", BOOL), ("no_host", BOOL),
        ("no_alloc", BOOL), ("load_mtp", BOOL),
    )  # fmt: skip


_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "use_extra_bufts": True}  # all others: 0


class TokenData(C.Structure):
    """struct llama_token_data: a candidate."""

    _fields_ = (("id", I32), ("logit", F32), ("p", F32))


class TokenDataArray(C.Structure):
    """struct llama_token_data_array: the candidates; ``selected`` is an index into ``data``, not a token."""

    _fields_ = (("data", P), ("size", SIZE), ("selected", I64), ("sorted", BOOL))


class LogitBias(C.Structure):
    """struct llama_logit_bias."""

    _fields_ = (("token", I32), ("bias", F32))


c = Bindings("llama_")

# struct llama_model_params llama_model_default_params(void);
c.declare("model_default_params", ModelParams)
# void llama_backend_init(void);
c.declare("backend_init", None)
# struct llama_model * llama_model_load_from_file(const char * path_model, struct llama_model_params params);
c.declare("model_load_from_file", P, STR, ModelParams)
# void llama_model_free(struct llama_model * model);
c.declare("model_free", None, P)
# const struct llama_vocab * llama_model_get_vocab(const struct llama_model * model);
c.declare("model_get_vocab", P, P)
# int32_t llama_model_n_ctx_train(const struct llama_model * model);
c.declare("model_n_ctx_train", I32, P)
# int32_t llama_model_meta_val_str(const struct llama_model * model, const char * key, char * buf, size_t buf_size);
c.declare("model_meta_val_str", I32, P, STR, P, SIZE)
# const char * llama_model_chat_template(const struct llama_model * model, const char * name);
c.declare("model_chat_template", STR, P, STR)
# enum llama_vocab_type llama_vocab_type(const struct llama_vocab * vocab);
c.declare("vocab_type", C.c_int, P)
# int32_t llama_vocab_n_tokens(const struct llama_vocab * vocab);
c.declare("vocab_n_tokens", I32, P)
# const char * llama_vocab_get_text(const struct llama_vocab * vocab, llama_token token);
c.declare("vocab_get_text", STR, P, I32)
# enum llama_token_attr llama_vocab_get_attr(const struct llama_vocab * vocab, llama_token token);
c.declare("vocab_get_attr", C.c_int, P, I32)
# bool llama_vocab_is_eog(const struct llama_vocab * vocab, llama_token token);
c.declare("vocab_is_eog", BOOL, P, I32)
# bool llama_vocab_is_control(const struct llama_vocab * vocab, llama_token token);
c.declare("vocab_is_control", BOOL, P, I32)
# llama_token llama_vocab_bos(const struct llama_vocab * vocab);  and eos, eot, nl: -1 where there is none
for _name in ("bos", "eos", "eot", "nl"):
    c.declare(f"vocab_{_name}", I32, P)
# bool llama_vocab_get_add_bos(const struct llama_vocab * vocab);
c.declare("vocab_get_add_bos", BOOL, P)
# bool llama_vocab_get_add_eos(const struct llama_vocab * vocab);
c.declare("vocab_get_add_eos", BOOL, P)
# const llama_token * llama_vocab_get_suppress_tokens(const struct llama_vocab * vocab, int32_t * n_suppress_tokens);
c.declare("vocab_get_suppress_tokens", C.POINTER(I32), P, C.POINTER(I32))
# int32_t llama_tokenize(const struct llama_vocab * vocab, const char * text, int32_t text_len, llama_token * tokens,
#                        int32_t n_tokens_max, bool add_special, bool parse_special);
c.declare("tokenize", I32, P, STR, I32, P, I32, BOOL, BOOL)
# int32_t llama_token_to_piece(const struct llama_vocab * vocab, llama_token token, char * buf, int32_t length,
#                              int32_t lstrip, bool special);
c.declare("token_to_piece", I32, P, I32, P, I32, I32, BOOL)
# int32_t llama_detokenize(const struct llama_vocab * vocab, const llama_token * tokens, int32_t n_tokens, char * text,
#                          int32_t text_len_max, bool remove_special, bool unparse_special);
c.declare("detokenize", I32, P, P, I32, P, I32, BOOL, BOOL)
# struct llama_sampler * llama_sampler_init_greedy(void);
c.declare("sampler_init_greedy", P)
# struct llama_sampler * llama_sampler_init_top_k(int32_t k);
c.declare("sampler_init_top_k", P, I32)
# void llama_sampler_apply(struct llama_sampler * smpl, llama_token_data_array * cur_p);
c.declare("sampler_apply", None, P, C.POINTER(TokenDataArray))
# void llama_sampler_free(struct llama_sampler * smpl);
c.declare("sampler_free", None, P)


@lru_cache(maxsize=1)
def check_llama_abi() -> None:
    """Raise AbiMismatch unless the installed libllama is one these bindings fit. Costs about a millisecond, once."""
    version = ggml.c.version().decode()
    if version not in KNOWN_VERSIONS:
        raise AbiMismatch(
            f"the installed libllama comes with ggml {version}, edge-rt was written for {', '.join(KNOWN_VERSIONS)};"
            " run `pip install llama-cpp-python==0.3.36`"
        )
    problem = _params_problem(c.model_default_params()) or _candidates_problem()
    if problem:
        raise AbiMismatch(
            f"the installed libllama (ggml {version}) has another layout than the one of ggml {KNOWN_VERSIONS[-1]} that edge-rt was"
            f" written for ({problem}); run `pip install --force-reinstall llama-cpp-python==0.3.36`"
        )


def _params_problem(found: ModelParams) -> str | None:
    """The first field of the default parameters that does not hold its known default: a shifted field shows here."""
    for name, _ in ModelParams._fields_:
        expected, value = _DEFAULTS.get(name, 0), getattr(found, name) or 0
        if value != expected:
            return f"llama_model_params.{name} is {value!r}, not {expected!r}"
    return None


def _candidates_problem() -> str | None:
    """Let two samplers loose on three candidates: every field of llama_token_data(_array) is read or written by them."""
    data = (TokenData * 3)(TokenData(5, 1.0, 0.0), TokenData(6, 3.0, 0.0), TokenData(7, 2.0, 0.0))
    candidates = TokenDataArray(C.addressof(data), 3, -1, False)
    for address in (c.sampler_init_greedy(), c.sampler_init_top_k(2)):
        sampler = ggml.Handle(address, c.sampler_free, "a sampler")
        c.sampler_apply(sampler.address, C.byref(candidates))
        sampler.close()
    if candidates.selected != 1:
        return f"the greedy sampler chose candidate {candidates.selected} of three, not 1"
    if candidates.size != 2 or not candidates.sorted or [data[0].id, data[1].id] != [6, 7]:
        return "the top-k sampler did not keep the two best of three"
    return None


@lru_cache(maxsize=1)
def initialise() -> None:
    """Check the library, send its log to ``logging`` and start it; once per process."""
    check_llama_abi()
    libs.install_native_log()
    c.backend_init()


class Vocab:
    """Text to tokens and back, and what the model's metadata says about its tokens.

    Tokenising is thread-safe. ``close`` lets go of the model; it is freed when the last sampler or running call that uses it ends.
    """

    def __init__(self, model: ggml.Handle | None, pointer: int, owner: object = None) -> None:
        """Use ``load`` or ``adopt``."""
        self._model: tuple[ggml.Handle | None, object] | None = (model, owner)
        self._model_pointer, self._pointer = pointer, int(c.model_get_vocab(pointer))
        vocab = self._pointer
        self.n_tokens = int(c.vocab_n_tokens(vocab))
        self.kind = KINDS[c.vocab_type(vocab)]
        self.train_context = int(c.model_n_ctx_train(pointer))
        some = self.kind != "none"
        self.bos = _token(c.vocab_bos(vocab)) if some else None
        self.eos = _token(c.vocab_eos(vocab)) if some else None
        self.eot = _token(c.vocab_eot(vocab)) if some else None
        self.nl = _token(c.vocab_nl(vocab)) if some else None
        self.add_bos = bool(some and c.vocab_get_add_bos(vocab)) and self.bos is not None
        self.add_eos = bool(some and c.vocab_get_add_eos(vocab)) and self.eos is not None
        self._pieces: tuple[dict[int, bytes], dict[int, bytes]] = ({}, {})
        self._eog: tuple[int, ...] | None = None
        self._control: tuple[str, ...] | None = None
        self._recurses = self.kind == "bpe" and self.metadata("tokenizer.ggml.pre") not in ITERATIVE

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocab:
        """Open the vocabulary of a GGUF file and wait for it; see ``VocabLoad``, and for what it raises."""

        return VocabLoad(path).result()

    @classmethod
    def adopt(cls, model_pointer: int, owner: object) -> Vocab:
        """The vocabulary of a model another engine opened: ``owner`` is kept alive, the model is not freed.

        Works with a library whose version is unknown, where ``load`` refuses: the functions a vocabulary needs are old and stable.
        """
        if not model_pointer:
            raise NativeError("cannot adopt the vocabulary of a model that is not open")
        libs.install_native_log()
        return cls(None, model_pointer, owner)

    @property
    def pointer(self) -> int:
        """Address of the llama_vocab. Raises NativeError after ``close``."""
        if self._model is None:
            raise NativeError("the vocabulary was closed; open the model again")
        return self._pointer

    @property
    def keep_alive(self) -> object:
        """Whoever holds this holds the model: samplers do, so that closing the vocabulary cannot free it under them."""
        return self._model

    def close(self) -> None:
        """Let go of the model; further calls raise NativeError. Closing twice is harmless."""
        self._model = None

    # ---- text to tokens ----------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, special: bool = False, bos: bool | None = None) -> list[int]:
        """Split a text into tokens; an end-of-text token is never added.

        ``special``: names of control tokens in the text become those tokens. ``bos``: put the beginning-of-text token in front;
        None does so if the model's metadata says so, and not a second time if the text already begins with it.
        Raises OptionError for text that is not valid Unicode, too long, or when ``bos`` is asked of a model without one.
        """
        self._need_tokens()
        if bos and self.bos is None:
            raise OptionError("bos=True, but this model has no beginning-of-text token; leave bos out")
        if self._recurses and len(text) > CHUNK:
            names = self.control_texts() if special else ()
            tokens = [token for part in chunks(text, CHUNK, names) for token in self._tokenize(part, special)]
        else:
            tokens = self._tokenize(text, special) if text else []
        if bos or (bos is None and self.add_bos and tokens[:1] != [self.bos]):
            tokens.insert(0, self.bos)  # type: ignore[arg-type]  # checked above, and add_bos implies it
        return tokens

    def _tokenize(self, text: str, special: bool) -> list[int]:
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise OptionError(f"the text holds half of a surrogate pair (U+{ord(text[error.start]):04X}); remove it") from None
        if len(data) > MAX_TEXT:
            raise OptionError(f"the text is {len(data):,} bytes long, more than can be tokenised at once; split it")
        _held = self._model  # another thread's close() cannot free it during the call
        room = len(data) + 8  # a token is a byte at least, but a space can be added in front
        for _ in range(2):
            buffer = (I32 * room)()
            n = c.tokenize(self.pointer, data, len(data), buffer, room, False, special)
            if n >= 0:  # a million numbers take Python 20 ms, in which no other thread would run
                return [token for at in range(0, n, AT_ONCE) for token in buffer[at : min(n, at + AT_ONCE)]]
            room = -n
        raise NativeError(f"llama_tokenize wants ever more room ({room} tokens for {len(data)} bytes)")

    # ---- tokens to text ----------------------------------------------------------------------------------------------

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes one token stands for, which need not be whole characters; control tokens are b"" unless ``special``."""
        cache = self._pieces[special]
        found = cache.get(token)
        if found is None:
            found = cache[token] = self._piece(self._check(token), special)
        return found

    def _piece(self, token: int, special: bool) -> bytes:
        _held, room = self._model, 64
        for _ in range(2):
            buffer = C.create_string_buffer(room)
            n = c.token_to_piece(self.pointer, token, buffer, room, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            room = -n
        raise NativeError(f"llama_token_to_piece wants ever more room ({room} bytes for token {token})")

    def detokenize(self, tokens: Iterable[int], special: bool = False) -> bytes:
        """The text of a token sequence as bytes, in linear time: the inverse of ``tokenize`` (a space it put in front is removed).

        Control tokens are left out unless ``special``. Raises OptionError for a token out of range.
        """
        self._need_tokens()
        try:
            ids = array.array("i", tokens)
        except (TypeError, OverflowError):
            raise OptionError("tokens must be integers of this model's vocabulary") from None
        if not ids:
            return b""
        self._check(min(ids))
        self._check(max(ids))
        _held, address, room = self._model, ids.buffer_info()[0], 8 * len(ids) + 64
        for _ in range(2):
            buffer = C.create_string_buffer(room)
            n = c.detokenize(self.pointer, address, len(ids), buffer, room, False, special)
            if n >= 0:
                return buffer.raw[:n]
            room = -n
        raise NativeError(f"llama_detokenize wants ever more room ({room} bytes for {len(ids)} tokens)")

    # ---- what the metadata says --------------------------------------------------------------------------------------

    def is_eog(self, token: int) -> bool:
        """Does this token end the generation (end of text, end of turn, ...)?"""
        return bool(c.vocab_is_eog(self.pointer, self._check(token)))

    def is_control(self, token: int) -> bool:
        """Is this a control token, which stands for no text?"""
        return bool(c.vocab_is_control(self.pointer, self._check(token)))

    def eog_tokens(self) -> tuple[int, ...]:
        """Every token that ends the generation (looked for at the first call: 15 ms for 49,152 tokens)."""
        if self._eog is None:
            is_eog, vocab = c.vocab_is_eog, self.pointer
            self._eog = tuple(t for t in range(self.n_tokens) if is_eog(vocab, t)) if self.kind != "none" else ()
        return self._eog

    def control_texts(self) -> tuple[str, ...]:
        """Names that ``tokenize(special=True)`` turns into control tokens, longest first (first call: 15 ms for 49,152 tokens)."""
        if self._control is None:
            attr, vocab = c.vocab_get_attr, self.pointer
            hidden = ATTR_CONTROL | ATTR_UNKNOWN
            ids = [t for t in range(self.n_tokens) if attr(vocab, t) & hidden] if self.kind != "none" else []
            names = {c.vocab_get_text(vocab, t).decode("utf-8", "replace") for t in ids}
            self._control = tuple(sorted(names - {""}, key=lambda name: (-len(name), name)))
        return self._control

    def suppressed_tokens(self) -> tuple[int, ...]:
        """Tokens the model's metadata says must never be sampled."""
        n = I32(0)
        tokens = c.vocab_get_suppress_tokens(self.pointer, C.byref(n))
        return tuple(tokens[: n.value]) if n.value else ()

    def metadata(self, key: str) -> str | None:
        """A scalar of the model's metadata as text; None where there is none."""
        self.pointer  # noqa: B018  # raises after close
        room = 256
        while True:
            buffer = C.create_string_buffer(room)
            n = c.model_meta_val_str(self._model_pointer, key.encode(), buffer, room)
            if n < room:
                return buffer.value.decode("utf-8", "replace") if n >= 0 else None
            room = n + 1

    def chat_template(self, name: str | None = None) -> str | None:
        """The chat template (Jinja) of the model's metadata, or its variant of that name; None where there is none."""
        self.pointer  # noqa: B018  # raises after close
        found = c.model_chat_template(self._model_pointer, None if name is None else name.encode())
        return found.decode("utf-8", "replace") if found is not None else None

    def _need_tokens(self) -> None:
        if self.kind == "none":
            raise OptionError("this model file has no vocabulary; use token numbers instead of text")

    def _check(self, token: int) -> int:
        """The token, if it is one. Raises OptionError."""
        self._need_tokens()
        if not 0 <= token < self.n_tokens:
            raise OptionError(f"token {token} is out of range; this model has tokens 0 to {self.n_tokens - 1}")
        return token


def _token(token: int) -> int | None:
    return None if token < 0 else int(token)


# Loading a vocabulary beside other work: libllama reads it on a thread, in C, without the GIL.


class VocabLoad:
    """A vocabulary that is being loaded (30 to 55 ms for 49,152 tokens where nothing else runs); weights are not read.

    The thread makes one call. What needs Python is done before it starts and after it ended: beside a busy main thread every return
    to Python waits for the GIL, five milliseconds each (sys.getswitchinterval). It is no daemon thread, because the interpreter could
    end in the middle of the call.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Start. Raises ModelFileError for an impossible path, AbiMismatch, NativeError."""
        initialise()
        self._name = os.fspath(path)
        if "\0" in self._name:
            raise ModelFileError("the model's path contains a NUL character; give the path of a GGUF file")
        self._params = c.model_default_params()
        self._params.vocab_only, self._params.load_mode, self._params.n_gpu_layers = True, LOAD_MODE_NONE, 0
        self._model: int | None = None
        self.vocab: Vocab | None = None
        self._lock = threading.Lock()
        self._closed = False
        load = c.model_load_from_file  # bound here: the first look-up takes Python
        quiet = ExitStack()
        quiet.enter_context(libs.muted())

        def run() -> None:
            with quiet:
                self._model = load(os.fsencode(self._name), self._params)

        self._thread = threading.Thread(target=run, name="edge-rt-vocabulary")
        try:
            self._thread.start()
        except BaseException:
            quiet.close()
            raise

    @property
    def loading(self) -> bool:
        """Whether it still goes on."""
        return self._thread.is_alive()

    def result(self) -> Vocab:
        """Wait for it; always the same object. Raises ModelFileError with libllama's own reason, NativeError after ``close``."""
        with self._lock:
            self._thread.join()
            if self._closed:
                raise NativeError("the vocabulary was closed; open the model again")
            if self.vocab is None:
                model = self._model or self._once_more()
                self.vocab = Vocab(ggml.Handle(model, c.model_free, "a vocabulary"), model)
            return self.vocab

    def _once_more(self) -> int:
        """Load it aloud, for the reason why it cannot be loaded."""
        with libs.collect_errors() as errors:
            model: int | None = c.model_load_from_file(os.fsencode(self._name), self._params)
        if not model:
            reason = errors[0].split(": ", 1)[-1] if errors else "it gave no reason"
            raise ModelFileError(f"libllama cannot read the vocabulary of {self._name} ({reason}); check that it is a complete GGUF file")
        return model

    def close(self) -> None:
        """Wait for the thread, then let go of the model as ``Vocab.close`` does. Closing twice is harmless."""
        with self._lock:
            self._thread.join()
            self._closed = True
            if self.vocab is not None:
                self.vocab.close()
            elif self._model:
                c.model_free(self._model)
            self._model = None
