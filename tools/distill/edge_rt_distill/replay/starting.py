"""A server that is started for a replay and stopped after it, and how long it takes until its first answer begins."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import IO, NamedTuple

from edge_rt.hooks import OptionError, UserError
from edge_rt_distill.replay.targets import Failed, Question, Target

_STOPS_WITHIN = 15.0
_TRY_EVERY = 0.05
_FIRST = Question("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "temperature": 0})
_NOT_YET = frozenset((
    "connection", "http_404", "http_408", "http_425", "http_429", "http_502", "http_503", "http_504",
    "model_loading", "no_model", "rate_limit_exceeded", "unavailable_error", "worker_died",
))  # fmt: skip
"""Codes of a server that is about to be there: HTTP's, and those that OpenAI, edge-rt and llama.cpp have words for."""


class Started(NamedTuple):
    """``begun``: when (time.perf_counter)."""

    process: subprocess.Popen[bytes]
    begun: float
    log: IO[bytes]

    def last_words(self) -> str:
        """The end of what it wrote."""
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 600))
        return " ".join(self.log.read().decode(errors="replace").split()) or "nothing"


@contextlib.contextmanager
def started(command: str) -> Iterator[Started]:
    """Run a command, a group of processes of its own, until the end of the block. Raises OptionError if it cannot be run."""
    with tempfile.TemporaryFile() as log:
        begun = time.perf_counter()
        try:
            words = shlex.split(command)
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        except (OSError, ValueError, IndexError) as error:
            raise OptionError(f"--start {command!r} cannot be run ({error}); give a program with its arguments") from error
        try:
            yield Started(process, begun, log)
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The program first, which ends what it has started; then what is left of its group."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_STOPS_WITHIN)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


async def first_token(server: Started, target: Target, within: float) -> float:
    """Seconds from a server's start to the first token of its first answer. Raises UserError if it ends, refuses, or takes too long."""
    moments: list[float] = []
    last = "it does not listen"
    while time.perf_counter() - server.begun < within:
        if server.process.poll() is not None:
            raise UserError(f"the server ended with {server.process.returncode} before it answered; it said: {server.last_words()}")
        try:
            await target.look()
            await asyncio.wait_for(target.ask(_FIRST, lambda *_: moments.append(time.perf_counter())), within)
            return (moments[0] if moments else time.perf_counter()) - server.begun
        except UserError as error:
            last = str(error)
        except Failed as error:
            last = f"{error.code}, {error}"
            if error.code not in _NOT_YET:
                raise UserError(f"the server refuses a first request: {last}") from error
        except asyncio.TimeoutError:
            break
        await asyncio.sleep(_TRY_EVERY)
    raise UserError(f"the server did not answer within {within:g} s ({last}); see --start-within. It said: {server.last_words()}")
