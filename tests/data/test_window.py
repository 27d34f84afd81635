"""The order of two levels: each sample once an epoch, few shards at a time, a function of the position alone."""

import numpy as np
import pytest

from selfvil.data.order import WindowOrder

SIZES = {
    "one shard": [10],
    "equal": [50] * 12,
    "unequal": [1, 200, 3, 40, 1, 1, 75, 60, 2, 19, 33],
    "a prime number of shards": list(range(1, 18)),
}


def order(sizes, window=4, seed=3):
    return WindowOrder(np.cumsum(sizes).tolist(), seed, window)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("window", [1, 2, 4, 1000])
def test_an_epoch_has_every_sample_once(sizes, window):
    each = order(sizes, window)
    for epoch in (0, 1, 5, 10_000):
        ids = each.ids(np.arange(each.length) + epoch * each.length)
        assert ids.dtype == np.int64
        np.testing.assert_array_equal(np.sort(ids), np.arange(each.length))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_window_has_few_shards_and_is_announced(sizes):
    window = 4
    each = order(sizes, window)
    ends = np.cumsum(sizes)
    positions = np.arange(3 * each.length)
    shards = np.searchsorted(ends, each.ids(positions), side="right")
    seen = []
    for position in positions.tolist():
        now, following = each.shards(position)
        assert len(now) <= window
        assert shards[position] in now
        if not seen or seen[-1][0] != now:
            if seen:
                assert seen[-1][1] == now  # the next window was announced in the one before
            seen.append((now, following))
    lengths = [len(now) for now, _ in seen]
    assert max(lengths) - min(lengths) <= 1
    assert len(seen) >= 3 * -(-len(sizes) // window) - 2  # a window may be equal to the next one, with one window


def test_positions_in_any_order_and_over_epochs():
    each = order(SIZES["unequal"])
    positions = np.arange(each.length - 100, 3 * each.length)
    whole = each.ids(positions)
    shuffled = np.random.default_rng(0).permutation(len(positions))
    np.testing.assert_array_equal(order(SIZES["unequal"]).ids(positions[shuffled]), whole[shuffled])
    np.testing.assert_array_equal(np.concatenate([each.ids(positions[i : i + 1]) for i in range(len(whole))]), whole)
    assert each.ids(np.array([], np.int64)).shape == (0,)


def test_late_positions_are_immediate():
    each = order([5000] * 20_000, window=16)
    far = np.arange(10**13, 10**13 + 64)
    ids = each.ids(far)
    assert ((ids >= 0) & (ids < 10**8)).all()
    assert len(set(ids.tolist())) == 64


def test_epochs_seeds_and_windows_have_different_permutations():
    sizes = [100] * 16
    one = order(sizes)
    length = one.length
    first, second = one.ids(np.arange(length)), one.ids(np.arange(length, 2 * length))
    assert (first == second).mean() < 0.02
    assert (first == order(sizes, seed=4).ids(np.arange(length))).mean() < 0.02
    ends = np.cumsum(sizes)
    windows = [one.shards(400 * k)[0] for k in range(8)]
    assert len({tuple(each) for each in windows}) == 8
    inside = []  # the places of the samples within their windows
    for k in range(8):
        ids = one.ids(np.arange(400 * k, 400 * k + 400))
        place = {shard: number for number, shard in enumerate(windows[k])}
        shards = np.searchsorted(ends, ids, side="right")
        inside.append(np.array([place[s] for s in shards.tolist()]) * 100 + ids % 100)
    for k in range(7):
        assert (inside[k] == inside[k + 1]).mean() < 0.05


def test_shards_are_well_mixed_within_a_window():
    each = order([500] * 8, window=4)
    shards = each.ids(np.arange(2000)) // 500
    counts = np.array([np.bincount(part, minlength=8)[np.unique(shards)] for part in shards.reshape(20, 100)])
    assert counts.mean() == 25
    assert 12 < counts.var() < 27  # hypergeometric: 17.8


def test_another_seed_for_replacements_stays_in_the_same_window():
    each = order(SIZES["unequal"])
    other = each.seeded(4)
    positions = np.arange(2 * each.length)
    ends = np.cumsum(SIZES["unequal"])
    assert (each.ids(positions) != other.ids(positions)).any()
    for position, id in zip(positions.tolist(), other.ids(positions).tolist()):
        assert np.searchsorted(ends, id, side="right") in each.shards(position)[0]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="window of one shard"):
        order([3], window=0)
