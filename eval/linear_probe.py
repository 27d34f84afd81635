"""python eval/linear_probe.py SOURCE --train SHARDS --test SHARDS [--baselines] [probe_seeds=3 ...]"""

import sys

from selfvil.cli import main

main(["eval", "linear", *sys.argv[1:]])
