"""What /proc/cpuinfo says of each processor: its model, and the instruction sets that kernels profit from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from edge_rt.system_files import read_text

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


def processors(root: Path = Path("/")) -> Iterator[Processor]:
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


def board(root: Path = Path("/")) -> str:
    """The board's name in the device tree (``Raspberry Pi 5 Model B Rev 1.0``), "" where there is none."""
    return read_text(root / "proc/device-tree/model") or read_text(root / "sys/firmware/devicetree/base/model") or ""
