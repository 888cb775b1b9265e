"""The servers compared, each a process of its own that is asked over HTTP, and ours over its socket too."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from bench.processes import PROGRAMS
from bench.results import OURS, Settings
from bench.serve.chats import Chat, HttpChat, OwnChat, prompt, talk
from bench.serve.served import Served, free_port, open_http

SLOTS, CONTEXT = 8, 4096
"""Sessions at once, and cells of each."""
OVER_HTTP = f"{OURS} over HTTP"
PEER = "llama-server"
_STARTS_WITHIN = 120.0

Ask = Callable[[str, int], Chat]
"""Makes a chat with a server: of a prompt and a number of tokens to answer."""


@dataclass(frozen=True, slots=True)
class Serving:
    """A server that runs."""

    pid: int
    ask: Ask

    def cpu_seconds(self) -> float:
        """CPU time that it and its children have used so far; clock ticks are hundredths."""
        return sum(_cpu_seconds(pid) for pid in (self.pid, *_children(self.pid)))


class Variant(NamedTuple):
    """A setting of llama.cpp's server: everything of it that could matter here."""

    flash: bool
    unified: bool
    repack: bool

    def __str__(self) -> str:
        cells = "one buffer of cells" if self.unified else "cells by session"
        return f"flash attention {'on' if self.flash else 'off'}, {cells}, weights {'repacked' if self.repack else 'as in the file'}"


class LineUp(NamedTuple):
    """Servers that run, by name, ours first; ``notes`` say which the peer is, or why there is none."""

    servers: dict[str, Serving]
    notes: list[str]


@contextlib.contextmanager
def line_up(path: Path, settings: Settings) -> Iterator[LineUp]:
    """Start ours and the best of the peers. Raises RuntimeError if ours does not start."""
    with contextlib.ExitStack() as stack:
        daemon, own = stack.enter_context(ours(path, settings.threads))
        servers = {OURS: own, OVER_HTTP: daemon}
        programs = peers(settings)
        if not programs:
            notes = [f"{PEER} is not compared: --llama-server names one, --peer-python a Python with the package xllamacpp"]
            yield LineUp(servers, notes)
            return
        command, variant, tried = _best(programs, path, settings)
        servers[PEER] = stack.enter_context(llama_server(command, path, settings.threads, variant))
        yield LineUp(servers, [f"peer: {_name(command)}, {settings.threads} threads, {variant} (the best of {tried} settings)"])


# ---- ours ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ours(path: Path, threads: int) -> Iterator[tuple[Serving, Serving]]:
    """The daemon, as one asks it over HTTP and over its socket."""
    port = free_port()
    with Served(path, "--threads", str(threads), "--ctx", str(CONTEXT), config=open_http(port)) as daemon:
        daemon.ready().close()
        over_http = partial(HttpChat, ("127.0.0.1", port), more={"edge_rt": {"ignore_eos": True}})
        yield Serving(daemon.pid, over_http), Serving(daemon.pid, partial(OwnChat, str(daemon.socket)))


# ---- llama.cpp's -----------------------------------------------------------------------------------------------------


def peers(settings: Settings) -> list[Sequence[str]]:
    """Commands of llama.cpp's servers here: the program named, or on PATH, and the one that xllamacpp carries."""
    program = settings.llama_server or shutil.which("llama-server")
    found: list[Sequence[str]] = [[str(program)]] if program else []
    if settings.peer_python:
        found.append([str(settings.peer_python), str(PROGRAMS / "llama_server_start.py")])
    return found


def _name(command: Sequence[str]) -> str:
    return "xllamacpp's server" if len(command) > 1 else "llama-server"


@contextlib.contextmanager
def llama_server(command: Sequence[str], path: Path, threads: int, variant: Variant) -> Iterator[Serving]:
    """llama.cpp's server in one setting. Raises RuntimeError if it does not start."""
    more = {"ignore_eos": True, "samplers": ["temperature"]}  # temperature 0 takes the likeliest; other samplers would only cost time
    port = free_port()
    with _running(llama_program(command, path, threads, variant, port), port) as process:
        yield Serving(process.pid, partial(HttpChat, ("127.0.0.1", port), more=more))


def llama_program(command: Sequence[str], path: Path, threads: int, variant: Variant, port: int) -> list[str]:
    """llama.cpp's server with its arguments."""
    flash = "on" if variant.flash else "off"
    if len(command) > 1:
        cells, weights = "unified" if variant.unified else "apart", "repacked" if variant.repack else "plain"
        return [*command, str(path), str(port), str(threads), str(CONTEXT), str(SLOTS), flash, cells, weights]
    return [
        *command, "-m", str(path), "-t", str(threads), "-tb", str(threads), "-np", str(SLOTS), "-c", str(SLOTS * CONTEXT), "-cb",
        "-fa", flash, "-kvu" if variant.unified else "-no-kvu", *([] if variant.repack else ["--no-repack"]), "--cache-prompt",
        "--cache-ram", "0", "--no-webui", "--log-disable", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip


def _best(programs: Sequence[Sequence[str]], path: Path, settings: Settings) -> tuple[Sequence[str], Variant, int]:
    """The program and setting that answers four clients soonest, of all there are, and how many those are."""
    variants = settings.pick([Variant(*flags) for flags in itertools.product((True, False), repeat=3)], [Variant(True, False, True)])
    seconds = {}
    for number, variant in itertools.product(range(len(programs)), variants):
        with llama_server(programs[number], path, settings.threads, variant) as server:
            burst(server, 1, 8, seed=1)
            seconds[number, variant] = min(burst(server, 4, settings.pick(48, 4), seed=seed) for seed in (10, 20))
    number, variant = min(seconds, key=lambda key: seconds[key])
    return programs[number], variant, len(seconds)


def burst(server: Serving, clients: int, tokens: int, seed: int) -> float:
    """Seconds that a server takes for as many chats at once. Raises RuntimeError if an answer has another length."""
    chats = [server.ask(prompt(48, 100 * seed + number), tokens) for number in range(clients)]
    seconds = talk(chats)
    if any(chat.tokens != tokens for chat in chats):
        raise RuntimeError(f"{tokens} tokens were asked for and {[chat.tokens for chat in chats]} came")
    return seconds


# ---- processes -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _running(program: Sequence[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, from when it is ready until the end of the block. Raises RuntimeError with its last words."""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors) as process,
    ):
        try:
            _wait(process, port)
            yield process
        except RuntimeError as error:
            raise RuntimeError(f"{error}; {Path(program[0]).name} said: {_last_words(errors)}") from error
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _last_words(errors: IO[bytes]) -> str:
    errors.seek(0)
    return errors.read().decode(errors="replace").strip()[-400:] or "nothing"


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    """Until the server says that it is healthy. Raises RuntimeError."""
    until = time.monotonic() + _STARTS_WITHIN
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"a server ended with status {process.returncode} before it was ready")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"a server was not ready within {_STARTS_WITHIN:g} s")


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
