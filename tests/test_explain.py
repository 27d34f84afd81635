"""`selfvil explain` and `selfvil recipes NAME`."""

import pytest

from selfvil.cli import main
from selfvil.errors import UserError
from selfvil.evaluate import EVALUATIONS
from selfvil.evaluate.entries import entry_model
from selfvil.explain import explain
from selfvil.objectives import OBJECTIVES, settings_model
from selfvil.recipe import Recipe, find


def test_a_key_has_documentation_type_limits_and_default():
    text = explain("optim.base_lr")
    assert "Learning rate for 256 images per step" in text
    assert "type: number, above 0" in text
    assert "default: none: it must be given" in text
    assert 'type: cosine | wsd | constant\n  default: "cosine"' in explain("optim.schedule")
    assert "type: text, or list of text" in explain("data.train")


def test_keys_of_objectives_name_the_objectives():
    assert "objective.mask_ratio (mae" in explain("objective.mask_ratio")
    assert "objective.local_crops (dino" in explain("objective.local_crops")
    assert "mae" not in explain("objective.local_crops").partition(")")[0]


def test_evaluations_have_their_own_keys():
    assert "eval.k (knn)" in explain("eval.k")
    assert "eval.every (knn, linear, linear_grid, mae_probe, attentive, few_label, finetune, " in explain("eval.every")
    assert "default: [10, 20, 100, 200]" in explain("eval.knn.k")
    assert explain("eval.knn").startswith("eval.knn: Accuracy of weighted k-nearest-neighbour")


def test_every_section_and_key_can_be_explained():
    for section, field in Recipe.model_fields.items():
        tables = {
            "objective": [settings_model(name) for name in OBJECTIVES],
            "eval": [entry_model(name) for name in EVALUATIONS],
        }
        for model in tables.get(section, [field.annotation]):
            for key in model.model_fields:
                assert "type: " in explain(f"{section}.{key}")
                assert key in explain(section)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("optim.lr", "did you mean optim.base_lr?"),
        ("optimizer.lr", "did you mean optim?"),
        ("budget.batch_size", "did you mean optim.batch_size?"),
        ("objective.mask_ration", "did you mean objective.mask_ratio"),
        ("objective.zzz", "valid keys"),
        ("", "sections: model"),
        ("eval.knn.kk", "did you mean eval.knn.k?"),
        ("eval.tests", "did you mean eval.test?"),
    ],
)
def test_an_unknown_key_gives_similar_ones(name, expected):
    with pytest.raises(UserError) as caught:
        explain(name)
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 1_000


def test_the_commands_print(capsys):
    for words, expected in {("explain", "run.seed"): "Seed of", ("recipes", "demo"): find("demo").read_text()}.items():
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code
        assert expected in capsys.readouterr().out
