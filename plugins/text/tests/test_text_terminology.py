"""The post-processor ``terminology``: the conformance suite with several rules, and a naive one that looks at whole texts."""

from __future__ import annotations

import itertools
import random
import re
import time
import tracemalloc

import pytest
from edge_rt_text import TERMINOLOGY
from edge_rt_text.glossary import MAX_TERM, narrow
from edge_rt_text.terminology import MAX_HELD, Prose
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edge_rt.errors import RuleError
from edge_rt.hooks import HALF_WIDTH, PostProcessorFactory, Rules
from edge_rt.plugin_host.registry import Registry
from edge_rt.postprocess.rules import RuleFile, Ruleset
from edge_rt.testing.conformance import PostProcessorConformance

(FACTORY,) = TERMINOLOGY.edge_rt_post_processors()


def compiled(values):
    rules = Rules(values, ("terminology",))
    make = FACTORY.compile(rules)
    rules.finish()
    return make


def run(make, pieces):
    processor = make()
    return "".join([*map(processor.feed, pieces), processor.flush()])


def apply(terms, text, **rules):
    """What becomes of a text."""
    return run(compiled({"terms": terms, **rules}), [text])


# ---- the contract ----------------------------------------------------------------------------------------------------


class Conformance(PostProcessorConformance):
    max_held = MAX_HELD + 100  # of output: what is held may get longer

    @pytest.fixture
    def factory(self) -> PostProcessorFactory:
        return FACTORY


class TestMixed(Conformance):
    rules = {  # noqa: RUF012
        "terms": {
            "PV": "photovoltaic (PV)",
            "machine learning": "ML",
            "machine learning model": "model",
            "人工智能": "AI",
            "人工": "手动",
            "智能电网": "smart grid",
            "A股": "A-share",
            "5G网络": "5G 网",
            "colour": "color",
        }
    }
    examples = {  # noqa: RUF012
        "PV and PVs, pv.PV": "photovoltaic (PV) and PVs, pv.photovoltaic (PV)",
        "photovoltaic (PV) stays": "photovoltaic (PV) stays",
        "machine learning models": "ML models",
        "A machine learning model.": "A model.",
        "Machine Learning": "ML",
        "用人工智能电网": "用AI电网",
        "人工和智能电网": "手动和smart grid",
        "A股，BA股": "A-share，BA股",
        "5G网络，4.5G网络": "5G 网，4.5G网络",
        "Colour COLOUR ｃｏｌｏｕｒ": "Color COLOR color",
        "`PV` PV\n```\nPV\n```\nPV": "`PV` photovoltaic (PV)\n```\nPV\n```\nphotovoltaic (PV)",
        "pv@a.org PV@a.org, http://PV.org/PV PV": "pv@a.org PV@a.org, http://PV.org/PV photovoltaic (PV)",
        "www.PV/PV（PV）PV-x@y": "www.PV/PV（photovoltaic (PV)）PV-x@y",
    }


class TestEverywhereOnce(Conformance):
    rules = {  # noqa: RUF012
        "terms": {"pv": {"to": "sun (PV)", "case": "ignore"}, "电": {"to": "电力", "first": False}},
        "first_only": True,
        "in_code": True,
        "in_addresses": True,
    }
    examples = {  # noqa: RUF012
        "PV, pv": "sun (PV), pv",
        "`pv` PV": "`sun (PV)` PV",
        "Sun (PV), pv": "Sun (PV), pv",
        "x@pv": "x@sun (PV)",
        "电电力电": "电力电力电力",
    }


class TestNoRules(Conformance):
    examples = {"PV": "PV"}  # noqa: RUF012
    max_held = 0


class TestRepetitive(Conformance):
    """Each term is the beginning of the next, and of others there are only beginnings."""

    rules = {"terms": {**{"中" * n: f"{n}" for n in range(1, 20)}, "a " * 30 + "b": "x", "a b": "c"}}  # noqa: RUF012
    examples = {"中" * 40: "19192", "a a a b": "a a c", "中中a b中": "2c1"}  # noqa: RUF012
    max_held = MAX_HELD


# ---- against a naive one ---------------------------------------------------------------------------------------------


