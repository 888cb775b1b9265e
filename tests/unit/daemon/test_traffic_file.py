"""The file of recorded traffic: private, whole lines whatever happens to it, older files beside it."""

import errno
import json
import os

import pytest
from edge_rt_distill.replay.trace import read_trace

from edge_rt.daemon.recording import trace as files
from edge_rt.daemon.recording.trace import TraceFile
from edge_rt.errors import OptionError

HEADER = b'{"edge_rt_trace":1,"begun":"2026-01-01T00:00:00.000Z"}\n'
LATER = b'{"edge_rt_trace":1,"begun":"2026-01-01T00:01:00.000Z"}\n'


def line(number):
    return json.dumps({"at": number, "request": {"messages": [{"role": "user", "content": "x" * 20}]}}).encode() + b"\n"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "traffic.jsonl"


def opened(path, header=HEADER, max_bytes=1 << 20, keep=2):
    return TraceFile(path, header, max_bytes, keep)


def write(file, *numbers):
    """The numbers of the lines before which a header was written."""
    begun = []
    for number in numbers:
        begun += [number] * file.prepare()
        file.append(line(number))
    return begun


def test_a_file_is_private_and_begins_with_its_header(path):
    file = opened(path)
    assert write(file, 1, 2) == [1]
    assert path.read_bytes() == HEADER + line(1) + line(2)
    assert path.stat().st_mode & 0o777 == 0o600
    file.close()


def test_a_run_goes_on_in_the_file_with_a_header_of_its_own(path):
    for header in (HEADER, LATER):
        file = opened(path, header)
        write(file, 1, 2)
        file.close()
    assert [one.at for one in read_trace(path).requests] == [1, 2, 61, 62]


@pytest.mark.parametrize("cut", range(1, len(HEADER + line(1)) + 1))
def test_a_torn_last_line_is_cut_off(path, cut, caplog):
    whole = HEADER + line(1)
    file = opened(path)
    write(file, 1)
    file.close()
    os.truncate(path, len(whole) - cut)
    file = opened(path, LATER)
    write(file, 2)
    file.close()
    kept = HEADER if len(whole) - cut >= len(HEADER) else b""
    assert path.read_bytes() == kept + LATER + line(2)
    torn = len(whole) - cut - len(kept)
    assert [record.message for record in caplog.records] == (
        [f"the last line of {path} was not whole: {torn} bytes were cut off"] if torn else []
    )


def test_a_torn_line_longer_than_what_is_read_at_once_is_cut_off(path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK", 7)
    path.write_bytes(HEADER + line(1) + line(2)[:-1])
    path.chmod(0o600)
    file = opened(path)
    write(file, 3)
    file.close()
    assert path.read_bytes() == HEADER + line(1) + HEADER + line(3)


def test_full_files_are_renamed_and_the_oldest_goes(path):
    file = opened(path, max_bytes=len(HEADER) + 2 * len(line(1)), keep=2)
    assert write(file, *range(9)) == [0, 2, 4, 6, 8]
    file.close()
    assert sorted(one.name for one in path.parent.iterdir()) == ["traffic.jsonl", "traffic.jsonl.1", "traffic.jsonl.2"]
    assert (path.parent / "traffic.jsonl.1").read_bytes() == HEADER + line(6) + line(7)
    assert (path.parent / "traffic.jsonl.2").read_bytes() == HEADER + line(4) + line(5)
    assert {one.stat().st_mode & 0o777 for one in path.parent.iterdir()} == {0o600}
    whole = b"".join((path.parent / name).read_bytes() for name in ("traffic.jsonl.2", "traffic.jsonl.1", "traffic.jsonl"))
    (path.parent / "all.jsonl").write_bytes(whole)
    assert [one.at for one in read_trace(path.parent / "all.jsonl").requests] == [4, 5, 6, 7, 8]


def test_a_file_that_was_full_at_the_start_is_renamed_first(path):
    for header in (HEADER, LATER):
        file = opened(path, header, max_bytes=len(HEADER) + 1)
        write(file, 1)
        file.close()
    assert (path.parent / "traffic.jsonl.1").read_bytes() == HEADER + line(1)
    assert path.read_bytes() == LATER + line(1)


@pytest.mark.parametrize("taken", ["removed", "renamed", "emptied", "replaced"])
def test_a_file_that_was_taken_away_is_begun_anew(path, taken):
    file = opened(path)
    write(file, 1)
    if taken == "removed":
        path.unlink()
    elif taken == "renamed":
        path.rename(path.parent / "old")
    elif taken == "emptied":
        os.truncate(path, 0)
    else:
        path.unlink()
        path.touch(0o600)
    assert write(file, 2, 3) == [2]
    assert path.read_bytes() == HEADER + line(2) + line(3)
    file.close()


def test_nothing_is_left_of_a_line_that_the_disk_did_not_take(path, monkeypatch):
    file = opened(path)
    write(file, 1)
    whole = os.write

    def full(descriptor, data):
        return whole(descriptor, data[:10]) if len(data) > 10 else _fail()

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            file.append(b"x" * 15)
    assert path.read_bytes() == HEADER + line(1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: whole(descriptor, data[:3]))
        file.append(line(2))
    assert path.read_bytes() == HEADER + line(1) + line(2)
    file.close()


def test_a_line_that_cannot_be_taken_back_is_cut_off_before_the_next(path, monkeypatch):
    file = opened(path)
    write(file, 1)
    with monkeypatch.context() as patched:
        whole = os.write
        patched.setattr(os, "write", lambda descriptor, data: whole(descriptor, data[:10]) if len(data) > 10 else _fail())
        patched.setattr(os, "ftruncate", lambda descriptor, size: _fail())
        with pytest.raises(OSError, match="No space"):
            file.append(b"x" * 15)
    assert path.read_bytes() == HEADER + line(1) + b"x" * 10
    assert write(file, 2) == [2]
    assert path.read_bytes() == HEADER + line(1) + HEADER + line(2)
    file.close()


def test_a_header_that_the_disk_did_not_take_is_written_later(path, monkeypatch):
    file = opened(path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: _fail())
        with pytest.raises(OSError, match="No space"):
            file.prepare()
    assert write(file, 1) == [1]
    assert path.read_bytes() == HEADER + line(1)
    file.close()


def _fail():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.write_text(HEADER.decode()) and path.chmod(0o640), "others may read .*; chmod 600 it"),
        (lambda path: path.write_text("notes\n") and path.chmod(0o600), "is something else than recorded traffic"),
        (lambda path: os.mkfifo(path, 0o600), "is no file"),
    ],
)
def test_files_that_are_not_written_to(path, spoil, message):
    spoil(path)
    before = path.stat().st_size
    with pytest.raises(OptionError, match=message):
        opened(path).prepare()
    with pytest.raises(OptionError, match=message):
        files.check_trace_file(path)
    assert path.stat().st_size == before


def test_what_can_be_written_is_told_without_a_trace(path):
    files.check_trace_file(path)
    assert not path.exists()
    with pytest.raises(OptionError, match=r"traffic cannot be recorded in .*: no such file or directory; name another file"):
        files.check_trace_file(path / "x")
    with pytest.raises(OptionError, match="is a directory"):
        files.check_trace_file(path.parent)


def test_two_do_not_write_to_the_same_file(path):
    file = opened(path)
    write(file, 1)
    with pytest.raises(OptionError, match="another daemon records traffic in"):
        opened(path).prepare()
    file.close()
    files.check_trace_file(path)
    assert path.read_bytes() == HEADER + line(1)
