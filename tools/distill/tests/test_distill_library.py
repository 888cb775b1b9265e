"""The teacher library's folder: several writers, kills, damage, queries, a full disk."""

from __future__ import annotations

import errno
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from edge_rt_distill import files
from edge_rt_distill.library.care import collect, verify
from edge_rt_distill.library.catalogue import Entry, Query, Record
from edge_rt_distill.library.shards import Merged, Part, digest_of, record_shards
from edge_rt_distill.library.store import Library

from edge_rt.hooks import DataError, OptionError, UserError

MODEL = "ab" * 32

WRITER = """
import random, sys
from edge_rt_distill.library.catalogue import Record
from edge_rt_distill.library.store import Library
from edge_rt_distill.library.care import collect
folder, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
library = Library.open(folder, create=True)
source = random.Random(name)
for i in range(count):
    own = library.put(source.randbytes(source.randrange(1, 200_000)))
    shared = library.put(b"the same in all" * (1 + i % 5))
    record = Record("snapshot", "cd" * 32, domain=name, seed=i, objects={"own": own, "shared": shared})
    library.add(record)
    print(record.id, flush=True)
    if i % 7 == 3:
        collect(library, grace=60.0)
"""


def start(folder: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), name, str(count)], stdout=subprocess.PIPE, text=True)


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library.open(tmp_path / "library", create=True)


def add(library: Library, content: bytes = b"content", **fields: object) -> Record:
    return library.add(Record(**{"kind": "snapshot", "model": MODEL, "objects": {"a.bin": library.put(content)}, **fields}))  # type: ignore[arg-type]


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [start(tmp_path / "library", name, 15) for name in "pqrs"]
    told = [line for writer in writers for line in (writer.communicate()[0] or "").split()]
    assert [writer.returncode for writer in writers] == [0] * 4
    library = Library.open(tmp_path / "library")
    assert {record.id for record in library.find()} == set(told)
    assert len(told) == 60
    assert verify(library) == []
    assert not list(library.incoming.iterdir())
    assert len({digest for record in library.find() for digest in record.objects.values()}) == 60 + 5  # equal content is stored once


def test_killed_writers_leave_a_sound_library(tmp_path: Path) -> None:
    """Everything that was reported as added is there, and nothing is damaged, whenever the kill came."""
    told: set[str] = set()
    waits = random.Random(4)
    for attempt in range(6):
        writer = start(tmp_path / "library", f"kill{attempt}", 10_000)
        assert writer.stdout is not None
        told.add(writer.stdout.readline().strip())
        time.sleep(waits.uniform(0.0, 0.1))
        writer.send_signal(signal.SIGKILL)
        told |= {line.strip() for line in writer.communicate()[0].splitlines() if len(line.strip()) == 32}
    library = Library.open(tmp_path / "library")
    assert verify(library) == []
    assert told <= {record.id for record in library.find()}
    collect(library, grace=-1.0)
    assert list(library.incoming.iterdir()) == []
    assert verify(library) == []


KILLED_AT = """
import os, signal, sys
from edge_rt_distill import files
from edge_rt_distill.library.catalogue import Record
from edge_rt_distill.library.store import Library
library = Library.open(sys.argv[1])
point, count = sys.argv[2], int(sys.argv[3])
module, name = (files, point) if hasattr(files, point) else (os, point)
real = getattr(module, name)
def deadly(*arguments, **named):
    global count
    count -= 1
    if count == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **named)
setattr(module, name, deadly)
library.add(Record("snapshot", "cd" * 32, objects={"x": library.put(b"new" * 1000)}))
"""


