"""How likely a model in torch finds options, for the engines that run one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edge_rt_distill.sandbox.items import Message


def option_nats(
    before: str | Sequence[Message], options: Sequence[str], *, chat: Callable[[Sequence[Message]], list[int]],
    tokens: Callable[[str], list[int]], start: Sequence[int], logits: Callable[[list[int], int], Tensor],
) -> list[float]:  # fmt: skip
    """The log-likelihood in nats of each option behind a text, whose tokens then count with each, or as the answer to messages.

    ``chat``: the tokens of messages up to where the answer begins. ``tokens``: of a text. ``start``: what a text's first token is told
    from. ``logits``: of all tokens, from a position on, [n, V].
    """
    if isinstance(before, str):
        rows, shared = [[*start, *tokens(before + option)] for option in options], len(start)
    else:
        prompt = chat(before)
        rows, shared = [[*prompt, *tokens(option)] for option in options], len(prompt)
    found = []
    for row in rows:
        told = torch.log_softmax(logits(row, shared - 1)[:-1].double(), -1)
        found.append(float(told.gather(1, torch.tensor(row[shared:], device=told.device)[:, None]).sum()))
    return found
