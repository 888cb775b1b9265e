"""The window over the null engine: whatever is said, whatever is allowed, the books balance and nothing leaves unreported."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import edge_rt
from edge_rt.core.context import manager, session_file
from edge_rt.core.context.history import SequenceState
from edge_rt.core.engine import MovesCells, RemovesCells, SequenceBatch
from edge_rt.core.generate.scoring import token_logprobs
from edge_rt.core.kv.cache import cell_bytes
from edge_rt.core.kv.pruning import budget_cells
from edge_rt.errors import ContextError, ContextOverflow, OptionError, PluginError
from edge_rt.hooks import Embedder, hookimpl
from edge_rt.model import Model
from edge_rt.native import ggml
from edge_rt.types import Delta, Done, Event, Notice, Pruning

GREEDY = {"temperature": 0.0}
POLICIES = ("strict", "slide", "graded")


def say(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def done_of(events: list[Event]) -> Done:
    assert isinstance(events[-1], Done)
    return events[-1]


def cells_of(model: Model, session: Any) -> list[int]:
    """The tokens in the engine's cells."""
    return list(model.engine._sequences[session._sequence].tokens)  # type: ignore[attr-defined]


def talk(turns: int, size: int = 60) -> list[dict[str, str]]:
    """A system message and turns of which no two are equal; the last is a question."""
    messages = [say("system", "Be brief.")]
    for i in range(turns):
        messages += [say("user", f"question {i} " + "q" * size), say("assistant", f"answer {i} " + "a" * size)]
    return messages[:-1]


# ---- any sequence of requests ----------------------------------------------------------------------------------------

