"""The trace file: redaction of whole texts, a line of JSON for each request or feedback, and the thread that writes them.

A request is written as a body of OpenAI's API that asks the same again. Serving never waits for the thread: what it has no time for is
left out and counted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import stat
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.daemon.http import openai as request
from edge_rt.daemon.http.openai import FINISH_REASONS, ToolCall, ToolCallParser
from edge_rt.errors import EdgeError, OptionError

if TYPE_CHECKING:
    from edge_rt.postprocess.rules import Ruleset

CHARACTERS_AT_ONCE, PAUSE = 2048, 0.0001
"""Characters that are redacted at once, some 2 ms, and seconds between: who waits lets the daemon's loop have Python's lock."""


class Redaction(NamedTuple):
    """``by``: what conceals, in words. ``names``: of the post-processors in the rules that do; none but these are used."""

    by: str
    rules: Ruleset
    names: tuple[str, ...]

    def text(self, text: str, following: str | None = None) -> str:
        """A whole text; with ``following`` one that was cut off, as ``HandlesCut`` has it. Raises PluginError, which does not quote it."""
        pipeline = self.rules.pipeline(self.names)
        told = []
        for start in range(0, len(text), CHARACTERS_AT_ONCE):
            told.append(pipeline.feed(text[start : start + CHARACTERS_AT_ONCE]))
            time.sleep(PAUSE)
        told.append(pipeline.flush() if following is None else pipeline.cut(following))
        return "".join(told)

    def value(self, value: Any) -> Any:
        """A value as JSON has it: every text in it, names of fields, and numbers that read as secrets.

        Raises PluginError, and ValueError if two names become one.
        """
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            told = {self.text(name): self.value(one) for name, one in value.items()}
            if len(told) < len(value):
                raise ValueError("two names became one")
            return told
        if isinstance(value, (list, tuple)):
            return [self.value(one) for one in value]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            shown = self.text(str(value))
            return value if shown == str(value) else shown
        return value


def load_redaction(file: Path | None) -> Redaction:
    """By the rules in a file, or the usual ones: all kinds that the plugin redaction knows.

    Raises RuleError, PluginError, and OptionError if nothing would be concealed.
    """
    from edge_rt.plugin_host.registry import Registry
    from edge_rt.postprocess.rules import RuleFile, Ruleset

    registry = Registry.load()
    if file is None:
        try:
            rules = Ruleset({"redaction": {}}, registry)
        except EdgeError as error:
            raise OptionError(f"traffic is not recorded without redaction, which cannot be loaded: {error}") from error
    else:
        rules = RuleFile(file, registry, watch=False).current
    names = tuple(name for name in rules.order if registry.post_processor(name).fails_closed)
    if not names:
        raise OptionError(f"{file} has no rules that conceal anything, and traffic is not recorded as it is; add a table [redaction]")
    said = "the usual rules" if file is None else file.name
    return Redaction(f"{', '.join(names)} by {said}, version {rules.version}", rules, names)


CHAT_PATH, COMPLETION_PATH = "/v1/chat/completions", "/v1/completions"
RECORDED_FIELDS = ("model", "prompt", "messages", "options", "priority")
"""Of ``generate``, which a request asks by; the others are the connection's."""
VARIANT = 12  # hexadecimal digits by which forms of prompts are told apart
MAX_SESSIONS = 1024  # sessions whose requests are known to go on from others; of one that was forgotten the next request is written whole


class NotExpressible(Exception):
    """OpenAI's API cannot ask this."""


class FinishedRequest(NamedTuple):
    """A request that has ended. ``at``: seconds since the recording began, ``cancel_after``, ``first_token`` and ``total`` since it came.

    ``session``: its id, which is not written. ``reason``: of the event ``done``. ``stop``: the stop text that was met. ``text``: of the
    answer, None if it was not kept. ``template``: of the model, "" if that is not known. ``rules``: how often each post-processor did
    something.
    """

    at: float
    fields: Mapping[str, Any]
    client: str
    session: str | None
    status: str
    code: str | None
    reason: str | None
    stop: str | None
    prompt_tokens: int | None
    completion_tokens: int
    first_token: float | None
    total: float
    cancel_after: float | None
    text: str | None
    template: str = ""
    rules: Mapping[str, int] = {}


