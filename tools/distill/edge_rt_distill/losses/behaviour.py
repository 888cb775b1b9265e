"""Level 4, behaviour: what the teacher does when it does well, and the student's own answers with the teacher as judge.

- Imitation: negative log-likelihood of rollouts that a reward kept, weighted token by token (end and format tokens more).
- Preference: direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) of pairs of a better and a worse answer:
  -log sigmoid(beta x ((log q(chosen) - log p(chosen)) - (log q(rejected) - log p(rejected)))). The reference p is the teacher: the
  optimum is then q ~ p exp(reward / beta), the teacher tilted to what is rewarded, which is what is to be distilled. The student's own
  start as a reference would hold it to a model that surgery has just damaged, and the reference-free form (SimPO, Meng et al. 2024,
  arXiv:2405.14734) to none at all; the teacher is in memory anyway. Log-probabilities are means over an answer's tokens, as SimPO has
  them: a damaged student loses tenths of a nat a token, which summed over a long rejected answer and a short chosen one would be a lead
  of its own (with sums, the loss of a student of SmolLM2 with 80 % of its parameters was 1e-8 from the first step).
- On-policy: reverse KL on the student's own rollouts, position by position (GKD, Agarwal et al. 2023, arXiv:2306.13649).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edge_rt_distill.losses.token import TokenLoss, TokenOptions, token_logprobs, token_loss
from edge_rt_distill.model.divergence import Final
from edge_rt_distill.model.rows import Rows


def imitation_loss(hidden: Tensor, weight: Tensor, batch: Rows) -> Tensor:
    """Weighted mean negative log-likelihood in nats. ``hidden`` [B, T, D]: the student's on ``batch.tokens``; ``weight``: its head."""
    return token_loss(
        hidden.flatten(0, 1), weight, None, weights=batch.mask.flatten(), labels=batch.labels.flatten(),
        options=TokenOptions(cross_entropy=1.0),
    ).loss  # fmt: skip


def answer_logprobs(hidden: Tensor, weight: Tensor, batch: Rows) -> Tensor:
    """Sum over an example's weighted tokens of weight x log q [B]."""
    at = batch.mask > 0
    return weighted(token_logprobs(hidden[at], weight, batch.labels[at]), batch)


def weighted(each: Tensor, batch: Rows) -> Tensor:
    """Sum over an example's weighted tokens of weight x a value [B], of the values of all of them in a row."""
    at = batch.mask > 0
    return each.new_zeros(len(batch.tokens)).index_add(0, at.nonzero()[:, 0], each * batch.mask[at].to(each))


def preference_loss(student: Tensor, teacher: Tensor, beta: float = 2.0) -> Tensor:
    """DPO. ``student``, ``teacher`` [2, N]: mean log-probabilities a token of N chosen answers, and of the rejected ones. At equality
    log 2. ``beta`` is SimPO's.
    """
    lead = (student[0] - student[1]) - (teacher[0] - teacher[1])
    return -F.logsigmoid(beta * lead).mean()


def on_policy_loss(hidden: Tensor, weight: Tensor, teacher: Final, batch: Rows, options: TokenOptions) -> TokenLoss:
    """Reverse KL (or what ``options`` says) on the student's own answers. ``teacher``: rows for all B x T positions."""
    return token_loss(hidden.flatten(0, 1), weight, teacher, weights=batch.mask.flatten(), options=options)
