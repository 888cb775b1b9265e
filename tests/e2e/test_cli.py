"""The real program, as a process, with the default model."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from meanings import PAIRS, closest

import edge_rt as api
from edge_rt import __version__, model_hub
from edge_rt.config import packed_dir
from edge_rt.core.weights import repack

PROGRAM = [sys.executable, "-m", "edge_rt.cli.main"]
GREEDY = ["--temp", "0", "-n", "12"]
QUESTION = "Name three colours."


def edge_rt(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run to the end. Standard input is empty unless given."""
    options.setdefault("stdin", subprocess.DEVNULL) if "input" not in options else None
    return subprocess.run([*PROGRAM, *words], text=True, capture_output=True, timeout=240, check=False, **options)


def start(*words: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start, with unbuffered pipes."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0, **options}
    return subprocess.Popen([*PROGRAM, *words], **options)


def remarks(err: str | bytes) -> list[str]:
    """What was said on stderr, without the progress that a slow machine shows."""
    lines = (err if isinstance(err, str) else err.decode()).splitlines()
    return [line for line in lines if not line.endswith(" ...")]


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def answer() -> str:
    """What the program answers to QUESTION, with its own name and no stderr."""
    done = subprocess.run(
        [Path(sys.executable).with_name("edge-rt"), "run", *GREEDY, QUESTION], text=True, capture_output=True, timeout=240, check=False
    )
    assert (done.returncode, remarks(done.stderr)) == (0, [])
    assert done.stdout.strip()
    assert done.stdout.endswith("\n")
    return done.stdout


# ---- embed -----------------------------------------------------------------------------------------------------------


def test_embeddings_of_close_texts_lie_close():
    texts = [text for pair in PAIRS for text in pair]
    done = edge_rt("embed", "-v", input="".join(f"{text}\n" for text in texts))
    found = events(done.stdout)
    assert (done.returncode, [one["index"] for one in found]) == (0, list(range(len(texts)))), done.stderr
    assert re.search(rf"^\[{len(texts)} texts, {sum(one['tokens'] for one in found)} tokens \(\d+/s\)\]$", done.stderr, re.MULTILINE)
    rows = [one["embedding"] for one in found]
    assert closest(rows) == [i ^ 1 for i in range(len(rows))], "each text's neighbour is the other one of its pair"
    again = events(edge_rt("embed", *texts[:2], "--no-normalize", "--pooling", "mean").stdout)
    for one, row in zip(again, rows, strict=False):
        length = sum(x * x for x in one["embedding"]) ** 0.5
        assert length > 2
        assert [x / length for x in one["embedding"]] == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"a\n\nb\n", "text 2 is empty and has no embedding"),
        (b"a\n\xff\n", "line 2 is not UTF-8 (byte 0)"),
        (b"a\nb" + b" far" * 100, "text 2 has 101 tokens and the context 64"),
    ],
)
def test_what_cannot_be_embedded_is_said_after_what_could(given, said):
    with start("embed", "-c", "64", stdin=subprocess.PIPE) as process:
        out, err = process.communicate(given, timeout=240)
    assert (process.returncode, len(events(out.decode()))) == (1, 1)
    assert said in err.decode()


# ---- run -------------------------------------------------------------------------------------------------------------


def test_the_version():
    assert edge_rt("--version").stdout == f"edge-rt {__version__}\n"


