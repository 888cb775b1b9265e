"""What a server of docs/protocol.md must do with generations, streams and sessions; for edge_rt/testing/protocol_conformance.py."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from typing import Any

from edge_rt.testing.protocol_checks import Check, Server
from edge_rt.testing.protocol_peer import Message, Peer, error_is, expect

PROMPT = "Once upon a time"
FEW, MANY = 10, 400
"""Tokens of an answer; many: more than a test waits for."""
QUIET = 0.5
"""Seconds without an event after which none is expected."""


def _generate(peer: Peer, tokens: int = FEW, prompt: str = PROMPT, **fields: Any) -> int:
    """Begin an answer of exactly so many tokens, the same each time."""
    return peer.ask("generate", prompt=prompt, options={"max_tokens": tokens, "temperature": 0, "ignore_eos": True}, **fields)


def _answer(peer: Peer, number: int) -> list[Message]:
    """All messages of a request, the answer last."""
    found = [peer.message_of(number)]
    while "event" in found[-1]:
        found.append(peer.message_of(number))
    return found


def _text(messages: Iterable[Message]) -> str:
    return "".join(one["text"] for one in messages if one.get("event") == "delta")


def _tokens(messages: Iterable[Message]) -> list[int]:
    return [token for one in messages if one.get("event") == "delta" for token in one["tokens"]]


def _done(messages: list[Message]) -> Message:
    """The last event; the answer after it must be empty."""
    expect(messages[-1].get("ok") == {}, f"a generation was answered {messages[-1]}")
    expect(len(messages) > 1 and messages[-2].get("event") == "done", "the last event is not done")
    expect([one.get("event") for one in messages].count("done") == 1, "there is more than one event done")
    return messages[-2]


def _expected(server: Server, tokens: int = FEW, prompt: str = PROMPT) -> str:
    with server.peer() as peer:
        return _text(_answer(peer, _generate(peer, tokens, prompt)))


def _numbered(messages: list[Message], after: int) -> int:
    """They must be numbered from the one after this; the last number."""
    numbers = [one.get("seq") for one in messages]
    expect(numbers == list(range(after + 1, after + 1 + len(numbers))), f"after seq {after} come {numbers}")
    return after + len(numbers)


def nothing_under_way(server: Server, seconds: float, what: str) -> None:
    """Wait until the server has no request. Raises Broken."""
    until = time.monotonic() + seconds
    with server.peer() as peer:
        while peer.ok("status")["server"]["requests"]:
            expect(time.monotonic() < until, f"{what} is still under way after {seconds:g} seconds")
            time.sleep(0.05)


# ---- generations -----------------------------------------------------------------------------------------------------


def a_generation_is_told_as_events(server: Server) -> None:
    with server.peer() as peer:
        found = _answer(peer, _generate(peer))
        done = _done(found)
        expect(done["reason"] == "max_tokens", f"the reason is {done['reason']}, and not max_tokens")
        expect(len(_tokens(found)) == FEW == done["usage"]["completion_tokens"], "the deltas have not as many tokens as were asked for")
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


def mistakes_have_codes(server: Server) -> None:
    with server.peer() as peer:
        peer.refused("bad_request", "generate")
        peer.refused("bad_request", "generate", prompt="x", messages=[])
        peer.refused("bad_request", "generate", prompt=1)
        peer.refused("option", "generate", prompt="x", priority="top")
        wrong: tuple[Message, ...] = ({"colour": 1}, {"top_p": 7}, {"max_tokens": "1"}, {"logit_bias": {"x": 1}}, {"prune": {}})
        for options in wrong:
            peer.refused("option", "generate", prompt="x", options=options)
        for op in ("generate", "close_session", "clone_session", "save_session"):
            fields = {"generate": {"prompt": "x"}, "save_session": {"name": "x"}}.get(op, {})
            peer.refused("no_such_session", op, session="no such session", **fields)
        peer.refused("session_file", "restore_session", name="no-such-session-was-saved")
        peer.refused("no_such_stream", "resume", stream="no such stream", after=0)


def a_request_under_way_keeps_its_id(server: Server) -> None:
    with server.peer() as peer:
        number = _generate(peer, MANY)
        first = peer.message_of(number)
        expect("event" in first, f"generate was answered {first}")
        peer.send({"id": number, "op": "status"})
        found = _until(peer, lambda one: "error" in one)
        error_is(found[-1], "bad_request", "a second request with an id under way")
        expect(found[-1]["id"] == number, "the error for a second request has another id")
        peer.ask("cancel", request=number)
        _done(_until(peer, lambda one: one.get("id") == number and "event" not in one, number))


def _until(peer: Peer, last: Any, number: int | None = None) -> list[Message]:
    """Messages as far as one for which ``last`` is true; only those of a request, if one is given."""
    found = [peer.message()]
    while not last(found[-1]):
        found.append(peer.message())
    return [one for one in found if number is None or one.get("id") == number]


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


def requests_of_a_connection_are_limited(server: Server) -> None:
    with server.peer() as peer:
        most = int(peer.hello["limits"]["requests_per_connection"])
        numbers = [_generate(peer, MANY) for _ in range(most + 1)]
        found = _until(peer, lambda one: "error" in one)
        error_is(found[-1], "limit", f"request {most + 1} of {most} that may be under way")
        expect(found[-1]["id"] == numbers[-1], "of too many requests, not the last is refused")
    nothing_under_way(server, 10, "what a broken connection asked for")


def cancelling_ends_a_generation(server: Server) -> None:
    with server.peer() as peer, server.peer() as other:
        number = _generate(peer, MANY)
        found = _until(peer, lambda one: one.get("event") == "delta")
        expect(other.ok("cancel", request=number) == {"found": False}, "a request of another connection can be cancelled")
        cancel = peer.ask("cancel", request=number)
        found += _until(peer, lambda one: one.get("id") == number and "event" not in one)
        expect(_done([one for one in found if one.get("id") == number])["reason"] == "cancelled", "the reason is not cancelled")
        answers = [one for one in found if one.get("id") == cancel] or [peer.message_of(cancel)]
        expect(answers == [{"id": cancel, "ok": {"found": True}}], f"cancel was answered {answers}")
        expect(peer.ok("cancel", request=number) == {"found": False}, "what has ended can still be cancelled")


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


def what_a_broken_connection_asked_for_ends(server: Server) -> None:
    for half in (False, True):
        with server.peer() as peer:
            number = _generate(peer, MANY)
            peer.message_of(number)
            if half:
                peer.socket.shutdown(socket.SHUT_WR)
                peer.ended()
        nothing_under_way(server, 5, "what a broken connection asked for")


# ---- streams that can be resumed -------------------------------------------------------------------------------------


def _begin(peer: Peer, tokens: int = FEW, prompt: str = PROMPT) -> tuple[int, str]:
    """Begin a stream that can be resumed: the request's id, and the token to resume by."""
    number = _generate(peer, tokens, prompt, resumable=True)
    first = peer.message_of(number)
    expect(first.get("event") == "stream" and isinstance(first.get("stream"), str), f"the first event is {first}, and not stream")
    expect("seq" not in first, "the event stream has a seq; the one after it is number 1")
    return number, first["stream"]


