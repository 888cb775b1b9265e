"""Samples: read from JSONL and text files, each with where it came from; every broken line is told by number and reason.

A line of JSONL is one of (types.py has the details)
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"prompt": "...", "response": "..."}
    {"custom_id": "...", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}      an OpenAI request
    {"text": "..."}
with ``domain``, ``language``, ``source``, ``licence``, ``split`` and ``checks`` (data/checks.py) where known.
Text files (.txt, .md) become passages.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from edge_rt.hooks import DataError
from edge_rt_distill.data.text import language_of, passages

MAX_LINE = 4 << 20
"""Bytes of a line. A longer one is no sample but a file without line ends, and would not fit a context by far."""
MAX_TEXT = 256 << 20
"""Bytes of a text file, which is read whole."""
RECORDS = frozenset({".jsonl", ".ndjson"})
TEXTS = frozenset({".txt", ".text", ".md"})
DEMO = Path(__file__).with_name("demo")
DOMAINS = ("finance", "government", "healthcare", "education", "legal", "retail", "manufacturing", "telecom")
_BOMS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_WAY_OUT = "one JSON object a line with messages, prompt and response, or text"


class Message(NamedTuple):
    """``role``: system, user or assistant."""

    role: str
    content: str


class Sample(NamedTuple):
    """A conversation (``messages``) or a passage (``text``), never both, and what is known of it."""

    id: str
    """The first 16 hex digits of the SHA-256 of the content (``sample_id``): the same content has the same id everywhere."""
    messages: tuple[Message, ...]
    text: str
    domain: str
    language: str
    source: str
    split: str = "train"
    """``train``, or ``evaluation`` for what must never be trained on (splits.py)."""
    checks: tuple[dict[str, Any], ...] = ()
    """What can be verified of an answer to the last question (data/checks.py)."""
    file: str = ""
    line: int = 0
    """Where it was read: the line of JSONL, or the number of the passage in a text file."""
    licence: str = ""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The messages up to the last question: what a model is asked to answer. Empty for a passage."""
        last = max((index for index, message in enumerate(self.messages) if message.role == "user"), default=-1)
        return self.messages[: last + 1]

    @property
    def answer(self) -> str:
        """The reference answer to the last question, or ""."""
        return self.messages[-1].content if self.messages and self.messages[-1].role == "assistant" else ""

    @property
    def content(self) -> str:
        """All that was said, without what the system was told: that is a setting, the same in many samples."""
        return self.text or "\n".join(message.content for message in self.messages if message.role != "system")


