"""python eval/finetune.py SOURCE --train SHARDS --test SHARDS [--epochs N] [--labels-per-class N] [--baselines]"""

import sys

from selfvil.cli import main

main(["eval", "finetune", *sys.argv[1:]])
