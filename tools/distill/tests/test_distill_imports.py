"""What this distribution imports of edge-rt, how long its files and functions are, what listing its commands loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "edge_rt_distill"
MAX_FILE, MAX_FUNCTION = 400, 60
LATER = ("torch", "numpy", "matplotlib", "gguf", "safetensors", "httpx2")
"""What takes long to import, and no list of commands needs."""


@cache
def trees() -> list[tuple[str, str, ast.Module]]:
    texts = [(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in sorted(ROOT.rglob("*.py"))]
    return [(name, text, ast.parse(text)) for name, text in texts]


def modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield node.module or ""


def test_of_edge_rt_only_hooks_and_open_are_imported():
    found = [(name, module) for name, _, tree in trees() for module in modules(tree) if module.split(".")[0] == "edge_rt"]
    assert len(found) > 20
    assert [one for one in found if one[1] not in ("edge_rt", "edge_rt.hooks")] == []


def test_files_and_functions_stay_short():
    long = []
    for name, text, tree in trees():
        if text.count("\n") > MAX_FILE:
            long.append(f"{name}: {text.count(chr(10))} lines")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[min(1, len(node.body) - 1)] if ast.get_docstring(node) else node.body[0]
                if (node.end_lineno or 0) - first.lineno + 1 > MAX_FUNCTION:
                    long.append(f"{name}:{node.name}")
    assert long == []


ORDER = (
    "files", "metadata", "progress", "named", "addresses", "asking", "plots", "pages", "model", "portable", "data", "behaviour", "library",
    "diagnose", "surgery", "losses", "stages", "evaluate", "quantise", "export", "compensate", "run", "sandbox", "replay", "feedback",
    "cli",
)  # fmt: skip
"""A folder or module imports those before it."""


def test_imports_go_one_way():
    wrong = []
    for name, _, tree in trees():
        place = name.split("/")[0].removesuffix(".py")
        if place == "__init__":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edge_rt_distill"):
                parts = (node.module or "").split(".")
                used = parts[1:2] or [alias.name for alias in node.names]
                wrong += [(name, one) for one in used if ORDER.index(one) > ORDER.index(place)]
    assert wrong == []


def test_listing_the_commands_loads_nothing_heavy():
    script = "import sys, edge_rt_distill.cli\nprint([name for name in sys.argv[1:] if name in sys.modules])"
    path = [str(ROOT.parent), *sys.path]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{script}", *LATER], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
