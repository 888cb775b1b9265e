"""A trace: requests with the moments at which they came, as the daemon records them (docs/replay.md) and as generators write them.

JSONL. The first line is a header; every other line is a request in OpenAI's form, with what became of it where that is known, or feedback:
what somebody said of an answer. Times are counted from when the header before them says that it was ``begun`` (RFC 3339). A daemon writes a
header at each start, and in each file: sessions and clients of what was begun at another time are others.
Lists of OpenAI requests (a body a line, or the lines of its batch files) are read too; they come one second after the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from edge_rt.hooks import DataError
from edge_rt_distill.data.checks import check_checks
from edge_rt_distill.data.json_lines import json_lines
from edge_rt_distill.files import write_file

VERSION = 1
PATHS = ("/v1/chat/completions", "/v1/completions")
STATUSES = ("ok", "error", "cancelled")
RATINGS = (-1, 0, 1)


class Seen(NamedTuple):
    """What became of a request when it was recorded. ``code``: of its error. Seconds from its coming, None: not known. ``rules``: how often
    each post-processor did something to the answer.
    """

    status: str
    code: str = ""
    finish_reason: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token: float | None = None
    total: float | None = None
    rules: Mapping[str, int] = {}


class Request(NamedTuple):
    """A request. ``at``: seconds after the trace's begin. ``body``: as it went to ``path``, without ``stream``.

    ``session``: requests of one continue each other: each body has only the messages that are new, and is sent when the one before it is
    answered. ``client``: who asked, without saying who that is. ``cancel_after``: seconds after which the client went away.
    ``checks``: what a right answer holds (data/checks.py). ``kind``: what the request is an example of. ``variant``: which form its prompt
    had, of template and system message, "" if that is not known.
    """

    at: float
    path: str
    body: Mapping[str, Any]
    session: str | None = None
    client: str | None = None
    cancel_after: float | None = None
    checks: tuple[Mapping[str, Any], ...] = ()
    kind: str = ""
    seen: Seen | None = None
    answer: str | None = None
    variant: str = ""


class Feedback(NamedTuple):
    """What somebody said of an ``answer``, to ``messages`` or, if there are none, to the text ``prompt``. ``rating``: -1, 0 or 1, or None.
    ``correction``: what should have been answered. ``at``, ``client`` and ``variant`` as of a request.
    """

    at: float
    answer: str
    messages: tuple[Mapping[str, Any], ...] = ()
    prompt: str = ""
    rating: int | None = None
    correction: str | None = None
    comment: str | None = None
    model: str | None = None
    client: str | None = None
    variant: str = ""


Line = TypeVar("Line", Request, Feedback)


class Trace(NamedTuple):
    """``about``: the header's other fields: who made it, of which model, whether and how it is redacted and sampled.

    Of several headers, what they all say alike, and the earliest ``begun``.
    """

    requests: tuple[Request, ...]
    about: Mapping[str, Any]
    feedback: tuple[Feedback, ...] = ()


def write_trace(path: Path, trace: Trace) -> None:
    """Raises UserError."""
    lines = [{"edge_rt_trace": VERSION, **trace.about}, *map(_record, trace.requests), *map(_told, trace.feedback)]
    write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _record(request: Request) -> dict[str, Any]:
    """A request as a line has it: what is not known is left out."""
    found = {name: value for name, value in request._asdict().items() if value not in (None, "", ())}
    found["request"] = dict(found.pop("body"))
    if request.seen is not None:
        seen = {**found.pop("seen")._asdict(), "rules": dict(request.seen.rules)}
        found["outcome"] = {name: value for name, value in seen.items() if value not in (None, "", {})}
    return found


def _told(feedback: Feedback) -> dict[str, Any]:
    found = {name: value for name, value in feedback._asdict().items() if value not in (None, "", ()) or name == "answer"}
    around: dict[str, Any] = {name: found.pop(name) for name in ("at", "client", "variant") if name in found}
    return {**around, "feedback": found}


def read_trace(path: Path, *, of_requests: bool = True) -> Trace:
    """A trace, or a list of OpenAI requests. Raises DataError with the line of the first mistake, and for a file without requests, or,
    unless it must be ``of_requests``, without feedback either.
    """
    headers: list[Mapping[str, Any]] = []
    requests: list[tuple[Mapping[str, Any], Request]] = []  # each with its header
    feedback: list[tuple[Mapping[str, Any], Feedback]] = []
    for number, record in json_lines(path):
        try:
            if not isinstance(record, dict):
                raise DataError("it is no JSON object")
            if "edge_rt_trace" in record:
                headers.append(_header(record, headers))
                continue
            header = headers[-1] if headers else {}
            if "feedback" in record:
                feedback.append((header, _feedback(record)))
                continue
            read = _request(record) if "request" in record else _foreign(record, float(len(requests)))
            requests.append((header, read))
        except DataError as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    if not requests and (of_requests or not feedback):
        raise DataError(f"{path} has no requests{'' if of_requests else ' and no feedback'}")
    return Trace(_placed(headers, requests), _about(headers), _placed(headers, feedback))


def _header(record: Mapping[str, Any], before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if record["edge_rt_trace"] != VERSION:
        raise DataError(f"the trace is of version {record['edge_rt_trace']!r}, and this tool reads {VERSION}")
    if "begun" in record or before:
        for one in (record, *before):
            _begun(one)
    return {name: value for name, value in record.items() if name != "edge_rt_trace"}


def _begun(header: Mapping[str, Any]) -> datetime:
    """When the times of what follows a header begin."""
    given = header.get("begun")
    try:
        found = datetime.fromisoformat(given.replace("Z", "+00:00") if isinstance(given, str) else "")
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise DataError(f"a header has {given!r} for begun; give a time as 2026-01-31T12:00:00.000Z")
    return found


def _placed(headers: Sequence[Mapping[str, Any]], lines: Iterable[tuple[Mapping[str, Any], Line]]) -> tuple[Line, ...]:
    """Requests or feedback on one clock and in its order, with sessions and clients told apart."""
    placed: Iterable[Line] = (one for _, one in lines)
    if len(headers) > 1:
        times = sorted({_begun(header) for header in headers})
        placed = (_moved(one, (begun := _begun(header or headers[0])) - times[0], times.index(begun)) for header, one in lines)
    return tuple(sorted(placed, key=lambda one: one.at))


def _moved(one: Line, later: timedelta, run: int) -> Line:
    """A line of the recording of this number among those of a trace."""
    mark = f".{run + 1}" if run else ""
    moved = one._replace(at=one.at + later.total_seconds(), client=one.client and f"{one.client}{mark}")
    return moved._replace(session=moved.session and f"{moved.session}{mark}") if isinstance(moved, Request) else moved


def _about(headers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What all headers say alike."""
    if len(headers) < 2:
        return dict(*headers)
    first = min(headers, key=_begun)
    return {name: one for name, one in first.items() if name == "begun" or all(header.get(name) == one for header in headers)}


