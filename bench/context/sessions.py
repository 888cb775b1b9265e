"""The same conversations through sessions, turn by turn as a chat does: what left, what came back for the question, what was answered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from bench.context.conversations import Conversation
from edge_rt.model import Model
from edge_rt.session import Session
from edge_rt.types import Delta, Done, GenerateOptions, Message, SamplingParams

RECALLING, SLIDING = "graded with recall (session)", "slide (session)"
POLICIES: Mapping[str, str] = {RECALLING: "graded", SLIDING: "slide"}
"""Methods by name: the policies their models are opened with."""
_GREEDY = SamplingParams(temperature=0)
_ENDS = (".", "。", "\n")  # of an answer, as for the methods that read tokens


class Asked(NamedTuple):
    """What a session made of a conversation.

    ``left``: its fact had left the cells before it was asked for. ``there``: it was in them when the answer was given.
    ``recalled``: tokens that came back for the question.
    """

    answer: str
    left: bool
    there: bool
    recalled: int


def converse(model: Model, conversation: Conversation, window: int, limit: int) -> Asked:
    """Hold a conversation in a session of ``window`` cells, which answers the question in ``limit`` tokens, its answer begun for it.

    Every message of the user is a request of its own, so that the fact has been in the cells; what is answered then is not what is
    scripted, and the next request says so.
    """
    messages, opening = conversation.messages, {"role": "assistant", "content": conversation.opening}
    fact = messages[1]["content"]
    with model.session(context=window) as session:
        for end in range(2, len(messages), 2):
            _answered(session, messages[:end], 1)
        left = not _holds(model, session, fact)
        answer, done = _answered(session, [*messages, opening], limit)
        return Asked(answer, left, _holds(model, session, fact), done.context.recalled_tokens)


def _answered(session: Session, messages: tuple[Message, ...] | list[Message], limit: int) -> tuple[str, Done]:
    """The greedy answer to some messages: its first sentence, ``limit`` tokens at most."""
    events = list(session.generate(messages, GenerateOptions(max_tokens=limit, stop=_ENDS, sampling=_GREEDY)))
    done = events[-1]
    assert isinstance(done, Done), "it is always the last event"
    return "".join(event.text for event in events if isinstance(event, Delta)), done


def _holds(model: Model, session: Session, text: str) -> bool:
    """Is a text, whole, in the session's cells?"""
    return text in model.detokenize(session.tokens)
