"""Sessions of a trace: which request continues which, and the whole conversation that is to be sent with each."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from edge_rt_distill.replay.results import Outcome
from edge_rt_distill.replay.targets import Question
from edge_rt_distill.replay.trace import Request


class Talks:
    """The conversations of one run. A turn that failed, or was left before a word of the answer came, is no part of what is sent later."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._run = secrets.token_hex(4)  # a server may still have the sessions of an earlier run
        self._said: dict[str, list[Mapping[str, Any]]] = {}
        last: dict[str, int] = {}
        self.before: dict[int, int] = {}
        """The number of the turn before, of every request that has one."""
        for number, one in enumerate(requests):
            if one.session is not None:
                if one.session in last:
                    self.before[number] = last[one.session]
                last[one.session] = number

    def question(self, number: int) -> Question:
        """A request with all that was said before it, once the turn before is answered.

        A request that brings a conversation itself, with what an assistant said, is sent as it is; so is a prompt that is a text.
        """
        request = self._requests[number]
        if request.session is None:
            return Question(request.path, request.body)
        body = dict(request.body)
        if "messages" in body:
            new = body["messages"]
            whole = any(one.get("role") == "assistant" for one in new[:-1])
            body["messages"] = new if whole else [*self._said.get(request.session, ()), *new]
        return Question(request.path, body, f"replay-{self._run}-{request.session}")

    def answered(self, question: Question, outcome: Outcome) -> None:
        """Remember what came of a request."""
        session = self._requests[outcome.number].session
        if session is None or outcome.status == "error" or (outcome.status == "cancelled" and not outcome.text):
            return
        if "messages" in question.body:  # a template may refuse an answer that is empty
            self._said[session] = [*question.body["messages"], {"role": "assistant", "content": outcome.text or " "}]
