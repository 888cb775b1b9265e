"""Finding MLU cards, on simulated device trees: no card, no PyTorch and no driver is needed here."""

from __future__ import annotations

import importlib.machinery
import os
import stat
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import edge_rt_mlu
import pytest
from edge_rt_mlu import adapters, cnmon
from edge_rt_mlu.boards import BOARDS, board
from edge_rt_mlu.device import Mlu, System, places

from edge_rt.hooks import API_VERSION, Health, NativeError, Offer, Refusal, TellsHealth
from edge_rt.testing.conformance import DeviceConformance

FIXTURES = Path(__file__).parent / "fixtures"
X8, BUSY = FIXTURES / "cnmon-x8.txt", FIXTURES / "cnmon-x4-busy.txt"


def program(folder: Path, script: str) -> Path:
    """An executable ``cnmon`` in a folder."""
    folder.mkdir(exist_ok=True)
    path = folder / "cnmon"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., System]:
    """``machine(cards=2, script="cat table")``: a simulated machine."""

    def make(cards: int = 0, script: str | None = None, vendor: str | None = None, environment: Mapping[str, str] | None = None) -> System:
        (tmp_path / "dev").mkdir(exist_ok=True)
        for number in range(cards):
            (tmp_path / f"dev/cambricon_dev{number}").touch()
        for name in ("cambricon_ctl", "cambricon_ipcm0", "null"):
            (tmp_path / "dev" / name).touch()
        if vendor is not None:
            (tmp_path / "sys/bus/pci/devices/0000:39:00.0").mkdir(parents=True, exist_ok=True)
            (tmp_path / "sys/bus/pci/devices/0000:39:00.0/vendor").write_text(vendor + "\n")
        if script is not None:
            program(tmp_path / "bin", script)
        return System(tmp_path, str(tmp_path / "bin"), environment or {})

    return make


