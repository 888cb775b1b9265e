"""llama.cpp's own server, from the xllamacpp package, until standard input ends.

MODEL PORT THREADS CONTEXT [SLOTS on|off unified|apart repacked|plain], the last four of how it is at its best with many clients.
"""

import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port = int(sys.argv[2])
params.cpuparams.n_threads = int(sys.argv[3])
params.n_ctx = int(sys.argv[4])
params.verbosity = -1
if len(sys.argv) > 5:
    slots, flash, cells, weights = int(sys.argv[5]), *sys.argv[6:9]
    kinds = xllamacpp.llama_flash_attn_type
    params.cpuparams_batch.n_threads = params.cpuparams.n_threads
    params.n_parallel, params.n_ctx = slots, slots * params.n_ctx
    params.flash_attn_type = kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash == "on" else kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.kv_unified, params.no_extra_bufts, params.cache_ram_mib = cells == "unified", weights == "plain", 0
server = xllamacpp.Server(params)
sys.stdin.read()
