"""`edge-rt arm`, and the plugin as edge-rt loads it."""

from __future__ import annotations

import json
from pathlib import Path

import arm_trees as trees
import edge_rt_arm
import pytest
import typer
from arm_trees import Recorded
from edge_rt_arm import command
from edge_rt_arm.firmware import Firmware
from typer.testing import CliRunner

from edge_rt import hooks
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing import system_trees


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What libggml was built for, for a test to fill in; in its own names."""
    found: list[str] = []
    monkeypatch.setattr(hooks, "ggml_features", lambda: tuple(found), raising=False)
    monkeypatch.setattr(hooks, "ggml_vector_length", lambda: 32 if "sve" in found else 0, raising=False)
    return found


def shown(root: Path, **answers: str) -> str:
    found = command.facts(root, Firmware(Recorded(answers)))
    json.dumps(found)  # it must be possible to write it
    return command.as_text(found)


def test_a_pi_5_with_a_library_built_for_it(tmp_path: Path, built: list[str]) -> None:
    built += ["neon", "arm_fma", "fp16_va", "dotprod", "llamafile"]
    text = shown(trees.pi_5(tmp_path), get_throttled="throttled=0x50000\n", pmic_read_adc=trees.PMIC)
    assert "board        Raspberry Pi 5 Model B Rev 1.0, 4 x Cortex-A76" in text
    assert "cores        4 x Cortex-A76 at 2.40 GHz, L1 64 KB, L2 512 KB, L3 2048 KB" in text
    assert "packed       Q4_0 4x4, Q8_0 4x4, Q4_K 8x4" in text
    assert "slowed down from 80 °C" in text
    assert "power        3.4 W" in text
    assert "throttled    no" in text
    assert "since start  the supply's voltage is too low; the firmware throttles" in text
    assert "build it here" not in text


def test_a_library_that_was_built_for_less_is_told(tmp_path: Path, built: list[str]) -> None:
    built += ["neon", "dotprod"]
    text = shown(trees.graviton_3(tmp_path))
    assert "it was not built for this processor and lacks Q4_0 8x8, Q8_0 4x8" in text
    assert "CMAKE_ARGS=-DGGML_NATIVE=ON pip install" in text


def test_the_library_knows_the_length_of_vectors_where_the_kernel_does_not_say(tmp_path: Path, built: list[str]) -> None:
    root = trees.graviton_3(tmp_path)
    (root / "proc/sys/abi/sve_default_vector_length").unlink()
    built += ["neon", "fp16_va", "dotprod", "matmul_int8", "sve"]
    text = shown(root)
    assert "packed       Q4_0 8x8" in text
    assert "lacks" not in text


def test_a_library_that_was_built_for_more_is_told(tmp_path: Path, built: list[str]) -> None:
    built += ["neon", "dotprod", "matmul_int8"]
    assert "this processor has no dotprod, i8mm: the library may crash" in shown(trees.cm4(tmp_path))


def test_a_library_that_cannot_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> tuple[str, ...]:
        raise hooks.NativeError("llama-cpp-python is not installed")

    monkeypatch.setattr(hooks, "ggml_features", broken, raising=False)
    assert "library      llama-cpp-python is not installed" in shown(trees.cm4(tmp_path))


def test_a_phone_is_told_where_threads_go(tmp_path: Path, built: list[str]) -> None:
    text = shown(trees.snapdragon(tmp_path))
    assert "threads      5, on CPUs 3, 4, 5, 6, 7" in text
    assert "since start" not in text, "only a Raspberry Pi knows"


def test_a_refusal(tmp_path: Path) -> None:
    assert shown(system_trees.x86_hybrid(tmp_path)) == "refused  this is no ARM processor; the device cpu runs models here"


# ---- the plugin ------------------------------------------------------------------------------------------------------


def test_it_is_a_plugin_with_a_device_and_a_command() -> None:
    registry = Registry.load(entry_points=False, plugins={"arm": edge_rt_arm})
    assert "arm" in registry.devices()
    app = typer.Typer()
    app.command("other")(lambda: None)
    registry.add_cli_commands(app)
    (status,) = (one for one in registry.plugins if one.name == "arm")
    assert (status.state, status.reason, status.hooks) == ("ok", "", ("edge_rt_cli_commands", "edge_rt_devices"))
    result = CliRunner().invoke(app, ["arm", "--json"])
    found = json.loads(result.output)
    assert result.exit_code == (1 if "refused" in found else 0)


def test_its_files_import_nothing_of_edge_rt_but_hooks() -> None:
    for path in Path(edge_rt_arm.__file__).parent.glob("*.py"):
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        modules = {words[1] for words in lines if words[:1] in (["from"], ["import"]) and words[1].split(".")[0] == "edge_rt"}
        assert modules <= {"edge_rt.hooks"}, path
