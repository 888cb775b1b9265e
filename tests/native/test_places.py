"""Places for caches: side by side, zeroed, the first free one first, and gone when nobody uses them."""

from __future__ import annotations

import itertools
import random

import pytest

from edge_rt.errors import OutOfMemory
from edge_rt.native import ggml, memory
from edge_rt.native.memory import PAGE

SIZE = 3 * PAGE


def test_pieces_lie_side_by_side_and_the_first_free_one_is_taken() -> None:
    taken = [memory.take(SIZE) for _ in range(5)]
    assert [b - a for a, b in itertools.pairwise(taken)] == [SIZE] * 4
    memory.give(taken[3], SIZE)
    memory.give(taken[1], SIZE)
    assert memory.take(SIZE) == taken[1]
    for one in (*taken[:3], taken[4]):
        memory.give(one, SIZE)
    assert SIZE not in memory._ranges, "the range goes with its last piece"


@pytest.mark.parametrize("seed", range(4))
def test_no_piece_is_taken_twice_and_each_is_zeroed(seed: int) -> None:
    """More than one range, in any order; what was written into one is in no other, nor in the next that lies there."""
    chance, held = random.Random(seed), dict[int, int]()
    for number in range(200):
        if held and chance.random() < 0.45:
            address = chance.choice(sorted(held))
            assert set(ggml.memory_at(address, SIZE)) == {held.pop(address)}
            memory.give(address, SIZE)
        else:
            address = memory.take(SIZE)
            assert address not in held
            piece = ggml.memory_at(address, SIZE)
            assert set(piece) == {0}
            held[address] = number % 255 + 1
            piece[:] = bytes([held[address]]) * SIZE
    for address in held:
        memory.give(address, SIZE)
    assert SIZE not in memory._ranges


def test_what_cannot_be_had_is_an_error_and_leaves_the_place_free(monkeypatch: pytest.MonkeyPatch) -> None:
    first = memory.take(SIZE)

    def none(*_: object) -> int:
        raise OutOfMemory("no memory")

    with monkeypatch.context() as patched:
        patched.setattr(memory, "map_anonymous", none)
        with pytest.raises(OutOfMemory):
            memory.take(SIZE)
    second = memory.take(SIZE)
    assert second == first + SIZE
    memory.give(first, SIZE)
    memory.give(second, SIZE)
    with pytest.raises(OutOfMemory, match="cannot get"):
        memory.take(1 << 46)


def test_where_addresses_are_short_each_piece_has_a_range_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = memory.reserve

    def short(size: int, address: int | None = None) -> int:
        if size > SIZE:
            raise OutOfMemory("no such range")
        return reserve(size, address)

    monkeypatch.setattr(memory, "reserve", short)
    taken = [memory.take(SIZE) for _ in range(3)]
    assert [one.places for one in memory._ranges[SIZE]] == [1, 1, 1]
    for address in taken:
        ggml.memory_at(address, SIZE)[:] = b"x" * SIZE
        memory.give(address, SIZE)
    assert SIZE not in memory._ranges
