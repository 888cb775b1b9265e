"""A model behind OpenAI's API: an edge-rt daemon, or any other server.

Likelihoods of given continuations are no part of that API any more. An edge-rt daemon tells them at ``/edge-rt/score``; a server whose
completions still have ``echo`` (vLLM, llama-cpp-python's server) tells them of continued texts, and of messages only if it writes prompts
out (``/apply-template``, llama-server's). Of others only answers are evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_rt.hooks import OptionError, UserError
from edge_rt_distill.asking import Asking
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.sandbox.engines import Facts
from edge_rt_distill.sandbox.items import Message

SECONDS = 600.0
"""For an answer, of which a small device may take minutes."""


class Endpoint:
    """See ``Engine``. Close it."""

    def __init__(self, address: str, *, model: str | None = None, key_file: Path | None = None) -> None:
        """``address``: a URL, or ``unix:PATH`` of a socket. ``model``: which of the server's; its first if left out. ``key_file`` holds the
        key that is sent. Raises UserError if nobody answers, OptionError for a model that is not there.
        """
        self._server = Asking(address, key_file, SECONDS)
        listed = self._server.get("/v1/models").get("data", [])
        names = [str(one.get("id")) for one in listed]
        if model is not None and model not in names:
            raise OptionError(f"{address} has no model {model}; it has {', '.join(names) or 'none'}")
        if model is None and not names:
            raise OptionError(f"{address} has no model; load one there, or name one with --served-as")
        self._model = model or names[0]
        self._ours = any(one.get("owned_by") == "edge-rt" for one in listed)
        self.scores = self._ours or self._echoes()

    @property
    def facts(self) -> Facts:
        """See Engine."""
        template = ""
        if self._ours:
            models = self._server.get("/edge-rt/status").get("models", [])
            template = next((str(one["model"].get("template", "")) for one in models if one["name"] == self._model and one["model"]), "")
        return Facts(self._model, "edge-rt daemon" if self._ours else "openai endpoint", template)

    def answer(self, messages: Sequence[Message], tokens: int) -> Answer:
        """See Engine."""
        body = {"model": self._model, "messages": list(messages), "max_tokens": tokens, "temperature": 0}
        choice = self._server.post("/v1/chat/completions", body)["choices"][0]
        return Answer(choice["message"].get("content") or "", choice.get("finish_reason") == "stop")

    def likelihoods(self, before: str | Sequence[Message], options: Sequence[str]) -> list[float]:
        """See Engine."""
        if self._ours:
            given = {"prompt": before} if isinstance(before, str) else {"messages": list(before)}
            found = self._server.post("/edge-rt/score", {"model": self._model, "continuations": list(options), **given})
            return [float(sum(one["logprobs"])) for one in found["data"]]
        prompt = before if isinstance(before, str) else str(self._server.post("/apply-template", {"messages": list(before)})["prompt"])
        return [self._echoed(prompt, option) for option in options]

    def _echoed(self, prompt: str, option: str) -> float:
        """Tokens that begin behind the prompt count; one that both share belongs to the option."""
        told = self._completed(prompt + option)
        ends = [*told["text_offset"][1:], len(prompt) + len(option)]
        return float(sum(one for one, end in zip(told["token_logprobs"], ends, strict=True) if end > len(prompt) and one is not None))

    def _echoes(self) -> bool:
        try:
            told = self._completed("One two")
        except UserError:
            return False
        return isinstance(told.get("token_logprobs"), list) and len(told["token_logprobs"]) > 1

    def _completed(self, text: str) -> dict[str, Any]:
        body = {"model": self._model, "prompt": text, "echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
        found: dict[str, Any] = self._server.post("/v1/completions", body)["choices"][0].get("logprobs") or {}
        return found

    def close(self) -> None:
        """Leave the server."""
        self._server.close()
