"""The post-processor punctuation: what it adds and changes, what it leaves alone, however the text is split."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from edge_rt_text import PUNCTUATION
from edge_rt_text.marks import DEPTH, FULL_WIDTH_ALNUM, TO_ASCII
from edge_rt_text.punctuation import BLANKS
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.errors import RuleError
from edge_rt.hooks import HALF_WIDTH, PostProcessor, PostProcessorFactory, Rules
from edge_rt.testing.conformance import PostProcessorConformance

(FACTORY,) = PUNCTUATION.edge_rt_post_processors()
Make = Callable[[], PostProcessor]


def make(**rules: Any) -> Make:
    table = Rules(rules)
    compiled = FACTORY.compile(table)
    table.finish()
    return compiled


def run(processor: Any, pieces: Sequence[str], following: str | None = None) -> str:
    """The joined output; ``following``: the text is cut there."""
    return "".join([*map(processor.feed, pieces), processor.flush() if following is None else processor.cut(following)])


STOPS = {
    "The capital of France is Paris": "The capital of France is Paris.",
    "今天天气很好": "今天天气很好。",
    "这是第一句。这是第二句": "这是第一句。这是第二句。",
    "It is big. I agree": "It is big. I agree.",
    "我喜欢用 Python": "我喜欢用 Python。",
    "The Chinese word for hello is 你好": "The Chinese word for hello is 你好.",
    "今天天气好吗": "今天天气好吗？",
    "3.14 is the value of pi": "3.14 is the value of pi.",
    "**Note.** I agree": "**Note.** I agree.",
    "请问怎么走": "请问怎么走？",
    "为什么会这样呢": "为什么会这样呢？",
    "我不知道为什么": "我不知道为什么。",
    "What is the capital of France": "What is the capital of France?",
    "Do you like tea": "Do you like tea?",
    "When is it due, we asked": "When is it due, we asked.",
    "What I like is green tea": "What I like is green tea.",
    "Had I known, I would have come": "Had I known, I would have come.",
    "This is really **important**": "This is really **important**.",
    "现在温度是25℃": "现在温度是25℃。",
    "It happens in 5% of cases (see above)": "It happens in 5% of cases (see above).",
    "See [the long docs](https://x.y/z)": "See [the long docs](https://x.y/z).",
    "He lives in cafe\u0301s in a cafe\u0301": "He lives in cafe\u0301s in a cafe\u0301.",
    "The answer is yes, it is \n\n": "The answer is yes, it is. \n\n",
    "今天天气很好\r\n": "今天天气很好。\r\n",
    "床前明月光，\n疑是地上霜": "床前明月光，\n疑是地上霜。",
    "1. First do this.\n2. Then do that": "1. First do this.\n2. Then do that.",
    "- 苹果是水果；\n- 香蕉也是水果": "- 苹果是水果；\n- 香蕉也是水果。",
    "- One is this. The other is that": "- One is this. The other is that.",
    "Это правда, что он здесь живёт": "Это правда, что он здесь живёт.",
    "오늘은 날씨가 정말 좋습니다": "오늘은 날씨가 정말 좋습니다.",
}
NO_STOP = [
    *("42", "Paris", "北京", "Yes", "是的", "3.14", "10:30", "The Lord of the Rings", "New York City", "答案：42", "The answer is: Paris"),
    *("需要准备的东西：", "# 一、背景", "## What is it about", "**All of this is a summary**", "| a | some words in a cell |"),
    *("- apples\n- pears", "1. 打开文件\n2. 关闭文件", "苹果\n香蕉\n葡萄", "Name: John\nAge: 42", "Best regards,\nJohn Smith"),
    *("今天我很开心😀", "I am so very happy 👩‍👩‍👧", "The flag of France is 🇫🇷", "你好，世界……", "你好，世界—", "Really?!", "“你好。”"),
    *("请看https://example.com/a", "Look at www.example.com", "Write to us at a.b@example.com", "发邮件到 a.b@example.com"),
    *("Open the file main.py", "The file is at /usr/local/bin", "Then run `ls`", "```\nx = 1\n```", "Some text is here.\n\nParis"),
    *("这是说明。（以后再讲）", "This is it. (We come back to it)", '{"a": "some words and more', "สวัสดีชาวโลกทุกคน", "", "\n", "***", "---"),
]  # fmt: skip
CLOSED = {
    "他说：“你好。": "他说：“你好。”",
    "他说：“我今天不去": "他说：“我今天不去。”",
    "这就叫“人工智能": "这就叫“人工智能”。",
    "他写了《红楼梦": "他写了《红楼梦》。",
    "他说：“她说‘不要【那个（东西": "他说：“她说‘不要【那个（东西）】’。”",
    "「他说『是的": "「他说『是的』。」",
    'He said "hello there my friend': 'He said "hello there my friend."',
    "He asked, 'Where are you going now": "He asked, 'Where are you going now.'",
    "The ‘quick fox isn’t so quick": "The ‘quick fox isn’t so quick.’",
    "He works (as I said [before": "He works (as I said [before]).",
    "他住在北京（中国的首都": "他住在北京（中国的首都）。",
    "（注：这里是重要的说明": "（注：这里是重要的说明。）",
    "看〈这个〔那个": "看〈这个〔那个〕〉。",
}
NOT_CLOSED = [
    *("It's 5'10\" tall.", "Rock 'n' roll is from the '90s.", "The dogs' owner doesn't care.", 'A 19" screen is here.', "’Tis the season."),
    *("He is happy :(", "a) one b) two.", "[0, 1) is half open.", "Say “yes” or 'no'.", '"Yes," he said. "No."', 'He said "a" and "b".'),
    *("5' by 3' is small.", "他说“你好“然后走了。", "- [ ] to do.", "\\(x is."  , "`(`", "```\nf(\n```", "```\nf(", "看 `f(", "| (a | b |"),
    *("In one (paragraph.\n\nThe next is fine.", "“One.\n\n“Two.”", "See https://en.wikipedia.org/wiki/A_(b", "[a](http://b"),
]  # fmt: skip
WIDTHS = {
    "你好,世界!": "你好，世界！",
    "你好, 世界.": "你好，世界。",
    "他说:你好;再见?": "他说：你好；再见？",
    "真的?!太好了!!": "真的？！太好了！！",
    "我用Python,它很好用.": "我用Python，它很好用。",
    "中文,English混排,没有问题.": "中文，English混排，没有问题。",
    "我用了三种语言, Python 是最好的.": "我用了三种语言，Python 是最好的。",
    "机器学习(Machine Learning)很难.": "机器学习（Machine Learning）很难。",
    "他来了（三点）。": "他来了（三点）。",
    "价格是1,234.56元,时间是10:30:05,比例3:2.": "价格是1,234.56元，时间是10:30:05，比例3:2。",
    "增长了50%,其中出口增长了10%.": "增长了50%，其中出口增长了10%。",
    "时间:10:30,地点:北京.": "时间：10:30，地点：北京。",
    "请访问https://example.com/a?b=1,c,然后登录.": "请访问https://example.com/a?b=1,c，然后登录。",
    "看https://zh.a.org/wiki/中文?a=1:2 吧,好.": "看https://zh.a.org/wiki/中文?a=1:2 吧，好。",
    "联系邮箱a.b@example.com,电话010-12345678.": "联系邮箱a.b@example.com，电话010-12345678。",
    "文件名是报告.docx,路径是C:\\用户\\文件.txt.": "文件名是报告.docx，路径是C:\\用户\\文件.txt。",
    "版本v1.2.3已发布!使用.NET开发.": "版本v1.2.3已发布！使用.NET开发。",
    '运行`print("你好,世界")`,然后看结果.': '运行`print("你好,世界")`，然后看结果。',
    "**注意**: 这里有内容, **重点**是它.": "**注意**：这里有内容，**重点**是它。",
    "参见[文档,一](路径/a.md?x=你,好),谢谢.": "参见[文档，一](路径/a.md?x=你,好)，谢谢。",
    "| 名称 | 说明,备注 |\n": "| 名称 | 说明，备注 |\n",
    "1. 打开文件;\n2. 关闭文件.\n": "1. 打开文件；\n2. 关闭文件。\n",
    "你好 ，世界 ！": "你好，世界！",
    "你好。 世界。": "你好。世界。",
    "你好,  \n世界.": "你好，  \n世界。",
    "Hello，world。How are you？": "Hello, world. How are you?",
    "“Hello，” he said。": "“Hello,” he said.",
    "See（above）for details；please。": "See (above) for details; please.",
    "At 10：30 there are 10，000 of them。": "At 10:30 there are 10,000 of them.",
    "１２３ＡＢＣ是编号。": "123ABC是编号。",
    '见[图,一](图（一）,b.png "好,a"),谢谢.': '见[图，一](图（一）,b.png "好,a")，谢谢。',
    "圆周率是３．１４。": "圆周率是3.14。",
    "等等...我想想。。。好": "等等……我想想……好。",
    "Wait... what is it... really?": "Wait… what is it… really?",
}
UNCHANGED = [
    *("Hello, world! It costs $1,234.50; see e.g. Dr. Smith (U.S.) at 10:30.", "他说：“你好，世界！”（见《说明》）", "比分是3:2。"),
    *("The word 你好, meaning hello, is common.", "The Great Wall (长城) is in China, near Beijing (北京), and is old.", "It means 你好."),
    *("我们有以下几点：1. 首先打开文件 2. 然后关闭文件。", "答案是 A. 北京。", "1.首先打开文件。\n2.然后关闭文件。", "一.首先是这个。"),
    *("J.K.罗琳写了书。", "函数f(x)的值为2。", "调用open(文件名)即可。", "支持的语言：\nPython，Java，Go。", "他说“Hello!”是你好。"),
    *("使用 Python 编程。", "Rust 的 std::vec 模块。", "main...feature and f(...) are code.", "Page ........ 5.", "他说。。然后走了。"),
    *("心情不好:(", "3.5折。", "<b>你好</b>。", "a,b,c.", "好~好。", "10：30，我们走。"),
    *("看&nbsp;你好。", '[{"a": "你好,世界"}]', '{"a": "你好,世界"}', "```\n你好,世界\n```\n", "`你好,世界`。"),
]  # fmt: skip
EXAMPLES = STOPS | {text: text for text in (*NO_STOP, *NOT_CLOSED, *UNCHANGED)} | CLOSED | WIDTHS


@pytest.mark.parametrize(("text", "expected"), EXAMPLES.items())
def test_example(text: str, expected: str) -> None:
    assert run(make()(), [text]) == expected
    assert run(make()(), list(text)) == expected


RULED = [
    ({"complete": "never"}, "今天天气很好", "今天天气很好"),
    ({"close": "never"}, "他说：“我今天不去", "他说：“我今天不去。"),
    ({"complete": "never", "close": "never"}, "他说：“我今天不去", "他说：“我今天不去"),
    ({"shortest": 1}, "Paris", "Paris"),  # a name all the same
    ({"shortest": 1}, "I agree", "I agree."),
    ({"shortest": 9}, "今天天气很好", "今天天气很好"),
    ({"complete": "paragraphs"}, "第一段没有句号\n\n第二段也没有\n", "第一段没有句号。\n\n第二段也没有。\n"),
    (
        {"complete": "paragraphs"},
        "# Title of it all\n\nThis is a paragraph  \n\nLast",
        "# Title of it all\n\nThis is a paragraph.  \n\nLast",
    ),
    ({"complete": "paragraphs"}, "列表如下：\n\n- 苹果\n- 香蕉\n\n以上就是全部", "列表如下：\n\n- 苹果\n- 香蕉\n\n以上就是全部。"),
    (
        {"complete": "paragraphs"},
        "Then run this command:\n\n```\nls\n```\n\nThat is all of it",
        "Then run this command:\n\n```\nls\n```\n\nThat is all of it.",
    ),
    ({"close": "paragraphs"}, "He said (and more.\r\n\r\nThat “is it.", "He said (and more.)\r\n\r\nThat “is it.”"),
    ({"close": "paragraphs", "complete": "paragraphs"}, "他说：“我今天不去\n\n好的。", "他说：“我今天不去。”\n\n好的。"),
    ({"width": "keep"}, "你好,世界 ，再见.１２", "你好,世界 ，再见.12。"),
    ({"width": "half"}, "你好，世界。（对）吗？", "你好, 世界. (对) 吗?"),
    ({"width": "half"}, "今天天气很好", "今天天气很好."),
    ({"width": "full"}, "I use Python, it is good. See a.b.com", "I use Python，it is good。See a.b.com"),
    ({"width": "full"}, "At 10:30 it costs 1,234.5, e.g. here.", "At 10:30 it costs 1,234.5，e.g. here。"),
    ({"digits": False}, "１２３ＡＢＣ是编号。", "１２３ＡＢＣ是编号。"),
    ({"ellipsis": False}, "等等...我想想。。。好", "等等...我想想。。。好。"),
    ({"spacing": True}, "使用Python3编程，共２个`a`。", "使用 Python3 编程，共 2 个`a`。"),
    ({"spacing": True}, "看https://a.b/c然后[图A](图A.png)走。", "看 https://a.b/c 然后[图 A](图A.png)走。"),
]


@pytest.mark.parametrize(("rules", "text", "expected"), RULED)
def test_rule(rules: dict[str, Any], text: str, expected: str) -> None:
    assert run(make(**rules)(), [text]) == expected
    assert run(make(**rules)(), list(text)) == expected


CUTS = [
    # text, following, rules, output
    ("今天天气很", "", {}, "今天天气很"),
    ("The weather today is so (very", "", {}, "The weather today is so (very)"),
    ("他说：“今天", "", {}, "他说：“今天”"),
    ("他说：“今天", "", {"close_cut": False}, "他说：“今天"),
    ("他说：“今天", "", {"close": "never"}, "他说：“今天"),
    ("他说：“今天不去", "\n\n", {}, "他说：“今天不去。”"),
    ("他说：“今天不去", "###", {"close_cut": False}, "他说：“今天不去。”"),
    ("你好,", "", {}, "你好，"),
    ("The weather is good today ", "###", {}, "The weather is good today. "),
    ("```\nprint(", "", {}, "```\nprint("),
    ("看 `f(x", "", {}, "看 `f(x"),
    ("见[文档](https://a.b/c", "", {}, "见[文档](https://a.b/c"),
]


@pytest.mark.parametrize(("text", "following", "rules", "expected"), CUTS)
def test_cut(text: str, following: str, rules: dict[str, Any], expected: str) -> None:
    assert run(make(**rules)(), [text], following) == expected
    assert run(make(**rules)(), list(text), following) == expected


def test_counts() -> None:
    processor: Any = make()()
    assert run(processor, ["他说：“１２个,不是（13个"]) == "他说：“12个，不是（13个）。”"
    assert processor.counts == {"completed": 1, "closed": 2, "normalised": 3}


def test_held_is_what_was_fed() -> None:
    processor: Any = make()()
    assert processor.feed("你好,") == "你好"
    assert processor.held == ","
    assert processor.feed(" ") == ""
    assert processor.held == ", "
    assert processor.feed("世") == "，世"
    assert processor.held == ""


@pytest.mark.parametrize("rules", [{"complete": True}, {"close": "end"}, {"width": "wide"}, {"shortest": 0}, {"stop": "."}])
def test_wrong_rules_are_refused(rules: dict[str, Any]) -> None:
    with pytest.raises(RuleError):
        make(**rules)


ALPHABET = (
    *"你好吗aB1２Ａ \n，。？：；（）、,.?!:;()[]\"'“”‘’《》「`/@|#_-{\\😀．",
    *("...", "。。。", "https://", "www.", "**", "- ", "1. ", "\r\n", "  ", "hello ", "e\u0301", "& ", " " * (BLANKS + 2), "👩‍👩‍👧", "🇫🇷"),
)  # fmt: skip
SETS: tuple[dict[str, Any], ...] = (
    {},
    {"complete": "paragraphs", "close": "paragraphs", "spacing": True},
    {"width": "full"},
    {"width": "half", "shortest": 1},
    {"width": "keep", "digits": False, "ellipsis": False, "spacing": True},
)


@settings(deadline=None, max_examples=300)
@given(
    parts=st.lists(st.sampled_from(ALPHABET), max_size=40),
    cuts=st.lists(st.integers(0, 120), max_size=10),
    rules=st.sampled_from(SETS),
    following=st.sampled_from((None, "", "###")),
)
def test_any_split_gives_the_same(parts: list[str], cuts: list[int], rules: dict[str, Any], following: str | None) -> None:
    text, compiled = "".join(parts), make(**rules)
    ends = sorted(min(cut, len(text)) for cut in cuts)
    pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]
    whole, divided, single = (compiled() for _ in range(3))
    expected = run(whole, [text], following)
    assert run(divided, pieces, following) == expected
    assert run(single, list(text), following) == expected
    assert vars(whole)["counts"] == vars(divided)["counts"] == vars(single)["counts"]


SENTENCES = [text for text in (*EXAMPLES, *EXAMPLES.values()) if text and "\n" not in text]


@settings(deadline=None, max_examples=150)
@given(
    texts=st.lists(st.sampled_from(SENTENCES), max_size=5), between=st.sampled_from(("\n\n", "\r\n\r\n")), rules=st.sampled_from(SETS[:3])
)
def test_twice_is_as_once(texts: list[str], between: str, rules: dict[str, Any]) -> None:
    compiled = make(**rules)
    once = run(compiled(), [between.join(texts)])
    assert run(compiled(), [once]) == once


@pytest.mark.parametrize("unit", ["“", "([{", "'a ", "你(", "a,你", "https://", " ", "`", "*a"])
def test_hostile_text_is_linear_and_held_back_little(unit: str) -> None:
    def seconds(length: int) -> float:
        processor: Any = make()()
        text = "你a" + (unit * length)[:length]
        start, sent = time.process_time(), 0
        for at in range(0, len(text), 500):
            sent += len(processor.feed(text[at : at + 500]))
            assert len(processor.held) <= BLANKS
        rest = len(processor.flush())
        assert rest <= BLANKS + DEPTH + 1
        return time.process_time() - start

    short, long = (min(seconds(length) for _ in range(3)) for length in (2_000, 16_000))
    assert long < 24 * short + 0.02, f"8 times the text took {long / short:.0f} times as long"


def test_a_million_openers() -> None:
    processor: Any = make()()
    assert sum(len(processor.feed("(" * 1000)) for _ in range(1000)) + len(processor.held) == 1_000_000
    assert len(processor.flush()) <= 1 + DEPTH


class Suite(PostProcessorConformance):
    max_held = BLANKS + DEPTH + 1

    @pytest.fixture
    def factory(self) -> PostProcessorFactory:
        return FACTORY


class TestPunctuation(Suite):
    examples = EXAMPLES


class TestParagraphs(Suite):
    rules = {"complete": "paragraphs", "close": "paragraphs", "width": "half", "spacing": True}  # noqa: RUF012
    examples = {"他说：“我今天不去\n\n第2段也没有": "他说: “我今天不去.”\n\n第 2 段也没有."}  # noqa: RUF012


class TestFull(Suite):
    rules = {"width": "full"}  # noqa: RUF012
    examples = {"I use a.b, it is good": "I use a.b，it is good。"}  # noqa: RUF012


def test_of_full_width_forms_letters_and_digits_alone_become_ascii() -> None:
    every = "".join(map(chr, HALF_WIDTH)) + "中\xa0é"
    assert "".join(map(chr, TO_ASCII)) == "".join(FULL_WIDTH_ALNUM.findall(every))
    assert every.translate(TO_ASCII) == FULL_WIDTH_ALNUM.sub(lambda found: found[0].translate(HALF_WIDTH), every)
