"""Tool schemas in prompts and in the window: found wherever a template puts them, protected, and there after any eviction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_rt.chat import template as chat_template
from edge_rt.chat.transcript import Span, answer_start, find_spans
from edge_rt.core.context.eviction import protections
from edge_rt.errors import ContextOverflow, OptionError
from edge_rt.model import Model
from edge_rt.native.llama import Vocab
from edge_rt.testing.null_device import NullVocab
from edge_rt.types import Delta, Done, Notice

TEMPLATES = {path.stem: path.read_text() for path in (Path(__file__).parents[1] / "templates").glob("*.jinja")}
TEMPLATES["ignores"] = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Weather, now", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "part", "description": "Find a part", "parameters": {"properties": {"id": {}}}}},
]
GREEDY = {"temperature": 0.0}


def shown(name: str) -> list[str]:
    """The schemas as a template writes them."""
    return [json.dumps(tool, indent=4 if name == "llama31" else None) for tool in TOOLS]


def call(number: int, text: str | None) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps({"place": f"number {number}"})}
    return {"role": "assistant", "content": text, "tool_calls": [{"id": f"{number:09}", "type": "function", "function": function}]}


def result(number: int, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"{number:09}", "content": text}


SAID = st.text("ab .\n\"'", min_size=1, max_size=60) | st.integers(1, 60).map(lambda n: "word " * n) | st.just("the pump is worn " * 4)
EXCHANGE = st.fixed_dictionaries(
    {
        "asked": SAID | st.just(json.dumps(TOOLS[0])) | st.just("weather"),
        "calls": st.booleans(),
        "beside": st.none() | st.just("I look."),
        "result": SAID,
        "answer": SAID | st.just("<think>hm, the pump</think>\n\nThe pump is worn."),
    }
)


def conversation(exchanges: list[dict[str, Any]], system: bool) -> list[dict[str, Any]]:
    """Questions with calls, results and answers; the last answer is left out."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}] if system else []
    for i, exchange in enumerate(exchanges):
        messages.append({"role": "user", "content": exchange["asked"]})
        if exchange["calls"]:
            messages += [call(i, exchange["beside"]), result(i, exchange["result"])]
        messages.append({"role": "assistant", "content": exchange["answer"]})
    return messages[:-1]


def checked(vocab: Vocab, messages: list[dict[str, Any]]) -> tuple[list[str], list[Span]]:
    """The texts of the pieces, which cover the tokens in order."""
    tokens = chat_template.tokenize_messages(vocab, messages, tools=TOOLS)
    found = find_spans(vocab, messages, tokens, TOOLS)
    assert [piece.start for piece in found] == [0, *[piece.end for piece in found[:-1]]]
    assert all(piece.start < piece.end for piece in found)
    assert found[-1].end == len(tokens)
    return [vocab.detokenize(tokens[piece.start : piece.end], special=True).decode(errors="replace") for piece in found], found


def protected_text(texts: list[str], found: list[Span]) -> list[str]:
    """Runs of protected text: of schemas and system prompts, not because they are new."""
    runs = [""]
    for text, reasons in zip(texts, protections([piece.segment for piece in found], share=0), strict=True):
        if {"tool schema", "system prompt"} & set(reasons):
            runs[-1] += text
        else:
            runs.append("")
    return runs


@pytest.mark.parametrize("name", TEMPLATES)
def test_schemas_are_protected_pieces_of_their_own(any_vocab: Vocab, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "find_template", lambda vocab, **options: TEMPLATES[name])

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(EXCHANGE, min_size=1, max_size=5), st.booleans())
    def check(exchanges: list[dict[str, Any]], system: bool) -> None:
        messages = conversation(exchanges, system and name != "gemma")
        texts, found = checked(any_vocab, messages)
        assert len(found) == 1 or any(piece.segment.kind == "schema" for piece in found)
        runs = protected_text(texts, found)
        for schema in shown(name):
            assert any(schema in run for run in runs)
        assert answer_start(found) == found[-1].end
        blank = not all(exchange["asked"].strip() for exchange in exchanges)
        if not blank and "</think>" not in str(messages):  # else messages may not be found, and more is protected
            assert len(found) > 1
            assert sum(map(len, runs)) < sum(map(len, shown(name))) + 600 * (1 + (name == "mistral"))

    check()


