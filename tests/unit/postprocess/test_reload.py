"""A plugin's code imported anew, under streams that go on with the old."""

import sys
import threading
from types import SimpleNamespace

import pytest

from edge_rt.errors import PluginError
from edge_rt.hooks import hookimpl
from edge_rt.plugin_host.registry import Registry
from edge_rt.postprocess.rules import RuleFile, Ruleset

CODE = """
from edge_rt.hooks import PostProcessorFactory, hookimpl
from plugin_pair.helper import change

EDGE_RT_API = 1

class Change:
    def feed(self, text): return change(text)
    def flush(self): return ""

@hookimpl
def edge_rt_post_processors():
    return [PostProcessorFactory("change", lambda rules: Change, {description!r})]
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed distribution whose plugin is a package of two modules."""
    monkeypatch.syspath_prepend(tmp_path)
    info = tmp_path / "pair-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pair\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[edge_rt]\npair = plugin_pair.main\n")
    folder = tmp_path / "plugin_pair"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "main.py").write_text(CODE.format(description="one"))
    (folder / "helper.py").write_text("def change(text): return text.upper()\n")
    yield folder
    for name in [name for name in sys.modules if name.startswith("plugin_pair")]:
        del sys.modules[name]


def said(ruleset):
    pipeline = ruleset.pipeline(["change"])
    return pipeline.feed("Ab") + pipeline.flush()


def test_new_code_is_used_from_then_on(package):
    registry = Registry.load()
    rules = Ruleset({}, registry)
    stream = rules.pipeline(["change"])
    assert (stream.feed("Ab"), registry.post_processor("change").description) == ("AB", "one")
    (package / "helper.py").write_text("def change(text): return text.lower()\n")  # of the same size, in the same second
    (package / "main.py").write_text(CODE.format(description="two"))
    registry.reload("pair")
    assert (said(Ruleset({}, registry)), registry.post_processor("change").description) == ("ab", "two")
    assert (stream.feed("Ab"), registry.generation) == ("AB", 1)


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("helper", "def change(:\n", "SyntaxError"),
        ("helper", "raise OSError('no dictionary')\n", "no dictionary"),
        ("main", CODE.replace("EDGE_RT_API = 1", "EDGE_RT_API = 9"), "was written for plugin API 9"),
        ("main", CODE.replace("def edge_rt_post_processors", "def edge_rt_post_procesors"), "did you mean edge_rt_post_processors"),
    ],
)
def test_code_that_does_not_work_changes_nothing(package, module, code, message):
    registry = Registry.load()
    assert said(Ruleset({}, registry)) == "AB"
    good = (package / f"{module}.py").read_text()
    old = sys.modules["plugin_pair.main"]
    (package / f"{module}.py").write_text(code.replace("{description!r}", "'x'"))
    with pytest.raises(PluginError, match=f"plugin pair goes on with its old code: .*{message}"):
        registry.reload("pair")
    assert (said(Ruleset({}, registry)), registry.generation, sys.modules["plugin_pair.main"] is old) == ("AB", 0, True)
    (package / f"{module}.py").write_text(good)
    registry.reload("pair")
    assert said(Ruleset({}, registry)) == "AB"


def test_a_plugin_that_failed_can_be_mended_and_reloaded(package):
    (package / "helper.py").write_text("raise OSError\n")
    registry = Registry.load()
    with pytest.raises(PluginError, match="no post-processor named change"):
        registry.post_processor("change")
    (package / "helper.py").write_text("def change(text): return text * 2\n")
    registry.reload("pair")
    assert said(Ruleset({}, registry)) == "AbAb"


def test_rules_are_compiled_again_with_the_new_code(package, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text("[change]\n")
    registry = Registry.load()
    book = RuleFile(path, registry, watch=False)
    (package / "helper.py").write_text("def change(text): return text.lower()\n")
    registry.reload("pair")
    assert (said(book.current), book.check(), said(book.current), book.exchanged, book.check()) == ("AB", True, "ab", 1, False)


def test_who_asks_while_code_is_reloaded_gets_the_old_or_the_new_and_afterwards_the_new(package):
    """A hook of another plugin is slow: what was collected before the reload must not be kept after it."""
    asked, go_on = threading.Event(), threading.Event()

    @hookimpl
    def edge_rt_post_processors():
        asked.set()
        assert go_on.wait(20)
        return []

    registry = Registry.load(plugins={"slow": SimpleNamespace(EDGE_RT_API=1, edge_rt_post_processors=edge_rt_post_processors)})
    asking = threading.Thread(target=registry.post_processors)
    asking.start()
    assert asked.wait(20)
    (package / "main.py").write_text(CODE.format(description="new"))
    reloading = threading.Thread(target=registry.reload, args=("pair",))
    reloading.start()
    reloading.join(0.3)
    go_on.set()
    asking.join()
    reloading.join()
    assert (registry.generation, registry.post_processor("change").description) == (1, "new")


def test_only_installed_plugins_can_be_reloaded():
    registry = Registry.load(entry_points=False, disabled=["ggml"])
    for name in ("none", "ggml"):
        with pytest.raises(PluginError, match=f"no plugin named {name} can be reloaded"):
            registry.reload(name)
    device = registry.devices()["cpu"].device
    registry.reload("cpu")
    assert type(registry.devices()["cpu"].device) is not type(device)
