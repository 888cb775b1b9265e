"""Adapters of the default model, made of random numbers: one that is heard, and one of zeros that changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.testing.random_models import write_random_adapter
from edge_rt.types import Delta

GREEDY = ["--temp", "0", "-n", "16", "--raw"]
PROMPT = "The sky is blue because"


@pytest.fixture(scope="module")
def adapters(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of rank 16, for all the model's linear layers."""
    folder = tmp_path_factory.mktemp("adapters")
    with ModelFile.open(smollm2) as model:
        return {
            name: write_random_adapter(folder / f"{name}.gguf", model.header, seed=seed, rank=16, alpha=16.0, gain=gain, type="F16")
            for seed, (name, gain) in enumerate({"loud": 0.4, "other": 0.4, "zeros": 0.0}.items())
        }


def run(*words: str, status: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "edge_rt.cli.main", *words],
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def test_one_is_heard_and_one_of_zeros_changes_nothing(adapters: dict[str, Path]) -> None:
    plain = run("run", *GREEDY, PROMPT)
    loud = run("run", *GREEDY, "--adapter", str(adapters["loud"]), PROMPT)
    assert loud != plain
    assert run("run", *GREEDY, "--adapter", f"{adapters['loud']}:0.5", PROMPT) not in (loud, plain)
    assert run("run", *GREEDY, "--adapter", f"{adapters['loud']}:0", PROMPT) == plain
    assert run("run", *GREEDY, "--adapter", str(adapters["zeros"]), PROMPT) == plain


def test_mistakes_are_one_sentence(adapters: dict[str, Path], smollm2: Path, tmp_path: Path) -> None:
    for words, said in (
        (["--adapter", str(tmp_path / "none.gguf")], "does not exist"),
        (["--adapter", f"{adapters['loud']}:much"], "does not exist"),
        (["--adapter", f"{adapters['loud']}:1e9"], "give -1000 to 1000"),
        (["--adapter", str(smollm2)], "is no adapter"),
        (["-m", str(adapters["loud"])], "a LoRA adapter and no model"),
    ):
        err = run("run", *GREEDY, *words, PROMPT, status=1)
        assert said in err
        assert "Traceback" not in err


def test_a_saved_session_refuses_another(adapters: dict[str, Path], tmp_path: Path) -> None:
    session = ["--session", str(tmp_path / "s.session")]
    run("run", *GREEDY, *session, "--adapter", str(adapters["loud"]), PROMPT)
    run("run", *GREEDY, *session, "--adapter", str(adapters["loud"]), PROMPT)
    for words in ([], ["--adapter", str(adapters["zeros"])]):
        assert "made with another adapter" in run("run", *GREEDY, *session, *words, PROMPT, status=1)


def test_inspect_says_what_it_is(adapters: dict[str, Path]) -> None:
    found = json.loads(run("inspect", str(adapters["loud"]), "--json"))
    assert found["adapter"] == {"type": "lora", "alpha": 16.0, "ranks": [16], "weights": 210}
    assert "lora of 210 weights, rank 16, alpha 16; run its model with --adapter" in run("inspect", str(adapters["loud"]))
    assert "adapter" not in json.loads(run("inspect", "smollm2", "--json"))


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, smollm2: Path, adapters: dict[str, Path]) -> Iterator[Daemon]:
    table = "".join(f"{name} = {str(path)!r}\n" for name, path in adapters.items())
    config = f"[model]\nfile = {str(smollm2)!r}\ncontext = 1024\n[model.adapters]\n{table}"
    with Daemon(tmp_path_factory.mktemp("daemon"), config=config) as found:
        found.ready().close()
        yield found


def test_the_daemon_answers_requests_for_several_at_once(serving: Daemon) -> None:
    """Each as it is answered alone: what rounding differs in larger steps is far too little to be heard."""
    asked: list[dict[str, Any]] = [
        {}, {"adapter": "loud"}, {"adapter": "other"}, {"adapter": "loud", "adapter_scale": 0.5}, {"adapter": "zeros"}, {"adapter": "loud"},
    ]  # fmt: skip
    found = [""] * len(asked)

    def ask(i: int) -> str:
        with serving.client() as client:
            events = client.generate(PROMPT, temperature=0, max_tokens=24, ignore_eos=True, **asked[i])
            return "".join(event.text for event in events if isinstance(event, Delta))

    def note(i: int) -> None:
        found[i] = ask(i)

    threads = [threading.Thread(target=note, args=(i,)) for i in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [ask(i) for i in range(len(asked))]
    assert found[0] == found[4]
    assert found[1] == found[5]
    assert len({*found}) == 4
