"""The sequences of the engine on libggml: a cache for each, and all that can become of its cells but a step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_rt.core.autotune import ComputeBuffers, autotune_v_layout, estimate_compute_buffer
from edge_rt.core.engine import MemoryReport, Pruned, check_fits
from edge_rt.core.graph.adapters import widest
from edge_rt.core.graph.decoder import FAMILIES
from edge_rt.core.graph.step import GRAPH_BYTES
from edge_rt.core.kv.cache import KVCache, cell_bytes, read_cells, write_cells
from edge_rt.core.kv.ops import rotate_keys
from edge_rt.core.kv.positions import largest_capacity, next_capacity, padded
from edge_rt.core.weights.lora import AppliedLora
from edge_rt.errors import ContextError, OptionError, SessionFileError
from edge_rt.native.memory import PAGE

if TYPE_CHECKING:
    from edge_rt.core.engine import EngineInfo, Logits
    from edge_rt.core.graph.builder import AttentionSupport
    from edge_rt.core.graph.config import ModelConfig
    from edge_rt.core.graph.step import GraphCache, StepGraph
    from edge_rt.core.kv.positions import Move
    from edge_rt.core.weights.error_correction import Corrections
    from edge_rt.core.weights.gpu_offload import Offloaded
    from edge_rt.core.weights.lora import AdapterWeights
    from edge_rt.core.weights.store import WeightStore
    from edge_rt.core.weights.streaming import Paging
    from edge_rt.native import ggml


@dataclass(slots=True)
class Decoding:
    """What is needed to repeat the last step one cell on, ``left`` times at most.

    Lists are in the order of the step's batches: ``sequences``, their ``caches``, ``cells`` (index of the cell that the next step fills),
    ``columns`` in the graph, and ``rows`` of its output. ``adapters``: adapters that at least one of the sequences is bound to.
    """

    sequences: list[int]
    caches: list[KVCache]
    cells: list[int]
    columns: list[int]
    rows: list[Logits | None]
    graph: StepGraph
    left: int
    adapters: set[AdapterWeights]


class GgmlSequences:
    """The part of ``GgmlEngine`` that does not compute with the model, but for rotating keys and scoring cells.

    ``_last`` is the step that the next may repeat; whatever changes a cache forgets it, and with it ``_graphs`` over that cache.
    """

    info: EngineInfo
    config: ModelConfig
    weights: WeightStore
    _backend: ggml.Handle
    _graphs: GraphCache
    _paging: Paging
    _key_type: int
    _chunk: int
    _traits: AttentionSupport
    _offloaded: Offloaded | None = None
    _corrections: Corrections | None = None
    _compensated: str | None = None

    def __init__(self, transposed: bool | None) -> None:
        """``transposed``: the layout of values, None for what is faster here."""
        self._sequences: dict[int, KVCache] = {}
        self._adapters: dict[int, AdapterWeights] = {}
        self._adapted: dict[int, AppliedLora] = {}  # by sequence
        self._next = 0
        self._last: Decoding | None = None
        self._transposed = transposed
        self._largest: dict[tuple[int, int, int], ComputeBuffers] = {}

    def new_sequence(self) -> int:
        """Open an empty sequence; memory comes with its first tokens."""
        return self._adopt(self._cache(padded(1)))

    def fork_sequence(self, sequence: int, length: int) -> int:
        """Copy the first ``length`` cells into a sequence of its own."""
        source = self._sequences[sequence]
        length = min(length, source.length)
        fork = self._adopt(source.copy(length, next_capacity(0, length + 1, self.info.max_context)))
        if applied := self._adapted.get(sequence):
            self._adapted[fork] = applied
        return fork

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the cells from ``length`` on."""
        self._sequences[sequence].truncate(length)

    def free_sequence(self, sequence: int) -> None:
        """Release a sequence and its memory."""
        self._last = None
        cache = self._sequences.pop(sequence)
        self._adapted.pop(sequence, None)
        self._graphs.forget(cache.view)
        cache.close()

    def length(self, sequence: int) -> int:
        """Cells in use."""
        return self._sequences[sequence].length

    def adapt(self, sequence: int, adapter: int | None, scale: float = 1.0, *, imported: bool = False) -> None:
        """Bind an empty sequence to an adapter; see ``AppliesAdapters``."""
        if self._sequences[sequence].length and not imported:
            raise ContextError("a sequence with cells cannot go through another adapter; truncate it first, or open another")
        self._last = None
        self._adapted.pop(sequence, None)
        if adapter is not None and scale:
            self._adapted[sequence] = AppliedLora(self._adapters[adapter], scale)

    @property
    def transposed_values(self) -> bool:
        """Whether cached values are transposed and decoding uses matmuls, not flash attention: what is faster here, timed once."""
        if self._transposed is None:
            self._transposed = autotune_v_layout(self.config, self._key_type)
        return self._transposed

    def _cache(self, capacity: int) -> KVCache:
        """An empty cache in the layout that decodes fastest here."""
        return KVCache(self.config, self._key_type, capacity, transposed=self.transposed_values, offloaded=self._offloaded)

    def _adopt(self, cache: KVCache) -> int:
        self._next += 1
        self._sequences[self._next] = cache
        return self._next

    def _room(self, sequence: int, tokens: int, more: int = 0) -> KVCache:
        """The sequence's cache, moved to a larger one if ``tokens`` more do not fit: one for all that are to come, as moving takes time."""
        cache = self._sequences[sequence]
        needed = cache.length + tokens
        if needed <= cache.capacity:
            return cache
        larger = cache.moved(next_capacity(cache.capacity, needed + more, self.info.max_context))
        self._replace(sequence, larger)
        return larger

    def _replace(self, sequence: int, cache: KVCache) -> None:
        """Cells have moved to another cache: the old one goes, and with it the graphs over it."""
        self._last = None
        old, self._sequences[sequence] = self._sequences[sequence], cache
        self._graphs.forget(old.view)
        old.close()

    # ---- cells that leave and come back --------------------------------------------------------------------------------

    def next_position(self, sequence: int) -> int:
        """Position of the next token."""
        return self._sequences[sequence].positions.next

    def remove_cells(self, sequence: int, spans: Sequence[tuple[int, int]]) -> int:
        """Forget cells in the middle; bytes given back. Raises ValueError for spans that do not rise within the sequence."""
        self._last = None
        return self._sequences[sequence].remove(spans)

    def renumber(self, sequence: int) -> None:
        """Close gaps between positions: keys are rotated back by as much as their tokens move."""
        self._last = None
        cache = self._sequences[sequence]
        self._rotate(cache, cache.renumber())

    def _rotate(self, cache: KVCache, moves: Sequence[Move]) -> None:
        family = FAMILIES[self.config.architecture]
        factors = self.weights.get("rope_freqs.weight") if family.rope_factors else None
        rotate_keys(cache, self.config, family.rope_mode, factors, moves, self._backend)

    def export_cells(self, sequence: int, start: int, end: int) -> bytes:
        """Cells [start, end) as bytes."""
        return write_cells(self._sequences[sequence], self.config, self._key_type, start, end)

    def insert_cells(self, sequence: int, at: int, data: bytes | memoryview) -> int:
        """Put exported cells before cell ``at``; see ``MovesCells``."""
        positions, mixed, cells = read_cells(data, self.config, self._key_type)
        if mixed is not None:
            raise ContextError("cells that were pruned head by head cannot be put between others; restore the session they are of")
        check_fits(self._sequences[sequence].length + positions.length, self.info)
        self._last = None
        cache = self._room(sequence, positions.length)
        self._rotate(cache, cache.insert(at, positions, cells))
        return positions.length

    def export_sequence(self, sequence: int) -> bytes:
        """All cells as bytes."""
        return self.export_cells(sequence, 0, self.length(sequence))

    def import_sequence(self, data: bytes | memoryview) -> int:
        """Open a sequence from exported bytes. Raises SessionFileError."""
        positions, mixed, cells = read_cells(data, self.config, self._key_type)
        if positions.length > self.info.max_context:
            raise SessionFileError(f"the saved session holds {positions.length} tokens, the context {self.info.max_context}; raise --ctx")
        cache = self._cache(next_capacity(0, positions.length + 1, self.info.max_context))
        try:
            cache.positions.next = positions.next
            cache.insert(0, positions, cells)
            cache.mixed = mixed
        except BaseException:
            cache.close()
            raise
        return self._adopt(cache)

    # ---- pruning -----------------------------------------------------------------------------------------------------

    def watch(self, sequence: int, window: int) -> None:
        """Keep the last ``window`` queries of every layer from now on; 0 stops. Raises OptionError, OutOfMemory."""
        if not 0 <= window <= self.info.max_context:
            raise OptionError(f"{window} queries cannot be kept; choose 0 to {self.info.max_context}")
        cache = self._sequences[sequence]
        if window == (cache.ring.window if cache.ring else 0):
            return
        self._last = None
        self._graphs.forget(cache.view)
        cache.watch(window)

    def prune(self, sequence: int, keep: int, *, first: int, last: int, method: str = "defensive", queries: int | None = None) -> Pruned:
        """Keep ``keep`` cells of each head; see ``PrunesCells``. They move to a cache of that size."""
        from edge_rt.core.kv.ops import cached_layers
        from edge_rt.core.kv.pruning import check_pruning, choose_cells

        check_pruning(keep, first, last, method, queries)
        cache = self._sequences[sequence]
        length, held = cache.length, cache.nbytes
        if keep >= length:
            return Pruned(0, 0)
        kept = choose_cells(cached_layers(cache, self.config, self._backend, queries), keep, first, last, method)
        pruned = cache.prune(kept, next_capacity(0, keep + 1, self.info.max_context))
        self._replace(sequence, pruned)
        return Pruned(length - keep, held - pruned.nbytes)

    @property
    def cell_bytes(self) -> int:
        """Bytes one cell takes over all layers."""
        return cell_bytes(self.config, self._key_type)

    def mixed_cells(self, sequence: int) -> int:
        """How many leading cells hold another token in every head."""
        return self._sequences[sequence].n_mixed

    # ---- what they take, and will take -------------------------------------------------------------------------------

    def memory(self) -> MemoryReport:
        """Bytes held now."""
        resident, corrected = [self.weights.resident()], self._corrections.size if self._corrections else 0
        resident += [weights.resident() for weights in self._adapters.values()]
        mapped = self.weights.size + sum(weights.size for weights in self._adapters.values())
        known, device = None if None in resident else corrected + sum(part or 0 for part in resident), self._offloaded
        return MemoryReport(mapped + corrected, known, *self.held_bytes(), device.held if device else 0)

    def held_bytes(self) -> tuple[int, int]:
        """What all caches hold, and the compute buffer with the graphs."""
        return sum(cache.nbytes for cache in self._sequences.values()), self._graphs.nbytes

    def compute_bytes(self, cells: int, batches: int, rows: int) -> int:
        """The most that steps hold beside the caches; see ``PredictsMemory``. Found once for up to twice as much."""
        cells = min(padded(self.info.max_context), padded(1) << max(0, (padded(cells) // padded(1) - 1).bit_length()))
        batches, rows = (1 << max(0, n - 1).bit_length() for n in (batches, rows))
        found = self._largest.get((cells, batches, rows))
        if found is None:
            with closing(KVCache(self.config, self._key_type, cells, transposed=self.transposed_values)) as cache:
                split, adapters = self._paging.streams, widest(self._adapters.values())
                found = estimate_compute_buffer(
                    self.config, self.weights, split, cache.view, self._chunk, batches, rows, adapters, traits=self._traits
                )
            if self._offloaded:  # a part of it here and a part there; inputs in both places, and results
                found = ComputeBuffers(2 * found.arena, 2 * found.graph + 4 * rows * self.config.n_vocab)
            self._largest[cells, batches, rows] = found
        return max(self._graphs.arena_bytes, found.arena) + GRAPH_BYTES + found.graph

    def sequence_bytes(self, sequence: int) -> int:
        """What a sequence may hold as it is."""
        return self._sequences[sequence].reserved

    def needed_bytes(self, sequence: int | None, cells: int, *, pruned: bool = False) -> int:
        """The most that a sequence holds on its way to ``cells`` cells; see ``PredictsMemory``."""
        h, cache = self.config, None if sequence is None else self._sequences[sequence]
        now = padded(1) if cache is None else cache.capacity
        most = largest_capacity(now, min(cells, self.info.max_context), self.info.max_context)
        found = most * self.cell_bytes + PAGE
        if pruned or most > now:  # a move: of one layer both are held, and of each tensor the pages that it shares with others
            found += found // h.n_layer + 4 * h.n_layer * PAGE
            if self._offloaded:  # on a device both are held as long as it takes
                found += found * len(self._offloaded.layers) // h.n_layer
        if pruned:  # the ring, and where the tokens of all heads stand, before a pass and after it
            from edge_rt.core.kv.pruning import WATCHED

            found += 4 * h.n_layer * (h.n_head * h.head_dim * WATCHED + 2 * h.n_head_kv * most) + PAGE
        elif cache is not None:
            found += cache.beside
        return found if cache is None else max(found, cache.reserved)
