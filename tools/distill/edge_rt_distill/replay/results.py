"""What became of a replay: every request with its moments, readings of the machine, faults that were injected. A file of JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edge_rt.hooks import DataError
from edge_rt_distill.files import write_file

VERSION = 1


class Outcome(NamedTuple):
    """A request of the trace, by its ``number`` there. All moments are seconds after the replay's begin.

    ``due``: when it should have been sent. ``sent``: when it was. ``pieces``: when each piece of the answer came. ``tokens``: how many
    tokens each piece had. ``status``: ok, error, cancelled. ``code``: of an error, the server's or ``connection``, ``timeout``.
    ``prompt_seconds``: for which the server says it read the prompt, None: it does not say.
    """

    number: int
    due: float
    sent: float
    ended: float
    status: str
    code: str = ""
    finish_reason: str = ""
    text: str = ""
    pieces: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    prompt_seconds: float | None = None
    passed: float | None = None
    """What its checks are worth, 0 to 1; None: it has none, or was not answered."""

    @property
    def first(self) -> float | None:
        """Seconds from sending to the first piece of the answer."""
        return self.pieces[0] - self.sent if self.pieces else None


class Reading(NamedTuple):
    """Of the server's processes. ``memory``: bytes (proportional set size where the system tells it). ``energy``: joules so far."""

    at: float
    memory: int | None = None
    energy: float | None = None


class Fault(NamedTuple):
    """What was done to the server, and when. ``said``: what came of doing it."""

    at: float
    what: str
    said: str = ""


class Results(NamedTuple):
    """``target``: what was asked. ``load``: how, e.g. ``open x1`` or ``closed 4``. ``trace``: a digest of the requests.

    ``cold_start``: seconds from starting the server to the first token of its first answer, None: it ran already.
    """

    target: str
    load: str
    trace: str
    outcomes: tuple[Outcome, ...]
    readings: tuple[Reading, ...] = ()
    faults: tuple[Fault, ...] = ()
    cold_start: float | None = None
    about: Mapping[str, Any] = {}


def write_results(path: Path, results: Results) -> None:
    """Raises UserError."""
    record = {"edge_rt_replay": VERSION, **results._asdict(), "about": dict(results.about)}
    for name in ("outcomes", "readings", "faults"):
        record[name] = [one._asdict() for one in getattr(results, name)]
    write_file(path, json.dumps(record, ensure_ascii=False))


def read_results(path: Path) -> Results:
    """Raises DataError for what is no file of results."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if (version := record.pop("edge_rt_replay")) != VERSION:
            raise DataError(f"{path} has results of version {version}, and this tool reads {VERSION}; replay again")
        outcomes = tuple(
            Outcome(**{**one, "pieces": tuple(map(float, one["pieces"])), "tokens": tuple(map(int, one["tokens"]))})
            for one in record.pop("outcomes")
        )
        readings = tuple(Reading(**one) for one in record.pop("readings"))
        faults = tuple(Fault(**one) for one in record.pop("faults"))
        return Results(**record, outcomes=outcomes, readings=readings, faults=faults)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} has no results of a replay ({error!r}); write them with `edge-rt replay run TRACE -o FILE`") from error
