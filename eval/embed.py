"""python eval/embed.py IMAGES --model SOURCE --out FILE.parquet; torchrun for several devices"""

import sys

from selfvil.cli import main

main(["embed", *sys.argv[1:]])
