"""libllama's samplers and grammars: candidates in, one token out. Prototypes are those of llama.cpp at ggml 0.25.3.

libllama aborts the process when a grammar accepts a token it does not allow, and lets C++ exceptions through when memory for a
penalty window cannot be had: callers check both before (core/generate/sampler.py).
"""

from __future__ import annotations

import ctypes as C
import math
import sys
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edge_rt.errors import ConstraintError, NativeError
from edge_rt.native.ggml import Handle
from edge_rt.native.llama import BOOL, F32, I32, SIZE, STR, U32, LogitBias, P, TokenData, TokenDataArray, Vocab, c

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

DEFAULT_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED: the library draws its own
DRY_BREAKERS = ("\n", ":", '"', "*")  # llama.cpp's default


class ChainParams(C.Structure):
    """struct llama_sampler_chain_params, by value."""

    _fields_ = (("no_perf", BOOL),)


# struct llama_sampler * llama_sampler_chain_init(struct llama_sampler_chain_params params);
c.declare("sampler_chain_init", P, ChainParams)
# void llama_sampler_chain_add(struct llama_sampler * chain, struct llama_sampler * smpl);  the chain owns smpl from then on
c.declare("sampler_chain_add", None, P, P)
# struct llama_sampler * llama_sampler_init_dist(uint32_t seed);
c.declare("sampler_init_dist", P, U32)
# struct llama_sampler * llama_sampler_init_top_p(float p, size_t min_keep);  and min_p, typical
for _name in ("top_p", "min_p", "typical"):
    c.declare(f"sampler_init_{_name}", P, F32, SIZE)
# struct llama_sampler * llama_sampler_init_temp(float t);
c.declare("sampler_init_temp", P, F32)
# struct llama_sampler * llama_sampler_init_penalties(int32_t n_vocab, int32_t penalty_last_n, float penalty_repeat,
#                                                     float penalty_freq, float penalty_present);
c.declare("sampler_init_penalties", P, I32, I32, F32, F32, F32)
# struct llama_sampler * llama_sampler_init_dry(const struct llama_vocab * vocab, float dry_multiplier, float dry_base,
#     int32_t dry_allowed_length, int32_t dry_penalty_last_n, const char ** seq_breakers, size_t num_breakers);
c.declare("sampler_init_dry", P, P, F32, F32, I32, I32, C.POINTER(STR), SIZE)
# struct llama_sampler * llama_sampler_init_logit_bias(int32_t n_vocab, int32_t n_logit_bias, const llama_logit_bias * logit_bias);
c.declare("sampler_init_logit_bias", P, I32, I32, C.POINTER(LogitBias))
# struct llama_sampler * llama_sampler_init_grammar(const struct llama_vocab * vocab, const char * grammar_str,
#                                                   const char * grammar_root);
c.declare("sampler_init_grammar", P, P, STR, STR)
# struct llama_sampler * llama_sampler_clone(const struct llama_sampler * smpl);
c.declare("sampler_clone", P, P)
# void llama_sampler_accept(struct llama_sampler * smpl, llama_token token);
c.declare("sampler_accept", None, P, I32)
# void llama_sampler_reset(struct llama_sampler * smpl);
c.declare("sampler_reset", None, P)


def likeliest(logits: memoryview[float] | npt.NDArray[np.float32], *, more: bool) -> int:
    """Where the largest of float32 [n] is: of equals the first; the first NaN, if there is any.

    ``more``: others will follow. One choice takes Python a millisecond (49,152 tokens) and NumPy two microseconds, after an import
    of 40 milliseconds: too much before the first token of a process, little beside what follows.
    """
    if more or "numpy" in sys.modules:
        import numpy as np

        return int(np.asarray(logits).argmax())
    values = logits.tolist()
    if math.isnan(sum(values)):  # a NaN, or both infinities
        first = next((i for i, value in enumerate(values) if math.isnan(value)), None)
        if first is not None:
            return first
    return int(values.index(max(values)))


class Candidates:
    """Every token with its logit, in the layout samplers take. One array, refilled for each choice: samplers reorder it."""

    def __init__(self, n_vocab: int) -> None:
        self._n = n_vocab
        self._data = (TokenData * n_vocab)()
        self._address = C.addressof(self._data)
        # Both NumPy and memoryviews copy into every third element. NumPy does so in 25 microseconds and not in 280 (49,152 tokens),
        # and is used as soon as it has been imported (see ``likeliest``).
        entries = memoryview(self._data).cast("B")
        self._ids: Any = array("i", range(n_vocab))
        self._id: Any = entries.cast("i")[::3]
        self.logit: Any = entries.cast("f")[1::3]  # after ``fill`` logit[i] is that of token i
        self._fast = False
        self.array = TokenDataArray(self._address, n_vocab, -1, False)

    def fill(self, logits: memoryview[float] | npt.NDArray[np.float32]) -> None:
        """Start over with these logits, [n_vocab]."""
        if not self._fast and "numpy" in sys.modules:
            import numpy as np

            self._ids, self._id, self.logit = np.asarray(self._ids), np.asarray(self._id), np.asarray(self.logit)
            self._fast = True
        self._id[:] = self._ids
        self.logit[:] = logits
        array = self.array
        array.data, array.size, array.selected, array.sorted = self._address, self._n, -1, False

    def selected(self) -> tuple[int, float]:
        """The chosen token and its logit after the samplers. Raises NativeError if none was chosen."""
        at = self.array.selected
        if not 0 <= at < self.array.size:
            raise NativeError(f"the sampler chose none of {self.array.size} candidates")
        chosen = TokenData.from_address(self.array.data + at * C.sizeof(TokenData))
        return chosen.id, chosen.logit


