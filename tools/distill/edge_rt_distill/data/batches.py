"""Samples -> sequences of tokens -> batches of similar length; each order is a function of (seed, epoch), so that a run can resume.

Which predictions count: all of a text; of a conversation only the assistant's words and the end of its turn.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from edge_rt.hooks import DataError
from edge_rt_distill.data.samples import Sample
from edge_rt_distill.model.rows import Rows, TokenSequence, grouped, rows_of
from edge_rt_distill.model.tokens import Tokeniser


class Share(NamedTuple):
    """What a source gave to a mixture. ``passes``: how often it was gone through; Muennighoff et al. 2023 (arXiv 2305.16264) found
    up to four passes to be worth nearly as much as new data."""

    wanted: float
    tokens: int
    targets: int
    sequences: int
    passes: float


class Mixture(NamedTuple):
    sequences: list[TokenSequence]
    shares: dict[str, Share]


def encode(
    samples: Sequence[Sample], tokeniser: Tokeniser, length: int, *, told: Callable[[str], None] | None = None
) -> list[TokenSequence]:
    """The sequences of ``samples``, none longer than ``length`` tokens, in their order.

    A longer text becomes several. A longer conversation is cut behind ``length``, and left out if no answer begins before that;
    prompts without an answer are left out too. ``told`` gets one line about what was cut and left out.
    Raises ``DataError`` if nothing is left, or for tokens outside the model's vocabulary.
    """
    if length < 2:
        raise DataError(f"a sequence of {length} tokens has nothing to predict; choose a length of at least 2")
    found: list[TokenSequence] = []
    cut = left_out = 0
    end = turn_end(tokeniser) if any(sample.messages for sample in samples) else -1
    for sample in samples:
        made = _text(sample, tokeniser, length) if sample.text else _conversation(sample, tokeniser, end)
        fitting = [TokenSequence(item.tokens[:length], item.targets[:length], item.sample) for item in made]
        kept = [item for item in fitting if any(item.targets)]
        cut += sum(len(item.tokens) > length for item in made)
        left_out += not kept
        found += kept
    _check_ids(found, tokeniser)
    if told is not None and (cut or left_out):
        told(f"{cut} of {len(samples)} samples were cut at {length} tokens, {left_out} left out (no answer within that length)")
    if not found:
        raise DataError(f"none of {len(samples)} samples has an answer or a text within {length} tokens; add some, or raise the length")
    return found


def _check_ids(sequences: Sequence[TokenSequence], tokeniser: Tokeniser) -> None:
    for item in sequences:
        if item.tokens and not (min(item.tokens) >= 0 and max(item.tokens) < tokeniser.size):
            raise DataError(
                f"sample {item.sample}: token {max(item.tokens)} is not in the model's vocabulary of {tokeniser.size}; "
                "the tokenizer is another model's: name the right one"
            )


def _text(sample: Sample, tokeniser: Tokeniser, length: int) -> list[TokenSequence]:
    tokens = tokeniser.encode(sample.text)
    pieces = [tokens[at : at + length] for at in range(0, len(tokens), length)]
    return [TokenSequence(piece, [False] + [True] * (len(piece) - 1), sample.id) for piece in pieces if len(piece) > 1]


def as_dicts(sample: Sample, count: int | None = None) -> list[dict[str, str]]:
    """The first ``count`` messages in the form that tokenisers take."""
    return [{"role": message.role, "content": message.content} for message in sample.messages[:count]]


def question(sample: Sample, tokeniser: Tokeniser) -> list[int]:
    """The tokens of a sample's last question and what came before it, in the model's template, up to where the answer begins."""
    return tokeniser.chat(as_dicts(sample, len(sample.prompt)), answer=True)


def turn_end(tokeniser: Tokeniser) -> int:
    """The token with which the model's template ends an answer, so what the model writes when it is done; else ``tokeniser.end``.

    They differ where a vocabulary has a token for the end of a text too, as SmolLM2's: it calls that one the end of a turn.
    """
    question = {"role": "user", "content": "a"}
    before = tokeniser.chat([question], True)
    after = tokeniser.chat([question, {"role": "assistant", "content": "b"}], False)
    words = tokeniser.encode("b")
    if after[: len(before)] == before and after[len(before) : len(before) + len(words)] == words:
        rest = after[len(before) + len(words) :]
        if rest and not tokeniser.decode(rest[:1]):  # a control token has no text
            return rest[0]
    return tokeniser.end


def _conversation(sample: Sample, tokeniser: Tokeniser, end: int) -> list[TokenSequence]:
    """One sequence in which all answers count; or one an answer, where the template writes earlier turns another way than the last."""
    answers = [index for index, message in enumerate(sample.messages) if message.role == "assistant"]
    if not answers:
        return []
    tokens = tokeniser.chat(as_dicts(sample, answers[-1] + 1), False)
    targets = [False] * len(tokens)
    last = 0
    for index in answers:
        before = tokeniser.chat(as_dicts(sample, index), True)
        first = len(before)
        last = next((at for at in range(first, len(tokens)) if tokens[at] == end), 0)
        words = tokeniser.decode(tokens[first:last])
        if not before or not last or tokens[:first] != before or words.strip() != sample.messages[index].content.strip():
            return [_answer(sample, index, tokeniser, end) for index in answers]
        targets[first : last + 1] = [True] * (last + 1 - first)
    return [TokenSequence(tokens[: last + 1], targets[: last + 1], sample.id)]


def _answer(sample: Sample, index: int, tokeniser: Tokeniser, end: int) -> TokenSequence:
    """What the model itself would write: the prompt as it is given to it, the words, the end of the turn."""
    before = tokeniser.chat(as_dicts(sample, index), True)
    words = [*tokeniser.encode(sample.messages[index].content), end]
    return TokenSequence([*before, *words], [False] * len(before) + [True] * len(words), sample.id)


WINDOW = 32
"""Batches whose sequences are sorted by length together: enough that rows are alike, few enough that each epoch's batches differ."""


