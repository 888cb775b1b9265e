"""Two JSON schemas in one: what is valid against the result is valid against both (``allOf``, and keywords beside ``$ref``)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, NoReturn
from urllib.parse import unquote

from edge_rt.errors import ConstraintError
from edge_rt.structured import json_strings
from edge_rt.structured.grammar import MAX_REPETITIONS

Schema = dict[str, Any]
_REMARKS = frozenset(
    ("title", "description", "default", "examples", "$comment", "$id", "$schema", "$defs", "definitions", "deprecated", "readOnly",
     "writeOnly", "$anchor", "unevaluatedProperties", "unevaluatedItems")
)  # fmt: skip
_LARGER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_SMALLER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")


class Nothing(ConstraintError):
    """A schema that allows nothing: fatal, but for an alternative or an optional property, which is then left out."""


def fail(path: str, what: str) -> NoReturn:
    """Raise the error for a place in the schema."""
    raise ConstraintError(f"{path} of the JSON schema {what}")


def merge(a: Schema, b: Schema, path: str) -> Schema:
    """Both schemas at once (neither holds ``$ref`` or ``allOf``). Raises ConstraintError where that cannot be said in one."""
    _check_closed(a, b, path)
    _check_closed(b, a, path)
    result = dict(a)
    for word, value in b.items():
        if word not in a or word in _REMARKS:
            result.setdefault(word, value)
        elif json.dumps(a[word], sort_keys=True) != json.dumps(value, sort_keys=True):
            result[word] = _both(word, a[word], value, path)
    return result


def _check_closed(a: Schema, b: Schema, path: str) -> None:
    """``additionalProperties`` of one part also binds the properties only the other declares: that is refused."""
    closed = a.get("additionalProperties", True)
    others = set(b.get("properties", ())) | set(b.get("required", ()))
    if closed is not True and closed != {} and others - set(a.get("properties", ())):
        fail(path, "combines 'additionalProperties' with properties of another part; declare them all in one place")


def _both(word: str, a: Any, b: Any, path: str) -> Any:
    """Two different values of one keyword."""
    if word == "properties" and isinstance(a, dict) and isinstance(b, dict):
        return {name: {"allOf": [a[name], b[name]]} if name in a and name in b else a.get(name, b.get(name)) for name in {**a, **b}}
    if word == "required" and isinstance(a, list) and isinstance(b, list):
        return [*a, *(name for name in b if name not in a)]
    if word == "type":
        return _types(a, b, path)
    if word == "enum" and isinstance(a, list) and isinstance(b, list):
        known = {json.dumps(value, sort_keys=True) for value in b}
        return [value for value in a if json.dumps(value, sort_keys=True) in known]
    if word in (*_LARGER, *_SMALLER) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b)):
        return max(a, b) if word in _LARGER else min(a, b)
    if word == "const":
        raise Nothing(f"{path} of the JSON schema allows two different constants")
    fail(path, f"combines two different {word!r}; say it in one")


def _types(a: Any, b: Any, path: str) -> Any:
    """Types that are in both; integers are numbers."""
    left, right = (x if isinstance(x, list) else [x] for x in (a, b))
    common = [t for t in left if t in right or (t == "integer" and "number" in right)]
    common += [t for t in right if t == "integer" and "number" in left and t not in common]
    if not common:
        raise Nothing(f"{path} of the JSON schema asks for types {a!r} and {b!r} at once")
    return common[0] if len(common) == 1 else common


# JSON schema to GBNF. Every text the grammar allows is valid against the schema; not every valid text is allowed.
#
# Why not llama-cpp-python's converter: it confuses references with the same last name, breaks on ``\`` and ``"`` in keys, on boolean
# schemas and ``{"$ref": "#"}``, ignores bounds, and checks with ``assert``. What this one cannot enforce it refuses, with the path.
#
# Objects have the declared properties in the declared order, and no others. ``oneOf`` is taken as ``anyOf``. ``format`` binds for
# date, time, date-time and uuid; other formats are remarks, as the standard says. References stay inside the schema: nothing is fetched.

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
MAX_RULES = 5_000
MAX_DEPTH = 100
_REFUSED = (
    "not", "if", "then", "else", "patternProperties", "propertyNames", "dependentRequired", "dependentSchemas", "dependencies",
    "contains", "$dynamicRef", "$recursiveRef",
)  # fmt: skip
_BELONGS = {  # a schema without a type gets the one its keywords speak of
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
_VALUE = {
    "ws": r'"" | " " | "\n" [ \t]{0,20}',
    "char": json_strings.CHAR,
    "string": r'"\"" char* "\""',
    "number": json_strings.NUMBER,
    "object": r'"{" ws (string ":" ws value ("," ws string ":" ws value)*)? ws "}"',
    "array": '"[" ws (value ("," ws value)*)? ws "]"',
    "value": 'object | array | string | number | "true" | "false" | "null"',
}

_NEVER = r"[\U7fffffff]"  # beyond Unicode: nothing fits


def schema_to_grammar(schema: Mapping[str, Any]) -> str:
    """The GBNF grammar whose texts are JSON valid against ``schema``. Raises ConstraintError."""
    if not isinstance(schema, Mapping):
        raise ConstraintError(f"the JSON schema is {type(schema).__name__}; it must be an object such as {{'type': 'object'}}")
    try:
        plain = json.loads(json.dumps(dict(schema), allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(f"the JSON schema is not JSON ({error}); use dictionaries, lists, texts and numbers") from None
    return _Converter(plain).grammar()


class _Converter:
    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._rules = dict(_VALUE)
        self._references: dict[str, str] = {}
        self._nothing: set[str] = set()
        self._depth = 0

    def grammar(self) -> str:
        root = self._reference("#", "#")
        return "\n".join([f"root ::= {root}", *(f"{name} ::= {rule}" for name, rule in self._rules.items())])

    def _add(self, body: str, name: str | None = None) -> str:
        """Put an expression in a rule of its own; returns its name."""
        if len(self._rules) > MAX_RULES:
            raise ConstraintError(f"the JSON schema needs more than {MAX_RULES} grammar rules; use a smaller one")
        name = name or f"r{len(self._rules)}"
        self._rules[name] = body
        return name

    def _visit(self, schema: Any, path: str) -> str:
        """The expression for a schema; safe to put in any sequence."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            fail(path, f"is nested more than {MAX_DEPTH} deep")
        try:
            return self._expression(schema, path)
        finally:
            self._depth -= 1

    def _expression(self, schema: Any, path: str) -> str:
        if isinstance(schema, dict) and "$ref" in schema and not _binding(schema, "$ref"):
            return self._reference(schema["$ref"], path)
        schema = self._flat(schema, path)
        if schema is True or not _binding(schema):
            return "value"
        for word in ("anyOf", "oneOf"):
            if word in schema:
                return self._union(schema, word, path)
        types = schema.get("type")
        if isinstance(types, list):
            return self._any_of([{**schema, "type": kind} for kind in types], path)
        if "const" in schema or "enum" in schema:
            return self._values(schema, path)
        kind = types or next((kind for kind, words in _BELONGS.items() if any(word in schema for word in words)), None)
        if kind not in TYPES:
            fail(path, f"has the unknown type {kind!r}")
        visit: Callable[[Schema, str], str] | None = getattr(self, f"_{kind}", None)
        return visit(schema, path) if visit else '("true" | "false")' if kind == "boolean" else '"null"'

    # ---- schemas made of schemas -------------------------------------------------------------------------------------

    def _target(self, reference: Any, path: str) -> Any:
        """The schema a reference points to."""
        if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
            fail(path, f"refers to {reference!r}; only references inside the schema (#/...) are followed, nothing is fetched")
        target: Any = self._schema
        for step in reference[1:].split("/")[1:]:
            step = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and step in target:
                target = target[step]
            elif isinstance(target, list) and step.isascii() and step.isdigit() and int(step) < len(target):
                target = target[int(step)]
            else:
                fail(path, f"refers to {reference!r}, which is not in the schema")
        return target

    def _reference(self, reference: Any, path: str) -> str:
        """The rule of a referenced schema, which may refer to itself."""
        target = self._target(reference, path)
        if reference in self._nothing:
            raise Nothing(f"{reference} of the JSON schema allows nothing")
        if reference not in self._references:
            name = self._references[reference] = self._add(_NEVER)
            try:
                self._rules[name] = self._visit(target, reference)
            except Nothing:  # the rule stays, for rules made meanwhile that name it
                self._nothing.add(reference)
                raise
        return self._references[reference]

    def _flat(self, schema: Any, path: str, depth: int = 0) -> Any:
        """The schema without ``$ref`` and ``allOf``, whose contents are merged in; True for one that allows everything."""
        if schema is True:
            return True
        if schema is False:
            raise Nothing(f"{path} of the JSON schema is false, which allows nothing")
        if not isinstance(schema, dict):
            fail(path, f"is {schema!r}, not a schema")
        for word in _REFUSED:
            if word in schema:
                fail(path, f"uses {word!r}, which cannot be enforced")
        parts = list(schema.get("allOf", ())) if isinstance(schema.get("allOf", []), list) else fail(path, "has an allOf that is no list")
        if "$ref" in schema:
            parts.append(self._target(schema["$ref"], path))
        result = {word: value for word, value in schema.items() if word not in ("$ref", "allOf")}
        if depth > MAX_DEPTH:
            fail(path, "refers to itself without end")
        for part in parts:
            flat = self._flat(part, path, depth + 1)
            if flat is not True:
                result = merge(result, flat, path)
        return result

    def _union(self, schema: Schema, word: str, path: str) -> str:
        options = schema[word]
        if not isinstance(options, list) or not options:
            fail(path, f"has an {word} that is no list of schemas")
        rest = {key: value for key, value in schema.items() if key != word}
        return self._any_of([{"allOf": [rest, option]} if _binding(rest) else option for option in options], f"{path}/{word}")

    def _any_of(self, options: list[Any], path: str) -> str:
        """One of several schemas; those that allow nothing are left out."""
        found, reason = [], None
        for i, option in enumerate(options):
            try:
                found.append(self._visit(option, f"{path}/{i}"))
            except Nothing as error:
                reason = error
        if not found:
            raise reason or Nothing(f"{path} of the JSON schema allows nothing")
        return found[0] if len(found) == 1 else f"({' | '.join(dict.fromkeys(found))})"

    def _values(self, schema: Schema, path: str) -> str:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, list):
            fail(path, "has an enum that is no list")
        if "const" in schema:
            values = [value for value in values if _same(value, schema["const"])]
        if "type" in schema:
            if schema["type"] not in TYPES:
                fail(path, f"has the unknown type {schema['type']!r}")
            values = [value for value in values if _is(value, schema["type"])]
        others = sorted(word for words in _BELONGS.values() for word in words if word in schema)
        if others:
            fail(path, f"combines fixed values with {others[0]!r}; leave out the values that do not fit instead")
        if not values:
            raise Nothing(f"{path} of the JSON schema allows none of its values")
        return f"({json_strings.strings(values)})"

    # ---- one type each -----------------------------------------------------------------------------------------------

    def _object(self, schema: Schema, path: str) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        additional = schema.get("additionalProperties", True)
        if not isinstance(properties, dict) or not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            fail(path, "needs an object of properties and a list of required names")
        missing = {name: additional for name in required if name not in properties}
        wanted = {**properties, **missing}
        least, most = _count(schema, "minProperties", 0, path), _count(schema, "maxProperties", None, path)
        if not wanted and additional is not False:
            return self._map(additional, least, most, path)
        members = []
        for name, value in wanted.items():
            where = f"{path}/properties/{name}"
            try:
                body = f'{json_strings.strings([name])} ":" ws {self._visit(value, where)}'
            except Nothing:
                if name in required:
                    raise
                continue
            members.append((self._add(body), name in required))
        if least > len(required) or (most is not None and most < len(members)):
            fail(path, "bounds the number of properties, which can be enforced only for objects without declared properties")
        return self._add(self._members(members))

    def _members(self, members: list[tuple[str, bool]]) -> str:
        """Members in order with commas between: rules for "one of those from here on, then the rest", from the last to the first."""
        tail, rest, must = "", '""', False
        for name, is_required in reversed(members):
            tail = self._add(f"{name} {rest}" if is_required or not tail else f"{name} {rest} | {tail}")
            must = must or is_required
            rest = self._add(f"{COMMA} {tail}" if must else f"({COMMA} {tail})?")
        if not tail:
            return '"{" ws "}"'
        return f'"{{" ws {tail} ws "}}"' if must else f'"{{" ws ({tail} ws)? "}}"'

    def _map(self, values: Any, least: int, most: int | None, path: str) -> str:
        """An object with any names."""
        if least > 0:
            fail(path, "uses 'minProperties', which cannot be enforced where names may repeat")
        if values is True and most is None:
            return "object"
        member = self._add(f'string ":" ws {self._visit(values, f"{path}/additionalProperties")}')
        return self._add(f'"{{" ws {_list(member, 0, most)} "}}"')

    def _array(self, schema: Schema, path: str) -> str:
        if schema.get("uniqueItems"):
            fail(path, "uses 'uniqueItems', which cannot be enforced")
        first, items = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(items, list):  # before draft 2020-12
            first, items = items, schema.get("additionalItems", True)
        if not isinstance(first, list):
            fail(path, "has prefixItems that are no list")
        least, most = _count(schema, "minItems", 0, path), _count(schema, "maxItems", None, path)
        first = first[: len(first) if most is None else most]
        parts = [self._visit(item, f"{path}/prefixItems/{i}") for i, item in enumerate(first)]
        least = max(0, least - len(parts))
        most = None if most is None else most - len(parts)
        more = ""
        if items is False or (first and least == 0):
            if least:
                raise Nothing(f"{path} of the JSON schema asks for more items than it allows")
        else:
            item = self._visit(items, f"{path}/items")
            if not parts:
                return self._add(f'"[" ws {_list(item, least, most)} "]"')
            more = f' ("," ws {item}){{{least}}}'
        return self._add(f'"[" ws {f" {COMMA} ".join(parts)}{more}{" ws" if parts else ""} "]"')

    def _string(self, schema: Schema, path: str) -> str:
        least, most = _count(schema, "minLength", 0, path), _count(schema, "maxLength", None, path)
        known = json_strings.FORMATS.get(str(schema.get("format")))
        if "pattern" in schema:
            if known or least or most is not None:
                fail(path, "combines 'pattern' with a length or a format; say it all in the pattern")
            if not isinstance(schema["pattern"], str):
                fail(path, "has a pattern that is no text")
            inside = json_strings.Pattern(schema["pattern"], lambda what: fail(path, what), "char").grammar()
        elif known:
            inside, shortest, longest = known
            if least > shortest or (most is not None and most < longest):
                fail(path, f"combines the format {schema['format']!r} with a length; leave the length out")
        elif not least and most is None:
            return "string"
        else:
            inside = f"char{_times(least, most)}"
        return self._add(rf'"\"" ({inside}) "\""')

    def _integer(self, schema: Schema, path: str) -> str:
        low, high = _bounds(schema, path, Decimal(1))
        body = json_strings.integer(
            None if low is None else int(low.to_integral_value("ROUND_CEILING")),
            None if high is None else int(high.to_integral_value("ROUND_FLOOR")),
        )
        return self._add(body) if body else _nothing(path)

    def _number(self, schema: Schema, path: str) -> str:
        low, high = _bounds(schema, path, Decimal("0.0001"))
        body = json_strings.number(low, high)
        return self._add(body) if body else _nothing(path)


