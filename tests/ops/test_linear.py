"""The linear map by oneDNN equals torch's in values and gradients, and uses torch where it does not apply."""

import pytest
import torch
import torch.nn.functional as F

from selfvil.ops import linear


def run(how, x, weight, bias):
    inputs = [y.detach().clone().requires_grad_() for y in (x, weight, bias)]
    y = how(*inputs)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("shape", [(1, 16), (5, 24), (2, 7, 48), (2, 3, 5, 32)])
@pytest.mark.parametrize("width", [16, 40])
def test_values_and_gradients_in_float32(shape, width):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(width, shape[-1]), torch.randn(width)
    exact = run(F.linear, x.double(), weight.double(), bias.double())
    for got, want in zip(run(linear, x, weight, bias), exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 1e-6 * want.norm()


def test_inputs_may_be_views():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 8, 64).chunk(2, dim=-1)[1], torch.randn(32, 20).T, torch.randn(20)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(linear(x.transpose(0, 1), weight, None), F.linear(x.transpose(0, 1), weight))


def test_other_precisions_use_torch():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(4, 32), torch.randn(16, 32), torch.randn(16)
    assert torch.equal(
        linear(x.double(), weight.double(), bias.double()), F.linear(x.double(), weight.double(), bias.double())
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16


def test_custom_operator_passes_opcheck():
    torch.manual_seed(0)
    x, weight, bias = (y.requires_grad_() for y in (torch.randn(5, 16), torch.randn(24, 16), torch.randn(24)))
    torch.library.opcheck(torch.ops.selfvil.linear.default, (x, weight, bias))
