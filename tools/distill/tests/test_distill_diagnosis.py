"""A whole diagnosis: its files, that it resumes, its table, its page and its pictures."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pytest
import torch
from edge_rt_distill import plots
from edge_rt_distill.diagnose.diagnosis import Diagnosis, diagnose
from edge_rt_distill.diagnose.findings import Measured, rank
from edge_rt_distill.diagnose.groups import Group, lift
from edge_rt_distill.diagnose.options import Options
from edge_rt_distill.diagnose.report import write
from edge_rt_distill.diagnose.rows import Labels
from edge_rt_distill.files import write_file
from edge_rt_distill.model.load import Teacher, load
from edge_rt_distill.plots import Axes

from edge_rt.hooks import Cancelled, DataError, OptionError, UserError

OPTIONS = Options(sequences=8, removal_tokens=60, order=1, paths=2, batch_tokens=64, far=4)


class One(NamedTuple):
    tokens: list[int]
    targets: list[bool]
    sample: str


@pytest.fixture(scope="module")
def teacher(tiny: Path) -> Teacher:
    return load(tiny)


@pytest.fixture(scope="module")
def sequences(teacher: Teacher) -> list[One]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(10):
        length = 8 + number
        tokens = torch.randint(3, teacher.model.architecture.vocabulary, (length,), generator=generator).tolist()
        found.append(One(tokens, [place >= 4 for place in range(length)], f"s{number}"))
    return found


@pytest.fixture(scope="module")
def labels() -> dict[str, Labels]:
    return {f"s{number}": Labels(("finance", "医疗")[number % 2], "zh" if number < 4 else "en") for number in range(10)}


@pytest.fixture(scope="module")
def done(teacher, sequences, labels, tmp_path_factory) -> tuple[Diagnosis, Path]:
    folder = tmp_path_factory.mktemp("diagnosis") / "new"
    return diagnose(teacher, sequences, OPTIONS, folder=folder, labels=labels), folder


def test_the_arrays_are_those_that_were_agreed_on_and_finite(done, teacher) -> None:
    a = teacher.model.architecture
    depth, heads, kv, ffn = len(a.layers), a.layers[0].heads, a.layers[0].kv_heads, a.layers[0].ffn
    shapes = {
        "layer_kl": (depth,), "attention_kl": (depth,), "ffn_kl": (depth,), "block_influence": (depth,), "heads": (depth, heads),
        "kv_groups": (depth, kv), "ffn_channels": (depth, ffn), "hidden": (a.width,), "path_heads": (depth, heads),
        "attention_entropy": (depth, heads), "stream_mean_square": (depth + 1,), "drop_order": (1,), "drop_kl": (1,),
        "domain.医疗.layer_kl": (depth,), "language.en.heads": (depth, heads), "input_mean_square.blk.1.ffn_down": (ffn,),
    }  # fmt: skip
    with np.load(done[1] / "diagnosis.npz") as file:
        for name, shape in shapes.items():
            assert file[name].shape == shape, name
            assert np.isfinite(file[name]).all(), name
    assert (done[0].arrays["layer_kl"] > 0).all()
    assert done[0].arrays["drop_order"][0] == done[0].arrays["layer_kl"].argmin()
    np.testing.assert_array_equal(done[0].arrays["ffn_channels"], done[0].arrays["ffn_channels_activation"])
    np.testing.assert_array_equal(done[0].arrays["hidden"], done[0].arrays["hidden_activation"])


def test_the_json_says_what_was_looked_at_and_ranks_by_share(done, teacher, sequences) -> None:
    data = json.loads((done[1] / "diagnosis.json").read_text(encoding="utf-8"))
    assert data["samples"]["sequences"] == 8
    assert 0 < data["samples"]["removal"]["tokens"] <= 60 < data["samples"]["tokens"]
    assert set(data["fisher"]) == set(teacher.model.sites())
    assert [one["layer"] for one in data["layers"]] == [0, 1]
    assert data["layers"][1]["layer_kl"] == pytest.approx(float(done[0].arrays["layer_kl"][1]))
    assert {(one["kind"], one["name"]) for one in data["groups"]} == {
        ("domain", "finance"), ("domain", "医疗"), ("language", "en"), ("language", "zh"),
    }  # fmt: skip
    assert sum(one["sequences"] for one in data["groups"] if one["kind"] == "domain") == 8
    shares = [one["share"] for one in data["findings"]]
    assert shares == sorted(shares, reverse=True)
    assert [one["rank"] for one in data["findings"]] == list(range(1, len(shares) + 1))
    kinds = {one["kind"] for one in data["findings"]}
    assert {"layer", "half", "head", "KV group", "FFN channels", "hidden dimension", "matrix", "path"} <= kinds
    assert all(one["explanation"] for one in data["findings"])
    one = data["traces"][0]
    assert len(one["pieces"]) == len(one["tokens"]) == len(one["weights"])
    assert one["answer"] == 4
    assert sum(one["weights"]) == pytest.approx(1, abs=1e-3)


def test_a_domain_has_a_row_where_it_differs_and_was_seen_enough(done) -> None:
    heads, kl = done[0].arrays["heads"], done[0].arrays["layer_kl"]
    tilted = kl * np.array([1.0, 3.0], np.float32)
    cases = {
        "seen": Group("domain", "seen", 4, 40, 4, 1.0, heads, tilted), "rare": Group("domain", "rare", 3, 40, 3, 1.0, heads, tilted),
        "alike": Group("domain", "alike", 9, 90, 9, 1.0, heads, kl * 5),
        "by heads": Group("language", "by heads", 9, 90, 1, 1.0, heads, tilted),
    }  # fmt: skip
    found = rank(Measured(done[0].arrays, done[0].facts, list(cases.values()), dict.fromkeys(done[0].fisher, 1)))
    rows = [one for one in found if one.kind in ("domain", "language")]
    assert [one.place for one in rows] == ["seen, layer 1"]
    assert rows[0].share == pytest.approx(float(tilted[1] / tilted.sum()))


def test_what_was_written_is_read_again(done) -> None:
    found = Diagnosis.read(done[1])
    assert found.facts == json.loads(json.dumps(done[0].facts))
    assert found.findings == done[0].findings
    assert found.fisher == done[0].fisher
    assert set(found.arrays) == set(done[0].arrays)


def test_a_diagnosis_resumes_with_the_parts_it_has_and_comes_to_the_same(done, teacher, sequences, labels, tmp_path, monkeypatch) -> None:
    def stop(part: str, number: int, total: int) -> None:
        if part == "removal":
            raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        diagnose(teacher, sequences, OPTIONS, stop, folder=tmp_path, labels=labels)
    assert not (tmp_path / "diagnosis.json").exists()
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == ["activations.npz", "fisher.npz", "gradients.npz"]
    seen: list[str] = []
    diagnose(teacher, sequences, OPTIONS, lambda part, *_: seen.append(part), folder=tmp_path, labels=labels)
    assert set(seen) == {"removal", "paths"}  # one layer to drop is the removal's least
    for name in ("diagnosis.json", "diagnosis.npz"):
        assert (tmp_path / name).read_bytes() == (done[1] / name).read_bytes()
    seen.clear()
    diagnose(teacher, sequences, dataclasses.replace(OPTIONS, far=5), lambda part, *_: seen.append(part), folder=tmp_path, labels=labels)
    assert set(seen) == {"activations"}
    (tmp_path / "parts" / "gradients.npz").write_bytes(b"PK damaged")
    seen.clear()
    diagnose(teacher, sequences, OPTIONS, lambda part, *_: seen.append(part), folder=tmp_path, labels=labels)
    assert set(seen) == {"activations", "gradients"}


def test_other_measures_can_be_chosen_and_the_parts_that_are_not_wanted_left_out(teacher, sequences, tmp_path) -> None:
    options = dataclasses.replace(
        OPTIONS, channels="taylor", hidden="taylor", fisher="text", halves=False, order=0, sequences=3, removal_tokens=2
    )
    found = diagnose(teacher, [*sequences, One([5, 6], [True, False], "none")], options, folder=tmp_path)
    np.testing.assert_array_equal(found.arrays["ffn_channels"], found.arrays["ffn_channels_taylor"])
    np.testing.assert_array_equal(found.arrays["hidden"], found.arrays["hidden_taylor"])
    assert "attention_kl" not in found.arrays
    assert len(found.arrays["drop_order"]) == 0
    assert found.facts["samples"]["removal"]["sequences"] == 1
    assert found.facts["samples"]["skipped"] == 1
    assert found.facts["layers"][0]["layer_kl_error"] is None  # no error of one sequence
    assert found.facts["groups"] == []


def test_what_cannot_be_diagnosed_is_said(teacher, sequences, tmp_path, monkeypatch) -> None:
    with pytest.raises(DataError, match="no sample"):
        diagnose(teacher, [], OPTIONS, folder=tmp_path)
    with pytest.raises(OptionError, match="sequences is 0"):
        Options(sequences=0)
    with pytest.raises(OptionError, match="one of activation, taylor"):
        Options(channels="wanda")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no diagnosis"):
        Diagnosis.read(tmp_path / "none")
    (tmp_path / "diagnosis.json").write_text('{"version": 99}')
    with pytest.raises(DataError, match="version 99"):
        Diagnosis.read(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_file(tmp_path / "new" / "file", b"x")
    assert list((tmp_path / "new").iterdir()) == []


def test_damaged_weights_end_a_diagnosis_with_their_layer(tiny, sequences, tmp_path) -> None:
    broken = load(tiny)
    broken.model.linear("blk.1.ffn_down").weight[0, 0] = float("nan")
    with pytest.raises(DataError, match="layer 1 of the teacher"):
        diagnose(broken, sequences, OPTIONS, folder=tmp_path)
    assert not (tmp_path / "diagnosis.json").exists()


def test_lift_is_a_share_against_the_usual_share() -> None:
    np.testing.assert_allclose(lift(np.array([3.0, 1.0, 0.0]), np.array([10.0, 10.0, 0.0])), [1.5, 0.5, 0])


def test_the_page_is_whole_and_self_contained(done, tmp_path) -> None:
    write(done[0], tmp_path / "diagnosis.html", "Diagnosis of <tiny>")
    text = (tmp_path / "diagnosis.html").read_text(encoding="utf-8")
    assert "Diagnosis of &lt;tiny&gt;" in text
    assert "医疗" in text
    assert "src=" not in text
    assert "http" not in text.replace("http://www.w3.org", "")
    drawings = text.split("<svg")[1:]
    assert len(drawings) >= 14
    for drawing in drawings:
        ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>")
    ids = [piece.split('"')[0] for piece in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))
    assert all(one.explanation.split(";")[0].split("&")[0][:40] in text for one in done[0].findings)


def test_pictures_are_drawn_of_what_there_is_and_leave_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    table = np.array([[1.0, np.nan, 0.0], [5.0, -1.0, 100.0]])
    names = ["医疗健康 & <b>", "金融"]
    drawn = [
        plots.heat_map(table, Axes("heads", "head", "layer", y_names=names), log=True, unit="nats"),
        plots.heat_map(np.zeros((2, 2)), Axes("nothing"), log=True),
        plots.heat_map(np.ones((40, 3)), Axes("flat", y_names=[f"row {number}" for number in range(40)])),
        plots.bars({"a": [1, np.nan, 3], "b": [2, 2]}, Axes("bars", x_names=["x" * 40, "y" * 9, "z"]), errors=[0.1, np.nan, 0.2], mark=[2]),
        plots.bars({"none": [0.0, 0.0]}, Axes("log of nothing"), log=True),
        plots.bars({}, Axes("empty")),
        plots.curves({f"{n}": ([1, 2, 3], [n, np.nan, 2]) for n in range(12)}, Axes("curves", "x", "y"), log=True, log_x=True),
    ]
    for text in drawn:
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(text) < 100_000
    assert "医疗健康 &amp; &lt;b&gt;" in drawn[0]
    assert "PingFang" in drawn[0]
    assert drawn[0] == plots.heat_map(table, Axes("heads", "head", "layer", y_names=names), log=True, unit="nats")
    assert dict(matplotlib.rcParams) == before
