"""Compares what two processors computed.

    python compare.py answers REFERENCE.npz EVENTS                 greedy tokens: of logits.py, and of `edge-rt run --json`
    python compare.py tokens EVENTS EVENTS                         greedy tokens of two runs of `edge-rt run --json`, which must be equal
    python compare.py logits REFERENCE.npz OTHER.npz [AGAIN.npz]   logits after the same text, as logits.py saves them
    python compare.py packed REFERENCE.npz OTHER.npz               packed bytes, as kernels.py saves them
    python compare.py files A.pack B.pack                          packed files of a whole model: what each tensor's bytes are

AGAIN is the reference's machine with its other kernels. Sums in another order move activations by a last bit, now and then that moves an
8-bit quant of them by one, and thirty layers make more of it: how far these two are apart says what is rounding, and what is not.
The exit status is 1 if it is not, or if bytes of one layout differ.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

FLOAT_APART = 0.05
"""Logits of a model with float weights, on average; the greatest is some 20. Cores with fp16 arithmetic sum up in half precision."""
AS_FAR = 2.0
"""Times as far on average as the reference's own kernels are apart."""
SURE = 2.0
"""Tokens may differ only where the two likeliest are closer than so many times what the logits there are apart."""


def answers(reference: str, events: str) -> bool:
    """Where greedy tokens part. They may: whether by more than rounding is for ``logits`` to say."""
    told = [json.loads(line) for line in Path(events).read_text(encoding="utf-8").splitlines()]
    other = [token for event in told if event["event"] == "delta" for token in event["tokens"]]
    expected = np.load(reference)["tokens"].tolist()[-len(other) :] if other else []
    equal = [a == b for a, b in zip(expected, other, strict=True)]
    times = told[-1]["timings"] if told[-1]["event"] == "done" else {}
    print(f"  edge-rt run on {told[0]['device']}: {''.join(event['text'] for event in told if event['event'] == 'delta')!r}")
    print(f"  {sum(equal)} of {len(equal)} greedy tokens equal" + ("" if all(equal) else f", the first {equal.index(False)} in a row")
          + f"; first token after {times.get('first_token', 0):.1f} s, {times.get('tokens_per_second', 0):.2f} tokens/s")  # fmt: skip
    return bool(other)


def tokens(first: str, second: str) -> bool:
    """Whether two runs answered with the same tokens."""
    found = [[token for event in map(json.loads, Path(path).read_text(encoding="utf-8").splitlines()) if event["event"] == "delta"
              for token in event["tokens"]] for path in (first, second)]  # fmt: skip
    equal = found[0] == found[1] != []
    print(f"  {len(found[1])} greedy tokens, {'all equal to those of the plain file' if equal else f'OTHERS: {found}'}")
    return equal


def logits(reference: str, other: str, again: str = "") -> bool:
    """How far the logits of the same text are apart."""
    a, b = np.load(reference), np.load(other)
    apart, most = np.abs(a["logits"] - b["logits"]), FLOAT_APART
    if again:
        own = np.abs(a["logits"] - np.load(again)["logits"])
        print(f"  this machine's packed and plain kernels are apart at most {own.max():.3f}, on average {own.mean():.4f}")
        most = AS_FAR * own.mean()
    print(f"  logits after {len(apart)} tokens: apart at most {apart.max():.3f}, on average {apart.mean():.4f}")
    good = bool(apart.mean() < most) and all(_excused(a["logits"][at], apart[at], at) for at in _otherwise(a, b))
    if not good:
        print("  THAT IS MORE THAN ROUNDING")
    return good


def _otherwise(a: Any, b: Any) -> list[int]:
    """Tokens of the text after which another one is likeliest."""
    return [int(at) for at in np.flatnonzero(a["logits"].argmax(-1) != b["logits"].argmax(-1))]


def _excused(row: np.ndarray[Any, Any], apart: np.ndarray[Any, Any], at: int) -> bool:
    second, first = np.sort(row)[-2:]
    print(f"  after token {at} another is likeliest: the reference's two likeliest are {first - second:.3f} apart, its logits from the "
          f"others up to {apart.max():.3f}")  # fmt: skip
    return bool(first - second < SURE * apart.max())


def packed(reference: str, other: str) -> bool:
    """Whether types that both pack in the same layout have the same bytes."""
    a, b = np.load(reference), np.load(other)
    both = sorted(name for name in set(a.files) & set(b.files) if ":" in name)  # the others are weights before packing
    unequal = [name for name in both if not np.array_equal(a[name], b[name])]
    verdict = f"BYTES DIFFER: {', '.join(unequal)}" if unequal else "the bytes are equal"
    print(f"  in one layout on both machines: {', '.join(both)}; {verdict}" if both else "  no layout is on both machines")
    return not unequal


def files(reference: str, other: str) -> bool:
    """Whether two packed files have the same tensors, in the same layout, with the same bytes."""
    a, b = _tensors(Path(reference)), _tensors(Path(other))
    unequal = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    print(f"  {len(a)} packed tensors made here, " + (f"{len(unequal)} DIFFER, first {unequal[0]}" if unequal else "all bytes equal"))
    return not unequal


def _tensors(path: Path) -> dict[str, tuple[object, ...]]:
    """Name -> (type, shape, layout, SHA-256) of a packed file's tensors (core/weights/repack.py)."""
    with path.open("rb") as file:
        _, length, _ = struct.unpack("<8sII", file.read(16))
        header = json.loads(file.read(length))
        found: dict[str, tuple[object, ...]] = {}
        for name, kind, shape, offset, nbytes, layout, _ in header["entries"]:
            file.seek(header["data_offset"] + offset)
            found[name] = kind, tuple(shape), layout, hashlib.sha256(file.read(nbytes)).hexdigest()
    return found


if __name__ == "__main__":
    comparisons: dict[str, Callable[..., bool]] = {"answers": answers, "tokens": tokens, "logits": logits, "packed": packed, "files": files}
    sys.exit(0 if comparisons[sys.argv[1]](*sys.argv[2:]) else 1)
