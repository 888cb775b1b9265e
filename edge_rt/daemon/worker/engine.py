"""The worker's engine: it owns a model and its sessions and carries out the daemon's commands, which the daemon has checked.

One thread calls everything but ``requests``' ``register``, ``cancel``, ``add_credits`` and ``mark_unwanted``, so that the model needs no
lock.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from edge_rt.daemon.protocol import Message
from edge_rt.daemon.worker.memory import MemoryBudget, SessionStore, anonymous_bytes, memory_report
from edge_rt.daemon.worker.requests import LONG, RequestManager
from edge_rt.errors import ProtocolError, UserError
from edge_rt.power.limits import sustained

if TYPE_CHECKING:
    from edge_rt.core.generate.scheduler import Scheduler
    from edge_rt.daemon.worker.read_jobs import ReadJobs
    from edge_rt.model import Model
    from edge_rt.postprocess.rules import RuleFile

PROGRESS_EVERY = 0.05  # seconds between two reports of one phase of opening
REPORT_EVERY, REPORT_SHARE = 0.2, 1 / 32  # seconds between two reports of bytes held, and the share by which they must have changed
SUSTAINED_EVERY = 1.0  # seconds between two reports of power and temperature


class WorkerEngine:
    """``handle`` carries out a command; a method ``_do_OP`` is one. What answers None has answered itself, or has no answer."""

    def __init__(self, send: Callable[[Message], None], later: Callable[[Message], None]) -> None:
        """``send`` takes messages to the daemon, ``later`` a command that is to be carried out in its turn; both on any thread."""
        self.beats = 0  # rises while something moves
        self.requests = RequestManager(send, later)
        self._send = send
        self._model: Model | None = None
        self._batch: Scheduler | None = None
        self._read_jobs: ReadJobs | None = None
        self._rules: RuleFile | None = None
        self._store: SessionStore | None = None
        self._reported = ("", 0.0)  # the phase of opening, and when it may be reported again
        self._cool = False
        self._held, self._held_due, self._sustained_due = (0, 0), 0.0, 0.0

    def step(self) -> bool:
        """One step for those who generate, and what fits beside it for those whose texts are read; False if nobody can go on."""
        self.beats += 1
        if self._batch is None:
            return False
        moved = self._batch.step()
        if self._read_jobs is not None:
            room, started = self._batch.room(), time.perf_counter()
            moved = self._read_jobs.step(room) or moved
            self._batch.waited(time.perf_counter() - started)
        return self._admit_and_report() or moved

    @property
    def expected(self) -> float | None:
        """Seconds that the engine's step under way should take, None if that is not known; on any thread."""
        return None if self._batch is None else self._batch.expected

    def _beat(self) -> None:
        self.beats += 1

    def handle(self, command: Message) -> None:
        """Carry out a command; its answer is sent, also if it is an error."""
        try:
            work: Callable[[Message], Message | None] = getattr(self, f"_do_{command['op']}")
            answer = work(command)
        except Exception as error:
            self.requests.fail(command, error)
        else:
            if answer is not None:
                self._send({"id": command["id"], "ok": answer})
        self._admit_and_report()

    def wait_seconds(self) -> float | None:
        """Until ``step`` is to be called though no command comes, None for no limit."""
        if self._store is None:
            return None
        times = [self.requests.queue.next_check(), self._held_due if self._held_changed() else None]
        return max(0.0, min(known) - time.monotonic()) if (known := [one for one in times if one is not None]) else None

    def _admit_and_report(self) -> bool:
        """Admit who fits since something changed; whether anybody did. Report what is held, and power and temperature, if due."""
        if self._store is None:
            return False
        now, requests, started = time.monotonic(), self.requests, False
        due = requests.queue.next_check()
        if requests.due or (due is not None and due <= now):
            requests.due = False
            started = requests.queue.admit()
        if now >= self._held_due:
            self._held_due = now + REPORT_EVERY
            if self._held_changed():
                self._send(self._report_held())
            if now >= self._sustained_due:
                self._sustained_due = now + SUSTAINED_EVERY
                if (found := sustained(self._opened.engine)) is not None:
                    self._send({"sustained": found._asdict()})
        return started

    def _held_and_reserved(self) -> tuple[int, int]:
        return self._budget.held(), self._budget.reserved()

    def _held_changed(self) -> bool:
        return any(abs(now - before) > REPORT_SHARE * before for now, before in zip(self._held_and_reserved(), self._held, strict=True))

    def _report_held(self) -> Message:
        self._held = self._held_and_reserved()
        return dict(zip(("held", "reserved"), self._held, strict=True))

    # ---- the model ---------------------------------------------------------------------------------------------------

    def _do_open(self, command: Message) -> Message:
        """Open rules and model, and take a first step, which makes what later ones need."""
        self._report_progress("mapping", 0, 0)
        from edge_rt.model import open as open_model
        from edge_rt.plugin_host.registry import Registry

        registry = Registry.load()
        if command["rules"] is not None:
            from edge_rt.postprocess.rules import RuleFile

            self._rules = RuleFile(command["rules"], registry, told=lambda _: self._report_rules())
            self._report_rules()
        options = dict(command["options"])
        adapters = options.pop("adapters", {})
        model = self._model = open_model(command["model"], progress=self._report_progress, registry=registry, **options)
        model.adapters.declare(adapters)
        self._report_progress("warm-up", 0, 0)
        from edge_rt import session  # noqa: F401 - what a request needs
        from edge_rt.core.engine import TellsProgress
        from edge_rt.core.generate.scheduler import Scheduler

        self._batch = Scheduler(model.engine, model.lock)
        if isinstance(model.engine, TellsProgress):
            model.engine.tell(self._beat)
        model.logits([model.vocab.bos or 0])
        store = SessionStore(model, self._send, command.get("parked"), self._beat)
        self._budget = MemoryBudget(model, store, command.get("allowance"))
        self.requests.open(model, self._batch, store, self._budget, self._rules)
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
        mapped, limit = self._opened.memory().weights_mapped, command["options"].get("memory")
        process, held = anonymous_bytes(), self._budget.held()
        found = {"weights": min(mapped, limit) if limit else mapped, "process": None if process is None else max(0, process - held)}
        found["working"] = self._budget.least() or None
        return {name: size for name, size in found.items() if size is not None}

    def _report_progress(self, phase: str, done: int, total: int) -> None:
        """Of opening; on any thread."""
        self.beats += 1
        now = time.monotonic()
        before, due = self._reported
        if phase != before or now >= due or done >= total > 0:
            self._reported = (phase, now + PROGRESS_EVERY)
            self._send({"phase": phase, "done": done, "total": total})

    def _report_rules(self) -> None:
        """The rules were read, or could not be; on any thread."""
        if rules := self._rules:
            error = str(rules.error) if rules.error is not None else None
            self._send({"rules": {"version": rules.current.version, "order": list(rules.current.order), "error": error}})

    def _do_reload_rules(self, command: Message) -> Message:
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
    def _sessions(self) -> SessionStore:
        if self._store is None:
            raise ProtocolError("unloaded", "the model could not be opened")
        return self._store

    def _do_tokenize(self, command: Message) -> Message | None:
        text, how = command["text"], {"special": command.get("special", False), "bos": command.get("bos")}
        if len(text) < LONG:
            return {"tokens": self._opened.tokenize(text, **how)}
        self.requests.run_in_background(command, lambda: {"tokens": self._opened.tokenize(text, **how)}, lambda found: found())
        return None

    def _do_found(self, command: Message) -> Message | None:
        """What ran in the background is done."""
        answer: Message | None = command["then"]()
        return answer

    def _do_detokenize(self, command: Message) -> Message:
        return {"text": self._opened.detokenize(command["tokens"])}

    def _do_tokenizer(self, command: Message) -> Message:
        vocab = self._opened.vocab
        bos, eos = (None if one is None else vocab.piece(one, special=True).decode(errors="replace") for one in (vocab.bos, vocab.eos))
        return {"bos": bos, "eos": eos, "template": vocab.chat_template(), "tokens": vocab.n_tokens}

    # ---- memory ------------------------------------------------------------------------------------------------------

    def _do_memory(self, command: Message) -> Message:
        """Bytes by owner. ``by_session`` names sessions: it is for the daemon alone."""
        found = memory_report(self._opened, self._sessions, self._budget)
        return {**found, "requests": len(self.requests), "queued": len(self.requests.queue)}

    def _do_allow(self, command: Message) -> Message:
        """Caches and steps may hold so many bytes from now on. Who runs is not cut."""
        self._budget.allowance = command["bytes"]
        self._budget.free(0)
        self.requests.queue.end_patience()
        self.requests.due = True
        return self._report_held()

    def _do_cool(self, command: Message) -> Message:
        """Give back all that can be had again, if nobody asks anything."""
        if len(self.requests):
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
        return {"held": self._budget.held()}

    def _warm(self) -> None:
        if self._cool:
            self._cool = False
            self._opened.warm()

    # ---- sessions ----------------------------------------------------------------------------------------------------

    def _do_open_session(self, command: Message) -> Message:
        self._sessions.open(command["session"], command.get("context"), command.get("owner", ""))
        return {}

    def _do_close_session(self, command: Message) -> None:
        name = command["session"]
        self._sessions.close(name, end=self.requests.end_session(name))
        self.requests.due = True

    def _do_park_session(self, command: Message) -> Message:
        name, store = command["session"], self._sessions
        store.known(name)
        if self.requests.uses(name):
            raise ProtocolError("busy", "the session answers a request; wait for it")
        if name in store.idle() and not store.park(name):
            raise UserError("the session cannot be parked; its folder is full, or there is none")
        self.requests.due = True
        return {"held": self._budget.held()}

    def _do_clone_session(self, command: Message) -> Message:
        store, name = self._sessions, command["session"]
        room = name not in store.live or self._has_room(store.live[name].history.cells, but=name)
        store.clone(name, command["new"], room=room)
        return {}

    def _has_room(self, cells: int, but: str | None = None) -> bool:
        """Whether a session of so many cells fits, after others were parked if need be."""
        return not self._budget.limited or self._budget.free(self._budget.session_bytes(cells), but)

    def _do_save_session(self, command: Message) -> Message:
        self._sessions.save(command["session"], Path(command["path"]))
        return {}

    def _do_restore_session(self, command: Message) -> Message:
        owner, path = command.get("owner", ""), Path(command["path"])
        tokens = self._sessions.restore(command["session"], path, owner, self._has_room, context=command.get("context"))
        return {"tokens": tokens}

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _do_generate(self, command: Message) -> None:
        model = self._opened
        self._warm()
        self.requests.generate(command, model)

    def _do_embed(self, command: Message) -> None:
        one = self.requests.start_read(command)
        self._warm()
        if self._read_jobs is None:
            from edge_rt.daemon.worker.read_jobs import ReadJobs

            requests = self.requests
            self._read_jobs = ReadJobs(self._opened, self._budget, requests.queue, requests.send_event, requests.finish_read)
        self._read_jobs.add(one, command)

    _do_score = _do_embed

    def _do_resume(self, command: Message) -> None:
        self.requests.resume(command["request"])

    def _do_cancel(self, command: Message) -> None:
        self.requests.end_waiting(command["request"])

    def _do_drop(self, command: Message) -> None:
        self.requests.drop(command["request"])
