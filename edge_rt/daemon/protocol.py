"""The daemon's protocol (docs/protocol.md): frames, operations with their fields, options of a request, codes of errors.

A frame is a 4-byte big-endian length followed by a MessagePack map of that many bytes. Peers are not trusted: the length is checked before
the frame is buffered, and every field of the map before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from edge_rt import errors
from edge_rt.errors import ProtocolError

MAX_BYTES = 16 << 20  # longest body of a frame
MAX_DEPTH = 32  # nesting of maps and lists in a message, the outermost map included
_LENGTH = struct.Struct(">I")

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    """Encode a message as a frame. Raises ProtocolError if it is longer than ``MAX_BYTES``."""
    import msgpack

    body: bytes = msgpack.packb(message, use_bin_type=True)
    if len(body) > MAX_BYTES:
        raise ProtocolError("frame_too_long", f"a message of {len(body):,} bytes is too long; {MAX_BYTES:,} are allowed")
    return _LENGTH.pack(len(body)) + body


def pack_answer(message: Message) -> bytes:
    """Encode the answer to a request as a frame. An answer that is too long is replaced by the error ``limit``."""
    try:
        return pack(message)
    except ProtocolError as error:
        return pack({"id": message["id"], "error": {"code": "limit", "message": str(error)}})


class FrameReader:
    """Incremental decoder of frames. ``max_bytes`` limits the body of a frame and may change between two messages."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.length = 0  # bytes of the message that was yielded last
        self._held = bytearray()

    @property
    def pending(self) -> int:
        return len(self._held)

    def feed(self, data: bytes | memoryview) -> Iterator[Message]:
        """Yield the messages that ``data`` completes. Raises ProtocolError, after which the stream cannot be decoded any further."""
        self._held += data
        start = 0
        try:
            while len(self._held) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._held, start)
                if length > self.max_bytes:
                    raise ProtocolError("frame_too_long", f"a frame of {length:,} bytes is too long; {self.max_bytes:,} are allowed")
                end = start + _LENGTH.size + length
                if len(self._held) < end:
                    break
                body = bytes(memoryview(self._held)[start + _LENGTH.size : end])
                start, self.length = end, length
                yield unpack(body)
        finally:
            del self._held[:start]


def unpack(body: bytes) -> Message:
    """Decode the body of a frame. Raises ProtocolError: bad_frame."""
    import msgpack

    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True, max_ext_len=0)
    except Exception as error:  # msgpack raises many kinds, all because of the peer's bytes
        raise ProtocolError("bad_frame", f"a frame is no MessagePack: {type(error).__name__}; see docs/protocol.md") from None
    if not isinstance(message, dict):
        raise ProtocolError("bad_frame", f"a frame holds {type(message).__name__} and no map; see docs/protocol.md")
    if depth(message) > MAX_DEPTH:
        raise ProtocolError("bad_frame", f"a message has more than {MAX_DEPTH} maps and lists in each other")
    return message


def depth(value: dict[Any, Any]) -> int:
    """Nesting of maps and lists, at most ``MAX_DEPTH`` + 1. Not recursive: a hostile message could exhaust Python's stack."""
    level: list[Any] = [value]
    for found in range(1, MAX_DEPTH + 1):
        inner = [one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer)]
        level = [one for one in inner if isinstance(one, (dict, list))]
        if not level:
            return found
    return MAX_DEPTH + 1


VERSIONS = (1,)
MAX_ID = (1 << 53) - 1  # largest id of a request: a double holds it exactly, for peers that have no other numbers

CODES: tuple[tuple[type[BaseException], str], ...] = (
    (errors.ContextOverflow, "context_overflow"),
    (errors.ContextError, "context"),
    (errors.ModelFileError, "model_file"),
    (errors.OptionError, "option"),
    (errors.ConstraintError, "constraint"),
    (errors.SessionMismatch, "session_mismatch"),
    (errors.SessionFileError, "session_file"),
    (errors.RuleError, "rule"),
    (errors.PluginError, "plugin"),
    (errors.UserError, "failed"),
    (errors.NativeError, "native"),
    (errors.OutOfMemory, "out_of_memory"),
    (MemoryError, "out_of_memory"),
    (errors.Cancelled, "cancelled"),
)
"""Error codes by exception class; the first match counts. A ProtocolError carries its own code; any other exception is ``internal``."""


