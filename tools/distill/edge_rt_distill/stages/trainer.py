"""One loop for all levels: train, evaluate, judge, keep; and go on after a kill -9 as if nothing had happened.

Everything that a step depends on is either a function of its number (learning rate, which data, seeds) or in the checkpoint (weights,
optimiser, random numbers, place in the data, gate), so that a run that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from edge_rt.hooks import Cancelled, DataError, OptionError, TrainingError
from edge_rt_distill.losses.balance import balance
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.precision import Precision, computing_in
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.stages import checkpoint
from edge_rt_distill.stages.gate import failure, is_open, judge
from edge_rt_distill.stages.guides import Guides
from edge_rt_distill.stages.health import WINDOW, complaint
from edge_rt_distill.stages.levels import LEVELS, Level, Term, check_level
from edge_rt_distill.stages.material import Material, check_material
from edge_rt_distill.stages.schedule import learning_rate
from edge_rt_distill.stages.state import Best, LevelResult, State
from edge_rt_distill.stages.teachers import TeacherView
from edge_rt_distill.stages.terms import Scene, errors, groups, say


class Scored(Protocol):
    """What a composite score is: ``evaluate.evaluator.Score`` is one."""

    @property
    def value(self) -> float:
        """0 to 1, more is better."""
        ...

    @property
    def parts(self) -> Mapping[str, float]:
        """What it was made of."""
        ...


class Options(NamedTuple):
    """``folder``: where ``last.pt``, ``best.pt`` and ``log.jsonl`` are. ``checkpoint_every``: steps between checkpoints besides those of
    evaluations, 0: none. ``diverged``: a loss of more than so many times the usual one stops the run. ``to_limit``: go on to a level's
    limit after its gate opened (to compare at equal tokens). ``calibration``: batches that guides are fitted on. ``precision``: of the
    products of training steps; evaluations are in float32."""

    folder: Path
    checkpoint_every: int = 0
    diverged: float = 8.0
    to_limit: bool = False
    calibration: int = 4
    precision: Precision = "float32"


class Event(NamedTuple):
    """Progress. ``kind``: ``step``, ``evaluation``, ``level`` (it ended) or ``problem`` (the run goes on). ``values``: what is logged."""

    kind: str
    level: str
    step: int
    steps: int
    message: str
    values: Mapping[str, Any]


def train(
    student: Decoder, teacher: TeacherView, material: Material, options: Options, *, levels: Sequence[Level] = LEVELS,
    scorer: Callable[[Decoder], Scored] | None = None, told: Callable[[Event], None] = lambda _: None,
) -> list[LevelResult]:  # fmt: skip
    """Take the student through the levels, in place, from where ``options.folder`` says it is, and say how each ended.

    ``scorer`` gives the composite score; a level with ``score_patience`` stops when it gets no better, with its best weights by that;
    of other levels it is told at their end.
    In other levels the level's own error chooses. A level whose gate opened hands on its last weights, which the gate judged.
    ``told`` is called after each step; it stops the run by raising Cancelled, and the next call goes on from there.

    Raises OptionError or DataError for levels that cannot be run or lack data, TrainingError when training diverged: the student and the
    folder then have the last good state.
    """
    trainer = _Trainer(student, teacher, material, options, levels, scorer, told)
    try:
        return trainer.run()
    finally:
        trainer.close()


@functools.lru_cache
def fused_adamw() -> bool:
    """Whether this torch has AdamW in one pass over a tensor on the CPU (2.4 has): a fraction of the time of a step of small batches."""
    try:
        torch.optim.AdamW([torch.zeros(1, requires_grad=True)], fused=True)
    except RuntimeError:
        return False
    return True


class _Trainer:
    def __init__(
        self, student: Decoder, teacher: TeacherView, material: Material, options: Options, levels: Sequence[Level],
        scorer: Callable[[Decoder], Scored] | None, told: Callable[[Event], None],
    ) -> None:  # fmt: skip
        for level in levels:
            check_level(level)
        check_material(material, levels)
        self.scene = Scene(student, teacher, Guides(student, teacher, material), material)
        self.options, self.levels, self.scorer, self.told = options, levels, scorer, told
        self.trainable = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        self.last, self.best = options.folder / "last.pt", options.folder / "best.pt"
        self.state = State()
        self.optimiser: torch.optim.Optimizer | None = None
        self.stream: Iterator[Rows] | None = None
        options.folder.mkdir(parents=True, exist_ok=True)
        kept = checkpoint.load(self.last) if self.last.exists() else None
        if kept is not None:
            self._restore(kept)
        self.log = checkpoint.Log(options.folder / "log.jsonl", self.state.log, self._problem)

    def close(self) -> None:
        """Give the student back as it came, as far as what is trainable goes."""
        for name, parameter in self.scene.student.named_parameters():
            parameter.requires_grad_(name in self.trainable)
            parameter.grad = None
        self.log.close()

    # ---- the loop ----

    def run(self) -> list[LevelResult]:
        """All levels from where the state is."""
        while self.state.level < len(self.levels):
            level = self.levels[self.state.level]
            self._begin(level)
            while not (ended_by := self._ended_by(level)):
                events = [self._step(level)]
                due = self.state.step % level.every == 0 or self.state.step == level.steps
                if due:
                    events.append(self._evaluate(level))
                if due or (self.options.checkpoint_every and self.state.step % self.options.checkpoint_every == 0):
                    self._save()
                self._tell(events)
            self._end(level, ended_by)
        self._save()
        return self.state.done

    def _begin(self, level: Level) -> None:
        for name, parameter in self.scene.student.named_parameters():
            frozen = any(fnmatch.fnmatchcase(name, pattern) for pattern in level.frozen)
            parameter.requires_grad_(name in self.trainable and not frozen)
        if self.optimiser is None:
            self.optimiser = self._make_optimiser(level)
        if self.state.begun:
            return
        if (level.terms.get("hidden") or "hidden" in self._judged()) and not self.scene.guides.get_buffer("fitted"):
            some = list(itertools.islice(self.scene.material.epoch(0, 0), self.options.calibration))
            self.scene.guides.fit(self.scene.student, self.scene.teacher, some)
        self.state.before = self.state.errors = errors(self.scene, self._judged())
        self.state.begun = True
        self.log.write(kind="begin", level=level.name, step=0, errors=self.state.before, tokens=0)
        self._save()

    def _judged(self) -> list[str]:
        """Levels whose errors are looked at: this one and those before it."""
        return [level.name for level in self.levels[: self.state.level + 1]]

    def _ended_by(self, level: Level) -> str:
        if self.state.opened and not self.options.to_limit:
            return "gate"
        if self.state.step >= level.steps:
            return "limit"
        return "score" if level.score_patience and self.state.stale >= level.score_patience else ""

    def _make_optimiser(self, level: Level) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in self.scene.student.parameters() if parameter.requires_grad]
        if not parameters:
            raise OptionError(f"level {level.name} has nothing to train; freeze less, or pass a student whose parameters require gradients")
        if level.terms.get("hidden"):
            parameters += list(self.scene.guides.projections)
        # Norms and biases do not decay: pulling a scale to 0 is no regulariser.
        sets = [
            {"params": [one for one in parameters if one.ndim > 1], "weight_decay": level.weight_decay},
            {"params": [one for one in parameters if one.ndim <= 1], "weight_decay": 0.0},
        ]
        sets = [one for one in sets if one["params"]]
        if level.optimiser == "sgd":
            return torch.optim.SGD(sets, lr=level.learning_rate, momentum=0.9)
        return torch.optim.AdamW(sets, lr=level.learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused_adamw())

    # ---- a step ----

    def _step(self, level: Level) -> Event:
        assert self.optimiser is not None
        started, before = time.perf_counter(), self.state.tokens
        rate = learning_rate(level, self.state.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad(set_to_none=True)
        with computing_in(self.options.precision):
            terms = self._backward(level)
        loss = sum(level.terms[term] * value for term, value in terms.items())
        self._stop_if(complaint(loss, self.state.recent, self.options.diverged), level)
        trained = [one for group in self.optimiser.param_groups for one in group["params"] if one.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(trained, level.clip))
        self._stop_if("" if math.isfinite(norm) else "the gradient is not a number", level)
        self.optimiser.step()
        self.state.step += 1
        self.state.recent = [*self.state.recent, loss][-WINDOW:]
        seconds = time.perf_counter() - started
        values = {
            "kind": "step", "level": level.name, "step": self.state.step, "loss": loss, "terms": terms, "lr": rate, "gradient": norm,
            "tokens": self.state.tokens, "tokens_per_second": round((self.state.tokens - before) / seconds, 1),
        }  # fmt: skip
        self.log.write(**values)
        return self._event(level, values, say(terms))

    def _backward(self, level: Level) -> dict[Term, float]:
        """Add the gradients of the step's batches; the mean of each term, unscaled."""
        seen: dict[Term, list[float]] = {}
        for _ in range(level.accumulate):
            rows, reference = self._next(), None
            for group in groups(self.scene, level, rows, self.state.step, self.state.batches):
                if reference is None:
                    reference = abs(float(next(iter(group.values())).detach()))
                total, _ = balance(group, level.terms, reference)
                self._stop_if("" if bool(torch.isfinite(total)) else "the loss is not a number", level)
                (total / level.accumulate).backward()  # type: ignore[no-untyped-call]
                for term, value in group.items():
                    seen.setdefault(term, []).append(float(value.detach()))
            self.state.batches += 1
            self.state.tokens += int(rows.lengths.sum())
        return {term: sum(values) / len(values) for term, values in seen.items()}

    def _next(self) -> Rows:
        while True:
            if self.stream is None:
                self.stream = self.scene.material.epoch(self.state.epoch, self.state.place)
            rows = next(self.stream, None)
            if rows is not None:
                self.state.place += 1
                return rows
            if self.state.place == 0:
                raise DataError("there is nothing to train on; add samples")
            self.state.epoch, self.state.place, self.stream = self.state.epoch + 1, 0, None

    def _stop_if(self, reason: str, level: Level) -> None:
        """Go back to the last checkpoint and raise TrainingError, if there is a reason to."""
        if not reason:
            return
        step = self.state.step + 1
        self.log.write(kind="diverged", level=level.name, step=step, reason=reason)
        kept = checkpoint.load(self.last)
        self._restore(kept)
        rate = learning_rate(level, step - 1)
        raise TrainingError(
            f"level {level.name}, step {step}: {reason}; the state of step {self.state.step} is kept in {self.last}: "
            f"go on from it with a lower learning rate (it was {rate:.3g})"
        )

    # ---- evaluation and the end of a level ----

    def _evaluate(self, level: Level) -> Event:
        state = self.state
        state.errors = errors(self.scene, self._judged())
        bad = [name for name, error in state.errors.items() if not math.isfinite(error)]
        self._stop_if(f"the held-out error of level {bad[0]} is not a number" if bad else "", level)
        own = state.errors[level.name]
        earlier = {name: error for name, error in state.errors.items() if name != level.name}
        state.gate = judge(level.gate, state.gate, own, earlier, state.ended)
        state.opened = state.opened or is_open(level.gate, state.gate)
        score = self._score(level)
        state.score = None if score is None else score.value
        # A score has coarse parts, such as a few answers: where it ends no level, it does not choose either.
        self._keep_if_best(score.value if score is not None and level.score_patience else -own)
        values: dict[str, Any] = {
            "kind": "evaluation", "level": level.name, "step": state.step, "errors": state.errors, "passed": state.gate.passed,
            "opened": state.opened, "reason": state.gate.reason, "tokens": state.tokens,
        }  # fmt: skip
        if score is not None:
            values |= {"score": score.value, "parts": dict(score.parts)}
        self.log.write(**values)
        return self._event(level, values, say(state.errors))

    def _score(self, level: Level) -> Scored | None:
        """Where it may end the level, and of what the level ends with: it takes longer than all errors do."""
        ends = self.state.step == level.steps or (self.state.opened and not self.options.to_limit)
        return self.scorer(self.scene.student) if self.scorer is not None and (level.score_patience or ends) else None

    def _keep_if_best(self, value: float) -> None:
        state = self.state
        state.stale += 1
        if state.best is not None and not value > state.best.value:
            return
        data = {
            "level": state.level,
            "step": state.step,
            "student": self.scene.student.state_dict(),
            "guides": self.scene.guides.state_dict(),
        }
        reason = checkpoint.save(self.best, data)
        if reason:
            self._problem(f"the best weights so far cannot be written: {reason}; free some space, earlier ones are kept")
            return
        state.best, state.stale = Best(value, state.step, state.errors, state.score), 0

    def _end(self, level: Level, ended_by: str) -> None:
        state = self.state
        kept, found, score = state.step, state.errors, state.score
        if not state.opened and state.best is not None and state.best.step != state.step:
            data = checkpoint.load(self.best)
            if (data["level"], data["step"]) == (state.level, state.best.step):
                self._load_weights(data)
                kept, found, score = state.best.step, state.best.errors, state.best.score
            else:
                self._problem(f"{self.best} is of another run; the last weights are kept instead of the best")
        reason = "" if state.opened else failure(level.gate, state.gate)
        result = LevelResult(level.name, state.opened, ended_by, reason, state.step, kept, state.tokens, state.before, found, score)
        self.log.write(kind="level", **result._asdict())
        self.told(self._event(level, {"kind": "level", **result._asdict()}, str(result)))
        self.state, self.optimiser = state.next_level(result), None

    # ---- keeping and telling ----

    def _save(self) -> None:
        self.state.log = self.log.length
        data = {
            "identity": self._identity(), "state": self.state.to_json(), "student": self.scene.student.state_dict(),
            "guides": self.scene.guides.state_dict(), "random": torch.get_rng_state(),
            "optimiser": None if self.optimiser is None else self.optimiser.state_dict(),
        }  # fmt: skip
        reason = checkpoint.save(self.last, data)
        if reason:
            self._problem(f"the checkpoint cannot be written: {reason}; the one before it is kept, free some space")

    def _restore(self, data: dict[str, Any]) -> None:
        if data["identity"] != self._identity():
            raise OptionError(f"{self.last} is of a student or levels other than these; use another folder, or delete it to begin again")
        self.state = State.from_json(data["state"])
        self._load_weights(data)
        torch.set_rng_state(data["random"])
        self.stream = self.optimiser = None
        if data["optimiser"] is not None:
            level = self.levels[self.state.level]
            self._begin(level)
            assert self.optimiser is not None
            self.optimiser.load_state_dict(data["optimiser"])

    def _load_weights(self, data: Mapping[str, Any]) -> None:
        self.scene.student.load_state_dict(data["student"])
        self.scene.guides.load_state_dict(data["guides"])

    def _identity(self) -> str:
        """Of what a checkpoint must fit to. Rates, limits and thresholds are not in it: they may be changed where a run stopped."""
        shapes = {name: list(value.shape) for name, value in self.scene.student.state_dict().items() if isinstance(value, Tensor)}
        plan = [[level.name, dict(level.terms), level.frozen, level.optimiser] for level in self.levels]
        return hashlib.sha256(json.dumps([shapes, plan, self.scene.material.seed]).encode()).hexdigest()

    def _event(self, level: Level, values: Mapping[str, Any], message: str) -> Event:
        return Event(str(values["kind"]), level.name, self.state.step, level.steps, message, values)

    def _tell(self, events: Sequence[Event]) -> None:
        """Between two steps, where the state is whole."""
        try:
            for event in events:
                self.told(event)
        except Cancelled:
            self._save()
            raise

    def _problem(self, message: str) -> None:
        level = self.levels[min(self.state.level, len(self.levels) - 1)]
        self.told(Event("problem", level.name, self.state.step, level.steps, message, {"kind": "problem", "message": message}))
