"""The table of objectives: adding one is one file and one line here."""

import importlib
from typing import Any

from selfvil.errors import UserError

OBJECTIVES = {
    "mae": ("selfvil.objectives.mae", "MAE", "MAESettings"),
    "simmim": ("selfvil.objectives.simmim", "SimMIM", "SimMIMSettings"),
    "autoregressive": ("selfvil.objectives.autoregressive", "Autoregressive", "AutoregressiveSettings"),
    "dino": ("selfvil.objectives.dino", "DINO", "DINOSettings"),
    "ibot": ("selfvil.objectives.ibot", "IBOT", "IBOTSettings"),
    "dinov2": ("selfvil.objectives.dinov2", "DINOv2", "DINOv2Settings"),
    "ijepa": ("selfvil.objectives.ijepa", "IJEPA", "IJEPASettings"),
    "lejepa": ("selfvil.objectives.lejepa", "LeJEPA", "LeJEPASettings"),
    "visreg": ("selfvil.objectives.visreg", "VISReg", "VISRegSettings"),
    "supervised": ("selfvil.objectives.supervised", "Supervised", "SupervisedSettings"),
    "distill": ("selfvil.objectives.distill", "Distill", "DistillSettings"),
}


def settings_model(name: object) -> Any:
    """The pydantic model of the settings of objective `name`. Raises UserError for an unknown name."""
    return _lookup(name)[1]


def objective_class(name: object) -> Any:
    """The `Objective` subclass of that name. Raises UserError for an unknown name."""
    return _lookup(name)[0]


def _lookup(name: object) -> tuple[Any, Any]:
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise UserError(f"objective.name = {name!r} is not an objective; choose one of: {', '.join(OBJECTIVES)}")
    module_name, class_name, settings_name = OBJECTIVES[name]
    module = importlib.import_module(module_name)
    return getattr(module, class_name), getattr(module, settings_name)
