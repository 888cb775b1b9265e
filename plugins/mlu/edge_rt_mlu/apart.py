"""For tests: a PyTorch device whose memory the host cannot touch. The CPU computes, and what a real device would refuse is refused.

A tensor of it claims the device ``meta``, which PyTorch has no memory for, and keeps its numbers in a tensor of the CPU that nothing but
operations reaches. An operation with tensors of both, which fails on a card, fails here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")


class Apart(torch.Tensor):  # type: ignore[misc, unused-ignore]
    """A tensor on the device; ``numbers``: the CPU's."""

    numbers: torch.Tensor

    @staticmethod
    def __new__(cls: type[Apart], numbers: torch.Tensor) -> Apart:
        """Wrap a tensor of the CPU."""
        found: Apart = torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype, device=DEVICE
        )
        found.numbers = numbers
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override, unused-ignore]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Compute with the numbers. Raises RuntimeError for what no device could compute."""
        kwargs = dict(kwargs or {})
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        target = kwargs.get("device")
        crossing = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if not crossing and any(not isinstance(one, Apart) and one.dim() for one in given):
            raise RuntimeError(f"{function} has tensors of the host and of the device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
        inner = {id(one.numbers): one for one in given if isinstance(one, Apart)}
        found = function(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))
        here = torch.device(target).type == "cpu" if target is not None else not isinstance(given[0], Apart)

        def outside(one: Any) -> Any:
            if not isinstance(one, torch.Tensor) or here:
                return one
            known = inner.get(id(one))  # what is changed in place stays what it is
            return Apart(one) if known is None else known

        return tree_map(outside, found)


def _numbers(one: Any) -> Any:
    return one.numbers if isinstance(one, Apart) else one


class _Factories(TorchDispatchMode):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """Makes tensors on the device where they are asked for there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        if any(isinstance(one, Apart) for one in tree_leaves((args, kwargs))):
            return Apart.__torch_dispatch__(function, types, args, kwargs)
        if target is None or torch.device(target).type != DEVICE.type:
            return function(*args, **kwargs)
        return tree_map(lambda one: Apart(one), function(*args, **{**kwargs, "device": torch.device("cpu")}))


@contextmanager
def apart() -> Iterator[torch.device]:
    """The device, for this thread. Tensors like these cannot be made in inference mode, so there is none meanwhile; and ``torch.tensor``
    is made to copy to the device what it makes, as it asks no mode.
    """
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **more: Any) -> torch.Tensor:
        made = make(data, **more)
        return made if device is None else made.to(device)

    factories = _Factories()  # type: ignore[no-untyped-call, unused-ignore]
    with factories, mock.patch.object(torch, "inference_mode", torch.no_grad), mock.patch.object(torch, "tensor", tensor):
        yield DEVICE
