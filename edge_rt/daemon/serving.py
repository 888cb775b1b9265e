"""What the worker process does: it owns a model, its sessions and the requests under way.

Commands are maps as the protocol's, from the daemon, which has checked them. One thread calls everything but ``generations``' ``note``,
``cancel``, ``credit`` and ``unwanted``, so that the model needs no lock.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.daemon.account import Account
from edge_rt.daemon.frames import Message
from edge_rt.daemon.generations import LONG, Generations
from edge_rt.daemon.store import Store
from edge_rt.errors import ProtocolError, UserError
from edge_rt.power.limits import sustained

if TYPE_CHECKING:
    from edge_rt.core.generate.scheduler import Scheduler
    from edge_rt.daemon.readings import Readings
    from edge_rt.model import Model
    from edge_rt.postprocess.rules import RuleFile

PROGRESS_EVERY = 0.05
"""Seconds between two reports of one phase of opening."""
TELL_EVERY = 0.2
"""Seconds between two words about what is held, and by which share it must have changed."""
NOTICEABLE = 1 / 32
SUSTAINED_EVERY = 1.0
"""Seconds between two words about power and temperature."""


class Serving:
    """See above. ``send`` takes messages to the daemon, ``later`` a command that is to be carried out in its turn; both on any thread."""

    def __init__(self, send: Callable[[Message], None], later: Callable[[Message], None]) -> None:
        self.beats = 0
        """Rises while something moves."""
        self.generations = Generations(send, later)
        self._send = send
        self._model: Model | None = None
        self._batch: Scheduler | None = None
        self._readings: Readings | None = None
        self._rules: RuleFile | None = None
        self._store: Store | None = None
        self._reported = ("", 0.0)
        self._cool = False
        self._held, self._held_due, self._sustained_due = (0, 0), 0.0, 0.0

    def step(self) -> bool:
        """One step for those who generate, and what fits beside it for those whose texts are read; False if nobody can go on."""
        self.beats += 1
        if self._batch is None:
            return False
        moved = self._batch.step()
        if self._readings is not None:
            room, started = self._batch.room(), time.perf_counter()
            moved = self._readings.step(room) or moved
            self._batch.waited(time.perf_counter() - started)
        return self._settle() or moved

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
            self.generations.failed(command, error)
        else:
            if answer is not None:
                self._send({"id": command["id"], "ok": answer})
        self._settle()

    def patience(self) -> float | None:
        """Seconds until something is to be done though no command comes; then ``step``."""
        if self._store is None:
            return None
        times = [self.generations.line.due(), self._held_due if self._changed_noticeably() else None]
        return max(0.0, min(known) - time.monotonic()) if (known := [one for one in times if one is not None]) else None

    def _settle(self) -> bool:
        """Let in who fits since something changed; whether anybody did. Tell what is held, if that changed."""
        if self._store is None:
            return False
        now, generations, started = time.monotonic(), self.generations, False
        due = generations.line.due()
        if generations.due or (due is not None and due <= now):
            generations.due = False
            started = generations.line.admit()
        if now >= self._held_due:
            self._held_due = now + TELL_EVERY
            if self._changed_noticeably():
                self._tell_held()
            self._tell_sustained(now)
        return started

    def _tell_sustained(self, now: float) -> None:
        """What became of limits of power and temperature, while there is work."""
        if now >= self._sustained_due:
            self._sustained_due = now + SUSTAINED_EVERY
            if (found := sustained(self._opened.engine)) is not None:
                self._send({"sustained": found._asdict()})

    def _tell_held(self) -> None:
        self._held = self._bytes()
        self._send(dict(zip(("held", "reserved"), self._held, strict=True)))

    def _bytes(self) -> tuple[int, int]:
        return self._account.held(), self._account.reserved()

    def _changed_noticeably(self) -> bool:
        return any(abs(now - told) > NOTICEABLE * told for now, told in zip(self._bytes(), self._held, strict=True))

    # ---- the model ---------------------------------------------------------------------------------------------------

    def _open(self, command: Message) -> Message:
        """Open rules and model, and take a first step, which makes what later ones need."""
        self._report("mapping", 0, 0)
        from edge_rt.model import open as open_model
        from edge_rt.plugin_host.registry import Registry

        registry = Registry.load()
        if command["rules"] is not None:
            from edge_rt.postprocess.rules import RuleFile

            self._rules = RuleFile(command["rules"], registry, told=lambda _: self._tell_rules())
            self._tell_rules()
        options = dict(command["options"])
        adapters = options.pop("adapters", {})
        model = self._model = open_model(command["model"], progress=self._report, registry=registry, **options)
        model.adapters.declare(adapters)
        self._report("warm-up", 0, 0)
        from edge_rt import session  # noqa: F401 - what a request needs
        from edge_rt.core.engine import TellsProgress
        from edge_rt.core.generate.scheduler import Scheduler

        self._batch = Scheduler(model.engine, model.lock)
        if isinstance(model.engine, TellsProgress):
            model.engine.tell(self._beat)
        model.logits([model.vocab.bos or 0])
        store = Store(model, self._send, command.get("parked"), self._beat)
        self._account = Account(model, store, command.get("allowance"))
        self.generations.opened(model, self._batch, store, self._account, self._rules)
        self._store = store
        info = model.info
        return {
            "path": str(model.file.path), "engine": info.engine, "device": info.device, "architecture": info.architecture,
            "context": info.max_context, "vocabulary": info.n_vocab, "notices": list(model.notices),
            "adapters": list(model.adapters.names), "compensation": dict(model.compensation.facts) if model.compensation else None,
            "needs": self._needs(command), "template": model.template,
        }  # fmt: skip

    def _needs(self, command: Message) -> Message:
        """Bytes of weights at most, of the process beside them, and the least to work with, as far as that is known."""
        from edge_rt.daemon.facts import anonymous

        mapped, limit = self._opened.memory().weights_mapped, command["options"].get("memory")
        process, held = anonymous(), self._account.held()
        found = {"weights": min(mapped, limit) if limit else mapped, "process": None if process is None else max(0, process - held)}
        found["working"] = self._account.least() or None
        return {name: size for name, size in found.items() if size is not None}

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

    @property
    def _sessions(self) -> Store:
        if self._store is None:
            raise ProtocolError("unloaded", "the model could not be opened")
        return self._store

    def _tokenize(self, command: Message) -> Message | None:
        text, how = command["text"], {"special": command.get("special", False), "bos": command.get("bos")}
        if len(text) < LONG:
            return {"tokens": self._opened.tokenize(text, **how)}
        self.generations.on_another_thread(command, lambda: {"tokens": self._opened.tokenize(text, **how)}, lambda found: found())
        return None

    def _found(self, command: Message) -> Message | None:
        """Another thread is done."""
        answer: Message | None = command["then"]()
        return answer

    def _detokenize(self, command: Message) -> Message:
        return {"text": self._opened.detokenize(command["tokens"])}

    def _tokenizer(self, command: Message) -> Message:
        vocab = self._opened.vocab
        bos, eos = (None if one is None else vocab.piece(one, special=True).decode(errors="replace") for one in (vocab.bos, vocab.eos))
        return {"bos": bos, "eos": eos, "template": vocab.chat_template(), "tokens": vocab.n_tokens}

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _memory(self, command: Message) -> Message:
        """Bytes by owner. ``by_session`` names sessions: it is for the daemon alone."""
        from edge_rt.daemon.facts import memory

        generations = self.generations
        found = memory(self._opened, self._sessions, self._account)
        return {**found, "requests": len(generations), "queued": len(generations.line)}

    def _allow(self, command: Message) -> Message:
        """Caches and steps may hold so many bytes from now on. Who runs is not cut."""
        self._account.allowance = command["bytes"]
        self._account.free(0)
        self.generations.line.allowed()
        self.generations.due = True
        self._held = self._bytes()
        return dict(zip(("held", "reserved"), self._held, strict=True))

    def _cool_down(self, command: Message) -> Message:
        """Give back all that can be had again, if nobody asks anything."""
        if len(self.generations):
            return {"busy": True}
        from edge_rt.native.memory import trim

        for name in self._sessions.idle():
            if not self._sessions.park(name):
                break
        self._opened.prefixes.clear()
        self._opened.cool()
        gc.collect()
        trim()
        self._cool = True
        return {"held": self._account.held()}

    def _park_session(self, command: Message) -> Message:
        name, store = command["session"], self._sessions
        store.known(name)
        if self.generations.uses(name):
            raise ProtocolError("busy", "the session answers a request; wait for it")
        if name in store.idle() and not store.park(name):
            raise UserError("the session cannot be parked; its folder is full, or there is none")
        self.generations.due = True
        return {"held": self._account.held()}

    # ---- sessions ----------------------------------------------------------------------------------------------------

    def _open_session(self, command: Message) -> Message:
        self._sessions.open(command["session"], command.get("context"), command.get("owner", ""))
        return {}

    def _close_session(self, command: Message) -> None:
        name = command["session"]
        self._sessions.close(name, end=self.generations.end(name))
        self.generations.due = True

    def _clone_session(self, command: Message) -> Message:
        store, name = self._sessions, command["session"]
        room = name not in store.live or self._has_room(store.live[name].history.cells, but=name)
        store.clone(name, command["new"], room=room)
        return {}

    def _has_room(self, cells: int, but: str | None = None) -> bool:
        """Whether a session of so many cells fits, after others were parked if need be."""
        return not self._account.limited or self._account.free(self._account.bytes_of(cells), but)

    def _save_session(self, command: Message) -> Message:
        self._sessions.save(command["session"], Path(command["path"]))
        return {}

    def _restore_session(self, command: Message) -> Message:
        owner, path = command.get("owner", ""), Path(command["path"])
        tokens = self._sessions.restore(command["session"], path, owner, self._has_room, context=command.get("context"))
        return {"tokens": tokens}

    # ---- generation --------------------------------------------------------------------------------------------------

    def _generate(self, command: Message) -> None:
        self._warm()
        self.generations.generate(command)

    def _read(self, command: Message) -> None:
        one = self.generations.reading(command)
        self._warm()
        if self._readings is None:
            from edge_rt.daemon.readings import Readings

            say, ended, line = self.generations.sent, self.generations.answered, self.generations.line
            self._readings = Readings(self._opened, self._account, line, say, ended)
        self._readings.add(one, command)

    def _warm(self) -> None:
        """Somebody asks again."""
        model = self._opened
        if self._cool:
            self._cool = False
            model.warm()

    def _resume(self, command: Message) -> None:
        self.generations.resume(command)

    def _cancel(self, command: Message) -> None:
        self.generations.cancelled(command)

    def _drop(self, command: Message) -> None:
        self.generations.drop(command)


_WORK: dict[str, Callable[[Serving, Message], Message | None]] = {
    "open": Serving._open,
    "reload_rules": Serving._reload_rules,
    "tokenize": Serving._tokenize,
    "detokenize": Serving._detokenize,
    "tokenizer": Serving._tokenizer,
    "found": Serving._found,
    "memory": Serving._memory,
    "allow": Serving._allow,
    "cool": Serving._cool_down,
    "park_session": Serving._park_session,
    "open_session": Serving._open_session,
    "close_session": Serving._close_session,
    "clone_session": Serving._clone_session,
    "save_session": Serving._save_session,
    "restore_session": Serving._restore_session,
    "generate": Serving._generate,
    "embed": Serving._read,
    "score": Serving._read,
    "resume": Serving._resume,
    "cancel": Serving._cancel,
    "drop": Serving._drop,
}
"""What answers None has answered itself, or has no answer."""
