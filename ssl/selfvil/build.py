"""Build the objective of a recipe, the data set it is trained on, and the parameter groups of its optimizer."""

import difflib
import os
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from selfvil import machine, optim
from selfvil.data import stats
from selfvil.data.base import Images
from selfvil.data.classes import class_names
from selfvil.data.images import open_images, open_mixture
from selfvil.data.mixture import Mixture
from selfvil.data.remote.cache import Cache
from selfvil.data.remote.shards import WINDOW
from selfvil.data.subset import FewLabels
from selfvil.errors import UserError
from selfvil.models.adapter import CLASSIFIERS, adapt
from selfvil.objectives import objective_class
from selfvil.objectives.base import ImageSpec, Objective
from selfvil.recipe import DataSection, Recipe
from selfvil.start_from import start_backbone, start_objective


def open_training(recipe: Recipe) -> tuple[Recipe, Images]:
    """The images of data.train, and the recipe with their classes and statistics where it leaves them open.

    Raises UserError if there are none, or their labels are missing or not those of the recipe, or their channels have
    not been measured.
    """
    shards = _open(recipe.data)
    if recipe.data.window is None and recipe.data.order == "shuffled" and shards.remote:
        # Recorded: the same shards on a local disk have another order.
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"window": WINDOW})})
    if isinstance(shards, Mixture):
        shards.check_step(recipe.optim.batch_size)
    if recipe.data.stats == "auto":
        found = stats.load(shards, recipe.model.in_chans)
        measured = {"mean": found.mean, "std": found.std, "stats": "given"}
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=measured)})
    if recipe.data.labels_per_class is not None:
        try:
            shards = FewLabels(shards, recipe.data.labels_per_class, recipe.run.seed)
        except UserError as error:
            raise UserError(f"data.labels_per_class: {error}") from None
    if not hasattr(recipe.objective, "classes"):
        return recipe, shards
    unlabelled = len(shards) if shards.labels is None else int((shards.labels < 0).sum())
    if shards.labels is None or unlabelled:
        raise UserError(
            f"data.train: {unlabelled:,} of the {len(shards):,} images have no label, and the objective "
            f"{recipe.objective.name} needs one (.cls) for each: pack a folder with one subfolder for each class "
            "(selfvil pack SOURCE OUT)"
        )
    found = np.unique(shards.labels).tolist()
    if len(found) < 2:
        raise UserError(f"data.train: all {len(shards):,} images have the label {found[0]}: give at least two classes")
    if recipe.objective.classes is None:
        classes = len(found) if found == list(range(len(found))) else found
        return recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"classes": classes})}), shards
    if unknown := sorted(set(found) - set(recipe.objective.labels())):
        raise UserError(
            f"data.train: images have the label {unknown[0]}, which is not among the "
            f"{len(recipe.objective.labels()):,} classes of objective.classes: correct it, or set it to null to "
            "take those of the images"
        )
    return recipe, shards


def cache_of(data: DataSection) -> Cache:
    """The cache for images behind a URL."""
    return Cache(data.cache, None if data.cache_gb is None else round(data.cache_gb * 1e9))


def _open(data: DataSection) -> Images:
    """The images of data.train."""
    cache = cache_of(data)
    if data.mixture:
        return open_mixture(data.mixture, data.image, cache)
    return open_images(data.train, image=data.image, cache=cache)  # type: ignore[arg-type]  # it is no mixture


def classifier(recipe: Recipe, backbone: nn.Module, shards: Images | None = None) -> dict[str, Any] | None:
    """What a checkpoint holds of the classifier on `backbone`: its pooling, the label and the name of each class.

    Without `shards`, there are no names. None for an objective without classes.
    """
    if not hasattr(recipe.objective, "classes"):
        return None
    labels, named = recipe.objective.labels(), class_names(shards) if shards is not None else None
    names = named.names if named else []
    pool = CLASSIFIERS[recipe.objective.readout or adapt(backbone).default_readout]
    return {
        "global_pool": pool,
        "labels": labels,
        "names": [names[label] if label < len(names) else str(label) for label in labels],
    }


