"""A client written from docs/protocol.md alone, with Python's own library: ``python -I peer_from_the_document.py SOCKET PROMPT``.

Prints the answer, asked for twice: as one stream, and as one whose connection breaks after every few events.
"""

import json
import socket
import struct
import sys


def write(value):
    """A value as MessagePack."""
    if value is None:
        return b"\xc0"
    if value is True or value is False:
        return b"\xc3" if value else b"\xc2"
    if isinstance(value, int):
        return struct.pack(">BQ", 0xCF, value) if value >= 0 else struct.pack(">Bq", 0xD3, value)
    if isinstance(value, float):
        return struct.pack(">Bd", 0xCB, value)
    if isinstance(value, str):
        data = value.encode()
        return struct.pack(">BI", 0xDB, len(data)) + data
    if isinstance(value, list):
        return struct.pack(">BI", 0xDD, len(value)) + b"".join(map(write, value))
    return struct.pack(">BI", 0xDF, len(value)) + b"".join(write(key) + write(one) for key, one in value.items())


NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
LENGTHS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H", 0xDF: ">I"}


class Reader:
    """Values of MessagePack, one after another."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count):
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self):
        kind = self.take(1)[0]
        if kind < 0x80 or kind >= 0xE0:
            return kind if kind < 0x80 else kind - 256
        if kind in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[kind]
        if kind in NUMBERS:
            return self.unpack(NUMBERS[kind])
        count = self.unpack(LENGTHS[kind]) if kind in LENGTHS else kind & (0x1F if kind >= 0xA0 else 0x0F)
        if kind in (0xD9, 0xDA, 0xDB) or 0xA0 <= kind < 0xC0:
            return self.take(count).decode()
        if kind in (0xDC, 0xDD) or 0x90 <= kind < 0xA0:
            return [self.value() for _ in range(count)]
        return {self.value(): self.value() for _ in range(count)}


class Connection:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)
        self.send({"id": 0, "op": "hello", "versions": [1], "client": "the document"})
        assert self.receive()["ok"]["version"] == 1

    def send(self, message):
        data = write(message)
        self.socket.sendall(struct.pack(">I", len(data)) + data)

    def receive(self):
        (length,) = struct.unpack(">I", self.exactly(4))
        return Reader(self.exactly(length)).value()

    def exactly(self, count):
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            assert more, "the daemon has closed the connection"
            data += more
        return data


def plain(path, request):
    """The text of one stream."""
    connection, text = Connection(path), ""
    connection.send({"id": 5, **request})
    while "event" in (message := connection.receive()):
        text += message["text"] if message["event"] == "delta" else ""
    assert message == {"id": 5, "ok": {}}
    connection.send({"id": 6, "op": "sing"})
    assert connection.receive()["error"]["code"] == "unknown_op"
    return text


def broken(path, request):
    """The text of a stream whose connection breaks after every seven events."""
    connection, text, seq, number = Connection(path), "", 0, 1
    connection.send({"id": number, **request, "resumable": True})
    stream = connection.receive()["stream"]
    while True:
        for _ in range(7):
            message = connection.receive()
            assert (message["id"], message["seq"]) == (number, seq + 1)
            seq += 1
            if message.get("event") == "delta":
                text += message["text"]
            if "event" not in message:
                assert message["ok"] == {}
                connection.send({"op": "ack", "stream": stream, "seq": seq})
                return text
            if seq % 3 == 0:
                connection.send({"op": "ack", "stream": stream, "seq": seq})
        connection.socket.close()
        connection, number = Connection(path), number + 1
        connection.send({"id": number, "op": "resume", "stream": stream, "after": seq})


if __name__ == "__main__":
    asked = {"op": "generate", "prompt": sys.argv[2], "options": {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "seed": None}}
    print(json.dumps([plain(sys.argv[1], asked), broken(sys.argv[1], asked)]))
