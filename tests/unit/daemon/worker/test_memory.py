"""Memory of the worker: reservations, parked sessions, and the budget."""

import gc
import weakref

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worker_host import Host

from edge_rt.daemon.worker import requests as admission
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing.null_device import NullEngine, NullPlugin

CELL = NullEngine.cell_bytes


CONTEXT = 4096


@pytest.fixture(scope="module")
def host(random_model):
    with pytest.MonkeyPatch.context() as patch:
        registry = Registry.load(entry_points=False, plugins={"null": NullPlugin()})
        patch.setattr(Registry, "load", lambda: registry)
        patch.setattr(admission, "PATIENCE", 0.05)
        model = random_model()
        yield lambda *given, **more: Host(model, *given, engine="null", device="null", **more)


def test_what_is_over_is_free_at_once_and_waits_for_no_collector(host):
    one = host()
    one.until(one.ask("a", max_tokens=3))
    gc.collect()
    gc.disable()
    try:
        requests = one.worker.requests
        first, second = one.ask("a" * 30, max_tokens=5), one.ask("b" * 30, max_tokens=100)
        one.step()
        asked = [weakref.ref(requests._active[number]) for number in (first, second)]
        running = [weakref.ref(requests._active[number].running) for number in (first, second)]
        assert all(ref() for ref in (*asked, *running))
        one.step()
        one.tell("drop", second)
        one.until(first, second)
        assert [ref() for ref in (*asked, *running)] == [None] * 4
    finally:
        gc.enable()


def test_idle_sessions_are_parked_and_come_back_the_same(host, tmp_path):
    plain, short = host(), host(allowance=300 * CELL, parked=tmp_path / "p")
    texts = []
    for one in (plain, short):
        for name in "xyz":
            one.do("open_session", session=name, owner=name)
        for turn in range(3):
            for name in "xyz":
                number = one.ask(name * (50 + 40 * turn), name, max_tokens=40)
                one.until(number)
                texts.append((one is short, one.text(number), one.used(number)["reused_tokens"]))
    assert [rest for is_short, *rest in texts if is_short] == [rest for is_short, *rest in texts if not is_short]
    assert len({one["parked"] for one in short.news if "parked" in one}) == 3
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o700
    memory = short.ok("memory")
    assert memory["sessions"] == 3
    assert memory["parked"] >= 1
    assert memory["held"] <= memory["reserved"] <= 300 * CELL
    assert sum(one["bytes"] for one in memory["by_session"].values()) == memory["cache"]


def test_the_least_recently_used_goes_first_and_shared_beginnings_before(host, tmp_path):
    one = host(allowance=400 * CELL, parked=tmp_path)
    for name in "xy":
        one.do("open_session", session=name)
        one.until(one.ask(name * 79, name, max_tokens=20))
    one.until(one.ask("shared" * 10, max_tokens=10))  # its session ends, its cells stay
    assert one.ok("memory")["promised"] == {"idle": 198 * CELL, "shared": 70 * CELL, "running": 0, "compute": 0}
    one.until(one.ask("a" * 149, max_tokens=50))
    assert not [told for told in one.news if "parked" in told]
    one.until(one.ask("b" * 249, max_tokens=50))
    assert [told["parked"] for told in one.news if "parked" in told] == ["x"]


def test_parked_sessions_are_cloned_saved_and_closed(host, tmp_path):
    one = host(parked=tmp_path / "p")
    one.do("open_session", session="x", owner="me", context=500)
    first = one.ask("hello", "x", max_tokens=30)
    one.until(first)
    prompt = "hello" + "more"
    assert one.ok("park_session", session="x") == {"held": 0}
    assert one.ok("park_session", session="x") == {"held": 0}
    one.ok("clone_session", session="x", new="y")
    one.ok("save_session", session="x", path=str(tmp_path / "s" / "saved"))
    assert one.ok("restore_session", session="z", path=str(tmp_path / "s" / "saved"), owner="me") == {"tokens": 35}
    numbers = [one.ask(prompt, name, max_tokens=9) for name in "xyz"]
    one.until(*numbers)
    assert len({one.text(number) for number in numbers}) == 1
    assert all(one.used(number)["reused_tokens"] == 6 for number in numbers)
    assert one.events(numbers[0], "done")[0]["context"]["allowed"] == 500
    for name in "xyz":
        one.do("close_session", session=name)
    assert not list((tmp_path / "p").iterdir())
    assert one.ok("memory")["sessions"] == 0


def test_what_does_not_fit_when_it_is_cloned_or_restored_is_parked_at_once(host, tmp_path):
    one = host(allowance=250 * CELL, parked=tmp_path / "p")
    one.do("open_session", session="x")
    one.until(one.ask("x" * 100, "x", max_tokens=50))
    one.ok("save_session", session="x", path=str(tmp_path / "saved"))
    one.ok("clone_session", session="x", new="y")
    assert one.ok("memory")["by_session"]["y"]["parked"]
    assert one.ok("restore_session", session="z", path=str(tmp_path / "saved")) == {"tokens": 150}
    assert one.budget.reserved() <= 250 * CELL
    assert one.ok("memory")["sessions"] == 3


def test_a_full_disk_loses_nothing(host, tmp_path, monkeypatch):
    one = host(allowance=300 * CELL, parked=tmp_path)
    one.do("open_session", session="x")
    first = one.ask("x" * 100, "x", max_tokens=50)
    one.until(first)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("edge_rt.core.context.session_file.os.replace", full)
        other = one.ask("y" * 150, max_tokens=50)
        assert one.until(other)[0]["error"]["code"] == "out_of_memory"
    assert not list(tmp_path.iterdir())
    again = one.ask("x" * 100 + "?", "x", max_tokens=5)
    one.until(again)
    assert one.used(again)["reused_tokens"] == 101


