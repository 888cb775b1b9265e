"""Requests are sent in their order and at their times, and whatever goes wrong with one is an outcome of that one."""

from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from edge_rt_distill.replay.driving import Load
from edge_rt_distill.replay.results import Results, read_results, write_results
from edge_rt_distill.replay.running import replay, summary
from edge_rt_distill.replay.targets import InProcess, Question, Server
from edge_rt_distill.replay.trace import PATHS, Request, digest
from replay_server import Peer

from edge_rt.hooks import DataError, OptionError, UserError

CLOSED = Load(concurrency=4, timeout=20)


def ask(what: str, at: float = 0.0, **more: Any) -> Request:
    body = {"messages": [{"role": "user", "content": what}], **more.pop("body", {})}
    return Request(at, PATHS[0], body, **more)


def sent(peer: Peer, requests: Sequence[Request], load: Load = CLOSED, **options: Any) -> Results:
    """What becomes of requests to a peer."""

    async def run() -> Results:
        async with peer:
            server = Server(peer.url, **options)
            try:
                return await replay(requests, server, load, out=io.StringIO())
            finally:
                await server.close()

    return asyncio.run(asyncio.wait_for(run(), 60))


def gate(peer: Peer, all_of: int, total: int) -> Callable[[Any], Awaitable[None]]:
    """Holds requests until as many run as should at once; of the last ones, all that are left."""
    changed, released = asyncio.Condition(), 0

    async def hold(_: Any) -> None:
        nonlocal released
        async with changed:
            changed.notify_all()
            await changed.wait_for(lambda: peer.running >= min(all_of, total - released))
            released += 1

    return hold


# ---- answers ---------------------------------------------------------------------------------------------------------------------------


def test_an_answer_is_text_with_moments_tokens_and_what_it_is_worth():
    right = ask("say the -Nile- flows", checks=({"kind": "contains", "all": ["Nile"]},))
    wrong = ask("say the Rhine", checks=({"kind": "contains", "all": ["Nile"]},))
    first, second = sent(Peer(), [right, wrong]).outcomes
    assert (first.number, first.status, first.text, first.finish_reason, first.passed) == (0, "ok", "the-Nile-flows", "stop", 1.0)
    assert first.tokens == (2, 2, 2)
    assert (first.prompt_tokens, first.prompt_seconds) == (5, 0.25)
    assert first.due <= first.sent <= first.pieces[0] <= first.pieces[1] <= first.pieces[2] <= first.ended
    assert (second.text, second.passed) == ("theRhine", 0.0)


@pytest.mark.parametrize(("usage", "tokens"), [(False, (2, 2, 2)), (True, (2, 2, 2))])
def test_tokens_are_told_by_chunk_or_spread_from_their_sum(usage: bool, tokens: tuple[int, ...]):
    (outcome,) = sent(Peer("edge-rt", usage), [ask("say a b c")]).outcomes
    assert outcome.tokens == tokens


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64])
def test_text_of_any_script_survives_wherever_it_is_cut(size: int):
    text = "नदी-长江-Ünïcödé-نهر-🦊\u2028\x85.\u200d"
    (outcome,) = sent(Peer(), [ask(f"bytewise {size} {text}")]).outcomes
    assert (outcome.status, outcome.text) == ("ok", text)


