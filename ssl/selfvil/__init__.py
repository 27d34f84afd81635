"""Self-supervised pretraining of Vision-LSTM. Importing the package registers its models with timm.

The Python API: `pretrain`, `evaluate`, `compare`, `export`, `report`, `embed`, `Embedder`, `load_backbone`, `verify`,
all imported on first use; `UserError`; and the models of timm.create_model("vil_...").

The `selfvil` command imports torch and timm only in commands that use them, so that `selfvil --help` is fast. In its
process, the modules that build networks (`selfvil.weights`, `selfvil.evaluate`) register the models.
"""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from selfvil.errors import UserError as UserError
from selfvil.version import __version__ as __version__

if TYPE_CHECKING:
    from selfvil.api import compare as compare
    from selfvil.api import evaluate as evaluate
    from selfvil.api import export as export
    from selfvil.api import pretrain as pretrain
    from selfvil.embedding.embedder import Embedder as Embedder
    from selfvil.embedding.write import embed as embed
    from selfvil.reporting.report import report as report
    from selfvil.verification import verify as verify
    from selfvil.weights import load_backbone as load_backbone

_LAZY = {
    "Embedder": "selfvil.embedding.embedder",
    "compare": "selfvil.api",
    "embed": "selfvil.embedding.write",
    "load_backbone": "selfvil.weights",
    "report": "selfvil.reporting.report",
    "verify": "selfvil.verification",
}
"""Function -> the module that has it."""

_CALLABLE = ("pretrain", "evaluate", "export")
"""Functions of selfvil.api that have the name of a module of this package."""


class _CallableModule(ModuleType):
    """A module such as selfvil.pretrain, which can be called as the function of the Python API that has its name.

    A name of a package is one object, and Python makes it the module whenever any import loads that module. So the
    module must be callable, which only its class can give it (PEP 713, a __call__ of modules, was rejected). The other
    way is to rename the three modules, which hold the loop, the evaluations and the export for all other code.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    @property
    def _function(self) -> Any:
        return getattr(import_module("selfvil.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Any:  # for help in notebooks
        from inspect import signature

        return signature(self._function)


class _Package(ModuleType):
    """The class of this package."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Python sets a module as an attribute of its package when it is imported for the first time, by any import.
        if name in _CALLABLE and type(value) is ModuleType:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return import_module(f"selfvil.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module 'selfvil' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def _is_the_command() -> bool:
    """Whether this process was started as `selfvil ...` (the installed script) or `python -m selfvil ...`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # until Python has found the module of the command line
        words = sys.orig_argv
        return words[words.index("-m") + 1].partition(".")[0] == "selfvil" if "-m" in words[:-1] else False
    script = os.path.realpath(program)
    return os.path.basename(script) == "selfvil" and os.path.dirname(script) == os.path.dirname(sys.executable)


if not _is_the_command():
    from selfvil import models as models
