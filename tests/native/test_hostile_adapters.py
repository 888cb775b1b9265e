"""Damaged adapters: each is refused in good order, or runs. None ends the process, with either engine."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

MUTANTS = 400


def test_no_mutant_kills_the_process(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        env={**os.environ, "EDGE_RT_CACHE": str(tmp_path / "cache"), "GGML_NO_BACKTRACE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, f"mutant {len(lines)} killed the process: {result.stderr[-600:]}"
    kinds = Counter(line.split(" ")[0] for line in lines)
    assert kinds.total() == MUTANTS
    # NativeError: numbers that were read as another type are none.
    assert set(kinds) <= {"ran", "ModelFileError", "UnsupportedModel", "NativeError"}, kinds
    assert kinds["ran"] > MUTANTS // 20, kinds
    assert kinds["ModelFileError"] > MUTANTS // 4, kinds


def main(folder: Path) -> None:
    """One line for each mutant: what became of it."""
    from hostile_worker import mutate

    import edge_rt
    from edge_rt.errors import EdgeError
    from edge_rt.testing.random_models import LINEAR, write_random_adapter, write_random_model

    path = write_random_model(folder / "model.gguf", n_layer=1, n_embd=32, n_head=2, n_head_kv=1, n_ff=64, tied=False)
    for engine in ("ggml", "llama_cpp"):
        with edge_rt.open(path, engine=engine, threads=1, context=64) as model, model.session() as session:
            target = LINEAR + r"|output\.weight|token_embd\.weight"
            raw = write_random_adapter(folder / "adapter.gguf", model.file.header, target=target, rank=2).read_bytes()
            for number in range(MUTANTS // 2):
                mutant = folder / f"{engine}-{number}.gguf"
                mutant.write_bytes(mutate(raw, random.Random(number)))
                try:
                    model.adapters.open(str(number), mutant)
                    for _ in session.generate("Hello world, the answer is", adapter=str(number), max_tokens=2, ignore_eos=True):
                        pass
                    print("ran", flush=True)
                except EdgeError as error:
                    print(type(error).__name__, str(error).replace("\n", " ")[:100], flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