def naive(terms, text):
    """Leftmost and longest, by trying all terms at all places. ``terms``: variant -> (preferred, exact), in letters a, b, A and Han."""
    out, at = "", 0
    inside = [
        p for p, _ in terms.values()
        if any(v.lower() in p.lower() and len(v) < len(p) for v in terms)
    ]  # fmt: skip
    while at < len(text):
        best = 0, ""
        for form in (*terms, *inside):
            there = text[at : at + len(form)]
            end = at + len(there)
            if there.lower() != form.lower() or len(there) <= best[0]:
                continue
            if word(there[0]) and at and word(text[at - 1]):
                continue
            if word(there[-1]) and word(text[end : end + 1]):
                continue
            same = [v for v, (_, exact) in terms.items() if (v == there if exact else v.lower() == there.lower())]
            exact = [v for v in same if terms[v][1]]
            if same:
                best = len(there), terms[(exact or same)[0]][0]
            elif form in inside:
                best = len(there), there
        out += best[1] if best[0] else text[at]
        at += best[0] or 1
    return out


def word(c):
    return bool(c) and c in "abAB"


TEXT = st.text("abAB 中文-", max_size=30)
VARIANT = st.text("abA 中文-", min_size=1, max_size=5).filter(lambda text: text == text.strip())


@st.composite
def glossaries(draw):
    """Terms without chains: no preferred form is a variant. Some have variants in them."""
    variants = draw(st.lists(VARIANT, min_size=1, max_size=6, unique_by=str.lower))
    folded = {variant.lower() for variant in variants}
    around = st.sampled_from(("", "z", "(", "文文", "a "))
    preferred = st.builds(lambda a, b, c: (a + b + c).strip(), around, st.sampled_from([*variants, "z", "Z中"]), around)
    preferred = preferred.filter(lambda text: text and text.lower() not in folded)
    return {variant: (draw(preferred), draw(st.booleans())) for variant in variants}


def rules_of(terms):
    return {"terms": {v: {"to": p, "case": "exact" if exact else "ignore"} for v, (p, exact) in terms.items()}}


@settings(max_examples=200, deadline=None)
@given(glossaries(), TEXT, st.lists(st.integers(0, 100), max_size=6))
def test_it_is_what_the_naive_one_does(terms, text, cuts):
    make = compiled(rules_of(terms))
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    assert run(make, [text[a:b] for a, b in itertools.pairwise(edges)]) == run(make, text) == naive(terms, text)


WORDS = st.sampled_from(("ab", "b", "中", "文中", "ab b", "b ab b", "z", "Z 中"))


@settings(max_examples=120, deadline=None)
@given(
    st.dictionaries(WORDS, st.tuples(WORDS, st.sampled_from(("{}", "{} x", "({})", "x {} y", "中文字"))).map(lambda p: p[1].format(p[0]))),
    st.lists(st.one_of(WORDS, st.sampled_from(("x", ".", "。", "(b)", "AB", "Ab"))), max_size=12),
    st.sampled_from(("exact", "ignore", "follow")),
    st.booleans(),
)
def test_twice_changes_nothing_more(terms, words, case, first):
    """Unless what was written makes a new term or a word together with what stands beside it: here that is parted by a semicolon.

    Nor is it so where the first use of a term is in the preferred form of another: there it is not seen.
    """
    assume(not first or not any(a.lower() in b.lower() and a != b for a, b in itertools.permutations(terms.values(), 2)))
    try:
        make = compiled({"terms": terms, "case": case, "first_only": first})
    except RuleError:  # terms that go in a circle
        return
    once = run(make, [" ; ".join(words)])
    assert run(make, [once]) == once


def test_only_a_possible_term_is_held_back():
    make = compiled({"terms": {"machine learning": "ML", "learn": "study", "中国": "China"}})
    for text, held in {
        "a machine": "machine", "xmachine": "", "machine lear": "machine lear", "machinelear": "", "machine learns": "", "learn": "learn",
        "learn ": "", "learn.": "learn.", "learn. ": "", "learn-x": "learn-x", "中": "中", "中国": "", "l": "l", "，": "", "ｌ": "ｌ",
    }.items():  # fmt: skip
        processor = make()
        processor.feed(text)
        assert processor.held == held, text


