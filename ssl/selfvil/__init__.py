"""Self-supervised pretraining of Vision-LSTM. Importing the package registers its models with timm.

The `selfvil` command imports torch and timm only where a command uses them, so that `selfvil --help` is quick. In its
process the modules that build networks (`selfvil.export`, `selfvil.evaluate`) register the models.
"""

import os
import sys

from selfvil.version import __version__ as __version__


def _is_the_command() -> bool:
    """Whether this process was started as `selfvil ...` (the installed script) or `python -m selfvil ...`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # what sys.argv holds while the module named on the command line is being found
        words = sys.orig_argv
        return words[words.index("-m") + 1].partition(".")[0] == "selfvil" if "-m" in words[:-1] else False
    script = os.path.realpath(program)
    return os.path.basename(script) == "selfvil" and os.path.dirname(script) == os.path.dirname(sys.executable)


if not _is_the_command():
    from selfvil import models as models
