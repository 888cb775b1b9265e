"""The clients of the serving benches: what they count must be right, however the bytes come."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.results import OURS, Settings
from bench.serve import chats, fairness, throughput
from bench.serve.chats import HttpChat, OwnChat, prompt, talk
from bench.serve.servers import OVER_HTTP, PEER, LineUp, Serving
from edge_rt.daemon.protocol import pack
from edge_rt.types import ContextUse, Delta, Done, Timings, Usage, record


def chunk(event: Any) -> bytes:
    data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode()
    return b"%x\r\n%s\r\n" % (len(data), data)


def delta(**content: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": content, "finish_reason": None}]}


EVENTS = [
    delta(role="assistant", content=""), delta(content="a"), delta(content="data: {b"), delta(content="\n\ndata: c"), delta(),
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}},
]  # fmt: skip
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM = HEAD + b"".join(map(chunk, EVENTS)) + chunk("[DONE]") + b"0\r\n\r\n"


@given(cuts=st.lists(st.integers(1, len(STREAM) - 1), unique=True).map(sorted))
def test_a_stream_over_http_is_read_the_same_however_it_is_cut(cuts: list[int]) -> None:
    chat = HttpChat(("localhost", 1), "text", 3, {})
    for number, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(STREAM)], strict=True)):
        if not chat.ended:
            chat.took(STREAM[start:end], float(number))
    assert (chat.ended, len(chat.times), chat.tokens, chat.prompt_tokens) == (True, 3, 3, 7)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'HTTP/1.1 400 Bad Request\r\n\r\n{"error": "no"}', "refused"),
        (HEAD + chunk({"error": {"message": "full"}}), "full"),
        (STREAM[:120], "broke"),
    ],
)
def test_errors_over_http_are_told(data: bytes, message: str) -> None:
    chat = HttpChat(("localhost", 1), "text", 3, {})

    def feed() -> None:
        chat.took(data, 0.0)
        chat.took(b"", 1.0)

    with pytest.raises(RuntimeError, match=message):
        feed()


def test_the_own_protocol_is_read_by_the_own_client() -> None:
    chat = OwnChat("/nowhere", "text", 2)
    chat._answers = chat._conversation.request("generate", {})
    events = [Delta("a", (1,)), Delta("", (2,)), Delta("b"), Done("max_tokens", Usage(5, 2), Timings(0.1, 0.1, 0.1), ContextUse(7, 9), 1)]
    frames = [pack({"id": chat._answers.request, **record(event)}) for event in events]
    for at, frame in enumerate(frames[:3]):
        chat.took(frame, float(at))
    assert (chat.times, chat.ended) == ([0.0, 2.0], False)
    chat.took(frames[3] + pack({"id": chat._answers.request, "ok": {}}), 3.0)
    assert (chat.ended, chat.tokens, chat.prompt_tokens) == (True, 2, 5)
    with pytest.raises(RuntimeError, match="has left"):
        chat.took(b"", 4.0)


class Talker:
    """A chat whose server says ``pieces`` as soon as it is asked."""

    def __init__(self, pieces: int, log: list[str], name: str) -> None:
        self.pieces, self.log, self.name = pieces, log, name
        self.sent, self.times, self.tokens, self.prompt_tokens, self.ended = 0.0, list[float](), 0, 0, False

    def begin(self) -> None:
        self.log.append(f"begin {self.name}")
        self.socket, other = socket.socketpair()
        other.sendall(b"x" * self.pieces)
        self._other = other

    def took(self, data: bytes, now: float) -> None:
        self.times += [now] * len(data)
        self.ended = len(self.times) >= self.pieces
        if self.ended:
            self.log.append(f"end {self.name}")
            self._other.close()


def test_who_comes_late_begins_when_all_others_have_come_so_far() -> None:
    log: list[str] = []
    talk([Talker(5, log, "a"), Talker(6, log, "b")], late=Talker(2, log, "late"), after=3)
    assert log[:2] == ["begin a", "begin b"]
    assert set(log) == {"begin a", "begin b", "end a", "end b", "begin late", "end late"}
    assert log.index("begin late") > log.index("begin b")


def test_a_silent_server_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chats, "PATIENCE", 0.05)
    silent = Talker(0, [], "silent")
    with pytest.raises(RuntimeError, match="said nothing"):
        talk([silent])
    silent._other.close()
    silent.socket.close()


def test_prompts_differ_from_their_first_word_on() -> None:
    assert prompt(48, 1) == prompt(48, 1)
    assert len({prompt(48, seed).split()[0] for seed in range(50)}) == 50


def test_the_share_that_is_judged_is_the_99th_percentile_over_the_median_before() -> None:
    rounds = [fairness.Waits([9.0, 10.0, 11.0], [20.0, 39.0, 40.0], 1.5, 1990), fairness.Waits([10.0], [20.0, 30.0], 2.0, 1990)]
    found = fairness._result(OURS, rounds, ["a note"])
    assert (found.ok, found.ours, found.notes) == (True, [4.0, 3.0], ["a note"])
    assert fairness._result(OURS, rounds[:1], []).ok is True
    assert fairness._result(OURS, [rounds[0]._replace(during=[41.0])], []).ok is False
    assert fairness._result(PEER, [rounds[0]._replace(during=[41.0])], []).ok is None, "nothing is required of the peer"


@pytest.mark.parametrize("with_peer", [True, False])
def test_both_ways_to_ask_are_judged_against_the_peer_if_there_is_one(monkeypatch: pytest.MonkeyPatch, *, with_peer: bool) -> None:
    seconds = {OURS: 1.0, OVER_HTTP: 1.25, PEER: 1.2}
    servers = {name: Serving(0, lambda *_: pytest.fail("nobody is asked")) for name in seconds if with_peer or name != PEER}  # type: ignore[arg-type]
    monkeypatch.setattr(throughput, "burst", lambda server, *_, **__: seconds[next(n for n, s in servers.items() if s is server)])
    found = throughput._together(LineUp(servers, ["the peer"]), 4, 1.1, Settings(True, 2, 0.0))
    assert [result.name for result in found] == ["serving 4 clients, over its own socket", "serving 4 clients, over HTTP"]
    assert [result.ok for result in found] == ([True, False] if with_peer else [None, None])
    assert found[0].ours == [4 * 8 / 1.0]
    assert "the peer" in found[0].notes
