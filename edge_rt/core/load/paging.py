"""How weights come into memory for one open model: read ahead once, streamed under a budget, or paged expert by expert."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edge_rt.core.graph.hyper import Hyper
from edge_rt.core.load.prefetch import AHEAD, Prefetcher
from edge_rt.core.load.residency import ExpertResidency, Pager
from edge_rt.errors import OptionError
from edge_rt.native import ggml, memory

if TYPE_CHECKING:
    from edge_rt.core.load.weights import WeightStore


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
        hyper: Hyper,
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
        self._hyper = hyper
        self._pager: Pager | None = None
        self._prefetcher: Prefetcher | None = None
        self._experts: ExpertResidency | None = None
        # A tied head's bytes are the embedding's rows too: what is held for one step's head is still there for the next step's rows.
        tied = weights.get("output.weight") is None
        self._needs = {"embedding": ("head", True), "head": ("head", False)} if tied else {}
        dense = sum(unit.size for unit in weights.units if not unit.sparse)
        if budget is not None and budget - beside < weights.size:
            sparse_budget = max(0, budget - beside - dense) if hyper.n_expert else 0
            pager = Pager(weights.units, budget - sparse_budget, beside)
            self._pager = pager
            if hyper.n_expert:
                self._experts = ExpertResidency(self._expert_spans(), hyper.n_expert, sparse_budget)
        else:
            self.warm()

    @property
    def streams(self) -> bool:
        """Whether units must be paged between graphs."""
        return self._pager is not None and self._pager.streams

    @property
    def pager(self) -> Pager | None:
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
            for layer in range(self._hyper.n_layer)
            for kind in ("gate", "up", "down")
            if self._weights.get(name := f"blk.{layer}.ffn_{kind}_exps.weight")
        }
