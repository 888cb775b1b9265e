"""Gates, schedules and the loop: what each level lowers, resuming to the bit, divergence, a full disk."""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from edge_rt_distill.behaviour.examples import Pair, example
from edge_rt_distill.losses.token import TokenOptions
from edge_rt_distill.model.architecture import Architecture, LayerShape
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.stages import checkpoint, trainer
from edge_rt_distill.stages.gate import Gate, GateState, failure, is_open, judge
from edge_rt_distill.stages.health import complaint
from edge_rt_distill.stages.levels import LEVELS, Level, check_level
from edge_rt_distill.stages.material import Answers, Material, check_material
from edge_rt_distill.stages.schedule import learning_rate, taid_mix
from edge_rt_distill.stages.state import Best, LevelResult, State
from edge_rt_distill.stages.teachers import CachingTeacher, LiveTeacher
from edge_rt_distill.stages.terms import Scene, errors, groups, own_answers
from edge_rt_distill.stages.trainer import Event, Options, train
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.errors import Cancelled, DataError, OptionError, TrainingError

VOCABULARY = 48
NEVER = Gate(-1e9)
SHAPE = LayerShape(4, 2, 32)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """These tests kill processes, not machines."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# ---- gates -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "own", "before", "opens_at"),
    [
        (0.5, [0.4, 0.4, 0.4], [], 3),
        (0.5, [0.6, 0.4, 0.4, 0.4], [], 4),
        (0.5, [0.4, 0.4, 0.6, 0.4, 0.4], [], None),
        (0.5, [0.4, 0.4, 0.5, 0.4, 0.4, 0.4], [], 6),  # at the threshold is not below it
        (0.5, [0.4, 0.4, math.nan, 0.4, 0.4, 0.4], [], 6),
        (0.5, [0.4, 0.4, 0.4], [1.0, 1.1, 1.1], 3),
        (0.5, [0.4, 0.4, 0.4, 0.4], [1.0, 1.11, 1.0, 1.0], None),
        (0.5, [0.4, 0.4, 0.4], [1.0, 1.0, math.nan], None),
        (0.5, [0.4, 0.4, 0.4], [-5.0, 0.5, 1.0], 3),
    ],
)
def test_a_gate_opens_after_three_evaluations_running(threshold, own, before, opens_at):
    gate, state, opened = Gate(threshold), GateState(), None
    for i, error in enumerate(own):
        state = judge(gate, state, error, {"token": before[i]} if before else {}, {"token": 1.0})
        if is_open(gate, state):
            opened = i + 1
            break
    assert opened == opens_at
    if opened is None:
        assert failure(gate, state)


numbers = st.floats(0, 2, allow_nan=False) | st.just(math.nan) | st.just(math.inf)


@given(st.lists(st.tuples(numbers, numbers), max_size=30), st.floats(0.01, 2), st.integers(1, 5))
def test_an_open_gate_has_its_evaluations_and_a_closed_one_has_not(history, threshold, patience):
    gate, state = Gate(threshold, patience), GateState()
    good = [error < threshold and earlier <= 1.1 for error, earlier in history]
    for i, (error, earlier) in enumerate(history):
        state = judge(gate, state, error, {"token": earlier}, {"token": 1.0})
        assert is_open(gate, state) == (i + 1 >= patience and all(good[i + 1 - patience : i + 1]))
        assert bool(state.reason) == (not good[i])
    assert state.evaluations == len(history)


def test_a_closed_gate_says_why():
    gate = Gate(0.5)
    assert "0.7 is not below 0.5" in failure(gate, judge(gate, GateState(), 0.7, {}, {}))
    assert "token rose from 1 to 1.2" in failure(gate, judge(gate, GateState(), 0.1, {"token": 1.2}, {"token": 1.0}))
    assert "1 evaluations" in failure(gate, judge(gate, GateState(), 0.1, {}, {}))
    assert failure(gate, GateState()) == "it was never evaluated"


def test_schedules():
    level = Level("token", {"token": 1.0}, NEVER, steps=100, learning_rate=1.0, warmup=0.1, floor=0.2, token=TokenOptions("taid", mix=0.4))
    rates = [learning_rate(level, step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.6)
    assert rates[100] == pytest.approx(0.2)
    assert sorted(rates[10:], reverse=True) == rates[10:]
    assert learning_rate(level._replace(warmup=0.0), 0) == 1.0
    assert [taid_mix(level, step) for step in (0, 50, 100, 200)] == pytest.approx([0.4, 0.7, 1, 1])


def test_losses_that_leave_the_usual_are_complained_of():
    usual = [1.0, 1.2, 0.8] * 5
    assert complaint(5.0, usual, 8) == ""
    assert "8 times" in complaint(9.0, usual, 8)
    assert complaint(9.0, usual[:5], 8) == ""
    assert "not a number" in complaint(math.nan, [], 8)
    assert complaint(1e-9, [1e-12] * 20, 8) == ""


def test_the_shipped_levels_can_be_run_and_bad_ones_are_refused():
    for level in LEVELS:
        check_level(level)
    for change, word in (
        ({"terms": {"tokens": 1.0}}, "tokens"), ({"terms": {}}, "no loss"), ({"terms": {"token": 0.0}}, "leading"), ({"steps": 0}, "steps"),
        ({"learning_rate": math.nan}, "learning_rate"), ({"warmup": 2.0}, "warmup"), ({"optimiser": "adam"}, "adamw"),
        ({"gate": Gate(1.0, 0)}, "patience"), ({"token": TokenOptions(head=-1)}, "head"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=word):
            check_level(LEVELS[0]._replace(**change))


# ---- a tiny pair -------------------------------------------------------------------------------------------------------------------------


def decoder(seed: int, width: int = 16, sources: tuple[tuple[int, ...], ...] = ((), (), ())) -> Decoder:
    torch.manual_seed(seed)
    layers = tuple(LayerShape(4, 2, 32, one) for one in sources)
    model = Decoder(Architecture("llama", VOCABULARY, width, 4, layers, True, 1e-5, 1e4, "interleaved", 64))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.0 if "embd" in name else 2.0)
    return model


def pair(width: int = 16) -> tuple[Decoder, Decoder]:
    """(student, teacher): the teacher without its middle layer, or a narrower model."""
    teacher = decoder(1).requires_grad_(False)
    student = decoder(2, width, ((0,), (2,)))
    if width == 16:
        for mine, theirs in zip([student.token_embd, *student.layers, student.output_norm], [teacher.token_embd, teacher.layers[0],
                                teacher.layers[2], teacher.output_norm], strict=True):  # fmt: skip
            mine.load_state_dict(theirs.state_dict())
    return student, teacher


def rows(seed: int, count: int = 4, length: int = 12) -> Rows:
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (count, length), generator=draw)
    lengths = torch.randint(length // 2, length + 1, (count,), generator=draw)
    places = torch.arange(length)
    mask = ((places < lengths[:, None] - 1) & (places >= 2)).float()
    return Rows(tokens * (places < lengths[:, None]), mask, lengths)


def epoch(number: int, start: int) -> Iterator[Rows]:
    yield from [rows(1000 * number + i) for i in range(start, 5)]


def material(**changed: object) -> Material:
    draw = torch.Generator().manual_seed(9)
    tokens = torch.randint(1, VOCABULARY, (24, 8), generator=draw).tolist()
    whole = {
        "epoch": epoch, "held_out": [rows(-1), rows(-2)], "examples": [example(one[:3], one[3:]) for one in tokens[:8]],
        "held_out_examples": [example(one[:3], one[3:]) for one in tokens[8:13]],
        "pairs": [Pair(example(a[:3], a[3:]), example(b[:3], b[3:])) for a, b in zip(tokens[13:18], tokens[18:23], strict=True)],
        "prompts": [one[:3] for one in tokens[:6]], "answers": Answers(6, 1.0, 0),
        "prior": torch.full((VOCABULARY,), -math.log(VOCABULARY)),
    }  # fmt: skip
    return Material(**{**whole, **changed})


def short(name: str, terms: dict[str, float], **changed: object) -> Level:
    options = {"steps": 8, "every": 4, "learning_rate": 5e-3, "token": TokenOptions(head=4), "on_policy_every": 2, **changed}
    return Level(name, terms, options.pop("gate", NEVER), **options)


ALL = (
    short("token", {"token": 1.0}),
    short("hidden", {"token": 1.0, "hidden": 0.5}, accumulate=2),
    short("attention", {"token": 1.0, "attention": 0.5}, frozen=("token_embd.*",)),
    short("behaviour", {"token": 1.0, "imitation": 0.5, "preference": 0.2, "on_policy": 0.5}, steps=6),
)


def weights(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not left[name].equal(right[name])] == []


# ---- what the loop does ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 12])
@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("token", {"token": 1.0}),
        ("hidden", {"hidden": 1.0}),
        ("attention", {"attention": 1.0}),
        ("behaviour", {"imitation": 1.0}),
    ],
)
def test_each_level_lowers_its_own_error(name, terms, width, tmp_path):
    student, teacher = pair(width)
    found = material()
    if name == "behaviour":  # noise cannot be generalised from: here it is learnt by heart
        found = material(held_out_examples=found.examples)
    result = train(student, LiveTeacher(teacher), found, Options(tmp_path), levels=[short(name, terms, steps=24, every=12)])[0]
    assert result.errors[name] < 0.9 * result.before[name]
    assert not result.opened
    assert result.ended_by == "limit"
    assert "is not below" in result.reason
    assert not teacher.token_embd.weight.requires_grad


def test_a_student_that_is_its_teacher_has_no_error_and_opens_all_gates_of_the_corpus(tmp_path):
    teacher = decoder(1).requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_()
    before = weights(student)
    levels = [level._replace(gate=Gate(1e-4), every=1) for level in ALL[:3]]
    results = train(student, LiveTeacher(teacher), material(), Options(tmp_path), levels=levels)
    assert [(one.opened, one.ended_by, one.steps) for one in results] == [(True, "gate", 3)] * 3
    for name, value in weights(student).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0.02)


def test_a_gate_ends_a_level_unless_it_is_to_go_on_to_its_limit(tmp_path):
    levels = [short("token", {"token": 1.0}, gate=Gate(100.0, 2), steps=6, every=1)]
    for to_limit, steps, ended_by in ((False, 2, "gate"), (True, 6, "limit")):
        student, teacher = pair()
        result = train(student, LiveTeacher(teacher), material(), Options(tmp_path / ended_by, to_limit=to_limit), levels=levels)[0]
        assert (result.opened, result.steps, result.kept, result.ended_by, result.reason) == (True, steps, steps, ended_by, "")
        assert "gate open" in str(result)


class Score:
    def __init__(self, value: float) -> None:
        self.value, self.parts = value, {"made_up": value}


def test_a_score_that_does_not_improve_ends_a_level_and_the_best_weights_stay(tmp_path):
    student, teacher = pair()
    at: list[dict[str, torch.Tensor]] = []

    def scorer(model: Decoder) -> Score:
        at.append(weights(model))
        return Score([0.3, 0.6, 0.5, 0.6, 0.9][len(at) - 1])

    levels = [short("token", {"token": 1.0}, steps=40, every=2, score_patience=2)]
    result = train(student, LiveTeacher(teacher), material(), Options(tmp_path), levels=levels, scorer=scorer)[0]
    assert (result.ended_by, result.steps, result.kept, result.score) == ("score", 8, 4, 0.6)
    assert_same(weights(student), at[1])
    assert errors(Scene(student, LiveTeacher(teacher), None, material()), ["token"]) == result.errors


@pytest.mark.parametrize(("threshold", "steps"), [(0.0, 20), (1e9, 6)])
def test_a_score_that_ends_nothing_is_told_once_at_the_end(threshold, steps, tmp_path):
    student, teacher = pair()
    at, seen = [], []
    levels = [short("token", {"token": 1.0}, steps=20, every=2, gate=Gate(threshold))]

    def told(event):
        if event.kind == "evaluation":
            seen.append((event.step, event.values.get("score")))

    def scorer(model):
        at.append(weights(model))
        return Score(0.5)

    train(student, LiveTeacher(teacher), material(), Options(tmp_path), levels=levels, scorer=scorer, told=told)
    assert len(at) == 1
    assert seen == [(step, 0.5 if step == steps else None) for step in range(2, steps + 1, 2)]


def test_what_is_frozen_stays(tmp_path):
    student, teacher = pair()
    before = weights(student)
    levels = [short("token", {"token": 1.0}, frozen=("token_embd.*", "layers.1.*"), optimiser="sgd")]
    train(student, LiveTeacher(teacher), material(), Options(tmp_path), levels=levels)
    changed = {name for name, value in weights(student).items() if not value.equal(before[name])}
    assert "layers.0.attn_q.weight" in changed
    assert not any(name.startswith(("token_embd", "layers.1.")) for name in changed)
    assert all(parameter.requires_grad for parameter in student.parameters())
    with pytest.raises(OptionError, match="nothing to train"):
        train(student.requires_grad_(False), LiveTeacher(teacher), material(), Options(tmp_path / "2"), levels=levels)


def test_the_log_has_every_step(tmp_path):
    student, teacher = pair()
    events: list[Event] = []
    train(student, LiveTeacher(teacher), material(), Options(tmp_path), levels=ALL, told=events.append)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step"]
    assert [(line["level"], line["step"]) for line in steps] == [(level.name, i + 1) for level in ALL for i in range(level.steps)]
    assert set(steps[-2]["terms"]) == {"token", "imitation", "preference", "on_policy"}  # its own answers every second time
    assert set(steps[-1]["terms"]) == {"token", "imitation", "preference"}
    assert all(line["tokens_per_second"] > 0 and line["lr"] > 0 for line in steps)
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    assert list(evaluations[-1]["errors"]) == ["token", "hidden", "attention", "behaviour"]
    assert [event.kind for event in events].count("step") == len(steps)
    assert next(event.message for event in events if event.kind == "level").startswith("level token: FAIL: error")


# ---- resuming ----------------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it: as good as a SIGKILL to what runs in Python."""


