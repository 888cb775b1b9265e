"""Value objects that cross stage borders: requests, the events that come back, their checks, and their form as plain maps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from edge_rt.errors import OptionError

if TYPE_CHECKING:
    from edge_rt.postprocess.rules import Rulebook

# Value objects that cross stage borders: what is asked for, and the events that come back.
#
# Named tuples: making a dataclass costs half a millisecond of every start. ``_replace`` gives a changed copy.

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
    tables of a rule file, or an ``edge_rt.postprocess.rules.RuleFile``, of which the request keeps the version current at its start.
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


# What a request may ask for: keywords over options, and values that are out of range.

_SAMPLING_FIELDS = frozenset(SamplingParams._fields)


def override(options: GenerateOptions, overrides: dict[str, Any]) -> GenerateOptions:
    """Apply keywords to options and to their sampling parameters. Raises OptionError for an unknown one."""
    sampling = {k: overrides.pop(k) for k in list(overrides) if k in _SAMPLING_FIELDS}
    unknown = sorted(set(overrides) - set(GenerateOptions._fields))
    if unknown:
        raise OptionError(f"generate has no option {unknown[0]!r}; see edge_rt.types.GenerateOptions")
    chosen = options._replace(**overrides)
    return chosen._replace(sampling=chosen.sampling._replace(**sampling)) if sampling else chosen


def check_opening(
    context: int | None, threads: int | None, memory: int | None, power: float | None = None, celsius: float | None = None
) -> None:
    """Raise OptionError for what no model can be opened with."""
    if context is not None and context < 1:
        raise OptionError(f"a context of {context} tokens is too small; give at least 1")
    if threads is not None and not 1 <= threads <= 512:
        raise OptionError(f"{threads} threads are out of range; give 1 to 512")
    if memory is not None and memory < 1:
        raise OptionError(f"a memory limit of {memory} bytes is too small; give e.g. 500M")
    if power is not None and not 0 < power <= 10_000:
        raise OptionError(f"a power cap of {power:g} W is out of range; give more than 0 and up to 10000")
    if celsius is not None and not 0 <= celsius <= 150:
        raise OptionError(f"a temperature limit of {celsius:g} degrees Celsius is out of range; give 0 to 150")


def check_context(context: int | None, most: int) -> None:
    """Raise OptionError for a context that the model cannot give."""
    if context is not None and not 1 <= context <= most:
        raise OptionError(f"a context of {context} tokens is out of range; give 1 to {most}, or open the model with a larger one")


def _check_pruning(pruning: Pruning) -> None:
    """Raise OptionError for a budget or an interval that is none."""
    if not 0 < pruning.budget < math.inf or (pruning.unit == "share" and pruning.budget > 1):
        most = "up to 1" if pruning.unit == "share" else "more than 0"
        raise OptionError(f"a pruning budget of {pruning.budget} {pruning.unit} is out of range; give {most}")
    if pruning.every < 0:
        raise OptionError(f"pruning every {pruning.every} tokens makes no sense; give at least 1, or 0 for never")


def check(options: GenerateOptions, max_context: int) -> None:
    """Raise OptionError for values out of range (sampling parameters are checked by the sampler)."""
    check_context(options.context, max_context)
    if options.prune is not None:
        _check_pruning(options.prune)
    if options.max_tokens is not None and options.max_tokens < 1:
        raise OptionError(f"max_tokens is {options.max_tokens}; give at least 1, or leave it out")
    if not 0 <= options.logprobs <= 100:
        raise OptionError(f"logprobs is {options.logprobs}; give 0 to 100")
    if not 0 <= options.speculate <= 64:
        raise OptionError(f"speculate is {options.speculate}; give 0 to 64")
    if isinstance(options.post, str):
        raise OptionError(f"post is the text {options.post!r}; give a list of names")
    if isinstance(options.rules, (str, Path)):
        raise OptionError(f"rules is the name {str(options.rules)!r}; open it with edge_rt.postprocess.rules.RuleFile")
    if options.grammar is not None and options.json_schema is not None:
        raise OptionError("a grammar and a JSON schema contradict each other; give one of them")


# Events as plain maps and back: what ``--json`` writes, and what the daemon's protocol carries.

_T = TypeVar("_T")
_NAMES: Mapping[type, str] = {PromptProgress: "prompt", Delta: "delta", Notice: "notice", Queued: "queued", Done: "done"}


def record(event: Event) -> dict[str, Any]:
    """An event as JSON: its fields and ``event``, its kind. Times are in seconds."""
    if isinstance(event, Delta):  # most events by far
        delta: dict[str, Any] = {"event": "delta", "text": event.text, "tokens": event.tokens}
        if event.logprobs:
            delta["logprobs"] = [_logprob(entry) for entry in event.logprobs]
        if event.concealed:
            delta["concealed"] = event.concealed
        return delta
    found = {"event": _NAMES[type(event)], **_plain(event)}
    if isinstance(event, Done):
        found["timings"]["total"] = event.timings.total
        found["timings"]["tokens_per_second"] = decode_rate(event)
    return found


def event(found: Mapping[str, Any]) -> Event | None:
    """The event that a record is of, None for a kind that this version does not know. Fields it does not know are left out."""
    kind = next((kind for kind, name in _NAMES.items() if name == found["event"]), None)
    if kind is Delta:
        scores = tuple(_scored(entry) for entry in found.get("logprobs", ()))
        return Delta(found["text"], tuple(found["tokens"]), scores, found.get("concealed", 0))
    if kind is Done:
        made = {**found, "usage": _made(Usage, found["usage"]), "timings": _made(Timings, found["timings"])}
        made["context"] = _made(ContextUse, found["context"])
        made["post"] = tuple(_made(PostUse, one) for one in found.get("post", ()))
        return _made(Done, made)
    return None if kind is None else _made(kind, found)


def singles(numbers: Iterable[float]) -> list[float]:
    """Numbers of single precision for JSON: nine digits tell each from its neighbours, and the 17 of double precision say no more."""
    return [float(f"{number:.9g}") for number in numbers]


def _made(kind: type[_T], found: Mapping[str, Any]) -> _T:
    """A named tuple of the fields that it knows."""
    return kind(**{name: found[name] for name in kind._fields if name in found})  # type: ignore[attr-defined]


def _plain(value: Any) -> Any:
    """A value with the named tuples and mappings in it as dictionaries; other tuples stay."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _logprob(entry: TokenLogprob) -> dict[str, Any]:
    """JSON has no infinity: the log-probability of what is impossible is null."""
    top = [(token, logprob if isfinite(logprob) else None) for token, logprob in entry.top]
    return {**entry._asdict(), "logprob": entry.logprob if isfinite(entry.logprob) else None, "top": top}


def _scored(entry: Mapping[str, Any]) -> TokenLogprob:
    top = tuple((token, -inf if logprob is None else logprob) for token, logprob in entry["top"])
    return TokenLogprob(entry["token"], entry["text"], -inf if entry["logprob"] is None else entry["logprob"], top)


def decode_rate(done: Done) -> float | None:
    """Tokens a second after the first one; None where there are too few to tell."""
    more = done.usage.completion_tokens - 1
    return more / done.timings.decode if more > 0 and done.timings.decode > 0 else None
