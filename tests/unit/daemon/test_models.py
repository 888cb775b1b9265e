"""Models that share a memory budget: with simulated workers that count what they hold, and with the real daemon."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from daemons import Daemon, write_plugin
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.daemon import supervisor
from edge_rt.daemon.models import MemoryNeeds, ModelManager, ParkingFolder, estimate_memory
from edge_rt.daemon.operations import ModelLoader
from edge_rt.daemon.protocol import FrameReader, Request, pack
from edge_rt.daemon.supervisor import TaskSet, WorkerExit, WorkerSpec
from edge_rt.errors import DaemonError, ModelFileError, ProtocolError

MB = 1 << 20


def in_loop(test):
    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(test(*args, **kwargs))

    return run


class Worker:
    """In place of a process. A request holds ``bytes`` of its allowance while it runs, and a tenth of it afterwards, until it is parked."""

    alive: list[Worker] = []  # noqa: RUF012 - all there are

    def __init__(self, told: Any, ended: Any):
        self.told, self.ended, self.pending, self.over, self.pid = told, ended, {}, False, 1
        self.allowance = self.running = self.kept = 0
        self.waiting: list[tuple[int, int]] = []
        Worker.alive.append(self)

    def call(self, number: int, command: dict[str, Any], took: Any):
        self.pending[number] = took
        asyncio.get_running_loop().call_soon(self._do, number, command)

    def tell(self, command: dict[str, Any]):
        pass

    def _do(self, number: int, command: dict[str, Any]):
        if self.over:
            return
        match command["op"]:
            case "open":
                self.allowance, self.parked = command["allowance"], command["parked"]
                needs = {"weights": Path(command["model"]).stat().st_size, "process": 5 * MB}
                self._answer(number, {"ok": {"template": "", "needs": needs}})
            case "allow":
                self.allowance = command["bytes"]
                self._shrink()
                self._answer(number, {"ok": {"held": self.running + self.kept, "reserved": self.running}})
                self._admit(final=True)
            case "cool":
                if self.running:
                    self._answer(number, {"ok": {"busy": True}})
                else:
                    self.kept = 0
                    self._answer(number, {"ok": {"held": 0}})
            case "generate":
                self.waiting.append((number, command["bytes"]))
                self._admit()

    def _shrink(self):
        self.kept = max(0, min(self.kept, self.allowance - self.running))

    def _admit(self, *, final: bool = False):
        for number, wanted in list(self.waiting):
            if self.running + wanted <= self.allowance:
                self.waiting.remove((number, wanted))
                self.running += wanted
                self._shrink()
                asyncio.get_running_loop().call_later(0.001, self._end, number, wanted)
            elif final and not self.running:
                self.waiting.remove((number, wanted))
                self._answer(number, {"error": {"code": "out_of_memory", "message": "no"}})
            elif not final:
                self.told({"short": self.running + wanted - self.allowance})

    def _end(self, number: int, wanted: int):
        if self.over:
            return
        self.running -= wanted
        self.kept += wanted // 10
        self._shrink()
        self._answer(number, {"ok": {}})
        self._admit()

    def _answer(self, number: int, message: dict[str, Any]):
        if took := self.pending.pop(number, None):
            took(message)

    def die(self, why: WorkerExit):
        self.over = True
        Worker.alive.remove(self)
        pending, self.pending = self.pending, {}
        self.ended(self, why)
        for took in pending.values():
            took({"error": why.error})

    kill = die

    async def stop(self, why: WorkerExit):
        await asyncio.sleep(0.001)
        if not self.over:
            self.die(why)

    @property
    def held(self) -> int:
        return self.running + self.kept


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    Worker.alive.clear()
    monkeypatch.setattr(supervisor, "WorkerProcess", Worker)
    monkeypatch.setattr("edge_rt.daemon.models.estimate_memory", lambda spec: MemoryNeeds(Path(spec.model).stat().st_size, 6 * MB, 4 * MB))


@dataclass
class Host:
    """A daemon's models. ``files``: sizes in MB by name."""

    models: ModelManager
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    asked: int = 0
    most: int = 0

    def ask(self, name: str, bytes: int = MB) -> int:
        self.asked += 1
        number = self.asked
        command = {"op": "generate", "bytes": bytes}
        self.models.call(self.models.find(name), command, lambda message: self.answers.setdefault(number, message))
        self.check()
        return number

    async def answer(self, number: int) -> dict[str, Any]:
        for _ in range(10_000):
            if number in self.answers:
                return self.answers[number]
            self.check()
            await asyncio.sleep(0.001)
        raise AssertionError(f"request {number} is not answered")

    def check(self):
        """What is promised, and what workers hold, is within the budget."""
        taken = sum(one.taken for one in self.models)
        self.most = max(self.most, taken)
        assert taken <= self.models.budget
        held = sum(worker.held for worker in Worker.alive)
        assert held <= sum(max(one.allowance, one.used) for one in self.models if one.placed)


