"""What a run starts from: the new head, as timm or as the paper's released code draws it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from spt_fast.training.run import add_prompts_and_head, start_head

NAMES = [str(number) for number in range(400)]


@pytest.mark.parametrize(("given", "std"), [({}, 0.02), ({"head_std": 0.01}, 0.01)])
def test_a_head_of_the_released_code(given: dict[str, float], std: float, vit: nn.Module) -> None:
    """timm's `trunc_normal_` written out: normal values, drawn by inversion between -2 and 2; zero bias."""
    tuned = add_prompts_and_head(vit, 2, class_names=NAMES, seed=4, head_init="trunc_normal", **given)
    weight, bias = tuned.head.weight.detach(), tuned.head.bias.detach()
    assert torch.equal(bias, torch.zeros(400))
    assert float(weight.double().std()) == pytest.approx(std, rel=0.03)
    # Inversion of the normal distribution; the bounds of -2 and 2 are absolute, 100 deviations away.
    uniform = torch.special.ndtr(weight.double().flatten() / std).sort().values
    expected = (torch.arange(uniform.numel()) + 0.5) / uniform.numel()
    assert float((uniform - expected).abs().max()) < 1.95 / uniform.numel() ** 0.5


def test_the_head_is_timms_unless_asked_and_the_seed_decides(make_vit: Any) -> None:
    def weights(**options: Any) -> torch.Tensor:
        return add_prompts_and_head(make_vit(), 2, class_names=NAMES, **options).head.weight.detach()

    # PyTorch's linear layer: uniform between -1 / sqrt(D) and 1 / sqrt(D).
    bound = 32**-0.5
    assert 0.99 * bound < float(weights().abs().max()) <= bound
    first, same, other = (weights(seed=seed, head_init="trunc_normal") for seed in (4, 4, 5))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"head_init": "zeros"}, "head_init must be one of 'timm', 'trunc_normal', got 'zeros'"),
        ({"head_std": 0.01}, "head_std is for head_init='trunc_normal', got 0.01 with 'timm'"),
        ({"head_init": "trunc_normal", "head_std": 0}, "head_std must be a finite number > 0, got 0"),
    ],
)
def test_bad_starts_are_named(given: dict[str, Any], expected: str, vit: nn.Module) -> None:
    with pytest.raises(ValueError, match=expected):
        add_prompts_and_head(vit, 2, class_names=NAMES, **given)


def test_a_head_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a linear head, got Identity"):
        start_head(nn.Identity())
