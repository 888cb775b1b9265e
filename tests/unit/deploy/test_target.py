"""Targets: the files that come with edge-rt, those of plugins, and what is said of a wrong one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_rt.deploy import target as targets
from edge_rt.errors import OptionError
from edge_rt.hooks import hookimpl
from edge_rt.plugin_host.registry import Registry

OURS = ("a10g", "android-arm64", "ascend-910b", "mlu370", "rpi-5", "rpi-cm4", "x86-avx2", "x86-avx512")
GOOD = (targets.FOLDER / "rpi-5.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OURS)
def test_each_target_loads_and_says_what_its_figures_rest_on(name: str) -> None:
    target = targets.load(name)
    assert target.name == name
    stated = ["cores", "memory", "bandwidth", "operations", "efficiency", "storage", "idle_power", "power", "hottest"]
    assert [field for field in stated if field not in target.profile.basis] == []
    # Nothing of it was run on the device itself, or the file would say where and when.
    assert set(target.profile.basis.values()) == {"projected"}
    assert target.threads >= 1
    assert (target.profile.link is not None) == (target.profile.kind != "cpu")


def test_there_are_the_targets_of_the_issue() -> None:
    assert tuple(targets.names()) == OURS


@pytest.mark.parametrize("name", OURS)
def test_each_figure_has_a_comment(name: str) -> None:
    lines = (targets.FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    bare = [line for line in lines if re.match(r"\w+ = (\d|\{)", line) and "#" not in line and not line.startswith("number")]
    assert bare == []


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ('kind = "cpu"', 'kind = "toaster"', 5, "kind is cpu, gpu or npu"),
        ('kind = "cpu"', 'kind = "cpu', 5, "it is not TOML"),
        ("memory = 7_500_000_000", 'memory = "much"', 7, "memory is no number"),
        ("memory = 7_500_000_000", "memory = -1", 7, "a number above 0"),
        ("memory = 7_500_000_000", "memory = nan", 7, "a number above 0"),
        ("storage = 90e6", "speed = 90e6", 8, "there is no field speed"),
        ("clock = 2.4e9", "clock = true", 16, "clock is no number"),
        ("4 = 11.4e9", "four = 11.4e9", 23, "by number of threads"),
        ("int8 = 614e9", "int4 = 614e9", 27, "int8, f16 and f32"),
        ("reading = 0.95", "reading = 92", 32, "reading is a number above 0 and up to 1"),
        ("Q8_0 = {one = 0.12, many = 0.25}", "Q8_0 = 0.12", 33, "efficiency of Q8_0 is given as"),
        ("node = 2e-6", "knot = 2e-6", 44, "overhead has no field knot"),
        ("node = 2e-6", "", 43, "node is missing"),
        ('bandwidth = "projected"', 'bandwidth = "guessed"', 53, "a basis is measured, simulated, projected or unknown"),
        ('features = ["neon", "fp16", "dotprod"]', "features = 3", 17, "features is a list"),
        ("caches = [{level = 1, size = 65536}", "caches = [{level = 1, size = 0}", 18, "size is a number above 0"),
    ],
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, old: str, new: str, line: int, words: str) -> None:
    assert old in GOOD
    path = tmp_path / "mine.toml"
    path.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(OptionError) as caught:
        targets.load(str(path))
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    found = re.search(r"mine\.toml, line (\d+)", message)
    assert found, message
    assert int(found[1]) == line, message  # of what is missing, its table's


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    for name in ("bytes.toml", "absent.toml"):
        with pytest.raises(OptionError, match="cannot be read"):
            targets.load(str(tmp_path / name))
    with pytest.raises(OptionError, match="there is no target rpi-6; choose from auto, a10g"):
        targets.load("rpi-6")


def test_a_plugin_adds_targets_and_takes_none_of_ours(tmp_path: Path) -> None:
    for name in ("my-board", "rpi-5"):
        (tmp_path / f"{name}.toml").write_text(GOOD.replace("Raspberry Pi 5, 8 GB", "another"), encoding="utf-8")

    class Plugin:
        EDGE_RT_API = 1

        @hookimpl
        def edge_rt_compiler_targets(self) -> list[Path]:
            return [tmp_path / "my-board.toml", tmp_path / "rpi-5.toml"]

    registry = Registry.load(entry_points=False, plugins={"boards": Plugin()})
    more = registry.compiler_targets()
    assert targets.load("my-board", more).description == "another"
    assert targets.load("rpi-5", more).description == "Raspberry Pi 5, 8 GB"


def test_bandwidth_between_and_beyond_what_is_known() -> None:
    profile = targets.load("rpi-cm4").profile._replace(bandwidth={2: 4.0, 4: 6.0})
    assert [targets.bandwidth(profile, n) for n in (1, 2, 3, 4, 8)] == [2.0, 4.0, 5.0, 6.0, 6.0]


def test_the_fastest_cores_have_the_larger_share() -> None:
    profile = targets.load("android-arm64").profile
    assert targets.share(profile, 4) == pytest.approx((2.4 + 3 * 2.2) / (2.4 + 3 * 2.2 + 4 * 1.9))
    assert targets.share(profile, 8) == 1.0
    assert targets.share(targets.load("a10g").profile, 1) == 1.0
