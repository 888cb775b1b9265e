"""The processors of this machine: models and instruction sets, clusters of like cores, their speed and caches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from edge_rt.hardware.profile import Cache, Cores
from edge_rt.hardware.system_files import cpu_quota, number_list, read_system_int, read_system_text, system_folders

# What /proc/cpuinfo says of each processor: its model, and the instruction sets that kernels profit from.

FEATURES = {
    "sse4_2": "sse4_2",
    "avx": "avx",
    "f16c": "f16c",
    "fma": "fma",
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512vl": "avx512vl",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "neon": "neon",  # 32-bit kernels say neon, 64-bit ones asimd
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
    "sme": "sme",
}
"""The kernel's name for a feature -> ours. x86 lists them under "flags", ARM under "Features"."""

ARM_PARTS = {
    (0x41, 0xC07): "Cortex-A7",
    (0x41, 0xD04): "Cortex-A35",
    (0x41, 0xD03): "Cortex-A53",
    (0x41, 0xD05): "Cortex-A55",
    (0x51, 0x801): "Kryo 2xx Silver",
    (0x51, 0x803): "Kryo 3xx Silver",
    (0x51, 0x805): "Kryo 4xx Silver",
    (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD80): "Cortex-A520",
    (0x41, 0xC0F): "Cortex-A15",
    (0x41, 0xD07): "Cortex-A57",
    (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73",
    (0x51, 0x800): "Kryo 2xx Gold",
    (0x41, 0xD0A): "Cortex-A75",
    (0x51, 0x802): "Kryo 3xx Gold",
    (0x41, 0xD0B): "Cortex-A76",
    (0x41, 0xD0E): "Cortex-A76AE",
    (0x51, 0x804): "Kryo 4xx Gold",
    (0x48, 0xD40): "Cortex-A76 (HiSilicon)",
    (0x41, 0xD0C): "Neoverse-N1",
    (0x48, 0xD01): "TaiShan v110",
    (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD41): "Cortex-A78",
    (0x41, 0xD42): "Cortex-A78AE",
    (0x41, 0xD4B): "Cortex-A78C",
    (0x41, 0xD47): "Cortex-A710",
    (0x41, 0xD4D): "Cortex-A715",
    (0x41, 0xD81): "Cortex-A720",
    (0x41, 0xD87): "Cortex-A725",
    (0x41, 0xD44): "Cortex-X1",
    (0x41, 0xD4C): "Cortex-X1C",
    (0x41, 0xD40): "Neoverse-V1",
    (0x41, 0xD49): "Neoverse-N2",
    (0x41, 0xD48): "Cortex-X2",
    (0x41, 0xD4E): "Cortex-X3",
    (0x41, 0xD82): "Cortex-X4",
    (0x41, 0xD4F): "Neoverse-V2",
    (0x41, 0xD8E): "Neoverse-N3",
    (0x41, 0xD85): "Cortex-X925",
    (0x61, 0x022): "Apple M1 Icestorm",
    (0x61, 0x032): "Apple M2 Blizzard",
    (0x61, 0x023): "Apple M1 Firestorm",
    (0x61, 0x033): "Apple M2 Avalanche",
}
"""(CPU implementer, CPU part) -> name, slow ones first: the order ranks cores of which no speed is known.

From the "Main ID Register" (MIDR_EL1) section of each core's technical reference manual, as Linux lists them in
arch/arm64/include/asm/cputype.h.
"""


class Processor(NamedTuple):
    """One processor: its model as x86 states it ("" elsewhere), ARM's (implementer, part) or None, and our names of its features."""

    number: int
    model: str
    part: tuple[int, int] | None
    features: tuple[str, ...]


def cpu_processors(root: Path = Path("/")) -> Iterator[Processor]:
    """Each processor as Linux states it in /proc/cpuinfo, none elsewhere. Lazy: reading all of many takes long."""
    fields: dict[str, str] = {}
    try:
        with (root / "proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                key, colon, value = line.partition(":")
                if not colon and "processor" in fields:  # the blank line between two
                    yield _processor(fields)
                    fields.clear()
                elif colon:
                    fields.setdefault(key.strip().lower(), value.strip())
    except OSError:
        return  # not Linux: the caller has other names
    if "processor" in fields:
        yield _processor(fields)


def _processor(fields: dict[str, str]) -> Processor:
    flags = (fields.get("flags") or fields.get("features") or "").split()
    try:
        part = int(fields["cpu implementer"], 0), int(fields["cpu part"], 0)
    except (KeyError, ValueError):
        part = None
    number = fields["processor"]
    features = tuple(dict.fromkeys(FEATURES[flag] for flag in flags if flag in FEATURES))
    return Processor(int(number) if number.isdecimal() else 0, fields.get("model name", ""), part, features)


def board_name(root: Path = Path("/")) -> str:
    """The board's name in the device tree (``Raspberry Pi 5 Model B Rev 1.0``), "" where there is none."""
    return read_system_text(root / "proc/device-tree/model") or read_system_text(root / "sys/firmware/devicetree/base/model") or ""


# The clusters of the CPU: which cores are of one kind, how fast they are, and what caches they have, from /sys and /proc.
#
# Files as documented in the kernel's Documentation/ABI/testing/sysfs-devices-system-cpu and Documentation/admin-guide/cputopology.rst.

_CPUS = "sys/devices/system/cpu"
_ALIKE = 0.9
"""Cores of one model are of one kind down to this share of the fastest one's speed: "favoured" cores of x86 clock some percent higher,
while the same Cortex in a phone's big and prime cluster differs by 13 % and more."""
_PMU_KINDS = {"cpu_core": "performance cores", "cpu_atom": "efficiency cores", "cpu_lowpower": "low-power cores"}
"""Folders of /sys/devices in which x86 hybrids list the processors of each kind, fast ones first."""
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_MODELS = tuple(ARM_PARTS)


class _Cpu(NamedTuple):
    """One logical CPU. ``core``: the CPUs that share its core. ``shares``: for each cache, the CPUs that share it. ``clock``: Hz."""

    number: int
    core: tuple[int, ...]
    kind: str
    model: str
    rank: int
    features: tuple[str, ...]
    capacity: int
    clock: float | None
    caches: tuple[tuple[int, int], ...]
    shares: tuple[tuple[int, ...], ...]

    @property
    def speed(self) -> tuple[int, int, float]:
        """Sorts fast ones high. A model says more than a clock: there are Cortex-A53 that clock higher than the Cortex-A73 beside them."""
        return self.capacity, self.rank, self.clock or 0.0


def cpu_topology(root: Path = Path("/")) -> tuple[Cores, ...]:
    """The CPU's clusters, fastest first, without what this process may not use; () where the system does not say (it is not Linux).

    Cores are of one kind if they have the same model and caches and about the same speed. ``number`` counts whole cores, ``cpus`` has all
    their hardware threads. If a cgroup's quota allows fewer CPUs, ``number`` is less, at the slow end. ``root``: of a recorded tree.
    """
    allowed = allowed_cpus(root)
    found = {cpu.number: cpu for cpu in _cpus(root, allowed)}
    clusters = sorted(_clusters(list(found.values())), key=lambda cluster: cluster[0].speed, reverse=True)
    named = [_cores(cluster, _core_of(root)) for cluster in clusters]
    quota = cpu_quota(root)
    return tuple(_within(named, quota)) if quota is not None else tuple(named)


def allowed_cpus(root: Path = Path("/")) -> tuple[int, ...]:
    """The numbers of the CPUs that are online and in the affinity of the calling thread, which cpusets narrow too; () if unknown."""
    online = number_list(read_system_text(root / _CPUS / "online"))
    if not online:
        online = tuple(int(path.name[3:]) for path in system_folders(root / _CPUS, "cpu"))
        online = online or tuple(one.number for one in cpu_processors(root))
    status = read_system_text(root / "proc/thread-self/status") or read_system_text(root / "proc/self/status") or ""
    for line in status.splitlines():
        if line.startswith("Cpus_allowed_list:"):
            affinity = number_list(line.partition(":")[2])
            return tuple(cpu for cpu in online if cpu in affinity) or online
    return online


def _cpus(root: Path, numbers: Sequence[int]) -> Iterator[_Cpu]:
    told = {one.number: one for one in cpu_processors(root)}
    first = next(iter(told.values()), Processor(0, "", None, ()))  # some kernels describe one for all
    kinds = {cpu: kind for kind in _PMU_KINDS for cpu in number_list(read_system_text(root / "sys/devices" / kind / "cpus"))}
    for number in numbers:
        folder = root / _CPUS / f"cpu{number}"
        info, kind = told.get(number, first), kinds.get(number, "")
        rank = _MODELS.index(info.part) if info.part in ARM_PARTS else -list(_PMU_KINDS).index(kind) if kind else 0
        clock = read_system_int(folder / "cpufreq/cpuinfo_max_freq")  # kHz
        caches = sorted(_caches(folder))
        yield _Cpu(
            number,
            number_list(read_system_text(folder / "topology/thread_siblings_list")) or (number,),
            kind,
            _model(info),
            rank,
            info.features,
            read_system_int(folder / "cpu_capacity") or 0,
            clock * 1e3 if clock else None,
            tuple((level, size) for level, size, _ in caches),
            tuple(cpus or (number,) for _, _, cpus in caches),
        )


def _model(info: Processor) -> str:
    if info.part is None:
        return info.model
    return ARM_PARTS.get(info.part) or f"ARM core {info.part[1]:#05x} of implementer {info.part[0]:#04x}"


def _caches(folder: Path) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(level, bytes, CPUs that share it) of each cache of a CPU that holds data and whose size is known."""
    for index in system_folders(folder / "cache", "index"):
        level, size = read_system_int(index / "level"), _size(read_system_text(index / "size") or "")
        if level is not None and size and read_system_text(index / "type") in ("Data", "Unified"):
            yield level, size, number_list(read_system_text(index / "shared_cpu_list"))


def _size(text: str) -> int:
    """Bytes of ``32K``; 0 for what is none."""
    unit = _UNITS.get(text[-1:], 1)
    digits = text[:-1] if text[-1:] in _UNITS else text
    return int(digits) * unit if digits.isdecimal() else 0


def _clusters(cpus: Sequence[_Cpu]) -> list[list[_Cpu]]:
    """CPUs of one kind together, the fastest of each first."""
    alike: dict[tuple[object, ...], list[_Cpu]] = {}
    for cpu in cpus:
        alike.setdefault((cpu.kind, cpu.model, cpu.features, cpu.caches), []).append(cpu)
    clusters: list[list[_Cpu]] = []
    for same in alike.values():
        start = len(clusters)
        for cpu in sorted(same, key=lambda cpu: (*(-part for part in cpu.speed), cpu.number)):
            fits = (one for one in clusters[start:] if _as_fast(cpu, one[0]))
            cluster = next(fits, None)
            if cluster is None:
                clusters.append([cpu])
            else:
                cluster.append(cpu)
    return clusters


def _as_fast(cpu: _Cpu, fastest: _Cpu) -> bool:
    return cpu.capacity >= _ALIKE * fastest.capacity and (cpu.clock or 0) >= _ALIKE * (fastest.clock or 0)


def _core_of(root: Path) -> Mapping[int, tuple[int, ...]]:
    """The CPUs of the core that each CPU of the system is of, those that this process may not use too: they share caches."""
    found: dict[int, tuple[int, ...]] = {}
    for folder in system_folders(root / _CPUS, "cpu"):
        number = int(folder.name[3:])
        found[number] = number_list(read_system_text(folder / "topology/thread_siblings_list")) or (number,)
    return found


def _cores(cluster: Sequence[_Cpu], core_of: Mapping[int, tuple[int, ...]]) -> Cores:
    first = cluster[0]
    # Where cores of one kind share caches in groups of unlike size, most have it so.
    shared = [Counter(len({core_of.get(n, (n,)) for n in cpu.shares[i]}) for cpu in cluster) for i in range(len(first.caches))]
    caches = (Cache(level, size, count.most_common(1)[0][0]) for (level, size), count in zip(first.caches, shared, strict=True))
    return Cores(
        name=", ".join(part for part in (first.model, _PMU_KINDS.get(first.kind)) if part) or "CPU",
        number=len({cpu.core for cpu in cluster}),
        cpus=tuple(sorted(cpu.number for cpu in cluster)),
        features=first.features,
        clock=first.clock,
        caches=tuple(caches),
    )


def _within(clusters: Sequence[Cores], quota: int) -> Iterator[Cores]:
    """As many cores as a quota has CPUs; they stay free to run on all CPUs of their clusters."""
    for cores in clusters:
        if quota > 0:
            yield cores._replace(number=min(quota, cores.number))
        quota -= cores.number
