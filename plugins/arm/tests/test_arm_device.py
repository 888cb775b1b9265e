"""The device ``arm`` on recorded trees of boards, phones and servers, and on this machine."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import arm_trees as trees
import pytest
from arm_trees import CPU, Recorded
from edge_rt_arm.device import Arm
from edge_rt_arm.firmware import Firmware

from edge_rt.hooks import HasProfile, Health, Offer, Refusal, TellsHealth
from edge_rt.testing import system_trees
from edge_rt.testing.conformance import DeviceConformance

Tree = Callable[[Path], Path]


def silent() -> Firmware:
    """A firmware that cannot be asked."""
    return Firmware(Recorded({}))


def device(root: Path, answers: dict[str, str] | None = None) -> Arm:
    return Arm(root, Firmware(Recorded(answers or {})), bits=64)


def offer(root: Path) -> Offer:
    answer = device(root).probe()
    assert isinstance(answer, Offer), answer
    return answer


class TestOnThisMachine(DeviceConformance):
    @pytest.fixture
    def device(self) -> Arm:
        return Arm()


class TestOnAPi(DeviceConformance):
    @pytest.fixture
    def device(self, tmp_path: Path) -> Arm:
        return Arm(trees.pi_5(tmp_path), silent(), bits=64)


class TestOnAPhone(DeviceConformance):
    @pytest.fixture
    def device(self, tmp_path: Path) -> Arm:
        return Arm(trees.snapdragon(tmp_path), silent(), bits=64)


# ---- what it offers --------------------------------------------------------------------------------------------------

NOTHING: dict[str, str] = {}
DOTPROD = {"Q4_0": "4x4", "Q8_0": "4x4", "Q4_K": "8x4", "Q5_K": "8x4", "Q6_K": "8x4", "IQ4_NL": "4x4", "MXFP4": "4x4", "Q1_0": "4x4"}
I8MM = {"Q4_0": "4x8", "Q8_0": "4x8", "Q4_K": "8x8", "Q5_K": "8x8", "Q6_K": "8x8", "IQ4_NL": "4x4", "MXFP4": "4x4", "Q1_0": "4x8"}


@pytest.mark.parametrize(
    ("tree", "description", "features", "layouts", "score"),
    [
        (trees.pi_3, "Raspberry Pi 3 Model B Plus Rev 1.3, 4 x Cortex-A53", ("neon",), NOTHING, 12),
        (trees.pi_4, "Raspberry Pi 4 Model B Rev 1.5, 4 x Cortex-A72", ("neon",), NOTHING, 12),
        (trees.cm4, "Raspberry Pi Compute Module 4 Rev 1.0, 4 x Cortex-A72", ("neon",), NOTHING, 12),
        (trees.pi_5, "Raspberry Pi 5 Model B Rev 1.0, 4 x Cortex-A76", ("neon", "fp16", "dotprod"), DOTPROD, 12),
        (trees.ampere, "8 x Neoverse-N1", ("neon", "fp16", "dotprod"), DOTPROD, 5),
        (trees.graviton_3, "4 x Neoverse-V1", ("neon", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve256"), I8MM | {"Q4_0": "8x8"}, 5),
        (trees.graviton_4, "4 x Neoverse-V2", ("neon", "fp16", "dotprod", "i8mm", "bf16", "sve", "sve2", "sve128"), I8MM, 5),
        (
            trees.snapdragon,
            "Qualcomm Technologies, Inc SM8550, 1 x Cortex-X3 + 2 x Cortex-A715 + 2 x Cortex-A710 + 3 x Cortex-A510, "
            "5 threads on the fast ones",
            ("neon", "fp16", "dotprod", "i8mm", "bf16"),
            I8MM,
            12,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_machines(tmp_path: Path, tree: Tree, description: str, features: tuple[str, ...], layouts: dict[str, str], score: float) -> None:
    found = device(tree(tmp_path))
    answer = found.probe()
    assert isinstance(answer, Offer), answer
    assert (answer.description, answer.features, answer.score) == (description, features, score)
    assert found.facts().layouts == layouts
    assert answer.memory_bytes == 8245256 << 10
    assert answer.basis == "simulated", "no board has run it yet"


def test_threads_stay_on_the_fast_cores_of_a_phone(tmp_path: Path) -> None:
    assert offer(trees.snapdragon(tmp_path)).cpus == (3, 4, 5, 6, 7)


def test_threads_may_go_anywhere_where_all_cores_are_alike(tmp_path: Path) -> None:
    assert offer(trees.pi_5(tmp_path)).cpus == ()


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    root = system_trees.write(trees.pi_5(tmp_path), {"sys/fs/cgroup/memory.max": 1 << 30})
    assert offer(root).memory_bytes == 1 << 30


@pytest.mark.parametrize(
    ("tree", "reason", "remedy"),
    [
        (system_trees.x86_hybrid, "this is no ARM processor", "the device cpu"),
        (lambda root: root, "no /proc/cpuinfo", "the device cpu"),
        (trees.pi_32_bit, "32-bit system", "the device cpu"),
    ],
    ids=["x86", "empty", "32-bit"],
)
def test_refusals_say_why_and_what_to_do(tmp_path: Path, tree: Tree, reason: str, remedy: str) -> None:
    answer = device(tree(tmp_path)).probe()
    assert isinstance(answer, Refusal)
    assert reason in answer.reason
    assert remedy in answer.remedy


def test_a_32_bit_program_on_a_64_bit_system_is_told_to_install_another(tmp_path: Path) -> None:
    answer = Arm(trees.pi_5(tmp_path), silent(), bits=32).probe()
    assert isinstance(answer, Refusal)
    assert "aarch64" in answer.remedy


# ---- trees with holes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["proc/device-tree", CPU, "sys", "proc/meminfo", "sys/class/thermal", f"{CPU}/cpu0/cpufreq"])
@pytest.mark.parametrize("tree", [trees.pi_5, trees.snapdragon], ids=["pi", "phone"])
def test_what_is_missing_is_done_without(tmp_path: Path, tree: Tree, missing: str) -> None:
    root = tree(tmp_path)
    gone = root / missing
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink(missing_ok=True)
    found = device(root)
    answer = found.probe()
    assert isinstance(answer, Offer)
    assert answer.features[:3] == ("neon", "fp16", "dotprod")
    assert answer.memory_bytes > 0
    assert sum(cores.number for cores in found.profile().cores) in (4, 8)
    found.health()


@pytest.mark.parametrize(
    "content", ["", "\0\0\0", "processor\n", "Features: asimd\nCPU architecture: 8\n", "CPU implementer : x\nprocessor : y\n"]
)
def test_nonsense_in_cpuinfo_is_an_offer_or_a_refusal(tmp_path: Path, content: str) -> None:
    root = system_trees.write(trees.pi_5(tmp_path), {"proc/cpuinfo": content})
    answer = device(root).probe()
    assert isinstance(answer, Offer | Refusal)
    if isinstance(answer, Refusal):
        assert answer.reason
        assert answer.remedy


def test_nonsense_in_sensors_is_no_temperature(tmp_path: Path) -> None:
    root = trees.pi_5(tmp_path)
    for content in ("hot", "", "999999999"):
        system_trees.write(root, {"sys/class/thermal/thermal_zone0/temp": content, f"{CPU}/cpu0/cpufreq/scaling_max_freq": content})
        found = device(root)
        found.health()
        time.sleep(0.05)
        assert found.health().temperature is None


# ---- profile ---------------------------------------------------------------------------------------------------------


def test_profile_of_a_pi_has_watts_from_the_table(tmp_path: Path) -> None:
    found = device(trees.cm4(tmp_path))
    assert isinstance(found, HasProfile)
    profile = found.profile()
    assert (profile.name, profile.kind, profile.idle_power, profile.power, profile.hottest) == ("arm", "cpu", 2.7, 6.4, 80.0)
    assert [profile.basis[field] for field in ("cores", "idle_power", "power", "hottest")] == ["measured", *["projected"] * 3]
    (cores,) = profile.cores
    assert (cores.name, cores.number, cores.clock) == ("Cortex-A72", 4, 1.5e9)


def test_a_pi_5_has_a_peak_and_a_meter_but_no_known_rest(tmp_path: Path) -> None:
    profile = device(trees.pi_5(tmp_path)).profile()
    assert (profile.idle_power, profile.power) == (None, 12.0)
    assert "idle_power" not in profile.basis


def test_a_pi_3_plus_slows_down_early(tmp_path: Path) -> None:
    assert device(trees.pi_3(tmp_path)).profile().hottest == 60.0


def test_profile_of_a_phone_has_the_kernels_temperature_and_no_watts(tmp_path: Path) -> None:
    profile = device(trees.snapdragon(tmp_path)).profile()
    assert (profile.idle_power, profile.power, profile.hottest) == (None, None, 95.0)
    assert profile.basis["hottest"] == "measured"
    assert [(cores.name, cores.cpus) for cores in profile.cores] == [
        ("Cortex-X3", (7,)), ("Cortex-A715", (3, 4)), ("Cortex-A710", (5, 6)), ("Cortex-A510", (0, 1, 2)),
    ]  # fmt: skip


# ---- health ----------------------------------------------------------------------------------------------------------


def settled(found: Arm, seconds: float = 5.0) -> Health:
    """Health when the threads that read sensors and ask the firmware have answered."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        health = found.health()
        if health.temperature is not None and (found._firmware._next or not found._is_raspberry):
            return found.health()
        time.sleep(0.005)
    raise AssertionError(f"no answer after {seconds} s: {found.health()}")


