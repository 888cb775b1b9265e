"""The models that the daemon knows of, a worker for each that is loaded, and the memory that all of them share.

What a model takes is its weights, its process, and an allowance for caches and compute, within which the worker admits requests. The sum
never exceeds the budget. Where it is short, allowances that nobody uses shrink first, then models leave that nobody asks anything:
those that have cooled down before others, the coldest first (heat: exponentially weighted counts of requests). A model
for which there is still no room waits, with a reason, until another is idle.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.weights.units import DecayingCounter
from edge_rt.daemon.protocol import describe_error
from edge_rt.daemon.supervisor import UNLOADED, Supervisor, TaskSet, WorkerExit, WorkerSpec, now
from edge_rt.errors import ModelFileError, OptionError, ProtocolError
from edge_rt.model_hub import format_size

if TYPE_CHECKING:
    from edge_rt.daemon.protocol import Message
    from edge_rt.daemon.supervisor import ReplyHandler

_PREFIX = "parked-"


class ParkingFolder:
    """Made when it is first asked for. It is locked as long as its daemon lives, so that the next can tell what was left behind."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._folder: Path | None = None
        self._lock = -1

    def folder(self) -> Path | None:
        """None where there is no place for one: then sessions stay in memory."""
        if self._folder is None:
            try:
                self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
                _remove_abandoned(self._state)
                made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._state))
                self._lock = _lock_folder(made)
                self._folder = made
            except OSError as error:
                logging.getLogger("edge_rt.daemon").warning("sessions cannot be parked in %s: %s", self._state, error.strerror or error)
        return self._folder

    def close(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)  # what is left is swept by the next
            os.close(self._lock)
            self._folder = None


def _lock_folder(folder: Path) -> int:
    """A descriptor that holds the folder's lock. Raises OSError: somebody else has it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _remove_abandoned(state: Path) -> None:
    for folder in state.glob(f"{_PREFIX}*"):
        try:
            descriptor = _lock_folder(folder)
        except OSError:
            continue  # its daemon lives, or another has just removed it
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


_PROCESS, _WORKING = 48 << 20, 48 << 20


class MemoryNeeds(NamedTuple):
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


def estimate_memory(spec: WorkerSpec) -> MemoryNeeds:
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
    return MemoryNeeds(weights + _adapter_bytes(spec), _PROCESS + min(size // 16, 64 << 20), _WORKING + size // 16)


def _adapter_bytes(spec: WorkerSpec) -> int:
    """Of all adapters: a worker opens them when they are first asked for, and does not count them before."""
    return sum(path.stat().st_size for path in map(Path, spec.options.get("adapters", {}).values()) if path.exists())


def _compensation_bytes(spec: WorkerSpec) -> int:
    """Of the side file that the model is opened with; one that cannot be is the worker's to refuse."""
    from edge_rt.core.weights.error_correction import AUTO, find_compensation

    side = find_compensation(Path(spec.model), spec.options.get("compensation", AUTO))
    return side.stat().st_size if side is not None and side.exists() else 0


