"""What a model learns: copied, put back, and averaged."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spt_fast.training.learned import Average, learned, take_back


@pytest.fixture
def net() -> nn.Module:
    """A frozen layer, a layer that learns, and statistics that follow the batches."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 3))
    net[0].requires_grad_(False)
    return net


def move(net: nn.Module) -> None:
    net.train()(torch.randn(8, 4))
    with torch.no_grad():
        for parameter in net[2].parameters():
            parameter.add_(torch.randn_like(parameter))


def test_values_come_back_and_frozen_ones_are_not_among_them(net):
    before = copy.deepcopy(net.state_dict())
    values = learned(net)
    assert set(values) == {"2.weight", "2.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"}
    move(net)
    assert not torch.equal(net[2].weight, before["2.weight"])
    take_back(net, values)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_values_of_another_model_change_nothing(net):
    before = learned(net)
    other = {name: value + 1 for name, value in before.items()}
    with pytest.raises(ValueError, match=r"differ in 2\.bias"):
        take_back(net, {name: value for name, value in other.items() if name != "2.bias"})
    with pytest.raises(ValueError, match=r"2\.weight must be \[3, 6\], got \[3, 7\]"):
        take_back(net, {**other, "2.weight": torch.zeros(3, 7)})
    assert all(torch.equal(value, before[name]) for name, value in learned(net).items())


def test_the_average_is_exponential_and_goes_on_from_its_values(net):
    average = Average(net, 0.9)
    expected = {name: value.double() for name, value in learned(net).items()}
    for step in range(6):
        if step == 3:
            kept = {name: value.clone() for name, value in average.values().items()}
            average = Average(net, 0.9)
            average.load(kept)
        move(net)
        average.update()
        for name, value in learned(net).items():
            counts = not value.is_floating_point()
            expected[name] = value.double() if counts else 0.9 * expected[name] + 0.1 * value.double()
    for name, value in average.values().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_model_has_the_average_for_a_while(net):
    average = Average(net, 0.5)
    move(net)
    average.update()
    present = learned(net)
    with average.in_place():
        assert all(torch.equal(value, average.values()[name]) for name, value in learned(net).items())
    assert all(torch.equal(value, present[name]) for name, value in learned(net).items())
