"""What a Raspberry Pi's firmware says of power and throttling, through the program ``vcgencmd``.

It knows more than the files of the kernel: what has been since the board started (the kernel's own watch, raspberrypi-hwmon.c, clears these
bits for itself when it looks), and on a Pi 5 what each rail takes.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edge_rt.hooks import read_system_int, read_system_text, system_folders

Run = Callable[[str], "str | None"]
"""Runs ``vcgencmd`` with one argument: what it prints, None if it cannot be run."""

_BITS = ("the supply's voltage is too low", "the clock is capped", "the firmware throttles", "the soft temperature limit is reached")
"""Bits 0 to 3 of get_throttled, now; 16 to 19 are the same since the board started (raspberrypi.com/documentation/computers/os.html)."""
_PAST = 16
_PERIOD = 1.0
_FAILED_PERIOD = 60.0
_TIMEOUT = 2.0
_RAIL = re.compile(r"^\s*(\w+)_([AV])\b.*?=([0-9.]+)[AV]\s*$", re.MULTILINE)
_LOSSES = 1.1451, 0.5879
"""Watts of the board = a x watts of all rails + b, fitted against a meter (pitop.hongjunwu.com/hardware/pi-features)."""


class Throttling(NamedTuple):
    """Why the firmware slows the board down: ``now``, and ``past``: at any time since it started."""

    now: tuple[str, ...]
    past: tuple[str, ...]


class Answer(NamedTuple):
    """The firmware's last answer; None: it gives none. ``power``: watts of the board."""

    throttling: Throttling | None = None
    power: float | None = None


def decode(text: str | None) -> Throttling | None:
    """``throttled=0x50005`` in words, None for anything else."""
    match = re.fullmatch(r"\s*throttled=0x([0-9a-fA-F]{1,8})\s*", text or "")
    if not match:
        return None
    bits = int(match[1], 16)
    now, past = (tuple(name for bit, name in enumerate(_BITS, first) if bits >> bit & 1) for first in (0, _PAST))
    return Throttling(now, past)


def board_power(text: str | None) -> float | None:
    """Watts of a Pi 5 from ``vcgencmd pmic_read_adc``: volts times amperes of every rail, and losses. None where there is no such meter."""
    volts: dict[str, float] = {}
    amperes: dict[str, float] = {}
    for rail, unit, value in _RAIL.findall(text or ""):
        try:
            (amperes if unit == "A" else volts)[rail] = float(value)
        except ValueError:  # 1.2.3
            return None
    rails = volts.keys() & amperes.keys()
    if not rails:
        return None
    factor, constant = _LOSSES
    return factor * sum(volts[rail] * amperes[rail] for rail in rails) + constant


def under_voltage(root: Path) -> tuple[str, ...]:
    """The reason, if the kernel's own watch over the supply (hwmon ``rpi_volt``) has its alarm raised: where vcgencmd cannot be run."""
    chips = system_folders(root / "sys/class/hwmon", "hwmon")
    raised = any(read_system_text(chip / "name") == "rpi_volt" and read_system_int(chip / "in0_lcrit_alarm") == 1 for chip in chips)
    return _BITS[:1] if raised else ()


def run(argument: str) -> str | None:
    """Run the real one."""
    import subprocess  # costs start-up time

    program = shutil.which("vcgencmd")
    if program is None:
        return None
    try:
        result = subprocess.run([program, argument], capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return result.stdout if result.returncode == 0 else None


class Firmware:
    """Asks at most every second, on a thread: the program takes some ten milliseconds to run."""

    def __init__(self, ask: Run = run, clock: Callable[[], float] = time.monotonic) -> None:
        self._ask, self._clock = ask, clock
        self._answer, self._next, self._asking = Answer(), 0.0, False
        self._has_meter = True

    def answer(self) -> Answer:
        """The last answer, at once; meanwhile another may be asked for."""
        if not self._asking and self._clock() >= self._next:
            import threading

            self._asking = True
            threading.Thread(target=self.refresh, daemon=True, name="edge-rt-vcgencmd").start()
        return self._answer

    def refresh(self) -> Answer:
        """Ask now and wait."""
        try:
            throttling = decode(self._ask("get_throttled"))
            power = board_power(self._ask("pmic_read_adc")) if throttling is not None and self._has_meter else None
            self._has_meter = power is not None
            self._answer = Answer(throttling, power)
            self._next = self._clock() + (_FAILED_PERIOD if throttling is None else _PERIOD)
        finally:
            self._asking = False
        return self._answer
