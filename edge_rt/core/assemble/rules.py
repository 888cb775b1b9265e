"""Rules of post-processors as a plugin reads them: one table of a TOML file, every value checked and every mistake placed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from edge_rt import sizes
from edge_rt.errors import OptionError, RuleError

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
            return sizes.parse(self.text(key), key)
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
