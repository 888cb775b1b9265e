"""Recording of what clients ask and what became of it (docs/daemon.md).

What runs in the daemon's loop is here and takes microseconds; redaction and writing are on the thread of trace.py.
"""

from __future__ import annotations

import hashlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from edge_rt import __version__
from edge_rt.daemon.connection import OVER_HTTP
from edge_rt.daemon.recording.trace import (
    RECORDED_FIELDS,
    Feedback,
    FinishedRequest,
    LineBuilder,
    Redaction,
    TraceFile,
    TraceWriter,
    as_line,
    load_redaction,
)

if TYPE_CHECKING:
    from edge_rt.daemon.config import RecordConfig
    from edge_rt.daemon.connection import ClientConnection
    from edge_rt.daemon.models import ManagedModel
    from edge_rt.daemon.protocol import Message
    from edge_rt.daemon.sessions import ClientSession

SWITCH_EVERY = 0.0005
"""Seconds that redaction may hold Python's lock while the daemon's loop wants it; by default it waits ten times as long."""
_OVERHEAD = 1024  # bytes of a request that waits to be written, beside its texts


class RequestRecorder:
    """One request, from when it came to its end; ``on_message`` takes its events and its answer."""

    def __init__(
        self, fields: Mapping[str, Any], size: int, client: str, hosted: ManagedModel, session: str | None, keeps: bool,
        began: float, clock: Callable[[], float], then: Callable[[FinishedRequest, int], None],
    ) -> None:  # fmt: skip
        """``keeps``: the answer. ``began``: when the recording did, by the clock. ``then`` is called at the end, with the bytes of it."""
        self._fields, self._size, self._client, self._hosted, self._session = fields, size, client, hosted, session
        self._clock, self._then, self._came = clock, then, clock()
        self._at = self._came - began
        self._text: list[str] | None = [] if keeps else None
        self._prompt_tokens: int | None = None
        self._completion_tokens = 0
        self._first_token: float | None = None
        self._left: float | None = None
        self._reason: str | None = None
        self._stop: str | None = None
        self._rules: dict[str, int] = {}

    def on_message(self, message: Message) -> None:
        """An event, or the answer to the request."""
        kind = message.get("event")
        if kind == "delta":
            self._delta(message)
        elif kind == "prompt":
            self._prompt_tokens = message["total"]
        elif kind == "done":
            self._reason, self._stop = message["reason"], message["stop"]
            hits = {one["name"]: sum(one["counts"].values()) for one in message["post"]}
            self._rules = {name: count for name, count in hits.items() if count}
            usage = message["usage"]
            self._prompt_tokens, self._completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
        elif kind is None:
            self.finish(message["error"]["code"] if "error" in message else None)

    def _delta(self, message: Message) -> None:
        count = len(message["tokens"]) + message.get("concealed", 0)
        if count and self._first_token is None:
            self._first_token = self._clock() - self._came
        self._completion_tokens += count
        if self._text is not None:
            self._text.append(message["text"])

    def on_left(self) -> None:
        """The client wants no more of it."""
        if self._left is None:
            self._left = self._clock() - self._came

    def finish(self, code: str | None) -> None:
        """It is over, with the code of an error if it failed."""
        cancelled = self._reason == "cancelled" or code == "cancelled"
        text = None if self._text is None else "".join(self._text)
        found = FinishedRequest(
            self._at, self._fields, self._client, self._session, "cancelled" if cancelled else "ok" if code is None else "error",
            None if cancelled else code, self._reason, self._stop, self._prompt_tokens, self._completion_tokens,
            self._first_token, self._clock() - self._came, self._left if cancelled else None, text,
            self._hosted.template, self._rules,
        )  # fmt: skip
        self._then(found, self._size + len(text or "") + _OVERHEAD)


class Recorder:
    """Takes requests, as many as the settings say. ``chance``: numbers from 0 to 1 for those without a session."""

    def __init__(
        self,
        settings: RecordConfig,
        redaction: Redaction,
        chance: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises OptionError if the file cannot be written."""
        self._settings, self._chance, self._clock, self._began = settings, chance, clock, clock()
        begun = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        header = {
            "edge_rt_trace": 1, "begun": begun, "by": f"edge-rt {__version__}", "redacted": True, "redacted_by": redaction.by,
            "sample": settings.sample, "answers": settings.answers,
        }  # fmt: skip
        file = TraceFile(settings.file, as_line(header), settings.max_bytes, settings.keep)
        self._writer = TraceWriter(file, LineBuilder(redaction, settings.answers), clock)
        self._clients: WeakKeyDictionary[ClientConnection, str] = WeakKeyDictionary()
        self._users: dict[int, str] = {}
        self._names = 0

    def start(
        self, connection: ClientConnection, fields: Mapping[str, Any], size: int, hosted: ManagedModel, session: ClientSession | None
    ) -> RequestRecorder | None:
        """A client asks for a generation. None if it is left out; requests of a session are taken or left together."""
        drawn = self._chance() if session is None else _hash_share(session.id)
        if drawn >= self._settings.sample:
            self._writer.count("left_out")
            return None
        asked = {name: fields[name] for name in RECORDED_FIELDS if name in fields}
        if session is not None:
            asked["model"] = hosted.name
        keeps = self._settings.answers or bool(fields.get("options", {}).get("tools"))  # calls are told by the answer
        named = None if session is None else session.id
        return RequestRecorder(asked, size, self._client(connection), hosted, named, keeps, self._began, self._clock, self._writer.put)

    def feedback(
        self, connection: ClientConnection, fields: Mapping[str, Any], size: int, template: str, then: Callable[[str], object]
    ) -> None:  # fmt: skip
        """A client says something of an answer; none is left out. ``then`` as of ``OutputStream.put``."""
        found = Feedback(self._clock() - self._began, fields, self._client(connection), template)
        self._writer.put(found, size + _OVERHEAD, then)

    def _client(self, connection: ClientConnection) -> str:
        """The alias of the user, or, where several may be one to us, of the connection."""
        user = connection.user
        assert user is not None, "nobody else comes as far as this"
        known = user >= 0 or user < OVER_HTTP
        found = self._users.get(user) if known else self._clients.get(connection)
        if found is None:
            self._names += 1
            found = f"c{self._names}"
            if known:
                self._users[user] = found
            else:
                self._clients[connection] = found
        return found

    @property
    def counts(self) -> Counter[str]:
        """What became of requests: see ``RESULTS`` of writer.py."""
        return self._writer.counts

    def status(self) -> Message:
        return {
            "file": str(self._settings.file), "paused": self._writer.paused, "queued_bytes": self._writer.queued, **self._writer.counts,
        }  # fmt: skip

    def close(self, seconds: float) -> None:
        """Write what is to be written, for so long at most."""
        self._writer.close(seconds)


def open_recorder(settings: RecordConfig) -> Recorder:
    """Raises OptionError, RuleError, PluginError: without redaction, or a file, nothing is recorded."""
    sys.setswitchinterval(SWITCH_EVERY)
    return Recorder(settings, load_redaction(settings.rules))


def _hash_share(name: str) -> float:
    """A number from 0 to 1 that a name stands for."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / (1 << 64)