def test_each_template_has_its_schemas_where_it_puts_them(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = Vocab.load(smollm2)
    exchanges = [{"asked": f"Question {i}?", "calls": True, "beside": None, "result": "grey", "answer": "It is grey."} for i in range(2)]
    kinds = {
        "qwen25": "system schema system user assistant tool assistant user assistant tool",
        "qwen3": "system schema system user assistant tool assistant user assistant tool",
        "llama31": "system schema system schema user schema assistant tool assistant user assistant tool",
        "mistral": "user tool assistant schema user tool",  # with its system prompt only where a question is last
        "ignores": "system schema system user assistant tool assistant user assistant tool",
    }
    for name, expected in kinds.items():
        monkeypatch.setattr(chat_template, "find_template", lambda vocab, name=name, **options: TEMPLATES[name])
        texts, found = checked(vocab, conversation(exchanges, True))
        assert [piece.segment.kind if piece.segment.kind == "schema" else piece.segment.role for piece in found] == expected.split(), name
        assert json.dumps(TOOLS[1]["function"]["name"]) in "".join(
            text for text, piece in zip(texts, found, strict=True) if piece.segment.kind == "schema"
        )
    vocab.close()


def test_a_turn_with_schemas_stays_a_turn(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What opens and closes the user's turn stays with the schemas in it, though what was asked may leave."""
    vocab = Vocab.load(smollm2)
    monkeypatch.setattr(chat_template, "find_template", lambda vocab, **options: TEMPLATES["llama31"])
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Which pump?"},
    ]  # fmt: skip
    texts, found = checked(vocab, messages)
    asked = next(i for i, piece in enumerate(found) if piece.segment.text == "Hello.")
    assert texts[asked - 1].startswith("<|im_start|>user\n\nHere are functions")
    assert (texts[asked].strip(), texts[asked + 1]) == ("Hello.", "<|im_end|>")
    vocab.close()


def test_what_nobody_can_tell_is_protected_whole(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = Vocab.load(smollm2)
    template = (
        "{% if not tools %}{{ raise_exception('I need tools.') }}{% endif %}{{ tools | tojson }}"
        "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}"
    )
    monkeypatch.setattr(chat_template, "find_template", lambda vocab, **options: template)
    _, found = checked(vocab, [{"role": "user", "content": "What is a pump made of?"}])
    assert [piece.segment.kind for piece in found] == ["system"]
    vocab.close()


# ---- the window ------------------------------------------------------------------------------------------------------


def use_template(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The null engine's vocabulary gets a template, with its own end of turn."""
    template = TEMPLATES[name].replace("<|im_end|>", "<|turn|>")
    monkeypatch.setattr(NullVocab, "chat_template", lambda self, variant=None: None if variant else template)


@pytest.mark.parametrize("policy", ["slide", "graded"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_schemas_stay_in_the_cells(open_null: Callable[..., Model], name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_template(name, monkeypatch)
    model = open_null(context=1500, policy=policy)
    evicted = 0

    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(EXCHANGE, min_size=4, max_size=8), st.booleans(), st.none() | st.integers(1, 40))
    def check(exchanges: list[dict[str, Any]], system: bool, max_tokens: int | None) -> None:
        nonlocal evicted
        with model.session() as session:
            for n in range(1, len(exchanges) + 1):
                unlike = [{**exchange, "asked": f"{i} {exchange['asked']}"} for i, exchange in enumerate(exchanges[:n])]
                messages = conversation(unlike, system and name != "gemma")
                events = list(session.generate(messages, tools=TOOLS, max_tokens=max_tokens, **GREEDY))
                history = session.history
                done = events[-1]
                assert isinstance(done, Done)
                evicted += done.context.evicted_segments
                whole = model.prompt_tokens(messages, TOOLS)
                assert history.tokens[: len(whole)] == whole
                assert list(model.engine._sequences[session._sequence].tokens) == history.resident()  # type: ignore[attr-defined]
                cells = model.vocab.detokenize(session.tokens).decode(errors="replace")
                for schema in shown(name):
                    assert schema in cells

    check()
    assert evicted > 0


def test_schemas_that_move_are_fed_again_from_where_they_were(open_null: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    use_template("mistral", monkeypatch)
    model = open_null("ok")
    messages = [{"role": "user", "content": "First?"}]
    with model.session() as session:
        list(session.generate(messages, tools=TOOLS, **GREEDY))
        messages += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "Second?"}]
        done = list(session.generate(messages, tools=TOOLS, **GREEDY))[-1]
        assert isinstance(done, Done)
        assert done.usage.reused_tokens == len(model.vocab.tokenize("<|begin|>[", special=True))
        cells = model.vocab.detokenize(session.tokens, special=True).decode()
    assert cells.startswith("<|begin|>[INST] First?[/INST] ok<|end|>[AVAILABLE_TOOLS] [")
    assert cells.count("[AVAILABLE_TOOLS]") == 1


def test_schemas_alone_may_be_too_much_and_are_named(open_null: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    use_template("qwen25", monkeypatch)
    with open_null("ok", context=300).session() as session, pytest.raises(ContextOverflow, match=r"must stay .* tokens \(tool schema \d+"):
        session.generate([{"role": "user", "content": "Hi"}], tools=TOOLS)


def test_a_schema_does_not_keep_back_what_the_question_is_about(open_null: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the question's words, as its description of the tool has, and answers nothing."""
    use_template("qwen25", monkeypatch)
    fact, asked = "The seal 6205-2RS of pump P-104 in Leeds was worn on 3 May.", "Which seal of the pump P-104 in Leeds was worn?"
    tool = {"type": "function", "function": {"name": "seal", "description": f"{asked} {asked}"}}
    model = open_null("ok", context=1100)
    messages = [{"role": "user", "content": fact}, {"role": "assistant", "content": "ok"}]
    with model.session() as session:
        for i in range(12):
            messages.append({"role": "user", "content": f"QUESTION {i} XYZ " + "XYZ " * 20})
            messages.append({"role": "assistant", "content": "Mr. X, 3 May, 418 euros"})
            list(session.generate(messages[:-1], tools=[tool], **GREEDY))
        assert fact not in model.detokenize(session.tokens)
        done = list(session.generate([*messages, {"role": "user", "content": asked}], tools=[tool], **GREEDY))[-1]
        assert fact in model.detokenize(session.tokens)
    assert isinstance(done, Done)
    assert done.context.recalled_segments >= 1


# ---- requests --------------------------------------------------------------------------------------------------------


def test_a_template_without_a_place_is_told_once(open_null: Callable[..., Model]) -> None:
    model = open_null("ok")
    with model.session() as session:
        for expected in (True, False):
            events = list(session.generate([{"role": "user", "content": "Hi"}], tools=TOOLS, **GREEDY))
            assert any("no place for tools" in event.message for event in events if isinstance(event, Notice)) == expected
            assert "".join(event.text for event in events if isinstance(event, Delta)) == "ok"
        cells = model.detokenize(session.tokens)
    for schema in shown("ignores"):
        assert schema in cells
    with model.session() as session:
        assert not any(isinstance(event, Notice) for event in session.generate([{"role": "user", "content": "Hi"}], **GREEDY))


def test_what_is_no_tool_is_refused_and_the_session_goes_on(open_null: Callable[..., Model]) -> None:
    with open_null("ok").session() as session:
        with pytest.raises(OptionError, match="a raw text does not; give messages"):
            session.generate("Hi", tools=TOOLS)
        with pytest.raises(OptionError, match="tool 0 is no function schema"):
            session.generate([{"role": "user", "content": "Hi"}], tools=[{"name": "weather"}])
        assert list(session.generate("Hi", **GREEDY))
