"""The evaluations of a recipe during its run, by the same functions as `selfvil eval`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from selfvil.build import cache_of, classifier
from selfvil.data.images import open_images
from selfvil.errors import UserError
from selfvil.evaluate import evaluation, want
from selfvil.evaluate.entries import labels, metric_prefixes
from selfvil.evaluate.processes import Processes
from selfvil.evaluate.task import Task
from selfvil.recipe import Recipe
from selfvil.weights import Network, Normalisation, create_backbone


def check_evaluations(recipe: Recipe) -> list[str]:
    """Check the shards and settings of `recipe.eval` before training starts; returns warnings.

    Raises UserError if shards are missing, damaged or unlabelled, or too few for an evaluation.
    """
    warnings: list[str] = []
    for label, entry in zip(labels([{"name": entry.name} for entry in recipe.eval]), recipe.eval):
        try:
            task = _task(recipe, entry, None, torch.device("cpu"), Processes())
            found = evaluation(entry.name).check(task, entry)
        except UserError as error:
            raise UserError(f"{label}: {error}; remove the entry from eval to train without its scores") from None
        warnings += [warning for warning in found if warning not in warnings]
    return warnings


def due_evaluations(recipe: Recipe, step: int, ended: bool) -> list[int]:
    """Indices of the entries of `recipe.eval` to run after `step` steps; at the end of the run, of all."""
    if step == 0:
        return [i for i, entry in enumerate(recipe.eval) if entry.at_start]
    return [i for i, entry in enumerate(recipe.eval) if ended or (entry.every is not None and step % entry.every == 0)]


def run_evaluations(
    recipe: Recipe,
    due: list[int],
    backbone: nn.Module,
    device: torch.device,
    *,
    guard: Callable[[str], AbstractContextManager[Any]],
    interrupts: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, float]:
    """Scores in percent of `backbone` by the entries `due`, such as {"knn_20": 41.2}; {} on all but the main process.

    Every process of the run calls this with the same `due` and weights; they share the images. The features of entries
    with the same shards are computed in one pass over the images.

    Args:
        backbone: complete on each process, in evaluation mode.
        guard: makes a context for the named evaluation, in which an error is reported and ends only this evaluation.
        interrupts: makes a context in which a signal raises `stop.Interrupted`.
    """
    processes = Processes.current(interrupts)
    prefixes, tasks, scores = metric_prefixes(recipe.eval), dict[str, Task](), dict[str, float]()
    shards = [str((entry.train, entry.test, entry.allow_shared)) for entry in recipe.eval]
    for index in due:
        entry = recipe.eval[index]
        with guard(f"the evaluation {prefixes[index]}{entry.name}"):
            if shards[index] not in tasks:
                task = processes.together(partial(_task, recipe, entry, backbone, device, processes))
                tasks[shards[index]] = task
                want(task, [(recipe.eval[i].name, recipe.eval[i]) for i in due if shards[i] == shards[index]])
            for score in evaluation(entry.name).evaluate(tasks[shards[index]], entry):
                scores[prefixes[index] + score.metric] = score.value
    return scores


def plain_copy(recipe: Recipe, backbone: nn.Module) -> nn.Module:
    """A copy of `backbone`, whose weights are whole now, that computes without the hooks of a sharding strategy."""
    return _network(recipe, backbone).backbone.to(next(backbone.parameters()).device).eval()


def _network(recipe: Recipe, backbone: nn.Module, **overrides: Any) -> Network:
    """A new network with the weights of `backbone`. overrides: arguments of `timm.create_model`."""
    model, data = recipe.model, recipe.data
    meta = {
        "model": {"name": model.name, "kwargs": model.create_kwargs() | overrides},
        "data": {"mean": data.mean, "std": data.std, "img_size": model.img_size},
        "classifier": classifier(recipe, backbone),
    }
    with torch.random.fork_rng(devices=[]):
        network = create_backbone(meta)
    # By parameter and buffer: state_dict() of a backbone under FSDP2 would divide its weights again.
    weights = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    network.backbone.load_state_dict({name: weights[name] for name in network.backbone.state_dict()})
    return network


def _task(recipe: Recipe, entry: Any, backbone: nn.Module | None, device: torch.device, processes: Processes) -> Task:
    model, data, cache = recipe.model, recipe.data, cache_of(recipe.data)
    normalisation = Normalisation(tuple(data.mean), tuple(data.std), model.img_size)

    def create(**overrides: Any) -> Network:
        assert backbone is not None
        return _network(recipe, backbone, **overrides)

    return Task(
        "pretrained", None if backbone is None else Network(backbone, normalisation, 0), normalisation,
        open_images(entry.train, image=data.image, cache=cache),
        open_images(entry.test, image=data.image, cache=cache), create,
        device=device, workers=data.workers, source=recipe.run.out, processes=processes,
        allow_shared=entry.allow_shared,
        labels=tuple(recipe.objective.labels()) if hasattr(recipe.objective, "labels") else (),
    )  # fmt: skip
