"""The small built-in page: its files, and what a browser is told of them."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.daemon.http.errors import ApiError

if TYPE_CHECKING:
    from edge_rt.daemon.http.routes import Exchange

_HERE = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}  # fmt: skip
POINTER = (
    b"edge-rt speaks OpenAI's API here: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models. Also /health and /metrics.\n"
)
PREFIX = "/page/"

_POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
))  # fmt: skip
"""Nothing from elsewhere, nothing inline, and no text that becomes HTML: what a model writes stays text."""
_HEADERS = (
    ("Content-Security-Policy", _POLICY), ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Opener-Policy", "same-origin"), ("Cross-Origin-Resource-Policy", "same-origin"), ("Cache-Control", "no-cache"),
)  # fmt: skip


class _File(NamedTuple):
    body: bytes
    kind: str
    tag: str


@cache
def _files() -> dict[str, _File]:
    """By name."""
    bodies = {path.name: path.read_bytes() for path in sorted(_HERE.iterdir()) if path.suffix in _TYPES}
    return {
        name: _File(body, _TYPES[Path(name).suffix], f'"{hashlib.sha256(body).hexdigest()[:16]}"') for name, body in bodies.items()
    }  # fmt: skip


def root(exchange: Exchange) -> None:
    """The page for a browser; for anybody else a line of text."""
    if "text/html" in exchange.headers.get("accept", ""):
        _send(exchange, _files()["index.html"], ("Vary", "Accept"))
    else:
        exchange.connection.respond(200, POINTER, "text/plain; charset=utf-8", (("Vary", "Accept"),))


def part(exchange: Exchange) -> None:
    """A file that the page is made of. Raises ApiError."""
    found = _files().get(exchange.path.removeprefix(PREFIX))
    if found is None:
        raise ApiError(404, f"the page has no file {exchange.path:.200}", "unknown_url")
    _send(exchange, found)


def _send(exchange: Exchange, file: _File, *more: tuple[str, str]) -> None:
    headers = (*_HEADERS, ("ETag", file.tag), *more)
    tags = [tag.strip().removeprefix("W/") for tag in exchange.headers.get("if-none-match", "").split(",")]
    if file.tag in tags:
        exchange.connection.respond(304, b"", "", headers)
    else:
        exchange.connection.respond(200, file.body, file.kind, headers)
