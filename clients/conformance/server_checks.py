"""What a server of docs/protocol.md must do. ``conformance.py`` runs these checks."""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any

from protocol_peer import OPS, ConformanceError, Message, Peer, Server, abbreviate, check_error, encode, expect, frame

LIMITS = ("frame_bytes", "requests_per_connection", "requests_per_second", "credits", "resume_within")
BEFORE_HELLO = 4096
"""Bytes: the longest frame that a server takes before hello."""
PROMPT = "Once upon a time"
FEW, MANY = 10, 400
"""Tokens of an answer; many: more than a check waits for."""
QUIET = 0.5
"""Seconds without an event after which none is expected."""
TEXTS = ["Hello", "Once upon a time there was a river", "Hello", "東京"]
"""Texts to embed."""
MANY_TEXTS = 500
"""More than a check waits for."""
ROUNDING = 1e-3
"""Largest difference of a number in two embeddings of the same text."""

Check = Callable[[Server], None]
"""Raises ConformanceError where the server does not do what the function's name says."""

CHECKS: dict[str, Check] = {}
"""By name, in the order in which they are run."""


def check(function: Check) -> Check:
    """Add a function to CHECKS."""
    CHECKS[function.__name__.replace("_", " ")] = function
    return function


def nothing_under_way(server: Server, seconds: float, what: str) -> None:
    """Wait until the server has no request. Raises ConformanceError."""
    until = time.monotonic() + seconds
    with server.peer() as peer:
        while peer.ok("status")["server"]["requests"]:
            expect(time.monotonic() < until, f"{what} is still under way after {seconds:g} seconds")
            time.sleep(0.05)


# ---- hello -----------------------------------------------------------------------------------------------------------


@check
def hello_says_what_there_is(server: Server) -> None:
    with server.peer() as peer:
        expect(peer.hello.get("version") == 1, f"the version is {peer.hello.get('version')}, and not 1")
        expect(isinstance(peer.hello.get("server"), str), "server is no text")
        missing = [op for op in OPS if op not in peer.hello.get("capabilities", [])]
        expect(not missing, f"the capabilities lack {', '.join(missing)}")
        for name in LIMITS:
            expect(isinstance(peer.hello.get("limits", {}).get(name), (int, float)), f"the limits have no {name}")


@check
def the_highest_common_version_is_chosen(server: Server) -> None:
    with server.connect() as peer:
        expect(peer.ok("hello", **server.hello(versions=[0, 1, 77]))["version"] == 1, "of the versions 0, 1 and 77, 1 is not chosen")


@check
def without_a_common_version_the_connection_ends(server: Server) -> None:
    with server.connect() as peer:
        error = peer.expect_error("unsupported_version", "hello", **server.hello(versions=[77, 78]))
        expect(1 in error.get("supported", []), "the error has no list `supported` with 1 in it")
        expect(peer.receive_all() == [], "something follows unsupported_version")


@check
def hello_is_the_first_request_and_said_once(server: Server) -> None:
    with server.connect() as peer:
        peer.expect_error("bad_request", "status")
    with server.peer() as peer:
        peer.expect_error("bad_request", "hello", **server.hello())
        peer.ok("status")


# ---- frames ----------------------------------------------------------------------------------------------------------


@check
def frames_may_be_split_at_every_byte(server: Server) -> None:
    with server.peer() as peer:
        data = frame({"id": 900, "op": "tokenize", "text": "Hello"})
        expected: Message | None = None
        for at in range(1, len(data)):
            _slowly(peer)
            peer.write(data[:at])
            time.sleep(0.001)
            peer.write(data[at:])
            answer = peer.message_for(900)
            expect("ok" in answer, f"a frame in two parts, split after {at} bytes, was answered {answer}")
            expect(answer == (expected or answer), f"split after {at} bytes, tokenize has another answer")
            expected = answer
        for i in range(len(data)):
            peer.write(data[i : i + 1])
        expect(peer.message_for(900) == expected, "sent byte by byte, tokenize has another answer")
    with server.connect() as peer:
        data = frame({"id": 1, "op": "hello", **server.hello()})
        for i in range(len(data)):
            peer.write(data[i : i + 1])
        expect("ok" in peer.message_for(1), "hello, sent byte by byte, is refused")


