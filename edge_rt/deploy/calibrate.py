"""What this machine's kernels reach with the shapes of one model; this machine as the target ``auto``; measured rates."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from edge_rt.config import Remembered, available_cpus, cache_dir
from edge_rt.core.autotune import NoWeights, autotune_v_layout
from edge_rt.core.engine import SequenceBatch
from edge_rt.core.gguf.reader import GGML_TYPES, TensorInfo
from edge_rt.core.graph import layers
from edge_rt.core.graph.builder import GraphBuilder, Inputs, SlotInputs, SlotShape, wants_flash
from edge_rt.core.graph.config import ModelConfig
from edge_rt.core.kv.cache import KVCache
from edge_rt.core.kv.positions import STEP
from edge_rt.core.weights import repack
from edge_rt.core.weights.repack import offsets_shape
from edge_rt.deploy.cost import Memory, ModelShape, Prediction, Product, tensor_bytes
from edge_rt.deploy.target import AUTO, FEW, Efficiency, Kernel, Target
from edge_rt.errors import ContextError, PluginError
from edge_rt.hardware.profile import Cores, HasProfile, Profile
from edge_rt.hooks import Offer
from edge_rt.native import ggml
from edge_rt.native.ggml import quantise_rows

if TYPE_CHECKING:
    from edge_rt.core.engine import Engine
    from edge_rt.plugin_host.registry import Registry

# What this machine's kernels reach with the shapes of one model: a short benchmark, remembered by machine and library.
#
# Weights are random: libggml looks their scales up in a table, and is half as fast again if all are the same. Each is timed in place (with
# copies enough that no cache holds them) and in a cache, so that what limits it is known; the least of a few times counts, which neighbours
# disturb little.

c = ggml.c
_NUMBERS = {name: number for number, (name, _, _) in GGML_TYPES.items()}
_COLD, _MOST_COLD = 64 << 20, 256 << 20
"""Bytes that together are in no cache: at least, and at most where the caches are larger."""
_HOT = 512 << 10
_HOT_TIMES, _MOST_NODES = 32, 512
_FORMAT = "6"
"""Of what is remembered: another where something is measured otherwise."""
_ROWS = 64
_MANY, _MANY_OPERATIONS = 256, 2e9
_CELLS = 1024
_ROUNDS, _AT_LEAST = 5, 0.01
_PASSES = 4
"""Measurements at most, if no two in a row agree: then the best counts, and the next run tries again."""
_ALIKE = 0.15
"""How far two measurements may differ to be remembered."""


def calibrated(shape: ModelShape, profile: Profile, threads: Iterable[int]) -> dict[tuple[str, int], Kernel]:
    """Kernels by what they compute (``TYPE INPUTSxOUTPUTS``, ``attention``, ``elements``) and threads. Raises NativeError, OutOfMemory."""
    build = (_FORMAT, c.version().decode(), c.commit().decode(), *ggml.ggml_features(), profile.name, str(available_cpus()))
    known = Remembered(cache_dir() / "calibration.json", "|".join(build))
    numbers = sorted(set(threads))
    wanted = dict(_measurements(shape, _cold_bytes(profile)))
    found = {(name, n): one for name in wanted for n in numbers if (one := _recall(known, name, n)) is not None}
    left = {name: measure for name, measure in wanted.items() if any((name, n) not in found for n in numbers)}
    # What disturbs lasts for seconds, so nothing is measured twice in a row.
    for _ in range(_PASSES):
        for name, measure in list(left.items()):
            if _improved(found, name, measure(numbers)):
                del left[name]
                for n in numbers:
                    _note(known, name, n, found[name, n])
    return {(_short(name), n): one for (name, n), one in found.items()}


def _improved(found: dict[tuple[str, int], Kernel], name: str, measured: dict[int, Kernel]) -> bool:
    """Keep the better of what was found before and now; whether the two agree, so that no further pass is needed."""
    agree = True
    for n, new in measured.items():
        old = found.get((name, n))
        found[name, n] = new if old is None else _better(old, new)
        agree = agree and old is not None and _agree(old, new)
    return agree


def _measurements(shape: ModelShape, cold: int) -> Iterator[tuple[str, Callable[[Sequence[int]], dict[int, Kernel]]]]:
    """What is to be known of a model: its name, and how it is measured."""
    h = shape.config
    for product in {(one.type, one.inputs, one.outputs): one for one in shape.products}.values():
        yield f"{product.type} {product.inputs}x{product.outputs}", partial(_product, product, cold)
    sizes = f"{h.n_head} {h.n_head_kv} {h.head_dim}"
    yield f"attention {sizes}", partial(_attention, h, cold)
    if autotune_v_layout(h, ggml.TYPE_F16):
        yield f"few-attention {sizes}", partial(_few_attention, h)
    yield f"elements {sizes} {h.n_embd} {h.n_ff}", partial(_elements, h)


def _short(name: str) -> str:
    return name if "x" in name else name.split(" ")[0]


def _recall(known: Remembered, name: str, threads: int) -> Kernel | None:
    values = [known.get(f"{name} {threads} {field}") for field in Kernel._fields]
    return None if None in values else Kernel(*values)  # type: ignore[arg-type]


def _note(known: Remembered, name: str, threads: int, found: Kernel) -> None:
    for field, value in found._asdict().items():
        known.put(f"{name} {threads} {field}", value)


def _better(first: Kernel, second: Kernel) -> Kernel:
    """What was faster of each: neighbours only slow down."""
    one, many, reading = map(max, first[:3], second[:3])
    return Kernel(one, many, reading, min(first.node or 0.0, second.node or 0.0), max(first.few or 0.0, second.few or 0.0))


def _agree(first: Kernel, second: Kernel) -> bool:
    return all(abs(a - b) <= _ALIKE * max(a, b) for a, b in zip(first[:3], second[:3], strict=True))


def _cold_bytes(profile: Profile) -> int:
    caches = [cache.size for cores in profile.cores for cache in cores.caches]
    return min(_MOST_COLD, max(_COLD, 2 * max(caches, default=0)))


# ---- timing ----------------------------------------------------------------------------------------------------------


def _least(backend: ggml.Handle, graph: int) -> float:
    """Seconds of the fastest of some evaluations; one before them does not count."""
    ggml.compute(backend, graph)
    times: list[float] = []
    while len(times) < _ROUNDS or (sum(times) < _AT_LEAST and len(times) < 20 * _ROUNDS):
        started = time.perf_counter()
        ggml.compute(backend, graph)
        times.append(time.perf_counter() - started)
        if sum(times) > 50 * _AT_LEAST and len(times) > 1:  # a slow machine
            break
    return min(times)


@contextlib.contextmanager
def _graph(build: Callable[[int], Iterable[int]], nodes: int) -> Iterator[int]:
    """A graph of what ``build`` makes in a context, allocated."""
    with ggml.context(nodes + 16, (nodes + 16,)) as work, ggml.allocator() as arena:
        graph = c.new_graph_custom(work.address, nodes + 16, False)
        for tensor in build(work.address):
            c.build_forward_expand(graph, tensor)
        c.gallocr_alloc_graph(arena.address, graph)
        yield graph


def _by_threads(numbers: Sequence[int], graph: int) -> dict[int, float]:
    found = {}
    for n in numbers:
        with ggml.cpu_backend(n) as backend:
            found[n] = _least(backend, graph)
    return found


# ---- products --------------------------------------------------------------------------------------------------------


class _Weight(NamedTuple):
    """A weight to make copies of."""

    type: str
    inputs: int
    outputs: int

    @property
    def nbytes(self) -> int:
        return tensor_bytes((self.inputs, self.outputs), self.type)

    def fewer(self, outputs: float) -> _Weight:
        """With fewer rows, in whole groups as packed layouts want them."""
        return self._replace(outputs=self.outputs if outputs >= self.outputs else max(64, int(outputs) // 64 * 64))


def _product(product: Product, cold: int, numbers: Sequence[int]) -> dict[int, Kernel]:
    experts = max(1, round(product.nbytes / max(1, tensor_bytes((product.inputs, 1), product.type)) / product.outputs))
    whole = _Weight(product.type, product.inputs, product.outputs // experts)
    small = whole.fewer(whole.outputs * _HOT / whole.nbytes)
    many = whole.fewer(_MANY_OPERATIONS / (2 * whole.inputs * _MANY))
    copies = min(_MOST_NODES, max(2, -(-cold // whole.nbytes)))
    streamed = _seconds(whole, copies, 1, 1, numbers)
    cached = _seconds(small, 1, _HOT_TIMES, 1, numbers)
    few = _seconds(whole, copies, 1, FEW, numbers)
    together = _seconds(many, 1, 1, _MANY, numbers)
    return {
        n: Kernel(
            one=2.0 * small.inputs * small.outputs / cached[n],
            many=2.0 * many.inputs * many.outputs * _MANY / together[n],
            reading=whole.nbytes / streamed[n],
            node=0.0,  # in each of the times above
            few=2.0 * whole.inputs * whole.outputs * FEW / few[n],
        )
        for n in numbers
    }


def _seconds(weight: _Weight, copies: int, times: int, columns: int, numbers: Sequence[int]) -> dict[int, float]:
    """Seconds of one product, by threads."""
    with _placed(weight, copies) as weights, ggml.context(2) as inputs:
        x = ggml.new_tensor(inputs.address, ggml.TYPE_F32, (weight.inputs, columns))
        with ggml.allocate_context(inputs):
            ggml.view(x, "f4", (columns * weight.inputs,))[:] = 0.5

            def build(ctx: int) -> list[int]:
                return [_multiplied(ctx, *one, x) for one in weights for _ in range(times)]

            with _graph(build, copies * times * (1 + layers.NODES)) as graph:
                return {n: seconds / (copies * times) for n, seconds in _by_threads(numbers, graph).items()}


def _multiplied(ctx: int, weight: int, apart: int | None, x: int) -> int:
    y = int(c.mul_mat(ctx, weight, x))
    return y if apart is None else int(c.add(ctx, y, layers.offsets_product(ctx, apart, x)))


@contextlib.contextmanager
def _placed(weight: _Weight, copies: int) -> Iterator[list[tuple[int, int | None]]]:
    """Copies of a weight, packed where the library has a kernel for it; and their offsets where they lie apart."""
    number = _NUMBERS[weight.type]
    info = TensorInfo("timed.weight", (weight.inputs, weight.outputs), number, weight.type, 0, weight.nbytes)
    found, centred = repack.forms({info.name: info})
    layout, nbytes = found.get(info.name, ("", info.nbytes))
    if info.name in centred:
        number, info = ggml.TYPE_Q4_0, info._replace(nbytes=tensor_bytes(info.shape, "Q4_0"))
    apart = -(-nbytes // 64) * 64
    type_ = repack.layouts()[layout] if layout else c.backend_cpu_buffer_type()
    source = _content(number, weight.inputs, info.nbytes)
    with ggml.context(copies) as ctx, ggml.context(copies) as beside, ggml.buffer(type_, apart * copies + 64) as room:
        base = -(-c.backend_buffer_get_base(room.address) // 64) * 64
        made = []
        for i in range(copies):
            tensor = ggml.new_tensor(ctx.address, number, info.shape)
            ggml.place(tensor, room.address, base + i * apart)
            c.backend_tensor_set(tensor, source, 0, info.nbytes)
            made.append(tensor)
        if info.name not in centred:
            yield [(one, None) for one in made]
            return
        others = [ggml.new_tensor(beside.address, ggml.TYPE_F16, offsets_shape(info.shape)) for _ in made]
        with ggml.allocate_context(beside):
            yield list(zip(made, others, strict=True))


def _content(number: int, width: int, nbytes: int) -> bytes:
    """So many bytes of rows of a type, the same few again and again."""
    random = np.random.default_rng(0)
    rows = random.standard_normal((_ROWS, width), dtype=np.float32) * np.exp2(random.uniform(-0.75, 0.75, (_ROWS, 1))).astype(np.float32)
    some = quantise_rows(rows, number, np.ones(width, np.float32))
    return (some * -(-nbytes // len(some)))[:nbytes]


# ---- attention and the rest ------------------------------------------------------------------------------------------


def _attention(config: ModelConfig, cold: int, numbers: Sequence[int]) -> dict[int, Kernel]:
    """Of one token over cached cells and over cells in memory, and of many tokens, as the engine computes it here."""
    transposed = autotune_v_layout(config, ggml.TYPE_F16)
    layer = 4 * config.kv_width * _CELLS  # bytes of keys and values
    deep = min(_MOST_NODES, max(2, -(-cold // layer)))
    operations = 4.0 * config.n_head * config.head_dim * _CELLS
    cached = _attended(config._replace(n_layer=2), 1, numbers, transposed)
    streamed = _attended(config._replace(n_layer=deep), 1, numbers, transposed)
    together = _attended(config._replace(n_layer=2), _MANY, numbers, transposed)
    found = {n: Kernel(operations / cached[n], operations * _MANY / together[n], layer / streamed[n], 0.0, 0.0) for n in numbers}
    if transposed:
        return found
    # Flash attention goes query by query; with few cells each, what a query costs beside them is seen.
    short = _attended(config._replace(n_layer=2), FEW, numbers, transposed, causal=True)
    seen = (FEW + 1) / 2
    for n in numbers:
        query = short[n] / FEW
        cell = max(0.5 * cached[n] / _CELLS, (cached[n] - query) / (_CELLS - seen))
        found[n] = found[n]._replace(one=operations / (cell * _CELLS), node=max(0.0, query - seen * cell))
    return found


def _few_attention(config: ModelConfig, numbers: Sequence[int]) -> dict[int, Kernel]:
    """Of several tokens, but fewer than flash attention takes at once, as products with transposed values."""
    seconds = _attended(config._replace(n_layer=2), FEW, numbers, transposed=True)
    rates = {n: 4.0 * config.n_head * config.head_dim * _CELLS * FEW / seconds[n] for n in numbers}
    return {n: Kernel(rate, rate, 1e18, 0.0, 0.0) for n, rate in rates.items()}


def _attended(config: ModelConfig, tokens: int, numbers: Sequence[int], transposed: bool, causal: bool = False) -> dict[int, float]:
    """Seconds of one layer's attention of some tokens, by threads: each sees all cells, or in a prompt itself and those before it."""
    n_cells = STEP if causal else _CELLS
    with (
        contextlib.closing(KVCache(config, ggml.TYPE_F16, n_cells, transposed=transposed)) as cache,
        ggml.context(8) as inputs,
        ggml.context(64 * config.n_layer, (64 * config.n_layer,)) as work,
        ggml.allocator() as arena,
    ):
        for layer in range(config.n_layer):  # untouched memory is one page of zeros, which every cache holds
            with cache.cells(layer, write=True) as both:
                for cells in both:
                    cells[:] = 0
        q = ggml.new_tensor(inputs.address, ggml.TYPE_F32, (config.head_dim, config.n_head, tokens))
        shape = SlotShape(tokens, n_cells, 0)
        half = wants_flash(shape, cache.view)
        mask = ggml.new_tensor(inputs.address, ggml.TYPE_F16 if half else ggml.TYPE_F32, (n_cells, tokens))
        with ggml.allocate_context(inputs):
            ggml.view(q, "f4", (tokens * config.n_head * config.head_dim,))[:] = 0.5
            hidden = causal & (np.arange(n_cells) > np.arange(tokens)[:, None])
            ggml.view(mask, "f2" if half else "f4", (tokens, n_cells))[:] = np.where(hidden, -np.inf, 0.0)
            slot, size = SlotInputs(0, 0, mask), 64 * config.n_layer
            builder = GraphBuilder(work.address, config, NoWeights(), Inputs(0, 0, None, [slot]), [shape], [cache.view], size)
            builder.begin("attention")
            for layer in range(config.n_layer):
                builder.expand(layers.attend(builder, layer, q))
            c.gallocr_alloc_graph(arena.address, builder.segments[0].graph)
            found = _by_threads(numbers, builder.segments[0].graph)
            return {n: seconds / config.n_layer for n, seconds in found.items()}


