"""A report of a bug: what a developer needs, and nothing of what the user typed."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from pathlib import Path

from edge_rt.config import cache_dir


def write_report(error: BaseException, command: str) -> str:
    """Write a report file and return the sentence that says where it is (or carries the report, where no file can be written)."""
    text = _text(error, command)
    name = f"edge-rt-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    problems = []
    for folder in (cache_dir() / "reports", Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        except OSError as problem:
            problems.append(f"{folder}: {problem.strerror}")
        else:
            return f"This is a bug in edge-rt or in a library it uses. A report is in {folder / name}"
    return f"This is a bug in edge-rt or in a library it uses. No report could be written ({'; '.join(problems)}):\n{text}"


def _text(error: BaseException, command: str) -> str:
    facts = {**versions(), "command": command or "(none of edge-rt's own)"}
    head = "".join(f"{name}: {value}\n" for name, value in facts.items())
    return f"{head}\n{''.join(traceback.format_exception(error))}"


def versions() -> dict[str, str]:
    """What runs here, by name. Loads no native library."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from edge_rt import __version__

    found = {"edge-rt": __version__, "Python": platform.python_version(), "platform": platform.platform()}
    for package in ("llama-cpp-python", "gguf", "numpy", "pluggy", "typer"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