def whole_run(folder: Path) -> tuple[dict[str, torch.Tensor], list[LevelResult], list[dict[str, object]]]:
    student, teacher = pair(12)
    results = train(student, CachingTeacher(teacher), material(), Options(folder, checkpoint_every=3), levels=ALL)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return weights(student), results, [{key: value for key, value in line.items() if key != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("whole"))


def test_a_run_that_is_killed_again_and_again_ends_the_same(uninterrupted, tmp_path):
    kills = 0
    for moment in itertools.count(2):
        seen = itertools.count()

        def told(event: Event, seen: Iterator[int] = seen, moment: int = moment) -> None:
            if next(seen) == moment:
                raise Killed

        student, teacher = pair(12)
        try:
            train(student, CachingTeacher(teacher), material(), Options(tmp_path, checkpoint_every=3), levels=ALL, told=told)
            break
        except Killed:
            kills += 1
    assert kills >= 3
    found = whole_run(tmp_path)  # there is nothing left to do
    assert_same(found[0], uninterrupted[0])
    assert found[1:] == uninterrupted[1:]


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import test_distill_stages as here
saves, replace = 0, os.replace
def killing(source, target):
    global saves
    saves += 1
    if saves == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace, os.fsync = killing, lambda handle: None
here.whole_run(Path(sys.argv[1]))
"""


def test_a_process_that_is_killed_while_it_writes_a_checkpoint_goes_on_to_the_same_bits(uninterrupted, tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "9"], env={**os.environ, "PYTHONPATH": path}, check=False, timeout=120
    )
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("*.part"))
    found = whole_run(tmp_path)
    assert_same(found[0], uninterrupted[0])
    assert found[1:] == uninterrupted[1:]
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_is_cancelled_keeps_its_last_step(uninterrupted, tmp_path):
    student, teacher = pair(12)

    def told(event: Event) -> None:
        if event.level == "hidden" and event.step == 4:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        train(student, CachingTeacher(teacher), material(), Options(tmp_path), levels=ALL, told=told)
    assert State.from_json(checkpoint.load(tmp_path / "last.pt")["state"]).step == 4
    assert_same(whole_run(tmp_path)[0], uninterrupted[0])


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    student, teacher = pair()
    train(student, LiveTeacher(teacher), material(), Options(tmp_path), levels=ALL[:1])
    with pytest.raises(OptionError, match="other than these"):
        train(pair(12)[0], LiveTeacher(teacher), material(), Options(tmp_path), levels=ALL[:1])
    with pytest.raises(OptionError, match="other than these"):
        train(student, LiveTeacher(teacher), material(), Options(tmp_path), levels=ALL[:2])
    data = (tmp_path / "last.pt").read_bytes()
    for broken in (data[: len(data) // 2], b"", b"nonsense"):
        (tmp_path / "last.pt").write_bytes(broken)
        with pytest.raises(DataError, match="delete it"):
            train(student, LiveTeacher(teacher), material(), Options(tmp_path), levels=ALL[:1])


def test_a_state_survives_json():
    result = LevelResult("token", False, "limit", "why", 8, 4, 99, {"token": 0.1}, {"token": 0.1 + 0.2}, None)
    state = State(1, 2, 3, gate=GateState(1, 2, "so"), best=Best(-0.1, 4, {"token": 1 / 3}, None), recent=[0.1, 1e-300], done=[result])
    assert State.from_json(state.to_json()) == state


# ---- what goes wrong ---------------------------------------------------------------------------------------------------------------------


def test_training_that_diverges_stops_with_the_last_good_state(tmp_path):
    student, teacher = pair()
    wild = [short("token", {"token": 1.0}, steps=60, every=5, learning_rate=30.0, clip=1e9, warmup=0.9)]
    with pytest.raises(TrainingError, match="lower learning rate") as caught:
        train(student, LiveTeacher(teacher), material(), Options(tmp_path, diverged=2.0), levels=wild)
    kept = checkpoint.load(tmp_path / "last.pt")
    assert f"the state of step {State.from_json(kept['state']).step} is kept" in str(caught.value)
    assert_same(weights(student), kept["student"])
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["kind"] == "diverged"
    calm = [wild[0]._replace(learning_rate=1e-3, steps=10 + State.from_json(kept["state"]).step)]
    assert train(student, LiveTeacher(teacher), material(), Options(tmp_path), levels=calm)[0].steps == calm[0].steps


@pytest.mark.parametrize("where", ["weights", "gradient"])
def test_what_is_no_number_never_reaches_a_checkpoint(where, tmp_path):
    student, teacher = pair()

    def told(event: Event) -> None:
        if event.kind == "step" and event.step == 6:
            if where == "weights":
                student.layers[0].attn_q.weight.data[0, 0] = math.nan
            else:
                student.layers[0].attn_q.weight.register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(TrainingError, match=r"step 7: the (loss|gradient) is not a number; the state of step 4"):
        train(student, LiveTeacher(teacher), material(), Options(tmp_path), levels=[ALL[0]], told=told)
    assert all(bool(value.isfinite().all()) for value in weights(student).values())


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(tmp_path):
    student, teacher = pair()
    events: list[Event] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def told(event: Event) -> None:
        events.append(event)
        if event.kind == "step" and event.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # a file can grow no larger than that

    try:
        train(student, LiveTeacher(teacher), material(), Options(tmp_path), levels=[ALL[0]], told=told)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    problems = [event.message for event in events if event.kind == "problem"]
    assert any("the checkpoint cannot be written: file too large" in message for message in problems)
    assert any("best weights" in message for message in problems)
    assert State.from_json(checkpoint.load(tmp_path / "last.pt")["state"]).step == 4
    assert not list(tmp_path.glob("*.part"))


def test_a_log_that_cannot_grow_keeps_whole_lines_and_the_run_goes_on(tmp_path):
    told: list[str] = []
    log = checkpoint.Log(tmp_path / "log.jsonl", 0, told.append)
    log.write(step=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.length + 4, limits[1]))
    try:
        log.write(step=2)
        log.write(step=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.write(step=4)
    log.close()
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 4]
    assert len(told) == 1
    assert "too large" in told[0]


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"held_out": []}, "held-out"),
        ({"held_out": [Rows(torch.ones(1, 3, dtype=torch.long), torch.zeros(1, 3), torch.tensor([3]))]}, "no position"),
        ({"held_out_examples": []}, "behaviour"),
        ({"examples": []}, "imitation"),
        ({"pairs": []}, "preference"),
        ({"prompts": []}, "on_policy"),
    ],
)
def test_levels_without_what_they_need_are_refused(changed, word):
    with pytest.raises(DataError, match=word):
        check_material(material(**changed), ALL)


def test_no_training_data_is_said(tmp_path):
    student, teacher = pair()
    with pytest.raises(DataError, match="nothing to train on"):
        train(student, LiveTeacher(teacher), material(epoch=lambda number, start: iter(())), Options(tmp_path), levels=[ALL[0]])


# ---- material and teachers ---------------------------------------------------------------------------------------------------------------


def test_handfuls_take_everything_once_before_anything_twice():
    found = material(beside=4)
    items = list(range(10))
    for round_ in range(3):
        taken = list(itertools.chain.from_iterable(found.turn(items, number) for number in range(5 * round_, 5 * round_ + 5)))
        assert sorted(taken) == sorted(items * 2)
    assert found.turn(items, 3) == found.turn(items, 3)
    assert sorted(found.turn([1, 2], 5)) == [1, 2]


def test_a_cached_teacher_gives_the_same_whatever_it_has_seen():
    teacher = decoder(1).requires_grad_(False)
    batch = rows(5)
    live, cached, small = LiveTeacher(teacher).hidden(batch), CachingTeacher(teacher), CachingTeacher(teacher, 500)
    first = cached.hidden(batch)
    assert len(cached.kept) == 4
    single = Rows(batch.tokens[2:3], batch.mask[2:3], batch.lengths[2:3])
    length = int(batch.lengths[2])
    for again in (cached.hidden(batch), small.hidden(batch), CachingTeacher(teacher).hidden(batch)):
        assert again.equal(first)
    assert CachingTeacher(teacher).hidden(single)[0, :length].equal(first[2, :length])
    assert small.used <= 500
    torch.testing.assert_close(first[2, :length], live[2, :length], rtol=2e-3, atol=2e-3)


def test_own_answers_count_from_the_last_token_of_the_prompt_to_the_last_but_one_of_the_answer():
    student, teacher = pair()
    scene = Scene(student, LiveTeacher(teacher), None, material())
    found = own_answers(scene, 0)
    again = own_answers(scene, 0)
    assert found.tokens.equal(again.tokens)
    for row in range(len(found.tokens)):
        length = int(found.lengths[row])
        assert found.mask[row].nonzero().flatten().tolist() == list(range(2, length - 1))
    assert not found.tokens.equal(own_answers(scene, 1).tokens)


def test_a_pair_is_judged_token_by_token_however_long_its_answers_are():
    """A student that knows nothing loses more on a long answer; that is no lead of the short one."""
    student, teacher = decoder(2).requires_grad_(False), decoder(3).requires_grad_(False)
    student.head_weight.zero_()
    both = Pair(example([1, 2], [3]), example([1, 2], [4] * 30))
    scene = Scene(student, LiveTeacher(teacher), None, material(pairs=[both]))
    (found,) = groups(scene, short("behaviour", {"preference": 1.0}), rows(1), 0, 0)
    likely = []
    for one in (both.chosen, both.rejected):
        said = (teacher(torch.tensor([one.tokens])).hidden[0] @ teacher.head_weight.T).log_softmax(-1)
        likely.append(float(said[1:-1].gather(-1, torch.tensor(one.tokens)[2:, None]).mean()))
    assert float(found["preference"]) == pytest.approx(math.log1p(math.exp(2 * (likely[0] - likely[1]))), rel=1e-4)


def test_a_position_is_only_seen_where_there_is_a_token():
    """What stands behind a row's length changes nothing."""
    student, teacher = pair()
    batch = rows(3)
    hidden_behind = torch.where(torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None], batch.tokens, 7)
    guides = trainer.Guides(student, LiveTeacher(teacher), material())
    guides.fit(student, LiveTeacher(teacher), [batch])
    names = ["token", "hidden", "attention"]
    ours = errors(Scene(student, LiveTeacher(teacher), guides, material(held_out=[batch])), names)
    theirs = errors(Scene(student, LiveTeacher(teacher), guides, material(held_out=[batch._replace(tokens=hidden_behind)])), names)
    assert ours == pytest.approx(theirs, rel=1e-5)
