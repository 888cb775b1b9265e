"""Running a model in less memory than its weights need: keep a share of every unit, stream the rest.

A dense model's units are touched in a cycle, where evicting the least recently used is the worst policy (it always evicts what
is needed next). So a share of every unit stays (locked if the system allows), and the rest is read ahead of the graph that needs
it, into slots that the units use in turn. The floor of a step is then (size - budget) / read bandwidth, whatever the kernel's
own policy.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from edge_rt.core.load.heat import Heat
from edge_rt.core.load.prefetch import CHUNK, read_span
from edge_rt.core.load.ring import Ring
from edge_rt.core.load.units import Span, Unit
from edge_rt.errors import Cancelled, ModelFileError, OptionError
from edge_rt.native import memory

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


class Pager:
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
        self._ring = Ring(SLOTS, max(share.streamed_bytes for share in self.shares)) if streamed else None
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
        self.heat = Heat()

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