def test_what_may_be_an_address_is_held_no_longer_than_the_bound():
    term = "a" * MAX_TERM
    make = compiled({"terms": {term: "b"}})
    for rest, result in (("-" * 300, "b"), ("-" * 63 + "@x", term), ("-" * 64 + "@x", "b"), ("://x", term), (":/x", "b"), (":", "b")):
        processor, most, out = make(), 0, ""
        for c in term + rest:
            out += processor.feed(c)
            most = max(most, len(processor.held))
        assert most <= MAX_HELD
        assert out + processor.flush() == result + rest


@given(st.lists(st.sampled_from(("www.", "w", "a", ".", "@", "://", ":", "/", " ", "中", "`", "-", "\n")), max_size=14), st.randoms())
def test_prose_is_the_same_in_every_division(parts, draw):
    text = "".join(parts)
    kinds = []
    for cuts in ([], range(len(text)), sorted(draw.choices(range(len(text) + 1), k=3))):
        prose, edges = Prose(in_code=False, in_addresses=False), [0, *cuts, len(text)]
        pieces = [prose.feed(text[a:b]) for a, b in itertools.pairwise(edges)]
        kinds.append([(c, kind) for piece, kind in itertools.chain.from_iterable(pieces) for c in piece])
    assert kinds[0] == kinds[1] == kinds[2]
    assert "".join(c for c, _ in kinds[0]) == text


# ---- words, case, width ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AI", "KI"),
        ("AI.", "KI."),
        ("AI. x", "KI. x"),
        ("AI.Next", "KI.Next"),
        ("AI.py x.AI", "AI.py x.KI"),
        ("MAIN AIs AI's 'AI' “AI”", "MAIN AIs KI's 'KI' “KI”"),
        ("AI_x _AI AI2 2AI AI-x", "AI_x _AI AI2 2AI KI-x"),
        ("用AI写，AI。", "用KI写，KI。"),
        ("AI는 のAIを", "KI는 のKIを"),
        ("AI\u0301 \u0301AI", "AI\u0301 \u0301AI"),  # accents make other letters
        ("éAI AIé ЯAI", "éAI AIé ЯAI"),
        ("ＡＩ", "KI"),
        ("AI\r\nAI", "KI\r\nKI"),
        ("(AI)[AI](http://AI)", "(KI)[KI](http://AI)"),
        ("AI/AI", "KI/KI"),
        ("ai Ai", "ai Ai"),
        ("2.5 x 2,5 2, 5 2", "2.5 x 2,5 two, 5 two"),
    ],
)
def test_words(text, expected):
    terms = {"AI": "KI", "2": "two"}
    assert apply(terms, text) == run(compiled({"terms": terms}), text) == expected


def test_emoji_are_not_taken_apart():
    family, woman = "👩‍👩‍👧", "👩"
    terms = {woman: "W", "👍": "ok", "👧": "G"}
    assert apply(terms, f"{woman} {family} 👍 👍🏽 {woman}\ufe0f👧") == f"W {family} ok 👍🏽 {woman}\ufe0fG"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("exact", "website Web Site WEB SITE Web site"),
        ("ignore", "website website website website"),
        ("follow", "website Website WEBSITE Website"),
        ("smart", "website Website WEBSITE Website"),
    ],
)
def test_case(case, expected):
    assert apply({"web site": "website"}, "web site Web Site WEB SITE Web site", case=case) == expected


def test_case_of_preferred_forms_and_of_capitals():
    assert apply({"github": "GitHub", "IT": "information technology"}, "GITHUB Github it IT") == "GitHub GitHub it information technology"
    assert apply({"us": {"to": "we", "case": "ignore"}, "US": "USA"}, "us US Us ＵＳ") == "we USA we USA"
    assert apply({"i": "one", "ß": "sz", "İ": "dotted", "σ": "s"}, "I i ß İ Σ σ ς") == "One one sz dotted S s ς"


def test_terms_lead_to_the_last_preferred_form():
    assert apply({"a": "b", "b": "c c", "c": "d"}, "a b c") == "c c c c d"
    with pytest.raises(RuleError, match=r"terms go in a circle, (a to b to a|b to a to b); leave one of them out"):
        apply({"a": "b", "b": "a"}, "")


def test_a_shorter_term_where_the_longest_is_part_of_a_word():
    terms = {"neural net": "NN", "neural": "N", "net": "web", "深度 net": "X", "深度": "deep"}
    assert apply(terms, "neural nets") == "N nets"
    assert apply(terms, "深度 nets，深度 net") == "deep nets，X"


