"""Jinja for chat templates: transformers' dialect, in a sandbox whose work, memory and output are bounded.

Templates come with model files and are not trusted. Jinja's sandbox keeps them from Python's insides; the bounds here keep them
from running for ever or filling the memory. Importing this module imports Jinja (40 ms).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sized
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_join, do_replace
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000  # turns of loops, look-ups, calls and operations: about a second
MAX_TEXT = 1 << 26  # characters in a text made on the way, or in the prompt
MAX_NUMBER = 100_000  # as an argument: a width, a count, a range
MAX_BITS = 4_096

_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "forceescape", "groupby", "int", "items",
    "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe", "select", "selectattr", "sort",
    "string", "title", "trim", "truncate", "unique", "upper", "urlencode", "wordcount",
)  # fmt: skip  # of Jinja's; not those that take a width, such as center


class Refusal(Exception):
    """The template called ``raise_exception``: it does not like the messages."""


def environment() -> Environment:
    """A fresh environment: one for each template, because it counts its steps."""
    return Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])


class _Run(threading.local):
    """What one run of a template has done so far; another thread may be at another."""

    steps = 0


class _Generation(Extension):
    """``{% generation %}``: marks what the assistant said, for training. Its body is simply part of the text."""

    tags = {"generation"}  # noqa: RUF012  # as Jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Watched(NodeTransformer):
    """Sends the iterable of every loop and the result of every ~ through a filter that counts."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "edge_rt_turns")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(node, "edge_rt_text")


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._run = _Run()
        kept = {name: self.filters[name] for name in _FILTERS}
        self.filters = {
            **kept, "tojson": _tojson, "join": self._join, "replace": self._replace, "indent": self._indent,
            "edge_rt_turns": self._turns, "edge_rt_text": self._text,
        }  # fmt: skip
        self.globals = {
            "range": self._range, "namespace": self.globals["namespace"], "dict": dict, "raise_exception": _raise, "strftime_now": _now,
        }  # fmt: skip

    def run(self, template: Template, variables: Mapping[str, Any]) -> str:
        """The template's text. Raises Refusal, SecurityError for what is out of bounds, and whatever a template can provoke."""
        parts, length = [], 0
        self._run.steps = 0
        for part in template.generate(variables):
            parts.append(part)
            length += len(part)
            self._check(length <= MAX_TEXT, "it writes too much")
        return "".join(parts)

    @staticmethod
    def _check(good: bool, what: str) -> None:
        if not good:
            raise SecurityError(what)

    def _step(self, n: int = 1) -> None:
        self._run.steps += n
        self._check(self._run.steps <= MAX_STEPS, f"it takes more than {MAX_STEPS:,} steps")

    # ---- what a template can do --------------------------------------------------------------------------------------

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watched().visit(super()._parse(source, name, filename))  # type: ignore[no-any-return]

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._step()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._step()
        return super().getattr(obj, attribute)

    def call(self, _context: Any, _function: Any, *args: Any, **kwargs: Any) -> Any:
        self._step()
        for value in (*args, *kwargs.values()):
            self._check(not isinstance(value, int) or abs(value) <= MAX_NUMBER, f"it calls a function with {value!r:.40}")
        owner = getattr(_function, "__self__", None)
        if isinstance(owner, str):
            self._check_method(owner, _function.__name__, args)
        return super().call(_context, _function, *args, **kwargs)

    def _check_method(self, text: str, method: str, args: tuple[Any, ...]) -> None:
        """Refuse string methods that would make a giant."""
        if method == "replace" and len(args) >= 2:
            self._check_replace(text, *args[:2])
        elif method == "join" and args:
            self._join(args[0], text)

    def wrap_str_format(self, value: Any) -> Any:
        """Jinja's sandboxed ``str.format``, bounded."""
        wrapped = super().wrap_str_format(value)
        self._check(wrapped is None or not re.search(r"\d{5}", value.__self__), "it formats with a great width")
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._step()
        if operator == "*":
            for one, times in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(times, int):
                    self._made(one, len(one) * times)
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            self._made(left, len(left) + len(right))
        if operator == "%" and isinstance(left, str):
            self._check(not re.search(r"%[^a-zA-Z%]*(\d{4}|\*)", left), "it formats with a great width")
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            self._check(bits <= MAX_BITS, "a number becomes too large")
        return super().call_binop(context, operator, left, right)

    # ---- globals and filters -----------------------------------------------------------------------------------------

    def _range(self, *args: int) -> range:
        result = range(*args)
        self._check(len(result) <= MAX_NUMBER, f"it counts to {len(result):,}")
        return result

    def _turns(self, iterable: Any) -> Any:
        """Count the turns of a loop; what has no length is counted as it goes."""
        if iterable is None or not isinstance(iterable, Iterable):
            return iterable  # Jinja says what is wrong with it
        if isinstance(iterable, Sized):
            self._step(len(iterable))
            return iterable
        return self._counted(iterable)

    def _counted(self, iterable: Iterable[Any]) -> Iterator[Any]:
        for item in iterable:
            self._step()
            yield item

    def _made(self, kind: Any, size: int) -> None:
        """A text or list of a size is about to be made: that is work too."""
        self._check(size <= (MAX_TEXT if isinstance(kind, str) else MAX_STEPS), "a text or list becomes too long")
        self._step(max(0, size) // 1000)

    def _text(self, text: str) -> str:
        self._made(text, len(text))
        return text

    def _join(self, value: Any, d: str = "", attribute: str | None = None) -> str:
        """Jinja's ``join``, bounded."""
        items = list(self._counted(value))
        if attribute is None:
            length = sum(len(item) if isinstance(item, str) else 1 for item in items) + len(str(d)) * len(items)
            self._check(length <= MAX_TEXT, "a text becomes too long")
        return str(do_join(nodes.EvalContext(self), items, d, attribute))

    def _replace(self, value: Any, old: str, new: str, count: int | None = None) -> str:
        """Jinja's ``replace``, bounded."""
        self._check_replace(str(value), old, new)
        return str(do_replace(nodes.EvalContext(self), str(value), old, new, count))

    def _check_replace(self, text: str, old: Any, new: Any) -> None:
        grows = isinstance(old, str) and isinstance(new, str) and text.count(old) * len(new)
        self._check(len(text) + int(grows) <= MAX_TEXT, "a text becomes too long")

    def _indent(self, value: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
        """Jinja's ``indent``, bounded."""
        margin = width if isinstance(width, str) else " " * min(int(width), 100)
        lines = str(value).split("\n")
        self._check(len(margin) * len(lines) <= MAX_TEXT, "a text becomes too long")
        wanted = [bool(line) or blank for line in lines]
        wanted[0] = first and (bool(lines[0]) or blank)
        return "\n".join(margin + line if indented else line for line, indented in zip(lines, wanted, strict=True))


def _raise(message: object) -> NoReturn:
    raise Refusal(str(message))


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """transformers' filter: Jinja's own escapes HTML."""
    indent = min(indent, 16) if indent else indent
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
