"""What the worker process does: it owns a model, its sessions and the requests under way.

Commands are maps as the protocol's, from the daemon, which has checked them. One thread calls everything but ``note``, ``cancel`` and
``credit``, so that the model needs no lock.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_rt.daemon import protocol
from edge_rt.daemon.frames import Message
from edge_rt.errors import Cancelled, ProtocolError
from edge_rt.records import record

if TYPE_CHECKING:
    from edge_rt.core.decode.batch import Batch, Running
    from edge_rt.daemon.embeddings import Embeddings
    from edge_rt.rules import RuleFile
    from edge_rt.runtime import Model
    from edge_rt.session import Session
    from edge_rt.types import Event

PROGRESS_EVERY = 0.05
"""Seconds between two reports of one phase of opening."""


@dataclass(eq=False)
class Asked:
    """A generation, or texts to embed: from the moment its command came until its last event was sent.

    ``credits``: events that may still be sent. ``pieces``: log-probabilities come with the bytes of their tokens.
    """

    id: int
    credits: int
    pieces: bool = False
    session: Session | None = None
    running: Running | None = None
    cancelled: bool = False
    unwanted: bool = False


class Serving:
    """See above. ``send`` takes messages to the daemon, on any thread."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        self.beats = 0
        """Rises while something moves."""
        self._send = send
        self._model: Model | None = None
        self._batch: Batch | None = None
        self._embeddings: Embeddings | None = None
        self._rules: RuleFile | None = None
        self._sessions: dict[str, Session] = {}
        self._asked: dict[int, Asked] = {}
        self._lock = threading.Lock()  # of credits
        self._reported = ("", 0.0)

    @property
    def busy(self) -> bool:
        """Whether there is anybody to take a step for."""
        return self._batch is not None and (len(self._batch) > 0 or (self._embeddings is not None and len(self._embeddings) > 0))

    def step(self) -> bool:
        """One step for those who generate, and what fits beside it for those who embed; False if nobody can go on."""
        self.beats += 1
        if self._batch is None:
            return False
        stepped = self._batch.step()
        return (self._embeddings is not None and self._embeddings.step(self._batch.room())) or stepped

    @property
    def expected(self) -> float | None:
        """Seconds that the engine's step under way should take, None if that is not known; on any thread."""
        return None if self._batch is None else self._batch.expected

    def _beat(self) -> None:
        self.beats += 1

    def do(self, command: Message) -> None:
        """Carry out a command; its answer is sent, also if it is an error."""
        try:
            work = _WORK[command["op"]]
            answer = work(self, command)
        except Exception as error:
            self._failed(command, error)
        else:
            if answer is not None:
                self._send({"id": command["id"], "ok": answer})

    def _failed(self, command: Message, error: Exception) -> None:
        found = protocol.failure(error)
        if found["code"] == "internal":
            logging.getLogger("edge_rt.daemon").error("%s failed", command["op"], exc_info=error)
        if (number := command.get("id")) is not None:
            self._asked.pop(number, None)
            self._send({"id": number, "error": found})

    # ---- the model ---------------------------------------------------------------------------------------------------

    def _open(self, command: Message) -> Message:
        """Open rules and model, and take a first step, which makes what later ones need."""
        self._report("mapping", 0, 0)
        from edge_rt.registry import Registry
        from edge_rt.runtime import open as open_model

        registry = Registry.load()
        if command["rules"] is not None:
            from edge_rt.rules import RuleFile

            self._rules = RuleFile(command["rules"], registry, told=lambda _: self._tell_rules())
            self._tell_rules()
        options = dict(command["options"])
        adapters = options.pop("adapters", {})
        model = self._model = open_model(command["model"], progress=self._report, registry=registry, **options)
        model.adapters.declare(adapters)
        self._report("warm-up", 0, 0)
        from edge_rt import session  # noqa: F401 - what a request needs
        from edge_rt.core.decode.batch import Batch
        from edge_rt.core.engine import TellsProgress

        self._batch = Batch(model.engine, model.lock)
        if isinstance(model.engine, TellsProgress):
            model.engine.tell(self._beat)
        model.logits([model.vocab.bos or 0])
        info = model.info
        return {
            "path": str(model.file.path), "engine": info.engine, "device": info.device, "architecture": info.architecture,
            "context": info.max_context, "vocabulary": info.n_vocab, "notices": list(model.notices),
            "adapters": list(model.adapters.names),
        }  # fmt: skip

    def _report(self, phase: str, done: int, total: int) -> None:
        """Progress of opening; on any thread."""
        self.beats += 1
        now = time.monotonic()
        before, due = self._reported
        if phase != before or now >= due or done >= total > 0:
            self._reported = (phase, now + PROGRESS_EVERY)
            self._send({"phase": phase, "done": done, "total": total})

    def _tell_rules(self) -> None:
        """The rules were read, or could not be; on any thread."""
        if rules := self._rules:
            error = str(rules.error) if rules.error is not None else None
            self._send({"rules": {"version": rules.current.version, "order": list(rules.current.order), "error": error}})

    def _reload_rules(self, command: Message) -> Message:
        if self._rules is None:
            raise ProtocolError("option", "the daemon has no rules; start it with --rules FILE")
        changed = self._rules.reload()
        if self._rules.error is not None:
            raise self._rules.error
        return {"changed": changed, "version": self._rules.current.version}

    @property
    def _opened(self) -> Model:
        if self._model is None:  # the daemon has heard why, and is about to end us
            raise ProtocolError("unloaded", "the model could not be opened")
        return self._model

    def _tokenize(self, command: Message) -> Message:
        return {"tokens": self._opened.tokenize(command["text"], special=command.get("special", False))}

    def _detokenize(self, command: Message) -> Message:
        return {"text": self._opened.detokenize(command["tokens"])}

    def _memory(self, command: Message) -> Message:
        return {**self._opened.memory()._asdict(), "sessions": len(self._sessions), "requests": len(self._asked)}

    # ---- sessions ----------------------------------------------------------------------------------------------------

    def _session(self, command: Message) -> Session:
        found = self._sessions.get(command["session"])
        if found is None:  # the daemon asks for sessions it knows of: one that could not be restored
            raise ProtocolError("session_lost", "the session was lost with the worker; open another")
        return found

    def _open_session(self, command: Message) -> Message:
        self._sessions[command["session"]] = self._opened.session(context=command.get("context"), owner=command.get("owner", ""))
        return {}

    def _close_session(self, command: Message) -> None:
        session = self._sessions.pop(command["session"], None)
        if session is not None:
            for one in [one for one in list(self._asked.values()) if one.session is session]:
                self._end(one)
            session.close()

    def _clone_session(self, command: Message) -> Message:
        self._sessions[command["new"]] = self._session(command).clone()
        return {}

    def _save_session(self, command: Message) -> Message:
        path = Path(command["path"])
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._session(command).save(path)
        return {}

    def _restore_session(self, command: Message) -> Message:
        self._sessions[command["session"]] = session = self._opened.restore(command["path"], owner=command.get("owner", ""))
        return {"tokens": len(session.tokens)}

    # ---- generation --------------------------------------------------------------------------------------------------

    def note(self, command: Message) -> None:
        """A generation, or embeddings, will be asked for; from now on that can be cancelled."""
        self._asked[command["id"]] = Asked(command["id"], command["credits"], command.get("pieces", False))

    def cancel(self, request: int) -> None:
        """End a generation at its next step; on any thread. ``_cancel`` follows."""
        if one := self._asked.get(request):
            one.cancelled = True
            if (session := one.session) is not None:
                session.cancel()

    def credit(self, request: int, events: int) -> None:
        """More events of a generation may be sent; on any thread. ``_resume`` follows."""
        if one := self._asked.get(request):
            with self._lock:
                one.credits += events

    def unwanted(self, request: int) -> None:
        """Nobody wants a generation any more; on any thread. ``_drop`` follows."""
        if one := self._asked.get(request):
            one.unwanted = True
        self.cancel(request)

    def _resume(self, command: Message) -> None:
        one = self._asked.get(command["request"])
        if one is not None and one.running is not None and self._batch is not None and one.credits > 0:
            self._batch.resume(one.running)

    def _cancel(self, command: Message) -> None:
        one = self._asked.get(command["request"])
        if one is not None and one.running is not None and self._batch is not None:
            self._batch.resume(one.running)  # it may be paused, and has no next step then

    def _drop(self, command: Message) -> None:
        if one := self._asked.get(command["request"]):
            self._end(one)

    def _end(self, one: Asked) -> None:
        """Let go of a generation that runs."""
        one.unwanted = True
        if one.running is not None and self._batch is not None:
            self._batch.drop(one.running)

    def _generate(self, command: Message) -> None:
        one = self._asked[command["id"]]
        if one.unwanted:
            raise Cancelled("the request was dropped, or its session closed")
        own = "session" not in command
        session = self._opened.session(owner=command.get("owner", "")) if own else self._session(command)
        try:
            options: dict[str, Any] = protocol.options(command.get("options", {}))
            prompt = command["prompt"] if "prompt" in command else command["messages"]
            one.session = session
            job, steps = session.begin(prompt, rules=self._rules, **options)
        except BaseException:
            if own:
                session.close()
            raise
        if one.cancelled:  # before it began, which forgets that
            session.cancel()

        def ended(error: Exception | None) -> None:
            session.end(job)
            if own:
                session.close()
            if one.unwanted:
                error = Cancelled("the request was dropped, or its session closed")
            if error is None:
                self._asked.pop(one.id, None)
                self._send({"id": one.id, "ok": {}})
            else:
                self._failed(command, error)

        assert self._batch is not None, "it was made with the model"
        running = self._batch.add(job, steps, partial(self._deliver, one), ended, command.get("priority", "normal"))
        if one.id in self._asked:
            one.running = running

    def _deliver(self, one: Asked, event: Event) -> bool:
        message = record(event)
        if one.pieces:
            for entry in message.get("logprobs", ()):
                entry["piece"] = self._piece(entry["token"])
                entry["top_pieces"] = [self._piece(token) for token, _ in entry["top"]]
        return self._say(one, message)

    def _say(self, one: Asked, message: Message) -> bool:
        """Send an event; whether another one may be sent."""
        self._send({"id": one.id, **message})
        with self._lock:
            one.credits -= 1
            return one.credits > 0

    def _embed(self, command: Message) -> None:
        one = self._asked[command["id"]]
        if one.cancelled:
            raise Cancelled("the request was cancelled")
        if self._embeddings is None:
            from edge_rt.daemon.embeddings import Embeddings

            self._embeddings = Embeddings(self._opened, self._say, self._embedded)
        self._embeddings.add(one, command)

    def _embedded(self, command: Message, error: Exception | None, answer: Message) -> None:
        if error is not None:
            self._failed(command, error)
            return
        self._asked.pop(command["id"], None)
        self._send({"id": command["id"], "ok": answer})

    def _piece(self, token: int) -> bytes:
        return self._opened.vocab.piece(token, special=True)


_WORK: dict[str, Callable[[Serving, Message], Message | None]] = {
    "open": Serving._open,
    "reload_rules": Serving._reload_rules,
    "tokenize": Serving._tokenize,
    "detokenize": Serving._detokenize,
    "memory": Serving._memory,
    "open_session": Serving._open_session,
    "close_session": Serving._close_session,
    "clone_session": Serving._clone_session,
    "save_session": Serving._save_session,
    "restore_session": Serving._restore_session,
    "generate": Serving._generate,
    "embed": Serving._embed,
    "resume": Serving._resume,
    "cancel": Serving._cancel,
    "drop": Serving._drop,
}
"""What answers None has answered itself, or has no answer."""