_REQUEST = ("at", "path", "request", "session", "client", "cancel_after", "checks", "kind", "outcome", "answer", "variant")
_FEEDBACK = ("messages", "prompt", "answer", "rating", "correction", "comment", "model")


def _request(record: Mapping[str, Any]) -> Request:
    _only("a request", record, _REQUEST)
    checks = record.get("checks", [])
    check_checks(checks)
    return Request(
        at=_seconds(record, "at") or 0.0,
        path=_path(record.get("path", PATHS[0])),
        body=_body(record["request"], record.get("path", PATHS[0])),
        session=_text(record, "session"),
        client=_text(record, "client"),
        cancel_after=_seconds(record, "cancel_after"),
        checks=tuple(checks),
        kind=_text(record, "kind") or "",
        seen=_seen(record["outcome"]) if record.get("outcome") is not None else None,
        answer=_text(record, "answer"),
        variant=_text(record, "variant") or "",
    )


def _only(what: str, record: Mapping[str, Any], known: Sequence[str]) -> None:
    if unknown := sorted(record.keys() - set(known)):
        raise DataError(f"{what} has no {unknown[0]!r}; it has {', '.join(sorted(known))}")


def _feedback(record: Mapping[str, Any]) -> Feedback:
    _only("a line of feedback", record, ("at", "client", "variant", "feedback"))
    said = record["feedback"]
    if not isinstance(said, dict):
        raise DataError("its feedback is no JSON object")
    _only("feedback", said, _FEEDBACK)
    rating, answer = said.get("rating"), _text(said, "answer")
    if answer is None or ("messages" in said) == ("prompt" in said):
        raise DataError("its feedback is not of an answer to messages or to a prompt")
    if rating is not None and (isinstance(rating, bool) or rating not in RATINGS):
        raise DataError(f"rating is {rating!r}; give -1, 0 or 1")
    body = _body({name: said[name] for name in ("messages", "prompt") if name in said}, PATHS["prompt" in said])
    return Feedback(
        at=_seconds(record, "at") or 0.0,
        answer=answer,
        messages=tuple(body.get("messages", ())),
        prompt=_text(said, "prompt") or "",
        rating=rating,
        correction=_text(said, "correction"),
        comment=_text(said, "comment"),
        model=_text(said, "model"),
        client=_text(record, "client"),
        variant=_text(record, "variant") or "",
    )


