"""Devices ``ascend:N`` on simulated drivers: what they offer, why they refuse, and that nothing hangs or raises."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edge_rt_ascend
import pytest
from edge_rt_ascend import cann
from edge_rt_ascend.device import BUILD, AscendDevice, npus_in
from edge_rt_ascend.npu_smi import NpuSmi, NpuSmiError, parse
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.hooks import Device, HasProfile, Health, NativeError, Offer, Refusal, TellsHealth
from edge_rt.plugin_host.registry import Registry

FIXTURES = Path(__file__).parent / "fixtures"
B3 = (FIXTURES / "910b3.txt").read_text()
TOOLKIT = "usr/local/Ascend/ascend-toolkit/latest"


def machine(root: Path, numbers: tuple[int, ...] = (0, 1), *, version: str | None = "8.0.0", driver: str | None = "23.0.3") -> Path:
    """The files of a machine with NPUs, after the CANN installation guide (hiascend.com)."""
    (root / "dev").mkdir(parents=True, exist_ok=True)
    for name in (*(f"davinci{n}" for n in numbers), "davinci_manager", "devmm_svm", "hisi_hdc"):
        (root / "dev" / name).touch()
    if driver:
        (root / "usr/local/Ascend/driver").mkdir(parents=True)
        (root / "usr/local/Ascend/driver/version.info").write_text(f"Version={driver}\nascendhal_version=7.35.19\n")
    if version:
        (root / TOOLKIT / "runtime").mkdir(parents=True)
        (root / TOOLKIT / "runtime/version.info").write_text(f"Version={version}\nversion_dir={version}\ntimestamp=20241129\n")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return machine(tmp_path)


def device(
    root: Path,
    output: str | Callable[[float], str] = B3,
    number: int = 0,
    *,
    built: tuple[str, ...] = ("cpu", "cann"),
    packages: tuple[str, ...] = (),
    **variables: str,
) -> AscendDevice:
    """A device with ggml backends ``built`` and Python packages installed."""
    environment = {"ASCEND_TOOLKIT_HOME": str(root / TOOLKIT), **variables}
    run = output if callable(output) else lambda seconds: output
    return AscendDevice(number, NpuSmi(run), root=root, environment=environment, backends=lambda: built, here=lambda name: name in packages)


def refused(answer: Offer | Refusal, reason: str, remedy: str) -> None:
    assert isinstance(answer, Refusal)
    assert reason in answer.reason
    assert remedy in answer.remedy
    assert not answer.remedy.endswith(".")


# ---- npu-smi ---------------------------------------------------------------------------------------------------------


def test_eight_910b3() -> None:
    found = parse(B3)
    assert found.version == "23.0.3"
    assert sorted(found.chips) == list(range(8))
    assert found.chips[3] == (3, "910B3", "OK", 93.3, 38.0, 65536 << 20, 3300 << 20)


def test_cards_of_two_chips_are_numbered_through() -> None:
    found = parse((FIXTURES / "910c.txt").read_text())
    assert sorted(found.chips) == [0, 1, 2, 3]
    assert [chip.power for _, chip in sorted(found.chips.items())] == [170.5, None, 170.5, None]
    assert found.chips[3].memory == 65536 << 20


def test_without_hbm_its_memory_counts() -> None:
    assert parse((FIXTURES / "310p3.txt").read_text()).chips[0] == (0, "310P3", "Alarm", None, 81.0, 21527 << 20, 1500 << 20)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "npu-smi shows no NPU (nothing)"),
        ("DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)\ndcmi module initialize failed. ret is -8005\n", "does not answer npu-smi"),
        ("npu-smi: error while loading shared libraries: libc_sec.so: cannot open shared object file: No such file", "find its libraries"),
        ("bash: /usr/local/bin/npu-smi: Permission denied", "may not ask"),
        (B3.split("+====")[0], "npu-smi shows no NPU"),
        ("<html>", "npu-smi shows no NPU (<html>)"),
    ],
)
def test_what_is_no_table(text: str, reason: str) -> None:
    with pytest.raises(NpuSmiError) as found:
        parse(text)
    assert reason in found.value.reason
    assert found.value.remedy


@given(st.data())
def test_damaged_output_is_an_answer_or_an_error_of_its_own(data: st.DataObject) -> None:
    """Cut off, lines lost, characters changed: chips that are sound, or NpuSmiError; never another exception."""
    lines = B3.splitlines()
    kept = [line for line in lines if data.draw(st.integers(0, 9))]
    text = "\n".join(kept)[: data.draw(st.integers(0, len(B3)))]
    for _ in range(data.draw(st.integers(0, 5))):
        at = data.draw(st.integers(0, max(0, len(text) - 1)))
        text = text[:at] + data.draw(st.sampled_from(list("|+ x9/:"))) + text[at + 1 :]
    with contextlib.suppress(NpuSmiError):
        found = parse(text)
        assert found.chips
        assert all(chip.memory >= 0 and chip.name and number == chip.number for number, chip in found.chips.items())


# ---- offers and refusals ---------------------------------------------------------------------------------------------


def test_a_910b3_is_offered(root: Path) -> None:
    one = device(root, number=1)
    assert one.probe() == Offer(
        score=100,
        description="Ascend 910B3, CANN 8.0.0",
        memory_bytes=65536 << 20,
        features=("910b3",),
        engines=("ggml_cann",),
        basis="projected",
    )
    assert isinstance(one, Device)
    assert isinstance(one, HasProfile)
    assert isinstance(one, TellsHealth)
    assert one.free(1.0) == (65536 - 3100) << 20


def test_one_device_for_each_node(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert [one.name for one in npus_in(root)] == ["ascend:0", "ascend:1"]
    assert [one.name for one in npus_in(tmp_path_factory.mktemp("empty"))] == ["ascend:0"]


def test_the_registry_takes_the_plugin() -> None:
    registry = Registry.load(entry_points=False, plugins={"ascend": edge_rt_ascend})
    assert "ggml_cann" in registry.engines()
    assert isinstance(registry.probe("ascend:0"), (Offer, Refusal))
    assert [status.reason for status in registry.plugins if status.name == "ascend"] == [""]


def never(seconds: float) -> str:
    raise AssertionError("npu-smi is not to be asked")


def test_without_a_card(tmp_path: Path) -> None:
    refused(device(tmp_path, never).probe(), "there is no Ascend NPU", "install the Ascend driver")


def test_a_card_without_its_driver(tmp_path: Path) -> None:
    card = tmp_path / "sys/bus/pci/devices/0000:c1:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x19e5\n")
    (card / "device").write_text("0xd802\n")
    refused(device(tmp_path, never).probe(), "an Ascend 910B is there, and its driver is not", "install the Ascend driver")


def test_a_number_that_no_npu_has(root: Path) -> None:
    refused(device(root, never, number=7).probe(), "no /dev/davinci7", "ascend:0, ascend:1")
    refused(device(root, B3.replace("| 1     910B3", "| 9     910B3"), number=1).probe(), "npu-smi does not show ascend:1", "ascend:0")


@pytest.mark.parametrize("missing", ["davinci_manager", "devmm_svm", "hisi_hdc"])
def test_a_container_with_half_of_the_nodes(root: Path, missing: str) -> None:
    (root / "dev" / missing).unlink()
    refused(device(root, never).probe(), f"/dev/{missing} is missing", f"--device /dev/{missing}")


def test_a_user_without_rights(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    refused(device(root, never).probe(), "may not use /dev/davinci0", "HwHiAiUser")


def test_hidden_npus_and_their_numbers(tmp_path: Path) -> None:
    root = machine(tmp_path, (2, 5, 6))
    assert device(root, number=5).index() == 1
    chosen = {"ASCEND_RT_VISIBLE_DEVICES": "2,0"}  # counted among those that are there
    assert [device(root, number=n, **chosen).index() for n in (2, 6)] == [1, 0]
    refused(device(root, never, number=5, **chosen).probe(), "ASCEND_RT_VISIBLE_DEVICES hides", "unset it")
    with pytest.raises(NativeError, match="hides ascend:5"):
        device(root, number=5, **chosen).index()


@pytest.mark.parametrize(
    ("files", "reason", "remedy"),
    [
        ({"driver": None}, "driver is not in /usr/local/Ascend/driver", "mount"),
        ({"version": "7.0.0"}, "CANN 7.0.0 is too old", "8.0"),
        ({"version": "6.3.RC2"}, "CANN 6.3.RC2 is too old", "8.0"),
    ],
)
def test_parts_that_are_missing_or_old(tmp_path: Path, files: dict[str, Any], reason: str, remedy: str) -> None:
    refused(device(machine(tmp_path, **files), never).probe(), reason, remedy)


def test_without_cann(tmp_path: Path) -> None:
    found = AscendDevice(0, NpuSmi(never), root=machine(tmp_path, version=None), environment={}, backends=lambda: ("cann",))
    refused(found.probe(), "CANN is not installed", "hiascend.com")


def test_a_libggml_without_cann_is_told_how_to_be_built(root: Path) -> None:
    refused(device(root, never, built=("cpu",)).probe(), "built without CANN", BUILD)
    assert "-DGGML_CANN=on" in BUILD
    assert "llama-cpp-python==0.3.36" in BUILD


def test_an_environment_that_was_not_set(root: Path) -> None:
    found = AscendDevice(0, NpuSmi(never), root=root, environment={}, backends=lambda: ("cann",))
    refused(found.probe(), "CANN's environment is not set", "ascend-toolkit/set_env.sh")


def test_npu_smi_that_hangs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the driver, where not even a kill ends it."""
    monkeypatch.setattr("edge_rt_ascend.device.SECONDS", 0.05)
    asked = []

    def hang(seconds: float) -> str:
        asked.append(seconds)
        time.sleep(30)
        return B3

    one = device(root, hang)
    for _ in range(3):
        start = time.monotonic()
        refused(one.probe(), "npu-smi did not answer within 0.05 s", "restart")
        assert time.monotonic() - start < 0.6
        assert one.health() == Health()
    assert len(asked) == 1


