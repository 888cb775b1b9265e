"""Greedy tokens after a prompt, and the logits after every token of a given text, for comparison between processors.

``tokens``: the prompt's and the answer's. ``logits``: float32 [tokens, n_vocab] after each of the reference's tokens, or of these.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

import edge_rt


def main() -> None:
    """Open, answer, feed the text, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", help="file to save to, .npz")
    parser.add_argument("prompt")
    parser.add_argument("count", type=int, help="tokens of the answer; 0: none is made")
    parser.add_argument("--reference", help="file of another processor: compute the logits of its tokens")
    parser.add_argument("--plain", action="store_true", help="use the kernels for weights as they are in the file")
    parser.add_argument("--device")
    asked = parser.parse_args()
    start = time.monotonic()
    with edge_rt.open(asked.model, threads=2, pack=not asked.plain, device=asked.device) as model:
        opened = time.monotonic()
        prompt = model.prompt_tokens(asked.prompt)
        answer: list[int] = []
        if asked.count:
            with model.session() as session:
                events = session.generate(asked.prompt, max_tokens=asked.count, temperature=0, ignore_eos=True)
                answer = [token for event in events for token in getattr(event, "tokens", ())]
        answered = time.monotonic()
        tokens = [*prompt, *answer]
        text = np.load(asked.reference)["tokens"].tolist() if asked.reference else tokens
        logits = model.logits(text)
        packed = sum(unit.packed for unit in model.engine.units())  # type: ignore[attr-defined]
        print(f"{model.info.engine} on {model.info.device}, {packed} units packed: open {opened - start:.1f} s, "
              f"logits of {len(text)} tokens {time.monotonic() - answered:.1f} s")  # fmt: skip
        if answer:
            print(f"answer: {model.detokenize(answer)!r}")
    np.savez(asked.out, tokens=np.array(tokens), logits=logits)


if __name__ == "__main__":
    main()
