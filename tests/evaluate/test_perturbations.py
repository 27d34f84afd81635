"""Occluded and shuffled images against plain loops."""

import pytest
import torch

from selfvil.evaluate.perturbations import Perturbed, occlude, shuffle


def test_occlusion_sets_exactly_the_first_cells_to_zero():
    image = torch.rand(3, 8, 12) + 1
    order = torch.randperm(16)
    result = occlude(image, order, 4, 0.25)
    for cell in range(16):
        row, column = divmod(cell, 4)
        here = slice(2 * row, 2 * row + 2), slice(3 * column, 3 * column + 3)
        expected = torch.zeros(3, 2, 3) if cell in order[:4] else image[:, here[0], here[1]]
        assert torch.equal(result[:, here[0], here[1]], expected)
    assert torch.equal(occlude(image, order, 4, 0.0), image)
    assert occlude(image, order, 4, 1.0).abs().sum() == 0


def test_shuffled_cells_are_those_of_the_image():
    image = torch.rand(3, 9, 12)  # the last row belongs to no cell
    order = torch.randperm(16)
    result = shuffle(image, order, 4)
    for cell in range(16):
        (row, column), (other_row, other_column) = divmod(cell, 4), divmod(int(order[cell]), 4)
        found = result[:, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
        wanted = image[:, 2 * other_row : 2 * other_row + 2, 3 * other_column : 3 * other_column + 3]
        assert torch.equal(found, wanted)
    assert torch.equal(result[:, 8], image[:, 8])
    assert torch.equal(shuffle(image, torch.arange(16), 4), image)


def test_a_view_makes_all_perturbations_of_an_image():
    view = Perturbed(lambda image: image, occlusions=[0.25, 0.75], shuffles=[2])
    image = torch.rand(3, 16, 16) + 1
    torch.manual_seed(3)
    views = view(image)
    assert view.names == ["clean", "occlusion_25", "occlusion_75", "shuffle_2"]
    assert torch.equal(views[0], image)
    assert float((views[1] == 0).double().mean()) == pytest.approx(0.25)
    assert not ((views[1] == 0) & (views[2] != 0)).any()  # what 25 % hide, 75 % hide too
    assert torch.equal(views[3].flatten(1).sort().values, image.flatten(1).sort().values)
    torch.manual_seed(3)
    assert torch.equal(view(image), views)
