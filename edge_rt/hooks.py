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

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import pluggy

from edge_rt.core.engine import AppliesAdapters as AppliesAdapters
from edge_rt.core.engine import AppliesCompensation as AppliesCompensation
from edge_rt.core.engine import EmbedsText as EmbedsText
from edge_rt.core.engine import EmbedsTokens as EmbedsTokens
from edge_rt.core.engine import Engine as Engine
from edge_rt.core.engine import EngineInfo as EngineInfo
from edge_rt.core.engine import EngineOptions as EngineOptions
from edge_rt.core.engine import HoldsLimits as HoldsLimits
from edge_rt.core.engine import Logits as Logits
from edge_rt.core.engine import MemoryReport as MemoryReport
from edge_rt.core.engine import MovesCells as MovesCells
from edge_rt.core.engine import PredictsMemory as PredictsMemory
from edge_rt.core.engine import Pruned as Pruned
from edge_rt.core.engine import PrunesCells as PrunesCells
from edge_rt.core.engine import RemovesCells as RemovesCells
from edge_rt.core.engine import SequenceBatch as SequenceBatch
from edge_rt.core.engine import TellsProgress as TellsProgress
from edge_rt.core.engine import Wanted as Wanted
from edge_rt.deferred_imports import Deferred
from edge_rt.errors import AbiMismatch as AbiMismatch
from edge_rt.errors import Cancelled as Cancelled
from edge_rt.errors import ContextError as ContextError
from edge_rt.errors import ContextOverflow as ContextOverflow
from edge_rt.errors import DataError as DataError
from edge_rt.errors import EdgeError as EdgeError
from edge_rt.errors import ModelChanged as ModelChanged
from edge_rt.errors import ModelFileError as ModelFileError
from edge_rt.errors import NativeError as NativeError
from edge_rt.errors import OptionError as OptionError
from edge_rt.errors import OutOfMemory as OutOfMemory
from edge_rt.errors import RuleError as RuleError
from edge_rt.errors import SessionFileError as SessionFileError
from edge_rt.errors import TrainingError as TrainingError
from edge_rt.errors import UnsupportedModel as UnsupportedModel
from edge_rt.errors import UserError as UserError
from edge_rt.hardware.profile import Basis as Basis
from edge_rt.hardware.profile import Cache as Cache
from edge_rt.hardware.profile import Cores as Cores
from edge_rt.hardware.profile import HasProfile as HasProfile
from edge_rt.hardware.profile import Health as Health
from edge_rt.hardware.profile import Limits as Limits
from edge_rt.hardware.profile import Profile as Profile
from edge_rt.hardware.profile import TellsHealth as TellsHealth
from edge_rt.postprocess.protocol import CountsWork as CountsWork
from edge_rt.postprocess.protocol import HandlesCut as HandlesCut
from edge_rt.postprocess.protocol import HoldsText as HoldsText
from edge_rt.postprocess.protocol import PostProcessor as PostProcessor
from edge_rt.postprocess.protocol import PostProcessorFactory as PostProcessorFactory

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt
    import typer

