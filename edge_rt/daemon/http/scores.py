"""How likely texts are, over HTTP: ``/v1/completions`` with ``echo``, as OpenAI's first models had it, and ``/edge-rt/score``.

Evaluation tools (lm-evaluation-harness, ``local-completions``) use ``echo`` with ``logprobs`` and ``max_tokens`` of 0 or 1.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt import __version__
from edge_rt.daemon.http.answer import IMPOSSIBLE
from edge_rt.daemon.http.errors import wrong
from edge_rt.daemon.http.request import COMPLETION, IGNORED, MOST_RIVALS, checked, headers, messages_of, texts_of

if TYPE_CHECKING:
    from edge_rt.daemon.frames import Message
    from edge_rt.daemon.http.routes import Exchange

Json = dict[str, Any]
FIELDS: Mapping[str, str] = {
    "model": "text", "prompt": "text", "messages": "maps", "continuations": "texts!", "top_logprobs": "integer",
}  # fmt: skip
"""Of ``/edge-rt/score``."""
MOST_TEXTS = 256


class Asked(NamedTuple):
    """A request that was checked. ``fields``: of ``score``. ``rivals``: to be shown with each token. ``more``: a token behind each text."""

    fields: dict[str, Any]
    model: str | None
    rivals: int
    more: bool = False
    ignored: tuple[str, ...] = ()


def echoes(body: Mapping[str, Any]) -> bool:
    """Whether a request for completions wants its prompts scored."""
    return body.get("echo") is True


def read_echo(body: Mapping[str, Any]) -> Asked:
    """A request for ``/v1/completions`` with ``echo``. Raises ApiError."""
    given, rest = checked({name: value for name, value in body.items() if name != "echo"}, COMPLETION, ("stop", "prompt"))
    rivals, most = given.get("logprobs"), given.get("max_tokens", 16)
    if rivals is None:
        raise wrong("echo", "echo is for scoring a prompt; set logprobs too, or leave echo out", "unsupported_value")
    if given.get("stream"):
        raise wrong("stream", "what is scored comes as a whole; leave stream out", "unsupported_value")
    if most not in (0, 1) or (most == 1 and given.get("temperature", 1) != 0):
        raise wrong("max_tokens", "with echo, max_tokens is 0, or 1 at temperature 0", "unsupported_value")
    fields = {**_prompts(rest.get("prompt")), "top": _rivals("logprobs", rivals), "beyond": most == 1, "pieces": True}
    return Asked(fields, given.get("model"), rivals, most == 1, tuple(name for name in IGNORED if body.get(name) is not None))


def _rivals(name: str, given: int) -> int:
    if not 0 <= given <= MOST_RIVALS:
        raise wrong(name, f"log-probabilities can be of 0 to {MOST_RIVALS} tokens")
    return given


def _prompts(given: Any) -> dict[str, Any]:
    name, prompts = texts_of("prompt", given, MOST_TEXTS)
    if not all(prompts):
        raise wrong("prompt", "one of the prompts is empty and has no likelihood; leave it out", "invalid_type")
    return {name: prompts}


def read_score(body: Mapping[str, Any]) -> Asked:
    """A request for ``/edge-rt/score``. Raises ApiError."""
    given, _ = checked(body, FIELDS, ())
    if ("prompt" in given) == ("messages" in given):
        raise wrong("prompt", "continuations continue a prompt or messages; give one of them", "missing_required_parameter")
    if not 1 <= len(given["continuations"]) <= MOST_TEXTS:
        raise wrong("continuations", f"there are {len(given['continuations'])} continuations; give 1 to {MOST_TEXTS}")
    rivals = _rivals("top_logprobs", given.get("top_logprobs", 0))
    before = {"prompt": given["prompt"]} if "prompt" in given else {"messages": messages_of(given["messages"])}
    return Asked({**before, "continuations": given["continuations"], "top": rivals, "pieces": True}, given.get("model"), rivals)


class Scores:
    """One request, until its answer."""

    def __init__(self, exchange: Exchange, asked: Asked, model: str, *, echo: bool) -> None:
        """``model``: what it is called in the answer."""
        self._exchange, self._asked, self._model, self._echo = exchange, asked, model, echo
        self._scores: list[Message] = []

    def start(self) -> None:
        """Raises ProtocolError."""
        self._exchange.heard = self._heard
        self._exchange.connection.run("score", {**self._asked.fields, "model": self._model}, len(self._exchange.body))

    def _heard(self, message: Message) -> None:
        """Scores of a text, or the end."""
        if message.get("event") == "scored":
            self._scores += message["scores"]
        elif "event" not in message:
            self._exchange.connection.respond_json(self._answer(message["ok"]["tokens"]), headers=headers(self._asked.ignored))

    def _answer(self, tokens: int) -> Json:
        more = len(self._scores) if self._asked.more else 0
        usage = {"prompt_tokens": tokens, "completion_tokens": more, "total_tokens": tokens + more}
        if self._echo:
            head = {"id": f"cmpl-{secrets.token_hex(12)}", "object": "text_completion", "system_fingerprint": f"edge-rt-{__version__}"}
            choices = [self._choice(index, one) for index, one in enumerate(self._scores)]
            return {**head, "created": int(time.time()), "model": self._model, "choices": choices, "usage": usage}
        data = [{"index": index, **self._scored(one)} for index, one in enumerate(self._scores)]
        return {"object": "edge_rt.scores", "model": self._model, "data": data, "usage": usage}

    def _scored(self, score: Message) -> Json:
        found = {"tokens": score["tokens"], "pieces": list(map(_text, score["pieces"])), "logprobs": list(map(_told, score["logprobs"]))}
        return {**found, "top_logprobs": [_named(one) for one in score["top"]]} if self._asked.rivals else found

    def _choice(self, index: int, score: Message) -> Json:
        """As OpenAI's completions had it: the first token's log-probability is null, for nothing is before it."""
        pieces = [score["first"], *score["pieces"]]
        logprobs: list[float | None] = [None, *map(_told, score["logprobs"])]
        rivals: list[Json | None] = [None, *map(_named, score.get("top", ()))]
        if self._asked.more:
            _, logprob, piece = score["beyond"][0]
            pieces.append(piece)
            logprobs.append(_told(logprob))
            rivals.append(_named(score["beyond"][: self._asked.rivals]))
        texts = list(map(_text, pieces))
        *offsets, _ = accumulate(map(len, texts), initial=0)
        shown = {
            "tokens": texts,
            "token_logprobs": logprobs,
            "top_logprobs": rivals if self._asked.rivals else None,
            "text_offset": offsets,
        }
        text = b"".join(pieces).decode(errors="replace")
        return {"index": index, "text": text, "logprobs": shown, "finish_reason": "length"}


def _told(logprob: float) -> float:
    """JSON has no minus infinity."""
    return max(logprob, IMPOSSIBLE)


def _named(rivals: Sequence[Sequence[Any]]) -> dict[str, float]:
    return {_text(piece): _told(logprob) for _, logprob, piece in reversed(rivals)}  # of tokens that look alike the likeliest stays


def _text(piece: bytes) -> str:
    return piece.decode(errors="replace")
