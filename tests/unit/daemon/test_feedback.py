"""Feedback to the daemon: both ways in, written redacted and told apart by the form of the prompt, refused where it cannot be kept."""

import asyncio

import pytest
from daemons import Daemon, write_plugin
from edge_rt_distill.replay.trace import read_trace
from http_peer import Peer

from edge_rt.daemon.client import AsyncClient
from edge_rt.errors import DaemonError

pytest.importorskip("h11", reason="the daemon speaks HTTP with h11; pip install 'edge-rt[http]'")

PATH = "/edge-rt/feedback"
MAIL = "ada@example.org"
HELLO = [{"role": "user", "content": f"Hello {MAIL}"}]
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
    answered = peer.post(PATH, {**SAID, "correction": "Hello!", "comment": f"Ask {MAIL}", "model": None, "user": "me"})
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
        assert peer.post(PATH, {"messages": messages, "answer": "x", "rating": 0}).status == 200
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
    answered = peer.post(PATH, {**SAID, **more})
    assert (answered.status in (400, 404), message in answered.json["error"]["message"]) == (True, True), answered.json
    assert path.read_bytes() == before


def test_without_recording_feedback_has_no_place(folder, random_model):
    with Daemon(folder, "--http", str(folder / "h.sock"), model=str(random_model())) as daemon, daemon.ready() as client:
        with pytest.raises(DaemonError, match="start it with --record FILE") as error:
            client.feedback(HELLO, "x", rating=1)
        assert error.value.code == "not_recording"
        assert Peer(str(folder / "h.sock")).post(PATH, SAID).code == "not_recording"


def test_what_cannot_be_written_is_told_to_who_gave_it(folder, random_model):
    (folder / "there").mkdir()
    record = '[record]\nfile = "there/t.jsonl"\n'
    with Daemon(folder, config=record, model=str(random_model())) as daemon, daemon.ready() as client:
        (folder / "there").rename(folder / "away")
        with pytest.raises(DaemonError, match="the file of recorded traffic cannot be written") as error:
            client.feedback(HELLO, "x", rating=1)
        assert error.value.code == "failed"


def test_requests_say_which_form_they_had_and_which_rules_their_answers_hit(folder, random_model):
    config = 'limits.requests_per_second = 0\nrules = "r.toml"\n[record]\nfile = "t.jsonl"\n'
    (folder / "r.toml").write_text('[[redaction.pattern]]\nname = "any"\nregex = "[a-z0-9]"\n')
    with Daemon(folder, config=config, model=str(random_model())) as daemon, daemon.ready() as client:
        list(client.generate(HELLO, max_tokens=40, ignore_eos=True))
        list(client.generate("Hello", max_tokens=2, ignore_eos=True))
        client.feedback(HELLO, "x", rating=1)
    trace = read_trace(folder / "t.jsonl")
    talk, text = trace.requests
    assert (len(talk.variant), text.variant) == (12, "")
    assert talk.variant == trace.feedback[0].variant
    assert (list(talk.seen.rules), talk.seen.rules["redaction"] > 0) == (["redaction"], True)
