"""Requests and the memory of the worker: who begins, who waits, who is parked, and that nothing is lost or promised twice."""

import gc
import weakref
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from worker_host import Host

from edge_rt.core.engine import PredictsMemory
from edge_rt.daemon.sessions import SessionRegistry
from edge_rt.daemon.worker import requests as admission
from edge_rt.daemon.worker.memory import MemoryRequest
from edge_rt.daemon.worker.requests import AdmissionQueue, QueueCallbacks, QueuedRequest
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


def test_the_null_engine_predicts():
    assert isinstance(NullEngine(), PredictsMemory)


def test_without_an_allowance_all_begin(host):
    one = host()
    asked = [one.ask("a" * 100, max_tokens=50) for _ in range(20)]
    memory = one.ok("memory")
    assert (memory["requests"], memory["queued"], memory["allowance"]) == (20, 0, None)
    one.until(*asked)
    assert not any(one.events(number, "queued") for number in asked)


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


def test_who_does_not_fit_waits_and_is_told(host):
    one = host(allowance=300 * CELL)
    first = one.ask("a" * 99, max_tokens=100)  # 200 cells
    second = one.ask("b" * 99, max_tokens=100)
    third = one.ask("c" * 39, max_tokens=20)  # 60 fit beside the first
    one.step()
    (queued,) = one.events(second, "queued")
    assert (queued["needed"], queued["available"]) == (200 * CELL, 100 * CELL)
    assert not one.events(first, "queued") + one.events(third, "queued")
    assert {"short": 100 * CELL} in one.news
    one.until(first, second, third)
    assert [told for told in one.news if "short" in told][-1] == {"short": 0}
    assert one.used(second)["completion_tokens"] == 100


def test_what_never_fits_is_refused_with_numbers(host):
    one = host(allowance=300 * CELL)
    number = one.ask("a" * 299, max_tokens=100)
    assert one.answer(number) is None  # the daemon may allow more
    assert {"short": 100 * CELL} in one.news
    error = one.until(number)[0]["error"]
    assert (error["code"], error["needed"], error["available"]) == ("out_of_memory", 400 * CELL, 300 * CELL)
    assert "max_tokens" in error["message"]


def test_more_may_be_allowed_in_time_or_not(host):
    one = host(allowance=300 * CELL)
    number = one.ask("a" * 299, max_tokens=100)
    assert one.ok("allow", bytes=400 * CELL)["held"] == 0
    assert one.until(number) == [{"id": number, "ok": {}}]
    other = one.ask("b" * 399, max_tokens=100)
    one.do("allow", bytes=400 * CELL)
    assert one.answer(other)["error"]["code"] == "out_of_memory"  # at once


def test_more_may_be_allowed_for_a_text_to_embed_in_time_or_not(host):
    one = host(allowance=20 * CELL)
    asked = one.do("embed", texts=["x" * 100], credits=10)
    one.step()  # its tokens
    one.step()
    (short,) = (told["short"] for told in one.news if "short" in told)
    assert short > 80 * CELL
    one.do("allow", bytes=20 * CELL + short)
    one.until(asked)
    assert "ok" in one.answer(asked), one.answer(asked)
    one.do("allow", bytes=20 * CELL)
    asked = one.do("embed", texts=["x" * 100], credits=10)
    one.step()  # its tokens
    one.step()
    assert one.worker.wait_seconds() <= admission.PATIENCE
    one.do("allow", bytes=30 * CELL)  # there is no more
    one.step()
    error = one.answer(asked)["error"]
    assert (error["code"], error["needed"] - error["available"]) == ("out_of_memory", short - 10 * CELL)
    assert error["message"].endswith("embed a shorter text, or let the daemon use more memory")
    assert not one.budget.reservations
    assert len(one.worker.requests) == 0


def test_texts_wait_in_one_line_with_those_who_generate(host):
    one = host(allowance=300 * CELL)
    first = one.ask("a" * 99, max_tokens=100)  # 200 cells
    texts = one.do("embed", texts=["x" * 150, "y" * 150], credits=10)
    for _ in range(3):
        one.step()
    (queued,) = one.events(texts, "queued")
    assert queued["needed"] > queued["available"] > 0
    assert one.ok("memory")["queued"] == 1
    later = one.ask("b" * 99, max_tokens=150)
    one.until(first, texts, later)
    assert len(one.events(texts, "queued")) == 1, "it is told once"
    assert [message["index"] for message in one.events(texts, "embedding")] == [0, 1]
    assert (one.budget.reservations, len(one.worker.requests.queue)) == ([], 0)


