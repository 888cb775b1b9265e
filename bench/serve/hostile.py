"""`serve-hostile`: clients that mean harm, while one that does not is answered all the time."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from bench import models
from bench.results import Result, Settings
from bench.serve.attacks import ATTACKS, attack
from bench.serve.served import GREEDY, Held, Served, free_port, held, quantile, say, wait_for, worker
from bench.serve.tally import Tally
from edge_rt.daemon.client import Client
from edge_rt.errors import DaemonError
from edge_rt.types import Delta

_KNOWN, _UNKNOWN = 65_534, 65_533
"""Users that the attacks run as, if this process may choose: one whom the daemon lets in, and one whom it does not."""
_SHARING = ("32 long generations", "half-open connections", "huge prompts")
"""Attacks that ask for texts or for prompts to be read: that is their right, and costs others a share of the steps. Judged by p99 alone."""
P99, MEDIAN = 4.0, 1.25
"""How long another client's gaps between tokens may get: the 99th in a hundred in medians of its own, the median in undisturbed ones."""
PEAK, LEFT = 96 << 20, 8 << 20
"""Bytes by which the daemon's memory may grow meanwhile (``held_bytes`` are 64 MiB), and after all attacks."""
_PROMPT = "Once upon a time"


class Bystander(threading.Thread):
    """A client that is answered all the time, and notes each gap between two tokens, and what goes wrong."""

    def __init__(self, daemon: Served, expected: str) -> None:
        super().__init__()
        self._client, self._expected = daemon.client(), expected
        self.gaps: list[tuple[float, float]] = []
        self.wrong: list[str] = []
        self.enough = threading.Event()

    def run(self) -> None:
        with self._client as client:
            while not self.enough.is_set():
                try:
                    self._listen(client)
                except DaemonError as error:
                    self.wrong.append(f"{error.code}: {error}")
                    if error.code in ("disconnected", "timeout"):
                        return
                    time.sleep(0.1)

    def _listen(self, client: Client) -> None:
        text, before = "", None
        for event in client.generate(_PROMPT, **GREEDY, max_tokens=1500):
            if isinstance(event, Delta):
                text += event.text
                now = time.perf_counter()
                if before is not None:
                    self.gaps.append((now, now - before))
                before = now
            if self.enough.is_set():
                break
        if not (self._expected.startswith(text) or text.startswith(self._expected)):
            self.wrong.append(f"another answer: {text[:200]!r}")

    def between(self, begin: float, end: float) -> list[float]:
        """Gaps that ended in a span of time."""
        return [gap for at, gap in list(self.gaps) if begin <= at < end]


