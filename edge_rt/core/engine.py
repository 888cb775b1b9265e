"""What every engine implements: the Engine protocol, its optional capabilities, and the checks made before a step changes anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

from edge_rt.errors import ContextError, OptionError

# What every engine fills: a model that turns tokens of several sequences into logits, with a cache it owns.
#
# An engine knows tokens, positions and its cache. It knows nothing of text, sampling, stop strings or sessions.
# Sequences are named by small integers the engine hands out; tokens always go to the end of a sequence.

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from edge_rt.core.gguf.lora import LoraFile
    from edge_rt.core.weights.error_correction import Compensation
    from edge_rt.hardware.profile import Limits
    from edge_rt.power.controller import Sustained

    Row = memoryview[float] | npt.NDArray[np.float32]
    """Logits after one token: float32 [n_vocab]."""

Wanted = Literal["none", "last", "all"]


class SequenceBatch(NamedTuple):
    """One sequence's share of a step: ``tokens`` go to its end; ``logits`` says for which of them logits come back.

    ``more``: so many tokens are to follow in later steps. An engine that must make room may do so for them, too.
    """

    sequence: int
    tokens: Sequence[int]
    logits: Wanted = "last"
    more: int = 0


class Logits(Protocol):
    """Float32 [rows, n_vocab]. NumPy arrays are such; ``np.asarray`` makes one of any other, without a copy.

    No more than this is asked, so that an engine need not import NumPy (40 ms) for the first token of a process.
    """

    def __len__(self) -> int:
        """Rows."""
        ...

    def __getitem__(self, index: int, /) -> Row:
        """One row, in place."""
        ...

    def copy(self) -> Logits:
        """The same in memory of its own."""
        ...

    def __array__(self) -> npt.NDArray[np.float32]:
        """All rows, in place where that is possible."""
        ...


class EngineInfo(NamedTuple):
    """What the loop must know of an engine. ``max_context`` is cells per sequence; ``chunk`` the tokens a step takes best.

    ``offloaded``: units of the weights that lie in the device's own memory, in forward order: ``blk.12``, ..., ``norm``, ``head``.
    """

    engine: str
    architecture: str
    n_vocab: int
    n_layer: int
    n_embd: int
    train_context: int
    max_context: int
    chunk: int
    device: str = "cpu"
    offloaded: tuple[str, ...] = ()


class MemoryReport(NamedTuple):
    """Bytes by owner. ``weights_resident`` is None where the system cannot say.

    ``device``: those in a device's own memory: weights, which are not among the mapped ones, caches and compute buffers, which are in
    ``cache`` and ``compute`` too.
    """

    weights_mapped: int
    weights_resident: int | None
    cache: int
    compute: int
    device: int = 0


class EngineOptions(NamedTuple):
    """What an engine is opened with.

    ``context``: cells per sequence (None: the model's own). ``threads``: None lets the engine choose. ``cpus``: keep to these; () any.
    ``memory``: bytes of weights that may be resident (None: no limit). ``pack``: build and use packed weights.
    ``key_type``: element type of cached keys. ``device``: the chosen device's name; an engine refuses those it cannot drive.
    ``progress`` is told (phase, done, total) during slow steps, on any thread; it stops the opening by raising.
    ``limits``: of power and temperature, to be held while it computes (None: none); an engine that cannot raises OptionError.
    ``compensation``: what corrects the model's products, open as long as the engine is being opened (None: nothing); an engine that cannot
    apply it refuses the model.
    ``extra``: settings of single engines, keyed ``"engine.setting"``; an engine reads its own and leaves the others alone.
    """

    context: int | None = None
    threads: int | None = None
    memory: int | None = None
    pack: bool = True
    key_type: Literal["f16", "q8_0"] = "f16"
    device: str = "cpu"
    progress: Callable[[str, int, int], None] | None = None
    limits: Limits | None = None
    extra: Mapping[str, Any] = MappingProxyType({})
    cpus: tuple[int, ...] = ()
    compensation: Compensation | None = None


@runtime_checkable
class Engine(Protocol):
    """The protocol. Calls come from one thread at a time (the runtime holds the lock).

    What only some engines can is in protocols of its own, which the runtime asks for with isinstance: RemovesCells, MovesCells,
    PrunesCells, EmbedsTokens, EmbedsText, AppliesAdapters, AppliesCompensation, TellsProgress, HoldsLimits, PredictsMemory. An engine has
    all methods of one, or does without what it is for.
    """

    @property
    def info(self) -> EngineInfo:
        """Static facts."""
        ...

    def new_sequence(self) -> int:
        """Open an empty sequence. Raises OutOfMemory."""
        ...

    def fork_sequence(self, sequence: int, length: int) -> int:
        """Open a sequence that starts with the first ``length`` cells of another; the two never touch each other again."""
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the cells from ``length`` on. Raises ContextError where the engine cannot."""
        ...

    def free_sequence(self, sequence: int) -> None:
        """Release a sequence and its memory."""
        ...

    def length(self, sequence: int) -> int:
        """Cells in use."""
        ...

    def step(self, batches: Sequence[SequenceBatch]) -> list[Logits | None]:
        """Feed every batch and return its logits: float32 [rows, n_vocab], rows 1 ("last") or len(tokens) ("all"), None for "none".

        They are valid until the next call. Raises ContextError if a sequence would outgrow ``max_context``
        (then no sequence has changed), ModelChanged, OutOfMemory, NativeError.
        """
        ...

    def exact_rows(self) -> int:
        """How many tokens of one sequence a step may carry while logits and cache stay bit-identical to feeding them one by one.

        1 where that is not proven. The answer comes from a probe of the real kernels, not from belief.
        """
        ...

    def export_sequence(self, sequence: int) -> bytes:
        """The cells of a sequence as bytes, for ``import_sequence`` of the same engine, model and version."""
        ...

    def import_sequence(self, data: bytes | memoryview) -> int:
        """Open a sequence from exported bytes. Raises SessionFileError."""
        ...

    def memory(self) -> MemoryReport:
        """Bytes held now."""
        ...

    def close(self) -> None:
        """Release everything; further calls are errors."""
        ...


# ---- what only some engines can: asked for with isinstance -------------------------------------------------------------------


@runtime_checkable
class RemovesCells(Protocol):
    """Sequences that can lose cells in the middle.

    The cells that stay keep the positions they were fed at, so a gap is left there, and the next token goes on behind the last one.
    """

    def next_position(self, sequence: int) -> int:
        """Position of the next token: ``length`` as long as no cell was removed."""
        ...

    def remove_cells(self, sequence: int, spans: Sequence[tuple[int, int]]) -> int:
        """Forget cells [start, end) of each span (rising, apart, numbered as before the call); later cells move down.

        Returns the bytes given back to the system. Raises ContextError where the model cannot.
        """
        ...

    def renumber(self, sequence: int) -> None:
        """Close the gaps: cell i gets position i, and cached keys are rotated to match. Raises ContextError where that is impossible."""
        ...


@runtime_checkable
class MovesCells(Protocol):
    """Sequences whose cells can leave and come back: to the same positions with the same logits as if they had never left."""

    def export_cells(self, sequence: int, start: int, end: int) -> bytes:
        """Cells [start, end) with their positions as bytes, for ``insert_cells`` of the same engine, model and version."""
        ...

    def insert_cells(self, sequence: int, at: int, data: bytes | memoryview) -> int:
        """Put exported cells before cell ``at``; later cells move up. Returns how many.

        Where their positions do not fit between the neighbours' (the gap was closed), they are moved there, and later positions move up.
        Raises SessionFileError for damaged bytes, ContextError if the sequence would outgrow ``max_context``, OutOfMemory.
        """
        ...


class Pruned(NamedTuple):
    """What pruning did: ``cells`` left every head of every layer, ``released_bytes`` are free."""

    cells: int
    released_bytes: int


@runtime_checkable
class PrunesCells(Protocol):
    """Sequences whose layers and heads can each forget the cells they need least.

    What is left stands closer together, at the positions it was fed at. The leading cells are then "mixed": the same cell holds another
    token in every head. They go or stay together: to truncate or fork in their middle, to remove or to export some of them, or to insert
    cells among them raises ContextError and changes nothing; truncating to 0, whole exports and pruning again always work.
    """

    def watch(self, sequence: int, window: int) -> None:
        """Keep the last ``window`` queries of every layer from now on, which pruning goes by; 0 stops. Forks are not watched.

        Asked again with the same number, nothing changes.

        Raises OptionError, OutOfMemory.
        """
        ...

    def prune(self, sequence: int, keep: int, *, first: int, last: int, method: str = "defensive", queries: int | None = None) -> Pruned:
        """Keep ``keep`` cells of each head, the first and last ones among them, and chosen by ``method`` of core/kv/pruning.py.

        ``queries``: ask with so many of those kept, the last ones; None: with all. Nothing changes if there are no more cells.
        Raises OptionError for an unknown method, ends longer than ``keep`` or less than one query, ContextError if the method asks for
        queries and none were kept, OutOfMemory.
        """
        ...

    @property
    def cell_bytes(self) -> int:
        """Bytes one cell takes over all layers, for budgets in bytes."""
        ...

    def mixed_cells(self, sequence: int) -> int:
        """How many leading cells are mixed: 0 as long as nothing was pruned."""
        ...


@runtime_checkable
class EmbedsTokens(Protocol):
    """Models that show what they take a token for before they read it in its context."""

    def token_embeddings(self, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
        """Rows of the token embedding: float32 [len(tokens), n_embd]. Raises OptionError for a token out of range."""
        ...


@runtime_checkable
class EmbedsText(Protocol):
    """Models that show what they make of a text before they turn it into logits."""

    def hidden(self, batches: Sequence[SequenceBatch]) -> list[npt.NDArray[np.float32] | None]:
        """``step``, with the hidden states after the output norm in place of logits: float32 [rows, n_embd].

        A batch's ``logits`` says for which tokens they come back. Cells are filled as by ``step``. Raises what that does.
        """
        ...


@runtime_checkable
class TellsProgress(Protocol):
    """Engines that say within a step that it goes on, so that one that takes long can be told from one that hangs."""

    def tell(self, moved: Callable[[], None]) -> None:
        """Call ``moved`` from now on within steps that may take long: every few seconds, on the thread that takes the step."""
        ...


@runtime_checkable
class HoldsLimits(Protocol):
    """Engines that hold limits of power and temperature (``EngineOptions.limits``) by computing less."""

    def sustained(self) -> Sustained | None:
        """What was asked for and what was measured, None without limits. On any thread."""
        ...

    def news(self) -> list[str]:
        """What a person should know of it, such as that the device tells no power any more; each once. On any thread."""
        ...


@runtime_checkable
class AppliesAdapters(Protocol):
    """Models that adapters (LoRA) change, sequence by sequence: one step may carry sequences of several adapters, and of none."""

    def open_adapter(self, adapter: LoraFile) -> int:
        """Take up an adapter that fits the model; the number it is called by until ``close``, behind which its file stays open.

        Raises UnsupportedModel where the engine cannot apply it, OutOfMemory.
        """
        ...

    def adapt(self, sequence: int, adapter: int | None, scale: float = 1.0, *, imported: bool = False) -> None:
        """All tokens of an empty sequence go through this adapter, ``scale`` times, and so do those of its forks. None: through none.

        ``imported``: the sequence was opened by ``import_sequence``, and its cells were made with this adapter and scale.
        Raises ContextError if the sequence has other cells, as what was computed without the adapter must not be mixed with it.
        """
        ...


@runtime_checkable
class AppliesCompensation(Protocol):
    """Engines that correct a quantised model's products by its side file (``EngineOptions.compensation``)."""

    def compensated(self) -> str | None:
        """The ``key`` of the compensation that all steps go through, None without one. On any thread."""
        ...


@runtime_checkable
class PredictsMemory(Protocol):
    """Engines that say beforehand what a request will take, so that no more are let in than there is memory for (docs/daemon.md).

    All are bytes; all but the first are upper bounds. An engine without this is not limited.
    """

    def held_bytes(self) -> tuple[int, int]:
        """What all sequences hold now, and what steps do beside them: quicker than ``memory``."""
        ...

    def sequence_bytes(self, sequence: int) -> int:
        """What a sequence may hold as it is now, cells that are reserved and not used yet included."""
        ...

    def needed_bytes(self, sequence: int | None, cells: int, *, pruned: bool = False) -> int:
        """The most that a sequence (None: a new one) holds on its way to ``cells`` cells, moves to larger memory included.

        ``pruned``: with what ``PrunesCells`` takes beside the cells. Never less than ``sequence_bytes``.
        """
        ...

    def compute_bytes(self, cells: int, batches: int, rows: int) -> int:
        """The most that steps hold beside the sequences, while none has more than ``cells`` cells and no step has more than ``batches``
        batches and ``rows`` rows of logits. Never less than is held now. Raises OutOfMemory.
        """
        ...


# What every engine checks before a step changes anything.


def check_batches(batches: Sequence[SequenceBatch], length: Callable[[int], int], info: EngineInfo) -> None:
    """Refuse a step that an engine cannot take. ``length``: gives the cells of a sequence, and raises what the engine raises for none.

    Raises OptionError for a sequence that is named twice and for tokens that no vocabulary of this size has, ContextError for a sequence
    that would outgrow the context.
    """
    seen: set[int] = set()
    for batch in batches:
        if batch.sequence in seen:
            raise OptionError("a step names the same sequence twice; join its tokens into one part")
        seen.add(batch.sequence)
        check_fits(length(batch.sequence) + len(batch.tokens), info)
        check_tokens(batch.tokens, info)


def check_tokens(tokens: Sequence[int], info: EngineInfo) -> None:
    """Raise OptionError for tokens that no vocabulary of this size has."""
    if min(tokens, default=0) < 0 or max(tokens, default=0) >= info.n_vocab:
        raise OptionError(f"a token id is outside the vocabulary of {info.n_vocab}; tokenize with this model")


def check_fits(cells: int, info: EngineInfo) -> None:
    """Raise ContextError if a sequence of so many cells would outgrow the context."""
    if cells > info.max_context:
        raise ContextError(f"{cells} tokens do not fit a context of {info.max_context}; shorten the prompt or raise --ctx")
