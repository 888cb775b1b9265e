"""Devices ``cuda:N`` on a simulated driver: what they offer, why they refuse, and that nothing hangs or raises."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import edge_rt_cuda
import pytest
from edge_rt_cuda.device import BUILD, CudaDevice, cards_in
from edge_rt_cuda.nvml import THROTTLED, Nvml
from simulated_nvml import Error, NvmlError, SimulatedNvml, card

from edge_rt.hooks import Device, HasProfile, Health, NativeError, Offer, Refusal, TellsHealth
from edge_rt.plugin_host.registry import Registry


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose kernel has the driver and two cards (as /proc/driver/nvidia, documented in the driver's README, "proc interface")."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for bus in ("0000:00:1e.0", "0000:00:1f.0"):
        (tmp_path / "proc/driver/nvidia/gpus" / bus).mkdir(parents=True)
    return tmp_path


BUILT = ("base", "cpu", "cuda")


def device(root: Path, *cards: dict[str, Any], index: int = 0, backends: tuple[str, ...] = BUILT, **more: Any) -> CudaDevice:
    return CudaDevice(index, Nvml(SimulatedNvml(*cards, **more)), root=root, backends=lambda: backends)


def refused(answer: Offer | Refusal, reason: str, remedy: str) -> None:
    assert isinstance(answer, Refusal)
    assert reason in answer.reason
    assert remedy in answer.remedy
    assert not answer.remedy.endswith(".")


# ---- offers ----------------------------------------------------------------------------------------------------------


def test_an_a10g_is_offered(root: Path) -> None:
    found = device(root, card()).probe()
    assert found == Offer(
        score=100,
        description="NVIDIA A10G, compute capability 8.6",
        memory_bytes=22731 << 20,
        features=("cc8.6", "tensor_cores"),
        engines=("ggml_cuda",),
        basis="projected",
    )


def test_it_is_what_the_protocols_ask_for(root: Path) -> None:
    one = device(root, card())
    assert isinstance(one, Device)
    assert isinstance(one, HasProfile)
    assert isinstance(one, TellsHealth)
    assert one.probe() == one.probe()


def test_one_device_a_card_and_one_to_say_that_there_is_none(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert [one.name for one in cards_in(root)] == ["cuda:0", "cuda:1"]
    assert [one.name for one in cards_in(tmp_path_factory.mktemp("empty"))] == ["cuda:0"]


def test_the_registry_takes_the_plugin() -> None:
    registry = Registry.load(entry_points=False, plugins={"cuda": edge_rt_cuda})
    assert "ggml_cuda" in registry.engines()
    assert "cuda:0" in registry.devices()
    assert isinstance(registry.probe("cuda:0"), (Offer, Refusal))
    assert [status.reason for status in registry.plugins if status.name == "cuda"] == [""]


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_without_a_driver_nothing_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    refused(CudaDevice(0, root=tmp_path).probe(), "no NVIDIA driver is loaded", "install its driver")


def test_without_the_binding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    refused(CudaDevice(0, Nvml(), root=root).probe(), "nvidia-ml-py is not installed", "pip install nvidia-ml-py")


@pytest.mark.parametrize(
    ("code", "reason", "remedy"),
    [
        (4, "may not use", "group"),
        (9, "not loaded", "modprobe"),
        (12, "libnvidia-ml.so.1 is missing", "--gpus all"),
        (13, "too old", "525"),
        (15, "fell off the bus", "dmesg"),
        (16, "must be reset", "--gpu-reset"),
        (18, "different versions", "restart"),
        (999, "NVML failed (code 999)", "nvidia-smi"),
    ],
)
def test_what_nvml_says_is_told_with_a_way_out(root: Path, code: int, reason: str, remedy: str) -> None:
    refused(device(root, card(), init=NvmlError(code)).probe(), reason, remedy)


@pytest.mark.parametrize("error", [OSError("invalid ELF header"), TypeError("NoneType"), AttributeError("nvmlInit"), ValueError()])
def test_a_driver_that_is_half_there(root: Path, error: Exception) -> None:
    refused(device(root, card(), init=error).probe(), f"NVML failed ({str(error) or 'ValueError'})", "reinstall the driver")


def test_a_card_that_is_lost_is_refused_though_its_name_is_known(root: Path) -> None:
    refused(device(root, card(nvmlDeviceGetMemoryInfo=Error(15))).probe(), "fell off the bus", "dmesg")
    refused(device(root, card(nvmlDeviceGetNumGpuCores=Error(15))).probe(), "fell off the bus", "dmesg")


@pytest.mark.parametrize("hanging", ["nvmlInit", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetMaxClockInfo"])
def test_a_driver_that_hangs(root: Path, monkeypatch: pytest.MonkeyPatch, hanging: str) -> None:
    monkeypatch.setattr("edge_rt_cuda.device.SECONDS", 0.1)
    found = device(root, card(), hangs={hanging: 30})
    for _ in range(3):  # and does not get a thread more each time
        start = time.monotonic()
        refused(found.probe(), "NVML did not answer within 0.1 s", "nvidia-smi -pm 1")
        assert time.monotonic() - start < 0.5
        assert found.health() == Health()
    assert found._nvml._module.calls.count(hanging) == 1


def test_a_slow_driver_is_asked_again_later(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that wakes a sleeping card."""
    monkeypatch.setattr("edge_rt_cuda.device.SECONDS", 0.1)
    found = device(root, card(), hangs={"nvmlInit": 0.4})
    assert isinstance(found.probe(), Refusal)
    time.sleep(0.6)
    assert isinstance(found.probe(), Offer)


