"""Running a model in less memory than its weights need: keep a fixed share of every unit, stream the rest.

A dense model's units are touched in a cycle, where evicting the least recently used is the worst policy (it always evicts what
is needed next). So a share of every unit stays (locked if the system allows), the rest is read ahead of the graph that needs it
and given back after. The floor of a step is then (size - budget) / read bandwidth, whatever the kernel's own policy.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

from edge_rt.core.load.prefetch import CHUNK, Heat, read_span
from edge_rt.core.load.units import Span, Unit
from edge_rt.errors import OptionError
from edge_rt.native import memory

AHEAD = 2
"""Units whose streamed part may be in memory at once: the one computed and the one being read."""


class Share(NamedTuple):
    """A unit's whole pages, divided into those kept and those streamed."""

    unit: Unit
    kept: tuple[Span, ...]
    streamed: tuple[Span, ...]

    @property
    def streamed_bytes(self) -> int:
        """Bytes read for every step."""
        return sum(span.size for span in self.streamed)


def divide(units: Sequence[Unit], budget: int) -> list[Share]:
    """Choose the share f of every dense unit that stays, so that f*S + AHEAD*(1-f)*U <= budget (S all, U the largest unit).

    Raises OptionError if not even the streaming window fits.
    """
    dense = [unit for unit in units if not unit.sparse]
    total, largest = sum(u.size for u in dense), max(u.size for u in dense)
    if total <= budget:
        return [Share(u, u.spans, ()) for u in dense]
    window = AHEAD * largest
    if budget < window:
        least = -(-window // (1 << 20))
        raise OptionError(f"--memory {budget >> 20}M is less than two of the model's largest units need; give at least {least}M")
    fraction = (budget - window) / (total - window)
    return [_share(unit, fraction) for unit in dense]


def _share(unit: Unit, fraction: float) -> Share:
    """Keep the first ``fraction`` of a unit's pages: the streamed part stays one sequential read."""
    left = int(unit.size * fraction)
    kept, streamed = [], []
    for span in unit.spans:
        address, size, offset = span.whole_pages
        if size == 0:
            continue
        keep = min(size, left // memory.PAGE * memory.PAGE)
        left -= keep
        if keep:
            kept.append(Span(address, keep, span.fd, offset))
        if size > keep:
            streamed.append(Span(address + keep, size - keep, span.fd, offset + keep))
    return Share(unit, tuple(kept), tuple(streamed))


class Pager:
    """Streams units through a window, on a thread that runs ahead of the graphs in forward order.

    ``acquire`` waits until a unit is in memory; ``done`` lets its streamed part go. Units must be used in order.
    """

    def __init__(self, units: Sequence[Unit], budget: int) -> None:
        self.shares = divide(units, budget)
        self._index = {share.unit.name: i for i, share in enumerate(self.shares)}
        self._change = threading.Condition()
        self._loaded = 0  # units loaded since the start, and released, both counted over all rounds
        self._released = 0
        self._closed = False
        self._error: BaseException | None = None
        self.read = 0
        self.locked = 0
        self._thread = threading.Thread(target=self._run, name="edge-rt-pager", daemon=True)
        self._thread.start()

    @property
    def names(self) -> tuple[str, ...]:
        """Units in forward order."""
        return tuple(self._index)

    @property
    def streams(self) -> bool:
        """Whether anything has to be read again and again."""
        return any(share.streamed for share in self.shares)

    @property
    def streamed_bytes(self) -> int:
        """Bytes read for every step."""
        return sum(share.streamed_bytes for share in self.shares)

    def acquire(self, name: str) -> None:
        """Wait for a unit; units before it that were not used count as done. Raises OSError if it cannot be read."""
        with self._change:
            target = self._turn(name)
            if target > self._released:
                self._released = target
                self._change.notify_all()
            self._change.wait_for(lambda: self._loaded > target or self._error or self._closed)
            if self._error:
                raise self._error

    def done(self, name: str) -> None:
        """The graph that used a unit has run."""
        with self._change:
            self._released = max(self._released, self._turn(name) + 1)
            self._change.notify_all()

    def close(self) -> None:
        """Stop the thread and unlock."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()
        for share in self.shares:
            for span in share.kept:
                memory.unlock(span.address, span.size)

    def _turn(self, name: str) -> int:
        """How often-th unit, over all rounds, the next use of ``name`` is."""
        n, index = len(self.shares), self._index[name]
        turn = self._released // n * n + index
        return turn if turn >= self._released else turn + n

    def _run(self) -> None:
        scratch, n, freed = bytearray(CHUNK), len(self.shares), 0
        kept: set[int] = set()
        try:
            while True:
                with self._change:
                    while not (self._closed or self._released > freed or self._loaded - self._released < AHEAD):
                        self._change.wait()
                    if self._closed:
                        return
                    released = self._released
                    unread = max(self._loaded, released)  # what was skipped need not be read any more
                for turn in range(freed, min(released, unread)):
                    for span in self.shares[turn % n].streamed:
                        memory.release(span.address, span.size, span.fd, span.offset)
                freed = released
                if unread - released < AHEAD:
                    self._load(unread % n, kept, scratch)
                    with self._change:
                        self._loaded = unread + 1
                        self._change.notify_all()
        except OSError as error:
            with self._change:
                self._error = error
                self._change.notify_all()

    def _load(self, index: int, kept: set[int], scratch: bytearray) -> None:
        share = self.shares[index]
        if index not in kept:
            kept.add(index)
            for span in share.kept:
                self.read += read_span(span, scratch)
                if memory.lock(span.address, span.size):
                    self.locked += span.size
        for span in share.streamed:
            self.read += read_span(span, scratch)


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
