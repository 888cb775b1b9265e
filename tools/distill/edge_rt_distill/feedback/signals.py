"""What a trace tells of answers that were not good: what people said of them, and what they did after them.

=============  ======  ==========================================================================================================
kind           weight  seen by
=============  ======  ==========================================================================================================
corrected      4       feedback has a correction
rated down     2       feedback has the rating -1 and no correction
asked again    1       the user's next message is much like the one before (``similarity`` of ``ALIKE`` or more), in the same session,
                       or from the same client within ``SOON`` seconds of an answer that had ended
cancelled      0.5     the client left after the answer had begun
failed         0.5     the engine failed at it (``BROKEN``)
rule hit       0.5     post-processors changed the answer
=============  ======  ==========================================================================================================

Limits. A question asked again in other words is not seen, nor one of fewer than ``FEWEST`` words or Chinese characters ("go on" is no
complaint). A client that fills one form again and again, slower than its answers come, looks like one who asks again; so does who asks
something else of the same long text. Who left may have read enough. A comment alone says nothing that could be counted.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from edge_rt_distill.data.text import units
from edge_rt_distill.replay.trace import Feedback, Request, Trace

WEIGHTS: Mapping[str, float] = {
    "corrected": 4.0, "rated down": 2.0, "asked again": 1.0, "cancelled": 0.5, "failed": 0.5, "rule hit": 0.5,
}  # fmt: skip
ALIKE = 0.6
SOON = 120.0
FEWEST = 4
BROKEN = ("worker_died", "worker_hung", "native", "internal", "failed")
"""Codes of errors that are the engine's own: others are of loads, limits, and requests that cannot be."""

Message = Mapping[str, Any]


class Case(NamedTuple):
    """An answer that was not good, by one signal.

    ``messages``: what was answered; () where a session's earlier answers were not recorded, or for the text ``prompt``. ``answer``: what
    the model said, "" if that was not recorded. ``correction``: what it should have said, "" if nobody told. ``at``: seconds after the
    trace's begin. ``variant``: see ``Request``.
    """

    kind: str
    messages: tuple[Message, ...]
    answer: str
    correction: str
    at: float
    variant: str
    weight: float
    prompt: str = ""


def cases(trace: Trace) -> list[Case]:
    """All signals of a trace, by time. An answer may have several."""
    talks = conversations(trace.requests)
    again = asked_again(trace.requests)
    found = [one for feedback in trace.feedback for one in _said(feedback)]
    for number, (request, talk) in enumerate(zip(trace.requests, talks, strict=True)):
        prompt = str(request.body.get("prompt", ""))
        found += [
            Case(kind, talk, request.answer or "", "", request.at, request.variant, WEIGHTS[kind], prompt)
            for kind in _kinds(request, number in again)
        ]
    return sorted(found, key=lambda one: one.at)


def _said(feedback: Feedback) -> Iterator[Case]:
    kind = "corrected" if feedback.correction else "rated down" if feedback.rating == -1 else None
    if kind is not None:
        correction, weight = feedback.correction or "", WEIGHTS[kind]
        yield Case(kind, feedback.messages, feedback.answer, correction, feedback.at, feedback.variant, weight, feedback.prompt)


def _kinds(request: Request, again: bool) -> Iterator[str]:
    """The signals of a request itself."""
    if again:
        yield "asked again"
    seen = request.seen
    if seen is None:
        return
    if seen.status == "cancelled" and request.cancel_after is not None and seen.first_token is not None:
        yield "cancelled"
    if seen.status == "error" and seen.code in BROKEN:
        yield "failed"
    if seen.rules:
        yield "rule hit"


def conversations(requests: Sequence[Request]) -> list[tuple[Message, ...]]:
    """What each request asked, with what its session said before: () for a text, and where an earlier answer was not recorded."""
    before: dict[str, tuple[Message, ...] | None] = {}  # by session, with the last answer; None: not known any more
    found: list[tuple[Message, ...]] = []
    for one in requests:
        messages = tuple(one.body.get("messages", ()))
        if one.session is None or not messages:
            found.append(messages)
            continue
        earlier = before.get(one.session, ())
        whole = None if earlier is None else (*earlier, *messages)
        found.append(whole or ())
        before[one.session] = None if whole is None or one.answer is None else (*whole, {"role": "assistant", "content": one.answer})
    return found


def asked_again(requests: Sequence[Request]) -> set[int]:
    """The numbers of requests whose answer was followed by much the same question."""
    found: set[int] = set()
    latest: dict[tuple[str, str], int] = {}  # by session and by client
    for number, one in enumerate(requests):
        keys = [(kind, name) for kind, name in (("session", one.session), ("client", one.client)) if name is not None]
        before = next((latest[key] for key in keys if key in latest and _follows(requests[latest[key]], one, key[0])), None)
        if before is not None and _much_alike(question(requests[before]), question(one)):
            found.add(before)
        latest.update(dict.fromkeys(keys, number))
    return found


def _follows(before: Request, after: Request, by: str) -> bool:
    """Whether what came after may be what somebody thought of the answer before."""
    seen = before.seen
    if seen is not None and (seen.status != "ok" or (seen.total is not None and after.at < before.at + seen.total)):
        return False
    return by == "session" or (before.session == after.session and after.at - before.at - (seen.total or 0.0 if seen else 0.0) <= SOON)


def question(request: Request) -> str:
    """The user's last message, or the prompt; "" if it has no text."""
    if "messages" not in request.body:
        return str(request.body["prompt"])
    asked = [one.get("content") for one in request.body["messages"] if one.get("role") == "user"]
    return asked[-1] if asked and isinstance(asked[-1], str) else ""


def _much_alike(first: str, second: str) -> bool:
    return min(len(units(first)), len(units(second))) >= FEWEST and similarity(first, second) >= ALIKE


def similarity(first: str, second: str) -> float:
    """Jaccard similarity of the runs of three characters of two texts, without case, width and punctuation: 0 to 1.

    For Latin script and Chinese alike: of words there are few in a question, of Chinese words nobody knows the ends.
    """
    left, right = (_trigrams(text) for text in (first, second))
    return len(left & right) / len(left | right)


def _trigrams(text: str) -> set[str]:
    plain = re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    return {plain[at : at + 3] for at in range(max(1, len(plain) - 2))}