def test_a_number_that_no_card_has(root: Path) -> None:
    refused(device(root, card(), index=1).probe(), "the NVIDIA driver shows 1 GPU", "cuda:0")
    refused(device(root).probe(), "the NVIDIA driver shows no GPU", "lspci")


def test_an_old_card(root: Path) -> None:
    refused(device(root, card(nvmlDeviceGetCudaComputeCapability=(3, 5))).probe(), "compute capability 3.5", "CPU")


def test_a_divided_card(root: Path) -> None:
    refused(device(root, card(nvmlDeviceGetMigMode=(1, 1))).probe(), "divided into instances", "-mig 0")


def test_a_libggml_without_cuda_is_told_how_to_be_built(root: Path) -> None:
    refused(device(root, card(), backends=("base", "cpu")).probe(), "built without CUDA", BUILD)
    assert "-DGGML_CUDA=on" in BUILD
    assert "llama-cpp-python==0.3.36" in BUILD


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_cards(root: Path, monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    refused(device(root, card()).probe(), "CUDA_VISIBLE_DEVICES hides", "unset it")


# ---- profile ---------------------------------------------------------------------------------------------------------


def test_the_profile_of_an_a10g_is_its_data_sheets(root: Path) -> None:
    found = device(root, card()).profile()
    assert (found.name, found.kind, found.memory) == ("cuda:0", "gpu", 22731 << 20)
    (cores,) = found.cores
    assert (cores.number, cores.clock) == (80, 1.71e9)
    assert found.bandwidth == {80: pytest.approx(600e9, rel=0.01)}
    assert found.operations == {kind: pytest.approx(rate, rel=0.01) for kind, rate in {"f32": 35e12, "f16": 70e12, "int8": 140e12}.items()}
    assert found.link == pytest.approx(31.5e9, rel=0.01)
    assert (found.power, found.hottest) == (300.0, 95.0)
    assert found.basis == {
        "memory": "measured", "cores": "measured", "power": "measured", "hottest": "measured",
        "bandwidth": "projected", "operations": "projected", "link": "projected",
    }  # fmt: skip


def test_what_a_card_does_not_say_is_not_known(root: Path) -> None:
    bare = {"nvmlDeviceGetName", "nvmlDeviceGetPciInfo", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCudaComputeCapability"}
    silent = card(**{name: Error(3) for name in card() if name not in bare})
    old = card(**{name: None for name in card() if name not in bare})  # the binding lacks the functions
    for one in (silent, old):
        found = device(root, one)
        assert isinstance(found.probe(), Offer)
        profile = found.profile()
        assert (profile.cores, dict(profile.bandwidth), dict(profile.operations), profile.link, profile.power) == ((), {}, {}, None, None)
        assert profile.basis == {"memory": "measured"}


@pytest.mark.parametrize("capability", [(5, 2), (6, 0), (7, 5), (8, 7), (9, 0), (12, 1), (99, 0)])
def test_every_architecture_has_rates(root: Path, capability: tuple[int, int]) -> None:
    profile = device(root, card(nvmlDeviceGetCudaComputeCapability=capability)).profile()
    assert profile.operations["f16"] >= profile.operations["f32"] > 1e12


def test_a_profile_without_a_driver_raises_what_it_should(root: Path) -> None:
    with pytest.raises(NativeError, match="not loaded; run"):
        device(root, init=NvmlError(9)).profile()


# ---- health ----------------------------------------------------------------------------------------------------------


def health(found: CudaDevice) -> Health:
    """When it has been asked: the first answer may come too late for the first call."""
    until = time.monotonic() + 5
    while (answer := found.health()) == Health() and time.monotonic() < until:
        time.sleep(0.01)
    return answer


def test_health(root: Path) -> None:
    assert health(device(root, card())) == Health(61.0, 212.345, 1695e6, 1710e6, ())


@pytest.mark.parametrize("bit", sorted(THROTTLED))
def test_reasons_are_decoded(root: Path, bit: int) -> None:
    harmless = 0x1 | 0x2 | 0x10 | 0x100  # idle, clocks set by the user, in step with other cards, a display
    assert health(device(root, card(nvmlDeviceGetCurrentClocksEventReasons=bit | harmless))).throttled == (THROTTLED[bit],)
    assert health(device(root, card(nvmlDeviceGetCurrentClocksEventReasons=harmless))).throttled == ()
    both = card(nvmlDeviceGetCurrentClocksEventReasons=sum(THROTTLED))
    assert health(device(root, both)).throttled == tuple(THROTTLED.values())


def test_older_drivers_have_another_name_for_reasons(root: Path) -> None:
    old = card(nvmlDeviceGetCurrentClocksEventReasons=None, nvmlDeviceGetCurrentClocksThrottleReasons=0x40)
    assert health(device(root, old)).throttled == (THROTTLED[0x40],)


def test_health_keeps_to_its_ten_milliseconds_and_gives_the_last_answer(root: Path) -> None:
    found = device(root, card())
    assert health(found).temperature == 61.0
    found._nvml._module.hangs["nvmlDeviceGetTemperature"] = 30
    found._latest._every = 0.0
    for _ in range(3):
        start = time.monotonic()
        assert found.health().temperature == 61.0
        assert time.monotonic() - start < 0.1  # 10 ms, and as much again as a busy machine needs