class Chain:
    """Samplers applied one after another, with their state: random numbers, windows of recent tokens."""

    def __init__(self, handle: Handle, keep_alive: object) -> None:
        self._handle, self._keep_alive = handle, keep_alive

    @classmethod
    def of(cls, stages: Sequence[int], keep_alive: object = None) -> Chain:
        """A chain of fresh samplers, which it owns from here on."""
        handle = Handle(c.sampler_chain_init(ChainParams(True)), c.sampler_free, "a sampler chain")
        for stage in stages:
            if not stage:
                raise NativeError("libllama could not create a sampler")
            c.sampler_chain_add(handle.address, stage)
        return cls(handle, keep_alive)

    def apply(self, candidates: Candidates) -> None:
        """Narrow the candidates and select one."""
        c.sampler_apply(self._handle.address, C.byref(candidates.array))

    def accept(self, token: int) -> None:
        """Tell every sampler which token was taken."""
        c.sampler_accept(self._handle.address, token)

    def reset(self) -> None:
        """Back to the state after creation, random numbers included."""
        c.sampler_reset(self._handle.address)

    def clone(self) -> Chain:
        """A copy with the same state, which then goes its own way."""
        return Chain(Handle(c.sampler_clone(self._handle.address), c.sampler_free, "a sampler chain"), self._keep_alive)

    def close(self) -> None:
        """Free it."""
        self._handle.close()


def logit_bias(n_vocab: int, biases: Mapping[int, float]) -> int:
    """A sampler that adds to the logits of some tokens."""
    entries = (LogitBias * len(biases))(*(LogitBias(token, bias) for token, bias in biases.items()))
    return int(c.sampler_init_logit_bias(n_vocab, len(biases), entries))


def dry(vocab: Vocab, multiplier: float, base: float, allowed_length: int, last_n: int) -> int:
    """A sampler that penalises repeating sequences, with llama.cpp's sequence breakers (14 ms for 49,152 tokens)."""
    breakers = (STR * len(DRY_BREAKERS))(*(text.encode() for text in DRY_BREAKERS))
    return int(c.sampler_init_dry(vocab.pointer, multiplier, base, allowed_length, last_n, breakers, len(breakers)))


class Grammar:
    """A GBNF grammar at some point of a text it describes."""

    def __init__(self, vocab: Vocab, handle: Handle) -> None:
        self._vocab, self._handle, self._keep_alive = vocab, handle, vocab.keep_alive

    @classmethod
    def parse(cls, vocab: Vocab, text: str) -> Grammar:
        """Parse a grammar whose start is ``root``. Raises ConstraintError.

        structured/grammar.py has checked the text: libllama prints its complaints to stderr and hangs on some grammars.
        """
        address = c.sampler_init_grammar(vocab.pointer, text.encode(), b"root")
        if not address:
            raise ConstraintError("libllama refuses this grammar; see llama.cpp's grammars/README.md for the syntax")
        return cls(vocab, Handle(address, c.sampler_free, "a grammar"))

    def apply(self, candidates: Candidates) -> bool:
        """Set the logits of tokens that cannot come next to -inf, in a freshly filled array; False if none is left."""
        c.sampler_apply(self._handle.address, C.byref(candidates.array))
        import numpy as np

        return bool(np.asarray(candidates.logit).max() > -np.inf)

    def allows(self, token: int) -> bool:
        """May this token come next?"""
        data = TokenData(token, 1.0, 0.0)
        c.sampler_apply(self._handle.address, C.byref(TokenDataArray(C.addressof(data), 1, -1, False)))
        return bool(data.logit == 1.0)

    def accept(self, token: int) -> None:
        """Go on past a token, which must be one that ``allows``: libllama aborts the process on any other."""
        c.sampler_accept(self._handle.address, token)

    def clone(self) -> Grammar:
        """A copy at the same point, which then goes its own way."""
        return Grammar(self._vocab, Handle(c.sampler_clone(self._handle.address), c.sampler_free, "a grammar"))

    def reset(self) -> None:
        """Back to the start of the text."""
        c.sampler_reset(self._handle.address)

    def close(self) -> None:
        """Free it."""
        self._handle.close()
