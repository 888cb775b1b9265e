"""What hidden states and attention are compared by: found on calibration batches when a level first needs it, and kept in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edge_rt_distill.losses.attention import HeadMatch, attention_loss, key_weights, match_heads, priorities
from edge_rt_distill.losses.hidden import Match, hidden_loss, inverse_variance, least_squares, match_states, without_first
from edge_rt_distill.model.decoder import Decoder, Output
from edge_rt_distill.model.rows import Rows
from edge_rt_distill.stages.material import Material
from edge_rt_distill.stages.teachers import TeacherView

UNEVEN = 0.5
"""Share of a key's weight that goes by the attention it got; the rest is equal for all, so that none is left out."""


class Guides(nn.Module):
    """Dimension weights and projections of the matched states, weights of the matched heads.

    Projections are parameters: they are trained with the student while the term is. Where widths are equal there are none.
    """

    def __init__(self, student: Decoder, teacher: TeacherView, material: Material) -> None:
        super().__init__()
        ours, theirs = student.architecture, teacher.architecture
        self.matches: list[Match] = match_states(ours, len(theirs.layers), material.depths)
        self.same_width = ours.width == theirs.width
        self.dimensions = nn.ParameterList(
            nn.Parameter(torch.ones(theirs.width), requires_grad=False) for _ in self.matches
        )  # fmt: skip
        self.projections = nn.ParameterList(
            nn.Parameter(torch.zeros(ours.width, theirs.width)) for _ in self.matches if not self.same_width
        )
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
        self._material, self._heads = material, list(material.heads)
        self._whose = (ours, theirs)

    @property
    def heads(self) -> list[HeadMatch]:
        """Maps that are compared: the material's, else some of all (raises OptionError where heads were cut and no table says which)."""
        if not self._heads:
            self._heads = match_heads(*self._whose)
        return self._heads

    @torch.no_grad()
    def fit(self, student: Decoder, teacher: TeacherView, batches: Sequence[Rows]) -> None:
        """Take variances of the teacher's states, and least-squares projections of the student's onto them, from some batches."""
        weights = [teacher.knows(rows).float() for rows in batches]
        theirs = [teacher.observe(rows, [m.teacher for m in self.matches], ()).states for rows in batches]
        ours: list[dict[int, Tensor]] = []
        if not self.same_width:
            ours = [student(rows.tokens, states=[m.student for m in self.matches]).states for rows in batches]
        w = torch.cat([one.flatten() for one in weights])
        for i, match in enumerate(self.matches):
            target = torch.cat([one[match.teacher].flatten(0, 1) for one in theirs])
            self.dimensions[i].copy_(inverse_variance(target[None], w[None]))
            if not self.same_width:
                source = torch.cat([one[match.student].flatten(0, 1) for one in ours])
                self.projections[i].copy_(least_squares(source, target, w))
        self.get_buffer("fitted").fill_(True)

    def hidden_term(self, ours: Output, theirs: Output, known: Tensor) -> Tensor:
        """Mean of the states' losses over the depths. ``known`` [B, T]: where the teacher has read the same. Prompts count, too: states
        carry them on.
        """
        weights, losses = known.float(), []
        for i, match in enumerate(self.matches):
            projection = None if self.same_width else self.projections[i]
            losses.append(hidden_loss(ours.states[match.student], theirs.states[match.teacher], weights, self.dimensions[i], projection))
        return torch.stack(losses).mean()

    def attention_term(self, ours: Output, theirs: Output, rows: Rows) -> Tensor:
        """Mean over the compared layers of their heads' losses."""
        losses = []
        for match in self.heads:
            maps = theirs.attention[match.teacher][:, list(match.heads)]
            importance = self._material.head_importance.get(match.student)
            head_weights = priorities(torch.ones(len(match.heads)) if importance is None else importance)
            keys = key_weights(maps.shape[-1], looked_at(maps, rows, head_weights))
            losses.append(attention_loss(ours.attention[match.student], maps, rows.real.float(), head_weights, keys))
        return torch.stack(losses).mean()


def looked_at(maps: Tensor, rows: Rows, head_weights: Tensor) -> Tensor:
    """Importance of positions as keys [B, T], with a mean of about 1 over a sequence.

    It is how much attention the teacher's heads, as they are weighted, give a position from where predictions count (the answer).
    ``maps`` [B, H, T, T].
    """
    visible = without_first(rows.real.float())
    got = torch.einsum("bhtk,bt,h->bk", maps, rows.mask.to(maps), head_weights.to(maps)) * visible
    mean = got.sum(-1, keepdim=True) / visible.sum(-1, keepdim=True).clamp(min=1)
    return (1 - UNEVEN) + UNEVEN * got / mean.clamp(min=1e-9)
