"""The built-in page and the status behind it: files, headers, and who may see what."""

import fnmatch
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from daemons import Daemon, write_plugin
from http_peer import Peer

from edge_rt.daemon.metrics import RATE_SECONDS, TokenRate

ROOT = Path(__file__).parents[4]


PAGE = ROOT / "edge_rt" / "daemon" / "http" / "page"


KEY, OTHER = "a" * 20, "b" * 20


CHAT, STATUS = "/v1/chat/completions", "/edge-rt/status"


SHORT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 12, "temperature": 0}


BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("page")
    write_plugin(folder)
    (folder / "keys").write_text(f"{KEY}\n{OTHER}\n")
    (folder / "keys").chmod(0o600)
    (folder / "rules.toml").write_text("[redaction]\n")
    config = 'rules = "rules.toml"\nlimits.requests_per_second = 0\n[http]\nkey_file = "keys"\nhosts = ["box.local"]\n'
    with Daemon(folder, "--http", "tcp:127.0.0.1:0", config=config, model=str(random_model())) as found:
        found.ready().close()
        yield found


@pytest.fixture(scope="module")
def port(daemon):
    return int(re.search(rb"tcp:127\.0\.0\.1:(\d+)", daemon.said)[1])


@pytest.fixture
def peer(port):
    return Peer(port, Authorization=f"Bearer {KEY}")


@pytest.fixture
def other(port):
    return Peer(port, Authorization=f"Bearer {OTHER}")


def named(session, **more):
    return {**SHORT, "edge_rt": {"ignore_eos": True, "session": session, **more}}


def test_a_browser_gets_the_page_and_others_a_line_of_text(port):
    stranger = Peer(port)
    page = stranger.get("/", Accept=BROWSER)
    assert (page.status, page.headers["content-type"], page.headers["vary"]) == (200, "text/html; charset=utf-8", "Accept")
    assert page.body == (PAGE / "index.html").read_bytes()
    for headers in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        found = stranger.get("/", **headers)
        assert (found.headers["content-type"], found.headers["vary"]) == ("text/plain; charset=utf-8", "Accept")
        assert b"/v1/chat/completions" in found.body
    head = stranger.ask("HEAD", "/", Accept=BROWSER)
    assert (head.body, head.headers["content-length"]) == (b"", str(len(page.body)))


def test_every_file_of_the_page_is_served_with_its_type_and_a_strict_policy(port):
    stranger = Peer(port)
    files = sorted(PAGE.iterdir())
    assert {path.suffix for path in files} == set(TYPES)
    for path in files:
        found = stranger.get(f"/page/{path.name}", Host="box.local")
        assert (found.status, found.body) == (200, path.read_bytes())
        assert found.headers["content-type"].split(";")[0] == TYPES[path.suffix]
        policy = dict(rule.split(" ", 1) for rule in found.headers["content-security-policy"].split("; "))
        assert policy.pop("default-src") == policy.pop("base-uri") == policy.pop("form-action") == policy.pop("frame-ancestors") == "'none'"
        assert policy.pop("require-trusted-types-for") == "'script'"
        assert policy == dict.fromkeys(("script-src", "style-src", "img-src", "connect-src"), "'self'")
        assert (found.headers["x-content-type-options"], found.headers["referrer-policy"]) == ("nosniff", "no-referrer")
        assert found.headers["cache-control"] == "no-cache"
        again = stranger.get(f"/page/{path.name}", If_None_Match=f'"x", W/{found.headers["etag"]}')
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", found.headers["etag"])
        assert stranger.get(f"/page/{path.name}", If_None_Match='"another"').status == 200


@pytest.mark.parametrize("name", ["nothing.js", "../routes.py", "..%2froutes.py", "%2e%2e/routes.py", ""])
def test_nothing_else_is_served(port, name):
    assert Peer(port).get(f"/page/{name}").code == "unknown_url"


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere():
    """Else its own policy would break it."""
    found = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            attributes = dict(attributes)
            wrong = [name for name in attributes if name == "style" or name.startswith("on")]
            found.extend((tag, name) for name in wrong)
            if tag == "style" or (tag == "script" and "src" not in attributes):
                found.append((tag, "inline"))
            for name in ("src", "href"):
                assert not attributes.get(name) or (PAGE.parent / attributes[name]).is_file(), attributes

    Reader().feed((PAGE / "index.html").read_text())
    assert found == []
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), path


_OF_THE_DAEMON = (
    "ready", "none", "waiting", "failed", "draining", "starting", "mapping", "load", "packing", "prefetch", "warm-up",
)  # fmt: skip


"""States and phases, which the daemon names."""


def test_every_word_is_there_in_both_languages_and_used():
    page, code = (PAGE / "index.html").read_text(), "".join(path.read_text() for path in PAGE.glob("*.js"))
    table = (PAGE / "words.js").read_text().partition("const WORDS = {")[2].partition("\n};")[0]
    words = {name.strip('"'): both for name, both in re.findall(r'^ {2}([\w"-]+): \[(.*?)\],$', table, re.MULTILINE | re.DOTALL)}
    assert len(words) > 100
    asked = set(re.findall(r'data-say(?:-label|-placeholder)?="(\w+)"', page)) | set(re.findall(r'\bsay\("(\w+)"', code))
    assert asked - set(words) == set()
    for name, both in words.items():
        english, chinese = re.findall(r'"((?:[^"\\]|\\.)*)"', both)
        assert set(re.findall(r"\{(\w+)", english)) == set(re.findall(r"\{(\w+)", chinese)), name
        assert f'"{name}"' in page + code.replace(table, "") or name in _OF_THE_DAEMON, f"{name} is not used"


