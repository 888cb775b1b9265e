"""Makes SmolLM2-135M-Instruct in Q4_0, which has packed kernels on ARM (the catalogue's Q4_1 has none), or in F16.

python model.py Q4_0|F16 TARGET.gguf
"""

from __future__ import annotations

import ctypes
import os
import sys

from llama_cpp import llama_cpp

from edge_rt import model_hub

_TYPES = {"F16": 1, "Q4_0": 2}  # enum llama_ftype

if __name__ == "__main__":
    kind, target = sys.argv[1:]
    part = f"{target}.part"
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = _TYPES[kind], True
    source = model_hub.fetch_model(model_hub.DEFAULT)
    if status := llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(part), ctypes.byref(params)):
        sys.exit(f"libllama could not make {kind} from {source} (status {status})")
    os.replace(part, target)
