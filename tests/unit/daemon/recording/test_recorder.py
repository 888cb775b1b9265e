"""What is recorded of requests and feedback, without delaying or breaking serving."""

import asyncio
import json
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest
from daemons import Daemon, write_plugin
from edge_rt_distill.replay.trace import read_trace
from http_peer import Peer

from edge_rt.daemon.client import AsyncClient
from edge_rt.daemon.config import RecordConfig
from edge_rt.daemon.connection import OVER_HTTP, OVER_TCP
from edge_rt.daemon.recording import Recorder
from edge_rt.daemon.recording import trace as writers
from edge_rt.errors import DaemonError, PluginError

HOSTED = SimpleNamespace(name="m", template="")


GREETING = {"messages": [{"role": "user", "content": "Hello"}]}


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


def ask(recorder, *messages, client=None, fields=GREETING, session=None, size=100):
    taken = recorder.start(client or Client(), fields, size, HOSTED, session)
    if taken is not None:
        for message in messages or (DELTA, done(), {"ok": {}}):
            taken.on_message(message)
    return taken


def recorded_soon(recorder, count, what="recorded"):
    until = time.monotonic() + 10
    while recorder.counts[what] < count:
        assert time.monotonic() < until, recorder.status()
        time.sleep(0.002)
    return recorder.status()


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]


def test_a_request_from_its_coming_to_its_end(tmp_path, record, clock):
    recorder = record(answers=True)
    clock.now += 5
    taken = recorder.start(
        Client(), {**GREETING, "resumable": True, "pieces": True, "session": "real", "priority": "low"}, 100, HOSTED, None
    )
    for seconds, message in [
        (1, {"event": "prompt", "done": 7, "total": 7}), (0.5, {**DELTA, "text": "my ", "tokens": []}), (0.25, {**DELTA, "text": "secret"}),
        (0.25, {**DELTA, "text": "", "tokens": [], "concealed": 1}), (1, done()), (0, {"ok": {}}),
    ]:  # fmt: skip
        clock.now += seconds
        taken.on_message(message)
    recorder.close(10)
    header, line = lines(tmp_path)
    assert header["edge_rt_trace"] == 1
    assert (header["redacted"], header["redacted_by"], header["sample"], header["answers"]) == (True, "nothing", 1, True)
    assert line == {
        "at": 5.0, "path": "/v1/chat/completions", "client": "c1", "request": {**GREETING, "edge_rt": {"priority": "low"}},
        "outcome": {"status": "ok", "finish_reason": "stop", "prompt_tokens": 7, "completion_tokens": 3, "first_token": 1.75, "total": 3.0},
        "answer": "my [X]",
    }  # fmt: skip
    assert read_trace(tmp_path / "t.jsonl").requests[0].seen.first_token == 1.75


def test_which_rules_an_answer_hit_and_which_form_its_prompt_had(tmp_path, record):
    recorder, hosted = record(), SimpleNamespace(name="m", template="t1")
    post = [{"name": "redaction", "counts": {"email": 2, "card": 1}}, {"name": "punctuation", "counts": {}}]
    for template, fields in (("t1", GREETING), ("t1", {"prompt": "x"}), ("t2", GREETING), ("", GREETING)):
        hosted.template = template
        taken = recorder.start(Client(), fields, 100, hosted, None)
        taken.on_message(done(post=post if template == "t1" else ()))
        taken.on_message({"ok": {}})
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
    taken = recorder.start(Client(), GREETING, 100, HOSTED, None)
    taken.on_message(DELTA)
    if left:
        clock.now += 2
        taken.on_left()
        clock.now += 1
        taken.on_left()
    for message in messages:
        taken.on_message(message)
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
    assert recorded_soon(recorder, 3)["dropped_queue"] == 1
    ask(recorder, size=2000)
    recorded_soon(recorder, 4)
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


def test_a_folder_that_vanishes_pauses_the_recording_until_it_is_back(tmp_path, clock, caplog):
    folder = tmp_path / "folder"
    folder.mkdir()
    recorder = Recorder(RecordConfig(folder / "t.jsonl"), Plain(), clock=clock)
    talk = [{"role": role, "content": role} for role in ("user", "assistant", "user")]

    def turn(messages):
        ask(recorder, fields={"messages": messages}, session=SimpleNamespace(id="x", hosted=HOSTED))

    turn(talk[:1])
    recorded_soon(recorder, 1)
    folder.rename(tmp_path / "away")
    turn(talk)
    assert "no such file or directory" in recorded_soon(recorder, 1, "dropped_disk")["paused"]
    folder.mkdir()
    turn(talk)
    recorded_soon(recorder, 2, "dropped_disk")  # it is not tried again at once
    clock.now += writers.RETRY_SECONDS
    turn(talk)
    assert recorded_soon(recorder, 2)["paused"] == ""
    recorder.close(10)
    assert [record.message.partition(": no such")[0] for record in caplog.records] == [
        f"traffic cannot be recorded in {folder / 't.jsonl'}", "traffic is recorded again; 2 requests were dropped so far",
    ]  # fmt: skip
    (request,) = read_trace(folder / "t.jsonl").requests
    assert list(request.body["messages"]) == talk, "the file before, which began the conversation, is not there"


