"""A whole run through the real command line: a random teacher of two layers becomes an INT4 student with corrections."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from edge_rt_distill.cli import add_commands
from edge_rt_distill.model.load import load
from edge_rt_distill.run.config import DistilConfig, StudentConfig
from edge_rt_distill.run.pipeline import ablation, run_file, state, workshop
from edge_rt_distill.run.pipeline import steps as planned
from edge_rt_distill.run.report import write_report
from edge_rt_distill.run.shape import plan_options
from edge_rt_distill.run.teach import paced
from typer.testing import CliRunner, Result

import edge_rt
from edge_rt.hooks import DataError, OptionError, UserError
from edge_rt.testing.random_models import write_random_model

DISTRIBUTION = Path(__file__).parents[1]
RUN = """
name = "tiny"
[run]
threads = 1
[teacher]
model = "tiny.gguf"
[data]
samples = ["demo", "more.jsonl"]
length = 96
held_out = 0.2
rollouts = 4
rollout_tokens = 12
chats = 16
weights = [3, 0, 1]
[library]
samples = 6
answer_tokens = 6
[diagnose]
sequences = 4
removal_tokens = 64
order = 1
paths = 1
[student]
parameters = 0.8
vocabulary = 0.9
widths = "free"
repair_tokens = 1024
side_rank = 2
[behaviour]
prompts = 16
per_prompt = 3
tokens = 8
reward = "my_reward:even"
[distil]
batch_tokens = 256
evaluate_every = 512
held_out = 6
asked = 2
[distil.token]
tokens = 1024
[distil.hidden]
tokens = 512
[distil.attention]
tokens = 512
[distil.behaviour]
tokens = 512
[quantise]
calibration_tokens = 1024
aware_tokens = 512
[compensate]
bytes = 0.2
time = 1.0
tokens = 2048
tune_tokens = 2048
"""
MORE = '{"text": "A sentence of the user\'s own, long enough to be learnt from."}\nthis is no JSON\n{"messages": []}\n'
REWARD = "def even(sample, answer, ended):\n    return 1.0 if len(answer) % 2 == 0 else 0.5\n"
"""Of the user's own: what a random teacher writes passes no check."""
Command = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """``edge-rt`` with this distribution installed, as a process that was started."""
    target, copy = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("build") / "distill"  # building leaves files behind
    shutil.copytree(DISTRIBUTION, copy, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    install = ["install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, timeout=120)
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(target / "mpl")}

    def start(*words: str | Path, cwd: Path) -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "edge_rt.cli.main", "distill", *map(str, words)]
        return subprocess.Popen(line, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


def folder(base: Path, tiny: Path, text: str = RUN) -> Path:
    base.mkdir()
    shutil.copy(tiny, base / "tiny.gguf")
    (base / "more.jsonl").write_text(MORE)
    (base / "my_reward.py").write_text(REWARD)
    (base / "run.toml").write_text(text)
    return base


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=240)
    return process.returncode, out, error


