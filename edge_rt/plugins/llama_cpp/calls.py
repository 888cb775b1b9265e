"""One call of llama_decode: its tokens in, logits or hidden states out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from edge_rt.hooks import NativeError, OutOfMemory, recent_native_errors

if TYPE_CHECKING:
    import numpy.typing as npt

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
