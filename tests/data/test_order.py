"""The stateless order: a random permutation for each epoch, independent of how it is queried."""

import itertools

import numpy as np
import pytest

from selfvil.data.order import Order


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 63, 64, 65, 1000, 4096, 4097, 65537, 262145])
def test_every_epoch_is_a_permutation(length):
    order = Order(length, seed=3)
    for epoch in (0, 1, 1000):
        ids = order.ids(np.arange(length) + epoch * length)
        assert ids.dtype == np.int64
        np.testing.assert_array_equal(np.sort(ids), np.arange(length))


def test_one_call_may_span_epochs_in_any_order():
    order = Order(10, seed=1)
    positions = np.arange(7, 45)
    whole = order.ids(positions)
    np.testing.assert_array_equal(whole, np.concatenate([order.ids(positions[i : i + 1]) for i in range(38)]))
    np.testing.assert_array_equal(whole[::-1], order.ids(positions[::-1]))
    assert order.ids(np.array([], np.int64)).shape == (0,)


def test_late_positions_are_immediate():
    order = Order(1_281_167, seed=0)
    far = np.arange(10**15, 10**15 + 4)
    ids = order.ids(far)
    assert ((ids >= 0) & (ids < 1_281_167)).all()
    assert len(set(ids.tolist())) == 4


def test_epochs_and_seeds_differ():
    orders = [Order(1000, seed).ids(np.arange(1000) + epoch * 1000) for seed in (0, 1, 2**31 - 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        # Two random permutations of 1,000 agree at one position on average, and at more than 8 once in a million pairs.
        assert (one == other).sum() <= 8
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


def test_known_values():
    """A checkpoint stores only the position, so the order is part of the format."""
    assert Order(10, 0).ids(np.arange(10)).tolist() == [1, 4, 0, 8, 2, 7, 9, 3, 5, 6]
    far = np.array([0, 1, 49_999, 50_000, 10**9])
    assert Order(50_000, 7).ids(far).tolist() == [26467, 38409, 9337, 25485, 12166]


@pytest.mark.parametrize("length", [1000, 65537])
def test_neighbours_are_unrelated(length):
    ids = Order(length, seed=5).ids(np.arange(length))
    spread = 1 / np.sqrt(length)
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(ids[:-lag], ids[lag:])[0, 1]) < 4 * spread
    # The mean displacement of a random permutation is a third of its length.
    assert abs(np.abs(ids - np.arange(length)).mean() / length - 1 / 3) < spread


@pytest.mark.parametrize("length", [2, 3, 5, 17, 64, 65])
def test_every_id_is_equally_often_at_every_position(length):
    """Chi-square of id by position over many epochs; row and column sums are fixed, so (length - 1)² degrees."""
    epochs = 2000
    ids = Order(length, seed=1).ids(np.arange(length * epochs)).reshape(epochs, length)
    counts = np.stack([np.bincount(ids[:, place], minlength=length) for place in range(length)])
    expected, degrees = epochs / length, (length - 1) ** 2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - degrees) < 4.5 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("length", [3, 4])
def test_all_permutations_occur_equally_often(length):
    epochs = 6000
    ids = Order(length, seed=2).ids(np.arange(length * epochs)).reshape(epochs, length)
    _, counts = np.unique(ids, axis=0, return_counts=True)
    kinds = 6 if length == 3 else 24
    assert len(counts) == kinds
    assert ((counts - epochs / kinds) ** 2 / (epochs / kinds)).sum() < kinds - 1 + 4.5 * np.sqrt(2 * (kinds - 1))
