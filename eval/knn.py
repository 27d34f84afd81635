"""python eval/knn.py SOURCE --train SHARDS --test SHARDS [--baselines]"""

import sys

from selfvil.cli import main

main(["eval", "knn", *sys.argv[1:]])
