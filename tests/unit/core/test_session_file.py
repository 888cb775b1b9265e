"""Sessions that are written to a slow disk, or read from it: the daemon sees that it gets on, and takes it for no worker that hangs."""

import itertools
import os

import pytest
from worker_host import Host

from edge_rt.core.context import session_file
from edge_rt.core.context.history import Condensed, SequenceState
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing.null_device import NullEngine, NullPlugin

CELL = NullEngine.cell_bytes


@pytest.fixture
def host(random_model, monkeypatch):
    registry = Registry.load(entry_points=False, plugins={"null": NullPlugin()})
    monkeypatch.setattr(Registry, "load", lambda: registry)
    return lambda *given, **more: Host(random_model(), *given, engine="null", device="null", **more)


def test_a_slow_disk_is_seen_to_get_on(host, tmp_path, monkeypatch):
    monkeypatch.setattr(session_file, "PIECE", 64)
    one = host(allowance=300 * CELL, parked=tmp_path / "p")
    one.do("open_session", session="x")
    one.until(one.ask("x" * 100, "x", max_tokens=50))
    size = len(one.engine.export_sequence(one.worker._sessions.live["x"].sequence))
    assert size > 3 * 64

    def beats(op, **fields):
        before = one.worker.beats
        one.ok(op, **fields)
        return one.worker.beats - before

    whole = size // 64
    assert beats("park_session", session="x") >= 2 * whole, "summed, and written"
    assert beats("clone_session", session="x", new="y") >= whole, "copied"
    assert beats("save_session", session="x", path=str(tmp_path / "saved")) >= whole, "copied"
    assert beats("restore_session", session="z", path=str(tmp_path / "saved")) >= 2 * whole, "read, and summed"
    assert (tmp_path / "saved").read_bytes() == next((tmp_path / "p").iterdir()).read_bytes()
    one.do("park_session", session="z")
    before = one.worker.beats
    again = one.ask("x" * 100 + "?", "x", max_tokens=1)
    assert one.worker.beats - before >= 2 * whole, "it comes back"
    one.until(again)
    assert one.used(again)["reused_tokens"] >= 101
    assert beats("save_session", session="x", path=str(tmp_path / "saved")) >= whole, "from memory, fewer cells than before"
    assert beats("cool") >= whole


def test_what_is_to_last_goes_to_the_disk_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(session_file, "PIECE", 10)
    monkeypatch.setattr(session_file, "SYNC_EVERY", 40)
    done = []
    monkeypatch.setattr(session_file.os, "fsync", lambda number: done.append(os.fstat(number).st_size))
    saved = session_file.SavedSession("e", "m", SequenceState([1, 2, 3], [], Condensed(0, 0)), bytes(range(100)))
    path = tmp_path / "a.session"
    session_file.save(path, saved, durable=False)
    assert done == []
    session_file.save(path, saved)
    assert [later - earlier for earlier, later in itertools.pairwise(done)] == [40, 20]
    assert done[-1] == path.stat().st_size
    read = session_file.load(path, engine="e", model="m")
    assert (bytes(read.cells), read.history.tokens) == (bytes(range(100)), [1, 2, 3])