class Watch(threading.Thread):
    """The daemon's memory, twenty times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self.peak = pid, 0
        self.enough = threading.Event()

    def run(self) -> None:
        while not self.enough.wait(0.05):
            self.peak = max(self.peak, held(self._pid).anonymous)


class Hurt(NamedTuple):
    """What an attack did: the bystander's gaps, the daemon's memory at most, and what the attackers were told."""

    gaps: list[float]
    peak: int
    seen: dict[str, int]


def run(settings: Settings) -> list[Result]:
    """One attack after another on one daemon."""
    port = free_port()
    name = f"edge-rt-bench-{secrets.token_hex(8)}"
    config = f'users = ["{os.getuid()}", "{_KNOWN}"]\n[http]\nopen = true\nlisten = ["tcp:127.0.0.1:{port}"]\n'
    model = models.smollm2(settings, "Q4_1")
    with Served(model, "-c", "2048", "--listen", f"abstract:{name}", config=config) as daemon, daemon.ready() as client:
        expected = say(client, _PROMPT, 200).text
        bystander = Bystander(daemon, expected)
        bystander.start()
        try:
            return _attacks(daemon, client, bystander, name, port, settings)
        finally:
            bystander.enough.set()
            bystander.join(60)


def _attacks(daemon: Served, client: Client, bystander: Bystander, name: str, port: int, settings: Settings) -> list[Result]:
    seconds, tally = settings.pick(10.0, 3.0), Tally()
    wait_for(lambda: len(bystander.gaps) > 20, 60, "the bystander hears nothing")
    begin = time.perf_counter()
    time.sleep(2 * seconds)
    alone = bystander.between(begin, time.perf_counter())
    before = held(daemon.pid)
    results = [_alone(alone)]
    for number, attacked in enumerate(ATTACKS):
        if attacked == "wrong user" and os.getuid() != 0:
            results.append(Result(attacked, "", "", [], shown="skipped", notes=["only root can be another user"]))
            continue
        hurt = _attack(daemon, client, bystander, attacked, (name, port, seconds), tally)
        results.append(_result(attacked, hurt, alone))
        print(f"    {number + 1} of {len(ATTACKS)} attacks: {results[-1].name}: {results[-1].shown}", flush=True)
    after = _settled(daemon, client)
    tally.check("no crash", daemon.alive and worker(client)["deaths"] == 0, daemon.log()[-300:])
    tally.check("no traceback", "Traceback" not in daemon.log(), daemon.log()[-500:])
    tally.check("descriptors as before", after.descriptors <= before.descriptors, f"{before.descriptors}, then {after.descriptors}")
    tally.check("bystander answered rightly", not bystander.wrong, "; ".join(bystander.wrong[:3]))
    grown = after.anonymous - before.anonymous
    tally.check(f"memory within {LEFT >> 20} MiB of before", grown <= LEFT, f"{grown / 2**20:+.1f} MiB")
    note = f"RssAnon + swap of the daemon {before.anonymous / 2**20:.1f} MiB before, {after.anonymous / 2**20:.1f} MiB after all attacks"
    return [*results, tally.result("the daemon after all attacks", "all right", list(tally.counts), [note])]


def _attack(
    daemon: Served, client: Client, bystander: Bystander, name: str, target: tuple[str, int, float], tally: Tally
) -> Hurt:  # fmt: skip
    watch = Watch(daemon.pid)
    start = held(daemon.pid).anonymous
    watch.start()
    uid = (_UNKNOWN if name == "wrong user" else _KNOWN) if os.getuid() == 0 else None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        begin = time.perf_counter()
        attacking = pool.submit(attack, name, *target, uid)
        time.sleep(target[2] / 2)
        if uid is not None:
            tally.check("another user let in meanwhile", _let_in(daemon), name)
        seen = attacking.result(timeout=300)
        gaps = bystander.between(begin, time.perf_counter())
    watch.enough.set()
    watch.join()
    _settled(daemon, client)
    if name == "wrong user":
        tally.check("wrong user refused", bool(seen.get("not_allowed")) and not seen.get("ok"), str(seen))
    return Hurt(gaps, watch.peak - start, seen)


def _let_in(daemon: Served) -> bool:
    """Whether a user who does nothing wrong gets an answer."""
    try:
        with daemon.client(timeout=20.0) as client:
            return "server" in client.status()
    except DaemonError:
        return False


def _settled(daemon: Served, client: Client) -> Held:
    """What the daemon holds once nobody is left but the bystander and us."""

    def quiet() -> bool:
        server = client.status()["server"]
        return bool(server["connections"] <= 2 and server["requests"] <= 1 and server["held_bytes"] < 4096)

    wait_for(quiet, 60, "the daemon keeps what attackers left", 0.1)
    return held(daemon.pid)


def _alone(gaps: list[float]) -> Result:
    return Result("undisturbed: gaps between tokens", "", "s", gaps, shown=_gaps(gaps))


def _gaps(gaps: list[float]) -> str:
    if not gaps:
        return "no token came"
    middle, high = quantile(gaps, 0.5), quantile(gaps, 0.99)
    return f"median {middle * 1e3:.1f} ms, p99 {high * 1e3:.1f} ms ({high / middle:.1f} medians), max {max(gaps) * 1e3:.0f} ms"


def _result(name: str, hurt: Hurt, alone: list[float]) -> Result:
    """Judged by the bystander's gaps and the daemon's memory."""
    said = ", ".join(f"{what} {count:,}" for what, count in sorted(hurt.seen.items()))
    shown = f"{_gaps(hurt.gaps)}; daemon +{hurt.peak / 2**20:.1f} MiB at most"
    sharing = name in _SHARING
    required = f"p99 ≤ {P99:g} medians, " + ("" if sharing else f"median ≤ {MEDIAN:g} × undisturbed, ") + f"memory ≤ +{PEAK >> 20} MiB"
    ok = bool(hurt.gaps) and hurt.peak <= PEAK
    if hurt.gaps:
        middle = quantile(hurt.gaps, 0.5)
        ok &= quantile(hurt.gaps, 0.99) <= P99 * middle and (sharing or middle <= MEDIAN * quantile(alone, 0.5))
    told = [f"attackers saw: {said}"]
    return Result(f"{name}: another client's gaps between tokens", required, "s", hurt.gaps, ok=ok, shown=shown, notes=told)
