"""A runtime that holds a model and times what it is asked to, one JSON line for one: ``[work, cells, tokens]`` -> seconds.

Usage: ``python -m bench.programs.contender edge-rt|llama.cpp|ik_llama MODEL CONTEXT THREADS [SETTING ...]``, from the repository's root.
Settings of llama.cpp: ``fa=0``, ``repack=0`` (default: flash attention on, weights repacked, as libllama has them); of ik_llama:
``rtr=1`` (run-time repacking; flash attention is on, as it has it). A process for each, because libraries of the same names do not live
in one, and because ggml's threads would meet.

Work: ``prefill`` of ``tokens`` into an empty cache; ``decode``: a token, the mean of ``tokens`` greedy ones behind ``cells``; ``rows``: one
step of ``tokens`` tokens with the logits of all behind ``cells``, as verifying drafts takes it, the median of five.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class IkLlama:
    """ik_llama.cpp through the bindings of ik-llama-cpp-python. Tokens, lengths and logits as ``bench.contenders.Contender`` has them."""

    def __init__(self, path: Path, context: int, threads: int, *, repack: bool) -> None:
        import ctypes

        from ik_llama_cpp import _ctypes_api as ik  # type: ignore[import-not-found]

        self._ik, self._ctypes = ik, ctypes
        ik.llama_backend_init()
        model_params = ik.llama_model_default_params()
        model_params.repack_tensors, model_params.use_mmap = repack, not repack
        self._model = ik.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise RuntimeError(f"ik_llama cannot load {path}")
        params = ik.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_threads, params.n_threads_batch = context, 2048, threads, threads
        params.flash_attn = True
        self._context = ik.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"ik_llama cannot make a context of {context} tokens")
        self._n_vocab = ik.llama_vocab_n_tokens(ik.llama_model_get_vocab(self._model))
        self._remove = ik._lib.llama_kv_cache_seq_rm
        self._remove.argtypes = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32]
        self._length = 0

    def feed(self, tokens: Sequence[int]) -> Any:
        return self._step(tokens, all_logits=False)[-1]

    def feed_all(self, tokens: Sequence[int]) -> Any:
        return self._step(tokens, all_logits=True)

    def _step(self, tokens: Sequence[int], *, all_logits: bool) -> Any:
        count = len(tokens)
        batch = self._ik.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, self._length + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, all_logits or i == count - 1
        status = self._ik.llama_decode(self._context, batch)
        self._ik.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"ik_llama's llama_decode failed with {status}")
        self._length += count
        first = self._ik.llama_get_logits_ith(self._context, 0 if all_logits else count - 1)
        return np.ctypeslib.as_array(first, shape=(count if all_logits else 1, self._n_vocab))

    def truncate(self, length: int) -> None:
        self._remove(self._context, 0, length, -1)
        self._length = length


def opened(runtime: str, path: Path, context: int, threads: int, settings: dict[str, str]) -> Any:
    """The runtime with the model open."""
    if runtime == "ik_llama":
        return IkLlama(path, context, threads, repack=settings.get("rtr") == "1")
    from bench.contenders import OFF, ON, Ours, Peer, PeerSetting

    if runtime == "edge-rt":
        return Ours(path, context, threads)
    flash, repack = OFF if settings.get("fa") == "0" else ON, settings.get("repack") != "0"
    return Peer(path, PeerSetting(threads, flash, repack), context)


def seconds(contender: Any, work: str, cells: int, tokens: int) -> float:
    """What the module's docstring says of ``work``."""
    prompt = [int(token) for token in np.random.default_rng(0).integers(100, 8000, max(cells, tokens))]
    contender.truncate(0)
    if work == "prefill":
        started = time.perf_counter()
        contender.feed(prompt[:tokens])
        return time.perf_counter() - started
    contender.feed(prompt[:cells])
    if work == "rows":
        return statistics.median(_step_seconds(contender, prompt[:tokens], cells) for _ in range(5))
    token = int(contender.feed([1]).argmax())
    started = time.perf_counter()
    for _ in range(tokens):
        token = int(contender.feed([token]).argmax())
    return (time.perf_counter() - started) / tokens


def _step_seconds(contender: Any, tokens: Sequence[int], cells: int) -> float:
    contender.truncate(cells)
    started = time.perf_counter()
    contender.feed_all(tokens)
    return time.perf_counter() - started


def main() -> None:
    """Answer requests until standard input ends. What libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    runtime, path, context, threads, *settings = sys.argv[1:]
    contender = opened(runtime, Path(path), int(context), int(threads), dict(item.split("=", 1) for item in settings))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(seconds(contender, *json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