def script(folder: Path, text: str) -> None:
    program = folder / "npu-smi"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)


def test_the_real_program_is_run_and_stopped(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    environment = {"ASCEND_TOOLKIT_HOME": str(root / TOOLKIT)}
    one = AscendDevice(0, NpuSmi(), root=root, environment=environment, backends=lambda: ("cann",))
    script(tmp_path, f"cat {FIXTURES / '910b3.txt'}")
    assert isinstance(one.probe(), Offer)
    script(tmp_path, "echo 'dcmi module initialize failed. ret is -8005'; exit 1")
    refused(one.probe(), "does not answer npu-smi", "restart")
    script(tmp_path, "exec sleep 30")
    start = time.monotonic()
    refused(one.probe(), "did not answer within 0.8 s", "npu-smi info")
    assert time.monotonic() - start < 2
    (tmp_path / "npu-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    if not Path("/usr/local/bin/npu-smi").exists():
        refused(one.probe(), "npu-smi is not there", "install the Ascend driver")


def test_health_of_a_chip_decides(root: Path) -> None:
    refused(device(root, B3.replace("OK      ", "Critical")).probe(), "critical", "npu-smi info -t health -i 0")
    assert isinstance(device(root, B3.replace("OK     ", "Warning")).probe(), Offer)
    refused(device(root, B3.replace("910B3", "310B1")).probe(), "no kernels for 310B1", "CPU")


# ---- profile and health ----------------------------------------------------------------------------------------------


def test_the_profile_of_a_910b3(root: Path) -> None:
    found = device(root).profile()
    assert (found.name, found.kind, found.memory, found.power) == ("ascend:0", "npu", 65536 << 20, 400.0)
    assert dict(found.bandwidth) == {20: 1.6e12}
    assert dict(found.operations) == {"f16": 313e12, "int8": 626e12}
    assert found.basis == {
        "memory": "measured", "cores": "projected", "bandwidth": "projected", "operations": "projected", "power": "projected",
    }  # fmt: skip


def test_of_a_chip_that_no_table_knows_only_the_memory_is_told(root: Path) -> None:
    found = device(root, B3.replace("910B3", "999X9")).profile()
    assert (found.cores, dict(found.bandwidth), dict(found.operations), found.basis) == ((), {}, {}, {"memory": "measured"})


def test_a_profile_without_npu_smi_raises_what_it_should(root: Path) -> None:
    with pytest.raises(NativeError, match="npu-smi shows no NPU"):
        device(root, "").profile()


def health(one: AscendDevice) -> Health:
    until = time.monotonic() + 5
    while (answer := one.health()) == Health() and time.monotonic() < until:
        time.sleep(0.01)
    return answer


def test_health_is_asked_in_the_background(root: Path) -> None:
    asked = []

    def slow(seconds: float) -> str:
        asked.append(seconds)
        time.sleep(0.2)
        return (FIXTURES / "310p3.txt").read_text()

    one = device(root, slow)
    start = time.monotonic()
    assert one.health() == Health()
    assert time.monotonic() - start < 0.1
    found = health(one)
    assert (found.temperature, found.power) == (81.0, None)
    assert found.throttled == ("npu-smi calls its health Alarm; see `npu-smi info -t health -i 0`",)
    for _ in range(5):
        one.health()
    assert len(asked) == 1, "an answer is good for a while"


# ---- CANN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "version"),
    [
        ("runtime/version.info", "Version=8.0.RC3\n", (8, 0)),
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=Ascend-cann-toolkit\nversion=8.1.RC1\n", (8, 1)),
        ("version.cfg", "# version: 1.0\nruntime_running_version=[7.3.0.1.231:8.0.0]\n", (8, 0)),
        ("compiler/version.info", "Version=8.5.0\r\n", (8, 5)),
    ],
)
def test_where_cann_says_its_version(tmp_path: Path, file: str, text: str, version: tuple[int, int]) -> None:
    where = tmp_path / TOOLKIT / file
    where.parent.mkdir(parents=True)
    where.write_text(text)
    found = cann.find(tmp_path, {})
    assert found is not None
    assert (found.version, found.ready) == (version, False)


def test_a_cann_that_says_nothing_is_one_of_unknown_version(tmp_path: Path) -> None:
    (tmp_path / TOOLKIT).mkdir(parents=True)
    found = cann.find(tmp_path, {"ASCEND_TOOLKIT_HOME": str(tmp_path / TOOLKIT)})
    assert found is not None
    assert (found.version, found.ready) == ((), True)
    assert cann.find(tmp_path, {}) is None
