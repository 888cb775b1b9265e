"""Answers of a model: several prompts at once, with a cache, each with a random sequence of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from edge_rt.hooks import OptionError
from edge_rt_distill.model.decoder import Cache, Decoder
from edge_rt_distill.progress import Told, quiet


class Rollout(NamedTuple):
    """An answer: its tokens, their log-probabilities (nats, at temperature 1), whether it ended by itself (its last token is the end)."""

    tokens: list[int]
    logprobs: list[float]
    ended: bool


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
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))  # alike in length: little padding
    found: dict[int, Rollout] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        draws = [_generator(seed, i, prompts[i]) for i in chosen]
        for i, rollout in zip(chosen, _batch(model, [prompts[i] for i in chosen], tokens, temperature, draws, end, top_k), strict=True):
            found[i] = rollout
        told(len(found), len(prompts))
    return [found[i] for i in range(len(prompts))]


def _generator(seed: int, place: int, prompt: Sequence[int]) -> torch.Generator:
    data = f"{seed} {place} {' '.join(map(str, prompt))}".encode()
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(data).digest()[:8], "little") >> 1)


@torch.no_grad()
def _batch(
    model: Decoder, prompts: Sequence[Sequence[int]], tokens: int, temperature: float, draws: Sequence[torch.Generator], end: int | None,
    top_k: int,
) -> list[Rollout]:  # fmt: skip
    """Answer prompts side by side, padded on the left; the padding is never attended to."""
    width, count = max(map(len, prompts)), len(prompts)
    ids = torch.zeros(count, width, dtype=torch.long)
    pads = torch.tensor([width - len(prompt) for prompt in prompts])
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
    a, capacity = model.architecture, width + tokens
    caches = [
        Cache(*(torch.zeros(count, shape.kv_heads, capacity, a.head) for _ in range(2))) for shape in a.layers
    ]  # fmt: skip
    visible = torch.arange(capacity) >= pads[:, None]  # [B, capacity]
    answers: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    ended, past = [False] * count, 0
    for _ in range(tokens):
        hidden = _step(model, ids, past, caches, visible, pads)
        past += ids.shape[1]
        found = torch.log_softmax(model.logits(hidden), -1)  # [B, V]
        ids = _draw(found, temperature, draws, top_k)
        for row in range(count):
            if not ended[row]:
                token = int(ids[row])
                answers[row].append(token)
                logprobs[row].append(float(found[row, token]))
                ended[row] = token == end
        if all(ended):
            break
    return [Rollout(*one) for one in zip(answers, logprobs, ended, strict=True)]


def _step(model: Decoder, ids: Tensor, past: int, caches: Sequence[Cache], visible: Tensor, pads: Tensor) -> Tensor:
    """The hidden state [B, D] behind the last of some tokens [B, T], which are appended to the caches."""
    length = ids.shape[1]
    places = torch.arange(past, past + length)
    turn = model.turn((places - pads[:, None]).clamp(min=0))
    turn = type(turn)(turn.cos[:, None], turn.sin[:, None])
    causal = torch.arange(past + length) <= places[:, None]
    mask = (visible[:, None, None, : past + length] & causal) | (torch.arange(past + length) == places[:, None])
    x = model.token_embd(ids)
    for layer, cache in zip(model.layers, caches, strict=True):
        x, _ = layer(x, turn, mask=mask, cache=cache, past=past)
    last: Tensor = model.output_norm(x[:, -1])
    return last


def _draw(logprobs: Tensor, temperature: float, draws: Sequence[torch.Generator], top_k: int) -> Tensor:
    """A token for each row [B, V], as [B, 1]: the first at which the sum of probabilities passes a random number."""
    if temperature <= 0:
        return logprobs.argmax(-1, keepdim=True)
    scores = logprobs / temperature
    if top_k:
        scores = scores.masked_fill(scores < scores.topk(top_k, -1).values[:, -1:], float("-inf"))
    sums = scores.softmax(-1).double().cumsum(-1)  # in single precision unlikely tokens would add nothing
    uniform = torch.stack([torch.rand(1, generator=draw, dtype=torch.float64) for draw in draws])
    return torch.searchsorted(sums, uniform * sums[:, -1:], right=True).clamp_max(sums.shape[-1] - 1)