@pytest.mark.parametrize("way", ["argument", "file", "stdin", "dash"])
def test_the_prompt_may_come_from_anywhere(way, answer, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(QUESTION)
    done = {
        "argument": lambda: edge_rt("run", QUESTION, *GREEDY),
        "file": lambda: edge_rt("run", *GREEDY, "-f", str(path)),
        "stdin": lambda: edge_rt("run", *GREEDY, input=QUESTION + "\n"),
        "dash": lambda: edge_rt("run", *GREEDY, "-", input=QUESTION),
    }[way]()
    assert (done.returncode, done.stdout) == (0, answer), done.stderr


def test_events_add_up_to_the_text(answer):
    done = edge_rt("run", *GREEDY, "--json", "--logprobs", "2", QUESTION)
    found = events(done.stdout)
    assert [found[0]["event"], found[1]["event"], found[-1]["event"]] == ["model", "prompt", "done"]
    deltas = [event for event in found if event["event"] == "delta"]
    assert "".join(delta["text"] for delta in deltas).rstrip("\n") == answer.rstrip("\n")
    tokens = [token for delta in deltas for token in delta["tokens"]]
    logprobs = [entry for delta in deltas for entry in delta.get("logprobs", [])]
    assert [entry["token"] for entry in logprobs] == tokens
    assert all(entry["top"][0] == [entry["token"], entry["logprob"]] and len(entry["top"]) == 2 for entry in logprobs)  # greedy
    last = found[-1]
    assert last["usage"]["completion_tokens"] == len(tokens) <= 12
    assert last["context"]["used"] <= last["context"]["allowed"] == found[0]["context"]
    assert 0 < last["timings"]["first_token"] <= last["timings"]["total"]


def test_the_same_seed_gives_the_same_answer_and_is_reported():
    words = ["run", "--json", "-n", "8", "--temp", "1.5", QUESTION]
    first = edge_rt(*words)
    seed = events(first.stdout)[-1]["seed"]
    again = edge_rt(*words, "--seed", str(seed))
    text = ["".join(event.get("text", "") for event in events(done.stdout)) for done in (first, again)]
    assert text[0] == text[1]


def test_a_schema_is_followed():
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"], "additionalProperties": False}
    done = edge_rt("run", "-n", "60", "--temp", "0", "--json-schema", json.dumps(schema), "Which colour has the sky?")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["colour"] in ("red", "blue")


def test_a_stop_string_and_raw_text():
    done = edge_rt("run", "--raw", "--temp", "0", "-n", "20", "--stop", "6", "--json", "1, 2, 3, 4, 5,")
    assert events(done.stdout)[-1]["reason"] == "stop_string"
    assert events(done.stdout)[-1]["stop"] == "6"
    assert "6" not in "".join(event.get("text", "") for event in events(done.stdout))


def test_text_arrives_while_the_program_still_writes():
    process = start("run", "--temp", "0", "-n", "40", "--ignore-eos", "Tell a story.")
    first = os.read(process.stdout.fileno(), 4096)
    assert process.poll() is None
    rest, err = process.communicate(timeout=240)
    assert (process.returncode, remarks(err)) == (0, [])
    assert len(first) < len(first + rest) / 2


def test_verbose_facts_go_to_stderr(answer):
    done = edge_rt("run", "-v", *GREEDY, QUESTION)
    assert done.stdout == answer
    assert re.search(r"opened in 0?\.?\d+.*\n\[context \d+ of \d+; prompt \d+ tokens .*first token after", done.stderr, re.DOTALL)


def test_a_session_is_saved_and_gone_on_with(tmp_path):
    path = tmp_path / "session.bin"
    words = ["run", "--raw", "--temp", "0", "-n", "4", "--json", "--session", str(path)]
    first = events(edge_rt(*words, "The capital of France is").stdout)
    text = "The capital of France is" + "".join(event.get("text", "") for event in first)
    second = events(edge_rt(*words, text + " and").stdout)
    assert second[-1]["event"] == "done", second
    assert second[-1]["usage"]["reused_tokens"] >= first[-1]["context"]["used"] - 1
    path.write_bytes(path.read_bytes()[:-9])
    damaged = edge_rt(*words, "x")
    assert (damaged.returncode, events(damaged.stdout)[-1]["error"]) == (1, "SessionFileError")


def test_a_cache_that_cannot_be_written_is_said_and_the_answer_comes(random_model):
    model = random_model(type="Q4_0", n_embd=256, n_ff=512)
    words = ["run", "-m", str(model), "--raw", "-n", "8", "--temp", "0", "--ignore-eos", "abc"]
    writable = edge_rt(*words)
    done = edge_rt(*words, env={**os.environ, "EDGE_RT_CACHE": "/proc/nowhere"})
    assert (writable.returncode, remarks(writable.stderr), done.returncode) == (0, [], 0)
    if not any(packed_dir().iterdir()):
        pytest.skip("this processor has no packed kernels for Q4_0")
    (packed,) = json.loads(edge_rt("inspect", str(model), "--json").stdout)["packed"]
    assert 0 <= packed["resident"] <= packed["bytes"] == Path(packed["path"]).stat().st_size
    assert "packed weights" in edge_rt("inspect", str(model)).stdout
    (note,) = remarks(done.stderr)
    assert re.fullmatch(r"note: running without packed weights.*/proc/nowhere.*EDGE_RT_CACHE", note)
    assert done.stdout.strip()


# ---- what the user can mend ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "-m", "/nowhere.gguf", "hi"], "there is no file /nowhere.gguf"),
        (["run", "-m", "smolm2", "hi"], "did you mean"),
        (["run", "-m", "/", "hi"], "directory"),
        (["run", "-m", __file__, "hi"], "text file"),
        (["run", ""], "the prompt is empty"),
        (["run", "   "], "the prompt is empty"),
        (["run"], "the prompt is empty"),
        (["run", "-f", "/nowhere.txt"], "cannot read the prompt"),
        (["run", "-f", "x", "hi"], "contradict"),
        (["run", "--raw", "--system", "s", "hi"], "chat template"),
        (["run", "-n", "0", "hi"], "--max-tokens"),
        (["run", "--ctx", "0", "hi"], "--ctx"),
        (["run", "--ctx", "-1", "hi"], "--ctx"),
        (["run", "--memory", "much", "hi"], "--memory"),
        (["run", "--logprobs", "2", "hi"], "--json"),
        (["run", "--json-schema", "{", "hi"], "not JSON"),
        (["run", "--json-schema", '{"type": "nonsense"}', "hi"], "nonsense"),
        (["run", "--grammar", "root ::= (", "hi"], "rammar"),
        (["run", "--ctx", "16", "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"], "tokens"),
        (["run", "--engine", "warp", "hi"], "warp"),
        (["run", "--device", "abacus", "hi"], "abacus"),
        (["run", "--post", "magic", "hi"], "magic"),
        (["run", b"caf\xe9"], "not UTF-8"),
        (["chat", "--load", __file__], "no conversation"),
        (["run", "--tools", __file__, "hi"], "are not JSON"),
        (["run", "--tools", "/nowhere.json", "hi"], "cannot read the tools from /nowhere.json"),
        (["run", "--tools", "-", "--raw", "hi"], "--tools needs the chat template"),
        (["pull", "nothing-like-this"], "no model nothing-like-this"),
        (["pull", "ftp://example.org/x.gguf"], "cannot be fetched"),
        (["pull", "smollm2", "--sha256", "0" * 64], "--sha256"),
        (["inspect", "/nowhere.gguf"], "no file"),
        (["bench", "--ctx", "64", "-p", "64", "-n", "8"], "needs 72 tokens of context"),
    ],
)
def test_a_mistake_is_one_sentence_and_status_1(words, message):
    done = edge_rt(*words)
    assert done.returncode == 1, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in done.stderr


