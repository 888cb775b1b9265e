"""Requests that prune, on real engines and the null engine: what is fed, what is left, what is saved, and what others share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edge_rt
from edge_rt.core.engine import PrunesCells
from edge_rt.core.kv.pruning import WATCHED
from edge_rt.errors import OptionError
from edge_rt.model import Model
from edge_rt.types import Delta, Done, Event, Notice, PromptProgress, Pruning

GREEDY = {"temperature": 0.0}
LONG = "The seal of pump number %d was changed in May. "


def text(sentences: int) -> str:
    return "".join(LONG % i for i in range(sentences))


def done_of(events: list[Event]) -> Done:
    assert isinstance(events[-1], Done)
    return events[-1]


def said(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.tokens]


@pytest.fixture(params=["ggml", "llama_cpp"])
def model(request: pytest.FixtureRequest, random_model: Callable[..., Path]) -> Any:
    with edge_rt.open(random_model("llama", seed=3), engine=request.param, threads=1, context=1024) as opened:
        yield opened


def test_a_prompt_longer_than_the_context_is_read_chunk_by_chunk(model: Model) -> None:
    prompt = text(60)
    tokens = len(model.prompt_tokens(prompt))
    assert tokens > 1024
    with model.session() as session:
        events = list(session.generate(prompt, max_tokens=40, ignore_eos=True, prune=Pruning(256), **GREEDY))
        done, held = done_of(events), model.engine.length(session._sequence)  # type: ignore[arg-type]
    use = done.context
    assert (done.usage.computed_tokens, done.usage.completion_tokens) == (tokens, 40)
    assert held == use.used <= 256 + 32 + 1
    assert use.used + use.absent_tokens + use.missing_cells == tokens + 39
    assert use.pruned_cells == use.absent_tokens + use.missing_cells
    assert use.evicted_segments == use.evicted_tokens == 0
    progress = [event for event in events if isinstance(event, PromptProgress)]
    assert [event.done for event in progress] == sorted({event.done for event in progress})
    assert progress[-1].done == progress[-1].total == tokens
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert notices[-1] == f"{use.pruned_cells:,} cells were pruned, {use.used:,} are left"


def test_memory_goes_back_and_is_reported(random_model: Callable[..., Path]) -> None:
    with edge_rt.open(random_model("llama", seed=3), engine="ggml", threads=1, context=1024) as model, model.session() as session:
        list(session.generate(text(20), max_tokens=1, **GREEDY))
        before = model.memory().cache
        done = done_of(list(session.generate(text(20), max_tokens=1, prune=Pruning(0.2, "share"), **GREEDY)))
        released, after = done.context.released_bytes, model.memory().cache
        engine = model.engine
        assert isinstance(engine, PrunesCells)
        assert released == pytest.approx(done.context.pruned_cells * engine.cell_bytes, rel=0.1)
        config = engine.config  # type: ignore[attr-defined]
        queries = WATCHED * config.n_layer * config.n_head * config.head_dim * 4
        assert before - after == pytest.approx(released - queries, rel=0.1)
        prune = Pruning(engine.cell_bytes * 60, "bytes")
        cells = done_of(list(session.generate(text(20), max_tokens=1, prune=prune, **GREEDY))).context.used
        assert 50 <= cells <= 68


def test_the_triggers(open_null: Callable[..., Model]) -> None:
    """Seen in the number of cells over time: at the question, at every so many tokens, and when an eighth more is in use."""
    model = open_null(context=1024)
    prompt = "x" * 299

    def cells(prune: Pruning) -> list[int]:
        with model.session() as session:
            found = []
            for event in session.generate(prompt, max_tokens=60, ignore_eos=True, prune=prune, **GREEDY):
                if isinstance(event, Delta) and event.tokens:
                    found.append(model.engine.length(session._sequence))  # type: ignore[arg-type]
        model.prefixes.clear()
        return found

    at_question = cells(Pruning(280))
    assert (at_question[0], at_question[1]) == (300, 281)
    assert max(at_question[1:]) <= 280 + 35
    later = cells(Pruning(280, question=False))
    assert later[:15] == list(range(300, 315))
    assert later[16] == 281
    every = cells(Pruning(280, every=10))
    assert max(every[1:]) == 290
    assert every.count(281) == 6
    assert cells(Pruning(1, "share")) == list(range(300, 360))


def test_it_is_pruned_for_the_question_before_that_is_fed(open_null: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk: the engine has just read the end of the prompt each time, and forgets it again."""
    model = open_null(context=1024)
    engine, prune, seen = model.engine, model.engine.prune, []  # type: ignore[attr-defined]

    def watched(sequence: int, *args: Any, **options: Any) -> Any:
        seen.append(engine._sequences[sequence].tokens[-13:])  # type: ignore[attr-defined]
        return prune(sequence, *args, **options)

    monkeypatch.setattr(engine, "prune", watched)
    messages = [{"role": "user", "content": "y" * 600 + " Who is it?"}]
    with model.session() as session:
        events = list(session.generate(messages, max_tokens=3, ignore_eos=True, prune=Pruning(100), **GREEDY))
    assert len(seen) > 5
    assert all(one == model.prompt_tokens(messages)[-13:] for one in seen)
    assert done_of(events).usage.computed_tokens == done_of(events).usage.prompt_tokens


