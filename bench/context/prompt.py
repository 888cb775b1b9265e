"""A task or a conversation as tokens in segments, and what of it is kept within a budget, all policies under equal protection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench.context.conversations import Conversation
from bench.context.reader import Reader
from bench.context.tasks import Task
from edge_rt.chat.template import tokenize_messages
from edge_rt.core.context.history import Segment, segments

SINKS = 4
"""First tokens that stay: without them, attention falls apart (Xiao et al., 2024, StreamingLLM)."""
NEWEST = 0.1
"""Share of the budget, from the end of the context, that stays. (Of the context itself, it would be all of a budget of 10 %.)"""


class Prompt(NamedTuple):
    """What is asked after what. ``head``: tokens that stay besides the sinks, a system prompt. ``parts``: tokens of each segment.

    ``question``: tokens from the question to the beginning of its answer, which stay. ``limit``: tokens of the answer.
    """

    head: list[int]
    segments: list[Segment]
    parts: list[list[int]]
    question: list[int]
    limit: int
    seed: int

    @property
    def context(self) -> list[int]:
        """All tokens before the question."""
        return [*self.head, *(token for part in self.parts for token in part)]


def of_task(reader: Reader, task: Task) -> Prompt:
    """A task as plain text, in segments as edge_rt makes them: its paragraphs."""
    found = segments([{"role": "user", "content": task.context}])
    parts = [reader.tokens(segment.text) for segment in found]
    return Prompt([], found, parts, reader.tokens(f"\n\n{task.question}"), task.limit, task.seed)


def of_conversation(reader: Reader, conversation: Conversation, limit: int) -> Prompt:
    """A conversation through the model's chat template, a segment a message; its system prompt is the head.

    Raises RuntimeError for a template that writes earlier messages otherwise once there are later ones.
    """
    system, *said, _ = conversation.messages
    vocab = reader.model.vocab
    so_far: list[int] = []
    parts = []
    for end in range(1, len(said) + 2):
        tokens = tokenize_messages(vocab, [system, *said][:end], add_generation_prompt=False)
        parts.append(_added(so_far, tokens))
        so_far = tokens
    asked = _added(so_far, tokenize_messages(vocab, conversation.messages)) + reader.tokens(conversation.opening)
    head, *parts = parts
    return Prompt(head, segments(said), parts, asked, limit, conversation.seed)


def _added(before: list[int], after: list[int]) -> list[int]:
    if after[: len(before)] != before:
        raise RuntimeError("the model's chat template changes earlier messages: conversations cannot be told apart by message")
    return after[len(before) :]


# ---- what is kept ----------------------------------------------------------------------------------------------------

Rank = Callable[[Prompt], Sequence[float]]
"""A number for each segment: the highest stays longest."""


def kept(prompt: Prompt, budget: int, rank: Rank) -> list[int]:
    """Exactly ``budget`` tokens of the context, or all if they are fewer, in their order.

    The head, the sinks and the newest part of the budget stay. The rest goes to the segments of the highest rank; of the one that no
    longer fits, the end is kept, so that segments ranked by their place give a sliding window. Raises ValueError if the budget does not
    hold what is protected.
    """
    context = prompt.context
    if budget >= len(context):
        return context
    first, last = max(len(prompt.head), SINKS), int(NEWEST * budget)
    if first + last > budget:
        raise ValueError(f"a budget of {budget} tokens does not hold the {first} at the head; give more")
    chosen = set(range(first)) | set(range(len(context) - last, len(context)))
    spans = _spans(prompt)
    ranks = rank(prompt)
    for i in sorted(range(len(spans)), key=lambda i: -ranks[i]):
        loose = [place for place in spans[i] if place not in chosen]
        room = budget - len(chosen)
        chosen.update(loose[-room:] if room < len(loose) else loose)
        if len(chosen) == budget:
            break
    return [token for place, token in enumerate(context) if place in chosen]


def _spans(prompt: Prompt) -> list[range]:
    """Where each segment's tokens stand in the context."""
    found = []
    start = len(prompt.head)
    for part in prompt.parts:
        found.append(range(start, start + len(part)))
        start += len(part)
    return found
