"""A fact that left the window comes back when it is asked for, on the real model."""

from __future__ import annotations

from pathlib import Path

import pytest

import edge_rt
from edge_rt.types import Delta, Done, Message, Notice

FACT = "The code of the front door is 48213. Remember the code of the front door: 48213."
TALK = [
    ("What a nice day it is. I think I will go for a walk by the lake later.", "That sounds lovely. Enjoy the fresh air."),
    ("My neighbour baked a cake and it smells wonderful in the whole house.", "How kind. I hope you get a piece of it."),
    ("I watched an old film about sailors yesterday, it was rather long.", "Old films have their own charm, I find."),
    ("The garden needs water again, the flowers look thirsty.", "A little water in the evening does them good."),
    ("We might paint the kitchen next month, but we have not chosen yet.", "Take your time, it is a big decision."),
]


def conversation(turns: int) -> list[Message]:
    """The fact, small talk, then the question."""
    messages = [{"role": "system", "content": "You are a helpful assistant."}]
    messages += [{"role": "user", "content": FACT}, {"role": "assistant", "content": "I will remember that."}]
    for i in range(turns):
        said, answered = TALK[i % len(TALK)]
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": "What is the code of the front door?"}]


@pytest.mark.parametrize("policy", ["graded", "slide"])
def test_a_fact_far_back(smollm2: Path, policy: str) -> None:
    messages = conversation(20)
    with edge_rt.open(smollm2, context=320, policy=policy, threads=2) as model, model.session() as session:
        evicted = 0
        for end in range(2, len(messages) + 1, 10):  # as a conversation grows
            events = list(session.generate(messages[:end], max_tokens=1, temperature=0))
            evicted += events[-1].context.evicted_segments if isinstance(events[-1], Done) else 0
        events = list(session.generate(messages, max_tokens=24, temperature=0))
        done = events[-1]
        assert isinstance(done, Done)
        text = "".join(event.text for event in events if isinstance(event, Delta))
        notices = [event.message for event in events if isinstance(event, Notice)]
        assert evicted > 10
        assert done.context.used <= 320
        if policy == "slide":
            assert done.context.recalled_segments == 0
            assert "48213" not in text
            return
        history = session.history
        held = model.detokenize(history.resident())
        assert "48213" in held, "it came back, or never left"
        assert "48213" in text, f"{text!r} {notices}"