TEXT = st.text("ab 1.\n", min_size=1, max_size=80) | st.integers(1, 900).map(lambda n: "word " * (n // 5) + "x")
PRUNE = st.builds(
    Pruning, st.integers(1, 200), st.sampled_from(["cells", "bytes"]), st.booleans(), st.sampled_from([0, 0, 7, 30])
) | st.builds(Pruning, st.floats(0.05, 1), st.just("share"), st.booleans(), st.just(9))  # fmt: skip
TURN = st.fixed_dictionaries(
    {
        "text": TEXT,
        "role": st.sampled_from(["user"] * 5 + ["tool", "system"]),
        "back": st.sampled_from([0] * 6 + [1, 2, 5]),  # messages taken back first
        "raw": st.sampled_from([False] * 5 + [True]),
        "policy": st.sampled_from(POLICIES),
        "context": st.none() | st.integers(1, 256),
        "max_tokens": st.none() | st.integers(1, 300),
        "stop_after": st.none() | st.integers(0, 40),  # events, then cancel
        "close": st.booleans(),  # or close the stream
        "speculate": st.sampled_from([0, 0, 4]),
        "ignore_eos": st.booleans(),
        "prune": st.none() | PRUNE,
    }
)


CALM = {
    "role": "user", "back": 0, "raw": False, "context": None, "max_tokens": None, "stop_after": None, "close": False, "speculate": 0,
    "ignore_eos": False, "prune": None,
}  # fmt: skip
COMES_BACK_TO_A_FULL_CONTEXT = [
    {**CALM, "text": "1", "policy": "strict"},
    {**CALM, "text": "1", "policy": "strict"},
    {**CALM, "text": "word " * 50 + "x", "back": 5, "raw": True, "policy": "slide", "ignore_eos": True},
    {**CALM, "text": "word " * 46 + "x", "policy": "graded"},
]


@pytest.mark.parametrize(
    "ability", ["removes", "has positions to spare", "cannot remove", "cannot renumber", "cannot go back", "cannot prune"]
)
def test_any_sequence_of_requests(open_null: Callable[..., Model], monkeypatch: pytest.MonkeyPatch, ability: str) -> None:
    model = open_null(context=4096 if ability == "has positions to spare" else 256)
    engine = model.engine
    truncate, length = engine.truncate, engine.length
    most = watched(model, monkeypatch)
    if ability == "cannot prune":
        monkeypatch.setattr(engine, "prune", None)  # so that it is no PrunesCells
    if ability.startswith("cannot") and ability != "cannot prune":

        def refuse(*args: Any) -> Any:
            raise ContextError("not with this model")

        def only_whole(sequence: int, to: int) -> None:
            if 0 < to < length(sequence):
                raise ContextError("this model cannot go back")
            truncate(sequence, to)

        monkeypatch.setattr(engine, "renumber" if ability == "cannot renumber" else "remove_cells", refuse)
        if ability == "cannot go back":
            monkeypatch.setattr(engine, "truncate", only_whole)
            monkeypatch.setattr(engine, "exact_rows", lambda: 1)  # nobody drafts who cannot take back

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(TURN, min_size=1, max_size=7))
    @example(COMES_BACK_TO_A_FULL_CONTEXT)
    def check(turns: list[dict[str, Any]]) -> None:
        with model.session(context=256) as session:
            messages: list[dict[str, str]] = []
            for turn in turns:
                del messages[max(0, len(messages) - turn["back"]) :]
                messages.append(say(turn["role"], turn["text"]))
                if ability == "cannot go back":
                    turn = {**turn, "prune": None}
                most[0] = 0
                request(model, session, messages, turn)
                assert turn["prune"] or most[0] <= (turn["context"] or 256)
        assert len(engine._sequences) == len(model.prefixes._kept)  # type: ignore[attr-defined]
        for kept in model.prefixes._kept:  # as if nothing had ever left: the states say what a token has seen
            held, fresh = engine._sequences[kept.sequence], engine.new_sequence()  # type: ignore[attr-defined]
            engine.step([SequenceBatch(fresh, kept.tokens, "none")])
            assert (held.tokens, held.states) == (kept.tokens, engine._sequences[fresh].states)  # type: ignore[attr-defined]
            assert list(held.positions) == list(engine._sequences[fresh].positions)  # type: ignore[attr-defined]
            assert held.positions.next == len(kept.tokens)
            engine.free_sequence(fresh)

    check()


def watched(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most cells that a sequence has had after a step."""
    most, step = [0], model.engine.step

    def watching(parts: Any) -> Any:
        found = step(parts)
        most[0] = max(most[0], *(model.engine.length(part.sequence) for part in parts))
        return found

    monkeypatch.setattr(model.engine, "step", watching)
    return most


def request(model: Model, session: Any, messages: list[dict[str, str]], turn: dict[str, Any]) -> None:
    """One request, and all that must hold after it."""
    model.policy = model.registry.context_policy(turn["policy"])
    prompt: Any = messages[-1]["content"] if turn["raw"] else messages
    options = {name: turn[name] for name in ("context", "max_tokens", "speculate", "ignore_eos", "prune")}
    before = session.history.tokens[: session.history.fed], len(session.history.evicted)
    condensed = session.history.condensed.tokens
    absent_before = sum(gone.end - gone.start for gone in session.history.evicted)
    events: list[Event] = []
    try:
        stream = session.generate(prompt, **GREEDY, **options)
        for event in itertools.islice(stream, 4000):
            events.append(event)
            if turn["stop_after"] == len(events):
                if turn["close"]:
                    stream.close()
                    break
                session.cancel()
    except ContextOverflow as overflow:
        _check_overflow(overflow)
        assert turn["prune"] or not events  # what is pruned may turn out not to fit while it is read: positions are used up
        check_cells(model, session)
        return
    history: SequenceState = session.history
    check_cells(model, session)
    away = sum(gone.end - gone.start for gone in history.evicted)
    assert history.fed == len(history.tokens) == history.cells + history.condensed.missing + away
    allowed = turn["context"] or 256
    assert history.cells <= allowed
    if turn["close"] and turn["stop_after"] is not None and turn["stop_after"] <= len(events) and not isinstance(events[-1], Done):
        return
    done = done_of(events)
    use, usage = done.context, done.usage
    assert (use.used, use.allowed, use.policy) == (history.cells, allowed, turn["policy"])
    assert use.absent_tokens + use.missing_cells == len(history.tokens) - history.cells
    assert any("cells were pruned" in e.message for e in events if isinstance(e, Notice)) == bool(use.pruned_cells)
    if not turn["prune"]:
        assert not use.pruned_cells
    elif done.reason != "cancelled" and not any("pruning ended" in e.message for e in events if isinstance(e, Notice)):
        keep = max(1, min(budget_cells(turn["prune"], len(history.tokens), 10), allowed - max(1, allowed // 8)))
        assert history.cells <= keep + keep // 8 + 1
        sinks = min(4, keep)
        assert history.resident()[:sinks] == history.tokens[:sinks]
    said = [token for event in events if isinstance(event, Delta) for token in event.tokens]
    whole = [*model.prompt_tokens(prompt), *said]
    assert history.tokens == whole[: len(history.tokens)]
    if done.reason != "cancelled":
        assert len(history.tokens) >= len(whole) - 1  # the last token may never be fed
        tail = max(1, min(10, allowed // 10, usage.prompt_tokens))
        assert turn["prune"] or not use.absent_tokens or all(gone.end <= len(history.tokens) - tail + 1 for gone in history.evicted)
    assert usage.reused_tokens + usage.computed_tokens <= usage.prompt_tokens
    assert condensed or turn["prune"] or usage.reused_tokens + usage.computed_tokens <= allowed
    if turn["policy"] == "strict":
        assert use.evicted_segments == use.evicted_tokens == 0
    assert bool(use.evicted_segments) == bool(use.evicted_tokens)
    assert any("left the context" in e.message for e in events if isinstance(e, Notice)) == bool(use.evicted_segments)
    if history.tokens[: len(before[0])] == before[0] and done.reason != "cancelled":  # a request that only goes on: each token is told once
        assert use.absent_tokens <= absent_before + use.evicted_tokens + use.pruned_cells
    if turn["max_tokens"]:
        assert usage.completion_tokens <= turn["max_tokens"]
    assert usage.completion_tokens <= (turn["max_tokens"] or allowed)
    if not turn["raw"] and not turn["prune"] and done.reason != "cancelled":
        check_protected(model, history, messages)
    if done.reason != "cancelled":
        messages.append(say("assistant", "".join(e.text for e in events if isinstance(e, Delta)) or "-"))


def _check_overflow(overflow: ContextOverflow) -> None:
    assert overflow.needed > overflow.available


def check_cells(model: Model, session: Any) -> None:
    """The engine holds what the history says: the condensed tokens in fewer cells, all others one by one."""
    history, held = session.history, cells_of(model, session)
    assert len(held) == history.cells
    start, resident = history.cell(history.condensed.tokens), history.resident()
    assert held[start:] == resident[history.kept(history.condensed.tokens) :]
    rest = iter(resident)
    assert all(token in rest for token in held), "they come in order"


def check_protected(model: Model, history: SequenceState, messages: list[dict[str, str]]) -> None:
    """System messages, the current question and the sinks are in the cells, each whole."""
    away = {at for gone in history.evicted for at in range(gone.start, gone.end)}
    question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    at = 1  # the begin-of-text token
    for i, message in enumerate(messages):
        size = len(message["content"].encode()) + 1  # the template closes each with one token
        if message["role"] == "system" or i == question:
            assert not away & set(range(at, at + size))
        at += size
    assert not away & set(range(4))


# ---- single things ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["slide", "graded"])
def test_a_chat_goes_on_far_beyond_the_window(open_null: Callable[..., Model], policy: str) -> None:
    model = open_null("Yes, of course.", context=256, policy=policy)
    messages = [say("system", "Be brief.")]
    told = reused = computed = 0
    with model.session() as session:
        for i in range(60):
            messages.append(say("user", f"Question number {i}: is the pump P-{i} in order?"))
            events = list(session.generate(messages, **GREEDY))
            done = done_of(events)
            assert done.reason == "end_of_generation"
            told += done.context.evicted_tokens - done.context.recalled_tokens
            assert done.context.absent_tokens == told
            reused, computed = reused + done.usage.reused_tokens, computed + done.usage.computed_tokens
            messages.append(say("assistant", "".join(e.text for e in events if isinstance(e, Delta))))
        assert len(session.history.tokens) > 10 * 256
        assert reused > 60 * 100
        assert computed < 60 * 70


def test_what_leaves_is_not_computed_and_a_notice_quotes_it(open_null: Callable[..., Model]) -> None:
    model = open_null("ok", context=256)
    messages = [
        say("user", "Pump P-104 failed on 3 May in Leeds, said Ms. Keller."), say("assistant", "Thank you, have a nice day! " * 4),
        say("user", "Pump P-105 failed on 4 May in Leeds, said Ms. Keller."), say("assistant", "Thank you."), say("user", "Why?"),
    ]  # fmt: skip
    with model.session(context=200) as session:
        events = list(session.generate(messages, **GREEDY))
    done = done_of(events)
    assert (done.context.evicted_segments, done.context.evicted_tokens) == (1, 113)
    assert done.usage.computed_tokens + 113 == done.usage.prompt_tokens
    notices = [event.message for event in events if isinstance(event, Notice)]
    assert notices == ["1 segment (113 tokens) left the context of 200 (graded): 'Thank you, have a nice day! Thank you, h'"]


def test_the_beginning_of_the_answer_stays_and_does_not_pass_for_what_is_asked_for(open_null: Callable[..., Model]) -> None:
    """It is the closest of all to the question, and yet no reason to leave away what that is about."""
    model = open_null("ok", context=1024)
    asked, fact = "Which pump failed in Leeds on the third of May?", "The pump that failed in Leeds on the third of May is P-104."
    messages = [say("user", fact), *talk(12)]
    with model.session(context=300) as session:
        for end in range(1, len(messages) + 1, 2):
            list(session.generate(messages[:end], max_tokens=1, **GREEDY))
        opening = f"{asked} You ask which pump that was. It was"
        done = done_of(list(session.generate([*messages, say("assistant", "a"), say("user", asked), say("assistant", opening)], **GREEDY)))
        held = model.detokenize(session.tokens)
    assert held.count(opening) == 1
    assert fact in held
    assert done.context.recalled_segments >= 1


def test_the_request_overrides_the_session_and_the_session_the_model(open_null: Callable[..., Model]) -> None:
    model = open_null("ok", context=256)
    for session_context, request_context, expected in ((None, None, 256), (100, None, 100), (100, 120, 120), (None, 90, 90)):
        with model.session(context=session_context) as session:
            done = done_of(list(session.generate("Hi", context=request_context, **GREEDY)))
            assert done.context.allowed == expected
    for bad in (0, 257):
        with pytest.raises(OptionError, match=f"a context of {bad} tokens is out of range; give 1 to 256"):
            model.session(context=bad)
        with model.session() as session, pytest.raises(OptionError, match="out of range"):
            session.generate("Hi", context=bad)


def test_short_memory_allows_fewer_cells_and_says_so_once(open_null: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_null("ok", context=256)
    monkeypatch.setattr("edge_rt.session.max_tokens_in_memory", lambda engine, cells: 60)
    with model.session() as session:
        events = list(session.generate("x" * 50, **GREEDY))
        assert done_of(events).context.allowed == 60
        assert [e.message for e in events if isinstance(e, Notice)] == [
            "free memory allows a context of 60 tokens and not 256; close something to have more"
        ]
        assert not any(isinstance(e, Notice) for e in session.generate("x" * 50, **GREEDY))


@pytest.fixture(params=["null", "ggml", "llama_cpp"])
def open_model(
    request: pytest.FixtureRequest, open_null: Callable[..., Model], random_model: Callable[..., Path]
) -> Iterator[Callable[..., Model]]:
    """``open_model(**options)`` on every engine."""
    opened: list[Model] = []

    def make(**options: Any) -> Model:
        if request.param == "null":
            return open_null(**options)
        opened.append(edge_rt.open(random_model("llama", seed=3), engine=request.param, threads=1, **options))
        return opened[-1]

    yield make
    for model in opened:
        model.close()


def test_what_memory_affords_is_counted_in_cells(random_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with edge_rt.open(random_model("llama", seed=3), engine="ggml", context=256) as model:
        config = model.engine.config  # type: ignore[attr-defined]
        monkeypatch.setattr(manager, "available_memory", lambda: 100 * cell_bytes(config, ggml.TYPE_F16))
        assert manager.max_tokens_in_memory(model.engine, 20) == 20 + 75
        with model.session() as session:
            done = done_of(list(session.generate("Once upon a time", max_tokens=200, ignore_eos=True, **GREEDY)))
            assert (done.context.allowed, done.usage.completion_tokens) == (75, 200)
        monkeypatch.setattr(manager, "available_memory", lambda: None)
        assert manager.max_tokens_in_memory(model.engine, 20) is None


def test_kept_cells_give_the_logits_that_the_engine_would(open_model: Callable[..., Model]) -> None:
    """After an eviction the answer comes from the very cells of a sequence from which the engine was told to remove the same ones."""
    model = open_model(context=400)
    messages = talk(2)
    longer = [*messages, say("assistant", "a" * 30), say("user", "b" * 60)]
    first, second = model.prompt_tokens(messages), model.prompt_tokens(longer)
    with model.session(context=len(first) + 30) as session:
        list(session.generate(messages, max_tokens=1, **GREEDY))
        events = list(session.generate(longer, max_tokens=1, logprobs=3, **GREEDY))
        left = list(session.history.evicted)
    (score,) = next(event.logprobs for event in events if isinstance(event, Delta) and event.tokens)
    engine = model.engine
    assert isinstance(engine, RemovesCells)
    sequence = engine.new_sequence()
    engine.step([SequenceBatch(sequence, first, "none")])
    spans = [(gone.start, min(gone.end, len(first))) for gone in left if gone.start < len(first)]
    assert spans
    engine.remove_cells(sequence, spans)
    rest = [second[i] for i in range(len(first), len(second)) if not any(gone.start <= i < gone.end for gone in left)]
    (logits,) = engine.step([SequenceBatch(sequence, rest, "last")])
    assert logits is not None
    logprob, top = token_logprobs(logits[0], score.token, 3)
    tolerance = 5e-3 if engine.info.engine == "llama_cpp" else 0.0  # libllama's cells lie elsewhere, and sums come out in another order
    assert [token for token, _ in top] == [token for token, _ in score.top]
    assert [value for _, value in score.top] == pytest.approx([value for _, value in top], abs=tolerance)
    assert score.logprob == pytest.approx(logprob, abs=tolerance)


def test_a_long_answer_and_a_long_talk_on_every_engine(open_model: Callable[..., Model]) -> None:
    model = open_model(context=160)
    messages = [say("system", "Be brief.")]
    with model.session() as session:
        for i in range(12):
            messages.append(say("user", f"Question number {i}?"))
            events = list(session.generate(messages, max_tokens=40, ignore_eos=True, **GREEDY))
            use = done_of(events).context
            assert model.engine.length(session._sequence) == use.used == len(session.tokens) <= 160
            assert use.used + use.absent_tokens == len(session.history.tokens)
            messages.append(say("assistant", "".join(e.text for e in events if isinstance(e, Delta)) or "-"))
        assert use.absent_tokens > 160
        done = done_of(list(session.generate("Once upon a time", max_tokens=700, ignore_eos=True, **GREEDY)))
        assert (done.reason, done.usage.completion_tokens) == ("max_tokens", 700)
        assert model.engine.length(session._sequence) == done.context.used <= 160


@pytest.mark.parametrize("sampling", [GREEDY, {"temperature": 1.3, "seed": 5}])
def test_speculation_changes_nothing_beyond_the_window(open_null: Callable[..., Model], sampling: dict[str, Any]) -> None:
    model = open_null("abcdefgh " * 100 if "seed" not in sampling else None, context=128)
    found = []
    for speculate in (0, 5):
        with model.session() as session:
            events = list(
                session.generate("the cat sat on the mat. " * 3, max_tokens=400, ignore_eos=True, speculate=speculate, **sampling)
            )
        done = done_of(events)
        found.append(([t for e in events if isinstance(e, Delta) for t in e.tokens], done.context))
        model.prefixes.clear()
    assert done.usage.drafted_tokens > 0 or "seed" in sampling, "random text seldom repeats itself"
    assert len(found[0][0]) == 400
    assert found[0][1].evicted_tokens > 300
    assert found[0] == found[1]


def test_strict_ends_an_answer_where_the_others_make_room(open_null: Callable[..., Model]) -> None:
    for policy in POLICIES:
        with open_null("the seals were worn out, and nobody looked", context=256, policy=policy).session() as session:
            done = done_of(list(session.generate(talk(2), **GREEDY)))
            expected = ("context_full", False) if policy == "strict" else ("end_of_generation", True)
            assert (done.reason, bool(done.context.evicted_segments)) == expected


def test_a_session_with_gaps_is_saved_and_goes_on_exactly(open_null: Callable[..., Model], tmp_path: Path) -> None:
    model, path = open_null(context=256), tmp_path / "s.session"
    messages = talk(4)
    longer = [*messages, say("assistant", "well"), say("user", "and?")]
    with model.session() as session:
        list(session.generate(messages, max_tokens=5, **GREEDY))
        assert session.history.evicted
        session.save(path)
        expected = [e for e in session.generate(longer, max_tokens=9, ignore_eos=True, **GREEDY) if isinstance(e, Delta)]
        after = session.history
    model.prefixes.clear()
    with model.restore(path) as restored:
        events = list(restored.generate(longer, max_tokens=9, ignore_eos=True, **GREEDY))
        assert [e for e in events if isinstance(e, Delta)] == expected
        assert (restored.history.tokens, restored.history.evicted) == (after.tokens, after.evicted)
        assert done_of(events).usage.reused_tokens > 50


def test_a_restored_session_recalls_what_it_was_saved_without(open_model: Callable[..., Model], tmp_path: Path) -> None:
    """A file has no cells of what left: they are computed again, as the engine would with the cells the file has before them."""
    model, path = open_model(context=1024), tmp_path / "s.session"
    fact, asked = "The pump that failed in Leeds on the third of May is P-104.", "Which pump failed in Leeds on the third of May?"
    messages = [say("system", "Be brief."), say("user", "q" * 40), say("assistant", "a" * 40), say("user", fact), *talk(9)[2:]]
    longer = [*messages, say("assistant", "a"), say("user", asked)]

    def ask(session: Any) -> tuple[list[int], Done, Any]:
        events = list(session.generate(longer, max_tokens=1, context=400, logprobs=3, **GREEDY))
        (score,) = next(event.logprobs for event in events if isinstance(event, Delta) and event.tokens)
        return session.history.resident()[: -done_of(events).usage.completion_tokens or None], done_of(events), score

    with model.session(context=400) as session:
        for end in range(2, len(messages) + 1, 2):
            list(session.generate(messages[:end], max_tokens=1, **GREEDY))
        assert fact not in model.detokenize(session.tokens)
        session.save(path)
        before = list(session.history.evicted)
        held, live, _ = ask(session)
    model.prefixes.clear()
    with model.restore(path) as restored:
        again, done, score = ask(restored)
        after = restored.history
        assert model.engine.length(restored._sequence) == done.context.used == after.cells
    assert fact in model.detokenize(again)
    assert again == held
    assert done.context == live.context
    assert done.context.recalled_segments == 1
    (back,) = (gone for gone in before if fact in gone.text)
    first = model.prompt_tokens(longer)
    followed = [first[i] for i in range(back.start, len(first)) if not any(gone.start <= i < gone.end for gone in after.evicted)]
    assert done.usage.computed_tokens == len(followed)
    if isinstance(model.engine, MovesCells):
        assert live.usage.computed_tokens < len(followed) - 100
    saved = session_file.load(path, engine=model.info.engine, model=model.file.key())
    sequence = model.engine.import_sequence(saved.cells)
    left = [gone for gone in after.evicted if gone not in before and gone.start < len(saved.history.tokens)]
    model.engine.remove_cells(sequence, saved.history.cell_spans(left))  # type: ignore[attr-defined]
    saved.history.evict(left)
    model.engine.truncate(sequence, saved.history.cell(back.start))
    model.engine.renumber(sequence)  # type: ignore[attr-defined]  # gaps close for what comes back
    for at in range(0, len(followed), model.info.chunk):
        (logits,) = model.engine.step([SequenceBatch(sequence, followed[at : at + model.info.chunk])])
    assert logits is not None
    logprob, top = token_logprobs(logits[0], score.token, 3)
    tolerance = 1e-5 if model.info.engine == "llama_cpp" else 0.0  # libllama's cells lie elsewhere
    assert [token for token, _ in score.top] == [token for token, _ in top]
    assert score.logprob == pytest.approx(logprob, abs=tolerance)


TOPICS = {"automobile": 0, "car": 0, "engine": 0, "walk": 1, "lake": 1, "cake": 2, "kitchen": 2}


class TopicPlugin:
    """An embedder that knows what words are about, which the engine under it does not."""

    EDGE_RT_API = 1

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.broken = False

    def embed(self, texts: Sequence[str]) -> Any:
        self.seen += texts
        if self.broken:
            raise OSError("out of order")
        vectors = np.full((len(texts), 3), 0.01, np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            for word in re.findall("[a-z]+", text.lower()):
                if word in TOPICS:
                    vector[TOPICS[word]] += 1
        return vectors

    @hookimpl
    def edge_rt_embedders(self) -> list[Embedder]:
        return [Embedder("topics", self.embed, 0.8)]


def small_talk(turns: int) -> list[dict[str, str]]:
    messages = [say("system", "Be brief."), say("user", "The car is behind the bakery."), say("assistant", "I see.")]
    for i in range(turns):
        messages += [say("user", f"{i}: We walk by the lake. " * 2), say("assistant", f"{i}: The cake is in the kitchen. " * 2)]
    return messages


def test_an_embedder_recalls_what_has_no_word_in_common(open_null: Callable[..., Model]) -> None:
    found = []
    for embedder in ("topics", None):
        plugin = TopicPlugin()
        model = open_null("ok", plugins={"topics": plugin}, context=1024, policy="graded", embedder=embedder)
        messages = small_talk(8)
        with model.session(context=300) as session:
            for end in range(2, len(messages) + 1, 2):
                list(session.generate(messages[:end], max_tokens=1, **GREEDY))
            assert "bakery" not in model.detokenize(session.tokens)
            done = done_of(list(session.generate([*messages, say("user", "Where did I leave my automobile?")], max_tokens=1, **GREEDY)))
            found.append(("bakery" in model.detokenize(session.tokens), done.context.recalled_segments))
        assert len(plugin.seen) == len(set(plugin.seen)), "each text once"
        texts = {message["content"] for message in messages} | {"Where did I leave my automobile?"}
        assert set(plugin.seen) == (texts if embedder else set()), "as they were said, without the template"
    assert found == [(True, 1), (False, 0)]


def test_an_embedder_that_fails_is_named_and_leaves_the_session_usable(open_null: Callable[..., Model]) -> None:
    plugin = TopicPlugin()
    model = open_null("ok", plugins={"mine": plugin}, context=1024, embedder="topics")
    messages = small_talk(8)
    with model.session(context=300) as session:
        for end in range(2, len(messages) + 1, 2):
            list(session.generate(messages[:end], max_tokens=1, **GREEDY))
        asked = [*messages, say("user", "Where did I leave my automobile?")]
        plugin.broken = True
        before = list(session.history.evicted)
        with pytest.raises(PluginError, match="plugin mine: embedder topics raised OSError: out of order"):
            session.generate(asked, max_tokens=1, **GREEDY)
        assert cells_of(model, session) == list(session.tokens)
        assert list(session.history.evicted) == before
        plugin.broken = False
        assert done_of(list(session.generate(asked, max_tokens=1, **GREEDY))).context.recalled_segments == 1


def test_an_embedder_is_found_or_refused_when_the_model_is_opened(open_null: Callable[..., Model]) -> None:
    plugins = {"topics": TopicPlugin()}
    with pytest.raises(PluginError, match="no embedder named none, there is topics"):
        open_null(plugins=plugins, embedder="none")
    with pytest.raises(OptionError, match="the policy slide recalls nothing, so an embedder has no use; choose graded, or leave"):
        open_null(plugins=plugins, embedder="topics", policy="slide")


def test_a_conversation_that_goes_back_to_what_left_gets_it_again(open_null: Callable[..., Model]) -> None:
    model = open_null("ok", context=256)
    messages = talk(5)
    with model.session() as session:
        list(session.generate(messages, **GREEDY))
        assert session.history.evicted
        back = messages[:4]  # the second question is the current one again
        done = done_of(list(session.generate(back, **GREEDY)))
        assert done.context.absent_tokens == 0
        assert cells_of(model, session)[: len(model.prompt_tokens(back))] == model.prompt_tokens(back)


def test_positions_never_pass_what_the_model_was_trained_for(open_null: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_null(context=128)
    highest, step = 0, model.engine.step

    def watched(parts: Any) -> Any:
        nonlocal highest
        found = step(parts)
        highest = max(highest, *(model.engine.next_position(part.sequence) for part in parts))  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(model.engine, "step", watched)
    with model.session() as session:
        done = done_of(list(session.generate("Once upon a time", max_tokens=1000, ignore_eos=True, **GREEDY)))
    assert done.usage.completion_tokens == 1000
    assert 100 < highest <= 128


def test_what_comes_back_among_pruned_cells_leaves_room_for_all_that_is_fed_again(
    open_null: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    model = open_null("ok", context=4096)  # so that positions are no limit
    most = watched(model, monkeypatch)
    messages = [say("user", "zebras vex quick fjords"), say("assistant", "Yes."), *talk(7, 20)[1:-1]]
    with model.session(context=256) as session:
        for text, prune in (("go on", None), ("17 + 4?", Pruning(60)), ("zebras vex quick fjords?", None)):
            messages.append(say("user", text))
            use = done_of(list(session.generate(messages, max_tokens=4, prune=prune, **GREEDY))).context
            messages.append(say("assistant", "ok"))
        assert use.recalled_segments == 1
        assert most[0] <= 256
        check_cells(model, session)


@pytest.mark.parametrize(
    ("text", "comes_back"), [("zebras vex quick fjords", 1), ("On 3 June 2023 Ms. Zebra met Mr. Fjord in Quux, Texas.", 0)]
)
def test_gaps_close_for_a_question_about_what_came_back_or_stayed(open_null: Callable[..., Model], text: str, comes_back: int) -> None:
    model = open_null(context=4096)
    engine = model.engine
    assert isinstance(engine, RemovesCells)
    others = (f"On {i} May 2024 Mr. {name * 8} paid {i}00 EUR to Acme Ltd." for i, name in enumerate("ABCDEFGHI", 1))
    messages = [say("system", "Be brief.")]
    messages += [say("user" if i % 2 else "assistant", said) for i, said in enumerate([text, *others], 1)]
    with model.session(context=400) as session:
        for end in range(2, len(messages) + 1, 2):
            list(session.generate(messages[:end], max_tokens=1, **GREEDY))
        assert (text in model.detokenize(session.tokens)) == (not comes_back)
        assert engine.next_position(session._sequence) > engine.length(session._sequence), "while nothing is asked, nothing moves"
        use = done_of(list(session.generate([*messages, say("user", text[:-3])], max_tokens=4, **GREEDY))).context
        assert text in model.detokenize(session.tokens)
        assert use.recalled_segments == comes_back
        assert engine.next_position(session._sequence) == engine.length(session._sequence)


def test_a_question_that_is_too_long_is_named_with_both_numbers(open_null: Callable[..., Model], tmp_path: Path) -> None:
    model = open_null("ok", context=128)
    with model.session() as session:
        list(session.generate([say("system", "Be brief."), say("user", "short")], **GREEDY))
        with pytest.raises(ContextOverflow, match=r"current question 20\d.*room for 127; shorten it or raise --ctx") as caught:
            session.generate([say("system", "Be brief."), say("user", "q" * 200)])
        assert (caught.value.needed, caught.value.available) == (212, 127)
        session.save(tmp_path / "s.session")  # nothing is broken
        assert model.restore(tmp_path / "s.session").history.tokens == session.history.tokens
        assert done_of(list(session.generate([say("user", "short")], **GREEDY))).reason == "end_of_generation"
