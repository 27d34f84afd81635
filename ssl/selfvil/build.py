"""Build the objective of a recipe, and the parameter groups of its optimizer."""

import difflib

import timm
import torch

from selfvil import optim
from selfvil.errors import UserError
from selfvil.objectives import objective_class
from selfvil.objectives.base import ImageSpec, Objective
from selfvil.recipe import Recipe
from selfvil.start_from import start_backbone, start_objective


def build_objective(recipe: Recipe, start: bool = True) -> Objective:
    """The objective of a recipe, initialised from `run.seed`; with `start`, also from model.start_from.

    Raises UserError if timm cannot build the model, the objective refuses it, or the weights do not fit.
    """
    torch.manual_seed(recipe.run.seed)
    name, kwargs = recipe.model.name, recipe.model.create_kwargs()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(
            f"model.name = {name!r} is no model that timm knows; did you mean {' or '.join(close)}?"
            if close
            else f"model.name = {name!r} is no model that timm knows; try vil_tiny_patch16_224"
        )
    try:
        backbone = timm.create_model(name, **kwargs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        advice = ""
        if "'img_size'" in str(error) or "'patch_size'" in str(error):
            advice = (
                "; a masked objective needs a vil_* model or one of timm's plain vision transformers (vit_*), and for "
                "any other objective on a network without patches model.patch_size must be null"
            )
        raise UserError(f"model: {name} cannot be built with {kwargs}: {error}{advice}") from None
    if recipe.model.patch_size is None and getattr(getattr(backbone, "patch_embed", None), "patch_size", None):
        raise UserError(
            f"model.patch_size = null is for networks without patches, and {name} has them: set it to their side, "
            "such as 16"
        )
    source = recipe.model.start_from if start else None
    if source is not None and recipe.model.start_heads == "new":
        with torch.random.fork_rng(devices=[]):  # so that new heads depend only on the seed
            start_backbone(backbone, source)  # before the objective copies the backbone for its teacher
    image = ImageSpec(
        recipe.model.img_size, recipe.model.patch_size or 1, recipe.model.in_chans, recipe.data.mean, recipe.data.std
    )
    objective = objective_class(recipe.objective.name)(backbone, recipe.objective, image)
    if source is not None and recipe.model.start_heads == "load":
        start_objective(objective, source)
    return objective


def parameter_groups(recipe: Recipe, objective: Objective) -> list[dict]:
    """Parameter groups of the objective, with the recipe's learning rates for the layers of its backbone."""
    settings, backbone = recipe.optim, objective.backbone
    scales = optim.layer_lr_scales(backbone, settings.layer_decay, settings.patch_embed_lr)
    scales = {f"backbone.{name}": scale for name, scale in scales.items()}
    tags = dict.fromkeys(scales, optim.BACKBONE) | objective.tags()
    return optim.parameter_groups(objective, objective.no_weight_decay(), tags, scales)
