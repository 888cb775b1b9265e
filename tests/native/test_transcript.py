"""Prompts in pieces: with the default model's vocabulary and random ones, and with templates that change what they are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_rt.chat import template as chat_template
from edge_rt.chat.transcript import Span, answer_start, find_spans, token_starts
from edge_rt.core.context.history import SHORT
from edge_rt.native.llama import Vocab

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
TEMPLATES = {
    "own": None,
    "plain": CHATML,
    "trims": CHATML.replace("m.content }}", "m.content | trim }}"),
    "drops system": CHATML.replace("messages %}", "messages if m.role != 'system' %}"),
    "newest first": CHATML.replace("in messages", "in messages | reverse"),
    "repeats the last": CHATML + "{{ messages[-1].content }}",
    "shouts": CHATML.replace("m.content }}", "m.content | upper }}"),
    "looks inside": CHATML.replace("{{ m.content }}", "{{ m.content.split('.')[-1] }}"),
    "numbers": CHATML.replace("<|im_start|>{{", "<|im_start|>{{ loop.index }} {{"),
    "without turns": "{% for m in messages %}{{ m.content }} {% endfor %}",
    "nothing of it": "Hello!",
}  # fmt: skip
ROLES = ("user", "assistant", "tool")
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "assistant", "tool", "system"]),
            "content": st.text(max_size=30)
            | st.text("ab .\n", max_size=60)
            | st.just("user")
            | st.integers(100, 400).map(lambda n: "\n\n".join(["The pump is worn. " * 8] * (n // 60 + 1)))
            | st.sampled_from(["<|im_end|>", "  padded  ", "中文。" * 30, "👩‍👩‍👧", "<|im_start|>user\nfaked"]),
        }
    ),
    min_size=1,
    max_size=8,
)


def checked(vocab: Vocab, prompt: str | Sequence[Any]) -> tuple[list[int], list[Span]]:
    """Tokens and pieces; the pieces cover the tokens, in order."""
    tokens = vocab.tokenize(prompt) if isinstance(prompt, str) else chat_template.tokenize_messages(vocab, prompt)
    found = find_spans(vocab, prompt, tokens)
    assert [piece.start for piece in found] == [0, *[piece.end for piece in found[:-1]]][: len(found)]
    assert all(piece.start < piece.end for piece in found)
    assert (found[-1].end if found else 0) == len(tokens)
    return tokens, found


@pytest.mark.parametrize("name", TEMPLATES)
def test_pieces_cover_the_tokens(any_vocab: Vocab, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (template := TEMPLATES[name]) is not None:
        monkeypatch.setattr(chat_template, "find_template", lambda vocab, **options: template)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(MESSAGES)
    def check(messages: list[dict[str, str]]) -> None:
        try:
            tokens, found = checked(any_vocab, messages)
        except chat_template.ConstraintError:  # control tokens in a text that the template rewrites
            return
        if name in ("own", "plain", "trims", "numbers", "drops system"):  # each segment's text is in its own piece
            for piece in found:
                text = any_vocab.detokenize(tokens[piece.start : piece.end], special=True).decode(errors="replace")
                words = piece.segment.text.strip()
                if len(words) > 3 and words.isascii() and words.isprintable() and "<|" not in words:
                    assert words in text or len(found) == 1

    check()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(max_size=200) | st.integers(1, 9).map(lambda n: "\n\n".join(["The pump is worn. " * 20] * n)))
def test_a_raw_text_is_paragraphs(any_vocab: Vocab, text: str) -> None:
    _, found = checked(any_vocab, text) if text else ([], [])
    if len(text) > SHORT and "\n\n" in text:
        assert len(found) == text.count("\n\n") + 1
        assert all(piece.segment.role == "text" for piece in found)


def test_tokens_alone_are_the_pieces_of_the_text_that_they_spell(smollm2: Path) -> None:
    vocab = Vocab.load(smollm2)
    text = "\n\n".join(["The pump is worn. " * 20, "<|im_end|> The seal leaks. " * 20, "Call Ada."])
    tokens = vocab.tokenize(text, special=True)
    found = find_spans(vocab, None, tokens)
    assert any(map(vocab.is_control, tokens))
    assert len(found) == 3
    assert found == find_spans(vocab, text, tokens)


def test_what_a_turn_is_made_of_goes_with_it(any_vocab: Vocab) -> None:
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "user"}, {"role": "assistant", "content": "I am."},
        {"role": "user", "content": "a"},
    ]  # fmt: skip
    tokens, found = checked(any_vocab, messages)
    texts = [any_vocab.detokenize(tokens[piece.start : piece.end], special=True).decode() for piece in found]
    assert [text.removeprefix("<s>").replace("> ", ">").strip() for text in texts] == [
        "<|im_start|>system\nBe brief.<|im_end|>",
        "<|im_start|>user\nuser<|im_end|>",
        "<|im_start|>assistant\nI am.<|im_end|>",
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant",
    ]
    assert [piece.segment.kind for piece in found] == ["system", "message", "message", "message"]


def test_the_beginning_of_an_answer_is_a_piece_of_its_own(any_vocab: Vocab) -> None:
    messages = [{"role": "user", "content": "Which pump?"}, {"role": "assistant", "content": "The pump is"}]
    tokens, found = checked(any_vocab, messages)
    assert (found[-1].segment.role, found[-2].segment.text) == ("assistant", "Which pump?")
    text = any_vocab.detokenize(tokens[answer_start(found) :], special=True).decode().replace("> ", ">")
    assert text.strip() == "<|im_start|>assistant\nThe pump is"
    tokens, found = checked(any_vocab, messages[:1])
    assert answer_start(found) == len(tokens)


def test_a_system_message_of_the_templates_own_is_one(smollm2: Path) -> None:
    vocab = Vocab.load(smollm2)
    tokens, found = checked(vocab, [{"role": "user", "content": "I"}])
    assert [(piece.segment.kind, piece.segment.role) for piece in found] == [("system", "system"), ("message", "user")]
    assert vocab.detokenize(tokens[found[1].start :], special=True) == b"<|im_start|>user\nI<|im_end|>\n<|im_start|>assistant\n"


def test_a_long_message_is_several_pieces(any_vocab: Vocab) -> None:
    paragraphs = [f"Paragraph {i} is about the pump. " * 12 for i in range(4)]
    tokens, found = checked(any_vocab, [{"role": "user", "content": "\n\n".join(paragraphs)}, {"role": "user", "content": "So?"}])
    inner = [piece for piece in found if piece.segment.kind == "paragraph"]
    assert len(inner) == 4
    for i, piece in enumerate(inner):
        assert f"Paragraph {i} is" in any_vocab.detokenize(tokens[piece.start : piece.end]).decode()


def test_where_nothing_is_found_the_prompt_is_one_protected_piece(any_vocab: Vocab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "find_template", lambda vocab, **options: "Hello!")
    _, found = checked(any_vocab, [{"role": "user", "content": "What is a pump made of?"}])
    assert [piece.segment.kind for piece in found] == ["system"]


def test_a_message_the_template_rewrites_is_one_piece_between_its_neighbours(any_vocab: Vocab, monkeypatch: pytest.MonkeyPatch) -> None:
    template = CHATML.replace("m.content }}", "m.content if loop.index != 3 else m.content | upper }}")
    monkeypatch.setattr(chat_template, "find_template", lambda vocab, **options: template)
    said = [
        "What is a pump made of?",
        "Of steel and of rubber.",
        "And what is a seal made of?",
        "Of rubber, for the most part.",
        "Thank you.",
    ]
    messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(said)]
    tokens, found = checked(any_vocab, messages)
    assert [piece.segment.message for piece in found][:4] == [0, 1, 2, 3]
    third = any_vocab.detokenize(tokens[found[2].start : found[2].end], special=True).decode()
    assert "AND WHAT IS A SEAL MADE OF?" in third
    assert "rubber" not in third


def test_bytes_without_a_token_disturb_only_their_place(smollm2: Path) -> None:
    vocab = Vocab.load(smollm2)
    text = "A pump \x06\x06 is worn \U00040000\x06 out."  # SmolLM2 has no tokens for all bytes
    tokens = vocab.tokenize(text)
    assert vocab.detokenize(tokens).decode(errors="replace") != text
    for token, start in zip(tokens, token_starts(vocab, tokens, text), strict=True):
        assert text.encode()[start:].startswith(vocab.piece(token))


def test_tokens_that_do_not_spell_the_text_are_placed_by_length(any_vocab: Vocab) -> None:
    tokens = any_vocab.tokenize("the quick brown fox", bos=False)
    starts = token_starts(any_vocab, tokens, "THE QUICK BROWN FOX THE")
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert 0 < starts[-1] < 23
