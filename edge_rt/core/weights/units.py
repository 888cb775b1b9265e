"""Units of weights: runs of mapped bytes that are read, kept and released together; how recently each was used; reading them ahead."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from edge_rt.native import memory

# Heat: how much something was used of late, for what is touched unevenly (experts, embedding rows, whole models).


class DecayingCounter:
    """Exponentially weighted access counts."""

    def __init__(self, half_life: float = 64.0) -> None:
        self._decay = 0.5 ** (1.0 / half_life)
        self._heat: dict[str, tuple[float, int]] = {}
        self._clock = 0

    def tick(self) -> None:
        """A step passed."""
        self._clock += 1

    def touch(self, key: str, amount: float = 1.0) -> None:
        """``key`` was used in this step."""
        self._heat[key] = (self.value(key) + amount, self._clock)

    def value(self, key: str) -> float:
        """Heat now: every past touch, halved for each half-life (in steps) since."""
        heat, when = self._heat.get(key, (0.0, self._clock))
        return float(heat * self._decay ** (self._clock - when))

    def coldest(self, keys: Iterable[str]) -> list[str]:
        """Keys by rising heat."""
        return sorted(keys, key=self.value)


# Units: what is read, kept and released together, as runs of mapped bytes.


class Span(NamedTuple):
    """A contiguous run of mapped bytes: where it is in memory and in its file."""

    address: int
    size: int
    fd: int
    offset: int

    @property
    def whole_pages(self) -> tuple[int, int, int]:
        """(address, size, file offset) of the whole pages inside; neighbours' pages are left out."""
        start, size = memory.inner_page_span(self.address, self.size)
        return start, size, self.offset + (start - self.address)


class Unit(NamedTuple):
    """What is read, kept and released together. ``sparse``: touched row by row or expert by expert, so never read ahead whole."""

    name: str
    spans: tuple[Span, ...]
    sparse: bool = False
    packed: bool = False

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(span.size for span in self.spans)

    def resident(self) -> int | None:
        """Bytes in memory now, None where the system cannot say."""
        total = 0
        for span in self.spans:
            bytes_ = memory.resident_bytes(*memory.page_span(span.address, span.size))
            if bytes_ is None:
                return None
            total += min(bytes_, span.size)
        return total


def unit_name(tensor: str) -> str:
    """The unit a GGUF tensor belongs to, by its name."""
    if tensor.startswith("blk."):
        return ".".join(tensor.split(".", 2)[:2])
    if tensor.startswith("token_embd"):
        return "embedding"
    return "head" if tensor.startswith("output.") else "norm"


def merge(spans: Sequence[Span]) -> tuple[Span, ...]:
    """Join neighbours (gaps under a page are alignment padding)."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.fd, s.address)):
        last = merged[-1] if merged else None
        if last and last.fd == span.fd and 0 <= span.address - (last.address + last.size) < memory.PAGE:
            merged[-1] = Span(last.address, span.address + span.size - last.address, last.fd, last.offset)
        else:
            merged.append(span)
    return tuple(merged)


# The prefetch queue: reads units in the order the forward pass will touch them, ahead of it, in large sequential reads.
#
# Page faults read 4-128 KB at a time and stall the kernel that took them; a thread that reads 2 MB at a time keeps the disk busy
# while the cores compute. What is already in the page cache is not read again.

CHUNK = 2 * 1024 * 1024
AHEAD = 4 * CHUNK
"""Bytes asked of the disk at once, so that it never waits for us."""
_RESERVE = 64 * 1024 * 1024
"""Free memory left to others when reading ahead."""


def read_span(span: Span, scratch: bytearray, stop: Callable[[], bool] = lambda: False, ahead: int = AHEAD) -> int:
    """Bring a span into memory and return the bytes that had to be read; ``stop`` is asked between chunks."""
    read = 0
    for start in range(0, span.size, CHUNK):
        if stop():
            break
        size = min(CHUNK, span.size - start)
        page, page_size = memory.page_span(span.address + start, size)
        absent = page_size - (memory.resident_bytes(page, page_size) or 0)
        if absent:
            memory.read_ahead(span.fd, span.offset + start, min(ahead, span.size - start))
        # Populating waits for the pages and enters them in the page table, without the copy that reading into a buffer makes.
        if not memory.populate(page, page_size) and absent:
            with memoryview(scratch)[:size] as target:
                os.preadv(span.fd, [target], span.offset + start)
        read += absent
    return read


def available_memory() -> int | None:
    """Bytes that can be used without swapping (MemAvailable, or what the cgroup leaves), None where unknown."""
    found: list[int] = []
    try:
        with open("/proc/meminfo") as lines:
            found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pages = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else -1
        return pages * memory.PAGE if pages > 0 else None
    for limit, used in _CGROUP_MEMORY:
        try:
            with open(limit) as a, open(used) as b:
                text = a.read().strip()
                if text != "max":
                    found.append(max(0, int(text) - int(b.read())))
        except (OSError, ValueError):
            continue  # no such controller here
    return min(found) if found else None


_CGROUP_MEMORY = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class Prefetcher:
    """Reads dense units once, in order, on a thread; reports how far it is and stops when memory gets short."""

    def __init__(
        self,
        units: Sequence[Unit],
        progress: Callable[[str, int, int], None] | None = None,
        ahead: int = AHEAD,
        locked: Collection[str] = (),
    ) -> None:
        """``ahead``: bytes asked of the disk at once. ``locked``: units to lock once they are in memory, as far as that is allowed."""
        self._units = [unit for unit in units if not unit.sparse]
        self._ahead, self._lock = ahead, locked
        self._progress = progress
        self._stop = threading.Event()
        self.total = sum(unit.size for unit in self._units)
        self.done = 0
        self.read = self.locked = 0
        self._thread = threading.Thread(target=self._run, name="edge-rt-prefetch", daemon=True)

    def start(self) -> None:
        """Begin reading."""
        self._thread.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything that fits is in memory; False if the timeout (seconds) came first."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Stop reading and wait for the thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        scratch = bytearray(CHUNK)
        for unit, span in self._spans():
            free = available_memory()
            if self._stop.is_set() or (free is not None and free < span.size + _RESERVE):
                return
            self.read += read_span(span, scratch, self._stop.is_set, self._ahead)
            if unit in self._lock and memory.lock(span.address, span.size):
                self.locked += span.size
            self.done += span.size
            if self._progress:
                self._progress("prefetch", self.done, self.total)

    def _spans(self) -> Iterable[tuple[str, Span]]:
        for unit in self._units:
            for span in unit.spans:
                yield unit.name, span
