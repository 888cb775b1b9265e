"""Post-processors in a session: how a text ends, what they conceal, and what is said of them."""

from types import SimpleNamespace

import pytest

import edge_rt
from edge_rt.errors import OptionError, PluginError, RuleError
from edge_rt.hooks import PostProcessorFactory, hookimpl
from edge_rt.plugin_host.registry import Registry
from edge_rt.postprocess.rules import RuleFile
from edge_rt.testing.null_device import NullPlugin
from edge_rt.testing.random_models import write_random_model
from edge_rt.types import Delta, Done, Notice

REPLY = "The code is 12345, he said."


class Digits:
    """Writes # for each digit once the number is whole, says how the text ended, and counts."""

    def __init__(self, sign):
        self.sign, self.held, self.counts = sign, "", {"numbers": 0}

    def feed(self, text):
        out = ""
        for c in text:
            if c.isdigit():
                self.held += c
                continue
            out += self._number() + c
        return out

    def _number(self):
        held, self.held = self.held, ""
        self.counts["numbers"] += bool(held)
        return self.sign * len(held)

    def flush(self):
        return self._number() + "<whole>"

    def cut(self, following):
        return self._number() + f"<cut {following!r}>"


class Breaks:
    """Raises at a comma, with the text in the message."""

    def feed(self, text):
        if "," in text:
            raise ValueError(f"cannot do {text}")
        return text

    def flush(self):
        return ""


def plugin(**factories):
    @hookimpl
    def edge_rt_post_processors():
        return [PostProcessorFactory(name, *rest) for name, rest in factories.items()]

    return SimpleNamespace(EDGE_RT_API=1, edge_rt_post_processors=edge_rt_post_processors)


def digits(rules):
    sign = rules.text("sign", "#")
    return lambda: Digits(sign)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plugins = {
        "null": NullPlugin(reply=REPLY),
        "a": plugin(
            open=(digits, ""), closed=(digits, "", True), breaks=(lambda rules: Breaks,), breaks_closed=(lambda rules: Breaks, "", True)
        ),
    }
    registry = Registry.load(entry_points=False, plugins=plugins)
    path = write_random_model(tmp_path_factory.mktemp("m") / "m.gguf")
    with edge_rt.open(path, engine="null", device="null", registry=registry) as opened:
        yield opened


def answer(model, **options):
    """The text, its deltas and the last event."""
    with model.session() as session:
        found = list(session.generate("Say it: ", temperature=0, **options))
    deltas = [event for event in found if isinstance(event, Delta)]
    assert isinstance(found[-1], Done)
    return "".join(delta.text for delta in deltas), deltas, found[-1]


def test_the_end_of_the_text_is_told_from_a_cut(model):
    assert answer(model, post=["open"])[0] == "The code is #####, he said.<whole>"
    assert answer(model, post=["open"], max_tokens=15)[0] == "The code is ###<cut ''>"
    text, _, done = answer(model, post=["open"], stop=["45"])
    assert (text, done.reason, done.stop) == ("The code is ###<cut '45'>", "stop_string", "45")


def test_half_a_character_is_no_text(tmp_path):
    registry = Registry.load(entry_points=False, plugins={"null": NullPlugin(reply="12你"), "a": plugin(open=(digits, ""))})
    with edge_rt.open(write_random_model(tmp_path / "m.gguf"), engine="null", device="null", registry=registry) as model:
        assert answer(model, max_tokens=3)[0] == "12\ufffd"  # tokens are bytes
        assert answer(model, max_tokens=3, post=["open"])[0] == "##<cut ''>"
        assert answer(model, post=["open"])[0] == "##你<whole>"


def test_a_cancelled_answer_is_cut(model):
    with model.session() as session:
        text, last = "", None
        for event in session.generate("Say it: ", temperature=0, post=["closed"]):
            if isinstance(event, Delta):
                text += event.text
                if text.endswith("is "):
                    session.cancel()
            last = event
    assert (text, last.reason) == ("The code is <cut ''>", "cancelled")


