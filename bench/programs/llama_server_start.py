"""llama.cpp's own server, from the xllamacpp package, until standard input ends: MODEL PORT THREADS CONTEXT."""

import sys

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.port = int(sys.argv[2])
params.cpuparams.n_threads = int(sys.argv[3])
params.n_ctx = int(sys.argv[4])
params.verbosity = -1
server = xllamacpp.Server(params)
sys.stdin.read()