def test_health_of_a_phone(tmp_path: Path) -> None:
    found = device(trees.snapdragon(tmp_path))
    assert isinstance(found, TellsHealth)
    health = settled(found)
    assert (health.temperature, health.clock, health.most, health.throttled) == (74.9, 3.1872e9, 3.1872e9, ())


def test_a_phone_that_is_hot(tmp_path: Path) -> None:
    cooler = "sys/class/thermal/cooling_device3"
    cooling = {f"{cooler}/type": "thermal-cpufreq-7", f"{cooler}/cur_state": 9, f"{cooler}/max_state": 20}
    root = system_trees.write(trees.snapdragon(tmp_path), {f"{CPU}/cpu7/cpufreq/scaling_max_freq": 1785600, **cooling})
    health = settled(device(root))
    assert health.most == 1.7856e9
    (reason,) = health.throttled
    assert "thermal-cpufreq-7 at 9 of 20" in reason


def test_health_of_a_throttled_pi_5(tmp_path: Path) -> None:
    health = settled(device(trees.pi_5(tmp_path), {"get_throttled": "throttled=0xd0006\n", "pmic_read_adc": trees.PMIC}))
    assert health.throttled == ("the clock is capped", "the firmware throttles")
    assert health.power == pytest.approx(1.1451 * (3.7 * 0.00487975 + 3.3 * 0.0663646 + 0.88 * 2.485) + 0.5879)
    assert health.temperature == 55.1


