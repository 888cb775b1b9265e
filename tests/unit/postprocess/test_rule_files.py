"""Rules compiled and exchanged: what a file may say, and that streams under way keep what they began with."""

import logging
import os
import queue
import random
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from edge_rt.errors import PluginError, RuleError
from edge_rt.hooks import PostProcessorFactory, hookimpl
from edge_rt.plugin_host.registry import Registry
from edge_rt.postprocess.rules import RuleFile, Ruleset, change


class Mark:
    """Puts marks around letters; holds one character back."""

    def __init__(self, mark, after):
        self.mark, self.after, self.held = mark, after, ""

    def feed(self, text):
        text = self.held + text
        self.held = text[-1:]
        return "".join(f"{self.mark}{c}{self.after}" for c in text[:-1])

    def flush(self):
        return self.feed("\0")


def plugin(name, **more):
    def compile_rules(rules):
        mark = rules.file("file")[1].strip() if "file" in rules else rules.text("mark", "")
        if mark == "bad":
            raise rules.error("a mark must be good", "mark")
        after = rules.text("after", "")
        return lambda: Mark(mark, after)

    @hookimpl
    def edge_rt_post_processors():
        return [PostProcessorFactory(name, compile_rules, **more)]

    return SimpleNamespace(EDGE_RT_API=1, edge_rt_post_processors=edge_rt_post_processors)


@pytest.fixture(scope="module")
def registry():
    return Registry.load(entry_points=False, plugins={"p": plugin("mark"), "q": plugin("safe", fails_closed=True)})


def text_of(ruleset, *names):
    pipeline = ruleset.pipeline(names)
    return pipeline.feed("ab") + pipeline.flush()


# ---- what a file says ------------------------------------------------------------------------------------------------


def test_tables_are_the_pipeline_in_their_order(registry):
    assert text_of(Ruleset({"mark": {"mark": "<"}, "safe": {"after": ">"}}, registry)) == "<>a><>b>"
    assert text_of(Ruleset({"safe": {"after": ">"}, "mark": {"mark": "<"}}, registry)) == "<a<><b<>"
    both = Ruleset({"pipeline": ["mark"], "safe": {"after": ">"}, "mark": {"mark": "<"}}, registry)
    assert (both.order, text_of(both), text_of(both, "safe")) == (("mark",), "<a<b", "a>b>")


def test_one_without_a_table_has_its_default_rules(registry):
    assert text_of(Ruleset({"mark": {"mark": "<"}}, registry), "safe", "mark") == "<a<b"
    with pytest.raises(PluginError, match="no post-processor named other"):
        text_of(Ruleset({}, registry), "other")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mrak": {}}, "there is no post-processor mrak; there is .*mark"),
        ({"mark": 1}, "mark is a whole number; give a table"),
        ({"mark": [{}]}, "mark is a list; give a table"),
        ({"mark": {"file": "a\0b"}}, "file is not the name of a file; check it"),
        ({"mark": {"file": "~no-such-user/b"}}, "file is not the name of a file; check it"),
        ({"pipeline": ["other"]}, "pipeline cannot be 'other'; choose from"),
        ({"pipeline": ["mark", "mark"]}, "pipeline names mark twice; name it once"),
        ({"mark": {"marc": "x"}}, "mark has no rule marc; did you mean mark?"),
        ({"mark": {"on_failure": "ignore"}}, "on_failure cannot be 'ignore'; choose from drop, stop"),
        ({"safe": {"on_failure": "drop"}}, "safe must not be left out of a stream; leave on_failure away, or say stop"),
    ],
)
def test_what_rules_cannot_be(registry, values, message):
    with pytest.raises(RuleError, match=message):
        Ruleset(values, registry)


def test_what_happens_on_failure_can_be_made_stricter(registry):
    assert not Ruleset({}, registry).fails_closed("mark")
    assert Ruleset({"mark": {"on_failure": "stop"}}, registry).pipeline().conceals
    assert Ruleset({}, registry).fails_closed("safe")


def test_single_rules_can_be_set():
    assert change({"a": {"x": 1, "y": 2}}, ['a.x="z"', "b.c=true"]) == {"a": {"x": "z", "y": 2}, "b": {"c": True}}
    with pytest.raises(RuleError, match=r"the rule 'a.x=z' is not as .*; a text needs its quotes"):
        change({}, ["a.x=z"])


