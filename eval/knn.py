"""python eval/knn.py SOURCE --train SHARDS --test SHARDS [--baselines] [k=20 ...]; torchrun for several devices"""

import sys

from selfvil.cli import main

main(["eval", "knn", *sys.argv[1:]])
