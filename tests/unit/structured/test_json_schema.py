"""Schemas to grammars, without libllama: texts are derived from the grammar at random and checked against the schema."""

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.errors import ConstraintError
from edge_rt.structured.grammar import ALT, MORE, TERMINAL, Parser, check_grammar
from edge_rt.structured.json_schema import schema_to_grammar

TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def is_type(value, kind):
    if kind in ("number", "integer"):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and (kind == "number" or value == int(value))
    return isinstance(value, TYPES[kind])


def problem(value, schema, root):
    """Why a value is not valid, None if it is. Written from the standard, for the keywords the converter takes."""
    if schema is True:
        return None
    if schema is False:
        return "false"
    found = [problem(value, part, root) for part in schema.get("allOf", [])]
    if "$ref" in schema:
        target = root
        for step in schema["$ref"][1:].split("/")[1:]:
            target = target[step.replace("~1", "/").replace("~0", "~")]
        found.append(problem(value, target, root))
    for word in ("anyOf", "oneOf"):
        if word in schema and all(problem(value, part, root) for part in schema[word]):
            found.append(word)
    kinds = schema.get("type", [])
    if kinds and not any(is_type(value, kind) for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        found.append("type")
    if "enum" in schema and json.dumps(value) not in map(json.dumps, schema["enum"]):
        found.append("enum")
    if "const" in schema and json.dumps(value) != json.dumps(schema["const"]):
        found.append("const")
    for kind, check in ((dict, object_problem), (list, array_problem), (str, string_problem)):
        if isinstance(value, kind):
            found.append(check(value, schema, root))
    if is_type(value, "number"):
        low, high = schema.get("minimum", -1e99), schema.get("maximum", 1e99)
        if not low <= value <= high or value <= schema.get("exclusiveMinimum", -1e99) or value >= schema.get("exclusiveMaximum", 1e99):
            found.append("bounds")
    return next((reason for reason in found if reason), None)


def object_problem(value, schema, root):
    properties = schema.get("properties", {})
    if missing := set(schema.get("required", ())) - set(value):
        return f"{missing} missing"
    if len(value) > schema.get("maxProperties", 99):
        return "maxProperties"
    inside = [problem(v, properties.get(k, schema.get("additionalProperties", True)), root) for k, v in value.items()]
    return next((reason for reason in inside if reason), None)


def array_problem(value, schema, root):
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1e9):
        return "length"
    first = schema.get("prefixItems", [])
    inside = [problem(v, first[i] if i < len(first) else schema.get("items", True), root) for i, v in enumerate(value)]
    return next((reason for reason in inside if reason), None)


def string_problem(value, schema, root):
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1e9):
        return "length"
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return "pattern"
    return None


class Deriver:
    """Random texts of a grammar."""

    def __init__(self, grammar, seed=0):
        check_grammar(grammar, lambda name: False)
        self.parser = Parser(grammar, lambda name: False)
        self.parser.parse()
        self.random = random.Random(seed)

    def text(self):
        out, stack, steps = [], [(self.parser.numbers["root"], 0)], 0
        while stack:
            number, depth = stack.pop()
            steps += 1
            if number <= TERMINAL:
                low, high = self.random.choice(self.parser.terminals[TERMINAL - number])
                out.append(chr(self.random.randint(low, high)))
                continue
            options = [[]]
            for element in self.parser.rules[number].elements:
                if element == ALT:
                    options.append([])
                elif element != MORE:
                    options[-1].append(element)
            shortest = min(options, key=lambda option: sum(element >= 0 for element in option))
            chosen = self.random.choice(options) if steps < 3000 and depth < 60 else shortest
            stack.extend((element, depth + 1) for element in reversed(chosen))
        return "".join(out)


def texts(schema, n=40):
    deriver = Deriver(schema_to_grammar(schema))
    return [deriver.text() for _ in range(n)]


