"""Where the tokens in a sequence's cells stand in the text: cells move together when some are removed, positions do not."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.errors import SessionFileError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


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