def _slowly(peer: Peer) -> None:
    """Not more requests than the server allows."""
    rate = peer.hello["limits"]["requests_per_second"]
    time.sleep(1 / rate if rate else 0)


@check
def many_frames_may_come_at_once(server: Server) -> None:
    with server.peer() as peer:
        numbers = range(100, 100 + min(20, int(peer.hello["limits"]["requests_per_connection"])))
        peer.write(b"".join(frame({"id": number, "op": "detokenize", "tokens": [number]}) for number in numbers))
        answers = [peer.message() for _ in numbers]
        expect(sorted(one.get("id", -1) for one in answers) == list(numbers), "requests that came at once are not answered once each")


@check
def frames_have_a_longest_length(server: Server) -> None:
    with server.connect() as peer:
        body = len(encode({"id": 1, "op": "hello", **server.hello(client="x" * 100)}))
        hello = server.hello(client="x" * (BEFORE_HELLO - body + 100))
        expect(len(encode({"id": 1, "op": "hello", **hello})) == BEFORE_HELLO, "the check's own frame has another length")
        peer.ok("hello", **hello)
    with server.connect() as peer:
        _closes_with(peer, struct.pack(">I", BEFORE_HELLO + 1), "frame_too_long")
    with server.peer() as peer:
        most = int(peer.hello["limits"]["frame_bytes"])
        rest = len(encode({"id": 2, "op": "sing", "text": "x" * 100})) - 100
        peer.number = 1
        peer.expect_error("unknown_op", "sing", text="x" * (most - rest))
        _closes_with(peer, struct.pack(">I", most + 1), "frame_too_long")


@check
def what_is_no_message_ends_the_connection(server: Server) -> None:
    deep = b"\x83\xa2id\x05\xa2op\xa4sing\xa1x"
    for name, body in (
        ("an empty frame", b""),
        ("a list", b"\x90"),
        ("a number", b"\x01"),
        ("a map that ends too early", b"\x82\xa2id\x01"),
        ("a map with bytes after it", b"\x80\xc0"),
        ("a map with a number as key", b"\x81\x01\x01"),
        ("a text that is not UTF-8", b"\x81\xa1x\xa2\xff\xfe"),
        ("a value of no kind", b"\x81\xa1x\xc1"),
        ("an extension type", b"\x81\xa1x\xd4\x01\x00"),
        ("33 maps and lists within each other", deep + b"\x91" * 31 + b"\x90"),
        ("a thousand lists within each other", deep + b"\x91" * 1000 + b"\x90"),
    ):
        with server.peer() as peer:
            try:
                _closes_with(peer, struct.pack(">I", len(body)) + body, "bad_frame")
            except ConformanceError as error:
                raise ConformanceError(f"{name}: {error}") from None
    with server.peer() as peer:
        body = deep + b"\x91" * 30 + b"\x90"
        peer.write(struct.pack(">I", len(body)) + body)
        check_error(peer.message_for(5), "unknown_op", "32 maps and lists within each other")


def _closes_with(peer: Peer, data: bytes, code: str) -> None:
    """These bytes are answered with an error without an id, and the end of the connection."""
    peer.write(data)
    found = peer.receive_all()
    expect(len(found) == 1, f"{len(found)} messages came before the connection ended, and not one")
    check_error(found[0], code, "it")
    expect(found[0].get("id", 0) is None, "the error before the connection's end has an id")


# ---- requests --------------------------------------------------------------------------------------------------------


@check
def what_is_not_in_the_document_is_an_error(server: Server) -> None:
    with server.peer() as peer:
        peer.expect_error("unknown_op", "sing")
        peer.expect_error("unknown_op", "Status")
        peer.expect_error("bad_request", "status", colour="red")
        peer.expect_error("bad_request", "tokenize", text="x", colour=None)
        peer.expect_error("bad_request", "tokenize")
        peer.expect_error("bad_request", "tokenize", text=None)
        for fields in ({"text": 3}, {"text": "x", "special": 1}, {"text": ["x"]}):
            peer.expect_error("bad_request", "tokenize", **fields)
        for tokens in ([-1], ["1"], 1, [True], [0.5]):
            peer.expect_error("bad_request", "detokenize", tokens=tokens)
        peer.ok("tokenize", text="x", special=None)


