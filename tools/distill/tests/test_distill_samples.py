"""Reading samples: every form, every kind of broken line with its number, and bytes of any kind."""

from __future__ import annotations

import importlib.util
import json
import sysconfig
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from edge_rt_distill.data import samples as module
from edge_rt_distill.data.samples import DOMAINS, Message, Problem, Sample, demo, make_sample, read_samples
from edge_rt_distill.data.sources import PACKAGES, docstrings, packages, technical_text
from edge_rt_distill.data.text import language_of, passages, sentences, units
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_rt.hooks import DataError

GOOD = '{"prompt": "How are you?", "response": "Well."}'


def write(folder: Path, *lines: str | bytes, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in lines))
    return path


def test_every_form_of_a_record_is_the_sample_it_says(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "developer", "content": "Be short."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
    request = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", **chat}}
    file = write(
        tmp_path,
        '{"prompt": "你好", "response": "您好。", "domain": "retail", "license": "CC0-1.0", "source": "shop", "split": "test"}',
        "",
        json.dumps(request),
        '{"text": "A passage.", "language": "de"}',
        '{"prompt": [{"role": "user", "content": "a"}], "system": "s", "completion": "b", "checks": [{"kind": "ends"}]}',
    )
    first, second, third, fourth = read_samples(file).samples
    assert first.messages == (Message("user", "你好"), Message("assistant", "您好。"))
    assert first.answer == "您好。"
    assert (first.domain, first.language, first.source, first.licence, first.split) == ("retail", "zh", "shop", "CC0-1.0", "evaluation")
    assert second.messages == (Message("system", "Be short."), Message("user", "Hi")) == second.prompt
    assert (second.file, second.line, second.answer, second.domain) == (str(file), 3, "", "general")
    assert (third.text, third.messages, third.language, third.prompt) == ("A passage.", (), "de", ())
    assert fourth.messages[0] == Message("system", "s")
    assert fourth.checks == ({"kind": "ends"},)


BROKEN = {
    "{": "not JSON: Expecting property name",
    "[1]": "a JSON object is needed, not a list",
    '{"a": 1}': "there is none of them",
    '{"text": "a", "prompt": "b"}': "there is prompt, text",
    '{"text": 3}': "text is a number, not a string",
    '{"text": " "}': "text is empty",
    '{"text": "a\\u0000b"}': "zero character",
    '{"text": "\\ud800"}': "half a surrogate pair",
    '{"text": "a", "domain": 1}': "domain is a number",
    '{"text": "a", "split": "dev"}': "split is 'dev'",
    '{"text": "a", "checks": [{"kind": "ends"}]}': "checks belong to a question",
    '{"messages": []}': "no message of a user",
    '{"messages": "Hi"}': "messages is a list",
    '{"messages": [1]}': "message 1 is a number",
    '{"messages": [{"role": "tool", "content": "a"}]}': "the role 'tool'",
    '{"messages": [{"role": ["user"], "content": "a"}]}': "the role ['user']",
    '{"messages": [{"role": "user", "content": null}]}': "the content of message 1 is null",
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}': "part that is not text",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "turn 1 is of assistant",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}': "turn 2 is of user",
    '{"prompt": "a", "checks": [{"kind": "magic"}]}': "check 'magic' is not known",
    '{"prompt": "a", "checks": [{"kind": "number", "equals": NaN}]}': "equals is nan",
    "[" * 200_000: "nested too deep",
    '{"text": ' + "9" * 5000 + "}": "",  # a number too long to read, or (Python 3.10.0) read and no string
}


