"""Events as plain maps and back: what ``--json`` writes, and what the daemon's protocol carries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf, isfinite
from typing import Any, TypeVar

from edge_rt.types import ContextUse, Delta, Done, Event, Notice, PostUse, PromptProgress, Queued, Timings, TokenLogprob, Usage

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