def host(folder: Path, budget: int, sizes: dict[str, int], **times: float) -> Host:
    cool_after, patience = times.get("cool_after", 0.0), times.get("patience", 5.0)
    models = ModelManager(budget * MB, 60.0, cool_after, patience, folder / "state", lambda one: None, lambda one, message: None)
    for name, size in sizes.items():
        path = folder / f"{name}.gguf"
        with path.open("wb") as file:
            file.truncate(size * MB)
        models.add(name, WorkerSpec(str(path), {}))
    return Host(models)


@in_loop
async def test_models_are_found_by_their_names(tmp_path):
    here = host(tmp_path, 100, {"a": 1, "b": 1})
    assert here.models.find("a") is here.models.find("a.gguf")
    for name in (None, "c"):
        with pytest.raises(ProtocolError, match="a, b"):
            here.models.find(name)
    here.models.default = "b"
    assert here.models.find().name == "b"
    here.models.forget(here.models.find())
    with pytest.raises(ProtocolError, match="names no model"):
        here.models.find()


@in_loop
async def test_one_that_is_not_in_memory_comes_for_its_first_request_and_the_coldest_leaves(tmp_path):
    here = host(tmp_path, 140, {"a": 40, "b": 40, "c": 40})
    for _ in range(3):
        assert await here.answer(here.ask("a")) == {"ok": {}}
    assert await here.answer(here.ask("b")) == {"ok": {}}
    assert {one.name for one in here.models if one.placed} == {"a", "b"}
    assert await here.answer(here.ask("c")) == {"ok": {}}
    assert {one.name for one in here.models if one.placed} == {"a", "c"}, "b was asked least"
    assert here.models.evictions == 1
    assert len(Worker.alive) == 2


@in_loop
async def test_one_that_is_busy_stays_and_the_other_waits_with_a_reason(tmp_path):
    here = host(tmp_path, 100, {"a": 60, "b": 60})
    first, second = here.ask("a"), here.ask("b")
    waiting = here.models.find("b").supervisor
    assert (waiting.state, "waits for" in waiting.reason) == ("waiting", True)
    assert await here.answer(first) == await here.answer(second) == {"ok": {}}


@in_loop
async def test_who_waits_too_long_is_told_how_much_is_missing(tmp_path):
    here = host(tmp_path, 100, {"a": 60, "b": 60}, patience=0.05)
    here.models.load(here.models.find("a"))
    here.models.find("a").under_way += 1  # for good
    error = (await here.answer(here.ask("b")))["error"]
    assert error["code"] == "out_of_memory"
    assert "73.4 MB" in error["message"]
    assert not here.models.find("b").placed


@in_loop
async def test_an_allowance_grows_at_the_expense_of_what_others_do_not_use(tmp_path):
    here = host(tmp_path, 100, {"a": 10, "b": 10})
    here.models.load(here.models.find("a"))
    assert await here.answer(here.ask("b", 30 * MB)) == {"ok": {}}
    assert await here.answer(here.ask("a", 30 * MB)) == {"ok": {}}
    assert await here.answer(here.ask("b", 69 * MB)) == {"ok": {}}, "so much is left beside both"
    assert here.models.evictions <= 1
    assert (await here.answer(here.ask("b", 90 * MB)))["error"]["code"] == "out_of_memory"


@in_loop
async def test_a_model_cools_down_when_nobody_asks_and_leaves_before_others(tmp_path):
    here = host(tmp_path, 140, {"a": 40, "b": 40, "c": 40}, cool_after=0.02)
    for _ in range(5):
        await here.answer(here.ask("a"))
    await asyncio.sleep(0.05)
    assert here.models.find("a").cooled
    await here.answer(here.ask("b"))
    assert not here.models.find("b").cooled
    await here.answer(here.ask("c"))
    assert {one.name for one in here.models if one.placed} == {"b", "c"}, "a was asked most, and is cool"
    await asyncio.sleep(0.05)
    assert here.models.find("b").cooled
    await here.answer(here.ask("b"))
    assert not here.models.find("b").cooled