def _elements(config: ModelConfig, numbers: Sequence[int]) -> dict[int, Kernel]:
    """Elements a second of norms, rotation, the gate and sums over many tokens; and what a small node costs."""
    heads = config.n_head + config.n_head_kv
    with ggml.context(8) as inputs:
        x = ggml.new_tensor(inputs.address, ggml.TYPE_F32, (config.n_embd, _MANY))
        w = ggml.new_tensor(inputs.address, ggml.TYPE_F32, (config.n_embd,))
        qk = ggml.new_tensor(inputs.address, ggml.TYPE_F32, (config.head_dim, heads, _MANY))
        both = ggml.new_tensor(inputs.address, ggml.TYPE_F32, (2 * max(32, config.n_ff), _MANY))
        positions = ggml.new_tensor(inputs.address, ggml.TYPE_I32, (_MANY,))
        with ggml.allocate_context(inputs):
            for tensor, count in ((x, config.n_embd * _MANY), (w, config.n_embd), (qk, config.head_dim * heads * _MANY)):
                ggml.view(tensor, "f4", (count,))[:] = 0.5
            ggml.view(both, "f4", (2 * max(32, config.n_ff) * _MANY,))[:] = 0.5
            ggml.view(positions, "i4", (_MANY,))[:] = 1
            with _graph(lambda ctx: _layer(ctx, config, x, w, qk, both, positions), 16) as graph:
                layer = _by_threads(numbers, graph)
            with _graph(lambda ctx: [_chain(ctx, w)], _MOST_NODES) as graph:
                node = {n: seconds / _MOST_NODES for n, seconds in _by_threads(numbers, graph).items()}
    elements = _MANY * (6 * config.n_embd + 2 * heads * config.head_dim + 3 * max(32, config.n_ff))
    return {n: Kernel(elements / layer[n], elements / layer[n], 1e18, node[n], 0.0) for n in numbers}


