"""Faults: what is done to a server in the middle of a replay, ``10:kill-worker`` ten seconds after its begin."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from edge_rt.hooks import OptionError, UserError
from edge_rt_distill.replay.results import Fault
from edge_rt_distill.replay.targets import Facts, Target
from edge_rt_distill.replay.watching import family


class Planned(NamedTuple):
    """``at``: seconds after the begin. ``name``: of FAULTS, or empty for a command. ``argument``: seconds, or the command."""

    at: float
    name: str
    argument: str

    def __str__(self) -> str:
        return f"{self.name}={self.argument}" if self.name and self.argument else self.name or self.argument


class Sort(NamedTuple):
    """A kind of fault. ``do``: with the server as it is and the argument; what it returns says what came of it. ``daemon``: only edge-rt's
    daemon has what it needs. ``usual``: the argument, if it may have one."""

    do: Callable[[Facts, str], Awaitable[str]]
    daemon: bool = False
    usual: str = ""


async def _kill_worker(facts: Facts, _: str) -> str:
    """SIGKILL to the worker that has the default model."""
    if facts.worker is None:
        return "there was no worker just then"
    os.kill(facts.worker, signal.SIGKILL)
    return f"worker {facts.worker} was killed"


async def _reload_rules(facts: Facts, _: str) -> str:
    """SIGHUP to the daemon."""
    assert facts.pid is not None, "a daemon says its own"
    os.kill(facts.pid, signal.SIGHUP)
    return f"daemon {facts.pid} was told to read its rules again"


async def _freeze(facts: Facts, seconds: str) -> str:
    """SIGSTOP to all processes of the server and, so many seconds later, SIGCONT."""
    import psutil

    assert facts.pid is not None, "it was checked before the run"
    frozen = family(facts.pid)
    if not frozen:
        return "its processes were gone"
    try:
        for process in frozen:
            process.suspend()
        await asyncio.sleep(float(seconds))
    finally:
        for process in frozen:
            with contextlib.suppress(psutil.NoSuchProcess):  # somebody has killed it meanwhile
                process.resume()
    return f"{len(frozen)} processes stood still for {seconds} s"


async def _command(_: Facts, command: str) -> str:
    """A command for the shell; if the replay ends before it, it is not waited for."""
    process = await asyncio.create_subprocess_shell(command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT)
    out, _error = await process.communicate()
    said = " ".join(out.decode(errors="replace").split())[:200]
    return f"ended with {process.returncode}" + (f": {said}" if said else "")


FAULTS: Mapping[str, Sort] = {
    "kill-worker": Sort(_kill_worker, daemon=True), "reload-rules": Sort(_reload_rules, daemon=True), "freeze": Sort(_freeze, usual="2"),
}  # fmt: skip
"""By name; anything else is a command."""
_COMMAND = Sort(_command)


def parse(text: str) -> Planned:
    """``SECONDS:NAME``, ``SECONDS:NAME=ARGUMENT`` or ``SECONDS:COMMAND``. Raises OptionError."""
    given = re.fullmatch(r"(\d+(?:\.\d+)?):\s*(\S.*)", text, re.DOTALL)
    if given is None:
        raise OptionError(f"--fault is {text!r}; give SECONDS:NAME of {', '.join(FAULTS)}, or SECONDS:COMMAND")
    at, what = float(given.group(1)), given.group(2).strip()
    name, _, argument = what.partition("=")
    if name in FAULTS:
        usual = FAULTS[name].usual
        if argument and not (usual and re.fullmatch(r"\d+(?:\.\d+)?", argument)):
            raise OptionError(f"the fault {name} is given {argument!r}; give it {'seconds' if usual else 'nothing'}")
        return Planned(at, name, argument or usual)
    if re.fullmatch(r"\w+(-\w+)*(=.*)?", what) and shutil.which(what) is None:
        raise OptionError(f"{what!r} is neither a fault nor a program here; the faults are {', '.join(FAULTS)}")
    return Planned(at, "", what)


def check(planned: Sequence[Planned], facts: Facts, *, own: bool) -> None:
    """Raises OptionError for faults that cannot be done to this server. ``own``: it is this very process."""
    for one in planned:
        if not one.name:
            continue
        if FAULTS[one.name].daemon and not facts.daemon:
            raise OptionError(f"the fault {one.name} is for edge-rt's daemon, and {facts.name} is none; give a command instead")
        if own or facts.pid is None:
            raise OptionError(
                f"the fault {one.name} needs the server's process, on this machine; name it with --pid, or let --start start it"
            )


class Injector:
    """Does what is planned; ``done`` are the faults so far, ``missed`` those that are still to come."""

    def __init__(self, planned: Sequence[Planned], target: Target, pid: int | None, now: Callable[[], float]) -> None:
        self._target, self._pid, self._now = target, pid, now
        self.done: list[Fault] = []
        self.missed = sorted(planned)

    async def go_on(self, say: Callable[[str], None]) -> None:
        """All of it, each at its time; ``say`` is told. A fault that fails is one that says so."""
        await asyncio.gather(*(self._one(planned, say) for planned in list(self.missed)))

    async def _one(self, planned: Planned, say: Callable[[str], None]) -> None:
        await asyncio.sleep(max(0.0, planned.at - self._now()))
        sort = FAULTS.get(planned.name, _COMMAND)
        try:
            facts = await self._target.look() if sort.daemon else Facts("", pid=self._pid)
        except UserError as error:
            place = self._begin(planned, f"it could not be done: {error}")
        else:
            place = self._begin(planned, "the replay ended in the middle of it")
            self.done[place] = self.done[place]._replace(said=await _done(sort, facts, planned.argument))
        say(f"fault {planned}: {self.done[place].said}")

    def _begin(self, planned: Planned, said: str) -> int:
        self.missed.remove(planned)
        self.done.append(Fault(self._now(), str(planned), said))
        return len(self.done) - 1


async def _done(sort: Sort, facts: Facts, argument: str) -> str:
    import psutil

    try:
        return await sort.do(facts, argument)
    except (OSError, psutil.Error) as error:
        return f"it could not be done: {error}"
