"""Where the tokens in a cache's cells stand, head by head: what of a cache does not depend on whose memory holds its keys and values.

Keys are rotated before they are cached, so a cell carries no position, and a pruned cache may hold other tokens in every layer and head.
Its leading cells then are "mixed": ``mixed`` holds the positions of their tokens, and they go or stay together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edge_rt.core.context.positions import Positions
from edge_rt.errors import ContextError, SessionFileError

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


def unmoved(kept: npt.NDArray[np.intp], length: int) -> int:
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
