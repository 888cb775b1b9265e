"""`serve-faults`: workers killed and stopped, clients that vanish, requests cancelled while their prompt is read, disks that are full."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

from bench import models
from bench.results import Result, Settings
from bench.serve.failing_disk import run as failing_disk
from bench.serve.served import GREEDY, NO_RATE, Served, milliseconds, quantile, say, wait_for, worker
from bench.serve.tally import Tally
from edge_rt.daemon.client import Client
from edge_rt.daemon.client import Session as ClientSession
from edge_rt.errors import DaemonError
from edge_rt.types import Delta, Done, Event, PromptProgress

KILLS = 200
TOLD_WITHIN = 1.0
"""Seconds from a worker's death to the error of who was answered by it."""
_FATAL = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""What is sent to a whole group of processes when somebody ends the daemon: that says what becomes of its worker."""
_STREAMS = 3
_TOKENS = 48
_CONTEXT = 2048
# So short that each is read in one piece, whatever else is under way: then every bit of an answer is the same.
_PROMPTS = ("Once upon a time", "The sea is", "A list of rivers", "My name is")
_HUNG_AFTER = 1.0
_KINDS = ("daemon alive", "typed error", "text before it right", "next answer right", "saved session restored", "nothing left over")


def run(settings: Settings) -> list[Result]:
    """All faults, each against a daemon that has been hurt by those before it."""
    model = models.smollm2(settings, "Q4_1")
    config = f"{NO_RATE}hung_after = 120\n"
    with Served(model, "-c", str(_CONTEXT), config=config) as daemon:
        results = [*_deaths(daemon, settings), _survived(daemon, settings), _vanishing(daemon, settings), _cancelled(daemon, settings)]
    with Served(model, "-c", str(_CONTEXT), config=f"{NO_RATE}hung_after = {_HUNG_AFTER}\n") as daemon:
        results.append(_stopped(daemon, settings))
    return [*results, *failing_disk(model, settings)]


# ---- a worker that dies ----------------------------------------------------------------------------------------------


class _Victim(threading.Thread):
    """Takes a stream, and notes how it ended and when."""

    def __init__(self, daemon: Served, prompt: str) -> None:
        super().__init__()
        self._daemon, self._prompt = daemon, prompt
        self.text, self.error, self.at = "", "", 0.0
        self.started = threading.Event()

    def run(self) -> None:
        with self._daemon.client() as client:
            try:
                for event in client.generate(self._prompt, **GREEDY, max_tokens=1500):
                    self.started.set()
                    if isinstance(event, Delta):
                        self.text += event.text
                self.error = "it came to its end"
            except DaemonError as error:
                self.error, self.at = error.code, time.perf_counter()
        self.started.set()


def _deaths(daemon: Served, settings: Settings) -> list[Result]:
    """Kill the worker again and again, at any moment of several streams."""
    kills, chance, tally = settings.items or settings.pick(KILLS, 12), random.Random(7), Tally()
    told: list[float] = []
    back: list[float] = []
    with daemon.ready() as client:
        undisturbed = {prompt: say(client, prompt, settings.pick(200, 40)).text for prompt in _PROMPTS}
        expected = {prompt: say(client, prompt, _TOKENS).text for prompt in _PROMPTS}
        saved = client.session(keep=True)
        say(client, _PROMPTS[0], _TOKENS, session=saved)
        saved.save("before")
        goes_on = f"{_PROMPTS[0]}{expected[_PROMPTS[0]]}"
        with client.restore("before") as copy:
            continued = say(client, goes_on, 8, session=copy).text
        deaths = worker(client)["deaths"]
        for number in range(kills):
            kind = _FATAL[number % len(_FATAL)]
            _kill(daemon, client, kind, chance, tally, undisturbed, told)
            deaths += 1
            prompt, asked = chance.choice(_PROMPTS), time.perf_counter()
            answer = say(client, prompt, _TOKENS)
            back.append(answer.times[0] - asked)
            tally.check("next answer right", answer.text == expected[prompt], f"after {kind.name}: {prompt!r} {answer.text!r}")
            _restored(client, saved, goes_on, continued, tally, kind.name)
            status = client.status()
            after = (status["worker"]["deaths"], status["server"]["requests"], daemon.alive)
            tally.check("nothing left over", after == (deaths, 0, True), f"deaths, requests, alive: {after} and not {(deaths, 0, True)}")
            if number % 25 == 24:
                print(f"    {number + 1} workers killed, {sum(tally.failures.values())} checks failed", flush=True)
    names = ", ".join(one.name for one in _FATAL)
    first = tally.result(f"worker killed mid-stream {kills} times by {names}", "all right", _KINDS, [f"{_STREAMS} streams each time"])
    within = Result(
        "error after the worker's death", f"≤ {TOLD_WITHIN:g} s", "s", told, ok=bool(told) and max(told) <= TOLD_WITHIN,
        shown=f"{milliseconds(told)} of {len(told)}" if told else "none came",
    )  # fmt: skip
    return [first, within, Result("first token after a death, opening the model again included", "", "s", back, shown=milliseconds(back))]


def _kill(
    daemon: Served, client: Client, kind: signal.Signals, chance: random.Random, tally: Tally, undisturbed: dict[str, str],
    told: list[float],
) -> None:  # fmt: skip
    """Let some streams begin, end the worker by a signal, and hear what each is told."""
    prompts = chance.sample(_PROMPTS, _STREAMS)
    victims = [_Victim(daemon, prompt) for prompt in prompts]
    for one in victims:
        one.start()
    if chance.random() < 0.8:  # else while prompts are read, or before
        for one in victims:
            one.started.wait(30)
    time.sleep(chance.random() * 0.5)
    pid = worker(client)["pid"]
    at = time.perf_counter()
    os.kill(pid, kind)
    for one, prompt in zip(victims, prompts, strict=True):
        one.join(60)
        tally.check("daemon alive", daemon.alive, f"{kind.name}: {daemon.log()[-300:]}")
        if tally.check("typed error", one.error == "worker_died", f"{kind.name}: {one.error or 'no end'}"):
            told.append(one.at - at)
        whole = undisturbed[prompt]
        same = whole.startswith(one.text) or one.text.startswith(whole)
        tally.check("text before it right", same, f"{prompt!r}: {one.text[:200]!r} and not {whole[:200]!r}")


def _restored(client: Client, saved: ClientSession, prompt: str, expected: str, tally: Tally, name: str) -> None:
    """The session goes on from its save: with its text, and without computing what it holds."""
    try:
        answer = say(client, prompt, 8, session=saved)
    except DaemonError as error:
        tally.check("saved session restored", False, f"after {name}: {error.code}: {error}")
        return
    reused = answer.done.usage.reused_tokens
    right = answer.text == expected and reused >= _TOKENS
    tally.check("saved session restored", right, f"after {name}: {reused} tokens reused, {answer.text!r} and not {expected!r}")


def _survived(daemon: Served, settings: Settings) -> Result:
    """Signals that are meant for the daemon do not change an answer."""
    tally = Tally()
    with daemon.ready() as client:
        expected = say(client, _PROMPTS[0], 60).text
        for number in range(settings.pick(12, 3)):
            kind = _IGNORED[number % len(_IGNORED)]
            events, text = client.generate(_PROMPTS[0], **GREEDY, max_tokens=60), ""
            for event in events:
                if isinstance(event, Delta):
                    if not text:
                        os.kill(worker_pid(daemon), kind)
                    text += event.text
            tally.check("answer unchanged", text == expected, f"{kind.name}: {text!r}")
    names = ", ".join(one.name for one in _IGNORED)
    return tally.result(f"{names} sent to the worker mid-stream", "the answer goes on", ["answer unchanged"])


def worker_pid(daemon: Served) -> int:
    """Of the worker now, over a connection of its own."""
    with daemon.client() as client:
        found: int = worker(client)["pid"]
        return found


def _stopped(daemon: Served, settings: Settings) -> Result:
    """A worker that does not move is ended by the watchdog."""
    tally, seconds = Tally(), []
    with daemon.ready() as client:
        expected = say(client, _PROMPTS[1], _TOKENS).text
        for _ in range(settings.pick(10, 2)):
            victim = _Victim(daemon, _PROMPTS[0])
            victim.start()
            victim.started.wait(30)
            at = time.perf_counter()
            os.kill(worker(client)["pid"], signal.SIGSTOP)
            victim.join(60)
            if tally.check("worker_hung", victim.error == "worker_hung", victim.error):
                seconds.append(victim.at - at)
            text = say(client, _PROMPTS[1], _TOKENS).text
            tally.check("next answer right", text == expected, repr(text))
    most = _HUNG_AFTER + TOLD_WITHIN
    tally.check("in time", bool(seconds) and max(seconds) <= most, f"{max(seconds, default=0):.2f} s")
    said = f"hung_after = {_HUNG_AFTER:g} s; told after {milliseconds(seconds)}" if seconds else "nobody was told"
    kinds = ["worker_hung", "next answer right", "in time"]
    return tally.result("worker stopped (SIGSTOP) mid-stream", f"told ≤ {most:g} s", kinds, [said])


# ---- clients that leave ----------------------------------------------------------------------------------------------


class _Witness(threading.Thread):
    """Another client's stream: each of its tokens is a step that has ended."""

    def __init__(self, daemon: Served) -> None:
        super().__init__()
        self._daemon = daemon
        self.times: list[float] = []
        self.enough = threading.Event()

    def run(self) -> None:
        with self._daemon.client() as client:
            while not self.enough.is_set():
                events: Iterator[Event] = client.generate(_PROMPTS[2], **GREEDY, max_tokens=1800)
                for event in events:
                    if isinstance(event, Delta):
                        self.times.append(time.perf_counter())
                    if self.enough.is_set():
                        break

    def steps(self, begin: float, end: float) -> int:
        """Steps that ended between two times."""
        return sum(begin < at <= end for at in self.times)


