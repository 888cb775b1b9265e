"""Frames: whole messages however the bytes come, and nothing a peer sends does harm."""

import random
import struct

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.daemon.protocol import MAX_BYTES, MAX_DEPTH, FrameReader, pack, unpack
from edge_rt.errors import ProtocolError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
MESSAGES = st.dictionaries(st.text(), VALUES, max_size=4)


@given(st.lists(MESSAGES, max_size=5), st.randoms())
def test_messages_come_out_whole_however_they_were_cut(messages, chance):
    data, frames, found = b"".join(map(pack, messages)), FrameReader(), []
    while data:
        n = chance.randrange(1, 40)
        found += frames.feed(data[:n])
        data = data[n:]
    assert (found, frames.pending) == (messages, 0)


@pytest.mark.parametrize("length", [MAX_BYTES + 1, 2**32 - 1])
def test_a_giant_length_is_refused_before_anything_is_kept(length):
    with pytest.raises(ProtocolError, match="is too long") as caught:
        list(FrameReader().feed(struct.pack(">I", length)))
    assert caught.value.code == "frame_too_long"
    with pytest.raises(ProtocolError, match=r"a message of .* is too long"):
        pack({"text": "x" * MAX_BYTES})


def nested(depth):
    return b"\x81\xa1a" * (depth - 1) + b"\x80"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x93",
        b"\x01",
        b"\x90",
        b"\x81\x01\x02",  # a key that is no text
        b"\x81\xa1a\xa2\xff\xfe",  # text that is not UTF-8
        b"\x80\x80",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa1a\xdd\xff\xff\xff\xff",
        b"\x81\xa1a\xc7\x01\x05x",  # an extension type
        nested(MAX_DEPTH + 1),
        nested(2000),
        b"\x91" * 100_000,
    ],
)
def test_what_is_no_message_is_refused(body):
    with pytest.raises(ProtocolError) as caught:
        unpack(body)
    assert caught.value.code == "bad_frame"


def test_depth_up_to_the_limit_is_allowed():
    assert unpack(nested(MAX_DEPTH))


def test_random_bytes_do_no_harm():
    chance = random.Random(5)
    for _ in range(2000):
        frames = FrameReader(max_bytes=1 << 16)
        data = chance.randbytes(chance.randrange(1, 200))
        if chance.random() < 0.5:
            data = struct.pack(">I", len(data)) + data
        try:
            for message in frames.feed(data):
                assert isinstance(message, dict)
                msgpack.packb(message)
        except ProtocolError:
            pass
        assert frames.pending <= len(data)
