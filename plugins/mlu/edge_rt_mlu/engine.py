"""The engine ``torch``: a llama-like decoder on any device that PyTorch drives, one cache per sequence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edge_rt.hooks import EngineInfo, MemoryReport, NativeError, OptionError, OutOfMemory, Part, Piece, in_pieces
from edge_rt_mlu.adapters import Adapter
from edge_rt_mlu.cells import Shape
from edge_rt_mlu.families import read
from edge_rt_mlu.model import SCORES, Decoder, Output, Slot
from edge_rt_mlu.rope import Rope
from edge_rt_mlu.sequences import TorchSequences, errors
from edge_rt_mlu.weights import Loader, predicted_bytes

if TYPE_CHECKING:
    import numpy.typing as npt

    from edge_rt.hooks import EngineOptions, Logits, ModelFile

CHUNK = 512
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class TorchEngine(TorchSequences):
    """Fills the ``Engine`` protocol, and RemovesCells, MovesCells, PrunesCells, EmbedsTokens, EmbedsText, TellsProgress, PredictsMemory."""

    def __init__(self, file: ModelFile, options: EngineOptions, adapter: Adapter, number: int) -> None:
        """Open a model. Raises UnsupportedModel, ModelFileError, ModelChanged, OptionError, OutOfMemory, NativeError."""
        super().__init__()
        self.hyper, family = read(file)
        name = options.extra.get("torch.dtype", adapter.dtype)
        if name not in DTYPES:
            raise OptionError(f"torch.dtype is {name!r}; choose from {', '.join(DTYPES)}")
        self._dtype, self._adapter = DTYPES[name], adapter
        if adapter.package is not None:
            importlib.import_module(adapter.package)
        elif options.threads is not None:
            torch.set_num_threads(options.threads)
        self._device = torch.device(adapter.kind) if adapter.package is None else torch.device(adapter.kind, number)
        h = self.hyper
        self.info = EngineInfo(
            engine="torch", architecture=h.architecture, n_vocab=h.n_vocab, n_layer=h.n_layer, n_embd=h.n_embd,
            train_context=h.train_context, max_context=options.context or h.train_context, chunk=CHUNK, device=options.device,
        )  # fmt: skip
        with errors(options.device):
            self._check_room(predicted_bytes(file, self._dtype))
            weights = Loader(file, h, self._device, self._dtype, _told(file, options)).load(family)
        # Cells are half precision everywhere: half of the memory, and a session saved on one device goes on on another.
        cached = torch.float16 if self._dtype is torch.float32 else self._dtype
        self._shape = Shape(h.n_layer, h.n_head_kv, h.head_dim, h.n_head, cached, self._device)
        self._rope = Rope(h, weights.factors, neighbours=family.neighbours, device=self._device)
        self._decoder: Decoder | None = Decoder(h, weights, self._rope, self._dtype)
        self._weights_bytes, self._held = weights.nbytes, 0
        self._moved: Callable[[], None] = lambda: None

    def _check_room(self, needed: int) -> None:
        """Raise OutOfMemory before anything is read if the weights cannot fit."""
        free = _free_bytes(self._adapter, self._device)
        if free is not None and needed > free:
            raise OutOfMemory(
                f"the weights take {needed >> 20} MiB as {_name(self._dtype)} and {free >> 20} MiB are free on {self.info.device};"
                " use a smaller model"
            )

    # ---- steps -------------------------------------------------------------------------------------------------------

    def step(self, parts: Sequence[Part]) -> list[Logits | None]:
        """Feed every part; see ``Engine.step``."""
        return list(self._step(parts, "logits"))

    def hidden(self, parts: Sequence[Part]) -> list[npt.NDArray[np.float32] | None]:
        """The same with hidden states in place of logits; see ``EmbedsText``."""
        return self._step(parts, "hidden")

    def _step(self, parts: Sequence[Part], output: Output) -> list[npt.NDArray[np.float32] | None]:
        """Any step, as several runs if it is long. A step that fails on the way leaves every sequence as long as it was."""
        self._check(parts)
        results: list[list[npt.NDArray[np.float32]]] = [[] for _ in parts]
        self._held = 0
        with self._restored(parts), errors(self.info.device):
            for part in parts:
                self._room(self._sequences[part.sequence], len(part.tokens), part.more)
            for run in in_pieces(parts, CHUNK):
                rows = self._run(run, output)
                start = 0
                for piece in run:
                    if piece.rows:
                        results[piece.part].append(rows[start : start + len(piece.rows)])
                        start += len(piece.rows)
        given = [None if not found else found[0] if len(found) == 1 else np.concatenate(found) for found in results]
        self._held = sum(rows.nbytes for rows in given if rows is not None)
        return given

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
        if min(tokens, default=0) < 0 or max(tokens, default=0) >= self.info.n_vocab:
            raise OptionError(f"a token id is outside the vocabulary of {self.info.n_vocab}; tokenize with this model")

    @contextmanager
    def _restored(self, parts: Sequence[Part]) -> Iterator[None]:
        """If the block fails, the sequences are cut back to what they were; queries of layers that were reached are forgotten."""
        before = [(cells, cells.length) for cells in (self._sequences[part.sequence] for part in parts)]
        try:
            yield
        except BaseException:
            for cells, length in before:
                cells.positions.truncate(length)
                if cells.ring:
                    cells.ring.only(0)
            raise

    def _run(self, run: Sequence[Piece], output: Output) -> npt.NDArray[np.float32]:
        """One pass over the weights; rows of all pieces that want some, in order: float32 [R, V or E]."""
        decoder = self._open_decoder()
        tokens, positions, rows, slots = list[int](), list[int](), list[int](), list[Slot]()
        for piece in run:
            cells = self._sequences[piece.sequence]
            rows += [len(tokens) + row for row in piece.rows]
            following = cells.positions.next
            positions += range(following, following + len(piece.tokens))
            tokens += piece.tokens
            slots.append(Slot(cells, cells.length, len(piece.tokens)))
        wanted = torch.tensor(rows, device=self._device) if rows else None
        ids, turn = torch.tensor(tokens, dtype=torch.int64, device=self._device), self._rope.at(positions)
        with torch.inference_mode():
            found = decoder.run(ids, turn, slots, wanted, output, self._moved)
        # This waits for the device: only then it has gone on, and only then it has failed if it fails.
        given: npt.NDArray[np.float32] = np.empty((0, 0), np.float32) if found is None else found.cpu().numpy()
        if found is None:
            _synchronize(self._adapter)
        elif not np.isfinite(given).all():  # half precision holds no more than 65,504, and what is beyond makes NaN of all that follows
            kind = _name(self._dtype)
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
        self._check_tokens(tokens)
        with errors(self.info.device):
            rows = self._open_decoder().weights.embedding[torch.tensor(list(tokens), dtype=torch.int64, device=self._device)]
            found: npt.NDArray[np.float32] = rows.float().cpu().numpy()
        return found

    # ---- memory ------------------------------------------------------------------------------------------------------

    def held_bytes(self) -> tuple[int, int]:
        """What all caches hold, and the last step's results."""
        return sum(cells.nbytes for cells in self._sequences.values()), self._held

    def memory(self) -> MemoryReport:
        """Bytes held now. Weights are on the device whole."""
        return MemoryReport(self._weights_bytes, self._weights_bytes, *self.held_bytes())

    def compute_bytes(self, cells: int, parts: int, rows: int) -> int:
        """The most that steps hold beside the caches; see ``PredictsMemory``."""
        h, size = self.hyper, int(self._dtype.itemsize)
        tokens, kv = CHUNK, h.n_head_kv * h.head_dim
        n_ff = max(int(block.down.weight.shape[1]) for block in self._open_decoder().weights.blocks)
        wide = h.n_head * h.head_dim + 2 * kv
        linear = tokens * ((4 * 4 + size) * h.n_embd + (4 * 5 + size) * max(wide, 2 * n_ff))
        scores = max(SCORES, h.n_head * cells) * (2 * size + 3 * 4 + 1)
        attention = cells * 2 * kv * size + tokens * wide * (size + 4) + scores
        logits = rows * (2 * 4 + size) * max(h.n_vocab, h.n_embd)
        return max(self._held, linear + attention + logits)

    def close(self) -> None:
        """Release everything; a second call does nothing."""
        self._closed = True
        self._sequences.clear()
        if self._decoder is not None:
            self._decoder = None
            if self._adapter.package is not None:
                getattr(torch, self._adapter.kind).empty_cache()  # else PyTorch keeps what was freed for itself


def _told(file: ModelFile, options: EngineOptions) -> Callable[[int], None]:
    """Adds up what was read and tells the user."""
    total, done = sum(info.nbytes for info in file.header.tensors.values()), 0

    def read_more(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if options.progress:
            options.progress("load", done, total)

    return read_more


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