@in_loop
async def test_one_that_needs_more_than_was_foreseen_makes_others_shrink(tmp_path, monkeypatch):
    here = host(tmp_path, 100, {"a": 40, "b": 40})
    here.models.find("b").needs = MemoryNeeds(10 * MB, 6 * MB, 4 * MB)
    here.models.load(here.models.find("a"))
    await here.answer(here.ask("a", 20 * MB))
    here.models.call(here.models.find("b"), {"op": "generate", "bytes": MB}, lambda message: here.answers.setdefault(99, message))
    while 99 not in here.answers:
        await asyncio.sleep(0.001)
    for _ in range(100):
        await asyncio.sleep(0.001)
        if here.models.free >= 0:
            break
    here.check()
    assert here.models.find("b").needs.weights == 40 * MB


@in_loop
async def test_one_that_turns_out_too_large_for_all_the_memory_leaves_and_is_refused_in_bytes(tmp_path, caplog):
    here = host(tmp_path, 50, {"a": 20, "b": 60})
    b = here.models.find("b")
    b.needs = MemoryNeeds(10 * MB, 6 * MB, 4 * MB)  # its worker knows better
    here.models.load(here.models.find("a"))
    await here.answer(here.ask("a"))
    refused = {"code": "out_of_memory", "needed": 69 * MB, "available": 50 * MB}
    here.asked += 1
    here.models.call(b, {"op": "generate", "bytes": 40 * MB}, lambda message: here.answers.setdefault(here.asked, message))
    while here.asked not in here.answers:  # for this moment, more is taken than may be
        await asyncio.sleep(0.001)
    error = here.answers[here.asked]["error"]
    assert {name: error[name] for name in refused} == refused
    assert error["message"].startswith("the model b needs 72.4 MB and all models may have 52.4 MB; raise memory")
    assert error["message"] in caplog.text
    while b.leaving:
        await asyncio.sleep(0.001)
    assert (b.placed, b.supervisor.state, here.models.free) == (False, "none", 50 * MB - here.models.find("a").taken)
    with pytest.raises(ProtocolError, match=r"needs 72\.4 MB") as caught:  # from now on it is known beforehand
        here.ask("b")
    assert {"code": caught.value.code, **caught.value.fields} == refused
    assert await here.answer(here.ask("a")) == {"ok": {}}
    await here.models.close(WorkerExit("draining", "over"))
    assert Worker.alive == []


@pytest.mark.parametrize("bidden", [False, True])
@in_loop
async def test_a_model_waits_for_room_as_long_as_somebody_waits_for_it(tmp_path, bidden):
    here = host(tmp_path, 100, {"a": 60, "b": 60})
    a, b = here.models.find("a"), here.models.find("b")
    await here.answer(here.ask("a"))
    a.under_way += 1
    restored: list[dict[str, Any]] = []
    here.models.call(b, {"op": "generate", "bytes": MB}, restored.append, awaits=False)  # as what brings a session back
    first, second = here.ask("b"), here.ask("b")
    if bidden:
        here.models.load(b)
    assert b.supervisor.state == "waiting"
    b.supervisor.cancel(2)
    assert b.supervisor.state == "waiting"
    b.supervisor.cancel(3)
    for number in (first, second):
        assert (await here.answer(number))["error"]["code"] == "cancelled"
    assert [one["error"]["code"] for one in restored] == ([] if bidden else ["unloaded"])
    assert b.supervisor.state == ("waiting" if bidden else "none")
    a.under_way -= 1
    here.models._schedule_sharing()  # as when its request has ended
    await asyncio.sleep(0.05)
    assert (a.placed, b.placed, here.models.evictions) == (not bidden, bidden, int(bidden))
    assert await here.answer(here.ask("b")) == {"ok": {}}


@in_loop
async def test_who_asks_for_a_model_that_leaves_for_good_is_told_and_no_worker_is_started_for_it(tmp_path):
    here = host(tmp_path, 100, {"a": 60})
    await here.answer(here.ask("a"))
    a = here.models.find("a")
    leaving = asyncio.ensure_future(here.models.unload(a))
    await asyncio.sleep(0)
    late = here.ask("a")
    await leaving
    again = here.models.add("a", a.spec)  # as load_model does
    assert (await here.answer(late))["error"]["code"] == "unloaded"
    assert await here.answer(here.ask("a")) == {"ok": {}}
    assert [one.pid for one in Worker.alive] == [again.supervisor.pid]
    assert (a.placed, a.under_way, a.supervisor.state) == (False, 0, "none")
    await here.models.unload(again)
    here.models.forget(again)
    assert Worker.alive == []