def describe_error(error: BaseException) -> Message:
    """The field ``error`` of an answer."""
    if isinstance(error, (ProtocolError, errors.DaemonError)):
        return {"code": error.code, "message": str(error), **error.fields}
    code = next((code for kind, code in CODES if isinstance(error, kind)), "internal")
    message = str(error) if code != "internal" else f"a bug in the daemon: {type(error).__name__}; its log says more"
    found: Message = {"code": code, "message": message}
    if isinstance(error, errors.ContextOverflow):
        found |= {"needed": error.needed, "available": error.available}
    return found


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_integer(value) and 0 <= value <= MAX_ID


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and _is_json(value)


def _is_json(value: Any) -> bool:
    """Whether JSON can represent it: no bytes at any depth, and texts as keys."""
    if isinstance(value, dict):
        return all(_is_text(key) and _is_json(one) for key, one in value.items())
    return all(map(_is_json, value)) if isinstance(value, list) else not isinstance(value, bytes)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


class Kind(NamedTuple):
    """The type of a field: a check of a value, and what error messages call the type."""

    fits: Callable[[Any], bool]
    shown: str


KINDS: Mapping[str, Kind] = {
    "text": Kind(_is_text, "a text"),
    "id": Kind(_is_id, "a whole number from 0 to 2^53 - 1"),
    "integer": Kind(_is_integer, "a whole number"),
    "number": Kind(lambda value: isinstance(value, (int, float)) and not isinstance(value, bool), "a number"),
    "flag": Kind(lambda value: isinstance(value, bool), "true or false"),
    "texts": Kind(_list_of(_is_text), "a list of texts"),
    "ids": Kind(_list_of(_is_id), "a list of whole numbers"),
    "id lists": Kind(_list_of(_list_of(_is_id)), "a list of lists of whole numbers"),
    "map": Kind(_is_map, "a map as JSON has it"),
    "maps": Kind(_list_of(_is_map), "a list of maps as JSON has them"),
}

OPS: Mapping[str, Mapping[str, str]] = {
    "hello": {"versions": "ids!", "client": "text", "key": "text"},
    "open_session": {"keep": "flag", "context": "id", "model": "text"},
    "close_session": {"session": "text!"},
    "clone_session": {"session": "text!", "keep": "flag"},
    "save_session": {"session": "text!", "name": "text!"},
    "restore_session": {"name": "text!", "keep": "flag", "model": "text"},
    "list_saved": {},
    "delete_saved": {"name": "text!"},
    "generate": {
        "session": "text", "model": "text", "prompt": "text", "tokens": "ids", "messages": "maps", "options": "map", "priority": "text",
        "resumable": "flag",
    },
    "embed": {"texts": "texts", "tokens": "id lists", "model": "text", "pooling": "text", "normalize": "flag", "dimensions": "id"},
    "score": {
        "texts": "texts", "tokens": "id lists", "prompt": "text", "messages": "maps", "continuations": "texts", "model": "text",
        "top": "id", "beyond": "flag", "pieces": "flag",
    },
    "feedback": {
        "prompt": "text", "messages": "maps", "answer": "text!", "rating": "integer", "correction": "text", "comment": "text",
        "model": "text",
    },
    "cancel": {"request": "id!"},
    "resume": {"stream": "text!", "after": "id!"},
    "ack": {"stream": "text!", "seq": "id!"},
    "tokenize": {"text": "text!", "special": "flag", "bos": "flag", "model": "text"},
    "detokenize": {"tokens": "ids!", "model": "text"},
    "tokenizer": {"model": "text"},
    "status": {},
    "metrics": {},
    "reload_rules": {},
    "load_model": {"model": "text!", "options": "map"},
    "unload_model": {"model": "text"},
}  # fmt: skip
"""Fields of each operation with their ``KINDS``; ``!`` marks a required field."""

