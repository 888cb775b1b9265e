"""The folder for parked sessions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_rt.daemon.models import ParkingFolder


def test_it_is_ones_own_and_goes_with_its_daemon(tmp_path: Path) -> None:
    one, other = ParkingFolder(tmp_path / "state"), ParkingFolder(tmp_path / "state")
    first, second = one.folder(), other.folder()
    assert first is not None
    assert second is not None
    assert first != second
    assert first.stat().st_mode & 0o777 == 0o700
    assert one.folder() == first
    (first / "a.session").write_bytes(b"x")
    one.close()
    assert list((tmp_path / "state").iterdir()) == [second]
    other.close()


def test_what_a_daemon_left_that_died_is_removed(tmp_path: Path) -> None:
    dead = ParkingFolder(tmp_path)
    left = dead.folder()
    assert left is not None
    (left / "m").mkdir()
    (left / "m" / "a.session").write_bytes(b"x")
    os.close(dead._lock)  # as when a process ends
    (tmp_path / "1000").mkdir()
    (tmp_path / "1000" / "mine.session").write_bytes(b"saved")
    found = ParkingFolder(tmp_path).folder()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "1000", found])
    assert (tmp_path / "1000" / "mine.session").read_bytes() == b"saved"


def test_where_there_is_no_place_sessions_are_not_parked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert ParkingFolder(tmp_path / "file" / "state").folder() is None
    assert "sessions cannot be parked" in caplog.text
    ParkingFolder(tmp_path).close()