@pytest.mark.parametrize(("point", "count"), [("fsync", 1), ("replace", 1), ("sync_folder", 2), ("replace", 2), ("fchmod", 2)])
def test_a_kill_at_each_step(library: Library, point: str, count: int) -> None:
    before = add(library)
    done = subprocess.run([sys.executable, "-c", KILLED_AT, str(library.folder), point, str(count)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert verify(library) == []
    assert [record.id for record in library.find()] == [before.id]
    collect(library, grace=-1.0)
    assert library.read(before.objects["a.bin"]) == b"content"
    assert sum(len(list(folder.iterdir())) for folder in library.objects.iterdir()) == 1
    assert list(library.incoming.iterdir()) == []


def test_damage_is_found_and_mended(library: Library) -> None:
    good, bad, gone, torn = (add(library, bytes([i]) * 1000, seed=i) for i in range(4))
    broken = library.path(bad.objects["a.bin"])
    broken.chmod(0o644)
    broken.write_bytes(b"x" + broken.read_bytes()[1:])
    library.path(gone.objects["a.bin"]).unlink()
    name = library.records / "snapshot" / torn.entry.file_name
    name.chmod(0o644)
    name.write_bytes(name.read_bytes()[:-20])
    (library.records / "snapshot" / "stray.json").write_text("{}")
    steps: list[tuple[int, int]] = []
    found = {(Path(damage.path).name, damage.reason.split(";")[0][:30]) for damage in verify(library, lambda *step: steps.append(step))}
    assert len(found) == 4
    assert {name for name, _ in found} == {broken.name, gone.entry.file_name, torn.entry.file_name, "stray.json"}
    assert steps[-1] == (3, 3)
    with pytest.raises(DataError, match="damaged"):
        library.read(bad.objects["a.bin"])
    with pytest.raises(DataError, match="gone"):
        library.read(gone.objects["a.bin"])
    with pytest.raises(DataError, match="no record of a teacher library"):
        list(library.find())
    assert library.read(good.objects["a.bin"]) == bytes(1000)
    with pytest.raises(DataError):  # what damaged records refer to is not known, so nothing is thrown away
        collect(library, grace=-1.0)
    library.put(bytes([1]) * 1000)
    assert library.read(bad.objects["a.bin"]) == bytes([1]) * 1000


def test_changed_record_is_not_believed(library: Library) -> None:
    record = add(library, score=0.5)
    path = library.records / "snapshot" / record.entry.file_name
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"seed":null', b'"seed":12345'))
    assert "damaged" in verify(library)[0].reason


def test_ten_thousand_records_are_asked_by_name(library: Library) -> None:
    """Only what was asked for can be read: the other files are empty."""
    folder = library.records / "evaluation"
    folder.mkdir(parents=True)
    expected = [i for i in range(10_000) if i % 50 == 7 and i % 8 == 7 and 3 <= 1 + i % 12 <= 9 and 0.2 <= i / 10_000 <= 0.9]
    slots = [Record("evaluation", MODEL, f"领域 {i}/x").entry.slot for i in range(8)]
    for i in range(10_000):
        date = f"2026-{1 + i % 12:02}-{1 + i % 28:02}T00:00:00Z"
        if i in expected:
            record = Record("evaluation", f"{i % 50:02}" * 32, f"领域 {i % 8}/x", date, i / 10_000, seed=i)
            (folder / record.entry.file_name).write_bytes(record.to_bytes())
        else:
            name = re.sub("[-:]", "", date)
            entry = Entry("evaluation", name, f"{i % 50:02}" * 8, i / 10_000, f"{i:032x}", slots[i % 8])
            (folder / entry.file_name).touch()
    wanted = Query("evaluation", model="07", domain="领域 7/x", since="2026-03-01", until="2026-09-30", low=0.2, high=0.9)
    found = list(library.find(wanted))
    assert sorted(record.seed or 0 for record in found) == expected
    assert len(expected) > 3
    assert library.reads == len(expected)
    assert [record.date for record in found] == sorted((record.date for record in found), reverse=True)
    assert next(library.find(wanted)) == found[0]
    assert library.reads == len(expected) + 1
    assert len(library.entries()) == 10_000
    assert library.reads == len(expected) + 1
    assert library.get(found[0].id[:12]) == found[0]


def test_queries(library: Library) -> None:
    long = "金融" * 40
    one = add(library, domain=long, date="2026-05-01T23:59:59Z", score=0.1)
    two = add(library, domain="a_b%!~", date="2026-05-02T00:00:00Z", score=1e-7, model="ab" * 30 + "cdcd")
    three = add(library, kind="errors", date="2026-05-03T00:00:00Z")
    ids = lambda **query: [record.id for record in library.find(Query(**query))]  # noqa: E731
    assert ids() == [three.id, two.id, one.id]
    assert ids(domain=long) == [one.id]
    assert ids(domain="a_b%!~") == [two.id]
    assert ids(domain="") == [three.id]
    assert ids(until="2026-05-01") == [one.id]
    assert ids(since="2026-05-02T00:00:00Z", until="2026-05-02T00:00:00Z") == [two.id]
    assert ids(low=0.0) == [two.id, one.id]
    assert ids(high=0.01) == [two.id]
    assert ids(model="ab" * 30) == [three.id, two.id, one.id]
    assert ids(model="ab" * 30 + "cd") == [two.id]  # longer than what names tell
    assert ids(model="cd") == []
    for wrong in ({"kind": "nothing"}, {"since": "yesterday"}, {"low": float("nan")}):
        with pytest.raises(OptionError):
            ids(**wrong)
    for start in ("", "abc", "zzzz"):
        with pytest.raises(DataError):
            library.get(start)
    library.remove(two)
    library.remove(two)
    assert ids() == [three.id, one.id]


def test_what_cannot_be_a_record() -> None:
    bad_objects = ({"objects": {"../x": "0" * 64}}, {"objects": {"x": "12"}})
    for wrong in ({"kind": "x"}, {"model": "../.."}, {"score": float("nan")}, {"date": "now"}, {"domain": "\ud800"}, *bad_objects):
        with pytest.raises(DataError):
            Record(**{"kind": "snapshot", "model": MODEL, **wrong})  # type: ignore[arg-type]
    with pytest.raises(DataError, match="JSON"):
        _ = Record("snapshot", MODEL, arguments={"x": float("inf")}).id
    for name in ("x.json", "a_b_c_d_e.json", "20260501T000000Z_ab_0.50_12_x.json"):
        assert Entry.parse("snapshot", name) is None


def test_collecting_spares_what_is_used_or_young(library: Library) -> None:
    kept = add(library, b"kept")
    young, old = library.put(b"young"), library.put(b"old")
    os.utime(library.path(old), (1, 1))
    os.utime(library.path(kept.objects["a.bin"]), (1, 1))
    (library.incoming / "left").write_bytes(b"123")
    os.utime(library.incoming / "left", (1, 1))
    assert collect(library) == (1, 1, 0, 6)
    assert not library.path(old).exists()
    assert library.path(young).exists()
    os.utime(library.path(young), (1, 1))
    library.put(b"young")  # found again, and so young again
    assert collect(library).objects == 0
    assert library.read(kept.objects["a.bin"]) == b"kept"


def test_collecting_beside_writers_takes_nothing_of_theirs(library: Library) -> None:
    """Old objects are found again by writers while the collector looks at just these: whoever comes first, no record lacks its object."""
    contents = [bytes([i]) * 50 for i in range(40)]
    for content in contents:
        os.utime(library.path(library.put(content)), (1, 1))
    problems: list[BaseException] = []

    def write() -> None:
        try:
            for i, content in enumerate(contents):
                add(library, content, seed=i)
        except BaseException as error:  # a thread's exception would be lost
            problems.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        collect(library, grace=60.0)
    thread.join()
    assert problems == []
    assert verify(library) == []
    assert len(list(library.find())) == 40


def test_a_record_needs_its_objects(library: Library) -> None:
    with pytest.raises(DataError, match="put it there before"):
        library.add(Record("snapshot", MODEL, objects={"x": "0" * 64}))
    assert library.entries() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_leaves_nothing_half(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    before = add(library)

    def full(dir: Path, prefix: str = "tmp") -> tuple[int, str]:
        path = Path(dir) / f"{prefix}full"
        path.write_bytes(b"")
        return os.open("/dev/full", os.O_WRONLY), str(path)

    with monkeypatch.context() as patch:
        patch.setattr(files.tempfile, "mkstemp", full)
        with pytest.raises(UserError, match=r"the disk is full; make room, or choose another folder") as caught:
            library.put(b"x" * 5_000_000)
        assert not isinstance(caught.value, DataError)
        with pytest.raises(UserError, match="the disk is full"):
            library.add(Record("snapshot", MODEL, seed=9, objects=before.objects))
    assert list(library.incoming.iterdir()) == []
    assert [record.id for record in library.find()] == [before.id]
    assert verify(library) == []

    def no_space(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, no_space)
            with pytest.raises(UserError, match="the disk is full"):
                library.put(b"y")
        assert list(library.incoming.iterdir()) == []
    library.put(b"y")
    assert verify(library) == []


def test_opening(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no teacher library"):
        Library.open(tmp_path / "x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(UserError, match="not empty"):
        Library.open(tmp_path / "other", create=True)
    Library.open(tmp_path / "deep" / "er", create=True)
    Library.open(tmp_path / "deep" / "er", create=True)
    for content, problem in (('{"format": 99}', "version"), ("[]", "version"), ("{", "damaged")):
        (tmp_path / "deep" / "er" / "library.json").write_text(content)
        with pytest.raises(UserError, match=problem):
            Library.open(tmp_path / "deep" / "er")
    with pytest.raises(UserError, match="cannot write"):
        Library.open(tmp_path / "other" / "file" / "x", create=True)


def test_a_recording_goes_on_where_it_was(library: Library) -> None:
    made: list[int] = []
    steps: list[tuple[int, int]] = []

    class Killed(BaseException):
        pass

    def work(indices: range, told: object) -> Part:
        if indices.start == 6 and len(made) < 3:
            made.append(-1)
            raise Killed
        made.append(indices.start)
        return Part({f"part-{indices.start}": library.put(repr(list(indices)).encode())}, {"count": len(indices)})

    def merge(parts: list[Part]) -> Merged:
        return Merged({k: v for part in parts for k, v in part.objects.items()}, {"count": sum(part.facts["count"] for part in parts)}, 0.5)

    def go(date: str) -> Record:
        draft = Record("trajectories", MODEL, date=date, arguments={"samples": digest_of(range(8))})
        return record_shards(library, draft, 8, 3, work, merge, lambda *step: steps.append(step))  # type: ignore[arg-type]

    with pytest.raises(Killed):
        go("2026-01-01T00:00:00Z")
    assert library.entries() == []
    assert collect(library, grace=-1.0).objects == 0  # what an unfinished recording has is not collected
    record = go("2026-02-02T00:00:00Z")
    assert made == [0, 3, -1, 6]
    assert record.date == "2026-01-01T00:00:00Z"
    assert record.facts == {"count": 8}
    assert record.score == 0.5
    assert len(record.objects) == 3
    assert steps[-3:] == [(3, 8), (6, 8), (8, 8)]
    assert list(library.unfinished.iterdir()) == []
    assert verify(library) == []
    assert list(library.find()) == [record]
    steps.clear()
    assert go("2026-03-03T00:00:00Z") == record  # made once
    assert made == [0, 3, -1, 6]
    assert steps == [(8, 8)]
    library.path(record.objects["part-3"]).unlink()
    assert go("2026-03-03T00:00:00Z").date == "2026-03-03T00:00:00Z"  # made again, as it is not whole
    assert made == [0, 3, -1, 6, 0, 3, 6]


def test_a_damaged_or_abandoned_part_is_made_again(library: Library) -> None:
    calls: list[int] = []

    def work(indices: range, told: object) -> Part:
        calls.append(indices.start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return Part({"x": library.put(b"%d" % indices.start)}, {})

    def go(domain: str) -> Record:
        return record_shards(library, Record("activations", MODEL, domain), 2, 1, work, lambda parts: Merged(parts[0].objects, {}))

    with pytest.raises(KeyboardInterrupt):
        go("a")
    part = next(library.unfinished.glob("*/00000000.json"))
    part.chmod(0o644)
    part.write_text("{")
    go("a")
    assert calls == [0, 1, 0, 1]
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        go("b")
    for path in (*library.unfinished.glob("*/*"), *library.unfinished.glob("*")):
        os.utime(path, (1, 1))
    assert collect(library).unfinished == 1
    assert not any(library.unfinished.iterdir())
    with pytest.raises(DataError, match="no samples"):
        record_shards(library, Record("activations", MODEL), 0, 1, work, lambda parts: Merged({}, {}))


def test_names_are_shown_whole(library: Library) -> None:
    record = add(library, domain="<script>alert(1)</script>")
    name = record.entry.file_name
    assert re.fullmatch(r"[\w.%!~-]+", name)
    assert len(name.encode()) < 255
    assert record.entry.domain == "<script>alert(1)</script>"


def test_two_processes_at_the_same_recording(library: Library) -> None:
    """One finishes, and removes the parts, while the other is in the middle."""

    def go(between: object) -> Record:
        def work(indices: range, told: object) -> Part:
            if indices.start == 1 and callable(between):
                between()
            return Part({f"part-{indices.start}": library.put(b"%d" % indices.start)}, {})

        def merge(parts: object) -> Merged:
            return Merged({f"part-{i}": library.put(b"%d" % i) for i in range(3)}, {})

        return record_shards(library, Record("activations", MODEL), 3, 1, work, merge)

    other: list[Record] = []
    one = go(lambda: other.append(go(None)))
    assert other == [one]
    assert list(library.find()) == [one]
    assert list(library.unfinished.iterdir()) == []
    assert verify(library) == []
    folder = library.unfinished / "x"
    files.remove_folder(folder)  # another process has removed it
    (folder / "y").mkdir(parents=True)
    with pytest.raises(OSError, match=r"directory|permitted"):  # what is no race is an error
        files.remove_folder(folder)
