"""Import statements that are carried out when one of their names is first used, as ``lazy from`` of Python 3.15 (PEP 810).

``hooks`` and ``testing`` show names of modules that cost start-up time. Each name is written once, in an ordinary import statement, which
type checkers and import-linter read as such:

    _home = Deferred(globals())
    with _home:
        from edge_rt.core.gguf.model_file import ModelFile as ModelFile


    def __getattr__(name: str) -> Any:
        return _home.load(name)
"""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class _Name(NamedTuple):
    """Stands for ``name`` of ``module`` until the ``with`` block ends."""

    module: str
    name: str


class _Module:
    """What a deferred ``from module import name`` takes its names from."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __getattr__(self, name: str) -> _Name:
        return _Name(self._module, name)


class Deferred:
    """The deferred imports of one module, whose ``globals()`` it is given. Other modules import as always, on other threads too."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._names: dict[str, _Name] = {}

    def __enter__(self) -> None:
        self._import = builtins.__import__
        builtins.__import__ = self._defer

    def __exit__(self, *_: object) -> None:
        builtins.__import__ = self._import
        self._names = {key: value for key, value in self._namespace.items() if isinstance(value, _Name)}
        for key in self._names:
            del self._namespace[key]

    def _defer(
        self, name: str, globals: Mapping[str, Any] | None = None, locals: Mapping[str, Any] | None = None,
        fromlist: Sequence[str] | None = (), level: int = 0,
    ) -> Any:  # fmt: skip
        if globals is self._namespace and fromlist and not level:
            return _Module(name)
        return self._import(name, globals, locals, fromlist or (), level)

    def load(self, name: str) -> Any:
        """Import a deferred name, which stays in the module from then on. Raises AttributeError for another name."""
        if name not in self._names:
            raise AttributeError(f"module {self._namespace['__name__']!r} has no attribute {name!r}")
        home = self._names[name]
        value = self._namespace[name] = getattr(importlib.import_module(home.module), home.name)
        return value
