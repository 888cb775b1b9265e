"""Writes down which functions of edge_rt a process calls, in every thread, while `bench.walks` says so.

Python imports a module of this name at each start, so the folder on PYTHONPATH reaches processes that others start, as the daemon's worker.
``$BENCH_WALK``: a folder with the file ``gate``, whose one byte is the number of the walk under way, 0 for none. ``$BENCH_WALK_PACKAGE``:
the folder of edge_rt. Each process appends to ``PID.jsonl`` there: a line at the first call of each function in a walk, and at each send
on a socket, with ``t`` in nanoseconds of a clock that all processes share.
"""

import json
import mmap
import os
import socket
import sys
import threading
import time
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

SENDS = {"send", "sendall", "sendmsg"}
_OPTIMISED = 0x1  # code of functions has this flag, that of modules and classes has not


def trace(folder: str, package: str) -> None:
    """Begin in this thread and those that follow; until the gate is open, each event costs a look at it."""
    with open(os.path.join(folder, "gate"), "r+b") as file:
        gate = mmap.mmap(file.fileno(), 1)
    out = os.open(os.path.join(folder, f"{os.getpid()}.jsonl"), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    root = package + os.sep
    seen, importing_seen = {}, {}
    under_way = 0

    def write(**line) -> None:
        os.write(out, json.dumps({"walk": under_way, "t": time.monotonic_ns(), **line}).encode() + b"\n")

    def imported(frame) -> bool:
        """Whether this runs because a module of ours is being imported."""
        while frame is not None:
            code = frame.f_code
            if not code.co_flags & _OPTIMISED and code.co_filename.startswith(root) and frame.f_globals.get("__name__") != "__main__":
                return True
            frame = frame.f_back
        return False

    def note(frame) -> None:
        code = frame.f_code
        if id(code) in seen:
            return
        if not code.co_filename.startswith(root) or not code.co_flags & _OPTIMISED:
            seen[id(code)] = code  # kept, so that no other gets its id
            return
        during_import = imported(frame)
        known = importing_seen if during_import else seen
        if id(code) not in known:
            known[id(code)] = code
            name = getattr(code, "co_qualname", code.co_name)
            write(file=code.co_filename[len(root) :], function=name, importing=during_import)

    def hook(frame, event, argument) -> None:
        nonlocal under_way
        walk = gate[0]
        if not walk:
            return
        if walk != under_way:
            under_way = walk
            seen.clear()
            importing_seen.clear()
        if event == "call" or event == "return":  # a return alone: it was called before the walk began, and waited
            if frame.f_back is not None:
                note(frame.f_back)  # may have been under way, and never return
            note(frame)
        elif event == "c_call" and argument.__name__ in SENDS and isinstance(argument.__self__, socket.socket):
            write(sent=True)

    threading.setprofile(hook)
    sys.setprofile(hook)


def next_one() -> None:
    """Run the module of this name that this one hides."""
    here = os.path.dirname(os.path.abspath(__file__))
    spec = PathFinder.find_spec("sitecustomize", [path for path in sys.path if os.path.abspath(path) != here])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


try:
    next_one()
except ModuleNotFoundError as error:
    if error.name != "sitecustomize":  # the one that was hidden looks for the next, and there is none
        raise
if "BENCH_WALK" in os.environ:
    trace(os.environ["BENCH_WALK"], os.environ["BENCH_WALK_PACKAGE"])
