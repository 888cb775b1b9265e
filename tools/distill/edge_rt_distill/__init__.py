"""edge-rt-distill: turns a teacher into an INT4 GGUF student that edge-rt runs, and proves what it kept.

Data flows one way: samples -> library (what the teacher does with them) -> diagnosis -> surgery -> four levels of distillation ->
quantisation -> compensation -> export. Each stage is a folder here whose docstring says where to begin; ``edge-rt distill run FILE.toml``
does all of them (``run``). All stand on ``model``, on ``files`` (how anything is written) and ``progress`` (how far it is).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_rt.hooks import hookimpl

if TYPE_CHECKING:
    import typer

EDGE_RT_API = 1


@hookimpl
def edge_rt_cli_commands(app: typer.Typer) -> None:
    """``edge-rt distill``."""
    from edge_rt_distill.cli import add_commands

    add_commands(app)