def accepts(schema, text):
    """Does the grammar allow exactly this text? Follows all derivations, stack by stack."""
    parser = Parser(schema_to_grammar(schema), lambda name: False)
    parser.parse()
    rules = [[[]] for _ in parser.rules]
    for i, rule in enumerate(parser.rules):
        for element in rule.elements:
            if element == ALT:
                rules[i].append([])
            elif element != MORE:
                rules[i][-1].append(element)

    def expand(stacks):
        done, todo = set(), list(stacks)
        while todo:
            stack = todo.pop()
            if stack and stack[-1] >= 0:
                todo.extend(stack[:-1] + tuple(reversed(option)) for option in rules[stack[-1]])
            else:
                done.add(stack)
        return done

    stacks = expand([(parser.numbers["root"],)])
    for c in text:
        stacks = expand(s[:-1] for s in stacks if s and any(a <= ord(c) <= b for a, b in parser.terminals[TERMINAL - s[-1]]))
    return () in stacks


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "note": {"type": ["string", "null"]},
        "friends": {"type": "array", "items": {"$ref": "#/$defs/friend"}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "$defs": {"friend": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}},
}
SCHEMAS = (
    {}, {"type": "object"}, {"type": "array"}, {"type": "string"}, {"type": "null"}, {"type": "boolean"}, {"type": "number"}, PERSON,
    {"type": "object", "properties": {"a\"\\\n/é": {"const": "x\"\\\n"}}, "required": ["a\"\\\n/é"]},
    {"enum": ["red", 3, 2.5, None, True, {"k": [1]}, "\u4e2d"]}, {"enum": [1, True, "1"], "type": "integer"},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": False, "c": True}},
    {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a", "extra"]},
    {"type": "object", "properties": {}, "additionalProperties": False},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
    {"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 3}, {"type": "array", "items": {"type": "boolean"}, "minItems": 2},
    {"type": "array", "maxItems": 0}, {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
    {"type": "string", "pattern": "^[A-Z]{2}-\\d+$"}, {"type": "string", "pattern": "b+"}, {"pattern": "^(foo|b[^a\"]r)?.$"},
    {"type": "string", "pattern": "^\\w+\\s\\S(?:x|y)*?$"}, {"type": "string", "pattern": "^[\\d\\-.\"\\\\]+$|^z"},
    {"type": "string", "minLength": 2}, {"type": "string", "maxLength": 3},
    {"type": "string", "format": "date"}, {"type": "string", "format": "uuid"}, {"type": "string", "format": "email"},
    {"type": "number", "minimum": 0, "maximum": 1}, {"type": "number", "exclusiveMinimum": -0.5, "exclusiveMaximum": 12.25},
    {"type": "integer", "exclusiveMinimum": -3, "maximum": 1200}, {"minimum": 5}, {"type": "integer", "multipleOf": 1, "maximum": -7},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}, False]}, {"oneOf": [{"const": 1}, {"const": "a"}]},
    {"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"y": {"type": "null"}}, "required": ["y"]}],
     "$defs": {"a": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}}},
    {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"$ref": "#/$defs/t", "$defs": {"t": {"properties": {"v": {"type": "integer"}, "l": {"$ref": "#/$defs/t"}}, "required": ["v"]}}},
    {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]},
    {"$ref": "#/definitions/a~1b/items", "description": "beside a reference", "definitions": {"a/b": {"items": {"type": "integer"}}}},
    {"type": "integer", "allOf": [{"minimum": 3}, {"minimum": 1, "maximum": 9}]}, {"type": ["integer", "null"], "minimum": 7},
)  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:60])
def test_every_text_is_valid(schema):
    different = set()
    for text in texts(schema):
        value = json.loads(text)
        assert problem(value, schema, schema) is None, text
        different.add(text)
    assert different