_deferred = Deferred(globals())
with _deferred:  # what few plugins need, or all need later: it costs start-up time
    from edge_rt.chat.template import tokenize_messages as tokenize_messages
    from edge_rt.config import available_cpus as available_cpus
    from edge_rt.core.context.eviction import Candidate as Candidate
    from edge_rt.core.context.eviction import keep_graded as keep_graded
    from edge_rt.core.context.eviction import keep_slide as keep_slide
    from edge_rt.core.context.eviction import keep_strict as keep_strict
    from edge_rt.core.context.grading import Contribution as Contribution
    from edge_rt.core.context.grading import Grade as Grade
    from edge_rt.core.context.grading import content_grader as content_grader
    from edge_rt.core.context.history import Segment as Segment
    from edge_rt.core.engine import check_batches as check_batches
    from edge_rt.core.engine import check_fits as check_fits
    from edge_rt.core.engine import check_tokens as check_tokens
    from edge_rt.core.ggml_engine import open_ggml_engine as open_ggml_engine
    from edge_rt.core.gguf.lora import LoraFile as LoraFile
    from edge_rt.core.gguf.model_file import ModelFile as ModelFile
    from edge_rt.core.gguf.reader import GGML_TYPES as GGML_TYPES
    from edge_rt.core.gguf.reader import gguf_metadata_spans as gguf_metadata_spans
    from edge_rt.core.graph.config import ModelConfig as ModelConfig
    from edge_rt.core.graph.config import read_config as read_config
    from edge_rt.core.graph.decoder import ggml_unsupported as ggml_unsupported
    from edge_rt.core.graph.step import Ubatch as Ubatch
    from edge_rt.core.graph.step import split_ubatches as split_ubatches
    from edge_rt.core.kv.positions import PlacedCells as PlacedCells
    from edge_rt.core.kv.positions import Positions as Positions
    from edge_rt.core.kv.positions import Run as Run
    from edge_rt.core.kv.positions import largest_capacity as largest_capacity
    from edge_rt.core.kv.positions import next_capacity as next_capacity
    from edge_rt.core.kv.positions import saved_mixed as saved_mixed
    from edge_rt.core.kv.positions import unmoved_cells as unmoved_cells
    from edge_rt.core.kv.pruning import check_pruning as check_pruning
    from edge_rt.core.kv.pruning import choose_cells as choose_cells
    from edge_rt.core.weights.error_correction import Compensation as Compensation
    from edge_rt.core.weights.error_correction import compensation_fingerprint as compensation_fingerprint
    from edge_rt.core.weights.gpu_offload import Accelerator as Accelerator
    from edge_rt.deploy.plan import Gain as Gain
    from edge_rt.deploy.plan import Pass as Pass
    from edge_rt.deploy.plan import Plan as Plan
    from edge_rt.hardware.sensors import CpuSensors as CpuSensors
    from edge_rt.hardware.sensors import cpu_profile as cpu_profile
    from edge_rt.hardware.system_files import Latest as Latest
    from edge_rt.hardware.system_files import Patient as Patient
    from edge_rt.hardware.system_files import read_system_int as read_system_int
    from edge_rt.hardware.system_files import read_system_text as read_system_text
    from edge_rt.hardware.system_files import system_folders as system_folders
    from edge_rt.hardware.topology import board_name as board_name
    from edge_rt.hardware.topology import cpu_processors as cpu_processors
    from edge_rt.hardware.topology import cpu_topology as cpu_topology
    from edge_rt.model_hub import resolve_model as resolve_model
    from edge_rt.native.ggml import ggml_features as ggml_features
    from edge_rt.native.ggml import ggml_vector_length as ggml_vector_length
    from edge_rt.native.ggml import quantise_rows as quantise_rows
    from edge_rt.native.libs import ggml_backends as ggml_backends
    from edge_rt.native.libs import install_native_log as install_native_log
    from edge_rt.native.libs import recent_native_errors as recent_native_errors
    from edge_rt.native.llama import Vocab as Vocab
    from edge_rt.postprocess.rules import Rules as Rules
    from edge_rt.postprocess.text_search import HALF_WIDTH as HALF_WIDTH
    from edge_rt.postprocess.text_search import AhoCorasick as AhoCorasick
    from edge_rt.postprocess.text_search import CodeSpans as CodeSpans
    from edge_rt.toml_file import read_toml as read_toml


def __getattr__(name: str) -> Any:
    return _deferred.load(name)


API_VERSION = 1
"""Raised when a hook or type here changes so that an existing plugin would break. A plugin declares ``EDGE_RT_API = 1``."""

ENTRY_POINT_GROUP = "edge_rt"
hookspec = pluggy.HookspecMarker("edge_rt")
hookimpl = pluggy.HookimplMarker("edge_rt")


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
