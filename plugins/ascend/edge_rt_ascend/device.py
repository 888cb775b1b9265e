"""The devices ``ascend:N``, N as in /dev/davinciN."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from edge_rt.hooks import Basis, Cores, Health, Latest, NativeError, Offer, Profile, Refusal, ggml_backends
from edge_rt_ascend import cann, second
from edge_rt_ascend.npu_smi import Chip, NpuSmi, NpuSmiError

SECONDS = 0.8
"""That a probe waits for npu-smi at most."""
OLDEST = (8, 0)
"""Version of CANN that ggml's backend is built with (llama.cpp, docs/backend/CANN.md: 8.5)."""
BUILD = (
    'CMAKE_ARGS="-DGGML_CANN=on" pip install --no-cache-dir --force-reinstall --no-deps '
    "--no-binary llama-cpp-python llama-cpp-python==0.3.36"
)
"""Without the first three flags pip would keep a llama-cpp-python of the same version that is there, or was built before."""


class Kind(NamedTuple):
    """What is said of a product: AI cores, clock in Hz, operations and bytes a second, watts of the board."""

    cores: int
    clock: float | None
    f16: float
    int8: float
    bandwidth: float
    power: float | None


KINDS = {
    "910B1": Kind(24, 1.85e9, 414e12, 828e12, 1.6e12, 400.0),
    "910B2": Kind(24, 1.8e9, 376e12, 752e12, 1.6e12, 400.0),
    "910B3": Kind(20, 1.8e9, 313e12, 626e12, 1.6e12, 400.0),
    "910B4": Kind(20, 1.5e9, 280e12, 560e12, 0.8e12, 310.0),
    "310P3": Kind(8, 1.08e9, 70e12, 140e12, 204.8e9, 72.0),
}
"""Atlas 800T A2, 800I A2, 300I A2, 300I Pro: as published; nothing of it was measured here. Others: not known.

Checked, with CANN's platform_config as quoted in public repositories (huawei-csl/pto-dsl): cores and clocks of the 910B2 and 910B4, and
cores of the 910B3. Cores x clock x 8192 make 354e12, 246e12 and 295e12 in f16, 6 to 12 % below what is published and stands here. Not found
again: clocks of the others, bandwidths, watts, all of the 310P3.
"""
_SCORE, _SCORE_TORCH = 100.0, 30.0
"""With torch alone as much as cards of edge-rt-mlu, which nothing else drives."""
_UNFIT = re.compile(r"310(B\d*)?")
"""Chips that ggml's backend has no kernels for."""


