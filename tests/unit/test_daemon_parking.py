"""Files of parked sessions, when the worker is killed."""

import os

from test_daemon_worker import generate, start, text  # noqa: F401 - one is a fixture


def parked(worker, session):
    worker.until(0)
    worker.tell(op="open_session", id=1, session=session, owner="me")
    generate(worker, 2, prompt="once upon", session=session, max_tokens=20)
    worker.until(2)
    worker.tell(op="park_session", id=3, session=session)
    assert worker.until(3)[-1]["ok"] == {"held": 0}
    (told,) = (one for one in worker.news if "parked" in one)
    assert told["parked"] == session
    return told["path"]


def test_sessions_go_on_from_there_when_the_worker_was_killed(start, tmp_path):  # noqa: F811
    worker = start(parked=str(tmp_path / "p"))
    path = parked(worker, "s")
    worker.process.kill()
    worker.process.wait()
    worker.socket.close()
    worker.close = lambda: None
    after = start(parked=str(tmp_path / "p"))
    after.tell(op="restore_session", id=1, session="s", path=path, owner="me")
    assert after.until(1)[-1]["ok"] == {"tokens": 29}
    generate(after, 2, prompt="once upon a", session="s", max_tokens=20)
    generate(after, 3, prompt="once upon a", max_tokens=20)
    after.until(3)
    assert after.until(2)[-2]["usage"]["reused_tokens"] == 10
    assert text(after.said[2]) == text(after.said[3])
    after.tell(op="close_session", session="s")
    after.tell(op="memory", id=4)
    after.until(4)
    assert not os.path.exists(path)


def test_a_worker_that_cannot_use_the_folder_says_so(start, tmp_path):  # noqa: F811
    (tmp_path / "p").touch()
    (answer,) = start(parked=str(tmp_path / "p")).until(0)
    assert answer["error"]["code"] == "option"
