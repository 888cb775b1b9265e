"""A second OpenMP program: libllama, which decodes with so many threads until it is ended. A line says that it is at work.

Usage: openmp_neighbour.py MODEL THREADS
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench.contenders import Peer, PeerSetting

peer = Peer(Path(sys.argv[1]), PeerSetting(int(sys.argv[2])), 512)
for count in itertools.count():
    if count % 256 == 0:
        peer.truncate(0)
    peer.feed([5])
    if count == 4:
        print("at work", flush=True)
