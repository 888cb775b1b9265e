"""The engine on libggml: our own graphs over mapped weights, one cache per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edge_rt import config
from edge_rt.core.context.kv import KvCache, cell_bytes, next_capacity, padded
from edge_rt.core.context.kv_bytes import read_cells, write_cells
from edge_rt.core.decode.governor import Governor
from edge_rt.core.engine import EngineInfo, MemoryReport, Part, Pruned
from edge_rt.core.graph.common import FLASH_FROM, SlotShape
from edge_rt.core.graph.decoder import FAMILIES
from edge_rt.core.graph.embedding import token_embeddings
from edge_rt.core.graph.exactness import distinct_kinds, exact_columns
from edge_rt.core.graph.hyper import Hyper, read_hyper
from edge_rt.core.graph.layout import transposed_decodes_faster
from edge_rt.core.graph.pieces import Piece, in_pieces
from edge_rt.core.graph.rotate import rotate_keys
from edge_rt.core.graph.shapes import check_shapes
from edge_rt.core.graph.step import GraphCache, Slot, StepGraph
from edge_rt.core.graph.support import key_type, unsupported
from edge_rt.core.load.pack_cache import open_packed
from edge_rt.core.load.paging import Paging
from edge_rt.core.load.weights import WeightStore
from edge_rt.errors import ContextError, OptionError, SessionFileError, UnsupportedModel
from edge_rt.native import abi, ggml, logs
from edge_rt.native.rows import Rows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.engine import Logits
    from edge_rt.core.graph.rotate import Move
    from edge_rt.core.load.model_file import ModelFile
    from edge_rt.core.load.residency import Pager
    from edge_rt.core.load.units import Unit
    from edge_rt.hooks import EngineOptions

CHUNK = 512


@dataclass(slots=True)
class _Decoding:
    """What is needed to repeat the last step one cell on: ``next`` is the cell it would fill, below ``limit``.

    ``ahead``: by how much positions are ahead of cells.
    """

    sequence: int
    cache: KvCache
    graph: StepGraph
    next: int
    limit: int
    ahead: int


class GgmlEngine:
    """Fills the ``Engine`` protocol. Not thread-safe: the runtime holds a lock."""

    def __init__(self, file: ModelFile, options: EngineOptions) -> None:
        """Open a model. Raises AbiMismatch, UnsupportedModel, ModelFileError, OptionError, OutOfMemory."""
        abi.check()
        logs.install()
        if reason := unsupported(file):
            raise UnsupportedModel(f"{reason}; run it with --engine llama_cpp")
        self._file, self.notices = file, list[str]()
        self.hyper: Hyper = read_hyper(file.header)
        check_shapes(file.header.tensors, self.hyper, FAMILIES[self.hyper.architecture])
        self._key_type = key_type(options.key_type, self.hyper)
        packed, notice = open_packed(file, options.progress) if options.pack else (None, None)
        if notice:
            self.notices.append(notice)
        self.weights = WeightStore(file, self.hyper, packed)
        self._paging = Paging(self.weights, self.hyper, options.memory, options.progress)
        self._governor = Governor(config.available_cpus()) if options.threads is None else None
        self._threads = options.threads or config.available_cpus()
        self._backend = ggml.cpu_backend(self._threads)
        self._graphs = GraphCache(self.hyper, self.weights, self._paging.streams)
        self._sequences: dict[int, KvCache] = {}
        self._next = 0
        self._exact: int | None = None
        self._last: _Decoding | None = None
        self._transposed: bool | None = options.extra.get("ggml.transposed_values")
        self._closed = False
        self.info = EngineInfo(
            engine="ggml", architecture=self.hyper.architecture, n_vocab=self.hyper.n_vocab, n_layer=self.hyper.n_layer,
            n_embd=self.hyper.n_embd, train_context=self.hyper.train_context, max_context=options.context or self.hyper.train_context,
            chunk=CHUNK, device=options.device,
        )  # fmt: skip

    # ---- sequences ---------------------------------------------------------------------------------------------------

    def new_sequence(self) -> int:
        """Open an empty sequence; memory comes with its first tokens."""
        return self._adopt(self._cache(padded(1)))

    def fork_sequence(self, sequence: int, length: int) -> int:
        """Copy the first ``length`` cells into a sequence of its own."""
        source = self._sequences[sequence]
        length = min(length, source.length)
        return self._adopt(source.copy(length, next_capacity(0, length + 1, self.info.max_context)))

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the cells from ``length`` on."""
        self._sequences[sequence].truncate(length)

    def free_sequence(self, sequence: int) -> None:
        """Release a sequence and its memory."""
        self._last = None
        cache = self._sequences.pop(sequence)
        self._graphs.forget(cache.view)
        cache.close()

    def length(self, sequence: int) -> int:
        """Cells in use."""
        return self._sequences[sequence].length

    @property
    def transposed_values(self) -> bool:
        """Whether cached values are transposed and decoding uses matmuls, not flash attention: what is faster here, timed once."""
        if self._transposed is None:
            self._transposed = transposed_decodes_faster(self.hyper, self._key_type, self._threads, self._backend)
        return self._transposed

    def _cache(self, capacity: int) -> KvCache:
        """An empty cache in the layout that decodes fastest here."""
        return KvCache(self.hyper, self._key_type, capacity, transposed=self.transposed_values)

    def _adopt(self, cache: KvCache) -> int:
        self._next += 1
        self._sequences[self._next] = cache
        return self._next

    # ---- steps -------------------------------------------------------------------------------------------------------

    def step(self, parts: Sequence[Part]) -> list[Logits | None]:
        """Feed every part; see ``Engine.step``."""
        if len(parts) == 1 and (logits := self._repeat(parts[0])) is not None:
            return [logits]
        self._file.check_unchanged()
        self._check(parts)
        pending = in_pieces(parts, CHUNK)
        results: list[list[Rows]] = [[] for _ in parts]
        for number, run in enumerate(pending):
            logits = self._run(run)
            if logits is None:
                continue
            row = 0
            for piece in run:
                if piece.rows:
                    rows = logits.part(row, len(piece.rows))
                    results[piece.part].append(rows if number == len(pending) - 1 else rows.copy())
                    row += len(piece.rows)
        return [None if not r else r[0] if len(r) == 1 else Rows.joined(r) for r in results]

    def _repeat(self, part: Part) -> Rows | None:
        """The step after the last: one more token of the one sequence that was decoding, through the same graph.

        Nearly all steps are this one, and Python's share of a step is what it touches: its caches are cold after a whole model
        passed through them. None if this is another kind of step.
        """
        last = self._last
        if last is None or part.sequence != last.sequence or len(part.tokens) != 1 or part.logits == "none":
            return None
        cell = last.next
        if cell != last.cache.length or cell >= last.limit or not 0 <= part.tokens[0] < self.info.n_vocab:
            return None
        self._file.check_unchanged()
        last.graph.advance(part.tokens[0], cell, cell + last.ahead)
        self._choose_threads()
        ggml.compute(self._backend, last.graph.segments[0].graph)
        last.cache.positions.append(1)
        last.next = cell + 1
        return last.graph.logits

    def _check(self, parts: Sequence[Part]) -> None:
        """Refuse before anything has changed."""
        seen: set[int] = set()
        for part in parts:
            if part.sequence in seen:
                raise OptionError("a step names the same sequence twice; join its tokens into one part")
            seen.add(part.sequence)
            self._check_fits(self._sequences[part.sequence].length + len(part.tokens))
            self._check_tokens(part.tokens)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise OptionError for tokens no vocabulary of this size has."""
        if min(tokens, default=0) < 0 or max(tokens, default=0) >= self.info.n_vocab:
            raise OptionError(f"a token id is outside the vocabulary of {self.info.n_vocab}; tokenize with this model")

    def _check_fits(self, needed: int) -> None:
        """Raise ContextError if a sequence would outgrow the context."""
        if needed > self.info.max_context:
            raise ContextError(f"{needed} tokens do not fit a context of {self.info.max_context}; shorten the prompt or raise --ctx")

    def _run(self, run: Sequence[Piece]) -> Rows | None:
        """Evaluate one graph; logits are valid until the next."""
        shapes, slots = [], []
        for piece in run:
            cache = self._room(piece.sequence, len(piece.tokens))
            shapes.append(SlotShape(len(piece.tokens), padded(cache.length + len(piece.tokens)), len(piece.rows)))
            column = cache.ring.column(cache.length) if cache.ring else 0
            slots.append(Slot(cache.view, cache.length, cache.positions.next, piece.tokens, piece.rows, column))
        graph = self._graphs.get(shapes, [slot.cache for slot in slots])
        graph.set_inputs(slots)
        self._choose_threads()
        for segment in graph.segments:
            with self._paging.holding(segment.unit):
                ggml.compute(self._backend, segment.graph)
        for piece in run:
            self._sequences[piece.sequence].positions.append(len(piece.tokens))
        self._paging.experts_used(graph.experts)
        self._last = None
        if len(run) == 1 and shapes[0].tokens == shapes[0].rows == 1 and len(graph.segments) == 1 and not graph.experts:
            cache = self._sequences[run[0].sequence]
            limit = min(shapes[0].cells, cache.capacity, self.info.max_context)
            self._last = _Decoding(run[0].sequence, cache, graph, cache.length, limit, cache.positions.next - cache.length)
        return graph.logits

    def _choose_threads(self) -> None:
        """Follow the governor, unless the user fixed the number."""
        if self._governor and (threads := self._governor.threads()) != self._threads:
            self._threads = threads
            ggml.c.backend_cpu_set_n_threads(self._backend.address, threads)

    def _room(self, sequence: int, tokens: int) -> KvCache:
        """The sequence's cache, moved to a larger one if ``tokens`` more do not fit."""
        cache = self._sequences[sequence]
        needed = cache.length + tokens
        if needed <= cache.capacity:
            return cache
        larger = cache.moved(next_capacity(cache.capacity, needed, self.info.max_context))
        self._replace(sequence, larger)
        return larger

    def _replace(self, sequence: int, cache: KvCache) -> None:
        """Cells have moved to another cache: the old one goes, and with it the graphs over it."""
        self._last = None
        old, self._sequences[sequence] = self._sequences[sequence], cache
        self._graphs.forget(old.view)
        old.close()

    def exact_rows(self) -> int:
        """Probed once, weight by weight (graph/exactness.py); attention runs token by token up to flash attention's threshold."""
        if self._exact is None:
            matrices = distinct_kinds(self.weights.matrices())
            # How experts group tokens depends on the data, so no probe could prove anything.
            self._exact = 1 if self.hyper.n_expert else exact_columns(self._paging.held(matrices), self._backend, FLASH_FROM - 1)
        return self._exact

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

    def _rotate(self, cache: KvCache, moves: Sequence[Move]) -> None:
        family = FAMILIES[self.hyper.architecture]
        factors = self.weights.get("rope_freqs.weight") if family.rope_factors else None
        rotate_keys(cache.view, self.hyper, family.rope_mode, factors, moves, self._backend)

    def export_cells(self, sequence: int, start: int, end: int) -> bytes:
        """Cells [start, end) as bytes."""
        return write_cells(self._sequences[sequence], self.hyper, self._key_type, start, end)

    def insert_cells(self, sequence: int, at: int, data: bytes | memoryview) -> int:
        """Put exported cells before cell ``at``; see ``MovesCells``."""
        positions, mixed, cells = read_cells(data, self.hyper, self._key_type)
        if mixed is not None:
            raise ContextError("cells that were pruned head by head cannot be put between others; restore the session they are of")
        self._check_fits(self._sequences[sequence].length + positions.length)
        self._last = None
        cache = self._room(sequence, positions.length)
        self._rotate(cache, cache.insert(at, positions, cells))
        return positions.length

    def export_sequence(self, sequence: int) -> bytes:
        """All cells as bytes."""
        return self.export_cells(sequence, 0, self.length(sequence))

    def import_sequence(self, data: bytes | memoryview) -> int:
        """Open a sequence from exported bytes. Raises SessionFileError."""
        positions, mixed, cells = read_cells(data, self.hyper, self._key_type)
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
        from edge_rt.core.context.pruning import check, choose
        from edge_rt.core.graph.scores import cached_layers

        check(keep, first, last, method, queries)
        cache = self._sequences[sequence]
        length, held = cache.length, cache.nbytes
        if keep >= length:
            return Pruned(0, 0)
        kept = choose(cached_layers(cache, self.hyper, self._backend, queries), keep, first, last, method)
        pruned = cache.prune(kept, next_capacity(0, keep + 1, self.info.max_context))
        self._replace(sequence, pruned)
        return Pruned(length - keep, held - pruned.nbytes)

    @property
    def cell_bytes(self) -> int:
        """Bytes one cell takes over all layers."""
        return cell_bytes(self.hyper, self._key_type)

    def mixed_cells(self, sequence: int) -> int:
        """How many leading cells hold another token in every head."""
        return self._sequences[sequence].n_mixed

    def token_embeddings(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Rows of the token embedding: float32 [len(tokens), n_embd]."""
        self._check_tokens(tokens)
        return token_embeddings(self.weights.require("token_embd.weight"), tokens, self._backend)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def memory(self) -> MemoryReport:
        """Bytes held now."""
        return MemoryReport(
            weights_mapped=self.weights.size,
            weights_resident=self.weights.resident(),
            cache=sum(cache.nbytes for cache in self._sequences.values()),
            compute=self._graphs.nbytes,
        )

    @property
    def pager(self) -> Pager | None:
        """What streams the weights under a memory budget, None without one."""
        return self._paging.pager

    def units(self) -> Sequence[Unit]:
        """The units of the weight store."""
        return self.weights.units

    def cool(self) -> None:
        """Give weights, graphs and the compute buffer back; vocabulary, header and caches stay."""
        self._last = None
        self._graphs.close()
        self._graphs = GraphCache(self.hyper, self.weights, self._paging.streams)
        self._paging.cool()

    def warm(self) -> None:
        """Read the weights again, in the background."""
        self._paging.warm()

    def close(self) -> None:
        """Release everything; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._last = None
        self._paging.close()
        self._graphs.close()
        for cache in self._sequences.values():
            cache.close()
        self._sequences.clear()
        self._backend.close()
        self.weights.close()
