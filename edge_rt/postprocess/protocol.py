"""What a post-processor is: an incremental transducer of text. The vocabulary of plugins, re-exported by ``edge_rt.hooks``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from edge_rt.postprocess.rules import Rules


@runtime_checkable
class PostProcessor(Protocol):
    """An incremental text transducer, one instance a stream.

    Contract: for every way of splitting a text into pieces, the joined results of ``feed`` and the final ``flush`` are equal;
    what was returned is never taken back; what is held back is bounded; cost is linear in the text. Instances share no state that
    changes. Held to by ``edge_rt.testing.conformance.PostProcessorConformance``.
    """

    def feed(self, text: str) -> str:
        """Take more text and return what can no longer change."""
        ...

    def flush(self) -> str:
        """The text is complete: return the rest. Nothing is fed after it, and a second call returns ``""``."""
        ...


@runtime_checkable
class HoldsText(Protocol):
    """A post-processor that says what it holds back: if it fails, that text goes on without it, and the delay can be reported."""

    @property
    def held(self) -> str:
        """Text it was fed and has not answered for yet, as it was fed."""
        ...


@runtime_checkable
class HandlesCut(Protocol):
    """A post-processor to which it matters that a text was cut off: half a secret is one too. Others are flushed."""

    def cut(self, following: str) -> str:
        """The text ends in the middle: return the rest, once, instead of ``flush``.

        ``following`` is what is known to come next and is not shown (a stop string); ``""``: anything may have come (the token limit,
        a cancel, a full context).
        """
        ...


@runtime_checkable
class CountsWork(Protocol):
    """A post-processor that counts what it did. The counts are reported with the answer, so they must not contain its text."""

    @property
    def counts(self) -> Mapping[str, int]:
        """How often it did what so far, e.g. ``{"email": 2}``."""
        ...


class PostProcessorFactory(NamedTuple):
    """Makes post-processors of one kind.

    ``compile`` is given the processor's own table of a rule file, empty where there is none, and returns a function that makes a
    post-processor for one stream. It is called once for each version of the rules, perhaps on another thread while streams run; all
    that takes long belongs into it. It raises RuleError, best through ``Rules``, for rules that cannot be.

    ``fails_closed``: better no text than text it has not seen. If one fails the stream stops, what is held back stays unsaid, and
    events carry no token ids, which would tell the text.
    """

    name: str
    compile: Callable[[Rules], Callable[[], PostProcessor]]
    description: str = ""
    fails_closed: bool = False
