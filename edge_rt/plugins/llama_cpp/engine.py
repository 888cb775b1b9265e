"""LoRA adapters in libllama. They belong to its context, through which all tokens of a call go: so a step makes a call for each adapter."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import logging
import os
import re
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_rt.hooks import (
    ContextError,
    EdgeError,
    EngineInfo,
    EngineOptions,
    Logits,
    MemoryReport,
    NativeError,
    OptionError,
    OutOfMemory,
    Positions,
    Run,
    SequenceBatch,
    SessionFileError,
    UnsupportedModel,
    available_cpus,
    check_batches,
    install_native_log,
    recent_native_errors,
)

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.hooks import LoraFile, ModelFile

Binding = tuple[int, float]
"""An adapter's number and how often it is applied; number 0: none."""
NONE: Binding = (0, 0.0)


class ContextAdapters:
    """The adapters of one context, and which sequence goes through which. libllama frees them with the model."""

    def __init__(self, lib: Any, model: int, context: Any) -> None:
        self._lib, self._model, self._context = lib, model, context
        self._opened: list[Any] = []
        self._bound: dict[int, Binding] = {}
        self._current = NONE

    def open(self, adapter: LoraFile) -> int:
        """Read an adapter's file. Raises UnsupportedModel."""
        pointer = self._lib.llama_adapter_lora_init(self._model, os.fsencode(adapter.file.native_path))
        if not pointer:
            why = (recent_native_errors() or ("no reason given",))[-1]
            raise UnsupportedModel(f"{adapter.file.path}: llama.cpp cannot load this adapter ({why}); convert it again")
        self._opened.append(pointer)
        return len(self._opened)

    def bind(self, sequence: int, adapter: int | None, scale: float) -> None:
        """A sequence's tokens go through this adapter from now on."""
        if adapter is None or not scale:
            self._bound.pop(sequence, None)
        elif 1 <= adapter <= len(self._opened):
            self._bound[sequence] = (adapter, scale)
        else:
            raise ValueError(f"there is no adapter {adapter}")

    def of(self, sequence: int) -> Binding:
        """What a sequence goes through."""
        return self._bound.get(sequence, NONE)

    def copy(self, source: int, sequence: int) -> None:
        """A fork goes through what its source does."""
        if source in self._bound:
            self._bound[sequence] = self._bound[source]

    def forget(self, sequence: int) -> None:
        """A sequence is no more."""
        self._bound.pop(sequence, None)

    def order(self, sequences: Sequence[int]) -> list[int]:
        """Indices of the sequences, those that go through the same side by side."""
        return sorted(range(len(sequences)), key=lambda i: self.of(sequences[i]))

    def use(self, binding: Binding) -> None:
        """The next call's tokens go through this. Raises NativeError."""
        if binding == self._current:
            return
        number, scale = binding
        adapters = scales = None
        if number:
            adapters = (self._lib.llama_adapter_lora_p_ctypes * 1)(self._opened[number - 1])
            scales = np.ctypeslib.as_ctypes(np.array([scale], dtype=np.float32))
        if self._lib.llama_set_adapters_lora(self._context, adapters, 1 if number else 0, scales):
            raise NativeError("libllama refuses an adapter that it has loaded; leave it out")
        self._current = binding


# One call of llama_decode: its tokens in, logits or hidden states out.

CHUNK = 512
"""Tokens a call of llama_decode takes: its default physical batch."""
TOLD_FROM = 32
"""Tokens in a call from which on it says that it goes on."""