class Feedback(NamedTuple):
    """What somebody says of an answer: the ``fields`` of the operation ``feedback``. ``at`` and ``template`` as of ``Recorded``."""

    at: float
    fields: Mapping[str, Any]
    client: str
    template: str


class LineBuilder:
    """Of one file."""

    def __init__(self, redaction: Redaction, answers: bool) -> None:
        self._redaction, self._answers = redaction, answers
        self._conversations = SessionTracker()

    def forget(self) -> None:
        """A file begins: what is in it does not go on from what is in others."""
        self._conversations.forget()

    def line(self, one: FinishedRequest | Feedback) -> bytes:
        """Raises Unfit, and whatever the redaction does."""
        record = self._feedback(one) if isinstance(one, Feedback) else self._request(one)
        return as_line({name: value for name, value in record.items() if value is not None})

    def _feedback(self, one: Feedback) -> dict[str, Any]:
        told = self._redaction.value(one.fields)
        return {"at": round(one.at, 3), "client": one.client, "variant": variant(one.template, one.fields), "feedback": told}

    def _request(self, one: FinishedRequest) -> dict[str, Any]:
        fields, session = one.fields, None
        if one.session is not None and "messages" in fields:
            session, messages = self._conversations.locate(one.session, fields["messages"])
            fields = {**fields, "messages": messages}
        told = redacted(fields, self._redaction)
        path, body = as_body(told)
        names = _parse_again(path, body, told).tools
        return {
            "at": round(one.at, 3), "path": path, "session": session, "client": one.client, "cancel_after": _milli(one.cancel_after),
            "variant": variant(one.template, one.fields), "request": body, "outcome": _outcome(one, names),
            "answer": self._redaction.text(one.text, _text_after_cut(one)) if self._answers and one.text else None,
        }  # fmt: skip

    def note_written(self, one: FinishedRequest | Feedback) -> None:
        """The line is in the file: what the session asks next may go on from it."""
        if isinstance(one, FinishedRequest) and one.session is not None and "messages" in one.fields:
            self._conversations.note_written(one.session, one.fields["messages"])


