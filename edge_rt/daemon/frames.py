"""Frames of the protocol (docs/protocol.md): a length of four bytes, big-endian, and a MessagePack map of that many bytes.

What comes from a peer is hostile until it was read: the length is checked before anything is kept, the map before anything uses it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from edge_rt.errors import ProtocolError

MAX_BYTES = 16 << 20
"""Longest frame, in bytes without the length."""
MAX_DEPTH = 32
"""Maps and lists within each other, the outermost map included."""
_LENGTH = struct.Struct(">I")

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    """A message as a frame. Raises ProtocolError if it is too long."""
    import msgpack

    body: bytes = msgpack.packb(message, use_bin_type=True)
    if len(body) > MAX_BYTES:
        raise ProtocolError("frame_too_long", f"a message of {len(body):,} bytes is too long; {MAX_BYTES:,} are allowed")
    return _LENGTH.pack(len(body)) + body


def pack_answer(message: Message) -> bytes:
    """The answer to a request as a frame; one that is too long becomes an error."""
    try:
        return pack(message)
    except ProtocolError as error:
        return pack({"id": message["id"], "error": {"code": "limit", "message": str(error)}})


class Frames:
    """Bytes in as they come, whole messages out. ``max_bytes`` may change between two messages."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.length = 0
        """Bytes of the message that was given last."""
        self._held = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of a frame that has begun."""
        return len(self._held)

    def feed(self, data: bytes | memoryview) -> Iterator[Message]:
        """The messages that are complete now. Raises ProtocolError; after that the stream cannot be read any more."""
        self._held += data
        start = 0
        try:
            while len(self._held) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._held, start)
                if length > self.max_bytes:
                    raise ProtocolError("frame_too_long", f"a frame of {length:,} bytes is too long; {self.max_bytes:,} are allowed")
                end = start + _LENGTH.size + length
                if len(self._held) < end:
                    break
                body = bytes(memoryview(self._held)[start + _LENGTH.size : end])
                start, self.length = end, length
                yield unpack(body)
        finally:
            del self._held[:start]


def unpack(body: bytes) -> Message:
    """The message of a frame's body. Raises ProtocolError."""
    import msgpack

    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True, max_ext_len=0)
    except Exception as error:  # msgpack raises many kinds, all because of the peer's bytes
        raise ProtocolError("bad_frame", f"a frame is no MessagePack: {type(error).__name__}; see docs/protocol.md") from None
    if not isinstance(message, dict):
        raise ProtocolError("bad_frame", f"a frame holds {type(message).__name__} and no map; see docs/protocol.md")
    if _depth(message) > MAX_DEPTH:
        raise ProtocolError("bad_frame", f"a message has more than {MAX_DEPTH} maps and lists in each other")
    return message


def _depth(value: Any) -> int:
    """How many maps and lists are within each other, MAX_DEPTH + 1 if there are more. Level by level: a recursion could be too deep."""
    level, depth = [value], 1
    while depth <= MAX_DEPTH:
        inner = [one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer)]
        level = [one for one in inner if isinstance(one, (dict, list))]
        if not level:
            break
        depth += 1
    return depth
