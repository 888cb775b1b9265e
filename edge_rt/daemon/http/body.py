"""A request's body: JSON from a stranger, checked so far that everything behind it may take it as it is."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from edge_rt.daemon.frames import MAX_DEPTH
from edge_rt.daemon.http.errors import ApiError

_DEEPEST = MAX_DEPTH - 2
"""What is passed on to the worker is in two more maps."""
_INTEGERS = range(-(1 << 63), 1 << 63)
"""What a frame can hold."""


def parse(body: bytes) -> dict[str, Any]:
    """The map in a body. Raises ApiError: no JSON, no map, too deep, or with values that cannot be passed on."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_constant)
    except UnicodeDecodeError:
        raise _malformed("the body is not UTF-8") from None
    except ValueError as error:
        raise _malformed(f"the body is no JSON: {error}") from None
    except RecursionError:
        raise _too_deep() from None
    if not isinstance(found, dict):
        raise _malformed("the body is JSON and no map; give a map with the request's fields")
    _check(found)
    return found


def _check(found: dict[str, Any]) -> None:
    """Level by level: a recursion could be too deep."""
    level: list[Any] = [found]
    for _ in range(_DEEPEST):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.keys()
                inner += one.values()
            else:
                inner += one
        for value in inner:
            _check_value(value)
        level = [value for value in inner if isinstance(value, (dict, list))]
        if not level:
            return
    raise _too_deep()


def _check_value(value: Any) -> None:
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise _malformed("a text has half of a surrogate pair in it; write the character itself") from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _malformed("a number is too large")
    elif isinstance(value, int) and value not in _INTEGERS:
        raise _malformed("a number is too large")


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _too_deep() -> ApiError:
    return _malformed(f"the body has more than {_DEEPEST} maps and lists in each other")


def _malformed(message: str) -> ApiError:
    return ApiError(400, message, "malformed_json")
