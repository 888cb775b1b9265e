"""A stream that breaks anywhere, any number of times, goes on without losing or repeating anything, and keeps little."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.daemon.client.protocol import ACK_EVERY, ClientProtocol, Reply, generate_fields
from edge_rt.daemon.connection import EventStream
from edge_rt.daemon.protocol import FrameReader, pack
from edge_rt.errors import DaemonError, OptionError, ProtocolError
from edge_rt.types import Delta, Pruning, record

CREDITS = 16


def worker(credit):
    """A model whose worker is given credits."""
    return SimpleNamespace(supervisor=SimpleNamespace(tell=lambda command: credit(command["events"])))


class Wire:
    """A worker that has a text to say, the daemon's stream, and a client; bytes between the last two get lost when it breaks."""

    def __init__(self, texts):
        self.left, self.credits = list(texts), CREDITS
        self.stream = EventStream(1, worker(self._credit), CREDITS, resumable=True)
        self.client, self.got, self.down = ClientProtocol(), [], b""
        self.answers = self.client.request("generate", generate_fields("x", None, None, "normal", True, {}))
        self.client.to_send()
        self.down = pack({"id": 1, "event": "stream", "stream": self.stream.token})
        self.deliver(len(self.down))
        self.frames = FrameReader()
        self.request = 1

    def _credit(self, events):
        self.credits += events

    def work(self):
        """The worker says one thing more, if it may."""
        if self.stream.ended or not self.credits:
            return
        self.credits -= bool(self.left)
        message = record(Delta(self.left.pop(0))) if self.left else {"ok": {}}
        sent = self.stream.add(message)
        assert self.stream.held <= CREDITS + 1
        self.down += pack({**sent, "id": self.request})

    def deliver(self, size):
        """Some bytes reach the client, which takes what it has, and what it says reaches the daemon."""
        data, self.down = self.down[:size], self.down[size:]
        self.client.feed(data)
        while (event := self.answers.next_event()) is not None:
            self.got.append(event.text)

    def listen(self):
        for message in self.frames.feed(self.client.to_send()):
            assert message["op"] == "ack"
            self.stream.acknowledge(message["seq"])

    def break_(self):
        """What is on its way either way is lost; the client connects again."""
        self.client.to_send()
        self.client.disconnected()
        self.down = b""
        if not self.client.broken:
            return
        self.client.resume()
        (message,) = FrameReader().feed(self.client.to_send())
        assert (message["op"], message["stream"]) == ("resume", self.stream.token)
        self.request = message["id"]
        self.down = b"".join(pack({**held, "id": self.request}) for held in self.stream.events_after(message["after"]))


@given(
    st.lists(st.text(min_size=1, max_size=5), max_size=60),
    st.lists(st.sampled_from(["work"] * 4 + ["listen", "break"]) | st.integers(1, 200), max_size=200),
)
def test_nothing_is_lost_or_repeated_wherever_it_breaks(texts, happens):
    wire = Wire(texts)
    for one in happens:
        if isinstance(one, int):
            wire.deliver(one)
        else:
            {"work": wire.work, "listen": wire.listen, "break": wire.break_}[one]()
    for _ in range(2 * len(texts) + 2):
        wire.work()
        wire.deliver(1 << 20)
        wire.listen()
    assert (wire.got, wire.answers.over) == (texts, True)
    assert wire.stream.ended
    assert wire.stream.held <= ACK_EVERY, "the last acknowledgement may be lost, no other"


def test_who_does_not_acknowledge_is_sent_no_more_than_the_credits():
    wire = Wire(["a"] * 100)
    for _ in range(100):
        wire.work()
    assert (wire.stream.held, wire.credits) == (CREDITS, 0)
    assert ACK_EVERY <= CREDITS // 2


def test_a_stream_goes_on_only_after_what_is_still_there():
    stream = EventStream(1, worker(lambda events: None), CREDITS, resumable=True)
    for text in "abcdef":
        stream.add(record(Delta(text)))
    stream.acknowledge(3)
    for seq in (2, 7):
        with pytest.raises(ProtocolError, match="can be resumed after 3 to 6"):
            stream.events_after(seq)
    assert [message["text"] for message in stream.events_after(4)] == ["e", "f"]


def test_credits_of_a_plain_stream_come_back_when_it_was_written():
    given = []
    stream = EventStream(1, worker(given.append), CREDITS, resumable=False)
    for _ in range(10):
        stream.written()
    assert (given, stream.token, stream.held) == ([4, 4], None, 0)


def test_what_cannot_be_resumed_fails_when_the_connection_breaks():
    client = ClientProtocol()
    answers = client.request("status", {})
    client.disconnected()
    with pytest.raises(DaemonError, match="has closed the connection") as caught:
        answers.result()
    assert (caught.value.code, client.broken) == ("disconnected", False)


def said(client):
    return [(message["op"], message.get("request")) for message in FrameReader().feed(client.to_send())]


def test_what_was_cancelled_is_cancelled_in_the_next_connection_too():
    client, answers = ClientProtocol(), Reply()
    client.cancel(answers)
    client.request("generate", {"prompt": "x"}, answers)
    assert said(client) == [("generate", None), ("cancel", answers.request)]
    client.feed(pack({"id": answers.request, "event": "stream", "stream": "s"}))
    client.disconnected()
    client.cancel(answers)
    assert said(client) == []
    client.resume()
    assert said(client) == [("resume", None), ("cancel", answers.request)]
    client.feed(pack({"id": answers.request, "ok": {}}))
    client.cancel(answers)
    assert (said(client), answers.over) == ([("ack", None)], True)


def test_options_as_the_protocol_has_them():
    fields = generate_fields("x", "s", "m", "low", False, {"logit_bias": {3: 1.5}, "prune": Pruning(8), "stop": ("a",), "seed": 1})
    assert fields == {
        "prompt": "x",
        "session": "s",
        "model": "m",
        "priority": "low",
        "options": {
            "logit_bias": {"3": 1.5},
            "prune": {"budget": 8, "unit": "cells", "question": True, "every": 0},
            "stop": ["a"],
            "seed": 1,
        },
    }
    with pytest.raises(OptionError, match="the daemon takes no rules"):
        generate_fields("x", None, None, "normal", False, {"rules": {}})
