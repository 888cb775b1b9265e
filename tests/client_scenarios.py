"""The program that docs/clients.md asks for, with the Python client: ``client_scenarios.py [MISTAKE] ADDRESS SCENARIO PROMPT MAX_TOKENS``.

A mistake makes the client one that does not keep to the protocol, so that the conformance script has something to find.
"""

import sys
import time

from edge_rt.daemon.client import Client
from edge_rt.daemon.client.protocol import ClientProtocol, Reply
from edge_rt.errors import DaemonError
from edge_rt.types import Delta


def forget_to_acknowledge():
    Reply.acknowledgement_due = lambda self, every: False


def resume_too_early():
    resume = ClientProtocol.resume

    def early(self):
        for answers in self._broken:
            answers.seq = max(0, answers.seq - 1)
        resume(self)

    ClientProtocol.resume = early


def ask_anew():
    def again(self):
        for answers in self._broken:
            self._pending[self.request("generate", {"prompt": "Once upon a time"}).request] = answers
        self._broken = []

    ClientProtocol.resume = again


MISTAKES = (forget_to_acknowledge, resume_too_early, ask_anew)


def main(address, scenario, prompt, max_tokens):
    with Client(address) as client:
        options = {"max_tokens": int(max_tokens), "temperature": 0, "ignore_eos": True}
        events = client.generate(prompt, resumable=scenario != "answer", **options)
        for event in events:
            if isinstance(event, Delta):
                sys.stdout.buffer.write(event.text.encode())
                sys.stdout.buffer.flush()
                if scenario == "cancel":
                    events.cancel()
                if scenario == "leave":
                    events.close()
                if scenario == "slow":
                    time.sleep(0.02)
        client.status()


if __name__ == "__main__":
    words = sys.argv[1:]
    if len(words) == 5:
        next(mistake for mistake in MISTAKES if mistake.__name__ == words.pop(0))()
    try:
        main(*words)
    except DaemonError as error:
        sys.exit(print(f"error: {error.code}", file=sys.stderr) or 3)
