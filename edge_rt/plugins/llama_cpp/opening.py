"""Loading a model into libllama and making a context for it."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edge_rt.hooks import EngineOptions, NativeError, OptionError, OutOfMemory, UnsupportedModel, available_cpus, install_native_log
from edge_rt.plugins.llama_cpp.calls import CHUNK
from edge_rt.plugins.llama_cpp.engine import LlamaCppEngine

if TYPE_CHECKING:
    from edge_rt.hooks import ModelFile

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