STEPS = 2
"""Steps that may end between a client's leaving and its slot being free: the one under way then, and one more."""


def _vanishing(daemon: Served, settings: Settings) -> Result:
    """A client's connection breaks while it is answered; another's tokens count the steps until its slot is free."""
    chance, steps, seconds = random.Random(3), [], []
    with daemon.ready() as client:
        witness = _Witness(daemon)
        witness.start()
        try:
            wait_for(lambda: len(witness.times) > 3, 30, "the witness hears nothing")
            for _ in range(settings.pick(50, 6)):
                wait_for(lambda: client.status()["server"]["requests"] == 1, 30, "the slot is not free")
                leaves = daemon.client()
                events = leaves.generate(_PROMPTS[0], **GREEDY, max_tokens=1800)
                for _ in range(chance.randrange(2, 12)):
                    next(events)
                at = time.perf_counter()
                leaves.close()
                wait_for(lambda: client.status()["server"]["requests"] <= 1, 30, "the slot is not free", 0)
                freed = time.perf_counter()
                seconds.append(freed - at)
                time.sleep(0.05)  # what the witness was sent by then has reached it
                steps.append(float(witness.steps(at, freed)))
        finally:
            witness.enough.set()
            witness.join(60)
    shown = f"p50 {quantile(steps, 0.5):.0f}, max {max(steps):.0f} steps of {len(steps)} times; {milliseconds(seconds)}"
    note = "counted by the tokens of another client, from the closing of the connection until the status shows one request fewer"
    return Result(
        "client vanishes mid-stream: steps until its slot is free", f"≤ {STEPS}: the one under way, and one", "steps", steps,
        ok=max(steps) <= STEPS, shown=shown, notes=[note],
    )  # fmt: skip