COMMA = '"," ws'


def _nothing(path: str) -> NoReturn:
    raise Nothing(f"{path} of the JSON schema has bounds that allow nothing")


def _binding(schema: Schema, *without: str) -> bool:
    """Does a schema say anything that binds?"""
    words = ("type", "const", "enum", "anyOf", "oneOf", "allOf", "$ref", *_REFUSED, *(w for words in _BELONGS.values() for w in words))
    return any(word in schema for word in words if word not in without)


def _is(value: Any, kind: str) -> bool:
    """Is a JSON value of a type?"""
    python = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float), "integer": int}
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, python[kind]) or (kind == "integer" and isinstance(value, float) and value.is_integer())  # type: ignore[arg-type]


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _count(schema: Schema, word: str, default: Any, path: str) -> Any:
    """A count such as minItems; counts beyond what a grammar can repeat are cut where that only allows less."""
    value = schema.get(word, default)
    if value is default:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 0:
        fail(path, f"has {word} {value!r}, not a count")
    if word.startswith("min") and value > MAX_REPETITIONS:
        fail(path, f"has {word} {value}; at most {MAX_REPETITIONS} can be enforced")
    return min(int(value), MAX_REPETITIONS)


def _times(least: int, most: int | None) -> str:
    if most is not None and most < least:  # also -1
        raise Nothing(f"the JSON schema asks for at least {least} and at most {most}")
    return f"{{{least},{'' if most is None else most}}}" if (least, most) != (0, None) else "*"


