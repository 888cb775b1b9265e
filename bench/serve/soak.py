"""`serve-soak`: a mixed load for twenty minutes, and whether anything grows.

Once a minute all clients pause and close their sessions, and the model cools down, where the daemon does that. What the daemon and its
worker hold then, they hold for nobody. Where it does not, the worker keeps caches and graphs for whoever comes next: what it names as
these is not counted.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from statistics import linear_regression, median
from typing import NamedTuple

from bench import models
from bench.results import Result, Settings
from bench.serve.load import ACTORS, Unexpected, metrics, write_rules
from bench.serve.served import NO_RATE, Held, Served, held, mapped, refused, wait_for, worker
from bench.serve.tally import Tally
from edge_rt.daemon.client import Client
from edge_rt.errors import DaemonError

MINUTES = 20.0
GROWTH = 1 << 20
"""Bytes of RssAnon and swap by which the daemon and its worker together may grow after the warm-up."""
WARM_UP = 0.25
"""The part of the time, and five minutes at most, in which caches fill and allocators find their size."""
_MOST_WARM_UP = 300.0
_CONTEXT = 2048
_LITTLE = 60 << 20
"""Bytes of files in the worker's page table: more than its libraries, less than the model."""
_COOL = "cool_after = 3\n"
_QUIET = 60.0
"""Seconds in which clients come to the end of what they are at."""


class Sample(NamedTuple):
    """What was held while nobody asked for anything. ``at``: seconds of the soak. ``tokens``: made since the last sample, a second.

    ``named``: bytes that the worker says are caches and graphs; 0 where they were given back.
    """

    at: float
    daemon: Held
    worker: Held
    tokens: float
    named: int = 0


class Gate:
    """Lets actors work, or has them wait between two of their rounds."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._open, self._over, self._inside = False, False, 0

    def enter(self) -> bool:
        """Wait until work may begin; False when there is no more."""
        with self._change:
            self._change.wait_for(lambda: self._open or self._over)
            self._inside += not self._over
            return not self._over

    def leave(self) -> None:
        """A round is over."""
        with self._change:
            self._inside -= 1
            self._change.notify_all()

    def open(self) -> None:
        """Let them work."""
        with self._change:
            self._open = True
            self._change.notify_all()

    def shut(self, *, over: bool = False) -> None:
        """Let nobody begin, and wait for those who have. Raises RuntimeError if they do not come to an end."""
        with self._change:
            self._open, self._over = False, self._over or over
            self._change.notify_all()
            if not self._change.wait_for(lambda: self._inside == 0, _QUIET):
                raise RuntimeError("clients of the soak do not come to an end")


class Actor(threading.Thread):
    """One client, again and again. What it did not expect is kept."""

    def __init__(self, number: int, act: Callable[[Served, random.Random], None], daemon: Served, gate: Gate) -> None:
        super().__init__(name=act.__name__, daemon=True)
        self._act, self._daemon, self._gate = act, daemon, gate
        self._chance = random.Random(number)
        self.rounds = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        while self._gate.enter():
            try:
                self._act(self._daemon, self._chance)
                self.rounds += 1
            except (DaemonError, OSError, Unexpected) as error:
                self.wrong.append(f"{self.name}: {type(error).__name__}: {error}"[:300])
                time.sleep(0.1)
            finally:
                self._gate.leave()


def run(settings: Settings) -> list[Result]:
    """Soak a daemon, and judge what was sampled."""
    minutes = settings.minutes or settings.pick(MINUTES, 1.0)
    cools = refused(_COOL) is None
    config = f'rules = "rules.toml"\n{NO_RATE}{_COOL if cools else ""}'
    daemon = Served(models.smollm2(settings, "Q4_1"), "-c", str(_CONTEXT), http=True, config=config)
    write_rules(daemon, "beacon")
    with daemon, daemon.ready() as client:
        client.call("tokenize", text="far away " * 10_000)  # the thread for long texts is started by the first one
        gate = Gate()
        actors = [Actor(number, act, daemon, gate) for number, act in enumerate(ACTORS)]
        for one in actors:
            one.start()
        try:
            samples = _soak(daemon, client, gate, minutes * 60, every=60.0 if minutes >= 10 else 15.0, cools=cools)
        finally:
            gate.shut(over=True)
        for one in actors:
            one.join(10)
        deaths, log = worker(client)["deaths"], daemon.log()
    return [*judge(samples), _errors(actors, deaths, log)]


def _soak(daemon: Served, client: Client, gate: Gate, seconds: float, every: float, *, cools: bool) -> list[Sample]:
    """Load, pause, sample; a line is printed for each sample."""
    samples: list[Sample] = []
    begin = time.monotonic()
    pid = worker(client)["pid"]
    made = _completed(client)
    while (now := time.monotonic() - begin) < seconds:
        gate.open()
        started = time.monotonic()
        time.sleep(min(every, max(1.0, seconds - now)))
        gate.shut()
        loaded = time.monotonic() - started
        wait_for(lambda: _quiet(client), _QUIET, "the daemon does not come to rest", 0.05)
        done = _completed(client)
        if cools:
            wait_for(lambda: mapped(pid) < _LITTLE, _QUIET, "the model has not cooled down", 0.05)
            time.sleep(0.5)  # sessions are parked, and buffers freed, about then
        one = Sample(time.monotonic() - begin, held(daemon.pid), held(pid), (done - made) / loaded, 0 if cools else _named(daemon))
        made = done
        samples.append(one)
        print(
            f"    {one.at / 60:5.1f} min: daemon {one.daemon.anonymous / 2**20:.2f} MiB, worker {one.worker.anonymous / 2**20:.2f} MiB "
            f"({one.named / 2**20:.1f} of it caches and graphs), "
            f"descriptors {one.daemon.descriptors} + {one.worker.descriptors}, threads {one.daemon.threads} + {one.worker.threads}, "
            f"{one.tokens:.0f} tokens/s", flush=True,
        )  # fmt: skip
    return samples


def _named(daemon: Served) -> int:
    """Bytes of the worker's caches and graphs, as it tells them to monitors."""
    text = metrics(daemon)
    return sum(int(found) for found in re.findall(r'^edge_rt_memory_bytes\{owner="(?:cache|compute)"\} (\d+)$', text, re.MULTILINE))


