"""The loss that is minimised: smoothed, weighted and mixed labels against their textbook forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spt_fast.training.objective import Objective, class_weights


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_c t_c log p_c of each image, in float64."""
    logits = logits.double()
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    return -(targets.double() * log_p).sum(1)


def one_hot(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    rows = torch.eye(classes, dtype=torch.float64)[labels]
    return rows * (1 - smoothing) + smoothing / classes


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_sum_over_images_with_a_label(smoothing):
    logits, labels = torch.randn(7, 4), torch.tensor([0, 3, 1, -100, 2, 2, -100])
    objective = Objective(label_smoothing=smoothing)
    images, targets = objective.prepare(torch.randn(7, 3, 2, 2), labels)
    assert len(images) == 7
    given = labels >= 0
    expected = cross_entropies(logits[given], one_hot(labels[given], 4, smoothing)).sum()
    assert objective.loss(logits, targets).item() == pytest.approx(expected.item(), rel=1e-6)


def test_classes_weigh_the_same():
    """20 images of class 0 and 5 of class 1 count alike; a class without images is no class."""
    labels = torch.tensor([0] * 20 + [1] * 5)
    logits = torch.randn(25, 3)
    losses = cross_entropies(logits, one_hot(labels, 3))
    expected = (losses[:20].mean() + losses[20:].mean()) / 2
    objective = Objective(class_counts=(20, 5, 0))
    assert objective.loss(logits, labels).item() / 25 == pytest.approx(expected.item(), rel=1e-6)
    weights = class_weights((20, 5, 0))
    assert weights.tolist() == pytest.approx([25 / 40, 25 / 10, 0.0])
    assert (weights[labels]).mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize("count", [6, 7])
def test_mixup_is_a_mixture_with_the_image_at_the_other_end(count):
    images, labels = torch.randn(count, 3, 4, 4), torch.arange(count) % 3
    before = images.clone()
    objective = Objective(mixup=1.0, label_smoothing=0.1, num_classes=3)
    np.random.seed(3)
    mixed, targets = objective.prepare(images, labels)
    np.random.seed(3)
    np.random.rand()
    share = np.random.beta(1.0, 1.0)
    other = torch.arange(count)
    other[:6] = torch.arange(5, -1, -1)
    wanted = share * images + (1 - share) * images[other]
    torch.testing.assert_close(mixed, wanted)
    rows = one_hot(labels, 3, 0.1)
    torch.testing.assert_close(targets.double(), share * rows + (1 - share) * rows[other], rtol=0, atol=1e-6)
    assert torch.equal(images, before), "the loader's own images are not to be mixed in place"
    logits = torch.randn(count, 3)
    expected = cross_entropies(logits, targets).sum().item()
    assert objective.loss(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def test_cutmix_takes_a_box_and_the_share_of_its_area():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    objective = Objective(cutmix=1.0, num_classes=4)
    np.random.seed(0)
    mixed, targets = objective.prepare(images, torch.arange(4))
    from_other = (mixed[0, 0] == 3.0).double().mean()
    assert 0 < from_other < 1
    share = float(from_other)
    assert targets[0].tolist() == pytest.approx([1 - share, 0, 0, share], abs=1e-6)


def test_images_without_a_label_are_not_mixed():
    images, labels = torch.randn(5, 3, 4, 4), torch.tensor([0, -100, 1, 1, -100])
    mixed, targets = Objective(mixup=0.4, num_classes=2).prepare(images, labels)
    assert len(mixed) == len(targets) == 3
    torch.testing.assert_close(targets.sum(1), torch.ones(3))


def test_mixing_needs_the_number_of_classes():
    with pytest.raises(ValueError, match="mixup and cutmix need a model that states num_classes"):
        Objective(mixup=0.2)
