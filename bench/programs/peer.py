"""libllama through llama-cpp-python's low-level bindings: load a model, feed a prompt, decode; prints what ours.py prints.

Usage: peer.py MODEL PROMPT_TOKENS NEW_TOKENS THREADS default|mapped
``default`` is libllama's own choice (repacked weights); ``mapped`` runs straight from the mapped file.
"""

import ctypes
import json
import os
import sys
import time

import numpy as np
from llama_cpp import llama_cpp as llama


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


path, prompt_tokens, new_tokens, threads, mode = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
quiet = llama.llama_log_callback(lambda *_: None)
llama.llama_log_set(quiet, ctypes.c_void_p(0))
llama.llama_backend_init()

start = time.perf_counter()
model_params = llama.llama_model_default_params()
if mode == "mapped":
    model_params.use_extra_bufts, model_params.load_mode = False, llama.LLAMA_LOAD_MODE_MMAP
model = llama.llama_model_load_from_file(os.fsencode(path), model_params)
params = llama.llama_context_default_params()
params.n_threads = params.n_threads_batch = threads
context = llama.llama_init_from_model(model, params)
opened = time.perf_counter()
private_open = private_memory()

resumed = time.perf_counter()
n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))


def feed(tokens: list[int]) -> int:
    """Append tokens and return the likeliest next one."""
    ids = (llama.llama_token * len(tokens))(*tokens)
    assert llama.llama_decode(context, llama.llama_batch_get_one(ids, len(tokens))) == 0
    return int(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), shape=(n_vocab,)).argmax())


token = feed(list(range(100, 100 + prompt_tokens)))
first, read_first = time.perf_counter(), disk_reads()
for _ in range(new_tokens):
    token = feed([token])
end = time.perf_counter()

print(
    json.dumps(
        {
            "open": opened - start,
            "first_token": opened - start + first - resumed,
            "decode": (end - first) / max(1, new_tokens),
            "decode_read": disk_reads() - read_first,
            "private_open": private_open,
            "private_end": private_memory(),
        }
    )
)
