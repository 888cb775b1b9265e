"""Sessions as the daemon knows them: saved, listed, deleted, and restored after the worker has died."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from daemons import Daemon, write_plugin

from edge_rt.daemon import sessions as saves
from edge_rt.daemon.client import Client
from edge_rt.daemon.sessions import SessionRegistry
from edge_rt.errors import DaemonError, ProtocolError, UserError

WHY = r"the session was lost: .* belongs to another model, or to what this one's file was before"


NODE = Path(__file__).parents[3] / "clients" / "node" / "edge-rt.js"


PROGRAM = """
const { Client } = require(process.argv[1]);
Client.connect(process.argv[2]).then(async (client) => {
  const names = async () => (await client.savedSessions()).map((one) => one.name);
  const found = [await names()];
  await client.deleteSaved('a');
  found.push(await names(), await client.deleteSaved('a').catch((error) => error.code));
  client.close();
  console.log(JSON.stringify(found));
});
"""


@pytest.fixture(scope="module")
def daemon(tmp_path_factory, random_model):
    folder = tmp_path_factory.mktemp("saves")
    write_plugin(folder)
    (folder / "key").write_text("0123456789abcdef\n")
    (folder / "key").chmod(0o600)
    config = f'key_file = "key"\nlisten = ["tcp:127.0.0.1:0", "{folder}/d.sock"]\nlimits.saved_per_user = 2\n'
    found = Daemon(folder, config=config, model=str(random_model()))
    found.words = [word for word in found.words if word not in ("--listen", str(found.socket))]
    with found:
        found.port = int(found.said.decode().split("tcp:127.0.0.1:")[1].split(",")[0])
        found.ready().close()
        yield found


def say(session, prompt="hello"):
    return list(session.generate(prompt, max_tokens=4, ignore_eos=True))[-1]


def test_they_are_listed_and_deleted_and_others_do_not_see_them(daemon):
    with daemon.client() as client, client.session() as session:
        assert client.saved() == []
        say(session)
        for name in ("b", "a"):
            session.save(name)
        first, second = client.saved()
        assert (first["name"], second["name"]) == ("a", "b")
        assert first["bytes"] == second["bytes"] > 0
        assert abs(first["saved"] - time.time()) < 60
        with pytest.raises(DaemonError, match="a user may have 2 saved sessions; delete one, or save under a name that has one"):
            session.save("c")
        with Client(f"tcp:127.0.0.1:{daemon.port}", key="0123456789abcdef") as other:
            assert other.saved() == []
            with pytest.raises(DaemonError) as caught:
                other.delete_saved("a")
            assert caught.value.code == "session_file"
        client.delete_saved("a")
        session.save("c")
        assert [one["name"] for one in client.saved()] == ["b", "c"]
        with pytest.raises(DaemonError, match="there is no saved session a; list_saved says which there are") as caught:
            client.restore("a")
        assert caught.value.code == "session_file"
        with pytest.raises(DaemonError) as caught:
            client.delete_saved("../b")
        assert caught.value.code == "option"
        for name in ("b", "c"):
            client.delete_saved(name)


def test_with_node(daemon):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    with daemon.client() as client, client.session() as session:
        for name in ("a", "b"):
            session.save(name)
        done = subprocess.run([node, "-e", PROGRAM, str(NODE), str(daemon.socket)], capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert json.loads(done.stdout) == [["a", "b"], ["b"], "session_file"]
        client.delete_saved("b")


def test_nobody_goes_on_from_what_was_deleted(daemon):
    with daemon.client() as client:
        session = client.session()
        say(session)
        session.save("gone")
        client.delete_saved("gone")
        deaths = client.status()["worker"]["deaths"]
        os.kill(client.status()["worker"]["pid"], signal.SIGKILL)
        while client.status()["worker"]["deaths"] == deaths:
            time.sleep(0.02)
        with pytest.raises(DaemonError) as caught:
            say(session)
        assert caught.value.code == "session_lost"
        session.close()


def test_what_is_no_saved_session_is_not_listed_and_a_disk_that_says_no_is_told(tmp_path):
    assert saves.list_saved_sessions(tmp_path, 7) == []
    folder = tmp_path / "7"
    folder.mkdir()
    for name in ("a.session", "a.sessionx1.tmp", ".session", "b.txt", "c d.session"):
        (folder / name).write_bytes(b"123")
    assert [(one.name, one.bytes) for one in saves.list_saved_sessions(tmp_path, 7)] == [("a", 3)]
    (folder / "d.session").mkdir()
    with pytest.raises(UserError, match="the saved session d cannot be deleted: is a directory"):
        saves.delete_saved_session(folder / "d.session", "d")
    with pytest.raises(ProtocolError) as caught:
        saves.delete_saved_session(folder / "e.session", "e")
    assert caught.value.code == "session_file"
    (tmp_path / "8").write_text("")
    with pytest.raises(UserError, match="saved sessions cannot be listed: not a directory"):
        saves.list_saved_sessions(tmp_path, 8)


def test_what_was_saved_of_a_model_whose_file_was_replaced_says_so_and_can_be_deleted(tmp_path, random_model):
    write_plugin(tmp_path)
    model = tmp_path / "m.gguf"
    shutil.copy(random_model(), model)
    with Daemon(tmp_path, model=str(model)) as daemon, daemon.ready() as client:
        session, idle = client.session(), client.session()
        for one in (session, idle):
            say(one)
        session.save("kept")
        client.call("save_session", session=idle.id, name="other")
        shutil.copy(random_model(), tmp_path / "new.gguf")
        (tmp_path / "new.gguf").replace(model)
        os.kill(client.status()["worker"]["pid"], signal.SIGKILL)
        until = time.monotonic() + 20
        while client.status()["worker"]["deaths"] < 1 or client.status()["worker"]["state"] != "ready":
            assert time.monotonic() < until
            time.sleep(0.02)
        for _ in range(2):
            with pytest.raises(DaemonError, match=WHY) as caught:
                say(session)
            assert caught.value.code == "session_lost"
        with pytest.raises(DaemonError) as caught:
            client.restore("kept")
        assert caught.value.code == "session_mismatch"
        client.call("close_session", session=session.id)
        for name in ("kept", "other"):
            client.delete_saved(name)
        assert client.saved() == []
        client.call("load_model", model=str(model), options={"engine": "null", "device": "null"})
        with pytest.raises(DaemonError, match="the session ended with its model, which was unloaded or replaced; open another"):
            say(idle)
        assert say(client.session())


def test_what_is_saved_later_is_gone_on_from_and_not_what_was_parked_before(tmp_path):
    parked, saved = tmp_path / "parked", tmp_path / "saved"
    for path in (parked, saved):
        path.touch()
    sessions = SessionRegistry(9, 1.0, lambda one: None)
    hosted = SimpleNamespace(supervisor=SimpleNamespace(epoch=0))
    one = sessions.add(1, hosted, False, None)
    assert one.last_save is None
    sessions.note_parked(one.id, parked)
    assert one.last_save == parked
    sessions.note_saved(one, saved)
    assert one.last_save == saved
    sessions.note_saved(sessions.add(1, hosted, False, None), saved)  # another, in the same place
    assert one.last_save == parked
    sessions.note_saved(one, saved)
    sessions.note_parked(one.id, parked)
    assert one.last_save == parked
    parked.unlink()
    assert one.last_save == saved
