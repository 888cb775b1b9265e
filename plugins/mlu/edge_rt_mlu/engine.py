"""The engine ``torch``: a llama-like decoder on any device that PyTorch drives, one cache per sequence."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edge_rt.hooks import (
    EngineInfo,
    MemoryReport,
    NativeError,
    OutOfMemory,
    SequenceBatch,
    Ubatch,
    check_batches,
    check_tokens,
    split_ubatches,
)
from edge_rt_mlu.adapters import Adapter
from edge_rt_mlu.cells import Shape
from edge_rt_mlu.families import read
from edge_rt_mlu.lora import LoraWeights
from edge_rt_mlu.model import SCORES, Decoder, Output, Slot
from edge_rt_mlu.placement import Placement, place
from edge_rt_mlu.rope import Rope
from edge_rt_mlu.sequences import TorchSequences, errors
from edge_rt_mlu.tensors import dtype_named, name_of
from edge_rt_mlu.weights import Loader

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.hooks import EngineOptions, Logits, LoraFile, ModelFile

CHUNK = 512


class TorchEngine(TorchSequences):
    """Fills the ``Engine`` protocol, and RemovesCells, MovesCells, PrunesCells, EmbedsTokens, EmbedsText, AppliesAdapters, TellsProgress,
    PredictsMemory.
    """

    def __init__(self, file: ModelFile, options: EngineOptions, adapter: Adapter, number: int) -> None:
        """Open a model on the device that PyTorch numbers so.

        Raises UnsupportedModel, ModelFileError, ModelChanged, OptionError, OutOfMemory, NativeError.
        """
        super().__init__()
        self.config, family = read(file)
        self._dtype, self._adapter = dtype_named(options.extra.get("torch.dtype", adapter.dtype)), adapter
        self._there = adapter.package is not None  # the device has memory of its own
        if adapter.package is not None:
            _import(adapter.package, adapter.remedy)
        elif options.threads is not None:
            torch.set_num_threads(options.threads)
        self._device = device_of(adapter, number)
        h = self.config
        placement = place(file, self._dtype.itemsize, options.memory, whole=not self._there)
        self.info = EngineInfo(
            engine="torch", architecture=h.architecture, n_vocab=h.n_vocab, n_layer=h.n_layer, n_embd=h.n_embd,
            train_context=h.train_context, max_context=options.context or h.train_context, chunk=CHUNK, device=options.device,
            offloaded=("embedding", *(f"blk.{n}" for n in range(placement.blocks)), "norm", "head") if self._there else (),
        )  # fmt: skip
        self._check_room(placement)
        with self._giving_back(), errors(options.device):
            weights = Loader(file, h, self._device, self._dtype, _told(file, options)).load(family, placement.blocks)
        # Cells are half precision everywhere: half of the memory, and a session saved on one device goes on on another.
        cached = torch.float16 if self._dtype is torch.float32 else self._dtype
        self._shape = Shape(h.n_layer, h.n_head_kv, h.head_dim, h.n_head, cached, self._device)
        self._rope = Rope(h, weights.factors, neighbours=family.neighbours, device=self._device)
        self._decoder: Decoder | None = Decoder(h, weights, self._rope, self._dtype)
        self._weights_bytes, self._kept_bytes, self._held = weights.nbytes, weights.kept, 0
        self._moved: Callable[[], None] = lambda: None

    def _check_room(self, placement: Placement) -> None:
        """Raise OutOfMemory before anything is read if the weights cannot fit."""
        with errors(self.info.device):
            free = _free_bytes(self._adapter, self._device)
        if free is not None and placement.nbytes > free:
            way = "give a --memory below that, and the rest of the blocks is copied over in every step" if self._there else "free some"
            raise OutOfMemory(
                f"the weights take {placement.nbytes >> 20} MiB as {name_of(self._dtype)} and {free >> 20} MiB are free on"
                f" {self.info.device}; {way}, or use a smaller model"
            )

    # ---- steps -------------------------------------------------------------------------------------------------------

    def step(self, batches: Sequence[SequenceBatch]) -> list[Logits | None]:
        """Feed every batch; see ``Engine.step``."""
        return list(self._step(batches, "logits"))

    def hidden(self, batches: Sequence[SequenceBatch]) -> list[npt.NDArray[np.float32] | None]:
        """The same with hidden states in place of logits; see ``EmbedsText``."""
        return self._step(batches, "hidden")

    def _step(self, batches: Sequence[SequenceBatch], output: Output) -> list[npt.NDArray[np.float32] | None]:
        """Any step, as several runs if it is long. A step that fails on the way leaves every sequence as long as it was."""
        check_batches(batches, self.length, self.info)
        results: list[list[npt.NDArray[np.float32]]] = [[] for _ in batches]
        self._held = 0
        with self._giving_back(), self._restored(batches), errors(self.info.device):
            for batch in batches:
                self._room(self._sequences[batch.sequence], len(batch.tokens), batch.more)
            for run in split_ubatches(batches, CHUNK, self._order(batches)):
                rows = self._run(run, output)
                start = 0
                for ubatch in run:
                    if ubatch.rows:
                        results[ubatch.batch].append(rows[start : start + len(ubatch.rows)])
                        start += len(ubatch.rows)
        given = [None if not found else found[0] if len(found) == 1 else np.concatenate(found) for found in results]
        self._held = sum(rows.nbytes for rows in given if rows is not None)
        return given

    def _order(self, batches: Sequence[SequenceBatch]) -> list[int]:
        """Sequences with the same adapter side by side: then one product is enough for them."""
        applied = [self._sequences[batch.sequence].applied for batch in batches]
        return sorted(range(len(batches)), key=lambda i: (0, 0.0) if (one := applied[i]) is None else (id(one.weights), one.scale))

    @contextmanager
    def _restored(self, batches: Sequence[SequenceBatch]) -> Iterator[None]:
        """If the block fails, the sequences are cut back to what they were; queries of layers that were reached are forgotten."""
        before = [(cells, cells.length) for cells in (self._sequences[batch.sequence] for batch in batches)]
        try:
            yield
        except BaseException:
            for cells, length in before:
                cells.positions.truncate(length)
                if cells.ring:
                    cells.ring.only(0)
            raise

    def _run(self, run: Sequence[Ubatch], output: Output) -> npt.NDArray[np.float32]:
        """One pass over the weights; rows of all ubatches that want some, in order: float32 [R, V or E]."""
        decoder = self._open_decoder()
        tokens, positions, rows, slots = list[int](), list[int](), list[int](), list[Slot]()
        for ubatch in run:
            cells = self._sequences[ubatch.sequence]
            rows += [len(tokens) + row for row in ubatch.rows]
            following = cells.positions.next
            positions += range(following, following + len(ubatch.tokens))
            tokens += ubatch.tokens
            slots.append(Slot(cells, cells.length, len(ubatch.tokens), len(ubatch.rows)))
        wanted = torch.tensor(rows, device=self._device) if rows else None
        ids, turn = torch.tensor(tokens, dtype=torch.int64, device=self._device), self._rope.at(positions)
        with torch.inference_mode():
            found = decoder.run(ids, turn, slots, wanted, output, self._moved)
        # This waits for the device: only then it has gone on, and only then it has failed if it fails.
        given: npt.NDArray[np.float32] = np.empty((0, 0), np.float32) if found is None else found.cpu().numpy()
        if found is None:
            _synchronize(self._adapter)
        elif not np.isfinite(given).all():  # half precision holds no more than 65,504, and what is beyond makes NaN of all that follows
            kind = name_of(self._dtype)
            raise NativeError(f"this model's activations do not fit {kind}; run it on another device, or with torch.dtype = bfloat16")
        self._moved()
        for slot in slots:
            slot.cells.positions.append(slot.tokens)
        return given

    def _open_decoder(self) -> Decoder:
        if self._decoder is None:
            raise ValueError("the engine is closed; open the model again")
        return self._decoder

    def tell(self, moved: Callable[[], None]) -> None:
        """Call ``moved`` after each block that was computed or, on a device that computes by itself, sent there; see ``TellsProgress``."""
        self._moved = moved

    def exact_rows(self) -> int:
        """1: kernels of PyTorch add up in another order for several rows, and nobody promises for which."""
        return 1

    def token_embeddings(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Rows of the token embedding: float32 [len(tokens), n_embd]."""
        check_tokens(tokens, self.info)
        with errors(self.info.device):
            rows = self._open_decoder().weights.embedding[torch.tensor(list(tokens), dtype=torch.int64, device=self._device)]
            found: npt.NDArray[np.float32] = rows.float().cpu().numpy()
        return found

    # ---- adapters ----------------------------------------------------------------------------------------------------

    def open_adapter(self, adapter: LoraFile) -> int:
        """Read an adapter onto the device; see ``AppliesAdapters``."""
        changeable = self._open_decoder().weights.changeable()
        with self._giving_back(), errors(self.info.device):
            weights = LoraWeights(adapter, changeable, self._device, self._dtype)
        number = len(self._adapters) + 1
        self._adapters[number] = weights
        return number

    # ---- memory ------------------------------------------------------------------------------------------------------

    def held_bytes(self) -> tuple[int, int]:
        """What all caches hold, and the last step's results."""
        return sum(cells.nbytes for cells in self._sequences.values()), self._held

    def memory(self) -> MemoryReport:
        """Bytes held now: of a device with memory of its own, its weights and caches as ``device``; else all in the host's."""
        cache, results = self.held_bytes()
        weights = self._weights_bytes + sum(adapter.nbytes for adapter in self._adapters.values())
        if self._there:
            return MemoryReport(self._kept_bytes, self._kept_bytes, cache, results, weights + cache)
        return MemoryReport(weights, weights, cache, results)

    def compute_bytes(self, cells: int, batches: int, rows: int) -> int:
        """The most that steps hold beside the caches; see ``PredictsMemory``."""
        h, size = self.config, int(self._dtype.itemsize)
        tokens, kv = CHUNK, h.n_head_kv * h.head_dim
        n_ff = self._open_decoder().weights.inner
        wide = h.n_head * h.head_dim + 2 * kv
        linear = tokens * ((4 * 4 + size) * h.n_embd + (4 * 5 + size) * max(wide, 2 * n_ff))
        scores = max(SCORES, h.n_head * cells) * (2 * size + 3 * 4 + 1)
        attention = cells * 2 * kv * size + tokens * wide * (size + 4) + scores
        logits = rows * (2 * 4 + size) * max(h.n_vocab, h.n_embd)
        if h.n_expert:  # scores of all experts, where their tokens are, and the results of one
            linear += tokens * (3 * 4 * h.n_expert + 7 * 8 * h.n_expert_used + (4 * 4 + 2 * size) * h.n_embd)
        if self._adapters:  # B (A x) of one weight, before and after it is scaled
            rank = max(adapter.rank for adapter in self._adapters.values())
            change = tokens * max(wide, n_ff, h.n_embd) + (rows * h.n_vocab if self._head_adapted else 0)
            linear += (size + 2 * 4) * change + (tokens + rows) * rank * size
        return max(self._held, linear + attention + logits)

    @property
    def _head_adapted(self) -> bool:
        return any(adapter.get("output.weight") for adapter in self._adapters.values())

    def close(self) -> None:
        """Release everything; a second call does nothing."""
        self._closed = True
        self._sequences.clear()
        self._adapters.clear()
        if self._decoder is not None:
            self._decoder = None
            self._empty_cache()

    def _empty_cache(self) -> None:
        """Give the device what was freed: PyTorch keeps it for itself, and other programs and engines go without."""
        if self._adapter.package is not None:
            getattr(torch, self._adapter.kind).empty_cache()

    @contextmanager
    def _giving_back(self) -> Iterator[None]:
        """What a call that fails has taken of the device is given back: the frames of an error hold tensors as long as it is looked at."""
        try:
            yield
        except BaseException as error:
            found: BaseException | None = error
            while found is not None:
                traceback.clear_frames(found.__traceback__)
                found = found.__cause__ or found.__context__
            with suppress(RuntimeError):  # a device that is gone: the error that is raised says so
                self._empty_cache()
            raise


