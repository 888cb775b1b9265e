"""Rules of post-processors: compiled from a TOML file, and exchanged while streams run when the file changes.

A stream is given the ruleset that is current when it starts and keeps it to its end. A file that changed is read and compiled on the
watching thread; only when that succeeded does it become current, by one assignment. A file that is wrong changes nothing but ``error``.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from edge_rt.core.assemble.pipeline import Pipeline, Stage
from edge_rt.core.assemble.rules import Place, Rules
from edge_rt.errors import EdgeError, RuleError

if TYPE_CHECKING:
    import logging

    from edge_rt.core.assemble.post_processor import PostProcessor
    from edge_rt.registry import Registry

INTERVAL = 0.25
"""Seconds between two looks at the files. A file is read when it was the same twice: half of one that is being written may be valid."""

_TICK = 50_000_000
"""Nanoseconds in which a file may be written twice and look the same: systems note the time of a change in steps of 1 to 10 ms."""


class _Compiled(NamedTuple):
    """How to make a stage of a name."""

    make: Callable[[], PostProcessor]
    fails_closed: bool
    plugin: str


class Ruleset:
    """One version of the rules, compiled. Nothing of it changes, so streams on any thread may share it.

    ``version`` stands for what the rules say, files that they name included: equal rules have equal versions. "" if there are none.
    """

    def __init__(
        self, values: Mapping[str, Any], registry: Registry, *, folder: Path | None = None, files: dict[Path, str] | None = None
    ) -> None:  # fmt: skip
        """``values``: the tables of a rule file; names of files in them are relative to ``folder``. What these hold is put into ``files``,
        also if the rules are wrong. Raises RuleError, PluginError.
        """
        self._registry, self.generation = registry, registry.generation
        self._compiled: dict[str, _Compiled] = {}
        self._lock = threading.Lock()
        self._files = {} if files is None else files
        self.order = self._order(values)
        """Post-processors of a request that names none."""
        for name, table in values.items():
            if name != "pipeline":
                self._compiled[name] = self._compile(name, table, folder)
        said = repr((values, list(self._files.values())))
        self.version = hashlib.sha256(said.encode(errors="surrogatepass")).hexdigest()[:8] if values else ""

    def _order(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the post-processors in the order of the pipeline: as ``pipeline`` says, else as their tables follow each other."""
        top = Rules(values)
        known = list(self._registry.post_processors())
        asked: list[tuple[str, Place]] = [(name, (name,)) for name in values if name != "pipeline"]
        asked += [(name, ("pipeline", i)) for i, name in enumerate(top.texts("pipeline"))]
        for name, place in asked:
            if name not in known and (absent := self._registry.not_installed(name)):
                raise top.error(f"the post-processor {absent}", *place)
        for name, table in values.items():
            if name != "pipeline" and name not in known:
                raise top.error(f"there is no post-processor {name}; there is {', '.join(known) or 'none'}", name)
            if name != "pipeline" and not isinstance(table, Mapping):
                top.table(name)  # says what it is instead
        order = top.choices("pipeline", known, [name for name in values if name != "pipeline"])
        if twice := next((name for i, name in enumerate(order) if name in order[:i]), None):
            raise top.error(f"pipeline names {twice} twice; name it once", "pipeline")
        return order

    def _compile(self, name: str, table: Mapping[str, Any], folder: Path | None) -> _Compiled:
        factory = self._registry.post_processor(name)
        rules = Rules(table, (name,), folder)
        on_failure = rules.choice("on_failure", ("drop", "stop"), "stop" if factory.fails_closed else "drop")
        if factory.fails_closed and on_failure == "drop":
            raise rules.error(f"{name} must not be left out of a stream; leave on_failure away, or say stop", "on_failure")
        try:
            make = factory.compile(rules)
            rules.finish()
        finally:
            self._files |= rules.files()
        return _Compiled(make, on_failure == "stop", factory.plugin)

    @property
    def current(self) -> Ruleset:
        """These, always."""
        return self

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that the rules name."""
        return tuple(self._files)

    def fails_closed(self, name: str) -> bool:
        """Whether a stream stops if this post-processor fails. Raises PluginError for an unknown name."""
        return self._get(name).fails_closed

    def pipeline(self, names: Sequence[str] = ()) -> Pipeline:
        """Fresh post-processors for one stream, those named or all, in order. Raises PluginError for an unknown name."""
        return Pipeline([self._stage(name) for name in names or self.order], self.version)

    def _stage(self, name: str) -> Stage:
        compiled = self._get(name)
        processor = compiled.make()
        if not self._registry.trusted(compiled.plugin):
            from edge_rt.core.assemble.aside import Aside

            processor = Aside(processor)
        return Stage(name, processor, compiled.fails_closed, compiled.plugin)

    def _get(self, name: str) -> _Compiled:
        """How to make a stage; one that has no table is compiled when it is first asked for."""
        with self._lock:
            if name not in self._compiled:
                self._compiled[name] = self._compile(name, {}, None)
            return self._compiled[name]


class _Seen(NamedTuple):
    """What a file was like."""

    path: Path
    inode: int
    size: int
    modified: int


def _look(path: Path) -> _Seen:
    """The state of a file; one that is not there has none."""
    try:
        found = path.stat()
    except OSError:
        return _Seen(path, 0, -1, 0)
    return _Seen(path, found.st_ino, found.st_size, found.st_mtime_ns)


def _read_at(look: _Seen) -> _Seen:
    """A look at a file just before it was read; one at a file written within the same tick tells nothing, so that it is read again."""
    return look._replace(modified=-1) if 0 <= time.time_ns() - look.modified < _TICK else look


def change(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The tables with some values replaced, each written as ``redaction.action="hash"``. Raises RuleError."""
    from edge_rt.core.assemble.toml_place import parse

    changed: dict[str, Any] = dict(values)
    for text in overrides:
        try:
            table: dict[str, Any] = parse(text)
        except RuleError as error:
            raise RuleError(f'the rule {text!r} is not as redaction.action="hash" ({error.reason}); a text needs its quotes') from error
        changed = _merged(changed, table)
    return changed


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {key: _merged(old[key], new[key]) for key in new if isinstance(old.get(key), Mapping) and isinstance(new[key], Mapping)}
    return {**old, **new, **both}


