"""The benches of the daemon: that they see what they are to find. What they measure is proven by running them."""

from __future__ import annotations

import itertools
import mmap
import os
import random
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from bench.__main__ import BENCHMARKS, SERVE
from bench.report import Kinds, pages, render
from bench.serve import hostile, isolation, soak
from bench.serve.conversations import Turn
from bench.serve.hostile import Bystander, Hurt
from bench.serve.served import Held, held, quantile, refused
from bench.serve.soak import Gate, Sample, judge
from bench.serve.tally import Tally

MIB = 1 << 20


def test_every_bench_of_the_daemon_has_its_place_on_the_page() -> None:
    assert {name for name in BENCHMARKS if name.startswith("serve-")} == set(SERVE)
    text = render({}, pages(Kinds([], [], [], SERVE))[-1])
    assert text.startswith("# What the daemon stands")
    assert all(f"`serve-{name}`" in text for name in ("start", "idle", "faults", "isolation", "hostile", "soak", "throughput", "fairness"))


def test_a_tally_counts_and_shows_what_failed() -> None:
    tally = Tally()
    tally.check("alive", True)
    assert tally.result("x", "all", ["alive"]).ok
    assert not tally.result("x", "all", ["alive", "never checked"]).ok
    tally.check("alive", False, "it has ended")
    found = tally.result("x", "all", ["alive"], ["a note"])
    assert (found.ok, found.shown, found.notes) == (False, "alive 1 of 2", ["a note", "alive: it has ended"])


def test_what_a_process_holds() -> None:
    before = held(os.getpid())
    kept = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # malloc may have as much left from earlier tests
    kept.write(os.urandom(8 * MIB))
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    with open(os.devnull):
        after = held(os.getpid())
    done.set()
    thread.join()
    assert after.anonymous - before.anonymous > 6 * MIB
    assert (after.descriptors, after.threads) == (before.descriptors + 1, before.threads + 1)
    assert len(kept) == 8 * MIB
    with pytest.raises(RuntimeError, match="cannot be told"):
        held(2**22 + 1)


def test_a_quantile_is_a_value_of_the_sample() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([float(i) for i in range(100)], 0.99) == 99.0
    with pytest.raises(ValueError, match="nothing"):
        quantile([], 0.5)


def test_a_daemon_without_a_setting_says_so() -> None:
    assert refused("hung_after = 1\n") is None
    assert "no_such_rule" in (refused("no_such_rule = 1\n") or "")


# ---- the soak --------------------------------------------------------------------------------------------------------


def samples(leak: float = 0.0, threads: int = 1, descriptors: int = 12, named: int = 0) -> list[Sample]:
    """Twenty minutes; ``leak``: bytes a minute of the daemon, after five minutes of filling caches."""
    found = []
    for minute in range(1, 21):
        grown = int(min(minute, 5) * 4 * MIB + max(0, minute - 5) * leak)
        more = minute > 15
        daemon = Held(15 * MIB + grown, descriptors if more else 12, threads if more else 1)
        found.append(Sample(minute * 60.0, daemon, Held(200 * MIB + minute * named, 6, 4), 100.0, minute * named))
    return found


def verdicts(found: list[Sample]) -> dict[str, bool | None]:
    return {result.name.removeprefix("soak: "): result.ok for result in judge(found)}


def test_caches_that_fill_and_what_the_worker_names_are_no_leak() -> None:
    found = verdicts(samples(leak=10_000, named=3 * MIB))
    assert found["growth of RssAnon and swap, daemon and worker"] is True
    assert (found["descriptors"], found["threads"]) == (True, True)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"leak": 150_000}, "growth of RssAnon and swap, daemon and worker"),
        ({"threads": 2}, "threads"),
        ({"descriptors": 13}, "descriptors"),
    ],
)
def test_what_grows_is_seen(change: dict[str, Any], name: str) -> None:
    found = verdicts(samples(**change))
    assert [which for which, ok in found.items() if ok is False] == [name]


def test_a_soak_that_was_too_short_proves_nothing() -> None:
    assert [result.ok for result in judge(samples()[:3])] == [False]
    assert [result.ok for result in judge([])] == [False]


def test_a_gate_waits_for_those_inside() -> None:
    gate, rounds = Gate(), itertools.count()

    def work() -> None:
        while gate.enter():
            next(rounds)
            gate.leave()

    workers = [threading.Thread(target=work) for _ in range(3)]
    for one in workers:
        one.start()
    for _ in range(20):
        gate.open()
        gate.shut()
        before = next(rounds)
        assert next(rounds) == before + 1
    gate.shut(over=True)
    for one in workers:
        one.join(5)
        assert not one.is_alive()