def test_a_full_disk_pauses_the_recording(tmp_path, record, clock, monkeypatch, caplog):
    recorder = record()
    ask(recorder)
    recorded_soon(recorder, 1)
    with monkeypatch.context() as patched:
        patched.setattr("edge_rt.daemon.recording.trace.os.write", _no_space)
        for number in range(3):
            clock.now += writers.RETRY_SECONDS
            ask(recorder)
            recorded_soon(recorder, number + 1, "dropped_disk")
    assert "no space left" in recorder.status()["paused"]
    clock.now += writers.RETRY_SECONDS
    ask(recorder)
    assert recorded_soon(recorder, 2)["paused"] == ""
    recorder.close(10)
    assert len(caplog.records) == 2
    assert [next(iter(line)) for line in lines(tmp_path)] == ["edge_rt_trace", "at", "at"]


def _no_space(descriptor, data):
    raise OSError(28, "No space left on device")


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


CHAT = "/v1/chat/completions"


MAIL = "ada@example.org"


HELLO = [{"role": "user", "content": f"Hello {MAIL}"}]


ANSWER = {"max_tokens": 6, "temperature": 0, "edge_rt": {"ignore_eos": True}}


def settled(client, count):
    """The state of the recording when so many requests came to an end, one way or the other."""
    until = time.monotonic() + 10
    while True:
        found = client.status()["recording"]
        if sum(value for name, value in found.items() if name.startswith(("recorded", "left", "dropped"))) >= count:
            return found
        assert time.monotonic() < until, found
        time.sleep(0.01)


@pytest.fixture
def path(folder):
    return folder / "t.jsonl"


def started(folder, model, more="", **options):
    config = f'limits.requests_per_second = 0\n{more}\n[record]\nfile = "t.jsonl"\nanswers = true\n'
    words = ("--http", str(folder / "h.sock"), "--policy", "strict")
    return Daemon(folder, *words, config=config, model=str(model), delay=0.001, **options)


def test_both_ways_in_are_recorded_and_ask_the_same_again(folder, path, random_model):
    with started(folder, random_model()) as daemon, daemon.ready() as client:
        peer = Peer(str(folder / "h.sock"))
        assert client.status()["recording"]["recorded"] == 0
        whole = peer.post(CHAT, {"messages": HELLO, **ANSWER}).json
        *_, last = peer.stream(CHAT, {"messages": HELLO, **ANSWER, "edge_rt": {**ANSWER["edge_rt"], "session": "mine"}})
        assert last == "[DONE]"
        list(client.generate(f"Mail {MAIL}", max_tokens=6, temperature=0, ignore_eos=True))
        client.embed(["texts to embed are not recorded"])
        generation = client.generate("x", max_tokens=100_000, ignore_eos=True)
        next(generation)
        generation.close()
        with pytest.raises(DaemonError):
            list(client.generate("x", grammar="root ::= ["))
        found = settled(client, 5)
        assert (found["recorded"], found["file"], found["paused"]) == (5, str(path), "")
        assert 'edge_rt_recording_total{result="recorded"} 5' in peer.get("/metrics").body.decode()
        assert client.call("metrics")["recording"]["recorded"] == 5

        text = path.read_text()
        assert MAIL not in text
        assert "mine" not in text
        first, second, third, fourth, fifth = read_trace(path).requests
        assert first.body == {"messages": [{"role": "user", "content": "Hello [EMAIL]"}], **ANSWER}
        assert (first.seen.status, first.seen.finish_reason, first.seen.completion_tokens) == ("ok", "length", 6)
        assert first.seen.prompt_tokens == whole["usage"]["prompt_tokens"]
        assert (second.session, second.body["messages"], first.session) == ("s1", first.body["messages"], None)
        assert (third.path, third.body["prompt"]) == ("/v1/completions", "Mail [EMAIL]")
        assert (fourth.seen.status, fourth.cancel_after > 0) == ("cancelled", True)
        assert (fifth.seen.status, fifth.seen.code) == ("error", "constraint")

        again = peer.post(first.path, dict(first.body)).json
        assert again["choices"][0]["finish_reason"] == "length"
        settled(client, 6)
    *_, last = read_trace(path).requests
    assert last.body == first.body


def test_a_client_that_goes_away_and_one_that_is_refused(folder, path, random_model):
    with started(folder, random_model(), "limits.requests_per_user = 1") as daemon, daemon.ready() as client:
        peer = Peer(str(folder / "h.sock"))
        long = {"messages": HELLO, "max_tokens": 3500, "edge_rt": {"ignore_eos": True}, "stream": True}
        with peer.asked("POST", CHAT, long) as answer:
            answer.readline()
            assert peer.post(CHAT, {"messages": HELLO, **ANSWER}).code == "rate_limit_exceeded"
        settled(client, 2)
    gone, refused = read_trace(path).requests
    assert (gone.seen.status, gone.seen.finish_reason, gone.cancel_after > 0) == ("cancelled", "", True)
    assert (refused.seen.status, refused.seen.code, refused.seen.first_token) == ("error", "limit", None)


