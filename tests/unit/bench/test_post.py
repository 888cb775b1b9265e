"""Generated secrets are what they are said to be and where; a planted leak is found; scores and delays are right."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from bench.post.clean import LOOK_ALIKES, clean
from bench.post.leaking import summary
from bench.post.numbers import ISSUERS, identity_18, identity_check, luhn_valid
from bench.post.overhead import delayed, percentile
from bench.post.presidio import Found, best_of, judge, located
from bench.post.rules import PLACEHOLDER, group_of, terms
from bench.post.scoring import REPLACED, hidden, leaks, replaced, strict
from bench.post.secret import SEPARATORS, ZERO_WIDTH, Sample, Span, disguised, grouped, number, significant, textual
from bench.post.streaming import Stream, at_random, said, stream
from bench.post.texts import LABELS, MAKERS, sample
from edge_rt.postprocess.pipeline import Pipeline, Stage

SAMPLES = [sample(i) for i in range(1500)]
MOBILE = re.compile(r"1[3-9][0-9]{9}")


def spans_of(kind: str) -> list[tuple[Sample, Span]]:
    return [(text, span) for text in SAMPLES for span in text.spans if span.kind == kind]


# ---- secrets ---------------------------------------------------------------------------------------------------------


def test_checksums_are_those_of_known_numbers() -> None:
    assert identity_check("11010519491231002") == "X"  # the example of GB 11643-1999
    assert luhn_valid("4111111111111111")
    assert luhn_valid("378282246310005")
    assert not luhn_valid("4111111111111112")


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_comes_often_and_enough_of_it_is_inside(kind: str) -> None:
    found = spans_of(kind)
    assert len(found) > 80
    assert all(0 < span.enough <= span.end - span.start for _, span in found)
    assert {text.language for text, _ in found} == {"zh", "en", "mixed"}


def test_secrets_have_valid_checksums_and_prefixes_however_they_are_written() -> None:
    for text, span in spans_of("id_18"):
        plain = significant(text.text[span.start : span.end]).upper()
        assert len(plain) == 18
        assert plain[17] == identity_check(plain[:17])
    for text, span in spans_of("card"):
        plain = significant(text.text[span.start : span.end])
        assert luhn_valid(plain)
        assert any(plain.startswith(issuer) and len(plain) == length for issuer, length in ISSUERS)
    for text, span in spans_of("mobile"):
        assert MOBILE.fullmatch(significant(text.text[span.start : span.end])[-11:])
    for text, span in spans_of("email"):
        assert significant(text.text[span.start : span.start + span.enough]) == significant(
            text.text[span.start :].split("@")[0].split("＠")[0]
        )


def test_spans_do_not_overlap_and_hold_the_secret_alone() -> None:
    for text in SAMPLES:
        ends = [0, *(span.end for span in text.spans)]
        assert all(end <= span.start < span.end for end, span in zip(ends, text.spans, strict=False))
        for span in text.spans:
            secret = text.text[span.start : span.end]
            assert secret == secret.strip()
            assert "\x00" not in text.text


def test_a_seed_always_gives_the_same_text_and_another_seed_another() -> None:
    assert [sample(i) for i in range(50)] == SAMPLES[:50]
    assert clean(7) == clean(7)
    assert len({text.text for text in SAMPLES}) > 0.99 * len(SAMPLES)


def test_secrets_stand_in_many_places_and_hundreds_of_frames() -> None:
    frames = set()
    for text in SAMPLES:
        frame = text.text
        for span in reversed(text.spans):
            frame = frame[: span.start] + "#" + frame[span.end :]
        frames.add(frame)
    assert len(frames) > 800
    assert any(span.start == 0 for text in SAMPLES for span in text.spans)
    assert any(span.end == len(text.text) for text in SAMPLES for span in text.spans)
    assert any(b.start - a.end == 1 for text in SAMPLES for a, b in zip(text.spans, text.spans[1:], strict=False))
    assert set(LABELS) == set(MAKERS)


def test_ways_of_writing_keep_what_counts() -> None:
    rng = random.Random(1)
    written = {grouped(rng, "13812345678", (3, 4, 4)) for _ in range(400)}
    assert {re.sub(r"[0-9]", "", text).strip()[:1] for text in written} >= {"", "-", "\u2013", "\uff0d"}
    assert all(significant(text) == "13812345678" for text in written)
    assert any(separator in text for separator in SEPARATORS for text in written)
    secrets = [disguised(rng, number("mobile", "13812345678")) for _ in range(400)]
    assert all(significant(secret.text) == "13812345678" for secret in secrets)
    assert any(c in secret.text for c in ZERO_WIDTH for secret in secrets)
    assert all(significant(secret.text[: secret.enough]) == "1381" for secret in secrets)
    assert significant(identity_18(random.Random(0)).text)
    assert textual("name", "张伟").enough == 2


def test_clean_texts_have_no_span_and_no_number_that_is_a_secret() -> None:
    texts = [clean(i) for i in range(1500)]
    assert {text.layout for text in texts} == {*LOOK_ALIKES, "prose"}
    for text in texts:
        assert not text.spans
        for digits in re.findall(r"[0-9]{11,}", text.text):
            assert not MOBILE.fullmatch(digits) or text.layout in ("commit", "decimals")
            if text.layout == "order number":
                assert not (13 <= len(digits) <= 19 and luhn_valid(digits))


def test_there_are_as_many_terms_as_asked_for() -> None:
    found = terms(300)
    assert len(found) == 300
    assert found == terms(300)
    assert all(term and term != preferred for term, preferred in found.items())


# ---- leaks -----------------------------------------------------------------------------------------------------------

TEXT = "订单1381，手机138 1234 5678，邮箱bob@example.com。"
PHONE, EMAIL = Span("mobile", 9, 22, 5, True), Span("email", 25, 40, 4, False)
SPANS = (PHONE, EMAIL)
GOOD = f"订单1381，手机{REPLACED}，邮箱{REPLACED}。"


def test_the_spans_of_this_test_are_right() -> None:
    assert [TEXT[span.start : span.end] for span in SPANS] == ["138 1234 5678", "bob@example.com"]


def test_a_good_output_has_no_leak() -> None:
    assert leaks(TEXT, SPANS, GOOD) == []
    assert strict(TEXT, SPANS, GOOD, open_end=False) == ({}, 0)


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (TEXT, "mobile"),
        (GOOD.replace(REPLACED, f"{REPLACED}678", 1), "mobile"),
        (GOOD.replace(REPLACED, f"{REPLACED}６-7 8", 1), "mobile"),
        (GOOD.replace("邮箱", "邮箱example"), "email"),
        (GOOD.replace("邮箱", "邮箱EX\u200bAM"), "email"),
    ],
)
def test_a_planted_leak_is_found(output: str, kind: str) -> None:
    assert kind in [leak.span.kind for leak in leaks(TEXT, SPANS, output)]


def test_what_stands_outside_of_secrets_is_no_leak_and_two_digits_are_none() -> None:
    assert leaks(TEXT, SPANS, GOOD.replace(REPLACED, "78", 1)) == []
    assert "138" not in [leak.window for leak in leaks(TEXT, SPANS, GOOD)]


def test_what_came_out_of_one_secret_is_not_counted_for_another() -> None:
    text = "138 1234 5678, 2001:0db8:1380:1:2:3:4:5"
    spans = (Span("mobile", 0, 13, 5, True), Span("ipv6", 15, 39, 4, False))
    assert [leak.span.kind for leak in leaks(text, spans, f"{REPLACED}, {text[15:]}")] == ["ipv6"]
    assert [leak.span.kind for leak in leaks(text, spans, f"{text[:13]}, {REPLACED}")] == ["mobile"]
    assert len(leaks(text, spans, text)) == 2
    assert len(leaks("5551 5551", (Span("a", 0, 4, 4, True), Span("b", 5, 9, 4, True)), "5551 5551")) == 1


def test_the_strict_measure_counts_single_characters_and_what_was_replaced_beside() -> None:
    assert strict(TEXT, SPANS, GOOD.replace(REPLACED, f"{REPLACED}78", 1), open_end=False).kept == {"mobile": 2}
    assert strict(TEXT, SPANS, GOOD.replace("订单1381", f"订单{REPLACED}"), open_end=False) == ({}, 4)
    assert strict(TEXT, SPANS, GOOD[:9], open_end=True) == ({}, 0)
    assert replaced("编号12345。", f"编号{REPLACED}。") == 5
    assert strict(TEXT, SPANS, GOOD.replace("，", "?"), open_end=False).kept == {}, "edited, not only replaced"
    assert replaced(TEXT, TEXT) == 0
    assert replaced("1、2、3、4", f"1、{REPLACED}、4") == 3
    assert replaced("1、2", REPLACED) == 3


def test_ambiguous_places_of_placeholders_count_for_the_best() -> None:
    text, span = "给a b c的 b信", Span("key", 1, 6, 4, False)
    assert strict(text, [span], f"给{REPLACED} b信", open_end=False) == ({}, 1)
    assert strict(text, [span], f"给{REPLACED} b{REPLACED}信", open_end=False).kept == {"key": 1}


def test_a_stump_counts_once_enough_of_it_came() -> None:
    assert hidden(SPANS, len(TEXT)) == ([PHONE, EMAIL], [])
    assert hidden(SPANS, 13) == ([], [PHONE._replace(end=13)])
    assert hidden(SPANS, 14) == ([PHONE._replace(end=14)], [])
    assert hidden(SPANS, 27) == ([PHONE], [EMAIL._replace(end=27)])
    assert hidden(SPANS, 9) == ([], [])


# ---- streams ---------------------------------------------------------------------------------------------------------


class Waits:
    """Holds numbers and addresses back until something else comes, then writes a placeholder; what is cut off it conceals."""

    def __init__(self) -> None:
        self.held = ""

    def feed(self, text: str) -> str:
        out = ""
        for c in text:
            if re.match(r"[0-9 @.a-zA-Z\-\u200b]", c):
                self.held += c
            else:
                out += self.flush() + c
        return out

    def flush(self) -> str:
        held, self.held = self.held, ""
        return re.sub(r"1[3-9][0-9 ]{8,}[0-9]", "⟦PHONE⟧", re.sub(r"[a-z]+@[a-z]+\.com", "⟦EMAIL⟧", held))

    def cut(self, following: str) -> str:
        held, self.held = self.held, ""
        return "⟦CUT⟧" if held else ""


class ForgetsCuts(Waits):
    """The same, but ends a text that was cut off as if it were whole."""

    def cut(self, following: str) -> str:
        return self.flush()


def pipeline(processor: Waits) -> Pipeline:
    return Pipeline([Stage("redaction", processor, fails_closed=True)])


def ended(text: str, end: str, shown: int, stop: str = "") -> Stream:
    tokens = at_random(random.Random(text), text if end in ("whole", "stop") else text[:shown])
    return Stream(text, tokens, end, stop, shown)  # type: ignore[arg-type]


@pytest.mark.parametrize(("end", "shown", "stop"), [("whole", 0, ""), ("limit", 18, ""), ("cancel", 18, ""), ("stop", 18, "567")])
def test_every_end_goes_the_way_of_a_real_stream(end: str, shown: int, stop: str) -> None:
    spoken = ended(TEXT, end, shown or len(TEXT), stop)
    shown = spoken.shown
    output = PLACEHOLDER.sub(REPLACED, said(spoken, pipeline(Waits())))
    must, _ = hidden(SPANS, shown)
    assert leaks(TEXT[:shown], must, output) == []
    assert output.startswith("订单1381，手机")


def test_a_processor_that_forgets_cuts_is_found_out() -> None:
    spoken = ended(TEXT, "limit", 18)
    output = PLACEHOLDER.sub(REPLACED, said(spoken, pipeline(ForgetsCuts())))
    assert [leak.span.kind for leak in leaks(TEXT[:18], hidden(SPANS, 18)[0], output)] == ["mobile"]


def test_tokens_are_the_text_and_ends_are_of_every_kind() -> None:
    ends = set()
    for i, text in enumerate(SAMPLES[:400]):
        spoken = stream(random.Random(i), text, None)
        whole = b"".join(spoken.tokens)
        assert spoken.text.encode().startswith(whole)
        if spoken.end in ("whole", "stop"):
            assert whole.decode() == spoken.text
        if spoken.end == "stop":
            assert spoken.text[spoken.shown :].startswith(spoken.stop)
        assert all(len(token.decode(errors="replace")) <= 8 for token in spoken.tokens)
        ends.add(spoken.end)
    assert ends == {"whole", "limit", "stop", "cancel"}


def test_one_leak_in_any_kind_fails() -> None:
    counts = Counter({"texts": 90, "secrets mobile": 60, "secrets email": 40, "significant": 1000, "clean texts": 200, "clean changed": 3})
    good, exact, alarms, _ = summary(counts, [], 100)
    assert (good.ok, good.shown.startswith("0 of 100 secrets in 90 texts")) == (True, True)
    assert exact.shown.startswith("100.0000% of 1,000")
    assert alarms.shown.startswith("1.50% of 200 texts")
    bad, exact, *_ = summary(counts + Counter({"leaks email": 1, "kept email": 5}), ["seed 3"], 200)
    assert bad.ok is False
    assert bad.notes[1:] == ["leaks: email 1", "ended before 200: the time was up", "seed 3"]
    assert exact.shown.startswith("99.5000%")
    assert summary(Counter(), [], 100)[0].ok is False, "nothing was measured"


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_placeholders_are_put_back_where_they_came_from() -> None:
    text = "手机 13812345678，或bob@example.com，再见"
    assert located(text, pipeline(Waits())) == [Found("phone", 3, 14), Found("email", 16, 31)]


def test_marks_are_of_kind_and_language() -> None:
    texts = [Sample(TEXT, SPANS, "zh", "prose"), Sample("1234", (), "en", "order number")]
    found = [[Found("phone", 9, 22), Found("email", 26, 40), Found("phone", 25, 30)], [Found("phone", 0, 4)]]
    assert judge(texts, found, ["phone"]) == (1, 1, 1, 3, 1)
    assert judge(texts, found, ["email"]) == (1, 1, 0, 1, 1)
    assert judge(texts, found, [], ["zh"]) == (2, 2, 1, 3, 3), "the kind does not matter"
    assert judge(texts, found, ["phone", "card"]) == (1, 1, 1, 3, 1)
    assert judge(texts, found, []).precision == 0.75
    assert judge(texts, found, []).f1 == pytest.approx(6 / 7)
    assert group_of("landline") == "phone"


def test_a_peer_stands_with_the_threshold_that_is_best_for_it() -> None:
    texts = [Sample(TEXT, SPANS, "zh", "prose"), Sample("1234", (), "en", "order number")]
    weak, strong = [[(0.3, Found("phone", 9, 22))], [(0.3, Found("phone", 0, 4))]], [[(0.9, Found("email", 25, 40))], []]
    both = [[*a, *b] for a, b in zip(weak, strong, strict=True)]
    chosen, found = best_of(texts, {"a": weak, "b": both})
    assert chosen == ("b", 0.3)
    assert found == [[Found("phone", 9, 22), Found("email", 25, 40)], [Found("phone", 0, 4)]]
    assert best_of(texts, {"a": weak, "b": [[(0.9, Found("phone", 9, 22))], []]})[0] == ("b", 0.9)


def test_delays_are_from_a_characters_coming_to_its_leaving() -> None:
    assert delayed(pipeline(Waits()), ["ab", "c。", "d"]) == [(3, 1), (2, 1), (1, 0), (0, 0), (0, 0)]
    assert delayed(Pipeline([]), ["ab", "", "c"]) == [(1, 0), (0, 0), (0, 0)]


def test_percentiles_are_values_that_were_there() -> None:
    values = list(range(1, 101))
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50, 99, 100)
    assert percentile([3], 0.99) == 3
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 0.5)