def _layer(ctx: int, config: ModelConfig, x: int, w: int, qk: int, both: int, positions: int) -> list[int]:
    """What a block computes beside products, over inputs that already are in memory."""
    r = config.rope
    rotated = c.rope_ext(
        ctx, qk, positions, None, r.dims, ggml.ROPE_NEOX, r.original_context, r.base, r.scale, r.ext_factor, r.attn_factor,
        r.beta_fast, r.beta_slow,
    )  # fmt: skip
    normed = [c.mul(ctx, c.rms_norm(ctx, x, config.eps), w) for _ in range(2)]
    return [*normed, rotated, c.swiglu(ctx, both), c.add(ctx, x, normed[0]), c.add(ctx, x, normed[1])]


def _chain(ctx: int, w: int) -> int:
    for _ in range(_MOST_NODES):
        w = c.add(ctx, w, w)
    return w


# The target ``auto``: this machine, as its device says that it is, with its kernels measured for one model.

_STEP = 5e-5
"""Seconds of Python in a step that repeats the last one (measured with 135M: the time of a step less that of its graph)."""
_OPENING, _PROCESS = 0.25, 75_000_000
_ASKED = ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4")
_GUESSED = {"int8": 1e11, "f16": 5e10, "f32": 5e10}
"""Of a few GHz and cores; used only for types that were not measured."""
_UNKNOWN = Efficiency(0.1, 0.2)
"""Of a type that was not measured here: the compiler asks about types that a model does not have yet."""


