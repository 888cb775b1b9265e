"""The worker's generations: from the command, through waiting for memory and the steps, to the last event."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from edge_rt.core.engine import check_tokens
from edge_rt.daemon import protocol
from edge_rt.daemon.account import Account, Promise, need
from edge_rt.daemon.admission import Line, Waiting
from edge_rt.daemon.frames import Message
from edge_rt.errors import Cancelled
from edge_rt.types import record

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from edge_rt.core.generate.loop import GenerationSteps, Request
    from edge_rt.core.generate.scheduler import Running, Scheduler
    from edge_rt.daemon.store import Store
    from edge_rt.model import Model
    from edge_rt.postprocess.rules import RuleFile
    from edge_rt.session import Session
    from edge_rt.types import Event

LONG = 1 << 14
"""Characters of a prompt from which it is tokenised on another thread: a MB takes 0.5 seconds, in which nobody else would get a token."""
LONG_TOKENS = 1 << 11
"""Tokens of a prompt from which a request begins on another thread: what leaves the context is chosen then, and all may be graded."""
_T = TypeVar("_T")
_DROPPED = "the request was dropped, or its session closed"
NICER = 5
"""By how much the thread that reads long prompts is nicer: all threads of a step wait for the one whose CPU another thread has."""


def _give_way() -> None:
    if sys.platform == "linux":  # there a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + NICER))


@dataclass(eq=False)
class Asked:
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
    waiting: Waiting | None = None
    cancelled: bool = False
    unwanted: bool = False
    beginning: bool = False
    alone: bool = False
    """Nobody else has its session: it ends with the request."""


class Generations:
    """``send`` takes messages to the daemon, ``later`` a command that is to be carried out in its turn; both on any thread.

    ``note``, ``cancel``, ``credit`` and ``unwanted`` are called on any thread, also before there is a model (``opened``).
    """

    def __init__(self, send: Callable[[Message], None], later: Callable[[Message], None]) -> None:
        self._send, self._later = send, later
        self._asked: dict[int, Asked] = {}
        self._lock = threading.Lock()  # of credits
        self._aside: Executor | None = None
        self.due = False
        """Something changed, and somebody who waits may fit now: ``Line.admit``."""

    def opened(self, model: Model, batch: Scheduler, store: Store, account: Account, rules: RuleFile | None) -> None:
        """There is a model, and with it all that belongs to it."""
        self._model, self._batch, self._store, self._account, self._rules = model, batch, store, account, rules
        self.line = Line(account, self._start, self._refuse, self._queued, self.short)

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
        """Answer a command with an error."""
        found = protocol.failure(error)
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

            self._aside = ThreadPoolExecutor(1, "edge-rt prompts", _give_way)
        future = self._aside.submit(work)
        future.add_done_callback(lambda done: self._later({"op": "found", "id": command["id"], "then": partial(then, done.result)}))

    def note(self, command: Message) -> None:
        """A generation, or what reads texts, will be asked for; from now on that can be cancelled."""
        self._asked[command["id"]] = Asked(command["id"], command["credits"], command.get("pieces", False))

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
        """Nobody wants a generation any more."""
        if one := self._asked.get(command["request"]):
            self._end(one)

    def _end(self, one: Asked) -> None:
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
        one.options = options = protocol.options(command.get("options", {}))
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
        needed = need(len(tokens), max(1, asked), options.get("max_tokens"), options.get("prune"), model.engine, drafts)
        one.waiting = Waiting(command, tokens, options, needed, one.name, lambda: one.credits > 0, lambda: one.cancelled)
        self.line.add(one.waiting)
        self.due = True

    def _refuse(self, waiting: Waiting, error: Exception) -> None:
        self._asked[waiting.command["id"]].waiting = None
        self.failed(waiting.command, error)

    def _queued(self, waiting: Waiting, event: Message) -> None:
        self.sent(self._asked[waiting.command["id"]], event)

    def _start(self, waiting: Waiting, room: int | None) -> None:
        """There is memory for it: ``room`` cells, None for all that it asks for."""
        one = self._asked[waiting.command["id"]]
        one.waiting = None
        try:
            self._begin(one, waiting, room)
        except Exception as error:
            self.due = True
            self.failed(waiting.command, error)

    def _begin(self, one: Asked, waiting: Waiting, room: int | None) -> None:
        command, name, account, store = waiting.command, waiting.name, self._account, self._store
        needed = waiting.need if room is None else waiting.need._replace(cells=room)
        promised = account.bytes(needed, name) if account.limited else 0
        session = store.use(name) if name is not None else self._model.session(owner=command.get("owner", ""))
        promise = Promise(needed, session, promised)
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
        one: Asked,
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

    def _deliver(self, one: Asked, event: Event) -> bool:
        message = record(event)
        if one.pieces:
            for entry in message.get("logprobs", ()):
                entry["piece"] = self._piece(entry["token"])
                entry["top_pieces"] = [self._piece(token) for token, _ in entry["top"]]
        if message["event"] == "done" and one.name is not None:
            self._store.noted(one.name, message["context"])
        return self.sent(one, message)

    def reading(self, command: Message) -> Asked:
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

    def sent(self, one: Asked, message: Message) -> bool:
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
