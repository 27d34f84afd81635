"""`selfvil.Embedder` inside scikit-learn."""

import pickle

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks

import selfvil
from images import random_image
from selfvil.embedding import embedder
from selfvil.errors import UserError


@pytest.fixture
def good(photos):
    return [
        *(photos / "cats" / f"{i}.png" for i in range(5)),
        *(photos / "dogs" / "old" / f"{i}.jpg" for i in range(5, 10)),
    ]


def test_every_kind_of_input_has_the_same_rows(good, photos, model, shards):
    """Paths, PIL images and arrays; batches and threads change nothing beyond rounding; and so has `embed`."""
    transformer = selfvil.Embedder(model, batch_size=3, device="cpu").fit()
    rows = transformer.transform(good)
    assert rows.dtype == np.float32
    assert rows.shape == (10, 96)
    np.testing.assert_allclose(rows, selfvil.embed(photos, model, workers=0, device="cpu").features, atol=2e-5)
    opened = [Image.open(path) for path in good]
    arrays = [np.asarray(image) for image in opened]
    mixed = [str(good[0]), opened[1], arrays[2], arrays[3][:, :, :], *good[4:]]
    for images in (opened, arrays, mixed, np.array([str(path) for path in good])):
        assert np.array_equal(transformer.transform(images), rows)
    assert np.array_equal(transformer.set_params(workers=0).transform(good), rows)
    np.testing.assert_allclose(transformer.set_params(batch_size=None).transform(good), rows, atol=2e-5)
    assert transformer.transform(np.stack([arrays[0]] * 2)).shape == (2, 96)
    assert transformer.transform([]).shape == (0, 96)
    assert np.array_equal(transformer.transform(shards), selfvil.embed(shards, model, workers=0, device="cpu").features)


def test_a_pipeline_learns_and_is_cloned_and_pickled(model, tmp_path):
    """Dark and bright images are told apart; copies have parameters and no weights, and give the same."""
    images = [Image.new("RGB", (24, 16), (value,) * 3) for value in (10, 20, 30, 200, 220, 240)]
    pipeline = make_pipeline(selfvil.Embedder(str(model), device="cpu"), LogisticRegression())
    assert pipeline.fit(images, [0, 0, 0, 1, 1, 1]).predict([images[1], images[4]]).tolist() == [0, 1]
    content = pickle.dumps(pipeline)
    assert len(content) < 10_000
    assert pickle.loads(content).predict_proba(images).tolist() == pipeline.predict_proba(images).tolist()
    transformer = pipeline[0]
    assert clone(transformer).get_params() == transformer.get_params()
    assert "_loaded" not in vars(clone(transformer))
    search = GridSearchCV(pipeline, {"embedder__readout": ["mean", "first_last_mean"]}, cv=2)
    assert search.fit(images, [0, 1, 0, 1, 0, 1]).cv_results_["mean_test_score"].shape == (2,)
    names = transformer.get_feature_names_out()
    assert names[0] == "embedder0"
    assert len(names) == 96


@pytest.mark.parametrize(
    "check",
    [
        "check_estimator_cloneable", "check_estimator_repr", "check_get_params_invariance", "check_mixin_order",
        "check_no_attributes_set_in_init", "check_set_params", "check_valid_tag_types",
    ],
)  # fmt: skip
def test_scikit_learns_own_checks(model, check):
    """Those without a table of numbers; `check_estimator` skips all checks of an estimator that takes none."""
    getattr(estimator_checks, check)("Embedder", selfvil.Embedder(str(model), device="cpu"))


def test_the_model_is_loaded_once_and_again_after_a_change(good, model, monkeypatch):
    calls, original = [], embedder.load_encoder
    monkeypatch.setattr(embedder, "load_encoder", lambda **given: calls.append(given) or original(**given))
    transformer = selfvil.Embedder(model, device="cpu")
    assert transformer.transform(good[:1]).shape == (1, 96)
    transformer.set_params(batch_size=7, workers=0).transform(good[:1])
    assert len(calls) == 1
    assert transformer.set_params(readout="mean").transform(good[:1]).shape == (1, 32)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([b"x"], "image 0 is a bytes; expected a path"),
        (["nowhere.png"], "nowhere.png cannot be read: No such file"),
        (Image.new("RGB", (4, 4)), "Embedder got one Image; expected a list"),
        (5, "Embedder got one int"),
        (np.zeros((3, 4)), r"an array of shape \[3, 4\]; expected images"),
        ([np.zeros((4, 4, 3), complex)], "image 0 is an array of complex128"),
        ([np.full((4, 4, 3), np.nan)], "image 0 holds NaN"),
        ([np.zeros((4, 4, 2), np.uint8)], r"shape \[4, 4, 2\]; expected uint8"),
        ([random_image(0), np.zeros((0, 4), np.uint8)], r"image 1 is an array of uint8, shape \[0, 4\]"),
        ([Image.new("F", (4, 4))], "image 0 cannot be read: floating-point pixels"),
        ("nowhere", "there is no folder nowhere"),
    ],
)
def test_wrong_input(model, images, message):
    with pytest.raises(UserError, match=message):
        selfvil.Embedder(model, device="cpu").transform(images)


def test_no_row_is_left_out(photos, model, tmp_path):
    with pytest.raises(UserError, match=r"the image cats/3b\.jpg in .* cannot be read"):
        selfvil.Embedder(model, workers=0, device="cpu").transform(photos)
    with pytest.raises(UserError, match=r"There is no folder|there is no"):
        selfvil.Embedder(tmp_path / "nowhere").fit()
    with pytest.raises(UserError, match="There is no readout 'best'"):
        selfvil.Embedder(model, "best").fit()
