"""The client's side of the protocol without input or output: requests in, bytes out; bytes in, answers out."""

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

ACK_EVERY = 8  # events of a stream that can be resumed between two acknowledgements

GONE = "the daemon has closed the connection; connect again"


class Reply:
    """What comes for one request. ``request``: its id, 0 until it was asked, and another one after the stream was resumed."""

    def __init__(self) -> None:
        self.request = 0
        self.cancelled = False  # the daemon is to be told, in this connection or the next
        self.stream: str | None = None
        self.seq = 0  # of the last event received
        self.events: deque[Event] = deque()
        self.readings: list[Message] = []  # events of texts that are read, in their order
        self._end: Message | None = None
        self._acknowledged = 0

    @property
    def over(self) -> bool:
        """The answer has come, after the last event."""
        return self._end is not None

    @property
    def resumable(self) -> bool:
        """Whether the stream may go on in another connection."""
        return self.stream is not None and not self.over

    def take(self) -> Event | None:
        """The next event that has come, None if there is none."""
        return self.events.popleft() if self.events else None

    def result(self) -> Message:
        """The answer. Raises DaemonError if it is one."""
        assert self._end is not None, "it has not come yet"
        if "error" in self._end:
            raise daemon_error(self._end["error"])
        found: Message = self._end["ok"]
        return found

    def end(self, message: Message) -> None:
        self._end = message

    def acknowledgement_due(self, every: int) -> bool:
        """Whether an acknowledgement is. ``every``: events between two."""
        if self.stream is None or not (self.over or self.seq - self._acknowledged >= every):
            return False
        self._acknowledged = self.seq
        return True


class ClientProtocol:
    """One client's requests. After ``disconnected`` it goes on with the next connection."""

    def __init__(self) -> None:
        self._farewell: Message = {"code": "disconnected", "message": GONE}
        self._frames = FrameReader()
        self._asked: dict[int, Reply] = {}
        self._broken: list[Reply] = []
        self._number = 0
        self._out: list[bytes] = []
        self._ack_every = ACK_EVERY

    def ask(self, op: str, fields: Mapping[str, Any], answers: Reply | None = None) -> Reply:
        """A request. ``answers``: those that are to take what comes. Raises ProtocolError if it is too long."""
        data = pack({"id": self._number + 1, "op": op, **fields})
        self._number += 1
        self._out.append(data)
        answers = Reply() if answers is None else answers
        answers.request = self._number
        self._asked[self._number] = answers
        if answers.cancelled:
            self._cancel(answers)
        return answers

    def cancel(self, answers: Reply) -> None:
        """End a generation soon: now, or as soon as it is asked or goes on."""
        answers.cancelled = True
        if self._asked.get(answers.request) is answers:
            self._cancel(answers)

    def _cancel(self, answers: Reply) -> None:
        self.ask("cancel", {"request": answers.request})

    def on_hello(self, hello: Message) -> None:
        """What hello was answered: a daemon with few credits wants more acknowledgements."""
        self._ack_every = max(1, min(ACK_EVERY, hello["limits"]["credits"] // 2))

    def resume(self) -> None:
        """After hello in another connection: go on with the streams that broke."""
        broken, self._broken = self._broken, []
        for answers in broken:
            self.ask("resume", {"stream": answers.stream, "after": answers.seq}, answers)

    @property
    def broken(self) -> bool:
        """Whether there are streams to go on with in another connection."""
        return bool(self._broken)

    def disconnect_error(self) -> DaemonError:
        """Why the connection ended: the daemon's last words, if it had any."""
        return daemon_error(self._farewell)

    def fail_broken(self, error: DaemonError) -> None:
        for answers in self._broken:
            answers.end({"error": {"code": error.code, "message": str(error)}})
        self._broken.clear()

    def to_send(self) -> bytes:
        data = b"".join(self._out)
        self._out.clear()
        return data

    def feed(self, data: bytes) -> None:
        """Bytes came. Raises ProtocolError if they are none of the daemon's."""
        for message in self._frames.feed(data):
            self._receive(message)

    def _receive(self, message: Message) -> None:
        answers = self._asked.get(message.get("id", -1))
        if answers is None:
            if message.get("id") is None and "error" in message:
                self._farewell = message["error"]
            return
        answers.seq = message.get("seq", answers.seq)
        if "event" not in message:
            answers.end(message)
            del self._asked[answers.request]
        elif message["event"] == "stream":
            answers.stream = message["stream"]
        elif message["event"] in ("embedding", "scored"):
            answers.readings.append(message)
        elif (event := event_of(message)) is not None:
            answers.events.append(event)
        if answers.acknowledgement_due(self._ack_every):
            self._out.append(pack({"op": "ack", "stream": answers.stream, "seq": answers.seq}))

    def disconnected(self) -> None:
        """What was asked is not answered any more, but for streams that can be resumed."""
        for answers in self._asked.values():
            if answers.resumable:
                self._broken.append(answers)
            else:
                answers.end({"error": self._farewell})
        self._frames, self._farewell = FrameReader(), {"code": "disconnected", "message": GONE}
        self._out.clear()
        self._asked.clear()


def hello_fields(key: str | None) -> Message:
    """The fields of ``hello``."""
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
        fields["options"] = {name: _sendable(name, value) for name, value in options.items()}
    return fields


def embed_fields(
    texts: Sequence[str | Sequence[int]], model: str | None, pooling: str | None, normalize: bool, dimensions: int | None
) -> Message:  # fmt: skip
    """The fields of ``embed``. Raises OptionError for texts and tokens together."""
    return {**_texts(texts), "model": model, "pooling": pooling, "normalize": normalize, "dimensions": dimensions}


def score_fields(
    texts: Sequence[str | Sequence[int]], before: str | Sequence[ChatMessage] | None, model: str | None, top: int, beyond: bool
) -> Message:  # fmt: skip
    """The fields of ``score``. Raises OptionError for texts and tokens together, and for tokens that continue something."""
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


def _sendable(name: str, value: Any) -> Any:
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
