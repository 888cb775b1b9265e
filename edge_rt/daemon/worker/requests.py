"""Requests in the worker: from the command, through the queue for memory and the steps, to the last event.

The queue is by priority and then in order. A smaller or more urgent request may pass one that does not fit yet, ``MAX_PASSES`` times;
after that nobody passes it, and what ends frees memory for it alone.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from edge_rt.core.engine import check_tokens
from edge_rt.daemon import protocol
from edge_rt.daemon.protocol import Message
from edge_rt.daemon.worker.memory import MemoryBudget, MemoryRequest, Reservation, memory_request
from edge_rt.errors import Cancelled, ProtocolError
from edge_rt.model_hub import format_size
from edge_rt.types import record

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from edge_rt.core.generate.loop import GenerationSteps, Request
    from edge_rt.core.generate.scheduler import Running, Scheduler
    from edge_rt.daemon.worker.memory import SessionStore
    from edge_rt.model import Model
    from edge_rt.postprocess.rules import RuleFile
    from edge_rt.session import Session
    from edge_rt.types import Event

MAX_PASSES = 8  # how often a request that waits is passed by later ones
PATIENCE = 2.0  # seconds that a request for which there is too little memory at all is kept, should the daemon allow more
RETRY_SECONDS = 1.0  # until it is tried again to admit somebody though nothing ended: a disk may have room again
_RANKS = {"high": 0, "normal": 1, "low": 2}
LONG = 1 << 14
"""Characters of a prompt from which it is tokenised on another thread: a MB takes 0.5 seconds, in which nobody else would get a token."""
LONG_TOKENS = 1 << 11
"""Tokens of a prompt from which a request begins on another thread: what leaves the context is chosen then, and all may be graded."""
NICER = 5
"""By how much the thread that reads long prompts is nicer: all threads of a step wait for the one whose CPU another thread has."""
_T = TypeVar("_T")
_DROPPED = "the request was dropped, or its session closed"


class QueueCallbacks(NamedTuple):
    """``start(request, room)`` begins a request, in so many cells (None: all it asks for); ``refuse`` ends it with an error; ``queued``
    sends its client an event.
    """

    start: Callable[[QueuedRequest, int | None], None]
    refuse: Callable[[QueuedRequest, Exception], None]
    queued: Callable[[QueuedRequest, Message], None]


@dataclass(eq=False)
class QueuedRequest:
    """A request that has not begun. ``name`` of its session, None for one of its own. ``ready``: whether its events can be sent.
    ``cancelled``: whether it was, before it came here. ``advice``: what to do if it never fits.
    """

    command: Message
    need: MemoryRequest
    name: str | None
    callbacks: QueueCallbacks
    ready: Callable[[], bool]
    cancelled: Callable[[], bool] = lambda: False
    tokens: list[int] = field(default_factory=list)
    advice: str = "ask for fewer max_tokens, shorten the prompt, or let the daemon use more memory"
    order: int = 0
    passed: int = 0
    notified: bool = False  # its client knows that it waits
    hopeless_until: float | None = None  # it never fits, and is refused then

    @property
    def rank(self) -> tuple[bool, int, int]:
        """The least is first."""
        return self.passed < MAX_PASSES, _RANKS[self.command.get("priority", "normal")] if self.passed < MAX_PASSES else 0, self.order


class AdmissionQueue:
    """Requests that wait for memory. ``report_shortage`` tells the daemon by how many bytes the allowance is too small for the first."""

    def __init__(self, budget: MemoryBudget, report_shortage: Callable[[int], None]) -> None:
        self._budget, self._report_shortage = budget, report_shortage
        self.waiting: list[QueuedRequest] = []
        self._orders = 0
        self._shortage = 0  # as reported last
        self._tried = 0.0

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, one: QueuedRequest) -> None:
        """``admit`` follows."""
        self._orders += 1
        one.order = self._orders
        self.waiting.append(one)

    def refuse(self, one: QueuedRequest, error: Exception) -> None:
        """Remove it, and end it with an error."""
        self.waiting.remove(one)
        one.callbacks.refuse(one, error)

    def withdraw(self, one: QueuedRequest) -> None:
        """Remove it; its client is told nothing."""
        self.waiting.remove(one)

    def admit(self) -> bool:
        """Start whoever fits now; whether anybody did."""
        started, self._tried = False, time.monotonic()
        for one in sorted(self.waiting, key=lambda one: one.rank):
            if not one.ready():
                continue
            room = self._room(one)
            if room is not None:
                self.waiting.remove(one)
                for other in self.waiting:
                    other.passed += other.order < one.order
                one.callbacks.start(one, room if room < one.need.cells else None)
                started = True
            elif one.cancelled():
                self.refuse(one, Cancelled("the request was cancelled before it began"))
            elif not self._may_wait(one):
                continue
            elif one.passed >= MAX_PASSES:
                break
        self._update_shortage()
        return started

    def end_patience(self) -> None:
        """The allowance was set, for those too who hoped for more of it."""
        for one in self.waiting:
            if one.hopeless_until is not None:
                one.hopeless_until = 0.0

    def next_check(self) -> float | None:
        """When ``admit`` is to be called at the latest, on the monotonic clock."""
        if not self.waiting:
            return None
        return min([self._tried + RETRY_SECONDS, *(one.hopeless_until for one in self.waiting if one.hopeless_until is not None)])

    def _room(self, one: QueuedRequest) -> int | None:
        """Cells that it may begin with, after memory was freed for them; None if it does not fit."""
        budget, need = self._budget, one.need
        if budget.missing(need, one.name) <= 0:
            return need.cells
        if budget.missing_at_best(need, one.name, alone=False) <= 0 and budget.free_for(need, one.name):
            return need.cells
        if need.least < need.cells and (cells := budget.cells(need, one.name)) and budget.free_for(need._replace(cells=cells), one.name):
            return cells
        return None

    def _may_wait(self, one: QueuedRequest) -> bool:
        """It does not fit: it waits, and its client knows; or it is refused, because it never will."""
        budget, least = self._budget, one.need._replace(cells=one.need.least)
        needed, missing = budget.bytes(least, one.name), budget.missing_at_best(least, one.name, alone=True)
        if missing <= 0:
            one.hopeless_until = None
            if not one.notified:
                one.notified = True
                available = max(0, needed - budget.missing_at_best(least, one.name, alone=False))
                reason = "the memory is promised to other requests; it begins when some of them have ended"
                one.callbacks.queued(one, {"event": "queued", "reason": reason, "needed": needed, "available": available})
            return True
        now = time.monotonic()
        if one.hopeless_until is None:
            one.hopeless_until = now + PATIENCE
        if now < one.hopeless_until:
            return True
        available = max(0, needed - missing)
        message = f"the request needs {format_size(needed)} of memory and can have {format_size(available)}; {one.advice}"
        self.refuse(one, ProtocolError("out_of_memory", message, needed=needed, available=available))
        return False

    def _update_shortage(self) -> None:
        """Report by how much the allowance is too small for the first that waits; once for each change."""
        shortage = 0
        if self.waiting:
            first = min(self.waiting, key=lambda one: one.rank)
            least = first.need._replace(cells=first.need.least)
            shortage = max(0, self._budget.missing_at_best(least, first.name, alone=False))
        if shortage != self._shortage:
            self._shortage = shortage
            self._report_shortage(shortage)


@dataclass(eq=False)
class ActiveRequest:
    """A generation, or texts to read: from the moment its command came until its last event was sent.

    ``credits``: events that may still be sent. ``pieces``: log-probabilities come with the bytes of their tokens. ``name``: of its
    session, None for one of its own. ``owns_session``: nobody else has it, and it ends with the request.
    """

    id: int
    credits: int
    pieces: bool = False
    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    session: Session | None = None
    running: Running | None = None
    waiting: QueuedRequest | None = None
    cancelled: bool = False
    unwanted: bool = False
    beginning: bool = False  # on another thread
    owns_session: bool = False


class RequestManager:
    """``register``, ``cancel``, ``add_credits`` and ``mark_unwanted`` are called on any thread, also before there is a model."""

    def __init__(self, send: Callable[[Message], None], later: Callable[[Message], None]) -> None:
        """``send`` takes messages to the daemon, ``later`` a command that is to be carried out in its turn; both on any thread."""
        self._send, self._later = send, later
        self._active: dict[int, ActiveRequest] = {}
        self._lock = threading.Lock()  # of credits
        self._background: Executor | None = None
        self._callbacks = QueueCallbacks(self._start, self._refuse, self._send_queued)
        self.due = False  # something changed, and somebody who waits may fit now

    def open(self, model: Model, batch: Scheduler, store: SessionStore, budget: MemoryBudget, rules: RuleFile | None) -> None:
        """There is a model, and with it all that belongs to it."""
        self._model, self._batch, self._store, self._budget, self._rules = model, batch, store, budget, rules
        self.queue = AdmissionQueue(budget, lambda missing: self._send({"short": missing}))

    def __len__(self) -> int:
        return len(self._active)

    def uses(self, name: str) -> bool:
        """Whether a session has a request under way."""
        return any(one.name == name for one in self._active.values())

    def end_session(self, name: str) -> bool:
        """End what runs or waits in a session that closes. False: a request begins in it on another thread, and then closes it."""
        ending = [one for one in list(self._active.values()) if one.name == name]
        for one in ending:
            self._end(one)
            one.owns_session |= one.beginning
        return not any(one.beginning for one in ending)

    def fail(self, command: Message, error: Exception) -> None:
        """Answer a command with an error."""
        found = protocol.describe_error(error)
        if found["code"] == "internal":
            logging.getLogger("edge_rt.daemon").error("%s failed", command["op"], exc_info=error)
        if (number := command.get("id")) is not None:
            self._active.pop(number, None)
            self._send({"id": number, "error": found})

    def run_in_background(self, command: Message, work: Callable[[], _T], then: Callable[[Callable[[], _T]], Message | None]) -> None:
        """Do something long; the command ``found`` follows, which calls ``then`` with what gives the result, or raises what went wrong.

        Others go on meanwhile: libllama's tokenizer may be called on any thread, Python's lock is free while it works, and Python itself
        changes threads often (``SWITCH_EVERY`` of __main__.py).
        """
        if self._background is None:
            from concurrent.futures import ThreadPoolExecutor

            self._background = ThreadPoolExecutor(1, "edge-rt prompts", _lower_priority)
        future = self._background.submit(work)
        future.add_done_callback(lambda done: self._later({"op": "found", "id": command["id"], "then": partial(then, done.result)}))

    # ---- on any thread -----------------------------------------------------------------------------------------------

    def register(self, command: Message) -> None:
        """A generation, or what reads texts, will be asked for; from now on that can be cancelled."""
        self._active[command["id"]] = ActiveRequest(command["id"], command["credits"], command.get("pieces", False))

    def cancel(self, request: int) -> None:
        """End a generation at its next step."""
        if one := self._active.get(request):
            one.cancelled = True
            if (session := one.session) is not None:
                session.cancel()

    def add_credits(self, request: int, events: int) -> None:
        """More events of a request may be sent. ``resume`` follows."""
        if one := self._active.get(request):
            with self._lock:
                one.credits += events

    def mark_unwanted(self, request: int) -> None:
        """Nobody wants a generation any more. ``drop`` follows."""
        if one := self._active.get(request):
            one.unwanted = True
        self.cancel(request)

    # ---- on the engine's thread --------------------------------------------------------------------------------------

    def resume(self, request: int) -> None:
        """Go on with a request that has got credits."""
        one = self._active.get(request)
        if one is None or one.credits <= 0:
            return
        if one.running is not None:
            self._batch.resume(one.running)
        self.due |= one.waiting is not None

    def end_waiting(self, request: int) -> None:
        """End a cancelled request that waits, for memory or for credits: it has no step at which it would notice."""
        one = self._active.get(request)
        if one is None:
            return
        if one.waiting is not None:
            self.queue.refuse(one.waiting, Cancelled("the request was cancelled before it began"))
        if one.running is not None:
            self._batch.resume(one.running)

    def drop(self, request: int) -> None:
        if one := self._active.get(request):
            self._end(one)

    def _end(self, one: ActiveRequest) -> None:
        """End a generation that runs or waits."""
        one.unwanted = True
        if one.waiting is not None:
            self.queue.refuse(one.waiting, Cancelled(_DROPPED))
        if one.running is not None:
            self._batch.drop(one.running)

    def generate(self, command: Message, model: Model) -> None:
        """Begin with the prompt's tokens: by them it is known what the request needs."""
        one = self._active[command["id"]]
        one.name = command.get("session")
        if one.name is not None:
            self._store.known(one.name)
        prompt, tools = _prompt(command), command.get("options", {}).get("tools") or ()
        one.options = options = protocol.check_options(command.get("options", {}))
        # What it needs depends on its adapter, which is opened here if it is the first to ask for it.
        model.adapters.chosen(options.get("adapter"), options.get("adapter_scale", 1.0))
        if "tokens" in command:
            check_tokens(command["tokens"], model.engine.info)
            self._enqueue(command, command["tokens"])
        elif (len(prompt) if isinstance(prompt, str) else sum(len(str(message.get("content"))) for message in prompt)) < LONG:
            self._enqueue(command, model.prompt_tokens(prompt, tools))
        else:
            self.run_in_background(command, lambda: model.prompt_tokens(prompt, tools), lambda found: self._enqueue(command, found()))

    def _enqueue(self, command: Message, tokens: list[int]) -> None:
        """A request whose tokens are known: it begins when there is memory for it."""
        one, model = self._active[command["id"]], self._model
        if one.unwanted:
            raise Cancelled(_DROPPED)
        options = one.options
        context = None if one.name is None else self._store.known(one.name).context
        most = min(options.get("context") or context or model.info.max_context, model.info.max_context)
        drafts = 0
        if (speculate := options.get("speculate", 0)) > 0:
            with model.lock:
                drafts = min(speculate, model.engine.exact_rows() - 1)
        need = memory_request(len(tokens), max(1, most), options.get("max_tokens"), options.get("prune"), model.engine, drafts)
        one.waiting = QueuedRequest(command, need, one.name, self._callbacks, lambda: one.credits > 0, lambda: one.cancelled, tokens)
        self.queue.add(one.waiting)
        self.due = True

    def _refuse(self, waiting: QueuedRequest, error: Exception) -> None:
        self._active[waiting.command["id"]].waiting = None
        self.fail(waiting.command, error)

    def _send_queued(self, waiting: QueuedRequest, event: Message) -> None:
        self.send_event(self._active[waiting.command["id"]], event)

    def _start(self, waiting: QueuedRequest, room: int | None) -> None:
        """There is memory for it: ``room`` cells, None for all that it asks for."""
        one = self._active[waiting.command["id"]]
        one.waiting = None
        try:
            self._begin(one, waiting, room)
        except Exception as error:
            self.due = True
            self.fail(waiting.command, error)

    def _begin(self, one: ActiveRequest, waiting: QueuedRequest, room: int | None) -> None:
        command, name, budget, store = waiting.command, waiting.name, self._budget, self._store
        need = waiting.need if room is None else waiting.need._replace(cells=room)
        reserved = budget.bytes(need, name) if budget.limited else 0
        session = store.use(name) if name is not None else self._model.session(owner=command.get("owner", ""))
        reservation = Reservation(need, session, reserved)
        budget.reservations.append(reservation)
        if name is not None:
            store.busy.add(name)

        def release() -> None:
            budget.reservations.remove(reservation)
            if name is not None:
                store.busy.discard(name)
            if one.owns_session:
                session.close()
            one.session = one.running = None  # each knows of the other: memory would wait for Python's collector
            self.due = True

        one.session, one.owns_session = session, name is None
        try:
            begin = session.start(_prompt(command), tokens=waiting.tokens, room=room, rules=self._rules, **one.options)
        except BaseException:
            release()
            raise
        run = partial(self._run, one, session, command, release)
        if len(waiting.tokens) < LONG_TOKENS:
            run(begin)
        else:
            one.beginning = True
            self.run_in_background(command, begin, run)

    def _run(
        self, one: ActiveRequest, session: Session, command: Message, release: Callable[[], None],
        begin: Callable[[], tuple[Request, GenerationSteps[None]]],
    ) -> None:  # fmt: skip
        """Add a request to the batch. ``begin`` gives its steps or raises why it cannot; ``release`` frees what was reserved for it."""
        try:
            job, steps = begin()
        except BaseException:
            release()
            raise
        finally:
            one.beginning = False

        def ended(error: Exception | None) -> None:
            session.end(job)
            release()
            if one.unwanted:
                error = Cancelled(_DROPPED)
            self._finish(command, error, {})

        if one.unwanted:
            steps.close()
            return ended(None)
        if one.cancelled:  # before it began, which forgets that
            session.cancel()
        running = self._batch.add(job, steps, partial(self._deliver, one), ended, command.get("priority", "normal"))
        if one.id in self._active:
            one.running = running

    def _finish(self, command: Message, error: Exception | None, answer: Message) -> None:
        if error is not None:
            self.fail(command, error)
        else:
            self._active.pop(command["id"], None)
            self._send({"id": command["id"], "ok": answer})

    def _deliver(self, one: ActiveRequest, event: Event) -> bool:
        message = record(event)
        if one.pieces:
            for entry in message.get("logprobs", ()):
                entry["piece"] = self._piece(entry["token"])
                entry["top_pieces"] = [self._piece(token) for token, _ in entry["top"]]
        if message["event"] == "done" and one.name is not None:
            self._store.add_counts(one.name, message["context"])
        return self.send_event(one, message)

    def _piece(self, token: int) -> bytes:
        return self._model.vocab.piece(token, special=True)

    def send_event(self, one: ActiveRequest, message: Message) -> bool:
        """Send an event; whether another may follow."""
        self._send({"id": one.id, **message})
        with self._lock:
            one.credits -= 1
            return one.credits > 0

    # ---- for ReadJobs ------------------------------------------------------------------------------------------------

    def start_read(self, command: Message) -> ActiveRequest:
        """Texts to embed or to score, which have no session. Raises Cancelled."""
        one = self._active[command["id"]]
        if one.cancelled:
            raise Cancelled("the request was cancelled")
        return one

    def finish_read(self, command: Message, error: Exception | None, answer: Message) -> None:
        self.due = True
        self._finish(command, error, answer)


def _prompt(command: Message) -> Any:
    """None if it is told by its tokens alone."""
    return command.get("prompt", command.get("messages"))


def _lower_priority() -> None:
    if sys.platform == "linux":  # there a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICER))
