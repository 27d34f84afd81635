"""Both entries of an operator: the function that eager mode calls, and torch's custom operator."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from selfvil.ops.operators import custom_operator

CALLS = []
"""The calls of the functions below."""


@custom_operator("selfvil_tests::scaled_square")
def scaled_square(x: torch.Tensor, factor: float) -> list[torch.Tensor]:
    """factor · x², and x doubled, which has no gradient."""
    CALLS.append("forward")
    return [factor * x * x, 2 * x]


@scaled_square.register_fake
def _(x, factor):
    return [torch.empty_like(x), torch.empty_like(x)]


@custom_operator("selfvil_tests::scaled_square_backward")
def scaled_square_backward(dy: torch.Tensor, double: torch.Tensor, factor: float) -> torch.Tensor:
    CALLS.append("backward")
    return dy * double * factor


@scaled_square_backward.register_fake
def _(dy, double, factor):
    return torch.empty_like(dy)


def setup(ctx, inputs, output):
    ctx.factor = inputs[1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def gradients(ctx, d_outputs):
    return scaled_square_backward(d_outputs[0], *ctx.saved_tensors, ctx.factor), None


scaled_square.register_autograd(gradients, setup_context=setup)


def loss_and_gradient(operator, x):
    x = x.detach().clone().requires_grad_()
    y, double = operator(x, 3.0)
    assert y.requires_grad
    assert not double.requires_grad
    y.sum().backward()
    return y.detach(), x.grad


def test_both_entries_have_equal_results_and_gradients():
    x = torch.randn(5, dtype=torch.float64)
    direct, custom = loss_and_gradient(scaled_square, x), loss_and_gradient(scaled_square.custom, x)
    for a, b, expected in zip(direct, custom, (3 * x * x, 6 * x), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, expected)


def test_eager_mode_does_not_enter_the_dispatcher(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(scaled_square, "custom", refuse)
    monkeypatch.setattr(scaled_square_backward, "custom", refuse)
    loss_and_gradient(scaled_square, torch.randn(5))
    with torch.no_grad():
        assert len(scaled_square(torch.randn(5), 3.0)) == 2


def test_a_mode_sees_the_custom_operator():
    counted = {torch.ops.selfvil_tests.scaled_square: lambda *_, **__: 7}
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        scaled_square(torch.randn(5), 3.0)
    assert counter.get_total_flops() == 7


def test_tensors_without_data_are_not_computed():
    CALLS.clear()
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.randn(5))
    y, _ = scaled_square(x, 3.0)
    assert y.shape == (5,)
    assert not CALLS


def test_a_compiled_graph_has_one_operator_for_each_direction():
    graphs = []

    def count(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(lambda x: scaled_square(x, 3.0)[0], backend=count, fullgraph=True)
    x = torch.randn(5, requires_grad=True)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, 6 * x.detach())
    assert sum("scaled_square" in name for name in graphs[0]) == 1


def test_a_second_derivative_is_refused():
    x = torch.randn(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="scaled_square has no second derivative"):
        torch.autograd.grad(scaled_square(x, 3.0)[0].sum(), x, create_graph=True)
