"""The device ``arm``: the CPU of a 64-bit ARM board, phone or server, run by the engine ``ggml``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.hooks import Cores, Health, Offer, Profile, Refusal, cpu_topology, read_system_int, read_system_text
from edge_rt_arm.boards import Board, board
from edge_rt_arm.firmware import Firmware, under_voltage
from edge_rt_arm.layouts import packed_layouts
from edge_rt_arm.placement import Placement, place, speed

if TYPE_CHECKING:
    from edge_rt.hooks import CpuSensors

_USE_CPU = "the device cpu runs models here"
_SCORE, _SCORE_KNOWING_NOTHING = 12.0, 5.0
"""Above the device ``cpu`` (10), but below it where this one knows nothing more: one kind of core, on a board nobody has named."""


class Facts(NamedTuple):
    """A system as it is described. ``clusters``: fastest first. ``vector_bytes``: of an SVE vector, 0 without SVE."""

    board: Board | None
    clusters: tuple[Cores, ...]
    features: tuple[str, ...]
    vector_bytes: int
    placement: Placement

    @property
    def layouts(self) -> dict[str, str]:
        """Packed layout of each type of weights."""
        return packed_layouts(self.features, self.vector_bytes)


class Arm:
    """``root``: of a recorded tree of /proc and /sys. ``firmware``: who is asked on a Raspberry Pi. ``bits``: of this process."""

    name = "arm"

    def __init__(self, root: Path = Path("/"), firmware: Firmware | None = None, bits: int = 64 if sys.maxsize > 1 << 32 else 32) -> None:
        self._root, self._firmware, self._bits = root, firmware or Firmware(), bits
        self._sensors: CpuSensors | None = None
        self._is_raspberry = False

    # ---- looking -----------------------------------------------------------------------------------------------------

    def probe(self) -> Offer | Refusal:
        """Reads small files of /proc and /sys, and nothing else."""
        refusal = self._refusal()
        if refusal:
            return refusal
        facts = self.facts()
        knows = len(facts.clusters) > 1 or facts.board is not None
        return Offer(
            score=_SCORE if knows else _SCORE_KNOWING_NOTHING,
            description=describe(facts),
            memory_bytes=memory(self._root),
            features=facts.features,
            engines=("ggml", "llama_cpp", "*"),
            basis="simulated",  # edge-rt has run on emulated cores; see the README for which, and what was measured
            cpus=facts.placement.cpus,
        )

    def facts(self) -> Facts:
        """What the system says of itself now."""
        clusters = cpu_topology(self._root)
        features = _common(clusters)
        length = (read_system_int(self._root / "proc/sys/abi/sve_default_vector_length") or 0) if "sve" in features else 0
        if length > 0:
            features = (*features, f"sve{8 * length}")
        placement = place(clusters, [speed(self._root, cores) for cores in clusters])
        return Facts(board(self._root), clusters, features, max(0, length), placement)

    def _refusal(self) -> Refusal | None:
        told = read_system_text(self._root / "proc/cpuinfo")
        if not told:
            return Refusal("there is no /proc/cpuinfo, by which Linux and Android describe their processors", _USE_CPU)
        lines = [line.partition(":") for line in told.lower().splitlines()]
        fields = {key.strip(): value.split() for key, _, value in lines}
        if "cpu implementer" not in fields and "cpu architecture" not in fields:
            return Refusal("this is no ARM processor", _USE_CPU)
        if "asimd" not in fields.get("features", []) or self._bits < 64:
            remedy = f"install a 64-bit system (aarch64) if the processor can run one; meanwhile {_USE_CPU}"
            return Refusal("this is a 32-bit system, and the fast kernels of ggml are for 64 bits", remedy)
        if not cpu_topology(self._root):
            return Refusal("/proc/cpuinfo names no processor that this process may use", _USE_CPU)
        return None

    # ---- what it is like ---------------------------------------------------------------------------------------------

    def profile(self) -> Profile:
        """As the device ``cpu``, which measures; where the board is known, its watts and temperatures from data sheets beside that."""
        from edge_rt.hooks import cpu_profile  # costs start-up time, as do the sensors

        found = cpu_profile(self.name, memory(self._root), root=self._root)
        known = board(self._root)
        figures = known.figures if known else None
        if figures is None:
            return found
        basis = dict(found.basis)
        basis |= {"idle_power": "projected"} if figures.idle else {}
        basis |= {"power": "projected"} if figures.load else {}
        hottest = found.hottest
        if basis.get("hottest") != "measured" or hottest is None or figures.slows < hottest:
            hottest, basis["hottest"] = figures.slows, "projected"
        return found._replace(idle_power=figures.idle, power=figures.load, hottest=hottest, basis=MappingProxyType(basis))

    def health(self) -> Health:
        """As the device ``cpu``, and on a Raspberry Pi what its firmware says, which answers one call late."""
        if self._sensors is None:
            from edge_rt.hooks import CpuSensors

            self._sensors = CpuSensors(self._root)
            known = board(self._root)
            self._is_raspberry = known is not None and known.is_raspberry
        found = self._sensors.health()
        if not self._is_raspberry:
            return found
        answer = self._firmware.answer()
        reasons = answer.throttling.now if answer.throttling else under_voltage(self._root)
        others = tuple(reason for reason in found.throttled if not reasons or "firmware" not in reason)
        return found._replace(power=found.power if answer.power is None else answer.power, throttled=(*reasons, *others))


def describe(facts: Facts) -> str:
    """In one line: the board and its cores, and where threads go."""
    clusters = " + ".join(f"{cores.number} x {cores.name}" for cores in facts.clusters)
    named = f"{facts.board.name}, {clusters}" if facts.board else clusters
    return f"{named}, {facts.placement.threads} threads on the fast ones" if facts.placement.cpus else named


def memory(root: Path) -> int:
    """Bytes this process may use: the machine's, or its cgroup's limit if that is less; 1 if the system does not say."""
    total = 1
    for line in (read_system_text(root / "proc/meminfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key == "MemTotal" and value.split()[:1] and value.split()[0].isdecimal():
            total = int(value.split()[0]) << 10
    limits = (read_system_int(root / "sys/fs/cgroup" / name) for name in ("memory.max", "memory/memory.limit_in_bytes"))
    return min([total, *(limit for limit in limits if limit)]) or 1


def _common(clusters: tuple[Cores, ...]) -> tuple[str, ...]:
    """What every core has: a thread may be moved to any of them."""
    if not clusters:
        return ()
    return tuple(one for one in clusters[0].features if all(one in cores.features for cores in clusters))
