"""Rules of post-processors: read and checked from a TOML file, compiled, and exchanged while streams run when the file changes."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from edge_rt import model_hub
from edge_rt.errors import EdgeError, OptionError, RuleError
from edge_rt.postprocess.pipeline import Pipeline, Stage

if TYPE_CHECKING:
    import logging

    from edge_rt.plugin_host.registry import Registry
    from edge_rt.postprocess.protocol import PostProcessor

# Rules of post-processors as a plugin reads them: one table of a TOML file, every value checked and every mistake placed.

_T = TypeVar("_T")
Place = tuple[str | int, ...]
"""Where a value is: keys of tables and indices of lists, from the top of the file."""

_NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a table"}
_LARGEST = (1 << 63) - 1
"""Whole numbers of TOML have 64 bits."""


class Rules:
    """A table of rules. What is read is checked; keys that nobody has read by the end of compiling are mistakes too.

    Every method raises RuleError with the place of a value that is wrong.
    """

    def __init__(self, values: Mapping[str, Any] | None = None, place: Place = (), folder: Path | None = None) -> None:
        """``place``: of the table. ``folder``: names of files are relative to it."""
        self._values = dict(values or {})
        self._place, self._folder = place, folder
        self._read: set[str] = set()
        self._tables: list[Rules] = []
        self._files: dict[Path, str] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def keys(self) -> list[str]:
        """Keys of a table whose keys are names of the user's choice, in the order they were written."""
        return list(self._values)

    # ---- values ------------------------------------------------------------------------------------------------------

    def text(self, key: str, default: str | None = None) -> str:
        """A text; without a default it must be there."""
        return self._get(key, str, default)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return self._get(key, bool, default)

    def integer(self, key: str, default: int, least: int = 0, most: int = 1 << 31) -> int:
        """A whole number from ``least`` to ``most``."""
        value = self._get(key, int, default)
        if not least <= value <= most:
            raise self.error(f"{key} is {value}; give {least} to {most}", key)
        return value

    def number(self, key: str, default: float, least: float, most: float) -> float:
        """A number from ``least`` to ``most``."""
        value = self._get(key, float, default)
        if not least <= value <= most:
            raise self.error(f"{key} is {value}; give {least} to {most}", key)
        return value

    def size(self, key: str, default: int = 0) -> int:
        """Bytes: a whole number, or a text as ``1.5G``."""
        if not isinstance(self._values.get(key), str):
            return self.integer(key, default, 0, 1 << 50)
        try:
            return model_hub.parse_size(self.text(key), key)
        except OptionError as error:
            raise self.error(str(error), key) from error

    def choice(self, key: str, choices: Sequence[str], default: str) -> str:
        """One of some texts."""
        return self._chosen(self._get(key, str, default), choices, key)

    def choices(self, key: str, choices: Sequence[str], default: Iterable[str]) -> tuple[str, ...]:
        """A list of some of the texts."""
        given = self.texts(key, default)
        return tuple(self._chosen(value, choices, key, i) for i, value in enumerate(given))

    def texts(self, key: str, default: Iterable[str] = ()) -> tuple[str, ...]:
        """A list of texts, none of them empty."""
        given = self._get(key, list, list(default))
        for i, value in enumerate(given):
            if not isinstance(value, str) or not value:
                raise self.error(f"{key} has {_kind(value) if value != '' else repr(value)} in it; give texts that are not empty", key, i)
        return tuple(given)

    def integers(self, key: str, default: Iterable[int] = (), least: int = 0, most: int = 1 << 31) -> tuple[int, ...]:
        """A list of whole numbers from ``least`` to ``most``."""
        given = self._get(key, list, list(default))
        for i, value in enumerate(given):
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                shown = _kind(value) if isinstance(value, bool) or not isinstance(value, int) else value
                raise self.error(f"{key} has {shown} in it; give whole numbers from {least} to {most}", key, i)
        return tuple(given)

    def table(self, key: str) -> Rules:
        """A table in this one, empty if it is not there."""
        return self._table(self._get(key, dict, {}), key)

    def tables(self, key: str) -> list[Rules]:
        """A list of tables (``[[name.key]]``), empty if there is none."""
        found = self._get(key, list, [])
        for i, value in enumerate(found):
            if not isinstance(value, dict):
                raise self.error(f"{key} has {_kind(value)} where a table is expected; write [[{self.name}.{key}]]", key, i)
        return [self._table(value, key, i) for i, value in enumerate(found)]

    def file(self, key: str) -> tuple[Path, str]:
        """A file that a rule names, relative to the rule file, and its text. It is watched as the rule file is."""
        name = self._get(key, str, None)
        try:
            path = (self._folder or Path()) / Path(name).expanduser()
            path.stat()
        except OSError:
            pass  # reading says why, and it may come to be
        except (ValueError, RuntimeError) as error:  # a character that no name has, a user that is not there
            raise self.error(f"{key} is not the name of a file; check it", key) from error
        self._files[path] = ""
        try:
            self._files[path] = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise self.error(f"{key} names {name}, which cannot be read: {reason}; check the name", key) from error
        except UnicodeDecodeError as error:
            raise self.error(f"{key} names {name}, which is not UTF-8 (byte {error.start}); save it as UTF-8", key) from error
        return path, self._files[path]

    # ---- mistakes ----------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The table's name as it is written."""
        return ".".join(str(key) for key in self._place if isinstance(key, str))

    def error(self, reason: str, *at: str | int) -> RuleError:
        """A mistake at a key of this table, or of it as a whole."""
        return RuleError(reason, place=(*self._place, *at))

    def finish(self) -> None:
        """Raise RuleError for a key that was not read: it is misspelt, or belongs elsewhere."""
        for key in self._values:
            if key not in self._read:
                from difflib import get_close_matches

                known = sorted(self._read)
                near = get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known) or 'none'}"
                raise self.error(f"{self.name or 'the file'} has no rule {key}; {hint}", key)
        for table in self._tables:
            table.finish()

    def files(self) -> dict[Path, str]:
        """Files that were asked for so far with their text, "" for those that could not be read."""
        found = dict(self._files)
        for table in self._tables:
            found |= table.files()
        return found

    def _get(self, key: str, kind: type[_T], default: _T | None) -> _T:
        self._read.add(key)
        if key not in self._values:
            if default is None:
                raise self.error(f"{self.name} has no {key}; give {_NAMES[kind]}")
            return default
        value = self._values[key]
        if isinstance(value, int) and abs(value) > _LARGEST:  # Python refuses to write some of these
            raise self.error(f"{key} is a number of more than 64 bits; give a smaller one", key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)  # type: ignore[return-value]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{key} is {_kind(value)}; give {_NAMES[kind]}", key)
        return value

    def _chosen(self, value: str, choices: Sequence[str], *at: str | int) -> str:
        if value not in choices:
            raise self.error(f"{at[0]} cannot be {value!r}; choose from {', '.join(choices)}", *at)
        return value

    def _table(self, values: Mapping[str, Any], *at: str | int) -> Rules:
        table = Rules(values, (*self._place, *at), self._folder)
        self._tables.append(table)
        return table


