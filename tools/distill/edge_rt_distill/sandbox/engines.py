"""Whoever answers items: it writes an answer to messages, and says how likely continuations are. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from edge_rt_distill.data.answers import Answer
from edge_rt_distill.sandbox.items import Message

if TYPE_CHECKING:
    from edge_rt import Model


class Facts(NamedTuple):
    """What a result is of. ``model``: its file's name. ``engine``: who ran it. ``template``: of the prompts' form: another is another
    variant in every comparison."""

    model: str
    engine: str
    template: str


class Engine(Protocol):
    """One model in one runtime. The same question gets the same answer."""

    @property
    def facts(self) -> Facts:
        """What it is."""
        ...

    def answer(self, messages: Sequence[Message], tokens: int) -> Answer:
        """The greedy answer of at most so many tokens."""
        ...

    def likelihoods(self, before: str | Sequence[Message], options: Sequence[str]) -> list[float]:
        """The log-likelihood in nats of each option behind a text, or as the answer to messages. What all options begin with behind a
        text counts in none."""
        ...


class InProcess:
    """A GGUF in edge-rt, or with ``engine="llama_cpp"`` in llama.cpp, in this process. Close it."""

    def __init__(self, path: Path, *, engine: str | None = None, compensation: str = "auto", context: int = 2048) -> None:
        """Raises what ``edge_rt.open`` raises."""
        import edge_rt

        self.path = path
        self.model: Model = edge_rt.open(path, engine=engine, compensation=compensation, context=context)

    @property
    def facts(self) -> Facts:
        """See Engine."""
        template = self.model.file.header.get("tokenizer.chat_template")
        return Facts(self.path.name, self.model.info.engine, hashlib.sha256(str(template).encode()).hexdigest()[:12])

    def answer(self, messages: Sequence[Message], tokens: int) -> Answer:
        """See Engine."""
        with self.model.session() as session:
            *events, done = session.generate(list(messages), max_tokens=tokens, temperature=0.0)
        text = "".join(getattr(event, "text", "") for event in events)  # only some have text: what is written
        return Answer(text, getattr(done, "reason", "") == "end_of_generation")

    def likelihoods(self, before: str | Sequence[Message], options: Sequence[str]) -> list[float]:
        """See Engine."""
        tokens, continuations = self.model.continuations(before if isinstance(before, str) else list(before), options)
        return [float(one.sum()) for one in self.model.continuation_logprobs(tokens, continuations)]

    def close(self) -> None:
        """Let go of the model."""
        self.model.close()

