"""Templates written out in Python give what Jinja makes of the same text."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.chat import template as chat_template
from edge_rt.chat.template import KNOWN
from edge_rt.errors import ConstraintError

ROLES = st.sampled_from(["system", "user", "assistant", "tool"])
MESSAGES = st.lists(st.tuples(ROLES, st.text(max_size=20)), min_size=1, max_size=5)


@pytest.mark.parametrize("template", KNOWN, ids=["chatml", "smollm2"])
@given(turns=MESSAGES, answer=st.booleans())
def test_the_same_as_jinja(template: str, turns: list[tuple[str, str]], answer: bool) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    known = chat_template.render(template, messages, bos="", eos="", add_generation_prompt=answer)
    # An unused variable makes it another call: that one runs Jinja.
    by_jinja = chat_template.render(template, messages, bos="", eos="", add_generation_prompt=answer, extra={"unused": 1})
    assert known == by_jinja


@pytest.mark.parametrize("template", KNOWN, ids=["chatml", "smollm2"])
def test_messages_without_text_go_to_jinja(template: str) -> None:
    try:
        text = chat_template.render(template, [{"role": "user", "content": None}], bos="", eos="")
    except ConstraintError:
        return  # SmolLM2's adds texts
    assert "None" in text


def test_a_known_template_does_not_load_jinja(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(chat_template, "_compile", None)
    for template in KNOWN:
        chat_template.prepare(template)
        assert "<|im_start|>user" in chat_template.render(template, [{"role": "user", "content": "hi"}], bos="", eos="")
