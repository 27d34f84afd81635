"""python eval/segment.py SOURCE --train SHARDS --test SHARDS [--baselines] [key=value ...]; torchrun for several"""

import sys

from selfvil.cli import main

main(["eval", "segment", *sys.argv[1:]])
