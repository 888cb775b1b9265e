"""docs/plugins.md, tried as written: its files are installed, its tests run, its commands do what it says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import edge_rt
from edge_rt.cli.doctor import plugin_facts
from edge_rt.errors import RuleError
from edge_rt.plugin_host.registry import Registry
from edge_rt.postprocess.rules import Ruleset
from edge_rt.testing.conformance import EmbedderConformance
from edge_rt.types import Done

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"
_FILE = re.compile(r"^`(edge-rt-arrows/[^`]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMANDS = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def project(page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutorial's folder."""
    folder = tmp_path_factory.mktemp("tutorial")
    files = dict(_FILE.findall(page))
    assert sorted(Path(name).name for name in files) == ["edge_rt_arrows.py", "pyproject.toml", "test_edge_rt_arrows.py"]
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "edge-rt-arrows"


@pytest.fixture(scope="module")
def run(project: Path, tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Run:
    """Runs a command of the tutorial, with the plugin installed into a folder of its own and the default model at hand."""
    target = tmp_path_factory.mktemp("site")
    copy = tmp_path_factory.mktemp("build") / "edge-rt-arrows"  # building leaves files behind
    shutil.copytree(project, copy)
    # Without the network, what the tutorial has pip fetch (edge-rt, setuptools) is what runs this test.
    install = ["install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, timeout=120)
    programs = {"python": [sys.executable], "edge-rt": [sys.executable, "-m", "edge_rt.cli.main"]}

    def run(command: str, cwd: Path = project) -> subprocess.CompletedProcess[str]:
        program, *words = shlex.split(command)
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 240, "check": False}
        environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "utf-8"}
        return subprocess.run([*programs[program], *words], cwd=cwd, env=environment, **options)

    return run


@pytest.fixture(scope="module")
def commands(page: str) -> SimpleNamespace:
    """The tutorial's commands, by what they are for."""
    (block,) = _COMMANDS.findall(page)
    pip, test, plugins, answer = block.splitlines()
    assert pip == 'pip install -e . "edge-rt[dev]"'
    return SimpleNamespace(test=test, plugins=plugins, answer=answer)


def test_its_tests_pass(run: Run, commands: SimpleNamespace) -> None:
    done = run(commands.test)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b[1-9]\d* passed", done.stdout)


def test_its_tests_fail_without_the_line_it_names(run: Run, commands: SimpleNamespace, project: Path, tmp_path: Path) -> None:
    broken = tmp_path / "edge-rt-arrows"
    shutil.copytree(project, broken)
    module = broken / "edge_rt_arrows.py"
    lines = module.read_text(encoding="utf-8").splitlines(keepends=True)
    module.write_text("".join(line for line in lines if 'self.held = "-"' not in line), encoding="utf-8")
    done = run(f"{commands.test} -p no:cacheprovider", cwd=broken)
    assert done.returncode == 1
    assert "FAILED test_edge_rt_arrows.py::TestArrows::test_character_by_character" in done.stdout


def test_it_is_listed(run: Run, commands: SimpleNamespace) -> None:
    done = run(commands.plugins)
    assert done.returncode == 0
    row = next(line for line in done.stdout.splitlines() if line.startswith("arrows "))
    assert row.split() == ["arrows", "edge-rt-arrows", "0.1.0", "ok", "post-processor", "arrows"]


def test_it_changes_an_answer(run: Run, commands: SimpleNamespace, page: str) -> None:
    done = run(commands.answer)
    assert (done.returncode, done.stdout) == (0, "left → right\n"), done.stderr
    assert "the last prints `left → right`" in page


def test_the_registry_has_it(run: Run) -> None:
    code = (
        "from edge_rt.plugin_host.registry import Registry; from edge_rt.postprocess.rules import Ruleset; "
        "r = Registry.load(required=['arrows']); "
        "p = r.post_processor('arrows'); s = Ruleset({}, r).pipeline(['arrows']); "
        "print(p.plugin, p.description, s.feed('a -') + s.feed('> b') + s.flush(), sep='|')"
    )
    assert run(f'python -c "{code}"').stdout == "arrows|writes -> as an arrow|a → b\n"


def test_the_rules_on_the_page_are_as_it_says(page: str) -> None:
    (code,) = re.findall(r"^```python\n(from edge_rt.hooks import PostProcessorFactory(?:(?!```).)*rules\.text.*?)^```$", page, re.M | re.S)
    plugin = ModuleType("arrows")
    exec(code, vars(plugin))
    registry = Registry.load(entry_points=False, plugins={"mine": plugin})
    pipeline = Ruleset({"arrows": {"arrow": "⇒"}}, registry).pipeline()
    assert pipeline.feed("a -") + pipeline.feed("> b-") + pipeline.flush() == "a ⇒ b-"
    for wrong in ({"arrow": 3}, {"arow": "⇒"}, {"arrow": "===>"}):
        with pytest.raises(RuleError):
            Ruleset({"arrows": wrong}, registry)


def test_the_embedder_on_the_page_finds_a_fact_far_back(page: str, smollm2: Path) -> None:
    (code,) = re.findall(r"^```python\n(import zlib.*?)^```$", page, re.MULTILINE | re.DOTALL)
    plugin = ModuleType("word_parts")
    exec(code, vars(plugin))
    registry = Registry.load(entry_points=False, plugins={"mine": plugin})
    talk = [
        {"role": role, "content": f"{i}: {text}"}
        for i in range(12)
        for role, text in (("user", "What a nice day it is, I think I will go for a walk."), ("assistant", "That sounds lovely, enjoy it."))
    ]
    fact = [{"role": "user", "content": "The front door has the code 48213."}, {"role": "assistant", "content": "I will remember that."}]
    with edge_rt.open(smollm2, context=256, embedder="word-parts", registry=registry) as model, model.session() as session:
        for messages in (fact[:1], [*fact, *talk[:-1]]):
            *_, done = session.generate(messages, max_tokens=1, temperature=0)
        assert "48213" not in model.detokenize(session.tokens)
        question = {"role": "user", "content": "Which code do the doors at the front have?"}
        *_, done = session.generate([*fact, *talk, question], max_tokens=1, temperature=0)
        assert isinstance(done, Done)
        assert done.context.recalled_segments == 1
        assert "48213" in model.detokenize(session.tokens)
    assert plugin_facts(registry)["embedders"] == [{"name": "word-parts", "description": "parts of words in common"}]
    assert plugin_facts(registry)["plugins"][-1]["offers"] == ["embedder word-parts"]

    class TestWordParts(EmbedderConformance):
        examples = {"Which code do the doors at the front have?": (fact[0]["content"], talk[0]["content"])}  # noqa: RUF012

    for name in (name for name in dir(TestWordParts) if name.startswith("test_")):
        getattr(TestWordParts(), name)(registry.embedder("word-parts").embedder)


def test_the_other_python_on_the_page_runs(page: str) -> None:
    (code,) = re.findall(r"^```python\n(from edge_rt.plugin_host.registry .*?)^```$", page, re.MULTILINE | re.DOTALL)
    plugin: Any = SimpleNamespace(EDGE_RT_API=1)
    names: dict[str, Any] = {"my_plugin": plugin}
    exec(code, names)
    assert [status.name for status in names["registry"].plugins][-2:] == ["null", "mine"]
    assert "null" in names["registry"].engines()
