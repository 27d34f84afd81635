"""Export a run's backbone: python launch/export.py RUN OUT (the same as `selfvil export RUN OUT`)."""

import sys

from selfvil.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