class ManagedModel:
    """``allowance``: bytes that its worker may use for caches and compute. ``used``: what it does, at least, as far as it has told."""

    def __init__(
        self, name: str, spec: WorkerSpec, hung_after: float, parking: ParkingFolder,
        on_state: Callable[[ManagedModel], None], on_report: Callable[[ManagedModel, Message], None],
    ) -> None:  # fmt: skip
        """Raises ModelFileError if the file is gone."""
        self.name, self.spec, self.needs = name, spec, estimate_memory(spec)
        self.allowance = self.used = self.under_way = 0
        self.placed = False  # it has its place in memory
        self.awaited = 0  # requests for whose sake it comes into memory
        self.requested = False  # it is to come also if nobody asks anything
        self.cooled = False  # its weights were given back, as nobody has asked anything for long
        self.leaving = False  # its worker is about to end
        self.idle_since = 0.0
        self.template = ""  # of its prompts, in 12 hexadecimal digits, as its worker told when it last opened it
        self.sustained: Message | None = None  # what its limits of power and temperature came to, as it last told
        self._parking, self._on_state, self._on_report = parking, on_state, on_report
        self._timer: asyncio.TimerHandle | None = None
        self.supervisor = Supervisor(hung_after, self._on_worker_state, self._on_worker_report, self._grant)

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
        return not self.under_way

    @property
    def taken(self) -> int:
        """Bytes that it has, or may take at any moment."""
        return self.needs.fixed + max(self.allowance, self.used) if self.placed else 0

    def _grant(self) -> Message:
        folder = self._parking.folder()
        return {"allowance": self.allowance, "parked": None if folder is None else str(folder / self.name)}

    def _on_worker_state(self) -> None:
        if self.supervisor.state == "ready" and self.supervisor.model is not None:
            self.template = self.supervisor.model["template"]
            opened = self.supervisor.model.pop("needs", None)
            if opened is not None:
                self.needs = self.needs._replace(**{**opened, "weights": opened["weights"] + _adapter_bytes(self.spec)})
            self._on_report(self, {"opened": True})
        elif self.supervisor.state in ("waiting", "failed"):
            self.used, self.cooled, self.sustained = 0, False, None  # the next worker is warm
            self._on_report(self, {"ended": True})
        self._on_state(self)

    def _on_worker_report(self, message: Message) -> None:
        if "held" in message:
            self.used = max(message["held"], message["reserved"])
        elif "sustained" in message:
            self.sustained = message["sustained"]
        else:
            self._on_report(self, message)

    async def ask(self, command: Message) -> Message:
        """The worker's answer to a command of the daemon's own: ``{"ok": ...}`` or ``{"error": ...}``."""
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        try:
            self.supervisor.call(command, partial(_resolve, answer))
        except ProtocolError as error:
            return {"error": describe_error(error)}
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
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def status(self) -> Message:
        worker = self.supervisor
        idle = now() - self.idle_since if self.idle and worker.state == "ready" else None
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


def _resolve(answer: asyncio.Future[Message], message: Message) -> None:
    if not answer.done() and "event" not in message:
        answer.set_result(message)


HALF_LIFE = 64.0  # requests, to any model, after which one counts half
MORE = 16 << 20  # bytes that a worker gets beyond those it is short of, if there are any: the next request is not far
UNWANTED = WorkerExit("unloaded", "the model waited for memory, and nobody waits for it any more; ask again")
LEFT = WorkerExit("unloaded", "the model left memory for another; ask again")