@pytest.mark.parametrize(
    ("what", "code", "text"),
    [
        ("refuse 400", "no_such_thing", ""), ("refuse 503", "http_503", ""), ("drop", "connection", "half"), ("page", "protocol", ""),
        ("mumble {", "protocol", ""), ("mumble []", "protocol", ""), ('mumble {"choices": [3]}', "protocol", ""),
        ("break", "worker_died", "half"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_an_outcome_of_that_request_alone(what: str, code: str, text: str):
    requests = [ask("say one"), ask(what, checks=({"kind": "not_empty"},)), ask("say two")]
    results = sent(Peer(), requests, Load(concurrency=1))
    assert [(one.status, one.code) for one in results.outcomes] == [("ok", ""), ("error", code), ("ok", "")]
    assert (results.outcomes[1].text, results.outcomes[1].passed) == (text, None)
    assert any(line.startswith(f"error {code} (1): ") for line in summary(results))


def test_an_answer_that_takes_too_long_has_failed_and_one_whose_client_leaves_is_cancelled():
    peer = Peer()
    late, left = sent(peer, [ask("forever"), ask("forever", cancel_after=1.0)], Load(concurrency=2, timeout=2.0)).outcomes
    assert (late.status, late.code) == ("error", "timeout")
    assert (left.status, left.code) == ("cancelled", "")
    assert left.pieces
    assert left.text == "on " * len(left.pieces)
    assert left.ended < late.ended


# ---- load ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_a_closed_loop_keeps_so_many_in_flight(concurrency: int):
    requests, peer = [ask(f"say {number}") for number in range(10)], Peer()
    peer.before = gate(peer, concurrency, len(requests))  # fewer would wait for ever
    results = sent(peer, requests, Load(concurrency=concurrency, timeout=20))
    assert [one.status for one in results.outcomes] == ["ok"] * 10
    assert (peer.most, results.load) == (concurrency, f"closed {concurrency}")


def test_a_client_of_a_closed_loop_stays_away_as_long_as_it_is_asked_to():
    requests = [ask("refuse 503 1"), ask("say a"), ask("refuse 503 soon"), ask("say b"), ask("refuse 503 30")]
    refused, then, odd, last, end = sent(Peer(), requests, Load(concurrency=1, timeout=20)).outcomes
    assert [one.code for one in (refused, odd, end)] == ["http_503"] * 3
    assert 1 <= then.sent - refused.ended < 5
    assert last.sent - odd.ended < 1, "what is no number of seconds is not followed"
    requests = [ask("refuse 503 30"), ask("say a", at=0.05)]
    assert sent(Peer(), requests, Load(timeout=20)).outcomes[1].sent < 10, "an open loop asks at the times of its trace"


def test_an_open_loop_sends_at_the_times_of_the_trace_whatever_is_still_running():
    requests, peer = [ask(f"say {number}", at=5 + 0.06 * number) for number in range(6)], Peer()
    peer.before = gate(peer, len(requests), len(requests))
    results = sent(peer, requests, Load(speed=2.0, timeout=20))
    assert [one.status for one in results.outcomes] == ["ok"] * 6
    assert [one.due for one in results.outcomes] == pytest.approx([0.03 * number for number in range(6)], abs=1e-5)
    assert all(one.sent >= one.due for one in results.outcomes)
    assert results.outcomes[-1].sent < min(one.ended for one in results.outcomes)
    assert results.load == "open x2"


@pytest.mark.parametrize("load", [Load(concurrency=6, timeout=20), Load(timeout=20)])
def test_turns_of_a_session_keep_their_order_and_bring_what_was_said(load: Load):
    requests = [ask(f"say {name}{turn}", session=name) for turn in range(4) for name in "abc"]
    peer = Peer()
    outcomes = sent(peer, requests, load).outcomes
    for name in "abc":
        bodies = [body["messages"] for body in peer.bodies if body["messages"][0]["content"] == f"say {name}0"]
        assert len(bodies) == 4
        said = [one["content"] for one in bodies[-1]]
        assert said == [text for turn in range(4) for text in (f"say {name}{turn}", f"{name}{turn}")][:-1]
        own = [one for one in outcomes if requests[one.number].session == name]
        assert all(before.ended <= after.due <= after.sent for before, after in pairwise(own))
    assert peer.most <= 3


def test_a_turn_that_failed_is_no_part_of_the_conversation():
    requests = [ask("say a", session="s"), ask("refuse 400", session="s"), ask("say b", session="s")]
    peer = Peer()
    sent(peer, requests)
    assert [one["content"] for one in peer.bodies[-1]["messages"]] == ["say a", "a", "say b"]


def test_a_request_that_brings_its_conversation_is_sent_as_it_is():
    whole = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "say b"}]
    peer = Peer()
    sent(peer, [ask("say a", session="s"), Request(0, PATHS[0], {"messages": whole}, session="s")])
    assert peer.bodies[-1]["messages"] == whole


def test_ctrl_c_ends_early_and_keeps_what_was_measured(tmp_path: Path):
    requests, peer = [ask("say one"), ask("say two"), ask("forever"), ask("say three")], Peer()

    async def interrupt(body: dict[str, Any]) -> None:
        if body["messages"][-1]["content"] == "forever":
            os.kill(os.getpid(), signal.SIGINT)

    peer.before = interrupt
    results = sent(peer, requests, Load(concurrency=1))
    assert [one.text for one in results.outcomes] == ["one", "two"]
    assert (results.about["unfinished"], results.about["unsent"]) == (1, 1)
    assert "ended early: 1 requests were under way and 1 not sent yet; they are left out" in summary(results)
    write_results(tmp_path / "r.json", results)
    assert read_results(tmp_path / "r.json") == results


def test_a_mistake_in_the_program_is_not_taken_for_a_failed_request():
    class Broken(Server):
        async def ask(self, question: Question, hear: Any) -> Any:
            raise ZeroDivisionError

    async def run() -> None:
        async with Peer() as peer:
            await replay([ask("say a")], Broken(peer.url), CLOSED, out=io.StringIO())

    with pytest.raises(ZeroDivisionError):
        asyncio.run(run())


def test_requests_are_told_apart_by_their_digest_and_not_by_what_was_recorded_of_them():
    one = ask("say a")
    assert digest([one]) == digest([one._replace(answer="a")]) != digest([ask("say b")])
    assert digest([one]) != digest([one._replace(at=1.0)])


def test_nothing_to_send_is_said():
    with pytest.raises(DataError, match="no requests"):
        sent(Peer(), [])


# ---- targets ---------------------------------------------------------------------------------------------------------------------------


def test_what_a_server_does_not_know_is_left_out_and_counted():
    own = {"edge_rt": {"top_k": 5, "session": "theirs"}}
    peer = Peer()
    results = sent(peer, [ask("say a", body=own), ask("say b", session="s")], model="another")
    assert all("edge_rt" not in body and body["model"] == "another" for body in peer.bodies)
    assert all(body["stream_options"] == {"include_usage": True} for body in peer.bodies)
    assert results.about["left_out"] == {"edge_rt": 1}
    assert "left out of 1 requests, as the target does not know it: edge_rt" in summary(results)


def test_edge_rt_keeps_sessions_and_counts_tokens_in_every_chunk():
    peer = Peer("edge-rt", usage=True)
    turns = [ask("say a", session="s", body={"edge_rt": {"top_k": 5}}), ask("say b", session="s"), ask("say c")]
    turns += [ask("say d", session="t", body={"edge_rt": wrong}) for wrong in (3, None)]
    results = sent(peer, turns, Load(concurrency=1))
    assert [one.status for one in results.outcomes] == ["ok"] * 5
    first, second, third, *_ = peer.bodies
    assert first["edge_rt"]["top_k"] == 5
    assert first["edge_rt"]["session"] == second["edge_rt"]["session"]
    assert "edge_rt" not in third
    assert first["stream_options"]["continuous_usage_stats"] is True
    assert results.target.startswith("edge-rt 9 at ")


def test_a_unix_socket_and_a_key(tmp_path: Path):
    peer = Peer(path=tmp_path / "s")
    assert sent(peer, [ask("say a")], key="k" * 16).outcomes[0].text == "a"
    assert set(peer.keys) == {f"bearer {'k' * 16}"}


@pytest.mark.parametrize("url", ["", "localhost", "ftp://x", "unix:", "http://"])
def test_an_address_that_is_none_is_said(url: str):
    with pytest.raises(OptionError, match=r"give http://HOST:PORT or unix:/PATH"):
        Server(url)


def test_nobody_there_is_said(tmp_path: Path):
    async def run() -> None:
        await Server(f"unix:{tmp_path / 'none'}").look()

    with pytest.raises(UserError, match="start the server"):
        asyncio.run(run())


@pytest.mark.parametrize("engine", [None, "llama_cpp"])
def test_a_model_in_this_process_answers_one_at_a_time(tiny: Path, engine: str | None):
    more = {"max_tokens": 4, "temperature": 0, "logit_bias": {"1": 1.0}}
    requests = [ask("one two", body=more, session="s"), ask("three", body=more), ask("four", body=more, session="s")]
    wrong: list[dict[str, Any]] = [
        {"top_p": 9},
        {"max_tokens": "many"},
        {"edge_rt": 3},
        {"response_format": 3},
        {"messages": [{"role": 3}]},
    ]
    requests += [ask("x", body={**more, **one}) for one in wrong]
    requests.append(ask("y", body={"temperature": 0, "ignore_eos": True}, cancel_after=0.3))

    async def run() -> Results:
        target = InProcess(tiny, engine=engine, context=4096)
        try:
            return await replay(requests, target, Load(concurrency=3, timeout=60), out=io.StringIO())
        finally:
            await target.close()

    results = asyncio.run(run())
    answered, refused, left = results.outcomes[:3], results.outcomes[3:-1], results.outcomes[-1]
    assert [one.status for one in answered] == ["ok"] * 3
    assert all(sum(one.tokens) <= 4 and one.prompt_tokens and one.prompt_seconds is not None for one in answered)
    assert [one.status for one in refused] == ["error"] * len(wrong)
    assert refused[0].code == "OptionError"
    assert left.status == "cancelled"
    assert results.about["left_out"]["logit_bias"] >= 4
    assert all(reading.memory for reading in results.readings)