@check
def ids_are_whole_numbers(server: Server) -> None:
    with server.peer() as peer:
        for number in (0, 2**53 - 1):
            peer.send({"id": number, "op": "status"})
            expect("ok" in peer.message_for(number), f"the id {number} is refused")
        for wrong in (-1, 2**53, 1.5, "1", True, [1], None):
            peer.send({"id": wrong, "op": "status"})
            check_error(peer.message(), "bad_request", f"the id {wrong!r}")
        peer.send({"op": "status"})
        check_error(peer.message(), "bad_request", "a request without an id")
        peer.ok("status")


@check
def text_and_tokens(server: Server) -> None:
    with server.peer() as peer:
        for text in ("", "Hello, world", "Grüße aus 東京 \U0001f600", "a\nb\tc\x00d"):
            tokens = peer.ok("tokenize", text=text)["tokens"]
            expect(isinstance(tokens, list) and all(isinstance(one, int) for one in tokens), "tokens is no list of whole numbers")
            again = peer.ok("detokenize", tokens=tokens)["text"]
            expect(again.endswith(text), f"{text!r} comes back from its tokens as {again!r}")


@check
def status_and_metrics(server: Server) -> None:
    with server.peer() as peer:
        status = peer.ok("status")
        for part, fields in (
            ("server", ("version", "pid", "uptime", "draining", "connections", "sessions", "requests", "held_bytes")),
            ("worker", ("state", "pid", "deaths")),
            ("model", ("path", "engine", "device", "architecture", "context", "vocabulary", "notices")),
        ):
            missing = [name for name in fields if name not in status.get(part, {})]
            expect(not missing, f"{part} in the status lacks {', '.join(missing)}")
        expect("rules" in status, "the status has no rules")
        before = peer.ok("metrics")
        for name in ("requests", "errors", "connections", "tokens", "worker_deaths", "uptime"):
            expect(name in before, f"the metrics lack {name}")
        peer.ok("status")
        expect(peer.ok("metrics")["requests"]["status"] > before["requests"]["status"], "a request is not counted in the metrics")


@check
def a_client_that_breaks_off_harms_nobody(server: Server) -> None:
    for data in (b"", b"\x00\x00", struct.pack(">I", 100) + b"\x81", b"\xff" * 50):
        with server.connect() as peer:
            peer.write(data)
        with server.peer() as peer:
            peer.write(data[:3])
    with server.peer() as peer:
        peer.socket.shutdown(socket.SHUT_WR)
        peer.receive_all()
    with server.peer() as peer:
        peer.ok("status")


def _generate(peer: Peer, tokens: int = FEW, prompt: str = PROMPT, **fields: Any) -> int:
    """Begin an answer of exactly so many tokens, the same each time."""
    return peer.ask("generate", prompt=prompt, options={"max_tokens": tokens, "temperature": 0, "ignore_eos": True}, **fields)


def _answer(peer: Peer, number: int) -> list[Message]:
    """All messages of a request, the answer last."""
    found = [peer.message_for(number)]
    while "event" in found[-1]:
        found.append(peer.message_for(number))
    return found


def _text(messages: Iterable[Message]) -> str:
    return "".join(one["text"] for one in messages if one.get("event") == "delta")


def _done(messages: list[Message]) -> Message:
    """The event ``done`` of a generation, which must be the last before an empty answer."""
    expect(messages[-1].get("ok") == {}, f"a generation was answered {messages[-1]}")
    expect(len(messages) > 1 and messages[-2].get("event") == "done", "the last event is not done")
    expect([one.get("event") for one in messages].count("done") == 1, "there is more than one event done")
    return messages[-2]