class Problem(NamedTuple):
    """Why a line is not a sample. ``line`` counts from 1; 0 is the whole file."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


class Samples(NamedTuple):
    samples: list[Sample]
    problems: list[Problem]
    duplicates: int = 0
    """Samples left out because an earlier one has the very same content."""


def sample_id(messages: Iterable[Message], text: str) -> str:
    """The id of a content: of its JSON without spaces, as UTF-8."""
    content: Any = text or [[message.role, message.content] for message in messages]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()[:16]


def can_be_read(text: str) -> bool:
    """Whether a sample may hold what a model wrote, which can be blank or have zero characters, at which tokenisers stop."""
    return bool(text.strip()) and "\0" not in text


def make_sample(messages: Iterable[Message] = (), text: str = "", **known: Any) -> Sample:
    """A sample of a content and what is known of it: ``domain`` (else "general"), ``language`` (else by script), ``source`` ..."""
    messages = tuple(messages)
    known["language"] = known.get("language") or language_of(text or "".join(message.content for message in messages))
    known["domain"] = known.get("domain") or "general"
    return Sample(sample_id(messages, text), messages, text, source=known.pop("source", ""), **known)


def read_samples(
    paths: Iterable[str | Path] | str | Path,
    *,
    policy: Literal["skip", "stop"] = "skip",
    told: Callable[[Problem], None] | None = None,
    minimum: int = 2,
    encoding: str = "utf-8",
    passage: int = 1500,
) -> Samples:
    """The samples of files, folders (all files of known kinds in them) and globs, in the order of their names.

    ``policy``: a broken line is skipped, told to ``told`` and listed in the result; or stops everything. ``encoding``: of files
    without a byte order mark; one of UTF-8 or UTF-16 is believed. ``passage``: letters in a passage of a text file.
    Raises ``DataError`` for files that are not there or of no known kind, fewer than ``minimum`` samples, and a problem if it stops.
    """
    if policy not in ("skip", "stop"):
        raise DataError(f"{policy!r} is no policy for broken lines; choose skip or stop")
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise DataError(f"{encoding!r} is no encoding known here; utf-8 and gb18030 are the usual ones") from None
    seen: set[str] = set()
    result = Samples([], [])
    duplicates = 0
    files = _files([paths] if isinstance(paths, (str, Path)) else list(paths))
    for file in files:
        for item in _read(file, encoding, passage):
            if isinstance(item, Problem):
                if policy == "stop":
                    raise DataError(f"{item}; mend it, or skip broken lines with the policy skip")
                result.problems.append(item)
                if told is not None:
                    told(item)
            elif item.id in seen:
                duplicates += 1
            else:
                seen.add(item.id)
                result.samples.append(item)
    _enough(result, files, minimum)
    return result._replace(duplicates=duplicates)


def demo() -> Samples:
    """The set that ships with the tool: English and Chinese, eight domains (``DOMAINS``), written for this project."""
    return read_samples([DEMO / f"{domain}.jsonl" for domain in DOMAINS], policy="stop")


def _enough(result: Samples, files: list[Path], minimum: int) -> None:
    found, broken = len(result.samples), len(result.problems)
    if found >= max(1, minimum):
        return
    where = str(files[0]) if len(files) == 1 else f"{len(files)} files"
    if broken:
        raise DataError(f"{where}: {found} usable samples and {broken} broken lines, the first: {result.problems[0]}; write {_WAY_OUT}")
    if not found:
        raise DataError(f"{where}: no samples at all; write {_WAY_OUT}")
    raise DataError(f"{where}: {found} samples, and at least {minimum} are needed; add more, or use the demo set")


def _files(paths: list[str | Path]) -> list[Path]:
    """The files that ``paths`` name, each once."""
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given).expanduser()
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in RECORDS | TEXTS and file.is_file())
            visible = [file for file in inside if not any(part.startswith(".") for part in file.relative_to(path).parts)]
            if not visible:
                raise DataError(f"{path}: no .jsonl, .ndjson, .txt or .md in this folder; name the folder with the samples")
            found.update(dict.fromkeys(visible))
        elif path.exists():
            found[path] = None
        elif glob.has_magic(str(path)) and (matches := sorted(glob.glob(str(path), recursive=True))):
            found.update(dict.fromkeys(file for match in matches if (file := Path(match)).is_file()))
        else:
            raise DataError(f"{path}: no such file, folder or match; check the path")
    if not found:
        raise DataError("no files with samples were named; name a file, a folder or a glob, or use the demo set")
    for file in found:
        if file.suffix.lower() not in RECORDS | TEXTS:
            hint = "jq -c '.[]' makes lines of a list" if file.suffix.lower() == ".json" else f"write {_WAY_OUT}, as .jsonl"
            raise DataError(f"{file}: samples are read from .jsonl, .ndjson, .txt and .md; {hint}")
    return list(found)


def _read(file: Path, encoding: str, passage: int) -> Iterator[Sample | Problem]:
    """The samples and problems of a file. What the system refuses is a problem of the file."""
    try:
        with file.open("rb") as stream:
            start = stream.read(4)
            stream.seek(0)
            encoding = next((name for mark, name in _BOMS if start.startswith(mark)), encoding)
            read = _read_records(stream, file, encoding) if file.suffix.lower() in RECORDS else _read_text(stream, file, encoding, passage)
            yield from read
    except OSError as error:
        yield Problem(str(file), 0, f"cannot be read: {error.strerror or error}")


def _read_records(stream: BinaryIO, file: Path, encoding: str) -> Iterator[Sample | Problem]:
    from edge_rt_distill.data.records import parse  # it needs Sample

    for number, line in enumerate(_lines(stream, encoding), 1):
        if isinstance(line, DataError):
            yield Problem(str(file), number, str(line))
        elif line.strip():
            try:
                yield parse(line, file=str(file), line=number)
            except DataError as error:
                yield Problem(str(file), number, str(error))


def _lines(stream: BinaryIO, encoding: str) -> Iterator[str | DataError]:
    """Lines, each decoded on its own: a broken one spoils no other. A line that cannot be is its reason."""
    if codecs.lookup(encoding).name.startswith(("utf-16", "utf-32")):  # a line's end may stand in the middle of a character
        yield from _wide_lines(stream, encoding)
        return
    first = True
    while raw := stream.readline(MAX_LINE + 1):
        if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
            while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield DataError(f"longer than {MAX_LINE >> 20} MiB")
        else:
            try:
                yield (raw.removeprefix(codecs.BOM_UTF8) if first else raw).decode(encoding)
            except UnicodeError as error:
                where = f" at byte {error.start + 1}" if isinstance(error, UnicodeDecodeError) else ""
                yield DataError(f"not {encoding}{where}; name the file's encoding")
        first = False


def _wide_lines(stream: BinaryIO, encoding: str) -> Iterator[str | DataError]:
    raw = stream.read(MAX_TEXT + 1)
    if len(raw) > MAX_TEXT:
        yield DataError(f"a file in {encoding} is longer than {MAX_TEXT >> 20} MiB; convert it to UTF-8")
        return
    for line in raw.decode(encoding, "replace").split("\n"):
        if "\ufffd" in line:
            yield DataError(f"not {encoding}; convert the file to UTF-8")
        elif len(line) > MAX_LINE:
            yield DataError(f"longer than {MAX_LINE >> 20} Mi characters")
        else:
            yield line


def _read_text(stream: BinaryIO, file: Path, encoding: str, passage: int) -> Iterator[Sample | Problem]:
    raw = stream.read(MAX_TEXT + 1)
    if len(raw) > MAX_TEXT:
        yield Problem(str(file), 0, f"longer than {MAX_TEXT >> 20} MiB; split it")
        return
    try:
        text = raw.removeprefix(codecs.BOM_UTF8).decode(encoding)
    except UnicodeError as error:
        at = error.start if isinstance(error, UnicodeDecodeError) else 0
        yield Problem(str(file), raw.count(b"\n", 0, at) + 1, f"not {encoding} at byte {at + 1} of the file; name the file's encoding")
        return
    if "\0" in text:
        yield Problem(str(file), text.count("\n", 0, text.index("\0")) + 1, "a zero byte: this is not a text file")
        return
    for index, piece in enumerate(passages(text, passage), 1):
        yield make_sample(text=piece, source=file.name, file=str(file), line=index)
