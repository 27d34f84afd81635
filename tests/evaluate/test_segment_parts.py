"""The parts of `segment` against scikit-learn and plain loops."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from selfvil.evaluate.dense import pictures
from selfvil.evaluate.dense.head import LinearHead, Training, _Trainer
from selfvil.evaluate.dense.iou import Tally, confusion, mean_iou
from selfvil.evaluate.dense.knn import NearestPatches, held_out_predictions
from selfvil.evaluate.dense.logistic import CS, fit_logistic
from selfvil.evaluate.dense.masks import Classes
from selfvil.evaluate.dense.patches import PatchFeatures, PatchSample, cell_of, patch_labels, windows
from selfvil.weights import Network, Normalisation
from small import MODELS, network

# --- mean IoU --------------------------------------------------------------------------------------------------------


def masks(count: int = 6, classes: int = 5) -> list[tuple[np.ndarray, np.ndarray]]:
    """Truth with ignored pixels (-1), and predictions; class 4 is never present, class 3 only predicted."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(5, 30, (count, 2))
    return [(generator.integers(-1, 3, size), generator.integers(0, classes - 1, size)) for size in sizes]


def test_iou_equals_a_plain_loop_and_scikit_learn():
    tally = Tally(5)
    for i, (truth, found) in enumerate(masks()):
        tally.add(i, truth, found)
    counts = {c: [0, 0] for c in range(5)}
    right = total = 0
    for truth, found in masks():
        for t, p in zip(truth.ravel().tolist(), found.ravel().tolist()):
            if t < 0:
                continue
            right, total = right + (t == p), total + 1
            for c in {t, p}:
                counts[c][1] += 1
                counts[c][0] += t == p
    expected = [100 * hits / union if union else np.nan for hits, union in counts.values()]
    assert tally.ious == pytest.approx(expected, nan_ok=True)
    assert np.isnan(tally.ious[4])
    assert tally.ious[3] == 0  # predicted but absent: it counts
    assert tally.mean == pytest.approx(np.mean(expected[:4]))
    assert tally.pixel_accuracy == pytest.approx(100 * right / total)
    truth, found = (np.concatenate([pair[i].ravel() for pair in masks()]) for i in (0, 1))
    assert tally.mean == pytest.approx(100 * jaccard_score(truth[truth >= 0], found[truth >= 0], average="macro"))


def test_tallies_of_several_processes_are_one():
    whole, parts = Tally(5), [Tally(5), Tally(5)]
    for i, pair in enumerate(masks()):
        whole.add(i, *pair)
        parts[i % 2].add(i, *pair)
    merged = whole.merge(parts)
    assert (merged.matrix == whole.matrix).all()
    assert merged.interval(200, seed=1) == whole.interval(200, seed=1)


def test_interval_is_that_of_resampled_images():
    tally = Tally(5)
    for i, pair in enumerate(masks(20)):
        tally.add(i, *pair)
    each = [confusion(*pair, 5) for pair in masks(20)]
    generator = np.random.default_rng(7)
    means = [mean_iou(sum(each[i] for i in generator.integers(0, 20, 20))) for _ in range(2_000)]
    assert tally.interval(2_000, seed=0) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.25)
    assert tally.interval(0, seed=0) is None


# --- fits ------------------------------------------------------------------------------------------------------------


def patches(count: int, seed: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, 6, generator=torch.Generator().manual_seed(9))
    return centres[y] + 2 * torch.randn(count, 6, generator=generator), y


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_knn_equals_scikit_learn_at_each_pixel(distance):
    (train, y), (test, _) = patches(120, 1), patches(70, 2)
    pixels = torch.stack([y, (y + 1) % 4, y.flip(0)], dim=1).to(torch.uint8)  # the patches have three pixels
    metric = "cosine" if distance == "cosine" else "euclidean"
    whole = PatchSample(train, pixels, y, torch.zeros(120, dtype=torch.int64))
    held = PatchSample(test, pixels[:70], y[:70], torch.ones(70, dtype=torch.int64))
    found = held_out_predictions(whole, held, [1, 3, 10, 30, 500], [distance], 4)
    assert [k for k, _ in found] == [1, 3, 10, 30]
    for k in (1, 3, 10, 30):
        classifier = KNeighborsClassifier(k, metric=metric, algorithm="brute")
        expected = classifier.fit(train.double().numpy(), pixels.numpy()).predict(test.double().numpy())
        assert NearestPatches(train, pixels, 4, k, distance).predict(test).tolist() == expected.tolist()
        assert found[k, distance].tolist() == expected.tolist()


