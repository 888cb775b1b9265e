"""Every hook does what its documentation says, and the documentation is the one in the code."""

from __future__ import annotations

import inspect
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import pytest

from edge_rt import hooks
from edge_rt.errors import AbiMismatch
from edge_rt.hooks import (
    API_VERSION,
    Candidate,
    ContextPolicy,
    Device,
    Embedder,
    EngineFactory,
    EngineOptions,
    Grade,
    GraderFactory,
    HookSpecs,
    Offer,
    PostProcessor,
    PostProcessorFactory,
    Rules,
    Segment,
    hookimpl,
)
from edge_rt.plugin_host.registry import BUILT_INS, Registry
from edge_rt.testing.null_device import NullDevice, NullEngineFactory

ROOT = Path(__file__).parents[3]
HOOKS = [name for name in vars(HookSpecs) if name.startswith("edge_rt_")]
MODEL: Any = SimpleNamespace(path=Path("tiny.null"))


def load(**hooks_: Callable[..., Any]) -> Registry:
    """A registry with one plugin of the given hooks."""
    plugin = SimpleNamespace(EDGE_RT_API=API_VERSION, **{name: hookimpl(function) for name, function in hooks_.items()})
    return Registry.load(entry_points=False, disabled=BUILT_INS, plugins={"mine": plugin}, required=["mine"])


# ---- each hook, by its name ------------------------------------------------------------------------------------------


def test_edge_rt_devices() -> None:
    probed = []

    class Card:
        name = "card"

        def probe(self) -> Offer:
            probed.append(1)
            return Offer(20, "a card", 1 << 30)

    def edge_rt_devices() -> list[Device]:
        return [Card(), NullDevice()]

    found = load(edge_rt_devices=edge_rt_devices)
    assert isinstance(found.devices()["card"], Device)
    assert found.choose_device().device.name == found.choose_device("card").device.name == "card"
    assert probed == [1], "a device is probed at most once"


def test_edge_rt_engines() -> None:
    def edge_rt_engines() -> list[EngineFactory]:
        return [NullEngineFactory(), NullEngineFactory(name="other")]

    found = load(edge_rt_engines=edge_rt_engines)
    assert isinstance(found.engines()["null"], EngineFactory)
    choice = found.choose_engine(MODEL, EngineOptions())
    assert [factory.name for factory, _ in choice.candidates] == ["null", "other"]


def test_edge_rt_context_policies() -> None:
    def keep(candidates: Sequence[Candidate], budget: int) -> list[int]:
        return [i for i, candidate in enumerate(candidates) if candidate.protections]

    def edge_rt_context_policies() -> list[ContextPolicy]:
        return [ContextPolicy("least", keep)]

    segment = Segment(0, "user", "abc", 0, 3, "message")
    found = [Candidate(segment, ((0, 3),), 0, 0.5), Candidate(segment, ((3, 4), (6, 9)), 2, 0.5, ("newest part",))]
    assert load(edge_rt_context_policies=edge_rt_context_policies).context_policy("least").keep(found, 5) == [1]


def test_edge_rt_graders() -> None:
    made = []

    def make(weights: Path | None) -> Callable[[Segment], Grade]:
        made.append(weights)
        return lambda segment: Grade(1 / (1 + len(segment.text)))

    def edge_rt_graders() -> list[GraderFactory]:
        return [GraderFactory("short", make, "the shorter the better")]

    factory = load(edge_rt_graders=edge_rt_graders).grader("short")
    assert made == []
    assert factory.start(Path("w.ini"))(Segment(0, "user", "abc", 0, 3, "message")) == Grade(0.25)
    assert made == [Path("w.ini")]


def test_edge_rt_embedders() -> None:
    seen: list[Sequence[str]] = []

    def embed(texts: Sequence[str]) -> Any:
        seen.append(texts)
        return np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)

    def edge_rt_embedders() -> list[Embedder]:
        return [Embedder("tiny", embed, 0.4, "two numbers")]

    embedder = load(edge_rt_embedders=edge_rt_embedders).embedder("tiny")
    function = embedder.start()
    assert seen == []
    found = function(["a", ""])
    assert (embedder.relevant, embedder.description, seen) == (0.4, "two numbers", [["a", ""]])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_edge_rt_post_processors() -> None:
    made = []

    class Shout:
        def feed(self, text: str) -> str:
            return text.upper()

        def flush(self) -> str:
            return ""

    def compile_rules(rules: Rules) -> Callable[[], PostProcessor]:
        mark = rules.text("mark", "!")

        def make() -> PostProcessor:
            made.append(mark)
            return Shout()

        return make

    def edge_rt_post_processors() -> list[PostProcessorFactory]:
        return [PostProcessorFactory("shout", compile_rules, "LOUD")]

    make = load(edge_rt_post_processors=edge_rt_post_processors).post_processor("shout").compile(Rules({"mark": "?"}))
    assert made == []
    assert [make().feed("hi") for _ in range(2)] == ["HI", "HI"]
    assert made == ["?", "?"], "one instance a stream"


