"""The one meeting point of core and plugins: hook specifications and the vocabulary they use.

A plugin imports only this module. It registers under the entry-point group ``edge_rt`` a module or object whose functions
are marked with ``hookimpl``. Every hook is called once, when the registry collects what is installed (not in the token loop),
and its results are chained. An exception in a hook is reported with the plugin's name and drops only that plugin's contribution,
unless the user asked for the plugin by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import pluggy

from edge_rt.core.engine import Engine, EngineInfo, Logits, MemoryReport, Part, Wanted
from edge_rt.errors import (
    Cancelled,
    ContextError,
    EdgeError,
    ModelFileError,
    NativeError,
    OptionError,
    OutOfMemory,
    SessionFileError,
    UnsupportedModel,
    UserError,
)

if TYPE_CHECKING:
    import typer

    from edge_rt.core.load.model_file import ModelFile

API_VERSION = 1
"""Raised when a hook or type here changes so that an existing plugin would break. A plugin declares ``EDGE_RT_API = 1``."""

ENTRY_POINT_GROUP = "edge_rt"
hookspec = pluggy.HookspecMarker("edge_rt")
hookimpl = pluggy.HookimplMarker("edge_rt")

Basis = Literal["measured", "simulated", "projected", "unknown"]
"""What a stated capability rests on."""


# ---- devices ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Offer:
    """A device is usable. The highest score wins (CPU: 10); ``engines`` are those that can run on it, best first."""

    score: float
    description: str
    memory_bytes: int
    features: tuple[str, ...] = ()
    engines: tuple[str, ...] = ("ggml",)
    basis: Basis = "unknown"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A device or engine cannot be used: why, and what the user can do about it."""

    reason: str
    remedy: str = ""


@runtime_checkable
class Device(Protocol):
    """Hardware that can run a model. ``probe`` must have no side effects and return in well under a second."""

    @property
    def name(self) -> str:
        """Short and unique, e.g. ``cpu``, ``cuda:0``."""
        ...

    def probe(self) -> Offer | Refusal:
        """Look at the hardware."""
        ...


# ---- engines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine is opened with.

    ``context``: cells per sequence (None: the model's own). ``threads``: None lets the engine choose.
    ``memory``: bytes of weights that may be resident (None: no limit). ``pack``: build and use packed weights.
    ``key_type``: element type of cached keys. ``progress`` is told (phase, done, total) during slow steps, on any thread.
    """

    context: int | None = None
    threads: int | None = None
    memory: int | None = None
    pack: bool = True
    key_type: Literal["f16", "q8_0"] = "f16"
    device: str = "cpu"
    progress: Callable[[str, int, int], None] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class EngineFactory(Protocol):
    """Opens engines of one kind."""

    @property
    def name(self) -> str:
        """Short and unique, e.g. ``ggml``, ``llama_cpp``."""
        ...

    def supports(self, model: ModelFile, options: EngineOptions) -> float | Refusal:
        """A score (ggml: 10, llama_cpp: 1), or why not. Reads the header only."""
        ...

    def open(self, model: ModelFile, options: EngineOptions) -> Engine:
        """Open the model. Raises the errors of ``edge_rt.errors``; AbiMismatch makes the runtime try the next engine."""
        ...


# ---- context ---------------------------------------------------------------------------------------------------------


@runtime_checkable
class ContextPolicy(Protocol):
    """Decides what happens to a prompt that does not fit."""

    @property
    def name(self) -> str:
        """Short and unique, e.g. ``refuse``."""
        ...

    def fit(self, tokens: Sequence[int], allowed: int) -> Sequence[int]:
        """Return the tokens to use, at most ``allowed``; raise ContextError to refuse."""
        ...


# ---- post-processing -------------------------------------------------------------------------------------------------


@runtime_checkable
class PostProcessor(Protocol):
    """An incremental text transducer, one instance a stream.

    Contract: for every way of splitting a text into pieces, the joined results of ``feed`` and the final ``flush`` are equal;
    what was returned is never taken back; what is held back is bounded; cost is linear in the text.
    """

    def feed(self, text: str) -> str:
        """Take more text and return what can no longer change."""
        ...

    def flush(self) -> str:
        """The stream ended (for whatever reason): return the rest."""
        ...


@dataclass(frozen=True, slots=True)
class PostProcessorFactory:
    """Makes a post-processor for one stream. ``fails_closed``: if it raises, the stream stops rather than going on without it."""

    name: str
    make: Callable[[], PostProcessor]
    description: str = ""
    fails_closed: bool = False


class HookSpecs:
    """Every hook, by stage. All are optional."""

    @hookspec
    def edge_rt_devices(self) -> Iterable[Device]:  # type: ignore[empty-body]
        """Devices: hardware this plugin knows how to look for. Called once per process, before the first model is opened."""

    @hookspec
    def edge_rt_engines(self) -> Iterable[EngineFactory]:  # type: ignore[empty-body]
        """Engines: ways to run a model. Called once per process, before the first model is opened."""

    @hookspec
    def edge_rt_context_policies(self) -> Iterable[ContextPolicy]:  # type: ignore[empty-body]
        """Context: policies for prompts that do not fit. Called once per process."""

    @hookspec
    def edge_rt_post_processors(self) -> Iterable[PostProcessorFactory]:  # type: ignore[empty-body]
        """Assemble: text transducers a request may name. Called once per process; ``make`` is called once per stream."""

    @hookspec
    def edge_rt_cli_commands(self, app: typer.Typer) -> None:
        """CLI: add commands to ``edge-rt``. Called once, when the command line starts."""

    @hookspec
    def edge_rt_compiler_passes(self) -> Iterable[Any]:  # type: ignore[empty-body]
        """Compiler: passes that fit a model to a device. Called once per compilation."""


__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "Basis",
    "Cancelled",
    "ContextError",
    "ContextPolicy",
    "Device",
    "EdgeError",
    "Engine",
    "EngineFactory",
    "EngineInfo",
    "EngineOptions",
    "HookSpecs",
    "Logits",
    "MemoryReport",
    "ModelFile",
    "ModelFileError",
    "NativeError",
    "Offer",
    "OptionError",
    "OutOfMemory",
    "Part",
    "PostProcessor",
    "PostProcessorFactory",
    "Refusal",
    "SessionFileError",
    "UnsupportedModel",
    "UserError",
    "Wanted",
    "hookimpl",
    "hookspec",
]