def _kind(value: Any) -> str:
    """What kind of value it is. Not the value itself: it may be a key."""
    return _NAMES.get(type(value), type(value).__name__)


# Rules of post-processors: compiled from a TOML file, and exchanged while streams run when the file changes.
#
# A stream is given the ruleset that is current when it starts and keeps it to its end. A file that changed is read and compiled on the
# watching thread; only when that succeeded does it become current, by one assignment. A file that is wrong changes nothing but ``error``.

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
            from edge_rt.postprocess.pipeline import TimeoutWrapper

            processor = TimeoutWrapper(processor)
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
    from edge_rt.toml_file import parse

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
        from edge_rt import toml_file

        before = {one.path: _read_at(_look(one.path)) for one in self._seen}  # what changes while it is read is read again
        files: dict[Path, str] = {}
        try:
            text = self._text()
            try:
                tables = toml_file.parse(text)
                if not tables:  # an editor that failed leaves such a file, and nothing would be concealed any more
                    raise RuleError("it has no rules; add a table, as [redaction], or say pipeline = []")
                return Ruleset(change(tables, self._overrides), self._registry, folder=self.path.parent, files=files)
            except RuleError as error:
                if any(toml_file.has(toml_file.parse(override), error.place) for override in self._overrides if error.place):
                    raise RuleError(error.reason, place=error.place) from error  # it is not the file that is wrong
                line = error.line if error.line is not None else toml_file.line_of(text, error.place)
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

    return logging.getLogger("edge_rt.postprocess.rules")
