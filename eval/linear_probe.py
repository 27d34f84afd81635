"""python eval/linear_probe.py SOURCE --train SHARDS --test SHARDS [--baselines] [--labels-per-class N]"""

import sys

from selfvil.cli import main

main(["eval", "linear", *sys.argv[1:]])
