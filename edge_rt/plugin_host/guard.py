"""What plugins hand in, wrapped so that every object knows its plugin and every unexpected exception names it.

Errors of ``edge_rt.errors`` go through unchanged: a plugin raises them to speak to the user. Engines are not wrapped: they are
called in the token loop, and raise errors of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from edge_rt.errors import EdgeError, PluginError
from edge_rt.hooks import (
    ContextPolicy,
    Device,
    Embedder,
    Engine,
    EngineFactory,
    EngineOptions,
    GraderFactory,
    HasProfile,
    Health,
    Offer,
    PostProcessor,
    PostProcessorFactory,
    Profile,
    Refusal,
    TellsHealth,
)

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from edge_rt.hooks import Candidate, Grade, ModelFile, Rules, Segment

_T = TypeVar("_T")


def _call(plugin: str, what: str, expected: Any, function: Callable[[], _T]) -> _T:
    """The function's result, if it is of the expected type. Raises PluginError with the plugin's name otherwise."""
    try:
        result = function()
    except EdgeError:
        raise
    except Exception as error:
        raise failure(plugin, what, error) from error
    if not isinstance(result, expected):
        raise PluginError(f"plugin {plugin}: {what} returned {type(result).__name__}; report this to the plugin's author")
    return result


def failure(plugin: str, what: str, error: BaseException) -> PluginError:
    """The error for an exception that a plugin should not have raised."""
    return PluginError(f"plugin {plugin}: {what} raised {type(error).__name__}: {error}; report this to the plugin's author")


class PluginDevice(NamedTuple):
    """A device and the plugin it came from."""

    plugin: str
    device: Device

    @property
    def name(self) -> str:
        """The device's name."""
        return self.device.name

    def probe(self) -> Offer | Refusal:
        """Look at the hardware. Raises PluginError."""
        return _call(self.plugin, f"probing device {self.name}", (Offer, Refusal), self.device.probe)

    def profile(self) -> Profile | None:
        """What it is like, None if it does not say; may measure for half a second. Raises the errors of ``edge_rt.errors``."""
        if not isinstance(self.device, HasProfile):
            return None
        from edge_rt.profile_check import profile_faults

        profile = _call(self.plugin, f"the profile of device {self.name}", Profile, self.device.profile)
        self._refuse("the profile", profile_faults(profile))
        return profile

    def health(self) -> Health | None:
        """How it is now, None if it does not say. Raises PluginError."""
        if not isinstance(self.device, TellsHealth):
            return None
        from edge_rt.profile_check import health_faults

        health = _call(self.plugin, f"the health of device {self.name}", Health, self.device.health)
        self._refuse("the health", health_faults(health))
        return health

    def _refuse(self, what: str, faults: Iterable[str]) -> None:
        """Raise PluginError for figures that cannot be true, which all that plan with them would carry on."""
        if fault := next(iter(faults), None):
            raise PluginError(f"plugin {self.plugin}: {what} of device {self.name} cannot be true: {fault}")


class PluginEngineFactory(NamedTuple):
    """An engine factory and the plugin it came from."""

    plugin: str
    factory: EngineFactory

    @property
    def name(self) -> str:
        """The engine's name."""
        return self.factory.name

    def supports(self, model: ModelFile, options: EngineOptions) -> float | Refusal:
        """A score or why not. Raises PluginError."""
        return _call(self.plugin, f"engine {self.name}: supports", (float, int, Refusal), lambda: self.factory.supports(model, options))

    def open(self, model: ModelFile, options: EngineOptions) -> Engine:
        """Open the model. Raises the errors of ``edge_rt.errors``."""
        return _call(self.plugin, f"engine {self.name}: open", (Engine,), lambda: self.factory.open(model, options))


