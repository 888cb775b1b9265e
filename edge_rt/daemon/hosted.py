"""One model that the daemon knows of: what it needs, what it may have, and its worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.daemon.protocol import failure
from edge_rt.daemon.supervisor import Spec, Supervisor
from edge_rt.errors import ModelFileError, ProtocolError

if TYPE_CHECKING:
    from edge_rt.daemon.frames import Message
    from edge_rt.daemon.parking import Parking

_PROCESS, _WORKING = 48 << 20, 48 << 20


class Needs(NamedTuple):
    """Bytes: of weights at most, of the process beside them, and the least with which it can work (caches and compute)."""

    weights: int
    process: int
    working: int

    @property
    def fixed(self) -> int:
        """Whatever it is asked."""
        return self.weights + self.process

    @property
    def total(self) -> int:
        """The least with which it is of use."""
        return self.fixed + self.working


def foreseen(spec: Spec) -> Needs:
    """What a model will need, told from the size of its file. The worker says it exactly when the model is open.

    The process: 33 MB, and its vocabulary, which is a larger part of a small model (135M with 49,152 tokens: 41 MB at all).
    Working: a few hundred cells and the buffers of a prompt's step, which grow with the model's width (135M: 54 MB).

    Raises ModelFileError if the file is gone.
    """
    try:
        size = Path(spec.model).stat().st_size
    except OSError as error:
        raise ModelFileError(f"{spec.model} cannot be opened: {(error.strerror or str(error)).lower()}; check the path") from error
    size += _compensation_bytes(spec)
    limit = spec.options.get("memory")
    weights = min(size, limit) if limit else size
    return Needs(weights + _adapter_bytes(spec), _PROCESS + min(size // 16, 64 << 20), _WORKING + size // 16)


def _adapter_bytes(spec: Spec) -> int:
    """Of all adapters: a worker opens them when they are first asked for, and does not count them before."""
    return sum(path.stat().st_size for path in map(Path, spec.options.get("adapters", {}).values()) if path.exists())


def _compensation_bytes(spec: Spec) -> int:
    """Of the side file that the model is opened with; one that cannot be is the worker's to refuse."""
    from edge_rt.core.weights.error_correction import AUTO, find_compensation

    side = find_compensation(Path(spec.model), spec.options.get("compensation", AUTO))
    return side.stat().st_size if side is not None and side.exists() else 0


class Hosted:
    """``allowance``: bytes that its worker may use for caches and compute. ``used``: what it does, at least, as far as it has told."""

    def __init__(
        self, name: str, spec: Spec, hung_after: float, parking: Parking,
        changed: Callable[[Hosted], None], told: Callable[[Hosted, Message], None],
    ) -> None:  # fmt: skip
        """Raises ModelFileError if the file is gone."""
        self.name, self.spec, self.needs = name, spec, foreseen(spec)
        self.allowance = self.used = self.under_way = 0
        self.placed = False
        """It has its place in memory."""
        self.awaited = 0
        """Requests for whose sake it comes into memory."""
        self.bidden = False
        """It is to come also if nobody asks anything."""
        self.cooled = False
        """Its weights were given back, as nobody has asked anything for long."""
        self.leaving = False
        """Its worker is about to end."""
        self.idle_since = 0.0
        self.template = ""
        """Of its prompts, in 12 hexadecimal digits, as its worker told when it last opened it."""
        self.sustained: Message | None = None
        """What its limits of power and temperature came to, as it last told."""
        self._parking, self._changed, self._tell = parking, changed, told
        self._timer: asyncio.TimerHandle | None = None
        self.supervisor = Supervisor(hung_after, self._state, self._told, self._grant)

    @property
    def names(self) -> tuple[str, ...]:
        """What it may be called: its name, and its file's with and without the suffix."""
        path = Path(self.spec.model)
        return (self.name, path.stem, path.name)

    @property
    def adapters(self) -> Mapping[str, str]:
        """Files of the adapters that requests may ask for, by name."""
        found: Mapping[str, str] = self.spec.options.get("adapters", {})
        return found

    @property
    def idle(self) -> bool:
        """Nobody waits for anything."""
        return not self.under_way

    @property
    def taken(self) -> int:
        """Bytes that it has, or may take at any moment."""
        return self.needs.fixed + max(self.allowance, self.used) if self.placed else 0

    def _grant(self) -> Message:
        folder = self._parking.folder()
        return {"allowance": self.allowance, "parked": None if folder is None else str(folder / self.name)}

    def _state(self) -> None:
        if self.supervisor.state == "ready" and self.supervisor.model is not None:
            self.template = self.supervisor.model["template"]
            opened = self.supervisor.model.pop("needs", None)
            if opened is not None:
                self.needs = self.needs._replace(**{**opened, "weights": opened["weights"] + _adapter_bytes(self.spec)})
            self._tell(self, {"opened": True})
        elif self.supervisor.state in ("waiting", "failed"):
            self.used, self.cooled, self.sustained = 0, False, None  # the next worker is warm
            self._tell(self, {"ended": True})
        self._changed(self)

    def _told(self, message: Message) -> None:
        if "held" in message:
            self.used = max(message["held"], message["reserved"])
        elif "sustained" in message:
            self.sustained = message["sustained"]
        else:
            self._tell(self, message)

    async def ask(self, command: Message) -> Message:
        """The worker's answer to a command of the daemon's own: ``{"ok": ...}`` or ``{"error": ...}``."""
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        try:
            self.supervisor.call(command, partial(_settle, answer))
        except ProtocolError as error:
            return {"error": failure(error)}
        return await answer

    async def allow(self, allowance: int) -> None:
        """Let the worker have so many bytes. Less than it uses now is reached when requests end."""
        if self.supervisor.state != "ready":  # the next worker is opened with it
            self.allowance = allowance
            return
        before, self.allowance = self.allowance, max(self.allowance, allowance)
        answer = await self.ask({"op": "allow", "bytes": allowance})
        if "ok" in answer:
            self.used = max(answer["ok"]["held"], answer["ok"]["reserved"])
            self.allowance = allowance
        elif self.supervisor.spec is None:  # it has left
            self.allowance = before
        else:  # it died, and the next is opened with this
            self.allowance = allowance

    def start_timer(self, seconds: float, then: Callable[[], None]) -> None:
        """Call something later, and nothing else that was to be called."""
        self.stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def stop_timer(self) -> None:
        """Call nothing later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def status(self) -> Message:
        """What is the case now."""
        worker = self.supervisor
        idle = asyncio.get_running_loop().time() - self.idle_since if self.idle and worker.state == "ready" else None
        return {
            "name": self.name,
            "file": self.spec.model,
            "worker": worker.status(),
            "model": worker.model,
            "memory": {**self.needs._asdict(), "allowance": self.allowance if self.placed else 0, "used": self.used, "taken": self.taken},
            "requests": self.under_way,
            "cooled": self.cooled,
            "idle": idle,
            "sustained": self.sustained,
        }


def _settle(answer: asyncio.Future[Message], message: Message) -> None:
    if not answer.done() and "event" not in message:
        answer.set_result(message)
