"""Reading rules: what a value may be, and that every mistake has its line."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt import toml_file
from edge_rt.errors import RuleError
from edge_rt.postprocess.rules import Rules

READS = [
    (lambda r: r.text("k"), "a", {"k": 3}, "k is a whole number; give a text"),
    (lambda r: r.text("k"), "a", {}, "t has no k; give a text"),
    (lambda r: r.flag("k", False), True, {"k": 1}, "k is a whole number; give true or false"),
    (lambda r: r.integer("k", 5, 1, 9), 3, {"k": True}, "k is true or false; give a whole number"),
    (lambda r: r.integer("k", 5, 1, 9), 3, {"k": 10}, "k is 10; give 1 to 9"),
    (lambda r: r.number("k", 0.5, 0, 1), 1, {"k": "x"}, "k is a text; give a number"),
    (lambda r: r.number("k", 0.5, 0, 1), 0.25, {"k": 1.5}, "k is 1.5; give 0 to 1"),
    (lambda r: r.choice("k", ("a", "b"), "a"), "b", {"k": "c"}, "k cannot be 'c'; choose from a, b"),
    (lambda r: r.choices("k", ("a", "b"), ["a"]), ["b"], {"k": ["a", "c"]}, "k cannot be 'c'; choose from a, b"),
    (lambda r: r.texts("k"), ["x"], {"k": ["x", ""]}, "k has '' in it; give texts that are not empty"),
    (lambda r: r.texts("k"), ["x"], {"k": "x"}, "k is a text; give a list"),
    (lambda r: r.integers("k", most=9), [1, 9], {"k": [1, 10]}, "k has 10 in it; give whole numbers from 0 to 9"),
    (lambda r: r.integers("k"), [1], {"k": [True]}, "k has true or false in it; give whole numbers from 0 to 2147483648"),
    (lambda r: r.integers("k"), [1], {"k": ["x"]}, "k has a text in it; give whole numbers from 0 to 2147483648"),
    (lambda r: r.table("k").text("a"), {"a": "x"}, {"k": []}, "k is a list; give a table"),
    (lambda r: r.tables("k"), [], {"k": [{}, 1]}, "k has a whole number where a table is expected; write [[t.k]]"),
    (lambda r: r.texts("k"), ["x"], {"k": ["x", 13800138000]}, "k has a whole number in it; give texts that are not empty"),
    (lambda r: r.integer("k", 5), 3, {"k": 1 << 20_000}, "k is a number of more than 64 bits; give a smaller one"),
    (lambda r: r.number("k", 0.5, 0, 1), 0.25, {"k": 1 << 20_000}, "k is a number of more than 64 bits; give a smaller one"),
    (lambda r: r.file("k"), None, {"k": "none.txt"}, "k names none.txt, which cannot be read: no such file or directory; check the name"),
]


@pytest.mark.parametrize(("read", "good", "bad", "message"), READS)
def test_values_are_checked(read, good, bad, message):
    if good is not None:
        read(Rules({"k": good}, ("t",)))
    with pytest.raises(RuleError, match=f"^{re.escape(message)}$") as caught:
        read(Rules(bad, ("t",)))
    assert caught.value.place[0] == "t"


def test_values_and_defaults():
    rules = Rules({"a": "x", "b": 1, "c": ["x"], "d": {"e": True}, "f": [{"g": 1}]}, ("t",))
    assert (rules.text("a"), rules.number("b", 0, 0, 9), rules.texts("c")) == ("x", 1.0, ("x",))
    assert rules.table("d").flag("e", False)
    assert [one.integer("g", 0) for one in rules.tables("f")] == [1]
    assert (rules.text("n", "y"), rules.integer("n", 3), rules.texts("n", ["z"]), rules.flag("n", True)) == ("y", 3, ("z",), True)
    assert (rules.table("n").keys(), rules.tables("n"), "a" in rules, "n" in rules) == ([], [], True, False)
    rules.finish()


def test_a_key_nobody_read_is_a_mistake():
    rules = Rules({"actoin": "x", "d": {"e": 1}}, ("t",))
    rules.text("action", "")
    with pytest.raises(RuleError, match=r"^t has no rule actoin; did you mean action\?$") as caught:
        rules.finish()
    assert caught.value.place == ("t", "actoin")
    rules = Rules({"d": {"e": 1}}, ("t",))
    rules.table("d").text("f", "")
    with pytest.raises(RuleError, match=r"^t\.d has no rule e; it takes f$"):
        rules.finish()


def test_files_are_read_from_the_rule_files_folder(tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffAda\n", encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    rules = Rules({"a": "names.txt", "sub": {"b": "bad.txt"}}, ("t",), tmp_path)
    assert rules.file("a") == (tmp_path / "names.txt", "Ada\n")
    with pytest.raises(RuleError, match="is not UTF-8"):
        rules.table("sub").file("b")
    assert rules.files() == {tmp_path / "names.txt": "Ada\n", tmp_path / "bad.txt": ""}


# ---- places ----------------------------------------------------------------------------------------------------------

FILE = '''# rules
pipeline = ["a",
  "b"]  # two

[a]
kinds = [
  # "none", [
  "email", # "x"
  "fax",
]
text = """
[b]
kinds = 1
"""
inline = { x = 1, y = [1,
 2] }
'quo.ted' = 'it # is'

[[a.pattern]]
name = "one"

[[a.pattern]]
name = "two"
regex = '['
[a.deep]
p.q.r = 3
'''
PLACES = {
    ("pipeline",): 2,
    ("pipeline", 0): 2,
    ("pipeline", 1): 3,
    ("a",): 5,
    ("a", "kinds"): 6,
    ("a", "kinds", 0): 8,
    ("a", "kinds", 1): 9,
    ("a", "text"): 11,
    ("a", "inline", "x"): 15,
    ("a", "quo.ted"): 17,
    ("a", "pattern", 0): 19,
    ("a", "pattern", 0, "name"): 20,
    ("a", "pattern", 1): 22,
    ("a", "pattern", 1, "regex"): 24,
    ("a", "pattern", 1, "missing"): 22,
    ("a", "deep", "p", "q", "r"): 26,
    ("nowhere",): None,
}


@pytest.mark.parametrize(("place", "line"), PLACES.items())
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_line_of_a_value(place, line, end):
    assert toml_file.line_of(FILE.replace("\n", end), place) == line


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a = 1\nb == 2\n", 2, "invalid value"),
        ("x", 1, "expected '='"),
        ("[a]\n[a]\n", 2, "cannot declare"),
        ("a = [1,\n\n", 3, "invalid value"),
    ],
)
def test_the_line_of_a_mistake_in_the_writing(text, line, reason):
    with pytest.raises(RuleError, match=rf"line {line}: it is not TOML: {reason}"):
        toml_file.parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "[" * 20_000, "it has too many lists and tables in each other"),
        ("a = " + "1" * 5_000, "it has a number of too many digits"),
    ],
)
def test_what_python_cannot_read(text, reason):
    with pytest.raises(RuleError, match=f"^{reason}"):
        toml_file.parse(text)


NESTED = """\
p = [
  {name = 1001, regex = 1002},
  # {
  {name = 1003, regx = 1004, l = [1005,
    1006]},
  { a = { b = [ {c = 1007},
     {c = 1008} ] } },
]
q = {a = [[1009], [1010,
 1011 # ] [
], []], b = 1012}
d."x y".'z' = [ {k = 1013}, {k = 1014},
   {k = 1015}]
