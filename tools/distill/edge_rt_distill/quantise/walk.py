"""Walks a decoder layer by layer, over all sequences at once: what is held is the residual stream at one layer's entry.

Statistics, GPTQ and compensation need the inputs of a layer's matrices, GPTQ and compensation those of the model as quantised so far. A
whole forward pass for each layer would cost the square of the depth; the states of 16k tokens of width 576 are 38 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from edge_rt.hooks import DataError, OptionError
from edge_rt_distill.model.rows import Rows, fill, grouped

BATCH_TOKENS = 4096
"""Positions that go through a layer at once."""

Sees = Callable[[int, Tensor], None]
"""Called with the number of a batch and a matrix' input [B, T, in] or output [B, T, out] (as forward hooks registered before left it)."""


class _ReachedError(Exception):
    """Ends a forward pass that has shown what was wanted."""


@dataclass
class Batch:
    """Sequences side by side. ``real`` [B, T]: False where a shorter sequence is padded on the right, which causal attention never sees."""

    real: Tensor
    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Stream:
    """The residual stream of ``sequences`` at the entry of layer ``index`` of a model, no more than that.

    The model's layers are taken as they are when the stream comes to them, so that what is changed before counts for all that follows.
    Raises DataError if there is no token to see.
    """

    def __init__(self, model: nn.Module, sequences: Sequence[Sequence[int]], *, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model, self.index = model, 0
        self.layers = list(cast("Iterable[nn.Module]", model.get_submodule("layers")))  # children() would leave out those that are shared
        with torch.no_grad():
            self.batches = [self._enter(rows) for rows in side_by_side(sequences, batch_tokens)]

    def _enter(self, rows: Rows) -> Batch:
        """Catch what the model hands its first layer: the states, and whatever else (rotations, masks) is the same for all layers."""
        caught: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append((args, kwargs))
            raise _ReachedError

        handle = self.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self.model(rows.tokens)
        except _ReachedError:
            pass
        finally:
            handle.remove()
        (hidden, *args), kwargs = caught[0]
        return Batch(rows.real, hidden, tuple(args), kwargs)

    @property
    def ended(self) -> bool:
        """Whether the stream is behind the last layer."""
        return self.index >= len(self.layers)

    @property
    def layer(self) -> nn.Module:
        """The layer whose entry the stream is at."""
        return self.layers[self.index]

    @torch.no_grad()
    def look(self, inputs: Mapping[str, Sees] | None = None, outputs: Mapping[str, Sees] | None = None, only: int | None = None) -> None:
        """Run the layer as far as needed to show inputs and outputs of its matrices, by name ("attn_q"); the stream stays where it is.

        ``only``: the number of the one batch to show. Raises OptionError if the layer does not use a matrix that is named.
        """
        inputs, outputs = inputs or {}, outputs or {}
        wanted = len(inputs) + len(outputs)
        for number, batch in enumerate(self.batches):
            if only not in (None, number):
                continue
            seen = 0

            def show(sees: Sees, value: Tensor, number: int = number) -> None:
                nonlocal seen
                sees(number, value)
                seen += 1
                if seen == wanted:
                    raise _ReachedError

            with ExitStack() as stack:
                for name, sees in inputs.items():
                    before = self.layer.get_submodule(name).register_forward_pre_hook(lambda _, args, sees=sees: show(sees, args[0]))
                    stack.callback(before.remove)
                for name, sees in outputs.items():
                    after = self.layer.get_submodule(name).register_forward_hook(lambda _, __, out, sees=sees: show(sees, out))
                    stack.callback(after.remove)
                try:
                    self._run(batch)
                except _ReachedError:
                    continue
                raise OptionError(f"layer {self.index} did not use all of {', '.join([*inputs, *outputs])}; name matrices it has")

    def _run(self, batch: Batch) -> Tensor:
        out = self.layer(batch.hidden, *batch.args, **batch.kwargs)
        state: Tensor = out if isinstance(out, Tensor) else out[0]
        return state

    @torch.no_grad()
    def advance(self) -> None:
        """Go through the layer as it now is, to the entry of the next."""
        for batch in self.batches:
            batch.hidden = self._run(batch)
        self.index += 1


class Step(NamedTuple):
    """Both streams at the entry of the same layer."""

    layer: int
    teacher: Stream
    student: Stream


def walk(teacher: nn.Module, student: nn.Module, sequences: Sequence[Sequence[int]], *, batch_tokens: int = BATCH_TOKENS) -> Iterator[Step]:
    """Both models' streams, layer by layer: the float model's, and that of the model as it was changed so far.

    What the caller does to the student's layer while it has the step counts for the layers that follow. The models must be equally deep:
    raises OptionError. After the last step both streams are behind the last layer.
    """
    streams = Stream(teacher, sequences, batch_tokens=batch_tokens), Stream(student, sequences, batch_tokens=batch_tokens)
    if len(streams[0].layers) != len(streams[1].layers):
        raise OptionError(
            f"models of {len(streams[0].layers)} and {len(streams[1].layers)} layers cannot be walked together; equal depths can"
        )
    while not streams[0].ended:
        yield Step(streams[0].index, *streams)
        for stream in streams:
            stream.advance()


def side_by_side(sequences: Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS) -> Iterator[Rows]:
    """Rows of the sequences in their order. Raises DataError if there are no tokens."""
    some = [one for one in sequences if len(one)]
    if not some:
        raise DataError("there are no tokens to calibrate with; give longer text or more samples")
    for chosen in grouped([len(one) for one in some], batch_tokens, range(len(some))):
        yield fill([some[i] for i in chosen])