def test_a_text_that_waits_leaves_when_it_is_cancelled_and_holds_up_nobody_who_reads(host):
    one = host(allowance=300 * CELL)
    first = one.ask("a" * 99, max_tokens=100)
    deaf = one.do("embed", texts=["x" * 150], credits=1)  # which the word that it waits uses up
    small = one.do("embed", texts=["y" * 20], credits=10)
    assert "ok" in one.until(small)[0]
    assert one.answer(first) is None, "it fits beside the first"
    gone = one.do("embed", texts=["z" * 150], credits=10)
    one.step()
    one.tell("cancel", gone)
    one.step()
    assert one.answer(gone)["error"]["code"] == "cancelled"
    one.until(first)
    one.worker.requests.add_credits(deaf, 5)
    one.do("resume", request=deaf, events=5)
    one.until(deaf)
    assert "ok" in one.answer(deaf)
    assert (one.budget.reservations, len(one.worker.requests), len(one.worker.requests.queue)) == ([], 0, 0)


def test_an_answer_of_unknown_length_takes_what_there_is(host):
    one = host(allowance=300 * CELL)
    number = one.ask("a" * 99)
    one.until(number)
    notice = one.events(number, "notice")[0]["message"]
    assert "free memory allows a context of 300 tokens and not 4,096" in notice
    assert one.events(number, "done")[0]["reason"] == "context_full"
    assert one.until(one.ask("b" * 290))[0]["error"]["code"] == "out_of_memory"  # too few cells for an answer


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


def test_another_worker_goes_on_with_what_was_parked(host, tmp_path):
    one = host(parked=tmp_path)
    for name in "xy":
        one.do("open_session", session=name)
        one.until(one.ask(name * 30, name, max_tokens=5))
        one.do("park_session", session=name)
    paths = {told["parked"]: told["path"] for told in one.news if "parked" in told}
    two = host(parked=tmp_path)
    assert two.ok("restore_session", session="x", path=paths["x"])["tokens"] > 30
    again = two.ask("x" * 30 + "?", "x", max_tokens=5)
    two.until(again)
    assert two.used(again)["reused_tokens"] >= 30
    for name in "xy":
        two.do("close_session", session=name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_saved_later_is_gone_on_from_and_not_what_was_parked_before(tmp_path):
    parked, saved = tmp_path / "parked", tmp_path / "saved"
    for path in (parked, saved):
        path.touch()
    sessions = SessionRegistry(9, 1.0, lambda one: None)
    hosted = SimpleNamespace(supervisor=SimpleNamespace(epoch=0))
    one = sessions.add(1, hosted, False, None)
    assert one.last_save is None
    sessions.note_parked(one.id, parked)
    assert one.last_save == parked
    sessions.note_saved(one, saved)
    assert one.last_save == saved
    sessions.note_saved(sessions.add(1, hosted, False, None), saved)  # another, in the same place
    assert one.last_save == parked
    sessions.note_saved(one, saved)
    sessions.note_parked(one.id, parked)
    assert one.last_save == parked
    parked.unlink()
    assert one.last_save == saved


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


@pytest.mark.parametrize("how", ["cancel", "drop", "close"])
def test_who_waits_may_leave(host, how):
    one = host(allowance=300 * CELL)
    one.do("open_session", session="x")
    first, second = one.ask("a" * 99, max_tokens=150), one.ask("b" * 99, "x", max_tokens=150)
    one.step()
    if how == "close":
        one.do("close_session", session="x")
    else:
        one.tell(how, second)
    assert one.answer(second)["error"]["code"] == "cancelled"
    third = one.ask("c" * 99, max_tokens=150)
    one.until(first, third)
    assert one.ok("memory")["requests"] == 0


class Units:
    """An account of ten units, each cell one."""

    def __init__(self):
        self.used = 0

    def missing(self, asked, name):
        return self.used + asked.cells - 10

    def missing_at_best(self, asked, name, *, alone):
        return asked.cells - 10 + (0 if alone else self.used)

    def free_for(self, asked, name):
        return self.missing(asked, name) <= 0

    def bytes(self, asked, name):
        return asked.cells


def test_who_was_cancelled_before_does_not_wait(host):
    one = host(allowance=300 * CELL)
    one.ask("a" * 99, max_tokens=150)
    command = {"op": "generate", "id": 77, "prompt": "b" * 99, "credits": 9, "options": {"max_tokens": 150}}
    one.worker.requests.register(command)
    one.worker.requests.cancel(77)
    one.worker.handle(command)
    assert one.answer(77)["error"]["code"] == "cancelled"


def test_nobody_is_passed_for_ever():
    units, begun = Units(), []

    def begin(one, room):
        begun.append(one.name)
        units.used += one.need.cells

    line = AdmissionQueue(units, lambda short: None)
    callbacks = QueueCallbacks(begin, lambda one, error: begun.append(error), lambda one, event: None)

    def come(name, cells, priority="normal"):
        line.add(QueuedRequest({"priority": priority}, MemoryRequest(cells, cells), name, callbacks, lambda: True))
        line.admit()

    def end(cells):
        units.used -= cells
        line.admit()

    come("first", 8)
    come("large", 10, "low")
    for number in range(12):
        come(number, 2, "high")
        if number < admission.MAX_PASSES:
            assert begun[-1] == number
            end(2)
    assert begun == ["first", *range(8)], "the others wait, though they would fit"
    end(8)
    assert begun[-1] == "large"
    come("late", 1, "high")
    end(10)
    assert begun[10:] == [8, 9, 10, 11, "late"]


def test_the_urgent_go_first_and_then_the_first():
    units, begun = Units(), []
    line = AdmissionQueue(units, lambda short: None)
    callbacks = QueueCallbacks(lambda one, room: begun.append(one.name), lambda one, error: None, lambda one, event: None)
    units.used = 10
    for name, priority in (("a", "low"), ("b", "normal"), ("c", "high"), ("d", "normal")):
        line.add(QueuedRequest({"priority": priority}, MemoryRequest(1, 1), name, callbacks, lambda: True))
    assert not line.admit()
    units.used = 0
    assert line.admit()
    assert begun == ["c", "b", "d", "a"]


def test_who_waits_is_looked_at_again_after_a_while_though_nothing_ended(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: now[0]))
    units = Units()
    line = AdmissionQueue(units, lambda short: None)
    callbacks = QueueCallbacks(lambda one, room: None, lambda one, error: None, lambda one, event: None)
    assert line.next_check() is None
    units.used = 10
    line.add(QueuedRequest({}, MemoryRequest(1, 1), "a", callbacks, lambda: True))
    line.admit()
    now[0] += admission.RETRY_SECONDS / 2
    assert line.next_check() > now[0]
    now[0] += admission.RETRY_SECONDS / 2
    assert line.next_check() <= now[0]
    line.admit()
    assert line.next_check() > now[0]


