"""The built-in page, and other pages, in a real browser with a real model."""

import functools
import http.server
import os
import re
import signal
import threading
import time

import browser
import pytest
from daemons import Daemon
from http_peer import Peer

pytestmark = pytest.mark.skipif(bool(browser.missing()), reason=browser.missing() or "there is a browser")

KEY = "0123456789abcdef0123"
ENTER, SHIFT, ESCAPE = "\ue007", "\ue008", "\ue00c"
RULES = "[redaction]\n"
QUESTION = {"messages": [{"role": "user", "content": "Name three colours."}], "temperature": 0, "max_tokens": 24}
RUNS = "return !document.querySelector('#stop').hidden"
READY = "return document.querySelector('#state').dataset.state === 'ready'"
INJECTION = "<img src=x onerror=\"document.title='broken into'\"><script>document.title='broken into'</script>"


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A page of another origin, as an application of a browser is: it asks with fetch and reads server-sent events."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "index.html").write_text(APPLICATION)
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        """Nothing."""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, smollm2, elsewhere):
    folder = tmp_path_factory.mktemp("browser")
    (folder / "rules.toml").write_text(RULES)
    config = f'rules = "rules.toml"\nlimits.requests_per_second = 0\n[http]\nopen = true\norigins = ["{elsewhere}"]\n'
    with Daemon(folder, "-m", str(smollm2), "-c", "512", "--http", "tcp:127.0.0.1:0", config=config) as found:
        found.port = int(re.search(rb"tcp:127\.0\.0\.1:(\d+)", found.said)[1])
        found.ready().close()
        yield found


@pytest.fixture(scope="module")
def expected(daemon):
    """What the model answers. The second time: like all later ones, that starts from the cells of the first."""
    peer = Peer(daemon.port)
    model = peer.get("/v1/models").json["data"][0]["id"]
    return [peer.post("/v1/chat/completions", {**QUESTION, "model": model}).json["choices"][0]["message"]["content"] for _ in range(2)][1]


@pytest.fixture(scope="module")
def window():
    with browser.Browser() as found:
        found.appear()
        yield found


@pytest.fixture
def page(window, daemon):
    """The page, open and in English, with answers that are short and the same each time."""
    window.open(f"http://127.0.0.1:{daemon.port}/")
    window.run("sessionStorage.clear()")
    window.console()
    window.open(f"http://127.0.0.1:{daemon.port}/")
    window.until(READY)
    settings(window, temperature="0", max_tokens="24")
    yield window
    assert window.console() == [], "no error, and nothing against the page's policy"


def settings(page, **values):
    page.click("#open-settings")
    for name, value in values.items():
        field = f"#{name.replace('_', '-')}"
        page.run("document.querySelector(arguments[0]).value = ''", field)
        page.type(field, value)
    page.click("#settings button")


def ask(page, text, how="button"):
    if len(text) > 40:  # typing takes a while
        page.run("document.querySelector('#prompt').value = arguments[0]", text)
    else:
        page.type("#prompt", text + (ENTER if how == "enter" else ""))
    if how == "button":
        page.click("#send")


def answered(page, turns=1, seconds=60.0):
    """Wait until so many questions have an answer, the last a whole one."""
    page.until(f"return document.querySelectorAll('.turn').length === {turns} && !document.querySelector('.writing')", seconds)
    assert not page.run(RUNS)


def last(page, selector):
    return page.run("return document.querySelector('.turn:last-child ' + arguments[0]).textContent", selector)


def quiet(daemon):
    with daemon.client() as client:
        until = time.monotonic() + 10
        while client.status()["server"]["requests"]:
            assert time.monotonic() < until, "the daemon still works for somebody"
            time.sleep(0.02)


# ---- the chat --------------------------------------------------------------------------------------------------------


def test_a_conversation(page, expected):
    ask(page, "Name three colours.", how="enter")
    answered(page)
    assert last(page, ".answer .text") == expected
    assert re.search(r"24 tokens · [\d.]+ tokens/s · first token after [\d.]+ s · prompt \d+, .* of it reused · context \d+ of 512",
                     last(page, ".meta"))  # fmt: skip
    assert "ended at the limit of tokens" in last(page, ".chips")
    ask(page, f"And {SHIFT}{ENTER}{SHIFT}another")
    answered(page, 2)
    assert last(page, ".question .text") == "And \nanother"
    reused = int(re.search(r"prompt \d+, (\d+) of it reused", last(page, ".meta"))[1])
    assert reused > 30, "the session's cells, with the first answer"
    page.until("return document.querySelector('#sessions').textContent.includes('this page')")
    page.click("#new")
    assert page.run("return [document.querySelectorAll('.turn').length, document.querySelector('#empty').hidden]") == [0, False]


