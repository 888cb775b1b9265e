"""edge-rt: open a model, feed a prompt, decode; prints times in seconds and private memory in bytes as JSON.

Usage: ours.py MODEL PROMPT_TOKENS NEW_TOKENS [MEMORY_BYTES]
"""

import json
import sys
import time

import numpy as np

import edge_rt
import edge_rt.core.ggml_engine
import edge_rt.core.gguf.reader
import edge_rt.model  # opening a model imports these: the other program, too, has its imports behind it when the clock starts
import edge_rt.plugin_host.registry
from edge_rt.hooks import SequenceBatch
from edge_rt.native import llama

llama.initialise()


def private_memory() -> int:
    """RssAnon of this process in bytes."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def disk_reads() -> int:
    """Bytes this process has had read from disk (0 where the system does not say)."""
    try:
        with open("/proc/self/io") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))
    except OSError:
        return 0


path, prompt_tokens, new_tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
memory = int(sys.argv[4]) if len(sys.argv) > 4 else None

start = time.perf_counter()
model = edge_rt.open(path, memory=memory)
opened = time.perf_counter()
model.tokenize("text")  # waits for the vocabulary, which loads beside the rest
ready = time.perf_counter()
private_open = private_memory()

resumed = time.perf_counter()
engine = model.engine
sequence = engine.new_sequence()


def feed(tokens: list[int]) -> int:
    """Append tokens and return the likeliest next one."""
    (logits,) = engine.step([SequenceBatch(sequence, tokens)])
    assert logits is not None
    return int(np.asarray(logits[0]).argmax())


token = feed(list(range(100, 100 + prompt_tokens)))
first, read_first = time.perf_counter(), disk_reads()
for _ in range(new_tokens):
    token = feed([token])
end = time.perf_counter()

pager = getattr(engine, "pager", None)
print(
    json.dumps(
        {
            "open": opened - start,
            "text": ready - start,
            "first_token": ready - start + first - resumed,
            "decode": (end - first) / max(1, new_tokens),
            "decode_read": disk_reads() - read_first,
            "private_open": private_open,
            "private_end": private_memory(),
            "streamed": pager.streamed_bytes if pager else 0,
            "read": pager.read if pager else 0,
            "notices": model.notices,
        }
    )
)
