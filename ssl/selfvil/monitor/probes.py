"""Scores during a run, by the code that scores a finished one."""

import torch
from torch import nn

from selfvil.data.index import open_shards
from selfvil.errors import UserError
from selfvil.evaluate.checks import check_parts
from selfvil.evaluate.features import extract
from selfvil.evaluate.knn import knn
from selfvil.evaluate.linear import linear_probe
from selfvil.recipe import Recipe


def check_probes(recipe: Recipe) -> list[str]:
    """Make sure that the shards in `recipe.eval` can be scored, before training starts; returns warnings.

    Raises UserError if shards are missing or damaged, or as `check_parts`.
    """
    if recipe.eval.train is None or recipe.eval.test is None:
        return []
    try:
        train, test = (open_shards(part, image=recipe.data.image) for part in (recipe.eval.train, recipe.eval.test))
        return check_parts(train, test, protocols=["knn", "linear"] if recipe.eval.linear else ["knn"])
    except UserError as error:
        raise UserError(f"eval.train and eval.test: {error}; set both to null to train without scores") from None


def probe_scores(backbone: nn.Module, recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Accuracy in percent of k-NN, by `k`, and of a linear probe if the recipe asks for it, on the shards in
    `recipe.eval`. Raises UserError where these can no longer be scored."""
    train, test = (
        extract(
            backbone, open_shards(pattern, image=recipe.data.image), img_size=recipe.model.img_size,
            mean=recipe.data.mean, std=recipe.data.std, workers=recipe.data.workers, device=device,
        )
        for pattern in (recipe.eval.train or (), recipe.eval.test or ())
    )  # fmt: skip
    scores = {f"knn_{k}": accuracy for k, accuracy in knn(train, test).items()}
    return scores | {"linear": linear_probe(train, test).accuracy} if recipe.eval.linear else scores
