"""Which CPUs to compute on where cores are of unlike speed (big.LITTLE, DynamIQ).

A graph has a barrier after each operation, where all threads wait for the slowest. With n cores of which the slowest has speed s, an
operation that is divided evenly goes on at n x s: slow cores are worth it only if they bring more than they hold up.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from edge_rt.hooks import Cores, read_system_int

_IN_ORDER = ("Cortex-A35", "Cortex-A53", "Cortex-A55", "Cortex-A510", "Cortex-A520", "Silver", "Icestorm", "Blizzard")
_IN_ORDER_SHARE = 0.4
"""Of the work an out-of-order core does in a clock: capacity-dmips-mhz in Linux's device trees is 326 to 530 for these cores where the
fast ones beside them have 1024 (sm8550.dtsi, rk3588-base.dtsi). Used only if the kernel does not state capacities."""


class Placement(NamedTuple):
    """``cpus``: the system's numbers of the CPUs to keep threads on, () if that is all there are. ``threads``: one for each core there."""

    cpus: tuple[int, ...]
    threads: int


def speed(root: Path, cores: Cores) -> float:
    """Of one core, in any unit that is the same for all cores of a machine."""
    capacities = [read_system_int(root / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity") for cpu in cores.cpus]
    if found := [capacity for capacity in capacities if capacity]:
        return float(max(found))
    share = _IN_ORDER_SHARE if any(name in cores.name for name in _IN_ORDER) else 1.0
    return share * (cores.clock or 1e9) / 1e9


def place(clusters: Sequence[Cores], speeds: Sequence[float]) -> Placement:
    """The clusters to compute on: the fastest, and slower ones as long as they make all together faster. ``clusters``: fastest first."""
    order = sorted(range(len(clusters)), key=lambda index: -speeds[index])
    best, gained, number = 0, 0.0, 0
    for count, index in enumerate(order, 1):
        number += clusters[index].number
        if number * speeds[index] > gained:
            best, gained = count, number * speeds[index]
    chosen = [clusters[index] for index in order[:best]]
    cpus = tuple(sorted(cpu for cores in chosen for cpu in cores.cpus))
    return Placement(() if best == len(clusters) else cpus, sum(cores.number for cores in chosen))
