"""What is recorded of requests, and that recording neither delays nor breaks serving, nor fails open."""

import json
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from edge_rt_distill.replay.trace import read_trace

from edge_rt.daemon.config import RecordConfig
from edge_rt.daemon.connection import OVER_HTTP, OVER_TCP
from edge_rt.daemon.recording import Recorder
from edge_rt.daemon.recording import trace as writers
from edge_rt.errors import OptionError, PluginError

HOSTED = SimpleNamespace(name="m", template="")
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
DELTA = {"event": "delta", "text": "Hi", "tokens": [1, 2]}


def done(reason="end_of_generation", stop=None, post=()):
    return {"event": "done", "reason": reason, "stop": stop, "usage": {"prompt_tokens": 7, "completion_tokens": 3}, "post": list(post)}


class Client:
    """A connection, as far as the recorder looks at it."""

    def __init__(self, user=1000):
        self.user = user


class Plain:
    """Stands in for the redaction; what the real one does is tested elsewhere."""

    by = "nothing"

    def __init__(self, text=lambda text: text.replace("secret", "[X]")):
        self.change = text

    def text(self, text, following=None):
        return self.change(text)

    def value(self, value):
        return json.loads(self.change(json.dumps(value)))


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def record(tmp_path, clock):
    """``record(redaction, **settings)``: a recorder, which is closed at the end."""
    made = []

    def make(redaction=None, chance=lambda: 0.0, **settings):
        given = RecordConfig(tmp_path / "t.jsonl", **settings)
        made.append(Recorder(given, redaction or Plain(), chance, clock))
        return made[-1]

    yield make
    for one in made:
        one.close(10)


def ask(recorder, *messages, client=None, fields=HELLO, session=None, size=100):
    taken = recorder.start(client or Client(), fields, size, HOSTED, session)
    if taken is not None:
        for message in messages or (DELTA, done(), {"ok": {}}):
            taken.observe(message)
    return taken


def settled(recorder, count, what="recorded"):
    until = time.monotonic() + 10
    while recorder.counts[what] < count:
        assert time.monotonic() < until, recorder.status()
        time.sleep(0.002)
    return recorder.status()


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]


# ---- what is recorded ------------------------------------------------------------------------------------------------