@pytest.mark.parametrize(("line", "reason"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_broken_line_is_told_by_number_and_reason_and_skipped_or_stops(tmp_path: Path, line: str, reason: str) -> None:
    file = write(tmp_path, GOOD, line, '{"text": "The rest."}')
    told: list[Problem] = []
    found = read_samples(file, told=told.append)
    assert [sample.line for sample in found.samples] == [1, 3]
    assert found.problems == told
    assert [(one.file, one.line) for one in told] == [(str(file), 2)]
    assert reason in told[0].reason
    with pytest.raises(DataError, match=r"line 2: .*; mend it, or skip"):
        read_samples(file, policy="stop")


def test_encodings_marks_and_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '{"text": "价格是多少"}\n{"text": "second"}\n'
    for name, data in {"a": b"\xef\xbb\xbf" + text.encode(), "b": text.encode("utf-16"), "c": text.encode("gb18030")}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(data)
        encoding = "gb18030" if name == "c" else "utf-8"
        assert [one.content for one in read_samples(tmp_path / f"{name}.jsonl", encoding=encoding).samples] == ["价格是多少", "second"]
    with pytest.raises(DataError, match="no encoding known"):
        read_samples(tmp_path / "a.jsonl", encoding="klingon")
    monkeypatch.setattr(module, "MAX_LINE", 100)
    file = write(tmp_path, '{"text": "' + "a" * 1000 + '"}', GOOD, b'{"text": "\xff"}', '{"text": "last"}')
    found = read_samples(file)
    assert [one.line for one in found.samples] == [2, 4]
    assert [one.line for one in found.problems] == [1, 3]
    assert "not utf-8 at byte 11" in found.problems[1].reason


@given(st.lists(st.binary(max_size=40) | st.sampled_from([GOOD.encode(), b'{"text": "x"}']), max_size=8))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_bytes_of_any_kind_are_samples_or_told(tmp_path: Path, lines: list[bytes]) -> None:
    """No bytes crash the reader, and each non-blank line is a sample, a duplicate or a problem."""
    file = write(tmp_path, *lines)
    data = file.read_bytes()
    good = write(tmp_path, GOOD, name="good.jsonl")  # so that there is something to read in any case
    found = read_samples([file, good], minimum=1)
    assert found.problems == sorted(found.problems, key=lambda one: one.line)
    if not data.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        filled = [line for line in data.split(b"\n") if line.decode(errors="replace").strip()]
        assert len(found.samples) + found.duplicates + len(found.problems) == len(filled) + 1


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_one_damaged_byte_spoils_one_line_at_most(tmp_path: Path, at: int, byte: int) -> None:
    damaged = bytearray(GOOD.encode())
    damaged[at] = byte
    found = read_samples(write(tmp_path, '{"text": "before"}', bytes(damaged), '{"text": "after"}'))
    assert {"before", "after"} <= {one.content for one in found.samples}
    assert all(one.line in (2, 3) for one in found.problems)  # 3: the byte was a line end


def test_what_holds_no_samples_says_so_with_the_way_out(tmp_path: Path) -> None:
    empty = write(tmp_path)
    cases = {
        "no samples at all": [empty],
        "no such file": [tmp_path / "missing.jsonl"],
        "no files with samples were named": [],
        "jq -c": [write(tmp_path, "[]", name="a.json")],
        "1 samples, and at least 2": [write(tmp_path, GOOD, name="b.jsonl")],
        "1 usable samples and 1 broken": [write(tmp_path, GOOD, "{", name="c.jsonl")],
        "no .jsonl": [(tmp_path / "folder")],
    }
    (tmp_path / "folder").mkdir()
    for message, paths in cases.items():
        with pytest.raises(DataError, match=message) as raised:
            read_samples(paths)
        assert "; " in str(raised.value)  # and the way out
    with pytest.raises(DataError, match="no policy"):
        read_samples(empty, policy="maybe")  # type: ignore[arg-type]


def test_folders_and_globs_are_read_in_order_and_equal_content_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, GOOD, name="b.jsonl")
    write(tmp_path, '{"text": "One."}', GOOD, name="sub/c.ndjson")
    write(tmp_path, "Two.\n\nThree.", name="a.txt")
    write(tmp_path, '{"text": "hidden"}', name="sub/.d.jsonl")
    found = read_samples([tmp_path, tmp_path / "b.jsonl"])
    assert [one.content for one in found.samples] == ["Two.\n\nThree.", "How are you?\nWell.", "One."]
    assert found.duplicates == 1
    assert [one.content for one in read_samples(f"{tmp_path}/**/*.ndjson").samples] == ["One.", "How are you?\nWell."]


def test_a_text_file_becomes_passages_and_a_broken_one_is_told_by_line(tmp_path: Path) -> None:
    file = write(
        tmp_path, "First sentence here. Second one.\n\n" + " ".join(f"word{number}" for number in range(400)) + "\n\n结束。", name="a.md"
    )
    found = read_samples(file, passage=300).samples
    assert [one.line for one in found] == list(range(1, len(found) + 1))
    assert found[0].source == "a.md"
    assert all(len(one.text) <= 300 for one in found)
    assert sum(one.text.count("word") for one in found) == 400
    for data, line in ((b"fine\nbad \xff\n", 2), (b"fine\n\nzero \0", 3)):
        write(tmp_path, data, name="broken.txt")
        assert read_samples([tmp_path / "broken.txt", file], passage=300).problems[0].line == line


def test_an_id_is_of_the_content_alone() -> None:
    assert make_sample(text="a", domain="x", file="f").id == make_sample(text="a").id != make_sample(text="b").id
    assert make_sample([Message("user", "a")]).id != make_sample([Message("system", "a")]).id


@given(st.text(max_size=400), st.integers(10, 200))
@settings(max_examples=150, deadline=None)
def test_passages_are_short_enough_and_lose_no_word(text: str, size: int) -> None:
    pieces = list(passages(text, size))
    assert all(piece.strip() and len(piece) <= size + 2 * piece.count("\n") for piece in pieces)
    strip = str.maketrans("", "", "".join({one for one in text if one.isspace()} | set(" \n\r\t")))
    assert "".join(pieces).translate(strip) == text.translate(strip)


def test_units_sentences_and_language_of_both_scripts() -> None:
    assert units("Ｈello, 5G网络！") == ["hello", "5g", "网", "络"]
    assert len(sentences("It costs 3.5 euros, e.g. today. Fine! 好的。1. item\n2. item")) == 5
    assert [language_of(text) for text in ("Good day", "支持 Wi-Fi 和 VPN 的路由器", "これは本です", "안녕", "Привет", "12 + 3")] == [
        "en", "zh", "ja", "ko", "ru", ""
    ]  # fmt: skip


def test_the_demo_set_has_its_domains_and_languages_each_in_full() -> None:
    found = demo()
    assert found.problems == []
    assert found.duplicates == 0
    for domain in DOMAINS:
        own = [one for one in found.samples if one.domain == domain]
        for language, chats, shortest, longest in (("en", 12, 150, 300), ("zh", 8, 200, 400)):
            mine = [one for one in own if one.language == language]
            assert len([one for one in mine if one.messages and one.answer]) >= chats
            texts = [one.text for one in mine if one.text]
            assert texts
            assert all(shortest <= (len(units(text)) if language == "en" else len(text)) <= longest for text in texts)
            assert all(language_of(one.content) == language for one in mine)
        assert any(len(one.messages) > 2 for one in own)
        assert any(one.checks for one in own)
        assert all(one.source and one.licence == "Apache-2.0" for one in own)


@pytest.mark.parametrize(("source", "letters"), [(technical_text, 200_000), (docstrings, 500_000)])
def test_the_general_text_is_there_with_its_licence(source: Callable[[], list[Sample]], letters: int) -> None:
    found = source()
    assert sum(len(one.text) for one in found) > letters
    assert len({one.id for one in found}) == len(found)
    assert all(one.licence == "PSF-2.0" and "CPython" in one.source and len(one.text) <= 1500 for one in found)


def test_docstrings_are_read_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long, other = "Says what it is about. " * 10, "Another thing altogether. " * 10
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "foreign.py").write_text(f'"""{long} And foreign."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "good.py").write_text(
        f'"""{long}"""\nraise SystemExit\ndef f():\n  """{other}"""\ndef g():\n  """{long}"""\ndef h():\n  "Short."\n'
    )
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    (found,) = docstrings()
    assert found.text == f"{long.strip()}\n\n{other.strip()}"
    assert "good.py, passage 1" in found.source
    (tmp_path / "good.py").unlink()
    with pytest.raises(DataError, match="no source"):
        docstrings()


def test_the_docstrings_of_packages_are_told_apart_by_their_version_and_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.py").write_text(f'"""{"Says what it is about. " * 10}"""\n')
    here = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: here if name == "numpy" else None)
    (one,) = packages()
    assert one.source == f"numpy {version('numpy')}, good.py, passage 1"
    assert one.licence == PACKAGES["numpy"]
