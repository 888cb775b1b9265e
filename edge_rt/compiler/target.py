"""What a model is fitted to: a device's profile, and what of it the kernels reach.

Targets are TOML files: those in ``targets``, and those of plugins (the hook ``edge_rt_compiler_targets``). ``auto`` is no file: it is
this machine, looked at by its device and measured by calibrate.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from edge_rt.core.weights.interleave import packed_types
from edge_rt.device_profile import Cache, Cores, Profile
from edge_rt.errors import OptionError, RuleError

FOLDER = Path(__file__).parent / "targets"
AUTO = "auto"
BASES = ("measured", "simulated", "projected", "unknown")


class Efficiency(NamedTuple):
    """The share of a device's operations that products with weights of one type reach: with ``one`` column, and with ``many``."""

    one: float
    many: float


FEW = 32
"""Columns of a product with ``few``."""


class Kernel(NamedTuple):
    """What products reach with some number of threads. Operations a second with ``one`` column (weights in a cache) and with ``many``;
    bytes of weights a second read from memory; ``node``, seconds of each product beside that, None: as the target's; and operations a
    second with ``FEW`` columns and weights in memory, which kernels for several columns do not read as evenly, None: not known.
    """

    one: float
    many: float
    reading: float
    node: float | None = None
    few: float | None = None


class Target(NamedTuple):
    """A device to plan for.

    ``efficiency``: by ggml type name, ``attention`` for products with cached keys and values, ``other`` for the rest. ``reading``: the
    share of the profile's bandwidth at which weights are read. ``node``: seconds that each node of a graph costs beside its work;
    ``step``: seconds of each step beside its graph. ``elements``: elements a second that one thread norms, rotates and adds.
    ``opening``: seconds until a model whose pages are in memory takes a prompt. ``process``: bytes of a process beside the model.
    ``packed``: types with packed kernels, by the features of its cores where its file does not say. ``kernels``: measured, by what is
    computed and the number of threads, where it was.
    """

    name: str
    description: str
    profile: Profile
    efficiency: Mapping[str, Efficiency]
    reading: float
    node: float
    step: float
    elements: float
    opening: float
    process: int
    packed: tuple[str, ...] = ()
    kernels: Mapping[tuple[str, int], Kernel] = MappingProxyType({})

    @property
    def threads(self) -> int:
        """All cores; a card counts as one thread."""
        return sum(cores.number for cores in self.profile.cores) if self.profile.kind == "cpu" else 1

    @property
    def features(self) -> frozenset[str]:
        """Instructions that all its cores have: one build of the library serves them all."""
        return _common(self.profile.cores)

    @property
    def measured(self) -> bool:
        """Whether kernels were timed on the device itself."""
        return bool(self.kernels)


def share(profile: Profile, threads: int) -> float:
    """The part of a CPU's operations that its ``threads`` fastest cores have, by their clocks; 1 for a card."""
    if profile.kind != "cpu":
        return 1.0
    clocks = [cores.clock or 1.0 for cores in profile.cores for _ in range(cores.number)]
    return sum(clocks[:threads]) / sum(clocks) if clocks else 1.0


def bandwidth(profile: Profile, threads: int) -> float:
    """Bytes a second that so many threads read; between numbers that are known in proportion, above the largest no more."""
    known = sorted(profile.bandwidth.items())
    if not known:
        return float("inf")
    below = max((one for one in known if one[0] <= threads), default=None)
    above = min((one for one in known if one[0] >= threads), default=None)
    if below is None or above is None or below == above:
        number, rate = below or above or known[0]
        return rate if below else rate * threads / number
    part = (threads - below[0]) / (above[0] - below[0])
    return below[1] + part * (above[1] - below[1])


# ---- files -----------------------------------------------------------------------------------------------------------


