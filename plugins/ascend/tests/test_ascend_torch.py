"""The engine ``torch`` of edge-rt-mlu as second choice on an NPU: offered where it is here, and what is said where something is missing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import edge_rt_ascend
import pytest
from edge_rt_ascend import second
from edge_rt_ascend.device import BUILD, AscendDevice
from edge_rt_ascend.engine import CannFactory
from test_ascend_device import B3, device, machine, never, refused

import edge_rt
from edge_rt.cli.doctor import device_rows, devices
from edge_rt.errors import PluginError
from edge_rt.hooks import EngineOptions, ModelFile, NativeError, Offer, OptionError, UnsupportedModel, hookimpl
from edge_rt.plugin_host.registry import Registry
from edge_rt.testing.random_models import write_random_model
from edge_rt.types import Delta

mlu = pytest.importorskip("edge_rt_mlu", reason="the engine torch comes with edge-rt-mlu, which is not installed here")

from edge_rt_mlu import adapters  # noqa: E402
from edge_rt_mlu.device import System, absent  # noqa: E402
from edge_rt_mlu.factory import TorchFactory  # noqa: E402

ALL = ("edge_rt_mlu", "torch", "torch_npu")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return machine(tmp_path)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_random_model(tmp_path / "tiny.gguf", "llama", type="F16")


def both(one: AscendDevice, root: Path, environment: dict[str, str] | None = None) -> Registry:
    """Both plugins, on a machine that has this device."""

    class Plugin:
        EDGE_RT_API = 1

        @hookimpl
        def edge_rt_devices(self) -> list[AscendDevice]:
            return [one]

        @hookimpl
        def edge_rt_engines(self) -> Iterable[Any]:
            return [CannFactory(lambda number: one), TorchFactory(root, environment or {})]

    return Registry.load(entry_points=False, plugins={"both": Plugin()})


# ---- what is offered -------------------------------------------------------------------------------------------------


def test_it_is_the_second_choice(root: Path) -> None:
    answer = device(root, packages=ALL).probe()
    assert isinstance(answer, Offer)
    assert (answer.engines, answer.score) == (("ggml_cann", "torch"), 100)


@pytest.mark.parametrize("missing", ALL)
def test_it_is_not_offered_where_a_part_is_missing(root: Path, missing: str) -> None:
    packages = tuple(name for name in ALL if name != missing)
    answer = device(root, packages=packages).probe()
    assert isinstance(answer, Offer)
    assert answer.engines == ("ggml_cann",)
    without = device(root, never, built=("cpu",), packages=packages)
    refused(without.probe(), f"the engine torch lacks the Python package {missing}", "install")


def test_without_either_both_ways_out_are_told(root: Path) -> None:
    answer = device(root, never, built=("cpu",), packages=("torch",)).probe()
    refused(answer, "libggml was built without CANN, and the engine torch lacks the Python packages edge_rt_mlu and torch_npu", BUILD)
    refused(answer, "", "; or, for the engine torch, install edge-rt-mlu and torch-npu of the version that fits CANN")


@pytest.mark.parametrize(
    ("files", "output", "built", "reason"),
    [
        ({}, B3, ("cpu",), "libggml was built without CANN"),
        ({"version": "7.0.0"}, B3, ("cann",), "CANN 7.0.0 is too old"),
        ({}, B3.replace("910B3", "310B1"), ("cann",), "ggml's CANN backend has no kernels for 310B1"),
    ],
)
def test_where_ggml_cannot_it_is_the_only_one(
    tmp_path: Path, files: dict[str, Any], output: str, built: tuple[str, ...], reason: str
) -> None:
    one = device(machine(tmp_path, **files), output, built=built, packages=ALL)
    answer = one.probe()
    assert isinstance(answer, Offer)
    assert (answer.engines, answer.score, answer.basis) == (("torch",), 30, "projected")
    assert f"with torch alone: {reason}" in answer.description
    (shown,) = (row for row in devices(both(one, tmp_path), False) if row["name"] == "ascend:0")
    text = "\n".join(" ".join(row) for row in device_rows(shown))
    assert "engines torch;" in text
    assert reason in text


def test_neither_works_without_cann(tmp_path: Path) -> None:
    none, unset = machine(tmp_path / "none", version=None), machine(tmp_path / "unset")
    refused(device(none, never, packages=ALL, ASCEND_TOOLKIT_HOME="").probe(), "CANN is not installed", "hiascend")
    refused(device(unset, never, packages=ALL, ASCEND_TOOLKIT_HOME="").probe(), "environment is not set", "set_env.sh")


# ---- which engine runs -----------------------------------------------------------------------------------------------


def test_models_that_cann_cannot_multiply_run_on_it(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "missing", lambda adapter: None)
    one = device(root, packages=ALL)
    registry = both(one, root)
    offer = registry.choose_device("ascend:0").offer
    for kind, engines in (("F16", ["ggml_cann", "torch"]), ("Q4_1", ["torch"])):
        with ModelFile.open(write_random_model(tmp_path / f"{kind}.gguf", "llama", type=kind)) as file:
            choice = registry.choose_engine(file, EngineOptions(device="ascend:0"), None, offer)
            assert [factory.name for factory, _ in choice.candidates] == engines


def test_with_only_the_ascend_plugin_it_says_what_to_install(tiny: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second, "installed", lambda package: False)
    registry = Registry.load(entry_points=False, plugins={"ascend": edge_rt_ascend})
    assert [status.reason for status in registry.plugins if status.name == "ascend"] == [""]
    with ModelFile.open(tiny) as file:
        with pytest.raises(UnsupportedModel, match="comes with edge-rt-mlu, which is not installed; pip install edge-rt-mlu"):
            registry.choose_engine(file, EngineOptions(device="ascend:0"), "torch", None)
        with pytest.raises(UnsupportedModel, match="pip install edge-rt-mlu"):
            second.AbsentTorch().open(file, EngineOptions(device="ascend:0"))
    assert registry.choose_device("cpu").offer.score > 0


def test_both_plugins_together_name_the_engine_once() -> None:
    registry = Registry.load(entry_points=False, plugins={"ascend": edge_rt_ascend, "mlu": mlu})
    assert {"torch", "ggml_cann"} <= registry.engines().keys()
    assert registry.engines()["torch"].plugin == "mlu"
    assert [status.reason for status in registry.plugins if status.name in ("ascend", "mlu")] == ["", ""]


def test_with_only_the_mlu_plugin_it_says_what_to_install(root: Path, tmp_path: Path) -> None:
    (one,) = absent(System(root), lambda package: False)

    class Plugin:
        EDGE_RT_API = 1

        @hookimpl
        def edge_rt_devices(self) -> list[Any]:
            return [one]

    registry = Registry.load(entry_points=False, plugins={"mlu": Plugin()})
    with pytest.raises(PluginError, match=r"ascend:0 cannot be used: .* edge-rt-ascend, .* is not installed; pip install edge-rt-ascend"):
        registry.choose_device("ascend:0")
    assert absent(System(root), lambda package: True) == []
    assert absent(System(tmp_path / "nothing"), lambda package: False) == []


# ---- its numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("visible", [None, "0", "2,0", "1, 2"])
def test_torch_numbers_npus_as_cann_does(tmp_path: Path, visible: str | None) -> None:
    root, npu = machine(tmp_path, (2, 5, 6)), adapters.ADAPTERS["ascend"]
    chosen = {} if visible is None else {"ASCEND_RT_VISIBLE_DEVICES": visible}
    for number in (2, 5, 6):
        try:
            expected = device(root, number=number, **chosen).index()
        except NativeError:
            with pytest.raises(OptionError, match=f"hides ascend:{number} from this process"):
                adapters.number_in_torch(npu, number, root, chosen)
        else:
            assert adapters.number_in_torch(npu, number, root, chosen) == expected
    with pytest.raises(OptionError, match="there is no /dev/davinci7"):
        adapters.number_in_torch(npu, 7, root, chosen)


# ---- an answer -------------------------------------------------------------------------------------------------------


def test_a_prompt_is_answered_through_torch_npu(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the probe to the answer, in a container with one of eight NPUs; only the arithmetic is the CPU's."""
    torch = pytest.importorskip("torch", reason="the engine's logic is tested on CPU PyTorch, which is not installed here")
    from edge_rt_mlu import engine, simulated

    root = machine(tmp_path, (1,))
    calls = simulated.install(monkeypatch, tmp_path, "torch_npu", "npu", devices=1)
    asked: list[tuple[str, int]] = []

    def device_of(adapter: Any, number: int) -> Any:
        asked.append((adapter.kind, number))
        return torch.device("cpu")

    monkeypatch.setattr(engine, "device_of", device_of)
    registry = both(device(root, number=1, built=("cpu",), packages=ALL), root)
    with edge_rt.open(tiny, device="ascend:1", registry=registry) as model:
        assert (model.info.engine, model.info.device) == ("torch", "ascend:1")
        events = list(model.session().generate("once upon a time", temperature=0.0, max_tokens=8))
        text = "".join(event.text for event in events if isinstance(event, Delta))
    assert asked == [("npu", 0)]
    assert calls[-1] == "empty_cache"
    with edge_rt.open(tiny) as model:
        events = list(model.session().generate("once upon a time", temperature=0.0, max_tokens=8))
        assert "".join(event.text for event in events if isinstance(event, Delta)) == text


def test_without_torch_npu_the_engine_says_so(tiny: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "installed", lambda package: package != "torch_npu")
    registry = both(device(root), root)
    offer = registry.choose_device("ascend:0").offer
    with ModelFile.open(tiny) as file, pytest.raises(UnsupportedModel, match=r"torch_npu is not installed; .*pip install torch-npu"):
        registry.choose_engine(file, EngineOptions(device="ascend:0"), "torch", offer)


def test_the_lacking_parts_are_named_as_packages_are() -> None:
    found = SimpleNamespace(names=[])

    def here(name: str) -> bool:
        found.names.append(name)
        return False

    assert second.missing(here) is not None
    assert found.names == list(second._NEEDED)
    assert not second.installed("no_such_package")
