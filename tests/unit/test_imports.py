"""What `import edge_rt`, and modules on the way to the first token, must not load. Who may import whom is in pyproject.toml."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