def test_events_that_nobody_takes_are_not_sent(host):
    one = host(allowance=300 * CELL)
    first, second = one.ask("a" * 99, max_tokens=150), one.ask("b" * 99, max_tokens=150, credits=1)
    one.until(first)
    for _ in range(5):
        one.step()
    assert [message["event"] for message in one.said[second]] == ["queued"]
    one.worker.requests.add_credits(second, 1000)
    one.worker.handle({"op": "resume", "request": second, "events": 1000})
    one.until(second)
    assert one.used(second)["completion_tokens"] == 150


def test_a_parked_session_comes_back_as_large_as_it_was(host, tmp_path):
    one = host(allowance=300 * CELL, parked=tmp_path)
    one.do("open_session", session="x")
    one.until(one.ask("x" * 149, "x", max_tokens=50))
    one.do("park_session", session="x")
    other = one.ask("a" * 99, max_tokens=100)
    short = one.ask("x" * 9, "x", max_tokens=10)  # 20 cells would fit, and not the 199 that come back first
    assert one.events(short, "queued")[0]["needed"] == 200 * CELL
    one.until(other, short)


def test_a_shared_beginning_that_is_copied_is_counted_beside_what_the_session_has(host):
    one = host(allowance=320 * CELL)
    one.until(one.ask("P" * 59 + "Q" * 80, max_tokens=11))  # 150 cells are kept
    one.do("open_session", session="x", owner="o")
    one.until(one.ask("z" * 89, "x", max_tokens=10))
    one.ask("P" * 59 + "R" * 80, "x", max_tokens=20)  # 60 of the 150 would be copied
    assert one.budget.held() <= one.budget.reserved() <= 320 * CELL


def test_pruned_requests_need_less(host):
    one = host(allowance=1000 * CELL)
    number = one.ask("a" * 900, max_tokens=900, prune={"budget": 100})
    one.until(number)
    assert one.events(number, "done")[0]["context"]["pruned_cells"] > 1000
    assert one.until(one.ask("a" * 900, max_tokens=900))[0]["error"]["needed"] == 1801 * CELL


def test_long_texts_are_tokenised_aside(host):
    one = host()
    other = one.ask("b" * 10, max_tokens=10)
    number, tokens = one.ask("a" * 100_000, max_tokens=3), one.do("tokenize", text="a" * 100_000)
    assert one.answer(number) is one.answer(tokens) is None
    one.until(other, number, tokens)
    assert len(one.answer(tokens)["ok"]["tokens"]) == 100_001
    assert one.used(number)["prompt_tokens"] == 100_001
    bad = one.do("generate", messages=[{"role": "user", "content": "x" * 100_000}], credits=9, options={"grammar": "root ::= ("})
    assert one.until(bad)[0]["error"]["code"] in ("constraint", "native", "context_overflow")


# ---- at random -------------------------------------------------------------------------------------------------------

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