def _foreign(record: Mapping[str, Any], at: float) -> Request:
    """A line of an OpenAI batch file, or a bare body."""
    if "body" in record:
        if record.get("method", "POST") != "POST":
            raise DataError(f"its method is {record['method']!r}; only POST has a body to send")
        path = _path(record.get("url", PATHS[0]))
        return Request(at, path, _body(record["body"], path))
    path = PATHS[0] if "messages" in record else PATHS[1]
    return Request(at, path, _body(record, path))


def _path(value: Any) -> str:
    if value not in PATHS:
        raise DataError(f"its path is {value!r}; choose {' or '.join(PATHS)}")
    return str(value)


def _body(value: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError("its request is no JSON object")
    wanted = "messages" if path == PATHS[0] else "prompt"
    if not value.get(wanted):
        raise DataError(f"its request has no {wanted}")
    if wanted == "messages" and not (isinstance(value["messages"], list) and all(isinstance(one, dict) for one in value["messages"])):
        raise DataError("its messages are no list of objects")
    return {name: one for name, one in value.items() if name not in ("stream", "stream_options")}


def _seen(record: Any) -> Seen:
    if not isinstance(record, dict) or record.get("status") not in STATUSES:
        raise DataError(f"its outcome has no status of {', '.join(STATUSES)}")
    rules = record.get("rules", {})
    if not isinstance(rules, dict):
        raise DataError(f"rules is {rules!r}; give a map of numbers")
    return Seen(
        record["status"], _text(record, "code") or "", _text(record, "finish_reason") or "",
        _count(record, "prompt_tokens"), _count(record, "completion_tokens"), _seconds(record, "first_token"), _seconds(record, "total"),
        {name: count for name in rules if (count := _count(rules, name))},
    )  # fmt: skip


def _seconds(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9):
        raise DataError(f"{name} is {value!r}; give seconds, 0 or more")
    return None if value is None else float(value)


def _count(record: Mapping[str, Any], name: str) -> int | None:
    value = record.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise DataError(f"{name} is {value!r}; give a whole number")
    return value


def _text(record: Mapping[str, Any], name: str) -> str | None:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{name} is {value!r}; give a text")
    return value


def kinds(requests: Iterable[Request]) -> dict[str, int]:
    """How many requests there are of each kind."""
    found: dict[str, int] = {}
    for one in requests:
        found[one.kind] = found.get(one.kind, 0) + 1
    return found


def digest(requests: Iterable[Request]) -> str:
    """Of what is asked, when, and how it is judged; not of what came of it when it was recorded."""
    lines = (json.dumps(one._replace(seen=None, answer=None), sort_keys=True) for one in requests)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