class ModelManager:
    """``on_state(hosted)`` is called when a worker's state changes, ``on_session(hosted, message)`` with what a worker says of sessions."""

    def __init__(
        self, budget: int, hung_after: float, cool_after: float, patience: float, state: Path,
        on_state: Callable[[ManagedModel], None], on_session: Callable[[ManagedModel, Message], None],
    ) -> None:  # fmt: skip
        """``budget``: bytes. ``cool_after``: seconds without a request, 0 for never. ``patience``: how long a model waits for room.

        ``state``: the folder in which there is one for parked sessions.
        """
        self.budget, self.default = budget, ""
        self._known: dict[str, ManagedModel] = {}
        self._hung_after, self._cool_after, self._patience, self._parking = hung_after, cool_after, patience, ParkingFolder(state)
        self._on_state, self._on_session = on_state, on_session
        self._heat = DecayingCounter(HALF_LIFE)
        self._wants: dict[ManagedModel, int] = {}  # bytes, in the order in which they were asked for
        self._sharing_due = False
        self._task: asyncio.Task[None] | None = None
        self._tasks = TaskSet()
        self.evictions = 0  # how many models have left for others
        self._deaths = 0  # of models that are not known any more

    def __iter__(self) -> Iterator[ManagedModel]:
        return iter(self._known.values())

    # ---- names -------------------------------------------------------------------------------------------------------

    def add(self, name: str, spec: WorkerSpec) -> ManagedModel:
        """A model that may be asked for, from now on. What was known by the name is forgotten; it must not be loaded.

        Raises ModelFileError if the file is gone: then nothing is forgotten.
        """
        one = ManagedModel(name, spec, self._hung_after, self._parking, self._on_state, self._on_report)
        if (before := self._known.get(name)) is not None:
            self.forget(before)
        self._known[name] = one
        return one

    def add_default(self, model: str, spec: WorkerSpec) -> ManagedModel:
        """From now on, a model is asked where a request names none. It is called as it was asked for, or like its file."""
        one = self.add(model_name(model, spec), spec)
        self.default = one.name
        return one

    def forget(self, one: ManagedModel) -> None:
        """A model is not known any more; it must not be loaded. Who has asked for it while it left gets an error."""
        self._known.pop(one.name, None)
        self._wants.pop(one, None)
        one.stop_timer()
        one.supervisor.abandon()
        self._deaths += one.supervisor.deaths
        if self.default == one.name:
            self.default = ""

    def find(self, name: str | None = None) -> ManagedModel:
        """A model by its name, else the name of its file; without one, the default. Raises ProtocolError: no_model."""
        if not self._known:
            raise ProtocolError("no_model", "no model is loaded; load one with load_model")
        if name is None:
            if not self.default:
                raise ProtocolError("no_model", f"the request names no model, and none is the default; name one of {self.names}")
            return self._known[self.default]
        alike = self._called(name)
        if len(alike) != 1:
            raise ProtocolError("no_model", f"there is no model {name:.80}; name one of {self.names}")
        return alike[0]

    def is_known(self, one: ManagedModel) -> bool:
        """Whether it is the model of its name still."""
        return self._known.get(one.name) is one

    def find_named(self, name: str) -> ManagedModel | None:
        """The model of a name, else one whose file is called so."""
        return next(iter(self._called(name)), None)

    def _called(self, name: str) -> list[ManagedModel]:
        return [self._known[name]] if name in self._known else [one for one in self if name in one.names]

    @property
    def deaths(self) -> int:
        """How often a worker has died."""
        return self._deaths + sum(one.supervisor.deaths for one in self)

    def loaded(self) -> list[ManagedModel]:
        return [one for one in self if one.supervisor.state == "ready"]

    @property
    def names(self) -> str:
        """All of them, for a person."""
        return ", ".join(self._known)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def call(self, one: ManagedModel, command: Message, handle: ReplyHandler, *, awaits: bool = True) -> int:
        """Let a model's worker answer, after it was loaded if need be; the command's number. Raises ProtocolError.

        ``awaits``: somebody waits for the answer, so that the model waits for room as long as they do.
        """
        if one.supervisor.spec is None:
            self._load_or_queue(one)

        def answered(message: Message) -> None:
            if "event" not in message:
                one.awaited -= awaits
                self._on_done(one)
            handle(message)

        number = one.supervisor.call(command, answered)
        one.under_way += 1
        one.awaited += awaits
        one.cooled = False
        if one.placed:
            one.stop_timer()
        self._heat.tick()
        self._heat.touch(one.name)
        return number

    def _on_done(self, one: ManagedModel) -> None:
        one.under_way -= 1
        if one in self._wants and not one.placed and not one.awaited and not one.requested:
            self._nobody_waits(one)
        self._start_idle_timer(one)
        if self._wants:
            self._schedule_sharing()

    def _nobody_waits(self, one: ManagedModel) -> None:
        """Who asked for a model that waits for room is gone: nobody is to leave for it any more."""
        del self._wants[one]
        one.stop_timer()
        one.supervisor.abandon(UNWANTED)

    def _start_idle_timer(self, one: ManagedModel) -> None:
        """A model may have nothing to do: after a while it cools down."""
        if not one.under_way and one.placed:  # else its timer is of its waiting for room
            one.idle_since = now()
            if self._cool_after:
                one.start_timer(self._cool_after, partial(self._cool_if_idle, one))

    def _cool_if_idle(self, one: ManagedModel) -> None:
        if one.idle and one.supervisor.state == "ready":
            self._tasks.spawn(self._cool_worker(one))

    async def _cool_worker(self, one: ManagedModel) -> None:
        answer = await one.ask({"op": "cool"})
        one.cooled = one.idle and "ok" in answer and not answer["ok"].get("busy")

    # ---- loading -----------------------------------------------------------------------------------------------------

    def load(self, one: ManagedModel) -> None:
        """Bring a model into memory before anybody asks. Raises ProtocolError: out_of_memory."""
        if one.supervisor.spec is None:
            self._load_or_queue(one)
        one.requested = not one.placed

    async def unload(self, one: ManagedModel, why: WorkerExit = UNLOADED) -> None:
        """End a model's worker; what it is at gets an error."""
        self._wants.pop(one, None)
        one.stop_timer()
        one.leaving = True  # who asks for it meanwhile waits until its memory is free
        try:
            await one.supervisor.unload(why)
        finally:
            one.placed, one.cooled, one.used, one.leaving, one.requested = False, False, 0, False, False
            self._schedule_sharing()

    async def close(self, why: WorkerExit) -> None:
        self._wants.clear()
        await asyncio.gather(*(self.unload(one, why) for one in self))
        if self._task is not None:  # it may be ending another worker, and finds nothing more to do
            await self._task
        self._parking.close()

    def _load_or_queue(self, one: ManagedModel) -> None:
        needed = one.needs.total
        if needed > self.budget:
            refusal = self._too_large(one)
            raise ProtocolError(refusal.code, refusal.message, **refusal.fields)
        if self._task is None and not one.leaving and self.free >= needed:
            self._place(one)
            return
        one.supervisor.expect(one.spec, f"it waits for {format_size(needed)} of memory, of which {format_size(max(0, self.free))} are free")
        one.start_timer(self._patience, partial(self._refuse_waiting, one))
        self._wants[one] = needed
        self._schedule_sharing()

    def _too_large(self, one: ManagedModel) -> WorkerExit:
        """Why a model is not loaded however much the others give."""
        needed, most = one.needs.total, self.budget
        message = (
            f"the model {one.name} needs {format_size(needed)} and all models may have {format_size(most)}; "
            "raise memory, or limit the model's own"
        )
        return WorkerExit("out_of_memory", message, {"needed": needed, "available": most})

    def _unload_too_large(self, one: ManagedModel) -> None:
        """A model that is open needs more than was foreseen, and more than all may have: it does not stay."""
        refusal = self._too_large(one)
        logging.getLogger("edge_rt.daemon").warning("%s", refusal.message)
        one.leaving = True
        self._tasks.spawn(self.unload(one, refusal))

    def _place(self, one: ManagedModel) -> None:
        one.stop_timer()
        one.placed, one.cooled, one.used, one.requested = True, False, 0, False
        one.allowance = max(one.needs.working, self.free - one.needs.fixed)
        one.supervisor.load(one.spec)

    def _refuse_waiting(self, one: ManagedModel) -> None:
        """A model has waited for room as long as it may."""
        if self._wants.pop(one, None) is None:  # it has just found some
            return
        needed, free = one.needs.total, max(0, self.free)
        message = (
            f"the model {one.name} needs {format_size(needed)} and {format_size(free)} are free, as other models are in use; "
            "ask again later"
        )
        self._tasks.spawn(self.unload(one, WorkerExit("out_of_memory", message, {"needed": needed, "available": free})))

    # ---- memory ------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Bytes of the budget that no model has; less than 0 if one turned out to need more than was foreseen."""
        return self.budget - sum(one.taken for one in self)

    def _on_report(self, one: ManagedModel, message: Message) -> None:
        """A worker says something of itself; or it is open, or has ended."""
        if "short" in message:
            if not one.leaving:
                self._wants[one] = message["short"]
                self._schedule_sharing()
        elif "opened" in message and one.needs.total > self.budget:
            self._unload_too_large(one)
        elif "opened" in message:
            self._start_idle_timer(one)
            more = max(0, one.needs.working - one.allowance)
            if more or self.free < 0:
                self._wants.setdefault(one, more)
            self._schedule_sharing()
        elif "ended" in message:
            self._schedule_sharing()
        else:
            self._on_session(one, message)

    def _schedule_sharing(self) -> None:
        self._sharing_due = bool(self._wants)
        if self._sharing_due and self._task is None:
            self._task = self._tasks.spawn(self._share_memory())
            self._task.add_done_callback(self._after_sharing)

    def _after_sharing(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if self._sharing_due:  # after its last look
            self._schedule_sharing()

    async def _share_memory(self) -> None:
        """Fulfil wants as far as that is possible now."""
        while self._sharing_due:
            self._sharing_due = False
            for one, wanted in list(self._wants.items()):
                if one not in self._wants:  # it has left meanwhile
                    continue
                enough = await self._make_room(one, wanted)
                if self._wants.get(one) != wanted:  # it has left meanwhile, or wants more
                    continue
                if one.placed:
                    del self._wants[one]
                    # The worker waits for an answer, also if there is no more: then it can refuse.
                    if one.supervisor.state != "starting":
                        await one.allow(one.allowance + min(self.free, wanted + MORE if wanted else 0))
                elif enough and not one.leaving:
                    del self._wants[one]
                    self._place(one)

    async def _make_room(self, one: ManagedModel, wanted: int) -> bool:
        """Free so many bytes for a model, at the expense of others; whether that could be."""
        for way in (self._take_unused, self._evict_cooled, self._take_parked, self._evict):
            for other in self._heat_order(one):
                if self.free >= wanted or one not in self._wants:  # there is enough, or nobody waits for it any more
                    break
                await way(other, wanted)
        return self.free >= wanted

    def _heat_order(self, but: ManagedModel) -> list[ManagedModel]:
        """The others that are in memory, coldest first."""
        names = [one.name for one in self if one.placed and one is not but]
        return [self._known[name] for name in self._heat.coldest(names)]

    async def _take_unused(self, one: ManagedModel, wanted: int) -> None:
        """Lower an allowance to what is in use, at most by what is wanted."""
        await self._lower_allowance(one, max(one.needs.working, one.used), wanted)

    async def _take_parked(self, one: ManagedModel, wanted: int) -> None:
        """Lower it further: sessions that nobody uses just now leave the worker's memory."""
        await self._lower_allowance(one, one.needs.working, wanted)

    async def _lower_allowance(self, one: ManagedModel, least: int, wanted: int) -> None:
        """One that is being opened answers when it is open, and is asked then: others need not wait for that."""
        if one.allowance > least and one.supervisor.state != "starting":
            await one.allow(max(least, one.allowance - (wanted - self.free)))

    async def _evict_cooled(self, one: ManagedModel, wanted: int) -> None:
        if one.cooled:
            await self._evict(one, wanted)

    async def _evict(self, one: ManagedModel, wanted: int) -> None:
        """Let an idle model go; its sessions stay, parked."""
        if not one.idle or one.leaving or one.supervisor.state == "starting":
            return
        if one.supervisor.state == "ready":
            await one.ask({"op": "cool"})
        if one.idle and not one.leaving:  # nobody has asked meanwhile, or unloaded it
            self.evictions += 1
            await self.unload(one, LEFT)

    # ---- facts -------------------------------------------------------------------------------------------------------

    async def memory(self, seconds: float) -> dict[str, Message]:
        """What each worker holds, of those that say so in time."""
        asked = {one.name: asyncio.ensure_future(one.ask({"op": "memory"})) for one in self.loaded()}
        if asked:
            await asyncio.wait(asked.values(), timeout=seconds)
        return {name: answer.result()["ok"] for name, answer in asked.items() if answer.done() and "ok" in answer.result()}

    def status(self) -> list[Message]:
        return [{**one.status(), "default": one.name == self.default, "heat": round(self._heat.value(one.name), 2)} for one in self]


def model_name(model: str, spec: WorkerSpec) -> str:
    """What a model is called that is asked for by a name, or by its file: by that name, or like its file."""
    path = Path(spec.model)
    return model if Path(model).name == model and model != path.name else path.stem


def check_model_name(model: str, spec: WorkerSpec, others: Container[str]) -> None:
    """Raises OptionError if the default model would be called as one of the others."""
    if (name := model_name(model, spec)) in others:
        raise OptionError(f"two models are called {name}: the one to be opened and [models.{name}]; give the latter another name")


def default_memory_budget() -> int:
    """Bytes that models may have where the configuration does not say: seven eighths of what is free now."""
    from edge_rt.core.weights.units import available_memory

    free = available_memory()
    return 1 << 60 if free is None else free * 7 // 8