def test_what_is_written_with_a_format_is_a_date():
    from datetime import date, datetime

    for text in texts({"format": "date"}, 300):
        date.fromisoformat(json.loads(text))
    for text in texts({"format": "date-time"}, 300):
        text = re.sub(r"\.(\d+)", lambda found: "." + found[1].ljust(6, "0"), json.loads(text))  # Python 3.10 wants 3 or 6 digits
        datetime.fromisoformat(text.replace("Z", "+00:00"))


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (PERSON, '{"name": "Ada", "age": 36}', '{"age": 36, "name": "Ada"}'),
        (PERSON, '{"name":"Ada","age":150,"friends":[{"id":1}, {"id":-2}]}', '{"name":"Ada","age":151}'),
        (PERSON, '{\n  "name": "Ada",\n  "age": 0,\n  "note": null\n}', '{"name": "Ada", "age": 0,}'),
        ({"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "required": ["b"]}, '{"b": 1, "c": [true]}', '{"a": 1, "c": 2}'),
        ({"type": "object", "properties": {"a": {}, "b": {}}}, "{}", '{"b": 1, "a": 1}'),
        ({"type": "string", "maxLength": 2}, '"\\u4e2d\\""', '"abc"'),
        ({"type": "string"}, '"\\n é 🙂"', '"\n"'),
        ({"type": "string"}, '"\\ud7ff"', '"\\ud83d\\ude42"'),
        ({"type": "string", "pattern": "^[\"\\\\]$"}, '"\\""', '"""'),
        ({"type": "string", "pattern": "b"}, '"abc"', '"ac"'),
        ({"type": "number", "minimum": 0, "maximum": 1}, "0.75", "1.5"),
        ({"type": "number", "minimum": 0, "maximum": 1}, "1.0", "-0.5"),
        ({"type": "integer"}, "-12", "012"),
        ({}, '[{"a": [1.5e3, "x"]}, null]', "[1,]"),
        ({"const": {"a": 1}}, '{"a": 1}', '{"a": 2}'),
    ],
)  # fmt: skip
def test_what_the_grammar_takes(schema, good, bad):
    assert accepts(schema, good)
    assert not accepts(schema, bad)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ([], "must be an object"), ("x", "must be an object"), ({"type": "strin"}, "unknown type 'strin'"), ({"type": 3}, "unknown type"),
        ({"properties": {"a": {"type": ["string", "x"]}}, "required": ["a"]}, "#/properties/a.*unknown type 'x'"),
        ({"a": {1, 2}}, "not JSON"), ({"const": float("nan")}, "not JSON"),
        ({"$ref": "https://example.com/schema.json"}, "nothing is fetched"), ({"$ref": "other.json#/a"}, "nothing is fetched"),
        ({"$ref": "#/$defs/nope"}, "not in the schema"), ({"$ref": 5}, "refers to 5"), ({"$ref": "#/properties/0"}, "not in the schema"),
        ({"$ref": "#", "type": "object"}, "without end"), ({"anyOf": []}, "no list of schemas"), ({"enum": []}, "none of its values"),
        ({"enum": ["a"], "type": "integer"}, "none of its values"), ({"enum": 3}, "no list"), (False, "must be an object"),
        ({"properties": {"a": False}, "required": ["a"]}, "false"), ({"allOf": [{"type": "string"}, {"type": "null"}]}, "at once"),
        ({"not": {}}, "'not', which cannot be enforced"), ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "number", "multipleOf": 5}, "multipleOf"), ({"type": "object", "patternProperties": {}}, "patternProperties"),
        ({"type": "object", "minProperties": 2}, "minProperties"), ({"type": "string", "minLength": 5, "maxLength": 2}, "at least 5"),
        ({"type": "string", "minLength": 3000}, "at most 2000"), ({"type": "string", "minLength": -1}, "not a count"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "allow nothing"), ({"type": "integer", "minimum": "x"}, "not a number"),
        ({"type": "number", "maximum": 1e60}, "digits"), ({"type": "string", "pattern": "(a"}, r"a \( without its \)"),
        ({"type": "string", "pattern": "a)"}, r"a \) without its \("), ({"type": "string", "pattern": "[a"}, r"a \[ without"),
        ({"type": "string", "pattern": "a**"}, "repetition of a repetition"), ({"type": "string", "pattern": "*a"}, "cannot be enforced"),
        ({"type": "string", "pattern": "(?=a)"}, "look-ahead"), ({"type": "string", "pattern": "a\\b"}, "cannot be enforced"),
        ({"type": "string", "pattern": "[z-a]"}, "a range that is none"), ({"type": "string", "pattern": "a{3,1}"}, "fewer"),
        ({"type": "string", "pattern": "\\"}, "single"), ({"type": "string", "pattern": 4}, "no text"), ({"allOf": 4}, "no list"),
        ({"type": "string", "pattern": "a", "minLength": 2}, "say it all"), ({"type": "string", "pattern": "a{9999}"}, "2000"),
        ({"type": "array", "prefixItems": [True], "items": False, "minItems": 2}, "more items"), ({"properties": 3}, "needs an object"),
        ({"allOf": [{"additionalProperties": False}, {"properties": {"a": {}}}]}, "one place"), ({"properties": {"a": 3}}, "not a schema"),
        ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "number of properties"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_the_reason(schema, message):
    with pytest.raises(ConstraintError, match=message):
        schema_to_grammar(schema)


