"""Steps of a run: each in a folder of its own, done once, resumed where it was interrupted, done again when what it was made of changed.

A step works in ``NAME.work`` and is renamed to ``NAME`` when it is whole, with ``done.json``: its key, the checksums of its files, its
summary. The key is a hash of the step's settings and the keys of the steps it needs: equal keys, equal results.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edge_rt.hooks import DataError, UserError
from edge_rt_distill import files
from edge_rt_distill.progress import PartTold, quiet

_DONE, _KEY, _LOG, _LOCK = "done.json", "key", "log.jsonl", "lock"


Told = Callable[[str, str, int, int], None]
"""Told that a step does something, of which so many parts of so many are done (0 of 0: not known), on the run's own thread."""


class Place(NamedTuple):
    """Where a step works. ``folder`` keeps what it wrote when it was interrupted. ``told(what, done, total)`` shows how far it is."""

    folder: Path
    need: Callable[[str], Path]
    told: PartTold
    log: Callable[[Mapping[str, Any]], None]


class Step(NamedTuple):
    """A part of a run. ``settings``: all that its result depends on beside what it needs, as plain data.

    ``run`` writes files into its place and returns a summary (plain data).
    """

    name: str
    run: Callable[[Place], Mapping[str, Any]]
    settings: Any = None
    needs: tuple[str, ...] = ()


class Done(NamedTuple):
    """A step that is done. ``seconds``: what it took, of all tries together. ``again``: it was done before this run."""

    name: str
    key: str
    files: Mapping[str, str]
    summary: Mapping[str, Any]
    seconds: float
    again: bool


def run_steps(folder: Path, steps: Sequence[Step], told: Told = quiet) -> list[Done]:
    """Do what is not done yet, in order.

    Raises what a step raises, when everything done so far stays; UserError when another run works in the folder or the disk is full.
    """
    found: dict[str, Done] = {}
    known = keys(steps)
    with _alone(folder):
        for step in steps:
            key = known[step.name]
            _promote(folder / f"{step.name}.work", folder / step.name)
            before = read_done(folder / step.name)
            if before is not None and before.key == key and _whole(folder / step.name, before):
                found[step.name] = before
                told(step.name, "done before", 1, 1)
                continue
            found[step.name] = _run(folder, step, key, told)
    return list(found.values())


def read_done(folder: Path) -> Done | None:
    """What is known of a step's folder; None when it is not there or not whole."""
    try:
        data = json.loads((folder / _DONE).read_text(encoding="utf-8"))
        return Done(data["name"], data["key"], data["files"], data["summary"], data["seconds"], True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keys(steps: Sequence[Step]) -> dict[str, str]:
    """By step a hash of all that its result depends on."""
    found: dict[str, str] = {}
    for step in steps:
        parts = [step.name, step.settings, {name: found[name] for name in step.needs}]
        found[step.name] = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    return found


def _whole(folder: Path, done: Done) -> bool:
    """Whether a step's files are all there with their sizes' worth of content; a damaged one is made again."""
    return all((folder / name).is_file() and files.sha256(folder / name) == known for name, known in done.files.items())


def _run(folder: Path, step: Step, key: str, told: Told) -> Done:
    work, final = folder / f"{step.name}.work", folder / step.name
    spent = _prepare(work, key)
    began = time.monotonic()

    def need(name: str) -> Path:
        assert name in step.needs, f"the step {step.name} does not say that it needs {name}"
        return folder / name

    def log(record: Mapping[str, Any]) -> None:
        append(folder / _LOG, {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "step": step.name, **record})

    told(step.name, "begins", 0, 0)
    try:
        log({"event": "begin", "key": key})
        summary = step.run(Place(work, need, lambda what, done, total: told(step.name, what, done, total), log))
        seconds = spent + time.monotonic() - began
        done = _finish(step.name, key, work, final, summary, seconds)
        log({"event": "end", "seconds": round(seconds, 3), "summary": summary})
    except OSError as error:
        raise _explained(error, step.name, folder) from error
    finally:
        _note_time(work, spent + time.monotonic() - began)
    return done


def _prepare(work: Path, key: str) -> float:
    """Make the place of work; what is there stays if it is of the same key. Returns the seconds that earlier tries took."""
    known = work / _KEY
    if work.exists() and (not known.is_file() or known.read_text(encoding="utf-8").split()[0] != key):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    for unfinished in work.rglob(f"*{files.PART}"):
        unfinished.unlink()
    if known.is_file():
        return float(known.read_text(encoding="utf-8").split()[1])
    files.write_file(known, f"{key} 0")
    return 0.0


def _note_time(work: Path, seconds: float) -> None:
    known = work / _KEY
    if known.is_file():  # the step did not come to its end
        with contextlib.suppress(UserError):  # a full disk: the time is told, and nothing depends on it
            files.write_file(known, f"{known.read_text(encoding='utf-8').split()[0]} {seconds:.3f}")


def _finish(name: str, key: str, work: Path, final: Path, summary: Mapping[str, Any], seconds: float) -> Done:
    names = sorted(path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file() and path.name != _KEY)
    sums = {one: files.sha256(work / one) for one in names}
    done = {"name": name, "key": key, "files": sums, "summary": dict(summary), "seconds": round(seconds, 3)}
    files.write_file(work / _DONE, json.dumps(done, indent=1))
    _promote(work, final)
    return Done(name, key, sums, summary, seconds, False)


def _promote(work: Path, final: Path) -> None:
    """Put a whole step in its place; also the one of a run that was killed just before it did."""
    if read_done(work) is None:
        return
    (work / _KEY).unlink(missing_ok=True)
    if final.exists():
        shutil.rmtree(final)
    os.replace(work, final)


def _explained(error: OSError, step: str, folder: Path) -> BaseException:
    if files.is_full(error):
        return UserError(f"the disk of {folder} is full, in the step {step}; make room and run the same command again: it goes on")
    return error


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Append a line of JSON, on a line of its own though the last writer was killed in the middle of one. Raises OSError."""
    line = json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n"
    with path.open("a+b") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            line = b"\n" + line
        file.write(line)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder. Raises UserError if another process does."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise DataError(f"{folder} cannot be written to: {files.reason(error)}; choose another folder") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise UserError(f"another run works in {folder}; wait until it ends, or choose another folder") from error
        yield
