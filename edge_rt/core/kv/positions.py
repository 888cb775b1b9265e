"""Where the tokens in a sequence's cells stand in the text, head by head, and cells as bytes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.errors import ContextError, SessionFileError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# How many cells a cache has room for: whole steps, growing by a quarter. Engines of plugins grow theirs alike.

STEP = 256
"""Cells: attention runs over multiples of this (as in llama.cpp), and capacities are multiples of it."""


def padded(cells: int) -> int:
    """Cells rounded up to a whole step, at least one."""
    return max(STEP, -(-cells // STEP) * STEP)


def next_capacity(current: int, needed: int, limit: int) -> int:
    """Grow by a quarter, at least one step: the waste stays under a quarter and copying stays linear in the end."""
    return min(padded(limit), max(padded(needed), padded(current + current // 4) if current else 0))


def largest_capacity(current: int, cells: int, limit: int) -> int:
    """The most that a cache of ``current`` cells comes to while it grows to ``cells``, however many are asked for at a time."""
    return current if cells <= current else next_capacity(max(current, padded(cells) - STEP), cells, limit)


# Where the tokens in a sequence's cells stand in the text: cells move together when some are removed, positions do not.


class Run(NamedTuple):
    """Cells [cell, cell + n) hold the tokens at positions [position, position + n)."""

    cell: int
    position: int
    n: int


class Positions:
    """Positions of ``length`` cells as runs, rising; ``next`` is the position of the token to come."""

    def __init__(self, runs: Sequence[Run] = ()) -> None:
        """``runs`` must follow each other without a hole in the cells."""
        self._runs = list(runs)
        self.next = self._end()

    @classmethod
    def saved(cls, runs: Sequence[Run], cells: int, following: int) -> Positions:
        """Of so many cells that were saved as runs; ``following``: the next position. Raises SessionFileError unless the runs rise and
        follow each other.
        """
        cell, position = 0, 0
        for run in runs:
            if run.cell != cell or run.position < position or not run.n:
                raise SessionFileError("the saved cells do not follow each other; start a new session")
            cell, position = run.cell + run.n, run.position + run.n
        if cell != cells or following < position:
            raise SessionFileError("the saved cells do not add up; start a new session")
        found = cls(runs)
        found.next = following
        return found

    @classmethod
    def of_each(cls, each: npt.NDArray[np.int32], following: int) -> Positions:
        """From the rising positions of all cells [length] and of the token to come."""
        import numpy as np

        starts = np.flatnonzero(np.diff(each, prepend=-2) != 1).tolist()
        positions = cls([Run(a, int(each[a]), b - a) for a, b in zip(starts, [*starts, len(each)][1:], strict=True)])
        positions.next = following
        return positions

    def each(self) -> npt.NDArray[np.int32]:
        """Position of every cell [length]."""
        import numpy as np

        runs = [np.arange(run.position, run.position + run.n, dtype=np.int32) for run in self._runs]
        return np.concatenate([np.empty(0, np.int32), *runs])

    @property
    def length(self) -> int:
        """Cells."""
        return self._runs[-1].cell + self._runs[-1].n if self._runs else 0

    @property
    def gaps(self) -> bool:
        """Whether some cell's position is not its number, or the next token's would not be."""
        return self.next != self.length

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def copy(self, length: int | None = None) -> Positions:
        """A copy of the first ``length`` cells, or of all."""
        copied = Positions(self._runs)
        copied.next = self.next
        if length is not None:
            copied.truncate(length)
        return copied

    def of(self, cell: int) -> int:
        """Position of a cell; of the one after the last: ``next``."""
        if cell >= self.length:
            return self.next
        run = self._runs[bisect_right(self._runs, cell, key=lambda r: r.cell) - 1]
        return run.position + cell - run.cell

    def append(self, n: int) -> None:
        """``n`` more tokens were fed."""
        if not n:
            return
        last = self._runs[-1] if self._runs else None
        if last and last.position + last.n == self.next:
            self._runs[-1] = last._replace(n=last.n + n)
        else:
            self._runs.append(Run(self.length, self.next, n))
        self.next += n

    def truncate(self, length: int) -> None:
        """Forget the cells from ``length`` on; the next token gets the position of the first of them."""
        if length < self.length:
            self.next = self.of(length)
            self._set(self._between(0, length))

    def remove(self, spans: Sequence[tuple[int, int]]) -> None:
        """Forget cells in the middle; ``next`` stays. Raises ValueError for spans that overlap, fall or lie outside."""
        kept: list[Run] = []
        start = 0
        for a, b in [*spans, (self.length, self.length)]:
            if not start <= a <= b <= self.length:
                raise ValueError(f"spans {list(spans)} do not rise within {self.length} cells")
            kept += self._between(start, a)
            start = b
        self._set(kept)

    def insert(self, at: int, runs: Sequence[Run]) -> list[tuple[int, int, int]]:
        """Put cells before cell ``at``. If their positions do not lie between the neighbours', they are moved there, side by side,
        and later ones move up as far as that needs. Returns what moved: cells [start, end), as they are numbered now, by how much.
        """
        low, high, n = self.of(at - 1) if at else -1, self.of(at), sum(run.n for run in runs)
        later = self._between(at, self.length)
        ends = [low, *(position for run in runs for position in (run.position, run.position + run.n - 1)), high]
        if ends == sorted(ends) and ends[0] < ends[1] and ends[-2] < ends[-1]:
            self._set([*self._between(0, at), *runs, *later])
            return []
        first = low + 1
        up = max(0, first + n - high)
        moved = [(at + run.cell, at + run.cell + run.n, first + run.cell - run.position) for run in runs]
        moved.append((at + n, self.length + n, up))
        self._set([*self._between(0, at), Run(0, first, n), *(run._replace(position=run.position + up) for run in later)])
        self.next += up
        return moved

    def part(self, start: int, end: int) -> list[Run]:
        """Runs of cells [start, end), cells counted from ``start``."""
        return [run._replace(cell=run.cell - start) for run in self._between(start, end)]

    def renumbered(self) -> list[int]:
        """By how much each run's positions fall when gaps close; then they are closed."""
        shifts = [run.position - run.cell for run in self._runs]
        self._set([Run(0, 0, self.length)] if self._runs else [])
        self.next = self.length
        return shifts

    def _between(self, start: int, end: int) -> list[Run]:
        """Pieces of the runs within cells [start, end), as they are numbered now."""
        pieces = []
        for run in self._runs:
            a, b = max(run.cell, start), min(run.cell + run.n, end)
            if a < b:
                pieces.append(Run(a, run.position + a - run.cell, b - a))
        return pieces

    def _set(self, runs: Sequence[Run]) -> None:
        """Number the cells of runs anew and join neighbours."""
        joined: list[Run] = []
        cell = 0
        for run in runs:
            last = joined[-1] if joined else None
            if last and last.position + last.n == run.position:
                joined[-1] = last._replace(n=last.n + run.n)
            else:
                joined.append(Run(cell, run.position, run.n))
            cell += run.n
        self._runs = joined

    def _end(self) -> int:
        return self._runs[-1].position + self._runs[-1].n if self._runs else 0


