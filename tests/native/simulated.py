"""The simulated accelerator of sim/sim_backend.cpp: compiled once a run, loaded as ggml loads its own backends."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from edge_rt.native import libs

SOURCE = Path(__file__).parent / "sim" / "sim_backend.cpp"


def build_simulator(folder: Path) -> Path:
    """The dynamic library; skips the test where it cannot be made."""
    compiler, libraries = shutil.which("c++"), libs.library_dir()
    if compiler is None:
        pytest.skip("no C++ compiler: the simulated accelerator cannot be built")
    if not (libraries / "libggml-base.so.0").exists():
        pytest.skip("the simulated accelerator is linked with libggml-base.so.0, which is not there")
    made = folder / "libggml-sim.so"
    linked = ["-L", str(libraries), "-l:libggml-base.so.0", "-l:libggml-cpu.so.0"]
    # -Bsymbolic-functions: its ggml_backend_init must not be another's.
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", str(SOURCE)]
    subprocess.run([*command, *linked, "-Wl,-Bsymbolic-functions", "-o", str(made)], check=True, capture_output=True, text=True)
    return made
