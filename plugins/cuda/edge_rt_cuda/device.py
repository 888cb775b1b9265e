"""The devices ``cuda:N``, N as nvidia-smi numbers the cards."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from edge_rt.hooks import Basis, Cores, Health, Latest, NativeError, Offer, Profile, Refusal, ggml_backends
from edge_rt_cuda.nvml import THROTTLED, Card, Nvml, Unavailable

SECONDS = 0.8
"""That a probe waits for NVML at most. Where no program uses a card and it is not kept awake, the driver needs longer to wake it."""
BUILD = (
    'CMAKE_ARGS="-DGGML_CUDA=on" pip install --no-cache-dir --force-reinstall --no-deps '
    "--no-binary llama-cpp-python llama-cpp-python==0.3.36"
)
"""Without the first three flags pip would keep a llama-cpp-python of the same version that is there, or was built before."""
OLDEST = (5, 0)
"""Compute capability that ggml's CUDA backend needs."""

_LANES = {  # FP32 lanes of a multiprocessor; multiply-adds a clock of its tensor cores: F16 into F32, INT8
    (5, 0): (128, 0, 0), (6, 0): (64, 0, 0), (6, 1): (128, 0, 512), (7, 0): (64, 512, 256), (7, 5): (64, 256, 1024),
    (8, 0): (64, 1024, 2048), (8, 6): (128, 256, 512), (8, 9): (128, 256, 1024), (9, 0): (128, 2048, 4096), (10, 0): (128, 4096, 8192),
    (12, 0): (128, 256, 1024),
}  # fmt: skip
"""By compute capability, each entry up to the next: CUDA C++ Programming Guide, "arithmetic instructions", NVIDIA's architecture papers.
Data centre cards of an architecture may do twice as much in F16 (A10), so that this is the least.
"""
_LANE_BYTES = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}
"""Bytes a second of one PCIe lane, by generation."""

_nvml = Nvml()


class CudaDevice:
    """One card."""

    def __init__(
        self, index: int, nvml: Nvml = _nvml, *, root: Path = Path("/"), backends: Callable[[], Collection[str]] | None = None
    ) -> None:
        """``root``: of another tree of /proc and /dev, for tests, as are the others."""
        self.name, self._index, self._nvml, self._root = f"cuda:{index}", index, nvml, root
        self._backends = backends or ggml_backends
        self._latest = Latest(self._health, Health())

    def probe(self) -> Offer | Refusal:
        """An offer if there is a card, a driver, and a libggml with CUDA."""
        if missing := _no_driver(self._root) or _hidden(os.environ.get("CUDA_VISIBLE_DEVICES")):
            return missing
        try:
            card = self._nvml.card(self._index, SECONDS)
        except Unavailable as error:
            return Refusal(error.reason, error.remedy)
        capability = ".".join(map(str, card.capability))
        if card.capability < OLDEST:
            return Refusal(f"{card.name} has compute capability {capability}, and 5.0 is needed", "use another card, or the CPU")
        if card.divided:
            return Refusal(f"{card.name} is divided into instances (MIG)", f"run `sudo nvidia-smi -i {self._index} -mig 0`")
        if "cuda" not in self._backends():
            return Refusal(f"{card.name} is there, but libggml was built without CUDA", f"install the CUDA toolkit and run `{BUILD}`")
        return Offer(
            score=100,
            description=f"{card.name}, compute capability {capability}",
            memory_bytes=card.memory,
            features=(f"cc{capability}", *(("tensor_cores",) if card.capability >= (7, 0) else ())),
            engines=("ggml_cuda",),
            basis="projected",
        )

    def profile(self) -> Profile:
        """From what the driver says of the card; bandwidth and operations are worked out from clocks and widths. Raises NativeError."""
        try:
            return profile_of(self.name, self._nvml.card(self._index, SECONDS))
        except Unavailable as error:
            raise NativeError(str(error)) from error

    def health(self) -> Health:
        """The last answer, at most a second old when the driver answers."""
        return self._latest.get()

    def _health(self) -> Health:
        state = self._nvml.state(self._index, 5.0)
        reasons = tuple(text for bit, text in THROTTLED.items() if state.reasons & bit)
        return Health(state.temperature, state.power, state.clock, state.most, reasons)


def profile_of(name: str, card: Card) -> Profile:
    """The profile of a card."""
    lanes, half, int8 = next(rates for oldest, rates in sorted(_LANES.items(), reverse=True) if card.capability >= oldest)
    number = card.cores // lanes if card.cores else 0
    features = (f"cc{card.capability[0]}.{card.capability[1]}",)
    bandwidth, operations = {}, {}
    if card.memory_clock and card.bus_width:
        # GDDR and HBM transfer twice a cycle of the clock that NVML states.
        bandwidth[max(1, number)] = 2 * card.memory_clock * card.bus_width / 8
    if card.sm_clock and number:
        rates = {"f32": lanes, "f16": half or lanes, "int8": int8}
        operations = {kind: 2 * rate * number * card.sm_clock for kind, rate in rates.items() if rate}
    link = None if card.link is None or card.link[0] not in _LANE_BYTES else _LANE_BYTES[card.link[0]] * card.link[1]
    known = {"cores": number, "power": card.power_limit, "hottest": card.slowdown}
    projected = {"bandwidth": bandwidth, "operations": operations, "link": link}
    basis: dict[str, Basis] = {"memory": "measured"}
    basis |= dict.fromkeys((key for key, value in known.items() if value), "measured")
    basis |= dict.fromkeys((key for key, value in projected.items() if value), "projected")
    cores = (Cores("multiprocessors", number, features=features, clock=card.sm_clock),) if number else ()
    return Profile(
        name=name, kind="gpu", cores=cores, memory=card.memory, bandwidth=bandwidth, operations=operations, link=link,
        power=card.power_limit, hottest=card.slowdown, basis=basis,
    )  # fmt: skip


def cards_in(root: Path = Path("/")) -> list[CudaDevice]:
    """A device for each card that the kernel's driver lists; where it lists none one to say so. Reads a folder."""
    try:
        found = len(list((root / "proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        found = 0
    return [CudaDevice(index, root=root) for index in range(max(1, found))]


def _no_driver(root: Path) -> Refusal | None:
    """Where nothing of the driver is to be seen, NVML is not even looked for: it takes time to import."""
    if os.name == "nt" or any((root / path).exists() for path in ("proc/driver/nvidia", "dev/nvidiactl", "dev/dxg")):
        return None
    return Refusal("no NVIDIA driver is loaded", "if there is an NVIDIA card, install its driver from your distribution")


def _hidden(visible: str | None) -> Refusal | None:
    if visible is None or visible.strip() not in ("", "-1", "NoDevFiles"):
        return None
    return Refusal("CUDA_VISIBLE_DEVICES hides all cards from this process", "unset it")
