"""`serve-start`: from starting the daemon's process to its first answer, to the open model, to the first token."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median

from bench import models, pages
from bench.processes import PROGRAMS
from bench.results import OURS, Result, Settings
from bench.serve.served import NO_RATE, Served, free_port, listen, milliseconds, user, wait_for, worker
from bench.timing import spread

LIMIT = 0.3
"""Seconds from the start of the process to the first answer that a daemon may take."""
LLAMA = "llama-server"
_CONTEXT = 2048
_MESSAGES = [user("Name the capital of France.")]
_PATIENCE = 60.0
Times = dict[str, float]
_STAGES = ("socket answers status", "model ready", "first token")


def run(settings: Settings) -> list[Result]:
    """Starts in turn with those of llama-server, if there is one; then with the model's file out of memory."""
    model = models.smollm2(settings, "Q4_1")
    contenders: dict[str, Callable[[], Times]] = {OURS: lambda: _ours(model, settings.threads)}
    notes = [] if settings.peer_python else [f"{LLAMA} is not compared: --peer-python names a Python with the package xllamacpp"]
    if python := settings.peer_python:
        contenders[LLAMA] = lambda: _llama(python, model, settings.threads)
    found: dict[str, list[Times]] = {name: [] for name in contenders}
    for number in range(settings.pick(15, 2) + 1):
        order = list(contenders) if number % 2 == 0 else list(contenders)[::-1]
        for name in order:
            times = contenders[name]()
            if number:  # the first one brings files into memory
                found[name].append(times)
    results = [_result(stage, {name: [one[stage] for one in times] for name, times in found.items()}, notes) for stage in _STAGES]
    return [*results, *_from_disk(model, settings)]


def _result(stage: str, samples: Mapping[str, list[float]], notes: list[str]) -> Result:
    """The first answer is judged; what comes after it stands beside llama-server's."""
    ours = samples[OURS]
    said = [f"{name}: {milliseconds(values)} of {len(values)} starts" for name, values in samples.items()]
    beside = "".join(f"; {name} {median(values) * 1e3:.0f} ms" for name, values in samples.items() if name != OURS)
    judged = stage == _STAGES[0]
    return Result(
        f"process start until {stage}", f"≤ {LIMIT * 1e3:.0f} ms" if judged else "", "s", ours,
        ok=median(ours) <= LIMIT if judged else None, shown=f"{median(ours) * 1e3:.0f} ms{beside}",
        notes=[*said, *(notes if judged else [])],
    )  # fmt: skip


def _from_disk(model: Path, settings: Settings) -> list[Result]:
    """The same when the weights are not in memory yet, if they can be put out of it."""
    name = "process start until first token, weights on disk"
    files = [model, *_packed(model)]
    samples = []
    for _ in range(settings.pick(7, 1)):
        try:
            pages.drop(*files)
        except RuntimeError as error:
            return [Result(name, "", "s", [], shown="skipped", notes=[str(error)])]
        samples.append(_ours(model, settings.threads)["first token"])
    return [Result(name, "", "s", samples, shown=f"{spread(samples).median * 1e3:.0f} ms", notes=[milliseconds(samples)])]


def _packed(model: Path) -> list[Path]:
    try:
        return [models.packed(model)]
    except RuntimeError:  # this CPU has no kernels for it
        return []


def _ours(model: Path, threads: int) -> Times:
    """Seconds to each stage of one start; who wants the first token asks at once, while the model is being opened."""
    found: Times = {}
    with Served(model, "-c", str(_CONTEXT), "--threads", str(threads), config=NO_RATE) as daemon:
        found[_STAGES[0]] = daemon.answered

        def first_token() -> None:
            with daemon.client() as client:
                times = listen(client.generate(_MESSAGES, max_tokens=1, temperature=0)).times
            found[_STAGES[2]] = times[0] - daemon.asked

        asking = threading.Thread(target=first_token)
        asking.start()
        with daemon.client() as client:
            wait_for(lambda: worker(client)["state"] == "ready", _PATIENCE, "the model is not open")
            found[_STAGES[1]] = time.perf_counter() - daemon.asked
            asking.join(_PATIENCE)
    if _STAGES[2] not in found:
        raise RuntimeError("the daemon has answered nothing")
    return found


# ---- the peer --------------------------------------------------------------------------------------------------------


def _llama(python: Path, model: Path, threads: int) -> Times:
    """The same of llama-server, over HTTP, which is what it has. Raises RuntimeError."""
    found: Times = {}
    port = free_port()
    words = [str(python), str(PROGRAMS / "llama_server_start.py"), str(model), str(port), str(threads), str(_CONTEXT)]
    asked = time.perf_counter()
    with _process(words) as process:

        def status() -> int | None:
            if process.poll() is not None:
                raise RuntimeError(f"{LLAMA} ended at once; has {python} the package xllamacpp?")
            with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
                connection.request("GET", "/health")
                return connection.getresponse().status
            return None

        wait_for(lambda: status() is not None, _PATIENCE, f"{LLAMA} does not answer", 0.001)
        found[_STAGES[0]] = time.perf_counter() - asked
        wait_for(lambda: status() == 200, _PATIENCE, f"{LLAMA} has no model")
        found[_STAGES[1]] = time.perf_counter() - asked
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)) as connection:
            body = {"messages": _MESSAGES, "max_tokens": 1, "temperature": 0}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            if connection.getresponse().status != 200:
                raise RuntimeError(f"{LLAMA} has answered nothing")
        found[_STAGES[2]] = time.perf_counter() - asked
    return found


@contextlib.contextmanager
def _process(words: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()
