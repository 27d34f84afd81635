"""Recipes: which are valid, which are refused, and the messages."""

import json

import pytest
import timm
import yaml

from selfvil.errors import UserError
from selfvil.explain import schema
from selfvil.recipe import find, load, packaged_recipes, parse
from selfvil.run import differences

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
        ("eval.knn.train=a.tar", ["missing key eval.knn.test"]),
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


def test_all_problems_are_reported_together():
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
def test_a_file_without_a_recipe_is_refused(tmp_path, text, expected):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=expected) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_a_missing_recipe_lists_the_packaged_ones():
    with pytest.raises(UserError, match=r"no recipe nothing\.yaml.*cifar10_mae"):
        load("nothing.yaml")


def test_identity_ignores_paths_and_speed():
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
    settings += whole["properties"]["eval"]["items"]["anyOf"]
    missing = [
        f"{section['title']}.{name}"
        for section in settings
        for name, field in section["properties"].items()
        if "description" not in field and name != "name"
    ]
    assert not missing


PARTS = {"train": "a.tar", "test": ["b.tar", "c.tar"]}


def with_eval(tmp_path, section, *overrides: str):
    tree = yaml.safe_load(find("cifar10_mae").read_text()) | {"eval": section}
    (tmp_path / "mine.yaml").write_text(json.dumps(tree))  # JSON is YAML, and has no aliases
    return load(tmp_path / "mine.yaml", overrides)


def test_evaluations_are_a_list_of_entries(tmp_path, caplog):
    section = [{"name": "knn", **PARTS, "every": 500, "k": 20}, {"name": "finetune", **PARTS, "img_size": 64}]
    knn, finetune = with_eval(tmp_path, section).eval
    assert (knn.name, knn.train, knn.test, knn.every, knn.k) == ("knn", "a.tar", ["b.tar", "c.tar"], 500, [20])
    assert (finetune.every, finetune.img_size, finetune.epochs) == (None, (64, 64), 100)
    assert not caplog.records
    assert load("cifar10_mae").eval == ()


def test_the_eval_section_does_not_belong_to_the_identity(tmp_path):
    assert with_eval(tmp_path, [{"name": "knn", **PARTS}]).identity() == load("cifar10_mae").identity()


def test_overrides_change_entries(tmp_path, caplog):
    section = [{"name": "knn", **PARTS}, {"name": "linear", **PARTS}, {"name": "linear", **PARTS, "holdout": 0.2}]
    more = ["eval.knn.k=[5]", "eval.2.every=3", "eval.test=2026", "eval.few_label.draws=2", "eval.few_label.train=x"]
    entries = with_eval(tmp_path, section, *more).eval
    assert [entry.name for entry in entries] == ["knn", "linear", "linear", "few_label"]
    assert {entry.test for entry in entries} == {"2026"}
    assert [entry.every for entry in entries] == [None, None, 3, None]
    assert (entries[0].k, entries[2].holdout, entries[3].draws, entries[3].train) == ([5], 0.2, 2, "x")
    assert not caplog.records


@pytest.mark.parametrize("linear", [True, False])
def test_the_old_form_of_eval_is_read_with_a_warning(tmp_path, caplog, linear):
    """A mapping in the file, or its keys as overrides; the warning is a list that gives the same entries."""
    names = ["knn", "linear"] if linear else ["knn"]
    section = PARTS | {"every": 7, "linear": linear}
    recipe = with_eval(tmp_path, section)
    assert [(entry.name, entry.every, entry.test) for entry in recipe.eval] == [
        (name, 7, ["b.tar", "c.tar"]) for name in names
    ]
    (record,) = caplog.records
    text = record.getMessage()
    assert "mine.yaml: eval is a list of evaluations now" in text
    written = yaml.safe_load("eval:" + text.partition("eval:\n")[2].partition("\nor, on")[0].join(["\n", ""]))
    caplog.clear()
    assert with_eval(tmp_path, written["eval"]).eval == recipe.eval
    assert not caplog.records
    words = ["eval.train=a.tar", "eval.test=[b.tar, c.tar]", "eval.every=7", f"eval.linear={str(linear).lower()}"]
    assert load("cifar10_mae", words).eval == recipe.eval
    assert "eval.knn.train=a.tar" in caplog.text
    caplog.clear()
    assert with_eval(tmp_path, {"train": None, "test": None, "every": None, "linear": True}).eval == ()
    assert not caplog.records  # as an earlier version wrote it into a run without scores


@pytest.mark.parametrize(
    ("section", "overrides", "expected"),
    [
        ([{"name": "knnn", **PARTS}], [], "eval.0.name: there is no evaluation 'knnn' (did you mean knn?"),
        ([PARTS], [], "missing key eval.0.name"),
        ([{"name": "knn", **PARTS, "kk": 3}], [], "unknown key eval.knn.kk = 3 (did you mean eval.knn.k?)"),
        ([{"name": "knn", **PARTS, "k": 0}], [], "eval.knn.k = 0"),
        ([{"name": "knn", **PARTS, "every": 0}], [], "eval.knn.every = 0: input should be greater than or equal to 1"),
        ([{"name": "knn", "train": "a"}], [], "missing key eval.knn.test"),
        ([{"name": "knn", **PARTS}] * 2, ["eval.1.k=x"], "override 'eval.1.k=x': eval.1.k = 'x'"),
        ([{"name": "knn", **PARTS}] * 2, ["eval.knn.k=3"], "2 entries named knn: write eval.0 or eval.1"),
        ([{"name": "knn", **PARTS}], ["eval.1.k=3"], "eval has 1 entries, numbered from 0"),
        ([], ["eval.svm.train=a"], "override eval.svm.train: there is no evaluation 'svm'"),
        ([{"name": "knn", **PARTS}], ["eval.linear=false"], "write eval.NAME.KEY"),
        ([{"name": "knn", **PARTS}], ["eval.knn.readout=first_lost"], "there is no readout 'first_lost'"),
        ({"name": "knn", **PARTS}, [], "eval is a list of evaluations: write `- name: knn`"),
        ({**PARTS, "evry": 3}, [], "unknown key eval.evry = 3 (did you mean eval.every?)"),
        ({"train": "a"}, [], "give both train and test"),
        ({"train": "a"}, ["eval.knn.k=3"], "the recipe's eval section is not a list"),
        (["knn"], [], "eval, entry 0, is not a section of `key: value` lines"),
        ("knn", [], "eval is not a section"),
    ],
)
def test_a_wrong_eval_section_is_named(tmp_path, section, overrides, expected):
    with pytest.raises(UserError) as caught:
        with_eval(tmp_path, section, *overrides)
    assert expected in str(caught.value)


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
def test_an_impossible_design_is_reported(override, expected):
    with pytest.raises(UserError, match=expected):
        load("mae_vil_t", override)