def test_a_request_from_its_coming_to_its_end(tmp_path, record, clock):
    recorder = record(answers=True)
    clock.now += 5
    taken = recorder.start(Client(), {**HELLO, "resumable": True, "pieces": True, "session": "real", "priority": "low"}, 100, HOSTED, None)
    for seconds, message in [
        (1, {"event": "prompt", "done": 7, "total": 7}), (0.5, {**DELTA, "text": "my ", "tokens": []}), (0.25, {**DELTA, "text": "secret"}),
        (0.25, {**DELTA, "text": "", "tokens": [], "concealed": 1}), (1, done()), (0, {"ok": {}}),
    ]:  # fmt: skip
        clock.now += seconds
        taken.observe(message)
    recorder.close(10)
    header, line = lines(tmp_path)
    assert header["edge_rt_trace"] == 1
    assert (header["redacted"], header["redacted_by"], header["sample"], header["answers"]) == (True, "nothing", 1, True)
    assert line == {
        "at": 5.0, "path": "/v1/chat/completions", "client": "c1", "request": {**HELLO, "edge_rt": {"priority": "low"}},
        "outcome": {"status": "ok", "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 3, "first_token": 1.75, "total": 3.0},
        "answer": "my [X]",
    }  # fmt: skip
    assert read_trace(tmp_path / "t.jsonl").requests[0].seen.first_token == 1.75


def test_which_rules_an_answer_hit_and_which_form_its_prompt_had(tmp_path, record):
    recorder, hosted = record(), SimpleNamespace(name="m", template="t1")
    post = [{"name": "redaction", "counts": {"email": 2, "card": 1}}, {"name": "punctuation", "counts": {}}]
    for template, fields in (("t1", HELLO), ("t1", {"prompt": "x"}), ("t2", HELLO), ("", HELLO)):
        hosted.template = template
        taken = recorder.start(Client(), fields, 100, hosted, None)
        taken.observe(done(post=post if template == "t1" else ()))
        taken.observe({"ok": {}})
    recorder.close(10)
    found = lines(tmp_path)[1:]
    assert [line["outcome"].get("rules") for line in found] == [{"redaction": 3}, {"redaction": 3}, None, None]
    first, text, second, unknown = (line.get("variant") for line in found)
    assert (len(first), first != second, text, unknown) == (12, True, None, None)


@pytest.mark.parametrize(
    ("left", "messages", "expected"),
    [
        (True, [DELTA, done("cancelled"), {"ok": {}}], {"status": "cancelled", "cancel_after": 2.0, "completion_tokens": 3}),
        (True, [{"error": {"code": "cancelled"}}], {"status": "cancelled", "cancel_after": 2.0, "completion_tokens": 2}),
        (False, [done("cancelled"), {"ok": {}}], {"status": "cancelled", "cancel_after": None}),
        (True, [DELTA, done(), {"ok": {}}], {"status": "ok", "cancel_after": None}),
        (False, [{"error": {"code": "worker_died"}}], {"status": "error", "code": "worker_died", "cancel_after": None}),
    ],
)
def test_how_requests_end(tmp_path, record, clock, left, messages, expected):
    recorder = record()
    taken = recorder.start(Client(), HELLO, 100, HOSTED, None)
    taken.observe(DELTA)
    if left:
        clock.now += 2
        taken.note_left()
        clock.now += 1
        taken.note_left()
    for message in messages:
        taken.observe(message)
    recorder.close(10)
    line = lines(tmp_path)[1]
    found = {"cancel_after": None, **line, **line["outcome"]}
    assert {name: found[name] for name in expected} == expected
    assert "answer" not in line
    read_trace(tmp_path / "t.jsonl")


def test_clients_have_aliases_by_user_where_the_user_is_known(tmp_path, record):
    recorder, local = record(), Client(1000)
    anybody, tcp = Client(OVER_HTTP), Client(OVER_TCP)
    order = [local, Client(1000), Client(0), Client(OVER_HTTP - 1), Client(OVER_HTTP - 1), anybody, Client(OVER_HTTP), anybody, tcp]
    for client in order:
        ask(recorder, client=client)
    recorder.close(10)
    assert [line["client"] for line in lines(tmp_path)[1:]] == ["c1", "c1", "c2", "c3", "c3", "c4", "c5", "c4", "c6"]
    assert "1000" not in (tmp_path / "t.jsonl").read_text()


def test_requests_of_a_session_are_recorded_together_or_not_at_all(tmp_path, record):
    recorder = record(sample=0.5, chance=iter([0.4, 0.6, 0.5, 0.1]).__next__)
    assert [ask(recorder) is not None for _ in range(4)] == [True, False, False, True]
    sessions = [SimpleNamespace(id=f"id-{number}", hosted=HOSTED) for number in range(200)]
    taken = [[ask(recorder, session=one) is not None for _ in range(3)] for one in sessions]
    assert all(len(set(one)) == 1 for one in taken)
    assert 60 < sum(one[0] for one in taken) < 140
    recorder.close(10)
    assert recorder.counts["left_out"] == 2 + sum(3 for one in taken if not one[0])
    written = lines(tmp_path)[1:]
    assert recorder.counts["recorded"] == len(written)
    assert {line["request"].get("model") for line in written if "session" in line} == {"m"}
    assert "id-" not in (tmp_path / "t.jsonl").read_text()


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def test_nobody_waits_for_the_redaction_and_what_has_no_room_is_dropped(tmp_path, record, monkeypatch):
    monkeypatch.setattr(writers, "QUEUE_BYTES", 10_000)
    let_go, begun = threading.Event(), threading.Event()

    def slow(text):
        begun.set()
        assert let_go.wait(10)
        return text

    recorder = record(Plain(slow))
    for _ in range(4):
        ask(recorder, size=2000)
    assert begun.wait(10)
    assert (recorder.status()["dropped_queue"], recorder.status()["recorded"]) == (1, 0)
    assert 9000 < recorder.status()["queued_bytes"] <= 10_000
    let_go.set()
    assert settled(recorder, 3)["dropped_queue"] == 1
    ask(recorder, size=2000)
    settled(recorder, 4)
    recorder.close(10)
    assert (len(lines(tmp_path)), recorder.status()["queued_bytes"]) == (5, 0)


@pytest.mark.parametrize("error", [PluginError("redaction failed"), RuntimeError("Hello"), RecursionError("Hello")])
def test_what_cannot_be_redacted_is_not_written_and_not_told(tmp_path, record, error, caplog):
    failing = [error, error]

    def text(given):
        if failing:
            raise failing.pop()
        return given

    recorder = record(Plain(text))
    for _ in range(2):
        ask(recorder)
    ask(recorder, fields={"prompt": "x"})
    recorder.close(10)
    assert recorder.counts == {**dict.fromkeys(writers.RESULTS, 0), "dropped_redaction": 2, "recorded": 1}
    assert "Hello" not in (tmp_path / "t.jsonl").read_text() + caplog.text
    assert len(caplog.records) == 1


def test_what_openais_api_cannot_ask_is_counted(tmp_path, record):
    recorder = record()
    ask(recorder, fields={"prompt": "x", "options": {"json_schema": {}}})
    recorder.close(10)
    assert (recorder.counts["dropped_form"], len(lines(tmp_path))) == (1, 1)


def test_a_folder_that_vanishes_pauses_the_recording_until_it_is_back(tmp_path, clock, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()
    recorder = Recorder(RecordConfig(folder / "t.jsonl"), Plain(), clock=clock)
    talk = [{"role": role, "content": role} for role in ("user", "assistant", "user")]

    def turn(messages):
        ask(recorder, fields={"messages": messages}, session=SimpleNamespace(id="x", hosted=HOSTED))

    turn(talk[:1])
    settled(recorder, 1)
    folder.rename(tmp_path / "away")
    turn(talk)
    assert "no such file or directory" in settled(recorder, 1, "dropped_disk")["paused"]
    folder.mkdir()
    turn(talk)
    settled(recorder, 2, "dropped_disk")  # it is not tried again at once
    clock.now += writers.RETRY_SECONDS
    turn(talk)
    assert settled(recorder, 2)["paused"] == ""
    recorder.close(10)
    assert [record.message.partition(": no such")[0] for record in caplog.records] == [
        f"traffic cannot be recorded in {folder / 't.jsonl'}", "traffic is recorded again; 2 requests were dropped so far",
    ]  # fmt: skip
    (request,) = read_trace(folder / "t.jsonl").requests
    assert list(request.body["messages"]) == talk, "the file before, which began the conversation, is not there"


def test_a_full_disk_pauses_the_recording(tmp_path, record, clock, monkeypatch, caplog):
    recorder = record()
    ask(recorder)
    settled(recorder, 1)
    with monkeypatch.context() as patched:
        patched.setattr("edge_rt.daemon.recording.trace.os.write", _no_space)
        for number in range(3):
            clock.now += writers.RETRY_SECONDS
            ask(recorder)
            settled(recorder, number + 1, "dropped_disk")
    assert "no space left" in recorder.status()["paused"]
    clock.now += writers.RETRY_SECONDS
    ask(recorder)
    assert settled(recorder, 2)["paused"] == ""
    recorder.close(10)
    assert len(caplog.records) == 2
    assert [next(iter(line)) for line in lines(tmp_path)] == ["edge_rt_trace", "at", "at"]


def _no_space(descriptor, data):
    raise OSError(28, "No space left on device")


def test_what_waits_at_the_end_is_written(tmp_path, record):
    recorder = record(Plain(lambda text: time.sleep(0.001) or text))
    for _ in range(50):
        ask(recorder)
    recorder.close(10)
    assert (recorder.counts["recorded"], len(lines(tmp_path))) == (50, 51)


def test_the_end_does_not_wait_for_ever(record, caplog):
    let_go = threading.Event()
    recorder = record(Plain(lambda text: (let_go.wait(0.3), text)[1]))
    for _ in range(20):
        ask(recorder)
    recorder.close(0.05)
    let_go.set()
    counts = Counter(recorder.counts)
    assert counts["recorded"] + counts["dropped_end"] == 20
    assert counts["recorded"] <= 2
    assert f"{counts['dropped_end']} requests were not recorded: the daemon had to end" in caplog.text


def test_a_file_that_cannot_be_written_is_told_at_once(tmp_path):
    with pytest.raises(OptionError, match=r"traffic cannot be recorded in .*: no such file or directory"):
        Recorder(RecordConfig(tmp_path / "none" / "t.jsonl"), Plain())
