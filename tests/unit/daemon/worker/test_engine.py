"""The worker process alone, over a pair of sockets."""

import socket
import subprocess
import sys
import threading
import time

import pytest
from daemons import Daemon

from edge_rt.daemon.protocol import FrameReader, pack


class Worker:
    """A worker process and what it says."""

    def __init__(self, folder, model, delay=0.0, **opening):
        ours, theirs = socket.socketpair()
        program = [sys.executable, "-m", "edge_rt.daemon.worker", str(theirs.fileno())]
        environment = Daemon(folder, delay=delay).environment
        self.process = subprocess.Popen(program, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        ours.settimeout(30)
        self.socket, self.frames, self.said, self.news = ours, FrameReader(), {}, []
        options = {"engine": "null", "device": "null", **opening.pop("options", {})}
        self.tell(op="open", id=0, model=str(model), options=options, rules=None, **opening)

    def tell(self, **command):
        self.socket.sendall(pack(command))

    def hear(self):
        for message in self.frames.feed(self.socket.recv(1 << 16)):
            if "id" in message:
                self.said.setdefault(message["id"], []).append(message)
            else:
                self.news.append(message)

    def until(self, number, key=None):
        """All that is said of a command, up to its answer, or up to an event of a kind."""
        while not any((key is None and "event" not in one) or one.get("event", 0) == key for one in self.said.get(number, [])):
            self.hear()
        return self.said[number]

    def close(self):
        self.socket.close()
        try:
            assert self.process.wait(10) == 0
        finally:
            self.process.kill()


@pytest.fixture
def start(folder, random_model):
    started = []

    def make(**options):
        started.append(Worker(folder, options.pop("model", random_model()), **options))
        return started[-1]

    yield make
    for one in started:
        one.close()


def generate(worker, number, prompt="abc", credits=1000, session=None, **options):
    given = {} if session is None else {"session": session}
    options = {"temperature": 0, "ignore_eos": True, **options}
    worker.tell(op="generate", id=number, prompt=prompt, credits=credits, options=options, **given)


def text(messages):
    return "".join(one["text"] for one in messages if one.get("event") == "delta")


def test_credits_are_not_exceeded_and_others_go_on(start):
    worker = start()
    generate(worker, 1, credits=3, max_tokens=20)
    generate(worker, 2, prompt="xyz", max_tokens=20)
    worker.until(2)
    assert len(worker.said[1]) == 3
    worker.tell(op="resume", request=1, events=2)
    worker.tell(op="tokenize", id=3, text="")
    worker.until(3)
    while len(worker.said[1]) < 5:
        worker.hear()
    worker.tell(op="resume", request=1, events=100)
    slow = text(worker.until(1))
    generate(worker, 4, max_tokens=20)
    assert slow == text(worker.until(4))


@pytest.mark.parametrize("early", [True, False])
def test_cancelling_reaches_a_request_before_it_begins_and_while_it_reads(start, early):
    worker = start(delay=0.02)
    worker.until(0)
    generate(worker, 1, prompt="b" * 3000, max_tokens=5)
    if not early:
        worker.until(1, "prompt")
    asked = time.monotonic()
    worker.tell(op="cancel", request=1)
    done = worker.until(1)[-2]
    assert (done["reason"], done["usage"]["completion_tokens"]) == ("cancelled", 0)
    assert time.monotonic() - asked < 5  # of 3,000 tokens at 64 a step and more: seconds are left
    assert len(worker.said[1]) < 20


def test_what_waits_for_credits_ends_when_it_is_cancelled(start):
    worker = start()
    generate(worker, 1, max_tokens=100000, credits=4)
    worker.until(1, "delta")
    worker.tell(op="tokenize", id=2, text="")
    while len(worker.said.get(1, ())) < 4 or 2 not in worker.said:
        worker.hear()
    worker.tell(op="cancel", request=1)
    *events, answer = worker.until(1)
    assert (events[-1]["reason"], answer) == ("cancelled", {"id": 1, "ok": {}})
    assert len(events) <= 4 + 2, "but for the rest of the text and done, nothing comes beyond the credits"
    worker.tell(op="resume", request=1, events=9)  # as the daemon may say of one that has ended
    worker.tell(op="memory", id=3)
    assert worker.until(3)[-1]["ok"]["requests"] == 0


def test_a_dropped_request_and_a_closed_session_are_free_at_once(start):
    worker = start()
    worker.tell(op="open_session", id=1, session="s")
    generate(worker, 2, session="s", max_tokens=100000, credits=5)
    worker.until(2, "delta")
    worker.tell(op="drop", request=2)
    assert worker.until(2)[-1]["error"]["code"] == "cancelled"
    generate(worker, 3, session="s", max_tokens=3)
    assert "ok" in worker.until(3)[-1]
    generate(worker, 4, session="s", max_tokens=100000, credits=5)
    worker.until(4, "delta")
    worker.tell(op="close_session", session="s")
    assert worker.until(4)[-1]["error"]["code"] == "cancelled"
    generate(worker, 5, session="s")
    assert worker.until(5)[-1]["error"]["code"] == "session_lost"
    worker.tell(op="memory", id=6)
    assert (worker.until(6)[-1]["ok"]["sessions"], worker.said[6][-1]["ok"]["requests"]) == (0, 0)


def test_mistakes_are_answered_and_leave_nothing(start):
    worker = start(options={"policy": "strict"})
    generate(worker, 1, temperature=-5)
    assert worker.until(1)[-1]["error"]["code"] == "option"
    generate(worker, 2, prompt="x" * 5000)
    assert worker.until(2)[-1]["error"] | {"message": ""} == {"code": "context_overflow", "message": "", "needed": 5001, "available": 4095}
    generate(worker, 3, post=["moons"])
    assert worker.until(3)[-1]["error"]["code"] == "plugin"
    worker.tell(op="restore_session", id=4, session="t", path="/nowhere")
    assert worker.until(4)[-1]["error"]["code"] == "session_file"
    worker.tell(op="detokenize", id=5, tokens=[1 << 40])
    assert worker.until(5)[-1]["error"]["code"] == "option"
    worker.tell(op="memory", id=6)
    assert worker.until(6)[-1]["ok"]["requests"] == 0


def test_whether_anything_moves(start):
    worker = start()
    worker.until(0)
    worker.tell(op="tokenize", id=1, text="")
    worker.until(1)
    time.sleep(0.05)
    worker.news.clear()
    worker.tell(op="ping")
    while not worker.news:
        worker.hear()
    assert (worker.news[0]["idle"], worker.news[0]["expected"]) == (True, None)
    worker.tell(op="generate", id=2, prompt="\x05\x05", credits=9)  # hangs
    time.sleep(0.2)
    beats = []
    for _ in range(2):
        worker.news.clear()
        worker.tell(op="ping")
        while not worker.news:
            worker.hear()
        beats.append(worker.news[0])
        time.sleep(0.05)
    assert beats[0] == beats[1]
    assert beats[0]["idle"] is False


def test_writes_of_a_step_go_out_when_it_is_over():
    from edge_rt.daemon.worker.__main__ import WorkerLoop as Work

    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    work, frames, heard = Work(theirs), FrameReader(), []

    class Engine:
        busy = False

        def step(self):
            for number in range(3):
                work._send({"id": number})
            other = threading.Thread(target=work._send, args=({"beats": 1},))
            other.start()
            other.join()
            heard.extend(frames.feed(ours.recv(1 << 16)))
            return True

    work._engine = Engine()
    assert work._step()
    assert heard == [{"beats": 1}], "what another thread says does not wait"
    assert list(frames.feed(ours.recv(1 << 16))) == [{"id": 0}, {"id": 1}, {"id": 2}]
    work._send({"id": 4})
    assert list(frames.feed(ours.recv(1 << 16))) == [{"id": 4}]
    ours.close()
    theirs.close()


def test_a_worker_that_cannot_use_the_folder_says_so(start, tmp_path):
    (tmp_path / "p").touch()
    (answer,) = start(parked=str(tmp_path / "p")).until(0)
    assert answer["error"]["code"] == "option"