def test_equal_rules_have_equal_versions(registry, tmp_path):
    path = tmp_path / "mark.txt"
    path.write_text("<")
    versions = [Ruleset({"mark": {"file": "mark.txt"}}, registry, folder=tmp_path).version for _ in range(2)]
    path.write_text(">")
    versions.append(Ruleset({"mark": {"file": "mark.txt"}}, registry, folder=tmp_path).version)
    assert versions[0] == versions[1] != versions[2]
    assert Ruleset({}, registry).version == ""


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text('[mark]\nmark = "<"\n')
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[mark]\n\nmark = "bad"\n', r"rules\.toml, line 3: a mark must be good$"),
        ("[mark]\nmark = 3\n", r"rules\.toml, line 2: mark is a whole number; give a text$"),
        ("x = [\n", r"rules\.toml, line 2: it is not TOML"),
        ('pipeline = [\n  "mark",\n  "safe",\n  "none"]\n', r"rules\.toml, line 4: pipeline cannot be 'none'"),
        (None, r"rules\.toml: cannot be read: no such file or directory; check the name$"),
        (b"\xff\xff", r"rules\.toml: it is not UTF-8 \(byte 0\)"),
    ],
)
def test_the_first_version_must_be_right(registry, file, text, message):
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RuleError, match=message):
        RuleFile(file, registry, watch=False)


def test_a_rule_set_beside_the_file_is_not_looked_for_in_it(registry, file):
    assert text_of(RuleFile(file, registry, overrides=['mark.after=">"'], watch=False).current) == "<a><b>"
    with pytest.raises(RuleError, match=r"^mark is a whole number; give a text$"):
        RuleFile(file, registry, overrides=["mark.mark=3"], watch=False)


def test_a_change_is_taken_when_the_file_has_settled(registry, file):
    book = RuleFile(file, registry, watch=False)
    stream = book.current.pipeline()
    assert (book.check(), book.exchanged, stream.feed("ab")) == (False, 0, "<a")
    file.write_text('[mark]\nmark = "{{"\n')
    assert [book.check() for _ in range(3)] == [False, True, False]
    assert (stream.feed("c") + stream.flush(), text_of(book.current)) == ("<b<c", "{{a{{b")
    assert (book.exchanged, stream.rules != book.current.version) == (1, True)


def test_a_file_that_is_being_written_is_not_taken(registry, file):
    book = RuleFile(file, registry, watch=False)
    for n in range(1, 5):
        file.write_text('[mark]\nmark = "' + "{" * (n + 1) + '"\n')
        assert not book.check()
    assert [book.check(), text_of(book.current)] == [True, "{" * 5 + "a" + "{" * 5 + "b"]


def test_a_wrong_file_changes_nothing_and_says_why(registry, file, caplog):
    told = []
    book = RuleFile(file, registry, watch=False, told=told.append)
    before = book.current
    file.write_text('[mark]\nmarc = "x"\n')
    with caplog.at_level(logging.INFO, "edge_rt.postprocess.rules"):
        assert [book.check() for _ in range(3)] == [False, False, False]
    assert book.current is before
    assert str(book.error) == f"{file}, line 2: mark has no rule marc; did you mean mark?" == str(told[0])
    assert f"the rules stay as they were: {book.error}" in caplog.text
    file.write_text('[mark]\nmark = "<"\n')  # as it was
    assert [book.check(), book.check(), book.error, told[1:]] == [False, False, None, [None]]
    assert book.current is before
    file.unlink()
    assert [book.check(), book.check()] == [False, False]
    assert "cannot be read" in str(book.error)


def test_two_changes_within_one_tick_of_the_clock_are_both_taken(registry, file):
    file.write_text('[mark]\nmark = "{"\n')
    book = RuleFile(file, registry, watch=False)
    read = file.stat()
    file.write_text('[mark]\nmark = "}"\n')
    os.utime(file, ns=(read.st_atime_ns, read.st_mtime_ns))  # as if the clock had not moved between
    assert [book.check(), book.check(), text_of(book.current)] == [False, True, "}a}b"]


def test_files_that_rules_name_are_watched_too(registry, tmp_path, file):
    (tmp_path / "m.txt").write_text("1")
    file.write_text('[mark]\nfile = "m.txt"\n')
    book = RuleFile(file, registry, watch=False)
    assert text_of(book.current) == "1a1b"
    (tmp_path / "m.txt").write_text("22")
    assert [book.check(), book.check(), text_of(book.current)] == [False, True, "22a22b"]
    (tmp_path / "m.txt").unlink()
    assert [book.check(), book.check(), text_of(book.current)] == [False, False, "22a22b"]
    assert "line 2: file names m.txt, which cannot be read" in str(book.error)
    (tmp_path / "m.txt").write_text("3")
    assert [book.check(), book.check(), text_of(book.current)] == [False, True, "3a3b"]


def test_a_mistake_is_told_once_whatever_files_come_with_it(registry, tmp_path, file):
    told = []
    book = RuleFile(file, registry, watch=False, told=told.append)
    file.write_text('[mark]\nfile = "none.txt"\n')
    for _ in range(6):
        book.check()
    assert [str(error) for error in told] == [
        f"{file}, line 2: file names none.txt, which cannot be read: no such file or directory; check the name"
    ]
    (tmp_path / "none.txt").write_text("1")
    assert [book.check(), book.check(), book.check()] == [False, True, False]
    assert (told[1:], text_of(book.current)) == ([None], "1a1b")


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_a_file_without_rules_is_not_taken(registry, file, text):
    """An editor that fails leaves an empty file; nothing would be concealed any more."""
    book = RuleFile(file, registry, watch=False)
    file.write_text(text)
    assert (book.reload(), text_of(book.current)) == (False, "<a<b")
    assert str(book.error) == f"{file}: it has no rules; add a table, as [redaction], or say pipeline = []"
    file.write_text("pipeline = []\n")
    assert (book.reload(), text_of(book.current)) == (True, "ab")


