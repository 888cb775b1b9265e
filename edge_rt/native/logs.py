"""Log lines of libggml and libllama go to the logger ``edge_rt.native``; the latest errors can be asked for.

Both libraries print to stderr unless told otherwise, and share one callback per process. It is called on whatever thread the
library runs on, sometimes with a piece of a line at a time.

A Python callback takes the GIL for every line. Opening a vocabulary writes some eighty, and beside a busy main thread each waits
for it: 276 ms instead of 85 ms (measured, SmolLM2). ``muted`` swaps in a C function that drops them.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from edge_rt.native.libs import Bindings, libraries

if TYPE_CHECKING:
    import logging

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


def install() -> None:
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
        install()


def recent_errors() -> tuple[str, ...]:
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
