"""The client side of the protocol without I/O: requests in, bytes out; bytes in, answers out."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from edge_rt import __version__
from edge_rt.daemon.protocol import FrameReader, Message, pack
from edge_rt.errors import DaemonError, OptionError
from edge_rt.types import Event
from edge_rt.types import Message as ChatMessage
from edge_rt.types import event as event_of

ACK_EVERY = 8  # events of a resumable stream between two acknowledgements
GONE = "the daemon has closed the connection; connect again"


class Reply:
    """The events and the answer of one request. ``request``: its id, 0 before it is sent; it changes when the stream is resumed."""

    def __init__(self) -> None:
        self.request = 0
        self.cancelled = False  # the cancellation is to be sent, with this connection or the next
        self.stream: str | None = None  # token of a resumable stream
        self.seq = 0  # of the last event received
        self.events: deque[Event] = deque()
        self.readings: list[Message] = []  # events ``embedding`` and ``scored``
        self.answer: Message | None = None  # ``{"ok": ...}`` or ``{"error": ...}``, after the last event
        self._acknowledged = 0

    @property
    def over(self) -> bool:
        return self.answer is not None

    @property
    def resumable(self) -> bool:
        """Whether the stream can continue on another connection."""
        return self.stream is not None and not self.over

    def next_event(self) -> Event | None:
        """Remove and return the oldest received event, None if there is none."""
        return self.events.popleft() if self.events else None

    def result(self) -> Message:
        """The content of the answer. Raises DaemonError if the answer is an error."""
        assert self.answer is not None, "it is not over"
        if "error" in self.answer:
            raise daemon_error(self.answer["error"])
        found: Message = self.answer["ok"]
        return found

    def acknowledgement_due(self, every: int) -> bool:
        """Whether to send an acknowledgement now: once per ``every`` events, and at the end. The caller must send it."""
        if self.stream is None or not (self.over or self.seq - self._acknowledged >= every):
            return False
        self._acknowledged = self.seq
        return True


class ClientProtocol:
    """All requests of one client. After ``disconnected`` it continues with the next connection."""

    def __init__(self) -> None:
        self._farewell: Message = {"code": "disconnected", "message": GONE}
        self._frames = FrameReader()
        self._pending: dict[int, Reply] = {}
        self._broken: list[Reply] = []  # resumable streams of the lost connection
        self._number = 0
        self._out: list[bytes] = []
        self._ack_every = ACK_EVERY

    def request(self, op: str, fields: Mapping[str, Any], reply: Reply | None = None) -> Reply:
        """Queue a request; ``reply`` receives its events and answer. Raises ProtocolError if the request is too long."""
        data = pack({"id": self._number + 1, "op": op, **fields})
        self._number += 1
        self._out.append(data)
        reply = Reply() if reply is None else reply
        reply.request = self._number
        self._pending[self._number] = reply
        if reply.cancelled:
            self.request("cancel", {"request": reply.request})
        return reply

    def cancel(self, reply: Reply) -> None:
        """Queue a cancellation: now, or as soon as the request is sent or resumed."""
        reply.cancelled = True
        if self._pending.get(reply.request) is reply:
            self.request("cancel", {"request": reply.request})

    def on_hello(self, hello: Message) -> None:
        """Process the answer to ``hello``: acknowledge at least twice per the daemon's credits."""
        self._ack_every = max(1, min(ACK_EVERY, hello["limits"]["credits"] // 2))

    def resume(self) -> None:
        """Queue the resumption of the streams of the lost connection. Call it after ``hello`` on the next one."""
        broken, self._broken = self._broken, []
        for reply in broken:
            self.request("resume", {"stream": reply.stream, "after": reply.seq}, reply)

    @property
    def broken(self) -> bool:
        """Whether there are streams to resume on another connection."""
        return bool(self._broken)

    def disconnect_error(self) -> DaemonError:
        """The error that the daemon sent before it closed the connection, by default ``disconnected``."""
        return daemon_error(self._farewell)

    def fail_broken(self, error: DaemonError) -> None:
        for reply in self._broken:
            reply.answer = {"error": {"code": error.code, "message": str(error)}}
        self._broken.clear()

    def to_send(self) -> bytes:
        """Remove and return the queued bytes."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    def feed(self, data: bytes) -> None:
        """Process received bytes. Raises ProtocolError if they are not the protocol's."""
        for message in self._frames.feed(data):
            self._receive(message)

    def _receive(self, message: Message) -> None:
        reply = self._pending.get(message.get("id", -1))
        if reply is None:
            if message.get("id") is None and "error" in message:
                self._farewell = message["error"]
            return
        reply.seq = message.get("seq", reply.seq)
        if "event" not in message:
            reply.answer = message
            del self._pending[reply.request]
        elif message["event"] == "stream":
            reply.stream = message["stream"]
        elif message["event"] in ("embedding", "scored"):
            reply.readings.append(message)
        elif (event := event_of(message)) is not None:
            reply.events.append(event)
        if reply.acknowledgement_due(self._ack_every):
            self._out.append(pack({"op": "ack", "stream": reply.stream, "seq": reply.seq}))

    def disconnected(self) -> None:
        """End all pending requests with ``disconnect_error``, except for resumable streams."""
        for reply in self._pending.values():
            if reply.resumable:
                self._broken.append(reply)
            else:
                reply.answer = {"error": self._farewell}
        self._frames, self._farewell = FrameReader(), {"code": "disconnected", "message": GONE}
        self._out.clear()
        self._pending.clear()


def hello_fields(key: str | None) -> Message:
    fields: Message = {"versions": [1], "client": f"edge-rt/{__version__}"}
    return fields if key is None else {**fields, "key": key}


def generate_fields(
    prompt: str | Sequence[ChatMessage], session: str | None, model: str | None, priority: str, resumable: bool, options: Mapping[str, Any]
) -> Message:
    fields = _prompt(prompt)
    fields |= {name: value for name, value in (("session", session), ("model", model)) if value is not None}
    if priority != "normal":
        fields["priority"] = priority
    if resumable:
        fields["resumable"] = True
    if options:
        fields["options"] = {name: _encode_option(name, value) for name, value in options.items()}
    return fields


def embed_fields(
    texts: Sequence[str | Sequence[int]], model: str | None, pooling: str | None, normalize: bool, dimensions: int | None
) -> Message:  # fmt: skip
    """Raises OptionError if texts and tokens are mixed."""
    return {**_texts(texts), "model": model, "pooling": pooling, "normalize": normalize, "dimensions": dimensions}


def score_fields(
    texts: Sequence[str | Sequence[int]], before: str | Sequence[ChatMessage] | None, model: str | None, top: int, beyond: bool
) -> Message:  # fmt: skip
    """Raises OptionError if texts and tokens are mixed, and for tokens with ``before``."""
    rest: Message = {"model": model, "top": top, "beyond": beyond}
    if before is None:
        return {**_texts(texts), **rest}
    if not all(isinstance(text, str) for text in texts):
        raise OptionError("what continues a prompt is given as text; or give the tokens of prompt and continuation together")
    return {**_prompt(before), "continuations": list(texts), **rest}


def feedback_fields(
    prompt: str | Sequence[ChatMessage], answer: str, rating: int | None, correction: str | None, comment: str | None, model: str | None
) -> Message:  # fmt: skip
    return {**_prompt(prompt), "answer": answer, "rating": rating, "correction": correction, "comment": comment, "model": model}


def _prompt(prompt: str | Sequence[ChatMessage]) -> Message:
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": [dict(message) for message in prompt]}


def _texts(texts: Sequence[str | Sequence[int]]) -> Message:
    if all(isinstance(text, str) for text in texts):
        return {"texts": list(texts)}
    if not any(isinstance(text, str) for text in texts):
        return {"tokens": [list(tokens) for tokens in texts]}
    raise OptionError("some texts are given as text and some as tokens; ask for them one after the other")


def _encode_option(name: str, value: Any) -> Any:
    if name in ("sampling", "rules"):
        raise OptionError(f"the daemon takes no {name}; give sampling parameters by name, and rules to the daemon itself")
    if hasattr(value, "_asdict"):
        return value._asdict()
    if name == "logit_bias":
        return {str(token): bias for token, bias in value.items()}
    return list(value) if isinstance(value, (tuple, list)) else value


def daemon_error(found: Mapping[str, Any]) -> DaemonError:
    rest = {name: value for name, value in found.items() if name not in ("code", "message")}
    return DaemonError(found["code"], found["message"], **rest)