class Calls:
    """Calls of one context. ``batch`` is its ``llama_batch``, which is the caller's to free."""

    def __init__(self, lib: Any, context: Any) -> None:
        self._lib, self._context = lib, context
        self.batch = lib.llama_batch_init(CHUNK, 0, 1)
        shape = (CHUNK,)
        self._tokens = np.ctypeslib.as_array(self.batch.token, shape)
        self._positions = np.ctypeslib.as_array(self.batch.pos, shape)
        self._wanted = np.ctypeslib.as_array(self.batch.logits, shape)
        np.ctypeslib.as_array(self.batch.n_seq_id, shape)[:] = 1  # every token belongs to one sequence
        self._slots = np.full(shape, -1, dtype=np.int32)  # what batch.seq_id holds: writing it costs a loop
        self._moved: Any = None

    def fill(self, tokens: Any, positions: Any, slots: Any, wanted: Any) -> None:
        """Set the next call to arrays of n <= 512 elements."""
        n = self.batch.n_tokens = len(tokens)
        self._tokens[:n], self._positions[:n], self._wanted[:n] = tokens, positions, wanted
        for i in np.flatnonzero(self._slots[:n] != slots).tolist():
            self.batch.seq_id[i][0] = int(slots[i])
        self._slots[:n] = slots

    def tell(self, moved: Callable[[], None]) -> None:
        """Call ``moved`` after each node of libllama's graph in calls of many tokens."""

        def callback(_: int | None) -> bool:
            moved()
            return False  # and go on

        self._moved = self._lib.ggml_abort_callback(callback)

    def decode(self, full: str) -> None:
        """Make the call. Raises OutOfMemory with the message ``full`` if its cells do not fit, NativeError."""
        told = self._moved is not None and self.batch.n_tokens >= TOLD_FROM
        if told:
            self._lib.llama_set_abort_callback(self._context, self._moved, None)
        code = self._lib.llama_decode(self._context, self.batch)
        if told:
            self._lib.llama_set_abort_callback(self._context, self._lib.ggml_abort_callback(), None)
        if code == 1:
            raise OutOfMemory(full)
        if code:
            why = (recent_native_errors() or ("no reason given",))[-1]
            raise NativeError(f"llama_decode failed with code {code}: {why}")

    def logits(self, rows: int, width: int) -> npt.NDArray[np.float32]:
        """The call's logits [rows, width], in place: in its order, whatever order libllama computed them in."""
        return np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), shape=(rows, width))

    def hidden(self, wanted: npt.NDArray[np.bool_], width: int) -> npt.NDArray[np.float32]:
        """The hidden states [rows, width] of the tokens that are wanted."""
        pointer = self._lib.llama_get_embeddings(self._context)
        every: npt.NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(len(wanted), width))
        return every[wanted]


# Loading a model into libllama and making a context for it.

_SEQUENCES = 16
_KEY_TYPES = {"f16": (1, 2.0), "q8_0": (8, 34 / 32)}  # enum ggml_type, bytes per element


def open_engine(model: ModelFile, options: EngineOptions) -> LlamaCppEngine:
    """Load the model and make a cache. Raises what ``LlamaCpp.open`` says."""
    if options.context is not None and options.context <= 0:
        raise OptionError(f"the context must be at least 1 token, not {options.context}")
    if options.limits is not None:
        what = "the engine llama_cpp cannot hold a limit of power or temperature"
        raise OptionError(f"{what}; run it with ggml, or leave --power and --celsius out")
    lib = _library()
    install_native_log()  # importing llama_cpp puts in a callback that prints to stderr
    pointer = _load(lib, model, options)
    try:
        cells = options.context or lib.llama_model_n_ctx_train(pointer)
        context, buffers = _new_context(lib, pointer, cells, options)
    except BaseException:
        lib.llama_model_free(pointer)
        raise
    return LlamaCppEngine(lib, model, pointer, context, buffers, cells, options.key_type)


@functools.cache
def _library() -> Any:
    """llama-cpp-python's bindings. Raises NativeError."""
    try:
        import llama_cpp.llama_cpp as lib
    except (ImportError, OSError, RuntimeError) as error:
        raise NativeError(f"llama-cpp-python cannot be loaded: {error}; reinstall it") from error
    lib.llama_backend_init()
    return lib


