"""Steps of a run: done once, resumed after a kill at any moment, done again when what they depend on changed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from edge_rt_distill.run import steps as machine
from edge_rt_distill.run.steps import Place, Step, read_done, run_steps

from edge_rt.errors import DataError, UserError


def counting(name: str, counts: dict[str, int], settings=None, needs=()) -> Step:
    """A step that writes its settings behind what it needs, and counts how often it ran."""

    def run(place: Place):
        counts[name] = counts.get(name, 0) + 1
        text = "".join((place.need(one) / "out.txt").read_text() for one in needs)
        (place.folder / "out.txt").write_text(f"{text}{name}={settings};")
        place.told("writes", 1, 2)
        return {"length": len(text)}

    return Step(name, run, settings, needs)


def chain(counts, first=1, second=2):
    return [counting("a", counts, first), counting("b", counts, second, ("a",)), counting("c", counts, None, ("a", "b"))]


def test_steps_run_in_order_and_once(tmp_path):
    counts, seen = {}, []
    done = run_steps(tmp_path, chain(counts), lambda *told: seen.append(told))
    assert [one.name for one in done] == ["a", "b", "c"]
    assert (tmp_path / "c" / "out.txt").read_text() == "a=1;a=1;b=2;c=None;"
    assert ("a", "writes", 1, 2) in seen
    again = run_steps(tmp_path, chain(counts))
    assert counts == {"a": 1, "b": 1, "c": 1}
    assert all(one.again for one in again)
    assert [one.key for one in again] == [one.key for one in done]
    assert [line["event"] for line in read_log(tmp_path)] == ["begin", "end"] * 3


def test_what_changed_is_done_again_with_what_needs_it(tmp_path):
    counts = {}
    run_steps(tmp_path, chain(counts))
    run_steps(tmp_path, chain(counts, second=3))
    assert counts == {"a": 1, "b": 2, "c": 2}
    assert (tmp_path / "c" / "out.txt").read_text() == "a=1;a=1;b=3;c=None;"
    (tmp_path / "a" / "out.txt").write_text("damaged")
    run_steps(tmp_path, chain(counts, second=3))
    assert counts == {"a": 2, "b": 2, "c": 2}, "what is made again is the same: its key did not change"
    assert (tmp_path / "a" / "out.txt").read_text() == "a=1;"


def test_a_step_that_fails_keeps_its_work(tmp_path):
    def run(place: Place):
        tries = place.folder / "tries"
        tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
        if len(tries.read_text()) < 3:
            raise DataError("not yet; try again")
        return {}

    for _ in range(2):
        with pytest.raises(DataError, match="not yet"):
            run_steps(tmp_path, [Step("a", run)])
        assert read_done(tmp_path / "a") is None
    assert run_steps(tmp_path, [Step("a", run)])[0].files.keys() == {"tries"}
    with pytest.raises(DataError, match="not yet"):  # other settings begin anew
        run_steps(tmp_path, [Step("a", run, "other")])


def test_a_step_may_only_use_what_it_says_it_needs(tmp_path):
    with pytest.raises(AssertionError, match="does not say that it needs b"):
        run_steps(tmp_path, [Step("a", lambda place: {"x": place.need("b")})])


def test_two_runs_do_not_meet(tmp_path):
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run works in"):
            run_steps(tmp_path, [])
    assert run_steps(tmp_path, []) == []


def test_a_full_disk_is_told(tmp_path):
    def run(place: Place):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="full, in the step a; make room"):
        run_steps(tmp_path, [Step("a", run)])
    with pytest.raises(DataError, match="cannot be written to"):
        run_steps(Path("/proc/nowhere"), [])


def read_log(folder):
    """The lines of a run's log but for one that a kill cut short."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_a_log_that_was_cut_short_goes_on(tmp_path):
    machine.append(tmp_path / "log.jsonl", {"n": 1})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"n": 2')
    machine.append(tmp_path / "log.jsonl", {"n": 3})
    assert [line["n"] for line in read_log(tmp_path)] == [1, 3]


_KILLED = """
import json, os, signal, sys
from pathlib import Path
from edge_rt_distill.run import steps as machine
from edge_rt_distill.run.steps import Step, run_steps
left = int(sys.argv[2])
def soon(event, args):
    global left
    if event in ("open", "os.rename", "os.remove", "shutil.rmtree", "os.mkdir", "os.rmdir") and str(sys.argv[1]) in str(args):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
def step(name, needs=()):
    def run(place):
        text = "".join((place.need(one) / "out.txt").read_text() for one in needs)
        (place.folder / "out.txt").write_text(text + name)
        return {"text": text}
    return Step(name, run, None, needs)
sys.addaudithook(soon)
run_steps(Path(sys.argv[1]), [step("a"), step("b", ("a",))])
"""


def test_killed_at_any_moment_a_run_comes_to_the_same_end(tmp_path):
    results, killed = [], 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for at in (*range(1, 60, 3), 10**9):
        folder = tmp_path / str(at)
        first = subprocess.run([sys.executable, "-c", _KILLED, str(folder), str(at)], env=environment, check=False)
        killed += first.returncode == -9
        if first.returncode:
            subprocess.run([sys.executable, "-c", _KILLED, str(folder), str(10**9)], env=environment, check=True)
        done = [json.loads((folder / name / "done.json").read_text()) for name in ("a", "b")]
        results.append([{**one, "seconds": 0} for one in done])
        assert sorted(path.name for path in folder.iterdir()) == ["a", "b", "lock", "log.jsonl"]
    assert killed > 10
    assert all(one == results[0] for one in results)