def build_objective(recipe: Recipe, start: bool = True) -> Objective:
    """The objective of a recipe, initialised from `run.seed`; with `start`, also from model.start_from.

    Raises UserError if timm cannot build the model, the objective refuses it, or the weights do not fit.
    """
    name, kwargs = recipe.model.name, recipe.model.create_kwargs()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(
            f"model.name = {name!r} is no model that timm knows; did you mean {' or '.join(close)}?"
            if close
            else f"model.name = {name!r} is no model that timm knows; try vil_tiny_patch16_224"
        )
    _require_memory(recipe)
    torch.manual_seed(recipe.run.seed)
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
    objective = objective_class(recipe.objective.name)(backbone, recipe.objective, image_spec(recipe))
    if recipe.data.channel_drop and not any(getattr(view, "channel_drop", 0) for view in objective.views()):
        raise UserError(
            f"data.channel_drop: the targets of the objective {recipe.objective.name} depend on all channels of its "
            "input: set it to 0, or take an objective that compares views, such as dino"
        )
    if source is not None and recipe.model.start_heads == "load":
        start_objective(objective, source)
    return objective


def _require_memory(recipe: Recipe) -> None:
    """Refuse networks whose weights do not fit in memory, before they are created.

    Linux lends more memory than it has, and ends the process that uses it, without a message. Needed are at least all
    weights in each process of this machine, and once more for the copy of a checkpoint.
    """
    sizes = _weight_sizes(recipe)
    total, copies = sum(sizes.values()), max(2, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if copies * total > (free := machine.free_host_bytes()):
        largest = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"model and objective: {recipe.objective.name} on {recipe.model.name} has {total / 2**30:,.1f} GiB of "
            f"weights ({largest} alone {sizes[largest] / 2**30:,.1f} GiB), which are held {copies} times, and "
            f"{free / 2**30:,.1f} GiB are free on this machine: take a smaller model, or smaller heads of the objective"
        )


def _weight_sizes(recipe: Recipe) -> dict[str, int]:
    """Bytes of each weight of the objective, none of which are created; empty where it cannot be built.

    Only those of the backbone where the objective reads another network, whose file has its size.
    """
    kind = objective_class(recipe.objective.name)
    try:
        with torch.device("meta"):
            networks = timm.create_model(recipe.model.name, **recipe.model.create_kwargs())
            if not kind.reads_weights:
                networks = kind(networks, recipe.objective, image_spec(recipe))
    except (RuntimeError, TypeError, ValueError, AssertionError, UserError):
        return {}  # building it in memory tells why
    return {name: parameter.nbytes for name, parameter in networks.named_parameters()}


def image_spec(recipe: Recipe) -> ImageSpec:
    """The images of a recipe. Raises ValueError unless data.stats is "given", as `open_training` makes it."""
    model, data = recipe.model, recipe.data
    if data.stats != "given":
        raise ValueError("the statistics of the recipe's images are not known before its images are opened")
    return ImageSpec(
        model.img_size, model.patch_size or 1, model.in_chans, data.mean, data.std, data.channel_drop,
        recipe.monitor.picture_channels,
    )  # fmt: skip


def parameter_groups(recipe: Recipe, objective: Objective) -> list[dict]:
    """Parameter groups of the objective, with the recipe's learning rates for the layers of its backbone."""
    settings, backbone = recipe.optim, objective.backbone
    scales = optim.layer_lr_scales(backbone, settings.layer_decay, settings.patch_embed_lr)
    scales = {f"backbone.{name}": scale for name, scale in scales.items()}
    tags = dict.fromkeys(scales, optim.BACKBONE) | objective.tags()
    return optim.parameter_groups(objective, objective.no_weight_decay(), tags, scales)
