"""Dropout drawn from 16 bits a value: distributed as torch's."""

import pytest
import torch

from model.dropout import Dropout


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_it_drops_as_many_and_keeps_the_mean(p, layout):
    torch.manual_seed(0)
    x = torch.ones(16, 32, 24, 24).to(memory_format=layout)
    y = Dropout(p)(x)
    kept = y != 0
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=4 * deviation)
    assert torch.allclose(y[kept], torch.tensor(1 / (1 - p)), rtol=1e-4)
    assert y.is_contiguous(memory_format=layout)
    # neighbours share a draw of 64 bits, and are independent all the same
    flat = kept.flatten().double()
    for distance in (1, 2, 3, 4):
        both = (flat[:-distance] * flat[distance:]).mean().item()
        assert both == pytest.approx((1 - p) ** 2, abs=6 * deviation)


def test_gradients_pass_where_values_do():
    torch.manual_seed(0)
    x = torch.randn(5, 7, requires_grad=True)  # 35 values: the last draw is not used up
    y = Dropout(0.3)(x)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0)


def test_draws_follow_from_the_seed_and_evaluation_has_none():
    x, dropout = torch.randn(64), Dropout(0.5)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(dropout(x))
    assert torch.equal(*draws) and not torch.equal(draws[0], x)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_or_nothing(p):
    assert (Dropout(p)(torch.ones(10)) == 0).all() == (p == 1)
