"""A second OpenMP program: libllama, which decodes, or reads prompts of so many tokens, until it is ended. A line says that it is at work.

Usage: openmp_neighbour.py MODEL THREADS TOKENS
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.contenders import Peer, PeerSetting

tokens = int(sys.argv[3])
peer = Peer(Path(sys.argv[1]), PeerSetting(int(sys.argv[2])), 512)
for count in itertools.count():
    if count * tokens % 256 == 0:
        peer.truncate(0)
    peer.feed([5] * tokens)
    if count == 1:
        print("at work", flush=True)
