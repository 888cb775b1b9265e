"""edge-rt and libllama behind one small face: feed tokens, get logits. Neither samples nor writes text here."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from llama_cpp import llama_cpp

import edge_rt
from bench.timing import WIDE, interleave
from edge_rt.core.engine import SequenceBatch

AUTO, OFF, ON = -1, 0, 1
_FLASH = {AUTO: "flash attention by default", OFF: "flash attention off", ON: "flash attention on"}
_BATCH = 2048
_quiet = llama_cpp.llama_log_callback(lambda *_: None)  # libllama keeps its address: it must live as long as the process


def silence_libllama() -> None:
    """Drop what libllama logs."""
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))


class Contender(Protocol):
    """What is measured."""

    def feed(self, tokens: Sequence[int]) -> Any:
        """Append tokens; logits of the last one, float32 [n_vocab], valid until the next call."""
        ...

    def feed_all(self, tokens: Sequence[int]) -> Any:
        """Append tokens; logits of all, float32 [n_tokens, n_vocab]."""
        ...

    def truncate(self, length: int) -> None:
        """Forget the cells from ``length`` on."""
        ...

    def close(self) -> None:
        """Give back what it holds."""
        ...


class Ours:
    """The engine of an open edge-rt model."""

    def __init__(self, path: Path, context: int, threads: int | None = None, pack: bool = True, compensation: str = "auto") -> None:
        self.model = edge_rt.open(path, context=context, threads=threads, pack=pack, compensation=compensation)
        self._engine = self.model.engine
        self._sequence = self._engine.new_sequence()

    @property
    def decode_flash(self) -> int:
        """The setting of libllama whose kernels decoding uses here."""
        return OFF if getattr(self._engine, "transposed_values", False) else ON

    @property
    def threads(self) -> int:
        """With which the last step was computed."""
        return int(getattr(self._engine, "_threads"))  # noqa: B009 - it is no part of the engine's protocol

    @property
    def length(self) -> int:
        """Cells in use."""
        return self._engine.length(self._sequence)

    def feed(self, tokens: Sequence[int]) -> Any:
        (logits,) = self._engine.step([SequenceBatch(self._sequence, tokens)])
        assert logits is not None, "a step with the last token's logits"
        return np.asarray(logits[0])

    def feed_all(self, tokens: Sequence[int]) -> Any:
        (logits,) = self._engine.step([SequenceBatch(self._sequence, tokens, "all")])
        assert logits is not None, "a step with all logits"
        return np.array(logits)

    def truncate(self, length: int) -> None:
        self._engine.truncate(self._sequence, length)

    def close(self) -> None:
        self.model.close()


@dataclass(frozen=True, slots=True)
class PeerSetting:
    """Settings of libllama that matter here; the defaults are its own, with a thread for each CPU."""

    threads: int
    flash: int = AUTO
    repack: bool = True
    load_mode: int = llama_cpp.LLAMA_LOAD_MODE_AUTO

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        mapped = "read" if self.load_mode == llama_cpp.LLAMA_LOAD_MODE_NONE else "mapped"
        return f"{_FLASH[self.flash]}, {threads}, {'repacked' if self.repack else 'not repacked'}, {mapped}"


class Peer:
    """libllama through llama-cpp-python's low-level bindings, one model and one context."""

    def __init__(self, path: Path, setting: PeerSetting, context: int) -> None:
        """Raises RuntimeError if libllama cannot load the model."""
        self.setting = setting
        silence_libllama()
        model_params = llama_cpp.llama_model_default_params()
        model_params.use_extra_bufts, model_params.load_mode = setting.repack, setting.load_mode
        self._model: Any = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise RuntimeError(f"libllama cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.no_perf = context, _BATCH, True
        params.n_threads = params.n_threads_batch = setting.threads
        params.flash_attn_type = setting.flash
        self._context: Any = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"libllama cannot make a context of {context} tokens")
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._one = (llama_cpp.llama_token * 1)()
        self._length = 0
        self._views: dict[int, Any] = {}

    def feed(self, tokens: Sequence[int]) -> Any:
        for start in range(0, len(tokens), _BATCH):
            chunk = tokens[start : start + _BATCH]
            ids = self._one if len(chunk) == 1 else (llama_cpp.llama_token * len(chunk))()
            ids[:] = list(chunk)
            if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(ids, len(chunk))):
                raise RuntimeError("llama_decode failed")
        self._length += len(tokens)
        return self._view(llama_cpp.llama_get_logits_ith(self._context, -1), 1)[0]

    def feed_all(self, tokens: Sequence[int]) -> Any:
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, self._length + i, 1, 1
            batch.seq_id[i][0] = 0
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError("llama_decode failed")
        self._length += len(tokens)
        return np.array(self._view(llama_cpp.llama_get_logits(self._context), len(tokens)))

    def _view(self, pointer: Any, rows: int) -> Any:
        """Logits in place. Making a view takes longer than asking for the address, so the one for decoding is kept."""
        address = ctypes.addressof(pointer.contents)
        view = self._views.get(address)
        if view is None or len(view) != rows:
            view = self._views[address] = np.ctypeslib.as_array(pointer, shape=(rows, self._n_vocab))
        return view

    def truncate(self, length: int) -> None:
        llama_cpp.llama_memory_seq_rm(self._memory, 0, length, -1)
        self._length = length

    def use_threads(self, threads: int) -> None:
        """Go on with another number of threads."""
        llama_cpp.llama_set_n_threads(self._context, threads, threads)
        self.setting = replace(self.setting, threads=threads)

    def close(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
            llama_cpp.llama_model_free(self._model)
            self._context = self._model = None


def in_turns(
    opened: Mapping[str, Ours], start: int, measure: Callable[[Ours], float], *, rounds: int, most: int, deadline: float, wide: float = WIDE
) -> dict[str, list[float]]:
    """Measure models that have ``start`` cells, as ``timing.interleave`` does, and close them."""
    try:
        for one in opened.values():
            one.feed(random_prompt(start))
        contenders = {name: partial(measure, one) for name, one in opened.items()}
        return interleave(contenders, rounds=rounds, most=most, deadline=deadline, wide=wide)
    finally:
        for one in opened.values():
            one.close()


def decode_seconds(contender: Contender, start: int, tokens: int) -> float:
    """Seconds a token for greedy decoding from cell ``start``; two tokens before them wake the threads and do not count."""
    contender.truncate(start)
    token = 1
    for _ in range(2):
        token = int(contender.feed([token]).argmax())
    started = time.perf_counter()
    for _ in range(tokens):
        token = int(contender.feed([token]).argmax())
    return (time.perf_counter() - started) / tokens


def random_prompt(length: int) -> list[int]:
    """Token ids that are in every vocabulary measured here; what they say does not change how long they take."""
    return [int(token) for token in np.random.default_rng(0).integers(100, 8000, length)]


Measure = Callable[[Contender], float]
