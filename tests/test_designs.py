"""Every published design with every objective is pretrained, diagnosed, drawn, resumed and exported, or refused with
one clear sentence.

The fast tests cover every pair of choices (objective and traversal, traversal and pooling, ...). The slow one is the
full product, with two steps of training and all that is measured and drawn of each:

    pytest -m slow tests/test_designs.py
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import timm
import torch
from matplotlib import figure

import runs
from selfvil import checkpoint
from selfvil.build import build_objective
from selfvil.data.index import open_shards
from selfvil.data.loader import train_batches
from selfvil.diagnostics.checkup import open_run
from selfvil.diagnostics.vitals import Vitals
from selfvil.errors import UserError
from selfvil.export import export
from selfvil.models.adapter import adapt
from selfvil.models.blocks import TRAVERSALS
from selfvil.monitor.saliency import pca_colours, readout_saliency
from selfvil.objectives.base import Progress
from selfvil.pretrain import pretrain
from selfvil.recipe import Recipe
from selfvil.reporting.report import report

Case = dict[str, Any]

DESIGN = {
    "traversal": list(TRAVERSALS),
    "global_pool": ["bilateral_concat", "bilateral_avg", "bilateral_patch", "avg", "middle_patch", "middle_cls",
                    "registers"],
    "conv": ["2d", "causal1d", "none"],
    "name": ["vil_nano_patch4_32", "vil_v1_tiny_patch16_224", "vil_mlp_nano_patch4_32"],
    "num_registers": [None, 2],
    "pos_embed": ["learn", "sincos"],
    "init_values": [None, 1e-4],
}  # fmt: skip
CAUSAL = DESIGN | {"traversal": ["unidirectional"], "conv": ["causal1d", "none"]}
"""Designs that the autoregressive objective supports."""
BIDIRECTIONAL = [name for name in runs.PACKAGED if name != "autoregressive"]
WITHOUT_PATCHES = ["dino", "lejepa", "visreg", "distill", "supervised"]
"""Objectives that support a ConvNeXt."""
CROPS = ["dino", "ibot", "dinov2", "lejepa", "visreg"]
SCANS = {traversal: 2 * how.directions for traversal, how in TRAVERSALS.items()}
"""mLSTM scans of one pair of blocks."""


def possible(case: Case) -> bool:
    if case["global_pool"] == "middle_cls":
        return case["num_registers"] is None
    return case["global_pool"] != "registers" or case["num_registers"] is not None


def pairwise(axes: dict[str, list]) -> list[Case]:
    """A few cases that cover every pair of values of two axes; each is the best of 40 random cases."""
    dice, names = random.Random(0), sorted(axes, key=lambda name: -len(axes[name]))
    pairs = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(axes[a], axes[b])
        if possible({"global_pool": "avg", "num_registers": 2 if "registers" in (x, y) else None} | {a: x, b: y})
    }
    cases = []
    while pairs:
        wanted = min(pairs, key=str)
        tries = [{name: dice.choice(axes[name]) for name in names} | dict(wanted) for _ in range(40)]
        covered = [
            {pair for pair in itertools.combinations(((name, case[name]) for name in names), 2) if pair in pairs}
            if possible(case) else set()
            for case in tries
        ]  # fmt: skip
        best = max(range(len(tries)), key=lambda index: len(covered[index]))
        cases.append(tries[best])
        pairs -= covered[best]
    return cases


def named(case: Case) -> str:
    return "-".join(str(value) for value in case.values() if value is not None)


COVERING = pairwise(DESIGN | {"objective": BIDIRECTIONAL}) + [
    case | {"objective": "autoregressive"} for case in pairwise(CAUSAL)
]
COMPARATORS = [
    *({"objective": name, "name": "vit_tiny_patch16_224", "num_heads": 2} for name in runs.PACKAGED),
    *({"objective": name, "name": "test_convnext", "patch_size": None} for name in WITHOUT_PATCHES),
]


def recipe_of(case: Case, shards, out, *more: str) -> Recipe:
    model = {"traversal": None, "conv": None, "init_values": None, "drop_path_uniform": None} | case
    objective = model.pop("objective")
    settings = [f"model.{key}={'null' if value is None else value}" for key, value in model.items()]
    if case.get("patch_size", 1) is None:  # images large enough for a ConvNeXt
        settings += ["model.embed_dim=null", "model.depth=null", "model.img_size=64"]
        settings += ["objective.local_crop_size=32"] if objective in CROPS else []
    more = ("budget.steps=3", "monitor.doctor_every=1", "monitor.pictures_every=1", *more)
    return runs.small(objective, shards, out, "optim.batch_size=20", *settings, *more)


def expected_scans(case: Case) -> int:
    return SCANS[case["traversal"]] if case["name"].startswith("vil") else 0


class Canvas:
    """Replace matplotlib's figure, the slowest part, by one that draws nothing."""

    def __init__(self, *args, **how) -> None:
        self.legend = self.savefig = lambda *args, **how: None

    def subplots(self, rows: int, columns: int, squeeze: bool = True, **how) -> np.ndarray:
        axis = MagicMock(**{"get_ylim.return_value": (1, 10), "get_yscale.return_value": "log"})
        axes = np.empty((rows, columns), dtype=object)
        for index in np.ndindex(rows, columns):
            axes[index] = axis
        return axes.flatten() if squeeze else axes


