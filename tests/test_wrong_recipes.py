"""Wrong recipes and overrides, as a user may write them: each gives one message that fits on a screen, with the file or
the override that causes it, and what to do."""

import logging

import pytest
import yaml

import runs
from selfvil.errors import UserError
from selfvil.pretrain import pretrain
from selfvil.recipe import find, load, read

LONGEST = 1_000


def refusal(source, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load(source, overrides)
    message = str(caught.value)
    assert len(message) < LONGEST, f"{len(message)} characters: {message}"
    assert "Traceback" not in message
    assert "pydantic" not in message
    return message


OVERRIDES = {
    # Mistyped keys, and what other programs call them.
    "optim.lr=1e-3": "override 'optim.lr=1e-3': unknown key optim.lr = '1e-3' (did you mean optim.base_lr?)",
    "optim.learning_rate=1e-3": "did you mean optim.base_lr?",
    "optim.batch_sise=3": "did you mean optim.batch_size?",
    "optim.bs=3": "did you mean optim.batch_size?",
    "optim.wd=0.1": "did you mean optim.weight_decay?",
    "optim.gradient_accumulation_steps=4": "did you mean optim.accumulate?",
    "optim.grad_clip=1": "did you mean optim.clip_norm?",
    "optim.epochs=3": "did you mean budget.epochs?",
    "optim.seed=3": "did you mean run.seed?",
    "budget.max_steps=100": "did you mean budget.steps?",
    "data.num_workers=2": "did you mean data.workers?",
    "data.path=images": "did you mean data.train?",
    "data.batch_size=3": "did you mean optim.batch_size?",
    "model.image_size=64": "did you mean model.img_size?",
    "model.arch=vil_tiny": "did you mean model.name?",
    "run.output_dir=here": "did you mean run.out?",
    "run.bf16=true": "did you mean run.precision?",
    "monitor.project=x": "did you mean monitor.wandb?",
    "objective.mask_ration=.5": "did you mean objective.mask_ratio?",
    "optim.zzz=1": "unknown key optim.zzz = 1 (valid keys: batch_size, accumulate, base_lr",
    # Sections, and the form of an override.
    "optimizer.base_lr=1": "there is no section optimizer (did you mean optim?)",
    "zzz.base_lr=1": "there is no section zzz (sections: model, data, objective, optim",
    "batch_size=3": "is not of the form section.key=value, such as optim.batch_size=256",
    "optim.batch_size": "is not of the form section.key=value",
    "optim.batch_size.x=3": "is not of the form section.key=value",
    "=": "is not of the form section.key=value",
    "objective=dino": "is not of the form section.key=value",
    # Types.
    "optim.batch_size=many": "optim.batch_size = 'many': input should be a valid integer",
    "optim.batch_size=2.5": "integer, got a number with a fractional part",
    "optim.batch_size=": "optim.batch_size = None",
    "optim.base_lr=[1, 2]": "optim.base_lr = [1, 2]: input should be a valid number",
    "optim.base_lr=.nan": "finite",
    "data.mean=0.5": "data.mean = 0.5: input should be a valid list",
    "data.mean=[a, b, c]": "data.mean = 'a': input should be a valid number",
    "data.train=null": "data.train = None: input should be a valid string, or input should be a valid list",
    "model.img_size=[1, 2, 3]": "model.img_size = [1, 2, 3]",
    "model.name=null": "model.name = None: input should be a valid string",
    "monitor.tensorboard=perhaps": "monitor.tensorboard = 'perhaps': input should be a valid boolean",
    "objective.name=[dino]": "objective.name = ['dino'] is not an objective; choose one of: mae",
    "run.seed=" + "9" * 6000: "run.seed",
    "optim.base_lr=" + "[" * 100_000: "optim.base_lr = '[[",
    # Ranges, and values that do not fit together.
    "optim.betas=[2, 3]": "optim.betas = 2: input should be less than 1",
    "optim.warmup=5": "optim.warmup = 5: input should be less than 1",
    "budget.steps=-1": "budget.steps = -1: input should be greater than 0",
    "objective.mask_ratio=1": "less than 1",
    "objective.name=maee": "objective.name = 'maee' is not an objective; choose one of: mae",
    "optim.schedule=wds": "'cosine', 'wsd' or 'constant'",
    "optim.min_lr=1": "min_lr 1, the rate at the end, is above the peak rate 0.004 that base_lr 0.004 gives",
    "optim.accumulate=3": "cifar10_mae.yaml with optim.accumulate=3: optim: batch_size 256 is not divisible by",
    "model.img_size=30": "img_size [30, 30] is not divisible by patch_size 4",
    "model.in_chans=1": "data.mean has 3 values, but model.in_chans is 1",
    "eval.train=a.tar": "give both train and test",
    "eval.knn.train.x=a.tar": "not of the form section.key=value",
    "eval.knn.tran=a.tar": "unknown key eval.knn.tran = 'a.tar' (did you mean eval.knn.train?)",
    "objective.name=dino": "with objective.name=dino: objective.local_crop_size [96, 96] is larger than "
    "model.img_size [32, 32]: small crops must not be larger than the image, such as [16, 16]",
}  # fmt: skip


@pytest.mark.parametrize(("override", "expected"), OVERRIDES.items(), ids=[each[:40] for each in OVERRIDES])
def test_a_wrong_override_is_named(override, expected):
    message = refusal("cifar10_mae", override)
    assert expected in message
    assert override[:80].rstrip("]") in message or override.partition("=")[2] in message


FILES = {
    "": "is not a recipe",
    "- a list": "is not a recipe: expected sections",
    "just text": "is not a recipe: expected sections",
    "model: [": "line 1, column 9: expected the node content",
    "lr: 3": "lr is not a section of `key: value` lines",
    "optim:\n\tbatch_size: 3": "line 2, column 1: found character '\\t'",
    "optim:\n  batch_size: 3\n   base_lr: 1": "line 3",
    "data:\n  train: *.tar": "or put text that begins with * or & in quotes",
    "optim: {batch_size: 3}\noptim: {base_lr: 1}": "line 2, column 1: optim was given before, in line 1",
    "a: &a [x]\nb: [*a, *a]": "*a is an alias, and recipes have none",
    "model: !!python/object/apply:os.system ['true']": "recipes have plain values, no tags",
    "run: {seed: " + "9" * 6000 + "}": "an impossible number or date",
    "? [a]\n: b": "a list or a mapping cannot be a key",
    "a: 1\n---\nb: 2": "found another document",
    "a: \x00": "unacceptable character",
    "[" * 100_000: "nested deeper than 16 levels",
    "{a: " * 100_000: "nested deeper than 16 levels",
    "- " * 20_000: "nested deeper than 16 levels",
    "# " + "x" * 2**20 + "\n": "more than 1 MiB",
    "optimizer: {batch_size: 3}": "unknown section optimizer (did you mean optim?)",
    "model: {name: vil_tiny_patch16_224}": "missing section data",
    "1: {a: 2}": "unknown section 1",
}


@pytest.mark.parametrize(("text", "expected"), FILES.items(), ids=range(len(FILES)))
def test_a_wrong_file_is_named(tmp_path, text, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    message = refusal(path)
    assert expected in message
    assert "mine.yaml" in message


def test_an_alias_bomb_is_refused_before_it_is_built(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    (tmp_path / "recipe.yaml").write_text("\n".join(lines))
    assert "alias" in refusal(tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="alias"):  # a run's own file is no more to be trusted
        read(tmp_path / "recipe.yaml")


def test_binary_and_unreadable_files_are_refused(tmp_path):
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert "is not a text file in UTF-8" in refusal(tmp_path / "image.yaml")
    assert "is a folder: give the recipe's file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mae_vil", "did you mean mae_vil_b or mae_vil_"),
        ("mae_vil_s", "mae_vil_"),
        ("cifar10-mae", "did you mean cifar10_mae"),
        ("recipes/mae_vil.yaml", "did you mean mae_vil_b or mae_vil_"),
        ("zzz", "those are camvid_lejepa, camvid_mae, "),
        ("x" * 3000, "no recipe xxx"),
    ],
)
def test_a_missing_recipe_is_refused(name, expected):
    assert expected in refusal(name)