# ---- cuts and counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "following", "expected"),
    [
        ("use AI", "", "use AI"),  # AID?
        ("use AI.", "", "use KI."),
        ("use AI", "\n\n", "use KI"),
        ("use AI", "D", "use AI"),
        ("use AI", "-x@y", "use AI"),
        ("用人工", "智能", "用手动"),  # the longer term is not in the text
        ("用人工", "", "用手动"),
        ("neural n", "", "N n"),
    ],
)
def test_cut(text, following, expected):
    processor = compiled({"terms": {"AI": "KI", "人工": "手动", "人工智能": "X", "neural": "N", "neural net": "NN"}})()
    assert processor.feed(text) + processor.cut(following) == expected
    assert processor.flush() == processor.held == ""


# ---- glossaries ------------------------------------------------------------------------------------------------------

FINANCE = """\ufeffvariant,preferred
# a comment
P/E,price-earnings ratio

"A股, 沪深",A-share
roe,ROE,ignore first
PV,present value
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "finance.csv").write_text(FINANCE, encoding="utf-8")
    (tmp_path / "energy.TSV").write_text("PV\tphotovoltaic, solar\r\npv cell\tsolar cell\r\n", encoding="utf-8")
    return tmp_path


def registry():
    return Registry.load(entry_points=False, plugins={"terminology": TERMINOLOGY})


GLOSSARIES = """[terminology]
domains = ["finance"]
[[terminology.glossary]]
domain = "finance"
file = "finance.csv"
[[terminology.glossary]]
domain = "energy"
file = "energy.TSV"
[terminology.terms]
"app" = "application"
"ROI" = { to = "return on investment", first = true }
"""


def test_glossaries_of_domains(folder):
    path = folder / "rules.toml"
    text = "P/E ROE roe PV A股, 沪深 app ROI ROI pv cell"
    path.write_text(GLOSSARIES, encoding="utf-8")
    with RuleFile(path, registry(), watch=False) as rules:
        pipeline = rules.current.pipeline()
        out = pipeline.feed(text) + pipeline.flush()
        assert out == "price-earnings ratio ROE roe present value A-share application return on investment ROI pv cell"
        assert pipeline.use()[0].counts == {"finance": 3, "terms": 2}
        path.write_text(GLOSSARIES.replace('"finance"]', '"energy"]'), encoding="utf-8")
        assert rules.reload()
        pipeline = rules.current.pipeline()
        out = pipeline.feed(text) + pipeline.flush()
        assert out == "P/E ROE roe photovoltaic, solar A股, 沪深 application return on investment ROI solar cell"
        (folder / "energy.TSV").write_text("PV\tsun\n", encoding="utf-8")
        rules.check()
        assert rules.check(), "a glossary is watched"
        pipeline = rules.current.pipeline()
        assert pipeline.feed("PV") + pipeline.flush() == "sun"
        (folder / "energy.TSV").write_text("# nothing\nPV\n", encoding="utf-8")
        assert not rules.reload()
        assert str(rules.error) == (
            f"{path}, line 8: energy.TSV, line 2: it has 1 fields; write a variant and its preferred form with a tab between them"
        )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a,b,c,d", "finance.csv, line 8: it has 4 fields; write a variant and its preferred form with a comma between them"),
        ("a,", "finance.csv, line 8: a preferred form is empty; write what it is, or leave the term out"),
        (",a", "finance.csv, line 8: a variant is empty; write what it is, or leave the term out"),
        ("a,b,loud", "finance.csv, line 8: there is no flag loud; choose from first, smart, exact, ignore, follow"),
        ('a,"b', "finance.csv, line 8: unexpected end of data; write variant,preferred form"),
        ("a" * 101 + ",b", f"finance.csv, line 8: the variant {'a' * 20}... has 101 characters; it may have 100"),
        ("P/E,PE", "finance.csv, line 8: P/E is to be PE here, and price-earnings ratio in finance.csv, line 3; leave one of them out"),
        ("App,a,follow", "finance.csv, line 8: App is to be a here, and application in terminology.terms; leave one of them out"),
    ],
)
def test_mistakes_in_a_glossary(folder, line, reason):
    (folder / "finance.csv").write_text(FINANCE + line, encoding="utf-8")
    (folder / "rules.toml").write_text(GLOSSARIES, encoding="utf-8")
    with pytest.raises(RuleError) as caught:
        RuleFile(folder / "rules.toml", registry(), watch=False)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"terms": {"a": 5}}, 'a is neither a text nor a table; write "a" = "preferred form"'),
        ({"terms": {"a": {"too": "b"}}}, "terminology.terms.a has no to; give a text"),
        ({"terms": {"a": {"to": "b", "kase": "exact"}}}, "terminology.terms.a has no rule kase; did you mean case?"),
        ({"terms": {"a": ""}}, "terminology.terms: a preferred form is empty; write what it is, or leave the term out"),
        ({"case": "loud"}, "case cannot be 'loud'; choose from smart, exact, ignore, follow"),
        ({"domains": ["x"]}, "domains chooses glossaries and there are none; add a [[terminology.glossary]] or leave domains out"),
        ({"glossary": [{"domain": "x", "file": "y"}], "domains": ["z"]}, "domains cannot be 'z'; choose from x"),
        ({"glossary": [{"domain": "x"}]}, "terminology.glossary has no file; give a text"),
        ({"terms": {"Aa": {"to": "b", "case": "ignore"}, "aA": {"to": "c", "case": "ignore"}}},
         "terminology.terms: aA is to be c here, and b in terminology.terms; leave one of them out"),
    ],
)  # fmt: skip
def test_mistakes_in_the_rules(rules, reason):
    with pytest.raises(RuleError) as caught:
        Ruleset({"terminology": rules}, registry())
    assert caught.value.reason == reason


# ---- thousands of terms ----------------------------------------------------------------------------------------------

HAN = "电力系统网络学习模型数据市场价格银行风险利率能源太阳光伏储存设备智能机器人工程技术研究开发管理服务企业"


def many(count):
    draw = random.Random(4)
    terms = {}
    while len(terms) < count:
        if draw.random() < 0.5:
            variant = "".join(draw.choices(HAN, k=draw.randint(2, 6)))
        else:
            variant = " ".join("".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(draw.randint(1, 3)))
        terms.setdefault(variant, f"<{len(terms)}>")
    return terms


def test_five_thousand_terms_against_a_regular_expression():
    terms = many(5000)
    draw = random.Random(5)
    parts = [*terms, *HAN, *"abcdefgh", "， ", ". ", " "]
    text = "".join(draw.choice(parts) + draw.choice(("", " ", "，")) for _ in range(500))
    longest_first = map(re.escape, sorted(terms, key=len, reverse=True))
    bound = [v if v[0] in HAN else rf"(?<![a-z])(?<![a-z]\.){v}(?![a-z]|\.[a-z])" for v in longest_first]
    expected = re.sub("|".join(bound), lambda match: terms[match[0]], text)
    make = compiled({"terms": terms, "case": "exact"})
    assert run(make, [text]) == expected != text
    at, pieces = 0, []
    while at < len(text):
        pieces.append(text[at : at + draw.randint(1, 6)])
        at += len(pieces[-1])
    assert run(make, pieces) == expected


def test_five_thousand_terms_are_compact():
    terms = many(5000)
    compiled({"terms": many(10)})  # tables of characters, which all rules share
    tracemalloc.start()
    make = compiled({"terms": terms})
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert make
    assert size < 5_000_000


@pytest.mark.parametrize("piece", [4, 1 << 20])
@pytest.mark.parametrize("text", ["a", "a ", "中", "a b@", "`a`", "a\n", "a://a ", "a.", "(", "www."])
def test_hostile_text_takes_linear_time(text, piece):
    terms = {("a " * n)[:-1]: "x" for n in range(1, 50)} | {"中" * n: "y" for n in range(1, 90, 9)} | {"中" * 80 + "a": "z"}
    make = compiled({"terms": terms})

    def seconds(length):
        whole = text * (length // len(text))
        start = time.process_time()
        run(make, [whole[i : i + piece] for i in range(0, length, piece)])
        return time.process_time() - start

    assert min(seconds(16_000) for _ in range(2)) < 24 * min(seconds(2_000) for _ in range(3)) + 0.02


def test_full_width_forms_are_read_as_ascii():
    every = "".join(map(chr, HALF_WIDTH)) + "中\xa0é"
    assert narrow(every) == every.translate(HALF_WIDTH).replace("\xa0", " ")