@in_loop
async def test_one_that_cannot_be_opened_makes_room_for_who_waits(tmp_path, monkeypatch):
    here = host(tmp_path, 100, {"a": 60, "b": 60})
    monkeypatch.setattr(Worker, "_do", lambda *_: None)
    here.models.load(here.models.find("a"))
    asked = here.ask("b")
    await asyncio.sleep(0.01)
    monkeypatch.undo()
    monkeypatch.setattr(supervisor, "WorkerProcess", Worker)
    (opening,) = Worker.alive
    opening._answer(0, {"error": {"code": "model_file", "message": "it is damaged"}})
    assert await here.answer(asked) == {"ok": {}}


@in_loop
async def test_deaths_stay_counted_when_their_model_is_forgotten(tmp_path):
    here = host(tmp_path, 100, {"a": 10})
    await here.answer(here.ask("a"))
    Worker.alive[0].die(WorkerExit("worker_died", "it died"))
    await here.models.unload(here.models.find("a"))
    here.models.forget(here.models.find("a"))
    assert here.models.deaths == 1


MODELS = {"a": 20, "b": 35, "c": 50}


STEPS = st.lists(
    st.tuples(st.sampled_from(sorted(MODELS)), st.integers(1, 40)) | st.just("wait") | st.integers(0, 2), min_size=1, max_size=40
)


"""A request to a model for so many MB, or a while without any, or the death of a worker."""


@given(STEPS, st.integers(70, 160))
@settings(deadline=None, max_examples=60)
@in_loop
async def test_the_budget_holds_and_every_request_is_answered(tmp_path_factory, steps, budget):
    Worker.alive.clear()
    here = host(tmp_path_factory.mktemp("models"), budget, MODELS)
    asked = []
    for step in steps:
        if step == "wait":
            await asyncio.sleep(0.003)
        elif isinstance(step, tuple):
            asked.append(here.ask(step[0], step[1] * MB))
        elif step < len(Worker.alive):
            Worker.alive[step].die(WorkerExit("worker_died", "it died"))
        here.check()
    for number in asked:
        answer = await here.answer(number)
        assert "ok" in answer or answer["error"]["code"] in ("out_of_memory", "worker_died", "unloaded"), answer
    assert all(one.under_way == 0 for one in here.models)
    await here.models.close(WorkerExit("draining", "over"))
    assert Worker.alive == []


def test_what_is_foreseen_is_near_what_a_worker_takes(tmp_path):
    path = tmp_path / "m.gguf"
    with path.open("wb") as file:
        file.truncate(93 * MB)
    needs = estimate_memory(WorkerSpec(str(path), {}))
    assert (needs.weights, needs.process) == (93 * MB, 48 * MB + 93 * MB // 16)
    assert estimate_memory(WorkerSpec(str(path), {"memory": 40 * MB})).weights == 40 * MB


def test_it_is_ones_own_and_goes_with_its_daemon(tmp_path):
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


def test_what_a_daemon_left_that_died_is_removed(tmp_path):
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


def test_where_there_is_no_place_sessions_are_not_parked(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert ParkingFolder(tmp_path / "file" / "state").folder() is None
    assert "sessions cannot be parked" in caplog.text
    ParkingFolder(tmp_path).close()


OPTIONS = {"engine": "null", "device": "null", "context": 128}


NULL = 'engine = "null"\ndevice = "null"\n'


def test_two_who_load_at_once_do_not_leave_a_worker_behind(tmp_path, random_model):
    write_plugin(tmp_path)
    asked = [{"op": "hello", "versions": [1]}, *[{"op": "load_model", "model": str(random_model()), "options": OPTIONS}] * 2]
    with Daemon(tmp_path) as daemon, socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(daemon.socket))
        connection.sendall(b"".join(pack({"id": number, **message}) for number, message in enumerate(asked)))
        frames, found = FrameReader(), {}
        while len(found) < len(asked):
            found |= {message["id"]: message for message in frames.feed(connection.recv(1 << 16))}
        assert found[2]["error"]["code"] == "busy"
        assert "ok" in found[1]


def test_who_asks_for_facts_keeps_nobody_from_exchanging_a_model(tmp_path, random_model):
    write_plugin(tmp_path)
    http = tmp_path / "h.sock"
    with Daemon(tmp_path, "--http", str(http), model=str(random_model())) as daemon, daemon.ready() as client:
        os.kill(client.status()["worker"]["pid"], signal.SIGSTOP)  # it does not say what it holds
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(http))
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
            time.sleep(0.1)
            client.call("unload_model")


