"""Files that commit 18b0e62 wrote (tests/data/compat) are still read, and mean what they meant: sessions, a trace, a plan, caches."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon
from edge_rt_distill.replay.trace import read_trace
from http_peer import Peer

import edge_rt
from edge_rt.cli.main import main
from edge_rt.types import Delta, Done

FILES = Path(__file__).parents[1] / "data" / "compat"
EXPECTED: dict[str, Any] = json.loads((FILES / "expected.json").read_text())
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
CLOSE = 0.2
"""Natural log-probabilities: another CPU's kernels and another layout of values round otherwise; wrong cells differ by more."""
CHAT = "/v1/chat/completions"


def copied(name: str, folder: Path) -> Path:
    """A copy of a fixture with the time of change that it had, which sessions and packed weights name."""
    target = folder / Path(name).name
    shutil.copyfile(FILES / name, target)
    os.utime(target, ns=(EXPECTED["mtime_ns"], EXPECTED["mtime_ns"]))
    return target


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model that everything was made with, alone in its folder, and an empty cache."""
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "empty"))
    return copied("compiled/model.gguf", tmp_path)


def answered(session: Any, prompt: Any, n: int, **options: Any) -> tuple[list[int], list[float], Done]:
    """Greedy tokens, their log-probabilities, and the last event."""
    *events, done = session.generate(prompt, max_tokens=n, **{**GREEDY, "logprobs": 1, **options})
    deltas = [event for event in events if isinstance(event, Delta)]
    assert isinstance(done, Done)
    return [t for one in deltas for t in one.tokens], [score.logprob for one in deltas for score in one.logprobs or ()], done


# ---- sessions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "pruned", "adapter", "llama_cpp"])
def test_a_session_goes_on_from_its_cells(name: str, model: Path, tmp_path: Path) -> None:
    one = EXPECTED[name]
    own = {"adapter": "mine", "adapter_scale": 0.5} if name == "adapter" else {}
    adapters = {"mine": copied("adapter.gguf", tmp_path)} if own else None
    with (
        edge_rt.open(model, engine=one["engine"], context=one["context"], threads=1, adapters=adapters) as opened,
        opened.restore(FILES / one["file"]) as session,
    ):
        assert list(session.history.tokens) == one["tokens"]
        assert not session.history.evicted
        tokens, logprobs, done = answered(session, one["next_prompt"], len(one["next"]), **own)
    assert (tokens, done.usage.reused_tokens, done.context.missing_cells) == (one["next"], one["reused"], one["missing"])
    assert logprobs == pytest.approx(one["logprobs"], abs=CLOSE)


def test_a_session_of_which_something_left_the_context_recalls_it(model: Path) -> None:
    one = EXPECTED["evicted"]
    with (
        edge_rt.open(model, engine=one["engine"], context=one["context"], threads=1) as opened,
        opened.restore(FILES / one["file"]) as session,
    ):
        assert (list(session.tokens), list(session.history.tokens)) == (one["tokens"], one["history"])
        evicted = [(left.start, left.end, left.text) for left in session.history.evicted]
        assert evicted == [tuple(left[:3]) for left in one["evicted"]]
        assert [left.score for left in session.history.evicted] == pytest.approx([left[3] for left in one["evicted"]])
        asked = [*one["messages"], {"role": "user", "content": one["ask"]}]
        tokens, logprobs, done = answered(session, asked, len(one["next"]))
    assert (done.context.recalled_segments, done.context.absent_tokens) == (one["recalled"], one["absent"])
    assert (tokens, done.usage.reused_tokens) == (one["next"], one["reused"])
    assert logprobs == pytest.approx(one["logprobs"], abs=CLOSE)


def test_the_command_line_goes_on_with_a_session(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, path = EXPECTED["plain"], tmp_path / "s.session"
    shutil.copyfile(FILES / one["file"], path)
    words = ["--engine", one["engine"], "-c", str(one["context"]), "--threads", "1", "--temp", "0", "-n", str(len(one["next"]))]
    words += ["--ignore-eos", "--raw", "--json", "--session", str(path)]
    assert main(["run", "-m", str(model), *words, one["next_prompt"]]) == 0
    *events, done = map(json.loads, capsys.readouterr().out.splitlines())
    assert [t for event in events if event["event"] == "delta" for t in event["tokens"]] == one["next"]
    assert done["usage"]["reused_tokens"] == one["reused"]


def test_a_saved_conversation_is_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again.json"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/save {again}\n/quit\n"))
    assert main(["chat", "-m", str(model), "--load", str(FILES / "talk.json")]) == 0, capsys.readouterr().err
    assert json.loads(again.read_text()) == json.loads((FILES / "talk.json").read_text())


# ---- a compiled directory: plan, packed weights, compensation --------------------------------------------------------


def test_a_compiled_directory_runs_by_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, features: frozenset[str]) -> None:
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "cache"))
    one = EXPECTED["compiled"]
    folder = shutil.copytree(FILES / "compiled", tmp_path / "compiled", copy_function=shutil.copyfile)  # without times, as it would go
    before = (folder / "model.pack").read_bytes()
    with edge_rt.open(folder, engine="ggml", threads=1) as opened, opened.session() as session:
        tokens, logprobs, _ = answered(session, one["prompt"], len(one["tokens"]))
        assert (opened.info.max_context, opened.notices) == (one["max_context"], one["notices"])
        assert opened.compensation is not None
        assert opened.compensation.facts["sites"] == 7
        packed = sorted(unit.name for unit in opened.units() if unit.packed)
    assert tokens == one["tokens"]
    assert logprobs == pytest.approx(one["logprobs"], abs=CLOSE)
    with edge_rt.open(folder, engine="ggml", threads=1, compensation="off") as opened, opened.session() as session:
        tokens, logprobs, _ = answered(session, one["prompt"], len(one["without_compensation"]))
    assert tokens == one["without_compensation"]
    assert logprobs == pytest.approx(one["logprobs_without"], abs=CLOSE)
    assert (folder / "model.pack").read_bytes() == before
    if "avx2" not in features or "amx_int8" in features:
        pytest.skip("the weights beside the model are packed for AVX2 without AMX, which this CPU has not: they are rightly not used")
    assert packed == one["packed"]
    assert list((tmp_path / "cache" / "packed").glob("*")) == []


def test_inspect_shows_what_a_compensation_corrects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(FILES / "compiled", tmp_path / "compiled")
    assert main(["inspect", str(folder / "model.gguf"), "--json"]) == 0
    side = json.loads(capsys.readouterr().out)["compensation"]
    assert (side["problem"], side["sites"], side["low_rank"], side["tables"], side["biases"]) == (None, 7, 7, 7, 7)


# ---- caches ----------------------------------------------------------------------------------------------------------


def used(model: Path) -> None:
    """Run a model as one does, with drafts, for which products of several columns are tried."""
    with edge_rt.open(model, engine="ggml", context=64, threads=1) as opened, opened.session() as session:
        answered(session, "one two one two one", 4, speculate=4, logprobs=0)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache that this version has filled."""
    folder = tmp_path_factory.mktemp("fresh")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("EDGE_RT_CACHE", str(folder))
        (folder / "model").mkdir()
        used(copied("compiled/model.gguf", folder / "model"))
        yield folder


