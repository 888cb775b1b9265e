"""What NVML (the NVIDIA Management Library) says of a card, through NVIDIA's own binding nvidia-ml-py.

Functions, error codes and bits are those of the NVML API reference (docs.nvidia.com/deploy/nvml-api). Older drivers lack some
functions, and some cards cannot answer some: then a figure is None. Where there is no answer at all, Unavailable says why.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from edge_rt.hooks import Patient

T = TypeVar("T")

_PERSISTENCE = "if it is slow because the card sleeps, run `sudo nvidia-smi -pm 1`; if it hangs, look for Xid in `dmesg` and restart"
_ERRORS = {
    4: ("this user may not use the NVIDIA driver", "join the group that owns /dev/nvidia*, or run as one that may"),
    9: ("the NVIDIA driver is installed and not loaded", "run `sudo modprobe nvidia`; after an update, restart"),
    10: ("NVML timed out", _PERSISTENCE),
    12: (
        "NVIDIA's library libnvidia-ml.so.1 is missing",
        "install the driver's user libraries (libnvidia-compute); start a container with `--gpus all`",
    ),
    13: ("the NVIDIA driver is too old for NVML", "install driver 525 or newer"),
    15: ("the GPU fell off the bus", "look for Xid 79 in `dmesg`, check its power and seat, and restart"),
    16: ("the GPU must be reset", "run `sudo nvidia-smi --gpu-reset`, or restart"),
    18: ("the NVIDIA driver and its libraries are of different versions", "restart: the driver was updated while it ran"),
}
"""nvmlReturn_t -> why there is no card, and the way out."""
_INVALID_ARGUMENT, _NOT_FOUND = 2, 6

GRAPHICS, SM, MEMORY = 0, 1, 2  # nvmlClockType_t
_CORE_TEMPERATURE, _SLOWDOWN = 0, 1  # nvmlTemperatureSensors_t, nvmlTemperatureThresholds_t

THROTTLED = {
    0x004: "it reached its power limit",
    0x008: "the hardware halved its clock; check cooling and power supply",
    0x020: "it is too warm, and the driver slows it down; cool it better",
    0x040: "it is too hot, and the hardware slows it down; cool it better",
    0x080: "the power supply told it to brake",
    0x200: "the board's limits slow it down",
    0x400: "its voltage's reliability limits slow it down",
}
"""nvmlClocksEventReasons that are a loss. Idle (1), clocks that the user set (2), and those of other cards or a display (0x10, 0x100) are
no fault of the card."""


class Unavailable(Exception):
    """There is no card to use: why, and the way out."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


class Card(NamedTuple):
    """What does not change. Bytes, Hz, watts, degrees Celsius; None: not known. ``bus``: PCI address as the CUDA runtime writes it.

    ``capability``: of CUDA, e.g. (8, 6). ``cores``: FP32 lanes. ``bus_width``: bits of the memory bus. ``link``: PCIe generation and lanes.
    ``divided``: into instances (MIG).
    """

    name: str
    bus: str
    memory: int
    capability: tuple[int, int]
    cores: int | None
    sm_clock: float | None
    memory_clock: float | None
    bus_width: int | None
    power_limit: float | None
    slowdown: float | None
    link: tuple[int, int] | None
    divided: bool


class State(NamedTuple):
    """What changes; as ``Card``. ``reasons``: nvmlClocksEventReasons."""

    temperature: float | None
    power: float | None
    clock: float | None
    most: float | None
    reasons: int


class Nvml:
    """NVML, asked on a thread: a driver that hangs holds up nobody for longer than is said."""

    def __init__(self, module: Any = None) -> None:
        """``module``: nvidia-ml-py's; None imports it when it is first needed."""
        self._module = module
        self._patient = Patient("NVML")
        self._ready = False

    def card(self, index: int, seconds: float) -> Card:
        """Raises Unavailable."""
        return self._ask(lambda nvml: _card(nvml, index), seconds)

    def state(self, index: int, seconds: float) -> State:
        """Raises Unavailable."""
        return self._ask(lambda nvml: _state(nvml, nvml.nvmlDeviceGetHandleByIndex(index)), seconds)

    def free(self, index: int, seconds: float) -> int:
        """Bytes of memory that nobody uses. Raises Unavailable."""
        return self._ask(lambda nvml: int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(index)).free), seconds)

    def _ask(self, question: Callable[[Any], T], seconds: float) -> T:
        def answer() -> T:
            if self._module is None:
                self._module = importlib.import_module("pynvml")
            if not self._ready:  # never shut down: to start again may take a second
                self._module.nvmlInit()
                self._ready = True
            return question(self._module)

        try:
            return self._patient.ask(answer, seconds)
        except ImportError:
            raise Unavailable("the Python package nvidia-ml-py is not installed", "run `pip install nvidia-ml-py`") from None
        except TimeoutError as error:
            raise Unavailable(str(error), _PERSISTENCE) from None
        except Exception as error:  # nvidia-ml-py has a class for each code, and raises TypeError and others where a driver is half there
            if isinstance(error, Unavailable):
                raise
            unknown = f"NVML failed ({str(error) or type(error).__name__})", "try `nvidia-smi`; if that fails too, reinstall the driver"
            raise Unavailable(*_ERRORS.get(getattr(error, "value", -1), unknown)) from error


