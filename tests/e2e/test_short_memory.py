"""Six conversations where there is memory for two: parked and restored, they go on as if there were enough."""

import pytest
from worker_host import Host

ANIMALS = ("cat", "dog", "horse", "whale", "eagle", "snake")
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
CONTEXT = 1024


def say(host, animal, turn, answers):
    """The whole conversation up to this turn."""
    found = []
    for at in range(turn + 1):
        filler = f"I have a {animal}. " * 12
        found.append({"role": "user", "content": f"{filler if at == 0 else ''}Tell me fact {at + 1} about the {animal}."})
        if at < turn:
            found.append({"role": "assistant", "content": answers[animal][at]})
    return host.do("generate", messages=found, session=animal, credits=1000, options=GREEDY, owner="me")


def conversations(host, largest=None):
    answers = {animal: [] for animal in ANIMALS}
    reused = []
    for animal in ANIMALS:
        host.do("open_session", session=animal, owner="me")
    for turn in range(2):
        for animal in ANIMALS:
            number = say(host, animal, turn, answers)
            while host.answer(number) is None:
                host.step()
                if largest is not None:
                    largest.append(host.budget.held())
            assert "ok" in host.answer(number), host.answer(number)
            answers[animal].append(host.text(number))
            reused.append(host.used(number)["reused_tokens"])
    return answers, reused


@pytest.fixture(scope="module")
def plenty(smollm2):
    host = Host(smollm2, context=CONTEXT)
    yield conversations(host)
    host.worker._opened.close()


def test_parked_sessions_say_the_same(smollm2, plenty, tmp_path):
    host = Host(smollm2, context=CONTEXT, parked=tmp_path)
    allowance = 2 * host.engine.needed_bytes(None, 256) + host.engine.compute_bytes(256, 1, 1)
    host.ok("allow", bytes=allowance)
    largest = []
    assert conversations(host, largest) == plenty
    assert max(largest) <= allowance
    memory = host.ok("memory")
    assert memory["parked"] >= 4
    assert sum(unit["nbytes"] for unit in memory["units"]) > 90_000_000
    assert len([told for told in host.news if "parked" in told]) >= 8
    # All at once: two begin, the others wait, and each is answered.
    numbers = [host.ask(f"A {animal} " * 50, animal, max_tokens=5) for animal in ANIMALS]
    host.step()
    assert sum(bool(host.events(number, "queued")) for number in numbers) >= 3
    assert all("ok" in answer for answer in host.until(*numbers, seconds=300))
    assert host.budget.held() <= allowance
    host.ok("cool")
    assert host.ok("memory")["parked"] == 6
    host.worker._opened.close()