def test_logistic_regression_equals_scikit_learn():
    (train, y), (test, truth) = patches(200, 1), patches(500, 2)
    y, truth = y * 2, truth * 2  # ids with gaps
    for c, model in fit_logistic(train, y, CS):
        theirs = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(train.double().numpy(), y.numpy())
        ours = model.predict(test)[:, 0].numpy()
        assert 100 * abs((ours == truth.numpy()).mean() - theirs.score(test.numpy(), truth.numpy())) <= 0.1
        assert (ours != theirs.predict(test.double().numpy())).mean() <= 0.002
        if c < 10:  # beyond, the loss is flat to the rounding of float32
            probabilities = (test @ model.weight + model.bias).softmax(dim=1)
            assert np.abs(probabilities.numpy() - theirs.predict_proba(test.double().numpy())).max() < 2e-3


def test_head_is_the_trained_norm_and_convolution():
    """The folded head equals BatchNorm2d and a 1 × 1 Conv2d; one update equals torch's on maps."""
    how = Training(2, 2, 0.1, 0.01, 0.0, (1.0, 1.0), False)
    trainer = _Trainer(6, 3, how, seed=0, device=torch.device("cpu"))
    norm, conv = nn.BatchNorm2d(6), nn.Conv2d(6, 3, 1)
    conv.weight.data = trainer.conv.weight.detach().clone()[..., None, None]
    conv.bias.data.zero_()
    optimizer = torch.optim.AdamW([*norm.parameters(), *conv.parameters()], lr=0.1, weight_decay=0.01)
    maps = torch.randn(2, 6, 3, 4)
    ids = torch.randint(0, 3, (2, 12, 16), dtype=torch.uint8)
    ids[0, :5] = 255
    tokens = maps.flatten(2).mT.reshape(-1, 6)
    trainer.step(tokens, ids.view(-1, 1), [(12, 16)] * 2, (4, 4), Classes(["a", "b", "c"], (255,)))
    logits = F.interpolate(conv(norm(maps)), (12, 16), mode="bilinear", align_corners=False)
    F.cross_entropy(logits, ids.long(), ignore_index=255).backward()
    optimizer.step()
    norm.eval()
    with torch.no_grad():
        expected = F.interpolate(conv(norm(maps)), (12, 16), mode="bilinear", align_corners=False)
        for one, each in zip(maps, expected):
            torch.testing.assert_close(trainer.head().logits(one, (12, 16)), each, rtol=1e-4, atol=1e-5)


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(20, 31), (7, 40), (12, 12), (5, 5)])
@pytest.mark.parametrize("stride", [3, 8, 12])
def test_windows_cover_every_pixel(size, stride):
    covered = np.zeros(size, int)
    boxes = windows(size, (12, 12), (stride, stride))
    for top, left, height, width in boxes:
        assert top >= 0 <= left
        assert (height, width) == (min(12, size[0]), min(12, size[1]))
        covered[top : top + height, left : left + width] += 1
        assert top + height <= size[0]
        assert left + width <= size[1]
    assert covered.min() >= 1
    assert len(set(boxes)) == len(boxes)


def test_windows_of_the_published_sizes():
    """mmsegmentation's example: 512 pixels and stride 341 on 512 x 683 pixels are two windows."""
    assert windows((512, 683), (512, 512), (341, 341)) == [(0, 0, 512, 512), (0, 171, 512, 512)]


def test_sliding_equals_the_plain_pass_where_one_window_covers_the_image():
    head = LinearHead(torch.randn(4, 5), torch.randn(4))
    features = torch.randn(5, 6, 7)
    plain = head.logits(features, (24, 28)).argmax(dim=0)
    found = head.predict(lambda box: features, (24, 28), (512, 512), (341, 341))
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), plain)


def test_sliding_equals_the_mean_of_all_windows():
    head, cell = LinearHead(torch.randn(4, 5), torch.randn(4)), 2
    image = torch.randn(5, 26, 38)

    def features(box):
        top, left, height, width = box
        return F.avg_pool2d(image[:, top : top + height, left : left + width], cell)

    total, count = torch.zeros(4, 26, 38), torch.zeros(26, 38)
    for box in windows((26, 38), (12, 16), (7, 9)):
        top, left, height, width = box
        total[:, top : top + height, left : left + width] += head.logits(features(box), (height, width))
        count[top : top + height, left : left + width] += 1
    found = head.predict(features, (26, 38), (12, 16), (7, 9))
    assert torch.equal(found.long(), (total / count).argmax(dim=0))


