"""How fast this machine reads memory, multiplies and reads files: short measurements with the kernels that models run on.

Each thread computes on its own, in many short runs of which those that nobody disturbed count: ggml's threads would wait for each other,
and two of them beside a busy neighbour are ten times slower than one. Each measurement stops at its deadline, and what there was no time
for is left out. They take all threads they are given: measure before a model runs, not beside it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar

from edge_rt.core.weights.repack import layouts
from edge_rt.errors import OutOfMemory
from edge_rt.native import ggml, memory
from edge_rt.native.libs import muted

_T = TypeVar("_T")
_Result = TypeVar("_Result")
_BEYOND = 2
"""Memory is read in runs of so many times the last-level cache, so that little of it is still there the next time."""
_LEAST, _MOST = 64 << 20, 384 << 20
"""Bytes of that memory, whatever the cache: phones and virtual machines have some that they do not tell of, and filling more takes long."""
_ROW, _PART = 16 << 10, 8 << 20
"""Bytes of a row, and bytes that are read in one run at most: short enough to fall between a busy neighbour's turns."""
_READ_AS = {ggml.TYPE_F16: 2, ggml.TYPE_F32: 4}
"""Types whose products cost little but their reading, and the bytes of a number."""
_TRIAL = 0.1
"""The share of its time that a trial of each of them takes."""
_UNDISTURBED = 0.75
"""The share of runs that may be slower than what counts."""
_ROUNDS = 3
_SIDE, _COLUMNS = 1024, 32
"""Rows and columns of a weight that fits a core's cache, and the columns it is multiplied with: a run is short."""
_OPERANDS: Mapping[str, tuple[int, ...]] = {"int8": (2, ggml.TYPE_Q8_0), "f16": (ggml.TYPE_F16,), "f32": (ggml.TYPE_F32,)}
"""What is multiplied -> ggml's types of weights that are multiplied as that (2: Q4_0), whose best counts."""
_BLOCK = 1 << 20
_ALIGNMENT = 64


