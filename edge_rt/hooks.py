"""The one meeting point of core and plugins: hook specifications and the vocabulary they use.

A plugin imports only this module. It registers under the entry-point group ``edge_rt`` a module or object whose functions
are marked with ``hookimpl``, and declares the interface it was written for with ``EDGE_RT_API = 1``.

The rules of every hook:

- All hooks are optional. None is called in the token loop: the registry calls each when it first needs what the hook offers.
- Results are chained: the offers of all plugins together, built-in plugins first, then by distribution and plugin name.
  That order decides only who keeps a name that two plugins claim; the later claim is reported and dropped.
  Choices are made by score. pluggy's ``tryfirst`` and ``trylast`` have no effect, and hook wrappers are refused.
- An exception in a hook is reported with the plugin's name and drops only that plugin's contribution to that hook,
  unless the user asked for the plugin by name.
- What the objects of a hook raise gets the plugin's name too, except errors of ``edge_rt.errors``: they speak to the user.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import pluggy

from edge_rt.core.engine import (
    AppliesAdapters,
    AppliesCompensation,
    EmbedsText,
    EmbedsTokens,
    Engine,
    EngineInfo,
    HoldsLimits,
    Logits,
    MemoryReport,
    MovesCells,
    PredictsMemory,
    Pruned,
    PrunesCells,
    RemovesCells,
    SequenceBatch,
    TellsProgress,
    Wanted,
)
from edge_rt.errors import (
    AbiMismatch,
    Cancelled,
    ContextError,
    ContextOverflow,
    DataError,
    EdgeError,
    ModelChanged,
    ModelFileError,
    NativeError,
    OptionError,
    OutOfMemory,
    RuleError,
    SessionFileError,
    TrainingError,
    UnsupportedModel,
    UserError,
)
from edge_rt.hardware.profile import Basis, Cache, Cores, HasProfile, Health, Limits, Profile, TellsHealth
from edge_rt.postprocess.protocol import CountsWork, HandlesCut, HoldsText, PostProcessor, PostProcessorFactory

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    import typer

    from edge_rt.chat.template import tokenize_messages
    from edge_rt.config import available_cpus
    from edge_rt.core.context.eviction import Candidate, keep_graded, keep_slide, keep_strict
    from edge_rt.core.context.grading import Contribution, Grade, content_grader
    from edge_rt.core.context.history import Segment
    from edge_rt.core.engine import check_batches, check_fits, check_tokens
    from edge_rt.core.ggml_engine import GgmlEngine as open_ggml_engine
    from edge_rt.core.gguf.lora import LoraFile
    from edge_rt.core.gguf.model_file import ModelFile
    from edge_rt.core.gguf.reader import GGML_TYPES
    from edge_rt.core.gguf.reader import metadata_spans as gguf_metadata_spans
    from edge_rt.core.graph.config import ModelConfig, read_config
    from edge_rt.core.graph.decoder import unsupported as ggml_unsupported
    from edge_rt.core.graph.step import Ubatch, split_ubatches
    from edge_rt.core.kv.positions import PlacedCells, Positions, Run, largest_capacity, next_capacity, saved_mixed, unmoved_cells
    from edge_rt.core.kv.pruning import check_pruning, choose_cells
    from edge_rt.core.weights.error_correction import Compensation, compensation_fingerprint
    from edge_rt.core.weights.gpu_offload import Accelerator
    from edge_rt.deploy.plan import Gain, Pass, Plan
    from edge_rt.hardware.sensors import CpuSensors, cpu_profile
    from edge_rt.hardware.system_files import Latest, Patient
    from edge_rt.hardware.system_files import read_int as read_system_int
    from edge_rt.hardware.system_files import read_text as read_system_text
    from edge_rt.hardware.system_files import subfolders as system_folders
    from edge_rt.hardware.topology import board as board_name
    from edge_rt.hardware.topology import cpu_topology
    from edge_rt.hardware.topology import processors as cpu_processors
    from edge_rt.model_hub import resolve_model
    from edge_rt.native.ggml import cpu_features as ggml_features
    from edge_rt.native.ggml import quantise as quantise_rows
    from edge_rt.native.ggml import vector_length as ggml_vector_length
    from edge_rt.native.libs import built_backends as ggml_backends
    from edge_rt.native.libs import install as install_native_log
    from edge_rt.native.libs import recent_errors as recent_native_errors
    from edge_rt.native.llama import Vocab
    from edge_rt.postprocess.rules import Rules
    from edge_rt.postprocess.text_search import HALF_WIDTH, AhoCorasick, CodeSpans
    from edge_rt.toml_file import read_file as read_toml

API_VERSION = 1
"""Raised when a hook or type here changes so that an existing plugin would break. A plugin declares ``EDGE_RT_API = 1``."""

ENTRY_POINT_GROUP = "edge_rt"
hookspec = pluggy.HookspecMarker("edge_rt")
hookimpl = pluggy.HookimplMarker("edge_rt")


def __getattr__(name: str) -> Any:
    """What few plugins need is imported when it is first asked for, because it costs start-up time."""
    from edge_rt.hook_names import HOMES

    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = HOMES[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)  # the next look-up is an ordinary one
    return value


# Named tuples and not dataclasses, here and in the registry: making a class of the latter costs a millisecond of every start.
# ---- devices ---------------------------------------------------------------------------------------------------------


class Offer(NamedTuple):
    """A device is usable.

    ``score``: the highest wins (CPU: 10); 0 or less is used only when asked for by name.
    ``memory_bytes``: what models may use of it, in bytes, free or not. ``features``: short lower-case names, e.g. ``avx2``, ``dotprod``.
    ``engines``: names of the engines that can drive it, best first; ``"*"`` for any engine that does not refuse.
    ``cpus``: the system's numbers of the CPUs its threads are best kept on (fast cores beside slow ones), () for any.
    """

    score: float
    description: str
    memory_bytes: int
    features: tuple[str, ...] = ()
    engines: tuple[str, ...] = ("ggml",)
    basis: Basis = "unknown"
    cpus: tuple[int, ...] = ()


class Refusal(NamedTuple):
    """A device or engine cannot be used: ``reason`` says why, ``remedy`` what the user can do about it (a clause, no full stop)."""

    reason: str
    remedy: str = ""


@runtime_checkable
class Device(Protocol):
    """Hardware that can run a model. ``probe`` must have no side effects and return in well under a second.

    What only some devices can is in protocols of its own: HasProfile, TellsHealth.
    """

    @property
    def name(self) -> str:
        """Short and unique, e.g. ``cpu``, ``cuda:0``."""
        ...

    def probe(self) -> Offer | Refusal:
        """Look at the hardware. Two calls in a row give equal answers; absent hardware is a Refusal, not an exception."""
        ...


# ---- engines ---------------------------------------------------------------------------------------------------------


class EngineOptions(NamedTuple):
    """What an engine is opened with.

    ``context``: cells per sequence (None: the model's own). ``threads``: None lets the engine choose. ``cpus``: keep to these; () any.
    ``memory``: bytes of weights that may be resident (None: no limit). ``pack``: build and use packed weights.
    ``key_type``: element type of cached keys. ``device``: the chosen device's name; an engine refuses those it cannot drive.
    ``progress`` is told (phase, done, total) during slow steps, on any thread; it stops the opening by raising.
    ``limits``: of power and temperature, to be held while it computes (None: none); an engine that cannot raises OptionError.
    ``compensation``: what corrects the model's products, open as long as the engine is being opened (None: nothing); an engine that cannot
    apply it refuses the model.
    ``extra``: settings of single engines, keyed ``"engine.setting"``; an engine reads its own and leaves the others alone.
    """

    context: int | None = None
    threads: int | None = None
    memory: int | None = None
    pack: bool = True
    key_type: Literal["f16", "q8_0"] = "f16"
    device: str = "cpu"
    progress: Callable[[str, int, int], None] | None = None
    limits: Limits | None = None
    extra: Mapping[str, Any] = MappingProxyType({})
    cpus: tuple[int, ...] = ()
    compensation: Compensation | None = None


@runtime_checkable
class EngineFactory(Protocol):
    """Opens engines of one kind."""

    @property
    def name(self) -> str:
        """Short and unique, e.g. ``ggml``, ``llama_cpp``."""
        ...

    def supports(self, model: ModelFile, options: EngineOptions) -> float | Refusal:
        """A score (ggml: 10, llama_cpp: 1; 0 or less is used only when asked for by name), or why not. Reads the header only."""
        ...

    def open(self, model: ModelFile, options: EngineOptions) -> Engine:
        """Open the model. Raises the errors of ``edge_rt.errors``.

        AbiMismatch and UnsupportedModel make the runtime try the next engine, and say so.

        The runtime reads the vocabulary from the model file. An engine can spare it that: by an attribute ``llama_model``,
        the address of libllama's model, or by an attribute ``vocab``, an object with the methods of the runtime's own.
        """
        ...


# ---- context ---------------------------------------------------------------------------------------------------------


class ContextPolicy(NamedTuple):
    """Chooses what stays in the context when not everything fits.

    ``keep`` gets the candidates, oldest first, and a budget of tokens, and returns the indices of those that stay, rising. They must
    fit the budget, and all that are protected must be among them; ContextOverflow says that this cannot be. The same candidates and
    budget must always give the same answer. It is called only if they do not fit, before a prompt is fed or in the middle of an
    answer, where ContextOverflow ends the answer.

    ``recalls``: what left comes back when a question is close to it, and what a question is close to counts as that much better.
    """

    name: str
    keep: Callable[[Sequence[Candidate], int], Sequence[int]]
    description: str = ""
    recalls: bool = False


class GraderFactory(NamedTuple):
    """Makes a grader: a function that says how much would be lost with a segment of a conversation.

    ``make`` is given a file of weights, whose form is the grader's own affair, or None for the default ones;
    it raises OptionError for a bad file. The same segment must always get the same grade.
    """

    name: str
    make: Callable[[Path | None], Callable[[Segment], Grade]]
    description: str = ""


class Embedder(NamedTuple):
    """Makes vectors of texts, by which recall tells what a question is about, instead of by the model's token embeddings.

    ``embed`` gets one text or more, long or blank ones too, and returns a vector for each, float32 [len(texts), E]: always the same for
    the same text, of any length, as directions alone count. Several threads may call it at once; it loads what it needs when first called.
    ``relevant``: the cosine, between 0 and 1, from which a segment of a conversation counts as close to a question.
    """

    name: str
    embed: Callable[[Sequence[str]], npt.NDArray[np.float32]]
    relevant: float
    description: str = ""


class HookSpecs:
    """Every hook, by stage. All are optional."""

    @hookspec
    def edge_rt_devices(self) -> Iterable[Device]:  # type: ignore[empty-body]
        """Devices: hardware this plugin knows how to look for.

        Called once per registry, before the first model is opened. Return a device for each place to look, found or not:
        ``Device.probe`` says whether it is there, and is called at most once per device and registry.
        """

    @hookspec
    def edge_rt_engines(self) -> Iterable[EngineFactory]:  # type: ignore[empty-body]
        """Engines: ways to run a model.

        Called once per registry, before the first model is opened. ``EngineFactory.supports`` is called for every model opened;
        the runtime opens the highest score, and the next one when that raises AbiMismatch or UnsupportedModel.
        """

    @hookspec
    def edge_rt_context_policies(self) -> Iterable[ContextPolicy]:  # type: ignore[empty-body]
        """Context: policies, which choose what leaves a context that gets short.

        Called once per registry, when a policy is first needed. The built-in ones are ``strict``, ``slide`` and ``graded``.
        """

    @hookspec
    def edge_rt_graders(self) -> Iterable[GraderFactory]:  # type: ignore[empty-body]
        """Context: graders, which say what segments of a conversation a full context can best do without.

        Called once per registry, when a grader is first needed. ``GraderFactory.make`` is called for each use of a grader, the
        function it returns once per segment. The built-in one is ``content``.
        """

    @hookspec
    def edge_rt_embedders(self) -> Iterable[Embedder]:  # type: ignore[empty-body]
        """Context: embedders, by which what left the context is recalled when a question is about it.

        Called once per registry, when a model is opened with an embedder. ``Embedder.embed`` is called when a conversation no longer
        fits, once for each segment and question. There is no built-in one.
        """

    @hookspec
    def edge_rt_post_processors(self) -> Iterable[PostProcessorFactory]:  # type: ignore[empty-body]
        """Assemble: text transducers a request may name.

        Called once per registry, when a post-processor is first needed. ``PostProcessorFactory.compile`` is called for every version of
        the rules, what it returns for every stream. The built-in one is ``redaction``; the distribution edge-rt-text has
        ``punctuation``, ``terminology`` and ``language_tags``.
        """

    @hookspec
    def edge_rt_cli_commands(self, app: typer.Typer) -> None:
        """CLI: add commands to ``edge-rt``.

        Called once, when the command line starts. A plugin that fails half-way loses all the commands it added.
        """

    @hookspec
    def edge_rt_compiler_targets(self) -> Iterable[Path]:  # type: ignore[empty-body]
        """Compiler: devices a model can be fitted to, as TOML files whose names (without ``.toml``) are the targets'.

        Called once per registry, when a target is first needed. ``edge_rt/deploy/targets`` shows what is in one.
        """

    @hookspec
    def edge_rt_compiler_passes(self) -> Iterable[Pass]:  # type: ignore[empty-body]
        """Compiler: passes that fit a model to a device. Called once per compilation; they come after the built-in ones."""


__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "GGML_TYPES",
    "HALF_WIDTH",
    "AbiMismatch",
    "Accelerator",
    "AhoCorasick",
    "AppliesAdapters",
    "AppliesCompensation",
    "Basis",
    "Cache",
    "Cancelled",
    "Candidate",
    "CodeSpans",
    "Compensation",
    "ContextError",
    "ContextOverflow",
    "ContextPolicy",
    "Contribution",
    "Cores",
    "CountsWork",
    "CpuSensors",
    "DataError",
    "Device",
    "EdgeError",
    "Embedder",
    "EmbedsText",
    "EmbedsTokens",
    "Engine",
    "EngineFactory",
    "EngineInfo",
    "EngineOptions",
    "Gain",
    "Grade",
    "GraderFactory",
    "HandlesCut",
    "HasProfile",
    "Health",
    "HoldsLimits",
    "HoldsText",
    "HookSpecs",
    "Latest",
    "Limits",
    "Logits",
    "LoraFile",
    "MemoryReport",
    "ModelChanged",
    "ModelConfig",
    "ModelFile",
    "ModelFileError",
    "MovesCells",
    "NativeError",
    "Offer",
    "OptionError",
    "OutOfMemory",
    "Pass",
    "Patient",
    "PlacedCells",
    "Plan",
    "Positions",
    "PostProcessor",
    "PostProcessorFactory",
    "PredictsMemory",
    "Profile",
    "Pruned",
    "PrunesCells",
    "Refusal",
    "RemovesCells",
    "RuleError",
    "Rules",
    "Run",
    "Segment",
    "SequenceBatch",
    "SessionFileError",
    "TellsHealth",
    "TellsProgress",
    "TrainingError",
    "Ubatch",
    "UnsupportedModel",
    "UserError",
    "Vocab",
    "Wanted",
    "available_cpus",
    "board_name",
    "check_batches",
    "check_fits",
    "check_pruning",
    "check_tokens",
    "choose_cells",
    "compensation_fingerprint",
    "content_grader",
    "cpu_processors",
    "cpu_profile",
    "cpu_topology",
    "ggml_backends",
    "ggml_features",
    "ggml_unsupported",
    "ggml_vector_length",
    "gguf_metadata_spans",
    "hookimpl",
    "hookspec",
    "install_native_log",
    "keep_graded",
    "keep_slide",
    "keep_strict",
    "largest_capacity",
    "next_capacity",
    "open_ggml_engine",
    "quantise_rows",
    "read_config",
    "read_system_int",
    "read_system_text",
    "read_toml",
    "recent_native_errors",
    "resolve_model",
    "saved_mixed",
    "split_ubatches",
    "system_folders",
    "tokenize_messages",
    "unmoved_cells",
]  # fmt: skip