def a_stream_is_numbered_and_can_be_resumed_at_every_number(server: Server) -> None:
    expected = _expected(server)
    with server.peer() as peer:
        number, stream = _begin(peer)
        found = _acknowledged(peer, number, stream)
        last = _numbered(found, 0)
        _done(found)
        expect(_text(found) == expected, "a stream that can be resumed has another text")
        peer.refused("no_such_stream", "resume", stream=stream, after=last + 1)
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
        found.append(peer.message_of(number))
        if "event" not in found[-1]:
            peer.send({"op": "ack", "stream": stream, "seq": found[-1].get("seq", 0)})
            break
    return found


def a_stream_breaks_again_and_again(server: Server) -> None:
    expected = _expected(server, 4 * FEW)
    peer = server.peer()
    number, stream = _begin(peer, 4 * FEW)
    found: list[Message] = []
    while not found or "event" in found[-1]:
        found.append(peer.message_of(number))
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


def no_more_comes_than_there_are_credits(server: Server) -> None:
    with server.peer() as peer:
        credits = int(peer.hello["limits"]["credits"])
        number, stream = _begin(peer, credits + MANY)
        found = peer.quiet(QUIET)
        last = _numbered(found, 0)
        expect(last <= credits, f"{last} events came without an acknowledgement; there are {credits} credits")
        for _ in range(3):
            peer.send({"op": "ack", "stream": stream, "seq": last})
            more = peer.quiet(QUIET)
            expect(0 < len(more) <= credits, f"{len(more)} events came after an acknowledgement; there are {credits} credits")
            last = _numbered(more, last)
        peer.refused("bad_request", "resume", stream=stream, after=last + 1)
        peer.send({"id": 9999, "op": "ack", "stream": "no such stream", "seq": 1})
        expect(peer.quiet(QUIET) == [], "an acknowledgement was answered")
        peer.ask("cancel", request=number)
        peer.send({"op": "ack", "stream": stream, "seq": last})
        while "event" in (message := peer.message()) or message["id"] != number:
            if "seq" in message:
                peer.send({"op": "ack", "stream": stream, "seq": message["seq"]})
        peer.send({"op": "ack", "stream": stream, "seq": message["seq"]})
    nothing_under_way(server, 5, "a stream that was cancelled")