@pytest.fixture
def unrendered(monkeypatch) -> None:
    monkeypatch.setattr(figure, "Figure", Canvas)


@pytest.mark.parametrize("case", COVERING + COMPARATORS, ids=named)
def test_a_run(case, digit_shards, tmp_path, unrendered):
    recipe = recipe_of(case, digit_shards, tmp_path / "run")
    paused = pretrain(recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"pause_minutes": 1e-9})}))
    assert (paused.finished, paused.step) == (False, 1)
    summary = pretrain(recipe)
    assert (summary.finished, summary.step) == (True, 3)

    record = open_run(tmp_path / "run")
    measured = [entry for entry in record.metrics if entry["kind"] == "doctor"]
    assert [entry["step"] for entry in measured] == [1, 2, 3]
    for entry in measured:
        assert sum(key.startswith("horizon/") for key in entry) == expected_scans(case)
        assert {"feature_std", "rankme", "relative_lr", "grad_norm/patch_embed"} - entry.keys() <= (
            set() if "traversal" in case or "vit" in case["name"] else {"grad_norm/patch_embed"}
        )
    pictures = sorted(path.name for path in (tmp_path / "run" / "pictures").glob("*.png"))
    assert len(pictures) == 3

    exported = timm.create_model(f"local-dir:{export(tmp_path / 'run', tmp_path / 'exported')}", pretrained=True)
    objective = build_objective(recipe, False)
    objective.load_state_dict(checkpoint.newest(tmp_path / "run" / "checkpoints").tensors("objective"))
    images = torch.rand(2, 1, *recipe.model.img_size)
    with torch.no_grad():
        got, want = exported.eval().forward_features(images), objective.exported().eval().forward_features(images)
    torch.testing.assert_close(got, want)

    page = report(tmp_path / "run", tmp_path / "page.html").read_text()
    missing = [part.split("<")[0] for part in page.split("Not shown: ")[1:]]
    reasons = {
        "no scores": True, "has no patches": case["name"] == "test_convnext",
        "has no forget gates": not expected_scans(case),
    }  # fmt: skip
    assert len(missing) == sum(reasons.values())
    assert all(any(reason in text for text in missing) for reason, wanted in reasons.items() if wanted)


def one_sentence(error: UserError, *words: str) -> None:
    message = str(error)
    assert "\n" not in message
    assert len(message) < 300
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["vil_nano_patch4_32", "vil_mlp_nano_patch4_32"])
@pytest.mark.parametrize("conv", DESIGN["conv"])
@pytest.mark.parametrize("traversal", TRAVERSALS)
def test_the_autoregressive_objective_refuses_what_is_not_causal(traversal, conv, name, digit_shards, tmp_path):
    case = {"objective": "autoregressive", "name": name, "traversal": traversal, "conv": conv}
    recipe = recipe_of(case, digit_shards, tmp_path / "run")
    if traversal == "unidirectional" and conv != "2d":
        build_objective(recipe)
        return
    with pytest.raises(UserError) as refused:
        pretrain(recipe)
    one_sentence(refused.value, "traversal = unidirectional" if traversal != "unidirectional" else "conv = causal1d")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", [name for name in runs.PACKAGED if name not in WITHOUT_PATCHES])
