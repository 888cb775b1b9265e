"""Opening model files: what is refused and how, and what happens when the file changes underneath."""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path

import pytest

from edge_rt.core.gguf.model_file import ModelFile
from edge_rt.errors import ModelChanged, ModelFileError, UnsupportedModel

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def model_bytes(extra: bytes = b"", extra_count: int = 0, version: int = 3, fill: bytes = b"\0") -> bytes:
    """A GGUF file with one tensor of 64 KiB."""
    head = b"GGUF" + struct.pack("<IQQ", version, 1, 1 + extra_count)
    head += text("general.architecture") + struct.pack("<I", 8) + text("llama") + extra
    head += text("w") + struct.pack("<IQIQ", 1, 16384, 0, 0)
    return head + bytes(-len(head) % 32) + fill * 65536


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(model_bytes())
    return path


def refusal(path: Path) -> str:
    before = set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()
    with pytest.raises(ModelFileError) as caught:
        ModelFile.open(path)
    if sys.platform == "linux":
        assert set(os.listdir("/proc/self/fd")) == before, "a descriptor leaked"
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_opens_and_closes(path: Path) -> None:
    with ModelFile.open(path) as model:
        assert model.path == path
        assert model.header.architecture == "llama"
        assert len(model.map) == model.identity.size == path.stat().st_size
        assert not os.get_inheritable(model.fd)
        with pytest.raises(TypeError):
            model.map[0:1] = b"x"
        fd = model.fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    model.close()
    assert model.map.closed


@linux
def test_opening_reads_no_tensor_data(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    raw = model_bytes()
    with path.open("wb") as out:
        out.write(raw)
        out.truncate(1 << 40)  # sparse: reading all of it would take hours
    with ModelFile.open(path) as model:
        smaps = Path("/proc/self/smaps").read_text()
        entry = smaps[smaps.index(str(path)) :]
        resident = int(entry[entry.index("Rss:") + 4 :].split()[0])
        assert resident <= 128  # KiB: what the kernel maps around the header
        model.key()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"GGUF", "cut short"),
        (b"hello, I am text\n", "text file"),
        (model_bytes()[:-1], "cut short"),
        (b"PK\x03\x04" + bytes(60), "zip"),
    ],
)
def test_refuses_what_is_no_model(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    message = refusal(path)
    assert words in message
    assert str(path) in message


def test_keeps_the_kind_of_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(model_bytes(version=9))
    with pytest.raises(UnsupportedModel, match="version 9"):
        ModelFile.open(path)


def test_no_such_file(tmp_path: Path, path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "absent.gguf")
    assert "does not exist" in refusal(path / "below-a-file")
    assert "NUL" in refusal(Path("a\0b"))
    assert "long" in refusal(tmp_path / ("n" * 5000))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "link" in refusal(loop)


def test_directory_names_a_model_in_it(tmp_path: Path, path: Path) -> None:
    message = refusal(tmp_path)
    assert "directory" in message
    assert str(path) in message


@linux
def test_special_files_do_not_block(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "pipe" in refusal(fifo)
    assert "device" in refusal(Path("/dev/null"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable(path: Path) -> None:
    path.chmod(0)
    assert "permissions" in refusal(path)


def test_split_models_say_how_to_merge(tmp_path: Path) -> None:
    path = tmp_path / "model-00002-of-00003.gguf"
    shard = text("split.count") + struct.pack("<IH", 2, 3) + text("split.no") + struct.pack("<IH", 2, 1)
    path.write_bytes(model_bytes(shard, 2))
    message = refusal(path)
    assert "part 2 of 3" in message
    assert "llama-gguf-split --merge" in message
    path.write_bytes(model_bytes(text("split.count") + struct.pack("<IH", 2, 1), 1))
    ModelFile.open(path).close()


# ---- the file changes ------------------------------------------------------------------------------------------------


def test_unchanged_is_silent(path: Path) -> None:
    with ModelFile.open(path) as model:
        path.read_bytes()
        model.check_unchanged()


def test_truncation_is_found(path: Path) -> None:
    with ModelFile.open(path) as model:
        os.truncate(path, 5000)
        with pytest.raises(ModelChanged, match="was changed while it was open"):
            model.check_unchanged()


def test_rewriting_in_place_is_found(path: Path) -> None:
    with ModelFile.open(path) as model:
        with path.open("r+b") as out:
            out.seek(-8, os.SEEK_END)
            out.write(b"x")
        os.utime(path, ns=(0, model.identity.mtime_ns + 1))  # a file system's clock may be too coarse for a quick test
        with pytest.raises(ModelChanged):
            model.check_unchanged()


@linux
def test_replacement_by_rename_is_harmless(path: Path) -> None:
    with ModelFile.open(path) as model:
        other = path.with_suffix(".new")
        other.write_bytes(b"something else")
        other.rename(path)
        model.check_unchanged()
        assert Path(model.native_path).read_bytes() == model_bytes()
        assert model.map[:4] == b"GGUF"
        path.unlink()
        assert Path(model.native_path).read_bytes() == model_bytes()


def test_key_identifies_content(tmp_path: Path, path: Path) -> None:
    def key(content: bytes, name: str = "a.gguf", mtime: int = 10**18) -> str:
        where = tmp_path / name
        where.write_bytes(content)
        os.utime(where, ns=(mtime, mtime))
        with ModelFile.open(where) as model:
            assert model.key() == model.key()
            return model.key()

    same = key(model_bytes())
    assert same == key(model_bytes(), "b.gguf")
    assert same != key(model_bytes(), mtime=10**18 + 1)
    assert same != key(model_bytes(fill=b"\1"))
    assert same != key(model_bytes() + b"\0")
    assert same != key(model_bytes(text("general.name") + struct.pack("<I", 8) + text("other"), 1))
