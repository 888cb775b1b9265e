"""Many requests on one engine: each gets what it would get alone, in its turn, and no one's fault is another's."""

import random
from collections import Counter

import pytest

from edge_rt.core.engine import SequenceBatch
from edge_rt.core.generate import scheduler
from edge_rt.core.generate.scheduler import Scheduler
from edge_rt.errors import OptionError, OutOfMemory
from edge_rt.testing.null_device import NullEngine
from edge_rt.types import PRIORITIES, Delta, Done


@pytest.fixture(scope="module")
def model(shared_null_model):
    return shared_null_model


class Locked:
    """An engine that is called by nobody without the lock: sessions outside the batch use it too."""

    def __init__(self, engine, lock):
        self.engine, self.lock = engine, lock

    def __getattr__(self, name):
        assert name == "info" or self.lock._is_owned(), f"{name} was called without the lock"
        return getattr(self.engine, name)


class Requests:
    """Requests of a batch, with what became of them."""

    def __init__(self, model):
        self.model, self.batch = model, Scheduler(Locked(model.engine, model.lock), model.lock)
        self.text, self.done, self.errors, self.running, self.sessions = Counter(), {}, {}, {}, {}

    def add(self, name, prompt, *, priority="normal", take=lambda event: True, **options):
        session = self.sessions[name] = self.sessions.get(name) or self.model.session()
        job, steps = session.begin(prompt, temperature=0, **options)
        self.text[name] = ""

        def deliver(event):
            if isinstance(event, Delta):
                self.text[name] += event.text
            if isinstance(event, Done):
                self.done[name] = event
            return take(event)

        def ended(error):
            session.end(job)
            self.errors[name] = error

        self.running[name] = self.batch.add(job, steps, deliver, ended, priority)

    def finish(self):
        while self.batch.step():
            pass
        assert len(self.batch) == 0

    def close(self):
        for one in self.running.values():
            self.batch.drop(one)
        for session in self.sessions.values():
            session.close()


@pytest.fixture
def requests(model):
    found = Requests(model)
    yield found
    found.close()


def alone(model, prompt, **options):
    with model.session() as session:
        return "".join(event.text for event in session.generate(prompt, temperature=0, **options) if isinstance(event, Delta))


@pytest.mark.parametrize("seed", range(8))
def test_everyone_gets_what_they_would_get_alone(model, requests, seed):
    chance = random.Random(seed)
    asked = {
        n: ("".join(chance.choices("abc ", k=chance.randrange(1, 120))), chance.randrange(1, 40)) for n in range(chance.randrange(1, 24))
    }
    for name, (prompt, most) in asked.items():
        requests.add(name, prompt, max_tokens=most, priority=chance.choice(list(PRIORITIES)), speculate=chance.choice((0, 4)))
        for _ in range(chance.randrange(6)):
            requests.batch.step()
    requests.finish()
    assert {name: (requests.text[name], requests.errors[name]) for name in asked} == {
        name: (alone(model, prompt, max_tokens=most), None) for name, (prompt, most) in asked.items()
    }


def sizes(monkeypatch):
    """Tokens of each part of each step that the engine takes from now on."""
    seen = []
    step = NullEngine.step

    def noted(self, parts):
        seen.append([len(part.tokens) for part in parts])
        return step(self, parts)

    monkeypatch.setattr(NullEngine, "step", noted)
    return seen


def test_who_decodes_is_not_held_up_by_a_long_prompt(requests, monkeypatch):
    requests.add("first", "a", max_tokens=60)
    requests.batch.step()
    requests.batch.step()
    seen = sizes(monkeypatch)
    requests.batch._decoding, requests.batch._a_prompt_token = {1: 1.0}, 0.2  # ten prompt tokens may come, or eight at a time
    monkeypatch.setattr(Scheduler, "_learn", lambda *_: None)
    requests.add("long", "q" * 100, max_tokens=5)
    requests.finish()
    both = [step for step in seen if len(step) == 2]
    assert [sorted(step) for step in both[:6]] == [[1, 8]] * 6
    assert max(map(max, both)) == 8
    assert len([step for step in seen if step == [1]]) > 30


def test_a_prompt_alone_is_read_as_fast_as_the_engine_can(requests, monkeypatch):
    seen = sizes(monkeypatch)
    requests.add("long", "r" * 100, max_tokens=1)
    requests.finish()
    assert max(map(max, seen)) == requests.model.info.chunk == 64


def test_more_requests_than_a_step_carries_take_turns(requests, monkeypatch):
    monkeypatch.setattr(scheduler, "MAX_PARTS", 3)
    seen = sizes(monkeypatch)
    for n in range(7):
        requests.add(n, "ab", max_tokens=20, ignore_eos=True)
    for _ in range(20):
        requests.batch.step()
    assert max(map(len, seen)) == 3
    counts = [one.job.completion for one in requests.running.values()]
    assert max(counts) - min(counts) <= 1
    requests.finish()


def test_priority_is_a_share(requests, monkeypatch):
    monkeypatch.setattr(scheduler, "MAX_PARTS", 1)
    for name in ("high", "low"):
        requests.add(name, "ab", max_tokens=200, priority=name, ignore_eos=True)
    for _ in range(100):
        requests.batch.step()
    high, low = (requests.running[name].job.completion for name in ("high", "low"))
    assert low >= 4, "no one starves"
    assert high > 10 * low


