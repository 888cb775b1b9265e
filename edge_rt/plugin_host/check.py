"""What a plugin must be to be registered, and how to say what is wrong with one that is not; how its code is imported anew."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from edge_rt.hooks import API_VERSION, HookSpecs, Refusal

if TYPE_CHECKING:
    from edge_rt.plugin_host.entry_points import EntryPoint

State = Literal["ok", "failed", "refused", "disabled"]


class Rejected(Exception):
    """A plugin that is not registered, and why."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(reason)
        self.state = state


def imported(load: Any) -> object:
    """The plugin's object, if it can be imported and was written for this plugin API. Raises Rejected."""
    try:
        plugin: object = load()
    except (Exception, SystemExit) as error:
        raise Rejected("failed", f"cannot be imported: {type(error).__name__}: {error}") from error
    if isinstance(plugin, type):
        raise Rejected("failed", f"its entry point names the class {plugin.__name__}; it must name a module or an object")
    version = getattr(plugin, "EDGE_RT_API", None)
    if not isinstance(version, int):
        raise Rejected("refused", f"it does not declare the plugin API it was written for; add `EDGE_RT_API = {API_VERSION}` to it")
    if version != API_VERSION:
        mend = "upgrade edge-rt" if version > API_VERSION else "upgrade the plugin"
        raise Rejected("refused", f"it was written for plugin API {version}, this edge-rt has {API_VERSION}; {mend}")
    return plugin


def unknown(caller: Any) -> str | None:
    """What is wrong with a hook that has no specification: pluggy would keep it and never call it."""
    if caller.has_spec() or all(impl.optionalhook for impl in caller.get_hookimpls()):
        return None
    from difflib import get_close_matches

    near = get_close_matches(caller.name, vars(HookSpecs), 1)
    return f"there is no hook {caller.name}" + (f"; did you mean {near[0]}?" if near else "")


def unmarked(plugin: object) -> str | None:
    """A function named like a hook that ``hookimpl`` was forgotten on, which pluggy ignores."""
    for name in dir(plugin):
        if name.startswith("edge_rt_") and name in vars(HookSpecs) and not hasattr(getattr(plugin, name), "edge_rt_impl"):
            return f"{name} is not marked with @hookimpl"
    return None


def checked(result: Any, kind: Any) -> Iterator[Any]:
    """The items of a hook's result. Raises Rejected for one that is not what the hook is for."""
    for item in () if result is None else result:
        if not isinstance(item, kind) or not isinstance(item.name, str):
            raise Rejected("failed", f"returned {item!r}, which is no {kind.__name__}")
        yield item


def sentence(refusal: Refusal) -> str:
    """A refusal in one sentence."""
    return f"{refusal.reason}; {refusal.remedy}" if refusal.remedy else refusal.reason


@contextmanager
def fresh_modules(point: EntryPoint) -> Iterator[Callable[[], None]]:
    """While it lasts a plugin's modules are imported anew; unless the function it yields was called, the old ones then come back.

    They are the module of the entry point and those in it, and of other distributions all of its package.
    """
    import importlib

    module = point.value.partition(":")[0].strip()
    root = module if module.startswith("edge_rt.") else module.partition(".")[0]
    kept = False

    def keep() -> None:
        nonlocal kept
        kept = True

    old = _take(root)
    for one in old.values():
        _forget_compiled(one)
    importlib.invalidate_caches()
    try:
        yield keep
    finally:
        if not kept:
            _take(root)
            sys.modules.update(old)


def _take(root: str) -> dict[str, Any]:
    """A package's modules, which from now on are not imported."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name == root or name.startswith(f"{root}.")}


def _forget_compiled(module: Any) -> None:
    """Remove a module's compiled file: it is taken for current if the source has its size and was written in the same second."""
    import os

    cached = getattr(module, "__cached__", None)
    if cached is None:
        return
    try:
        os.unlink(cached)
    except OSError:
        return  # there is none, or it is not ours to remove: then the source's time decides
