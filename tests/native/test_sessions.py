"""Sessions end to end over the null engine (whose logits show any slip in the history) and over tiny random models."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edge_rt
from edge_rt.errors import ContextOverflow, OptionError, SessionFileError, UserError
from edge_rt.model import Model
from edge_rt.types import Delta, Done, PromptProgress

GREEDY = {"temperature": 0.0}


@pytest.fixture(params=["null", "ggml", "llama_cpp"])
def model(request: pytest.FixtureRequest, open_null: Callable[..., Model], random_model: Callable[..., Path]) -> Iterator[Model]:
    """The same sessions on every engine."""
    if request.param == "null":
        yield open_null(context=256)
    else:
        with edge_rt.open(random_model("llama", seed=3), engine=request.param, context=256, threads=1) as opened:
            yield opened


def text_of(events: Any) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def run(session: Any, prompt: Any, **options: Any) -> tuple[str, Done]:
    """Text and final event; Done must come once and last."""
    events = list(session.generate(prompt, **{**GREEDY, **options}))
    assert [isinstance(event, Done) for event in events] == [False] * (len(events) - 1) + [True]
    return text_of(events), events[-1]


def test_a_reply_streams_and_ends(open_null: Callable[..., Model]) -> None:
    with open_null("Hello, world!").session() as session:
        text, done = run(session, "Hi")
    assert text == "Hello, world!"
    assert done.reason == "end_of_generation"
    assert done.usage.completion_tokens == len("Hello, world!")
    assert done.context.used <= done.context.allowed


def test_a_character_of_several_tokens_is_never_torn(open_null: Callable[..., Model]) -> None:
    with open_null("价格是 42 € 👍🏽").session() as session:
        deltas = [event.text for event in session.generate("?", **GREEDY) if isinstance(event, Delta)]
    assert "".join(deltas) == "价格是 42 € 👍🏽"
    assert not any("\ufffd" in delta for delta in deltas)


def test_a_stop_string_ends_the_text_before_it(open_null: Callable[..., Model]) -> None:
    with open_null("one, two, three").session() as session:
        text, done = run(session, "count", stop=[", th", "never"])
    assert (text, done.reason, done.stop) == ("one, two", "stop_string", ", th")


def test_text_that_only_looked_like_a_stop_string_comes_at_the_end(open_null: Callable[..., Model]) -> None:
    with open_null("abcab").session() as session:
        assert run(session, "x", stop=["abd"])[0] == "abcab"


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_max_tokens_is_exact(model: Model, limit: int) -> None:
    with model.session() as session:
        _, done = run(session, "Once upon", max_tokens=limit, ignore_eos=True)
        assert (done.reason, done.usage.completion_tokens) == ("max_tokens", limit)


def test_the_context_fills_up_and_says_so(model: Model) -> None:
    model.policy = model.registry.context_policy("strict")
    with model.session() as session:
        _, done = run(session, "Once upon", ignore_eos=True)
        assert done.reason == "context_full"
        assert done.context.used == done.context.allowed == 256
        assert (done.context.policy, done.context.absent_tokens) == ("strict", 0)


def test_an_answer_without_a_limit_is_as_long_as_the_context_at_most(model: Model) -> None:
    with model.session() as session:
        _, done = run(session, "Once upon", ignore_eos=True)
        assert (done.reason, done.usage.completion_tokens) == ("context_full", 256)
        assert done.context.used + done.context.absent_tokens == len(session.history.tokens)


def test_strict_refuses_a_prompt_that_does_not_fit_with_both_numbers(model: Model) -> None:
    model.policy = model.registry.context_policy("strict")
    with model.session() as session:
        with pytest.raises(ContextOverflow, match=r"\d+ tokens.*255") as caught:
            session.generate("x" * 3000)
        assert (caught.value.needed, caught.value.available) == (len(model.prompt_tokens("x" * 3000)), 255)
        assert run(session, "Once", max_tokens=2, ignore_eos=True)[1].usage.completion_tokens == 2  # and nothing is broken


@pytest.mark.parametrize("speculate", [1, 3, 7])
def test_speculation_changes_nothing(model: Model, speculate: int) -> None:
    """Greedy and sampled: same tokens, same text, same reason."""
    prompt = "the cat sat on the mat, the cat sat on the hat, the cat sat on "
    for sampling in (GREEDY, {"temperature": 1.3, "seed": 11}):
        with model.session() as plain, model.session() as drafting:
            request = {"max_tokens": 40, "ignore_eos": True, **sampling}
            expected = [e for e in plain.generate(prompt, **request) if isinstance(e, Delta)]
            found = [e for e in drafting.generate(prompt, speculate=speculate, **request) if isinstance(e, Delta)]
            assert [e.tokens for e in expected] == [e.tokens for e in found]
            assert text_of(expected) == text_of(found)
            assert plain.tokens[: len(drafting.tokens)] == drafting.tokens[: len(plain.tokens)]


def test_drafts_are_accepted_on_the_null_engine(open_null: Callable[..., Model]) -> None:
    reply = "abcdefgh " * 12
    with open_null(reply).session() as session:
        text, done = run(session, "x", speculate=4)
    assert text == reply
    assert done.usage.accepted_tokens > 40


def test_a_growing_chat_computes_only_what_is_new(model: Model) -> None:
    with model.session() as session:
        run(session, "a" * 100, max_tokens=3, ignore_eos=True)
        _, done = run(session, "a" * 100 + "b" * 20, max_tokens=3, ignore_eos=True)
        assert done.usage.reused_tokens > 0
        _, fresh = run(session, "a" * 100 + "b" * 20, max_tokens=3, ignore_eos=True)
        assert fresh.usage.reused_tokens == fresh.usage.prompt_tokens - 1


def test_a_second_session_starts_from_the_first_ones_cells_and_gives_the_same(model: Model) -> None:
    prompt = "A long shared beginning, the same for both requests. " * 2
    with model.session() as first:
        text, done = run(first, prompt + "One?", max_tokens=12, ignore_eos=True)
    with model.session() as second:
        again, done2 = run(second, prompt + "One?", max_tokens=12, ignore_eos=True)
    assert done.usage.reused_tokens == 0
    assert done2.usage.reused_tokens > 40
    assert again == text
    with model.session() as third:  # diverging in the middle
        assert run(third, prompt + "Two!", max_tokens=5, ignore_eos=True)[1].usage.reused_tokens > 20


def test_cancelling_ends_with_what_was_said(model: Model) -> None:
    with model.session() as session:
        events, seen = session.generate("Once upon", ignore_eos=True, **GREEDY), []
        for event in events:
            seen.append(event)
            if sum(isinstance(e, Delta) for e in seen) == 5:
                session.cancel()
        assert isinstance(seen[-1], Done)
        assert seen[-1].reason == "cancelled"
        assert 5 <= seen[-1].usage.completion_tokens <= 6
        text, _ = run(session, "Once upon", max_tokens=5, ignore_eos=True)
        assert text_of(seen).startswith(text)


def test_cancelling_during_prefill(open_null: Callable[..., Model]) -> None:
    with open_null(context=8000).session() as session:
        seen = []
        for event in session.generate("y" * 6000, **GREEDY):
            seen.append(event)
            session.cancel()
        assert isinstance(seen[-1], Done)
        assert seen[-1].reason == "cancelled"
        assert seen[-1].usage.completion_tokens == 0
        assert 0 < len(session.tokens) < 6000


def test_abandoning_a_stream_leaves_the_session_usable(model: Model) -> None:
    with model.session() as session:
        events = session.generate("Once upon", ignore_eos=True, speculate=4, **GREEDY)
        for event in events:
            if isinstance(event, Delta):
                break
        events.close()  # type: ignore[attr-defined]
        with model.session() as fresh:
            expected, _ = run(fresh, "Once upon a", max_tokens=8, ignore_eos=True)
        assert run(session, "Once upon a", max_tokens=8, ignore_eos=True)[0] == expected


def test_one_request_at_a_time(open_null: Callable[..., Model]) -> None:
    with open_null("Hello").session() as session:
        events = session.generate("a", **GREEDY)
        next(iter(events))
        with pytest.raises(OptionError, match="another request"):
            session.generate("b")
        assert text_of(events) == "Hello"


def test_sessions_on_threads_do_not_disturb_each_other(model: Model) -> None:
    prompts = [f"Story number {i}: " for i in range(4)]
    expected = []
    for prompt in prompts:
        with model.session() as session:
            expected.append(run(session, prompt, max_tokens=20, ignore_eos=True)[0])
    found: dict[int, str] = {}

    def work(i: int) -> None:
        with model.session() as session:
            found[i] = run(session, prompts[i], max_tokens=20, ignore_eos=True)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == expected


def test_async_is_the_same_stream(open_null: Callable[..., Model]) -> None:
    async def collect(model: Model) -> str:
        with model.session() as session:
            return "".join([e.text async for e in session.agenerate("Hi", **GREEDY) if isinstance(e, Delta)])

    assert asyncio.run(collect(open_null("Hello, world!"))) == "Hello, world!"


def test_leaving_an_async_stream_cancels_it(open_null: Callable[..., Model]) -> None:
    async def leave(model: Model) -> tuple[str, str]:
        with model.session() as session:
            stream = session.agenerate("Hi", **GREEDY)
            async for event in stream:
                if isinstance(event, Delta):
                    break
            await stream.aclose()  # type: ignore[attr-defined]
            return event.text, "".join([e.text async for e in session.agenerate("Hi", **GREEDY) if isinstance(e, Delta)])

    assert asyncio.run(leave(open_null("Hello"))) == ("H", "Hello")


def test_a_saved_session_goes_on_exactly(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "s.session"
    with model.session() as session:
        run(session, "Remember this: 12345. " * 3, max_tokens=5, ignore_eos=True)
        session.save(path)
        longer = "Remember this: 12345. " * 3 + "And?"
        expected, _ = run(session, longer, max_tokens=10, ignore_eos=True)
    model.prefixes.clear()
    with model.restore(path) as restored:
        found, done = run(restored, longer, max_tokens=10, ignore_eos=True)
    assert found == expected
    assert done.usage.reused_tokens > 20


def test_damaged_and_foreign_session_files_are_refused(model: Model, random_model: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "s.session"
    with model.session() as session:
        run(session, "Remember", max_tokens=3, ignore_eos=True)
        session.save(path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    flips = [bytes(b ^ (0x40 if i == at else 0) for i, b in enumerate(data)) for at in rng.integers(0, min(len(data), 400), 20)]
    for bad in (b"", data[:7], data[:20], data[:-1], data + b"x", b"not a session at all", *flips):
        path.write_bytes(bad)
        try:
            model.restore(path).close()
        except SessionFileError:
            continue
        pytest.fail("a damaged session was accepted")
    path.write_bytes(data)
    with edge_rt.open(random_model("llama", seed=4), engine="ggml", context=256, threads=1) as other, pytest.raises(SessionFileError):
        other.restore(path)
    with pytest.raises(SessionFileError, match="cannot read"):
        model.restore(tmp_path / "absent")
    with model.session() as session, pytest.raises(UserError, match="cannot save"):
        session.save(tmp_path / "no" / "such" / "folder")


def test_progress_tells_how_much_was_reused(open_null: Callable[..., Model]) -> None:
    model = open_null("ok", context=4000)
    with model.session() as session:
        list(session.generate("z" * 1500, **GREEDY))
        steps = [e for e in session.generate("z" * 1500 + "!" * 1200, **GREEDY) if isinstance(e, PromptProgress)]
    assert steps[-1].done == steps[-1].total
    assert all(step.reused == steps[0].reused >= 1500 for step in steps)
    assert [s.done for s in steps] == sorted(s.done for s in steps)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"logprobs": -1},
        {"speculate": -1},
        {"temperature": float("nan")},
        {"top_p": 2.0},
        {"stop": [""]},
        {"nonsense": 1},
    ],
    ids=lambda bad: next(iter(bad)),
)
def test_bad_options_are_refused_and_leave_the_session_usable(open_null: Callable[..., Model], bad: dict[str, Any]) -> None:
    with open_null("fine").session() as session:
        with pytest.raises(OptionError):
            session.generate("x", **bad)
        assert run(session, "x")[0] == "fine"


def test_an_empty_prompt_is_refused(open_null: Callable[..., Model]) -> None:
    with open_null("fine").session() as session, pytest.raises(OptionError, match="empty"):
        session.generate("")


def test_logprobs_are_those_of_the_model(model: Model) -> None:
    with model.session() as session:
        events = [e for e in session.generate("Once", max_tokens=4, logprobs=3, ignore_eos=True, **GREEDY) if isinstance(e, Delta)]
    tokens = model.prompt_tokens("Once") + [t for e in events for t in e.tokens]
    logits = model.logits(tokens).astype(np.float64)
    scores = [score for event in events for score in event.logprobs]
    assert len(scores) == 4
    for i, score in enumerate(scores):
        row = logits[len(tokens) - 5 + i]
        expected = row[score.token] - np.log(np.exp(row - row.max()).sum()) - row.max()
        assert score.logprob == pytest.approx(expected, abs=2e-3)
        assert len(score.top) == 3
        assert [p for _, p in score.top] == sorted((p for _, p in score.top), reverse=True)


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_a_session_ends_a_stream_that_somebody_still_holds(open_null: Callable[..., Model], taken: int) -> None:
    with open_null("Hello, world!") as model:
        session = model.session()
        events = session.generate("Hi", **GREEDY)
        for _ in range(taken):
            next(events)
        session.close()
        assert list(events) == []


@pytest.mark.parametrize("taken", [0, 2])
def test_a_dropped_stream_frees_the_session(open_null: Callable[..., Model], taken: int) -> None:
    with open_null("Hello").session() as session:
        events = session.generate("Hi", **GREEDY)
        for _ in range(taken):
            next(events)
        del events
        assert run(session, "Hi")[0] == "Hello"


def test_a_stream_that_failed_frees_the_session(open_null: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    with open_null("Hello") as model, model.session() as session:
        events = session.generate("Hi", **GREEDY)
        with monkeypatch.context() as broken:
            broken.setattr(model.engine, "step", None)
            with pytest.raises(TypeError):
                list(events)
        assert run(session, "Hi")[0] == "Hello"


def test_closing_the_model_closes_sessions(open_null: Callable[..., Model]) -> None:
    model = open_null("x")
    session = model.session()
    model.close()
    model.close()
    with pytest.raises(OptionError, match="closed"):
        session.generate("x")


def test_beginnings_are_shared_with_their_owner_alone(model):
    prompt = "Once upon a time there was a pump in Leeds, and "
    for owner, reused in (("a", False), ("b", False), ("a", True), ("", False), ("b", True)):
        with model.session(owner=owner) as session, session.clone() as clone:
            *_, done = clone.generate(prompt, max_tokens=1, temperature=0)
            assert (done.usage.reused_tokens > 0) == reused, owner