def test_an_answer_streams_with_its_speed_and_can_be_stopped(page, daemon):
    settings(page, max_tokens="700")
    ask(page, "Write a long story.")
    page.until("return parseFloat(document.querySelector('#rate').textContent) > 0")
    assert page.until(lambda: re.search(r"\d+ tokens · ([\d.]+) tokens/s", last(page, ".meta")))[1] != "0.0"
    length = len(last(page, ".answer .text"))
    page.until(lambda: len(last(page, ".answer .text")) > length)
    assert page.run(RUNS)
    page.type("#prompt", ESCAPE)
    answered(page, seconds=5)
    quiet(daemon)
    assert "stopped" in last(page, ".chips")
    assert page.run("return document.querySelector('#spark .line').getAttribute('d')").count("L") == 60
    text = last(page, ".answer .text")
    settings(page, max_tokens="8")
    ask(page, "Go on.")  # the part that was written is of the conversation
    answered(page, 2)
    prompt = int(re.search(r"prompt (\d+)", last(page, ".meta"))[1])
    assert prompt > len(text.split()) + 10


def test_what_is_written_stays_text(page, daemon):
    ask(page, f"Repeat this: {INJECTION}")
    answered(page)
    assert last(page, ".question .text") == f"Repeat this: {INJECTION}"
    settings(page, system=INJECTION)
    ask(page, INJECTION)
    answered(page, 2)
    assert page.run("return [document.title, document.querySelectorAll('.log img, .log script').length]") == ["edge-rt", 0]
    # and what the model writes: the browser itself refuses what is not text
    refused = "try { document.body.innerHTML = arguments[0]; return '' } catch (error) { return error.name }"
    assert page.run(refused, INJECTION) == "TypeError"
    assert "TrustedHTML" in "".join(page.console())


def test_what_the_api_refuses_is_told_and_can_be_asked_again(page):
    ask(page, "far " * 600)
    answered(page)
    assert re.search(r"\d+ tokens", last(page, ".chips .bad")), "as the API tells it"
    page.run("document.querySelector('#temperature').value = 3")
    page.click("#new")
    ask(page, "Hello")
    answered(page)
    assert last(page, ".chips .bad") == "temperature is 3; give 0 to 2"
    page.run("document.querySelector('#temperature').value = 0")
    page.click(".chips .act button")
    page.until(RUNS)
    answered(page)
    assert (page.run("return document.querySelectorAll('.turn').length"), len(last(page, ".answer .text")) > 5) == (1, True)
    assert all("status of 400" in line for line in page.console())


def test_what_leaves_the_context_is_told_with_the_answer_and_counted(page):
    settings(page, max_tokens="8")
    for n in range(4):
        ask(page, f"The captain of ship {n} was seen in the harbour at noon. " * 10)
        answered(page, n + 1)
    said = page.text("#log")
    assert re.search(r"\d+ tokens left the context \(\d+ passages?\)", said)
    page.until("return document.querySelector('#context').textContent.match(/[1-9][\\d,]*tokens evicted|tokens evicted[1-9]/)")


def test_a_worker_that_dies_is_told(page, daemon):
    settings(page, max_tokens="700")
    ask(page, "Write a long story.")
    page.until(lambda: len(last(page, ".answer .text")) > 10)
    with daemon.client() as client:
        os.kill(client.status()["worker"]["pid"], signal.SIGKILL)
    answered(page, seconds=20)
    assert "worker" in last(page, ".chips .bad")
    page.until("return document.querySelector('#daemon .bad')?.textContent === 'Worker deaths1'")
    daemon.ready().close()
    page.until(READY)


# ---- facts -----------------------------------------------------------------------------------------------------------


# ---- for everybody ---------------------------------------------------------------------------------------------------


def test_chinese(page, daemon):
    page.click("#language")
    assert page.run("return document.documentElement.lang") == "zh-CN"
    assert (page.text("#send"), page.text("#state"), page.text("#rules h2")) == ("发送", "就绪", "规则")
    ask(page, "Name three colours.")
    answered(page)
    assert re.search(r"24 个词元 · [\d.]+ 词元/秒", last(page, ".meta"))
    page.click("#language")
    assert page.text("#send") == "Send"
    assert "24 tokens" in last(page, ".meta")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280, 1920])
def test_it_fits_and_can_be_read(page, width, dark):
    page.appear(width=width, height=800, dark=dark)
    try:
        for view in ("chat", "device") if width == 360 else ("chat",):
            page.run("document.querySelector(`.tabs [data-view=${arguments[0]}]`).click()", view)
            assert page.run(OVERFLOWING) == []
            assert page.run(PALE) == []
    finally:
        page.run("document.querySelector('.tabs [data-view=chat]').click()")
        page.appear()


OVERFLOWING = """return [document.documentElement, document.body, ...document.querySelectorAll("main, .chat, .panel, .card, .bar, .rows")]
    .filter((one) => one.clientWidth && one.scrollWidth > one.clientWidth + 1).map((one) => one.className || one.tagName)"""
