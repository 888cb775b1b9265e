"""Tokens over HTTP, as vLLM's server has them: ``/tokenize``, ``/detokenize`` and ``/tokenizer_info``, by which evaluation tools count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from edge_rt.daemon.http import body
from edge_rt.daemon.http.models import named
from edge_rt.daemon.http.request import checked

if TYPE_CHECKING:
    from edge_rt.daemon.frames import Message
    from edge_rt.daemon.http.routes import Exchange

TOKENIZE: Mapping[str, str] = {"prompt": "text!", "add_special_tokens": "flag", "model": "text"}
DETOKENIZE: Mapping[str, str] = {"tokens": "ids!", "model": "text"}


def tokenize(exchange: Exchange) -> None:
    """The tokens of a prompt; names of control tokens in it are those tokens. Raises ApiError, ProtocolError."""
    given, _ = checked(body.parse(exchange.body), TOKENIZE, ())
    fields = {"text": given["prompt"], "special": True, **({} if given.get("add_special_tokens", True) else {"bos": False})}
    _ask(exchange, "tokenize", fields, given.get("model"), lambda found: {"tokens": found["tokens"], "count": len(found["tokens"])})


def detokenize(exchange: Exchange) -> None:
    """The text of some tokens. Raises ApiError, ProtocolError."""
    given, _ = checked(body.parse(exchange.body), DETOKENIZE, ())
    _ask(exchange, "detokenize", {"tokens": given["tokens"]}, given.get("model"), lambda found: {"prompt": found["text"]})


def info(exchange: Exchange) -> None:
    """Of the default model: the names of the tokens that begin and end texts, and its chat template. Raises ProtocolError."""

    def shown(found: Message) -> dict[str, Any]:
        return {"bos_token": found["bos"], "eos_token": found["eos"], "chat_template": found["template"], "vocab_size": found["tokens"]}

    _ask(exchange, "tokenizer", {}, None, shown)


def _ask(exchange: Exchange, op: str, fields: dict[str, Any], model: str | None, shown: Callable[[Message], dict[str, Any]]) -> None:
    hosted, _ = named(exchange.server, model)
    exchange.heard = lambda message: exchange.connection.respond_json(shown(message["ok"]))
    exchange.connection.run(op, {**fields, "model": hosted.name}, len(exchange.body))