def test_deep_schemas_are_refused_and_do_not_exhaust_the_stack():
    deep = {"type": "integer"}
    for _ in range(300):
        deep = {"type": "array", "items": deep}
    with pytest.raises(ConstraintError, match="deep"):
        schema_to_grammar(deep)
    for _ in range(10_000):
        deep = {"items": deep}
    with pytest.raises(ConstraintError, match="not JSON"):
        schema_to_grammar(deep)


def test_a_reference_that_allows_nothing_is_left_out_of_alternatives():
    nothing = {"properties": {"a": False}, "required": ["a"]}
    schema = {"anyOf": [{"$ref": "#/$defs/no"}, {"$ref": "#/$defs/no"}, {"type": "null"}], "$defs": {"no": nothing}}
    assert set(texts(schema, 5)) == {"null"}


def test_many_optional_properties_stay_cheap():
    schema = {"type": "object", "properties": {f"field_{i}": {"type": "integer"} for i in range(150)}}
    check_grammar(schema_to_grammar(schema), lambda name: False)


COUNTS = st.integers(0, 4)
LEAVES = st.one_of(
    st.just({"type": "boolean"}),
    st.builds(lambda low, n: {"type": "integer", "minimum": low, "maximum": low + n}, st.integers(-999, 999), st.integers(0, 99)),
    st.builds(lambda low, n: {"type": "string", "minLength": low, "maxLength": low + n}, COUNTS, COUNTS),
    st.builds(lambda values: {"enum": values}, st.lists(st.one_of(st.integers(), st.text(max_size=5), st.none()), min_size=1, max_size=4)),
)


def make_object(names, kinds, needed):
    return {
        "type": "object",
        "properties": dict(zip(names, kinds, strict=False)),
        "required": [name for name, wanted in zip(names, needed, strict=False) if wanted],
    }


def extend(inner):
    four = {"min_size": 4, "max_size": 4}
    return st.one_of(
        st.builds(lambda item, low, n: {"type": "array", "items": item, "minItems": low, "maxItems": low + n}, inner, COUNTS, COUNTS),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(
            make_object, st.lists(st.text(max_size=4), unique=True, max_size=4), st.lists(inner, **four), st.lists(st.booleans(), **four)
        ),
    )


VALUES = st.recursive(LEAVES, extend, max_leaves=6)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_random_schemas(schema):
    try:
        derived = texts(schema, 6)
    except ConstraintError as error:
        assert "surrogate" in str(error) or "ambiguous" in str(error)  # noqa: PT017  # the only reasons such schemas may be refused
        return
    for text in derived:
        assert problem(json.loads(text), schema, schema) is None, text
