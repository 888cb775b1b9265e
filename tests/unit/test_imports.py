"""Who may import whom, and what `import edge_rt` must not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "edge_rt"


@dataclass(frozen=True)
class Import:
    """``module`` is imported by ``file``; ``at_runtime`` is false under ``if TYPE_CHECKING``."""

    file: str
    module: str
    at_runtime: bool


def files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders or ("",) for path in _python(ROOT / folder))


def _python(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imports(path: Path) -> Iterator[Import]:
    """Every module a file imports, wherever in it, ``from package import module`` included."""
    file = path.relative_to(ROOT).as_posix()
    package = ("edge_rt", *path.relative_to(ROOT).parts[:-1])

    def walk(node: ast.AST, at_runtime: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(file, alias.name, at_runtime) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield Import(file, module, at_runtime)
            yield from (Import(file, f"{module}.{alias.name}", at_runtime) for alias in node.names if _is_module(f"{module}.{alias.name}"))
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for child in node.body:
                yield from walk(child, False)
            for child in node.orelse:
                yield from walk(child, at_runtime)
        else:
            for child in ast.iter_child_nodes(node):
                yield from walk(child, at_runtime)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), True)


def _is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.is_dir()


def ours(*folders: str) -> Iterator[Import]:
    """Imports of edge_rt's own modules by files of the given folders."""
    return (one for path in files(*folders) for one in imports(path) if one.module == "edge_rt" or one.module.startswith("edge_rt."))


def within(module: str, *packages: str) -> bool:
    """Is the module one of the packages under edge_rt, or in one?"""
    return any(module == f"edge_rt.{package}" or module.startswith(f"edge_rt.{package}.") for package in packages)


def test_the_reader_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path / "edge_rt")
    file = tmp_path / "edge_rt" / "core" / "x.py"
    file.parent.mkdir(parents=True)
    (tmp_path / "edge_rt" / "cli.py").touch()
    file.write_text(
        "import ctypes.util as u\nfrom edge_rt import cli\nfrom . import y\nfrom ..z import w\n"
        "if TYPE_CHECKING:\n    import a\nelse:\n    import b\ndef f():\n    try:\n        import c\n    except E: pass\n"
    )
    found = {(one.module, one.at_runtime) for one in imports(file)}
    expected = {"ctypes.util", "edge_rt", "edge_rt.cli", "edge_rt.core", "edge_rt.z", "b", "c"}
    assert found == {(module, True) for module in expected} | {("a", False)}


# ---- who imports whom ------------------------------------------------------------------------------------------------


def test_ctypes_is_used_in_native_alone() -> None:
    users = {one.file for path in files() for one in imports(path) if one.module.split(".")[0] in ("ctypes", "_ctypes", "cffi")}
    assert users, "the reader has found no import of ctypes at all"
    assert [file for file in users if not file.startswith("native/")] == []


def test_native_imports_nothing_of_ours_but_errors() -> None:
    assert [one for one in ours("native") if not within(one.module, "native", "errors") and one.module != "edge_rt"] == []


def test_core_imports_nothing_above_it() -> None:
    above = ("plugins", "cli", "daemon", "compiler", "testing", "model", "session", "plugin_host")
    assert [one for one in ours("core") if within(one.module, *above)] == []
    # The vocabulary of plugins is made of core's types, so core may name it for type checkers alone.
    assert [one for one in ours("core") if within(one.module, "hooks") and one.at_runtime] == []


def test_plugins_import_only_hooks() -> None:
    """And the files of a plugin each other."""
    wrong = []
    for one in ours("plugins"):
        plugin = one.file.split("/")[1].removesuffix(".py")
        if not within(one.module, "hooks", f"plugins.{plugin}") and one.module != "edge_rt":
            wrong.append(one)
    assert wrong == []


def test_plugins_of_other_distributions_import_only_hooks() -> None:
    found = set()
    for path in sorted((ROOT.parent / "plugins").glob("*/edge_rt_*/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {(path.name, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module == "edge_rt":
                found |= {(path.name, f"edge_rt.{alias.name}") for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add((path.name, node.module or ""))
    ours = {(file, module) for file, module in found if module == "edge_rt" or module.startswith("edge_rt.")}
    assert {module for _, module in ours} == {"edge_rt.hooks"}, ours


def test_the_runtime_knows_nothing_of_its_users() -> None:
    below = [
        "model.py",
        "session.py",
        "hooks.py",
        "config.py",
        "errors.py",
        "types.py",
        "plugin_host",
        "postprocess",
        "chat",
        "structured",
        "power",
    ]
    assert [one for one in ours(*below) if within(one.module, "cli", "daemon", "compiler", "testing", "plugins")] == []


def test_nothing_but_tests_imports_the_testing_package() -> None:
    assert [one for path in files() for one in imports(path) if within(one.module, "testing") and not one.file.startswith("testing/")] == []


# ---- what an import loads --------------------------------------------------------------------------------------------

_NATIVE = ("ctypes", "llama_cpp")
_HEAVY = (*_NATIVE, "numpy", "gguf", "jinja2", "typer", "rich", "psutil", "asyncio", "hypothesis", "importlib.metadata")
_ON_THE_WAY = ("edge_rt.hooks", "edge_rt.plugin_host.registry", "edge_rt.plugins.cpu", "edge_rt.plugins.llama_cpp", "edge_rt.config")


def loaded_by(code: str) -> set[str]:
    """Modules that a fresh interpreter has after running some code and had not before (site-packages' .pth files load some)."""
    script = f"import sys\nbefore = set(sys.modules)\n{code}\nprint('\\n'.join(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_loads_next_to_nothing() -> None:
    loaded = loaded_by("import edge_rt")
    assert [name for name in loaded if name.startswith("edge_rt")] == ["edge_rt"]
    assert [name for name in (*_HEAVY, "pluggy") if name in loaded] == []
    # A count and not a time: the same on a busy machine. 6 with Python 3.11, all of the standard library.
    assert len(loaded) < 30


def test_importing_the_package_maps_no_native_library() -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says what is mapped")
    code = "import sys\nimport edge_rt\nprint(open('/proc/self/maps').read())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "libllama" not in result.stdout
    assert "libggml" not in result.stdout


@pytest.mark.parametrize("module", _ON_THE_WAY)
def test_modules_on_the_way_to_the_first_token_load_nothing_heavy(module: str) -> None:
    loaded = loaded_by(f"import {module}")
    assert module in loaded
    assert [name for name in _HEAVY if name in loaded] == []


def test_choosing_a_device_needs_neither_numpy_nor_the_native_library() -> None:
    code = "from edge_rt.plugin_host.registry import Registry\nRegistry.load(entry_points=True, disabled=['ggml']).choose_device()"
    loaded = loaded_by(code)
    assert "edge_rt.plugins.cpu" in loaded
    assert [name for name in _HEAVY if name in loaded] == []