class Rulebook(Protocol):
    """What knows which rules a new stream is to follow."""

    @property
    def current(self) -> Ruleset:
        """The rules now."""
        ...


class RuleFile:
    """A file of rules that may change while streams run; a context manager.

    ``current`` is the newest version that could be compiled, ``error`` why a newer one could not be, else None. ``told`` is called with
    each new error, and with None when it is mended or the rules were exchanged, on the watching thread.
    """

    def __init__(
        self,
        path: str | Path,
        registry: Registry,
        *,
        overrides: Sequence[str] = (),
        watch: bool = True,
        told: Callable[[RuleError | None], None] = lambda error: None,
    ) -> None:
        """``overrides``: see ``change``. Raises RuleError, PluginError: the first version must be right."""
        self.path, self._registry, self._overrides, self._told = Path(path), registry, tuple(overrides), told
        self._reading = threading.RLock()  # what is read first must not become current last
        self.error: RuleError | None = None
        self.exchanged = 0
        """How often the rules were exchanged."""
        self._generation = registry.generation
        self._seen: tuple[_Seen, ...] = (_look(self.path),)  # of each file, when it was read
        self.current = self._read()
        self._unsettled: tuple[_Seen, ...] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="edge-rt rules", daemon=True) if watch else None
        if self._thread is not None:
            self._thread.start()

    def check(self) -> bool:
        """Look once, as the watching thread does all the time; whether ``current`` was exchanged. Not for two threads at once.

        The rules are compiled again when a file changed, and when a plugin's code was reloaded.
        """
        seen = tuple(_look(one.path) for one in self._seen)
        if self._registry.generation != self._generation:
            return self.reload()
        if seen == self._seen:
            self._unsettled = None
            return False
        if seen != self._unsettled:
            self._unsettled = seen
            return False
        self._unsettled = None
        return self.reload()

    def reload(self) -> bool:
        """Read the file now; whether ``current`` was exchanged. If it could not be, ``error`` says why and everything stays."""
        with self._reading:
            return self._exchange()

    def _exchange(self) -> bool:
        had, generation = self.error, self._registry.generation
        try:
            fresh = self._read()
        except EdgeError as error:
            self.error = error if isinstance(error, RuleError) else RuleError(str(error), file=str(self.path))
            self._generation = generation
            if str(self.error) != str(had):
                _log().warning("the rules stay as they were: %s", self.error)
                self._told(self.error)
            return False
        self.error = None
        changed = fresh.version != self.current.version or generation != self._generation
        self._generation = generation
        if changed:
            self.current = fresh
            self.exchanged += 1
            _log().info("%s is in force, version %s", self.path, fresh.version)
        if changed or had is not None:
            self._told(None)
        return changed

    def _read(self) -> Ruleset:
        """Compile the file as it is now. Raises RuleError with file and line."""
        from edge_rt.core.assemble import toml_place

        before = {one.path: _read_at(_look(one.path)) for one in self._seen}  # what changes while it is read is read again
        files: dict[Path, str] = {}
        try:
            text = self._text()
            try:
                tables = toml_place.parse(text)
                if not tables:  # an editor that failed leaves such a file, and nothing would be concealed any more
                    raise RuleError("it has no rules; add a table, as [redaction], or say pipeline = []")
                return Ruleset(change(tables, self._overrides), self._registry, folder=self.path.parent, files=files)
            except RuleError as error:
                if any(toml_place.has(toml_place.parse(override), error.place) for override in self._overrides if error.place):
                    raise RuleError(error.reason, place=error.place) from error  # it is not the file that is wrong
                line = error.line if error.line is not None else toml_place.line_of(text, error.place)
                raise RuleError(error.reason, place=error.place, file=str(self.path), line=line) from error
        finally:
            self._seen = tuple(before.get(path) or _read_at(_look(path)) for path in (self.path, *files))

    def _text(self) -> str:
        """Raises RuleError."""
        try:
            return self.path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise RuleError(f"cannot be read: {(error.strerror or str(error)).lower()}; check the name", file=str(self.path)) from error
        except UnicodeDecodeError as error:
            raise RuleError(f"it is not UTF-8 (byte {error.start}); save it as UTF-8", file=str(self.path)) from error

    def _watch(self) -> None:
        while not self._closed.wait(INTERVAL):
            try:
                self.check()
            except Exception as error:  # a bug, which must not end the watching unsaid
                self.error = RuleError(f"{type(error).__name__} while it was read; report this", file=str(self.path))
                _log().exception("the rules stay as they were: %s", self.error)
                self._told(self.error)

    def close(self) -> None:
        """Stop watching. The current rules stay usable."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> RuleFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _log() -> logging.Logger:
    import logging  # only now: it costs start-up time

    return logging.getLogger("edge_rt.rules")
