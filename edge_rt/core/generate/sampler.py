"""Choosing the next token: libllama's samplers in llama.cpp's order, and a short cut for greedy decoding.

    logit bias -> penalties -> DRY -> top-k -> typical -> top-p -> min-p -> temperature -> draw

Sampling is strictly in sequence: a token is sampled from its logits only after every token before it was accepted, whether the
logits came one row at a time or as the rows of a verified draft. Each call draws from the random numbers the same number of
times for the same history and logits, so speculation changes nothing:

    for row, drafted in zip(logits, [*draft, None]):
        token = sampler.sample(row)
        sampler.accept(token)
        if token != drafted: break          # rows after this one are not sampled

Temperature 0 takes the likeliest token after bias, penalties and grammar (ties: the lowest id); the cuts (top-k and the others)
could not change it and are left out.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from edge_rt.errors import ConstraintError, NativeError, OptionError
from edge_rt.native import samplers
from edge_rt.native.llama import c, check_llama_abi
from edge_rt.native.samplers import Candidates, Chain, likeliest
from edge_rt.types import SamplingParams

if TYPE_CHECKING:
    from edge_rt.core.engine import Row
    from edge_rt.native.llama import Vocab
    from edge_rt.structured.grammar import Constraint

GREEDY_BELOW = 1e-6
"""Temperatures under this are greedy: dividing logits by them overflows, and nothing but the likeliest token could be drawn."""

NEVER = 1e-30
"""Times as likely as the likeliest token: less cannot be drawn (random numbers have 53 bits)."""

_RANGES: dict[str, tuple[type, float, float, str]] = {
    "temperature": (float, -1.0, 1000.0, "0 (greedy) to 1000"),
    "top_k": (int, -1, 2**31 - 1, "0 (off) or more"),
    "top_p": (float, 0.0, 1.0, "0 to 1 (off)"),
    "min_p": (float, 0.0, 1.0, "0 (off) to 1"),
    "typical_p": (float, 0.0, 1.0, "0 to 1 (off)"),
    "repeat_penalty": (float, 0.01, 100.0, "0.01 to 100, 1 is off"),
    "repeat_last_n": (int, -1, 2**31 - 1, "0 (off) or more tokens, -1 for the whole context"),
    "frequency_penalty": (float, -100.0, 100.0, "-100 to 100, 0 is off"),
    "presence_penalty": (float, -100.0, 100.0, "-100 to 100, 0 is off"),
    "dry_multiplier": (float, 0.0, 100.0, "0 (off) to 100"),
    "dry_base": (float, 1.0, 100.0, "1 to 100"),
    "dry_allowed_length": (int, 0, 2**31 - 1, "0 or more tokens"),
    "dry_penalty_last_n": (int, -1, 2**31 - 1, "0 (off) or more tokens, -1 for the whole context"),
}
MAX_BIAS = 1e6


def check_params(params: SamplingParams, n_vocab: int) -> None:
    """Raise OptionError for the first parameter that is out of range, naming it, its value and what is allowed."""
    for name, (kind, low, high, allowed) in _RANGES.items():
        value: Any = getattr(params, name)
        right = isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
        if not right or not low <= value <= high:  # NaN compares false
            raise OptionError(f"{name} is {value!r}; allowed: {allowed}")
    seed = params.seed
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral) or not -1 <= seed < 2**32):
        raise OptionError(f"seed is {seed!r}; allowed: 0 to {2**32 - 2}, or none for a fresh one")
    for token, bias in params.logit_bias.items():
        if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= token < n_vocab:
            raise OptionError(f"logit_bias names token {token!r}; allowed: 0 to {n_vocab - 1}")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not (abs(bias) <= MAX_BIAS or bias == -math.inf):
            raise OptionError(f"logit_bias of token {token} is {bias!r}; allowed: {-MAX_BIAS:.0f} to {MAX_BIAS:.0f}, or -inf to ban it")


def _window(last_n: int, context: int) -> int:
    """Tokens a penalty looks back on: -1 is the whole context, and more than that is never needed."""
    return context if last_n < 0 else min(last_n, context)


class Sampler:
    """Chooses tokens for one sequence. Not for use by two threads at once."""

    def __init__(
        self,
        vocab: Vocab,
        params: SamplingParams,
        constraint: Constraint | None = None,
        *,
        context: int | None = None,
        ban_eog: bool = False,
    ) -> None:
        """``context``: cells a sequence may use, for windows of -1 (None: what the model was trained for).

        ``ban_eog``: never choose a token that ends the generation. ``constraint`` is copied, and can serve other samplers too.
        Raises OptionError for a parameter out of range.
        """
        check_params(params, vocab.n_tokens)
        self._vocab, self.params, self._n_vocab = vocab, params, vocab.n_tokens
        fresh = params.seed is None or params.seed in (-1, samplers.DEFAULT_SEED)  # llama.cpp's -1
        # Not the secrets module: it loads OpenSSL, at every start.
        self.seed: int = int.from_bytes(os.urandom(8), "little") % samplers.DEFAULT_SEED if fresh else int(params.seed)  # type: ignore[arg-type]
        self._greedy = params.temperature < GREEDY_BELOW
        self._constraint = constraint.clone() if constraint is not None else None
        biases = self._biases(ban_eog)
        stages, self._looks_back = self._history_stages(context or vocab.train_context or 4096, biases)
        self._chain: Chain | None = None
        if not self._greedy or stages or self._constraint is not None:
            self._chain = Chain.of([*stages, *self._choice_stages()], vocab.keep_alive)
        self._argmax = self._greedy and not stages
        # Where nothing but biases that take away changes logits, the likeliest token is the choice unless it has one.
        only_lower = self._greedy and len(stages) == bool(biases) and all(bias <= 0 for bias in biases.values())
        self._lowered = biases.keys() if only_lower else None
        self._candidates: Candidates | None = None  # made when they are needed: that takes two milliseconds
        self._sampled: int | None = None  # what the constraint is known to allow next
        self._began = False

    def _biases(self, ban_eog: bool) -> dict[int, float]:
        """What is added to the logits of some tokens."""
        biases = {int(token): float(bias) for token, bias in self.params.logit_bias.items()}
        biases.update(dict.fromkeys(self._vocab.suppressed_tokens(), -math.inf))
        if ban_eog:
            biases.update(dict.fromkeys(self._vocab.eog_tokens(), -math.inf))
        return biases

    def _history_stages(self, context: int, biases: Mapping[int, float]) -> tuple[list[int], int]:
        """Samplers that change logits, and on how many tokens they look back."""
        p, stages, looks_back = self.params, [], 0
        if biases:
            stages.append(samplers.logit_bias(self._n_vocab, biases))
        last_n = _window(p.repeat_last_n, context)
        if last_n and (p.repeat_penalty, p.frequency_penalty, p.presence_penalty) != (1.0, 0.0, 0.0):
            check_llama_abi()  # its arguments differ between versions, and an adopted vocabulary's version may be unknown
            stages.append(c.sampler_init_penalties(self._n_vocab, last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty))
            looks_back = last_n
        last_n = _window(p.dry_penalty_last_n, context)
        if last_n and p.dry_multiplier:
            stages.append(samplers.dry(self._vocab, p.dry_multiplier, p.dry_base, p.dry_allowed_length, last_n))
            looks_back = max(looks_back, last_n)
        return stages, looks_back

    def _choice_stages(self) -> list[int]:
        """Samplers that narrow the candidates and pick one."""
        p = self.params
        if self._greedy:
            return [c.sampler_init_greedy()]
        stages = []
        if p.top_k > 0:
            stages.append(c.sampler_init_top_k(min(p.top_k, self._n_vocab)))
        if p.typical_p < 1:
            # libllama sorts by p log p here, which is NaN where a probability is 0: behind a ban, a grammar, a wide gap.
            stages += [c.sampler_init_min_p(NEVER, 0), c.sampler_init_typical(p.typical_p, 0)]
        if p.top_p < 1:
            stages.append(c.sampler_init_top_p(p.top_p, 0))
        if p.min_p > 0:
            stages.append(c.sampler_init_min_p(p.min_p, 0))
        return [*stages, c.sampler_init_temp(p.temperature), c.sampler_init_dist(self.seed)]

    # ---- one token ---------------------------------------------------------------------------------------------------

    def sample(self, logits: Row) -> int:
        """Choose a token from float32 logits [n_vocab]. The state changes only by the random numbers drawn; call ``accept`` next.

        Raises NativeError if the logits hold NaN or +inf or nothing else than -inf, ConstraintError if the grammar allows none.
        """
        best = self._best(logits)
        plain = self._argmax or (self._lowered is not None and best not in self._lowered)
        token = best if plain else self._choose(logits)
        if self._constraint is not None and not self._constraint.allows(token):
            token = self._choose_allowed(logits)
        self._sampled = token
        return token

    def _best(self, logits: Row) -> int:
        """The likeliest token (ties: the lowest id), after looking at what no sampler can cope with."""
        if logits.shape != (self._n_vocab,):
            raise NativeError(f"logits have shape {logits.shape}, this vocabulary has {self._n_vocab} tokens")
        best = likeliest(logits, more=self._began)
        self._began = True
        if not math.isfinite(logits[best]):
            raise NativeError(f"the logits hold {logits[best]} at token {best}; the model file or the computation is damaged")
        return best

    def _choose(self, logits: Row) -> int:
        candidates, chain = self._scratch()
        candidates.fill(logits)
        return self._apply(chain, candidates)

    def _choose_allowed(self, logits: Row) -> int:
        """The first choice was against the grammar: apply the grammar to all candidates and choose again (as llama.cpp does)."""
        candidates, chain = self._scratch()
        candidates.fill(logits)
        if self._constraint is None or not self._constraint.apply(candidates):
            raise ConstraintError("no token of this model's vocabulary fits the grammar here; rewrite the grammar")
        return self._apply(chain, candidates)

    def _scratch(self) -> tuple[Candidates, Chain]:
        if self._chain is None:
            raise NativeError("this sampler was closed")
        if self._candidates is None:
            self._candidates = Candidates(self._n_vocab)
        return self._candidates, self._chain

    @staticmethod
    def _apply(chain: Chain, candidates: Candidates) -> int:
        chain.apply(candidates)
        token, logit = candidates.selected()
        if not math.isfinite(logit):
            raise ConstraintError("every token is banned here, by the logit biases or together with the grammar; allow some")
        return token

    def accept(self, token: int, *, prompt: bool = False) -> None:
        """Take a token into the history; usually what ``sample`` returned.

        ``prompt``: it belongs to the prompt, which the penalties look back on too (as in llama.cpp), but the grammar does not describe.
        Raises OptionError for a token out of range, ConstraintError if the grammar forbids it.
        """
        if not 0 <= token < self._n_vocab:
            raise OptionError(f"token {token} is out of range; this model has tokens 0 to {self._n_vocab - 1}")
        if self._constraint is not None and not prompt:
            if token != self._sampled and not self._constraint.allows(token):
                raise ConstraintError(f"token {token} does not fit the grammar here")
            self._constraint.accept(token)
        self._sampled = None
        if self._looks_back and self._chain is not None:
            self._chain.accept(token)

    def read(self, prompt: Sequence[int]) -> None:
        """Take a whole prompt: ``accept`` of each token, but for those on which nothing looks back. Raises OptionError."""
        for token in (min(prompt, default=0), max(prompt, default=0)):
            if not 0 <= token < self._n_vocab:
                raise OptionError(f"token {token} is out of range; this model has tokens 0 to {self._n_vocab - 1}")
        for token in prompt[max(0, len(prompt) - self._looks_back) :]:
            self.accept(token, prompt=True)

    # ---- state -------------------------------------------------------------------------------------------------------

    def clone(self) -> Sampler:
        """A copy with the same state, random numbers included, which then goes its own way."""
        copy: Sampler = object.__new__(Sampler)
        copy.__dict__.update(self.__dict__)
        copy.params = self.params
        copy._constraint = self._constraint.clone() if self._constraint is not None else None
        copy._chain = self._chain.clone() if self._chain is not None else None
        copy._candidates = None
        return copy

    def reset(self) -> None:
        """Back to the start: empty history, the same seed, the grammar at its beginning."""
        if self._chain is not None:
            self._chain.reset()
        if self._constraint is not None:
            self._constraint.reset()
        self._sampled = None

    def close(self) -> None:
        """Free what is native; twice is harmless."""
        if self._chain is not None:
            self._chain.close()
        if self._constraint is not None:
            self._constraint.close()
        self._chain = self._constraint = self._candidates = self._lowered = None