def test_edge_rt_cli_commands() -> None:
    import typer
    from typer.testing import CliRunner

    def edge_rt_cli_commands(app: Any) -> None:
        @app.command("greet")
        def greet() -> None:
            typer.echo("hello from a plugin")

        @app.command("other")
        def other() -> None:
            """Two commands make a group."""

    app = typer.Typer()
    load(edge_rt_cli_commands=edge_rt_cli_commands).add_cli_commands(app)
    result = CliRunner().invoke(app, ["greet"])
    assert (result.exit_code, result.output) == (0, "hello from a plugin\n")


def test_edge_rt_compiler_passes() -> None:
    def edge_rt_compiler_passes() -> list[Any]:
        return ["a pass"]

    assert load(edge_rt_compiler_passes=edge_rt_compiler_passes).compiler_passes() == ["a pass"]


def test_edge_rt_compiler_targets() -> None:
    def edge_rt_compiler_targets() -> list[Path]:
        return [Path("board.toml")]

    assert load(edge_rt_compiler_targets=edge_rt_compiler_targets).compiler_targets() == [Path("board.toml")]


def test_every_hook_has_a_test_here() -> None:
    assert HOOKS
    assert [name for name in HOOKS if f"test_{name}" not in globals()] == []


# ---- documentation ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "generate_hooks_doc.py"))


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "hooks.md").read_text(encoding="utf-8")


def test_the_page_is_current(generator: dict[str, Any], page: str) -> None:
    assert page == generator["document"](), "run `make docs`"


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_heading_and_its_exact_arguments(name: str, page: str) -> None:
    section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    arguments = [parameter for parameter in inspect.signature(getattr(HookSpecs, name)).parameters if parameter != "self"]
    signature = re.search(rf"^{name}\((.*)\) -> ", section, re.MULTILINE)
    assert signature
    assert [part.partition(":")[0] for part in signature[1].split(", ") if part] == arguments
    assert "Called " in section, "say when the hook is called, and how often"


def test_every_type_a_hook_uses_is_explained(page: str) -> None:
    types = [value for value in vars(hooks).values() if isinstance(value, type) and value.__module__ == hooks.__name__]
    assert Device in types
    assert [kind.__name__ for kind in types if kind is not HookSpecs and f"\n### {kind.__name__}\n" not in page] == []


ENGINES = (hooks.Engine, hooks.RemovesCells, hooks.MovesCells, hooks.PrunesCells, hooks.EmbedsTokens, hooks.AppliesAdapters, hooks.Logits)


@pytest.mark.parametrize("kind", ENGINES)
def test_every_method_an_engine_may_have_is_explained(kind: type, page: str) -> None:
    section = page.partition(f"\n### {kind.__name__}\n")[2].partition("\n#")[0]
    methods = {name: value for name, value in vars(kind).items() if getattr(value, "__module__", "") == kind.__module__ and callable(value)}
    assert methods
    for name, method in methods.items():
        (signature,) = re.findall(rf"^- `{name}\((.*)\) -> ", section, re.MULTILINE)
        for parameter in list(inspect.signature(method).parameters.values())[1:]:
            assert f"{parameter.name}: {parameter.annotation}" in signature
        assert (inspect.getdoc(method) or "").splitlines()[0].replace("``", "`") in section


def test_a_new_protocol_of_engines_gets_a_section_by_itself(generator: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_rt.core import engine

    class Dreams(Protocol):
        """Sequences that go on by themselves."""

        def dream(self, sequence: int) -> int:
            """How many tokens came of it."""
            ...

    Dreams.__module__ = Dreams.dream.__module__ = engine.__name__
    monkeypatch.setattr(engine, "Dreams", Dreams, raising=False)
    again = runpy.run_path(str(ROOT / "tools" / "generate_hooks_doc.py"))["document"]()
    assert "### Dreams" not in generator["document"]()
    assert "\n### Dreams\n\nSequences that go on by themselves.\n\n- `dream(sequence: int) -> int`\n" in again


def test_check_tells_an_old_page(tmp_path: Path) -> None:
    copy = tmp_path / "tools" / "generate_hooks_doc.py"
    copy.parent.mkdir()
    copy.write_text((ROOT / "tools" / "generate_hooks_doc.py").read_text())
    (tmp_path / "docs").mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, str(copy), *arguments], capture_output=True, text=True, check=False)

    assert run("--check").returncode == 1
    assert run().returncode == 0
    assert run("--check").returncode == 0
    (tmp_path / "docs" / "hooks.md").write_text("old")
    assert "run `make docs`" in run("--check").stderr


# ---- the module ------------------------------------------------------------------------------------------------------


def test_every_deferred_name_can_be_imported() -> None:
    source = inspect.getsource(hooks)
    names = re.findall(r"^    from \S+ import (\w+) as \1$", source, re.MULTILINE)
    assert {"ModelFile", "open_ggml_engine", "read_toml"} <= set(names)
    assert [name for name in names if getattr(hooks, name) is None] == []
    assert not any("_Name" in repr(value) for value in vars(hooks).values())


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = hooks.no_such_name


def test_errors_are_the_cores_own() -> None:
    assert hooks.AbiMismatch is AbiMismatch


def test_built_in_plugins_declare_the_current_version() -> None:
    from importlib import import_module

    assert {name: import_module(path).EDGE_RT_API for name, path in BUILT_INS.items()} == dict.fromkeys(BUILT_INS, API_VERSION)
