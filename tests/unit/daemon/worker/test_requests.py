"""Requests in the worker: the queue for memory, long prompts on another thread, cancellation."""

import threading
import time

import pytest
from worker_host import Host

from edge_rt.daemon.worker import requests as admission
from edge_rt.daemon.worker.memory import MemoryRequest
from edge_rt.daemon.worker.requests import AdmissionQueue, QueueCallbacks, QueuedRequest
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing.null_device import NullEngine, NullPlugin

CELL = NullEngine.cell_bytes


@pytest.fixture(scope="module")
def host(random_model):
    with pytest.MonkeyPatch.context() as patch:
        registry = Registry.load(entry_points=False, plugins={"null": NullPlugin()})
        patch.setattr(Registry, "load", lambda: registry)
        patch.setattr(admission, "PATIENCE", 0.05)
        model = random_model()
        yield lambda *given, **more: Host(model, *given, engine="null", device="null", **more)


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


HUGE = "".join(f"Line {i} says that {i * i} people came.\n\n" for i in range(700))  # some 30,000 tokens; the context has 4,096


class Gate:
    """A grader that waits at its first segment until it is let go."""

    def __init__(self, host):
        model = host.worker._opened
        self._grade, self.reached, self.open = model.grader(), threading.Event(), threading.Event()
        self.threads = set()
        model._grade = self

    def __call__(self, segment):
        self.threads.add(threading.current_thread())
        self.reached.set()
        assert self.open.wait(20)
        return self._grade(segment)


def outcome(host, number):
    """All that is said of a request but how long it took."""
    return [{k: v for k, v in one.items() if k not in ("id", "timings", "seed")} for one in host.said[number]]


def alone(host, prompt, **options):
    """What a request is told when nobody else asks anything."""
    one = host()
    number = one.ask(prompt, max_tokens=20, **options)
    one.until(number)
    return outcome(one, number)


def test_others_go_on_while_a_huge_prompt_begins(host):
    one = host()
    gate = Gate(one)
    other = one.ask("b" * 30, max_tokens=3000)
    huge = one.ask(HUGE, max_tokens=20)
    while not gate.reached.wait(0.005):  # the thread gets its turn, or 3,000 steps are over before it began
        one.step()
    before = len(one.events(other, "delta"))
    for _ in range(200):
        one.step()
    assert len(one.events(other, "delta")) == before + 200
    assert not one.events(huge, "prompt_progress")
    assert gate.threads.isdisjoint({threading.current_thread()})
    gate.open.set()
    one.until(huge, other)
    assert one.answer(huge)["ok"] == {}
    assert outcome(one, huge) == alone(host, HUGE)
    assert len(one.events(other, "delta")) == 3000


@pytest.mark.parametrize("options", [{}, {"prune": {"budget": 300, "unit": "cells"}}, {"speculate": 4}, {"context": 700}])
@pytest.mark.parametrize("chat", [False, True])
def test_the_outcome_is_that_of_a_session_that_begins_at_once(host, options, chat):
    one = host()
    model = one.worker._opened
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": HUGE}, {"role": "assistant", "content": "So?"}]
    prompt = [*messages, {"role": "user", "content": "How many came in line 77?"}] if chat else HUGE
    fields = {"messages" if chat else "prompt": prompt}
    asked = {"temperature": 0, "ignore_eos": True, "max_tokens": 20, **options}
    number = one.do("generate", credits=100_000, options=asked, priority="normal", owner="o", **fields)
    one.until(number)
    given_options = dict(asked)
    if "prune" in options:
        from edge_rt.types import Pruning

        given_options["prune"] = Pruning(300, "cells")
    with model.session() as session:
        events = list(session.generate(prompt, **given_options))
        text = "".join(getattr(event, "text", "") for event in events)
    assert one.text(number) == text
    (done,) = one.events(number, "done")
    assert done["context"] == events[-1].context._asdict()
    notices = [event.message for event in events if type(event).__name__ == "Notice"]
    assert [event["message"] for event in one.events(number, "notice")] == notices


@pytest.mark.parametrize("what", ["cancel", "drop", "close"])
def test_a_request_that_begins_can_be_ended(host, what):
    one = host()
    gate = Gate(one)
    one.do("open_session", session="x", owner="o")
    huge = one.ask(HUGE, "x", max_tokens=20)
    while not gate.reached.is_set():
        one.step()
        time.sleep(0.001)
    assert one.answer(one.do("park_session", session="x"))["error"]["code"] == "busy"
    if what == "close":
        one.do("close_session", session="x")
        assert one.ok("memory")["sessions"] == 0
    else:
        one.tell(what, huge)
    assert one.answer(huge) is None
    gate.open.set()
    (answer,) = one.until(huge)
    if what == "cancel":
        assert answer["ok"] == {}
        assert one.events(huge, "done")[0]["reason"] == "cancelled"
    else:
        assert answer["error"]["code"] == "cancelled"
    assert not one.events(huge, "delta")
    assert not one.budget.reservations
    if what != "close":
        again = one.ask("a" * 50, "x", max_tokens=5)
        one.until(again)
        assert one.text(again)
        one.do("close_session", session="x")
    one.until(one.ask("b" * 50, max_tokens=5))
    assert len(one.engine._sequences) == len(one.worker._opened.prefixes.sequences)
    assert len(one.worker.requests) == 0


def test_a_grader_that_fails_ends_its_own_request_alone(host):
    one = host()
    other = one.ask("b" * 30, max_tokens=500)

    def broken(segment):
        raise ZeroDivisionError("a bad grader")

    one.worker._opened._grade = broken
    huge = one.ask(HUGE, max_tokens=20)
    (error,) = one.until(huge)
    assert "error" in error
    assert not [reservation for reservation in one.budget.reservations if reservation.session is None or reservation.need.cells > 1000]
    one.until(other)
    assert one.answer(other)["ok"] == {}
    assert one.ok("memory")["requests"] == 0