def _load(lib: Any, model: ModelFile, options: EngineOptions) -> int:
    """A ``llama_model *``. Raises UnsupportedModel, and what ``options.progress`` raises."""
    raised: list[BaseException] = []

    @lib.llama_progress_callback  # type: ignore[untyped-decorator]
    def progress(fraction: float, _data: Any) -> bool:
        try:
            if options.progress:
                options.progress("load", round(fraction * model.header.file_size), model.header.file_size)
        except BaseException as error:  # it must not unwind through C: carried around it instead
            raised.append(error)
        return not raised

    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = 0
    parameters.use_extra_bufts = options.pack
    parameters.progress_callback = progress
    with _native_lines() as lines:
        pointer = lib.llama_model_load_from_file(os.fsencode(model.native_path), parameters)
    if raised:
        if pointer:
            lib.llama_model_free(pointer)
        raise raised[0]
    if not pointer:
        raise UnsupportedModel(f"{model.path}: llama.cpp cannot load it ({_first_error(lines)}); use another model, or a newer edge-rt")
    if lib.llama_model_has_encoder(pointer) or not lib.llama_model_has_decoder(pointer) or lib.llama_model_is_diffusion(pointer):
        lib.llama_model_free(pointer)
        raise UnsupportedModel(f"{model.path}: {model.header.architecture} models do not write text token by token; use a decoder model")
    return int(pointer)


def _new_context(lib: Any, pointer: int, cells: int, options: EngineOptions) -> tuple[Any, dict[str, int]]:
    """A ``llama_context *``, and bytes by kind of buffer. Raises OutOfMemory, OptionError."""
    sequences = int(options.extra.get("llama_cpp.sequences", _SEQUENCES))
    if not 1 <= sequences <= lib.llama_max_parallel_sequences():
        raise OptionError(f"llama_cpp.sequences must be 1 to {lib.llama_max_parallel_sequences()}, not {sequences}")
    key_type, key_bytes = _KEY_TYPES[options.key_type]
    _check_room(lib, pointer, cells, key_bytes)
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = cells
    parameters.n_batch = parameters.n_ubatch = CHUNK
    parameters.n_seq_max = sequences
    parameters.kv_unified = True
    parameters.swa_full = True  # keep what lies outside a sliding window: a session may go back to it
    parameters.type_k = key_type
    parameters.pooling_type = lib.LLAMA_POOLING_TYPE_NONE  # hidden states token by token, whatever the file says; edge-rt pools
    parameters.n_threads = parameters.n_threads_batch = options.threads or available_cpus()
    with _native_lines() as lines:
        context = lib.llama_init_from_model(pointer, parameters)
    if not context:
        why = _first_error(lines)
        if "cache type" in why:
            raise OptionError(f"keys of this model cannot be cached as {options.key_type} ({why}); use --key-type f16")
        raise OutOfMemory(f"llama.cpp cannot make a cache of {cells} tokens ({why}); pass a smaller --ctx")
    return context, _buffer_sizes(lines)


def _check_room(lib: Any, pointer: int, cells: int, key_bytes: float) -> None:
    """Raise OutOfMemory if the cache, which libllama writes to at once, is larger than the free memory: Linux would kill us."""
    import psutil

    width = lib.llama_model_n_embd(pointer) // max(1, lib.llama_model_n_head(pointer)) * lib.llama_model_n_head_kv(pointer)
    needed = int(cells * lib.llama_model_n_layer(pointer) * width * (key_bytes + 2))
    free = int(psutil.virtual_memory().available)
    if needed > free:
        raise OutOfMemory(
            f"a context of {cells} tokens needs {needed >> 20} MiB of cache and {free >> 20} MiB are free; pass a smaller --ctx"
        )


@contextlib.contextmanager
def _native_lines() -> Iterator[list[tuple[int, str]]]:
    """What the library logs while the block runs, as (level, line); lines the user has not asked for are not shown."""
    logger = logging.getLogger("edge_rt.native")
    before, usual = logger.level, logger.getEffectiveLevel()
    lines: list[tuple[int, str]] = []

    def keep(record: logging.LogRecord) -> bool:
        lines.append((record.levelno, record.getMessage()))
        return record.levelno >= usual

    logger.addFilter(keep)
    logger.setLevel(min(usual, logging.INFO))
    try:
        yield lines
    finally:
        logger.setLevel(before)
        logger.removeFilter(keep)


def _buffer_sizes(lines: Sequence[tuple[int, str]]) -> dict[str, int]:
    """Bytes by kind of buffer (KV, RS for recurrent state, compute, output), which libllama tells only in its log."""
    sizes = dict.fromkeys(("KV", "RS", "compute", "output"), 0)
    for _, text in lines:
        if found := re.search(r"(KV|RS|compute|output) buffer size = +([\d.]+) MiB", text):
            sizes[found[1]] += round(float(found[2]) * (1 << 20))
    return sizes


