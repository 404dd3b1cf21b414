"""What tests of prompting share: ViTs whose every parameter is random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

MakeViT = Callable[..., VisionTransformer]


@pytest.fixture(scope="session")
def make_random(make_vit: MakeViT) -> MakeViT:
    """`make_vit` in evaluation mode with every parameter random, so that a branch left out would show."""

    def make(**options: Any) -> VisionTransformer:
        model = make_vit(**options)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_vector = parameter.ndim == 1
                noise = torch.randn(parameter.shape, generator=generator) * (0.5 if is_vector else 0.15)
                parameter.copy_(noise + (1 if is_vector and name.endswith("weight") else 0))
        return model.eval()

    return make
