"""What is said of Cambricon's boards, by the name that ``cnmon`` gives them. None of it was measured by this project.

Checked, with press reports of its launch (21 March 2022), is the X8: 48 GB LPDDR5 at 614.4 GB/s, INT8 256 TOPS, FP16 and BF16 96 TFLOPS,
FP32 32 TFLOPS, 250 W, PCIe 4.0 x16, two chips, shown by ``cnmon`` as two cards. Operations and power of S4 and X4 are not. The bandwidth
of one chip follows from its bus too: 384 bits (CNRT's device properties) x 6,400 MT/s = 307.2 GB/s. Cores and on-chip memory: CNRT's
properties of an X4 (8 clusters of 4 cores; 768 KiB NRAM a core, 4 MiB SRAM a cluster, 2 MiB L2).
"""

from __future__ import annotations

from typing import NamedTuple


class Board(NamedTuple):
    """One chip's share of a board, as ``cnmon`` counts: bytes a second, operations a second by type, watts of the whole board."""

    bandwidth: float
    operations: dict[str, float]
    power: float
    link: float = 31.5e9  # PCIe 4.0 x16, one direction, after encoding
    clusters: int = 8


BOARDS = {
    "MLU370-S4": Board(307.2e9, {"int8": 192e12, "f16": 72e12, "f32": 18e12}, 75.0),
    "MLU370-X4": Board(307.2e9, {"int8": 256e12, "f16": 96e12, "f32": 24e12}, 150.0),
    "MLU370-X8": Board(307.2e9, {"int8": 128e12, "f16": 48e12, "f32": 16e12}, 250.0),
}


def board(name: str) -> Board | None:
    """The board of that name, or the one whose name it begins with (``MLU370-X4K``); None if it is not known."""
    return next((found for known, found in BOARDS.items() if name.upper().startswith(known)), None)