def _expected(server: Server, tokens: int = FEW, prompt: str = PROMPT) -> str:
    with server.peer() as peer:
        return _text(_answer(peer, _generate(peer, tokens, prompt)))


def _numbered(messages: list[Message], after: int) -> int:
    """The last number of messages, which must be numbered one by one from the one after ``after``."""
    numbers = [one.get("seq") for one in messages]
    expect(numbers == list(range(after + 1, after + 1 + len(numbers))), f"after seq {after} come {numbers}")
    return after + len(numbers)


# ---- generations -----------------------------------------------------------------------------------------------------


@check
def a_generation_is_told_as_events(server: Server) -> None:
    with server.peer() as peer:
        found = _answer(peer, _generate(peer))
        done = _done(found)
        expect(done["reason"] == "max_tokens", f"the reason is {done['reason']}, and not max_tokens")
        count = sum(len(one["tokens"]) for one in found if one.get("event") == "delta")
        expect(count == FEW == done["usage"]["completion_tokens"], "the deltas have not as many tokens as were asked for")
        for part, names in (
            ("usage", ("prompt_tokens", "completion_tokens", "reused_tokens", "computed_tokens", "drafted_tokens", "accepted_tokens")),
            ("timings", ("first_token", "prompt", "decode", "total", "tokens_per_second")),
            ("context", ("used", "allowed")),
        ):
            missing = [name for name in names if name not in done[part]]
            expect(not missing, f"{part} of done lacks {', '.join(missing)}")
        expect({"seed", "stop", "post", "rules", "answer"} <= set(done), "done lacks a field")
        expect(not any("seq" in one or one.get("event") == "stream" for one in found), "a stream that was not to be resumed is numbered")
        progress = [one for one in found if one.get("event") == "prompt"]
        expect(all(0 <= one["reused"] <= one["done"] <= one["total"] for one in progress), "the prompt's progress is none")
        again = _answer(peer, _generate(peer))
        expect(_text(again) == _text(found), "the same request at temperature 0 has another answer")
        messages = peer.ask("generate", messages=[{"role": "user", "content": "Hi"}], options={"max_tokens": 2})
        _done(_answer(peer, messages))


@check
def mistakes_have_codes(server: Server) -> None:
    with server.peer() as peer:
        peer.expect_error("bad_request", "generate")
        peer.expect_error("bad_request", "generate", prompt="x", messages=[])
        peer.expect_error("bad_request", "generate", prompt=1)
        peer.expect_error("option", "generate", prompt="x", priority="top")
        wrong: tuple[Message, ...] = ({"colour": 1}, {"top_p": 7}, {"max_tokens": "1"}, {"logit_bias": {"x": 1}}, {"prune": {}})
        for options in wrong:
            peer.expect_error("option", "generate", prompt="x", options=options)
        for op in ("generate", "close_session", "clone_session", "save_session"):
            fields = {"generate": {"prompt": "x"}, "save_session": {"name": "x"}}.get(op, {})
            peer.expect_error("no_such_session", op, session="no such session", **fields)
        peer.expect_error("session_file", "restore_session", name="no-such-session-was-saved")
        peer.expect_error("no_such_stream", "resume", stream="no such stream", after=0)


@check
def a_request_under_way_keeps_its_id(server: Server) -> None:
    with server.peer() as peer:
        number = _generate(peer, MANY)
        first = peer.message_for(number)
        expect("event" in first, f"generate was answered {first}")
        peer.send({"id": number, "op": "status"})
        found = _until(peer, lambda one: "error" in one)
        check_error(found[-1], "bad_request", "a second request with an id under way")
        expect(found[-1]["id"] == number, "the error for a second request has another id")
        peer.ask("cancel", request=number)
        _done(_answer(peer, number))


def _until(peer: Peer, last: Callable[[Message], bool]) -> list[Message]:
    """Messages of all requests as far as one for which ``last`` is true."""
    found = [peer.message()]
    while not last(found[-1]):
        found.append(peer.message())
    return found


