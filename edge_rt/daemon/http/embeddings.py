"""``/v1/embeddings``: OpenAI's request as the protocol's ``embed``, and its events as OpenAI's answer."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_rt.daemon import protocol
from edge_rt.daemon.http.errors import wrong
from edge_rt.daemon.http.request import IGNORED, checked, headers, texts_of
from edge_rt.types import singles

if TYPE_CHECKING:
    from edge_rt.daemon.frames import Message
    from edge_rt.daemon.http.routes import Exchange

FIELDS: Mapping[str, str] = {"model": "text", "encoding_format": "text", "dimensions": "integer", "edge_rt": "map"}
EXTENSIONS: Mapping[str, str] = {"pooling": "text", "normalize": "flag", "truncate": "flag"}
"""Fields of ``edge_rt``. ``truncate``: the client knows that the model was trained for fewer dimensions."""
MOST_TEXTS = 2048
"""OpenAI's limit of one request."""


class Asked(NamedTuple):
    """A request that was checked. ``fields``: of ``embed``. ``dimensions``: what the model must have, if that was asked for."""

    fields: dict[str, Any]
    model: str | None
    base64: bool
    dimensions: int | None
    ignored: tuple[str, ...]


def read(body: Mapping[str, Any]) -> Asked:
    """A request for ``/v1/embeddings``. Raises ApiError, ProtocolError."""
    given, rest = checked(body, FIELDS, ("input",))
    form = given.get("encoding_format", "float")
    if form not in ("float", "base64"):
        raise wrong("encoding_format", "encoding_format is float or base64")
    extensions = protocol.fields(given.get("edge_rt", {}), EXTENSIONS, "edge_rt")
    truncate, dimensions = extensions.pop("truncate", False), given.get("dimensions")
    if dimensions is not None and dimensions < 1:
        raise wrong("dimensions", f"dimensions is {dimensions}; give 1 or more")
    fields = {**_texts(rest.get("input")), **extensions}
    if truncate and dimensions is not None:
        fields["dimensions"], dimensions = dimensions, None
    ignored = tuple(name for name in IGNORED if body.get(name) is not None)
    return Asked(fields, given.get("model"), form == "base64", dimensions, ignored)


def _texts(given: Any) -> dict[str, Sequence[Any]]:
    """``input``: a text, texts, tokens of one text, or of several."""
    if given is None:
        raise wrong("input", "there is no input; give a text or a list of texts", "missing_required_parameter")
    name, texts = texts_of("input", given, MOST_TEXTS)
    for i, text in enumerate(texts):
        if not text:
            raise wrong("input", f"text {i + 1} is empty and has no embedding; leave it out")
    return {name: texts}


class Embedding:
    """One request, until its answer. Each embedding is kept as it will be written: Python's numbers would take three times the memory."""

    def __init__(self, exchange: Exchange, asked: Asked, model: str) -> None:
        """``model``: what it is called in the answer."""
        self._exchange, self._asked, self._model = exchange, asked, model
        self._data: list[str] = []
        self._tokens = 0

    def start(self) -> None:
        """Raises ProtocolError."""
        self._exchange.heard = self._heard
        self._exchange.connection.run("embed", {**self._asked.fields, "model": self._model}, len(self._exchange.body))

    def _heard(self, message: Message) -> None:
        """An embedding, or the end. Raises ApiError, ProtocolError."""
        if "event" not in message:
            self._exchange.connection.respond(200, self._answer(), "application/json", headers(self._asked.ignored))
            return
        if message["event"] != "embedding":  # it waits for memory, which is nothing to tell in an answer that is whole
            return
        row = message["embedding"]
        wanted = self._asked.dimensions
        if wanted is not None and wanted != len(row):
            said = "fewer mean something only if it was trained for them (Matryoshka); say so with edge_rt.truncate"
            raise wrong("dimensions", f"an embedding of this model has {len(row)} numbers and not {wanted}; {said}", "unsupported_value")
        written = json.dumps(_packed(row) if self._asked.base64 else singles(row), separators=(",", ":"))
        self._exchange.connection.keep(len(written))
        self._data.append(f'{{"object":"embedding","index":{message["index"]},"embedding":{written}}}')
        self._tokens += message["tokens"]

    def _answer(self) -> bytes:
        usage = {"prompt_tokens": self._tokens, "total_tokens": self._tokens}
        rest = json.dumps({"model": self._model, "usage": usage}, ensure_ascii=False, separators=(",", ":"))
        return f'{{"object":"list","data":[{",".join(self._data)}],{rest[1:]}'.encode()


def _packed(row: Sequence[float]) -> str:
    """As OpenAI packs it: single precision, little-endian, in base64."""
    return base64.b64encode(struct.pack(f"<{len(row)}f", *row)).decode()
