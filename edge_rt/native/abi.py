"""Is the installed libggml the one these bindings were written for? Checked once, before anything else is called."""

from __future__ import annotations

import ctypes as C
from functools import lru_cache
from typing import NamedTuple

from edge_rt.errors import AbiMismatch, NativeError
from edge_rt.native import ggml, libs

KNOWN_VERSIONS = ("0.25.3",)
"""ggml versions whose prototypes were compared with these bindings (0.25.3: llama-cpp-python 0.3.36)."""

_OBJECT_SIZE = 32  # sizeof(struct ggml_object), part of ggml_tensor_overhead()


class AbiReport(NamedTuple):
    """What was found. ``problem`` is None when the graph engine may run."""

    library: str
    ggml_version: str
    ggml_commit: str
    cpu_features: tuple[str, ...]
    problem: str | None


@lru_cache(maxsize=1)
def check() -> None:
    """Raise AbiMismatch unless version, struct sizes and field offsets are as expected. Costs well under a millisecond."""
    version = ggml.c.version().decode()
    if version not in KNOWN_VERSIONS:
        raise AbiMismatch(
            f"libggml is version {version}, edge-rt knows {', '.join(KNOWN_VERSIONS)}; install llama-cpp-python==0.3.36"
            " or go on with the llama_cpp engine"
        )
    if problem := _struct_problem():
        raise AbiMismatch(f"libggml {version} has another memory layout than edge-rt expects ({problem}); reinstall llama-cpp-python")


def _struct_problem() -> str | None:
    """Compare ggml_tensor as bound here with tensors the library makes."""
    expected = C.sizeof(ggml.TensorStruct) + _OBJECT_SIZE
    if (found := ggml.c.tensor_overhead()) != expected:
        return f"ggml_tensor_overhead() is {found}, not {expected}"
    ctx = ggml.context(8)
    try:
        tensor = ggml.new_tensor(ctx.address, ggml.TYPE_F16, (64, 3, 5, 7))
        ggml.c.set_name(tensor, b"probe")
        norm = ggml.c.rms_norm(ctx.address, ggml.c.new_tensor_2d(ctx.address, ggml.TYPE_F32, 32, 2), 0.5)
        seen, result = ggml.fields(tensor), ggml.fields(norm)
        checks = {
            "type": seen.type == ggml.TYPE_F16,
            "ne": list(seen.ne) == [64, 3, 5, 7],
            "nb": list(seen.nb) == [2, 128, 384, 1920],
            "name": seen.name == b"probe",
            "data": not seen.data and not seen.extra and not seen.buffer,
            "src": bool(result.src[0]) and not result.src[1],
            "op_params": C.cast(result.op_params, C.POINTER(C.c_float))[0] == 0.5,
        }
        return next((name for name, good in checks.items() if not good), None)
    finally:
        ctx.close()


def report() -> AbiReport:
    """Everything `edge-rt doctor` shows of the native library. Never raises."""
    try:
        library = str(libs.library_dir())
        version, commit = ggml.c.version().decode(), ggml.c.commit().decode()
        features = ggml.ggml_features()
    except NativeError as error:
        return AbiReport("", "", "", (), str(error))
    try:
        check()
    except AbiMismatch as error:
        return AbiReport(library, version, commit, features, str(error))
    return AbiReport(library, version, commit, features, None)
