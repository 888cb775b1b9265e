"""Each check ranks answers that are good above those that are not, and what is no check is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from edge_rt_distill.behaviour.rewards import Reward, checks_of, load_reward, reward
from edge_rt_distill.data.answers import Answer
from edge_rt_distill.data.checks import KINDS, check_checks, score
from edge_rt_distill.data.samples import Message, Sample, demo, make_sample
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_rt.hooks import DataError, OptionError

LOOP = "The answer is yes and " * 12
RANKED: list[tuple[dict[str, Any], list[str]]] = [
    # check, and answers from the best to the worst, each strictly worse than the one before
    ({"kind": "not_empty"}, ["5", " \n…"]),
    ({"kind": "no_loops"}, ["A short and sound answer without anything said twice.", "one two three four " * 2 + "five six seven", LOOP]),
    ({"kind": "no_loops"}, ["水泵已经停机，请检查滤网并通知班长。", "请检查滤网。请检查滤网。请检查滤网。请检查滤网。"]),
    ({"kind": "no_loops"}, ["| a | b |\n|---------|---------|\n| 1 | 2 |", "ha" * 9]),
    ({"kind": "language", "is": "zh"}, ["好的，可以使用 VPN。", "Yes, you can use the VPN."]),
    ({"kind": "language", "is": "en-GB"}, ["Fine.", "好的。"]),
    ({"kind": "length", "unit": "words", "max": 4}, ["One two three.", "One two three four five.", "a b c d e f", "w " * 8]),
    ({"kind": "length", "unit": "words", "min": 4}, ["一二三四。", "one two three", "one two", ""]),
    ({"kind": "length", "unit": "sentences", "min": 2, "max": 2}, ["It costs 2.50 now. Buy it.", "It costs 2.50 e.g. now."]),
    ({"kind": "length", "unit": "paragraphs", "max": 1}, ["a\nb", "a\n\nb"]),
    ({"kind": "length", "unit": "characters", "max": 5}, ["abcde", "abcdef"]),
    ({"kind": "list", "items": 3}, ["- a\n- b\n- c", "- a\n- b", "1. a", "a, b and c"]),
    ({"kind": "list", "items": 2, "numbered": True}, ["1. 甲\n2、乙", "1. a\n- b", "- a\n- b"]),
    ({"kind": "list", "min": 2, "max": 3}, ["一、甲\n二、乙", "* a", "none"]),
    (
        {"kind": "json", "type": "object", "keys": ["a", "b"]},
        ['```json\n{"a": 1, "b": 2}\n```', '{"a": 1}', '{"c": 1}', 'Here: {"a": 1, "b": null}', "[1]"],
    ),
    ({"kind": "json"}, ["[1, 2]", "[1, 2"]),
    ({"kind": "contains", "all": ["rent", "deposit"]}, ["Rent and ＤＥＰＯＳＩＴ.", "The rent.", "Parental leave."]),
    ({"kind": "contains", "any": ["押金", "定金"]}, ["需要付押金。", "需要付款。"]),
    ({"kind": "excludes", "texts": ["art"]}, ["A party.", "This is art."]),
    ({"kind": "number", "equals": 1250.5}, ["It is 1,250.50 euros.", "It is 1,250 euros."]),
    ({"kind": "number", "equals": -3}, ["Minus: −3 °C", "from 1-3"]),
    ({"kind": "number", "equals": 35000}, ["共 3.5万元", "共 3.5 元"]),
    ({"kind": "number", "equals": 2e6}, ["2 million people", "2 milliondollar"]),
    ({"kind": "number", "equals": 7, "which": "last"}, ["2x = 14, x = 7.", "x = 7, so 2x = 14"]),
    ({"kind": "number", "equals": 7, "which": "first", "tolerance": 0.5}, ["7.4 of 9", "9 of 7"]),
    ({"kind": "starts_with", "text": "No"}, [" no, never", "Yes, no"]),
    ({"kind": "ends_with", "text": "regards."}, ["Kind regards.\n", "regards. Bye"]),
    ({"kind": "choice", "options": ["yes", "no"], "is": "no"}, ["**No.**", "No, it is not.", "Yes"]),
    ({"kind": "choice", "options": ["是", "否"]}, ["否。", "不知道"]),
    ({"kind": "declines", "is": True}, ["I'm sorry, I cannot share that.", "It is 5 euros."]),
    ({"kind": "declines", "is": True}, ["抱歉，我无法提供他的电话。", "他的电话是 555 0100。"]),
    ({"kind": "declines", "is": True}, ["The note does not say when.", "On Monday."]),
    ({"kind": "declines", "is": True}, ["I'd rather not.", "No, it is open."]),
    ({"kind": "declines", "is": True}, ["No.", "Nobody came."]),
    ({"kind": "declines", "is": True}, ["That is confidential.", "Sign the confidential form."]),
    ({"kind": "declines", "is": True}, ["我不会告诉您。", "这不能说明原因在泵上。"]),
    ({"kind": "declines", "is": True}, ["这是保密的。", "请签保密协议。"]),
    ({"kind": "declines", "is": True}, ["不行。", "不能超过三天。"]),
    ({"kind": "declines", "is": False}, ["Bring the card and the form.", "We can't help with that."]),
    ({"kind": "arithmetic"}, ["2 × (3 + 4) = 14", "2 + 2 = 4 and 2 + 3 = 6", "Fourteen."]),
    ({"kind": "arithmetic"}, ["85 + 2 × 40 = 85 + 80 = 165", "2 + 3 = 4 + 1 = 6", "2 + 3 = 6"]),
    ({"kind": "arithmetic"}, ["12,000 元 × 5% = 600 元，10 / 3 ≈ 3.33", "12,000 元 × 5% = 60 元，10 / 4 = 2.5", "100 ÷ 3 = 33.4"]),
    ({"kind": "redacts", "secrets": ["13812345678", "Ann Lee"]}, ["Call [number] for her.", "Call 138-1234-5678."]),
    ({"kind": "redacts", "secrets": ["38261"]}, ["There is a code.", "3、8、2、6、1"]),
    ({"kind": "redacts", "secrets": ["Bande"]}, ["You may grab and eat it.", "It is B-a-n-d-e."]),
    ({"kind": "redacts", "secrets": ["Ann Lee"]}, ["Mann Leeson came.", "annlee@example.com"]),
    ({"kind": "redacts", "secrets": ["张伟"]}, ["一位客户来电。", "客户张伟来电。"]),
    (
        {"kind": "supported", "passage": "The branch in Leeds closed on 3 May. All customers moved to York. No staff lost their jobs."},
        ["The Leeds branch closed. No staff lost jobs.", "The Leeds branch closed. 300 staff lost their jobs.", "Profits doubled."],
    ),
    ({"kind": "supported", "passage": "本店三月五日停业。会员余额转到二号店。"}, ["三月五日本店停业。", "本店四月停业，余额清零。"]),
    ({"kind": "chooses", "is": "not allowed", "options": ["allowed", "not allowed"]}, ["It is not allowed.", "It is allowed."]),
    ({"kind": "register", "is": "formal"}, ["Your order has been sent.", "We'll send your order.", "Hey, we'll send your order!"]),
    ({"kind": "register", "is": "plain"}, ["You can cancel within 14 days.", "您可在十四日内取消，特此通知。"]),
    ({"kind": "own_turn"}, ["Five.", "Five.\nUser: And six?"]),
    ({"kind": "own_turn"}, ["五。", "五。\n用户：六呢？"]),
    ({"kind": "own_turn"}, ["**Five**: yes.", "Five.\n**User:** And six?"]),
    ({"kind": "own_turn"}, ["Five.", "Five.</s>"]),
    ({"kind": "own_turn"}, ["五。", "五。＜｜im_start｜＞"]),
    ({"kind": "matches", "pattern": r"\d{4}-\d{2}-\d{2}"}, ["2026-05-01\n", "On 2026-05-01.", "May"]),
    ({"kind": "matches", "pattern": r"[A-Z]+", "lines": True}, ["A\nB", "A\nb", "1"]),
    ({"kind": "csv", "columns": 3, "rows": 2}, ["a,b,c\n1,2,3", "a,b,c", "a;b;c"]),
    ({"kind": "csv", "columns": 2, "separator": "|"}, ["| a | b |\n|---|---|\n| 1 | 2 |", "| a | b |\n| 1 |", "a b"]),
]


@pytest.mark.parametrize(("check", "answers"), RANKED, ids=[f"{index}-{check['kind']}" for index, (check, _) in enumerate(RANKED)])
def test_a_check_ranks_the_good_above_the_bad(check: dict[str, Any], answers: list[str]) -> None:
    check_checks([check])
    values = [score(check, Answer(answer, True)) for answer in answers]
    assert values[0] == 1
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values), values


def test_every_kind_is_ranked_above_and_says_what_it_does() -> None:
    assert {check["kind"] for check, _ in RANKED} | {"ends"} == set(KINDS)
    assert score({"kind": "ends"}, Answer("Yes", True)) > score({"kind": "ends"}, Answer("Yes", False))
    assert all(kind.apply.__doc__ for kind in KINDS.values())


@given(st.text(max_size=200), st.sampled_from([check for check, _ in RANKED]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_answer_gets_from_0_to_1(text: str, check: dict[str, Any], ended: bool) -> None:
    assert 0 <= score(check, Answer(text, ended)) <= 1


def test_what_is_no_check_is_refused_with_the_fault() -> None:
    wrong: list[tuple[Any, str]] = [
        ({}, "checks is a list"),
        (["ends"], "checks is a list"),
        ([{}], "check None is not known"),
        ([{"kind": ["ends"]}], "is not known"),
        ([{"kind": "ends", "at": 1}], "has no 'at'; it takes weight"),
        ([{"kind": "number"}], "needs 'equals'"),
        ([{"kind": "number", "equals": "5"}], "it must be number"),
        ([{"kind": "number", "equals": True}], "it must be number"),
        ([{"kind": "number", "equals": 10**400}], "it must be number"),
        ([{"kind": "number", "equals": 1, "tolerance": -1}], "not negative"),
        ([{"kind": "length", "unit": "words"}], "needs min or max"),
        ([{"kind": "length", "unit": "pages", "max": 1}], "it must be words, characters"),
        ([{"kind": "length", "unit": "words", "min": 3, "max": 2}], "min is above max"),
        ([{"kind": "contains", "all": []}], "it must be texts"),
        ([{"kind": "json", "type": []}], "it must be object or array"),
        ([{"kind": "no_loops", "n": 0}], "at least 1"),
        ([{"kind": "ends", "weight": -1}], "not negative"),
        ([{"kind": "matches", "pattern": "("}], "it must be regular expression"),
        ([{"kind": "register", "is": "rude"}], "it must be formal or plain"),
        ([{"kind": "csv", "columns": 0}], "it must be positive count"),
        ([{"kind": "supported", "passage": "a", "share": 2}], "it must be share"),
    ]
    for checks, message in wrong:
        with pytest.raises(DataError, match=message):
            check_checks(checks)


def ask(question: str, *checks: dict[str, Any]) -> Sample:
    return make_sample([Message("user", question)], checks=checks)


def test_a_reward_is_the_mean_of_the_checks_if_the_answer_stops_and_tells_its_parts() -> None:
    sample = ask(
        "How much?",
        {"kind": "number", "equals": 5, "weight": 2},
        {"kind": "contains", "all": ["euros"]},
        {"kind": "contains", "all": ["x"]},
    )
    assert reward(sample, "5 euros.", True) == Reward(3 / 4, {"number": 1, "contains": 1, "contains 2": 0, "ends": 1, "no_loops": 1})
    assert reward(sample, "5 euros.", False).value == 3 / 8
    assert reward(sample, "Nothing of that.", True).value == 0
    assert reward(sample, " ", True) == Reward(0, {"not_empty": 0})
    assert reward(ask("q", {"kind": "ends", "weight": 0}, {"kind": "no_loops", "weight": 0}), "a", True).value == 0


def test_without_checks_an_answer_must_end_not_loop_and_be_in_the_questions_language() -> None:
    sample = ask("退货需要什么？")
    assert [[check["kind"] for check in checks] for checks in checks_of(sample)] == [["language"], ["ends", "no_loops"]]
    good = reward(sample, "请带上小票和完整的商品。", True).value
    worse = [
        reward(sample, text, ended).value
        for text, ended in (("请带上小票", False), ("Bring the receipt.", True), ("请带上小票。" * 9, True), ("", True))
    ]
    assert good == 1
    assert max(worse) < 1
    assert reward(sample, "请带上小票。" * 9, False).value < worse[0]


def test_the_references_of_the_demo_set_pass_all_their_checks() -> None:
    for sample in demo().samples:
        if sample.messages:
            found = reward(sample, sample.answer, True)
            assert found.value == 1, (sample.domain, sample.line, found)
            assert reward(sample, "Banana banana banana. " * 20, False).value < 0.6


def test_a_reward_of_the_users_is_found_by_name_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_distill_rewards.py").write_text(
        "def length(sample, answer, ended):\n    return len(answer) / 10\ndef nothing(sample, answer, ended):\n    return None\nthing = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert load_reward("") is reward
    assert load_reward("my_distill_rewards:length")(ask("q"), "12345", True) == Reward(0.5, {"length": 0.5})
    with pytest.raises(DataError, match=r"returned Reward\(value=1.1"):
        load_reward("my_distill_rewards:length")(ask("q"), "12345678901", True)
    with pytest.raises(DataError, match="returned None"):
        load_reward("my_distill_rewards:nothing")(ask("q"), "1", True)
    for name, message in (
        ("length", "write MODULE:FUNCTION"),
        ("my_distill_rewards:missing", "has no missing"),
        ("my_distill_rewards:thing", "not a function"),
        ("no_such_module_here:f", "PYTHONPATH"),
    ):
        with pytest.raises(OptionError, match=message):
            load_reward(name)
    sys.modules.pop("my_distill_rewards", None)
