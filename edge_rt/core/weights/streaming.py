"""Running a model in less memory than its weights need: a share of every unit stays, the rest is streamed through buffers."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.core.graph.config import ModelConfig
from edge_rt.core.weights.units import AHEAD, CHUNK, DecayingCounter, Prefetcher, Span, Unit, read_span
from edge_rt.errors import Cancelled, ModelFileError, OptionError
from edge_rt.native import ggml, memory

if TYPE_CHECKING:
    from edge_rt.core.weights.store import WeightStore

# A ring of slots: a little memory in which all streamed weights take turns, each at its own address.
#
# A slot's pages are moved in the page table to where a unit's weights belong, filled from the file, and moved on: nothing is
# released or taken again. Files are read around the page cache (O_DIRECT): no copy, no reclaim, hardly any CPU time. Pages are
# huge where the system has them: disks fill memory that lies together up to three times as fast as scattered pages.

REQUEST = 8 * 1024 * 1024
"""Bytes a read asks for at most: the kernel sends its parts to the disk all at once, so one thread keeps the disk busy."""


class Source:
    """Reads an open file around the page cache where its file system can; else through it, leaving nothing there."""

    def __init__(self, fd: int) -> None:
        """``fd`` stays the caller's. Raises OSError if there are too many open files."""
        direct = _open_direct(fd)
        self.direct = direct is not None
        self._fd = os.dup(fd) if direct is None else direct

    def read(self, target: memoryview, offset: int) -> None:
        """Fill ``target`` (bytes) from a file offset; address, offset and size in whole pages. Raises OSError."""
        done = 0
        while done < len(target):
            count = os.preadv(self._fd, [target[done : done + REQUEST]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the file ends early")
            if not self.direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fd, offset + done, count, os.POSIX_FADV_DONTNEED)
            done += count

    def close(self) -> None:
        """Close."""
        os.close(self._fd)


def _open_direct(fd: int) -> int | None:
    """The very file ``fd`` has open, opened again with O_DIRECT; None where that is unknown or refused."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return None
    try:
        with mmap.mmap(-1, memory.PAGE) as page:
            os.preadv(direct, [page], memory.PAGE)  # some file systems refuse only now, or want larger blocks than pages
    except OSError:
        os.close(direct)
        return None
    return direct


class StreamBuffers:
    """``slots`` runs of ``size`` bytes (whole pages), lent to parts of mapped files. Not thread-safe.

    Where pages cannot be moved, a slot is memory taken anew for every turn: the same budget, more work for the system.
    """

    def __init__(self, slots: int, size: int) -> None:
        """Memory is taken when slots are filled. Raises OutOfMemory."""
        self._size, self._moves = size, memory.can_move()
        self._homes = [memory.map_large(size) for _ in range(slots)] if self._moves else []
        self._cuts: list[set[int]] = [set() for _ in range(slots)]  # where spans end: a run between cuts moves as a whole
        self._lent: list[tuple[Span, ...]] = [()] * slots
        self._taken: set[int] = set()
        self._sources: dict[int, Source] = {}
        self._overlaid: list[Span] = []

    def overlay(self, spans: Sequence[Span], slot: int) -> None:
        """Say that parts of files (whole pages, ``size`` bytes at most) will use a slot; they show zeros until they are filled.

        Raises OutOfMemory, OSError.
        """
        position = 0
        for span in spans:
            if span.fd not in self._sources:
                self._sources[span.fd] = Source(span.fd)
            memory.map_anonymous(span.size, span.address)
            self._overlaid.append(span)
            position += span.size
            self._cuts[slot].add(position)

    def fill(self, spans: Sequence[Span], slot: int) -> int:
        """Lend a slot to what was overlaid, and read it from its file; returns bytes read. Raises OSError."""
        if self._moves and slot not in self._taken:  # while it is at home: there huge pages fit
            memory.fill_zero(self._homes[slot], self._size)
            self._taken.add(slot)
        self._lend(slot, spans)
        for span in spans:
            self._sources[span.fd].read(ggml.memory_at(span.address, span.size), span.offset)
        return sum(span.size for span in spans)

    def clear(self) -> None:
        """Give the memory back until slots are filled again."""
        for slot in range(len(self._lent)):
            self._lend(slot, ())
        for home in self._homes:
            memory.map_anonymous(self._size, home)
            memory.advise(home, self._size, "hugepage")
        self._taken.clear()

    def close(self) -> None:
        """Show the files' own pages again, and give the memory back."""
        for span in self._overlaid:
            memory.map_file(span.fd, span.size, span.offset, span.address)
        for home in self._homes:
            memory.unmap(home, self._size)
        for source in self._sources.values():
            source.close()

    def _lend(self, slot: int, spans: Sequence[Span]) -> None:
        """Move a slot's pages from where they are to ``spans``, and what is too much of them home."""
        old, self._lent[slot] = self._lent[slot], tuple(spans)
        if not self._moves:
            for span in old:
                memory.map_anonymous(span.size, span.address)
            return
        home = self._homes[slot]
        before = {position: (address, size) for position, address, size in self._pieces(slot, old)}
        for position, address, size in self._pieces(slot, spans):
            source, _ = before.pop(position, (home + position, size))
            if source != address:
                memory.move(source, address, size)
        for position, (address, size) in before.items():
            memory.move(address, home + position, size)

    def _pieces(self, slot: int, spans: Sequence[Span]) -> Iterator[tuple[int, int, int]]:
        """(position in the slot, address, size) of the runs that move as a whole."""
        start = 0
        for span in spans:
            end = start + span.size
            for a, b in pairwise(sorted({start, end} | {cut for cut in self._cuts[slot] if start < cut < end})):
                yield a, span.address + a - start, b - a
            start = end


# Running a model in less memory than its weights need: keep a share of every unit, stream the rest.
#
# A dense model's units are touched in a cycle, where evicting the least recently used is the worst policy (it always evicts what
# is needed next). So a share of every unit stays (locked if the system allows), and the rest is read ahead of the graph that needs
# it, into slots that the units use in turn. The floor of a step is then (size - budget) / read bandwidth, whatever the kernel's
# own policy.

SLOTS = 2
"""Units whose streamed part may be in memory at once: the one computed and the one being read. More slots mean more to stream."""


class Share(NamedTuple):
    """A unit, divided into the part that is kept and the whole pages that are streamed."""

    unit: Unit
    kept: tuple[Span, ...]
    streamed: tuple[Span, ...]

    @property
    def streamed_bytes(self) -> int:
        """Bytes read for every step."""
        return sum(span.size for span in self.streamed)


def divide(units: Sequence[Unit], budget: int, beside: int = 0) -> list[Share]:
    """Divide every dense unit so that what is kept and SLOTS slots, each of the largest streamed part, fit the budget; ``beside`` of it is
    taken.

    Slots are as small as that allows: then the least is read. Raises OptionError if no size of a slot fits.
    """
    dense = [unit for unit in units if not unit.sparse]
    total = sum(unit.size for unit in dense) + beside
    if total <= budget:
        return [Share(unit, unit.spans, ()) for unit in dense]
    fixed = _entangled(units) | {"norm"}  # factors of the rotation are in there too, and every block reads them
    rooms = [0 if unit.name in fixed else sum(span.whole_pages[1] for span in unit.spans) for unit in dense]

    def needed(slot: int) -> int:
        return total - sum(min(room, slot) for room in rooms) + SLOTS * slot

    # A larger slot saves memory as long as more than SLOTS units fill it.
    largest = sorted(rooms, reverse=True)[SLOTS] if len(rooms) > SLOTS else 0
    if needed(largest) > budget:
        least = -(-needed(largest) // (1 << 20))
        raise OptionError(f"--memory {budget >> 20}M is less than this model can be streamed with; give at least {least}M")
    slot = memory.PAGE * bisect_left(range(largest // memory.PAGE), True, key=lambda pages: needed(pages * memory.PAGE) <= budget)
    return [_share(unit, min(room, slot)) for unit, room in zip(dense, rooms, strict=True)]


def _entangled(units: Sequence[Unit]) -> set[str]:
    """Units whose spans overlap: a small tensor of one lies in a gap of another, whose pages must then stay."""
    found: set[str] = set()
    end, last = 0, ""
    for span, name in sorted((span, unit.name) for unit in units for span in unit.spans):
        if span.address < end:
            found |= {last, name}
        if span.address + span.size > end:
            end, last = span.address + span.size, name
    return found


def _share(unit: Unit, streamed_bytes: int) -> Share:
    """Stream the last whole pages of a unit: it stays one sequential read."""
    kept: list[Span] = []
    streamed: list[Span] = []
    for span in reversed(unit.spans):
        address, size, _ = span.whole_pages
        take = min(size, streamed_bytes)
        streamed_bytes -= take
        cut = address + size - take
        for part, start, end in (
            (kept, address + size, span.address + span.size),
            (streamed, cut, address + size),
            (kept, span.address, cut),
        ):
            if end > start:
                part.append(Span(start, end - start, span.fd, span.offset + start - span.address))
    return Share(unit, tuple(reversed(kept)), tuple(reversed(streamed)))


class WeightStreamer:
    """Streams units through a ring of slots, on a thread that runs ahead of the graphs in forward order.

    ``acquire`` waits until a unit is in memory; after ``done``, or the next ``acquire``, its streamed part may read as zeros.
    Any order of units works; the order of the forward pass is fast.
    """

    def __init__(self, units: Sequence[Unit], budget: int, beside: int = 0) -> None:
        """Begins to read. ``beside``: bytes of the budget that are taken. Raises OptionError, OutOfMemory, NativeError, OSError."""
        self.shares = divide(units, budget, beside)
        self._index = {share.unit.name: i for i, share in enumerate(self.shares)}
        streamed = [i for i, share in enumerate(self.shares) if share.streamed]
        self._slot = {index: turn % SLOTS for turn, index in enumerate(streamed)}
        self._ring = StreamBuffers(SLOTS, max(share.streamed_bytes for share in self.shares)) if streamed else None
        self._change = threading.Condition()
        self._next = 0  # the unit in use, or the first that will be
        self._held: list[int | None] = [None] * SLOTS  # whose bytes each slot has
        self._kept: set[int] = set()  # units whose kept part has been read
        self._reading = self._idle = self._closed = False
        self._error: Exception | None = None
        self.read = 0
        self.locked = 0
        self._thread = threading.Thread(target=self._run, name="edge-rt-pager", daemon=True)
        try:
            for index, slot in self._slot.items():
                assert self._ring, "there is one where anything has a slot"
                self._ring.overlay(self.shares[index].streamed, slot)
            self._thread.start()
        except BaseException:
            if self._ring:
                self._ring.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """Units in forward order."""
        return tuple(self._index)

    @property
    def streams(self) -> bool:
        """Whether anything has to be read again and again."""
        return bool(self._slot)

    @property
    def streamed_bytes(self) -> int:
        """Bytes read for every step."""
        return sum(share.streamed_bytes for share in self.shares)

    def acquire(self, name: str) -> None:
        """Wait for a unit; others may go. Raises ModelFileError if it cannot be read (the next call tries again), Cancelled if closed."""
        index = self._index[name]
        with self._change:
            self._next, self._idle, self._error = index, False, None
            self._change.notify_all()
            self._change.wait_for(lambda: self._ready(index) or self._error or self._closed)
            if self._closed:
                raise Cancelled("the model was closed")
            if self._ready(index) or self._error is None:
                return
            if isinstance(self._error, OSError):
                raise ModelFileError(f"the model cannot be read: {self._error.strerror}; check the disk it is on") from self._error
            raise self._error

    def done(self, name: str) -> None:
        """The graph that used a unit has run."""
        with self._change:
            self._next = (self._index[name] + 1) % len(self.shares)
            self._change.notify_all()

    def warm(self) -> None:
        """Read ahead again after ``cool``."""
        with self._change:
            self._idle = False
            self._change.notify_all()

    def cool(self) -> None:
        """Give the slots back and unlock what is kept, until ``warm`` or ``acquire``. No unit may be in use."""
        with self._change:
            self._idle = True
            self._change.wait_for(lambda: not self._reading)
            self._unlock()
            self._held = [None] * SLOTS
            self._kept.clear()
            if self._ring:
                self._ring.clear()

    def close(self) -> None:
        """Stop the thread, unlock, and show the files' own pages again."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        self._unlock()
        if self._ring:
            self._ring.close()

    def _unlock(self) -> None:
        for share in self.shares:
            for span in share.kept:
                memory.unlock(span.address, span.size)
        self.locked = 0

    def _ready(self, index: int) -> bool:
        return index in self._kept and (index not in self._slot or self._held[self._slot[index]] == index)

    def _wanted(self) -> int | None:
        """The unit to read next: the first from ``_next`` on that is not in memory and whose slot no unit before it needs."""
        claimed: set[int] = set()
        for step in range(len(self.shares)):
            index = (self._next + step) % len(self.shares)
            slot = self._slot.get(index)
            if slot not in claimed and not self._ready(index):
                return index
            if slot is not None:
                claimed.add(slot)
            if len(claimed) == SLOTS:
                break
        return None

    def _run(self) -> None:
        while (index := self._begin()) is not None:
            error: Exception | None = None
            try:
                self._read(index)
            except Exception as failed:  # whatever it is, it belongs to who waits for the unit
                error = failed
            with self._change:
                self._reading, self._error = False, error
                if error is None and index in self._slot:
                    self._held[self._slot[index]] = index
                self._change.notify_all()

    def _begin(self) -> int | None:
        """Wait for a unit to read, and take its slot; None when closed."""
        with self._change:
            while not self._closed:
                index = None if self._idle or self._error else self._wanted()
                if index is not None:
                    self._reading = True
                    if index in self._slot:
                        self._held[self._slot[index]] = None
                    return index
                self._change.wait()
            return None

    def _read(self, index: int) -> None:
        share = self.shares[index]
        if index not in self._kept:
            scratch = bytearray(CHUNK)
            for span in share.kept:
                self.read += read_span(span, scratch)
                if memory.lock(span.address, span.size):
                    self.locked += span.size
            self._kept.add(index)
        if self._ring and share.streamed:
            self.read += self._ring.fill(share.streamed, self._slot[index])


class ExpertResidency:
    """Keeps the hottest experts of a mixture within a budget: cold ones are given back after a step that exceeded it."""

    def __init__(self, spans: dict[str, Span], n_expert: int, budget: int) -> None:
        """``spans`` are the 3-D expert tensors, expert by expert contiguous."""
        self._parts = {
            f"{name}#{i}": Span(s.address + i * (s.size // n_expert), s.size // n_expert, s.fd, s.offset + i * (s.size // n_expert))
            for name, s in spans.items()
            for i in range(n_expert)
        }
        self._budget = budget
        self._resident: set[str] = set()
        self.heat = DecayingCounter()

    def touched(self, names: Sequence[str]) -> None:
        """These experts ("tensor#index") were used in the step just run."""
        self.heat.tick()
        for name in names:
            self.heat.touch(name)
        self._resident.update(names)
        used = sum(self._parts[n].size for n in self._resident)
        if used <= self._budget:
            return
        for name in self.heat.coldest(self._resident):
            if used <= self._budget:
                return
            address, size, offset = self._parts[name].whole_pages
            memory.release(address, size, self._parts[name].fd, offset)
            self._resident.discard(name)
            used -= self._parts[name].size


# How weights come into memory for one open model: read ahead once, streamed under a budget, or paged expert by expert.


def paging_settings(extra: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """``ahead`` and ``locked`` of ``Paging`` as an engine's settings have them. Raises OptionError."""
    ahead, locked = extra.get("ggml.prefetch", AHEAD), extra.get("ggml.locked", ())
    if not isinstance(ahead, int) or not 4096 <= ahead <= 1 << 32:
        raise OptionError(f"ggml.prefetch is a number of bytes from 4096 to {1 << 32} and not {ahead!r}")
    return ahead, tuple(locked)


class Paging:
    """Chooses by budget: none or enough -> a prefetcher; too little -> a pager, and for a mixture an expert budget."""

    def __init__(
        self,
        weights: WeightStore,
        config: ModelConfig,
        budget: int | None,
        progress: Callable[[str, int, int], None] | None = None,
        ahead: int = AHEAD,
        locked: Collection[str] = (),
        *,
        beside: int = 0,
    ) -> None:
        """``ahead``: bytes asked of the disk before they are read. ``locked``: units that stay in memory once they were read, where the
        system lets this process lock so much. ``beside``: bytes of the budget that are taken. Raises OptionError if the budget cannot even
        hold the streaming window.
        """
        self._weights, self._progress, self._ahead, self._locked = weights, progress, ahead, frozenset(locked)
        self._config = config
        self._pager: WeightStreamer | None = None
        self._prefetcher: Prefetcher | None = None
        self._experts: ExpertResidency | None = None
        # A tied head's bytes are the embedding's rows too: what is held for one step's head is still there for the next step's rows.
        tied = weights.get("output.weight") is None
        self._needs = {"embedding": ("head", True), "head": ("head", False)} if tied else {}
        dense = sum(unit.size for unit in weights.units if not unit.sparse)
        if budget is not None and budget - beside < weights.size:
            sparse_budget = max(0, budget - beside - dense) if config.n_expert else 0
            pager = WeightStreamer(weights.units, budget - sparse_budget, beside)
            self._pager = pager
            if config.n_expert:
                self._experts = ExpertResidency(self._expert_spans(), config.n_expert, sparse_budget)
        else:
            self.warm()

    @property
    def streams(self) -> bool:
        """Whether units must be paged between graphs."""
        return self._pager is not None and self._pager.streams

    @property
    def pager(self) -> WeightStreamer | None:
        """The pager, if the budget called for one."""
        return self._pager

    @contextlib.contextmanager
    def holding(self, unit: str) -> Iterator[None]:
        """Keep a unit in memory while its graph runs. Without paging this does nothing."""
        if self._pager is None or not self._pager.streams:
            yield
            return
        name, last = self._needs.get(unit, (unit, True))
        if name not in self._pager.names:
            yield
            return
        self._pager.acquire(name)
        try:
            yield
        finally:
            if last:
                self._pager.done(name)

    def held(self, tensors: Iterable[int]) -> Iterator[int]:
        """The same tensors, each in memory until the next is asked for."""
        for tensor in tensors:
            address = ggml.fields(tensor).data
            unit = next(u.name for u in self._weights.units if any(s.address <= address < s.address + s.size for s in u.spans))
            with self.holding(unit):
                yield tensor

    def experts_used(self, chosen: Sequence[Any]) -> None:
        """Tell the expert budget, if there is one, what each layer used: arrays of ids [T, n_expert_used], one a layer."""
        if self._experts is None:
            return
        import numpy as np

        names = [
            f"blk.{layer}.ffn_{kind}_exps.weight#{expert}"
            for layer, ids in enumerate(chosen)
            for expert in np.unique(ids)
            for kind in ("gate", "up", "down")
        ]
        self._experts.touched(names)

    def warm(self) -> None:
        """Read dense units in forward order, in the background: beside the first step, so only if anything has to be read."""
        if self._pager:
            self._pager.warm()
        elif self._locked or not all(unit.sparse or unit.resident() == unit.size for unit in self._weights.units):
            self._stop_prefetch()
            self._prefetcher = Prefetcher(self._weights.units, self._progress, self._ahead, self._locked)
            self._prefetcher.start()

    def cool(self) -> None:
        """Give every page of the weights back: the system may take it, and what it has not taken by then need not be read again."""
        self._stop_prefetch()
        self._unlock()
        if self._pager:
            self._pager.cool()
        for unit in self._weights.units:
            for span in unit.spans:
                address, size, _ = span.whole_pages
                memory.yield_pages(address, size)

    def close(self) -> None:
        """Stop the threads."""
        self._stop_prefetch()
        self._unlock()
        if self._pager:
            self._pager.close()

    def _stop_prefetch(self) -> None:
        if self._prefetcher:
            self._prefetcher.stop()

    def _unlock(self) -> None:
        for unit in self._weights.units:
            if unit.name in self._locked:
                for span in unit.spans:
                    memory.unlock(span.address, span.size)

    def _expert_spans(self) -> dict[str, Any]:
        return {
            name: self._weights.span(name)
            for layer in range(self._config.n_layer)
            for kind in ("gate", "up", "down")
            if self._weights.get(name := f"blk.{layer}.ffn_{kind}_exps.weight")
        }
