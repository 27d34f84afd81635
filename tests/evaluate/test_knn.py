"""k-NN against a literal implementation of the papers, one test image at a time."""

import logging
import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from selfvil.errors import UserError
from selfvil.evaluate import knn as module
from selfvil.evaluate.features import Features, shared_classes
from selfvil.evaluate.knn import classify, knn


def clusters(n: int, classes: int = 4, dim: int = 6, noise: float = 1.0, seed: int = 0) -> Features:
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    return Features(centres[y] + noise * torch.randn(n, dim, generator=generator), y)


def slow_knn(train: Features, test: Features, k: int, temperature: float) -> float:
    correct = 0
    for query, truth in zip(test.x.double(), test.y.tolist()):
        similarities = [
            (float(query @ row / query.norm() / row.norm()), label)
            for row, label in zip(train.x.double(), train.y.tolist())
        ]
        votes: dict[int, float] = {}
        for similarity, label in sorted(similarities, reverse=True)[:k]:
            votes[label] = votes.get(label, 0.0) + math.exp(similarity / temperature)
        correct += max(votes, key=lambda label: votes[label]) == truth
    return 100 * correct / len(test)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_slow_reference(monkeypatch, temperature):
    train, test = clusters(150, seed=1), clusters(60, seed=2)
    ks = (1, 10, 20, 100, 150)
    expected = {k: slow_knn(train, test, k, temperature) for k in ks}
    assert len(set(expected.values())) > 1
    assert knn(train, test, ks, temperature) == expected
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 7 * 150)  # seven test images at a time
    assert knn(train, test, ks, temperature) == expected


@pytest.mark.parametrize("k", [1, 5, 20, 150])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_each_prediction_is_that_of_scikit_learn(k, temperature):
    """The same features in float64, cosine distance, the weight exp(similarity / temperature)."""
    train, test = clusters(300, dim=12, noise=2.0, seed=1), clusters(400, dim=12, noise=2.0, seed=2)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.x.double().numpy(), train.y.numpy())
    expected = torch.from_numpy(theirs.predict(test.x.double().numpy())) == test.y
    assert 0.3 < expected.double().mean() < 0.95
    assert torch.equal(classify(train, test, [k], temperature)[k], expected)


def test_of_equal_votes_the_smallest_label_wins():
    """As in scikit-learn: two neighbours at the same distance, one of each class, in either order."""
    x, query = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    for labels in ([3, 5], [5, 3]):
        train = Features(x, torch.tensor(labels))
        theirs = KNeighborsClassifier(2, metric="cosine", algorithm="brute").fit(x.numpy(), labels)
        assert theirs.predict(query.numpy()).tolist() == [3]
        assert classify(train, Features(query, torch.tensor([3])), [2])[2].tolist() == [True]


def test_the_order_of_rows_their_lengths_and_the_names_of_classes_do_not_matter():
    train, test = clusters(150, seed=1), clusters(60, seed=2)
    order = torch.randperm(150)
    lengths = torch.rand(150, 1) + 0.1
    expected = knn(train, test)
    assert knn(Features(train.x[order], train.y[order]), test) == expected
    assert knn(Features(train.x * lengths, train.y), test) == expected
    assert knn(Features(train.x, 7 * train.y + 3), Features(test.x, 7 * test.y + 3)) == expected


def test_no_temperature_and_no_precision_overflows():
    train, test = clusters(150, noise=0.3, seed=1), clusters(60, noise=0.3, seed=2)
    exact = knn(train, test, temperature=1e-6)
    assert exact[100] == slow_knn(train, test, 1, 0.07)  # at a temperature near 0 only the nearest neighbour counts
    half = Features(train.x.half(), train.y), Features(test.x.half(), test.y)
    assert all(abs(value - knn(train, test)[k]) < 2 for k, value in knn(*half).items())


def test_k_beyond_the_training_images_is_left_out_with_a_note(caplog):
    train, test = clusters(30), clusters(8, seed=2)
    with caplog.at_level(logging.WARNING):
        assert set(knn(train, test)) == {10, 20}
    assert "[100, 200]" in caplog.text
    with pytest.raises(UserError, match="needs at least 10 training images, found 9"):
        knn(clusters(9), test)
    with pytest.raises(UserError, match="needs at least"):
        knn(train, test, ks=(0,))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (clusters(0), clusters(5), "no training images"),
        (clusters(20), clusters(0), "no test images"),
        (clusters(20), clusters(5, dim=3), "6 columns, test features 3"),
        (clusters(20, classes=3), clusters(20), r"no training image has: \[3\]; training has 3 classes, 0 to 2"),
        (Features(torch.zeros(20, 6), torch.full((20,), -1)), clusters(5), "training images have no label"),
        (clusters(20), Features(torch.full((1, 6), float("nan")), torch.tensor([0])), "test images hold NaN"),
    ],
)  # fmt: skip
def test_features_that_do_not_fit(train, test, message):
    with pytest.raises(UserError, match=message):
        shared_classes(train, test)
    with pytest.raises(UserError):
        knn(train, test)
