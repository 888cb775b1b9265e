"""Packed bytes of small samples: made on one processor by its library, held against NumPy's on another.

    python sample.py make OUT.json                           on a core: what its library packs
    python sample.py check SAMPLE.json                       anywhere: whether NumPy makes the same of it for such a core
    python sample.py record TARGET.json CORE=SAMPLE.json...  the samples of several cores together, as tests/fixtures/arm_packed.json

A sample's weights are random bytes that are the same everywhere, so only packed ones are kept. The exit status of ``check`` is 1 if any
differ.
"""

from __future__ import annotations

import base64
import json
import math
import random
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from edge_rt.core.gguf.reader import GGML_TYPES, TensorInfo
from edge_rt.core.weights import repack
from edge_rt.core.weights.repack import Entry, Packer, interleaver
from edge_rt.native import ggml, libs

_LONG = ("Q4_0", "Q8_0", "IQ4_NL", "MXFP4", "Q4_1")
_TYPES = (*_LONG, "Q1_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K")
_SHAPES = {name: [(64 if name in _LONG else 256, 8)] for name in _TYPES} | {"Q4_0": [(64, 8), (64, 12), (64, 6), (64, 8, 2)]}
_KINDS = ((256, 32), (256, 4))
"""Of which there are fingerprints, for every type."""
_NAMES = {"fp16_va": "fp16", "matmul_int8": "i8mm", "avx512": "avx512f"}
"""The library's names of features that have others in hardware/topology.py."""


def features() -> tuple[str, ...]:
    """What the library was built for and this processor has, in the names of hardware/topology.py, and how long its vectors are."""
    found = [_NAMES.get(name, name) for name in ggml.ggml_features()]
    length = ggml.ggml_vector_length()
    return (*found, f"sve{8 * length}") if "sve" in found else tuple(found)


def packed(packer: Packer) -> dict[str, bytes]:
    """``TYPE SHAPE`` -> the packed bytes of such a sample, for those that the packer packs."""
    infos = [_info(name, shape) for name, shapes in _SHAPES.items() for shape in shapes]
    kernels = packer.kernels({info.name: info for info in infos})
    found = {}
    for info in infos:
        if info.name in kernels:
            layout, nbytes = kernels[info.name]
            data = random.Random(info.name).randbytes(info.nbytes)
            found[info.name.removesuffix(".weight")] = bytes(packer.pack(Entry(info.name, info.type, info.shape, 0, nbytes, layout), data))
    return found


def fingerprints(packer: Packer) -> list[str]:
    """Of a model with each kind of weight: what a packed file beside a model is known by."""
    infos = [_info(name, shape) for name in _TYPES for shape in _KINDS]
    return list(repack.fingerprints(SimpleNamespace(tensors={info.name: info for info in infos}), packer=packer))  # type: ignore[arg-type]


def _info(name: str, shape: tuple[int, ...]) -> TensorInfo:
    number, elements, size = next((number, elements, size) for number, (known, elements, size) in GGML_TYPES.items() if known == name)
    called = f"{name} {'x'.join(map(str, shape))}.weight"
    return TensorInfo(called, shape, number, name, 0, math.prod(shape) // elements * size)


def make() -> dict[str, Any]:
    """What this processor's library packs, and in which features it differs from others."""
    libs.install_native_log()
    library = repack.library()
    encoded = {name: base64.b64encode(data).decode() for name, data in packed(library).items()}
    return {"features": features(), "packed": encoded, "fingerprints": fingerprints(library)}


def differing(sample: Mapping[str, Any]) -> list[str]:
    """What NumPy packs otherwise than a sample's processor did, or one of both not at all."""
    packer = interleaver(sample["features"])
    theirs = {name: base64.b64decode(data) for name, data in sample["packed"].items()}
    ours = packed(packer)
    prints = set(sample["fingerprints"]) ^ set(fingerprints(packer))
    return sorted({name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)} | prints)


def check(path: str) -> int:
    """Print the verdict."""
    sample = json.loads(Path(path).read_text(encoding="utf-8"))
    unequal = differing(sample)
    count = f"{len(sample['packed'])} samples and {len(sample['fingerprints'])} fingerprints"
    print(f"  NumPy's packed bytes against the core's, {count}: {'DIFFER: ' + ', '.join(unequal) if unequal else 'all equal'}")
    return 1 if unequal else 0


def record(target: str, *samples: str) -> int:
    """Several cores' samples in one file; bytes that are equal lie there once, by their CRC-32."""
    kept: dict[str, str] = {}
    cores = {}
    for core, _, path in (one.partition("=") for one in samples):
        sample = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, data in sample["packed"].items():
            key = f"{zlib.crc32(base64.b64decode(data)):08x}"
            kept[key], sample["packed"][name] = data, key
        cores[core] = sample
    made = "by tools/test_arm.sh: packed by libggml (llama-cpp-python 0.3.36) on cores that qemu-user emulated, one name for core and build"
    text = json.dumps({"made": made, "cores": cores, "bytes": kept}, indent=1)
    Path(target).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    task, *arguments = sys.argv[1:]
    if task == "make":
        Path(arguments[0]).write_text(json.dumps(make()), encoding="utf-8")
    else:
        sys.exit({"check": check, "record": record}[task](*arguments))
