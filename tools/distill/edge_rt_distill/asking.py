"""Servers that are asked over HTTP, one request after the other; what they refuse is said in their words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2

from edge_rt.hooks import UserError
from edge_rt_distill.addresses import read_address, read_key


class Asking:
    """A connection to the server at ``address`` (addresses.py). Close it."""

    def __init__(self, address: str, key_file: Path | None, seconds: float) -> None:
        """``key_file`` holds the key that is sent. ``seconds``: that an answer may take. Raises OptionError."""
        self._address = address
        base, socket, here = read_address(address)
        headers = {"Authorization": f"Bearer {read_key(key_file)}"} if key_file is not None else {}
        transport = httpx2.HTTPTransport(uds=socket) if socket is not None else None
        self._client = httpx2.Client(base_url=base, headers=headers, transport=transport, timeout=seconds, trust_env=not here)

    def get(self, path: str) -> dict[str, Any]:
        """What a path answers. Raises UserError with the server's own words."""
        return self._answered("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The same, of a body."""
        return self._answered("POST", path, dict(body))

    def _answered(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            reply = self._client.request(method, path, json=body)
            found = reply.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise UserError(f"{self._address}{path} did not answer with JSON ({error}); is a server with OpenAI's API there?") from error
        if reply.status_code != 200 or not isinstance(found, dict):
            told = found.get("error", found) if isinstance(found, dict) else found
            said = told.get("message", told) if isinstance(told, dict) else told
            raise UserError(f"{self._address}{path} answered {reply.status_code}: {said}")
        return found

    def close(self) -> None:
        """Leave the server."""
        self._client.close()