def test_without_vcgencmd_the_kernel_knows_of_a_weak_supply(tmp_path: Path) -> None:
    assert settled(device(trees.pi_4(tmp_path))).throttled == ("the supply's voltage is too low",)


def test_the_firmware_and_the_kernel_do_not_say_the_same_twice(tmp_path: Path) -> None:
    root = system_trees.write(trees.pi_5(tmp_path), {"sys/devices/platform/soc/soc:firmware/get_throttled": "4"})
    found = device(root, {"get_throttled": "throttled=0x40004\n"})
    assert settled(found).throttled == ("the firmware throttles",)
    assert settled(device(root)).throttled == ("the firmware slows the CPU down",), "where vcgencmd cannot be run"


def test_health_does_not_wait_for_the_firmware(tmp_path: Path) -> None:
    def slow(argument: str) -> str | None:
        time.sleep(0.3)
        return "throttled=0x0\n"

    found = Arm(trees.pi_5(tmp_path), Firmware(slow), bits=64)
    found.health()  # the first finds the sensors too
    times = []
    for _ in range(10):
        start = time.perf_counter()
        found.health()
        times.append(time.perf_counter() - start)
    assert sorted(times)[2] < 0.01


def test_no_firmware_is_asked_on_other_boards(tmp_path: Path) -> None:
    asked = Recorded({"get_throttled": "throttled=0x1\n"})
    found = Arm(trees.snapdragon(tmp_path), Firmware(asked), bits=64)
    found.health()
    time.sleep(0.02)
    assert asked.calls == []