def test_who_does_not_take_events_waits_and_holds_up_nobody(requests):
    events = []
    requests.add("slow", "ab", max_tokens=9, ignore_eos=True, take=lambda event: events.append(event) or False)
    requests.add("quick", "cd", max_tokens=9, ignore_eos=True)
    while requests.batch.step():
        pass
    assert (len(events), "slow" in requests.done, requests.done["quick"].usage.completion_tokens) == (1, False, 9)
    while "slow" not in requests.done:
        before = len(events)
        requests.batch.resume(requests.running["slow"])
        requests.batch.step()
        assert len(events) <= before + 1
    requests.batch.resume(requests.running["slow"])
    assert len(requests.batch) == 0


def test_a_cancelled_request_ends_within_a_step_even_while_its_prompt_is_read(requests):
    requests.add("other", "ab", max_tokens=50, ignore_eos=True)
    requests.batch.step()
    requests.batch.step()
    requests.add("long", "b" * 300, max_tokens=50)
    requests.batch.step()
    assert requests.running["long"].fed
    requests.sessions["long"].cancel()
    requests.batch.step()
    assert (requests.done["long"].reason, requests.errors["long"]) == ("cancelled", None)
    requests.add("long", "b" * 300, max_tokens=5)  # the session is as it was
    requests.finish()
    assert requests.text["long"] == alone(requests.model, "b" * 300, max_tokens=5)


def test_a_dropped_request_frees_its_session(requests):
    requests.add("gone", "ab", max_tokens=50, ignore_eos=True)
    requests.batch.step()
    requests.batch.drop(requests.running["gone"])
    assert (len(requests.batch), requests.errors) == (0, {"gone": None})
    requests.add("gone", "ab", max_tokens=5)
    requests.finish()


def test_a_failing_step_fails_only_the_one_whose_fault_it_is(requests, monkeypatch):
    step = NullEngine.step
    for name in ("good", "bad", "fine"):
        requests.add(name, name, max_tokens=8, ignore_eos=True)
    bad = requests.running["bad"].job.window.sequence

    def failing(self, parts):
        if any(part.sequence == bad for part in parts):
            raise OutOfMemory("no cells are left")
        return step(self, parts)

    monkeypatch.setattr(NullEngine, "step", failing)
    requests.finish()
    assert isinstance(requests.errors.pop("bad"), OutOfMemory)
    assert requests.errors == {"good": None, "fine": None}
    monkeypatch.undo()
    assert requests.text["good"] == alone(requests.model, "good", max_tokens=8, ignore_eos=True)
    requests.add("bad", "bad", max_tokens=8, ignore_eos=True)
    requests.finish()


def test_memory_that_can_be_freed_is_freed_first(requests, monkeypatch):
    step, short = NullEngine.step, [True]

    def relieve():
        short[0] = False
        return True

    requests.add("one", "ab", max_tokens=4, ignore_eos=True)
    requests.running["one"].job.relieve = relieve

    def failing(self, parts):
        if short[0]:
            raise OutOfMemory("no cells are left")
        return step(self, parts)

    monkeypatch.setattr(NullEngine, "step", failing)
    requests.finish()
    assert (requests.errors, requests.done["one"].usage.completion_tokens) == ({"one": None}, 4)


def test_a_session_answers_one_request_at_a_time(requests):
    requests.add("one", "ab", max_tokens=4)
    with pytest.raises(OptionError, match="the session is answering another request"):
        requests.add("one", "ab", max_tokens=4)
    requests.finish()


def test_how_long_a_step_should_take_is_known_while_it_is_under_way(requests, monkeypatch):
    seen, step = [], NullEngine.step

    def noted(self, parts):
        seen.append(requests.batch.expected)
        return step(self, parts)

    monkeypatch.setattr(NullEngine, "step", noted)
    requests.add("first", "a", max_tokens=3)
    requests.finish()
    requests.batch._decoding, requests.batch._a_prompt_token = {1: 1.0}, 0.25
    requests.add("second", "abc", max_tokens=2)
    requests.finish()
    assert seen[:2] == [None, None], "there was none of its kind"
    assert seen[3] == 1.0 + 4 * 0.25
    assert 0 < seen[4] <= 1.0
    assert requests.batch.expected is None


@pytest.mark.parametrize(
    ("may", "come"), [(0, 2), (2, 2), (3, 4), (8, 8), (15, 12), (17, 16), (40, 40), (63, 56), (64, 64), (100, 64), (1000, 64)], ids=str
)  # fmt: skip
def test_prompt_tokens_come_in_few_different_numbers(requests, may, come):
    """An engine keeps what it builds for a step. As many as may come, rounded down; at least four, or two where those take long."""
    requests.batch._decoding, requests.batch._a_prompt_token = {1: 1.0}, (scheduler.STRETCH - 1) / (may + 0.5)
    requests.add("decodes", "a", max_tokens=60)
    requests.batch._running[0].part = SequenceBatch(0, [1], "all")
    assert requests.batch._prompt_tokens() == come


def test_who_decodes_alone_is_slowed_as_if_those_who_wait_decoded_already(requests):
    """Their prompts are read the sooner, and then all decode together. How long such a step takes is known, or guessed from others."""
    found = []
    for number in range(4):
        requests.add(number, "a", max_tokens=60)
        requests.batch._running[number].part = SequenceBatch(number, [1] if number == 0 else [1] * 50, "none" if number else "all")
        requests.batch._decoding, requests.batch._a_prompt_token = {1: 1.0}, 0.05
        guessed = requests.batch._prompt_tokens()
        requests.batch._decoding[number + 1] = 1.0
        found.append((guessed, requests.batch._prompt_tokens()))
    guessed, known = zip(*found, strict=True)
    assert guessed == tuple(sorted(guessed))
    assert guessed[-1] > guessed[0]
    assert known == (24, 24, 24, 24), "such steps take no longer here"
