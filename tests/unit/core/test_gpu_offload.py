"""How many blocks go to an accelerator: as many as fit, and never more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edge_rt.core.weights.gpu_offload import Placement, Sizes, place_units

BYTES = st.integers(0, 1 << 40)
SIZES = st.builds(Sizes, st.lists(BYTES, min_size=1, max_size=80), BYTES, BYTES, BYTES)


def taken(sizes: Sizes, first: int) -> int:
    """What blocks from ``first`` on and the head take, added up apart from ``place``."""
    blocks = sizes.blocks[first:]
    return sum(blocks) + len(blocks) * sizes.cache + sizes.head + sizes.compute


@given(SIZES, BYTES)
def test_as_many_blocks_as_fit_and_no_more(sizes: Sizes, memory: int) -> None:
    placement = place_units(sizes, memory)
    if placement is None:
        assert sizes.head + sizes.compute > memory
        return
    assert placement.size == taken(sizes, placement.first) <= memory
    assert placement.first == 0 or taken(sizes, placement.first - 1) > memory


@given(SIZES, BYTES, BYTES)
def test_more_memory_never_takes_a_block_away(sizes: Sizes, memory: int, more: int) -> None:
    less, large = place_units(sizes, memory), place_units(sizes, memory + more)
    assert less is None or (large is not None and large.first <= less.first)


@given(SIZES, st.data())
def test_what_a_placement_takes_is_just_enough_for_it(sizes: Sizes, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(sizes.blocks)))
    placement = place_units(sizes, taken(sizes, first))
    assert placement is not None
    assert placement.first <= first  # fewer only where a block takes nothing
    assert placement.size == taken(sizes, first)


def test_the_last_blocks_go_not_the_smallest() -> None:
    sizes = Sizes([1, 1, 100, 10], 5, 2, 3)
    assert place_units(sizes, 7) is None
    assert place_units(sizes, 8) == Placement(4, 8)
    assert place_units(sizes, 20) == Placement(3, 20)
    assert place_units(sizes, 121) == Placement(3, 20), "the block before does not fit, so those before it stay, too"
    assert place_units(sizes, 128) == Placement(0, 128)