def here(registry: Registry, shape: ModelShape, threads: Iterable[int] = ()) -> Target:
    """This machine for one model, measured with so many threads and with one and all CPUs.

    Raises PluginError, UserError, NativeError, OutOfMemory.
    """
    from edge_rt.native import libs

    libs.install_native_log()
    profile = cpu_profile(registry)
    kernels = calibrated(shape, profile, {1, available_cpus(), *threads})
    efficiency = {"other": _UNKNOWN, "attention": _UNKNOWN}
    return Target(
        AUTO, profile.name, profile, efficiency, reading=1.0, node=1e-6, step=_STEP, elements=1e9, opening=_OPENING, process=_PROCESS,
        packed=packed_types_here(), kernels=kernels,
    )  # fmt: skip


def cpu_profile(registry: Registry) -> Profile:
    """What the device ``cpu`` says of itself, or where it makes no profile what its offer says. Raises PluginError, NativeError."""
    device = registry.devices()["cpu"]
    if isinstance(device, HasProfile) and (found := device.profile()) is not None:
        return found
    offer = registry.probe("cpu")
    if not isinstance(offer, Offer):
        raise PluginError(f"the device cpu makes no offer ({offer.reason}), so there is nothing to plan for; name a target")
    cpus = available_cpus()
    cores = Cores(offer.description, cpus, tuple(range(cpus)), offer.features)
    return Profile(offer.description, "cpu", (cores,), offer.memory_bytes, operations=_GUESSED, basis={"memory": "measured"})


