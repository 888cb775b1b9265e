"""clients/vectors.json holds for the Python client and for clients/conformance, as clients/node/test.js says that it does for Node."""

import json
import math
from pathlib import Path

import protocol_peer
import pytest
from protocol_peer import ConformanceError

from edge_rt.daemon.client.protocol import ClientProtocol
from edge_rt.daemon.protocol import FrameReader, pack, unpack
from edge_rt.errors import DaemonError, ProtocolError
from edge_rt.types import Delta

VECTORS = json.loads((Path(__file__).parents[3] / "clients" / "vectors.json").read_text(encoding="utf-8"))
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