def _card(nvml: Any, index: int) -> Card:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
    except Exception as error:
        if getattr(error, "value", -1) not in (_INVALID_ARGUMENT, _NOT_FOUND):
            raise
        count = nvml.nvmlDeviceGetCount()
        remedy = f"choose one of cuda:0 to cuda:{count - 1}" if count else "see whether `lspci` shows one"
        raise Unavailable(f"the NVIDIA driver shows {count or 'no'} {'GPU' if count < 2 else 'GPUs'}", remedy) from None

    def optional(name: str, *arguments: Any, scale: float = 1.0) -> float | None:
        return _optional(nvml, name, handle, *arguments, scale=scale)

    cores, width = optional("nvmlDeviceGetNumGpuCores"), optional("nvmlDeviceGetMemoryBusWidth")
    generation, lanes = optional("nvmlDeviceGetMaxPcieLinkGeneration"), optional("nvmlDeviceGetMaxPcieLinkWidth")
    return Card(
        name=_decoded(nvml.nvmlDeviceGetName(handle)),
        bus=_address(_decoded(nvml.nvmlDeviceGetPciInfo(handle).busId)),
        memory=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        capability=tuple(nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        cores=None if cores is None else int(cores),
        sm_clock=optional("nvmlDeviceGetMaxClockInfo", SM, scale=1e6),
        memory_clock=optional("nvmlDeviceGetMaxClockInfo", MEMORY, scale=1e6),
        bus_width=None if width is None else int(width),
        power_limit=optional("nvmlDeviceGetEnforcedPowerLimit", scale=1e-3),
        slowdown=optional("nvmlDeviceGetTemperatureThreshold", _SLOWDOWN),
        link=None if generation is None or lanes is None else (int(generation), int(lanes)),
        divided=_divided(nvml, handle),
    )


def _state(nvml: Any, handle: Any) -> State:
    def optional(name: str, *arguments: Any, scale: float = 1.0) -> float | None:
        return _optional(nvml, name, handle, *arguments, scale=scale)

    reasons = optional("nvmlDeviceGetCurrentClocksEventReasons")
    if reasons is None:  # its name before driver 535
        reasons = optional("nvmlDeviceGetCurrentClocksThrottleReasons")
    return State(
        temperature=optional("nvmlDeviceGetTemperature", _CORE_TEMPERATURE),
        power=optional("nvmlDeviceGetPowerUsage", scale=1e-3),
        clock=optional("nvmlDeviceGetClockInfo", SM, scale=1e6),
        most=optional("nvmlDeviceGetMaxClockInfo", SM, scale=1e6),
        reasons=int(reasons or 0),
    )


def _optional(nvml: Any, name: str, *arguments: Any, scale: float) -> float | None:
    """A figure, None where this card, driver or binding has it not."""
    try:
        return scale * float(getattr(nvml, name)(*arguments))
    except Exception as error:
        if getattr(error, "value", -1) in (15, 16):  # the card is lost: no figure will come
            raise
        return None


def _divided(nvml: Any, handle: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except Exception:  # most cards cannot be
        return False


def _decoded(text: str | bytes) -> str:
    """Older versions of the binding give bytes."""
    return text.decode(errors="replace") if isinstance(text, bytes) else text


def _address(bus: str) -> str:
    """NVML's PCI address (00000000:00:1E.0) as the CUDA runtime writes it (0000:00:1e.0)."""
    domain, _, rest = bus.lower().partition(":")
    return f"{domain[-4:]}:{rest}"