def packed_types_here() -> tuple[str, ...]:
    """Types for which the library has packed kernels here."""
    from edge_rt.core.gguf.reader import GGML_TYPES, TensorInfo
    from edge_rt.core.weights.repack import forms
    from edge_rt.deploy.cost import tensor_bytes

    shape = (1024, 1024)
    asked = {
        f"{name}.weight": TensorInfo(f"{name}.weight", shape, number, name, 0, tensor_bytes(shape, name))
        for number, (name, _, _) in GGML_TYPES.items()
        if name in _ASKED
    }
    return tuple(name.removesuffix(".weight") for name in forms(asked)[0])


# A row of the table that was timed: an open model, with the prompt and the context that a prediction is about.

TOKENS = 16
"""Tokens that are decoded, up to the end of the context."""
_MEASURE_ROUNDS, _SETTLED, _LONG = 3, 0.5, 5.0


def measure(engine: Engine, target: str, *, context: int, prompt: int, threads: int) -> Prediction:
    """Time the first token of a prompt, and tokens at the end of a context; the best of a few rounds. Raises ContextError."""
    if max(prompt, context) + 1 > engine.info.max_context:
        raise ContextError(f"the model was opened with a context of {engine.info.max_context} tokens; raise --context")
    first = first_token(engine, prompt)
    sequence = filled(engine, context)
    try:
        tokens = rate(engine, sequence, context)
        held = engine.memory()
    finally:
        engine.free_sequence(sequence)
    memory = Memory(held.weights_resident or held.weights_mapped, held.cache, held.compute, 0)
    return Prediction(
        target=target, threads=threads, prompt=prompt, context=context, first=first, first_bound="", first_cold=None, cold_bound=None,
        rate=tokens, rate_bound="", memory=memory, fits=True, energy=None, measured=True, basis="measured",
    )  # fmt: skip