def names(more: Iterable[Path] = ()) -> dict[str, Path]:
    """The targets that there are, by name (a file's name without ``.toml``); ours first, and a name that is taken stays whose it is."""
    found: dict[str, Path] = {}
    for path in [*sorted(FOLDER.glob("*.toml")), *more]:
        found.setdefault(path.stem, path)
    return found


def load(name: str, more: Iterable[Path] = ()) -> Target:
    """A target by name, or by the path of its file. Raises OptionError."""
    known = names(more)
    path = known.get(name) or (Path(name) if name.endswith(".toml") else None)
    if path is None:
        raise OptionError(f"there is no target {name}; choose from {', '.join([AUTO, *known])}, or give the path of a .toml file")
    return read(path)


def read(path: Path) -> Target:
    """Read a target's file. Raises OptionError with the file and the line of the first mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OptionError(f"the target {path} cannot be read: {why}") from error
    from edge_rt import toml_file

    try:
        return _target(path.stem, toml_file.parse(text))
    except RuleError as error:
        line = error.line if error.line is not None else toml_file.line_of(text, error.place)
        raise OptionError(f"{path}, line {line or 1}: {error.reason}") from None


_FIELDS = (
    "kind", "description", "memory", "storage", "link", "idle_power", "power", "hottest", "cores", "bandwidth", "operations",
    "efficiency", "overhead", "packed", "basis",
)  # fmt: skip
_OVERHEAD = {"node": 1e-2, "step": 1.0, "elements": 1e15, "opening": 600.0, "process": 1e12}
"""What may be in ``overhead``, and the most each can be."""
_OPERATIONS = ("int8", "f16", "f32")


def _target(name: str, found: Mapping[str, Any]) -> Target:
    if unknown := sorted(set(found) - set(_FIELDS)):
        raise RuleError(f"there is no field {unknown[0]}; there are {', '.join(_FIELDS)}", place=(unknown[0],))
    kind = _text(found, "kind", ())
    if kind not in ("cpu", "gpu", "npu"):
        raise RuleError(f"kind is cpu, gpu or npu and not {kind!r}", place=("kind",))
    tables = {key: _table(found, key) for key in ("bandwidth", "operations", "efficiency", "overhead", "basis")}
    if unknown := sorted(set(tables["overhead"]) - set(_OVERHEAD)):
        raise RuleError(f"overhead has no field {unknown[0]}; it has {', '.join(_OVERHEAD)}", place=("overhead", unknown[0]))
    overhead = {key: _number(tables["overhead"], key, ("overhead",), most=most) for key, most in _OVERHEAD.items()}
    profile = Profile(
        name=_text(found, "description", ()),
        kind=kind,  # type: ignore[arg-type]
        cores=_cores(found),
        memory=int(_number(found, "memory", ())),
        bandwidth=_by_threads(tables["bandwidth"]),
        operations=_operations(tables["operations"]),
        storage=_known(found, "storage"),
        link=_known(found, "link"),
        idle_power=_known(found, "idle_power"),
        power=_known(found, "power"),
        hottest=_known(found, "hottest"),
        basis=_basis(tables["basis"]),
    )
    efficiency, reading = _efficiencies(tables["efficiency"])
    packed = found.get("packed", list(packed_types(_common(profile.cores))) if profile.kind == "cpu" else [])
    if not isinstance(packed, list) or not all(isinstance(one, str) for one in packed):
        raise RuleError('packed is a list of types, as ["Q4_0"]', place=("packed",))
    return Target(
        name, profile.name, profile, efficiency, reading, overhead["node"], overhead["step"], overhead["elements"],
        overhead["opening"], int(overhead["process"]), tuple(packed),
    )  # fmt: skip


def _common(cores: Iterable[Cores]) -> frozenset[str]:
    sets = [frozenset(one.features) for one in cores]
    return frozenset.intersection(*sets) if sets else frozenset()


def _basis(table: Mapping[str, Any]) -> Mapping[str, Any]:
    for key, value in table.items():
        if value not in BASES:
            raise RuleError(f"a basis is {', '.join(BASES[:-1])} or unknown and not {value!r}", place=("basis", key))
    return table


def _cores(found: Mapping[str, Any]) -> tuple[Cores, ...]:
    given = found.get("cores")
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise RuleError("a target needs its cores, as a table [[cores]] for each kind, the fastest first", place=("cores",))
    made = []
    for i, one in enumerate(given):
        place = ("cores", i)
        caches = one.get("caches", [])
        if not isinstance(caches, list) or not all(isinstance(cache, dict) for cache in caches):
            raise RuleError("caches is a list of tables, as [{level = 1, size = 32768}]", place=(*place, "caches"))
        levels = tuple(
            Cache(*(int(_number(cache, key, (*place, "caches", j), default=1)) for key in ("level", "size", "shared_by")))
            for j, cache in enumerate(caches)
        )
        features = one.get("features", [])
        if not isinstance(features, list) or not all(isinstance(feature, str) for feature in features):
            raise RuleError('features is a list of names, as ["neon"]', place=(*place, "features"))
        number = int(_number(one, "number", place, most=1e6))
        clock = _number(one, "clock", place, most=1e11)
        made.append(Cores(_text(one, "name", place), number, (), tuple(features), clock, levels))
    return tuple(made)


def _by_threads(table: Mapping[str, Any]) -> dict[int, float]:
    for key in table:
        if not key.isdecimal() or int(key) < 1:
            raise RuleError(f"bandwidth is by number of threads, as 4 = 12e9, and {key} is none", place=("bandwidth", key))
    if not table:
        raise RuleError("a target needs its bandwidth, as a table [bandwidth] by number of threads", place=("bandwidth",))
    return {int(key): _number(table, key, ("bandwidth",)) for key in table}


def _operations(table: Mapping[str, Any]) -> dict[str, float]:
    if unknown := sorted(set(table) - set(_OPERATIONS)):
        raise RuleError(f"operations are of int8, f16 and f32 and not of {unknown[0]}", place=("operations", unknown[0]))
    return {key: _number(table, key, ("operations",)) for key in _OPERATIONS}


def _efficiencies(table: Mapping[str, Any]) -> tuple[dict[str, Efficiency], float]:
    """By type, and the share of the bandwidth that is reached."""
    for key in ("other", "attention"):
        if key not in table:
            raise RuleError(f"efficiency needs {key}, as {{one = 0.2, many = 0.4}}", place=("efficiency",))
    found = {}
    for key, value in table.items():
        if key != "reading":
            place = ("efficiency", key)
            if not isinstance(value, dict) or set(value) != {"one", "many"}:
                raise RuleError(f"the efficiency of {key} is given as {{one = 0.2, many = 0.4}}", place=place)
            found[key] = Efficiency(*(_number(value, part, place, most=1.0) for part in ("one", "many")))
    return found, _number(table, "reading", ("efficiency",), most=1.0)


def _table(found: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = found.get(key, {})
    if not isinstance(value, dict):
        raise RuleError(f"{key} is a table, as [{key}]", place=(key,))
    return value


def _text(found: Mapping[str, Any], key: str, place: tuple[str | int, ...]) -> str:
    if not isinstance(value := found.get(key), str) or not value:
        raise RuleError(f"{key} is missing or is no text", place=(*place, key))
    return value


def _known(found: Mapping[str, Any], key: str) -> float | None:
    """A number that a target may leave out."""
    return _number(found, key, ()) if key in found else None


def _number(found: Mapping[str, Any], key: str, place: tuple[str | int, ...], most: float = 1e18, default: float | None = None) -> float:
    """A number above 0 and up to ``most``."""
    value = found.get(key, default)
    if value is None:
        raise RuleError(f"{key} is missing", place=(*place, key))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RuleError(f"{key} is no number", place=(*place, key))
    if not 0 < value <= most:
        raise RuleError(f"{key} is a number above 0 and up to {most:g} and not {value:g}", place=(*place, key))
    return float(value)
