"""Conversations that a model makes up: it continues its template where a user speaks, then answers its own question.

After Magpie (Xu et al. 2024, arXiv:2406.08464). What a model was aligned with comes out again, so that a student learns to answer what
this teacher is asked and not only to continue the texts at hand.
"""

from __future__ import annotations

from itertools import takewhile

from edge_rt.hooks import OptionError
from edge_rt_distill.data.batches import turn_end
from edge_rt_distill.data.samples import Message, Sample, can_be_read, make_sample
from edge_rt_distill.model.generate import generate
from edge_rt_distill.model.load import Teacher
from edge_rt_distill.model.tokens import Tokeniser
from edge_rt_distill.progress import Told, quiet

QUESTION = 128
"""Tokens of a question. One that did not end by then is not asked."""


def made_up(teacher: Teacher, count: int, tokens: int, *, seed: int = 0, told: Told = quiet) -> list[Sample]:
    """Up to ``count`` conversations of a question and an answer of at most ``tokens`` tokens. Raises OptionError for a model without a
    template, or one that begins with what the user says.
    """
    tokeniser = teacher.tokeniser
    end = turn_end(tokeniser)
    opening = before_question(tokeniser)
    asked = generate(
        teacher.model, [opening] * count, tokens=QUESTION, seed=seed, end=end, batch=32, told=lambda done, most: told(done, 2 * most)
    )  # fmt: skip
    questions = [tokeniser.decode(one.tokens[:-1]).strip() for one in asked if one.ended]
    questions = list(dict.fromkeys(filter(can_be_read, questions)))
    prompts = [tokeniser.chat([{"role": "user", "content": one}], answer=True) for one in questions]
    answers = generate(
        teacher.model, prompts, tokens=tokens, seed=seed, end=end, batch=32, told=lambda done, most: told(most + done, 2 * most)
    )  # fmt: skip
    texts = [tokeniser.decode(one.tokens[:-1] if one.ended else one.tokens).strip() for one in answers]
    return [
        make_sample((Message("user", one), Message("assistant", text)), source="the teacher itself", domain="general")
        for one, text in zip(questions, texts, strict=True)
        if can_be_read(text)
    ]


def before_question(tokeniser: Tokeniser) -> list[int]:
    """The tokens of a conversation up to where the user's first words stand. Raises OptionError if there are none."""
    one, other = (tokeniser.chat([{"role": "user", "content": word}], answer=False) for word in ("a", "Z"))
    opening = [token for token, _ in takewhile(lambda both: both[0] == both[1], zip(one, other, strict=False))]
    if not opening:
        raise OptionError("the teacher's template has nothing before a question, so it cannot make one up; set data.chats to 0")
    return opening
