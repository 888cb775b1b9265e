"""Value objects that cross stage borders: what is asked for, and the events that come back.

Named tuples: making a dataclass costs half a millisecond of every start. ``_replace`` gives a changed copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from edge_rt.rules import Rulebook

Message = Mapping[str, Any]
"""One chat message: ``{"role": "system"|"user"|"assistant"|"tool", "content": str, ...}``."""

FinishReason = Literal["end_of_generation", "stop_string", "max_tokens", "context_full", "cancelled"]

PRIORITIES = {"low": 1.0, "normal": 4.0, "high": 16.0}
"""Of requests, with their shares where more is asked than can be done."""


class SamplingParams(NamedTuple):
    """How the next token is chosen; names and defaults are llama.cpp's.

    ``temperature`` 0 means greedy. ``seed`` None draws a fresh one, which the final event reports.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    seed: int | None = None
    logit_bias: Mapping[int, float] = MappingProxyType({})


class Pruning(NamedTuple):
    """How far a request's cells are pruned head by head, and when (docs/context.md).

    ``budget``: what a pass leaves, in cells, in bytes, or as a ``share`` of all tokens that were said (up to 1, and 64 cells at
    least).
    A pass comes when an eighth more cells than that are in use, when the prompt was read (``question``), and after ``every`` tokens
    of the answer (0: not then).
    """

    budget: float
    unit: Literal["cells", "bytes", "share"] = "cells"
    question: bool = True
    every: int = 0


class GenerateOptions(NamedTuple):
    """One request.

    ``max_tokens`` None generates until the model stops or the context is full: the answer is never longer than the context.
    ``context``: cells this request may use (None: what the session or the model allows). ``prune``: prune them (None: never).
    ``logprobs`` n > 0 attaches each token's log-probability and its n likeliest rivals (natural log, before sampling).
    ``speculate`` is the number of tokens an n-gram look-up may draft per step (0: off); it never changes the result.
    ``post`` names post-processors, applied in this order; none: those of the ``rules``, if there are any. ``rules``: their rules, as the
    tables of a rule file, or an ``edge_rt.rules.RuleFile``, of which the request keeps the version that is current when it starts.
    ``tools``: schemas of functions the model may call, as ``{"type": "function", "function": {"name", "description", "parameters"}}``;
    they go to the model's chat template. A call is text of the answer.
    ``adapter``: name of a LoRA adapter of the model, applied ``adapter_scale`` times; None: the model as it is. Another one than the
    session's last request had makes its cells of no use, and they are computed again.
    """

    max_tokens: int | None = None
    stop: Sequence[str] = ()
    sampling: SamplingParams = SamplingParams()
    grammar: str | None = None
    json_schema: Mapping[str, Any] | None = None
    logprobs: int = 0
    speculate: int = 0
    post: Sequence[str] = ()
    rules: Rulebook | Mapping[str, Any] | None = None
    ignore_eos: bool = False
    context: int | None = None
    prune: Pruning | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    adapter: str | None = None
    adapter_scale: float = 1.0


class TokenLogprob(NamedTuple):
    """A token, its log-probability (natural log) and its likeliest rivals, best first."""

    token: int
    text: str
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class PromptProgress(NamedTuple):
    """Prefill went on: ``done`` of the ``total`` prompt tokens that the context will hold are in it, ``reused`` of them were already."""

    done: int
    total: int
    reused: int


class Delta(NamedTuple):
    """Text that can no longer change. ``tokens`` are the ids decoded since the last Delta (their text may still be held back); none where
    a post-processor conceals what the model wrote, as redaction does: ``concealed`` is how many there were then.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    concealed: int = 0


class Queued(NamedTuple):
    """The request waits until there is memory for it: ``needed`` bytes, of which ``available`` could be had now. From a daemon only."""

    reason: str
    needed: int
    available: int


class Notice(NamedTuple):
    """Something a person should know and no one asked for: a fallback, a degraded mode."""

    message: str


class Usage(NamedTuple):
    """Token counts. Of the prompt's, ``reused`` were in the context already and ``computed`` were fed; the rest had left it.

    ``drafted``/``accepted`` count speculation.
    """

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    computed_tokens: int = 0


class Timings(NamedTuple):
    """Seconds. ``first_token`` counts from the request to the first sampled token."""

    first_token: float
    prompt: float
    decode: float

    @property
    def total(self) -> float:
        """Seconds from the request to the last token."""
        return self.first_token + self.decode


class ContextUse(NamedTuple):
    """Cells in use after the request, cells allowed, and what the policy did. Nothing is ever dropped silently.

    ``evicted_segments`` with ``evicted_tokens`` left the context during this request, or never got into it. ``absent_tokens``: of all
    that was said so far, what is not in the context now, whenever it left. ``recalled_segments`` with ``recalled_tokens`` came back to it.
    ``pruned_cells`` left every head of the cache during this request; their tokens are not absent, for each may be left in some heads.
    ``missing_cells``: how many fewer cells than tokens there are after this and earlier passes. ``used``, ``absent_tokens`` and
    ``missing_cells`` add up to all that was said.
    ``released_bytes`` of the cache went back to the system.
    """

    used: int
    allowed: int
    policy: str = "graded"
    evicted_segments: int = 0
    evicted_tokens: int = 0
    absent_tokens: int = 0
    recalled_segments: int = 0
    recalled_tokens: int = 0
    pruned_cells: int = 0
    missing_cells: int = 0
    released_bytes: int = 0


class PostUse(NamedTuple):
    """What a post-processor did in one stream.

    ``counts``: how often it did what, by its own kinds; never any text. ``most_held``: the most characters of its input that it held back
    at once, None if that is not known. ``left_out``: it failed, and the text went on without it. ``conceals``: what it takes out of the
    text must not be known.
    """

    name: str
    counts: Mapping[str, int] = MappingProxyType({})
    most_held: int | None = 0
    left_out: bool = False
    conceals: bool = False


class Done(NamedTuple):
    """The last event of every generation.

    ``rules``: the version of the rules that ``post`` followed, all through. ``answer``: where there are post-processors, what a
    conversation is to go on from: as the model wrote it, or as it left the last of them that conceals.
    """

    reason: FinishReason
    usage: Usage
    timings: Timings
    context: ContextUse
    seed: int
    stop: str | None = None
    post: tuple[PostUse, ...] = ()
    rules: str = ""
    answer: str | None = None


Event = PromptProgress | Delta | Notice | Queued | Done
