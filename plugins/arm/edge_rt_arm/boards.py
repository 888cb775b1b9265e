"""What is known on paper of boards that cannot say it themselves: watts, and the temperatures at which the firmware slows them down."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from edge_rt.hooks import read_system_text

_TREES = ("proc/device-tree", "sys/firmware/devicetree/base")
_FREQUENCY = "raspberrypi.com/documentation/computers/raspberry-pi.html#frequency-management-and-thermal-control"
_PIDRAMBLE = "pidramble.com/wiki/benchmarks/power-consumption"
_SUPPLY = "raspberrypi.com/documentation/computers/raspberry-pi.html#power-supply"
_PI_5 = "raspberrypi.com/news/introducing-raspberry-pi-5, peak; 12.0 W at HPL: github.com/geerlingguy/sbc-reviews/issues/21"


class Figures(NamedTuple):
    """``idle``, ``load``: watts of the whole board without peripherals, at rest and with all cores at work. ``slows``, ``limit``: degrees
    Celsius from which its cores are slowed down, and at which they are slowed down hard. ``sources``: of the watts, then of the degrees.
    """

    idle: float | None
    load: float | None
    slows: float
    limit: float
    sources: tuple[str, str]


class Board(NamedTuple):
    """``name``: as people call it. ``compatible``: of the device tree, most exact first. ``figures``: None for boards not in the table."""

    name: str
    compatible: tuple[str, ...]
    figures: Figures | None

    @property
    def is_raspberry(self) -> bool:
        """Whether VideoCore's firmware answers vcgencmd."""
        return any(one.startswith("raspberrypi,") for one in self.compatible) or self.name.startswith("Raspberry Pi")


FIGURES = {
    "raspberrypi,3-model-b-plus": Figures(1.9, 5.1, 60.0, 85.0, (_PIDRAMBLE, _FREQUENCY)),  # temp_soft_limit: 1.4 -> 1.2 GHz
    "raspberrypi,3-model-b": Figures(1.4, 3.7, 80.0, 85.0, (_PIDRAMBLE, _FREQUENCY)),
    # The documentation has 0.6 A idle, with a screen, and 1.25 A at most under stress: 3.1 and 6.4 W.
    "raspberrypi,4-model-b": Figures(2.7, 6.4, 80.0, 85.0, (f"{_PIDRAMBLE}; {_SUPPLY}", _FREQUENCY)),
    # The module has the Pi 4's chip at its clock; what a carrier board takes comes on top.
    "raspberrypi,4-compute-module": Figures(2.7, 6.4, 80.0, 85.0, (f"{_PIDRAMBLE}; {_SUPPLY}, of the Pi 4 B", _FREQUENCY)),
    "raspberrypi,5-model-b": Figures(None, 12.0, 80.0, 85.0, (_PI_5, _FREQUENCY)),
    "raspberrypi,5-compute-module": Figures(None, 12.0, 80.0, 85.0, ("as the Pi 5, whose chip it has", _FREQUENCY)),
}
"""The first ``compatible`` of a board's device tree -> its figures."""


def board(root: Path) -> Board | None:
    """The board of the device tree; where there is none, what /proc/cpuinfo says under Hardware or Model (phones); else None."""
    for tree in _TREES:
        name = read_system_text(root / tree / "model")
        if name:
            compatible = tuple(filter(None, (read_system_text(root / tree / "compatible") or "").split("\0")))
            return Board(name, compatible, next((FIGURES[one] for one in compatible if one in FIGURES), None))
    for line in (read_system_text(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("Hardware", "Model") and value.strip():
            return Board(value.strip(), (), None)
    return None
