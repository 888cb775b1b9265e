"""The device ``arm`` and the command ``edge-rt arm``: what a 64-bit ARM board or phone is, how it is, and where threads run best on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from edge_rt.hooks import Device, hookimpl
from edge_rt_arm.device import Arm

if TYPE_CHECKING:
    import typer

EDGE_RT_API = 1


@hookimpl
def edge_rt_devices() -> Iterable[Device]:
    """One device, ``arm``."""
    return [Arm()]


@hookimpl
def edge_rt_cli_commands(app: typer.Typer) -> None:
    """``edge-rt arm``."""
    from edge_rt_arm.command import add

    add(app)
