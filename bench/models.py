"""The models measured: SmolLM2 in several types, made from the catalogue's file, and a random one of more than a gigabyte."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.results import Settings
from edge_rt import config, model_hub
from edge_rt.core.gguf.model_file import ModelFile

_FILE_TYPES = {"F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K_M": 15}  # enum llama_ftype

LARGE = {"n_layer": 32, "n_embd": 2560, "n_head": 20, "n_head_kv": 4, "head_dim": 128, "n_ff": 6912, "n_vocab": 49152}
"""2.3 billion weights, 1.3 GB as Q4_0."""
SMALL = {"n_layer": 12, "n_embd": 512, "n_head": 8, "n_head_kv": 2, "head_dim": 64, "n_ff": 2048, "n_vocab": 8192}


def smollm2(settings: Settings, kind: str, *, keep_embedding: bool = False) -> Path:
    """SmolLM2-135M-Instruct as llama.cpp's quantiser makes it of the Q4_1 file; made once and kept in the cache.

    ``keep_embedding``: it is F16, instead of what goes with the type. Raises DownloadError, RuntimeError.
    """
    source = settings.model or model_hub.fetch_model(model_hub.DEFAULT)
    if kind == "Q4_1":
        return source
    with ModelFile.open(source) as file:
        key = zlib.crc32(file.key().encode())
    name = f"smollm2-{key:08x}-{kind}{'-embedding-F16' if keep_embedding else ''}.gguf"
    return made_once(folder() / name, lambda path: _quantise(source, path, kind, settings.threads, keep_embedding))


def without_layer(settings: Settings, kind: str, layer: int) -> Path:
    """The same with all weights of a layer zero, which then adds nothing; made once and kept in the cache."""
    source = smollm2(settings, kind)

    def write(path: Path) -> None:
        shutil.copyfile(source, path)
        with ModelFile.open(source) as file, open(path, "r+b") as copy:
            for one in file.header.tensors.values():
                if one.name.startswith(f"blk.{layer}."):
                    copy.seek(one.offset)
                    copy.write(bytes(one.nbytes))

    return made_once(source.with_name(f"{source.stem}-without-{layer}.gguf"), write)


def large(settings: Settings) -> Path:
    """A random llama in Q4_0: 1.3 GB (quick: 25 MB)."""
    return random("Q4_0", settings.pick(LARGE, SMALL))


def quantised(source: Path, kind: str, threads: int) -> Path:
    """Another type of a file, as llama.cpp's quantiser makes it; made once, beside the file. Raises RuntimeError."""
    return made_once(source.with_name(f"{source.stem}-{kind}.gguf"), lambda path: _quantise(source, path, kind, threads, False))


def random(kind: str, measures: Mapping[str, int]) -> Path:
    """A random llama of a type and of measures that ``write_random_model`` takes. Random weights cost what real ones cost."""
    from edge_rt.testing.random_models import write_random_model

    name = "-".join(str(value) for value in measures.values())

    def write(path: Path) -> None:
        write_random_model(path, "llama", type=kind, context=4096, **measures)  # type: ignore[arg-type]

    return made_once(folder() / (f"random-{name}.gguf" if kind == "Q4_0" else f"random-{name}-{kind}.gguf"), write)


def packed(path: Path) -> Path:
    """The packed file of a model, made if need be. Raises RuntimeError where the CPU has no packed kernels."""
    from edge_rt.core.weights.repack import open_packed
    from edge_rt.native import llama

    llama.initialise()  # libggml's log goes to logging; without this it prints a line for every tensor packed
    with ModelFile.open(path) as file:
        found, notice = open_packed(file)
        if found is None:
            raise RuntimeError(f"there are no packed weights for {path.name}: {notice or 'this CPU has no kernels for them'}")
        where = found.path
        found.close()
    return where


def folder() -> Path:
    folder = config.cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Make a file beside its name, put it on disk (pages not yet written cannot be dropped from memory) and rename it."""
    if target.exists():
        return target
    part = target.with_suffix(".part")
    try:
        make(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        shutil.move(part, target)
    finally:
        part.unlink(missing_ok=True)
    return target


def _quantise(source: Path, target: Path, kind: str, threads: int, keep_embedding: bool) -> None:
    import ctypes

    from llama_cpp import llama_cpp

    from bench.contenders import silence_libllama

    silence_libllama()  # it tells of every tensor
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.nthread = _FILE_TYPES[kind], True, threads
    if keep_embedding:  # it is the output too
        params.token_embedding_type = params.output_tensor_type = llama_cpp.GGML_TYPE_F16
    status = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"libllama could not make {kind} from {source} (status {status})")