def test_what_is_concealed_is_not_in_the_events_either(model):
    text, deltas, done = answer(model, post=["closed"])
    assert text == "The code is #####, he said.<whole>"
    assert {delta.tokens for delta in deltas} == {()}
    assert done.usage.completion_tokens == len(REPLY)
    assert sum(len(delta.tokens) for delta in answer(model, post=["open"])[1]) == len(REPLY)
    with pytest.raises(OptionError, match=r"^log-probabilities tell the text that post-processing is to conceal; ask for one of them$"):
        answer(model, post=["closed"], logprobs=1)


def test_what_they_did_is_in_the_last_event(model):
    _, _, done = answer(model, post=["open", "breaks"])
    first, second = done.post
    assert (first.name, dict(first.counts), first.most_held, first.left_out) == ("open", {"numbers": 1}, 5, False)
    assert (second.name, second.left_out) == ("breaks", True)
    assert answer(model)[2].post == ()


def test_one_that_fails_closed_ends_the_answer_and_tells_nothing(model):
    with model.session() as session:
        text = []
        events = session.generate("Say it: ", temperature=0, post=["breaks_closed", "open"])
        with pytest.raises(PluginError, match=r"breaks_closed of plugin a failed .* ValueError at line \d+ of \w+.py$") as caught:
            text.extend(event.text for event in events if isinstance(event, Delta))
        assert "".join(text) == "The code is "
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__
        assert next(iter(session.generate("Say it: ", temperature=0)))  # the session goes on


def test_rules_of_a_request(model, tmp_path):
    assert answer(model, rules={"open": {"sign": "*"}})[0] == "The code is *****, he said.<whole>"
    assert answer(model, rules={"open": {"sign": "*"}}, post=["closed"])[0] == "The code is #####, he said.<whole>"
    with pytest.raises(RuleError, match="open has no rule sing; did you mean sign"):
        answer(model, rules={"open": {"sing": "*"}})
    path = tmp_path / "rules.toml"
    path.write_text('[open]\nsign = "x"\n')
    with RuleFile(path, model.registry, watch=False) as book:
        text, _, done = answer(model, rules=book)
        assert (text, done.rules) == ("The code is xxxxx, he said.<whole>", book.current.version)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"post": "open"}, "post is the text 'open'; give a list of names"),
        ({"rules": "rules.toml"}, "rules is the name 'rules.toml'; open it with edge_rt.postprocess.rules.RuleFile"),
    ],
)
def test_names_where_something_else_is_expected(model, options, message):
    with pytest.raises(OptionError, match=f"^{message}$"):
        answer(model, **options)


def test_a_stream_keeps_the_rules_it_began_with(model, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text('[open]\nsign = "x"\n')
    with RuleFile(path, model.registry, watch=False) as book, model.session() as session:
        text, before = "", book.current.version
        for event in session.generate("Say it: ", temperature=0, rules=book):
            if isinstance(event, Delta):
                text += event.text
                if event.text == " " and text.endswith("is "):
                    path.write_text('[open]\nsign = "yy"\n')
                    assert book.reload()
        assert (text, event.rules) == ("The code is xxxxx, he said.<whole>", before)
        assert answer(model, rules=book)[0] == "The code is yyyyyyyyyy, he said.<whole>"


def test_what_leaves_the_context_is_not_quoted_where_something_is_concealed(tmp_path):
    reply = "".join(f"His number is 5550{i}. " for i in range(40))
    registry = Registry.load(entry_points=False, plugins={"null": NullPlugin(reply=reply), "a": plugin(closed=(digits, "", True))})
    said = {}
    with edge_rt.open(write_random_model(tmp_path / "m.gguf"), engine="null", device="null", registry=registry) as model:
        for post in ((), ("closed",)):
            with model.session(context=200) as session:
                events = list(session.generate("Say it: ", temperature=0, post=post, max_tokens=600))
            said[post] = "\n".join(event.message for event in events if isinstance(event, Notice))
    assert "left the context of 200 (graded): 'Say it:', 'His number is 55500." in said[()]
    assert "left the context of 200 (graded)" in said["closed",]
    assert "555" not in said["closed",]
