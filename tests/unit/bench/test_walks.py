"""The benches that compare checkouts: what is made of traces and of samples. What they trace and measure is proven by running them."""

from __future__ import annotations

from typing import Any

import pytest

from bench.before_after import NEW, OLD, Quantity, compared, table
from bench.walks import Place, Walk, last_send, outer, places
from bench.walks import table as table_of_walks


def line(t: int, file: str, function: str, *, importing: bool = False) -> dict[str, Any]:
    return {"walk": 1, "t": t, "file": file, "function": function, "importing": importing}


def test_places_come_in_the_order_of_first_calls_over_all_processes() -> None:
    daemon = [line(1, "a.py", "first"), line(5, "a.py", "last"), line(4, "c.py", "X.f")]
    worker = [
        {"walk": 1, "t": 3, "sent": True},
        line(2, "b.py", "g.<locals>.<listcomp>"),
        line(3, "b.py", "g"),
        line(6, "d.py", "h", importing=True),
    ]
    assert places([("daemon", daemon), ("worker", worker)]) == [
        Place("daemon", "a.py", ["first", "last"]), Place("worker", "b.py", ["g"]), Place("daemon", "c.py", ["X.f"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("A.f", "A.f"),
        ("A.f.<locals>.inner", "A.f.<locals>.inner"),
        ("A.f.<locals>.<genexpr>", "A.f"),
        ("A.f.<locals>.<lambda>.<locals>.<listcomp>", "A.f"),
        ("A.f.<locals>.inner.<locals>.<lambda>", "A.f.<locals>.inner"),
        ("A.<lambda>", "A"),
    ],
)
def test_what_has_no_name_belongs_to_the_function_around_it(name: str, function: str) -> None:
    assert outer(name) == function


def test_a_noisy_ratio_decides_nothing() -> None:
    time = Quantity("request", "ms")
    noisy = {OLD: {time: [10.0] * 4}, NEW: {time: [9.0, 10.1, 10.5, 12.0]}}
    (row,) = compared(noisy)
    assert (row.worse, row.unsure) == (True, True)
    assert "perhaps worse" in table([row])
    (calm,) = compared({OLD: noisy[OLD], NEW: {time: [10.5, 10.5, 10.5, 10.5]}})
    assert (calm.worse, calm.unsure) == (True, False)
    (calm,) = compared({OLD: noisy[OLD], NEW: {time: [10.0, 10.0, 10.0, 10.0]}})
    assert (calm.worse, calm.unsure) == (False, False)


def test_a_walk_ends_with_the_write_that_brought_the_event() -> None:
    lines = [{"walk": 1, "t": t, "sent": True} for t in (3, 7, 12)]
    assert last_send(lines, 10) == 7
    with pytest.raises(RuntimeError, match="nothing was seen that sent it"):
        last_send(lines, 2)


def test_files_of_another_walk_do_not_count_and_a_file_of_two_processes_counts_once() -> None:
    walk = Walk("request", 1, [Place("daemon", "a.py", ["f"]), Place("worker", "a.py", ["f", "g"]), Place("worker", "x/b.py", ["h"])], 0)
    assert (walk.files, walk.functions, walk.counted, walk.folders) == (2, 3, 2, {".": 1, "x": 1})
    assert " no " in table_of_walks([walk])
    known = Walk("request", 1, walk.places, 0, known=frozenset({"x/b.py"}))
    assert known.counted == 1
    assert " yes " in table_of_walks([known])


def test_a_quantity_is_worse_by_its_own_direction() -> None:
    rate, time = Quantity("decode", "tokens/s", more=True), Quantity("request", "ms")
    found = {OLD: {rate: [100.0, 100.0, 50.0], time: [10.0, 10.0, 20.0]}, NEW: {rate: [97.0, 97.0, 48.5], time: [9.7, 9.7, 19.4]}}
    slower = {row.name: row for row in compared(found)}
    assert slower["decode"].worse
    assert slower["decode"].ratio == pytest.approx(0.97)
    assert slower["decode"].spread == pytest.approx(0)
    assert not slower["request"].worse
    back = {row.name: row.worse for row in compared({OLD: found[NEW], NEW: found[OLD]})}
    assert back == {"decode": False, "request": True}
    assert table(list(slower.values())).count("worse by more than 2%") == 1
    with pytest.raises(ValueError, match="argument 2"):
        compared({OLD: {time: [1.0, 2.0]}, NEW: {time: [1.0]}})