class AscendDevice:
    """One NPU."""

    def __init__(
        self,
        number: int,
        npu_smi: NpuSmi | None = None,
        *,
        root: Path = Path("/"),
        environment: Mapping[str, str] = os.environ,
        backends: Callable[[], Collection[str]] | None = None,
        here: Callable[[str], bool] = second.installed,
    ) -> None:
        """``root``: of another tree of files, for tests, as are the others. ``here``: whether a Python package is installed."""
        self.name, self._number, self._root, self._environment = f"ascend:{number}", number, root, environment
        self._npu_smi = npu_smi or _npu_smi
        self._backends, self._here = backends or ggml_backends, here
        self._latest = Latest(self._health, Health(), every=2.0)

    def probe(self) -> Offer | Refusal:
        """An offer if there is an NPU, a driver, CANN, and an engine: ggml's CANN backend, torch as second choice, or both."""
        if refusal := self._unreachable() or self._without_cann():
            return refusal
        no_ggml, no_torch = self._without_ggml(), second.missing(self._here)
        if no_ggml and no_torch:
            return second.or_else(no_ggml, no_torch)
        try:
            chip = self._chip(SECONDS)
        except NpuSmiError as error:
            return Refusal(error.reason, error.remedy)
        if chip.health == "Critical":
            return Refusal(f"npu-smi calls the health of {chip.name} critical", f"see `npu-smi info -t health -i {self._number}`")
        if _UNFIT.fullmatch(chip.name):
            no_ggml = Refusal(f"ggml's CANN backend has no kernels for {chip.name}", "use the CPU")
            if no_torch:
                return second.or_else(no_ggml, no_torch)
        only = f", with torch alone: {no_ggml.reason}" if no_ggml else ""
        return Offer(
            score=_SCORE_TORCH if no_ggml else _SCORE,
            description=f"Ascend {chip.name}, CANN {self._cann_text()}{only}",
            memory_bytes=chip.memory,
            features=(chip.name.lower(),),
            engines=tuple(name for name, lacks in (("ggml_cann", no_ggml), (second.ENGINE, no_torch)) if lacks is None),
            basis="projected",
        )

    def index(self) -> int:
        """What CANN numbers it by: among those that this process sees. Raises NativeError if it does not see it."""
        found = self._position()
        if found is None:
            raise NativeError(f"ASCEND_RT_VISIBLE_DEVICES hides {self.name} from this process; unset it")
        return found

    def free(self, seconds: float) -> int:
        """Bytes of its memory that nobody uses. Raises NativeError."""
        try:
            chip = self._chip(seconds)
        except NpuSmiError as error:
            raise NativeError(f"{self.name} cannot be used: {error}") from error
        return chip.memory - chip.used

    def profile(self) -> Profile:
        """Memory from npu-smi, the rest from data sheets where they are known. Raises NativeError."""
        try:
            return profile_of(self.name, self._chip(SECONDS))
        except NpuSmiError as error:
            raise NativeError(str(error)) from error

    def health(self) -> Health:
        """The last answer: npu-smi takes a second, so it is asked in the background."""
        return self._latest.get()

    def _health(self) -> Health:
        chip = self._chip(10.0)
        bad = chip.health not in ("OK", "UNKNOWN")
        reasons = (f"npu-smi calls its health {chip.health}; see `npu-smi info -t health -i {self._number}`",) if bad else ()
        return Health(temperature=chip.temperature, power=chip.power, throttled=reasons)

    def _chip(self, seconds: float) -> Chip:
        answer = self._npu_smi.info(seconds)
        if self._number not in answer.chips:
            shown = ", ".join(f"ascend:{number}" for number in sorted(answer.chips))
            raise NpuSmiError(f"npu-smi does not show {self.name}", f"choose one that it shows: {shown}")
        return answer.chips[self._number]

    # ---- refusals ----------------------------------------------------------------------------------------------------

    def _unreachable(self) -> Refusal | None:
        numbers, node = _numbers(self._root), self._root / f"dev/davinci{self._number}"
        if not numbers:
            if card := _pci_card(self._root):
                remedy = "install the Ascend driver and firmware; give a container --device /dev/davinci0"
                return Refusal(f"{card} is there, and its driver is not", remedy)
            return Refusal("there is no Ascend NPU (/dev/davinci*)", "if there is a card, install the Ascend driver and firmware")
        if self._number not in numbers:
            return Refusal(f"there is no /dev/davinci{self._number}", f"choose one of {', '.join(f'ascend:{n}' for n in numbers)}")
        for name in ("davinci_manager", "devmm_svm", "hisi_hdc"):
            if not (self._root / "dev" / name).exists():
                return Refusal(f"/dev/{name} is missing beside /dev/davinci{self._number}", f"give the container --device /dev/{name}")
        if not os.access(node, os.R_OK | os.W_OK):
            return Refusal(f"this user may not use /dev/davinci{self._number}", "run `sudo usermod -aG HwHiAiUser $USER` and log in again")
        if self._position() is None:
            return Refusal("ASCEND_RT_VISIBLE_DEVICES hides it from this process", "unset it, or choose a device that it names")
        if cann.driver(self._root) is None:
            return Refusal(
                "the Ascend driver is not in /usr/local/Ascend/driver", "install it; mount /usr/local/Ascend/driver into a container"
            )
        return None

    def _without_cann(self) -> Refusal | None:
        found = cann.find(self._root, self._environment)
        if found is None:
            return Refusal("CANN is not installed", "install its toolkit and the kernels for this chip, 8.0 or newer, from hiascend.com")
        if not found.ready:
            return Refusal("CANN's environment is not set", f"run `source {found.place.parent}/set_env.sh` before edge-rt")
        return None

    def _without_ggml(self) -> Refusal | None:
        """Why ggml cannot drive the NPU, which torch perhaps can."""
        found = cann.find(self._root, self._environment)
        if found and found.version and found.version < OLDEST:
            return Refusal(f"CANN {found.text} is too old", "install CANN 8.0 or newer, and a driver that fits it")
        if "cann" not in self._backends():
            return Refusal("libggml was built without CANN", f"run `{BUILD}`")
        return None

    def _cann_text(self) -> str:
        found = cann.find(self._root, self._environment)
        return found.text if found else "?"

    def _position(self) -> int | None:
        """Among the NPUs of this process, after ASCEND_RT_VISIBLE_DEVICES; None if it is not among them."""
        numbers = _numbers(self._root)
        if self._number not in numbers:
            return None
        own, visible = numbers.index(self._number), self._environment.get("ASCEND_RT_VISIBLE_DEVICES")
        if visible is None:
            return own
        listed = [int(n) for n in re.findall(r"\d+", visible)]
        return listed.index(own) if own in listed else None


_npu_smi = NpuSmi()


def profile_of(name: str, chip: Chip) -> Profile:
    """The profile of a chip."""
    kind = KINDS.get(chip.name.removeprefix("Ascend"))
    basis: dict[str, Basis] = {"memory": "measured"}
    if kind is None:
        return Profile(name=name, kind="npu", cores=(), memory=chip.memory, basis=basis)
    basis |= dict.fromkeys(("cores", "bandwidth", "operations", *(("power",) if kind.power else ())), "projected")
    return Profile(
        name=name, kind="npu", cores=(Cores("AI cores", kind.cores, clock=kind.clock),), memory=chip.memory,
        bandwidth={kind.cores: kind.bandwidth}, operations={"f16": kind.f16, "int8": kind.int8}, power=kind.power, basis=basis,
    )  # fmt: skip


def npus_in(root: Path = Path("/")) -> list[AscendDevice]:
    """A device for each /dev/davinciN; where there is none one to say so."""
    return [AscendDevice(number, root=root) for number in _numbers(root) or [0]]


def _numbers(root: Path) -> list[int]:
    """The N of all /dev/davinciN, rising."""
    found = (re.fullmatch(r"davinci(\d+)", path.name) for path in (root / "dev").glob("davinci*"))
    return sorted(int(match.group(1)) for match in found if match)


_CARDS = {"0xd803": "an Ascend 910C", "0xd802": "an Ascend 910B", "0xd801": "an Ascend 910", "0xd500": "an Ascend 310P"}
"""PCI numbers of Huawei's (0x19e5) NPUs: llama.cpp, docs/backend/CANN.md."""


def _pci_card(root: Path) -> str | None:
    """A card on the PCI bus, in words; None if there is none."""
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        try:
            vendor, device = ((folder / name).read_text().strip() for name in ("vendor", "device"))
        except (OSError, UnicodeDecodeError):
            continue  # a device that went away, or one that says nothing
        if vendor == "0x19e5" and device in _CARDS:
            return _CARDS[device]
    return None
