"""A cut applied to the teacher's weights: the student, before any repair or training."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_rt_distill.model.decoder import Decoder
from edge_rt_distill.model.load import empty
from edge_rt_distill.surgery.cut import Cut, student_architecture
from edge_rt_distill.surgery.depth import merge
from edge_rt_distill.surgery.sharing import average, deciding
from edge_rt_distill.surgery.width import narrow, norm


@torch.no_grad()
def apply(teacher: Decoder, cut: Cut) -> Decoder:
    """The student of a cut, float32, its parameters to be trained. Exact: what carried nothing can go without a change.

    Raises OptionError for a cut that does not fit the teacher.
    """
    old = teacher.architecture
    student = empty(student_architecture(old, cut)).eval()
    hidden = torch.tensor(cut.hidden, dtype=torch.int64)
    student.token_embd.weight.copy_(teacher.token_embd.weight[:, hidden])
    student.output_norm.weight.copy_(norm(teacher.output_norm.weight, hidden, old.width))
    if student.output is not None and teacher.output is not None:
        student.output.weight.copy_(teacher.output.weight[:, hidden])
    for place, one in enumerate(cut.layers):
        if one.like is not None:
            continue
        parts = [merge([layer_tensors(teacher, source) for source in each.sources], cut.merge) for each in deciding(cut, place)]
        made = narrow(average(parts), one, cut.hidden, old.width, old.head)
        for name, tensor in layer_tensors(student, place).items():
            tensor.copy_(made[name])
    return student


def layer_tensors(model: Decoder, layer: int) -> dict[str, Tensor]:
    """A layer's tensors by GGUF's names without the block (``attn_q.weight``); of parametrised matrices what they compute with."""
    found = {}
    for site, module in model.layers[layer].named_children():
        for kind in ("weight", "bias"):
            tensor = getattr(module, kind, None)
            if tensor is not None:
                found[f"{site}.{kind}"] = tensor
    return found