OPTIONS: Mapping[str, str] = {
    "max_tokens": "integer", "stop": "texts", "grammar": "text", "json_schema": "map", "logprobs": "integer", "speculate": "integer",
    "post": "texts", "ignore_eos": "flag", "context": "integer", "prune": "map", "tools": "maps",
    "adapter": "text", "adapter_scale": "number",
    "temperature": "number", "top_k": "integer", "top_p": "number", "min_p": "number", "typical_p": "number",
    "repeat_penalty": "number", "repeat_last_n": "integer", "frequency_penalty": "number", "presence_penalty": "number",
    "dry_multiplier": "number", "dry_base": "number", "dry_allowed_length": "integer", "dry_penalty_last_n": "integer",
    "seed": "integer", "logit_bias": "map",
}  # fmt: skip
"""Options of ``generate``: the fields of ``GenerateOptions`` and ``SamplingParams`` but ``rules``, which only the daemon sets."""

PRUNE = {"budget": "number!", "unit": "text", "question": "flag", "every": "integer"}
MODEL_OPTIONS = {
    "context": "integer", "threads": "integer", "memory": "integer", "pack": "flag", "key_type": "text", "engine": "text",
    "device": "text", "policy": "text", "embedder": "text", "compensation": "text", "power": "number", "celsius": "number",
}  # fmt: skip
"""Options of ``load_model``, those of ``edge_rt.open``."""


class Request(NamedTuple):
    """A valid request. ``fields`` holds the given fields that are not null."""

    id: int | None
    op: str
    fields: Mapping[str, Any]


def parse_request(message: Message) -> Request:
    """Validate a message. Raises ProtocolError: bad_request, unknown_op."""
    op, number = message.get("op"), message.get("id")
    if number is None and op != "ack":
        raise ProtocolError("bad_request", "a request has no id; give a whole number")
    if number is not None and not _is_id(number):
        raise ProtocolError("bad_request", f"the id of a request is not {KINDS['id'].shown}")
    if not isinstance(op, str) or op not in OPS:
        raise ProtocolError("unknown_op", f"there is no operation {_shown(op)}; see the capabilities in the answer to hello")
    given = {name: value for name, value in message.items() if name not in ("id", "op")}
    return Request(number, op, check_fields(given, OPS[op], op))


def check_fields(given: Mapping[str, Any], known: Mapping[str, str], what: str, code: str = "bad_request") -> dict[str, Any]:
    """The fields of ``given`` that are not null. Raises ProtocolError with ``code`` for unknown, missing or mistyped fields of ``what``."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ProtocolError(code, f"{what} has no {_shown(name)}; it takes {', '.join(known) or 'nothing'}")
        if value is None:
            continue
        kind = KINDS[known[name].rstrip("!")]
        if not kind.fits(value):
            raise ProtocolError(code, f"{name} of {what} is not {kind.shown}")
        found[name] = value
    for name, kind_name in known.items():
        if kind_name.endswith("!") and name not in found:
            raise ProtocolError(code, f"{what} has no {name}; give {KINDS[kind_name.rstrip('!')].shown}")
    return found


def check_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Convert the options of ``generate`` to keywords of ``Session.generate``. Raises ProtocolError: option."""
    found = check_fields(given, OPTIONS, "the options", "option")
    if "logit_bias" in found:
        found["logit_bias"] = dict(_parse_bias(token, value) for token, value in found["logit_bias"].items())
    if "prune" in found:
        from edge_rt.types import Pruning

        found["prune"] = Pruning(**check_fields(found["prune"], PRUNE, "prune", "option"))
        if found["prune"].unit not in ("cells", "bytes", "share"):
            raise ProtocolError("option", "the unit of prune is none; choose from cells, bytes, share")
    return found


def _parse_bias(token: str, value: Any) -> tuple[int, float]:
    if not (token.isascii() and token.isdigit() and len(token) < 10 and KINDS["number"].fits(value)):
        raise ProtocolError("option", 'logit_bias is not as {"42": 1.5}: token ids, as texts, with a number each')
    return int(token), float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