def test_the_older_of_two_versions_does_not_come_last(tmp_path):
    """One is read on demand while the watching thread still compiles the one before."""
    compiling, go_on = threading.Event(), threading.Event()

    def compile_rules(rules):
        mark = rules.text("mark", "")
        if mark == "old":
            compiling.set()
            assert go_on.wait(20)
        return lambda: Mark(mark, "")

    @hookimpl
    def edge_rt_post_processors():
        return [PostProcessorFactory("mark", compile_rules)]

    plugins = {"p": SimpleNamespace(EDGE_RT_API=1, edge_rt_post_processors=edge_rt_post_processors)}
    path = tmp_path / "rules.toml"
    path.write_text("[mark]\n")
    book = RuleFile(path, Registry.load(entry_points=False, plugins=plugins), watch=False)
    path.write_text('[mark]\nmark = "old"\n')
    first, second = (threading.Thread(target=book.reload) for _ in range(2))
    first.start()
    assert compiling.wait(20)
    path.write_text('[mark]\nmark = "new"\n')
    second.start()
    second.join(0.3)
    go_on.set()
    first.join()
    second.join()
    assert text_of(book.current) == "newanewb"


def test_the_watching_thread_does_so(registry, file, monkeypatch):
    monkeypatch.setattr("edge_rt.postprocess.rules.INTERVAL", 0.01)
    told = threading.Event()
    with RuleFile(file, registry, told=lambda error: told.set()) as book:
        file.write_text('[mark]\nmark = "{{"\n')
        assert told.wait(10)
        assert text_of(book.current) == "{{a{{b"
    assert not book._thread.is_alive()


def test_a_bug_does_not_end_the_watching(registry, file, monkeypatch):
    monkeypatch.setattr("edge_rt.postprocess.rules.INTERVAL", 0.01)
    told = queue.SimpleQueue()
    with RuleFile(file, registry, told=told.put) as book:
        with monkeypatch.context() as broken:
            broken.setattr("edge_rt.postprocess.rules.change", lambda *_: 1 / 0)
            file.write_text('[mark]\nmark = "{{"\n')
            assert "ZeroDivisionError while it was read; report this" in str(told.get(timeout=10))
        file.write_text('[mark]\nmark = "[["\n')
        assert told.get(timeout=10) is None
        assert (text_of(book.current), book.error) == ("[[a[[b", None)


# ---- a storm ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_threads():
    """Threads take turns often, so that 1,000 changes do not wait for four busy streams."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)
    yield
    sys.setswitchinterval(before)


def stream(book, chance):
    """One stream: what was fed, what came out, and the notices."""
    pipeline = book.current.pipeline()
    text = "".join(chance.choices("abcdefgh", k=chance.randrange(1, 200)))
    out, rest = "", text
    while rest:
        n = chance.randrange(1, 9)
        out += pipeline.feed(rest[:n])
        rest = rest[n:]
        time.sleep(0)
    return text, out + pipeline.flush(), pipeline.notices


def test_reload_storm(registry, file, monkeypatch, quick_threads):
    """1,000 changes, a third of them wrong, under four streams: each follows one version from its first to its last character."""
    monkeypatch.setattr("edge_rt.postprocess.rules.INTERVAL", 0)
    over, seen, failures, told = threading.Event(), set(), [], queue.SimpleQueue()

    def streams(seed):
        chance = random.Random(seed)
        while not over.is_set():
            text, out, notices = stream(book, chance)
            mark = out[: out.index(text[0])]
            seen.add(mark)
            if out != "".join(mark + c for c in text) or notices:
                failures.append((text, out))

    wrong = ("[mark\n", "[mark]\nmark = 3\n", '[mark]\nmark = "bad"\n', '[mark]\nmarc = "1"\n')
    with RuleFile(file, registry, told=told.put) as book:
        threads = [threading.Thread(target=streams, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        try:
            for n in range(1000):
                fresh = wrong[n // 3 % len(wrong)] if n % 3 == 2 else f'[mark]\nmark = "{n}-"\n'
                temporary = file.with_suffix(".new")
                temporary.write_text(fresh)
                os.replace(temporary, file)
                error = told.get(timeout=20)
                assert (error is not None) == (n % 3 == 2), error
        finally:
            over.set()
            for thread in threads:
                thread.join()
        assert (text_of(book.current), book.exchanged, book.error) == ("999-a999-b", 667, None)
    assert failures == []
    assert len(seen) >= 20