def a_stream_moves(server: Server) -> None:
    expected = _expected(server)
    with server.peer() as before, server.peer() as after:
        number, stream = _begin(before)
        first = before.message_of(number)
        again = after.ask("resume", stream=stream, after=first["seq"])
        found = [first, *_acknowledged(after, again, stream)]
        last = _until(before, lambda one: "event" not in one)[-1]
        error_is(last, "moved", "the request whose stream went on elsewhere")
        expect(last["id"] == number, "the error moved has another id")
        _numbered(found, 0)
        expect(_text(found) == expected, "a stream that moved has another text")
        before.ok("status")


# ---- sessions --------------------------------------------------------------------------------------------------------


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
        peer.refused("session_file", "restore_session", name="protocol-conformance")
        peer.refused("session_file", "delete_saved", name="protocol-conformance")
        for name in (session, clone, restored):
            found = _answer(peer, _generate(peer, FEW, longer, session=name))
            expect(_text(found) == alone, "in a session, a prompt has another answer than without")
            expect(_done(found)["usage"]["reused_tokens"] > 0, "in a session, nothing of an earlier prompt is reused")
            peer.ok("close_session", session=name)
            peer.refused("no_such_session", "close_session", session=name)


def a_session_answers_one_request_at_a_time(server: Server) -> None:
    with server.peer() as peer:
        session = peer.ok("open_session")["session"]
        number = _generate(peer, MANY, session=session)
        peer.message_of(number)
        second = _generate(peer, session=session)
        error_is(peer.message_of(second), "busy", "a second request in a session")
        peer.ask("cancel", request=number)
        _done(_until(peer, lambda one: one.get("id") == number and "event" not in one, number))
        _done(_answer(peer, _generate(peer, session=session)))


def only_sessions_to_be_kept_outlive_their_connection(server: Server) -> None:
    with server.peer() as peer:
        kept, left = peer.ok("open_session", keep=True)["session"], peer.ok("open_session")["session"]
    with server.peer() as peer:
        _done(_answer(peer, _generate(peer, session=kept)))
        peer.refused("no_such_session", "generate", session=left, prompt=PROMPT)
        peer.ok("close_session", session=kept)


CHECKS: tuple[Check, ...] = (
    a_generation_is_told_as_events,
    mistakes_have_codes,
    a_request_under_way_keeps_its_id,
    many_requests_share_a_connection,
    requests_of_a_connection_are_limited,
    cancelling_ends_a_generation,
    who_does_not_read_is_waited_for,
    what_a_broken_connection_asked_for_ends,
    a_stream_is_numbered_and_can_be_resumed_at_every_number,
    a_stream_breaks_again_and_again,
    no_more_comes_than_there_are_credits,
    a_stream_moves,
    sessions_go_on_and_are_cloned,
    a_session_answers_one_request_at_a_time,
    only_sessions_to_be_kept_outlive_their_connection,
)