@pytest.fixture(scope="module")
def whole(command: Command, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from its beginning to its end."""
    place = folder(tmp_path_factory.mktemp("run") / "whole", tiny)
    (place / "demo").mkdir()  # as a run named demo.toml leaves it; the set of that name is meant
    code, out, error = finish(command("run", "run.toml", "--json", cwd=place))
    assert code == 0, error
    (place / "said.json").write_text(out)
    (place / "told.txt").write_text(error)
    return place


def results(place: Path) -> dict[str, dict[str, str]]:
    """By step the checksums of what it left, without those of times."""
    found = {}
    for path in sorted((place / "run").glob("*/done.json")):
        files = json.loads(path.read_text())["files"]
        found[path.parent.name] = {name: known for name, known in files.items() if name not in ("log.jsonl", "records.txt")}
    return found


def test_a_teacher_becomes_a_student_that_runs(whole):
    steps = {one["name"]: one["summary"] for one in json.loads((whole / "said.json").read_text())}
    assert [problem.partition(":")[0] for problem in steps["data"]["broken"]] == ["more.jsonl, line 2", "more.jsonl, line 3"]
    assert steps["cut"]["share"] <= 0.8
    assert steps["distil"]["levels"] == 4
    assert steps["vocabulary"]["tokens"] == 320, "nine of ten, in blocks of 64"
    assert steps["vocabulary"]["longer"] > 0
    verified = json.loads((whole / "run" / "verify" / "verify.json").read_text())
    assert verified["kl from stock llama.cpp"] < 0.005
    with edge_rt.open(whole / "run" / verified["file"], context=64) as model, model.session() as session:
        assert model.compensation is not None
        assert len(list(session.generate("Hello", max_tokens=4))) > 1
        assert np.isfinite(model.logits([1, 2, 3])).all()


def test_a_run_that_is_done_is_not_done_again(command, whole):
    code, out, error = finish(command("run", "run.toml", cwd=whole))
    assert code == 0
    assert error.count("done before") == len(out.splitlines())
    said = invoke("status", whole / "run.toml").output
    assert len(said.splitlines()) == len(out.splitlines())
    assert "not done" not in said
    assert "again" not in said
    records = json.loads(invoke("library", "ls", whole / "run" / "teacher-library", "--json").output)
    assert {one["kind"] for one in records} >= {"snapshot", "trajectories", "activations", "attention"}


def test_status_says_what_changed_settings_would_do_again(whole):
    other = whole / "other.toml"
    other.write_text(RUN.replace("[run]", '[run]\nfolder = "run"').replace("calibration_tokens = 1024", "calibration_tokens = 2048"))
    said = {line.split()[0]: "again" in line for line in invoke("status", other).output.splitlines()}
    assert [name for name, again in said.items() if again] == ["quantise", "compensate", "verify"]


def test_an_ablation_shares_the_cut_and_a_report_tells_of_all(whole, tmp_path):
    place = shutil.copytree(whole, tmp_path / "place")
    (place / "run.toml").write_text("# A student for tests.\n#   edge-rt distill run run.toml\n" + RUN)
    before = results(place)
    done = {one.name: one for one in run_file(place / "run.toml", planning=ablation)}
    assert all(one.again for name, one in done.items() if not name.startswith("ablation"))
    assert {name: found for name, found in results(place).items() if not name.startswith("ablation")} == before
    found = [done[f"ablation-{count}"].summary for count in range(5)]
    assert found[0]["kl"] == pytest.approx(done["cut"].summary["kl"]), "taught nothing, the student is the cut"
    assert len({one["tokens"] // 1024 for one in found[1:]}) == 1, "all learn from as many tokens"
    page = write_report([place / "run.toml"], place / "report.md").read_text()
    assert "## run\n\nA student for tests.\n\n```sh\nedge-rt distill run run.toml\n```" in page
    assert page.count("| + ") == 4
    plain = done["cut"].summary["unrepaired"]
    assert f"| cut | {plain['kl']:.4f} | {plain['top1']:.3f} | {plain['perplexity_ratio']:.3f} |" in page
    assert plain["kl"] > 0
    for one in found:
        assert f"| {one['kl']:.4f} ± {one['kl error']:.4f} | {one['top1']:.3f} | {one['perplexity_ratio']:.3f} |" in page
    (place / "report.md").write_text(page.replace("## run\n", "## another\n"))
    both = write_report([place / "run.toml"], place / "report.md").read_text()
    assert write_report([place / "run.toml"], place / "report.md").read_text() == both
    assert both == page.replace("## run\n", "## another\n") + "\n" + page[page.index("## run") :], "what was said of another run stays"
    (place / "diary.md").write_text("Mine.\n")
    with pytest.raises(DataError, match="not a report"):
        write_report([place / "run.toml"], place / "diary.md")
    assert (place / "diary.md").read_text() == "Mine.\n"


def invoke(*words: str | Path) -> Result:
    """A command in this process."""
    app = typer.Typer()
    add_commands(app)
    return CliRunner().invoke(app, ["distill", *map(str, words)])


@pytest.mark.soak  # steps that are killed are in test_distill_steps, checkpoints in test_distill_stages
def test_a_run_that_is_killed_again_and_again_comes_to_the_same_end(command, whole, tiny, tmp_path):
    place = folder(tmp_path / "killed", tiny)
    for at in ("library", "distil", "compensate"):
        process = command("run", "run.toml", cwd=place)
        work, until = place / "run" / f"{at}.work", time.monotonic() + 120
        while not (work / "key").exists():
            assert time.monotonic() < until
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] == -signal.SIGKILL
    code, _, error = finish(command("run", "run.toml", cwd=place))
    assert code == 0, error
    assert results(place) == results(whole)


MISTAKES = {
    "no such model": ('[teacher]\nmodel = "none.gguf"\n', "there is no file none.gguf; did you mean tiny.gguf?"),
    "a wrong value": ("[student]\nparameters = 2\n", "run.toml, line 2: parameters is 2.0; give 0.05 to 1"),
    "an unknown key": ("[distil.token]\ntoken = 2\n", "did you mean tokens?"),
    "samples that are not there": ('[data]\nsamples = ["nothing.jsonl"]\n', "nothing.jsonl: no such file"),
    "a broken line that stops": ('[teacher]\nmodel = "tiny.gguf"\n[data]\nsamples = ["more.jsonl"]\npolicy = "stop"\n', "line 2"),
    "too few samples": ('[teacher]\nmodel = "tiny.gguf"\n[data]\nsamples = ["more.jsonl"]\n', "cannot be split; add samples that differ"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(tiny, tmp_path, monkeypatch, name):
    text, expected = MISTAKES[name]
    monkeypatch.chdir(folder(tmp_path / "mistake", tiny, text))
    with pytest.raises(UserError, match=re.escape(expected)):
        run_file(Path("run.toml"))


def test_a_mistake_is_told_without_a_traceback_and_exits_with_1(command, tiny, tmp_path):
    text, expected = MISTAKES["an unknown key"]
    code, _, error = finish(command("run", "run.toml", cwd=folder(tmp_path / "mistake", tiny, text)))
    assert (code, "Traceback" in error) == (1, False), error
    assert expected in error


def test_a_file_to_begin_with_is_written_once(command, tiny, tmp_path):
    assert finish(command("init", "my.toml", cwd=tmp_path))[0] == 0
    assert "# Share of the teacher's parameters at most." in (tmp_path / "my.toml").read_text()
    assert "is there already" in str(invoke("init", tmp_path / "my.toml").exception)
    with pytest.raises(OptionError, match="there is no step nowhere; the steps are data"):
        run_file(folder(tmp_path / "run", tiny) / "run.toml", until="nowhere")


def test_another_teacher_of_the_same_name_is_another_teacher(tiny, tmp_path):
    place = folder(tmp_path / "stamps", tiny)
    keys = {one.name: one.settings for one in planned(workshop(place / "run.toml"))}
    write_random_model(place / "tiny.gguf", "llama", n_layer=2, seed=1, type="F32")
    changed = {one.name for one in planned(workshop(place / "run.toml")) if one.settings != keys[one.name]}
    assert changed == {"rollouts", "vocabulary", "library", "diagnose", "answers"}, "the others depend on these"
    (place / "tiny.gguf").unlink()
    assert [one.done for one in state(place / "run.toml")] == [None] * len(keys), "what is done can be told without the teacher"


@pytest.mark.parametrize(
    ("said", "qk_norm", "expected"),
    [
        (StudentConfig(), False, "free"), (StudentConfig(), True, "equal"), (StudentConfig(ffn=64), False, "equal"),
        (StudentConfig(widths="equal"), False, "equal"), (StudentConfig(widths="free"), True, "free"),
    ],
)  # fmt: skip
def test_layers_may_differ_in_channels_where_they_can(tiny, said, qk_norm, expected):
    assert plan_options(said, replace(load(tiny).model.architecture, qk_norm=qk_norm)).widths == expected


@pytest.mark.parametrize("tokens", [1, 1024, 3072, 5000, 100_000])
def test_a_level_is_evaluated_as_often_as_its_gate_waits_for(tokens):
    steps, every = paced(tokens, DistilConfig(batch_tokens=1024, evaluate_every=8192))
    assert steps == max(1, tokens // 1024)
    assert 1 <= every <= 8
    assert steps / every >= min(3, steps)


def test_a_run_without_texts_of_the_teacher_learns_from_the_samples_alone(tiny, tmp_path):
    shop = workshop(folder(tmp_path / "alone", tiny) / "run.toml")
    (tmp_path / "train.jsonl").write_text(MORE.splitlines()[0] + "\n")
    (tmp_path / "rollouts.jsonl").write_text("")
    found = shop.sequences(shop.teacher.tokeniser, tmp_path / "train.jsonl", tmp_path / "rollouts.jsonl")
    assert found == shop.sequences(shop.teacher.tokeniser, tmp_path / "train.jsonl")
    assert len(found) == 1