@pytest.fixture(scope="module")
def features(fresh: Path) -> frozenset[str]:
    """Of this CPU, as measurements name them."""
    return frozenset(build_of(fresh / "exact-columns.json").split("|")[2:])


def build_of(path: Path) -> str:
    return str(json.loads(path.read_text())["build"])


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh: Path) -> Path:
    """The old cache in use; skips where what is in it is of another CPU or library."""
    then, now = build_of(FILES / "cache" / "exact-columns.json"), build_of(fresh / "exact-columns.json")
    if then != now:
        pytest.skip(f"the cache was filled on a CPU and a library of {then}, and here are {now}: it is rightly not used")
    folder = shutil.copytree(FILES / "cache", tmp_path / "cache")
    monkeypatch.setenv("EDGE_RT_CACHE", str(folder))
    return folder


def contents(folder: Path, *patterns: str) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of files."""
    found = [path for pattern in patterns for path in folder.glob(pattern) if path.suffix != ".lock"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in found}


def test_packed_weights_and_measurements_are_used_and_not_made_again(old: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RT_CACHE", str(old))
    before = contents(old, "packed/*", "*.json")
    assert len(before) == 4
    monkeypatch.chdir(model.parent)
    used(Path(model.name))
    with edge_rt.open(model.name, engine="ggml", context=64, threads=1) as opened:
        assert any(unit.packed for unit in opened.units())
    assert contents(old, "packed/*", "*.json") == before


def test_a_plan_for_this_machine_is_made_from_what_was_measured(
    old: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGE_RT_CACHE", str(old))
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("it was measured on two CPUs, and there is one")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    before = contents(old, "*.json")
    assert main(["compile", str(model), "--target", "auto", "--dry-run", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)["predicted"]
    assert {name: predicted[name] for name in EXPECTED["predicted"]} == pytest.approx(EXPECTED["predicted"])
    assert contents(old, "*.json") == before


def test_a_sound_file_is_marked_as_it_was(fresh: Path, model: Path) -> None:
    """A mark names a state of a file and cannot be copied: what is here is compared with the old one's form, and with the file."""
    (then,) = (FILES / "cache" / "checked").iterdir()
    (now,) = (fresh / "checked").iterdir()
    for path in (then, now):
        assert path.name == f"{zlib.crc32(path.read_bytes()):08x}"
    facts = (fresh / "model" / "model.gguf").stat()
    version, *state, library = now.read_text().split(" ")
    assert (version, list(map(int, state))) == (
        edge_rt.__version__, [facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns]
    )  # fmt: skip
    _, _, _, size, changed, _, library_then = then.read_text().split(" ")
    assert (size, changed) == (str(facts.st_size), str(facts.st_mtime_ns))
    assert re.fullmatch(r"\d+-\d+", library)
    assert re.fullmatch(r"\d+-\d+", library_then)