def _told(file: ModelFile, options: EngineOptions) -> Callable[[int], None]:
    """Adds up what was read and tells the user."""
    total, done = sum(info.nbytes for info in file.header.tensors.values()), 0

    def read_more(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if options.progress:
            options.progress("load", done, total)

    return read_more


def _import(package: str, remedy: str) -> None:
    """Raises NativeError: what worked in a process of its own can fail in this one, which has loaded other libraries."""
    try:
        importlib.import_module(package)
    except Exception as error:
        raise NativeError(f"{package} cannot be imported beside what is loaded here ({error}); {remedy}") from error


def device_of(adapter: Adapter, number: int) -> torch.device:
    """PyTorch's device of that number."""
    return torch.device(adapter.kind) if adapter.package is None else torch.device(adapter.kind, number)


def _synchronize(adapter: Adapter) -> None:
    """Wait until the device has done what it was sent."""
    if adapter.package is not None:
        getattr(torch, adapter.kind).synchronize()


def _free_bytes(adapter: Adapter, device: torch.device) -> int | None:
    """Memory of the device that is free; None where PyTorch cannot say (old versions of vendors' packages)."""
    if adapter.package is None:
        import psutil

        return int(psutil.virtual_memory().available)
    ask: Any = getattr(getattr(torch, adapter.kind), "mem_get_info", None)
    return int(ask(device.index)[0]) if ask else None