def test_logits_are_resized_at_the_centres_of_pixels():
    """Bilinear, align_corners=False: a pixel's value depends on the distance between centres."""
    head = LinearHead(torch.ones(1, 1), torch.zeros(1))
    row = head.logits(torch.tensor([[[0.0, 4.0]]]), (1, 4))[0, 0]
    assert row.tolist() == [0.0, 1.0, 3.0, 4.0]


# --- patches ---------------------------------------------------------------------------------------------------------


def features_of(name: str, **options) -> PatchFeatures:
    normalisation = Normalisation((0.5,) * 3, (0.25,) * 3, (16, 24))
    backbone = timm.create_model("test_convnext", num_classes=0) if name == "convnext" else network(name)
    return PatchFeatures(Network(backbone, normalisation, 0), normalisation, cell_of(backbone), **options)


@pytest.mark.parametrize("name", [*MODELS, "convnext"])
@pytest.mark.parametrize("layers", [1, 2])
def test_features_have_one_vector_for_each_cell_of_any_image(name, layers):
    features = features_of(name, layers=layers)
    for size in ((1, 3), (3, 2), (9, 5)):
        height, width = (side * cell for side, cell in zip(size, features.cell))
        assert features(torch.randn(2, 3, height, width)).shape[2:] == size


@pytest.mark.parametrize("name", MODELS)
def test_features_are_the_tokens_of_the_last_layer_after_the_norm(name):
    features = features_of(name)
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        tokens = features.backbone.forward_features(images)
    prefix = features.backbone.num_prefix_tokens
    expected = tokens if tokens.ndim == 4 else tokens[:, prefix:].unflatten(1, (4, 6))
    torch.testing.assert_close(features(images), expected.permute(0, 3, 1, 2))


def test_the_given_network_is_not_changed():
    backbone = network("vit_tiny_patch16_224").train()
    normalisation = Normalisation((0.5,) * 3, (0.25,) * 3, (16, 24))
    PatchFeatures(Network(backbone, normalisation, 0), normalisation, (4, 4))
    assert backbone.training
    assert not backbone.dynamic_img_size


def test_raw_pixels_are_the_pixels_of_the_cell():
    features = PatchFeatures(None, Normalisation((0.5,) * 3, (0.25,) * 3, (16, 16)), (4, 4))
    image = torch.rand(3, 8, 12)
    found = features(image[None])[0]
    assert torch.equal(found[:, 1, 2], image[:, 4:8, 8:12].flatten())


def test_large_images_are_cut_into_tiles(monkeypatch):
    features = PatchFeatures(None, Normalisation((0.5,) * 3, (0.25,) * 3, (16, 16)), (4, 4))
    image = torch.rand(1, 3, 40, 24)
    whole = features(image)
    monkeypatch.setattr("selfvil.evaluate.dense.patches.MOST_PIXELS", 144)
    assert torch.equal(features(image), whole)


def test_sizes_are_the_nearest_multiples_of_the_cell():
    features = PatchFeatures(None, Normalisation((0.5,) * 3, (0.25,) * 3, (16, 16)), (8, 8), short_side=100)
    assert features.size_of(360, 480) == (96, 136)  # of 100 × 133.3
    assert features.size_of(8, 480) == (96, 6000)
    assert features.size_of(360, 480, scale=0.5) == (48, 64)


def test_labels_of_patches():
    """The most frequent id; ties go to the smaller; a patch that is mostly ignored has none; the rest is filled."""
    mask = np.array([[0, 0, 2, 2], [0, 255, 1, 1], [255, 255, 255, 1], [255, 1, 1, 1]], np.uint8)
    pixels, label = patch_labels(mask, (2, 2), (2, 2), Classes(["a", "b", "c"], (255,)))
    assert label.tolist() == [0, 1, -1, 1]
    assert pixels[0].tolist() == [0, 0, 0, 0]
    assert pixels[1].tolist() == [2, 2, 1, 1]
    assert pixels[3].tolist() == [1, 1, 1, 1]


def test_colours_differ():
    assert len(np.unique(pictures.colours(40), axis=0)) == 40
