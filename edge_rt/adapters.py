"""The adapters of an open model, by name: each file is opened once, and every request chooses one or none."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from edge_rt.core.engine import AppliesAdapters
from edge_rt.errors import OptionError, SessionFileError

if TYPE_CHECKING:
    from edge_rt.core.load.adapter import LoraFile
    from edge_rt.runtime import Model

MOST = 1000.0
"""How often an adapter can be applied, or taken away."""


class Adapter(NamedTuple):
    """An adapter as a request has chosen it: what cells made with it depend on. ``number``: the engine's. ``key``: of its content."""

    name: str
    number: int
    key: str
    scale: float


class _Opened(NamedTuple):
    number: int
    key: str
    lora: LoraFile


class Adapters:
    """Names and files. Any thread may ask."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._files: dict[str, str | os.PathLike[str]] = {}
        self._opened: dict[str, _Opened] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> tuple[str, ...]:
        """What a request can ask for."""
        return tuple(self._files)

    def declare(self, files: Mapping[str, str | os.PathLike[str]]) -> None:
        """Adapters that are opened when a request first asks for them. Raises OptionError for a name that is taken."""
        for name in files:
            if not name or name in self._files:
                raise OptionError(f"there is an adapter {name!r} already; choose another name" if name else "an adapter has no name")
        self._files.update(files)

    def open(self, name: str, path: str | os.PathLike[str]) -> None:
        """Open one now. Raises OptionError, ModelFileError, UnsupportedModel; then its name is free as before."""
        self.declare({name: path})
        try:
            self._get(name)
        except BaseException:
            del self._files[name]
            raise

    def chosen(self, name: str | None, scale: float) -> Adapter | None:
        """The adapter of a request; one that is applied 0 times is none. Raises OptionError, and what opening it raises."""
        if name is None:
            if scale != 1.0:
                raise OptionError("adapter_scale says how often an adapter is applied, and there is none; give an adapter too")
            return None
        if not abs(scale) <= MOST:
            raise OptionError(f"adapter_scale is {scale}; give {-MOST:g} to {MOST:g}")
        if name not in self._files:
            known = ", ".join(self._files) or "none"
            raise OptionError(f"there is no adapter {name!r:.80}; this model has {known}")
        found = self._get(name)
        return Adapter(name, found.number, found.key, float(scale)) if scale else None

    def saved(self, name: str, key: str, scale: float) -> Adapter:
        """The adapter that a saved session was made with, whatever it is called now. Raises SessionFileError if it is not here."""
        for own in sorted(self._files, key=lambda one: one != name):  # the likeliest first
            if own == name or own in self._opened:
                found = self._get(own)
                if found.key == key:
                    return Adapter(own, found.number, key, scale)
        raise SessionFileError(f"the session was made with another adapter, then called {name!r:.80}; open the model with that one")

    def _get(self, name: str) -> _Opened:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._open(name)
            return self._opened[name]

    def _open(self, name: str) -> _Opened:
        from edge_rt.core.load.adapter import open_lora

        model = self._model
        if not isinstance(model.engine, AppliesAdapters):
            raise OptionError(f"the engine {model.info.engine} applies no adapters; leave the adapter out, or choose another engine")
        lora = open_lora(self._files[name], model.file.header)
        try:
            with model.lock:
                number = model.engine.open_adapter(lora)
        except BaseException:
            lora.file.close()
            raise
        if lora.norms:
            model.notices.append(f"the adapter {name} has {len(lora.norms)} norms, which are left out: only its low-rank parts are applied")
        return _Opened(number, lora.file.key(), lora)

    def close(self) -> None:
        """Close the files; the engine has let go of them."""
        for found in self._opened.values():
            found.lora.file.close()
        self._opened.clear()
        self._files.clear()
