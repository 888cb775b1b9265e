"""LoRA adapters in libllama. They belong to its context, through which all tokens of a call go: so a step makes a call for each adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_rt.hooks import NativeError, UnsupportedModel, recent_native_errors

if TYPE_CHECKING:
    from edge_rt.hooks import LoraFile

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
