"""The daemon's protocol (docs/protocol.md): frames, operations with their fields, options of a request, codes of errors.

A frame is a length of four bytes, big-endian, and a MessagePack map of that many bytes. What comes from a peer is hostile until it was
checked: the length before anything is kept, the map field by field before anything uses it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from edge_rt import errors
from edge_rt.errors import ProtocolError

MAX_BYTES = 16 << 20  # longest frame, in bytes without the length
MAX_DEPTH = 32  # maps and lists within each other, the outermost map included
_LENGTH = struct.Struct(">I")

Message = dict[str, Any]


def pack(message: Message) -> bytes:
    """A message as a frame. Raises ProtocolError if it is too long."""
    import msgpack

    body: bytes = msgpack.packb(message, use_bin_type=True)
    if len(body) > MAX_BYTES:
        raise ProtocolError("frame_too_long", f"a message of {len(body):,} bytes is too long; {MAX_BYTES:,} are allowed")
    return _LENGTH.pack(len(body)) + body


def pack_answer(message: Message) -> bytes:
    """The answer to a request as a frame; one that is too long becomes an error."""
    try:
        return pack(message)
    except ProtocolError as error:
        return pack({"id": message["id"], "error": {"code": "limit", "message": str(error)}})


class FrameReader:
    """Bytes in as they come, whole messages out. ``max_bytes`` may change between two messages."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.length = 0  # bytes of the message that was given last
        self._held = bytearray()

    @property
    def pending(self) -> int:
        return len(self._held)

    def feed(self, data: bytes | memoryview) -> Iterator[Message]:
        """The messages that are complete now. Raises ProtocolError; after that the stream cannot be read any more."""
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
    """The message of a frame's body. Raises ProtocolError."""
    import msgpack

    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True, max_ext_len=0)
    except Exception as error:  # msgpack raises many kinds, all because of the peer's bytes
        raise ProtocolError("bad_frame", f"a frame is no MessagePack: {type(error).__name__}; see docs/protocol.md") from None
    if not isinstance(message, dict):
        raise ProtocolError("bad_frame", f"a frame holds {type(message).__name__} and no map; see docs/protocol.md")
    if _depth(message) > MAX_DEPTH:
        raise ProtocolError("bad_frame", f"a message has more than {MAX_DEPTH} maps and lists in each other")
    return message


def _depth(value: Any) -> int:
    """How many maps and lists are within each other, MAX_DEPTH + 1 if there are more. Level by level: a recursion could be too deep."""
    level, depth = [value], 1
    while depth <= MAX_DEPTH:
        inner = [one for outer in level for one in (outer.values() if isinstance(outer, dict) else outer)]
        level = [one for one in inner if isinstance(one, (dict, list))]
        if not level:
            break
        depth += 1
    return depth


VERSIONS = (1,)
MAX_ID = (1 << 53) - 1  # of requests: what a double can hold exactly, for peers that know no other numbers

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
"""Codes of edge-rt's errors; the first class that fits counts. A ProtocolError has its own, any other error is ``internal``."""


def describe_error(error: BaseException) -> Message:
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


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_id, value))


def _is_id_lists(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_ids, value))


def _is_json(value: Any) -> bool:
    """What JSON could say: no bytes anywhere, and texts as keys."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            if not all(map(_is_text, one)):
                return False
            rest += one.values()
        elif isinstance(one, list):
            rest += one
        elif isinstance(one, bytes):
            return False
    return True


def _is_map(value: Any) -> bool:
    return isinstance(value, dict) and _is_json(value)


def _is_maps(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value) and _is_json(value)


class Kind(NamedTuple):
    """What a field may be. ``shown``: as messages call it."""

    fits: Callable[[Any], bool]
    shown: str


KINDS: Mapping[str, Kind] = {
    "text": Kind(_is_text, "a text"),
    "id": Kind(_is_id, "a whole number from 0 to 2^53 - 1"),
    "integer": Kind(_is_integer, "a whole number"),
    "number": Kind(_is_number, "a number"),
    "flag": Kind(_is_flag, "true or false"),
    "texts": Kind(_is_texts, "a list of texts"),
    "ids": Kind(_is_ids, "a list of whole numbers"),
    "id lists": Kind(_is_id_lists, "a list of lists of whole numbers"),
    "map": Kind(_is_map, "a map as JSON has it"),
    "maps": Kind(_is_maps, "a list of maps as JSON has them"),
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
"""Operations and the kinds of their fields; ``!``: it must be there."""

OPTIONS: Mapping[str, str] = {
    "max_tokens": "integer", "stop": "texts", "grammar": "text", "json_schema": "map", "logprobs": "integer", "speculate": "integer",
    "post": "texts", "ignore_eos": "flag", "context": "integer", "prune": "map", "tools": "maps",
    "adapter": "text", "adapter_scale": "number",
    "temperature": "number", "top_k": "integer", "top_p": "number", "min_p": "number", "typical_p": "number",
    "repeat_penalty": "number", "repeat_last_n": "integer", "frequency_penalty": "number", "presence_penalty": "number",
    "dry_multiplier": "number", "dry_base": "number", "dry_allowed_length": "integer", "dry_penalty_last_n": "integer",
    "seed": "integer", "logit_bias": "map",
}  # fmt: skip
"""Options of ``generate``: the fields of ``GenerateOptions`` and ``SamplingParams``, but ``rules``, which are the daemon's."""

PRUNE = {"budget": "number!", "unit": "text", "question": "flag", "every": "integer"}
MODEL_OPTIONS = {
    "context": "integer", "threads": "integer", "memory": "integer", "pack": "flag", "key_type": "text", "engine": "text",
    "device": "text", "policy": "text", "embedder": "text", "compensation": "text", "power": "number", "celsius": "number",
}  # fmt: skip
"""Options of ``load_model``, those of ``edge_rt.open``."""


class Request(NamedTuple):
    """A request that was checked. ``fields`` holds what was given and is not null."""

    id: int | None
    op: str
    fields: Mapping[str, Any]


def parse_request(message: Message) -> Request:
    """Check a message. Raises ProtocolError: bad_request, unknown_op."""
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
    """The fields of a map that are not null, checked. Raises ProtocolError."""
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
    """Options of ``generate``, checked, as keywords of ``Session.generate``. Raises ProtocolError: option."""
    found = check_fields(given, OPTIONS, "the options", "option")
    if "logit_bias" in found:
        found["logit_bias"] = dict(_bias(token, value) for token, value in found["logit_bias"].items())
    if "prune" in found:
        from edge_rt.types import Pruning

        found["prune"] = Pruning(**check_fields(found["prune"], PRUNE, "prune", "option"))
        if found["prune"].unit not in ("cells", "bytes", "share"):
            raise ProtocolError("option", "the unit of prune is none; choose from cells, bytes, share")
    return found


def _bias(token: str, value: Any) -> tuple[int, float]:
    if not (token.isascii() and token.isdigit() and len(token) < 10 and _is_number(value)):
        raise ProtocolError("option", 'logit_bias is not as {"42": 1.5}: token ids, as texts, with a number each')
    return int(token), float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