def as_line(record: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8, with the end of the line. Raises Unfit for numbers that JSON has not."""
    try:
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise NotExpressible(str(error)) from error
    return text.encode(errors="backslashreplace") + b"\n"  # a half of a surrogate pair becomes JSON's escape


def variant(template: str, fields: Mapping[str, Any]) -> str | None:
    """12 hexadecimal digits that tell one form of prompt from others: of the model's chat template and what the system message says.

    None for a text, which has no form, and where the template is not known.
    """
    if "messages" not in fields or not template:
        return None
    system = [message.get("content") for message in fields["messages"] if message.get("role") == "system"]
    return hashlib.sha256(json.dumps([template, system], sort_keys=True).encode()).hexdigest()[:VARIANT]


def redacted(fields: Mapping[str, Any], redaction: Redaction) -> dict[str, Any]:
    """Fields of ``generate`` as they may be written. Numbers among the options are as they were: seeds look like anything."""
    told = {name: redaction.value(value) for name, value in fields.items() if name != "options"}
    options: Mapping[str, Any] = fields.get("options", {})
    return {**told, "options": {name: one if isinstance(one, (int, float)) else redaction.value(one) for name, one in options.items()}}


def as_body(fields: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The path and the body by which OpenAI's API asks for what ``generate`` does with these fields, if it can: see ``_asked``."""
    options = {name: value for name, value in fields.get("options", {}).items() if value is not None}
    chat = "messages" in fields
    body = {name: fields[name] for name in ("model", "messages", "prompt") if name in fields}
    body |= {name: options.pop(name) for name in ("max_tokens", "stop", "tools", *request.SAME_FIELDS) if name in options}
    if rivals := options.pop("logprobs", 0):
        body |= {"logprobs": True, "top_logprobs": rivals} if chat else {"logprobs": rivals}
    if chat and "json_schema" in options:
        schema = options.pop("json_schema")
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    if "priority" in fields:
        options["priority"] = fields["priority"]
    return CHAT_PATH if chat else COMPLETION_PATH, {**body, "edge_rt": options} if options else body


def _parse_again(path: str, body: Mapping[str, Any], fields: Mapping[str, Any]) -> request.GenerateRequest:
    """What the body asks. Raises Unfit if that is something else than the fields do."""
    try:
        asked = (request.parse_chat if path == CHAT_PATH else request.parse_completion)(body)
    except EdgeError as error:
        raise NotExpressible(str(error)) from error
    if _without_defaults(asked.fields) != _without_defaults(fields):
        raise NotExpressible("it would ask something else")
    return asked


def _without_defaults(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields without those that say nothing: null, no tools, no log-probabilities."""
    found = {name: fields[name] for name in RECORDED_FIELDS if name in fields}
    options = found.get("options", {}).items()
    found["options"] = {name: one for name, one in options if one is not None and (one or name not in ("tools", "logprobs"))}
    if "messages" in found:
        found["messages"] = [{name: one for name, one in message.items() if one is not None} for message in found["messages"]]
    return found


def _outcome(one: FinishedRequest, names: frozenset[str]) -> dict[str, Any]:
    """What became of it, as far as it is known. ``names``: of the functions that were offered."""
    finish = FINISH_REASONS.get(one.reason) if one.reason is not None else None
    if one.reason == "end_of_generation" and any(isinstance(piece, ToolCall) for piece in ToolCallParser(names).feed(one.text or "")):
        finish = "tool_calls"
    found = {
        "status": one.status, "code": one.code, "finish_reason": finish, "prompt_tokens": one.prompt_tokens,
        "completion_tokens": one.completion_tokens, "first_token": _milli(one.first_token), "total": _milli(one.total),
        "rules": dict(one.rules) or None,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def _milli(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _text_after_cut(one: FinishedRequest) -> str | None:
    """None if the answer came to its end; else what is known to follow where it was cut off."""
    if one.reason == "end_of_generation":
        return None
    return one.stop or ""


class SessionTracker:
    """Which requests of sessions go on from others: of these only the messages that are new are written, as the trace's form has it.

    Clients send the whole conversation each time. A request goes on from one that was written if its messages are those, then an answer,
    and then more; any other begins a conversation of its own.
    """

    def __init__(self) -> None:
        self._written: OrderedDict[str, tuple[str, int, bytes]] = OrderedDict()  # by session: alias, messages, their hash
        self._names = 0

    def locate(self, session: str, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[Mapping[str, Any]]]:
        """The conversation's alias, and the messages that are to be written."""
        alias, count, before = self._written.get(session, ("", 0, b""))
        if count and len(messages) > count + 1 and messages[count].get("role") == "assistant" and _hash(messages[:count]) == before:
            return alias, list(messages[count + 1 :])
        return f"s{self._names + 1}", list(messages)

    def note_written(self, session: str, messages: Sequence[Mapping[str, Any]]) -> None:
        """What ``locate`` said of these messages was written."""
        alias, _ = self.locate(session, messages)
        if alias == f"s{self._names + 1}":
            self._names += 1
        self._written[session] = (alias, len(messages), _hash(messages))
        self._written.move_to_end(session)
        if len(self._written) > MAX_SESSIONS:
            self._written.popitem(last=False)

    def forget(self) -> None:
        """Nothing of what was written can be gone on from. Names are not used again."""
        self._written.clear()


def _hash(messages: Sequence[Mapping[str, Any]]) -> bytes:
    return hashlib.sha256(repr(messages).encode(errors="surrogatepass")).digest()


HEADER_START = b'{"edge_rt_trace"'  # of every header, and so of every file that may be appended to
_BLOCK = 1 << 16


class TraceFile:
    """``prepare``, then ``append``, for each line. One thread at a time."""

    def __init__(self, path: Path, header: bytes, max_bytes: int, keep: int) -> None:
        """``header``: the line that begins each file, and goes before what is appended to one that was there. ``keep``: of older files."""
        self.path, self._header, self._max_bytes, self._keep = path, header, max_bytes, keep
        self._file: int | None = None
        self._size = 0

    def prepare(self) -> bool:
        """Open the file, or the next one if it is full; whether a header was written. Raises OSError, OptionError."""
        if self._file is not None and not self._still_there(self._file):
            self.close()
        if self._file is not None and self._size < self._max_bytes:
            return False
        if self._file is None:
            self._open()
        if self._size >= self._max_bytes:
            self._make_way()
            self._open()
        try:
            self.append(self._header)
        except OSError:
            self.close()  # or the next line would follow without
            raise
        return True

    def append(self, line: bytes) -> None:
        """Raises OSError: then nothing of the line is in the file."""
        assert self._file is not None, "it was made ready"
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # what is left makes it another file, and is cut off when that is opened
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _still_there(self, file: int) -> bool:
        """Whether the name still stands for what is open, as we left it."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return False
        opened = os.fstat(file)
        return (found.st_ino, found.st_dev, found.st_size) == (opened.st_ino, opened.st_dev, self._size)

    def _open(self) -> None:
        file = _open_locked(self.path, os.O_CREAT)
        try:
            self._size = _cut_torn_line(file, self.path)
        except BaseException:
            os.close(file)
            raise
        self._file = file

    def _make_way(self) -> None:
        """Rename the file and those before it; the oldest goes."""
        for number in range(self._keep - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self._older(number), self._older(number + 1))
        os.replace(self.path, self._older(1))
        self.close()

    def _older(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


def check_trace_file(path: Path) -> None:
    """Whether one could write there, without doing it. Raises OptionError."""
    try:
        os.close(_open_locked(path, 0))
    except FileNotFoundError as error:
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
            raise cannot_write(path, error) from error
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> OptionError:
    """What to say of a file that cannot be written."""
    reason = (error.strerror or str(error)).lower()
    return OptionError(f"traffic cannot be recorded in {path}: {reason}; name another file, in a folder that is there")


def _open_locked(path: Path, flags: int) -> int:
    """The file, locked. Raises OSError, and OptionError for one that others may read or write, or that is no trace."""
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NONBLOCK | flags, 0o600)
    try:
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode):
            raise OptionError(f"{path} is no file; name another one to record traffic in")
        if facts.st_mode & 0o077 or facts.st_uid != os.getuid():
            raise OptionError(f"others may read {path}, where traffic is to be recorded; chmod 600 it, or name another file")
        if not HEADER_START.startswith(os.pread(file, len(HEADER_START), 0)):
            raise OptionError(f"{path} is something else than recorded traffic; name another file")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OptionError(f"another daemon records traffic in {path}; name another file") from error
    except BaseException:
        os.close(file)
        raise
    return file


def _cut_torn_line(file: int, path: Path) -> int:
    """Cut off a last line that is not whole, which a daemon that was killed has left; the size. Raises OSError."""
    size = end = os.fstat(file).st_size
    while end:
        start = max(0, end - _BLOCK)
        if (last := os.pread(file, end - start, start).rfind(b"\n")) >= 0:
            end = start + last + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
        logging.getLogger("edge_rt.daemon").warning("the last line of %s was not whole: %d bytes were cut off", path, size - end)
    return end


QUEUE_BYTES = 16 << 20  # of requests that wait to be written
RETRY_SECONDS = 5.0  # until it is tried again, after a file could not be written
RESULTS = ("recorded", "left_out", "dropped_queue", "dropped_redaction", "dropped_form", "dropped_disk", "dropped_end")
"""What becomes of a request: written; left out by sampling; dropped as the queue was full, redaction failed, OpenAI's API cannot ask it,
the file cannot be written, or the daemon ended before.
"""


class TraceWriter:
    """``put``, then ``close``. ``counts``: by ``RESULTS``. ``paused``: why nothing can be written now, "" if it can."""

    def __init__(self, file: TraceFile, lines: LineBuilder, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OptionError if the file cannot be written."""
        self._file, self._lines, self._clock = file, lines, clock
        self.counts: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))  # all at once: it is read while others count
        self.paused = ""
        self.queued = 0  # bytes of what waits
        self._retry = 0.0
        self._logged = ""
        self._lock = threading.Lock()
        self._ending = False
        self._queue: SimpleQueue[tuple[FinishedRequest | Feedback, int, Callable[[str], object]] | None] = SimpleQueue()
        try:
            file.prepare()
        except OSError as error:
            raise cannot_write(file.path, error) from error
        self._thread = threading.Thread(target=self._run, name="edge-rt traffic", daemon=True)
        self._thread.start()

    def count(self, result: str) -> None:
        with self._lock:
            self.counts[result] += 1

    def put(self, one: FinishedRequest | Feedback, size: int, then: Callable[[str], object] = lambda result: None) -> None:
        """Have it written, if it has room. ``size``: its bytes, about. ``then`` is called with what became of it, one of ``RESULTS``, on
        any thread; not once the daemon has to end.
        """
        with self._lock:
            fits = self.queued + size <= QUEUE_BYTES
            self.queued += size if fits else 0
        if fits:
            self._queue.put((one, size, then))
        else:
            self.count("dropped_queue")
            then("dropped_queue")

    def close(self, seconds: float) -> None:
        """Write what waits, as far as that is done in some seconds."""
        self._queue.put(None)
        self._thread.join(seconds)
        self._ending = True  # what is under way is the last
        self._thread.join(1.0)
        if left := self.counts["dropped_end"]:
            _log().warning("%d requests were not recorded: the daemon had to end", left)

    def _run(self) -> None:
        while (found := self._queue.get()) is not None:
            one, size, then = found
            result = "dropped_end" if self._ending else self._write(one)
            self.count(result)
            with self._lock:
                self.queued -= size
            if not self._ending:
                then(result)
        self._file.close()

    def _write(self, one: FinishedRequest | Feedback) -> str:
        if self.paused and self._clock() < self._retry:
            return "dropped_disk"
        try:
            if self._file.prepare():
                self._lines.forget()
        except (OSError, OptionError) as error:
            return self._pause(error)
        try:
            line = self._lines.line(one)
        except NotExpressible:
            return "dropped_form"
        except Exception as error:  # whatever it was: nothing is written that was not redacted
            self._log_once(f"a request was not recorded: {_safe_message(error)}")
            return "dropped_redaction"
        try:
            self._file.append(line)
        except OSError as error:
            return self._pause(error)
        self._lines.note_written(one)
        if self.paused:
            self.paused = ""
            self._log_once(f"traffic is recorded again; {self.counts['dropped_disk']} requests were dropped so far")
        return "recorded"

    def _pause(self, error: OSError | OptionError) -> str:
        self.paused = str(cannot_write(self._file.path, error) if isinstance(error, OSError) else error)
        self._retry = self._clock() + RETRY_SECONDS
        self._log_once(f"{self.paused}; requests are not recorded until that is mended")
        return "dropped_disk"

    def _log_once(self, text: str) -> None:
        """In the log, once for what is the same again and again."""
        if text != self._logged:
            self._logged = text
            _log().warning("%s", text)


def _safe_message(error: Exception) -> str:
    """An error without what it may quote: edge-rt's own do not, when text is to be concealed."""
    return str(error) if isinstance(error, EdgeError) else type(error).__name__


def _log() -> logging.Logger:
    return logging.getLogger("edge_rt.daemon")
