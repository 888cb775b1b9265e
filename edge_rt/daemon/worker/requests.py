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
from edge_rt.daemon.worker.memory import MemoryBudget, Reservation, memory_request
from edge_rt.errors import Cancelled, ProtocolError
from edge_rt.model_hub import format_size
from edge_rt.types import record

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from edge_rt.core.generate.loop import GenerationSteps, Request
    from edge_rt.core.generate.scheduler import Running, Scheduler
    from edge_rt.daemon.worker.memory import MemoryRequest, SessionStore
    from edge_rt.model import Model
    from edge_rt.postprocess.rules import RuleFile
    from edge_rt.session import Session
    from edge_rt.types import Event

MAX_PASSES = 8  # so often a request that waits is passed by later ones
PATIENCE = 2.0  # seconds that a request for which there is too little memory at all is kept, should the daemon allow more
RETRY_SECONDS = 1.0  # seconds between two looks whether something fits now that did not, though nothing ended: a disk may have room again
_RANKS = {"high": 0, "normal": 1, "low": 2}


class QueueCallbacks(NamedTuple):
    """Whose request waits: ``start(request, room)`` begins one, in so many cells (None: no limit); ``refuse`` ends one with an error;
    ``queued`` tells one's client.
    """

    start: Callable[[QueuedRequest, int | None], None]
    refuse: Callable[[QueuedRequest, Exception], None]
    queued: Callable[[QueuedRequest, Message], None]


@dataclass(eq=False)
class QueuedRequest:
    """A request that has not begun. ``name`` of its session, None for one of its own. ``ready``: whether its events can be sent.
    ``cancelled``: whether it was, before it came here. ``asker``: None for the line's own. ``advice``: what to do if it never fits.
    """

    command: Message
    tokens: list[int]
    options: dict[str, Any]
    need: MemoryRequest
    name: str | None
    ready: Callable[[], bool]
    cancelled: Callable[[], bool] = lambda: False
    asker: QueueCallbacks | None = None
    advice: str = "ask for fewer max_tokens, shorten the prompt, or let the daemon use more memory"
    order: int = 0
    passed: int = 0
    told: bool = False
    until: float | None = None  # it is hopeless, and refused then

    @property
    def rank(self) -> tuple[bool, int, int]:
        """The least is first."""
        return self.passed < MAX_PASSES, _RANKS[self.command.get("priority", "normal")] if self.passed < MAX_PASSES else 0, self.order


class AdmissionQueue:
    """Requests that wait. ``start``, ``refuse`` and ``queued`` are of the ``Asker`` of those that have none of their own; ``short`` tells
    the daemon by how many bytes the allowance is too small for the first.
    """

    def __init__(
        self,
        account: MemoryBudget,
        start: Callable[[QueuedRequest, int | None], None],
        refuse: Callable[[QueuedRequest, Exception], None],
        queued: Callable[[QueuedRequest, Message], None],
        short: Callable[[int], None],
    ) -> None:
        self._account, self._asker, self._short = account, QueueCallbacks(start, refuse, queued), short
        self.waiting: list[QueuedRequest] = []
        self._orders = 0
        self._told = 0
        self._looked = 0.0

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, one: QueuedRequest) -> None:
        self._orders += 1
        one.order = self._orders
        self.waiting.append(one)

    def leave(self, one: QueuedRequest, error: Exception) -> None:
        """It does not want to wait any longer."""
        self.waiting.remove(one)
        self._asker_of(one).refuse(one, error)

    def withdraw(self, one: QueuedRequest) -> None:
        """Its asker does not want it to wait, and needs no error."""
        self.waiting.remove(one)

    def _asker_of(self, one: QueuedRequest) -> QueueCallbacks:
        return one.asker or self._asker

    def admit(self) -> bool:
        """Let in whoever fits now; whether anybody did."""
        started, self._looked = False, time.monotonic()
        for one in sorted(self.waiting, key=lambda one: one.rank):
            if not one.ready():
                continue
            room = self._room(one)
            if room is not None:
                self.waiting.remove(one)
                for other in self.waiting:
                    other.passed += other.order < one.order
                self._asker_of(one).start(one, room if room < one.need.cells else None)
                started = True
            elif one.cancelled():
                self.leave(one, Cancelled("the request was cancelled before it began"))
            elif not self._waits(one):
                continue
            elif one.passed >= MAX_PASSES:
                break
        self._tell_short()
        return started

    def allowed(self) -> None:
        """The allowance was set, for those too who hoped for more of it."""
        for one in list(self.waiting):
            if one.until is not None:
                one.until = 0.0

    def due(self) -> float | None:
        """When ``admit`` is to be called at the latest, on the monotonic clock."""
        if not self.waiting:
            return None
        return min([self._looked + RETRY_SECONDS, *(one.until for one in self.waiting if one.until is not None)])

    def _room(self, one: QueuedRequest) -> int | None:
        """Cells that it may begin with, after memory was freed for them; None if it does not fit."""
        account, need = self._account, one.need
        if account.missing(need, one.name) <= 0:
            return need.cells
        if account.missing_at_best(need, one.name, alone=False) <= 0 and account.free_for(need, one.name):
            return need.cells
        if need.least < need.cells and (cells := account.cells(need, one.name)) and account.free_for(need._replace(cells=cells), one.name):
            return cells
        return None

    def _waits(self, one: QueuedRequest) -> bool:
        """It does not fit: it waits, and its client knows; or it is refused, because it never will."""
        account, least = self._account, one.need._replace(cells=one.need.least)
        needed, missing = account.bytes(least, one.name), account.missing_at_best(least, one.name, alone=True)
        if missing <= 0:
            one.until = None
            if not one.told:
                one.told = True
                available = max(0, needed - account.missing_at_best(least, one.name, alone=False))
                reason = "the memory is promised to other requests; it begins when some of them have ended"
                self._asker_of(one).queued(one, {"event": "queued", "reason": reason, "needed": needed, "available": available})
            return True
        now = time.monotonic()
        if one.until is None:
            one.until = now + PATIENCE
        if now < one.until:
            return True
        available = max(0, needed - missing)
        self.leave(one, ProtocolError(
            "out_of_memory",
            f"the request needs {format_size(needed)} of memory and can have {format_size(available)}; {one.advice}",
            needed=needed, available=available,
        ))  # fmt: skip
        return False

    def _tell_short(self) -> None:
        """By how much the allowance is too small for the first that waits; once for each change."""
        first = min(self.waiting, key=lambda one: one.rank, default=None)
        least = None if first is None else first.need._replace(cells=first.need.least)
        short = 0 if first is None or least is None else max(0, self._account.missing_at_best(least, first.name, alone=False))
        if short != self._told:
            self._told = short
            self._short(short)


