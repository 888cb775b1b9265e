"""Finds and loads the libllama and libggml that llama-cpp-python installs, binds C functions on first use, and takes their log lines."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_rt.errors import NativeError

if TYPE_CHECKING:
    import logging

# Finds and loads the libllama and libggml that llama-cpp-python installs, and binds C functions on first use.
#
# Importing this module, or a table of bindings made with it, loads nothing: a name is bound when it is first read.

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


def ggml_backends() -> frozenset[str]:
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


# Log lines of libggml and libllama go to the logger ``edge_rt.native``; the latest errors can be asked for.
#
# Both libraries print to stderr unless told otherwise, and share one callback per process. It is called on whatever thread the
# library runs on, sometimes with a piece of a line at a time.
#
# A Python callback takes the GIL for every line. Opening a vocabulary writes some eighty, and beside a busy main thread each waits
# for it: 276 ms instead of 85 ms (measured, SmolLM2). ``muted`` swaps in a C function that drops them.

_P = ctypes.c_void_p
c = Bindings("llama_")
# typedef void (*ggml_log_callback)(enum ggml_log_level level, const char * text, void * user_data);
_Callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, _P)
# void llama_log_set(ggml_log_callback log_callback, void * user_data);  sets libggml's callback too
c.declare("log_set", None, _P, _P)

# enum ggml_log_level { NONE = 0, DEBUG = 1, INFO = 2, WARN = 3, ERROR = 4, CONT = 5 };  CONT goes on with the line before
_DEBUG, _INFO, _WARNING, _ERROR = 10, 20, 30, 40  # those of logging, which costs 5 ms to import: not before there is a line
_LEVELS = {0: _INFO, 1: _DEBUG, 2: _INFO, 3: _WARNING, 4: _ERROR}

_recent: deque[str] = deque(maxlen=32)


class _Partial(threading.local):
    """What one thread has logged of a line so far, and who on that thread is listening for errors."""

    def __init__(self) -> None:
        self.text = ""
        self.level = _INFO
        self.listeners: list[list[str]] = []


_partial = _Partial()


@lru_cache(maxsize=1)
def logger() -> logging.Logger:
    """The logger ``edge_rt.native``."""
    import logging

    found = logging.getLogger("edge_rt.native")
    found.addHandler(logging.NullHandler())  # without it, logging prints warnings to stderr in a program that configured nothing
    return found


def _emit(text: str, level: int) -> None:
    """Hand one whole line on."""
    text = text.rstrip()
    if not text:
        return
    if level >= _ERROR:
        _recent.append(text)
        for listener in _partial.listeners:
            listener.append(text)
    if level < _ERROR and "logging" not in sys.modules:
        return  # nobody can be listening, and loading logging costs start-up time
    logger().log(level, "%s", text)


def _on_log(native_level: int, text: bytes | None, _user_data: int | None) -> None:
    """The callback: join pieces to lines and pass each on."""
    if native_level in _LEVELS:  # not a continuation
        if _partial.text:
            _emit(_partial.text, _partial.level)
            _partial.text = ""
        _partial.level = _LEVELS[native_level]
    *lines, _partial.text = (_partial.text + (text or b"").decode("utf-8", "replace")).split("\n")
    for line in lines:
        _emit(line, _partial.level)


_callback = _Callback(_on_log)  # kept for the life of the process: the libraries hold its address


def install_native_log() -> None:
    """Send native log lines to ``logging``. Call it again after importing llama_cpp, which puts its own callback in."""
    c.log_set(ctypes.cast(_callback, _P), None)


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Drop native log lines, of every thread, without taking the GIL, unless the logger wants INFO.

    The libraries have no level to set and offer no C function for this, so llama_max_devices stands in: it takes no argument,
    touches nothing and returns a constant, and C calling conventions let a callee ignore what it is passed.
    Errors are lost meanwhile: a caller that sees a failure repeats the call unmuted, to learn why.
    """
    if "logging" in sys.modules and logger().isEnabledFor(_INFO):
        yield
        return
    c.log_set(ctypes.cast(libraries()[0]["llama_max_devices"], _P), None)
    try:
        yield
    finally:
        install_native_log()


def recent_native_errors() -> tuple[str, ...]:
    """The latest error lines of any thread, oldest first, at most 32."""
    return tuple(_recent)


@contextlib.contextmanager
def collect_errors() -> Iterator[list[str]]:
    """The error lines that calls made on this thread write while the block runs."""
    lines: list[str] = []
    _partial.listeners.append(lines)
    try:
        yield lines
    finally:
        if _partial.text:  # a last line without its newline
            _emit(_partial.text, _partial.level)
            _partial.text = ""
        _partial.listeners.pop()  # blocks on one thread end in the reverse order
