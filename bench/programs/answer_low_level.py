"""The same with the low-level bindings and nothing that can be left out: the chat template is written by hand.

Usage: answer_low_level.py MODEL PROMPT THREADS
"""

import ctypes
import os
import sys

from llama_cpp import llama_cpp as llama

quiet = llama.llama_log_callback(lambda *_: None)
llama.llama_log_set(quiet, ctypes.c_void_p(0))
model = llama.llama_model_load_from_file(os.fsencode(sys.argv[1]), llama.llama_model_default_params())
params = llama.llama_context_default_params()
params.n_threads = params.n_threads_batch = int(sys.argv[3])
context = llama.llama_init_from_model(model, params)
vocab = llama.llama_model_get_vocab(model)

text = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    f"<|im_start|>user\n{sys.argv[2]}<|im_end|>\n<|im_start|>assistant\n"
).encode()
tokens = (llama.llama_token * (len(text) + 1))()
count = llama.llama_tokenize(vocab, text, len(text), tokens, len(tokens), False, True)
assert llama.llama_decode(context, llama.llama_batch_get_one(tokens, count)) == 0
greedy = llama.llama_sampler_init_greedy()
token = llama.llama_sampler_sample(greedy, context, -1)
piece = ctypes.create_string_buffer(64)
length = llama.llama_token_to_piece(vocab, token, piece, len(piece), 0, False)
sys.stdout.buffer.write(piece.raw[:length])
sys.stdout.buffer.flush()
