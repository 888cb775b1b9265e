"""The engine on libggml: our own graphs over mapped weights, one cache per sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from edge_rt.config import available_cpus
from edge_rt.core.autotune import distinct_kinds, estimate_compute_buffer, probe_batch_invariance
from edge_rt.core.engine import EngineInfo, SequenceBatch, check_batches, check_tokens
from edge_rt.core.graph.adapters import check_adapted
from edge_rt.core.graph.builder import FLASH_FROM, FULL_SUPPORT, TILES_FROM, SlotShape
from edge_rt.core.graph.config import ModelConfig, check_shapes, fused, read_config
from edge_rt.core.graph.decoder import FAMILIES, ggml_unsupported, key_type
from edge_rt.core.graph.layers import of_block
from edge_rt.core.graph.step import GraphCache, SequenceInput, StepGraph, Ubatch, attention_traits, split_ubatches, stacked
from edge_rt.core.kv.cache import KVCache, cell_bytes
from edge_rt.core.kv.ops import token_embeddings
from edge_rt.core.kv.positions import padded
from edge_rt.core.sequences import Decoding, GgmlSequences
from edge_rt.core.weights.gpu_offload import Accelerator, Offloaded
from edge_rt.core.weights.lora import AdapterWeights
from edge_rt.core.weights.repack import open_packed
from edge_rt.core.weights.store import WeightStore
from edge_rt.core.weights.streaming import Paging, paging_settings
from edge_rt.errors import UnsupportedModel
from edge_rt.native import abi, ggml, libs, memory
from edge_rt.native.ggml import Rows
from edge_rt.power.throttle import StepThrottle

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.engine import EngineOptions, Logits
    from edge_rt.core.gguf.lora import LoraFile
    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.core.graph.builder import AttentionSupport
    from edge_rt.core.graph.config import ModelConfig
    from edge_rt.core.graph.decoder import Output
    from edge_rt.core.weights.error_correction import Compensation
    from edge_rt.core.weights.streaming import WeightStreamer
    from edge_rt.core.weights.units import Unit
    from edge_rt.power.controller import Kind, Sustained

CHUNK = 512
TOLD_FROM = 1 << 35
"""Tokens times bytes of weights from which on a graph says within that it goes on: half a second on two cores, and ten where they are
slow. Python takes 20 us for it after each node, which made a step of 32 tokens half as long again (135M).
"""


class GgmlEngine(GgmlSequences):
    """Fills the ``Engine`` protocol. Not thread-safe: the runtime holds a lock."""

    def __init__(self, file: ModelFile, options: EngineOptions, *, accelerator: Accelerator | None = None, name: str = "ggml") -> None:
        """Open a model, the last blocks of it on an ``accelerator`` if one is given. ``name``: the engine's.

        Raises AbiMismatch, UnsupportedModel, ModelFileError, OptionError, OutOfMemory.
        """
        super().__init__(options.extra.get("ggml.transposed_values"))
        abi.check()
        libs.install_native_log()
        if reason := ggml_unsupported(file):
            raise UnsupportedModel(f"{reason}; run it with --engine llama_cpp")
        self._file, self.notices = file, list[str]()
        self.config: ModelConfig = fused(read_config(file.header), file.header, options.extra)
        check_shapes(file.header.tensors, self.config, FAMILIES[self.config.architecture])
        self._key_type = key_type(options.key_type, self.config)
        self._progress, self._traits = options.progress, FULL_SUPPORT
        self._chunk = int(options.extra.get("ggml.chunk", CHUNK))
        if accelerator:
            self._offload(accelerator, options)
        self._open_weights(options)
        self._correct(options.compensation)
        beside = self._corrections.size if self._corrections else 0
        self._paging = Paging(self.weights, self.config, options.memory, options.progress, *paging_settings(options.extra), beside=beside)
        cpus = memory.fitting(options.cpus, options.threads)
        most = min(available_cpus(), len(cpus) or 1 << 16, int(options.extra.get("ggml.most_threads", 1 << 16)))
        self._threads = options.threads or most
        self._backend = ggml.cpu_backend(self._threads, cpus)
        self._pace = StepThrottle(options.threads, most, options.limits, cpus)
        self._graphs = GraphCache(self.config, self.weights, self._paging.streams, self._offloaded)
        self._exact: int | None = None
        self._moved: Callable[[], None] = lambda: None
        self._after_node: Any = None
        self._closed = False
        self.info = EngineInfo(
            engine=name, architecture=self.config.architecture, n_vocab=self.config.n_vocab, n_layer=self.config.n_layer,
            n_embd=self.config.n_embd, train_context=self.config.train_context, max_context=options.context or self.config.train_context,
            chunk=self._chunk, device=options.device, offloaded=self._offloaded.weights.names if self._offloaded else (),
        )  # fmt: skip
        if self._offloaded:
            self._try_out()

    def _open_weights(self, options: EngineOptions) -> None:
        """Map the weights; packed ones if any block is computed here."""
        near = self._offloaded is None or self._offloaded.first > 0
        centre = bool(options.extra.get("ggml.centred", True))
        packed, notice = open_packed(self._file, options.progress, centre) if options.pack and near else (None, None)
        if notice:
            self.notices.append(notice)
        self.weights = WeightStore(self._file, self.config, packed, self._elsewhere())

    def _correct(self, compensation: Compensation | None) -> None:
        """Take up the corrections of all products. Raises UnsupportedModel, ModelChanged, OutOfMemory."""
        if compensation is None:
            return
        from edge_rt.core.weights.error_correction import Corrections

        products: list[tuple[str, ...]] = []
        for layer in range(self.config.n_layer):
            far = self._offloaded if self._offloaded and layer in self._offloaded.layers else None
            products += of_block(far.weights if far else self.weights, self.config, f"blk.{layer}")
        self._corrections = Corrections(compensation, self._file.header, products, self._offloaded)
        self._compensated = compensation.key
        self.weights.corrections = self._corrections
        if self._offloaded:
            self._offloaded.weights.corrections = self._corrections

    def compensated(self) -> str | None:
        """The key of the compensation that steps go through; see ``AppliesCompensation``."""
        return self._compensated

    def _offload(self, accelerator: Accelerator, options: EngineOptions) -> None:
        """Place the last blocks on the device."""

        self._offloaded, self._traits = offload(
            accelerator, self._file, self.config, self._key_type, options.context, self._chunk, options.compensation
        )
        if self._transposed is None:
            self._transposed = not self._traits.flash

    def _elsewhere(self) -> set[str]:
        """Units that nothing here reads but to bring them to the device. Norms are small, and blocks here may need one, too."""
        offloaded = self._offloaded.weights.names if self._offloaded else ()
        return {name + part for name in offloaded if name != "norm" for part in ("", ".experts")}

    def _try_out(self) -> None:
        """Build the graphs of a token and of a prompt, so that a kernel that a device lacks is found now. Closes the engine if so."""
        try:
            with closing(self._cache(padded(1))) as cache:
                for tokens in (1, TILES_FROM):
                    self._graphs.get([SlotShape(tokens, cache.capacity, 1, traits=self._traits)], [cache.view])
                self._graphs.forget(cache.view)
        except BaseException:
            self.close()
            raise

    # ---- steps -------------------------------------------------------------------------------------------------------

    def step(self, batches: Sequence[SequenceBatch]) -> list[Logits | None]:
        """Feed every batch; see ``Engine.step``."""
        repeated = self._repeat(batches)
        return list(self._step(batches, "logits")) if repeated is None else repeated

    def hidden(self, batches: Sequence[SequenceBatch]) -> list[npt.NDArray[np.float32] | None]:
        """The same with hidden states in place of logits; see ``EmbedsText``."""
        import numpy as np

        return [None if rows is None else np.asarray(rows) for rows in self._step(batches, "hidden")]

    def _step(self, batches: Sequence[SequenceBatch], output: Output) -> list[Rows | None]:
        """Any step, as several graph runs if it is long."""
        self._file.check_unchanged()
        self._check(batches)
        for batch in batches:
            self._room(batch.sequence, len(batch.tokens), batch.more)
        pending = split_ubatches(batches, self._chunk, self._order(batches) if len(batches) > 1 else None)
        results: list[list[Rows]] = [[] for _ in batches]
        for number, run in enumerate(pending):
            graph = self._run(run, output)
            found = graph.output
            if found is None:
                continue
            row = 0
            for ubatch in run:
                if ubatch.rows:
                    rows = found.part(row, len(ubatch.rows))
                    results[ubatch.batch].append(rows if number == len(pending) - 1 else rows.copy())
                    row += len(ubatch.rows)
        given = [None if not r else r[0] if len(r) == 1 else Rows.joined(r) for r in results]
        if len(pending) == 1 and output == "logits":
            self._remember(batches, pending[0], graph, given)
        return given

    def tell(self, moved: Callable[[], None]) -> None:
        """Call ``moved`` after each graph, of which there is one for each unit whose weights are streamed; of long ones after each node."""
        self._moved, self._after_node = moved, ggml.after_node(moved)

    def _repeat(self, batches: Sequence[SequenceBatch]) -> list[Logits | None] | None:
        """The step after the last: one more token of each of the sequences that were decoding, through the same graph.

        Nearly all steps are this one, and Python's share of a step is what it touches: its caches are cold after a whole model
        passed through them. None if this is another kind of step.
        """
        last = self._last
        if last is None or not last.left or [batch.sequence for batch in batches] != last.sequences:
            return None
        tokens, cells = [0] * len(batches), [0] * len(batches)
        for batch, cache, cell, column in zip(batches, last.caches, last.cells, last.columns, strict=True):
            if len(batch.tokens) != 1 or batch.logits == "none" or cell != cache.length or not 0 <= batch.tokens[0] < self.info.n_vocab:
                return None
            tokens[column], cells[column] = batch.tokens[0], cell
        self._file.check_unchanged()
        for weights in last.adapters:
            weights.check_unchanged()
        self._last = None  # until it is done: after a step that failed the inputs are not those of the one before
        last.graph.advance(tokens, cells)
        self._begin("decode")
        if self._offloaded:
            self._compute(last.graph)
        else:
            ggml.compute(self._backend, last.graph.segments[0].graph)
        if self._pace.limited:
            self._pace.after("decode", len(batches))
        for cache in last.caches:
            cache.positions.append(1)
        last.cells, last.left = [cell + 1 for cell in last.cells], last.left - 1
        self._last = last
        return last.rows

    def _remember(self, batches: Sequence[SequenceBatch], run: Sequence[Ubatch], graph: StepGraph, rows: list[Rows | None]) -> None:
        """Note what the next step needs to repeat this one, if it was one token of each."""
        if self._paging.streams or graph.experts or any(len(ubatch.tokens) != 1 or not ubatch.rows for ubatch in run):
            return
        columns = [0] * len(run)
        for column, ubatch in enumerate(run):
            columns[ubatch.batch] = column
        caches = [self._sequences[batch.sequence] for batch in batches]
        left = min(min(padded(cache.length), self.info.max_context) - cache.length for cache in caches)
        adapters = {applied.weights for batch in batches if (applied := self._adapted.get(batch.sequence))}
        sequences, cells = [batch.sequence for batch in batches], [cache.length for cache in caches]
        self._last = Decoding(sequences, caches, cells, columns, list(rows), graph, left, adapters)

    def _order(self, batches: Sequence[SequenceBatch]) -> list[int]:
        """Tokens of one adapter side by side, those that go through it one by one first: then one product is enough for them.

        Of these, those of one token by where their caches are, so that neighbours can be one in the graph.
        """
        numbers = {id(weights): number for number, weights in self._adapters.items()}

        def key(index: int) -> tuple[int, float, bool, bool, int, int]:
            batch = batches[index]
            found, cache = self._adapted.get(batch.sequence), self._sequences[batch.sequence].view
            adapter = (numbers[id(found.weights)], found.scale) if found else (0, 0.0)
            n = len(batch.tokens)
            return *adapter, n >= FLASH_FROM or (n > 1 and batch.logits != "all"), n > 1, cache.capacity, cache.address

        return sorted(range(len(batches)), key=key)

    def _check(self, batches: Sequence[SequenceBatch]) -> None:
        """Refuse before anything has changed."""
        for weights in {applied.weights for batch in batches if (applied := self._adapted.get(batch.sequence))}:
            weights.check_unchanged()
        check_batches(batches, self.length, self.info)

    def _slots(self, run: Sequence[Ubatch]) -> tuple[list[SlotShape], list[SequenceInput]]:
        """What the ubatches are to a graph: each a slot, but neighbours that decode are one together."""
        shapes, slots = [], []
        for ubatch in run:
            cache = self._sequences[ubatch.sequence]
            applied = self._adapted.get(ubatch.sequence)
            n = len(ubatch.tokens)
            shapes.append(SlotShape(n, padded(cache.length + n), len(ubatch.rows), applied, traits=self._traits))
            column = cache.ring.column(cache.length) if cache.ring else 0
            slots.append(SequenceInput(cache.view, (cache.length,), (cache.positions.next,), ubatch.tokens, ubatch.rows, column))
        return stacked(shapes, slots) if len(run) > 1 else (shapes, slots)

    def _run(self, run: Sequence[Ubatch], output: Output) -> StepGraph:
        """Evaluate one graph; its output is valid until the next."""
        self._last = None
        if self._offloaded:
            self._offloaded.warm()
        shapes, slots = self._slots(run)
        graph = self._graphs.get(shapes, [slot.cache for slot in slots], output)
        graph.set_inputs(slots)
        kind: Kind = "decode" if all(len(ubatch.rows) == len(ubatch.tokens) for ubatch in run) else "prompt"
        self._begin(kind)
        after = self._after_node if sum(shape.tokens for shape in shapes) * self.weights.size >= TOLD_FROM else None
        self._compute(graph, after)
        if self._pace.limited:
            self._end(kind, run)
        for ubatch in run:
            self._sequences[ubatch.sequence].positions.append(len(ubatch.tokens))
        self._paging.experts_used(graph.experts)
        return graph

    def _compute(self, graph: StepGraph, after: Any = None) -> None:
        """Run the segments of a graph, each where it belongs; ``after``: as for ``ggml.compute``."""
        for segment in graph.segments:
            if segment.far and graph.boundary and self._offloaded:
                self._offloaded.fill(self._progress, self._moved)
                graph.boundary.run(segment)
            else:
                with self._paging.holding(segment.unit):
                    ggml.compute(self._backend, segment.graph, after)
            self._moved()

    def _begin(self, kind: Kind) -> None:
        """Wait as long as limits ask for, and take as many threads as are free and allowed."""
        if (threads := self._pace.before(kind, self._moved)) != self._threads:
            self._threads = threads
            ggml.c.backend_cpu_set_n_threads(self._backend.address, threads)

    def _end(self, kind: Kind, run: Sequence[Ubatch]) -> None:
        """Tell what a graph was for, before its cells count."""
        fed = [(ubatch.sequence, self._sequences[ubatch.sequence].length, len(ubatch.tokens)) for ubatch in run]
        self._pace.after(kind, self._pace.written(fed) if kind == "decode" else sum(tokens for _, _, tokens in fed))

    def sustained(self) -> Sustained | None:
        """What limits of power and temperature were asked for, and what was measured; see ``HoldsLimits``."""
        return self._pace.report()

    def news(self) -> list[str]:
        """What became of the limits, each once."""
        return self._pace.news()

    def exact_rows(self) -> int:
        """Probed once, weight by weight (graph/exactness.py); attention runs token by token up to flash attention's threshold."""
        if self._exact is None:
            matrices = distinct_kinds(self.weights.matrices())
            # How experts group tokens depends on the data, so no probe could prove anything; and a device's kernels are not probed.
            unknown = self.config.n_expert or self._offloaded
            self._exact = 1 if unknown else probe_batch_invariance(self._paging.held(matrices), self._backend, FLASH_FROM - 1)
        return self._exact

    # ---- weights and memory ------------------------------------------------------------------------------------------

    def token_embeddings(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Rows of the token embedding: float32 [len(tokens), n_embd]."""
        check_tokens(tokens, self.info)
        return token_embeddings(self.weights.require("token_embd.weight"), tokens, self._backend)

    def open_adapter(self, adapter: LoraFile) -> int:
        """Place an adapter's tensors; see ``AppliesAdapters``."""
        check_adapted(adapter)
        number = len(self._adapters) + 1
        self._adapters[number] = AdapterWeights(adapter, self._offloaded)
        self._largest.clear()
        return number

    @property
    def pager(self) -> WeightStreamer | None:
        """What streams the weights under a memory budget, None without one."""
        return self._paging.pager

    def units(self) -> Sequence[Unit]:
        """The units of the weight store."""
        return self.weights.units

    def cool(self) -> None:
        """Give weights, graphs and the compute buffer back; vocabulary, header and caches stay."""
        self._last = None
        self._graphs.close()
        self._graphs = GraphCache(self.config, self.weights, self._paging.streams, self._offloaded)
        self._paging.cool()
        if self._offloaded:
            self._offloaded.cool()
        for weights in self._adapters.values():
            weights.cool()

    def warm(self) -> None:
        """Read the weights again, in the background."""
        self._paging.warm()

    def close(self) -> None:
        """Release everything; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._last = None
        self._pace.close()
        self._paging.close()
        self._graphs.close()
        for cache in self._sequences.values():
            cache.close()
        self._sequences.clear()
        self._adapted.clear()
        for weights in self._adapters.values():
            weights.close()
        if self._corrections:
            self._corrections.close()
        self._backend.close()
        self.weights.close()
        if self._offloaded:
            self._offloaded.close()


# Opening the part of a model that an accelerator takes: what it can do, what a step needs there, and what then fits.

PLANNED_CELLS = 4096
"""Cells that room is kept for on the device where no context was asked for: what a model was trained with is often far more than it
gets, and would leave no room for weights. Sequences may use what is left beyond.
"""
PLANNED_BATCHES, PLANNED_ROWS = 4, 16
"""Sequences in a step, and rows of logits, that the compute buffer is planned for."""


def offload(
    accelerator: Accelerator, file: ModelFile, config: ModelConfig, key_type: int, context: int | None, chunk: int,
    compensation: Compensation | None = None,
) -> tuple[Offloaded, AttentionSupport]:  # fmt: skip
    """Open the device and place the last blocks there, beside one sequence of ``context`` cells, which needs twice its memory when it
    grows by moving; and what attention may ask of it.

    Raises OptionError if there is no such device or it cannot hold the head, OutOfMemory.
    """
    offloaded = Offloaded.open(accelerator, file, config)
    try:
        traits = attention_traits(offloaded.device, config, key_type)
        cells = padded(context or min(config.train_context, PLANNED_CELLS))
        with (
            closing(WeightStore(file, config)) as weights,
            closing(KVCache(config, key_type, cells, transposed=not traits.flash)) as cache,
        ):
            found = estimate_compute_buffer(config, weights, False, cache.view, chunk, PLANNED_BATCHES, PLANNED_ROWS, traits=traits)
        if compensation:
            from edge_rt.core.weights.error_correction import far_bytes

            offloaded.weights.add(far_bytes(compensation))
        offloaded.place(2 * cells * cell_bytes(config, key_type) // config.n_layer, found.arena + found.graph)
    except BaseException:
        offloaded.close()
        raise
    return offloaded, traits


open_ggml_engine = GgmlEngine
"""The name under which ``edge_rt.hooks`` offers it to plugins."""