def _completed(client: Client) -> int:
    found: int = client.call("metrics")["tokens"].get("completion_tokens", 0)
    return found


def _quiet(client: Client) -> bool:
    server = client.status()["server"]
    return (server["connections"], server["sessions"], server["requests"]) == (1, 0, 0)


# ---- judging ---------------------------------------------------------------------------------------------------------


def judge(samples: Sequence[Sample]) -> list[Result]:
    """Growth between the first and the last third after the warm-up, what else may not change, and speed at both ends."""
    end = samples[-1].at if samples else 0.0
    settled = [one for one in samples if one.at > min(WARM_UP * end, _MOST_WARM_UP)]
    if len(settled) < 4:
        return [Result("soak", "", "", [], ok=False, shown="too short: four samples after the warm-up are the least")]
    third = max(1, len(settled) // 3)
    first, last = settled[:third], settled[-third:]
    span = f"{end / 60:.1f} minutes, the first {min(WARM_UP * end, _MOST_WARM_UP) / 60:.1f} of them warm-up"
    results = []
    for name, of in (("daemon and worker", _both), ("daemon", _daemon), ("worker", _worker)):
        grown = median(map(of, last)) - median(map(of, first))
        slope = linear_regression([one.at / 60 for one in settled], [of(one) for one in settled]).slope
        both = name == "daemon and worker"
        shown = f"{grown / 2**20:+.2f} MiB from the first to the last third, {slope / 2**20:+.3f} MiB a minute"
        ends = f"{median(map(of, first)) / 2**20:.1f} MiB, then {median(map(of, last)) / 2**20:.1f} MiB"
        note = f"{span}; {ends} (medians of {third} samples)"
        results.append(Result(
            f"soak: growth of RssAnon and swap, {name}", f"≤ {GROWTH / 2**20:g} MiB" if both else "", "bytes",
            [float(of(one)) for one in settled], ok=grown <= GROWTH if both else None, shown=shown, notes=[note],
        ))  # fmt: skip
    return [*results, *(_constant(settled, what) for what in ("descriptors", "threads")), _speed(settled)]


def _daemon(one: Sample) -> int:
    return one.daemon.anonymous


def _worker(one: Sample) -> int:
    return one.worker.anonymous - one.named


def _both(one: Sample) -> int:
    return _daemon(one) + _worker(one)


def _constant(samples: Sequence[Sample], what: str) -> Result:
    found = [sorted({getattr(getattr(one, who), what) for one in samples}) for who in ("daemon", "worker")]
    shown = "; ".join(f"{who} {', '.join(map(str, counts))}" for who, counts in zip(("daemon", "worker"), found, strict=True))
    return Result(f"soak: {what}", "constant", what, [], ok=all(len(counts) == 1 for counts in found), shown=shown)


def _speed(samples: Sequence[Sample]) -> Result:
    quarter = max(1, len(samples) // 4)
    first, last = (median(one.tokens for one in part) for part in (samples[:quarter], samples[-quarter:]))
    shown = f"{first:.0f} tokens/s in the first quarter after the warm-up, {last:.0f} in the last"
    return Result("soak: speed of the mixed load", "", "tokens/s", [one.tokens for one in samples], shown=shown)


def _errors(actors: Sequence[Actor], deaths: int, log: str) -> Result:
    tally = Tally()
    for one in actors:
        tally.check("every client did something", one.rounds > 0, one.name)
        for _ in range(one.rounds):
            tally.check("rounds as expected", True)
        for wrong in one.wrong:
            tally.check("rounds as expected", False, wrong)
    tally.check("worker never died", deaths == 0, f"{deaths} times")
    tally.check("nothing in the log", not log.replace("edge-rt listens at", "", 1).count("\n") > 1, log[-400:])
    rounds = ", ".join(f"{one.name} {one.rounds:,}" for one in actors)
    return tally.result("soak: errors that were not asked for", "none", list(tally.counts), [f"rounds: {rounds}"])
