"""Makes of a student that stock llama.cpp would not load the same function in a family that it does."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from edge_rt.hooks import UnsupportedModel
from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.load import empty, tensors


def family(model: Decoder) -> str:
    """Of which llama.cpp would load the model. It wants as many query rows as the model is wide of a qwen2, which a student with fewer
    heads has not, and layers of one size of all but a deci (llama-model.cpp). Raises UnsupportedModel.
    """
    a = model.architecture
    if not a.even:
        if a.qk_norm:
            raise UnsupportedModel("stock llama.cpp runs no qwen3 whose layers differ in size; cut all alike")
        return "deci"
    return "llama" if a.family == "qwen2" and any(shape.heads * a.head != a.width for shape in a.layers) else a.family


def portable(model: Decoder) -> Decoder:
    """The model itself, or, where stock llama.cpp would refuse it, a llama or deci that computes the same. Raises UnsupportedModel.

    A qwen2 is a llama with biases whose rotation pairs element i of a head with i + head/2 instead of its neighbour: the rows of queries
    and keys change places. Do this before quantising: statistics of outputs and side files are of the order of rows.
    """
    a, wanted = model.architecture, family(model)
    if wanted == a.family:
        return model
    changed = empty(replace(a, family=wanted, rope="interleaved"))
    places = torch.arange(a.head).view(2, -1).T.flatten()
    with torch.no_grad():
        mine = tensors(model)
        for name, target in tensors(changed).items():
            part = name.split(".")[2] if name.startswith("blk.") else ""
            target.copy_(_moved(mine[name], places) if a.rope == "halves" and part in ("attn_q", "attn_k") else mine[name])
    return changed.train(model.training).requires_grad_(model.token_embd.weight.requires_grad)


def _moved(rows: Tensor, places: Tensor) -> Tensor:
    """Rows [heads * head, ..] with each head's in the order of ``places`` [head]."""
    return rows.view(-1, len(places), *rows.shape[1:])[:, places].reshape(rows.shape)
