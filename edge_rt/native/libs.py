"""Finds and loads the libllama and libggml that llama-cpp-python installs, and binds C functions on first use.

Importing this module, or a table of bindings made with it, loads nothing: a name is bound when it is first read.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from edge_rt.errors import NativeError

_NAMES = {
    "linux": ("libllama.so",),
    "darwin": ("libllama.dylib",),
    # Windows resolves a symbol only in the library that exports it.
    "win32": ("llama.dll", "ggml.dll", "ggml-base.dll", "ggml-cpu.dll"),
}


@lru_cache(maxsize=1)
def library_dir() -> Path:
    """Directory of the native libraries: ``$LLAMA_CPP_LIB_PATH``, else the one inside llama-cpp-python (which is not imported).

    Raises NativeError if llama-cpp-python is not installed.
    """
    if override := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(override)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise NativeError("llama-cpp-python is not installed; run `pip install llama-cpp-python==0.3.36`")
    return Path(next(iter(spec.submodule_search_locations))) / "lib"


def identity() -> str:
    """Tells one installed libllama from another without loading it: size and time of change; empty where there is none."""
    try:
        found = [os.stat(library_dir() / name) for name in _NAMES.get(sys.platform, _NAMES["linux"])]
    except (NativeError, OSError):  # whoever needs it will say so
        return ""
    return " ".join(f"{one.st_size}-{one.st_mtime_ns}" for one in found)


def built_backends() -> frozenset[str]:
    """ggml's backends that are installed, e.g. ``cpu`` and ``cuda``, told by their files' names: nothing is loaded."""
    try:
        names = os.listdir(library_dir())
    except (NativeError, OSError):  # whoever needs the library will say so
        return frozenset()
    stems = (name.split(".")[0].removeprefix("lib") for name in names)
    return frozenset(stem.removeprefix("ggml-") for stem in stems if stem.startswith("ggml-"))


@lru_cache(maxsize=1)
def libraries() -> tuple[ctypes.CDLL, ...]:
    """Load the libraries once.

    On Unix only libllama is opened: dlsym on its handle also searches what it depends on. Opening libggml by its own path
    could load a second copy, because wheels flatten the versioned symlinks into separate files.
    """
    names = _NAMES.get(sys.platform, _NAMES["linux"])
    directory = library_dir()
    try:
        return tuple(ctypes.CDLL(str(directory / name)) for name in names)
    except OSError as error:
        raise NativeError(f"cannot load {names[0]} from {directory}: {error}; reinstall llama-cpp-python") from error


def function(name: str, result: Any, *arguments: Any) -> Any:
    """Bind one exported C function. Raises NativeError if no library exports it."""
    for library in libraries():
        try:
            bound = library[name]  # a fresh object: library.name would share its argtypes with llama-cpp-python's own bindings
        except AttributeError:
            continue
        bound.restype = result
        bound.argtypes = list(arguments)
        return bound
    raise NativeError(f"the installed libllama does not export {name}; edge-rt was written for llama-cpp-python 0.3.36")


class Bindings:
    """A table of C prototypes; reading an attribute binds it.

    >>> c = Bindings("ggml_")
    >>> c.declare("mul_mat", P, P, P, P)     # then c.mul_mat(...) calls ggml_mul_mat
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._prototypes: dict[str, tuple[Any, ...]] = {}

    def declare(self, name: str, result: Any, *arguments: Any) -> None:
        """Note the prototype of ``prefix + name``."""
        self._prototypes[name] = (result, *arguments)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # Called only while the name is unbound: the bound function is then an ordinary attribute, at no cost per call.
        try:
            prototype = self._prototypes[name]
        except KeyError:
            raise AttributeError(f"no prototype declared for {self._prefix}{name}") from None
        bound = function(self._prefix + name, *prototype)
        setattr(self, name, bound)
        return bound  # type: ignore[no-any-return]
