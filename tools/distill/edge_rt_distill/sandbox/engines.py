"""Whoever answers items: it writes an answer to messages, and says how likely continuations are. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from edge_rt.hooks import OptionError, resolve_model
from edge_rt_distill.addresses import is_address
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.sandbox.items import Message

if TYPE_CHECKING:
    from edge_rt import Model


class Facts(NamedTuple):
    """What a result is of. ``model``: its file's name. ``engine``: who ran it. ``template``: of the prompts' form: another is another
    variant in every comparison; "" where that is not known."""

    model: str
    engine: str
    template: str


class Engine(Protocol):
    """One model in one runtime. The same question gets the same answer."""

    @property
    def facts(self) -> Facts:
        """What it is."""
        ...

    @property
    def scores(self) -> bool:
        """Whether it gives likelihoods; else items that compare options cannot be asked."""
        ...

    def answer(self, messages: Sequence[Message], tokens: int) -> Answer:
        """The greedy answer of at most so many tokens."""
        ...

    def likelihoods(self, before: str | Sequence[Message], options: Sequence[str]) -> list[float]:
        """The log-likelihood in nats of each option behind a text, or as the answer to messages. Only their differences mean something:
        tokens of the text that an option changes count with it or not."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class InProcess:
    """A GGUF in edge-rt, or with ``engine="llama_cpp"`` in llama.cpp, in this process. Close it."""

    scores = True

    def __init__(self, path: Path, *, engine: str | None = None, compensation: str = "auto", context: int = 2048) -> None:
        """Raises what ``edge_rt.open`` raises."""
        import edge_rt

        self.path = path
        self.model: Model = edge_rt.open(path, engine=engine, compensation=compensation, context=context)

    @property
    def facts(self) -> Facts:
        """See Engine."""
        return Facts(self.path.name, self.model.info.engine, self.model.template)

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


def open_engine(
    target: str, *, engine: str | None = None, model: str | None = None, key_file: Path | None = None, context: int = 2048
) -> Engine:
    """Whoever is to answer: a GGUF or a name of one, a folder of Hugging Face's, or the address of a server (``http://``, ``https://`` or
    ``unix:``). ``engine``: who runs a GGUF. ``model``, ``key_file``: of a server. Raises OptionError, and what opening it raises.
    """
    if is_address(target):
        from edge_rt_distill.sandbox.endpoint import Endpoint

        if engine is not None:
            raise OptionError(f"a server runs its model with an engine of its own; leave --engine {engine} out")
        return Endpoint(target, model=model, key_file=key_file)
    if model is not None or key_file is not None:
        raise OptionError(f"--served-as and --key-file are of servers, and {target} is none; give an address such as http://127.0.0.1:8080")
    if Path(target).is_dir():
        from edge_rt_distill.sandbox.hugging_face import HuggingFace

        return HuggingFace(Path(target))
    return InProcess(resolve_model(Path(target)), engine=engine, context=context)