def test_a_session_is_not_saved_where_there_can_be_no_folder(host, tmp_path):
    one = host(parked=tmp_path / "p")
    one.do("open_session", session="x")
    (tmp_path / "file").touch()
    assert one.answer(one.do("save_session", session="x", path=str(tmp_path / "file" / "a.session")))["error"]["code"] == "failed"


def test_a_file_that_is_damaged_costs_time_only(host, tmp_path):
    one = host(parked=tmp_path)
    one.do("open_session", session="x")
    first = one.ask("x" * 100, "x", max_tokens=50)
    one.until(first)
    one.do("park_session", session="x")
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    prompt = "x" * 100 + "?"
    again, fresh = one.ask(prompt, "x", max_tokens=5), one.ask(prompt, max_tokens=5)
    one.until(again, fresh)
    assert one.text(again) == one.text(fresh)


def test_cooling_down_and_waking(host, tmp_path):
    one = host(parked=tmp_path)
    one.do("open_session", session="x")
    first = one.ask("x" * 100, "x", max_tokens=50)
    one.step()
    assert one.ok("cool") == {"busy": True}
    one.until(first)
    assert one.ok("cool") == {"held": 0}
    again = one.ask("x" * 100 + "?", "x", max_tokens=5)
    one.until(again)
    assert one.used(again)["reused_tokens"] == 101


def test_a_parked_session_comes_back_as_large_as_it_was(host, tmp_path):
    one = host(allowance=300 * CELL, parked=tmp_path)
    one.do("open_session", session="x")
    one.until(one.ask("x" * 149, "x", max_tokens=50))
    one.do("park_session", session="x")
    other = one.ask("a" * 99, max_tokens=100)
    short = one.ask("x" * 9, "x", max_tokens=10)  # 20 cells would fit, and not the 199 that come back first
    assert one.events(short, "queued")[0]["needed"] == 200 * CELL
    one.until(other, short)


def test_pruned_requests_need_less(host):
    one = host(allowance=1000 * CELL)
    number = one.ask("a" * 900, max_tokens=900, prune={"budget": 100})
    one.until(number)
    assert one.events(number, "done")[0]["context"]["pruned_cells"] > 1000
    assert one.until(one.ask("a" * 900, max_tokens=900))[0]["error"]["needed"] == 1801 * CELL


NAMES = ["s0", "s1", "s2", "s3"]


asking = st.tuples(
    st.just("ask"), st.sampled_from([None, *NAMES]), st.integers(1, 250), st.sampled_from([None, 1, 30, 120]),
    st.sampled_from(["low", "normal", "high"]), st.integers(0, 3),
)  # fmt: skip


other = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 60)),
    st.tuples(st.sampled_from(["cancel", "drop"]), st.integers(0, 100)),
    st.tuples(st.just("allow"), st.integers(100, 900)),
    st.tuples(st.sampled_from(["close", "park", "clone"]), st.sampled_from(NAMES)),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(first=st.integers(100, 700), moves=st.lists(st.one_of(asking, asking, other), min_size=5, max_size=40))
def test_whatever_comes_nothing_is_promised_twice_or_lost(host, tmp_path_factory, first, moves):
    one = host(allowance=first * CELL, parked=tmp_path_factory.mktemp("parked"))
    plain = host()
    account, limit = one.budget, [first * CELL]

    def check():
        held, reserved = account.held(), account.reserved()
        assert held <= reserved <= limit[0], "promised twice"
        limit[0] = max(account.allowance, min(limit[0], reserved))  # what ran when less was allowed may end

    step = one.engine.step

    def checked_step(parts):
        found = step(parts)
        assert account.held() <= limit[0]
        return found

    one.engine.step = checked_step
    asked, opened = {}, set()

    def ask(name, prompt, max_tokens, priority, kind):
        if name is not None and name not in opened:
            one.do("open_session", session=name, owner="o")
            opened.add(name)
        if name is not None and any(one.answer(n) is None and given[0] == name for n, given in asked.items()):
            return  # the daemon lets in one at a time
        text = "abcd"[kind] * prompt
        number = one.ask(text, name, max_tokens=max_tokens, priority=priority, seed=1)
        asked[number] = (name, text, max_tokens)

    for op, *words in moves:
        if op == "ask":
            ask(*words)
        elif op == "step":
            for _ in range(words[0]):
                one.step()
                check()
        elif op in ("cancel", "drop") and asked:
            one.tell(op, sorted(asked)[words[0] % len(asked)])
        elif op == "allow":
            allowed = one.ok("allow", bytes=words[0] * CELL)
            limit[0] = max(words[0] * CELL, allowed["reserved"])
        elif op == "close" and words[0] in opened:
            one.do("close_session", session=words[0])
            opened.discard(words[0])
        elif op == "park" and words[0] in opened:
            one.do("park_session", session=words[0])
        elif op == "clone" and words[0] in opened and "c" not in opened:
            if any(one.answer(n) is None and session == words[0] for n, (session, *_) in asked.items()):
                continue
            one.ok("clone_session", session=words[0], new="c")
            opened.add("c")
        check()
    one.until(*asked)
    check()
    for number, (_, text, max_tokens) in asked.items():
        answers = [message for message in one.said[number] if "event" not in message]
        assert len(answers) == 1
        if "error" in answers[0]:
            assert answers[0]["error"]["code"] in ("cancelled", "out_of_memory")
        elif max_tokens is not None and one.events(number, "done")[0]["reason"] != "cancelled":
            same = plain.ask(text, max_tokens=max_tokens, seed=1)
            plain.until(same)
            assert one.text(number) == plain.text(same)
    memory = one.ok("memory")
    assert (memory["requests"], memory["queued"], memory["promised"]["running"]) == (0, 0, 0)