def test_a_mistake_is_an_event_too():
    done = edge_rt("run", "--json", "--post", "magic", "hi")
    assert done.returncode == 1
    (said,) = remarks(done.stderr)
    assert events(done.stdout)[-1] == {"event": "error", "error": "PluginError", "message": said.removeprefix("error: ")}


@pytest.mark.parametrize("words", [["run", "--nope"], ["run", "-n", "many", "hi"], ["sing"], ["pull"]])
def test_wrong_usage_is_status_2(words):
    done = edge_rt(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


# ---- being stopped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--json"], []])
def test_a_reader_that_stops_reading_ends_it_quietly(words):
    process = start("run", "--temp", "0", "--ignore-eos", "-n", "2000", *words, "Tell a story.")
    os.read(process.stdout.fileno(), 5)
    process.stdout.close()
    err = process.stderr.read()
    assert (process.wait(timeout=60), remarks(err)) == (141, [])


def test_a_list_cut_off_by_head():
    done = subprocess.run(
        f"{sys.executable} -m edge_rt.cli.main inspect smollm2 --tensors --json | head -n 1; echo ${{PIPESTATUS[0]}}",
        shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] in ("0", "141")  # 0: all of it fitted into the pipe


def test_no_standard_output_at_all():
    done = subprocess.run(
        f"{sys.executable} -m edge_rt.cli.main run -n 4 hi >&-", shell=True, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert remarks(done.stderr)[0].startswith("error: standard output is closed")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, "run", "-n", "4", "hi"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert (done.returncode, remarks(done.stderr)) == (1, ["error: cannot write to standard output: no space left on device"])


def wait_for(process: subprocess.Popen[bytes], kind: str) -> bytes:
    """Read lines until an event of a kind; returns all that was read."""
    seen = b""
    while f'"event": "{kind}"'.encode() not in seen:
        piece = process.stdout.readline()
        assert piece, f"it ended before {kind}: {seen!r} {process.stderr.read()!r}"
        seen += piece
    return seen


@pytest.mark.parametrize("moment", ["model", "prompt", "delta"])
def test_ctrl_c_after_an_event(moment):
    process = start("run", "--json", "--temp", "0", "--ignore-eos", "Tell a story. " * 100)
    seen = wait_for(process, moment)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert (process.returncode, remarks(err)) == (130, [])
    last = events((seen + rest).decode())[-1]
    if moment != "model":  # before the request has begun there is nothing to end with an event
        assert (last["event"], last["reason"]) == ("done", "cancelled")


def test_ctrl_c_keeps_what_was_written():
    process = start("run", "--temp", "0", "--ignore-eos", "Tell a story.")
    seen = os.read(process.stdout.fileno(), 4096)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert (process.returncode, remarks(err)) == (130, [])
    assert (seen + rest).endswith(b"\n")


@pytest.mark.parametrize("delay", [0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8])
def test_ctrl_c_at_any_moment_leaves_no_traceback(delay, random_model, tmp_path):
    """From the imports through packing to the answer, with an empty cache; the next run must be none the worse for it."""
    model = random_model(type="Q4_0", n_layer=8, n_embd=1024, n_ff=4096, n_head=8, n_head_kv=4)  # 70 MB take a moment to pack
    environment = {**os.environ, "EDGE_RT_CACHE": str(tmp_path)}
    begin = "import sys; from edge_rt.cli.main import main; print('ready', file=sys.stderr, flush=True); sys.exit(main())"
    words = ["run", "-m", str(model), "--raw", "--temp", "0", "--ignore-eos", "Once upon a time"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    process = subprocess.Popen([sys.executable, "-c", begin, *words], env=environment, **pipes)
    assert process.stderr.readline() == b"ready\n"
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, remarks(err)) == (130, [])
    again = edge_rt(*words, "-n", "3", env=environment)
    assert (again.returncode, remarks(again.stderr)) == (0, [])


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_a_conversation_over_a_pipe(tmp_path):
    saved = tmp_path / "talk.json"
    lines = ["My name is Ada.", "/nonsense", "", "What is my name?", f"/save {saved}", "/save", "/clear", "/quit", "not read"]
    done = edge_rt("chat", *GREEDY, "--system", "Be brief.", input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    messages = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert done.stdout.split() == " ".join(message["content"] for message in messages if message["role"] == "assistant").split()
    assert "there is no command /nonsense" in done.stderr
    assert "/save needs the name of a file" in done.stderr
    assert "starts anew" in done.stderr
    more = edge_rt("chat", *GREEDY, "--load", str(saved), input="And now?")
    assert more.returncode == 0, more.stderr
    assert more.stdout.strip()


def test_a_question_that_does_not_fit_does_not_end_the_conversation():
    done = edge_rt("chat", *GREEDY, "--ctx", "64", input="word " * 200 + "\nHello.\n")
    assert done.returncode == 0
    assert "error: what must stay in the context has 230 tokens (current question 209, system prompt 21)" in done.stderr
    assert done.stdout.strip()


def test_a_conversation_goes_on_beyond_the_window():
    questions = "\n".join(f"Tell me fact number {i} about rivers and the sea." for i in range(8))
    done = edge_rt("chat", *GREEDY, "--ctx", "128", input=questions)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    assert re.search(r"note: \d segments? \([\d,]+ tokens\) left the context of 128 \(graded\): 'Tell me fact number 0", done.stderr)


def test_run_says_what_left_the_context(tmp_path):
    letter = tmp_path / "letter.txt"
    letter.write_text("\n\n".join(f"Paragraph {i} says nothing much about anything at all, as letters do. " * 3 for i in range(12)))
    done = edge_rt("run", *GREEDY, "--json", "--raw", "--ctx", "256", "-f", str(letter))
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    use = events[-1]["context"]
    assert use["used"] <= use["allowed"] == 256
    assert use["evicted_segments"] > 1
    assert use["absent_tokens"] >= use["evicted_tokens"] > 100
    assert any("left the context" in event.get("message", "") for event in events)
    strict = edge_rt("run", *GREEDY, "--json", "--raw", "--ctx", "256", "--policy", "strict", "-f", str(letter))
    assert strict.returncode == 1
    assert json.loads(strict.stdout.splitlines()[-1])["error"] == "ContextOverflow"
    assert edge_rt("run", "--policy", "none", "Hi").returncode == 1
    unknown = edge_rt("run", "--embedder", "none", "Hi")
    assert (unknown.returncode, unknown.stderr) == (1, "error: no embedder named none, there is none\n")


WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": {"properties": {"city": {"type": "string"}}}},
}


def test_tools_are_in_the_prompt_and_stay(tmp_path):
    file, saved = tmp_path / "tools.json", tmp_path / "s.session"
    file.write_text(json.dumps([WEATHER]))
    done = edge_rt("run", *GREEDY, "--json", "--tools", str(file), "--session", str(saved), "How is the weather in Leeds?")
    assert done.returncode == 0, done.stderr
    assert [event["message"] for event in events(done.stdout) if event["event"] == "notice"] == [
        "the model's chat template has no place for tools: they are written into the messages, but it may not know how to call them"
    ]
    with api.open(model_hub.fetch_model(model_hub.DEFAULT)) as model, model.restore(saved) as session:
        assert f"<tools>\n{json.dumps(WEATHER)}\n</tools>" in model.detokenize(session.tokens)
    questions = "\n".join(f"Tell me fact number {i} about rivers and the sea." for i in range(6))
    talk = edge_rt("chat", *GREEDY, "--ctx", "220", "--tools", str(file), "-v", input=questions)
    assert talk.returncode == 0, talk.stderr
    assert "left the context of 220 (graded): 'Tell me fact number 0" in talk.stderr
    assert talk.stderr.count("no place for tools") == 1


class Terminal:
    """The program on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.seen = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [*PROGRAM, *words])

    def wait(self, condition: Callable[[str], object], seconds: float = 60) -> None:
        """Read until the condition holds for what was shown since the last ``type``."""
        end = time.monotonic() + seconds
        while not condition(self.seen):
            assert time.monotonic() < end, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert condition(self.seen), self.seen

    def type(self, text: str) -> None:
        """Write as a person does, who needs a moment after the prompt: readline shows it before it listens to signals."""
        time.sleep(0.3)
        self.seen = ""
        os.write(self.fd, text.encode())

    def status(self) -> int:
        """Wait for the end and return the exit status."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if select.select([self.fd], [], [], 0.05)[0]:
                with suppress(OSError):  # the other side is closed
                    os.read(self.fd, 4096)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"it did not end: {self.seen}")

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def terminal():
    opened = []

    def make(*words: str) -> Terminal:
        opened.append(Terminal(*words))
        return opened[-1]

    yield make
    for screen in opened:
        screen.close()


def test_ctrl_c_ends_the_answer_and_not_the_conversation(terminal):
    screen = terminal("chat", "--temp", "0", "--ignore-eos")
    screen.wait(lambda seen: seen.endswith("> "))
    screen.type("Tell a long story.\n")
    screen.wait(lambda seen: len(seen) > 80)
    screen.type("\x03")
    screen.wait(lambda seen: "[stopped]" in seen and seen.endswith("> "))
    assert "[context" in screen.seen
    screen.type("\x03")
    screen.wait(lambda seen: "Ctrl-C again or /quit leaves" in seen and seen.endswith("> "))
    screen.type("/quit\n")
    assert screen.status() == 0


@pytest.mark.parametrize(("keys", "status"), [(["\x04"], 0), (["\x03", "\x03"], 130)])
def test_leaving(terminal, keys, status):
    screen = terminal("chat")
    screen.wait(lambda seen: seen.endswith("> "))
    for key in keys:
        screen.type(key)
        if key != keys[-1]:
            screen.wait(lambda seen: seen.endswith("> "))
    assert screen.status() == status


# ---- the other commands ----------------------------------------------------------------------------------------------


def test_models():
    found = json.loads(edge_rt("models", "--json").stdout)
    assert [model["name"] for model in found["installed"]] == [model_hub.DEFAULT]
    assert found["available"] == []
    assert model_hub.DEFAULT in edge_rt("models").stdout


def test_inspect(smollm2):
    found = json.loads(edge_rt("inspect", "smollm2", "--json", "--tensors").stdout)
    assert (found["architecture"], found["vocabulary"], found["sizes"]["blocks"]) == ("llama", 49152, 30)
    assert [unit["unit"] for unit in found["units"]] == ["embedding", *(f"blk.{i}" for i in range(30)), "norm"]
    assert sum(unit["bytes"] for unit in found["units"]) == sum(tensor["bytes"] for tensor in found["tensors"])
    assert sum(kind["bytes"] for kind in found["types"]) == sum(tensor["bytes"] for tensor in found["tensors"]) < found["bytes"]
    assert all(0 <= unit["resident"] <= unit["bytes"] and unit["blocks"] > 0 for unit in found["units"])
    shown = edge_rt("inspect", str(smollm2)).stdout
    assert "Q4_1" in shown
    assert re.search(r"^blk\.29 .* 2\.2 MB", shown, re.MULTILINE)


def test_plugins():
    found = json.loads(edge_rt("plugins", "--json").stdout)
    states = {plugin["name"]: (plugin["state"], plugin["offers"]) for plugin in found["plugins"]}
    assert states["cpu"] == ("ok", ["device cpu"])
    assert states["ggml"] == ("ok", ["engine ggml"])
    assert states["llama_cpp"] == ("ok", ["engine llama_cpp"])
    assert re.search(r"^ggml +edge-rt \S+ +ok +engine ggml$", edge_rt("plugins").stdout, re.MULTILINE)


def test_doctor():
    done = edge_rt("doctor", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr, found["problems"]) == (0, "", [])
    assert found["versions"]["edge-rt"] == __version__
    assert found["library"]["verdict"] == "as expected"
    assert found["library"]["ggml"] in found["library"]["known"]
    assert found["library"]["layouts"] == list(repack.layouts())
    cpu = found["devices"][0]
    assert (cpu["name"], cpu["usable"], cpu["basis"]) == ("cpu", True, "measured")
    assert found["cache"]["writable"]
    assert found["memory"]["available"] <= found["memory"]["total"]
    shown = edge_rt("doctor").stdout
    assert all(title in shown for title in ("Versions\n", "Native library\n", "  packs for  ", "Devices\n", "Plugins\n", "Cache\n"))
    assert "Problems" not in shown


def test_bench():
    done = edge_rt("bench", "-p", "32", "-n", "4", "-r", "2", "--json")
    found = json.loads(done.stdout)
    assert (found["prompt_tokens"], found["answer_tokens"], found["repetitions"]) == (32, 4, 2)
    for name in ("prefill", "decode", "first_token"):
        assert 0 < found[name]["min"] <= found[name]["median"] <= found[name]["max"]
    shown = edge_rt("bench", "-p", "16", "-n", "2", "-r", "1").stdout
    assert re.search(r"^decode +2 +\d+\.\d tokens/s", shown, re.MULTILINE)


def test_pull_a_file(tmp_path, random_model):
    source = random_model()
    environment = {**os.environ, "EDGE_RT_CACHE": str(tmp_path)}
    done = edge_rt("pull", source.as_uri(), env=environment)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == source.read_bytes()
    checksum = re.search("--sha256 ([0-9a-f]{64})", done.stderr)[1]
    assert edge_rt("pull", source.as_uri(), "--sha256", checksum, env=environment).stderr == ""
    assert edge_rt("run", "-m", path.stem, "-n", "3", "--seed", "1", "hi", env=environment).returncode == 0