@check
def many_requests_share_a_connection(server: Server) -> None:
    expected = {prompt: _expected(server, FEW, prompt) for prompt in ("One", "Two", "Three")}
    with server.peer() as peer:
        asked = {_generate(peer, FEW, prompt): prompt for prompt in expected}
        status = peer.ask("status")
        found: dict[int, list[Message]] = {number: [] for number in (*asked, status)}
        while any(not messages or "event" in messages[-1] for messages in found.values()):
            message = peer.message()
            expect(message.get("id") in found, f"the message {message} is for no request")
            found[message["id"]].append(message)
        for number, prompt in asked.items():
            _done(found[number])
            expect(_text(found[number]) == expected[prompt], f"{prompt!r} has another answer beside others than alone")


@check
def requests_of_a_connection_are_limited(server: Server) -> None:
    with server.peer() as peer:
        most = int(peer.hello["limits"]["requests_per_connection"])
        numbers = [_generate(peer, MANY) for _ in range(most + 1)]
        found = _until(peer, lambda one: "error" in one)
        check_error(found[-1], "limit", f"request {most + 1} of {most} that may be under way")
        expect(found[-1]["id"] == numbers[-1], "of too many requests, not the last is refused")
    nothing_under_way(server, 10, "what a broken connection asked for")


@check
def cancelling_ends_a_generation(server: Server) -> None:
    with server.peer() as peer, server.peer() as other:
        number = _generate(peer, MANY)
        found = _until(peer, lambda one: one.get("event") == "delta")
        expect(other.ok("cancel", request=number) == {"found": False}, "a request of another connection can be cancelled")
        cancel = peer.ask("cancel", request=number)
        found += _until(peer, lambda one: one.get("id") == number and "event" not in one)
        expect(_done([one for one in found if one.get("id") == number])["reason"] == "cancelled", "the reason is not cancelled")
        answers = [one for one in found if one.get("id") == cancel] or [peer.message_for(cancel)]
        expect(answers == [{"id": cancel, "ok": {"found": True}}], f"cancel was answered {answers}")
        expect(peer.ok("cancel", request=number) == {"found": False}, "what has ended can still be cancelled")


@check
def who_does_not_read_is_waited_for(server: Server) -> None:
    expected = _expected(server, MANY)
    with server.connect() as peer, server.peer() as other:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.hello = peer.ok("hello", **server.hello())
        numbers = [_generate(peer, MANY) for _ in range(2)]
        for _ in range(3):
            _done(_answer(other, _generate(other)))
        found = _until(peer, lambda one: "event" not in one)
        last = next(number for number in numbers if number != found[-1]["id"])
        if not any(one.get("id") == last and "event" not in one for one in found):
            found += _until(peer, lambda one: one.get("id") == last and "event" not in one)
        for number in numbers:
            expect(_text(one for one in found if one["id"] == number) == expected, "who reads late gets another text")


@check
def what_a_broken_connection_asked_for_ends(server: Server) -> None:
    for half in (False, True):
        with server.peer() as peer:
            number = _generate(peer, MANY)
            peer.message_for(number)
            if half:
                peer.socket.shutdown(socket.SHUT_WR)
                peer.receive_all()
        nothing_under_way(server, 5, "what a broken connection asked for")


# ---- streams that can be resumed -------------------------------------------------------------------------------------


def _begin(peer: Peer, tokens: int = FEW, prompt: str = PROMPT) -> tuple[int, str]:
    """Begin a stream that can be resumed: the request's id, and the token to resume by."""
    number = _generate(peer, tokens, prompt, resumable=True)
    first = peer.message_for(number)
    expect(first.get("event") == "stream" and isinstance(first.get("stream"), str), f"the first event is {first}, and not stream")
    expect("seq" not in first, "the event stream has a seq; the one after it is number 1")
    return number, first["stream"]


