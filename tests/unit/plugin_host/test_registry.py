"""The plugin host: what it finds, what it does with plugins that do not work, and how it chooses."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edge_rt.errors import AbiMismatch, ContextOverflow, OptionError, PluginError, UnsupportedModel
from edge_rt.hooks import (
    API_VERSION,
    Candidate,
    ContextPolicy,
    Embedder,
    EngineOptions,
    Grade,
    GraderFactory,
    Offer,
    PostProcessorFactory,
    Refusal,
    RuleError,
    Rules,
    Segment,
    hookimpl,
)
from edge_rt.plugin_host import entry_points, registry
from edge_rt.plugin_host.registry import BUILT_INS, EXTRAS, OWN_PLUGINS, PluginStatus, Registry
from edge_rt.postprocess.rules import Ruleset
from edge_rt.testing.null_device import NullDevice, NullEngine, NullPlugin

MODEL: Any = SimpleNamespace(path=Path("tiny.gguf"), header=SimpleNamespace(architecture="llama"))
OPTIONS = EngineOptions()


def plugin(api: Any = API_VERSION, **hooks: Callable[..., Any]) -> SimpleNamespace:
    """A plugin object with the given hooks, marked."""
    made = SimpleNamespace(**{name: hookimpl(function) for name, function in hooks.items()})
    if api is not None:
        made.EDGE_RT_API = api
    return made


def nothing() -> Callable[[], list[Any]]:
    """A hook that offers nothing; a function of its own each time, because marking it changes it."""

    def hook() -> list[Any]:
        return []

    return hook


def load(**plugins: Any) -> Registry:
    return Registry.load(entry_points=False, disabled=BUILT_INS, plugins=plugins)


def status(found: Registry, name: str) -> PluginStatus:
    (one,) = (status for status in found.plugins if status.name == name)
    return one


@dataclass
class Device:
    name: str = "card"
    answer: Any = None

    def probe(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@dataclass
class Engine:
    name: str = "engine"
    answer: Any = 1.0
    opened: Any = None

    def supports(self, model: Any, options: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def open(self, model: Any, options: Any) -> Any:
        if isinstance(self.opened, Exception):
            raise self.opened
        return self.opened


def offer(score: float, *engines: str) -> Offer:
    return Offer(score, "a card", 1 << 30, engines=engines or ("*",))


def devices(*items: Any) -> SimpleNamespace:
    return plugin(edge_rt_devices=lambda: list(items))


def engines(*items: Any) -> SimpleNamespace:
    return plugin(edge_rt_engines=lambda: list(items))


# ---- what is loaded --------------------------------------------------------------------------------------------------


def test_built_ins_work_and_are_registered_like_a_strangers() -> None:
    found = Registry.load(entry_points=False)
    assert [s.name for s in found.plugins] == list(BUILT_INS)
    assert {s.distribution for s in found.plugins} == {"edge-rt"}
    assert [(s.name, s.reason) for s in found.plugins if s.state != "ok"] == []
    assert "cpu" in found.devices()
    assert "llama_cpp" in found.engines()
    assert list(found.context_policies()) == ["strict", "slide", "graded"]
    assert "content" in found.graders()


def test_the_table_of_built_ins_is_the_distributions_entry_points() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    section = text.partition("[project.entry-points.edge_rt]\n")[2].partition("\n[")[0]
    declared = dict(line.replace('"', "").split(" = ") for line in section.splitlines() if line)
    assert declared == BUILT_INS


def test_the_table_of_own_plugins_is_the_entry_points_of_their_distributions() -> None:
    declared = {}
    for path in (Path(__file__).parents[3] / "plugins").glob("*/pyproject.toml"):
        text = path.read_text()
        distribution = text.partition('name = "')[2].partition('"')[0]
        if distribution in EXTRAS:
            section = text.partition("[project.entry-points.edge_rt]\n")[2].partition("\n[")[0]
            declared |= dict.fromkeys((line.partition(" = ")[0] for line in section.splitlines() if line), distribution)
    assert declared == OWN_PLUGINS
    extras = (Path(__file__).parents[3] / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")[2]
    for distribution, requirement in EXTRAS.items():
        assert f'{requirement.removeprefix("edge-rt[").removesuffix("]")} = ["{distribution}"]' in extras


def test_a_plugin_of_our_own_that_is_not_installed_is_named_with_the_command() -> None:
    found = load()
    with pytest.raises(PluginError, match=r"^the post-processor punctuation is not installed; pip install 'edge-rt\[text\]'$"):
        found.post_processor("punctuation")
    with pytest.raises(PluginError, match=r"^the plugin punctuation is not installed; pip install 'edge-rt\[text\]'$"):
        Registry.load(entry_points=False, required=["punctuation"])
    for values, place in (({"terminology": {}}, ("terminology",)), ({"pipeline": ["punctuation"]}, ("pipeline", 0))):
        with pytest.raises(RuleError, match=r"is not installed; pip install 'edge-rt\[text\]'$") as caught:
            Ruleset(values, found)
        assert caught.value.place == place


def test_a_plugin_of_our_own_that_is_disabled_is_not_said_to_be_missing() -> None:
    found = Registry.load(entry_points=False, plugins={"punctuation": plugin(edge_rt_post_processors=nothing())}, disabled=["punctuation"])
    with pytest.raises(PluginError, match=r"^no post-processor named punctuation, .*plugin punctuation disabled: it was disabled"):
        found.post_processor("punctuation")


def test_plugins_of_our_own_distributions_are_trusted_and_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for distribution in ("edge-rt-text", "other"):
        info = tmp_path / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[edge_rt]\n{distribution} = trusted_or_not:PLUGIN\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = Registry.load(disabled=["edge-rt-text", "other"])
    assert [found.trusted(name) for name in ("cpu", "redaction", "edge-rt-text", "other")] == [True, True, True, False]


def test_a_working_plugin() -> None:
    found = load(mine=NullPlugin())
    assert status(found, "mine") == PluginStatus("mine", "", "", "ok", "", ("edge_rt_devices", "edge_rt_engines"))
    assert found.devices()["null"].plugin == "mine"


def _raise(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise error

    return function


class _AClass:
    EDGE_RT_API = API_VERSION


BROKEN: dict[str, tuple[Any, str, str]] = {
    "says no version": (plugin(api=None, edge_rt_devices=nothing()), "refused", "does not declare .* `EDGE_RT_API = 1`"),
    "version is text": (plugin(api="1", edge_rt_devices=nothing()), "refused", "does not declare"),
    "too new": (plugin(api=99, edge_rt_devices=nothing()), "refused", f"plugin API 99, this edge-rt has {API_VERSION}; upgrade edge-rt"),
    "too old": (plugin(api=0, edge_rt_devices=nothing()), "refused", f"plugin API 0, this edge-rt has {API_VERSION}; upgrade the plugin"),
    "misspelt": (plugin(edge_rt_device=nothing()), "failed", "no hook edge_rt_device; did you mean edge_rt_devices?"),
    "unlike any": (plugin(frobnicate=nothing()), "failed", "no hook frobnicate$"),
    "wrong argument": (plugin(edge_rt_devices=lambda model: []), "failed", "model"),
    "no hook": (plugin(), "failed", "implements no hook"),
    "unmarked": (SimpleNamespace(EDGE_RT_API=1, edge_rt_devices=nothing()), "failed", "not marked with @hookimpl"),
    "a class": (_AClass, "failed", "names the class _AClass"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_reported_and_stops_nobody(case: str, caplog: pytest.LogCaptureFixture) -> None:
    broken, state, reason = BROKEN[case]
    found = load(a=broken, b=NullPlugin())
    assert status(found, "a").state == state
    with pytest.raises(PluginError, match=reason):
        Registry.load(entry_points=False, plugins={"a": broken}, required=["a"])
    assert any("plugin a: " in record.getMessage() for record in caplog.records)
    assert list(found.devices()) == ["null"]
    assert status(found, "b").state == "ok"


def test_a_misspelt_hook_is_not_found_again_in_the_next_plugin() -> None:
    found = load(a=plugin(edge_rt_device=nothing()), b=plugin(edge_rt_device=nothing()), c=NullPlugin())
    assert [(s.name, s.state) for s in found.plugins if not s.distribution] == [("a", "failed"), ("b", "failed"), ("c", "ok")]


def test_a_hook_of_a_later_version_may_be_marked_optional() -> None:
    newer = plugin(edge_rt_devices=nothing())
    newer.edge_rt_from_the_future = hookimpl(optionalhook=True)(nothing())
    assert status(load(a=newer), "a").state == "ok"


def test_hook_wrappers_are_refused() -> None:
    def wrap() -> Any:
        return (yield)

    found = load(a=SimpleNamespace(EDGE_RT_API=1, edge_rt_devices=hookimpl(wrapper=True)(wrap)), b=NullPlugin())
    assert "wrappers" in status(found, "a").reason
    assert list(found.devices()) == ["null"]


def test_disabled_plugins_are_not_imported() -> None:
    found = Registry.load(entry_points=False, disabled=["ggml", "no such plugin"])
    assert status(found, "ggml").state == "disabled"
    assert "ggml" not in found.engines()
    with pytest.raises(PluginError, match="ggml: it was disabled"):
        Registry.load(entry_points=False, disabled=["ggml"], required=["ggml"])


def test_a_required_plugin_must_be_there() -> None:
    with pytest.raises(PluginError, match=r"no plugin named cuda is installed; installed are .*cpu"):
        Registry.load(entry_points=False, required=["cuda"])


# ---- what is installed -----------------------------------------------------------------------------------------------


def install(folder: Path, name: str, module: str | None, point: str = "mine", version: str = "1.0", suffix: str = "dist-info") -> None:
    """A distribution with one entry point, and its module."""
    info = folder / f"{name.replace('-', '_')}-{version}.{suffix}"
    info.mkdir(parents=True)
    metadata = info / ("METADATA" if suffix == "dist-info" else "PKG-INFO")
    metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nVersion: none\n")
    (info / "entry_points.txt").write_text(f"[console_scripts]\nx = y:z\n\n# a comment\n[edge_rt]\n{point} = plugin_{point}\n")
    if module is not None:
        (folder / f"plugin_{point}.py").write_text(module)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("plugin_"):
            del sys.modules[name]


WORKING = "from edge_rt.hooks import hookimpl\nEDGE_RT_API = 1\n@hookimpl\ndef edge_rt_devices(): return []\n"


@pytest.mark.parametrize("suffix", ["dist-info", "egg-info"])
def test_installed_plugins_are_found(site: Path, suffix: str) -> None:
    install(site, "edge-rt-mine", WORKING, version="2.5", suffix=suffix)
    assert status(Registry.load(), "mine") == PluginStatus("mine", "edge-rt-mine", "2.5", "ok", "", ("edge_rt_devices",))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (None, "ModuleNotFoundError: No module named 'plugin_mine'"),
        ("import no_such_module_xyz", "ModuleNotFoundError: No module named 'no_such_module_xyz'"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_an_installed_plugin_that_cannot_be_imported(site: Path, module: str | None, reason: str) -> None:
    install(site, "edge-rt-mine", module)
    found = Registry.load()
    assert status(found, "mine").state == "failed"
    assert reason in status(found, "mine").reason
    assert "cpu" in found.devices()
    with pytest.raises(PluginError, match="plugin mine: cannot be imported") as caught:
        Registry.load(required=["mine"])
    assert caught.value.__cause__ is not None


def test_nobody_takes_a_built_in_plugins_name(site: Path) -> None:
    install(site, "aaa", WORKING, point="cpu")
    found = Registry.load()
    assert status(found, "cpu").distribution == "edge-rt"
    assert status(found, "cpu (aaa)").reason == "the name cpu is taken by edge-rt"


def test_plugins_come_by_distribution_and_name_whatever_the_path_says(tmp_path: Path) -> None:
    for folder, name, point in (("1", "zz", "a"), ("2", "bb", "y"), ("2", "bb-more", "x")):
        install(tmp_path / folder, name, WORKING, point)
    found = entry_points.find("edge_rt", [str(tmp_path / "1"), str(tmp_path / "2")])
    assert [(p.distribution, p.name) for p in found] == [("bb", "y"), ("bb-more", "x"), ("zz", "a")]


def test_the_first_of_two_versions_counts(tmp_path: Path) -> None:
    install(tmp_path / "1", "my.plugin", WORKING, version="1.0")
    install(tmp_path / "2", "My-Plugin", WORKING, version="2.0")
    assert [p.version for p in entry_points.find("edge_rt", [str(tmp_path / "1"), str(tmp_path / "2")])] == ["1.0"]


def test_the_quick_scan_finds_what_importlib_finds() -> None:
    quick = entry_points._from_directories("console_scripts", sys.path)
    assert len(quick) > 5
    assert set(quick) == set(entry_points._from_metadata("console_scripts", sys.path))


def test_an_archive_on_the_path_is_left_to_importlib(tmp_path: Path) -> None:
    import zipfile

    install(tmp_path / "site", "edge-rt-mine", WORKING)
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (tmp_path / "site").rglob("*"):
            if path.is_file():
                file.write(path, path.relative_to(tmp_path / "site"))
    assert [(p.distribution, p.name, p.version) for p in entry_points.find("edge_rt", [str(archive)])] == [("edge-rt-mine", "mine", "1.0")]


def test_odd_metadata_is_survived(tmp_path: Path) -> None:
    (tmp_path / "a_file.egg-info").write_text("Name: a-file\n")
    (tmp_path / "empty-1.dist-info").mkdir()
    (tmp_path / "odd-1.dist-info").mkdir()
    (tmp_path / "odd-1.dist-info" / "entry_points.txt").write_bytes(b"\xff\xfe[edge_rt]\n")
    install(tmp_path, "good", WORKING)
    (tmp_path / "good-1.0.dist-info" / "METADATA").unlink()
    found = entry_points.find("edge_rt", [str(tmp_path), str(tmp_path / "missing")])
    assert [(p.distribution, p.version) for p in found] == [("good", "1.0")]


# ---- what is collected -----------------------------------------------------------------------------------------------


def test_a_hook_is_called_once_and_late() -> None:
    calls = []
    found = load(a=plugin(edge_rt_devices=lambda: calls.append(1) or [NullDevice()]))
    assert calls == []
    assert found.devices() is found.devices()
    assert calls == [1]


def test_a_hook_may_be_a_generator_or_return_nothing() -> None:
    def generate() -> Any:
        yield Device("one")
        yield Device("two")

    assert list(load(a=plugin(edge_rt_devices=generate), b=plugin(edge_rt_devices=lambda: None)).devices()) == ["one", "two"]


def _half(error: Exception) -> Callable[[], Any]:
    def generate() -> Any:
        yield Device("half")
        raise error

    return generate


@pytest.mark.parametrize(
    ("hook", "reason"),
    [
        (_raise(RuntimeError("no driver")), "edge_rt_devices raised RuntimeError: no driver"),
        (_half(RuntimeError("lost it")), "edge_rt_devices raised RuntimeError: lost it"),
        (lambda: [object()], "is no Device"),
        (lambda: [Device(name=7)], "is no Device"),  # type: ignore[arg-type]
        (lambda: "text", "'t', which is no Device"),
        (lambda: 5, "TypeError"),
        (lambda: [Device("same"), Device("same")], "a name taken by plugin a"),
    ],
)
def test_a_hook_that_fails_takes_only_its_own_offers_along(hook: Any, reason: str) -> None:
    found = load(a=plugin(edge_rt_devices=hook), b=devices(Device("good")))
    assert [name for name in found.devices() if name != "same"] == ["good"]
    assert status(found, "a").state == "failed"
    assert reason in status(found, "a").reason
    with pytest.raises(PluginError, match="plugin a: "):
        Registry.load(entry_points=False, plugins={"a": plugin(edge_rt_devices=hook)}, required=["a"]).devices()


def test_of_two_claims_to_a_name_the_first_plugins_holds() -> None:
    found = load(a=devices(Device("card")), b=devices(Device("card"), Device("other")))
    assert {name: device.plugin for name, device in found.devices().items()} == {"card": "a", "other": "b"}
    assert "card, a name taken by plugin a" in status(found, "b").reason


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_the_highest_score_wins_not_the_order() -> None:
    found = load(a=devices(Device("slow", offer(1))), b=devices(Device("fast", offer(5))), c=devices(Device("gone", Refusal("no card"))))
    choice = found.choose_device()
    assert (choice.device.name, choice.device.plugin, choice.offer.score) == ("fast", "b", 5)
    assert found.choose_device("slow").device.name == "slow"


def test_score_0_is_used_only_by_name() -> None:
    found = load(a=NullPlugin())
    assert found.choose_device("null").offer.score == 0
    with pytest.raises(PluginError, match="no device can be used"):
        found.choose_device()


def test_a_device_that_cannot_be_used_says_why_and_what_to_do() -> None:
    found = load(a=devices(Device("cuda:0", Refusal("the driver is older than 12.0", "update it"))))
    with pytest.raises(PluginError, match=r"device cuda:0 cannot be used: the driver is older than 12.0; update it"):
        found.choose_device("cuda:0")
    with pytest.raises(PluginError, match=r"no device can be used \(cuda:0: the driver is older"):
        found.choose_device()


def test_an_unknown_device_names_what_there_is_and_what_failed() -> None:
    found = load(a=devices(Device("card", offer(1))), cuda=plugin(api=2, edge_rt_devices=nothing()))
    with pytest.raises(PluginError, match=r"no device named cuda, there is card; .*plugin cuda refused: .*API 2"):
        found.choose_device("cuda")


@pytest.mark.parametrize("answer", [RuntimeError("cudaErrorUnknown"), None, "yes"])
def test_a_probe_that_fails_refuses_with_the_plugins_name(answer: Any) -> None:
    found = load(a=devices(Device("card", answer)), b=devices(Device("good", offer(1))))
    assert found.choose_device().device.name == "good"
    refusal = found.probe("card")
    assert isinstance(refusal, Refusal)
    assert "plugin a: probing device card" in refusal.reason
    assert status(found, "a").state == "failed"


# ---- engines ---------------------------------------------------------------------------------------------------------


def test_engines_come_best_first_with_reasons_for_the_others() -> None:
    found = load(
        a=engines(Engine("low", 1.0), Engine("no", Refusal("an unknown architecture")), Engine("hidden", 0.0)),
        b=engines(Engine("high", 10), Engine("broken", KeyError("rope"))),
    )
    choice = found.choose_engine(MODEL, OPTIONS)
    assert [(factory.name, score) for factory, score in choice.candidates] == [("high", 10), ("low", 1.0)]
    assert choice.refusals["no"] == Refusal("an unknown architecture")
    assert "by name" in choice.refusals["hidden"].reason
    assert "plugin b: engine broken: supports raised KeyError" in choice.refusals["broken"].reason


def test_an_engine_by_name_is_the_only_candidate() -> None:
    found = load(a=engines(Engine("low", 0.0), Engine("high", 10.0)))
    (candidate,) = found.choose_engine(MODEL, OPTIONS, "low").candidates
    assert candidate[0].name == "low"
    with pytest.raises(PluginError, match="no engine named none, there is low, high"):
        found.choose_engine(MODEL, OPTIONS, "none")


def test_a_device_limits_engines_to_those_that_can_drive_it() -> None:
    found = load(a=engines(Engine("cpu_only", 10.0), Engine("cuda", 1.0)))
    choice = found.choose_engine(MODEL, OPTIONS, offer=offer(1, "cuda"))
    assert [factory.name for factory, _ in choice.candidates] == ["cuda"]
    assert "cannot drive the device" in choice.refusals["cpu_only"].reason
    assert len(found.choose_engine(MODEL, OPTIONS, offer=offer(1, "cuda", "*")).candidates) == 2
    assert found.choose_engine(MODEL, OPTIONS, "cpu_only", offer(1, "cuda")).candidates


def test_no_engine_is_an_error_with_every_reason() -> None:
    found = load(a=engines(Engine("one", Refusal("no graph for mamba", "wait")), Engine("two", Refusal("too large"))))
    with pytest.raises(UnsupportedModel, match=r"no engine can run this model \(one: no graph for mamba; wait; two: too large\)"):
        found.choose_engine(MODEL, OPTIONS)


def test_opening_passes_typed_errors_and_names_the_plugin_in_others() -> None:
    engine = NullEngine()
    opened = {"abi": AbiMismatch("other version"), "bug": ZeroDivisionError("oops"), "ok": engine, "wrong": 3}
    found = load(a=engines(*(Engine(name, opened=result) for name, result in opened.items())))
    assert found.engines()["ok"].open(MODEL, OPTIONS) is engine
    with pytest.raises(AbiMismatch, match=r"^other version$"):
        found.engines()["abi"].open(MODEL, OPTIONS)
    with pytest.raises(PluginError, match="plugin a: engine bug: open raised ZeroDivisionError: oops"):
        found.engines()["bug"].open(MODEL, OPTIONS)
    with pytest.raises(PluginError, match="plugin a: engine wrong: open returned int"):
        found.engines()["wrong"].open(MODEL, OPTIONS)


# ---- context policies, graders, post-processors, commands, passes ------------------------------------------------------


CANDIDATES = [
    Candidate(Segment(i, "user", "abc", 0, 3, "message"), ((3 * i, 3 * i + 3),), 0, 0.5, why)
    for i, why in enumerate(((), (), ("newest part",)))
]


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([0, 1, 2], "kept 9 tokens where 6 are allowed"),
        ([0, 1], "dropped candidate 2, which is protected .newest part."),
        ([2, 0], "no rising indices of 3 candidates"),
        ([2, 2], "no rising indices of 3 candidates"),
        ([2, 3], "no rising indices of 3 candidates"),
        (["a", 2], "no rising indices of 3 candidates"),
        (None, "returned NoneType"),
    ],
    ids=repr,
)
def test_a_policy_is_held_to_its_rules(kept: Any, message: str) -> None:
    found = load(a=plugin(edge_rt_context_policies=lambda: [ContextPolicy("odd", lambda candidates, budget: kept)]))
    with pytest.raises(PluginError, match=f"plugin a: context policy odd.*{message}"):
        found.context_policy("odd").keep(CANDIDATES, 6)
    with pytest.raises(PluginError, match="no context policy named none, there is odd"):
        found.context_policy("none")


def test_a_policy_may_refuse() -> None:
    def keep(candidates: Any, budget: int) -> Any:
        raise ContextOverflow("too much", 9, budget)

    found = load(a=plugin(edge_rt_context_policies=lambda: [ContextPolicy("odd", keep)]))
    with pytest.raises(ContextOverflow, match=r"^too much$") as caught:
        found.context_policy("odd").keep(CANDIDATES, 6)
    assert (caught.value.needed, caught.value.available) == (9, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_raise(OSError("no lexicon")), "plugin a: making grader odd raised OSError: no lexicon"),
        (lambda weights: None, "plugin a: making grader odd returned NoneType"),
        (lambda weights: _raise(KeyError("x")), "plugin a: grader odd raised KeyError: 'x'"),
        (lambda weights: lambda segment: 0.5, "plugin a: grader odd returned float"),
        (lambda weights: lambda segment: Grade(1.5), "plugin a: grader odd gave the score 1.5; it must be from 0 to 1"),
        (lambda weights: lambda segment: Grade("high"), "plugin a: grader odd gave the score high; it must be from 0 to 1"),
        (lambda weights: lambda segment: Grade(float("nan")), "plugin a: grader odd gave the score nan; it must be from 0 to 1"),
    ],
)
def test_what_a_grader_does_wrong_names_its_plugin(make: Any, message: str) -> None:
    found = load(a=plugin(edge_rt_graders=lambda: [GraderFactory("odd", make)]))
    with pytest.raises(PluginError, match=message):
        found.grader("odd").start()(Segment(0, "user", "hi", 0, 2, "message"))
    with pytest.raises(PluginError, match="no grader named none, there is odd"):
        found.grader("none")


def test_a_graders_own_errors_go_through_unchanged() -> None:
    found = load(a=plugin(edge_rt_graders=lambda: [GraderFactory("odd", _raise(OptionError("no such file")))]))
    with pytest.raises(OptionError, match=r"^no such file$"):
        found.grader("odd").start()


def _embedder(made: Any, relevant: Any = 0.5) -> SimpleNamespace:
    embed = made if callable(made) else lambda texts: made
    return plugin(edge_rt_embedders=lambda: [Embedder("odd", embed, relevant)])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (_raise(OSError("no model")), "plugin a: embedder odd raised OSError: no model"),
        (None, r"plugin a: embedder odd returned an array \[\] where \[2, E\] is expected"),
        ([[1.0, 2.0]], r"plugin a: embedder odd returned an array \[1, 2\] where \[2, E\]"),
        ([1.0, 2.0], r"plugin a: embedder odd returned an array \[2\] where"),
        ([[], []], r"plugin a: embedder odd returned an array \[2, 0\] where"),
        ([[1.0], [1.0, 2.0]], "plugin a: embedder odd raised ValueError: .*inhomogeneous"),
        ([["a"], ["b"]], "plugin a: embedder odd raised ValueError: could not convert"),
        ([[1.0], [float("nan")]], "plugin a: embedder odd returned vectors that are not finite"),
        ([[1.0], [float("inf")]], "plugin a: embedder odd returned vectors that are not finite"),
    ],
)
def test_what_an_embedder_does_wrong_names_its_plugin(made: Any, message: str) -> None:
    with pytest.raises(PluginError, match=message):
        load(a=_embedder(made)).embedder("odd").start()(["x", "y"])


def test_an_embedders_vectors_have_one_width() -> None:
    embed = load(a=_embedder(lambda texts: [[1.0] * len(text) for text in texts])).embedder("odd").start()
    assert embed(["ab", "cd"]).shape == (2, 2)
    with pytest.raises(PluginError, match=r"plugin a: embedder odd returned an array \[1, 3\] where \[1, 2\] is expected"):
        embed(["abc"])


@pytest.mark.parametrize("relevant", [0, 1, -0.5, float("nan"), "high", None])
def test_what_an_embedder_calls_close_is_a_cosine(relevant: Any) -> None:
    with pytest.raises(PluginError, match=f"plugin a: embedder odd has {relevant} for relevant; it must be between 0 and 1"):
        _ = load(a=_embedder([[1.0]], relevant)).embedder("odd").relevant


def test_an_embedders_own_errors_go_through_unchanged() -> None:
    with pytest.raises(OptionError, match=r"^set EMBEDDING_MODEL$"):
        load(a=_embedder(_raise(OptionError("set EMBEDDING_MODEL")))).embedder("odd").start()(["x"])
    with pytest.raises(PluginError, match="no embedder named none, there is odd"):
        load(a=_embedder([])).embedder("none")


def _processor(feed: Any = None, flush: Any = None) -> Any:
    return SimpleNamespace(feed=feed or (lambda text: text.upper()), flush=flush or (lambda: "!"))


def post(make: Any, **more: Any) -> SimpleNamespace:
    return plugin(edge_rt_post_processors=lambda: [PostProcessorFactory("shout", lambda rules: make, **more)])


def test_a_post_processor_is_made_once_a_stream() -> None:
    found = load(a=post(_processor, description="LOUD", fails_closed=True))
    factory = found.post_processor("shout")
    assert (factory.plugin, factory.name, factory.description, factory.fails_closed) == ("a", "shout", "LOUD", True)
    make = factory.compile(Rules())
    one, other = make(), make()
    assert one is not other
    assert (one.feed("hi"), one.flush()) == ("HI", "!")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_raise(OSError("no dictionary")), "plugin a: making post-processor shout raised OSError: no dictionary"),
        (lambda: None, "plugin a: making post-processor shout returned NoneType"),
        (None, "plugin a: compiling the rules of post-processor shout returned NoneType"),
    ],
)
def test_what_making_a_post_processor_raises_names_its_plugin(make: Any, message: str) -> None:
    factory = load(a=post(make)).post_processor("shout")
    with pytest.raises(PluginError, match=message):
        factory.compile(Rules())()


def test_errors_in_rules_go_through_unchanged() -> None:
    def refuse(rules: Rules) -> Any:
        raise rules.error("no such language", "language")

    found = load(a=plugin(edge_rt_post_processors=lambda: [PostProcessorFactory("shout", refuse)]))
    with pytest.raises(RuleError, match=r"^no such language$"):
        found.post_processor("shout").compile(Rules())


def test_commands_of_a_plugin_that_fails_half_way_are_taken_back() -> None:
    import typer

    def good(app: Any) -> None:
        app.command("good")(lambda: None)

    def bad(app: Any) -> None:
        app.command("bad")(lambda: None)
        app.add_typer(typer.Typer(), name="group")
        raise RuntimeError("half-way")

    app = typer.Typer()
    found = load(a=plugin(edge_rt_cli_commands=good), b=plugin(edge_rt_cli_commands=bad))
    found.add_cli_commands(app)
    assert [command.name for command in app.registered_commands] == ["good"]
    assert app.registered_groups == []
    assert status(found, "b").reason.startswith("edge_rt_cli_commands raised RuntimeError: half-way")


def test_compiler_passes_are_fresh_each_time() -> None:
    found = load(a=plugin(edge_rt_compiler_passes=lambda: [object()]), b=plugin(edge_rt_compiler_passes=_raise(ValueError("no"))))
    first, second = found.compiler_passes(), found.compiler_passes()
    assert len(first) == len(second) == 1
    assert first[0] is not second[0]
    assert status(found, "b").state == "failed"


def test_warnings_go_to_one_logger(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "edge_rt.plugins"):
        load(a=plugin(), b=NullPlugin())
    assert [record.getMessage() for record in caplog.records] == ["plugin a: it implements no hook; going on without it"]


def test_registries_share_nothing() -> None:
    assert "null" in load(a=NullPlugin()).devices()
    assert "null" not in Registry.load(entry_points=False).devices()
    assert not [name for name, value in vars(registry).items() if isinstance(value, Registry)]
