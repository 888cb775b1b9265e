"""The plugin host: what is installed, what each plugin offers, and which offer to use.

A plugin that cannot be imported, was written for another plugin API, misspells a hook or raises is reported (``Registry.plugins``,
and a log line) and never fatal, unless it was asked for by name. Hooks are called when their results are first needed; a session
keeps the objects it got, so nothing here is touched in the token loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pluggy

from edge_rt.errors import PluginError, UnsupportedModel
from edge_rt.hooks import (
    ENTRY_POINT_GROUP,
    ContextPolicy,
    Device,
    Embedder,
    EngineFactory,
    EngineOptions,
    GraderFactory,
    HookSpecs,
    Offer,
    PostProcessorFactory,
    Refusal,
)
from edge_rt.plugin_host import entry_points as installed
from edge_rt.plugin_host.check import Rejected, State, checked, fresh_modules, imported, sentence, unknown, unmarked
from edge_rt.plugin_host.guard import (
    PluginContextPolicy,
    PluginDevice,
    PluginEmbedder,
    PluginEngineFactory,
    PluginGraderFactory,
    PluginPostProcessorFactory,
    failure,
)

if TYPE_CHECKING:
    import typer

    from edge_rt.hooks import ModelFile, Pass

# The entry points of this distribution, for a source tree that is not installed or whose metadata is old. A test holds them equal.
BUILT_INS = {
    "context_policies": "edge_rt.plugins.context_policies",
    "cpu": "edge_rt.plugins.cpu",
    "ggml": "edge_rt.plugins.ggml",
    "grader_content": "edge_rt.plugins.grader_content",
    "llama_cpp": "edge_rt.plugins.llama_cpp",
    "redaction": "edge_rt.plugins.redaction",
}
OWN_PLUGINS = {"language_tags": "edge-rt-text", "punctuation": "edge-rt-text", "terminology": "edge-rt-text"}
"""Plugins that are in a distribution of this project, installed by an extra of edge-rt: plugin -> distribution."""
EXTRAS = {"edge-rt-text": "edge-rt[text]"}
"""Distribution -> what pip is given to install it."""

_T = TypeVar("_T")


class PluginStatus(NamedTuple):
    """What became of a plugin. ``reason`` is empty while it is ok; ``hooks`` are the names of those it implements."""

    name: str
    distribution: str
    version: str
    state: State
    reason: str = ""
    hooks: tuple[str, ...] = ()


class DeviceChoice(NamedTuple):
    """The device to use and what it offers."""

    device: PluginDevice
    offer: Offer


class EngineChoice(NamedTuple):
    """Engines that can run a model, best first, and why the others cannot, by engine name."""

    candidates: tuple[tuple[PluginEngineFactory, float], ...]
    refusals: Mapping[str, Refusal]


class Registry:
    """Installed plugins and what they offer. Make one with ``Registry.load``."""

    def __init__(self, required: Iterable[str] = ()) -> None:
        self._manager = pluggy.PluginManager("edge_rt")
        self._manager.add_hookspecs(HookSpecs)
        self._required = frozenset(required)
        self._status: dict[str, PluginStatus] = {}
        self._collected: dict[str, dict[str, Any]] = {}
        self._probed: dict[str, Offer | Refusal] = {}
        self._points: dict[str, installed.EntryPoint] = {}
        self._lock = threading.RLock()  # what was collected while code is reloaded would be kept with the old
        self.generation = 0
        """How often code was reloaded: what was made of an earlier generation's is to be made again."""

    @classmethod
    def load(
        cls,
        *,
        entry_points: bool = True,
        disabled: Iterable[str] = (),
        required: Iterable[str] = (),
        plugins: Mapping[str, object] | None = None,
    ) -> Registry:
        """Register the built-in plugins, those of installed distributions, and ``plugins`` (objects by name).

        ``entry_points`` False leaves out other distributions'. ``disabled`` names plugins not to import (unknown names do nothing).
        Raises PluginError if a plugin in ``required`` is missing, disabled, or fails now or later.
        """
        registry = cls(required)
        off = frozenset(disabled)
        for point in installed.with_built_ins(ENTRY_POINT_GROUP, BUILT_INS, others=entry_points):
            registry._points.setdefault(point.name, point)
            registry._add(point.name, point.distribution, point.version, point.load, disabled=point.name in off)
        for name, plugin in (plugins or {}).items():
            registry._add(name, "", "", lambda plugin=plugin: plugin, disabled=name in off)
        missing = sorted(registry._required - registry._status.keys())
        if missing:
            if absent := registry.not_installed(missing[0]):
                raise PluginError(f"the plugin {absent}")
            raise PluginError(f"no plugin named {missing[0]} is installed; installed are {', '.join(registry._status) or 'none'}")
        return registry

    @property
    def plugins(self) -> tuple[PluginStatus, ...]:
        """Every plugin found, in the order in which their offers are chained."""
        return tuple(self._status.values())

    def devices(self) -> Mapping[str, PluginDevice]:
        """Devices by name, usable or not."""
        return self._collect("edge_rt_devices", Device, PluginDevice)

    def engines(self) -> Mapping[str, PluginEngineFactory]:
        """Engine factories by name."""
        return self._collect("edge_rt_engines", EngineFactory, PluginEngineFactory)

    def context_policies(self) -> Mapping[str, PluginContextPolicy]:
        """Context policies by name."""
        return self._collect("edge_rt_context_policies", ContextPolicy, PluginContextPolicy)

    def graders(self) -> Mapping[str, PluginGraderFactory]:
        """Grader factories by name."""
        return self._collect("edge_rt_graders", GraderFactory, PluginGraderFactory)

    def embedders(self) -> Mapping[str, PluginEmbedder]:
        """Embedders by name."""
        return self._collect("edge_rt_embedders", Embedder, PluginEmbedder)

    def post_processors(self) -> Mapping[str, PluginPostProcessorFactory]:
        """Post-processor factories by name."""
        return self._collect("edge_rt_post_processors", PostProcessorFactory, PluginPostProcessorFactory)

    def context_policy(self, name: str) -> PluginContextPolicy:
        """A context policy by name. Raises PluginError."""
        return self._named("context policy", self.context_policies(), name)

    def grader(self, name: str) -> PluginGraderFactory:
        """A grader factory by name. Raises PluginError."""
        return self._named("grader", self.graders(), name)

    def embedder(self, name: str) -> PluginEmbedder:
        """An embedder by name. Raises PluginError."""
        return self._named("embedder", self.embedders(), name)

    def post_processor(self, name: str) -> PluginPostProcessorFactory:
        """A post-processor factory by name. Raises PluginError."""
        return self._named("post-processor", self.post_processors(), name)

    def trusted(self, plugin: str) -> bool:
        """Whether a plugin is of this project: its post-processors run on the stream's thread, those of others on their own, timed."""
        return self._status[plugin].distribution in (installed.OWN_DISTRIBUTION, *EXTRAS)

    def not_installed(self, plugin: str) -> str | None:
        """What to say of a plugin of this project whose distribution is not installed, with the command; None for any other name."""
        if plugin in self._status or plugin not in OWN_PLUGINS:
            return None
        return f"{plugin} is not installed; pip install '{EXTRAS[OWN_PLUGINS[plugin]]}'"

    def add_cli_commands(self, app: typer.Typer) -> None:
        """Let every plugin add commands to ``app``; one that raises adds none."""
        for plugin, function in self._implementations("edge_rt_cli_commands"):
            commands, groups = list(app.registered_commands), list(app.registered_groups)
            try:
                function(app)
            except Exception as error:
                app.registered_commands, app.registered_groups = commands, groups
                self._fail(plugin, str(failure(plugin, "edge_rt_cli_commands", error)), error)

    def compiler_passes(self) -> list[Pass]:
        """Fresh compiler passes of all plugins."""
        return self._chained("edge_rt_compiler_passes")

    def compiler_targets(self) -> list[Path]:
        """Files of targets of all plugins."""
        return [Path(path) for path in self._chained("edge_rt_compiler_targets")]

    def _chained(self, hook: str) -> list[Any]:
        """What all plugins offer; one that raises offers nothing."""
        offers: list[Any] = []
        for plugin, function in self._implementations(hook):
            try:
                offers += function() or ()
            except Exception as error:
                self._fail(plugin, str(failure(plugin, hook, error)), error)
        return offers

    def reload(self, plugin: str) -> None:
        """Import the code of an installed plugin anew. What was made with the old code goes on with it; hooks are called again.

        Raises PluginError, and then everything is as it was.
        """
        point, status = self._points.get(plugin), self._status.get(plugin)
        if point is None or status is None or status.state == "disabled":
            raise PluginError(f"no plugin named {plugin} can be reloaded; see `edge-rt plugins`")
        with self._lock:
            hooks = self._exchange(plugin, point)
            self._status[plugin] = status._replace(state="ok", reason="", hooks=hooks)
            self._collected.clear()
            self._probed.clear()
            self.generation += 1

    def _exchange(self, plugin: str, point: installed.EntryPoint) -> tuple[str, ...]:
        """Register a plugin's code anew and return its hooks. Raises PluginError, and then the old is registered."""
        registered = self._manager.get_plugin(plugin)
        with fresh_modules(point) as keep:
            try:
                fresh = imported(point.load)
                if registered is not None:
                    self._manager.unregister(name=plugin)
                hooks = self._register(plugin, fresh)
            except Rejected as rejected:
                if registered is not None and not self._manager.has_plugin(plugin):
                    self._manager.register(registered, plugin)
                raise PluginError(f"plugin {plugin} goes on with its old code: {rejected}") from rejected.__cause__
            keep()
        return hooks

    # ---- choosing ----------------------------------------------------------------------------------------------------

    def probe(self, name: str) -> Offer | Refusal:
        """What a device says of itself, asked once; one that raises refuses. Raises PluginError if there is no such device."""
        device = self._named("device", self.devices(), name)
        if name not in self._probed:
            try:
                self._probed[name] = device.probe()
            except PluginError as error:
                self._fail(device.plugin, str(error), error)
                self._probed[name] = Refusal(str(error), f"run without it by disabling the plugin {device.plugin}")
        return self._probed[name]

    def choose_device(self, name: str | None = None) -> DeviceChoice:
        """The device of that name, or the one with the highest score above 0. Raises PluginError if it cannot be used."""
        if name is not None:
            offer = self.probe(name)
            if isinstance(offer, Refusal):
                raise PluginError(f"device {name} cannot be used: {sentence(offer)}")
            return DeviceChoice(self.devices()[name], offer)
        answers = {name: self.probe(name) for name in self.devices()}
        offers = {name: answer for name, answer in answers.items() if isinstance(answer, Offer) and answer.score > 0}
        if not offers:
            reasons = "; ".join(f"{name}: {sentence(answer)}" for name, answer in answers.items() if isinstance(answer, Refusal))
            raise PluginError(f"no device can be used ({reasons or 'none is installed'}); see `edge-rt doctor`")
        best = max(offers, key=lambda name: offers[name].score)  # of equals the first
        return DeviceChoice(self.devices()[best], offers[best])

    def choose_engine(self, model: ModelFile, options: EngineOptions, name: str | None = None, offer: Offer | None = None) -> EngineChoice:
        """The engine of that name, or all with a score above 0, best first.

        ``offer`` is the chosen device's: an engine it does not list is refused, unless asked for by name.
        Raises UnsupportedModel if no engine can run the model, PluginError if ``name`` is not installed.
        """
        factories = self.engines() if name is None else {name: self._named("engine", self.engines(), name)}
        candidates: list[tuple[PluginEngineFactory, float]] = []
        refusals: dict[str, Refusal] = {}
        for factory in factories.values():
            if name is None and offer is not None and not {factory.name, "*"} & set(offer.engines):
                refusals[factory.name] = Refusal(f"it cannot drive the device {options.device}")
                continue
            answer = self._supports(factory, model, options)
            if isinstance(answer, Refusal):
                refusals[factory.name] = answer
            elif answer > 0 or name is not None:
                candidates.append((factory, answer))
            else:
                refusals[factory.name] = Refusal("it is used only when asked for by name")
        if not candidates:
            reasons = "; ".join(f"{engine}: {sentence(refusal)}" for engine, refusal in refusals.items())
            raise UnsupportedModel(f"no engine can run this model ({reasons or 'none is installed'})")
        return EngineChoice(tuple(sorted(candidates, key=lambda candidate: -candidate[1])), refusals)

    def _supports(self, factory: PluginEngineFactory, model: ModelFile, options: EngineOptions) -> float | Refusal:
        try:
            return factory.supports(model, options)
        except PluginError as error:
            self._fail(factory.plugin, str(error), error)
            return Refusal(str(error))

    # ---- loading -----------------------------------------------------------------------------------------------------

    def _add(self, name: str, distribution: str, version: str, load: Any, *, disabled: bool) -> None:
        """Import and register one plugin, and note what became of it."""
        if name in self._status:
            owner = self._status[name].distribution or "the caller"
            name, reason = f"{name} ({distribution or 'the caller'})", f"the name {name} is taken by {owner}"
            self._note(PluginStatus(name, distribution, version, "failed", reason), None)
            return
        if disabled:
            self._note(PluginStatus(name, distribution, version, "disabled", "it was disabled"), None)
            return
        try:
            plugin = imported(load)
            hooks = self._register(name, plugin)
        except Rejected as rejected:
            self._note(PluginStatus(name, distribution, version, rejected.state, str(rejected)), rejected.__cause__)
        else:
            self._note(PluginStatus(name, distribution, version, "ok", "", hooks), None)

    def _register(self, name: str, plugin: object) -> tuple[str, ...]:
        """Register a checked plugin and return its hooks. Raises Rejected, then nothing of it is registered."""
        try:
            self._manager.register(plugin, name)
        except (pluggy.PluginValidationError, ValueError) as error:
            if self._manager.has_plugin(name):  # older versions of pluggy register what they then find fault with
                self._manager.unregister(name=name)
            raise Rejected("failed", " ".join(str(error).split())) from error
        callers = self._manager.get_hookcallers(plugin) or []
        problem = unmarked(plugin) or next(filter(None, map(unknown, callers)), None)
        if not problem and any(i.plugin is plugin and (i.wrapper or i.hookwrapper) for c in callers for i in c.get_hookimpls()):
            problem = "hook wrappers are not supported"
        if not problem and not callers:
            problem = "it implements no hook"
        if problem:
            self._manager.unregister(plugin)
            for caller in callers:  # a misspelt hook would be found again in the next plugin
                if not caller.has_spec() and not caller.get_hookimpls():
                    delattr(self._manager.hook, caller.name)
            raise Rejected("failed", problem)
        return tuple(sorted(caller.name for caller in callers))

    def _note(self, status: PluginStatus, cause: BaseException | None) -> None:
        """Keep a plugin's status; say what went wrong. Raises PluginError for a plugin that was asked for by name."""
        self._status[status.name] = status
        if status.state == "ok":
            return
        message = f"plugin {status.name}: {status.reason}"
        if status.name in self._required:
            raise PluginError(message) from cause
        if status.state != "disabled":
            import logging  # only now: it costs start-up time that an ordinary run does not need to spend

            logging.getLogger("edge_rt.plugins").warning("%s; going on without it", message)

    def _fail(self, plugin: str, reason: str, cause: BaseException | None) -> None:
        """A registered plugin did something wrong. Raises PluginError if it was asked for by name."""
        reason = reason.removeprefix(f"plugin {plugin}: ")
        self._note(self._status[plugin]._replace(state="failed", reason=reason), cause)

    # ---- collecting --------------------------------------------------------------------------------------------------

    def _implementations(self, hook: str) -> Iterator[tuple[str, Any]]:
        """(plugin, function) for each implementation of a hook, in the order of ``plugins``."""
        functions = {impl.plugin_name: impl.function for impl in getattr(self._manager.hook, hook).get_hookimpls()}
        return ((plugin, functions[plugin]) for plugin in list(self._status) if plugin in functions)

    def _collect(self, hook: str, kind: Any, wrap: Callable[[str, Any], _T]) -> dict[str, _T]:
        """What all plugins return from a hook, wrapped, by name; called once."""
        with self._lock:
            if hook not in self._collected:
                self._collected[hook] = self._call(hook, kind, wrap)
            found: dict[str, _T] = self._collected[hook]
        return found

    def _call(self, hook: str, kind: Any, wrap: Callable[[str, Any], _T]) -> dict[str, _T]:
        """Call a hook of all plugins."""
        found: dict[str, _T] = {}
        owners: dict[str, str] = {}
        for plugin, function in self._implementations(hook):
            try:
                items = list(checked(function(), kind))
            except Rejected as rejected:
                self._fail(plugin, f"{hook} {rejected}", None)
                continue
            except Exception as error:
                self._fail(plugin, str(failure(plugin, hook, error)), error)
                continue
            for item in items:
                if item.name in found:
                    self._fail(plugin, f"{hook} offers {item.name}, a name taken by plugin {owners[item.name]}", None)
                else:
                    found[item.name] = wrap(plugin, item)
                    owners[item.name] = plugin
        return found

    def _named(self, kind: str, offers: Mapping[str, _T], name: str) -> _T:
        """An offer by name. Raises PluginError that says what there is, and which plugins failed."""
        if name in offers:
            return offers[name]
        if absent := self.not_installed(name):
            raise PluginError(f"the {kind} {absent}")
        broken = [f"plugin {status.name} {status.state}: {status.reason}" for status in self.plugins if status.state != "ok"]
        raise PluginError("; ".join([f"no {kind} named {name}, there is {', '.join(offers) or 'none'}", *broken]))