@check
def a_stream_is_numbered_and_can_be_resumed_at_every_number(server: Server) -> None:
    expected = _expected(server)
    with server.peer() as peer:
        number, stream = _begin(peer)
        found = _acknowledged(peer, number, stream)
        last = _numbered(found, 0)
        _done(found)
        expect(_text(found) == expected, "a stream that can be resumed has another text")
        peer.expect_error("no_such_stream", "resume", stream=stream, after=last + 1)
    for after in range(last):
        with server.peer() as peer:
            number, stream = _begin(peer)
            found = _acknowledged(peer, number, stream, after)
        with server.peer() as peer:
            again = peer.ask("resume", stream=stream, after=after)
            rest = _acknowledged(peer, again, stream)
            _numbered(found + rest, 0)
            expect(_text(found + rest) == expected, f"resumed after seq {after}, the text is another")
    nothing_under_way(server, 5, "a stream whose answer was acknowledged")


def _acknowledged(peer: Peer, number: int, stream: str, count: int | None = None) -> list[Message]:
    """Messages of a stream as far as the answer, or so many; all but the last are acknowledged, and the answer is."""
    found: list[Message] = []
    while count is None or len(found) < count:
        if found:
            peer.send({"op": "ack", "stream": stream, "seq": found[-1]["seq"]})
        found.append(peer.message_for(number))
        if "event" not in found[-1]:
            peer.send({"op": "ack", "stream": stream, "seq": found[-1].get("seq", 0)})
            break
    return found


@check
def a_stream_breaks_again_and_again(server: Server) -> None:
    expected = _expected(server, 4 * FEW)
    peer = server.peer()
    number, stream = _begin(peer, 4 * FEW)
    found: list[Message] = []
    while not found or "event" in found[-1]:
        found.append(peer.message_for(number))
        if "event" in found[-1]:
            peer.close()
            peer = server.peer()
            number = peer.ask("resume", stream=stream, after=found[-1]["seq"])
    peer.send({"op": "ack", "stream": stream, "seq": found[-1]["seq"]})
    peer.ok("status")
    peer.close()
    _numbered(found, 0)
    _done(found)
    expect(_text(found) == expected, "after a break at every event the text is another")


@check
def no_more_comes_than_there_are_credits(server: Server) -> None:
    with server.peer() as peer:
        credits = int(peer.hello["limits"]["credits"])
        number, stream = _begin(peer, credits + MANY)
        found = peer.receive_until_quiet(QUIET)
        last = _numbered(found, 0)
        expect(last <= credits, f"{last} events came without an acknowledgement; there are {credits} credits")
        for _ in range(3):
            peer.send({"op": "ack", "stream": stream, "seq": last})
            more = peer.receive_until_quiet(QUIET)
            expect(0 < len(more) <= credits, f"{len(more)} events came after an acknowledgement; there are {credits} credits")
            last = _numbered(more, last)
        peer.expect_error("bad_request", "resume", stream=stream, after=last + 1)
        peer.send({"id": 9999, "op": "ack", "stream": "no such stream", "seq": 1})
        expect(peer.receive_until_quiet(QUIET) == [], "an acknowledgement was answered")
        peer.ask("cancel", request=number)
        peer.send({"op": "ack", "stream": stream, "seq": last})
        while "event" in (message := peer.message()) or message["id"] != number:
            if "seq" in message:
                peer.send({"op": "ack", "stream": stream, "seq": message["seq"]})
        peer.send({"op": "ack", "stream": stream, "seq": message["seq"]})
    nothing_under_way(server, 5, "a stream that was cancelled")


@check
def a_stream_moves(server: Server) -> None:
    expected = _expected(server)
    with server.peer() as before, server.peer() as after:
        number, stream = _begin(before)
        first = before.message_for(number)
        again = after.ask("resume", stream=stream, after=first["seq"])
        found = [first, *_acknowledged(after, again, stream)]
        last = _until(before, lambda one: "event" not in one)[-1]
        check_error(last, "moved", "the request whose stream went on elsewhere")
        expect(last["id"] == number, "the error moved has another id")
        _numbered(found, 0)
        expect(_text(found) == expected, "a stream that moved has another text")
        before.ok("status")


# ---- sessions --------------------------------------------------------------------------------------------------------


