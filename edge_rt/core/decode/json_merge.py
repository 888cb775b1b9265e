"""Two JSON schemas in one: what is valid against the result is valid against both (``allOf``, and keywords beside ``$ref``)."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from edge_rt.errors import ConstraintError

Schema = dict[str, Any]
_REMARKS = frozenset(
    ("title", "description", "default", "examples", "$comment", "$id", "$schema", "$defs", "definitions", "deprecated", "readOnly",
     "writeOnly", "$anchor", "unevaluatedProperties", "unevaluatedItems")
)  # fmt: skip
_LARGER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_SMALLER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")


class Nothing(ConstraintError):
    """A schema that allows nothing: fatal, but for an alternative or an optional property, which is then left out."""


def fail(path: str, what: str) -> NoReturn:
    """Raise the error for a place in the schema."""
    raise ConstraintError(f"{path} of the JSON schema {what}")


def merge(a: Schema, b: Schema, path: str) -> Schema:
    """Both schemas at once (neither holds ``$ref`` or ``allOf``). Raises ConstraintError where that cannot be said in one."""
    _check_closed(a, b, path)
    _check_closed(b, a, path)
    result = dict(a)
    for word, value in b.items():
        if word not in a or word in _REMARKS:
            result.setdefault(word, value)
        elif json.dumps(a[word], sort_keys=True) != json.dumps(value, sort_keys=True):
            result[word] = _both(word, a[word], value, path)
    return result


def _check_closed(a: Schema, b: Schema, path: str) -> None:
    """``additionalProperties`` of one part also binds the properties only the other declares: that is refused."""
    closed = a.get("additionalProperties", True)
    others = set(b.get("properties", ())) | set(b.get("required", ()))
    if closed is not True and closed != {} and others - set(a.get("properties", ())):
        fail(path, "combines 'additionalProperties' with properties of another part; declare them all in one place")


def _both(word: str, a: Any, b: Any, path: str) -> Any:
    """Two different values of one keyword."""
    if word == "properties" and isinstance(a, dict) and isinstance(b, dict):
        return {name: {"allOf": [a[name], b[name]]} if name in a and name in b else a.get(name, b.get(name)) for name in {**a, **b}}
    if word == "required" and isinstance(a, list) and isinstance(b, list):
        return [*a, *(name for name in b if name not in a)]
    if word == "type":
        return _types(a, b, path)
    if word == "enum" and isinstance(a, list) and isinstance(b, list):
        known = {json.dumps(value, sort_keys=True) for value in b}
        return [value for value in a if json.dumps(value, sort_keys=True) in known]
    if word in (*_LARGER, *_SMALLER) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b)):
        return max(a, b) if word in _LARGER else min(a, b)
    if word == "const":
        raise Nothing(f"{path} of the JSON schema allows two different constants")
    fail(path, f"combines two different {word!r}; say it in one")


def _types(a: Any, b: Any, path: str) -> Any:
    """Types that are in both; integers are numbers."""
    left, right = (x if isinstance(x, list) else [x] for x in (a, b))
    common = [t for t in left if t in right or (t == "integer" and "number" in right)]
    common += [t for t in right if t == "integer" and "number" in left and t not in common]
    if not common:
        raise Nothing(f"{path} of the JSON schema asks for types {a!r} and {b!r} at once")
    return common[0] if len(common) == 1 else common