def plan(lengths: Sequence[int], batch_tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """Which sequences stand in which batch, the same for the same arguments: every one once, rows x longest <= ``batch_tokens``.

    A sequence that is longer than that is a batch by itself.
    """
    if batch_tokens < 1:
        raise DataError(f"a batch of {batch_tokens} tokens holds nothing; choose at least the length of a sequence")
    order = list(range(len(lengths)))
    dice = random.Random(f"batches {seed} {epoch}")
    dice.shuffle(order)
    window = max(1, WINDOW * batch_tokens * len(lengths) // max(1, sum(lengths)))
    found: list[list[int]] = []
    for start in range(0, len(order), window):
        some = sorted(order[start : start + window], key=lambda index: lengths[index])  # stable: equals stay shuffled
        found += grouped(lengths, batch_tokens, some)
    dice.shuffle(found)
    return found


def batches(sequences: Sequence[TokenSequence], batch_tokens: int, seed: int, epoch: int, start: int = 0) -> Iterator[Rows]:
    """The batches of an epoch from number ``start`` on: going on at ``start`` gives what the whole epoch would have given from there."""
    if not sequences:
        raise DataError("no sequences to make batches of; check that the samples have answers or text")
    for numbers in plan([len(item.tokens) for item in sequences], batch_tokens, seed, epoch)[start:]:
        yield rows_of(sequences, numbers)


def mix(sources: Mapping[str, Sequence[TokenSequence]], weights: Mapping[str, float], tokens: int, *, seed: int, epoch: int = 0) -> Mixture:
    """About ``tokens`` tokens of several sources, shares as ``weights``, each source from where the epoch before left it.

    Each source is gone through in an order shuffled anew on each pass. A source gives at most one sequence more than its share.
    Raises ``DataError`` for empty or unknown sources and weights that are no shares.
    """
    if set(sources) != set(weights):
        raise DataError(f"sources are {', '.join(sorted(sources))} and weights {', '.join(sorted(weights))}; name the same in both")
    total = sum(weights.values())
    if not (0 < total < float("inf")) or min(weights.values()) < 0 or tokens < 1:
        raise DataError("weights of sources are not negative, not all zero, and at least one token is wanted; mend them")
    found: list[TokenSequence] = []
    shares: dict[str, Share] = {}
    for name in sorted(sources):
        taken, passes = _take(sources[name], name, int(tokens * weights[name] / total), seed, epoch)
        targets = sum(sum(item.targets) for item in taken)
        shares[name] = Share(weights[name] / total, sum(len(item.tokens) for item in taken), targets, len(taken), passes)
        found += taken
    random.Random(f"mix {seed} {epoch}").shuffle(found)
    return Mixture(found, shares)


def _take(source: Sequence[TokenSequence], name: str, budget: int, seed: int, epoch: int) -> tuple[list[TokenSequence], float]:
    """(sequences of at least ``budget`` tokens, share of the source that is), after those that earlier epochs took."""
    if budget and not any(item.tokens for item in source):
        raise DataError(f"the source {name} is empty; leave it out or set its weight to 0")
    taken: list[TokenSequence] = []
    order: list[int] = []
    position = 0
    for _ in range(epoch + 1 if budget else 0):
        taken, got = [], 0
        while got < budget:
            if position % len(source) == 0:
                order = list(range(len(source)))
                random.Random(f"{name} {seed} {position // len(source)}").shuffle(order)
            taken.append(source[order[position % len(source)]])
            got += len(taken[-1].tokens)
            position += 1
    return taken, len(taken) / len(source) if source else 0.0
