"""Recipes: what parses, what is refused, and what the refusal says."""

import json

import pytest
import timm
import yaml

from selfvil.errors import UserError
from selfvil.recipe import differences, find, load, packaged_recipes, parse, schema

RECIPES = sorted(packaged_recipes())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_resolves_to_itself(name):
    recipe = load(name)
    again = parse(yaml.safe_load(recipe.to_yaml()), "again")
    assert again == recipe
    assert recipe.identity() == again.identity()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_opens_with_its_command(name):
    lines = [line.lstrip("# ") for line in find(name).read_text().splitlines() if line.startswith("#")]
    text = "\n".join(lines)
    assert f"accelerate launch launch/pretrain.py recipes/{name}.yaml" in text or f"selfvil pretrain {name}" in text
    for word in ("Hardware:", "Memory:", "Time:", "Expect:"):
        assert word in text


def test_overrides_reach_their_key():
    pattern = "../data/train-{000000..000001}.tar"
    recipe = load("cifar10_mae", [f"data.train={pattern}", "optim.base_lr=1e-4", "model.init_values=1e-5"])
    assert recipe.data.train == pattern
    assert recipe.optim.base_lr == 1e-4
    assert recipe.model.create_kwargs()["init_values"] == 1e-5
    assert load("cifar10_mae", ["data.train={0..3}.tar"]).data.train == "{0..3}.tar"


def test_a_square_size_may_be_one_number():
    assert load("cifar10_mae", ["model.img_size=[32,64]"]).model.img_size == (32, 64)
    assert load("cifar10_mae", ["model.img_size=64"]).model.img_size == (64, 64)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.batch_sise=3", ["optim.batch_sise", "3", "did you mean optim.batch_size?"]),
        ("objective.mask_ration=.5", ["objective.mask_ration", "did you mean objective.mask_ratio?"]),
        ("optim.batch_size=many", ["optim.batch_size", "'many'", "integer"]),
        ("optim.base_lr=.nan", ["optim.base_lr", "finite"]),
        ("objective.mask_ratio=0", ["objective.mask_ratio = 0", "greater than 0"]),
        ("objective.mask_ratio=1", ["objective.mask_ratio = 1", "less than 1"]),
        ("objective.name=maee", ["objective.name = 'maee'", "mae"]),
        ("model.img_size=30", ["img_size [30, 30] is not divisible by patch_size 4"]),
        ("optim.accumulate=3", ["batch_size 256 is not divisible by accumulate 3"]),
        ("optim.schedule=wds", ["optim.schedule", "cosine", "wsd", "constant"]),
        ("optim.layer_decay=0", ["optim.layer_decay = 0", "greater than 0"]),
        ("data.augment=gpu", ["data.augment = 'gpu'", "workers", "device"]),
        ("data.mean=[0.5]", ["data.mean has 1 values, but model.in_chans is 3"]),
        ("eval.train=a.tar", ["give both train and test"]),
        ("optimiser.base_lr=1", ["no section optimiser", "did you mean optim?"]),
        ("batch_size=3", ["section.key=value"]),
        ("optim.batch_size", ["section.key=value"]),
    ],
)
def test_a_wrong_value_is_named(override, expected):
    with pytest.raises(UserError) as caught:
        load("cifar10_mae", [override])
    for text in expected:
        assert text in str(caught.value)


def test_a_schedule_fits_into_its_run():
    with pytest.raises(UserError, match=r"warmup 0\.5 and cooldown 0\.6 together are more than the whole run"):
        load("cifar10_mae", ["optim.schedule=wsd", "optim.warmup=0.5", "optim.cooldown=0.6"])


def test_all_problems_are_told_at_once():
    with pytest.raises(UserError, match=r"mask_ratio.*batch_sise"):
        load("cifar10_mae", ["objective.mask_ratio=2", "optim.batch_sise=3"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: [", "not valid YAML"),
        ("- a list", "not a recipe"),
        ("model: 3", "not a recipe"),
        ("", "not a recipe"),
        ("model: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, text, expected):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_recipe_lists_the_packaged_ones():
    with pytest.raises(UserError, match=r"no recipe nothing\.yaml.*cifar10_mae"):
        load("nothing.yaml")


def test_identity_ignores_where_and_how_fast():
    rate = "optim.base_lr=0.25"
    base = load("cifar10_mae", [rate]).identity()
    same = load(
        "cifar10_mae", [rate, "run.out=elsewhere", "data.workers=7", "monitor.log_every=3", "budget.pause_minutes=1"]
    )
    other = load("cifar10_mae", ["run.seed=1", "optim.base_lr=0.5"])
    assert same.identity() == base
    assert differences(base, other.identity()) == ["optim.base_lr: 0.25 -> 0.5", "run.seed: 0 -> 1"]


def test_schema_documents_every_field():
    whole = json.loads(json.dumps(schema()))
    settings = [*whole["$defs"].values(), *whole["properties"]["objective"]["anyOf"]]
    missing = [
        f"{section['title']}.{name}"
        for section in settings
        for name, field in section["properties"].items()
        if "description" not in field and name != "name"
    ]
    assert not missing


@pytest.mark.parametrize(
    ("budget", "steps"),
    [("budget.samples=1000", 10), ("budget.epochs=2.5", 12), ("budget.steps=7", 7), ("budget.epochs=0.001", 1)],
)
def test_budget_in_steps(budget, steps):
    overrides = ["budget.samples=null", budget] if "samples" not in budget else [budget]
    assert load("cifar10_mae", overrides).budget.total_steps(num_samples=480, batch_size=100) == steps


DESIGN = {
    "traversal": "quad_alternating", "conv": "none", "global_pool": "registers", "num_registers": 3,
    "drop_path_rate": 0.1, "drop_path_uniform": False, "pos_embed": "sincos",
}  # fmt: skip


def test_designs_of_vil_reach_the_backbone():
    recipe = load("mae_vil_t", [f"model.{key}={value}" for key, value in DESIGN.items()])
    kwargs = recipe.model.create_kwargs()
    assert {key: kwargs[key] for key in DESIGN} == DESIGN
    backbone = timm.create_model(recipe.model.name, **kwargs | {"depth": 1})
    assert [name for name, _ in backbone.named_modules() if name.endswith("conv")] == []
    assert backbone.reg_token.shape[1] == 3
    assert not set(DESIGN) & set(load("mae_vil_t").model.create_kwargs()) - {"drop_path_rate"}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (["model.traversal=spiral"], "model.traversal = 'spiral': input should be 'alternating', 'unidirectional'"),
        (["model.global_pool=registers"], "global_pool 'registers' needs num_registers, such as 4"),
        (["model.global_pool=middle_cls", "model.num_registers=2"], "leaves no room for num_registers"),
        (["model.name=vit_tiny_patch16_224", "model.conv=2d"], "conv: only vil_\\* models have that"),
    ],
)
def test_a_design_that_cannot_be_is_named(override, expected):
    with pytest.raises(UserError, match=expected):
        load("mae_vil_t", override)
