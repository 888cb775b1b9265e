"""Answers of a model: several prompts at once, with a cache, each with a random sequence of its own.

Answers are of different lengths: where a quarter of the rows have ended, those that go on close up and the next prompts join them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_rt.hooks import OptionError
from edge_rt_distill.model.decoder import Cache, Decoder
from edge_rt_distill.progress import Told, quiet

FULL = 0.75
"""Share of the rows that go on, above which they stay as they are: closing up copies the caches."""
_BLOCK = 256
"""Tokens whose probabilities are summed before one is drawn, so that few sums are made in double precision."""


class Rollout(NamedTuple):
    """An answer: its tokens, their log-probabilities (nats, at temperature 1), whether it ended by itself (its last token is the end)."""

    tokens: list[int]
    logprobs: list[float]
    ended: bool


@dataclass
class _Answer:
    """One that is being written."""

    draw: torch.Generator
    most: int
    end: int | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] == self.end

    @property
    def done(self) -> bool:
        return self.ended or len(self.tokens) == self.most


class _Rows(NamedTuple):
    """Answers side by side. ``who`` [B]: which; ``ids`` [B, 1]: the token of each that has not been run; ``caches``: what came before it,
    in cells ``pads[row]`` .. ``past`` - 1."""

    who: list[int]
    ids: Tensor
    pads: Tensor
    caches: list[Cache]
    past: int


@torch.no_grad()
def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], *, tokens: int, temperature: float = 1.0, seed: int = 0, end: int | None = None,
    top_k: int = 0, batch: int = 16, told: Told = quiet,
) -> list[Rollout]:  # fmt: skip
    """An answer of at most ``tokens`` tokens to each prompt, in their order.

    ``temperature`` 0: the likeliest token. ``top_k``: choose among so many, 0: all. ``told`` is called with prompts done and in all.
    Each prompt draws from a random sequence made of ``seed``, its tokens and its place: equal calls give equal answers.
    Raises OptionError for an empty prompt, or one that leaves no room in the model's context.
    """
    longest = model.architecture.context - tokens
    for prompt in prompts:
        if not prompt or len(prompt) > longest:
            raise OptionError(f"a prompt of {len(prompt)} tokens cannot be answered: it must have between 1 and {longest}")
    waiting = deque(sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)))  # alike in length: little padding
    answers = [_Answer(_generator(seed, i, prompt), tokens, end) for i, prompt in enumerate(prompts)]
    rows, going = _Rows([], torch.zeros(0, 1), torch.zeros(0), [], 0), list[int]()
    while going or waiting:
        if len(going) <= FULL * len(rows.who):
            joining = [waiting.popleft() for _ in range(min(batch - len(going), len(waiting)))]
            rows = _together(model, [(rows, going), *([(_begun(model, prompts, joining), range(len(joining)))] if joining else [])], tokens)
        ids = _next(model, rows, [answers[i] for i in rows.who], temperature, top_k)
        rows = rows._replace(ids=ids, past=rows.past + 1)
        before, going = len(going), [row for row, i in enumerate(rows.who) if not answers[i].done]
        if len(going) < before or not going:
            told(len(prompts) - len(waiting) - len(going), len(prompts))
    return [Rollout(one.tokens, one.logprobs, one.ended) for one in answers]


def _generator(seed: int, place: int, prompt: Sequence[int]) -> torch.Generator:
    data = f"{seed} {place} {' '.join(map(str, prompt))}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1)


def _begun(model: Decoder, prompts: Sequence[Sequence[int]], who: Sequence[int]) -> _Rows:
    """Prompts side by side, all but the last token of each run; they are padded on the left, and the padding is never attended to."""
    past = max(len(prompts[i]) for i in who) - 1
    ids = torch.zeros(len(who), past + 1, dtype=torch.long)
    pads = torch.tensor([past + 1 - len(prompts[i]) for i in who])
    for row, i in enumerate(who):
        ids[row, int(pads[row]) :] = torch.tensor(prompts[i])
    caches = _empty(model, len(who), past)
    if past:
        _step(model, ids[:, :-1], 0, caches, pads)
    return _Rows(list(who), ids[:, -1:], pads, caches, past)


def _empty(model: Decoder, rows: int, cells: int) -> list[Cache]:
    a = model.architecture
    return [Cache(*(torch.zeros(rows, shape.kv_heads, cells, a.head) for _ in range(2))) for shape in a.layers]


def _together(model: Decoder, parts: Sequence[tuple[_Rows, Sequence[int]]], tokens: int) -> _Rows:
    """Some rows of each part, as one, with their ends in the same cell and room for so many tokens more."""
    chosen = [(part, list(rows), part.past - int(part.pads[list(rows)].min())) for part, rows in parts if rows]
    past = max(width for _, _, width in chosen)
    caches = _empty(model, sum(len(rows) for _, rows, _ in chosen), past + tokens)
    first = 0
    for part, rows, width in chosen:
        for whole, old in zip(caches, part.caches, strict=True):
            for into, one in zip(whole, old, strict=True):
                into[first : first + len(rows), :, past - width : past] = one[rows, :, part.past - width : part.past]
        first += len(rows)
    pads = torch.cat([part.pads[rows] + past - part.past for part, rows, _ in chosen])
    ids = torch.cat([part.ids[rows] for part, rows, _ in chosen])
    return _Rows([part.who[row] for part, rows, _ in chosen for row in rows], ids, pads, caches, past)


def _next(model: Decoder, rows: _Rows, answers: Sequence[_Answer], temperature: float, top_k: int) -> Tensor:
    """Run a token of each row, and add the one that is drawn to answers that are not done. Returns what was drawn [B, 1]."""
    scores = model.logits(_step(model, rows.ids, rows.past, rows.caches, rows.pads))
    ids = _draw(scores, temperature, [one.draw for one in answers], top_k)
    logprobs = scores.gather(-1, ids)[:, 0] - scores.logsumexp(-1)
    for one, token, logprob in zip(answers, ids[:, 0].tolist(), logprobs.tolist(), strict=True):
        if not one.done:
            one.tokens.append(token)
            one.logprobs.append(logprob)
    return ids


def _step(model: Decoder, ids: Tensor, past: int, caches: Sequence[Cache], pads: Tensor) -> Tensor:
    """The hidden state [B, D] behind the last of some tokens [B, T], which are appended to the caches."""
    places, cells = torch.arange(past, past + ids.shape[1]), torch.arange(past + ids.shape[1])
    turn = model.turn((places - pads[:, None]).clamp(min=0))
    turn = type(turn)(turn.cos[:, None], turn.sin[:, None])
    here = places[:, None]
    mask = ((cells >= pads[:, None])[:, None, None] & (cells <= here)) | (cells == here)
    x = model.token_embd(ids)
    for layer, cache in zip(model.layers, caches, strict=True):
        x, _ = layer(x, turn, mask=mask, cache=cache, past=past)
    last: Tensor = model.output_norm(x[:, -1])
    return last


def _draw(scores: Tensor, temperature: float, draws: Sequence[torch.Generator], top_k: int) -> Tensor:
    """A token for each row of logits [B, V], as [B, 1]: the first at which the sum of probabilities passes a random number."""
    if temperature <= 0:
        return scores.argmax(-1, keepdim=True)
    scores = scores / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k, -1).values[:, -1:], float("-inf"))
    blocks = F.pad(scores.softmax(-1), (0, -scores.shape[-1] % _BLOCK)).view(len(scores), -1, _BLOCK)
    uniform = torch.stack([torch.rand(1, generator=draw, dtype=torch.float64) for draw in draws])
    # In single precision unlikely tokens would add nothing to a sum near 1.
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = uniform * sums[:, -1:]
    block = _first(sums, wanted)
    inside = blocks[torch.arange(len(blocks)), block[:, 0]].double().cumsum(-1)
    return block * _BLOCK + _first(inside, wanted - F.pad(sums, (1, 0)).gather(-1, block))


def _first(sums: Tensor, numbers: Tensor) -> Tensor:
    """For each row of rising sums [B, N] the first place that passes its number [B, 1]; where rounding left none, the last that adds."""
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.searchsorted(sums, numbers, right=True).minimum(last)
