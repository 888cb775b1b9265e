"""Fewer tokens: a tokeniser of GPT-2's kind without some of those it merges, and the teacher with it (Ushio et al. 2023, arXiv:2305.15020).

In a small model the embedding is much of the weights, and all of it is read for every token that is written. A token that is left out is
written as those it was merged from: texts stay what they are, and some get longer.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from edge_rt.hooks import ModelFile, ModelFileError, OptionError, UnsupportedModel, gguf_metadata_spans
from edge_rt_distill import metadata
from edge_rt_distill.files import write_file
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.load import Teacher, frozen
from edge_rt_distill.model.precision import Rest
from edge_rt_distill.model.tokens import Tokeniser

_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_HUGGING_FACE = "tokenizer.huggingface.json"
"""The tokeniser once more, for other readers: wrong when tokens are gone."""
_OF_TOKENS = {"tokenizer.ggml.token_type": (metadata.INT32, "i"), "tokenizer.ggml.scores": (metadata.FLOAT32, "f")}
"""Arrays with a number for each token, and how they are written."""
_EVEN = 64
"""Tokens are a multiple of it: rows of the head are multiplied in blocks."""


class Merges(NamedTuple):
    """A tokeniser. ``pairs``: what is merged, by rank; ``made``: what that gives; ``parts``: of a token that merges make, the pair that
    does so first. All are numbers of ``tokens``."""

    tokens: list[bytes]
    pairs: list[tuple[int, int]]
    made: list[int]
    parts: dict[int, tuple[int, int]]


def read_merges(source: Path) -> Merges:
    """The tokeniser in a GGUF. Raises UnsupportedModel for one of another kind, ModelFileError for a damaged one."""
    file = ModelFile.open(source)
    try:
        kind = file.header.optional("tokenizer.ggml.model", str, "none")
        if kind != "gpt2":
            raise UnsupportedModel(f"{source}: a tokeniser of the kind {kind} cannot do without tokens; leave student.vocabulary at 1")
        tokens, lines = file.header.raw_strings(_TOKENS), file.header.raw_strings(_MERGES)
    finally:
        file.close()
    number = {token: i for i, token in enumerate(tokens)}
    found = Merges(tokens, [], [], {})
    for line in lines:
        left, _, right = line.partition(b" ")  # spaces in tokens are written otherwise
        if not {left, right, left + right} <= number.keys():
            raise ModelFileError(f"{source} merges {line.decode(errors='replace')!r}, which are not all tokens; convert the model again")
        pair, whole = (number[left], number[right]), number[left + right]
        found.pairs.append(pair)
        found.made.append(whole)
        found.parts.setdefault(whole, pair)
    return found


def choose(merges: Merges, counts: Mapping[int, int], share: float) -> list[int]:
    """The tokens that are kept, rising: all that no merge makes, then those that ``counts`` has most often, then the commonest of what the
    tokeniser was made from (which it merges first); each with what it is merged from. Raises OptionError for a share that has no room for
    them."""
    size = int(share * len(merges.tokens)) // _EVEN * _EVEN
    kept = {token for token in range(len(merges.tokens)) if token not in merges.parts}
    if len(kept) > size:
        raise OptionError(f"{len(kept)} tokens cannot be left out, and {share} of all are {size}; raise student.vocabulary")
    used = sorted((token for token, count in counts.items() if count > 1), key=lambda token: (-counts[token], token))
    for token in (*used, *merges.made):
        needed = set[int]()
        _with_parts(token, merges, kept, needed)
        if len(kept) + len(needed) <= size:
            kept |= needed
    return sorted(kept)


def _with_parts(token: int, merges: Merges, kept: set[int], needed: set[int]) -> None:
    if token not in kept and token not in needed:
        needed.add(token)
        for part in merges.parts[token]:
            _with_parts(part, merges, kept, needed)


def beginnings(merges: Merges, kept: Sequence[int]) -> list[int]:
    """Of each token the number, among those kept, of the one that it begins with: itself, where it is kept."""
    place = {token: i for i, token in enumerate(kept)}
    found = []
    for token in range(len(merges.tokens)):
        while token not in place:
            token = merges.parts[token][0]
        found.append(place[token])
    return found


def write_fewer(source: Path, merges: Merges, kept: Sequence[int], out: Path) -> None:
    """A GGUF without tensors that has the vocabulary and metadata of another, but only those tokens. Raises ModelFileError, UserError."""
    place = {token: i for i, token in enumerate(kept)}
    file = ModelFile.open(source)
    try:
        spans = gguf_metadata_spans(file.map)[1]
        entries = [_entry(file, key, bytes(file.map[start:end]), merges, place) for key, start, end in spans]
    finally:
        file.close()
    entries = [one for one in entries if one]
    write_file(out, metadata.start(0, len(entries)) + b"".join(entries))


def _entry(file: ModelFile, key: str, before: bytes, merges: Merges, place: Mapping[int, int]) -> bytes:
    """An entry of metadata as it is with fewer tokens; nothing, where it is of no use then."""
    if key == _TOKENS:
        return _strings(key, [merges.tokens[token] for token in place])
    if key == _MERGES:
        pairs = zip(merges.pairs, merges.made, strict=True)
        return _strings(key, [merges.tokens[i] + b" " + merges.tokens[j] for (i, j), whole in pairs if {i, j, whole} <= place.keys()])
    if key in _OF_TOKENS:
        number, letter = _OF_TOKENS[key]
        values = file.header.get(key)
        return metadata.array(key, number, len(place), struct.pack(f"<{len(place)}{letter}", *(values[token] for token in place)))
    if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
        token = place.get(file.header.get(key))
        return b"" if token is None else metadata.entry(key, token)
    return b"" if key == _HUGGING_FACE else before


def _strings(key: str, items: Sequence[bytes]) -> bytes:
    return metadata.array(key, metadata.STRING, len(items), b"".join(map(metadata.string, items)))


class Fewer(NamedTuple):
    """The teacher with fewer tokens. ``kept``: its own number of each. ``rest``: what it says of those that are gone."""

    teacher: Teacher
    kept: list[int]
    rest: Rest


def with_fewer(teacher: Teacher, merges: Merges, kept: Sequence[int], source: Path) -> Fewer:
    """The teacher with the tokens ``kept``; it shares its layers. ``source``: the GGUF of ``write_fewer``."""
    old, first = teacher.model, beginnings(merges, kept)
    with torch.device("meta"):
        model = Decoder(replace(old.architecture, vocabulary=len(kept)))
    model.layers, model.output_norm = old.layers, old.output_norm
    for ours, theirs in ((model.token_embd, old.token_embd), (model.output, old.output)):
        if ours is not None and theirs is not None:
            ours.weight = nn.Parameter(theirs.weight[torch.tensor(kept)], requires_grad=False)
    there = set(kept)
    gone = [token for token in range(len(first)) if token not in there]
    rest = Rest(old.head_weight[gone].detach(), torch.tensor([first[token] for token in gone], dtype=torch.long))
    return Fewer(Teacher(frozen(model), Tokeniser(source), teacher.origin, teacher.digest), list(kept), rest)
