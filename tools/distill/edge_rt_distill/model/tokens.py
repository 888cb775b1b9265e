"""Text to tokens and back, with the vocabulary of a GGUF: the same code that tokenises when the student runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from edge_rt.hooks import ModelFile, UserError, Vocab, gguf_metadata_spans, tokenize_messages
from edge_rt_distill import metadata
from edge_rt_distill.files import write_file


class Tokeniser:
    """The vocabulary of a GGUF file, loaded when first used."""

    def __init__(self, source: Path) -> None:
        self.source = source
        """A GGUF that holds the vocabulary."""

    @cached_property
    def vocab(self) -> Vocab:
        """The vocabulary itself. Raises ModelFileError."""
        return Vocab.load(self.source)

    @property
    def size(self) -> int:
        """Tokens there are."""
        return self.vocab.n_tokens

    @cached_property
    def end(self) -> int:
        """The token that ends an answer: the one the template writes behind an answer, else the vocabulary's; -1 if there is none.

        SmolLM2's vocabulary calls <|endoftext|> the end of a turn, and its template ends turns with <|im_end|>.
        """
        written: list[int] = []
        with suppress(UserError):  # a template that refuses this conversation: the vocabulary knows
            written = self.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], False)
        last = next((token for token in reversed(written) if self.vocab.is_eog(token)), None)
        found = next((token for token in (last, self.vocab.eot, self.vocab.eos) if token is not None), None)
        return -1 if found is None else found

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Tokens of a text. ``special``: names of control tokens are control tokens. Raises OptionError for half surrogates."""
        return self.vocab.tokenize(text, special=special)

    def decode(self, tokens: Iterable[int], special: bool = False) -> str:
        """The text of tokens; bytes that are no UTF-8 become U+FFFD."""
        return self.vocab.detokenize(tokens, special).decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        """What one token stands for, control tokens by name."""
        return self.vocab.piece(token, True).decode("utf-8", "replace")

    def chat(self, messages: Sequence[Mapping[str, str]], answer: bool) -> list[int]:
        """Tokens of a conversation in the model's template. ``answer``: an answer of the model is to follow."""
        return tokenize_messages(self.vocab, messages, add_generation_prompt=answer)


def write_vocabulary(source: str | os.PathLike[str], out: Path) -> None:
    """A GGUF without tensors that has the vocabulary and metadata of another. Raises ModelFileError, UserError."""
    file = ModelFile.open(source)
    try:
        _, spans = gguf_metadata_spans(file.map)
        start, end = spans[0][1], spans[-1][2]
        data = metadata.start(0, len(spans)) + bytes(file.map[start:end])
    finally:
        file.close()
    write_file(out, data)
