"""Recorded traffic of a real model: asked both ways, in one piece and as a stream, and asked again from the file."""

import time

from daemons import Daemon
from edge_rt_distill.replay.trace import read_trace
from http_peer import Peer

CHAT = "/v1/chat/completions"
MAIL, CARD = "john.smith@example.com", "4111 1111 1111 1111"
QUESTION = [{"role": "user", "content": f"Say in one sentence who writes to {MAIL} about card {CARD}."}]
REDACTED = [{"role": "user", "content": "Say in one sentence who writes to [EMAIL] about card [CARD]."}]
GREEDY = {"temperature": 0, "max_tokens": 16}


def test_traffic_is_recorded_without_its_secrets_and_can_be_asked_again(tmp_path, smollm2):
    path = tmp_path / "traffic.jsonl"
    words = ("-m", str(smollm2), "-c", "1024", "--http", str(tmp_path / "h.sock"))
    with Daemon(tmp_path, *words, config=f'[record]\nfile = "{path.name}"\nanswers = true\n') as daemon, daemon.ready() as client:
        peer = Peer(str(tmp_path / "h.sock"))
        answer = peer.post(CHAT, {"messages": QUESTION, **GREEDY}).json["choices"][0]["message"]["content"]
        turns = [*QUESTION, {"role": "assistant", "content": answer}, {"role": "user", "content": f"Write to {MAIL} then."}]
        for messages in (QUESTION, turns):
            assert peer.stream(CHAT, {"messages": messages, **GREEDY, "edge_rt": {"session": MAIL}})[-1] == "[DONE]"
        list(client.generate(QUESTION, **GREEDY))
        cancelled = client.generate(f"{MAIL} and {CARD} and ", max_tokens=900, ignore_eos=True)
        next(cancelled)
        cancelled.close()
        settled(client, 5)

        assert peer.post(CHAT, dict(read_trace(path).requests[0].body)).status == 200
        settled(client, 6)

    text = path.read_text()
    assert not [secret for secret in (MAIL, CARD, CARD.replace(" ", "")) if secret in text]
    first, one, other, own, left, again = read_trace(path).requests
    assert [request.body["messages"] for request in (first, one, own, again)] == [REDACTED] * 4
    assert other.body["messages"] == [{"role": "user", "content": "Write to [EMAIL] then."}]
    assert (one.session, other.session, first.session) == ("s1", "s1", None)
    assert {request.seen.status for request in (first, one, other, own, again)} == {"ok"}
    assert all(0 < request.seen.first_token <= request.seen.total for request in (first, one, other, own, again))
    assert (left.seen.status, left.body["prompt"], left.cancel_after > 0) == ("cancelled", "[EMAIL] and [CARD] and ", True)
    assert again.body == first.body
    assert again.answer


def settled(client, count):
    """Wait until so many requests are in the file."""
    until = time.monotonic() + 30
    while client.status()["recording"]["recorded"] < count:
        assert time.monotonic() < until, client.status()["recording"]
        time.sleep(0.02)
