"""Errors as OpenAI's API tells them: a status, and a body with message, type, param and code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edge_rt.daemon import protocol
from edge_rt.daemon.frames import Message
from edge_rt.errors import UserError

TRY_AGAIN = (("Retry-After", "1"),)

STATUS: Mapping[str, tuple[int, str]] = {
    "bad_request": (400, "invalid_value"),
    "option": (400, "invalid_value"),
    "constraint": (400, "invalid_value"),
    "plugin": (400, "invalid_value"),
    "context_overflow": (400, "context_length_exceeded"),
    "context": (400, "context_length_exceeded"),
    "not_recording": (400, "not_recording"),
    "frame_too_long": (413, "request_too_large"),
    "not_allowed": (403, "not_allowed"),
    "limit": (429, "rate_limit_exceeded"),
    "busy": (429, "rate_limit_exceeded"),
    "draining": (503, "draining"),
    "no_model": (503, "no_model"),
    "unloaded": (503, "no_model"),
    "model_file": (503, "model_file"),
    "worker_died": (503, "worker_died"),
    "worker_hung": (503, "worker_hung"),
    "session_lost": (503, "session_lost"),
    "cancelled": (503, "cancelled"),
    "out_of_memory": (503, "out_of_memory"),
}
"""The status and OpenAI's code, where there is one, of the protocol's codes; any other is 500 and keeps its name."""

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(UserError):
    """An answer that is an error. ``more``: further fields of the body."""

    def __init__(
        self, status: int, message: str, code: str, *, param: str | None = None, headers: tuple[tuple[str, str], ...] = (), **more: Any
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param, self.headers, self.more = status, code, param, headers, more

    def body(self) -> dict[str, Any]:
        """As JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code, **self.more}}


def wrong(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field of the body that cannot be."""
    return ApiError(400, message, code, param=param)


def api_error(error: BaseException) -> ApiError:
    """Any error as an answer."""
    return error if isinstance(error, ApiError) else from_protocol(protocol.failure(error))


def from_protocol(found: Message) -> ApiError:
    """The protocol's error as an answer."""
    rest = dict(found)
    own, message = rest.pop("code"), rest.pop("message")
    status, code = STATUS.get(own, (500, own))
    headers: tuple[tuple[str, str], ...] = ()
    if status in (429, 503):
        headers = (("Retry-After", str(max(1, math.ceil(rest.pop("retry_after", 1))))),)
    return ApiError(status, message, code, headers=headers, **rest)