s = '''
[a]
k = 1
'''
o = ''''q'''''
k = 1016 # \"\"\"
[[ x ]]
[[x]]
 y . "ключ" = 1017
"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_values_in_inline_tables_and_lists_of_lists_are_found(end):
    text = NESTED.replace("\n", end)
    places = {value: place for place, value in leaves(toml_file.parse(text)) if isinstance(value, int)}
    assert sorted(places) == list(range(1001, 1018))
    for value, place in places.items():
        assert toml_file.line_of(text, place) == text[: text.index(str(value))].count("\n") + 1


def leaves(values, place=()):
    """(place, value) of all that holds no others."""
    if isinstance(values, (dict, list)):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from leaves(value, (*place, key))
    else:
        yield place, values


_KEYS = st.sampled_from(["a", "b", "c d", 'e"f'])
_ITEMS = st.lists(st.sampled_from(["1", '"x,]"', "'[ #'", '"""m\nn"""', "{ z = [1, 2] }"]), max_size=5)
_SPACE = st.sampled_from(["", " ", "\n", '\n  # [ , "\n'])


@given(st.lists(st.tuples(_KEYS, _ITEMS, _SPACE), min_size=1, max_size=4, unique_by=lambda entry: entry[0]))
def test_items_of_lists_are_found_wherever_they_are(entries):
    text, expected = "", {}
    for key, items, space in entries:
        quoted = '"' + key.replace('"', '\\"') + '"'
        text += f"{quoted} = ["
        for i, item in enumerate(items):
            text += space
            expected[key, i] = text.count("\n") + 1
            text += f"{item},"
        text += f"{space}]\n"
    assert {place: toml_file.line_of(text, place) for place in expected} == expected
