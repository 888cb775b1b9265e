"""Grades: facts above boilerplate above small talk, in linear time, the same everywhere, by weights that can be changed."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_rt.core.context.grading import CHARACTER, DEFAULT_WEIGHTS, Features, content_grader, features, grade, load_weights
from edge_rt.core.context.history import Segment
from edge_rt.errors import OptionError

WEIGHTS = load_weights()


def graded(text):
    return grade(Segment(0, "user", text, 0, len(text), "message"), WEIGHTS)


# ---- what is counted -------------------------------------------------------------------------------------------------

FOUND = [
    ("We met Laura Bennett and Tom.", {"names": 2}),
    ("Dr. Patel and Mrs. Lind left", {"names": 2}),
    ("Sentences begin with Capitals. So do These. Names do Not", {"names": 1}),
    ("She works for Northwind Trading Ltd. in Paris", {"organisations": 1, "places": 1}),
    ("at 221 Baker Street", {"places": 1, "amounts": 1}),
    ("on 2024-03-15 at 12:35 or 3pm, 15 March, Monday", {"times": 5}),
    ("$4,250 or 12% of 6.5 kg, twenty, 1,000,000", {"amounts": 5}),
    ("E4021 V-12 v2.1 10.0.4.17 7f3a9c1 550134 555-013-4567", {"identifiers": 7}),
    ("https://example.com/a?b=1 j.doe@example.com /etc/gateway/config.yaml user_id getUserName C:\\temp #12", {"identifiers": 7}),
    ('he said "stop" and “go” and 「停」', {"quotes": 3}),
    ("well-known and/or don't U.S. e.g. fine", {"identifiers": 0}),
    ("because it rained, but if so, therefore first", {"causes": 2, "contrasts": 1, "conditions": 1, "conclusions": 1, "sequences": 1}),
    ("the man who said that", {"clauses": 2}),
    ("as a result we agreed", {"causes": 1, "decisions": 1}),
    ("thanks, sounds good", {"courtesies": 3}),
    ("a, b; c: (d)\n- e\n2. f", {"punctuation": 7}),
    ("王先生和欧阳娜，还有张伟的同事", {"names": 3}),
    ("我叫王小明", {"names": 1}),
    ("高度、国王、方便、马上、张开", {"names": 0}),
    ("在杭州市西湖区文三路", {"places": 3}),
    ("城市、市场、道路、地区、区别、路上", {"places": 0}),
    ("华为技术有限公司与中国银行", {"organisations": 2, "places": 1}),
    ("2024年5月1日下午三点半，星期一", {"times": 4}),
    ("今天上午", {"times": 2}),
    ("4250元、百分之五十、三公斤、12万、６５０元", {"amounts": 5}),
    ("一个人一直有一点十分高兴", {"amounts": 0}),
    ("因为……但是……如果……总之……首先", {"causes": 1, "contrasts": 1, "conditions": 1, "conclusions": 1, "sequences": 1}),
    ("因為……雖然……無論……總之……然後", {"causes": 1, "contrasts": 1, "conditions": 1, "conclusions": 1, "sequences": 1}),
    ("必须批准", {"decisions": 2}),
    ("好的，謝謝", {"courtesies": 2}),
    ("订单ＡＢ１２３４", {"identifiers": 1}),
]


@pytest.mark.parametrize(("text", "expected"), FOUND)
def test_features(text, expected):
    counts = features(text)._asdict()
    assert {name: counts[name] for name in expected} == expected


def test_words():
    assert features("one two, three").words == 3
    assert features("三个字 and").words == pytest.approx(1 + 3 * CHARACTER)
    assert features("").words == 0


def test_a_number_counts_once():
    for text in ("2024年5月1日", "15 March", "4250元", "12:35", "1,000,000"):
        counts = features(text)
        assert counts.times + counts.amounts + counts.identifiers == 1, text


# ---- what it is worth ------------------------------------------------------------------------------------------------


def pairs():
    """(language and set) -> (more, less) of grading_pairs.txt."""
    found, more = {}, ""
    for line in (Path(__file__).parents[2] / "data" / "grading_pairs.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            current = found.setdefault(line[1:-1], [])
        elif line.startswith("+ "):
            more = line[2:]
        elif line.startswith("- "):
            current.append((more, line[2:]))
    return found


@pytest.mark.parametrize("name", [f"{language} {kind}" for language in ("english", "chinese") for kind in ("tuned", "held_out", "fresh")])
def test_what_matters_more_grades_higher(name):
    labelled = pairs()[name]
    assert len(labelled) >= 20
    wrong = [(more, less) for more, less in labelled if graded(more).score <= graded(less).score]
    assert len(wrong) <= 0.05 * len(labelled), wrong


@pytest.mark.parametrize("text", ["thanks!", "好的，谢谢", "ok sounds good", "Hi there! How are you?", "哈哈哈，太好了", ""])
def test_small_talk_grades_low(text):
    assert graded(text).score < 0.1


@pytest.mark.parametrize("text", ["Order #55021 must reach Tom Lind in Oslo by 3 May.", "张伟5月3日向中国银行转账4250元，单号AB1234。"])
def test_facts_grade_high(text):
    assert graded(text).score > 0.5


@given(st.text(alphabet=st.characters()))
def test_contributions_add_up_to_a_score_from_0_to_1(text):
    found = graded(text)
    assert 0 <= found.score < 1
    assert found.score == pytest.approx(max(0, 1 - math.exp(-sum(part.points for part in found.contributions))))
    assert [part.value for part in found.contributions] == [getattr(features(text), part.feature) for part in found.contributions]
    assert found == graded(text)


def test_neither_locale_nor_hash_seed_matter():
    code = "from edge_rt.core.context.grading import features; import sys; print([features(t) for t in sys.argv[1:]])"
    texts = [text for text, _ in FOUND]
    outputs = {
        subprocess.run(
            [sys.executable, "-X", "utf8", "-c", code, *texts],
            env={"PYTHONHASHSEED": seed, "LC_ALL": locale},
            capture_output=True,
            check=True,
        ).stdout
        for seed, locale in (("1", "C"), ("2", "tr_TR.UTF-8"))
    }
    assert outputs == {(str([features(text) for text in texts]) + "\n").encode()}


# ---- time ------------------------------------------------------------------------------------------------------------

REPEATED = [
    *"aA1一王 \n\t.,。，\"“「`-_/\\@#$￥：(|'\0\ud800\udc00é１百年第张路市的",
    *["A ", "A. ", "Mr. ", "a.", "1,", "1.", "1:", "a@", "://", "A of the ", "1,111", "aA", "\n- "],
    *["百分之", "一年", "张伟", "1一", "1一a王"],
    "Because Mr. Smith paid $4,250 on 3 May, 张伟把4250元汇到中国银行。",
]


@pytest.mark.parametrize("part", REPEATED)
def test_time_is_linear(part):
    def cpu_time(length):
        text = (part * length)[:length]
        times = []
        for _ in range(3):
            start = time.thread_time()
            features(text)
            times.append(time.thread_time() - start)
        return min(times)

    # Eight times the text: linear takes 8 times as long, quadratic 64 times.
    short, long = cpu_time(2_000), cpu_time(16_000)
    assert long < 24 * short + 0.005, f"8 times the text took {long / short:.0f} times as long"


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_the_file_names_every_feature():
    text = DEFAULT_WEIGHTS.read_text(encoding="utf-8")
    assert all(text.count(f"\n{name} = ") == 2 for name in Features._fields)


def test_a_file_changes_what_it_names(tmp_path):
    path = tmp_path / "mine.ini"
    path.write_text("[weight]\nnames = 2  # persons matter here\n")
    assert load_weights(path) == {**WEIGHTS, "names": WEIGHTS["names"]._replace(points=2)}
    segment = Segment(0, "user", "we met Laura", 0, 12, "message")
    assert content_grader(path)(segment).score > content_grader()(segment).score


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[weight]\nnmaes = 1", r"has a weight for nmaes, which is no feature; features are words, clauses, "),
        (b"[weight]\nnames = much", r"has names = much in \[weight\]; give a number$"),
        (b"[weight]\nnames = nan", r"has names = nan in \[weight\]; give a number$"),
        (b"[half]\nnames = 0", r"has names = 0 in \[half\]; give a number above 0$"),
        (b"[weights]\nnames = 1", r"has a section \[weights\]; weights have \[weight\] and \[half\]$"),
        (b"names = 1", r"is no file of weights \(.*\); write lines such as"),
        (b"[weight]\nnames = 1\nnames = 2", r"is no file of weights \(.*\); write lines such as"),
        (b"\xff\xfe", r"is no file of weights \(.*\); write lines such as"),
        (None, r"^cannot read weights from .*: no such file or directory$"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "bad.ini"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=message) as caught:
        load_weights(path)
    assert "\n" not in str(caught.value)