def test_a_session_keeps_its_context_when_its_model_left_also_before_it_was_used(tmp_path, random_model):
    write_plugin(tmp_path)
    with Daemon(tmp_path, model=str(random_model())) as daemon, daemon.ready() as client:
        fresh, saved = client.session(context=24), client.session(context=24)
        assert allowed(saved, "ab") == 24
        saved.save("kept")
        for deaths in (1, 2):
            os.kill(client.status()["worker"]["pid"], signal.SIGKILL)
            until = time.monotonic() + 20
            while client.status()["worker"]["deaths"] < deaths:
                assert time.monotonic() < until
                time.sleep(0.02)
            assert allowed(saved, "abc") == 24
            if deaths == 1:
                assert allowed(fresh, "ab") == 24
                with pytest.raises(DaemonError) as caught:
                    client.session(context=1 << 40)
                assert caught.value.code == "option"
        with pytest.raises(DaemonError) as caught:
            allowed(fresh, "abc")
        assert caught.value.code == "session_lost", "it was used, and never saved"


def allowed(session, prompt):
    """Cells that a request in a session may use."""
    return list(session.generate(prompt, max_tokens=3, ignore_eos=True))[-1].context.allowed


def test_nothing_waits_for_memory_for_a_client_that_has_gone(tmp_path, random_model):
    write_plugin(tmp_path)
    config = 'memory = "110M"\n' + "".join(f'[models.{name}]\nfile = "{random_model()}"\n{NULL}' for name in ("a", "b"))
    with Daemon(tmp_path, config=config, delay=0.01) as daemon, daemon.client() as client:

        def state():
            return {one["name"]: one["worker"]["state"] for one in client.status()["models"]}["b"]

        events = client.generate("x", model="a", max_tokens=3000, ignore_eos=True)
        next(events)
        asked = [{"op": "hello", "versions": [1]}, {"op": "tokenize", "text": "x", "model": "b"}, {"op": "open_session", "model": "b"}]
        asked.append({"op": "generate", "prompt": "x", "model": "b"})
        with socket.socket(socket.AF_UNIX) as other:
            other.settimeout(30)
            other.connect(str(daemon.socket))
            other.sendall(b"".join(pack({"id": number, **message}) for number, message in enumerate(asked)))
            until = time.monotonic() + 20
            while state() != "waiting" or client.status()["server"]["requests"] < 4:
                assert time.monotonic() < until, client.status()
                time.sleep(0.02)
        while state() != "none":
            assert time.monotonic() < until, client.status()
            time.sleep(0.02)
        assert client.status()["server"]["requests"] == 1
        assert client.status()["server"]["sessions"] == 0
        events.close()
        assert list(client.generate("x", model="b", max_tokens=2))


@in_loop
async def test_a_model_whose_file_vanishes_is_refused_and_can_be_loaded_later(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_rt.daemon.models.estimate_memory", estimate_memory)
    here, tasks, said = host(tmp_path, 1000, {"a": 10}), TaskSet(), []
    connection = SimpleNamespace(answer=lambda number, result: said.append(result), refuse=lambda number, error: said.append(error))
    path, loader = tmp_path / "a.gguf", ModelLoader(here.models, lambda model, options: WorkerSpec(model, options), tasks)

    async def load(*, vanish):
        loader.load(connection, Request(1, "load_model", {}), str(path), {})
        if vanish:
            path.unlink()  # the worker is about to end
        while tasks:
            await asyncio.sleep(0.001)
        return said.pop()

    await here.answer(here.ask("a"))
    error = await load(vanish=True)
    assert isinstance(error, ModelFileError)
    assert str(error) == f"{path} cannot be opened: no such file or directory; check the path"
    assert Worker.alive == []
    with path.open("wb") as file:
        file.truncate(10 * MB)
    assert await load(vanish=False) == {"model": str(path)}
    assert await here.answer(here.ask("a")) == {"ok": {}}
