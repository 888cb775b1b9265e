"""A roofline of a model on a target: what the model asks of a machine, how long a step takes, and what limits it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from edge_rt.core.gguf.reader import GGML_TYPES
from edge_rt.core.graph.builder import TILES_FROM
from edge_rt.core.graph.config import TOGETHER, ModelConfig, read_config
from edge_rt.core.kv.positions import padded
from edge_rt.core.weights.streaming import SLOTS
from edge_rt.core.weights.units import unit_name
from edge_rt.deploy.target import FEW, Kernel, Target, bandwidth, share

if TYPE_CHECKING:
    from edge_rt.core.gguf.reader import Header, TensorInfo

# What a model asks of a machine, read from its header: bytes by unit, products, operations and nodes of a step, bytes of a cell.
#
# An operation is a multiplication or an addition. Shapes are in ggml's order: a weight [inputs, outputs].

_BLOCKS = {name: (block, nbytes) for name, block, nbytes in GGML_TYPES.values()}
LEAST = 32
"""Bytes that tensors of a file are aligned to at least."""


class Product(NamedTuple):
    """A matrix that hidden states are multiplied with: [inputs, outputs].

    ``share``: the part of it that one token uses, less than 1 for experts. ``tokens``: whether all tokens of a prompt need it, or only
    those whose logits are wanted (the head, and what follows attention in the last block).
    """

    unit: str
    name: str
    type: str
    inputs: int
    outputs: int
    nbytes: int
    share: float = 1.0
    tokens: bool = True

    @property
    def operations(self) -> float:
        """For each token."""
        return 2.0 * self.inputs * self.outputs * self.share


class ModelShape(NamedTuple):
    """A model as a cost model sees it.

    ``units``: bytes in the order of the forward pass; a tied embedding counts as the head, which reads it whole. ``products``: in that
    order too. ``types``: bytes by ggml type name. ``folded``: norms of hidden states that are not multiplied with.
    """

    config: ModelConfig
    units: Mapping[str, int]
    products: tuple[Product, ...]
    types: Mapping[str, int]
    folded: int = 0

    @property
    def weights(self) -> int:
        """Bytes of all units."""
        return sum(self.units.values())

    @property
    def parameters(self) -> int:
        """Elements that a token is multiplied with, experts by their share."""
        return round(sum(product.operations for product in self.products) / 2)

    @property
    def streamed(self) -> float:
        """Bytes of weights that decoding one token reads."""
        return sum(product.nbytes * product.share for product in self.products)

    @property
    def nodes(self) -> int:
        """Nodes of a decoding step's graph that compute something and are no products with weights: norms (2), their factors (2, but for
        those folded), rotation, writing keys and values (2), attention (3), the gate, and adding to the hidden states (2) in each block.
        """
        return self.config.n_layer * 13 + 3 - self.folded

    def cell_bytes(self, key_type: str = "f16") -> int:
        """Bytes of one token's keys and values in all layers; values are always f16."""
        block, nbytes = _BLOCKS[key_type.upper()]
        return self.config.n_layer * (self.config.kv_width * 2 + self.config.kv_width // block * nbytes)

    def attention_operations(self, tokens: int, cells: int) -> float:
        """In all layers, of so many tokens that each see so many cells: products with keys, and with values."""
        return 4.0 * tokens * cells * self.config.n_head * self.config.head_dim * self.config.n_layer

    def elements(self, tokens: int) -> float:
        """Elements that norms, rotation, the gate and additions read in all layers."""
        h = self.config
        active = h.n_ff * max(1, h.n_expert_used)
        each = h.n_layer * (6 * h.n_embd + 2 * (h.n_head + h.n_head_kv) * h.head_dim + 3 * active)
        return float(tokens * (each - self.folded * h.n_embd))


def read_shape(
    header: Header,
    types: Mapping[str, str] | None = None,
    packed: Collection[str] | None = None,
    *,
    joined: Collection[str] | None = None,
    folded: Collection[str] = (),
) -> ModelShape:
    """The shape of a model, with ``types`` of tensors in place of the file's own, and without the scales of norms that are ``folded``.

    What shares its input is one product if its types are ``packed`` (None: any), or if it lies side by side in the file. With ``joined``,
    names of TOGETHER joined by "|", it is if it is one of these and can be laid side by side. Raises ModelFileError, UnsupportedModel.
    """
    config = read_config(header)
    tensors = {name: _typed(info, (types or {}).get(name, info.type_name)) for name, info in header.tensors.items()}
    tied = "output.weight" not in tensors
    units: dict[str, int] = {}
    by_type: dict[str, int] = {}
    order = ["embedding", *(f"blk.{i}" for i in range(config.n_layer)), "norm", "head"]
    placed = [("head" if tied and unit_name(name) == "embedding" else unit_name(name), info) for name, info in tensors.items()]
    for unit, info in sorted(placed, key=lambda one: order.index(one[0]) if one[0] in order else len(order)):
        units[unit] = units.get(unit, 0) + info.nbytes
        by_type[info.type_name] = by_type.get(info.type_name, 0) + info.nbytes
    by_type = dict(sorted(by_type.items(), key=lambda one: -one[1]))

    def one(names: Sequence[str], infos: Sequence[TensorInfo]) -> bool:
        if len({info.type_name for info in infos}) > 1 or (joined is not None and "|".join(names) not in joined):
            return False
        if packed is None or infos[0].type_name in packed:
            return True
        if joined is not None:
            return all(info.nbytes % LEAST == 0 for info in infos[:-1])
        return all(a.offset + a.nbytes == b.offset for a, b in pairwise(infos))

    scales = sum(not name.endswith(("attn_q_norm.weight", "attn_k_norm.weight")) for name in folded)
    return ModelShape(config, units, tuple(_products(config, tensors, one)), by_type, scales)


def tensor_bytes(shape: Sequence[int], type_name: str) -> int:
    """Bytes of a tensor in a type; rows that are no multiple of its block count as if they were filled."""
    block, nbytes = _BLOCKS[type_name]
    return -(-shape[0] // block) * nbytes * prod(shape[1:])


def _typed(info: TensorInfo, type_name: str) -> TensorInfo:
    return info if type_name == info.type_name else info._replace(type_name=type_name, nbytes=tensor_bytes(info.shape, type_name))


_One = Callable[[Sequence[str], "Sequence[TensorInfo]"], bool]
"""Whether products of these names and weights are one."""


def _products(config: ModelConfig, tensors: Mapping[str, TensorInfo], one: _One) -> Iterable[Product]:
    for layer in range(config.n_layer):
        prefix = f"blk.{layer}."
        own = {
            name.removeprefix(prefix).removesuffix(".weight"): info
            for name, info in tensors.items()
            if name.startswith(prefix) and name.endswith(".weight") and len(info.shape) > 1
        }
        last = layer == config.n_layer - 1
        for name, infos in _together(own, one):
            yield _product(config, f"blk.{layer}", name, infos, tokens=not (last and name.startswith(("attn_output", "ffn"))))
    head = tensors.get("output.weight") or tensors["token_embd.weight"]
    yield _product(config, "head", "output", [head], tokens=False)


def _together(own: Mapping[str, TensorInfo], one: _One) -> Iterable[tuple[str, list[TensorInfo]]]:
    """The products of a block in the order in which they are computed, those that are ``one`` as one."""
    left = {name: [info] for name, info in own.items()}
    for names in TOGETHER:
        found = [own[name] for name in names if name in own]
        if len(found) == len(names) and one(names, found):
            for name in names:
                del left[name]
            left["|".join(names)] = found
    order = ("attn_qkv", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name in sorted(left, key=lambda one: next((i for i, start in enumerate(order) if one.startswith(start)), len(order))):
        yield name, left[name]


def _product(config: ModelConfig, unit: str, name: str, infos: Sequence[TensorInfo], *, tokens: bool) -> Product:
    experts = len(infos[0].shape) == 3
    outputs = sum(prod(info.shape[1:]) for info in infos)
    share = config.n_expert_used / config.n_expert if experts and config.n_expert else 1.0
    return Product(unit, name, infos[0].type_name, infos[0].shape[0], outputs, sum(info.nbytes for info in infos), share, tokens)


# A roofline of a model on a target: how long a step takes, and what limits it.
#
# Each product takes the longer of reading its weights and computing (Williams, Waterman and Patterson 2009, "Roofline"), and each node of
# the graph its overhead. What limits a step is what most of its time goes to.

CHUNK = 512
"""Tokens of a prompt that the ggml engine feeds at once."""
BUILDING = 0.2
"""Python's share of building a node of a graph, in parts of what it takes for a step that repeats: 10 of 50 microseconds (135M)."""
TILE = 64
"""Cells that flash attention leaves out together, of many tokens (GGML_FA_TILE_KV)."""

Bound = Literal["bandwidth", "compute", "overhead", "storage"]


class Cost(NamedTuple):
    """Seconds by what they go to."""

    bandwidth: float = 0.0
    compute: float = 0.0
    overhead: float = 0.0
    storage: float = 0.0

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self)

    @property
    def bound(self) -> Bound:
        """What most go to."""
        parts: dict[Bound, float] = self._asdict()  # type: ignore[assignment]
        return max(parts, key=lambda name: parts[name])

    def plus(self, other: Cost) -> Cost:
        """Both, one after the other."""
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


class Memory(NamedTuple):
    """Bytes: weights that every step touches, cells of the context, compute buffers, and the process beside that."""

    weights: int
    cells: int
    compute: int
    process: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


class Prediction(NamedTuple):
    """A row of the table. Times are seconds, energy joules; None where the target does not say.

    ``first_cold``: with nothing of the model in memory, the opening included; ``first``: with the model open and in memory.
    ``measured``: the row was timed, not worked out.
    """

    target: str
    threads: int
    prompt: int
    context: int
    first: float
    first_bound: str
    first_cold: float | None
    cold_bound: str | None
    rate: float
    rate_bound: str
    memory: Memory | None
    fits: bool
    energy: float | None
    measured: bool = False
    basis: str = "projected"


# ---- what kernels reach ----------------------------------------------------------------------------------------------

_ARITHMETIC = {"F32": "f32", "F16": "f16", "BF16": "f16", "attention": "f16"}
"""What a type is multiplied as; quantised weights as int8."""


def kernel(target: Target, kind: str, threads: int, inputs: int = 0, outputs: int = 0) -> Kernel:
    """What products of a kind (a type, or ``attention``) reach: as measured for this very shape, for others of the kind, or as stated."""
    for name in (f"{kind} {inputs}x{outputs}", kind):
        if found := target.kernels.get((name, threads)):
            return found
    if alike := _alike(target, kind, threads):
        return alike
    profile, efficiency = target.profile, target.efficiency.get(kind) or target.efficiency["other"]
    most = profile.operations[_ARITHMETIC.get(kind, "int8")] * share(profile, threads)
    return Kernel(most * efficiency.one, most * efficiency.many, bandwidth(profile, threads) * target.reading)


def _alike(target: Target, kind: str, threads: int) -> Kernel | None:
    """The mean of what was measured of a kind with other shapes, each as it would be with so many threads; None if there is nothing."""
    numbers = [number for name, number in target.kernels if name.split(" ")[0] == kind]
    if not numbers:
        return None
    nearest = min(numbers, key=lambda number: (abs(number - threads), number))
    found = [each for (name, number), each in target.kernels.items() if name.split(" ")[0] == kind and number == nearest]
    one, many, reading = (sum(part) / len(found) for part in zip(*(each[:3] for each in found), strict=True))
    mean = Kernel(one, many, reading, found[0].node, _mean([each.few for each in found]))
    if nearest == threads:
        return mean
    more = share(target.profile, threads) / share(target.profile, nearest)
    reads = bandwidth(target.profile, threads) / bandwidth(target.profile, nearest) if target.profile.bandwidth else more
    return Kernel(mean.one * more, mean.many * more, mean.reading * reads, mean.node, mean.few and mean.few * min(more, reads))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cached(target: Target, nbytes: float) -> bool:
    """Whether what is read again and again stays in the largest cache of the fastest cores."""
    caches = [cache.size for cores in target.profile.cores[:1] for cache in cores.caches]
    return bool(caches) and nbytes < 0.5 * max(caches)


def _work(reading: float, computing: float) -> Cost:
    """The longer of the two; both happen at once."""
    return Cost(bandwidth=reading) if reading > computing else Cost(compute=computing)


def _product_cost(target: Target, product: Product, tokens: int, threads: int, *, cached: bool) -> Cost:
    found = kernel(target, product.type, threads, product.inputs, product.outputs)
    # Of experts, tokens together touch nearly all.
    touched = product.nbytes * (1.0 - (1.0 - product.share) ** tokens)
    reading = 0.0 if cached else touched / found.reading
    computing = _computing(product, found, tokens)
    if tokens > 1 and found.few and not cached:
        computing += max(0.0, FEW * product.operations / found.few - _computing(product, found, FEW))
    overhead = target.node * _barrier(target, threads) if found.node is None else found.node
    return _work(reading, computing).plus(Cost(overhead=overhead))


def _computing(product: Product, found: Kernel, tokens: int) -> float:
    """Few columns take no longer than the kernel for one takes for each, nor less than many at their rate."""
    one = product.operations / found.one
    return min(tokens * one, max(one, tokens * product.operations / found.many))


def _barrier(target: Target, threads: int) -> float:
    """Threads meet after each node; one alone meets nobody, and has only the call."""
    return 1.0 if threads > 1 or target.profile.kind != "cpu" else 0.4


def _attention(shape: ModelShape, target: Target, tokens: int, before: int, threads: int, key_type: str = "f16") -> Cost:
    """Of so many tokens of a sequence, behind so many cells."""
    found, few = kernel(target, "attention", threads), target.kernels.get(("few-attention", threads))
    seen = before + (tokens + 1) / 2  # by a token, on average
    if tokens >= TILES_FROM:
        rate, seen, beside = found.many, min(seen + TILE / 2, before + tokens), 0.0
    else:
        beside = tokens * shape.config.n_layer * (found.node or 0.0)
        rate = few.many if few and tokens > 1 else found.one
        # Flash attention leaves out cells that a token does not see; products with transposed values, which are timed, do not.
        seen = padded(before + tokens) if few else seen
    computing = shape.attention_operations(tokens, 1) * seen / rate
    nbytes = seen * shape.cell_bytes(key_type)
    return _work(0.0 if _cached(target, nbytes) else nbytes / found.reading, computing).plus(Cost(overhead=beside))


def _rest(shape: ModelShape, target: Target, tokens: int, threads: int) -> Cost:
    """Norms, rotation, gates and sums; and what each node of the graph, and the step, costs beside."""
    measured = target.kernels.get(("elements", threads))
    rate = measured.many if measured else target.elements * (share(target.profile, threads) * target.threads)
    node = measured.node if measured and measured.node is not None else target.node * _barrier(target, threads)
    return Cost(compute=shape.elements(tokens) / rate, overhead=shape.nodes * node + target.step)


# ---- steps -----------------------------------------------------------------------------------------------------------


def _step(shape: ModelShape, target: Target, tokens: int, rows: int, before: int, threads: int, key_type: str = "f16") -> Cost:
    """A step of one sequence: so many tokens behind so many cells; ``rows`` of them get logits."""
    cached = _cached(target, shape.streamed)
    total = _attention(shape, target, tokens, before, threads, key_type)
    for product in shape.products:
        columns = tokens if product.tokens else rows
        if columns:
            total = total.plus(_product_cost(target, product, columns, threads, cached=cached))
    return total.plus(_rest(shape, target, tokens, threads))


def products(shape: ModelShape, target: Target, tokens: int, threads: int, names: Collection[str]) -> Cost:
    """Of so many tokens, of the products of these names alone."""
    total, cached = Cost(), _cached(target, shape.streamed)
    for product in (one for one in shape.products if one.name in names):
        total = total.plus(_product_cost(target, product, tokens, threads, cached=cached))
    return total


def decode(shape: ModelShape, target: Target, cells: int, threads: int, key_type: str = "f16") -> Cost:
    """One token, the last of so many cells."""
    return _step(shape, target, 1, 1, cells - 1, threads, key_type)


def prefill(shape: ModelShape, target: Target, tokens: int, threads: int, chunk: int = CHUNK) -> Cost:
    """A prompt in an empty context, with the logits of its last token, in chunks."""
    total, building = Cost(), Cost(overhead=BUILDING * target.step * shape.nodes)  # a graph for each, as each has its number of cells
    for start in range(0, tokens, chunk):
        n = min(chunk, tokens - start)
        last = start + n == tokens
        total = total.plus(_step(shape, target, n, int(last), start, threads)).plus(building)
    return total


def first_token(shape: ModelShape, target: Target, prompt: int, threads: int, chunk: int = CHUNK) -> Cost:
    """From the prompt to the first token, with the model open and in memory."""
    return prefill(shape, target, prompt, threads, chunk)


def first_token_cold(shape: ModelShape, target: Target, prompt: int, threads: int, chunk: int = CHUNK) -> Cost | None:
    """The same from the start of the process, with nothing of the model in memory; None where the speed of the storage is not known.

    Weights are read ahead in the order in which they are computed with, so both happen at once: the longer of them counts.
    """
    if target.profile.storage is None:
        return None
    reading = shape.weights / target.profile.storage
    if target.profile.link:
        reading = max(reading, shape.weights / target.profile.link)
    computing = first_token(shape, target, prompt, threads, chunk)
    beside = Cost(overhead=target.opening)
    return (Cost(storage=reading) if reading > computing.seconds else computing).plus(beside)


def streaming(shape: ModelShape, target: Target, budget: int | None) -> float:
    """Seconds that reading takes for each step when only so many bytes of weights stay in memory; 0 without such a budget."""
    if budget is None or budget >= shape.weights:
        return 0.0
    # Of each of n units so much is streamed that the rest and the slots fit (residency.divide).
    n = max(SLOTS + 1, len(shape.units) - 1)
    return (shape.weights - budget) * n / (n - SLOTS) / (target.profile.storage or float("inf"))


def memory(shape: ModelShape, target: Target, context: int, chunk: int = CHUNK, key_type: str = "f16") -> Memory:
    """What a process with one sequence of so many cells holds, when the context is full."""
    h, cells = shape.config, padded(context)
    n = min(chunk, cells)
    active = h.n_ff * max(1, h.n_expert_used)
    # The largest of what is alive at once in a block: hidden states and their norm, gate and up joined and their product; and the mask.
    hidden = 4 * n * (3 * h.n_embd + 3 * active)
    queries = 4 * n * (2 * h.n_head + 2 * h.n_head_kv) * h.head_dim
    mask = 2 * n * cells
    return Memory(shape.weights, cells * shape.cell_bytes(key_type), max(hidden, queries) + mask + 4 * h.n_vocab, target.process)


def power(target: Target, threads: int) -> float | None:
    """Watts of the board with so many threads at work: between idle and all, by their part of the operations. None if not known."""
    idle, most = target.profile.idle_power, target.profile.power
    return None if idle is None or most is None else idle + (most - idle) * share(target.profile, threads)


def predict(
    shape: ModelShape, target: Target, *, context: int, prompt: int, threads: int | None = None, chunk: int = CHUNK, key_type: str = "f16"
) -> Prediction:
    """A row of the table: the first token of a prompt, and tokens at the end of a context."""
    n = threads or target.threads
    first = first_token(shape, target, prompt, n, chunk)
    cold = first_token_cold(shape, target, prompt, n, chunk)
    token = decode(shape, target, context, n, key_type)
    held = memory(shape, target, context, chunk, key_type)
    watts = power(target, n)
    return Prediction(
        target=target.name,
        threads=n,
        prompt=prompt,
        context=context,
        first=first.seconds,
        first_bound=first.bound,
        first_cold=None if cold is None else cold.seconds,
        cold_bound=None if cold is None else cold.bound,
        rate=1.0 / token.seconds,
        rate_bound=token.bound,
        memory=held,
        fits=held.total <= target.profile.memory,
        energy=None if watts is None else watts * token.seconds,
        basis="measured kernels" if target.measured else _basis(target.profile.basis),
    )


def _basis(stated: Mapping[str, str]) -> str:
    """The weakest of what the figures rest on."""
    ranks = ("unknown", "projected", "simulated", "measured")
    used: Iterable[str] = (stated.get(key, "unknown") for key in ("bandwidth", "operations", "efficiency"))
    return min(used, key=ranks.index)
