"""Trees of /proc and /sys of ARM machines, with what this plugin reads beside the CPUs. All are simulated after public documents.

Where ``edge_rt.testing.system_trees`` has a machine it is taken from there. ``Recorded`` plays vcgencmd.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from edge_rt.testing.system_trees import A53_FEATURES, A76_FEATURES, Kind, arm, cpus, raspberry_pi_4, raspberry_pi_5, thermal_zone, write

CPU = "sys/devices/system/cpu"
ARMV9 = f"{A76_FEATURES} ilrcpc flagm ssbs sb paca pacg dcpodp flagm2 frint i8mm bf16 bti"
MEMORY = {"proc/meminfo": "MemTotal:        8245256 kB\nMemFree:         123456 kB"}


class Recorded:
    """Answers as vcgencmd would; ``calls`` are what it was asked."""

    def __init__(self, answers: Mapping[str, str]) -> None:
        self.answers, self.calls = dict(answers), list[str]()

    def __call__(self, argument: str) -> str | None:
        self.calls.append(argument)
        return self.answers.get(argument)


PMIC = """\
 3V7_WL_SW_A current(0)=0.00487975A
   3V3_SYS_A current(1)=0.06636460A
  VDD_CORE_A current(7)=2.48500000A
   3V7_WL_SW_V volt(8)=3.70000000V
   3V3_SYS_V volt(9)=3.30000000V
  VDD_CORE_V volt(15)=0.88000000V
     EXT5V_V volt(24)=5.12000000V
      BATT_V volt(25)=0.00000000V
"""
"""Some rails of ``vcgencmd pmic_read_adc`` on a Raspberry Pi 5.

The form is that of raspberrypi/utils, vcgencmd/vcgencmd.1, and of examples on forums.raspberrypi.com; the values are made up.
"""


def pi_3(root: Path) -> Path:
    """A Raspberry Pi 3 B+. Simulated after raspberrypi.com/documentation/computers/processors.html (BCM2837B0, 4 x Cortex-A53, 1.4 GHz)."""
    cpus(root, [Kind(range(4), arm(0xD03, A53_FEATURES), 1400, caches=[(1, "32K", 1), (2, "512K", 4)])])
    return write(root, {**tree("Raspberry Pi 3 Model B Plus Rev 1.3", "raspberrypi,3-model-b-plus", "brcm,bcm2837"), **MEMORY})


def pi_4(root: Path) -> Path:
    """A Raspberry Pi 4 B with a weak supply (see the fixture it extends)."""
    raspberry_pi_4(root)
    hwmon = {"sys/class/hwmon/hwmon1/name": "rpi_volt", "sys/class/hwmon/hwmon1/in0_lcrit_alarm": 1}
    return write(root, {**tree("Raspberry Pi 4 Model B Rev 1.5", "raspberrypi,4-model-b", "brcm,bcm2711"), **MEMORY, **hwmon})


def cm4(root: Path) -> Path:
    """A Compute Module 4 (see the fixture it extends)."""
    raspberry_pi_4(root)
    return write(root, {**tree("Raspberry Pi Compute Module 4 Rev 1.0", "raspberrypi,4-compute-module", "brcm,bcm2711"), **MEMORY})


def pi_5(root: Path) -> Path:
    """A Raspberry Pi 5 (see the fixture it extends)."""
    raspberry_pi_5(root)
    return write(root, {**tree("Raspberry Pi 5 Model B Rev 1.0", "raspberrypi,5-model-b", "brcm,bcm2712"), **MEMORY})


def tree(model: str, *compatible: str) -> dict[str, object]:
    """Files of a device tree: strings end with zero bytes (devicetree-specification, 2.3.1)."""
    return {"proc/device-tree/model": f"{model}\0", "proc/device-tree/compatible": "".join(f"{one}\0" for one in compatible)}


def snapdragon(root: Path) -> Path:
    """A phone with a Snapdragon 8 Gen 2: 1 x Cortex-X3, 2 x A715, 2 x A710, 3 x A510, as Termux sees it.

    Simulated after Qualcomm's product brief (3.19, 2.8 and 2.0 GHz; L3 8 MB) and arch/arm64/boot/dts/qcom/sm8550.dtsi (which CPU is what,
    capacities). Android hides the device tree, /proc/stat and most thermal zones from applications.
    """
    l3 = (3, "8192K", 8)
    kinds = [
        Kind(range(3), arm(0xD46, ARMV9), 2016, 205, [(1, "32K", 1), (2, "256K", 3), l3]),
        Kind([3, 4], arm(0xD4D, ARMV9), 2803.2, 608, [(1, "64K", 1), (2, "512K", 1), l3]),
        Kind([5, 6], arm(0xD47, ARMV9), 2803.2, 608, [(1, "64K", 1), (2, "512K", 1), l3]),
        Kind([7], arm(0xD4E, ARMV9), 3187.2, 1024, [(1, "64K", 1), (2, "1024K", 1), l3]),
    ]
    cpus(root, kinds)
    cpuinfo = (root / "proc/cpuinfo").read_text()
    zones = {
        **thermal_zone(0, "soc", 0.087, 100),  # the battery's state of charge, in per cent
        **thermal_zone(1, "cpu-1-0-usr", 71.2, 125, 95),
        **thermal_zone(2, "cpuss-0-usr", 74.9, 125, 95),
        **thermal_zone(3, "battery", 35.0, 60),
        **thermal_zone(4, "cpu-2-0-usr", -273.0, 125),
    }
    return write(root, {"proc/cpuinfo": f"{cpuinfo}\nHardware\t: Qualcomm Technologies, Inc SM8550", **zones, **MEMORY})


def graviton_3(root: Path) -> Path:
    """A virtual machine on Graviton3 (Neoverse V1, SVE of 256 bits), without sensors or clocks.

    Simulated after github.com/aws/aws-graviton-getting-started and Documentation/arch/arm64/sve.rst.
    """
    kinds = [Kind(range(4), arm(0xD40, f"{ARMV9} sve svebf16 svei8mm"), caches=[(1, "64K", 1), (2, "1024K", 1), (3, "32768K", 4)])]
    return write(cpus(root, kinds), {"proc/sys/abi/sve_default_vector_length": 32, **MEMORY})


def graviton_4(root: Path) -> Path:
    """A virtual machine on Graviton4 (Neoverse V2, SVE2 of 128 bits); see ``graviton_3``."""
    kinds = [Kind(range(4), arm(0xD4F, f"{ARMV9} sve sve2 svebf16 svei8mm"), caches=[(1, "64K", 1), (2, "2048K", 1)])]
    return write(cpus(root, kinds), {"proc/sys/abi/sve_default_vector_length": 16, **MEMORY})


def ampere(root: Path) -> Path:
    """An Ampere Altra (Neoverse N1: dot products, no SVE). Simulated after amperecomputing.com's Altra data sheet (3.0 GHz, L2 1 MB)."""
    return write(cpus(root, [Kind(range(8), arm(0xD0C, A76_FEATURES), 3000, caches=[(1, "64K", 1), (2, "1024K", 1)])]), MEMORY)


def pi_32_bit(root: Path) -> Path:
    """A Raspberry Pi 4 under a 32-bit system. Simulated after raspberrypi/linux's arch/arm/kernel/setup.c (c_show)."""
    describe = {"model name": "ARMv7 Processor rev 3 (v7l)", **arm(0xD08, "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 crc32")}
    cpus(root, [Kind(range(4), {**describe, "CPU architecture": "7"}, 1500)])
    return write(root, tree("Raspberry Pi 4 Model B Rev 1.5", "raspberrypi,4-model-b", "brcm,bcm2711"))
