"""What the sensors of recorded trees say: temperature, power, clock, and why a CPU is slow; and that no sensor stops anybody."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from edge_rt.hardware import sensors, system_files
from edge_rt.hardware.profile import Health
from edge_rt.hardware.sensors import CpuSensors
from edge_rt.testing import system_trees as trees

CPU = "sys/devices/system/cpu"
RAPL = "sys/class/powercap/intel-rapl:0"
PI_FIRMWARE = "sys/devices/platform/soc/soc:firmware/get_throttled"


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_files, "DRIVER_PATIENCE", 10.0)  # answers must not depend on how busy this machine is


def health(root: Path) -> Health:
    return CpuSensors(root).health()


def test_nothing_to_read(tmp_path: Path) -> None:
    assert health(tmp_path) == health(tmp_path / "none") == health(trees.virtual_machine(tmp_path / "vm")) == Health()


def test_raspberry_pi(tmp_path: Path) -> None:
    root = trees.raspberry_pi_4(tmp_path)
    assert health(root) == Health(temperature=48.3, clock=1.5e9, most=1.5e9)
    trees.write(root, {PI_FIRMWARE: "e0000"})  # it was throttled some time ago
    assert health(root).throttled == ()
    trees.write(root, {PI_FIRMWARE: "e0008", f"{CPU}/cpu0/cpufreq/scaling_cur_freq": 600000})
    assert health(root).throttled == ("it is so warm that the firmware limits the clock; cool it better",)
    trees.write(root, {PI_FIRMWARE: "0x50005"})
    assert health(root).throttled == ("the supply voltage is too low; use a stronger power supply", "the firmware slows the CPU down")
    trees.write(root, {PI_FIRMWARE: "no number"})
    assert health(root).throttled == ()


def test_the_clock_is_the_fastest_clusters(tmp_path: Path) -> None:
    root = trees.write(trees.phone(tmp_path), {f"{CPU}/cpu7/cpufreq/scaling_cur_freq": 1190400})
    found = health(root)
    assert (found.clock, found.most, found.throttled) == (1.1904e9, 2.8416e9, ())
    trees.write(root, {f"{CPU}/cpu7/cpufreq/scaling_max_freq": 2000000})
    assert health(root).throttled == ("the system allows a clock of 2 GHz of 2.8 GHz",)


def test_temperature_is_that_of_the_hottest_place_near_the_cpu(tmp_path: Path) -> None:
    trees.write(tmp_path, trees.thermal_zone(0, "battery", 90, 120) | trees.thermal_zone(1, "cpu-1-0-usr", 61.5, 120))
    trees.write(tmp_path, trees.thermal_zone(2, "cpu-1-1-usr", 63.5, 120) | trees.thermal_zone(3, "cpu-broken", -274, 120))
    assert health(tmp_path).temperature == 63.5
    trees.write(tmp_path, {"sys/class/hwmon/hwmon3/name": "k10temp", "sys/class/hwmon/hwmon3/temp1_input": 71250})
    trees.write(tmp_path, {"sys/class/hwmon/hwmon4/name": "nvme", "sys/class/hwmon/hwmon4/temp1_input": 99000})
    assert health(tmp_path).temperature == 71.25


def test_a_board_with_zones_of_other_names(tmp_path: Path) -> None:
    assert health(trees.write(tmp_path, trees.thermal_zone(0, "Tdie", 40, 100))).temperature == 40


# ---- power -----------------------------------------------------------------------------------------------------------


def test_package_power_is_energy_over_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    root = trees.write(tmp_path, {f"{RAPL}/name": "package-0", f"{RAPL}/energy_uj": 1_000_000, f"{RAPL}/max_energy_range_uj": 60_000_000})
    trees.write(root, {f"{RAPL}:0/name": "core", f"{RAPL}:0/energy_uj": 0})
    trees.write(root, {"sys/class/powercap/intel-rapl:1/name": "psys", "sys/class/powercap/intel-rapl:1/energy_uj": 5})
    cpu = CpuSensors(root)
    assert cpu.health().power is None, "one reading of a counter tells no power"
    now[0] += 0.5
    trees.write(root, {f"{RAPL}/energy_uj": 7_000_000})
    assert cpu.health().power == pytest.approx(12.0)
    now[0] += 0.0001
    trees.write(root, {f"{RAPL}/energy_uj": 7_000_001})
    assert cpu.health().power == pytest.approx(12.0), "too soon for another figure"
    now[0] += 0.9999
    trees.write(root, {f"{RAPL}/energy_uj": 2_000_000})  # the counter went over its end
    assert cpu.health().power == pytest.approx(55.0)


def test_energy_that_only_root_may_read(tmp_path: Path) -> None:
    root = trees.write(tmp_path, {f"{RAPL}/name": "package-0"})
    (root / RAPL / "energy_uj").mkdir()  # unreadable even for root
    cpu = CpuSensors(root)
    assert cpu.health() == cpu.health() == Health()


def test_a_meter_of_the_board_comes_before_the_package(tmp_path: Path) -> None:
    root = trees.write(tmp_path, {"sys/class/hwmon/hwmon0/name": "ina219", "sys/class/hwmon/hwmon0/power1_input": 6_250_000})
    trees.write(root, {"sys/class/hwmon/hwmon1/name": "amdgpu", "sys/class/hwmon/hwmon1/power1_average": 90_000_000})
    assert health(root).power == 6.25


def test_a_phone_on_its_battery(tmp_path: Path) -> None:
    battery = "sys/class/power_supply/battery"
    files = {"type": "Battery", "status": "Discharging", "current_now": -850_000, "voltage_now": 3_900_000}
    root = trees.write(tmp_path, {f"{battery}/{name}": value for name, value in files.items()})
    assert health(root).power == pytest.approx(3.315)
    trees.write(root, {f"{battery}/status": "Charging"})  # what flows into it says nothing of what the phone takes
    assert health(root).power is None


# ---- why it is slow --------------------------------------------------------------------------------------------------


def test_cooling_devices(tmp_path: Path) -> None:
    device = "sys/class/thermal/cooling_device"
    root = trees.write(tmp_path, {f"{device}0/type": "pwm-fan", f"{device}0/cur_state": 4, f"{device}0/max_state": 4})
    trees.write(root, {f"{device}1/type": "cpufreq-cpu0", f"{device}1/cur_state": 0, f"{device}1/max_state": 13})
    trees.write(root, {f"{device}2/type": "intel_powerclamp", f"{device}2/cur_state": -1, f"{device}2/max_state": 100})
    assert health(root).throttled == (), "a fan slows nothing down"
    trees.write(root, {f"{device}1/cur_state": 5})
    assert health(root).throttled == ("it is slowed down to cool it (cpufreq-cpu0 at 5 of 13)",)


def test_throttle_counters_count_only_while_they_rise(tmp_path: Path) -> None:
    root = trees.x86_hybrid(tmp_path)
    counter = f"{CPU}/cpu0/thermal_throttle/package_throttle_count"
    trees.write(root, {counter: 41})
    cpu = CpuSensors(root)
    assert cpu.health().throttled == ()
    time.sleep(2 * sensors._SHORTEST)
    trees.write(root, {counter: 42})
    assert cpu.health().throttled == ("it was too hot and slowed down",)
    time.sleep(2 * sensors._SHORTEST)
    assert cpu.health().throttled == ()


# ---- sensors that hang or break --------------------------------------------------------------------------------------


def test_a_sensor_that_hangs_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = trees.raspberry_pi_4(tmp_path)
    cpu = CpuSensors(root)
    known = cpu.health()
    monkeypatch.setattr(system_files, "DRIVER_PATIENCE", 0.01)
    temperature = root / "sys/class/thermal/thermal_zone0/temp"
    temperature.unlink()
    os.mkfifo(temperature)  # whoever reads it waits for a writer
    threads = threading.active_count()
    start = time.perf_counter()
    assert [cpu.health() for _ in range(5)] == [known] * 5, "the last answer"
    assert time.perf_counter() - start < 2.0
    assert threading.active_count() == threads + 1, "one reader waits, not five"
    temperature.write_text("61000\n")
    while threading.active_count() > threads:
        time.sleep(0.005)
    temperature.unlink()
    trees.write(root, {"sys/class/thermal/thermal_zone0/temp": 62000})
    monkeypatch.setattr(system_files, "DRIVER_PATIENCE", 10.0)
    assert cpu.health().temperature == 62, "and goes on when it can"


@pytest.mark.parametrize("nonsense", ["", "\0", "-", "nan", "9" * 40, "0x"])
def test_nonsense_in_any_file_is_survived(tmp_path: Path, nonsense: str) -> None:
    root = trees.phone(tmp_path)
    trees.write(root, trees.thermal_zone(0, "cpu-0", 50, 100) | {f"{RAPL}/name": "package-0", f"{RAPL}/energy_uj": 3})
    trees.write(root, {"sys/class/hwmon/hwmon0/name": "ina3221", "sys/class/hwmon/hwmon0/power1_input": 1_000_000, PI_FIRMWARE: "0"})
    for path in [path for path in root.rglob("*") if path.is_file()]:
        before = path.read_bytes()
        path.write_text(nonsense)
        found = health(root)
        assert isinstance(found, Health)
        assert found.temperature in (None, 50), path
        path.write_bytes(before)
    assert health(root)[:3] == (50, 1, 2.8416e9)


def test_devices_that_go_away(tmp_path: Path) -> None:
    root = trees.raspberry_pi_4(tmp_path)
    cpu = CpuSensors(root)
    assert cpu.health().temperature == 48.3
    for path in root.rglob("temp"):
        path.unlink()
    assert cpu.health().temperature is None
