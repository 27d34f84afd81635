"""The linear probe against scikit-learn: the problem is convex, so both must find the same optimum."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from selfvil.errors import UserError
from selfvil.evaluate import few_label, intervals, linear, settings
from selfvil.evaluate.features import Features
from selfvil.evaluate.few_label import few_label_draws
from selfvil.evaluate.linear import linear_probe


def few_label_probe(*arguments, **how) -> tuple[float, float]:
    """Mean and standard deviation over draws of the accuracy in percent."""
    found = intervals.accuracy(few_label_draws(*arguments, **how))
    return found.value, found.deviation or 0.0


def mixture(n: int, classes: int = 4, dim: int = 12, seed: int = 0) -> Features:
    """Overlapping classes; features of very different scales, correlated, one constant and one repeated."""
    fixed = torch.Generator().manual_seed(7)
    centres = torch.randn(classes, dim, generator=fixed)
    mixing = torch.randn(dim, dim, generator=fixed) * torch.logspace(0, -2, dim)
    generator = torch.Generator().manual_seed(seed)
    y = torch.randperm(n, generator=generator) % classes
    x = (0.7 * centres[y] + torch.randn(n, dim, generator=generator)) @ mixing + 5
    x[:, 3] = 2.5
    x[:, 4] = x[:, 5]
    return Features(x, y)


def standardised(train: Features, test: Features) -> tuple[np.ndarray, np.ndarray]:
    mean, std = train.x.double().mean(0), train.x.double().std(0, correction=0)
    std[std < 1e-9] = torch.inf
    return ((train.x - mean) / std).numpy(), ((test.x - mean) / std).numpy()


def sklearn_model(x: np.ndarray, y: torch.Tensor, strength: float) -> LogisticRegression:
    return LogisticRegression(C=1 / (strength * len(x)), tol=1e-9, max_iter=10000).fit(x, y.numpy())


def objective(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor, strength: float) -> float:
    return float(F.cross_entropy(x @ weights + biases, y) + strength / 2 * weights.square().sum())


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize(("n", "dim"), [(300, 12), (30, 50)], ids=["tall", "wide"])
@pytest.mark.parametrize("start", ["zero", "elsewhere"])
def test_the_solver_finds_the_optimum_of_scikit_learn(strength, n, dim, start):
    train = mixture(n, dim=dim)
    x = torch.from_numpy(standardised(train, train)[0]).float()
    axes, spread = linear.principal_axes(x)
    assert torch.allclose(x @ axes @ axes.T, x, atol=1e-4)  # nothing is lost
    began = (torch.randn(axes.shape[1], 4), torch.randn(4)) if start == "elsewhere" else None
    weights, biases = linear.solve(x @ axes, train.y, 4, strength, spread, began)
    weights = axes @ weights
    theirs = sklearn_model(x.double().numpy(), train.y, strength)
    expected = torch.from_numpy(theirs.coef_.T), torch.from_numpy(theirs.intercept_)
    least = objective(x.double(), train.y, *expected, strength)
    found = objective(x.double(), train.y, weights.double(), biases.double(), strength)
    assert found == pytest.approx(least, rel=1e-5, abs=5e-6)
    predicted = x.double() @ expected[0] + expected[1]
    difference = x @ weights + biases - predicted
    difference = difference - difference.mean(dim=1, keepdim=True)  # a shift of all scores changes nothing
    assert (
        difference.abs().max() < 0.05 * predicted.abs().max()
    )  # the loss is flat where the probabilities are near 0 and 1


def test_accuracy_and_choice_are_those_of_scikit_learn():
    train, test = mixture(600, seed=1), mixture(400, seed=2)
    result = linear_probe(train, test, seed=3)
    x, queries = standardised(train, test)
    fitted, held = linear.stratified_split(train.y, 0.1, seed=3)
    expected = {}
    for strength in result.held_out:
        model = sklearn_model(x[fitted], train.y[fitted], strength)
        expected[strength] = 100 * model.score(x[held], train.y[held].numpy())
    assert result.held_out == pytest.approx(expected)
    assert result.strength == max(expected, key=lambda strength: (round(expected[strength], 6), strength))
    model = sklearn_model(x, train.y, result.strength)
    assert result.accuracy == pytest.approx(100 * model.score(queries, test.y.numpy()), abs=0.3)
    assert 50 < result.accuracy < 98  # the task is neither trivial nor impossible


def test_dinov3s_protocol_is_that_of_scikit_learn():
    """Values of C, features as they are, chosen on held-out images, the final fit with the same C on all images."""
    train, test = mixture(600, seed=1), mixture(1000, seed=2)
    cs = linear.DINOV3_CS[12:33:4]
    result = linear_probe(train, test, cs=cs, standardise=False, seed=3)
    fitted, held = linear.stratified_split(train.y, 0.1, seed=3)
    x, queries = train.x.double().numpy(), test.x.double().numpy()
    held_out = {}
    for c in cs:
        model = LogisticRegression(C=c, tol=1e-10, max_iter=20000).fit(x[fitted], train.y[fitted].numpy())
        held_out[c] = 100 * model.score(x[held], train.y[held].numpy())
    assert list(result.held_out.values()) == pytest.approx(list(held_out.values()))
    best = max(held_out, key=lambda c: (round(held_out[c], 6), -c))
    assert result.strength == pytest.approx(1 / (best * 600))
    model = LogisticRegression(C=best, tol=1e-10, max_iter=20000).fit(x, train.y.numpy())
    assert result.accuracy == pytest.approx(100 * model.score(queries, test.y.numpy()), abs=0.1)
    assert len(linear.DINOV3_CS) == 45
    assert (linear.DINOV3_CS[0], linear.DINOV3_CS[-1]) == pytest.approx((1e-6, 1e5))


def test_the_grid_is_given_once():
    assert settings("linear", {"c": "dinov3"}).c == "dinov3"
    assert settings("linear", {"c": 3}).c == settings("linear", {"c": "3e0"}).c == [3]
    for values, message in [
        ({"c": 1, "strengths": [1]}, "give strengths or c, not both"),
        ({"c": "dinov2"}, r"linear\.c"),
        ({"c": [0]}, r"linear\.c"),
        ({"c": []}, r"linear\.c"),
    ]:
        with pytest.raises(UserError, match=message):
            settings("linear", values)


def test_shares_of_the_labels():
    """1 % of each class, rounded, but at least one image; all labels are the whole fit."""
    train, test = mixture(400, seed=1), mixture(300, seed=2)
    counts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_label, "solve", lambda x, y, *rest: counts.append(y.bincount().tolist()) or linear.solve(
            x, y, *rest))  # fmt: skip
        for share in ("1%", "2.6%", "10%", "0.01%"):
            assert few_label.few_label_draws(train, test, share, draws=2).shape == (2, 300)
    assert counts == [[1] * 4] * 2 + [[3] * 4] * 2 + [[10] * 4] * 2 + [[1] * 4] * 2
    draws = few_label.few_label_draws(train, test, "100%", draws=2, strength=1e-2)
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(
        few_label.few_label_draws(train, test, "5%", draws=3), few_label.few_label_draws(train, test, 5, draws=3)
    )


@pytest.mark.parametrize("value", [0, -1, "0%", "101%", "1", "x%", "%", True, 1.5, [], ["1%", 0]])
def test_wrong_numbers_of_labels(value):
    with pytest.raises(UserError, match="labels_per_class"):
        settings("few_label", {"labels_per_class": value})
    assert settings("few_label", {"labels_per_class": "1%"}).labels_per_class == ["1%"]
    assert settings("few_label", {"labels_per_class": ["1%", 5]}).labels_per_class == ["1%", 5]


def test_the_held_out_part():
    y = torch.tensor([0] * 40 + [1] * 10 + [2] * 2 + [3])
    fitted, held = linear.stratified_split(y, 0.1, seed=0)
    assert sorted(fitted.tolist() + held.tolist()) == list(range(53))
    assert y[held].bincount(minlength=4).tolist() == [4, 1, 1, 0]
    assert not torch.equal(held, linear.stratified_split(y, 0.1, seed=1)[1])
    assert linear.stratified_split(y, 0.9, seed=0)[0].tolist()  # even then each class keeps one to fit on
    assert y[linear.stratified_split(y, 0.99, seed=0)[0]].unique().tolist() == [0, 1, 2, 3]


def test_results_repeat_and_do_not_depend_on_units_or_class_names():
    train, test = mixture(300, seed=1), mixture(200, seed=2)
    expected = linear_probe(train, test)
    assert linear_probe(train, test) == expected
    scale, shift = torch.logspace(-3, 3, 12), torch.linspace(-9, 9, 12)
    moved = Features(train.x * scale + shift, 5 * train.y + 2), Features(test.x * scale + shift, 5 * test.y + 2)
    assert linear_probe(*moved).accuracy == pytest.approx(expected.accuracy, abs=0.5)
    few = few_label_probe(train, test)
    assert few_label_probe(*moved) == pytest.approx(few, abs=0.2)


def test_the_order_of_training_rows_does_not_change_a_fit():
    train, test = mixture(300, seed=1), mixture(200, seed=2)
    order = torch.randperm(300)
    accuracies = []
    for part in (train, Features(train.x[order], train.y[order])):
        x, queries = linear.standardised(part, test)
        axes, spread = linear.principal_axes(x)
        weights = linear.solve(x @ axes, part.y, 4, 1e-3, spread)
        accuracies.append(linear.accuracy(weights, queries @ axes, test.y))
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.5)


def test_the_weakest_strength_is_a_warning(caplog):
    y = (torch.arange(200) % 10 == 0).long()  # a strong penalty leaves the biases alone: always the common class
    features = Features(torch.stack([y + 0.1 * torch.randn(200), torch.randn(200)], dim=1), y)
    with caplog.at_level(logging.WARNING):
        result = linear_probe(features, features, strengths=(1e3, 1e2, 1e-2))
    assert result.held_out == {1e3: 90.0, 1e2: 90.0, 1e-2: 100.0}
    assert result.strength == 1e-2
    assert "chose its weakest strength" in caplog.text


def test_few_labels_against_scikit_learn():
    train, test = mixture(200, seed=1), mixture(300, seed=2)
    x, queries = standardised(train, test)
    generator = torch.Generator().manual_seed(4)
    accuracies = []
    for _ in range(3):
        order = torch.randperm(200, generator=generator)
        chosen = torch.cat([order[train.y[order] == label][:5] for label in range(4)])
        assert len(set(chosen.tolist())) == 20
        model = sklearn_model(x[chosen], train.y[chosen], 1 / 20)
        accuracies.append(100 * model.score(queries, test.y.numpy()))
    mean, deviation = few_label_probe(train, test, labels_per_class=5, draws=3, seed=4)
    assert mean == pytest.approx(np.mean(accuracies), abs=0.3)
    assert deviation == pytest.approx(np.std(accuracies, ddof=1), abs=0.3)
    assert few_label_probe(train, test, draws=1)[1] == 0.0
    assert few_label_probe(train, test, seed=5) != few_label_probe(train, test, seed=6)


def test_few_labels_with_all_of_them_is_the_whole_fit():
    train, test = mixture(200, seed=1), mixture(300, seed=2)
    mean, deviation = few_label_probe(train, test, labels_per_class=50, draws=4, strength=1e-2)
    whole = linear_probe(train, test, strengths=[1e-2]).accuracy
    assert mean == pytest.approx(whole, abs=0.2)
    assert deviation < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda train, test: linear_probe(mixture(50, classes=1), mixture(9, classes=1)), "at least two classes"),
        (lambda train, test: few_label_probe(mixture(50, classes=1), mixture(9, classes=1)), "at least two classes"),
        (lambda train, test: linear_probe(mixture(50, classes=3), test), r"no training image has: \[3\]"),
        (lambda train, test: linear_probe(mixture(4), test), "held out"),
        (lambda train, test: linear_probe(train, test, strengths=[]), "strengths above 0"),
        (lambda train, test: linear_probe(train, test, strengths=[0.0]), "strengths above 0"),
        (lambda train, test: linear_probe(train, test, holdout=1.0), "holdout < 1"),
        (lambda train, test: few_label_probe(train, test, 14), "12 training images, fewer than the 14"),
        (lambda train, test: few_label_probe(train, test, draws=0), "must be above 0"),
        (lambda train, test: few_label_probe(train, test, "0%"), "neither a number of labels"),
    ],
)  # fmt: skip
def test_what_cannot_be_probed(change, message):
    with pytest.raises(UserError, match=message):
        change(mixture(50), mixture(20, seed=2))
