"""`serve-isolation`: what one conversation hears of another. Nothing, whatever happens between their turns."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import edge_rt
from bench import models
from bench.results import Result, Settings
from bench.serve.conversations import KEYS, Conversation, Refused, Turn, begin, metrics
from bench.serve.served import NO_RATE, Served, free_port, quantile, worker
from bench.serve.tally import Tally
from edge_rt.daemon.client import Client
from edge_rt.errors import DaemonError

TURNS = 1000
_KINDS = ("socket", "socket", "socket", "tcp", "tcp", "tcp", "http", "http")
"""Eight sessions of three users."""
_AT_ONCE = 4
_CONTEXT = 512
_LONGEST = 40
"""Messages after which a conversation ends and another begins: about three times what the context holds."""
_TOKENS = 20
_EXPECTED = ("worker_died", "session_lost", "cancelled")
TIE = 1.0
"""Logits by which a token may be behind the best of a fresh process: so much the kernels for one token and for many differ."""
_LEAK = "no other's word was heard"


class Soak:
    """The conversations, all words there ever were, and what was checked."""

    def __init__(self, daemon: Served, port: int, seed: int) -> None:
        self.daemon, self.chance, self.tally = daemon, random.Random(seed), Tally()
        self._addresses = {"socket": str(daemon.socket), "tcp": f"tcp:127.0.0.1:{port}", "http": ""}
        self.words: set[str] = set()
        self._probed: set[tuple[str, str]] = set()
        self.did: Counter[str] = Counter()
        self.turns: list[Turn] = []
        self.conversations = [self._new(kind) for kind in _KINDS]

    def _new(self, kind: str) -> Conversation:
        found = begin(kind, self.daemon, self._addresses[kind], self.chance)
        self.words.add(found.word)
        return found

    def heard(self, one: Conversation | None, text: str) -> None:
        """No word of others may be in what somebody was told, nor the first letters of one."""
        own = None if one is None else one.word
        found = [word for word in self.words if word != own and word[:6] in text]
        self.tally.check(_LEAK, not found, f"{one and one.user}: {found[:3]} in {text[:300]!r}")

    # ---- what a turn may be ------------------------------------------------------------------------------------------

    def turn(self, one: Conversation, what: str, seed: int) -> None:
        """One turn of a conversation; what goes wrong because the worker was ended is mended."""
        chance = random.Random(seed)
        try:
            _TURNS[what](self, one, chance)
        except (Refused, DaemonError) as error:
            self.heard(one, str(error))
            self._mend(one, error)

    def _mend(self, one: Conversation, error: Refused | DaemonError) -> None:
        self.did[f"({error.code})"] += 1
        self.tally.check("errors as expected", error.code in _EXPECTED, f"{one.user}: {error.code}: {error}")
        if error.code == "session_lost":
            one.open()

    def _took(self, one: Conversation, turn: Turn) -> None:
        """An answer becomes a part of the conversation."""
        self.heard(one, turn.heard)
        self.turns.append(turn)
        if turn.text:
            one.messages = [*turn.messages, {"role": "assistant", "content": turn.text}]

    def plain(self, one: Conversation, chance: random.Random) -> None:
        """A question and its answer."""
        self._took(one, one.ask(one.question(chance), _TOKENS))

    def pruned(self, one: Conversation, chance: random.Random) -> None:
        """With fewer cells than tokens."""
        turn = one.ask(one.question(chance), _TOKENS, prune={"budget": 96, "unit": "cells"})
        self._took(one, turn._replace(whole=False))

    def cancelled(self, one: Conversation, chance: random.Random) -> None:
        """Left in the middle."""
        self.heard(one, one.ask(one.question(chance), 200, leave_after=chance.randrange(1, 8)).heard)

    def cloned(self, one: Conversation, chance: random.Random) -> None:
        """Another question in a clone, then one here."""
        if one.session is not None:
            with one.session.clone() as other:
                self._aside(one, one.ask(one.question(chance), _TOKENS, session=other))
        self.plain(one, chance)

    def restored(self, one: Conversation, chance: random.Random) -> None:
        """Saved, and gone on with from the file."""
        if one.session is not None and one.client is not None:
            before, name = one.session, f"{one.word}-{chance.randrange(3)}"
            before.save(name)
            one.session = one.client.restore(name)
            before.close()
        self.plain(one, chance)

    def _aside(self, one: Conversation, turn: Turn) -> None:
        self.heard(one, turn.heard)
        self.turns.append(turn)

    # ---- between turns -----------------------------------------------------------------------------------------------

    def probe(self, one: Conversation, other: Conversation) -> None:
        """Ask with another user's words, and for its sessions: neither the answer nor the tokens reused may tell anything.

        Once for each user and word: what it has asked itself may serve it again.
        """
        if (one.user, other.word) in self._probed:
            return
        self._probed.add((one.user, other.word))
        try:
            turn = one.fresh(other.messages)
        except Refused as error:
            self._mend(one, error)
            return
        self.tally.check("0 tokens reused of another user's", turn.reused == 0, f"{one.user} asked {other.user}'s: {turn.reused}")
        if one.client is None or other.session is None:
            return
        for op, fields in (
            ("generate", {"prompt": "x", "session": other.session.id}), ("clone_session", {"session": other.session.id}),
            ("save_session", {"session": other.session.id, "name": "stolen"}), ("close_session", {"session": other.session.id}),
            *(("restore_session", {"name": f"{other.word}-{number}"}) for number in range(3)),
        ):  # fmt: skip
            code = "ok"
            try:
                one.client.call(op, **fields)
            except DaemonError as error:
                code = error.code
                self.heard(one, str(error).replace(f"{other.word}-", ""))  # the name it has given itself
            refused = ("session_file",) if op == "restore_session" else ("no_such_session",)
            self.tally.check("another user's session refused", code in refused, f"{one.user} {op} of {other.user}'s: {code}")

    def again(self, index: int) -> None:
        """End a conversation. Its beginning, asked again by its user, is quick, which shows that the probe could see it."""
        one = self.conversations[index]
        client, kind = one.client, one.user
        for other in self.conversations:
            if other.user != kind:
                self.probe(other, one)
        if client is not None and one.session is not None:
            one.session.close()
            one.session = None
            try:
                one.fresh(one.messages[:2])  # what was in the session may be pruned, or its beginning evicted
                turn = one.fresh(one.messages[:2])
                self.tally.check("one's own beginning reused", turn.reused >= 16, f"{turn.reused} tokens")
            except Refused as error:
                self._mend(one, error)
        one.close()
        self.conversations[index] = self._new(kind)

    def close(self) -> None:
        """All leave."""
        for one in self.conversations:
            one.close()


_TURNS: dict[str, Callable[[Soak, Conversation, random.Random], None]] = {
    "plain": Soak.plain, "pruned": Soak.pruned, "cancelled": Soak.cancelled, "cloned": Soak.cloned, "restored": Soak.restored,
}  # fmt: skip
_OFTEN = (10, 2, 2, 3, 3)


def run(settings: Settings) -> list[Result]:
    """Turns, several at a time; then every answer is looked at by a fresh process."""
    turns, model = settings.items or settings.pick(TURNS, 48), models.smollm2(settings, "Q4_1")
    port = free_port()
    config = f'key_file = "tcp.key"\n{NO_RATE}[http]\nkey_file = "http.key"\n'
    daemon = Served(model, "-c", str(_CONTEXT), "--listen", f"tcp:127.0.0.1:{port}", http=True, config=config)
    for name, key in KEYS.items():
        path = daemon.folder / f"{name}.key"
        path.touch(0o600)
        path.write_text(key)
    with daemon, daemon.ready() as client:
        soak = Soak(daemon, port, seed=11)
        try:
            _talk(soak, client, turns)
        finally:
            soak.close()
        soak.tally.check("daemon alive", daemon.alive and "Traceback" not in daemon.log(), daemon.log()[-400:])
    return [_crossing(soak, turns), _equal(soak, model, settings)]


def _talk(soak: Soak, client: Client, turns: int) -> None:
    """Waves of turns at once; between them conversations end, workers are killed, and users ask for what is others'."""
    chance, done, told = soak.chance, 0, 0
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        while done < turns:
            chosen = chance.sample(soak.conversations, _AT_ONCE)
            what = chance.choices(list(_TURNS), _OFTEN, k=_AT_ONCE)
            waiting = [pool.submit(soak.turn, one, kind, chance.randrange(1 << 30)) for one, kind in zip(chosen, what, strict=True)]
            if chance.random() < 0.04:
                time.sleep(chance.random() * 0.5)
                os.kill(worker(client)["pid"], signal.SIGKILL)
                soak.did["worker killed"] += 1
            for turn in waiting:
                turn.result()
            soak.did.update(what)
            done += len(chosen)
            if chance.random() < 0.2:
                one, other = chance.sample(soak.conversations, 2)
                if one.user != other.user and other.messages[1:]:
                    soak.probe(one, other)
            for index, one in enumerate(soak.conversations):
                if len(one.messages) > _LONGEST:
                    soak.again(index)
            soak.heard(None, repr(client.status()) + metrics(soak.daemon))
            if done - told >= 100:
                told = done
                print(f"    {done:,} turns, {len(soak.words)} words, {sum(soak.tally.failures.values())} checks failed", flush=True)
        for index in range(len(soak.conversations)):
            if soak.conversations[index].messages[1:]:
                soak.again(index)


