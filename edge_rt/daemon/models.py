"""The models that the daemon knows of, a worker for each that is loaded, and the memory that all of them share.

What a model takes is its weights, its process, and an allowance for caches and compute, within which the worker admits requests. The sum
never exceeds the budget. Where it is short, allowances that nobody uses shrink first, then models leave that nobody asks anything:
those that have cooled down before others, the coldest first (heat: exponentially weighted counts of requests). A model
for which there is still no room waits, with a reason, until another is idle.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.core.weights.units import DecayingCounter
from edge_rt.daemon.hosted import Hosted
from edge_rt.daemon.parking import Parking
from edge_rt.daemon.process import Ended
from edge_rt.daemon.supervisor import UNLOADED, Spec
from edge_rt.daemon.tasks import Tasks
from edge_rt.errors import OptionError, ProtocolError
from edge_rt.model_hub import format_size

if TYPE_CHECKING:
    from edge_rt.daemon.frames import Message
    from edge_rt.daemon.process import Took

HALF_LIFE = 64.0
"""Requests, to any model, after which one counts half."""
MORE = 16 << 20
"""Bytes that a worker gets beyond those it is short of, if there are any: the next request is not far."""
UNWANTED = Ended("unloaded", "the model waited for memory, and nobody waits for it any more; ask again")
LEFT = Ended("unloaded", "the model left memory for another; ask again")


class Models:
    """``changed(hosted)`` is called when a worker's state is another, ``told(hosted, message)`` with what a worker says of sessions."""

    def __init__(
        self, budget: int, hung_after: float, cool_after: float, patience: float, state: Path,
        changed: Callable[[Hosted], None], told: Callable[[Hosted, Message], None],
    ) -> None:  # fmt: skip
        """``budget``: bytes. ``cool_after``: seconds without a request, 0 for never. ``patience``: how long a model waits for room.

        ``state``: the folder in which there is one for parked sessions.
        """
        self.budget, self.default = budget, ""
        self._known: dict[str, Hosted] = {}
        self._hung_after, self._cool_after, self._patience, self._parking = hung_after, cool_after, patience, Parking(state)
        self._changed, self._told = changed, told
        self._heat = DecayingCounter(HALF_LIFE)
        self._wants: dict[Hosted, int] = {}  # bytes, in the order in which they were asked for
        self._nudged = False
        self._task: asyncio.Task[None] | None = None
        self._tasks = Tasks()
        self.evictions = 0
        """How many models have left for others."""
        self._deaths = 0  # of models that are not known any more

    def __iter__(self) -> Iterator[Hosted]:
        return iter(self._known.values())

    # ---- names -------------------------------------------------------------------------------------------------------

    def know(self, name: str, spec: Spec) -> Hosted:
        """A model that may be asked for, from now on. What was known by the name is forgotten; it must not be loaded.

        Raises ModelFileError if the file is gone: then nothing is forgotten.
        """
        one = Hosted(name, spec, self._hung_after, self._parking, self._changed, self._hear)
        if (before := self._known.get(name)) is not None:
            self.forget(before)
        self._known[name] = one
        return one

    def know_default(self, model: str, spec: Spec) -> Hosted:
        """From now on, a model is asked where a request names none. It is called as it was asked for, or like its file."""
        one = self.know(name_of(model, spec), spec)
        self.default = one.name
        return one

    def forget(self, one: Hosted) -> None:
        """A model is not known any more; it must not be loaded. Who has asked for it while it left gets an error."""
        self._known.pop(one.name, None)
        self._wants.pop(one, None)
        one.stop_timer()
        one.supervisor.abandon()
        self._deaths += one.supervisor.deaths
        if self.default == one.name:
            self.default = ""

    def find(self, name: str | None = None) -> Hosted:
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

    def known(self, one: Hosted) -> bool:
        """Whether it is the model of its name still."""
        return self._known.get(one.name) is one

    def named(self, name: str) -> Hosted | None:
        """The model of a name, else one whose file is called so."""
        return next(iter(self._called(name)), None)

    def _called(self, name: str) -> list[Hosted]:
        return [self._known[name]] if name in self._known else [one for one in self if name in one.names]

    @property
    def deaths(self) -> int:
        """How often a worker has died."""
        return self._deaths + sum(one.supervisor.deaths for one in self)

    def loaded(self) -> list[Hosted]:
        """Those that can answer at once."""
        return [one for one in self if one.supervisor.state == "ready"]

    @property
    def names(self) -> str:
        """All of them, for a person."""
        return ", ".join(self._known)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def call(self, one: Hosted, command: Message, took: Took, *, awaits: bool = True) -> int:
        """Let a model's worker answer, after it was loaded if need be; the command's number. Raises ProtocolError.

        ``awaits``: somebody waits for the answer, so that the model waits for room as long as they do.
        """
        if one.supervisor.spec is None:
            self._bring(one)

        def answered(message: Message) -> None:
            if "event" not in message:
                one.awaited -= awaits
                self._done(one)
            took(message)

        number = one.supervisor.call(command, answered)
        one.under_way += 1
        one.awaited += awaits
        one.cooled = False
        if one.placed:
            one.stop_timer()
        self._heat.tick()
        self._heat.touch(one.name)
        return number

    def _done(self, one: Hosted) -> None:
        one.under_way -= 1
        if one in self._wants and not one.placed and not one.awaited and not one.bidden:
            self._nobody_waits(one)
        self._rest(one)
        if self._wants:
            self._nudge()

    def _nobody_waits(self, one: Hosted) -> None:
        """Who asked for a model that waits for room is gone: nobody is to leave for it any more."""
        del self._wants[one]
        one.stop_timer()
        one.supervisor.abandon(UNWANTED)

    def _rest(self, one: Hosted) -> None:
        """A model may have nothing to do: after a while it cools down."""
        if not one.under_way and one.placed:  # else its timer is of its waiting for room
            one.idle_since = _now()
            if self._cool_after:
                one.start_timer(self._cool_after, partial(self._cool, one))

    def _cool(self, one: Hosted) -> None:
        """Nobody has asked anything for long."""
        if one.idle and one.supervisor.state == "ready":
            self._tasks.spawn(self._cooled(one))

    async def _cooled(self, one: Hosted) -> None:
        answer = await one.ask({"op": "cool"})
        one.cooled = one.idle and "ok" in answer and not answer["ok"].get("busy")

    # ---- loading -----------------------------------------------------------------------------------------------------

    def load(self, one: Hosted) -> None:
        """Bring a model into memory before anybody asks. Raises ProtocolError: out_of_memory."""
        if one.supervisor.spec is None:
            self._bring(one)
        one.bidden = not one.placed

    async def unload(self, one: Hosted, why: Ended = UNLOADED) -> None:
        """End a model's worker; what it is at gets an error."""
        self._wants.pop(one, None)
        one.stop_timer()
        one.leaving = True  # who asks for it meanwhile waits until its memory is free
        try:
            await one.supervisor.unload(why)
        finally:
            one.placed, one.cooled, one.used, one.leaving, one.bidden = False, False, 0, False, False
            self._nudge()

    async def close(self, why: Ended) -> None:
        """End all workers."""
        self._wants.clear()
        await asyncio.gather(*(self.unload(one, why) for one in self))
        if self._task is not None:  # it may be ending another worker, and finds nothing more to do
            await self._task
        self._parking.close()

    def _bring(self, one: Hosted) -> None:
        needed = one.needs.total
        if needed > self.budget:
            refusal = self._too_large(one)
            raise ProtocolError(refusal.code, refusal.message, **refusal.fields)
        if self._task is None and not one.leaving and self.free >= needed:
            self._place(one)
            return
        one.supervisor.expect(one.spec, f"it waits for {format_size(needed)} of memory, of which {format_size(max(0, self.free))} are free")
        one.start_timer(self._patience, partial(self._give_up, one))
        self._wants[one] = needed
        self._nudge()

    def _too_large(self, one: Hosted) -> Ended:
        """Why a model is not loaded however much the others give."""
        needed, most = one.needs.total, self.budget
        message = (
            f"the model {one.name} needs {format_size(needed)} and all models may have {format_size(most)}; "
            "raise memory, or limit the model's own"
        )
        return Ended("out_of_memory", message, {"needed": needed, "available": most})

    def _put_out(self, one: Hosted) -> None:
        """A model that is open needs more than was foreseen, and more than all may have: it does not stay."""
        refusal = self._too_large(one)
        logging.getLogger("edge_rt.daemon").warning("%s", refusal.message)
        one.leaving = True
        self._tasks.spawn(self.unload(one, refusal))

    def _place(self, one: Hosted) -> None:
        """There is room: load it."""
        one.stop_timer()
        one.placed, one.cooled, one.used, one.bidden = True, False, 0, False
        one.allowance = max(one.needs.working, self.free - one.needs.fixed)
        one.supervisor.load(one.spec)

    def _give_up(self, one: Hosted) -> None:
        """A model has waited for room as long as it may."""
        if self._wants.pop(one, None) is None:  # it has just found some
            return
        needed, free = one.needs.total, max(0, self.free)
        message = (
            f"the model {one.name} needs {format_size(needed)} and {format_size(free)} are free, as other models are in use; "
            "ask again later"
        )
        self._tasks.spawn(self.unload(one, Ended("out_of_memory", message, {"needed": needed, "available": free})))

    # ---- memory ------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Bytes of the budget that no model has; less than 0 if one turned out to need more than was foreseen."""
        return self.budget - sum(one.taken for one in self)

    def _hear(self, one: Hosted, message: Message) -> None:
        """A worker says something of itself; or it is open, or has ended."""
        if "short" in message:
            if not one.leaving:
                self._wants[one] = message["short"]
                self._nudge()
        elif "opened" in message and one.needs.total > self.budget:
            self._put_out(one)
        elif "opened" in message:
            self._rest(one)
            more = max(0, one.needs.working - one.allowance)
            if more or self.free < 0:
                self._wants.setdefault(one, more)
            self._nudge()
        elif "ended" in message:
            self._nudge()
        else:
            self._told(one, message)

    def _nudge(self) -> None:
        """Something may be possible that was not."""
        self._nudged = bool(self._wants)
        if self._nudged and self._task is None:
            self._task = self._tasks.spawn(self._share())
            self._task.add_done_callback(self._shared)

    def _shared(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if self._nudged:  # after its last look
            self._nudge()

    async def _share(self) -> None:
        """Fulfil wants as far as that is possible now."""
        while self._nudged:
            self._nudged = False
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

    async def _make_room(self, one: Hosted, wanted: int) -> bool:
        """Free so many bytes for a model, at the expense of others; whether that could be."""
        for way in (self._unused, self._leave_cooled, self._parked_sessions, self._leave):
            for other in self._heat_order(one):
                if self.free >= wanted or one not in self._wants:  # there is enough, or nobody waits for it any more
                    break
                await way(other, wanted)
        return self.free >= wanted

    def _heat_order(self, but: Hosted) -> list[Hosted]:
        """The others that are in memory, coldest first."""
        names = [one.name for one in self if one.placed and one is not but]
        return [self._known[name] for name in self._heat.coldest(names)]

    async def _unused(self, one: Hosted, wanted: int) -> None:
        """Lower an allowance to what is in use, at most by what is wanted."""
        await self._lower(one, max(one.needs.working, one.used), wanted)

    async def _parked_sessions(self, one: Hosted, wanted: int) -> None:
        """Lower it further: sessions that nobody uses just now leave the worker's memory."""
        await self._lower(one, one.needs.working, wanted)

    async def _lower(self, one: Hosted, least: int, wanted: int) -> None:
        """One that is being opened answers when it is open, and is asked then: others need not wait for that."""
        if one.allowance > least and one.supervisor.state != "starting":
            await one.allow(max(least, one.allowance - (wanted - self.free)))

    async def _leave_cooled(self, one: Hosted, wanted: int) -> None:
        if one.cooled:
            await self._leave(one, wanted)

    async def _leave(self, one: Hosted, wanted: int) -> None:
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
        """What is the case with each now."""
        return [{**one.status(), "default": one.name == self.default, "heat": round(self._heat.value(one.name), 2)} for one in self]


def name_of(model: str, spec: Spec) -> str:
    """What a model is called that is asked for by a name, or by its file: by that name, or like its file."""
    path = Path(spec.model)
    return model if Path(model).name == model and model != path.name else path.stem


def check_name(model: str, spec: Spec, others: Container[str]) -> None:
    """Raises OptionError if the default model would be called as one of the others."""
    if (name := name_of(model, spec)) in others:
        raise OptionError(f"two models are called {name}: the one to be opened and [models.{name}]; give the latter another name")


def most_of_what_is_free() -> int:
    """Bytes that models may have where the configuration does not say: seven eighths of what is free now."""
    from edge_rt.core.weights.units import available_memory

    free = available_memory()
    return 1 << 60 if free is None else free * 7 // 8


def _now() -> float:
    return asyncio.get_running_loop().time()