@check
def sessions_go_on_and_are_cloned(server: Server) -> None:
    longer = f"{PROMPT} there was a king"
    alone = _expected(server, FEW, longer)
    with server.peer() as peer:
        session = peer.ok("open_session")["session"]
        _done(_answer(peer, _generate(peer, session=session)))
        clone = peer.ok("clone_session", session=session)["session"]
        expect(clone != session, "a clone has its origin's id")
        peer.ok("save_session", session=session, name="protocol-conformance")
        restored = peer.ok("restore_session", name="protocol-conformance")["session"]
        names = [one["name"] for one in peer.ok("list_saved")["saved"]]
        expect("protocol-conformance" in names, f"a saved session is not among those that list_saved names: {names}")
        peer.ok("delete_saved", name="protocol-conformance")
        peer.expect_error("session_file", "restore_session", name="protocol-conformance")
        peer.expect_error("session_file", "delete_saved", name="protocol-conformance")
        for name in (session, clone, restored):
            found = _answer(peer, _generate(peer, FEW, longer, session=name))
            expect(_text(found) == alone, "in a session, a prompt has another answer than without")
            expect(_done(found)["usage"]["reused_tokens"] > 0, "in a session, nothing of an earlier prompt is reused")
            peer.ok("close_session", session=name)
            peer.expect_error("no_such_session", "close_session", session=name)


@check
def a_session_answers_one_request_at_a_time(server: Server) -> None:
    with server.peer() as peer:
        session = peer.ok("open_session")["session"]
        number = _generate(peer, MANY, session=session)
        peer.message_for(number)
        second = _generate(peer, session=session)
        check_error(peer.message_for(second), "busy", "a second request in a session")
        peer.ask("cancel", request=number)
        _done(_answer(peer, number))
        _done(_answer(peer, _generate(peer, session=session)))


@check
def only_sessions_to_be_kept_outlive_their_connection(server: Server) -> None:
    with server.peer() as peer:
        kept, left = peer.ok("open_session", keep=True)["session"], peer.ok("open_session")["session"]
    with server.peer() as peer:
        _done(_answer(peer, _generate(peer, session=kept)))
        peer.expect_error("no_such_session", "generate", session=left, prompt=PROMPT)
        peer.ok("close_session", session=kept)


# ---- embeddings ------------------------------------------------------------------------------------------------------


def _embed(peer: Peer, texts: list[Any], name: str = "texts", **fields: Any) -> tuple[list[list[float]], Message]:
    """The embeddings of texts and the answer after them; checks all that holds for any texts."""
    *events, last = _answer(peer, peer.ask("embed", **{name: texts}, **fields))
    answer: Message = last.get("ok", {})
    expect("ok" in last, f"embed was answered {last}")
    expect([one.get("event") for one in events] == ["embedding"] * len(texts), "there is not one event `embedding` for each text")
    expect([one.get("index") for one in events] == list(range(len(texts))), "index does not count the texts")
    rows = [one["embedding"] for one in events]
    for row in rows:
        expect(isinstance(row, list) and all(isinstance(x, float) and math.isfinite(x) for x in row), "an embedding is no list of numbers")
        expect(len(row) == answer.get("dimensions"), f"dimensions are {answer.get('dimensions')}, and an embedding has {len(row)} numbers")
    expect(all(one.get("tokens", 0) > 0 for one in events), "a text has no tokens")
    expect(answer.get("tokens") == sum(one["tokens"] for one in events), "the answer's tokens are not those of all texts")
    return rows, answer


def _dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def _same(a: list[float], b: list[float], what: str) -> None:
    expect(len(a) == len(b) and all(abs(x - y) < ROUNDING for x, y in zip(a, b, strict=True)), f"{what} changes an embedding")


@check
def each_text_has_an_embedding(server: Server) -> None:
    with server.peer() as peer:
        rows, answer = _embed(peer, TEXTS)
        expect(answer.get("pooling") in ("mean", "cls", "last"), f"the pooling is {answer.get('pooling')}")
        for row in rows:
            expect(abs(_dot(row, row) - 1) < ROUNDING, "an embedding has another length than 1")
        _same(rows[0], rows[2], "a text before it")
        expect(_dot(rows[0], rows[1]) < 1 - 1e-6, "different texts have the same embedding")
        for text, row in zip(TEXTS, rows, strict=True):
            _same(_embed(peer, [text])[0][0], row, "other texts in the request")


