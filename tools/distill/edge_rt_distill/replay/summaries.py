"""Traces as wholes: what is in one, and one made of several."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from edge_rt_distill.replay.trace import Request, Trace, kinds

BUSY = 10.0
"""Seconds over which the most requests are counted."""


def joined(parts: Sequence[tuple[str, Trace]], rate: float | None) -> Trace:
    """The requests of several named traces, at their own times, or one after the other at ``rate`` a second. Sessions stay apart; feedback
    stays at its own times.
    """
    requests: list[Request] = []
    for place, (name, trace) in enumerate(parts, 1):
        mark = f"{place}-" if len(parts) > 1 else ""
        requests += [
            one._replace(kind=one.kind or name, session=None if one.session is None else mark + one.session) for one in trace.requests
        ]
    if rate is None:
        requests.sort(key=lambda one: one.at)
    else:
        requests = [one._replace(at=number / rate) for number, one in enumerate(requests)]
    about = dict(parts[0][1].about) if len(parts) == 1 else {"of": [dict(trace.about) for _, trace in parts]}
    feedback = sorted((one for _, trace in parts for one in trace.feedback), key=lambda one: one.at)
    return Trace(tuple(requests), {**about, "imported": [name for name, _ in parts]}, tuple(feedback))


def described(trace: Trace) -> list[str]:
    """What is in a trace, as lines for people."""
    requests = trace.requests
    first, seconds = requests[0].at, requests[-1].at - requests[0].at
    sessions = {one.session for one in requests if one.session is not None}
    lines = [f"{name}: {value}" for name, value in trace.about.items()]
    if "redacted" not in trace.about:
        lines.append("redacted: not said")
    lines.append(f"{len(requests)} requests in {seconds:.1f} s" + (f", {(len(requests) - 1) / seconds:.2f} a second" if seconds else ""))
    times = [one.at for one in requests]
    busiest = max(bisect_left(times, at + BUSY) - place for place, at in enumerate(times))
    lines.append(f"most in {BUSY:g} s: {busiest}" + (f"; begins {first:.1f} s after the recording" if first else ""))
    lines.append("kinds: " + ", ".join(f"{name or 'none'} {count}" for name, count in sorted(kinds(requests).items())))
    lines.append(f"in {len(sessions)} sessions: {sum(one.session is not None for one in requests)}")
    sizes = sorted(_letters(one) for one in requests)
    lines.append(f"letters of prompts, beside what a session said before: median {sizes[len(sizes) // 2]}, most {sizes[-1]}")
    left = sum(one.cancel_after is not None for one in requests)
    lines.append(f"with checks {sum(bool(one.checks) for one in requests)}, left by their clients {left}")
    if trace.feedback:
        lines.append(f"feedback: {len(trace.feedback)}, with corrections {sum(one.correction is not None for one in trace.feedback)}")
    if seen := [one.seen for one in requests if one.seen is not None]:
        ends = {status: sum(one.status == status for one in seen) for status in sorted({one.status for one in seen})}
        lines.append("when recorded: " + ", ".join(f"{status} {count}" for status, count in ends.items()))
    return lines


def _letters(request: Request) -> int:
    """Of texts; what else a prompt may have, such as pictures, counts for nothing."""
    if "prompt" in request.body:
        return len(str(request.body["prompt"]))
    contents = [one.get("content") for one in request.body["messages"]]
    parts = [part for one in contents for part in ([{"text": one}] if isinstance(one, str) else one or ())]
    return sum(len(part["text"]) for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))
