"""Messages are divided where a reader would, and nothing is lost; what must stay is known by reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.core.context.eviction import NEWEST, protections
from edge_rt.core.context.history import LONGEST, SHORT, segments
from edge_rt.errors import OptionError

LONG = "word " * (SHORT // 5 + 1)


def parts(text, role="user"):
    return [(segment.kind, segment.text) for segment in segments([{"role": role, "content": text}])]


PIECES = st.sampled_from(
    ["\n", "\n\n", " \n", "```\n", "~~~~\n", "| a | b |\n", "一句话。", "A sentence. ", "x" * 900, "字" * 900, "\r\n", "\u2028", "\ud800"]
)
TEXTS = st.lists(st.one_of(PIECES, st.text(max_size=20)), max_size=25).map("".join)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool", "developer"]), TEXTS), max_size=4))
def test_the_segments_of_a_message_are_its_text(conversation):
    messages = [{"role": role, "content": text} for role, text in conversation]
    found = segments(messages)
    for i, (role, text) in enumerate(conversation):
        own = [segment for segment in found if segment.message == i]
        assert own, "every message has a segment"
        assert "".join(segment.text for segment in own) == text
        assert all(text[segment.start : segment.end] == segment.text and segment.role == role for segment in own)
        assert all(len(segment.text) <= LONGEST for segment in own if segment.kind == "paragraph")
        assert len(own) == 1 or all(segment.text for segment in own)


def test_a_short_message_is_one_segment():
    assert parts("a\n\nb") == [("message", "a\n\nb")]
    assert parts("") == [("message", "")]
    assert segments([{"role": "assistant", "content": None, "tool_calls": []}])[0].text == ""


def test_a_long_message_is_divided_at_blank_lines():
    assert parts(f"\n \n{LONG}\n\n \nb\nc\n") == [("paragraph", f"\n \n{LONG}\n\n \n"), ("paragraph", "b\nc\n")]


@pytest.mark.parametrize("fence", ["```", "~~~", "````"])
def test_code_and_tables_stay_whole(fence):
    code = f"{fence}python\na\n\n{'x' * LONGEST}\n\nb\n{fence}\n\n"
    table = "| a | b |\n|---|---|\n" + "| c | d |\n" * LONGEST
    assert parts(f"{LONG}\n{code}{table}and so on\n") == [
        ("paragraph", f"{LONG}\n"),
        ("code", code),
        ("table", table),
        ("paragraph", "and so on\n"),
    ]


def test_a_fence_is_closed_only_by_its_like():
    code = f"````\n```\n\n~~~~\n\n{LONG}\n"
    assert parts(code + "````\nafter") == [("code", code + "````\n"), ("paragraph", "after")]
    assert parts(code) == [("code", code)], "one that nobody closes lasts to the end"


@pytest.mark.parametrize("sentence", ["这一句话不长。", "他说：“好！”", "This is it. ", 'He said "no." ', "No full stop here\n"])
def test_a_giant_paragraph_is_divided_at_the_ends_of_sentences(sentence):
    found = parts(sentence * LONGEST)
    assert len(found) > 2
    assert all(kind == "paragraph" and text.endswith(sentence) for kind, text in found)
    assert all(LONGEST - len(sentence) < len(text) <= LONGEST for _, text in found[:-1])


def test_without_sentences_between_words_and_without_words_at_the_bound():
    assert all(text.endswith("word ") for _, text in parts("word " * LONGEST))
    assert [len(text) for _, text in parts("x" * (2 * LONGEST + 1))] == [LONGEST, LONGEST, 1]


def test_kinds_by_role():
    assert parts(f"{LONG}\n\nb", "system") == [("system", f"{LONG}\n\nb")]
    assert [kind for kind, _ in parts(f"{LONG}\n\n```\nb\n```", "tool")] == ["tool", "tool"]
    schema = segments([], [{"name": "查询"}])[0]
    assert (schema.message, schema.kind, schema.text) == (-1, "schema", '{"name": "查询"}')


@pytest.mark.parametrize("message", [{}, {"content": "a"}, {"role": 1, "content": "a"}, {"role": "user", "content": ["a"]}, "user"])
def test_what_is_no_message_is_refused(message):
    with pytest.raises(OptionError, match=r"^message 1 has .*; give it "):
        segments([{"role": "user", "content": "a"}, message])


# ---- protection ------------------------------------------------------------------------------------------------------


def test_reasons():
    texts = [("system", "s" * 50), ("user", "a" * 500), ("assistant", "b" * 300), ("user", "?"), ("assistant", "c" * 149), ("tool", "d")]
    found = segments([{"role": role, "content": text} for role, text in texts], [{}])
    assert protections(found) == [
        ("tool schema",),
        ("system prompt",),
        (),
        (),
        ("current question",),
        ("newest part",),
        ("newest part",),
    ]
    assert protections([]) == []


def test_every_part_of_a_long_question_is_protected():
    found = segments([{"role": "user", "content": f"{LONG}\n\n{LONG}\n\nWhy?"}])
    assert len(found) == 3
    assert all("current question" in reasons for reasons in protections(found))


@given(st.lists(st.text(max_size=50), min_size=1, max_size=20))
def test_the_newest_part_is_the_least_that_covers_its_share(texts):
    found = segments([{"role": "assistant", "content": text} for text in texts])
    total = sum(map(len, texts))
    newest = [len(segment.text) for segment, reasons in zip(found, protections(found), strict=True) if "newest part" in reasons]
    assert sum(newest) >= NEWEST * total
    assert not newest or sum(newest[1:]) < NEWEST * total
