"""The losses of an epoch: their mean, and the first that is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from spt_fast.training.losses import Losses


def test_the_mean_is_over_images_and_goes_on_from_an_earlier_part():
    losses = Losses(1)
    for step in range(70):
        losses.add(torch.tensor(float(step)), step % 5, step + 1, 0.1)
    total, count = losses.totals()
    assert (total, count) == (sum(range(70)), sum(step % 5 for step in range(70)))
    rest = Losses(1, total=total, count=count)
    rest.add(torch.tensor(100.0), 10, 71, 0.1)
    assert rest.mean() == pytest.approx((total + 100) / (count + 10))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_named(value):
    losses = Losses(3)
    losses.add(torch.tensor(1.0), 2, 1, 0.5)
    expected = rf"loss is {value} at epoch 3, step 2, learning rate 0\.25; lower lr"
    with pytest.raises(FloatingPointError, match=expected):
        losses.add(torch.tensor(value), 2, 2, 0.25)


def test_no_image_at_all():
    with pytest.raises(ValueError, match="train_loader must give at least one image, got none"):
        Losses(1).mean()
