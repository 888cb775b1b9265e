"""The sequences of the torch engine: their cells, and all that can become of them but a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edge_rt.hooks import (
    ContextError,
    NativeError,
    OptionError,
    OutOfMemory,
    Pruned,
    SessionFileError,
    check_fits,
    largest_capacity,
    next_capacity,
)
from edge_rt_mlu.cells import Cells, Shape
from edge_rt_mlu.lora import Applied
from edge_rt_mlu.saved import read_cells, write_cells

if TYPE_CHECKING:
    from edge_rt.hooks import EngineInfo
    from edge_rt_mlu.lora import LoraWeights
    from edge_rt_mlu.rope import Rope

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")

WATCHED = 64
"""Queries that edge-rt has a sequence keep, at most (core/kv/pruning.py)."""


@contextmanager
def errors(device: str) -> Iterator[None]:
    """What PyTorch raises as errors of edge-rt: OutOfMemory, else NativeError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in _NO_MEMORY):
            raise OutOfMemory(f"there is not enough memory on {device}; use a shorter --ctx, fewer sessions or a smaller model") from error
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise NativeError(f"PyTorch failed on {device}: {said}; see that the driver fits torch") from error


class TorchSequences:
    """The part of the engine that does not compute with the model, but for rotating keys and scoring cells."""

    info: EngineInfo
    _shape: Shape
    _rope: Rope

    def __init__(self) -> None:
        self._sequences: dict[int, Cells] = {}
        self._adapters: dict[int, LoraWeights] = {}
        self._next = 0
        self._closed = False

    def _adopt(self, cells: Cells) -> int:
        self._next += 1
        self._sequences[self._next] = cells
        return self._next

    def new_sequence(self) -> int:
        """Open an empty sequence; memory comes with its first tokens."""
        if self._closed:
            raise NativeError("the engine is closed; open the model again")
        return self._adopt(Cells(self._shape))

    def fork_sequence(self, sequence: int, length: int) -> int:
        """Copy the first ``length`` cells into a sequence of its own."""
        source = self._sequences[sequence]
        length = min(length, source.length)
        with errors(self.info.device):
            return self._adopt(source.copy(length, next_capacity(0, length + 1, self.info.max_context) if length else 0))

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the cells from ``length`` on."""
        self._sequences[sequence].truncate(length)

    def free_sequence(self, sequence: int) -> None:
        """Release a sequence and its memory."""
        del self._sequences[sequence]

    def length(self, sequence: int) -> int:
        """Cells in use."""
        return self._sequences[sequence].length

    def adapt(self, sequence: int, adapter: int | None, scale: float = 1.0, *, imported: bool = False) -> None:
        """Bind an empty sequence to an adapter; see ``AppliesAdapters``."""
        cells = self._sequences[sequence]
        if cells.length and not imported:
            raise ContextError("a sequence with cells cannot go through another adapter; truncate it first, or open another")
        cells.applied = None if adapter is None or not scale else Applied(self._adapters[adapter], scale)

    def _room(self, cells: Cells, tokens: int, more: int = 0) -> None:
        """Move to larger memory if ``tokens`` more do not fit: for all that are to come at once, as moving takes time."""
        needed = cells.length + tokens
        if needed > cells.capacity:
            cells.resize(next_capacity(cells.capacity, needed + more, self.info.max_context))

    # ---- cells that leave and come back --------------------------------------------------------------------------------

    def next_position(self, sequence: int) -> int:
        """Position of the next token."""
        return self._sequences[sequence].positions.next

    def remove_cells(self, sequence: int, spans: Sequence[tuple[int, int]]) -> int:
        """Forget cells in the middle; bytes given back. Raises ValueError for spans that do not rise within the sequence."""
        with errors(self.info.device):
            return self._sequences[sequence].remove(spans, self.info.max_context)

    def renumber(self, sequence: int) -> None:
        """Close gaps between positions: keys are rotated back by as much as their tokens move."""
        cells = self._sequences[sequence]
        with errors(self.info.device):
            cells.rotate(cells.renumber(), self._rope)

    def export_cells(self, sequence: int, start: int, end: int) -> bytes:
        """Cells [start, end) as bytes."""
        with errors(self.info.device):
            return write_cells(self._sequences[sequence], start, end)

    def insert_cells(self, sequence: int, at: int, data: bytes | memoryview) -> int:
        """Put exported cells before cell ``at``; see ``MovesCells``."""
        saved, cells = read_cells(data, self._shape), self._sequences[sequence]
        if saved.mixed is not None:
            raise ContextError("cells that were pruned head by head cannot be put between others; restore the session they are of")
        check_fits(cells.length + saved.positions.length, self.info)
        with errors(self.info.device):
            self._room(cells, saved.positions.length)
            cells.rotate(cells.insert(at, saved.positions, saved.data), self._rope)
        return saved.positions.length

    def export_sequence(self, sequence: int) -> bytes:
        """All cells as bytes."""
        return self.export_cells(sequence, 0, self.length(sequence))

    def import_sequence(self, data: bytes | memoryview) -> int:
        """Open a sequence from exported bytes. Raises SessionFileError, OutOfMemory."""
        saved = read_cells(data, self._shape)
        n = saved.positions.length
        if n > self.info.max_context:
            raise SessionFileError(f"the saved session holds {n} tokens, the context {self.info.max_context}; raise --ctx")
        with errors(self.info.device):
            cells = Cells(self._shape, next_capacity(0, n + 1, self.info.max_context) if n else 0)
            cells.positions.next = saved.positions.next
            cells.insert(0, saved.positions, saved.data)
        cells.mixed = saved.mixed
        return self._adopt(cells)

    # ---- pruning -----------------------------------------------------------------------------------------------------

    def watch(self, sequence: int, window: int) -> None:
        """Keep the last ``window`` queries of every layer from now on; 0 stops. Raises OptionError."""
        from edge_rt_mlu.cells import Ring

        if not 0 <= window <= self.info.max_context:
            raise OptionError(f"{window} queries cannot be kept; choose 0 to {self.info.max_context}")
        cells = self._sequences[sequence]
        if window != (cells.ring.window if cells.ring else 0):
            cells.ring = Ring(self._shape, window) if window else None

    def prune(self, sequence: int, keep: int, *, first: int, last: int, method: str = "defensive", queries: int | None = None) -> Pruned:
        """Keep ``keep`` cells of each head; see ``PrunesCells``. They move to memory of that size."""
        from edge_rt.hooks import check_pruning, choose_cells
        from edge_rt_mlu.scores import cached_layers

        check_pruning(keep, first, last, method, queries)
        cells = self._sequences[sequence]
        length, held = cells.length, cells.nbytes
        if keep >= length:
            return Pruned(0, 0)
        with errors(self.info.device):
            kept = choose_cells(cached_layers(cells, queries), keep, first, last, method)
            cells.prune(kept, next_capacity(0, keep + 1, self.info.max_context))
        return Pruned(length - keep, held - cells.nbytes)

    @property
    def cell_bytes(self) -> int:
        """Bytes one cell takes over all layers."""
        return self._shape.cell_bytes

    def mixed_cells(self, sequence: int) -> int:
        """How many leading cells hold another token in every head."""
        return self._sequences[sequence].n_mixed

    # ---- what they will take -----------------------------------------------------------------------------------------

    def sequence_bytes(self, sequence: int) -> int:
        """What a sequence may hold as it is."""
        return self._sequences[sequence].nbytes

    def needed_bytes(self, sequence: int | None, cells: int, *, pruned: bool = False) -> int:
        """The most that a sequence holds on its way to ``cells`` cells; see ``PredictsMemory``."""
        s, held = self._shape, None if sequence is None else self._sequences[sequence]
        now = 0 if held is None else held.capacity
        most = largest_capacity(now, min(cells, self.info.max_context), self.info.max_context)
        found = most * s.cell_bytes
        if pruned or most > now:  # a move: of one layer both are held, and what is gathered on the way
            found += 2 * found // s.layers
        if pruned:  # the queries, twice while they roll on, and where the tokens of all heads stand, before a pass and after it
            found += 4 * s.layers * (2 * s.queries * s.size * WATCHED + 2 * s.heads * most)
        elif held is not None:
            found += held.beside
        return found if held is None else max(found, held.nbytes)
