"""Servers are started, watched, disturbed and stopped; what cannot be done or read is said."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from edge_rt_distill.replay.driving import Load
from edge_rt_distill.replay.faults import FAULTS, Injector, Planned, check, parse
from edge_rt_distill.replay.live import Live, Tally, quantile
from edge_rt_distill.replay.results import Fault, Outcome, Reading, Results
from edge_rt_distill.replay.running import replay, summary, whole
from edge_rt_distill.replay.targets import Facts, Server
from edge_rt_distill.replay.trace import PATHS, Request
from edge_rt_distill.replay.watching import Watch, family, held
from hypothesis import given
from hypothesis import strategies as st
from replay_server import Peer

from edge_rt.hooks import OptionError, UserError

HELPER = Path(__file__).with_name("replay_server.py")
ASK = Request(0.0, PATHS[0], {"messages": [{"role": "user", "content": "say a"}]})


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # who starts the tests may ignore it, and children inherit that
    with subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE) as process:
        signal.signal(signal.SIGHUP, before)
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


class Told:
    """A target that says who it is."""

    def __init__(self, *facts: Facts | UserError) -> None:
        self._facts = facts
        self.left_out: Counter[str] = Counter()

    async def look(self) -> Facts:
        found = self._facts[0]
        if isinstance(found, UserError):
            raise found
        return found


def injected(planned: list[Planned], target: Any, pid: int | None = None, until: float = 10.0) -> Injector:
    """Faults that are injected, for so many seconds at most."""

    async def run() -> Injector:
        begun = time.perf_counter()
        found = Injector(planned, target, pid, lambda: time.perf_counter() - begun)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(found.go_on(lambda _: None), until)
        return found

    return asyncio.run(run())


# ---- faults ----------------------------------------------------------------------------------------------------------------------------


def test_a_worker_is_killed(child: subprocess.Popen[bytes]):
    found = injected([parse("0.1:kill-worker")], Told(Facts("d", True, os.getpid(), child.pid)))
    assert child.wait(10) == -signal.SIGKILL
    (fault,) = found.done
    assert (fault.what, fault.said) == ("kill-worker", f"worker {child.pid} was killed")
    assert fault.at >= 0.1


def test_a_daemon_is_told_to_reload(child: subprocess.Popen[bytes]):
    injected([parse("0:reload-rules")], Told(Facts("d", True, child.pid)))
    assert child.wait(10) == -signal.SIGHUP, "which this one does not handle"


def test_a_server_stands_still_and_goes_on(child: subprocess.Popen[bytes]):
    async def run() -> tuple[list[str], list[Fault]]:
        begun, seen = time.perf_counter(), []
        found = Injector([parse("0:freeze=0.6")], Told(), child.pid, lambda: time.perf_counter() - begun)
        going = asyncio.ensure_future(found.go_on(lambda _: None))
        while not going.done():
            seen.append(psutil.Process(child.pid).status())
            await asyncio.sleep(0.02)
        return seen, found.done

    seen, (fault,) = asyncio.run(run())
    assert psutil.STATUS_STOPPED in seen
    assert psutil.Process(child.pid).status() != psutil.STATUS_STOPPED
    assert fault.said == "1 processes stood still for 0.6 s"


def test_a_freeze_that_is_cut_short_leaves_nothing_frozen(child: subprocess.Popen[bytes]):
    found = injected([parse("0:freeze=60")], Told(), child.pid, until=0.3)
    assert psutil.Process(child.pid).status() != psutil.STATUS_STOPPED
    assert found.done[0].said == "the replay ended in the middle of it"


def test_commands_failures_and_what_comes_too_late_are_told(child: subprocess.Popen[bytes]):
    child.kill()
    child.wait()
    planned = [parse("0:echo out; exit 3"), parse("0:freeze"), parse("0:kill-worker"), parse("99:freeze=1")]
    found = injected(planned, Told(UserError("it is gone")), child.pid, until=2.0)
    said = {fault.what: fault.said for fault in found.done}
    assert said["echo out; exit 3"] == "ended with 3: out"
    assert said["freeze=2"] == "its processes were gone"
    assert said["kill-worker"] == "it could not be done: it is gone"
    assert found.missed == [Planned(99.0, "freeze", "1")]


@given(at=st.floats(0, 1e4).map(lambda at: round(at, 2)), name=st.sampled_from(sorted(FAULTS)))
def test_faults_are_read_by_name(at: float, name: str):
    found = parse(f"{at:.2f}:{name}")
    assert (found.at, found.name) == (pytest.approx(at), name)


@pytest.mark.parametrize("text", ["", "kill-worker", "x:freeze", "-1:freeze", "3:", "3:kill-wroker", "3:freeze=soon", "3:kill-worker=2"])
def test_faults_that_are_none_are_said(text: str):
    with pytest.raises(OptionError):
        parse(text)


def test_faults_that_cannot_be_done_to_this_server_are_said_before_the_run():
    other, daemon = Facts("a server", pid=3), Facts("edge-rt", daemon=True)
    check([parse("0:freeze"), parse("0:echo x")], other, own=False)
    for planned, facts, own in (("0:kill-worker", other, False), ("0:freeze", daemon, False), ("0:freeze", other, True)):
        with pytest.raises(OptionError):
            check([parse(planned)], facts, own=own)


# ---- the server's processes ------------------------------------------------------------------------------------------------------------


def test_memory_is_that_of_a_process_and_its_children(child: subprocess.Popen[bytes]):
    large = "x = b'x' * (60 << 20); print(flush=True); input()"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {large!r}])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        alone, both = held(family(child.pid)).memory, held(family(parent.pid)).memory
        parent.communicate(b"\n")
    assert alone is not None
    assert both is not None
    assert both > alone + (20 << 20)
    assert held(family(parent.pid)).memory is None


def test_energy_is_summed_over_packages_and_past_the_counters_end(tmp_path: Path):
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0")
    (zone / "max_energy_range_uj").write_text("10000000")
    watch = Watch(None, iter(range(100)).__next__, Tally(1), root=tmp_path)

    async def run() -> None:
        for value in (9_000_000, 9_500_000, 500_000):  # half a joule, then a joule past the end
            (zone / "energy_uj").write_text(str(value))
            await asyncio.sleep(0.01)
            await watch.read()

    asyncio.run(run())
    first, second, third = [reading.energy for reading in watch.readings]
    assert first is None
    assert second is not None
    assert third is not None
    assert third > second > 0
    assert watch.unknown == ["memory is not read, as the server's process is not known; name it with --pid"]


def test_what_cannot_be_read_is_said(tmp_path: Path):
    watch = Watch(os.getpid(), lambda: 0.0, Tally(1), root=tmp_path)
    asyncio.run(watch.read())
    assert watch.readings[0].memory
    assert watch.unknown == ["the energy that the machine takes cannot be read here"]


# ---- a whole run -----------------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def test_a_server_is_started_waited_for_measured_and_stopped():
    port = free_port()
    first = Request(0.0, PATHS[0], {"messages": [{"role": "user", "content": "say Hi"}]})
    make: Callable[[], Server] = lambda: Server(f"http://127.0.0.1:{port}")  # noqa: E731
    late = ASK._replace(body={"messages": [{"role": "user", "content": "forever"}]}, cancel_after=1.2)
    command = f"{sys.executable} {HELPER} {port}"
    results = asyncio.run(whole(make, [first, late], Load(), faults=[parse("0.2:freeze=0.2")], start=command, within=30))
    assert [one.status for one in results.outcomes] == ["ok", "cancelled"]
    assert results.cold_start is not None
    assert results.cold_start > 0
    assert len(results.readings) >= 3
    assert all(reading.memory for reading in results.readings)
    assert [fault.said for fault in results.faults] == ["1 processes stood still for 0.2 s"]
    assert any(line.startswith("from the server's start") for line in summary(results))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 5)


@pytest.mark.parametrize(
    ("command", "error", "said"),
    [
        (f"{sys.executable} -c \"raise SystemExit('no model')\"", UserError, "ended with 1 before it answered; it said: no model"),
        (f"{sys.executable} -c \"import time; time.sleep(60)\"", UserError, "did not answer within 0.5 s"),
        ("/no/such/program", OptionError, "cannot be run"),
        ("'", OptionError, "cannot be run"),
        ("", OptionError, "cannot be run"),
    ],
)  # fmt: skip
def test_a_server_that_does_not_start_is_said(command: str, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        asyncio.run(whole(lambda: Server(f"http://127.0.0.1:{free_port()}"), [ASK], Load(), start=command, within=0.5))


def test_a_fault_is_in_the_results_and_one_that_comes_too_late_in_their_notes():
    async def run() -> Results:
        async with Peer() as peer:
            server, out = Server(peer.url), io.StringIO()
            slow = ASK._replace(body={"messages": [{"role": "user", "content": "forever"}]}, cancel_after=0.6)
            return await replay([slow], server, Load(), faults=[parse("0.1:echo x"), parse("50:echo y")], out=out)

    results = asyncio.run(run())
    assert [(fault.what, fault.said) for fault in results.faults] == [("echo x", "ended with 0: x")]
    assert "the replay ended before the fault echo y" in summary(results)


# ---- the view --------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5)), min_size=1), st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_a_quantile_is_that_of_each_value_as_often_as_it_counts(weighted: list[tuple[float, int]], share: float):
    every = sorted(value for value, weight in weighted for _ in range(weight))
    found = quantile(weighted, share)
    assert found is not None
    assert sum(value <= found for value in every) >= share * len(every) - 1e-6
    assert sum(value < found for value in every) < max(1, share * len(every) + 1e-6)


def test_a_tally_shows_counts_and_the_last_seconds():
    tally = Tally(9)
    tally.sent = 3
    tally.piece(1.0, 4, 99.0, first=True)  # long ago
    tally.piece(20.0, 10, 0.5, first=True)
    tally.piece(20.1, 10, 0.2, first=False)
    tally.ended(Outcome(0, 0, 0, 1, "ok"))
    tally.ended(Outcome(1, 0, 0, 1, "error", "x"))
    tally.reading = Reading(20.0, 2_000_000)
    assert tally.lines(21.0) == [
        "21.0 s: sent 3 of 9, running 1, ended 2, failed 1", "  2.0 tokens/s, memory 2.0 MB",
        "  first token p50 500 ms p95 500 ms, between tokens p50 20 ms p99 20 ms",
    ]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_block_is_written_over_in_a_terminal_and_what_is_said_stays_above_it():
    out = Terminal()
    live = Live(Tally(1), lambda: 1.0, out)
    live.close()
    live.say("a fault")
    live.close()
    assert out.getvalue().count("\x1b[3A\x1b[J") == 0, "nothing is written over that is to stay"

    async def some() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(live.show(), 1.3)

    asyncio.run(some())
    live.say("another")
    text = out.getvalue()
    assert "\x1b[3A\x1b[J" in text
    assert text.endswith("another\n")


def test_elsewhere_there_are_lines_without_marks():
    out = io.StringIO()
    live = Live(Tally(1), lambda: 1.0, out)
    live.say("a fault")
    live.close()
    assert "\x1b" not in out.getvalue()
    assert out.getvalue().count("\n") == 2
