"""Tokens to text, one at a time: bytes wait until they make whole characters."""

from __future__ import annotations

import codecs
from typing import Protocol


class Pieces(Protocol):
    """What a vocabulary must know here."""

    def piece(self, token: int) -> bytes:
        """The bytes of a token; none for control tokens."""
        ...


class Detokeniser:
    """Joined, the results are ``bytes.decode("utf-8", "replace")`` of the joined pieces, however the bytes are spread over tokens.

    At most three bytes wait. Control tokens render as nothing. A space that a SentencePiece vocabulary has in front of its
    first word stays: the text goes on after a prompt.
    """

    def __init__(self, vocab: Pieces) -> None:
        self._piece = vocab.piece
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def feed(self, token: int) -> str:
        """The text that became certain with this token."""
        return self._decode(self._piece(token))

    def flush(self) -> str:
        """The stream ended: U+FFFD for an unfinished character, else nothing."""
        return self._decode(b"", final=True)
