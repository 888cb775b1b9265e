"""What a plugin must be to be registered, and how to say what is wrong with one that is not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from edge_rt.hooks import API_VERSION, HookSpecs, Refusal

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
