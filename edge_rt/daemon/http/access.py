"""Who may ask over HTTP: the host that was meant, the page that asks, and the key."""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from edge_rt.daemon.config import Http
from edge_rt.daemon.http.errors import ApiError

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def check_host(http: Http, headers: Mapping[str, str]) -> None:
    """A page whose name was bound anew to this machine is told by the name it asks for. Raises ApiError."""
    host = headers.get("host")
    if host is None:  # no browser leaves it out
        return
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name.lower() not in _LOOPBACK and name.lower() not in http.hosts:
        raise ApiError(403, "the name in the Host header is not this daemon's; add it to hosts in [http]", "host_not_allowed")


def check_origin(http: Http, headers: Mapping[str, str]) -> str | None:
    """The origin of the page that asks, None if no page does or its origin is our own. Raises ApiError for pages of others."""
    origin, host = headers.get("origin"), headers.get("host")
    if origin is None or origin in (f"http://{host}", f"https://{host}"):  # TLS is a proxy's before us
        return None
    if origin not in http.origins:
        raise ApiError(403, "pages of this origin may not use the daemon; add it to origins in [http]", "origin_not_allowed")
    return origin


def cross_origin(origin: str | None) -> list[tuple[str, str]]:
    """Headers that let a page of this origin read the answer."""
    if origin is None:
        return []
    exposed = "Retry-After, X-Request-Id, Edge-RT-Ignored"
    return [("Access-Control-Allow-Origin", origin), ("Vary", "Origin"), ("Access-Control-Expose-Headers", exposed)]


def preflight(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    """The answer's headers when a browser asks whether a page may ask."""
    found = [("Access-Control-Allow-Methods", "GET, POST"), ("Access-Control-Max-Age", "600")]
    if asked := headers.get("access-control-request-headers"):
        found.append(("Access-Control-Allow-Headers", asked))
    if headers.get("access-control-request-private-network") == "true":
        found.append(("Access-Control-Allow-Private-Network", "true"))
    return found


def check_key(http: Http, headers: Mapping[str, str]) -> int | None:
    """Which of the keys was shown, None if there are none. Raises ApiError."""
    if not http.keys:
        return None
    scheme, _, key = headers.get("authorization", "").partition(" ")
    shown = key.strip(" \t").encode("latin-1") if scheme.lower() == "bearer" else b""
    matches = [hmac.compare_digest(shown, one.encode()) for one in http.keys]  # all of them: the time tells nothing
    if not any(matches):
        message = "the API key is not one of the daemon's; send `Authorization: Bearer KEY` with one of its key_file"
        raise ApiError(401, message, "invalid_api_key", headers=(("WWW-Authenticate", "Bearer"),))
    return matches.index(True)