class PluginContextPolicy(NamedTuple):
    """A context policy and the plugin it came from."""

    plugin: str
    policy: ContextPolicy

    @property
    def name(self) -> str:
        """The policy's name."""
        return self.policy.name

    @property
    def recalls(self) -> bool:
        """Whether what left comes back when a question is close to it."""
        return self.policy.recalls

    def keep(self, candidates: Sequence[Candidate], budget: int) -> list[int]:
        """The candidates that stay, rising. Raises ContextOverflow if that cannot be, PluginError if the policy breaks its rules."""
        what = f"context policy {self.name}"
        kept = list(_call(self.plugin, what, (Sequence,), lambda: self.policy.keep(candidates, budget)))
        if kept != sorted({i for i in kept if isinstance(i, int) and 0 <= i < len(candidates)}):
            raise PluginError(f"plugin {self.plugin}: {what} kept {kept}, which are no rising indices of {len(candidates)} candidates")
        total = sum(candidates[i].tokens for i in kept)
        if total > budget:
            raise PluginError(f"plugin {self.plugin}: {what} kept {total} tokens where {budget} are allowed")
        for i in {i for i, candidate in enumerate(candidates) if candidate.protections} - set(kept):
            raise PluginError(f"plugin {self.plugin}: {what} dropped candidate {i}, which is protected ({candidates[i].protections[0]})")
        return kept


class PluginGraderFactory(NamedTuple):
    """A grader factory and the plugin it came from."""

    plugin: str
    factory: GraderFactory

    @property
    def name(self) -> str:
        """The grader's name."""
        return self.factory.name

    def start(self, weights: Path | None = None) -> Callable[[Segment], Grade]:
        """A grader with weights from a file, or its default ones. Raises OptionError, PluginError; so does the grader."""
        from edge_rt.hooks import Grade

        function = _call(self.plugin, f"making grader {self.name}", Callable, lambda: self.factory.make(weights))

        def grade(segment: Segment) -> Grade:
            made = _call(self.plugin, f"grader {self.name}", Grade, lambda: function(segment))
            if not isinstance(made.score, (int, float)) or not 0 <= made.score <= 1:
                raise PluginError(f"plugin {self.plugin}: grader {self.name} gave the score {made.score}; it must be from 0 to 1")
            return made

        return grade


class PluginEmbedder(NamedTuple):
    """An embedder and the plugin it came from."""

    plugin: str
    embedder: Embedder

    @property
    def name(self) -> str:
        """The embedder's name."""
        return self.embedder.name

    @property
    def description(self) -> str:
        """One line for listings."""
        return self.embedder.description

    @property
    def relevant(self) -> float:
        """The cosine from which a segment counts as close to a question. Raises PluginError."""
        relevant = self.embedder.relevant
        if not isinstance(relevant, (int, float)) or not 0 < relevant < 1:
            raise PluginError(f"plugin {self.plugin}: embedder {self.name} has {relevant} for relevant; it must be between 0 and 1")
        return relevant

    def start(self) -> Callable[[Sequence[str]], npt.NDArray[np.float32]]:
        """A function that makes vectors of length 1, all of one width: float32 [len(texts), E]. It raises PluginError."""
        what, width = f"embedder {self.name}", 0

        def embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
            nonlocal width
            import numpy as np

            # Lengths of large float32 values overflow; what is no array of numbers is the plugin's fault too.
            made = _call(self.plugin, what, np.ndarray, lambda: np.asarray(self.embedder.embed(texts), dtype=np.float64))
            if made.ndim != 2 or len(made) != len(texts) or made.shape[1] != (width or made.shape[1]) or not made.size:
                expected = f"[{len(texts)}, {width or 'E'}]"
                raise PluginError(f"plugin {self.plugin}: {what} returned an array {list(made.shape)} where {expected} is expected")
            if not np.isfinite(made).all():
                raise PluginError(f"plugin {self.plugin}: {what} returned vectors that are not finite")
            width = made.shape[1]
            lengths = np.linalg.norm(made, axis=1, keepdims=True)
            return (made / np.where(lengths > 0, lengths, 1)).astype(np.float32)

        return embed


class PluginPostProcessorFactory(NamedTuple):
    """A post-processor factory and the plugin it came from."""

    plugin: str
    factory: PostProcessorFactory

    @property
    def name(self) -> str:
        """The post-processor's name."""
        return self.factory.name

    @property
    def description(self) -> str:
        """One line for listings."""
        return self.factory.description

    @property
    def fails_closed(self) -> bool:
        """Must the stream stop if the post-processor fails?"""
        return self.factory.fails_closed

    def compile(self, rules: Rules) -> Callable[[], PostProcessor]:
        """What makes a post-processor for one stream by these rules. Raises RuleError, PluginError; so does the function."""
        what = f"post-processor {self.name}"
        make = _call(self.plugin, f"compiling the rules of {what}", Callable, lambda: self.factory.compile(rules))
        return lambda: _call(self.plugin, f"making {what}", PostProcessor, make)
