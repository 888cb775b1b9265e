"""What ``npu-smi info`` says: the table that Huawei documents (hiascend.com, "npu-smi info", e.g. npusmi_007 of the Atlas 200I A2).

Two rows a chip, under a heading of two rows that names their columns; the columns differ from product to product: HBM-Usage only where
there is HBM, Phy-ID or Device. So cells are found by the heading, not by their place.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from typing import NamedTuple

from edge_rt.hooks import Patient


class Chip(NamedTuple):
    """One chip. ``number``: N of its /dev/davinciN. Bytes, watts, degrees Celsius; None: not stated, which is common for the second chip
    of a card.
    """

    number: int
    name: str
    health: str
    power: float | None
    temperature: float | None
    memory: int
    used: int


class Answer(NamedTuple):
    """The chips by number, and the version of the driver."""

    version: str
    chips: dict[int, Chip]


class NpuSmiError(Exception):
    """npu-smi gave no answer: why, and the way out."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


class NpuSmi:
    """Runs ``npu-smi info`` on a thread: one that hangs in the driver cannot be waited for, not even when it is killed."""

    def __init__(self, run: Callable[[float], str] | None = None) -> None:
        """``run``: gives the output within so many seconds, for tests."""
        self._run = run or _run
        self._patient = Patient("npu-smi")

    def info(self, seconds: float) -> Answer:
        """Raises NpuSmiError."""
        try:
            text = self._patient.ask(lambda: self._run(seconds), seconds + 0.1)
        except (TimeoutError, subprocess.TimeoutExpired):
            raise NpuSmiError(f"npu-smi did not answer within {seconds:g} s", "try `npu-smi info`; if it hangs, restart") from None
        except FileNotFoundError:
            raise NpuSmiError("npu-smi is not there", "install the Ascend driver; mount /usr/local/bin/npu-smi into a container") from None
        except OSError as error:
            raise NpuSmiError(f"npu-smi cannot be run ({error.strerror or error})", "see who may: `ls -l $(which npu-smi)`") from None
        return parse(text)


def _run(seconds: float) -> str:
    """The output, errors included. Raises FileNotFoundError, OSError, subprocess.TimeoutExpired."""
    program = shutil.which("npu-smi") or shutil.which("npu-smi", path="/usr/local/bin:/usr/local/sbin:/usr/local/Ascend/driver/tools")
    if program is None:
        raise FileNotFoundError("npu-smi")
    done = subprocess.run(
        [program, "info"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False
    )
    return done.stdout.decode(errors="replace")


_TROUBLE = (
    ("dcmi module initialize failed", "the driver does not answer npu-smi", "see whether `lsmod` shows drv_davinci_intf; restart"),
    ("cannot open shared object", "npu-smi does not find its libraries", "put /usr/local/Ascend/driver/lib64 into LD_LIBRARY_PATH"),
    ("permission denied", "this user may not ask npu-smi", "run `sudo usermod -aG HwHiAiUser $USER` and log in again"),
)
"""What npu-smi writes instead of a table -> why, and the way out."""


def parse(text: str) -> Answer:
    """Read the table. Raises NpuSmiError for what is none."""
    low = text.lower()
    for mark, reason, remedy in _TROUBLE:
        if mark in low:
            raise NpuSmiError(reason, remedy)
    version = re.search(r"Version:\s*(\S+)", text)
    heading: list[list[str]] = []
    rows: list[list[list[str]]] = []
    for line in text.splitlines():
        cells = [cell.split() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or len(cells) < 3:
            if heading and rows and not line.startswith(("|", "+")):
                break
            continue
        words = [word for cell in cells for word in cell]
        if words[0] in ("NPU", "Chip"):
            if words[:2] == ["NPU", "Process"] or "Process" in words:
                break  # the table of processes, which comes after
            heading.append(words)
        elif len(heading) == 2:
            rows.append(cells)
    chips = [chip for first, second in zip(rows[::2], rows[1::2], strict=False) if (chip := _chip(first, second, heading[1]))]
    if not chips:
        line = next((line.strip() for line in text.splitlines() if line.strip()), "nothing")
        raise NpuSmiError(f"npu-smi shows no NPU ({line[:80]})", "try `npu-smi info`; install a driver that fits the card")
    return Answer(version.group(1) if version else "", {chip.number: chip for chip in chips})


def _chip(first: list[list[str]], second: list[list[str]], heading: list[str]) -> Chip | None:
    """A chip of its two rows; None where they are damaged."""
    try:
        name, health = first[0][1], first[1][0]
        # After the bus id, in the order of the heading: AICore(%), then pairs "used / total" of memory and, if there is any, of HBM.
        pairs = re.findall(r"(\d+)\s*/\s*(\d+)", " ".join(second[2]))
        used, total = pairs[-1] if "HBM-Usage(MB)" in heading else pairs[0]
        return Chip(
            number=int(second[0][1] if len(second[0]) > 1 else first[0][0]),
            name=name,
            health=health,
            power=_number(first[2][0]),
            temperature=_number(first[2][1]),
            memory=int(total) << 20,
            used=int(used) << 20,
        )
    except (IndexError, ValueError):
        return None


def _number(text: str) -> float | None:
    """A figure; None for "-" and "NA"."""
    try:
        return float(text)
    except ValueError:
        return None
