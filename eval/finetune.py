"""python eval/finetune.py SOURCE --train SHARDS --test SHARDS [--baselines] [epochs=20 labels_per_class=10 ...]"""

import sys

from selfvil.cli import main

main(["eval", "finetune", *sys.argv[1:]])