def test_objectives_that_need_patches_refuse_networks_without(objective, digit_shards, tmp_path):
    recipe = recipe_of({"objective": objective, "name": "test_convnext", "patch_size": None}, digit_shards, tmp_path)
    with pytest.raises(UserError) as refused:
        build_objective(recipe)
    one_sentence(refused.value, "vil_* model")


# --- the full product ------------------------------------------------------------------------------------------------


def product(axes: dict[str, list]) -> Iterator[Case]:
    for values in itertools.product(*axes.values()):
        case = dict(zip(axes, values))
        case["num_registers"] = 2 if case["global_pool"] == "registers" else None
        yield case


def train_and_measure(case: Case, batch_of: Callable[[Recipe], Any], shards, tmp_path) -> None:
    """Two steps of training, all vital signs, the objective's picture, features as colours and the readout's map."""
    recipe = recipe_of(case, shards, tmp_path / "run")
    objective = build_objective(recipe)
    batch, optimizer = batch_of(recipe, objective), torch.optim.AdamW(objective.parameters(), 1e-3)
    vitals = Vitals(objective)
    for step in range(2):
        output = objective(batch, Progress(step, 3, 10.0, 0))
        output.loss.backward()
        vitals.before_step({name: p.grad.norm() for name, p in objective.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        objective.after_step(Progress(step, 3, 10.0, 0))
    values = vitals.after_step(2, 1e-3, batch, output)
    assert sum(key.startswith("horizon/") for key in values) == expected_scans(case)
    assert {"feature_std", "rankme", "grad_reach"} <= values.keys()
    objective.eval()
    picture = objective.picture(batch, Progress(2, 3, 10.0, 0))
    assert np.isfinite(picture.numpy()).all()
    backbone = objective.exported()
    images = batch.views[0][:4]
    assert readout_saliency(backbone, images).isfinite().all()
    assert pca_colours(backbone, images).isfinite().all()
    clone = timm.create_model(recipe.model.name, **recipe.model.create_kwargs()).eval()
    if case["objective"] == "supervised":  # which chooses the pooling of its classifier
        clone.reset_classifier(len(objective.classes), backbone.global_pool)
    clone.load_state_dict(backbone.state_dict())
    adapter = adapt(clone)
    readout = adapter.default_readout
    with torch.no_grad():
        assert adapter.read_out(images, readout).shape == (len(images), adapter.readout_dim(readout))


def product_of(objective: str) -> list[Case]:
    """Traversals, poolings, convolutions and versions: 441 designs, of which the autoregressive objective takes 42."""
    design = CAUSAL if objective == "autoregressive" else DESIGN
    axes = {key: design[key] for key in ("traversal", "global_pool", "conv", "name")}
    return [case | {"objective": objective} for case in product(axes)]


def train_and_measure_all(cases: list[Case], digit_shards, tmp_path) -> None:
    shards, batches = open_shards(f"{digit_shards}/digits-*.tar"), {}

    def batch_of(recipe: Recipe, built) -> Any:
        if not batches:
            batches[0] = next(train_batches(shards, built.views(), seed=0, batch_size=20, stop_step=1, channels=1))
        return batches[0]

    failed = []
    for case in cases:
        try:
            train_and_measure(case, batch_of, digit_shards, tmp_path)
        except Exception as error:
            failed.append(f"{named(case)}: {type(error).__name__}: {error}")
    assert not failed, f"{len(failed)} designs, such as {json.dumps(failed[:3], indent=1)}"


@pytest.mark.parametrize("objective", runs.PACKAGED)
def test_a_sample_of_the_product(objective, digit_shards, tmp_path):
    """The whole product is slow; without its sample, a change that breaks all of it would not be seen."""
    train_and_measure_all(random.Random(objective).sample(product_of(objective), 3), digit_shards, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("objective", runs.PACKAGED)
def test_the_full_product(objective, digit_shards, tmp_path):
    train_and_measure_all(product_of(objective), digit_shards, tmp_path)