PALE = """
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const part = (x) => ((x /= 255) <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
};
const behind = (one) => {
  for (; one; one = one.parentElement) {
    const found = numbers(getComputedStyle(one).backgroundColor);
    if (found.length < 4 || found[3] === 1) return found;
  }
};
const pale = [];
for (const one of document.querySelectorAll("body *")) {
  const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!own || !one.checkVisibility() || one.closest(".unseen, noscript, script")) continue;
  const [a, b] = [light(numbers(getComputedStyle(one).color)), light(behind(one))].sort((x, y) => y - x);
  const contrast = (a + 0.05) / (b + 0.05);
  if (contrast < 4.5) pale.push(`${one.textContent.slice(0, 30)}: ${contrast.toFixed(2)}`);
}
return pale;"""
"""Text with less contrast than WCAG 2 asks for (AA: 4.5)."""


def test_everything_pressed_has_a_name_and_is_reached_by_keys(page):
    nameless = """return [...document.querySelectorAll('button, input, select, textarea, [role], summary, section, aside')].filter((one) =>
        !one.textContent.trim() && !one.ariaLabel && !one.labels?.length && one.role !== 'status' && one.role !== 'alert')
        .map((one) => one.outerHTML)"""
    assert page.run(nameless) == []
    assert page.run("return document.activeElement.id") in ("prompt", "open-settings")
    page.run("document.querySelector('#open-settings').focus()")
    page.type("#open-settings", ENTER)
    assert page.run("return document.querySelector('#settings').open")
    page.type("#system", ESCAPE)
    assert not page.run("return document.querySelector('#settings').open")


def test_a_key_is_asked_for_once_and_a_wrong_one_told(window, tmp_path, smollm2):
    (tmp_path / "keys").write_text(KEY)
    (tmp_path / "keys").chmod(0o600)
    with Daemon(tmp_path, "-m", str(smollm2), "--http", "tcp:127.0.0.1:0", config='[http]\nkey_file = "keys"\n') as daemon:
        port = int(re.search(rb"tcp:127\.0\.0\.1:(\d+)", daemon.said)[1])
        window.open(f"http://127.0.0.1:{port}/")
        window.until("return document.querySelector('#door').open")
        assert window.run("return document.querySelector('#door-error').hidden"), "nothing was wrong yet"
        window.type("#key", f"错误的密钥{ENTER}")
        window.until("return !document.querySelector('#door-error').hidden")
        assert "the API key is not one of the daemon's" in window.text("#door-error")
        window.run("document.querySelector('#key').value = ''")
        window.type("#key", f"{KEY}{ENTER}")
        window.until(READY)
        window.open(f"http://127.0.0.1:{port}/")
        window.until(READY)
        assert KEY not in window.run("return location.href + document.documentElement.outerHTML + JSON.stringify(localStorage)")
        settings(window, max_tokens="700")
        ask(window, "Write a long story.")  # an answer of a few words may end before it can be stopped
        window.until("return document.querySelector('.answer .text')?.textContent.length > 3")
        window.click("#stop")
        answered(window)
    assert all("status of 401" in line or "ERR_" in line for line in window.console())


# ---- other pages -----------------------------------------------------------------------------------------------------

APPLICATION = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><title>an application</title><script>
// As OpenAI's documentation and its client do it in a browser.
async function chat(base, key, body, options = {}) {
  const response = await fetch(`${base}/v1/chat/completions`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Authorization: `Bearer ${key}`, "X-Stainless-Lang": "js" },
    body: JSON.stringify(body), ...options,
  });
  if (!response.ok) throw Object.assign(new Error((await response.json()).error.message), { status: response.status });
  if (!body.stream) return response.json();
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  let held = "", text = "", chunks = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("no [DONE]");
    held += decoder.decode(value, { stream: true });
    const lines = held.split("\\n");
    held = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return { text, chunks, id: response.headers.get("x-request-id") };
      text += JSON.parse(line.slice(6)).choices[0]?.delta?.content ?? "";
      chunks += 1;
    }
  }
}
</script>"""


def test_a_page_of_another_origin_that_is_allowed(window, daemon, elsewhere, expected):
    window.open(elsewhere)
    window.console()
    for _ in range(2):  # the worker may be another than the one that was expected to answer so
        whole = window.run("return chat(...arguments)", f"http://127.0.0.1:{daemon.port}", "any", QUESTION)
    found = window.run("return chat(...arguments)", f"http://127.0.0.1:{daemon.port}", "any", {**QUESTION, "stream": True})
    assert found["text"] == whole["choices"][0]["message"]["content"] == expected
    assert (found["chunks"] > 10, found["id"].startswith("req_")) == (True, True)
    aborted = """const stop = new AbortController();
        setTimeout(() => stop.abort(), 500);
        return chat(...arguments, { signal: stop.signal }).then(() => "not aborted", (error) => error.name)"""
    long = {**QUESTION, "stream": True, "max_tokens": 900, "edge_rt": {"ignore_eos": True}}
    assert window.run(aborted, f"http://127.0.0.1:{daemon.port}", "any", long) == "AbortError"
    quiet(daemon)
    refused = "return chat(...arguments).catch((error) => [error.status, error.message])"
    status, message = window.run(refused, f"http://127.0.0.1:{daemon.port}", "any", {**QUESTION, "n": 2})
    assert (status, "n can only be 1" in message) == (400, True)
    assert all("status of 400" in line for line in window.console())
