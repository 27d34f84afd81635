"""accelerate launch launch/pretrain.py RECIPE [section.key=value ...]"""

import sys

try:
    from selfvil.cli import main

    main(["pretrain", *sys.argv[1:]])
except KeyboardInterrupt:  # Ctrl-C while torch is being imported
    sys.exit(130)
