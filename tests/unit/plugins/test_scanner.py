"""Redaction of a text that comes in pieces and may be cut off anywhere: nothing of a secret gets out before it is known to be one."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.hooks import Rules
from edge_rt.plugins import redaction
from edge_rt.plugins.redaction.automaton import MAX_JUMPS, significant
from edge_rt.plugins.redaction.scanner import LIMIT

LEAK = 4
"""Characters in a row that tell something of a secret."""


def make(**rules: Any) -> Any:
    read = Rules(rules, ("redaction",))
    made = redaction.compile_rules(read)
    read.finish()
    return made


_NAMES = ["张三丰", "John Smith"]
_PLACEHOLDERS = make(names=_NAMES)
_HASHES = make(names=_NAMES, action="hash", key="0123456789abcdef", pattern=[
    {"name": "few", "regex": "[ab]+c|EMP-\\d{3,}"}, {"name": "words", "regex": r"\b(?:\w+ ){2}x\b"},
])  # fmt: skip
_MASKS = make(names=_NAMES, action="mask", keep_first=3, keep_last=4, cut="keep")

# A secret and the text around it.
SECRETS = [
    ("13812345678", "我的手机是{}，谢谢"), ("138-1234-5678", "call {} now"), ("１３８ １２３４ ５６７８", "电话{}"),
    ("+86 138 1234 5678", "x {} y"),
    ("11010519491231002X", "证{}。"), ("110105 19491231 002X", "身份证号 {} 已"), ("110105491231002", "old {} ok"),
    ("6222021234567890128", "卡号{}的"), ("4111 1111 1111 1111", "card {}."), ("1 3 8 1 2 3 4 5 6 7 8", "数字 {} 。"),
    ("0571-88888888", "拨{}吧"), ("(415) 555-2671", "call {} ok"), ("zhangsan@example.com", "写信给{}吧"),
    ("john.smith+x@mail.example.co.uk", "mail {} please"), ("john @ gmail . com", "mail {} please"),
    ("jo\u200bhn@gm\u00adail.com", "mail {} x"),
    ("192.168.10.25", "host {} up"), ("2001:db8:85a3::8a2e:370:7334", "host {} up"), ("00:1a:2b:3c:4d:5e", "mac {} ok"),
    ("GB82 WEST 1234 5698 7654 32", "iban {} ok"), ("sk-abcdefghijklmnopqrstuvwxyz123456", "key {} ok"),
    ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "{} ok"), ("AKIAIOSFODNN7EXAMPLE", "是{}。"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "jwt {} ."), ("hunter2!pw", "password: {} ok"), ("abc123", "密码：{}，"),
    ("-----BEGIN PRIVATE KEY-----\nMIIEpAIBAAKCAQEA75Zk\nabcDEF123+/=\n", "k\n{}-----END"), ("d41d8cd98f00b204e9800998ecf8427e", "v {} ok"),
    ("q7Zx9Lk2Vb8Nw4Tr6Yp1Mc3D", "v {} ok"), ("张三丰", "我叫{}。"), ("John Smith", "met {} ok"),
    ("浙江省杭州市西湖区文三路478号3号楼501室", "住在{}，"), ("朝阳区建国路88号", "地址：{}。"),
    ("12 Main Street, Springfield, IL 62704", "at {} ok"),
]  # fmt: skip


def leaked(secret: str, output: str) -> str | None:
    """A part of a secret that is in an output."""
    wanted, got = significant(secret), significant(output)
    length = min(LEAK, len(wanted))
    return next((wanted[i : i + length] for i in range(len(wanted) - length + 1) if wanted[i : i + length] in got), None)


@pytest.mark.parametrize(("secret", "around"), SECRETS)
def test_nothing_of_a_secret_gets_out_wherever_it_is_cut(secret: str, around: str) -> None:
    before, after = around.split("{}")
    number = significant(secret).rstrip("Xx").lstrip("+").isdigit()
    for end in range(1, len(secret) + 1):
        processor = _PLACEHOLDERS()
        shown = "".join(map(processor.feed, before + secret[:end]))
        assert leaked(secret, shown[len(before) :]) is None
        shown = (shown + processor.cut("")).replace(before.strip(), "")
        assert leaked(secret, shown) is None, secret[:end]
        assert not number or not any(char.isdigit() for char in shown), secret[:end]
    processor = _PLACEHOLDERS()
    shown = "".join(map(processor.feed, before + secret + after)) + processor.cut("")
    assert leaked(secret, shown.replace(before, "")) is None


@pytest.mark.parametrize(("secret", "around"), SECRETS)
def test_a_stop_string_within_or_after_a_secret_shows_nothing_of_it(secret: str, around: str) -> None:
    before = around.split("{}")[0]
    for following in ("\n\n", secret[-2:], "###", "。"):
        end = len(secret) - 2 if following == secret[-2:] else len(secret)
        processor = _PLACEHOLDERS()
        shown = "".join(map(processor.feed, before + secret[:end])) + processor.cut(following)
        assert leaked(secret[:end], shown.replace(before.strip(), "")) is None


@pytest.mark.parametrize(("text", "following", "expected"), [
    ("the last word", "", "the last …"), ("the last word", "\n", "the last word"), ("the end.", "\n\n", "the end."),
    ("and the", "", "and the"), ("你好，世界", "", "你好，世界"), ("In 2024", "", "In …"),
    ("In 2024", "年", "In 2024"),
    ("call 138123", "", "call …"), ("call 138123", "\n", "call 138123"), ("call 1381234", "5678", "call [PHONE]"),
    ("call 13812345678", "", "call [PHONE]"),
    ("x 13812345678", "9", "x [PHONE]"), ("a@b.com", "", "[EMAIL]"),
    ("密码：ab", "", "密码：…"), ("密码：", "", "密码："), ("so —", "", "so —"),
    ("张", "", "…"), ("我叫张", "飞", "我叫张"), ("John", " S", "…"),
])  # fmt: skip
def test_what_is_shown_where_a_text_is_cut(text: str, following: str, expected: str) -> None:
    for pieces in ([text], list(text)):
        processor = _PLACEHOLDERS()
        assert "".join(map(processor.feed, pieces)) + processor.cut(following) == expected
        assert processor.held == ""


def test_a_complete_text_shows_what_only_might_have_become_a_secret() -> None:
    for text in ("call 138123", "the last word", "密码：ab", "John", "-----BEGIN RSA", "+86 1"):
        processor = _PLACEHOLDERS()
        assert processor.feed(text) + processor.flush() == text


def test_what_a_cut_leaves_unclear_may_be_kept_or_named() -> None:
    for rules, expected in (({"cut": "keep"}, "call 138123"), ({"cut_text": "[CUT]"}, "call [CUT]")):
        processor = make(**rules)()
        assert processor.feed("call 138123") + processor.cut("") == expected


# ---- divisions -------------------------------------------------------------------------------------------------------

_LINES = [around.format(secret) for secret, around in SECRETS]
_ALPHABET = "0123456789 -.@()+:abcXx中号省路区\u200b\u00ad０１－，。\n/_=张三é\u0301AbEMP"
_part = st.sampled_from(_LINES).flatmap(lambda line: st.tuples(st.integers(0, len(line)), st.integers(0, len(line))).map(
    lambda ends: line[min(ends) : max(ends)]))  # fmt: skip
_repeated = st.tuples(st.sampled_from(_ALPHABET), st.integers(1, 500)).map(lambda pair: pair[0] * pair[1])
_texts = st.lists(st.one_of(_part, st.sampled_from(_LINES), st.text(_ALPHABET, max_size=12), _repeated), max_size=6).map("".join)


@pytest.mark.parametrize("made", [_PLACEHOLDERS, _HASHES, _MASKS])
@settings(deadline=None, max_examples=100)
@given(text=_texts, cuts=st.lists(st.integers(0, 3000), max_size=30), end=st.sampled_from([None, "", "\n\n", "1", "@x.com", " ", "。"]))
def test_divisions_change_nothing(made: Any, text: str, cuts: list[int], end: str | None) -> None:
    def processed(pieces: list[str]) -> tuple[str, dict[str, int]]:
        processor, shown, fed = made(), "", ""
        for piece in pieces:
            shown += processor.feed(piece)
            fed += piece
            assert fed.endswith(processor.held)
            assert len(processor.held) <= LIMIT
        shown += processor.flush() if end is None else processor.cut(end)
        assert processor.held == ""
        return shown, dict(processor.counts)

    at = sorted({min(cut, len(text)) for cut in cuts})
    whole = processed([text])
    assert processed([text[a:b] for a, b in zip([0, *at], [*at, len(text)], strict=True)]) == whole
    assert processed(list(text)) == whole


def test_long_secrets_are_concealed_to_their_end() -> None:
    key = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=5000))
    for text in (f"sk-{key}", key, f"password={key}", f"-----BEGIN PRIVATE KEY-----\n{key}\n", f"eyJ{key}.{key}"):
        for size in (1, 7, 10_000):
            processor = _PLACEHOLDERS()
            pieces = [*(text[i : i + size] for i in range(0, len(text), size)), " ok"]
            shown = "".join(map(processor.feed, pieces)) + processor.flush()
            assert leaked(key, shown.removeprefix("password=").removesuffix("ok")) is None


def test_a_long_run_before_an_address_hides_nothing() -> None:
    for length in (1, 100, 130, 200, 1000):
        processor = _PLACEHOLDERS()
        shown = processor.feed("x" * length + ".bob@example.com ok") + processor.flush()
        assert shown.endswith("[EMAIL] ok")
        assert "bob" not in shown


def test_a_secret_drawn_apart_is_concealed_unnamed() -> None:
    for size in (1, 1000):
        processor, text = _PLACEHOLDERS(), "号" + ("\u200b" * 60).join("13812345678") + "。"
        shown = "".join(processor.feed(text[i : i + size]) for i in range(0, len(text), size)) + processor.flush()
        assert "138" not in significant(shown)
        assert processor.counts["unclear"] == 1


def test_what_is_kept_of_texts_tells_no_secret() -> None:
    processor = make(names=_NAMES)()
    pieces = ["My ", "pwd=hunter ", "password: ", "correct", "horse", " ok ", "138", "1234", "5678", " John", " Smith", " sk", "-aB3xYz",
              " the", " river"]  # fmt: skip
    for _ in range(2):
        for piece in pieces:
            processor.feed(piece)
    kept = {text.strip() for state in processor._automaton._states.values() for text in state.jumps}
    assert {"river", "the"} <= kept
    assert not kept & {"pwd=hunter", "hunter", "correct", "horse", "1234", "5678", "Smith", "-aB3xYz"}


def test_what_is_kept_of_texts_is_bounded() -> None:
    processor, drawn = make(names=_NAMES)(), random.Random(4)
    for _ in range(MAX_JUMPS + 2_000):
        processor.feed(" " + "".join(drawn.choices("abcdefghij", k=5)))
    assert sum(len(state.jumps) for state in processor._automaton._states.values()) <= MAX_JUMPS


def test_streams_on_several_threads_share_what_was_learned() -> None:
    made, text = make(names=_NAMES), "\n".join(_LINES) * 3

    def processed(make_one: Any) -> str:
        processor = make_one()
        return "".join(map(processor.feed, text)) + str(processor.flush())

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(processed, [made] * 8)) == {processed(_PLACEHOLDERS)}


# ---- cost ------------------------------------------------------------------------------------------------------------


def _hostile(length: int) -> Iterator[str]:
    parts = """1 |(1|1.2.3.|4111 1111 1111 1111 |12-|:|f:|a@|a@b.|a.|市区路1号|北京市|password:|密码：a|1\u200b|\u200b|-----BEGIN |eyJ|sk-
        |AB12 |John |张 |12 Main |://a:b|ab|a|@|+1|\u0301"""
    for part in parts.replace("\n        ", "").split("|"):
        yield (part * length)[:length]
    for alphabet in ("0123456789 -.", "ab", "ab.@ ", "北京市区路1号 ", "0123456789abcdef:", "aA1_-/+"):
        yield "".join(random.Random(3).choices(alphabet, k=length))


def test_hostile_text_costs_no_more_by_its_length() -> None:
    patterns = [{"name": "p", "regex": "a*b"}, {"name": "q", "regex": "(?:ab|ba)+c", "max_length": 20}]

    def seconds(text: str) -> float:
        processor = make(names=_NAMES, pattern=patterns)()  # a fresh one, which has not seen a short text of the kind yet
        gc.disable()  # what other tests left would be looked through again and again
        try:
            start = time.process_time()
            for i in range(0, len(text), 4):
                processor.feed(text[i : i + 4])
                assert len(processor.held) <= LIMIT
            processor.flush()
            return time.process_time() - start
        finally:
            gc.enable()

    for short, long in zip(_hostile(300), _hostile(2_400), strict=True):
        # Eight times the text: linear takes 8 times as long, quadratic 64 times.
        assert seconds(long) < 24 * seconds(short) + 0.03, long[:20]


def test_ordinary_text_is_hardly_held_back() -> None:
    english = "The runtime reads the header of a model file and decides which engine can run it; the best score wins, don't you think? "
    chinese = "端侧推理引擎的目标是在手机和单板计算机上运行语言模型，它需要处理内存受限的问题，同时保持较低的首字延迟。"
    for text, most in ((english * 5, 16), (chinese * 5, 2)):
        processor, held = _PLACEHOLDERS(), []
        for char in text:
            processor.feed(char)
            held.append(len(processor.held))
        assert max(held) <= most
