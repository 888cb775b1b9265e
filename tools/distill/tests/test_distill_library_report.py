"""The library's report and commands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import pytest
import typer
from edge_rt_distill.library import pictures, snapshots
from edge_rt_distill.library.attribution import Aim
from edge_rt_distill.library.catalogue import Query, Record
from edge_rt_distill.library.commands import add, listed
from edge_rt_distill.library.errors import Case, record_errors
from edge_rt_distill.library.record import (
    Answers,
    Prompt,
    record_activations,
    record_attention,
    record_trajectories,
)
from edge_rt_distill.library.report import render, tokens_marked, write_report
from edge_rt_distill.library.store import Library
from edge_rt_distill.model.load import load
from typer.testing import CliRunner

from edge_rt.hooks import DataError, UserError

NASTY = "<script>alert('x')</script> & \"金融\" $x$"


class Row(NamedTuple):
    sample: str
    tokens: list[int]


@pytest.fixture(scope="module")
def library(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Library:
    library = Library.open(tmp_path_factory.mktemp("report") / "library", create=True)
    teacher = load(tiny)
    rows = [Row(f"{NASTY} {i}", [5 + i, 17, 40, 9, 33, 21, 60]) for i in range(3)]
    snapshots.store(library, teacher)
    for domain in (NASTY, "legal"):
        prompts = [Prompt(row.sample, row.tokens) for row in rows]
        record_trajectories(library, teacher, prompts, domain=domain, options=Answers(tokens=4), score=lambda *_: 0.5)
    record_activations(library, teacher, rows, domain=NASTY)
    record_attention(library, teacher, rows, domain=NASTY)
    cases = [Case(NASTY, [5, 17, 40, 9], 2, (NASTY,), Aim([1, 2], [40, 9]))]
    record_errors(library, teacher, cases, domain=NASTY, heads=2)
    library.add(Record("evaluation", teacher.digest, date="2026-01-02T03:04:05Z", score=0.25, facts={NASTY: NASTY}))
    return library


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def source(library: Library) -> str:
    steps: list[tuple[int, int]] = []
    page = render(library, told=lambda *step: steps.append(step))
    assert steps[-1] == (7, 7)
    return page


def test_report_shows_all_and_runs_nothing(source: str) -> None:
    page = Page(source)
    names = [tag for tag, _ in page.tags]
    assert "script" not in names
    assert not {"link", "iframe", "object", "embed"} & set(names)
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    for tag, attributes in page.tags:
        for key in ("src", "href", "xlink:href"):
            value = attributes.get(key) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value[:50])
    assert NASTY in "".join(page.words)
    for kind in ("snapshot", "trajectories", "activations", "attention", "errors", "evaluation"):
        assert f"<h3>{kind}</h3>" in source
    assert names.count("svg") == 3 + 1 + 2 + 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', source)
    assert used
    assert {a or b for a, b in used} <= set(ids)
    assert "#010203" not in source
    assert "mathdefault" not in source
    assert "1 more samples are stored" in source


def test_pictures_are_well_formed(source: str) -> None:
    for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        ElementTree.fromstring(svg)


def test_report_of_a_query(library: Library, tmp_path: Path) -> None:
    out = write_report(library, tmp_path / "deep" / "report.html", Query("evaluation"))
    page = out.read_text("utf-8")
    assert "<h3>evaluation</h3>" in page
    assert "<h3>errors</h3>" not in page
    assert out.stat().st_mode & 0o777 == 0o644
    assert "No records." in render(library, Query(domain="nothing"))
    with pytest.raises(UserError, match="cannot write"):
        write_report(library, out / "x.html")


def test_tokens_are_marked_by_what_they_did() -> None:
    marked = tokens_marked(["<b>", "x\n", ""], [1.0, -0.5, 0.0], 1)
    page = Page(marked)
    spans = [attributes for tag, attributes in page.tags if tag == "span"]
    assert [span["class"] for span in spans] == ["for", "against answer", "against answer"]
    assert [span["style"] for span in spans] == ["--a:0.75", "--a:0.38", "--a:0.00"]
    assert "".join(page.words) == "<b>x↵\n∅"
    with pytest.raises(DataError):
        tokens_marked(["a"], [], 0)


def test_pictures_of_extreme_values() -> None:
    zeros = np.zeros((3, 4), np.float32)
    for svg in (
        pictures.activation_maps(zeros, zeros + 1e9),
        pictures.histograms("t", "l", {"": np.zeros(5), "金": np.ones(1)}, log=True),
        pictures.histograms("t", "l", {"x": np.full(5, 2.0)}),
        pictures.carried([0.0, 0.0], np.full((2, 2), np.nan)),
        pictures.attention_series(np.ones((1, 1, 1, 1), np.float16)),
        pictures.scores({"x": [0.5]}),
    ):
        assert svg.startswith("<svg role")
        ElementTree.fromstring(svg)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command("other")(lambda: None)
    add(app)
    return app


def call(app: typer.Typer, *words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["library", *map(str, words)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def test_commands(library: Library, app: typer.Typer, tmp_path: Path) -> None:
    where = library.folder
    found = json.loads(call(app, "ls", where, "--json"))
    assert len(found) == 7
    assert [one["date"] for one in found] == sorted((one["date"] for one in found), reverse=True)
    last = found[-1]
    assert (last["kind"], last["date"], last["score"]) == ("evaluation", "2026-01-02T03:04:05Z", 0.25)
    lines = call(app, "ls", where).splitlines()
    assert len(lines) == 8
    assert lines[0].split() == ["ID", "KIND", "DATE", "MODEL", "DOMAIN", "SCORE"]
    assert len(json.loads(call(app, "ls", where, "--json", "--domain", NASTY))) == 4
    assert len(json.loads(call(app, "ls", where, "--json", "-n", 2))) == 2
    assert [one["id"] for one in json.loads(call(app, "ls", where, "--json", "--max-score", 0.3))] == [last["id"]]
    assert call(app, "ls", where, "--until", "2025-01-01") == "no records\n"
    shown = json.loads(call(app, "show", where, last["id"][:8], "--json"))
    assert shown["facts"] == {NASTY: NASTY}
    text = call(app, "show", where, found[0]["id"][:8])
    assert text.splitlines()[0].split() == ["id", found[0]["id"]]
    assert call(app, "verify", where) == "no damage\n"
    call(app, "report", where, "-o", tmp_path / "r.html", "--kind", "evaluation")
    assert "<h3>evaluation</h3>" in (tmp_path / "r.html").read_text("utf-8")
    result = CliRunner().invoke(app, ["library", "show", str(where), "nothing"])
    assert isinstance(result.exception, DataError)


def test_commands_that_tidy(app: typer.Typer, tmp_path: Path) -> None:
    library = Library.open(tmp_path / "l", create=True)
    record = library.add(Record("diagnosis", "ab", objects={"x": library.put(b"12345")}))
    call(app, "gc", library.folder)
    library.path(record.objects["x"]).chmod(0o644)
    library.path(record.objects["x"]).write_bytes(b"1234")
    damage = json.loads(call(app, "verify", library.folder, "--json", code=1))
    assert len(damage) == 1
    assert "missing" not in call(app, "show", library.folder, record.id)
    told = call(app, "gc", library.folder, "--grace", "0", "--forget", record.id[:6])
    assert told == "removed 1 objects, 0 temporary files and 0 abandoned recordings; 4 B freed\n"
    assert call(app, "verify", library.folder) == "no damage\n"


def test_listing_reads_no_records(library: Library) -> None:
    before = library.reads
    assert len(listed(library, Query(low=0.0), 0)) == 3
    assert library.reads == before
    digest = next(library.find()).model
    assert len(listed(library, Query(model=digest), 0)) == 7


def test_looking_needs_no_torch() -> None:
    code = "import sys, edge_rt_distill.library.commands; print([m for m in ('torch', 'numpy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