def memory_bandwidth(threads: Sequence[int], cache: int, seconds: float = 0.12) -> dict[int, float]:
    """Bytes a second at which so many threads together read weights that no cache holds: what decoding a token cannot exceed.

    Matrices are multiplied by a vector, of the type that this CPU reads fastest so (float16 or float32), which costs little but its
    reading. They lie in large pages, as files do where the system has large folios. ``threads``: the numbers to try, the most important
    first. ``cache``: bytes of the last-level caches together. ``seconds`` of reading: to get the memory takes some more. Raises
    NativeError, OutOfMemory.
    """
    size, most = min(max(_LEAST, min(_MOST, _BEYOND * cache)), _available() // 4), max(threads, default=1)
    part = max(_ROW, min(_PART, size // (2 * most)) // _ROW * _ROW)
    parts, found = max(2 * most, size // part), dict[int, float]()
    with muted(), ExitStack() as stack:
        address = stack.enter_context(_pages(parts * part, most))
        starts = range(address, address + parts * part, part)
        readers = {type_: [_reader(stack, type_, start, part) for start in starts] for type_ in _READ_AS}
        deadline = time.perf_counter() + seconds
        best = max(_READ_AS, key=lambda type_: _together([readers[type_]], time.perf_counter() + seconds * _TRIAL))
        for at, number in enumerate(threads):
            now = time.perf_counter()
            if found and now >= deadline:
                break
            until = now + (deadline - now) / (len(threads) - at)
            found[number] = part * _together([readers[best][i::number] for i in range(number)], until)
    return dict(sorted(found.items()))


def operations(threads: int, seconds: float = 0.12) -> dict[str, float]:
    """Operations a second, a multiplication and an addition being two, of products of matrices by what is multiplied: int8, f16, f32.

    The weights are in the packed layout of this CPU where there is one, as those of models are. Raises NativeError, OutOfMemory.
    """
    share = seconds / sum(map(len, _OPERANDS.values())) / _ROUNDS
    with muted():
        # In rounds, so that a neighbour who is busy for a while does not spoil all of one type.
        rounds = [{name: max(_rate(type_, threads, share) for type_ in types) for name, types in _OPERANDS.items()} for _ in range(_ROUNDS)]
    return {name: max(found[name] for found in rounds) for name in _OPERANDS}


def storage_bandwidth(folders: Sequence[Path], seconds: float = 0.05) -> float | None:
    """Bytes a second at which the largest file in these folders is read from its disk, past the page cache; None if that cannot be told.

    Reads blocks that double in size, from the middle of the file. Changes nothing: it needs a file system with O_DIRECT.
    """
    path = _largest(folders)
    if path is None or not hasattr(os, "O_DIRECT") or not hasattr(os, "preadv"):
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:  # tmpfs and some network file systems know no such reading
        return None
    try:
        return _read_rate(fd, os.fstat(fd).st_size, seconds)
    except OSError:
        return None
    finally:
        os.close(fd)


def _read_rate(fd: int, size: int, seconds: float) -> float | None:
    import mmap

    at = size // 2 // _BLOCK * _BLOCK
    block, total, start, spent = _BLOCK, 0, time.perf_counter(), 0.0
    while spent < seconds and at + block <= size:
        with mmap.mmap(-1, block) as buffer:  # at an address that is a whole page, as O_DIRECT wants it
            begun = time.perf_counter()
            count = os.preadv(fd, [buffer], at)
            spent = time.perf_counter() - start
            rate = count / max(1e-9, time.perf_counter() - begun)
        if not count:
            break
        total, at = total + count, at + count // _BLOCK * _BLOCK
        block = max(block, min(8 * _BLOCK, int(rate * max(0.0, seconds - spent) / 2) // _BLOCK * _BLOCK))
    return total / spent if total else None


def _largest(folders: Sequence[Path]) -> Path | None:
    sizes = []
    for folder in folders:
        try:
            sizes += [(path.stat().st_size, path) for path in folder.iterdir() if path.is_file()]
        except OSError:
            continue
    most, path = max(sizes, default=(0, None))
    return path if most >= 2 * _BLOCK else None


def _available() -> int:
    """Bytes of memory that are free or can be made so."""
    import psutil

    return int(psutil.virtual_memory().available)


def _together(work: Sequence[Sequence[int]], deadline: float) -> float:
    """Runs a second of all threads together, each of which computes its graphs in turn: what was just read is in a cache."""

    def rate(graphs: Sequence[int]) -> float:
        with ggml.cpu_backend(1) as backend:
            return 1 / _undisturbed(graphs, backend, deadline)

    return sum(_on_threads(rate, work))


def _on_threads(function: Callable[[_T], _Result], items: Sequence[_T]) -> list[_Result]:
    """The function of each item, each on a thread of its own. Raises what it raises, and OutOfMemory."""
    with ThreadPoolExecutor(len(items)) as pool:
        try:
            return list(pool.map(function, items))
        except RuntimeError as error:  # the system has no more threads
            raise OutOfMemory(f"cannot measure with {len(items)} threads ({error}); close other programs") from error


def _undisturbed(graphs: Sequence[int], backend: ggml.Handle, deadline: float) -> float:
    """Seconds of a run that nobody disturbed; the first one, which touches all for the first time, counts only if it is the only one."""
    times: list[float] = []
    for graph in itertools.cycle(graphs):
        start = time.perf_counter()
        if times and start + min(times) > deadline:
            break
        ggml.compute(backend, graph)
        times.append(time.perf_counter() - start)
    counted = sorted(times[1:] or times)
    return counted[int(len(counted) * (1 - _UNDISTURBED))]


def _rate(type_: int, threads: int, seconds: float) -> float:
    """Operations a second of all threads with weights of this type."""
    deadline, shape = time.perf_counter() + seconds, (_SIDE, _SIDE)
    with ExitStack() as stack:
        weight = _packed(stack, type_, shape)
        with ggml.cpu_backend(1) as backend:  # some machines, and emulated ones, are too slow for many columns
            one = _undisturbed([_product(stack, weight, shape, 1)], backend, time.perf_counter() + seconds / 4)
        columns = max(1, min(_COLUMNS, int(seconds / 2 / one)))
        graphs = [_product(stack, weight, shape, columns) for _ in range(threads)]
        return 2.0 * _SIDE * _SIDE * columns * _together([[graph] for graph in graphs], deadline)


@contextmanager
def _pages(size: int, threads: int) -> Iterator[int]:
    """The address of memory that is really there, in large pages where the system has them."""
    address = memory.map_large(size)
    try:
        part = -(-size // threads // memory.PAGE) * memory.PAGE
        # Pages that were only read would all be the same one.
        _on_threads(lambda start: memory.fill_zero(address + start, min(part, size - start)), range(0, size, part))
        yield address
    finally:
        memory.unmap(address, size)


def _packed(stack: ExitStack, type_: int, shape: tuple[int, int]) -> int:
    """A weight of zeros in the first packed layout that has a kernel for it, else in ggml's own; it lives until the stack is closed."""
    plain = ggml.c.backend_cpu_buffer_type()
    for buffer_type in (*layouts().values(), plain) if ggml.c.is_quantized(type_) else (plain,):
        ctx = stack.enter_context(ggml.context(3))
        weight = ggml.new_tensor(ctx.address, type_, shape)
        room = int(ggml.c.backend_buft_get_alloc_size(buffer_type, weight))
        buffer = stack.enter_context(ggml.buffer(buffer_type, room + _ALIGNMENT))
        ggml.place(weight, buffer.address, -(-ggml.c.backend_buffer_get_base(buffer.address) // _ALIGNMENT) * _ALIGNMENT)
        vector = ggml.new_tensor(ctx.address, ggml.TYPE_F32, (shape[0], 2))
        if ggml.supports(ggml.c.mul_mat(ctx.address, weight, vector)):  # to pack a weight that has no kernel would crash
            break
    zeros = bytes(ggml.c.row_size(type_, shape[0]) * shape[1])
    ggml.c.backend_tensor_set(weight, memory.address_of(zeros), 0, len(zeros))
    return weight


@contextmanager
def _plain(type_: int, shape: tuple[int, int], address: int) -> Iterator[int]:
    """A weight that lies at an address."""
    with ggml.context(1) as ctx, ggml.buffer_from_address(address, ggml.c.row_size(type_, shape[0]) * shape[1]) as buffer:
        weight = ggml.new_tensor(ctx.address, type_, shape)
        ggml.place(weight, buffer.address, address)
        yield weight


def _reader(stack: ExitStack, type_: int, address: int, size: int) -> int:
    """A graph that reads memory as a matrix of a type, whatever is there."""
    columns = _ROW // _READ_AS[type_]
    return _product(stack, stack.enter_context(_plain(type_, (columns, size // _ROW), address)), (columns, size // _ROW), 1)


def _product(stack: ExitStack, weight: int, shape: tuple[int, int], columns: int) -> int:
    """The graph of ``weight @ zeros``, which lives until the stack is closed. Raises OutOfMemory."""
    inputs = stack.enter_context(ggml.context(1))
    vector = ggml.new_tensor(inputs.address, ggml.TYPE_F32, (shape[0], columns))
    stack.enter_context(ggml.allocate_context(inputs))
    memory.fill_zero(ggml.data_address(vector), shape[0] * columns * 4)
    ctx = stack.enter_context(ggml.context(2, (8,)))
    graph: int = ggml.c.new_graph_custom(ctx.address, 8, False)
    ggml.c.build_forward_expand(graph, ggml.c.mul_mat(ctx.address, weight, vector))
    room = stack.enter_context(ggml.allocator())
    if not ggml.c.gallocr_alloc_graph(room.address, graph):
        raise OutOfMemory("there is no memory to measure in; close other programs")
    return graph
