"""The client side of the protocol: clients/vectors.json, and streams that break anywhere any number of times."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import protocol_peer
import pytest
from hypothesis import given
from hypothesis import strategies as st
from protocol_peer import ConformanceError

from edge_rt.daemon.client.protocol import ACK_EVERY, ClientProtocol, Reply, generate_fields
from edge_rt.daemon.connection import EventStream
from edge_rt.daemon.protocol import FrameReader, pack, unpack
from edge_rt.errors import DaemonError, OptionError, ProtocolError
from edge_rt.types import Delta, Pruning, record

VECTORS = json.loads((Path(__file__).parents[4] / "clients" / "vectors.json").read_text(encoding="utf-8"))


IN_A_MAP = b"\x81\xa1x"  # {"x": ...}


def named(part):
    return pytest.mark.parametrize("vector", VECTORS[part], ids=lambda vector: vector["name"])


def value_of(found):
    """A value of the vectors: JSON has neither all whole numbers nor all others for everybody."""
    if isinstance(found, list):
        return [value_of(one) for one in found]
    if not isinstance(found, dict):
        return found
    if "$integer" in found:
        return int(found["$integer"])
    return float(found["$number"]) if "$number" in found else {key: value_of(one) for key, one in found.items()}


def same(one, other):
    return type(one) is type(other) and (one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other)))


@named("messagepack")
def test_messagepack(vector):
    data, expected = IN_A_MAP + bytes.fromhex(vector["hex"]), value_of(vector["value"])
    for decode in (unpack, protocol_peer.decode):
        assert same(decode(data)["x"], expected)
    assert same(unpack(protocol_peer.encode({"x": expected}))["x"], expected)
    assert same(protocol_peer.decode(pack({"x": expected})[4:])["x"], expected)


@named("not_messagepack")
def test_what_is_no_messagepack(vector):
    data = IN_A_MAP + bytes.fromhex(vector["hex"])
    with pytest.raises(ProtocolError) as caught:
        unpack(data)
    assert caught.value.code == "bad_frame"
    if "within each other" not in vector["name"]:  # the script reads what it gets from a server, of any depth
        with pytest.raises(ConformanceError):
            protocol_peer.decode(data)


@named("frames")
def test_frames_split_at_every_byte(vector):
    data = bytes.fromhex(vector["hex"])
    for at in range(len(data) + 1):
        frames = FrameReader()
        assert [*frames.feed(data[:at]), *frames.feed(data[at:])] == vector["messages"]


@named("not_frames")
def test_what_is_no_frame(vector):
    with pytest.raises(ProtocolError) as caught:
        list(FrameReader().feed(bytes.fromhex(vector["hex"])))
    assert caught.value.code == vector["code"]


@named("resume")
@pytest.mark.parametrize("at_once", [True, False])
def test_resuming(vector, at_once):
    conversation, text = ClientProtocol(), ""
    answers = conversation.request("generate", {"prompt": "x", "resumable": True})
    conversation.to_send()

    def take():
        while (event := answers.next_event()) is not None:
            yield event.text if isinstance(event, Delta) else ""

    for step in vector["steps"]:
        if "break" in step:
            conversation.disconnected()
            conversation.resume()
            expected = step["break"]["resumes"]
            sent = list(FrameReader().feed(conversation.to_send()))
            assert sent == ([] if expected is None else [{"id": answers.request, **expected}])
        else:
            data = pack({"id": answers.request, **step.get("receive", step.get("receive_part"))})
            conversation.feed(data if "receive" in step else data[: len(data) // 2])
        if at_once:
            text += "".join(take())
        for message in FrameReader().feed(conversation.to_send()):
            assert (message["op"], message["seq"] <= answers.seq) == ("ack", True)
    assert text + "".join(take()) == vector["text"]
    if vector["error"] is None:
        assert answers.result() == {}
    else:
        with pytest.raises(DaemonError) as caught:
            answers.result()
        assert caught.value.code == vector["error"]


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