def test_every_wrong_key_is_reported_with_its_origin(tmp_path):
    tree = yaml.safe_load(find("cifar10_mae").read_text())
    tree["optim"]["lr"] = 3
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    message = refusal(tmp_path / "mine.yaml", "data.wrkers=1")
    assert "mine.yaml: unknown key optim.lr = 3" in message
    assert "override 'data.wrkers=1': unknown key data.wrkers = 1" in message
    many = refusal("cifar10_mae", *(f"optim.key{number}={'x' * 500}" for number in range(40)))
    assert "and 37 more" in many


def test_an_override_of_the_budget_replaces_that_of_the_recipe():
    for key, value in {"steps": 100, "epochs": 2.0, "samples": 640}.items():
        budget = load("cifar10_mae", [f"budget.{key}={value}"]).budget
        given = {name for name in ("steps", "epochs", "samples") if getattr(budget, name) is not None}
        assert given == {key}
    assert load("cifar10_mae", ["budget.samples=null", "budget.steps=3"]).budget.steps == 3
    assert load("cifar10_mae", ["budget.pause_minutes=1"]).budget.samples == 180_000
    assert "exactly one of" in refusal("cifar10_mae", "budget.steps=3", "budget.epochs=3")


def test_another_objective_takes_its_own_defaults(caplog):
    with caplog.at_level(logging.WARNING):
        recipe = load("cifar10_mae", ["objective.local_crop_size=16", "objective.name=dino"])
    assert recipe.objective.name == "dino"
    assert recipe.objective.local_crop_size == (16, 16)
    assert recipe.objective.out_dim == 65_536
    assert "the recipe's settings of mae are left out (mask_ratio, decoder_dim" in caplog.text
    assert len(caplog.records) == 1
    caplog.clear()
    assert load("cifar10_mae", ["objective.name=mae"]).objective.decoder_dim == 64
    assert not caplog.records


