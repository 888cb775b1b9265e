"""The clients in clients/: against a daemon with a real model, over a connection that breaks, and against the conformance script.

Node's is the reference. Those for Kotlin and Swift are tested where their compilers are.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import conformance
import pytest
from relay import Relay

from edge_rt.types import Delta

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / "clients"
PROMPT, TOKENS = "Once upon a time", 60


def run(*words, seconds=300):
    return subprocess.run([str(word) for word in words], capture_output=True, timeout=seconds, check=False)


def tool(name):
    """A program that must be there for this test."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def node():
    found = tool("node")
    version = run(found, "--version").stdout.decode()
    if int(version.lstrip("v").split(".")[0]) < 18:
        pytest.skip(f"the client needs Node 18, and this is {version}")
    return found


def python(folder):
    return [sys.executable, ROOT / "tests" / "client_scenarios.py"]


def with_node(folder):
    return [node(), CLIENTS / "node" / "scenario.js"]


def kotlin(folder):
    compiler, java, jar = tool("kotlinc"), tool("java"), folder / "edgert.jar"
    done = run(compiler, *sorted((CLIENTS / "kotlin").glob("*.kt")), "-include-runtime", "-Werror", "-d", jar)
    assert done.returncode == 0, done.stderr.decode()
    return [java, "-cp", jar, "edgert.ScenarioKt"]


def swift(folder):
    program = folder / "edgert"
    sources = sorted((CLIENTS / "swift").glob("*.swift"))
    done = run(tool("swiftc"), "-swift-version", "5", "-warnings-as-errors", *sources, "-o", program)
    assert done.returncode == 0, done.stderr.decode()
    return [program]


@pytest.fixture(scope="module", params=[python, with_node, kotlin, swift])
def program(request, tmp_path_factory):
    """The program that docs/clients.md asks for."""
    return [str(word) for word in request.param(tmp_path_factory.mktemp("client"))]


@pytest.fixture(scope="module")
def expected(daemon):
    with daemon.client() as client:
        events = client.generate(PROMPT, temperature=0, max_tokens=TOKENS, ignore_eos=True)
        return "".join(event.text for event in events if isinstance(event, Delta))


def test_the_client_for_node_by_itself():
    done = run(node(), "--test", CLIENTS / "node" / "test.js")
    assert done.returncode == 0, done.stdout.decode()


def test_clients_keep_to_the_protocol(program):
    checks = conformance.client_checks(program, 20)
    assert {name: wrong for name, wrong in conformance.run(checks) if wrong} == {}


def test_an_answer(daemon, program, expected):
    done = run(*program, daemon.socket, "answer", PROMPT, TOKENS)
    assert (done.returncode, done.stdout.decode()) == (0, expected), done.stderr.decode()


@pytest.mark.parametrize("scenario", ["cancel", "leave"])
def test_cancelling(daemon, program, scenario):
    done = run(*program, daemon.socket, scenario, PROMPT, 900)
    assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr.decode()
    with daemon.client() as client:
        until = time.monotonic() + 5  # not the time that 900 tokens take
        while client.status()["server"]["requests"]:
            assert time.monotonic() < until
            time.sleep(0.05)


class Cutting(Relay):
    """Connections break, each after some bytes from the daemon. A greeting has about 800: some break within it, most after some events."""

    def __init__(self, path, behind, seed):
        self.cuts, self._chance = 0, random.Random(seed)
        super().__init__(path, behind, self._cut)

    def _cut(self, pieces):
        left = self._chance.randrange(400, 2200)
        for data in pieces:
            yield data[:left]
            left -= len(data)
            if left < 0:
                self.cuts += 1
                return


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_or_repeated_when_the_connection_is_cut(daemon, program, expected, tmp_path, seed):
    with Cutting(tmp_path / "c.sock", daemon.socket, seed) as way:
        for _ in range(8):  # until the stream has begun, before which it cannot be resumed
            done = run(*program, tmp_path / "c.sock", "resume", PROMPT, TOKENS)
            if done.stdout:
                break
            assert done.stderr.strip() == b"error: disconnected"
    assert (done.stdout.decode(), way.cuts > 2) == (expected, True), done.stderr.decode()
    # After the text comes a request that cannot be resumed.
    assert done.returncode == 0 or done.stderr.strip() == b"error: disconnected"


CHAT = """
const { Client } = require(process.argv[1]);
(async () => {
  const client = await Client.connect(process.argv[2]);
  const session = await client.openSession();
  const messages = [{ role: 'user', content: 'Name a river in Africa.' }];
  const options = { temperature: 0, max_tokens: 16 };
  await session.generate(messages, { temperature: 0, max_tokens: 1 }).text(); // kernels depend on how a prompt is divided
  const [first, other] = await Promise.all([session.generate(messages, options).text(), client.generate('One two three', options).text()]);
  messages.push({ role: 'assistant', content: first }, { role: 'user', content: 'And one in Asia.' });
  let done;
  let second = '';
  for await (const event of session.generate(messages, options)) {
    if (event.event === 'delta') second += event.text;
    if (event.event === 'done') done = event;
  }
  const clone = await session.clone();
  const again = await clone.generate(messages, options).text();
  await session.close();
  const failed = await session.generate('x').text().catch((error) => error.code);
  console.log(JSON.stringify({ first, other, second, again, failed, reused: done.usage.reused_tokens }));
  client.close();
})();
"""


def test_a_chat_in_a_session_beside_another_request(daemon):
    done = run(node(), "-e", CHAT, CLIENTS / "node" / "edge-rt.js", daemon.socket)
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout)
    with daemon.client() as client, client.session() as session:

        def ask(prompt, within=session, tokens=16):
            events = within.generate(prompt, temperature=0, max_tokens=tokens)
            return "".join(event.text for event in events if isinstance(event, Delta))

        messages = [{"role": "user", "content": "Name a river in Africa."}]
        ask(messages, tokens=1)
        first = ask(messages)
        messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And one in Asia."}]
        assert (said["first"], said["other"], said["second"]) == (first, ask("One two three", client), ask(messages))
    assert (said["again"], said["failed"], said["reused"] > 10) == (said["second"], "no_such_session", True)


SLOW = """
const { Client } = require(process.argv[1]);
(async () => {
  const client = await Client.connect(process.argv[2]);
  const options = { temperature: 0, max_tokens: 200, ignore_eos: true, resumable: process.argv[3] === 'resumable' };
  const generation = client.generate('Once upon a time', options);
  await generation.next();
  const answers = await generation.asking;
  const pause = (time) => new Promise((resolve) => setTimeout(resolve, time));
  while (answers.events.length < 50) await pause(20);
  await pause(1500);
  const held = answers.events.length;
  console.log(JSON.stringify({ held, text: await generation.text() }));
  client.close();
})();
"""


@pytest.fixture(scope="module")
def long_text(daemon):
    with daemon.client() as client:
        events = client.generate(PROMPT, temperature=0, max_tokens=200, ignore_eos=True)
        return "".join(event.text for event in events if isinstance(event, Delta))


@pytest.mark.parametrize("kind", ["resumable", "plain"])
def test_what_is_not_read_is_not_held(daemon, long_text, kind):
    done = run(node(), "-e", SLOW, CLIENTS / "node" / "edge-rt.js", daemon.socket, kind)
    assert done.returncode == 0, done.stderr.decode()
    said = json.loads(done.stdout)
    assert said["text"] == long_text
    assert said["held"] <= 100, "of 200 tokens"
