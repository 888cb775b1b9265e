"""Small but real vocabularies for random models: any text goes through them and comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["bpe", "spm"]

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_WORDS = (
    "the and of to in is it that you for with this are on not be as have from one all can will what there which when how an at by we"
    " model device weight token memory answer question hello world"
)
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # llama_token_type


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in order of their ids, with what GGUF says of each."""

    model: str
    tokens: list[str]
    types: list[int]
    bos: int
    eos: int
    pre: str = ""
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def write(self, writer: Any, *, add_eos: bool = False) -> None:
        """Add the metadata to a ``gguf.GGUFWriter``."""
        writer.add_tokenizer_model(self.model)
        if self.pre:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        writer.add_bos_token_id(self.bos)
        writer.add_eos_token_id(self.eos)
        writer.add_add_bos_token(self.model == "llama")
        if add_eos:
            writer.add_add_eos_token(True)


def make_vocabulary(kind: Kind, size: int | None = None) -> Vocabulary:
    """A byte-level BPE ("bpe") or SentencePiece ("spm") vocabulary of at least 256 bytes, 3 control tokens and some words.

    ``size`` beyond that is filled with words no text is split into (a model can still produce them); less raises ValueError.
    """
    return _byte_pair(size) if kind == "bpe" else _sentence_piece(size)


def _byte_pair(size: int | None) -> Vocabulary:
    letters = _byte_letters()
    tokens = [*CONTROL_TOKENS, *letters.values()]
    merges: list[str] = []
    known = set(tokens)
    for word in _WORDS.split():
        left = letters[ord(" ")]
        for letter in word:
            if left + letter not in known:
                known.add(left + letter)
                tokens.append(left + letter)
                merges.append(f"{left} {letter}")
            left += letter
    n_control = len(CONTROL_TOKENS)
    tokens += _fillers(letters[ord(" ")], len(tokens), size)
    types = [_CONTROL] * n_control + [_NORMAL] * (len(tokens) - n_control)
    return Vocabulary(model="gpt2", pre="smollm", tokens=tokens, types=types, merges=merges, bos=1, eos=2)


def _sentence_piece(size: int | None) -> Vocabulary:
    tokens = ["<unk>", "<s>", "</s>", *CONTROL_TOKENS[1:]]
    types = [_UNKNOWN, *[_CONTROL] * 4]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    types += [_BYTE] * 256
    pieces = dict.fromkeys(["▁", *map(chr, range(0x21, 0x7F))])
    for word in _WORDS.split():  # pieces are joined two at a time: every beginning must be one
        pieces.update(dict.fromkeys("▁" + word[:end] for end in range(1, len(word) + 1)))
    tokens += pieces
    tokens += _fillers("▁", len(tokens), size)
    types += [_NORMAL] * (len(tokens) - len(types))
    return Vocabulary(model="llama", tokens=tokens, types=types, scores=[-float(i) for i in range(len(tokens))], bos=1, eos=2)


def _byte_letters() -> dict[int, str]:
    """GPT-2's table: the visible letter that stands for each byte. Printable Latin-1 stands for itself, the rest is moved up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + i) for i, byte in enumerate(hidden)}


def _fillers(space: str, count: int, size: int | None) -> list[str]:
    if size is not None and size < count:
        raise ValueError(f"the vocabulary needs at least {count} tokens")
    return [f"{space}w{i}" for i in range((size or count) - count)]
