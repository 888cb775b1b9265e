"""The two passes all measures are taken in: a walk through the layers without gradients, and one backward pass without a weight's gradient.

What a measure wants to see it watches with hooks on the model's modules. Only the gradients of activations are computed: from these and
the activations everything else follows (``sum_t x g`` is the gradient of a mask on x; ``G^T X`` that of a matrix), and a weight's
gradient is never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_rt.hooks import DataError, OptionError
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.logits import pieces
from edge_rt_distill.model.rows import Rows

SeesGradient = Callable[[Tensor, Tensor], None]
"""Takes an activation [B, T, n] and the loss' gradient by it."""
SeesValue = Callable[[Tensor], None]
"""Takes an activation [B, T, n]."""


class Step(NamedTuple):
    """One layer of a walk: the residual stream [B, T, D] before and behind it, and its attention [B, H, T, T]."""

    layer: int
    entry: Tensor
    exit: Tensor
    attention: Tensor | None


class Backward(NamedTuple):
    """What a backward pass gives by itself: the loss of each sequence [B] (nats, summed over the predictions that count),
    the embeddings [B, T, D] and the loss' gradient by them."""

    loss: Tensor
    embeddings: Tensor
    gradient: Tensor


def check_own_parameters(model: Decoder) -> None:
    """Raises OptionError for a model whose layers share parameters: its measures by layer would be of several layers at once."""
    if len({id(layer) for layer in model.layers}) < len(model.layers):
        raise OptionError("a model whose layers share parameters cannot be diagnosed layer by layer; diagnose the one it was made of")


def walk(model: Decoder, tokens: Tensor, *, attention: bool = False) -> Iterator[Step]:
    """Layer by layer through a batch [B, T]; only one layer's attention is in memory at a time.

    Raises DataError, with the layer, if something is no number.
    """
    with torch.no_grad():
        state = model.token_embd(tokens)
        turn = model.turn(torch.arange(tokens.shape[1], device=tokens.device))
    if not torch.isfinite(state).all():
        raise DataError("the teacher's token embeddings have values that are no numbers; its file is damaged, get it again")
    for number, layer in enumerate(model.layers):
        with torch.no_grad():
            after, maps = layer(state, turn, maps=attention)
        if not torch.isfinite(after).all():
            raise DataError(f"layer {number} of the teacher gives values that are no numbers; its weights are damaged, get it again")
        yield Step(number, state, after, maps)
        state = after


@contextmanager
def inputs(watched: Sequence[tuple[nn.Module, SeesValue]]) -> Iterator[None]:
    """While open, each module's input is shown before the module runs."""
    with ExitStack() as stack:
        for module, sees in watched:
            handle = module.register_forward_pre_hook(lambda _, args, sees=sees: sees(args[0]))
            stack.callback(handle.remove)
        yield


class Watch(NamedTuple):
    """What is to be seen of a module in the backward pass. ``of``: "input" or "output".

    ``sees`` takes the value and its gradient; for ``of`` "matrix" a linear's input and the gradient by its output.
    """

    module: nn.Module
    of: str
    sees: SeesGradient


@contextmanager
def _gradients(watched: Sequence[Watch]) -> Iterator[None]:
    def listen(one: Watch, value: Tensor, shown: Tensor) -> None:
        hook: Callable[..., Any] = value.register_hook  # torch gives it no type
        hook(lambda gradient: one.sees(shown, gradient))

    with ExitStack() as stack:
        for one in watched:
            if one.of == "input":
                handle = one.module.register_forward_pre_hook(lambda _, args, one=one: listen(one, args[0], args[0].detach()))
            elif one.of == "output":
                handle = one.module.register_forward_hook(lambda _, __, out, one=one: listen(one, out, out.detach()))
            else:
                handle = one.module.register_forward_hook(lambda _, args, out, one=one: listen(one, out, args[0].detach()))
            stack.callback(handle.remove)
        yield


def backward(model: Decoder, rows: Rows, watched: Sequence[Watch] = (), sample: torch.Generator | None = None) -> Backward:
    """Forward and back through one batch; parameters get no gradients. ``watched`` see theirs on the way.

    The loss is the negative log-likelihood of the sequence's own next tokens, or, with ``sample``, of tokens drawn from the model.
    Raises DataError if the loss is no number.
    """
    with torch.enable_grad(), _gradients(watched):
        embeddings = model.token_embd(rows.tokens).detach().requires_grad_()
        hidden = model.run(embeddings).hidden
        loss, by_hidden = next_token_loss(model, hidden.detach(), rows, sample)
        if not torch.isfinite(loss).all():
            for _ in walk(model, rows.tokens):  # says which layer it was
                pass
            raise DataError("the teacher's logits are no numbers; its output matrix is damaged, get it again")
        (gradient,) = torch.autograd.grad(hidden, embeddings, by_hidden)
    return Backward(loss, embeddings.detach(), gradient)


def next_token_loss(model: Decoder, hidden: Tensor, rows: Rows, sample: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Each sequence's summed loss [B], and its gradient by the final states [B, T, D], with few logits in memory at a time."""
    where, step = rows.mask.nonzero(as_tuple=True)
    labels = rows.tokens[where, step + 1]
    loss = torch.zeros(len(rows.tokens), dtype=torch.float64)
    gradient = torch.zeros_like(hidden)
    for some in pieces(len(where), model.architecture.vocabulary):
        b, t = where[some], step[some]
        with torch.enable_grad():
            states = hidden[b, t].requires_grad_()
            logits = model.logits(states)
            wanted = labels[some]
            if sample is not None and torch.isfinite(logits).all():
                wanted = torch.multinomial(logits.detach().softmax(-1), 1, generator=sample).squeeze(1)
            each = F.cross_entropy(logits, wanted, reduction="none")
            (gradient[b, t],) = torch.autograd.grad(each.sum(), states)
        loss.index_add_(0, b, each.detach().double())
    return loss, gradient


def counted(rows: Rows) -> Tensor:
    """Predictions that count, by sequence [B] (float64)."""
    return rows.mask.sum(1).double()