def _cancelled(daemon: Served, settings: Settings) -> Result:
    """Cancelled while a long prompt is read: how much of it is read after that."""
    chunks, seconds, tally = [], [], Tally()
    with daemon.ready() as client:
        for number in range(settings.pick(20, 3)):
            prompt = f"{number} " + "far away " * 900
            answers = client._send("generate", {"prompt": prompt, "options": {"max_tokens": 5, "temperature": 0}})
            while answers.next_event() is None:
                client._receive()
            at = time.perf_counter()
            client._send("cancel", {"request": answers.request})
            more, reason = 0, ""
            while not answers.over or answers.events:
                event = answers.next_event()
                more += isinstance(event, PromptProgress)
                reason = event.reason if isinstance(event, Done) else reason
                if event is None:
                    client._receive()
            seconds.append(time.perf_counter() - at)
            chunks.append(float(more))
            tally.check("ended as cancelled", reason == "cancelled", reason or "no last event")
    ok = max(chunks) <= 1 and not tally.failures
    shown = f"p50 {quantile(chunks, 0.5):.0f}, max {max(chunks):.0f} chunks more; {milliseconds(seconds)}"
    return Result(
        "cancelled while 1,800 tokens are read: chunks read after that", "≤ 1: the one under way", "chunks", chunks, ok=ok, shown=shown,
        notes=tally.examples,
    )  # fmt: skip
