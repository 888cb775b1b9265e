"""What the worker does, without its process: commands in, answers and news out, step by step."""

import time

from edge_rt.daemon.worker.engine import WorkerEngine


class Host:
    """A WorkerEngine without its process. It hears what the daemon would."""

    def __init__(self, model, allowance=None, parked=None, keep=(), **options):
        self.said, self.news, self.queue, self.number = {}, [], [], 0
        self.worker = WorkerEngine(self._send, self.queue.append)
        parked = None if parked is None else str(parked)
        self.do("open", model=str(model), options=options, rules=None, allowance=allowance, parked=parked, keep=keep)
        assert "ok" in self.said[0][-1], self.said
        self.engine, self.budget = self.worker._opened.engine, self.worker._budget

    def _send(self, message):
        if "id" in message:
            self.said.setdefault(message["id"], []).append(message)
        else:
            self.news.append(message)

    def do(self, op, **fields):
        """Carry out a command; its number."""
        number = self.number
        self.number += 1
        command = {"op": op, "id": number, **fields}
        if op in ("generate", "embed"):
            self.worker.requests.register(command)
        self.worker.handle(command)
        return number

    def ask(self, prompt, session=None, credits=100_000, priority="normal", **options):
        given = {} if session is None else {"session": session}
        options = {"temperature": 0, "ignore_eos": True, **options}
        return self.do("generate", prompt=prompt, credits=credits, options=options, priority=priority, owner="o", **given)

    def tell(self, op, request):
        getattr(self.worker.requests, {"cancel": "cancel", "drop": "mark_unwanted"}[op])(request)
        self.do(op, request=request)

    def step(self):
        while self.queue:
            self.worker.handle(self.queue.pop(0))
        return self.worker.step()

    def answer(self, number):
        """The answer, None as long as there is none."""
        last = self.said.get(number, [{"event": ""}])[-1]
        return None if "event" in last else last

    def until(self, *numbers, seconds=20):
        """Go on until these are answered; their answers."""
        end = time.monotonic() + seconds
        while any(self.answer(number) is None for number in numbers):
            assert time.monotonic() < end, "nothing moves"
            if not self.step():
                time.sleep(0.001)
        return [self.answer(number) for number in numbers]

    def events(self, number, kind):
        return [one for one in self.said.get(number, []) if one.get("event") == kind]

    def text(self, number):
        return "".join(one["text"] for one in self.events(number, "delta"))

    def used(self, number):
        return self.events(number, "done")[0]["usage"]

    def ok(self, op, **fields):
        return self.answer(self.do(op, **fields))["ok"]