@pytest.fixture
def torch_mlu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of these names can be found, and must not be imported by a probe."""
    for name in ("torch", "torch_mlu"):
        (tmp_path / "packages" / name).mkdir(parents=True)
        (tmp_path / "packages" / name / "__init__.py").write_text("raise AssertionError('a probe imports nothing')\n")
    monkeypatch.syspath_prepend(tmp_path / "packages")


def refusal(device: Mlu) -> Refusal:
    answer = device.probe()
    assert isinstance(answer, Refusal)
    assert answer.reason
    assert answer.remedy
    return answer


# ---- the table -------------------------------------------------------------------------------------------------------


def test_the_published_table() -> None:
    table = cnmon.parse(X8.read_text())
    assert table.driver == "5.10.13"
    assert table.cards == {
        0: cnmon.Card(0, "MLU370-X8", "1.1.6", "0000:39:00.0", 32, 106, 250, 0, 23374 << 20),
        1: cnmon.Card(1, "MLU370-X8", "1.1.6", "0000:3D:00.0", 39, 106, 250, 0, 23374 << 20),
    }


def test_what_a_card_does_not_say_is_not_known() -> None:
    cards = cnmon.parse(BUSY.read_text()).cards
    assert [cards[i].name for i in range(4)] == ["MLU370-X4", "MLU370-S4", "MLU590-M9", "MLU370-X4"]
    assert cards[0].used == 20012 << 20
    assert (cards[1].temperature, cards[1].power, cards[1].cap) == (None, None, None)
    assert cards[1].memory == 23374 << 20


@pytest.mark.parametrize("cut", range(0, 1500, 37))
def test_a_table_that_is_cut_short_has_fewer_cards(cut: int) -> None:
    whole = cnmon.parse(X8.read_text()).cards
    found = cnmon.parse(X8.read_text()[:cut]).cards
    assert all(whole[index] == card for index, card in found.items())


@pytest.mark.parametrize("text", ["", "\0" * 100, "|" * 10000, "| 0 / MLU370 v1 | x |\n" * 3, "cnmon: cannot load shared libraries"])
def test_no_table_has_no_cards(text: str) -> None:
    assert cnmon.parse(text).cards == {}


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_no_card(machine: Callable[..., System]) -> None:
    (device,) = places(machine())
    assert "no Cambricon card" in refusal(device).reason


def test_a_card_without_its_driver(machine: Callable[..., System]) -> None:
    (device,) = places(machine(vendor="0xcabc"))
    answer = refusal(device)
    assert "driver is not loaded" in answer.reason
    assert "modprobe" in answer.remedy
    (device,) = places(machine(vendor="0x10de"))
    assert "no Cambricon card" in refusal(device).reason


def test_no_monitor(machine: Callable[..., System]) -> None:
    answer = refusal(places(machine(cards=1))[0])
    assert "cnmon is not installed" in answer.reason
    assert "mount it" in answer.remedy


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'Initialize cndev failed.' >&2; exit 1", "said 'Initialize cndev failed.'"),
        ("exit 0", "shows no card (it ended with 0"),
        ("kill -SEGV $$", "shows no card (it ended with -11"),
        ("head -c 100000 /dev/urandom", "shows no card"),
    ],
)
def test_a_monitor_that_fails(machine: Callable[..., System], script: str, reason: str) -> None:
    assert reason in refusal(places(machine(cards=1, script=script))[0]).reason


def test_a_monitor_that_hangs_is_not_waited_for(machine: Callable[..., System]) -> None:
    device = places(machine(cards=1, script="trap '' TERM; exec sleep 60"))[0]
    start = time.monotonic()
    answer = refusal(device)
    assert time.monotonic() - start < 3  # TIMEOUT, and what a busy machine adds
    assert "did not answer within 0.8 seconds" in answer.reason


def test_a_monitor_that_is_no_program(machine: Callable[..., System], tmp_path: Path) -> None:
    system = machine(cards=1, script="")
    (tmp_path / "bin/cnmon").write_bytes(b"\x7fELF\0\0")
    assert "cnmon cannot be run" in refusal(places(system)[0]).reason


def test_a_card_that_failed_and_one_that_is_gone(machine: Callable[..., System], torch_mlu: None) -> None:
    devices = places(machine(cards=5, script=f"cat {BUSY}"))
    assert len(devices) == 5
    assert "no memory on card 3" in refusal(devices[3]).reason
    assert "shows no card 4" in refusal(devices[4]).reason
    assert isinstance(devices[0].probe(), Offer)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_a_card_that_this_user_may_not_open(machine: Callable[..., System], tmp_path: Path) -> None:
    system = machine(cards=1, script=f"cat {X8}")
    (tmp_path / "dev/cambricon_dev0").chmod(0)
    assert "may not open" in refusal(places(system)[0]).reason


@pytest.mark.skipif(adapters.installed("torch_mlu"), reason="torch_mlu is installed here")
def test_without_torch_mlu(machine: Callable[..., System], monkeypatch: pytest.MonkeyPatch) -> None:
    device = places(machine(cards=2, script=f"cat {X8}"))[0]
    missing = "torch_mlu" if adapters.installed("torch") else "torch"
    answer = refusal(device)
    assert answer.reason == f"the Python package {missing} is not installed"
    assert "fits the driver" in answer.remedy


# ---- offers ----------------------------------------------------------------------------------------------------------


def test_an_offer_says_what_the_card_is(machine: Callable[..., System], torch_mlu: None) -> None:
    devices = places(machine(cards=2, script=f"cat {X8}"))
    assert [device.name for device in devices] == ["mlu:0", "mlu:1"]
    offer = devices[1].probe()
    assert isinstance(offer, Offer)
    assert offer.description == "MLU370-X8 at 0000:3D:00.0, 23374 MiB, driver 5.10.13"
    assert (offer.memory_bytes, offer.engines, offer.basis) == (23374 << 20, ("torch",), "projected")
    assert offer.score > 10, "a card is better than the CPU"


def test_visible_devices_are_numbered_as_pytorch_does(machine: Callable[..., System], torch_mlu: None) -> None:
    devices = places(machine(cards=2, script=f"cat {X8}", environment={"MLU_VISIBLE_DEVICES": "1"}))
    assert [device.name for device in devices] == ["mlu:0"]
    offer = devices[0].probe()
    assert isinstance(offer, Offer)
    assert "0000:3D:00.0" in offer.description
    (hidden,) = places(machine(cards=2, script=f"cat {X8}", environment={"MLU_VISIBLE_DEVICES": ""}))
    assert "only 0 cards that MLU_VISIBLE_DEVICES shows" in refusal(hidden).reason


class TestWithCards(DeviceConformance):
    @pytest.fixture
    def device(self, machine: Callable[..., System], torch_mlu: None) -> Mlu:
        return places(machine(cards=2, script=f"cat {X8}"))[1]


class TestOfAnUnknownKind(DeviceConformance):
    @pytest.fixture
    def device(self, machine: Callable[..., System], torch_mlu: None) -> Mlu:
        return places(machine(cards=4, script=f"cat {BUSY}"))[2]


class TestThatSaysLittle(DeviceConformance):
    @pytest.fixture
    def device(self, machine: Callable[..., System], torch_mlu: None) -> Mlu:
        return places(machine(cards=4, script=f"cat {BUSY}"))[1]


class TestWithout(DeviceConformance):
    @pytest.fixture
    def device(self, machine: Callable[..., System]) -> Mlu:
        return places(machine())[0]


class TestThisMachine(DeviceConformance):
    @pytest.fixture
    def device(self) -> Mlu:
        return places()[0]


# ---- profile and health ----------------------------------------------------------------------------------------------


def test_a_profile_is_projected_but_for_what_the_driver_says(machine: Callable[..., System]) -> None:
    profile = places(machine(cards=4, script=f"cat {BUSY}"))[0].profile()
    assert (profile.name, profile.kind, profile.memory) == ("mlu:0", "npu", 23374 << 20)
    assert [(cores.name, cores.number) for cores in profile.cores] == [("MLU370-X4, MLUarch03", 32)]
    assert profile.bandwidth == {32: 307.2e9}
    assert profile.operations["f16"] == 96e12
    assert profile.power == 150
    assert profile.basis["memory"] == profile.basis["power"] == "measured"
    assert profile.basis["bandwidth"] == profile.basis["operations"] == "projected"


def test_a_board_that_is_not_known_has_a_profile_without_speed(machine: Callable[..., System]) -> None:
    profile = places(machine(cards=4, script=f"cat {BUSY}"))[2].profile()
    assert (profile.memory, profile.power, dict(profile.bandwidth), dict(profile.operations)) == (98304 << 20, 550, {}, {})
    assert profile.basis == {"cores": "unknown", "memory": "measured", "power": "measured"}


def test_no_profile_without_a_card(machine: Callable[..., System]) -> None:
    with pytest.raises(NativeError, match="mlu:0: there is no Cambricon card here"):
        places(machine())[0].profile()


def test_boards_are_found_by_the_names_of_their_variants() -> None:
    assert board("MLU370-X4K") is BOARDS["MLU370-X4"]
    assert board("MLU290-M5") is None
    for known in BOARDS.values():  # the memory's bus: 384 bits at 6,400 MT/s
        assert known.bandwidth == 384 / 8 * 6400e6


def test_health_comes_at_once_and_then_from_the_last_reading(machine: Callable[..., System]) -> None:
    device = places(machine(cards=4, script=f"sleep 0.2; cat {BUSY}"))[0]
    assert isinstance(device, TellsHealth)
    start = time.perf_counter()
    assert device.health() == Health()
    assert time.perf_counter() - start < 0.05, "the answer waits for no program; ten milliseconds, and what a busy machine adds"
    deadline = time.monotonic() + 5
    while device.health() == Health() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert device.health() == Health(81, 150, throttled=("it draws all of the 150 W it may",))
    assert device._replace(number=1).health() == Health()
    assert device._replace(number=2).health() == Health(34, 100)
    assert device._replace(number=7).health() == Health()


def test_health_without_a_card_never_raises_and_starts_one_thread_at_a_time(machine: Callable[..., System]) -> None:
    device = places(machine(cards=1, script="exec sleep 60"))[0]
    for _ in range(50):
        assert device.health() == Health()
    assert sum(thread.name == "edge-rt-health" for thread in threading.enumerate()) <= 1


# ---- the vendor's package --------------------------------------------------------------------------------------------


def package(tmp_path: Path, code: str) -> str:
    """A folder with a ``torch`` that has a namespace ``mlu``, and a ``torch_mlu`` that runs some code when it is imported."""
    (tmp_path / "torch.py").write_text("class mlu:\n    device_count = staticmethod(lambda: 2)\n")
    (tmp_path / "torch_mlu.py").write_text(textwrap.dedent(code))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import time; time.sleep(60)", "took longer than 3 seconds"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with signal 11"),
        ("raise ImportError('libcnrt.so: cannot open shared object file')", "libcnrt.so: cannot open shared object file"),
        ("import sys; sys.exit(3)", "cannot be imported (no reason given)"),
        ("import os; print('devices: 9'); os._exit(0)", None),
    ],
)
def test_a_vendor_package_that_does_not_work(tmp_path: Path, code: str, reason: str | None) -> None:
    answer = adapters.tried(adapters.ADAPTERS["mlu"], 3.0, path=package(tmp_path, code))
    if reason is None:
        assert answer == 9  # what a package prints is no matter, as long as the last word is ours
        return
    assert isinstance(answer, Refusal)
    assert reason in answer.reason
    assert answer.remedy


def test_a_vendor_package_that_works_says_how_many_devices_there_are(tmp_path: Path) -> None:
    assert adapters.tried(adapters.ADAPTERS["mlu"], 20.0, path=package(tmp_path, "print('Cambricon PyTorch')")) == 2


def test_names_of_devices() -> None:
    assert adapters.split("mlu:3") == (adapters.ADAPTERS["mlu"], 3)
    assert adapters.split("ascend:0")[0] is adapters.ADAPTERS["ascend"]
    assert adapters.split("cpu") == (adapters.ADAPTERS["cpu"], 0)
    for strange in ("mlu:x", "cuda:0", "", "mlu:-1"):
        assert adapters.split(strange)[0] is None


# ---- the plugin ------------------------------------------------------------------------------------------------------


def test_the_plugin_registers_and_imports_no_pytorch() -> None:
    import subprocess

    from edge_rt.plugin_host.registry import Registry

    assert edge_rt_mlu.EDGE_RT_API == API_VERSION
    registry = Registry.load(entry_points=False, plugins={"mlu": edge_rt_mlu})
    assert "mlu:0" in registry.devices()
    assert "torch" in registry.engines()
    code = "import sys, edge_rt_mlu; print([m for m in ('torch', 'numpy', 'gguf', 'subprocess') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_a_package_without_a_spec_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("half_removed")
    monkeypatch.setitem(sys.modules, "half_removed", module)
    assert module.__spec__ is None
    assert not adapters.installed("half_removed")
    module.__spec__ = importlib.machinery.ModuleSpec("half_removed", None)
    assert adapters.installed("half_removed")