def filled(engine: Engine, context: int) -> int:
    """A new sequence with so many cells."""
    sequence = engine.new_sequence()
    engine.step([SequenceBatch(sequence, _ids(engine, context))])
    return sequence


def first_token(engine: Engine, prompt: int) -> float:
    """Seconds from a prompt to its logits, in an empty context; the least of a few, or of one that takes long."""
    times: list[float] = []
    while len(times) < _MEASURE_ROUNDS + 1 and sum(times) < _LONG:
        sequence = engine.new_sequence()
        try:
            started = time.perf_counter()
            engine.step([SequenceBatch(sequence, _ids(engine, prompt))])
            times.append(time.perf_counter() - started)
        finally:
            engine.free_sequence(sequence)
    return min(times)


def rate(engine: Engine, sequence: int, context: int) -> float:
    """Tokens a second up to the end of a context, of which the sequence has at least that many cells; the most of a few rounds."""
    tokens = min(TOKENS, max(2, context))
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < _MEASURE_ROUNDS or time.perf_counter() - started < _SETTLED:
        engine.truncate(sequence, max(0, context - tokens))
        engine.step([SequenceBatch(sequence, [1])])  # wakes the threads, and builds the graph
        begun = time.perf_counter()
        for _ in range(tokens - 1):
            engine.step([SequenceBatch(sequence, [1])])
        times.append((time.perf_counter() - begun) / (tokens - 1))
    return 1.0 / min(times)


def _ids(engine: Engine, n: int) -> list[int]:
    """Tokens that differ; what they are does not change how long they take (of experts, nearly)."""
    return [(7 + 13 * i) % engine.info.n_vocab for i in range(n)]