LONG = 1 << 14
"""Characters of a prompt from which it is tokenised on another thread: a MB takes 0.5 seconds, in which nobody else would get a token."""
LONG_TOKENS = 1 << 11
"""Tokens of a prompt from which a request begins on another thread: what leaves the context is chosen then, and all may be graded."""
_T = TypeVar("_T")
_DROPPED = "the request was dropped, or its session closed"
NICER = 5  # by how much the thread that reads long prompts is nicer: all threads of a step wait for the one whose CPU another thread has


def _lower_priority() -> None:
    if sys.platform == "linux":  # there a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICER))


@dataclass(eq=False)
class ActiveRequest:
    """A generation, or texts to read: from the moment its command came until its last event was sent.

    ``credits``: events that may still be sent. ``pieces``: log-probabilities come with the bytes of their tokens. ``name``: of its
    session, None for one of its own.
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
    beginning: bool = False
    alone: bool = False  # nobody else has its session: it ends with the request


class RequestManager:
    """``send`` takes messages to the daemon, ``later`` a command that is to be carried out in its turn; both on any thread.

    ``note``, ``cancel``, ``credit`` and ``unwanted`` are called on any thread, also before there is a model (``opened``).
    """

    def __init__(self, send: Callable[[Message], None], later: Callable[[Message], None]) -> None:
        self._send, self._later = send, later
        self._asked: dict[int, ActiveRequest] = {}
        self._lock = threading.Lock()  # of credits
        self._aside: Executor | None = None
        self.due = False  # something changed, and somebody who waits may fit now: ``Line.admit``

    def opened(self, model: Model, batch: Scheduler, store: SessionStore, account: MemoryBudget, rules: RuleFile | None) -> None:
        """There is a model, and with it all that belongs to it."""
        self._model, self._batch, self._store, self._account, self._rules = model, batch, store, account, rules
        self.line = AdmissionQueue(account, self._start, self._refuse, self._queued, self.short)

    def __len__(self) -> int:
        return len(self._asked)

    def short(self, missing: int) -> None:
        """Tell the daemon by how many bytes the allowance is too small."""
        self._send({"short": missing})

    def uses(self, name: str) -> bool:
        """Whether a session has a request under way."""
        return any(one.name == name for one in self._asked.values())

    def end(self, name: str) -> bool:
        """A session closes: let go of what runs or waits in it. False: a request begins in it on another thread, and then closes it."""
        ending = [one for one in list(self._asked.values()) if one.name == name]
        for one in ending:
            self._end(one)
            one.alone |= one.beginning
        return not any(one.beginning for one in ending)

    def failed(self, command: Message, error: Exception) -> None:
        found = protocol.describe_error(error)
        if found["code"] == "internal":
            logging.getLogger("edge_rt.daemon").error("%s failed", command["op"], exc_info=error)
        if (number := command.get("id")) is not None:
            self._asked.pop(number, None)
            self._send({"id": number, "error": found})

    def on_another_thread(self, command: Message, work: Callable[[], _T], then: Callable[[Callable[[], _T]], Message | None]) -> None:
        """Do something long; the command ``found`` follows, which calls ``then`` with what gives the result, or raises what went wrong.

        Others go on meanwhile: libllama's tokenizer may be called on any thread, Python's lock is free while it works, and Python itself
        changes threads often (worker.py).
        """
        if self._aside is None:
            from concurrent.futures import ThreadPoolExecutor

            self._aside = ThreadPoolExecutor(1, "edge-rt prompts", _lower_priority)
        future = self._aside.submit(work)
        future.add_done_callback(lambda done: self._later({"op": "found", "id": command["id"], "then": partial(then, done.result)}))

    def note(self, command: Message) -> None:
        """A generation, or what reads texts, will be asked for; from now on that can be cancelled."""
        self._asked[command["id"]] = ActiveRequest(command["id"], command["credits"], command.get("pieces", False))

    def cancel(self, request: int) -> None:
        """End a generation at its next step; on any thread."""
        if one := self._asked.get(request):
            one.cancelled = True
            if (session := one.session) is not None:
                session.cancel()

    def credit(self, request: int, events: int) -> None:
        """More events of a generation may be sent; on any thread. ``resume`` follows."""
        if one := self._asked.get(request):
            with self._lock:
                one.credits += events

    def unwanted(self, request: int) -> None:
        """Nobody wants a generation any more; on any thread. ``drop`` follows."""
        if one := self._asked.get(request):
            one.unwanted = True
        self.cancel(request)

    def resume(self, command: Message) -> None:
        """More events of a generation may be sent: go on."""
        one = self._asked.get(command["request"])
        if one is None or one.credits <= 0:
            return
        if one.running is not None:
            self._batch.resume(one.running)
        self.due |= one.waiting is not None

    def cancelled(self, command: Message) -> None:
        """A generation was cancelled: one that waits, for memory or for credits, has no step at which it would notice."""
        one = self._asked.get(command["request"])
        if one is None:
            return
        if one.waiting is not None:
            self.line.leave(one.waiting, Cancelled("the request was cancelled before it began"))
        if one.running is not None:
            self._batch.resume(one.running)

    def drop(self, command: Message) -> None:
        if one := self._asked.get(command["request"]):
            self._end(one)

    def _end(self, one: ActiveRequest) -> None:
        """Let go of a generation that runs or waits."""
        one.unwanted = True
        if one.waiting is not None:
            self.line.leave(one.waiting, Cancelled(_DROPPED))
        if one.running is not None:
            self._batch.drop(one.running)

    def generate(self, command: Message) -> None:
        """Begin with the prompt's tokens: by them it is known what the request needs."""
        one = self._asked[command["id"]]
        one.name = command.get("session")
        if one.name is not None:
            self._store.known(one.name)
        prompt, tools = _prompt(command), command.get("options", {}).get("tools") or ()
        one.options = options = protocol.check_options(command.get("options", {}))
        # What it needs depends on its adapter, which is opened here if it is the first to ask for it.
        self._model.adapters.chosen(options.get("adapter"), options.get("adapter_scale", 1.0))
        if "tokens" in command:
            check_tokens(command["tokens"], self._model.engine.info)
            self.arrived(command, command["tokens"])
        elif (len(prompt) if isinstance(prompt, str) else sum(len(str(message.get("content"))) for message in prompt)) < LONG:
            self.arrived(command, self._model.prompt_tokens(prompt, tools))
        else:
            self.on_another_thread(command, lambda: self._model.prompt_tokens(prompt, tools), lambda found: self.arrived(command, found()))

    def arrived(self, command: Message, tokens: list[int]) -> None:
        """A request whose tokens are known: it begins when there is memory for it."""
        one, model = self._asked[command["id"]], self._model
        if one.unwanted:
            raise Cancelled(_DROPPED)
        options = one.options
        context = None if one.name is None else self._store.known(one.name).context
        asked = min(options.get("context") or context or model.info.max_context, model.info.max_context)
        drafts = 0
        if (speculate := options.get("speculate", 0)) > 0:
            with model.lock:
                drafts = min(speculate, model.engine.exact_rows() - 1)
        needed = memory_request(len(tokens), max(1, asked), options.get("max_tokens"), options.get("prune"), model.engine, drafts)
        one.waiting = QueuedRequest(command, tokens, options, needed, one.name, lambda: one.credits > 0, lambda: one.cancelled)
        self.line.add(one.waiting)
        self.due = True

    def _refuse(self, waiting: QueuedRequest, error: Exception) -> None:
        self._asked[waiting.command["id"]].waiting = None
        self.failed(waiting.command, error)

    def _queued(self, waiting: QueuedRequest, event: Message) -> None:
        self.sent(self._asked[waiting.command["id"]], event)

    def _start(self, waiting: QueuedRequest, room: int | None) -> None:
        """There is memory for it: ``room`` cells, None for all that it asks for."""
        one = self._asked[waiting.command["id"]]
        one.waiting = None
        try:
            self._begin(one, waiting, room)
        except Exception as error:
            self.due = True
            self.failed(waiting.command, error)

    def _begin(self, one: ActiveRequest, waiting: QueuedRequest, room: int | None) -> None:
        command, name, account, store = waiting.command, waiting.name, self._account, self._store
        needed = waiting.need if room is None else waiting.need._replace(cells=room)
        promised = account.bytes(needed, name) if account.limited else 0
        session = store.use(name) if name is not None else self._model.session(owner=command.get("owner", ""))
        promise = Reservation(needed, session, promised)
        account.promises.append(promise)
        if name is not None:
            store.busy.add(name)

        def over() -> None:
            account.promises.remove(promise)
            if name is not None:
                store.busy.discard(name)
            if one.alone:
                session.close()
            one.session = one.running = None  # each knows of the other: memory would wait for Python's collector
            self.due = True

        one.session, one.alone = session, name is None
        try:
            begin = session.start(_prompt(command), tokens=waiting.tokens, room=room, rules=self._rules, **waiting.options)
        except BaseException:
            over()
            raise
        begun = partial(self._begun, one, session, command, over)
        if len(waiting.tokens) < LONG_TOKENS:
            begun(begin)
        else:
            one.beginning = True
            self.on_another_thread(command, begin, begun)

    def _begun(
        self,
        one: ActiveRequest,
        session: Session,
        command: Message,
        over: Callable[[], None],
        begin: Callable[[], tuple[Request, GenerationSteps[None]]],
    ) -> None:
        """A request takes its first step. ``begin`` gives it or raises why it cannot; ``over`` lets go of what it was promised."""
        try:
            job, steps = begin()
        except BaseException:
            over()
            raise
        finally:
            one.beginning = False

        def ended(error: Exception | None) -> None:
            session.end(job)
            over()
            if one.unwanted:
                error = Cancelled(_DROPPED)
            if error is None:
                self._asked.pop(one.id, None)
                self._send({"id": one.id, "ok": {}})
            else:
                self.failed(command, error)

        if one.unwanted:
            steps.close()
            return ended(None)
        if one.cancelled:  # before it began, which forgets that
            session.cancel()
        running = self._batch.add(job, steps, partial(self._deliver, one), ended, command.get("priority", "normal"))
        if one.id in self._asked:
            one.running = running

    def _deliver(self, one: ActiveRequest, event: Event) -> bool:
        message = record(event)
        if one.pieces:
            for entry in message.get("logprobs", ()):
                entry["piece"] = self._piece(entry["token"])
                entry["top_pieces"] = [self._piece(token) for token, _ in entry["top"]]
        if message["event"] == "done" and one.name is not None:
            self._store.noted(one.name, message["context"])
        return self.sent(one, message)

    def reading(self, command: Message) -> ActiveRequest:
        """Texts to embed or to score, which have no session. Raises Cancelled."""
        one = self._asked[command["id"]]
        if one.cancelled:
            raise Cancelled("the request was cancelled")
        return one

    def answered(self, command: Message, error: Exception | None, answer: Message) -> None:
        """A request that has no session is over."""
        self.due = True
        if error is not None:
            self.failed(command, error)
            return
        self._asked.pop(command["id"], None)
        self._send({"id": command["id"], "ok": answer})

    def sent(self, one: ActiveRequest, message: Message) -> bool:
        """Send an event; whether another may follow."""
        self._send({"id": one.id, **message})
        with self._lock:
            one.credits -= 1
            return one.credits > 0

    def _piece(self, token: int) -> bytes:
        return self._model.vocab.piece(token, special=True)


def _prompt(command: Message) -> Any:
    """None if it is told by its tokens alone."""
    return command.get("prompt", command.get("messages"))