def test_all_that_is_no_python_is_in_the_wheel():
    patterns = re.search(r"^edge_rt = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    allowed = re.findall(r'"([^"]+)"', patterns)
    package = ROOT / "edge_rt"
    names = [path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert any(name.endswith("page.js") for name in names)
    assert [name for name in names if not any(fnmatch.fnmatch(name, pattern) for pattern in allowed)] == []


def test_the_facts_need_a_key(port, peer):
    reply = Peer(port).get(STATUS)
    assert (reply.status, reply.code) == (401, "invalid_api_key")
    reply = peer.get(STATUS)
    assert (reply.status, reply.headers["content-type"], reply.headers["cache-control"]) == (200, "application/json", "no-store")
    assert peer.post(STATUS, {}).code == "method_not_allowed"


def test_the_facts(daemon, peer):
    before = peer.get(STATUS).json
    assert peer.post(CHAT, named("facts")).status == 200
    found = peer.get(STATUS).json
    with daemon.client() as client:
        status = client.status()
    assert (found["worker"]["state"], found["model"], found["rules"]) == ("ready", status["model"], status["rules"])
    assert found["rules"]["order"] == ["redaction"]
    assert set(found["server"]) == set(status["server"])
    assert found["counts"]["tokens"]["completion_tokens"] == before["counts"].get("tokens", {}).get("completion_tokens", 0) + 12
    assert found["counts"]["worker_deaths"] == 0
    (memory,) = found["memory"].values()
    assert list(found["memory"]) == [one["name"] for one in status["models"]]
    assert {"weights_mapped", "weights_resident", "cache", "compute", "units"} <= set(memory)
    assert memory["units"] == [], "the null engine has none"
    (own,) = [one for one in found["sessions"]["own"] if one["name"] == "facts"]
    assert (own["busy"], own["cells"] > 12, own["model"]) == (False, True, status["models"][0]["name"])


def test_nobody_sees_anothers_sessions(peer, other):
    assert peer.post(CHAT, named("mine")).status == other.post(CHAT, named("yours")).status == 200
    mine, yours = peer.get(STATUS), other.get(STATUS)
    assert "mine" in [one["name"] for one in mine.json["sessions"]["own"]]
    assert [one["name"] for one in yours.json["sessions"]["own"]] == ["yours"]
    assert (b"yours" in mine.body, b"mine" in yours.body) == (False, False)
    assert b"by_session" not in mine.body
    assert mine.json["sessions"]["open"] == yours.json["sessions"]["open"] >= 2
    for one in mine.json["sessions"]["own"]:
        assert set(one) == {"name", "model", "busy", "cells", "bytes", "parked"}, "its id is nobody's business"


def test_what_leaves_the_context_is_counted(daemon, peer):
    messages = [
        {"role": role, "content": f"{word} word " * 12} for word in ("one", "two", "three", "four") for role in ("user", "assistant")
    ]
    asked = {**named("full", context=300), "messages": [*messages, {"role": "user", "content": "Which?"}], "max_tokens": 5}
    before = peer.get(STATUS).json["counts"]["context"]
    assert set(before) == {"evicted_segments", "evicted_tokens", "recalled_segments", "recalled_tokens", "pruned_cells", "released_bytes"}
    context = peer.post(CHAT, asked).json["edge_rt"]["context"]
    assert context["evicted_tokens"] > 0
    after = peer.get(STATUS).json["counts"]["context"]
    assert {name: after[name] - before[name] for name in after} == {name: context[name] for name in after}
    line = f'edge_rt_context_total{{kind="evicted_tokens"}} {after["evicted_tokens"]}'
    assert line in peer.get("/metrics").body.decode().splitlines()
    with daemon.client() as client:
        assert client.call("metrics")["context"]["evicted_tokens"] == after["evicted_tokens"]


def test_usage_so_far_is_in_every_chunk_if_asked_for(peer):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, done = peer.stream(CHAT, {**named("usage"), "stream_options": options})
    counted = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert (done, counted[0], counted[-1]) == ("[DONE]", 0, last["usage"]["completion_tokens"])
    assert counted == sorted(counted)
    assert counted[1] < counted[-1]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks[1:]} == {last["usage"]["prompt_tokens"]}
    assert all(chunk["usage"]["total_tokens"] == sum(list(chunk["usage"].values())[:2]) for chunk in chunks)
    reply = peer.post(CHAT, {**SHORT, "stream": True, "stream_options": {"continuous_usage_stats": 1}})
    assert reply.status == 400


def test_tokens_by_second():
    recent, start = TokenRate(), 1000.0
    for tenth in range(100):
        recent.add(3, start + tenth / 10)  # 30 a second, for ten seconds
    now = start + 10
    assert recent.by_second(now) == [0] * (RATE_SECONDS - 10) + [30] * 10
    assert recent.rate(now) == 30
    assert recent.rate(now + 0.5) == 60 / 2.5
    assert recent.rate(now + 3) == 0
    assert recent.by_second(now + 55) == [30] * 5 + [0] * (RATE_SECONDS - 5)
    assert recent.by_second(now + 1e9) == [0] * RATE_SECONDS
    assert recent.by_second(now) == [0] * RATE_SECONDS, "a clock that goes back changes nothing"
