"""python launch/export.py RUN OUT [--network NAME] [--heads]"""

import sys

from selfvil.cli import main

main(["export", *sys.argv[1:]])