@pytest.mark.parametrize("engine", ["ggml", "llama_cpp"])
def test_a_pruned_session_is_saved_and_goes_on_exactly(engine: str, random_model: Callable[..., Path], tmp_path: Path) -> None:
    path, prune = tmp_path / "s.session", Pruning(128)
    with edge_rt.open(random_model("llama", seed=3), engine=engine, threads=1, context=1024) as model:
        prompt = text(20)
        with model.session() as session:
            first = list(session.generate(prompt, max_tokens=9, ignore_eos=True, prune=prune, **GREEDY))
            session.save(path)
            assert done_of(first).context.pruned_cells > 200
            expected = list(session.generate(prompt, max_tokens=9, ignore_eos=True, **GREEDY))
        with model.restore(path) as restored:
            events = list(restored.generate(prompt, max_tokens=9, ignore_eos=True, **GREEDY))
            assert said(events) == said(expected)
            assert done_of(events).context == done_of(expected).context
            # Where tokens left as wholes they come back as soon as all fit, so only what was before the first is used again.
            assert done_of(events).usage.reused_tokens == (789 if engine == "ggml" else done_of(expected).usage.reused_tokens)


def test_pruning_one_session_never_touches_another_that_shares_its_beginning(random_model: Callable[..., Path]) -> None:
    prompt = text(20)
    with edge_rt.open(random_model("llama", seed=3), engine="ggml", threads=1, context=1024) as model:
        with model.session() as session:
            expected = said(list(session.generate(prompt, max_tokens=9, ignore_eos=True, **GREEDY)))
        with model.session() as pruned, model.session() as other:  # both begin with what the first has left
            list(pruned.generate(prompt + "A", max_tokens=9, ignore_eos=True, prune=Pruning(64), **GREEDY))
            assert pruned.history.condensed.tokens
            assert said(list(other.generate(prompt, max_tokens=9, ignore_eos=True, **GREEDY))) == expected
        with model.session() as third:  # what the pruned one left is no beginning of anything
            assert said(list(third.generate(prompt, max_tokens=9, ignore_eos=True, **GREEDY))) == expected
            assert not third.history.condensed.tokens


def test_a_conversation_goes_on_after_pruning_and_an_earlier_point_is_computed_anew(open_null: Callable[..., Model]) -> None:
    model = open_null("ok", context=512)
    messages = [{"role": "user", "content": "z" * 300}]
    with model.session() as session:
        done = done_of(list(session.generate(messages, prune=Pruning(150), **GREEDY)))
        assert done.context.pruned_cells > 100
        longer = [*messages, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "And then?"}]
        done = done_of(list(session.generate(longer, prune=Pruning(150), **GREEDY)))
        assert done.usage.computed_tokens < 30
        assert done.context.missing_cells > 100
        done = done_of(list(session.generate(messages[0]["content"][:200], **GREEDY)))
        assert (done.usage.reused_tokens, done.context.missing_cells) == (0, 0)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        (Pruning(0), "a pruning budget of 0 cells is out of range; give more than 0"),
        (Pruning(float("nan")), "out of range"),
        (Pruning(1.5, "share"), "give up to 1"),
        (Pruning(10, every=-1), "at least 1, or 0 for never"),
    ],
)
def test_nonsense_is_refused(open_null: Callable[..., Model], prune: Pruning, message: str) -> None:
    with open_null("ok").session() as session, pytest.raises(OptionError, match=message):
        session.generate("Hi", prune=prune)


def test_engines_that_cannot_say_so(random_model: Callable[..., Path]) -> None:
    with edge_rt.open(random_model("llama", seed=3), engine="llama_cpp", threads=1, context=256) as model:
        with model.session() as session, pytest.raises(OptionError, match="in cells or as a share"):
            session.generate("Hi", prune=Pruning(1 << 20, "bytes"))
        with model.session() as session:
            assert done_of(list(session.generate("Hi", max_tokens=2, ignore_eos=True, **GREEDY))).usage.completion_tokens == 2
