"""The protocol's vocabulary (docs/protocol.md): operations with their fields, options of a request, codes of errors.

A message from a peer is checked here, field by field, before anything uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from edge_rt import errors
from edge_rt.daemon.frames import Message
from edge_rt.errors import ProtocolError

VERSIONS = (1,)
MAX_ID = (1 << 53) - 1
"""Of requests: what a double can hold exactly, for peers that know no other numbers."""

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


def failure(error: BaseException) -> Message:
    """An error as the protocol tells it."""
    if isinstance(error, (ProtocolError, errors.DaemonError)):
        return {"code": error.code, "message": str(error), **error.fields}
    code = next((code for kind, code in CODES if isinstance(error, kind)), "internal")
    message = str(error) if code != "internal" else f"a bug in the daemon: {type(error).__name__}; its log says more"
    found: Message = {"code": code, "message": message}
    if isinstance(error, errors.ContextOverflow):
        found |= {"needed": error.needed, "available": error.available}
    return found


# ---- fields ----------------------------------------------------------------------------------------------------------


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ID


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_id, value))


def _id_lists(value: Any) -> bool:
    return isinstance(value, list) and all(map(_ids, value))


def _json(value: Any) -> bool:
    """What JSON could say: no bytes anywhere, and texts as keys."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            if not all(map(_text, one)):
                return False
            rest += one.values()
        elif isinstance(one, list):
            rest += one
        elif isinstance(one, bytes):
            return False
    return True


def _map(value: Any) -> bool:
    return isinstance(value, dict) and _json(value)


def _maps(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value) and _json(value)


class Kind(NamedTuple):
    """What a field may be. ``shown``: as messages call it."""

    fits: Callable[[Any], bool]
    shown: str


KINDS: Mapping[str, Kind] = {
    "text": Kind(_text, "a text"),
    "id": Kind(_id, "a whole number from 0 to 2^53 - 1"),
    "integer": Kind(_integer, "a whole number"),
    "number": Kind(_number, "a number"),
    "flag": Kind(_flag, "true or false"),
    "texts": Kind(_texts, "a list of texts"),
    "ids": Kind(_ids, "a list of whole numbers"),
    "id lists": Kind(_id_lists, "a list of lists of whole numbers"),
    "map": Kind(_map, "a map as JSON has it"),
    "maps": Kind(_maps, "a list of maps as JSON has them"),
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


def request(message: Message) -> Request:
    """Check a message. Raises ProtocolError: bad_request, unknown_op."""
    op, number = message.get("op"), message.get("id")
    if number is None and op != "ack":
        raise ProtocolError("bad_request", "a request has no id; give a whole number")
    if number is not None and not _id(number):
        raise ProtocolError("bad_request", f"the id of a request is not {KINDS['id'].shown}")
    if not isinstance(op, str) or op not in OPS:
        raise ProtocolError("unknown_op", f"there is no operation {_shown(op)}; see the capabilities in the answer to hello")
    given = {name: value for name, value in message.items() if name not in ("id", "op")}
    return Request(number, op, fields(given, OPS[op], op))


def fields(given: Mapping[str, Any], known: Mapping[str, str], what: str, code: str = "bad_request") -> dict[str, Any]:
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


def options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of ``generate``, checked, as keywords of ``Session.generate``. Raises ProtocolError: option."""
    found = fields(given, OPTIONS, "the options", "option")
    if "logit_bias" in found:
        found["logit_bias"] = dict(_bias(token, value) for token, value in found["logit_bias"].items())
    if "prune" in found:
        from edge_rt.types import Pruning

        found["prune"] = Pruning(**fields(found["prune"], PRUNE, "prune", "option"))
        if found["prune"].unit not in ("cells", "bytes", "share"):
            raise ProtocolError("option", "the unit of prune is none; choose from cells, bytes, share")
    return found


def _bias(token: str, value: Any) -> tuple[int, float]:
    if not (token.isascii() and token.isdigit() and len(token) < 10 and _number(value)):
        raise ProtocolError("option", 'logit_bias is not as {"42": 1.5}: token ids, as texts, with a number each')
    return int(token), float(value)


def _shown(value: Any) -> str:
    """A peer's value in a message, shortened."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
