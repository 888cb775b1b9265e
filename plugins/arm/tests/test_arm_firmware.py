"""What the firmware of a Raspberry Pi says, in words, and how often it is asked."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from arm_trees import PMIC, Recorded
from edge_rt_arm import firmware
from edge_rt_arm.firmware import Answer, Firmware, Throttling, board_power, decode

VOLTAGE, CAPPED, THROTTLES, SOFT = firmware._BITS


@pytest.mark.parametrize(
    ("text", "now", "past"),
    [
        ("throttled=0x0", (), ()),
        ("throttled=0x1", (VOLTAGE,), ()),
        ("throttled=0x50000\n", (), (VOLTAGE, THROTTLES)),  # the example of the documentation
        ("throttled=0x50005", (VOLTAGE, THROTTLES), (VOLTAGE, THROTTLES)),
        ("throttled=0x80008", (SOFT,), (SOFT,)),
        ("throttled=0x20002", (CAPPED,), (CAPPED,)),
        ("throttled=0xfffffff0", (), firmware._BITS),  # other bits mean nothing
    ],
)
def test_bits(text: str, now: tuple[str, ...], past: tuple[str, ...]) -> None:
    assert decode(text) == Throttling(now, past)


@pytest.mark.parametrize(
    "text", [None, "", "VCHI initialization failed", "throttled=", "throttled=0x", "throttled=5", "throttled=0x123456789"]
)
def test_what_is_no_answer(text: str | None) -> None:
    assert decode(text) is None


def test_power_of_rails_that_have_volts_and_amperes() -> None:
    assert board_power("A_A current(0)=2.0A\nA_V volt(1)=3.0V\nEXT5V_V volt(24)=5.0V\n") == pytest.approx(1.1451 * 6 + 0.5879)
    assert 2.5 < (board_power(PMIC) or 0) < 4
    assert [board_power(text) for text in (None, "", 'error=1 error_msg="Command not registered"', "A_A current(0)=1.2.3A")] == [None] * 4


def test_it_is_asked_once_a_second() -> None:
    asked, now = Recorded({"get_throttled": "throttled=0x4"}), [0.0]
    source = Firmware(asked, lambda: now[0])
    assert source.refresh() == Answer(Throttling(("the firmware throttles",), ()))
    assert source._next == 1.0
    assert source.answer().throttling == Throttling(("the firmware throttles",), ())
    assert asked.calls == ["get_throttled", "pmic_read_adc"]
    source.refresh()
    assert asked.calls == ["get_throttled", "pmic_read_adc", "get_throttled"], "a board without a power meter is not asked for it again"


def test_one_that_does_not_answer_is_left_alone_for_a_minute() -> None:
    source = Firmware(Recorded({}), lambda: 5.0)
    assert source.refresh() == Answer()
    assert source._next == 65.0


def test_the_real_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "vcgencmd"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert firmware.run("get_throttled") is None, "it is not there"
    program.write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x8 || exit 255\n')
    program.chmod(0o755)
    assert firmware.run("get_throttled") == "throttled=0x8\n"
    assert firmware.run("pmic_read_adc") is None


def test_a_program_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("vcgencmd", timeout)

    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/vcgencmd")
    monkeypatch.setattr(subprocess, "run", hangs)
    assert firmware.run("get_throttled") is None