# Where the tokens in a cache's cells stand, head by head: what of a cache does not depend on whose memory holds its keys and values.
#
# Keys are rotated before they are cached, so a cell carries no position, and a pruned cache may hold other tokens in every layer and head.
# Its leading cells then are "mixed": ``mixed`` holds the positions of their tokens, and they go or stay together.

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Move = tuple[int, int, npt.NDArray[np.int32]]
    """Cells [start, end), and by how many positions their keys are to turn: [L, G, end - start] or something that broadcasts to it."""


class PlacedCells:
    """One sequence's cells in ``layers`` layers of ``heads`` key-value heads; ``positions`` says which are in use and where they stand.

    ``mixed`` int32 [L, G, mixed cells]: the positions, rising, of the tokens in the leading cells that are not the same in all heads.
    ``positions`` counts these cells as the last ones before the position of the newest of them. Caches of engines are subclasses.
    """

    def __init__(self, layers: int, heads: int) -> None:
        self._layers, self._heads = layers, heads
        self.positions = Positions()
        self.mixed: npt.NDArray[np.int32] | None = None

    @property
    def length(self) -> int:
        """Cells in use."""
        return self.positions.length

    @property
    def n_mixed(self) -> int:
        """Leading cells that hold other tokens in every head."""
        return 0 if self.mixed is None else int(self.mixed.shape[2])

    def each_position(self) -> npt.NDArray[np.int32]:
        """Where the token of every cell stands, head by head [L, G, length]."""
        import numpy as np

        each = np.tile(self.positions.each(), (self._layers, self._heads, 1))
        if self.mixed is not None:
            each[:, :, : self.n_mixed] = self.mixed
        return each

    # ---- what must hold ----------------------------------------------------------------------------------------------

    def check_apart(self, cell: int) -> None:
        """Raise ContextError for a cell in the middle of the mixed ones: what comes before it differs from head to head."""
        if 0 < cell < self.n_mixed:
            raise ContextError(
                f"the first {self.n_mixed} cells were pruned head by head, so they go or stay together; start again from the first token"
            )

    def is_whole(self, start: int, end: int) -> bool:
        """Whether cells [start, end) are all of them. Raises ContextError for some of the mixed ones: only with all others they make
        sense.
        """
        whole = (start, end) == (0, self.length)
        if start < self.n_mixed and not whole:
            n = self.n_mixed
            raise ContextError(f"the first {n} cells were pruned head by head and can be saved only with all others; save the session")
        return whole

    # ---- what becomes of them ----------------------------------------------------------------------------------------

    def place_like(self, other: PlacedCells, length: int) -> None:
        """These are the first ``length`` cells of another cache."""
        self.positions, self.mixed = other.positions.copy(length), other.mixed
        if not length:
            self._forget_mixed()

    def cut(self, length: int) -> None:
        """Forget the cells from ``length`` on. Raises ContextError in the middle of mixed cells."""
        self.check_apart(length)
        self.positions.truncate(length)
        if not length:
            self._forget_mixed()

    def _forget_mixed(self) -> None:
        """The next token stands where the first one of any head stood."""
        if self.mixed is not None:
            self.positions.next, self.mixed = int(self.mixed.min()), None

    def take_out(self, spans: Sequence[tuple[int, int]]) -> None:
        """Forget cells [start, end) of each span (rising, apart). Raises ContextError for mixed cells, ValueError for no spans."""
        if self.n_mixed and any(start < self.n_mixed for start, _ in spans):
            raise ContextError(f"the first {self.n_mixed} cells were pruned head by head and cannot leave one by one; prune again")
        self.positions.remove(spans)

    def put_in(self, at: int, positions: Positions) -> list[Move]:
        """Cells come before cell ``at``. Returns how keys are to turn where positions had to move. Raises ContextError for mixed cells."""
        import numpy as np

        if at < self.n_mixed:
            raise ContextError(f"the first {self.n_mixed} cells were pruned head by head; cells come back only behind them")
        moved = self.positions.insert(at, list(positions))
        return [(first, last, np.array([shift], dtype=np.int32)) for first, last, shift in moved]

    def place_kept(self, other: PlacedCells, kept: npt.NDArray[np.intp]) -> None:
        """These are the cells ``kept`` [L, G, n] (rising) of another cache, or of this one before it was pruned."""
        import numpy as np

        each = np.take_along_axis(other.each_position(), kept, axis=2)
        # Whether the tokens differ is seen in their positions, except where gaps between those of mixed cells were closed.
        differ = (each != each[0, 0]).any(axis=(0, 1)) | (kept < other.n_mixed).any(axis=(0, 1))
        n_mixed, line = int(differ.nonzero()[0].max(initial=-1)) + 1, each[0, 0].copy()
        following = other.positions.next
        self.mixed = each[:, :, :n_mixed].copy() if n_mixed else None
        if self.mixed is not None:
            line[:n_mixed] = np.arange(n_mixed) + self.mixed[:, :, -1].max() + 1 - n_mixed
        self.positions = Positions.of_each(line, following)

    def close_gaps(self) -> list[Move]:
        """Cell i gets position i. Returns how keys are to turn."""
        import numpy as np

        moves = []
        if self.mixed is not None:
            ranks = np.arange(self.n_mixed, dtype=np.int32)
            moves.append((0, self.n_mixed, ranks - self.mixed))
            self.mixed = np.tile(ranks, (*self.mixed.shape[:2], 1))
        for run in self.positions:
            start = max(run.cell, self.n_mixed)
            if start < run.cell + run.n:
                moves.append((start, run.cell + run.n, np.array([run.cell - run.position], np.int32)))
        self.positions.renumbered()
        return moves


def unmoved_cells(kept: npt.NDArray[np.intp], length: int) -> int:
    """How many of the last of ``length`` cells every head keeps, with all that follow; ``kept`` [L, G, n]."""
    import numpy as np

    whole = (kept == np.arange(length - kept.shape[2], length)).all(axis=(0, 1))
    return int(whole[::-1].cumprod().sum())


def saved_mixed(data: memoryview, layers: int, heads: int, n: int, positions: Positions) -> npt.NDArray[np.int32] | None:
    """Positions [L, G, n] of mixed cells that were saved as bytes, None if there are none. Raises SessionFileError unless they rise up to
    where ``positions`` ends them.
    """
    import numpy as np

    if not n:
        return None
    mixed: npt.NDArray[np.int32] = np.frombuffer(data, np.int32).reshape(layers, heads, n).copy()
    if mixed.min() < 0 or (np.diff(mixed) <= 0).any() or mixed.max() != positions.of(n - 1):
        raise SessionFileError("the saved cells do not follow each other; start a new session")
    return mixed
