"""libllama itself, through llama-cpp-python's own bindings: what our graphs are compared with, bit for bit."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np

from edge_rt.core.weights import repack
from edge_rt.native import ggml

_QUIET = llama.llama_log_callback(lambda *_: None)


class Reference:
    """One model and one context of libllama; ``flash`` chooses its attention.

    ``layouts``: the packed buffer types it may put weights into (None: those that edge-rt uses here, which on x86 are all it would
    use by itself). Each has kernels of its own, so that bits are the same only where both programs use the same layouts.
    """

    def __init__(
        self, path: Path, *, flash: bool, threads: int = 1, context: int = 512, key_type: int = 1, layouts: Sequence[str] | None = None
    ) -> None:
        llama.llama_log_set(_QUIET, ctypes.c_void_p(0))
        with _offered(tuple(repack.layouts()) if layouts is None else layouts):
            self._model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        assert self._model, f"libllama cannot load {path}"
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, context, 512
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1 if flash else 0
        params.type_k = key_type
        self._context = llama.llama_init_from_model(self._model, params)
        self._n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._at = 0

    def feed(self, tokens: Sequence[int]) -> Any:
        """Logits of every token: float32 [n_tokens, n_vocab]."""
        batch = llama.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self._at + i, 1, 1
            batch.seq_id[i][0] = 0
        assert llama.llama_decode(self._context, batch) == 0
        llama.llama_batch_free(batch)
        self._at += len(tokens)
        return np.ctypeslib.as_array(llama.llama_get_logits(self._context), shape=(len(tokens), self._n_vocab)).copy()

    def remove(self, start: int, end: int, *, close_gap: bool = False) -> None:
        """Forget positions [start, end); with ``close_gap`` later ones move down, their keys rotated."""
        memory = llama.llama_get_memory(self._context)
        assert llama.llama_memory_seq_rm(memory, 0, start, end)
        if close_gap:
            llama.llama_memory_seq_add(memory, 0, end, -1, start - end)
            self._at -= end - start

    def close(self) -> None:
        llama.llama_free(self._context)
        llama.llama_model_free(self._model)


@contextmanager
def _offered(names: Sequence[str]) -> Iterator[None]:
    """Let libllama choose only among these packed buffer types. It has a switch for all of them and none for each, but asks
    the CPU's device for the list: an array of the library's that ends with NULL.
    """
    types = ggml.extra_buffer_types()
    registry = ggml.c.backend_cpu_reg()
    ask = ggml.c.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    listing = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(ask)(ggml.c.backend_reg_dev_get(registry, 0))

    def write(chosen: Sequence[str]) -> None:
        for i, address in enumerate([*(types[name] for name in chosen), None]):
            listing[i] = address

    write(names)
    try:
        yield
    finally:
        write(tuple(types))
