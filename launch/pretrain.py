"""accelerate launch launch/pretrain.py RECIPE [section.key=value ...]"""

import sys

from selfvil.cli import main

main(["pretrain", *sys.argv[1:]])