def test_what_a_client_did_not_expect_is_an_error_of_the_soak() -> None:
    actors: Any = [SimpleNamespace(name="chats", rounds=3, wrong=[]), SimpleNamespace(name="binds", rounds=1, wrong=["a bad text"])]
    assert soak._errors(actors[:1], 0, "edge-rt listens at x\n").ok
    assert not soak._errors(actors, 0, "edge-rt listens at x\n").ok
    assert not soak._errors(actors[:1], 1, "edge-rt listens at x\n").ok
    assert not soak._errors(actors[:1], 0, "edge-rt listens at x\nERROR edge_rt.daemon: generate failed\n").ok


# ---- isolation -------------------------------------------------------------------------------------------------------


def talk(*words: str) -> Any:
    """What the checks of the isolation bench see, without a daemon."""
    found = isolation.Soak.__new__(isolation.Soak)
    found.tally, found.words, found.did, found.turns = Tally(), set(words), isolation.Counter(), []
    found._probed = set()
    return found


def conversation(user: str, word: str, **more: Any) -> Any:
    return SimpleNamespace(user=user, word=word, messages=[{"role": "system", "content": word}], client=None, session=None, **more)


def test_another_conversations_word_is_heard() -> None:
    found, mine = talk("QWERTZUIO", "ASDFGHJKL"), conversation("tcp", "ASDFGHJKL")
    found.heard(mine, "my own word is ASDFGHJKL")
    found.heard(None, "nobody's")
    assert not found.tally.failures
    found.heard(mine, "as was said, QWERTZ")
    found.heard(None, "edge_rt_sessions{word=ASDFGHJKL}")
    assert found.tally.failures[isolation._LEAK] == 2
    assert not isolation._crossing(found, 2).ok


def test_tokens_reused_across_users_are_seen_and_ones_own_are_not_asked_twice() -> None:
    found = talk("QWERTZUIO")
    reused = iter([0, 40])
    asking = conversation("tcp", "x", fresh=lambda _: Turn([], "a", (), next(reused), True, "a"))
    found.probe(asking, conversation("socket", "QWERTZUIO"))
    found.probe(asking, conversation("socket", "QWERTZUIO"))
    assert not found.tally.failures
    found.probe(asking, conversation("socket", "ASDFGHJKL"))
    assert sum(found.tally.failures.values()) == 1


# ---- hostile clients -------------------------------------------------------------------------------------------------


def gaps(seconds: float, slow: float = 0.0) -> list[float]:
    """A thousand gaps, of which two in a hundred are slow."""
    chance = random.Random(1)
    return [slow if slow and i % 50 == 0 else seconds * chance.uniform(0.95, 1.05) for i in range(1000)]


@pytest.mark.parametrize(
    ("hurt", "ok"),
    [
        (Hurt(gaps(0.01), 5 * MIB, {}), True),
        (Hurt(gaps(0.013), 5 * MIB, {}), False),  # all gaps are longer
        (Hurt(gaps(0.01, slow=0.05), 5 * MIB, {}), False),  # a few are
        (Hurt(gaps(0.01), 200 * MIB, {}), False),
        (Hurt([], 0, {}), False),  # no token came
    ],
)
def test_an_attack_that_hurts_others_is_seen(hurt: Hurt, ok: bool) -> None:
    assert hostile._result("flood of requests", hurt, gaps(0.01)).ok is ok


def test_who_shares_fairly_may_slow_others_down() -> None:
    assert hostile._result(hostile._SHARING[0], Hurt(gaps(0.1), 0, {}), gaps(0.01)).ok


def test_a_bystander_that_is_answered_wrongly_says_so() -> None:
    from edge_rt.types import Delta

    found = Bystander.__new__(Bystander)
    found._expected, found.gaps, found.wrong, found.enough = "the sea is wide", [], [], threading.Event()
    client: Any = SimpleNamespace(generate=lambda *_, **__: iter([Delta("the sea "), Delta("is wide and deep")]))
    found._listen(client)
    assert (found.wrong, len(found.gaps)) == ([], 1)
    client.generate = lambda *_, **__: iter([Delta("the sea "), Delta("said another")])
    found._listen(client)
    assert len(found.wrong) == 1
