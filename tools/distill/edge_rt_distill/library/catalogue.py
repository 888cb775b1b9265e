"""What the library knows of one thing it keeps, and the file name a record can be found by without being read.

A record is one small JSON file. Its id is the SHA-256 of what it says, so it shows damage itself, and adding it twice adds it once.
All that can be asked for stands in the file's name, so a query lists a folder and reads only what it found.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from edge_rt.hooks import DataError, OptionError

KINDS = ("snapshot", "trajectories", "activations", "attention", "errors", "diagnosis", "evaluation")
"""What can be recorded of a model."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,120}")
_MODEL = re.compile(r"[0-9A-Za-z]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MODEL_SHOWN = 16
_DOMAIN_SHOWN = 100


@dataclass(frozen=True)
class Record:
    """One thing in the library.

    ``model``: digest of the model it is of. ``domain``: of the samples, "" for none or all. ``date``: UTC, "2026-11-29T03:33:35Z".
    ``score``: higher is better, None where nothing was scored. ``version``: of the tool that made it. ``arguments``: what it was made with.
    ``objects``: SHA-256 by name. ``facts``: what can be told of it without reading objects (counts, means).
    ``arguments`` and ``facts`` are plain JSON. Raises DataError for what cannot be a record.
    """

    kind: str
    model: str
    domain: str = ""
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"))
    score: float | None = None
    version: str = ""
    seed: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    objects: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(f"{self.kind!r} is no kind of record; choose {', '.join(KINDS)}")
        if not _MODEL.fullmatch(self.model):
            raise DataError(f"{self.model!r} is no digest of a model; it has letters and digits only")
        if self.score is not None and not math.isfinite(self.score):
            raise DataError(f"a score must be finite and not {self.score}; leave it out where there is none")
        try:
            self.domain.encode()
        except UnicodeEncodeError:
            raise DataError(f"{self.domain!r} is no name of a domain; half surrogates are no text") from None
        try:
            datetime.strptime(self.date, "%Y-%m-%dT%H:%M:%SZ")
        except ValueError:
            raise DataError(f"{self.date!r} is no date as 2026-11-29T03:33:35Z; give it in UTC") from None
        for name, digest in self.objects.items():
            if not _NAME.fullmatch(name) or not _DIGEST.fullmatch(digest):  # names become files when a snapshot is exported
                raise DataError(f"object {name!r} of a record needs a plain file name and a SHA-256, and has {digest!r}")

    @cached_property
    def id(self) -> str:
        """32 hexadecimal digits of the SHA-256 over what the record says."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:32]

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal records are equal bytes. Raises DataError for values that JSON cannot hold."""
        data = {name: getattr(self, name) for name in _FIELDS}
        try:
            return json.dumps(data, sort_keys=True, allow_nan=False, separators=(",", ":"), default=_plain).encode() + b"\n"
        except (TypeError, ValueError) as error:
            raise DataError(f"the record cannot be written as JSON: {error}; its arguments and facts must be plain data") from None

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """Raises DataError for what ``to_bytes`` did not write."""
        try:
            found = json.loads(data)
            return cls(**{name: found[name] for name in _FIELDS})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"this is no record of a teacher library ({error}); restore the file or remove it") from None

    @property
    def entry(self) -> Entry:
        """What its name tells."""
        return Entry(self.kind, _compact(self.date), self.model[:_MODEL_SHOWN], self.score, self.id, _slot(self.domain))


_FIELDS = ("kind", "model", "domain", "date", "score", "version", "seed", "arguments", "objects", "facts")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple | set | frozenset):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    raise TypeError(f"{type(value).__name__} is not plain data")


class Entry(NamedTuple):
    """What the name of a record's file tells. ``model`` is the digest's beginning; ``slot`` is the domain as it stands in a file name."""

    kind: str
    date: str
    model: str
    score: float | None
    id: str
    slot: str

    @property
    def file_name(self) -> str:
        """The record's file, in its kind's folder."""
        score = "-" if self.score is None else repr(float(self.score))
        return f"{self.date}_{self.model}_{score}_{self.id}_{self.slot}.json"

    @property
    def domain(self) -> str:
        """The domain, or its hash where it is too long for a name."""
        return unquote(self.slot)

    @classmethod
    def parse(cls, kind: str, file_name: str) -> Entry | None:
        """The inverse of ``file_name``; None for a file that is no record's."""
        stem, dot, end = file_name.rpartition(".")
        parts = stem.split("_", 4)
        if end != "json" or not dot or len(parts) != 5:
            return None
        date, model, score, key, slot = parts
        try:
            found = cls(kind, date, model, None if score == "-" else float(score), key, slot)
        except ValueError:
            return None
        return found if found.file_name == file_name else None


class Query(NamedTuple):
    """What to look for; None: any.

    ``model``: a digest or its beginning. ``since`` and ``until``: a day, or a moment as 2026-11-29T03:33:35Z, both inclusive, UTC.
    ``low``, ``high``: the score, inclusive; records without a score are then left out.
    """

    kind: str | None = None
    model: str | None = None
    domain: str | None = None
    since: str | None = None
    until: str | None = None
    low: float | None = None
    high: float | None = None

    def prepared(self) -> Wanted:
        """Checked, and as names are compared. Raises OptionError."""
        if self.kind is not None and self.kind not in KINDS:
            raise OptionError(f"{self.kind!r} is no kind of record; choose {', '.join(KINDS)}")
        for value in (self.low, self.high):
            if value is not None and not math.isfinite(value):
                raise OptionError(f"a limit of the score must be a finite number and not {value}; leave it out for none")
        since = "" if self.since is None else _moment(self.since, "000000")
        until = "~" if self.until is None else _moment(self.until, "235959")
        slot = None if self.domain is None else _slot(self.domain)
        scored = self.low is not None or self.high is not None
        low, high = (-math.inf if self.low is None else self.low), (math.inf if self.high is None else self.high)
        return Wanted(self.model or "", slot, since, until, scored, low, high)


class Wanted(NamedTuple):
    """A Query made ready."""

    model: str
    slot: str | None
    since: str
    until: str
    scored: bool
    low: float
    high: float

    def has(self, entry: Entry) -> bool:
        """Whether an entry is wanted, as far as its name tells."""
        if not self.since <= entry.date <= self.until or not entry.model.startswith(self.model[:_MODEL_SHOWN]):
            return False
        if self.slot is not None and entry.slot != self.slot:
            return False
        return not self.scored or (entry.score is not None and self.low <= entry.score <= self.high)


def _slot(domain: str) -> str:
    """A domain in a file name. A long one is a hash behind "!", which a quoted text never has."""
    quoted = quote(domain, safe="")
    return quoted if len(quoted) <= _DOMAIN_SHOWN else "!" + hashlib.sha256(domain.encode()).hexdigest()[:24]


def _compact(date: str) -> str:
    return date.replace("-", "").replace(":", "")


def _moment(text: str, day: str) -> str:
    """A day, at time ``day``, or a moment, as names have it."""
    for form, moment in (("%Y-%m-%d", False), ("%Y-%m-%dT%H:%M:%SZ", True)):
        try:
            found = datetime.strptime(text, form)
        except ValueError:
            continue
        return found.strftime("%Y%m%dT%H%M%SZ") if moment else found.strftime("%Y%m%dT") + day + "Z"
    raise OptionError(f"{text!r} is no date; write it as 2026-11-29 or 2026-11-29T03:33:35Z")