def _crossing(soak: Soak, turns: int) -> Result:
    kinds = list(soak.tally.counts)
    what = ", ".join(f"{name} {count}" for name, count in sorted(soak.did.items()))
    evicted = sum(not turn.whole for turn in soak.turns)
    notes = [
        f"{turns:,} turns, {_AT_ONCE} at a time, in 8 sessions of 3 users (peer credentials, a key on TCP, a key on HTTP); {what}",
        f"{evicted:,} answers with a part of the conversation out of the context; {len(soak.words)} words; answers, notices, errors, "
        "status and metrics are searched for each but one's own, in whole and by its first six letters",
    ]
    return soak.tally.result("cross-talk between conversations", "none", kinds, notes)


def _equal(soak: Soak, path: Path, settings: Settings) -> Result:
    """Every token of every answer with the whole conversation in its context, against logits of a process that knows nothing else."""
    import numpy as np

    checked = best = 0
    behind: list[float] = []
    worst = ""
    wanted = [turn for turn in soak.turns if turn.whole and turn.text]
    with edge_rt.open(path, context=_CONTEXT) as model:
        for turn in wanted:
            if time.monotonic() > settings.deadline + 1200:
                break
            prompt = model.prompt_tokens(turn.messages)
            answer = list(turn.tokens) or model.tokenize(turn.text, bos=False)
            logits = model.logits([*prompt, *answer])[len(prompt) - 1 : -1]
            margins = logits.max(axis=1) - logits[np.arange(len(answer)), answer]
            checked += len(answer)
            best += int((margins == 0).sum())
            behind += [float(margin) for margin in margins if margin > 0]
            if behind and max(behind) == float(margins.max()) and margins.max() > TIE:
                worst = f"{margins.max():.2f} behind: {turn.text!r}"
    most = max(behind, default=0.0)
    shown = f"{best:,} of {checked:,} tokens are the best of a fresh process, the others {most:.2f} logits behind at most"
    notes = [
        f"{len(wanted):,} of {len(soak.turns):,} answers: those with the whole conversation in the context, and without pruning. How many "
        "tokens are computed at once depends on who else asks, and kernels for one and for many round differently: so ties may be broken "
        "otherwise",
        *([f"behind: p50 {quantile(behind, 0.5):.2f}, p99 {quantile(behind, 0.99):.2f}"] if behind else []), *([worst] if worst else []),
    ]  # fmt: skip
    name = "greedy answers among others, against a fresh process"
    return Result(name, f"≤ {TIE:g} logits behind", "logits", behind, ok=checked > 0 and most <= TIE, shown=shown, notes=notes)