def test_text_may_look_like_something_else():
    recipe = load("cifar10_mae", ["run.out=2026-11-26", "monitor.wandb=42", "data.train=on"])
    assert (recipe.run.out, recipe.monitor.wandb, recipe.data.train) == ("2026-11-26", "42", "on")
    assert load("cifar10_mae", ["monitor.wandb=null"]).monitor.wandb is None
    assert load("cifar10_mae", ["data.train=[a.tar, b.tar]"]).data.train == ["a.tar", "b.tar"]


@pytest.mark.parametrize(
    "recipe", ["cifar10_mae", "cifar10_simmim", "cifar10_autoregressive", "cifar10_ijepa", "cifar10_distill"]
)
@pytest.mark.parametrize("scale", ["[0,1]", "[1,0.2]", "[0.5,2]"])
def test_an_impossible_crop_scale_is_refused_by_every_objective(recipe, scale):
    with pytest.raises(UserError, match=r"objective\.crop_scale: .* is not a range of shares"):
        load(recipe, [f"objective.crop_scale={scale}"])


@pytest.mark.parametrize("objective", ["mae", "simmim"])
def test_overlapping_patches_are_refused_where_pixels_are_predicted(objective, digit_shards, tmp_path):
    with pytest.raises(UserError, match=r"model\.stride makes patches overlap"):
        pretrain(runs.small(objective, digit_shards, tmp_path / "run", "model.stride=2"))
    assert not (tmp_path / "run").exists()