@check
def embeddings_are_made_as_asked(server: Server) -> None:
    with server.peer() as peer:
        (row,), answer = _embed(peer, TEXTS[:1])
        for pooling in ("mean", "cls", "last"):
            _, told = _embed(peer, TEXTS[:1], pooling=pooling)
            expect(told["pooling"] == pooling, f"the answer to pooling {pooling} says {told['pooling']}")
        _same(_embed(peer, TEXTS[:1], pooling=answer["pooling"])[0][0], row, "naming the model's own pooling")
        (raw,), _ = _embed(peer, TEXTS[:1], normalize=False)
        length = math.sqrt(_dot(raw, raw))
        _same([x / length for x in raw], row, "more than its length: normalize")
        half = max(1, len(row) // 2)
        (short,), told = _embed(peer, TEXTS[:1], dimensions=half)
        expect(told["dimensions"] == half, "the answer has other dimensions than asked for")
        length = math.sqrt(_dot(row[:half], row[:half]))
        _same([x / length for x in row[:half]], short, "more than its end: dimensions")


@check
def tokens_are_embedded_as_they_are(server: Server) -> None:
    with server.peer() as peer:
        tokens = [peer.ok("tokenize", text=text)["tokens"] for text in TEXTS[:2]]
        rows, answer = _embed(peer, tokens, "tokens")
        expect(answer["tokens"] == sum(map(len, tokens)), "other tokens were embedded than asked for")
        expect(_dot(rows[0], rows[1]) < 1 - 1e-6, "different tokens have the same embedding")


@check
def what_cannot_be_embedded_has_a_code(server: Server) -> None:
    with server.peer() as peer:
        context = peer.ok("status")["model"]["context"]
        for code, fields in (
            ("bad_request", {}),
            ("bad_request", {"texts": ["x"], "tokens": [[1]]}),
            ("bad_request", {"texts": "x"}),
            ("bad_request", {"tokens": [1]}),
            ("bad_request", {"tokens": [[-1]]}),
            ("option", {"texts": []}),
            ("option", {"texts": ["x", ""]}),
            ("option", {"tokens": [[1 << 50]]}),
            ("option", {"texts": ["x"], "pooling": "max"}),
            ("option", {"texts": ["x"], "dimensions": 0}),
            ("option", {"texts": ["x"], "dimensions": 1 << 40}),
        ):
            _embed_error(peer, code, **fields)
        error = _embed_error(peer, "context_overflow", tokens=[[1], [1] * (context + 1)])
        expect(error.get("needed") == context + 1 and error.get("available") == context, "the error does not say how much is too much")
        _embed(peer, ["x"])


def _embed_error(peer: Peer, code: str, **fields: Any) -> Message:
    answer = _answer(peer, peer.ask("embed", **fields))
    expect(len(answer) == 1, "something was embedded before the error")
    return check_error(answer[0], code, f"embed with {abbreviate(fields)}")


@check
def embedding_is_cancelled(server: Server) -> None:
    with server.peer() as peer:
        number = peer.ask("embed", texts=TEXTS[1:2] * MANY_TEXTS)
        expect(peer.message_for(number).get("event") == "embedding", "the first message is not an embedding")
        cancel = peer.ask("cancel", request=number)
        found, events = False, 1
        while True:
            message = peer.message()
            if message.get("id") == cancel:
                found = message["ok"]["found"]
            elif "event" not in message:
                check_error(message, "cancelled", "what was cancelled")
                break
            else:
                events += 1
        expect(found, "cancel does not find what is being embedded")
        expect(events < MANY_TEXTS, "all was embedded after cancel")
        _embed(peer, ["x"])


@check
def leaving_ends_what_is_embedded(server: Server) -> None:
    with server.peer() as peer:
        number = peer.ask("embed", texts=TEXTS[1:2] * MANY_TEXTS)
        peer.message_for(number)
    nothing_under_way(server, 5, "what a client that left wanted embedded")