def _first_error(lines: Sequence[tuple[int, str]]) -> str:
    """The first error names the cause, those after it only who passed it on."""
    return next((text.rpartition("error loading model: ")[2] for level, text in lines if level >= logging.ERROR), "no reason given")


# libllama behind the engine protocol.

# magic, layout version, cells, bytes of payload (runs of positions, then libllama's state), digests of it and of what it belongs to
_HEADER = struct.Struct("<8sIIQ16s16s")
_RUNS, _RUN = struct.Struct("<II"), struct.Struct("<III")  # number of runs, next position; a run
_MAGIC = b"ERTLLAMA"
_LAYOUT = 2


class LlamaCppEngine:
    """A libllama model with one context. ``llama_model`` is the address of its ``llama_model``, for the vocabulary."""

    def __init__(
        self, lib: Any, model: ModelFile, pointer: int, context: Any, buffers: dict[str, int], max_context: int, key_type: str
    ) -> None:
        """Take over ``pointer`` and ``context``; ``buffers`` are bytes by kind: KV, RS, compute, output."""
        self.llama_model = pointer
        self.info = EngineInfo(
            engine="llama_cpp",
            architecture=model.header.architecture,
            n_vocab=lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(pointer)),
            n_layer=lib.llama_model_n_layer(pointer),
            n_embd=lib.llama_model_n_embd(pointer),
            train_context=lib.llama_model_n_ctx_train(pointer),
            max_context=max_context,
            chunk=CHUNK,
        )
        self._lib = lib
        self._model = model
        self._key_type = key_type
        self._context = context
        self._buffers = buffers
        self._call = Calls(lib, context)
        self._release = weakref.finalize(self, _release, lib, self._call.batch, context, pointer)
        self._cells = lib.llama_get_memory(context)
        # A state of fixed size instead of cells: it cannot be cut, only dropped.
        self._indivisible = lib.llama_model_is_recurrent(pointer) or lib.llama_model_is_hybrid(pointer)
        self._window = lib.llama_model_n_swa(pointer)
        self._free_slots = list(range(lib.llama_n_seq_max(context) - 1, -1, -1))
        self._slots: dict[int, int] = {}  # sequence -> libllama's number for it
        self._positions: dict[int, Positions] = {}
        self._adapters = ContextAdapters(lib, pointer, context)
        self._next = 0  # numbers are never handed out twice: use of a freed sequence is an error, not someone else's text

    # ---- sequences ---------------------------------------------------------------------------------------------------

    def new_sequence(self) -> int:
        """Open an empty sequence. Raises OutOfMemory when as many are open as ``llama_cpp.sequences`` allows."""
        self._check_open()
        if not self._free_slots:
            raise OutOfMemory(f"all {len(self._slots)} sequences of the llama_cpp engine are in use; close a session")
        sequence, self._next = self._next, self._next + 1
        self._slots[sequence] = self._free_slots.pop()
        self._positions[sequence] = Positions()
        return sequence

    def fork_sequence(self, sequence: int, length: int) -> int:
        """Open a sequence that starts with the first ``length`` cells of another. Raises ContextError where the model cannot."""
        source = self._slot(sequence)
        self._check_cut(sequence, length)
        new = self.new_sequence()
        self._adapters.copy(sequence, new)
        if length:
            copied = self._positions[sequence].copy(length)
            self._lib.llama_memory_seq_cp(self._cells, source, self._slots[new], 0, copied.next)
            self._positions[new] = copied
        return new

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the cells from ``length`` on. Raises ContextError where the model cannot."""
        slot = self._slot(sequence)
        self._check_cut(sequence, length)
        if length < self.length(sequence):
            if not self._lib.llama_memory_seq_rm(self._cells, slot, self._positions[sequence].of(length), -1):
                raise ContextError(f"{self.info.architecture} models cannot go back to token {length}; start the session anew")
            self._positions[sequence].truncate(length)
            self._follow(sequence)

    def free_sequence(self, sequence: int) -> None:
        """Release a sequence's cells for others; the cache itself stays as it is."""
        slot = self._slot(sequence)
        self._lib.llama_memory_seq_rm(self._cells, slot, -1, -1)
        del self._slots[sequence], self._positions[sequence]
        self._adapters.forget(sequence)
        self._free_slots.append(slot)

    def length(self, sequence: int) -> int:
        """Cells in use."""
        self._slot(sequence)
        return self._positions[sequence].length

    def open_adapter(self, adapter: LoraFile) -> int:
        """Read an adapter; see ``AppliesAdapters``. It stays in memory until ``close``."""
        self._check_open()
        return self._adapters.open(adapter)

    def adapt(self, sequence: int, adapter: int | None, scale: float = 1.0, *, imported: bool = False) -> None:
        """Bind a sequence to an adapter; see ``AppliesAdapters``."""
        if self.length(sequence) and not imported:
            raise ContextError("a sequence with cells cannot go through another adapter; truncate it first, or open another")
        self._adapters.bind(sequence, adapter, scale)

    def next_position(self, sequence: int) -> int:
        """Position of the next token."""
        self._slot(sequence)
        return self._positions[sequence].next

    def remove_cells(self, sequence: int, spans: Sequence[tuple[int, int]]) -> int:
        """Forget cells in the middle; 0: the cache keeps its size. Raises ContextError where the model cannot, ValueError."""
        slot, positions = self._slot(sequence), self._positions[sequence]
        if self._indivisible:
            raise ContextError(f"{self.info.architecture} models cannot forget tokens in the middle; start the session anew")
        left = positions.copy()
        left.remove(spans)
        for start, end in spans:
            for run in positions.part(start, end):
                self._lib.llama_memory_seq_rm(self._cells, slot, run.position, run.position + run.n)
        self._positions[sequence] = left
        self._follow(sequence)
        return 0

    def _follow(self, sequence: int) -> None:
        """No gap at the end: libllama takes the next token only right behind the last one that is left."""
        positions = self._positions[sequence]
        positions.next = positions.of(positions.length - 1) + 1 if positions.length else 0

    def renumber(self, sequence: int) -> None:
        """Close gaps between positions: libllama rotates keys at the next step. Raises ContextError where it cannot.

        It says it can for quantised keys too, but then the next step is a segmentation fault, and under YaRN it scales keys twice
        (llama-cpp-python 0.3.36).
        """
        slot, positions = self._slot(sequence), self._positions[sequence]
        header = self._model.header
        yarn = header.get(f"{header.architecture}.rope.scaling.type") == "yarn"
        if positions.gaps and (self._key_type != "f16" or yarn or not self._lib.llama_memory_can_shift(self._cells)):
            raise ContextError(f"{self.info.architecture} models cannot move tokens to other positions; start the session anew")
        runs = list(positions)
        for run, shift in zip(runs, positions.renumbered(), strict=True):
            if shift:
                self._lib.llama_memory_seq_add(self._cells, slot, run.position, run.position + run.n, -shift)

    def _slot(self, sequence: int) -> int:
        self._check_open()
        if sequence not in self._slots:
            raise ValueError(f"there is no sequence {sequence}")
        return self._slots[sequence]

    def _check_open(self) -> None:
        if not self._release.alive:
            raise NativeError("the engine is closed; open the model again")

    def _check_cut(self, sequence: int, length: int) -> None:
        """Raise ValueError, or ContextError if the model does not keep what a sequence cut to ``length`` needs."""
        held = self.length(sequence)
        if not 0 <= length <= held:
            raise ValueError(f"sequence {sequence} has {held} cells, not {length}")
        if length in (0, held):
            return
        oldest = self._lib.llama_memory_seq_pos_min(self._cells, self._slots[sequence])
        if self._indivisible or (self._window and oldest > max(0, self._positions[sequence].of(length) - self._window)):
            raise ContextError(f"{self.info.architecture} models cannot go back to token {length} of {held}; start the session anew")

    # ---- steps -------------------------------------------------------------------------------------------------------

    def step(self, batches: Sequence[SequenceBatch]) -> list[Logits | None]:
        """Feed every batch and return its logits, as ``Engine.step`` says. More than 512 tokens go to libllama in several calls.

        Raises ContextError or OutOfMemory (then no sequence has changed), ModelChanged, NativeError.
        """
        return list(self._step(batches))

    def hidden(self, batches: Sequence[SequenceBatch]) -> list[npt.NDArray[np.float32] | None]:
        """The same with hidden states in place of logits, as ``EmbedsText`` says; libllama makes both."""
        if not any(batch.logits != "none" for batch in batches):
            return self._step(batches)
        self._check_open()
        self._lib.llama_set_embeddings(self._context, True)
        try:
            return self._step(batches, hidden=True)
        finally:
            self._lib.llama_set_embeddings(self._context, False)

    def _step(self, batches: Sequence[SequenceBatch], *, hidden: bool = False) -> list[npt.NDArray[np.float32] | None]:
        """Any step."""
        self._check_open()
        self._model.check_unchanged()
        check_batches(batches, self.length, self.info)
        arrays = [np.asarray(batch.tokens, dtype=np.int32) for batch in batches]
        if not any(map(len, arrays)):
            return [None] * len(batches)
        order = self._adapters.order([batch.sequence for batch in batches])
        pairs = [(batches[i], arrays[i]) for i in order]
        tokens = np.concatenate([array for _, array in pairs])
        positions = np.concatenate([self._positions[batch.sequence].next + np.arange(len(array), dtype=np.int32) for batch, array in pairs])
        slots = np.repeat([self._slots[batch.sequence] for batch, _ in pairs], [len(array) for _, array in pairs]).astype(np.int32)
        wanted = np.concatenate([_wanted(batch, len(array)) for batch, array in pairs])
        found = np.empty((int(wanted.sum()), self.info.n_embd if hidden else self.info.n_vocab), dtype=np.float32)
        try:
            done = 0
            for chunk, binding in self._calls(pairs):
                self._adapters.use(binding)
                rows = int(wanted[chunk].sum())
                # With embeddings libllama gives those of all tokens, and warns where fewer are asked for.
                self._call.fill(tokens[chunk], positions[chunk], slots[chunk], True if hidden else wanted[chunk])
                held, capacity = sum(one.length for one in self._positions.values()), self.info.max_context
                self._call.decode(f"the sequences' {held} tokens fill the shared cache of {capacity}; close a session or raise --ctx")
                if rows:
                    width = found.shape[1]
                    found[done : done + rows] = self._call.hidden(wanted[chunk], width) if hidden else self._call.logits(rows, width)
                done += rows
        except BaseException as error:
            lost = self._undo([batch.sequence for batch in batches])
            if lost and isinstance(error, EdgeError):
                raise NativeError(f"{error}; this step's sessions are lost: {self.info.architecture} models cannot go back") from error
            raise
        results: list[npt.NDArray[np.float32] | None] = [None] * len(batches)
        row = 0
        for i, (batch, array) in zip(order, pairs, strict=True):
            self._positions[batch.sequence].append(len(array))
            rows = {"none": 0, "last": min(1, len(array)), "all": len(array)}[batch.logits]
            results[i] = found[row : row + rows] if rows else None
            row += rows
        return results

    def tell(self, moved: Callable[[], None]) -> None:
        """Call ``moved`` after each node of libllama's graph in calls of many tokens."""
        self._call.tell(moved)

    def _calls(self, pairs: Sequence[tuple[SequenceBatch, npt.NDArray[np.int32]]]) -> Iterator[tuple[slice, Binding]]:
        """The calls that the tokens of some batches take, one behind the other: at most 512 tokens in each, all through one adapter."""
        start = 0
        for binding, group in itertools.groupby(pairs, key=lambda pair: self._adapters.of(pair[0].sequence)):
            end = start + sum(len(array) for _, array in group)
            yield from ((slice(at, min(at + CHUNK, end)), binding) for at in range(start, end, CHUNK))
            start = end

    def _undo(self, sequences: Sequence[int]) -> bool:
        """After a failed step: take back what earlier chunks of it have added. True if some sequence had to be emptied instead."""
        lost = False
        for sequence in sequences:
            slot = self._slots[sequence]
            if not self._lib.llama_memory_seq_rm(self._cells, slot, self._positions[sequence].next, -1):
                self._lib.llama_memory_seq_rm(self._cells, slot, -1, -1)  # an indivisible state has moved on
                self._positions[sequence], lost = Positions(), True
        return lost

    def exact_rows(self) -> int:
        """1: libllama picks other kernels for several rows, and this engine does not probe which of them agree to the bit."""
        return 1

    # ---- saving ------------------------------------------------------------------------------------------------------

    def export_sequence(self, sequence: int) -> bytes:
        """The cells of a sequence as bytes, under a header that says which model and library they belong to."""
        slot, length, positions = self._slot(sequence), self.length(sequence), self._positions[sequence]
        runs = list(positions)
        payload = _RUNS.pack(len(runs), positions.next) + b"".join(_RUN.pack(*run) for run in runs)
        if length:
            buffer = np.empty(self._lib.llama_state_seq_get_size(self._context, slot), dtype=np.uint8)
            written = self._lib.llama_state_seq_get_data(self._context, np.ctypeslib.as_ctypes(buffer), len(buffer), slot)
            if written != len(buffer):
                raise NativeError(f"libllama wrote {written} of {len(buffer)} bytes of a sequence's state")
            payload += buffer.tobytes()
        return _HEADER.pack(_MAGIC, _LAYOUT, length, len(payload), _digest(payload, length), self._identity()) + payload

    def import_sequence(self, data: bytes | memoryview) -> int:
        """Open a sequence from exported bytes.

        Raises SessionFileError if they are damaged or belong to another model, library version or key type: libllama is never
        shown a state it did not write. Raises OutOfMemory if there is no room.
        """
        self._check_open()
        data = memoryview(data).cast("B")
        if len(data) < _HEADER.size or bytes(data[:8]) != _MAGIC:
            raise SessionFileError("this is not a sequence saved by the llama_cpp engine; save the session again")
        _, layout, length, size, digest, identity = _HEADER.unpack_from(data)
        payload = data[_HEADER.size :]
        if layout != _LAYOUT or identity != self._identity():
            raise SessionFileError("the saved sequence belongs to another model, key type or version of llama.cpp; save the session again")
        if len(payload) != size or _digest(payload, length) != digest:
            raise SessionFileError("the saved sequence is damaged; save the session again")
        if length > self.info.max_context:
            raise SessionFileError(f"the saved sequence has {length} tokens, more than the context of {self.info.max_context}; raise --ctx")
        n_runs, following = _RUNS.unpack_from(payload)  # the digest vouches for what follows
        positions = Positions([Run(*_RUN.unpack_from(payload, _RUNS.size + _RUN.size * i)) for i in range(n_runs)])
        positions.next = following
        sequence = self.new_sequence()
        if length:
            slot = self._slots[sequence]
            state = np.ctypeslib.as_ctypes(np.frombuffer(payload[_RUNS.size + _RUN.size * n_runs :], dtype=np.uint8).copy())
            if self._lib.llama_state_seq_set_data(self._context, state, len(state), slot) != len(state):
                self.free_sequence(sequence)
                raise OutOfMemory(f"the shared cache of {self.info.max_context} cells has no room for {length} more; close a session")
        self._positions[sequence] = positions
        return sequence

    def _identity(self) -> bytes:
        """Digest of what a saved state belongs to, 16 bytes."""
        return _digest(f"{self._model.key()} {self._lib.llama_version()!r} {self._key_type}".encode())

    def memory(self) -> MemoryReport:
        """Bytes held now, by libllama's own account; how much of the weights is resident, it cannot say."""
        self._check_open()
        return MemoryReport(
            weights_mapped=self._lib.llama_model_size(self.llama_model),
            weights_resident=None,
            cache=self._buffers["KV"] + self._buffers["RS"],
            compute=self._buffers["compute"] + self._buffers["output"],
        )

    def close(self) -> None:
        """Release everything; calling it again does nothing."""
        self._release()


def _wanted(batch: SequenceBatch, n: int) -> npt.NDArray[np.bool_]:
    """For which of a batch's n tokens logits are wanted: bool [n]."""
    wanted = np.full(n, batch.logits == "all")
    wanted[-1:] = batch.logits != "none"
    return wanted


def _digest(data: bytes | memoryview, number: int = 0) -> bytes:
    """16 bytes that depend on both."""
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16)
    digest.update(data)
    return digest.digest()


def _release(lib: Any, batch: Any, context: Any, model: int) -> None:
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