def test_a_mark_is_believed(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_RT_CACHE", str(fresh))
    before = {path: (path.read_bytes(), path.stat().st_ino) for path in (fresh / "checked").iterdir()}
    used(fresh / "model" / "model.gguf")
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in (fresh / "checked").iterdir()} == before


def test_swapped_cells_have_their_names_and_what_a_dead_process_left_goes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They belong to one process: no later one reads them."""
    cache = tmp_path / "cache"
    shutil.copytree(FILES / "cache" / "evicted", cache / "evicted")
    monkeypatch.setenv("EDGE_RT_CACHE", str(cache))
    (left,) = cache.glob("evicted/999999999-left/*")
    size = left.stat().st_size
    with suppress(ProcessLookupError):
        os.kill(999999999, 0)
        pytest.skip("there is a process of this number")
    one = EXPECTED["evicted"]
    messages = [*one["messages"], {"role": "user", "content": one["ask"]}]
    with edge_rt.open(model, engine=one["engine"], context=one["context"], threads=1) as opened, opened.session() as session:
        for turn in (2, 4, 6):
            answered(session, messages[:turn], 10, logprobs=0, speculate=4)
        (folder,) = (cache / "evicted").iterdir()
        assert folder.name.startswith(f"{os.getpid()}-")
        assert (folder / left.name).stat().st_size == size
    assert list((cache / "evicted").iterdir()) == []


# ---- the daemon ------------------------------------------------------------------------------------------------------


def test_the_daemon_restores_a_session_and_goes_on_in_a_trace_whose_requests_it_answers(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("h11", reason="the daemon speaks HTTP with h11; pip install 'edge-rt[http]'")
    trace, one = tmp_path / "trace.jsonl", EXPECTED["plain"]
    shutil.copyfile(FILES / "trace.jsonl", trace)
    trace.chmod(0o600)
    saved = tmp_path / "state" / "sessions" / str(os.getuid())
    saved.mkdir(parents=True)
    shutil.copyfile(FILES / one["file"], saved / "talk.session")
    old = read_trace(trace)
    config = 'limits.requests_per_second = 0\n[model]\nengine = "ggml"\ncontext = 512\nthreads = 1\n'
    config += '[record]\nfile = "trace.jsonl"\nanswers = true\n'
    with Daemon(tmp_path, "-m", str(model), "--http", str(tmp_path / "h.sock"), config=config) as daemon, daemon.ready() as client:
        assert [found["name"] for found in client.saved()] == ["talk"]
        session = client.restore("talk")
        *events, done = session.generate(one["next_prompt"], max_tokens=len(one["next"]), **GREEDY)
        assert [t for event in events if isinstance(event, Delta) for t in event.tokens] == one["next"]
        assert done.usage.reused_tokens == one["reused"]
        peer, asked = Peer(str(tmp_path / "h.sock")), [request for request in old.requests if request.seen.status == "ok"]
        assert len(asked) == 7
        for request in asked:
            reply = peer.post(request.path, {name: value for name, value in request.body.items() if name != "model"})
            assert reply.status == 200
            (choice,) = reply.json["choices"]
            assert choice["finish_reason"] == request.seen.finish_reason
            if request.session is None and "[EMAIL]" not in str(request.body):  # of sessions there is only what is new
                assert reply.json["usage"]["prompt_tokens"] == request.seen.prompt_tokens
        settled(lambda: client.status()["recording"]["recorded"], 1 + len(asked))
    now = read_trace(trace)
    assert trace.read_text().startswith((FILES / "trace.jsonl").read_text())
    assert (len(now.requests), now.feedback) == (len(old.requests) + 1 + len(asked), old.feedback)
    again = [request.body for request in now.requests[len(old.requests) + 1 :]]
    assert again == [{name: value for name, value in request.body.items() if name != "model"} for request in asked]


def test_a_trace_says_what_it_said() -> None:
    trace = read_trace(FILES / "trace.jsonl")
    assert trace.about["redacted"] is True
    assert trace.about["by"] == "edge-rt 0.1.0"
    assert [(request.path == CHAT, request.seen.status, request.seen.code, request.session) for request in trace.requests] == [
        (True, "ok", "", None), (True, "ok", "", "s1"), (True, "ok", "", "s1"), (False, "ok", "", None), (True, "ok", "", None),
        (True, "ok", "", None), (False, "cancelled", "", None), (False, "error", "constraint", None), (False, "ok", "", None),
    ]  # fmt: skip
    first, told = trace.requests[0], trace.feedback[0]
    assert first.body["messages"] == [{"role": "user", "content": "Mail [EMAIL] about hall 7."}]
    assert trace.requests[4].body["tools"][0]["function"]["name"] == "weather"
    assert trace.requests[5].body["response_format"]["json_schema"]["schema"] == {"enum": ["red", "blue"]}
    assert trace.requests[5].answer == '"blue"'
    assert (told.rating, told.correction, told.comment) == (-1, "Within 14 days.", "Too short for [EMAIL]")
    assert told.variant == first.variant


def settled(count: Callable[[], int], expected: int) -> None:
    until = time.monotonic() + 30
    while count() < expected:
        assert time.monotonic() < until, count()
        time.sleep(0.02)