FEEDBACK = "/edge-rt/feedback"


SAID = {"messages": HELLO, "answer": f"Write to {MAIL}", "rating": -1}


RECORD = '[record]\nfile = "t.jsonl"\nsample = 0.0\n'


@pytest.fixture(scope="module")
def recording(tmp_path_factory, random_model):
    """A daemon that samples every request away, and with it a peer over HTTP and a client."""
    folder = tmp_path_factory.mktemp("feedback")
    write_plugin(folder)
    words = ("--http", str(folder / "h.sock"))
    config = f"limits.requests_per_second = 0\n{RECORD}"
    with Daemon(folder, *words, config=config, model=str(random_model())) as daemon, daemon.ready() as client:
        yield folder / "t.jsonl", Peer(str(folder / "h.sock")), client


def test_feedback_is_in_the_file_redacted_when_it_is_answered_and_never_sampled_away(recording):
    path, peer, client = recording
    list(client.generate(HELLO, max_tokens=2))
    answered = peer.post(FEEDBACK, {**SAID, "correction": "Hello!", "comment": f"Ask {MAIL}", "model": None, "user": "me"})
    assert (answered.status, answered.json) == (200, {"object": "edge_rt.feedback"})
    (over_http,) = read_trace(path, of_requests=False).feedback
    assert over_http.messages == ({"role": "user", "content": "Hello [EMAIL]"},)
    assert (over_http.answer, over_http.rating, over_http.correction) == ("Write to [EMAIL]", -1, "Hello!")
    assert (over_http.comment, over_http.client) == ("Ask [EMAIL]", "c1")

    client.feedback("Once upon", " a time", rating=1)

    async def give():
        async with AsyncClient(client.address) as other:
            await other.feedback(HELLO, "", comment="it said nothing")

    asyncio.run(give())
    trace = read_trace(path, of_requests=False)
    assert trace.requests == ()
    assert [(one.prompt, one.answer, one.rating, one.variant) for one in trace.feedback[1:]] == [
        ("Once upon", " a time", 1, ""), ("", "", None, over_http.variant),
    ]  # fmt: skip
    assert MAIL not in path.read_text()
    assert client.status()["recording"]["recorded"] == len(trace.feedback)


def test_a_changed_system_message_is_another_variant_and_a_changed_question_is_not(recording):
    path, peer, _ = recording
    texts = ["Be brief.", f"Be brief. {MAIL}", "Be brief. bob@example.org"]
    talks = [[{"role": "system", "content": text}, *HELLO] for text in texts] + [HELLO, [{"role": "user", "content": "Bye"}]]
    talks += [[{"role": "developer", "content": texts[0]}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]]
    for messages in talks:
        assert peer.post(FEEDBACK, {"messages": messages, "answer": "x", "rating": 0}).status == 200
    found = [one.variant for one in read_trace(path, of_requests=False).feedback[-6:]]
    assert all(len(one) == 12 and set(one) <= set("0123456789abcdef") for one in found)
    assert len(set(found)) == 4, "two prompts that look alike once they are redacted are two"
    assert (found[3], found[0]) == (found[4], found[5])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"rating": None}, "give a rating, a correction or a comment"),
        ({"rating": 2}, "the rating is 2; give -1, 0 or 1"),
        ({"rating": True}, "rating is not a whole number"),
        ({"prompt": "x"}, "give one of them"),
        ({"messages": None}, "give one of them"),
        ({"messages": []}, "give the prompt or the messages"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "no role of"),
        ({"answer": None}, "there is no answer; give a text"),
        ({"stars": 5}, "there is no field stars"),
        ({"model": "other"}, "there is no model 'other'"),
    ],
)
def test_feedback_that_cannot_be_is_refused_and_not_written(recording, more, message):
    path, peer, _ = recording
    before = path.read_bytes()
    answered = peer.post(FEEDBACK, {**SAID, **more})
    assert (answered.status in (400, 404), message in answered.json["error"]["message"]) == (True, True), answered.json
    assert path.read_bytes() == before


def test_what_cannot_be_written_is_told_to_who_gave_it(folder, random_model):
    (folder / "there").mkdir()
    record = '[record]\nfile = "there/t.jsonl"\n'
    with Daemon(folder, config=record, model=str(random_model())) as daemon, daemon.ready() as client:
        (folder / "there").rename(folder / "away")
        with pytest.raises(DaemonError, match="the file of recorded traffic cannot be written") as error:
            client.feedback(HELLO, "x", rating=1)
        assert error.value.code == "failed"