def _list(item: str, least: int, most: int | None) -> str:
    """Items with commas between, and blanks after the last."""
    if most == 0 and not least:
        return '""'
    times = _times(max(0, least - 1), None if most is None else most - 1)
    return f"({item} ({COMMA} {item}){times} ws){'' if least else '?'}"


def _bounds(schema: Schema, path: str, step: Decimal) -> tuple[Decimal | None, Decimal | None]:
    """Least and greatest value. A bound that is excluded moves inwards by ``step`` (exact for integers)."""
    if schema.get("multipleOf", 1) != 1 or ("multipleOf" in schema and schema.get("type") != "integer"):
        fail(path, "uses 'multipleOf', which cannot be enforced")
    found: list[Decimal | None] = []
    for word, exclusive, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        values = []
        beyond = schema.get(exclusive)
        if word in schema:
            value = _bound(schema[word], word, path)
            values.append(_inward(value, sign * step) if beyond is True else value)  # draft 4: a flag
        if beyond is not None and not isinstance(beyond, bool):
            values.append(_inward(_bound(beyond, exclusive, path), sign * step))
        found.append((max if sign > 0 else min)(values) if values else None)
    return found[0], found[1]


def _bound(value: Any, word: str, path: str) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        fail(path, f"has {word} {value!r}, not a number")
    decimal = Decimal(repr(value))
    if len(format(decimal, "f")) > json_strings.MAX_DIGITS:
        fail(path, f"has {word} {value!r}, which has more than {json_strings.MAX_DIGITS} digits")
    return decimal


def _inward(value: Decimal, step: Decimal) -> Decimal:
    """The next value inside an excluded bound: for integers the next integer."""
    if abs(step) == 1:
        rounded = value.to_integral_value("ROUND_FLOOR" if step > 0 else "ROUND_CEILING")
        return rounded + step
    return value + step
