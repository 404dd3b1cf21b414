"""What all tests share: fixed seeds, poisoned memory, and tiny backbones with images for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Read when torch is loaded: threads that wait sleep instead of spinning. The tests are many small ops, which
# take ten times as long where spinning threads keep each other from the cores of a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read when Triton is imported, by whatever comes first: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import spt_fast

Batch = tuple[Tensor, Tensor]

# Flavours of timm's Vision Transformer that differ in which tokens enter the first block.
FLAVOURS: dict[str, dict[str, Any]] = {
    "class-token": {},
    "registers": {"reg_tokens": 4},
    "registers-no-class": {"class_token": False, "reg_tokens": 3, "global_pool": "avg"},
    "no-prefix": {"class_token": False, "global_pool": "avg"},
    "pre-norm": {"pre_norm": True},
    "no-embed-class": {"no_embed_class": True},
    "dynamic-size": {"dynamic_img_size": True},
    "attention-pool": {"global_pool": "map", "class_token": False},
}


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU where there is none; start every test with the same random numbers."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that memory read before it is written shows up."""
    if torch.cuda.is_available():
        # Deterministic algorithms, which the filling comes with, exist on the CPU but not for all CUDA ops.
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    """Environment in which a fresh interpreter imports the package that is imported here, in any folder."""
    return {**os.environ, "PYTHONPATH": str(Path(spt_fast.__file__).resolve().parents[1])}


@pytest.fixture(params=list(FLAVOURS))
def flavour(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Keyword arguments of `make_vit`, one flavour of Vision Transformer after the other."""
    return FLAVOURS[request.param]


@pytest.fixture(scope="session")
def make_vit() -> Callable[..., VisionTransformer]:
    """Factory of random ViTs of width 32 and depth 3 for images of 32 x 32 in 16 patches; timm's options."""

    def make(**options: Any) -> VisionTransformer:
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 2,
            "num_classes": 5,
        }
        torch.manual_seed(1)
        return VisionTransformer(**{**sizes, **options})

    return make


@pytest.fixture
def vit(make_vit: Callable[..., VisionTransformer]) -> VisionTransformer:
    """The ViT that `make_vit` gives without options."""
    return make_vit()


@pytest.fixture(scope="session")
def make_loader() -> Callable[..., list[Batch]]:
    """Factory of loaders: lists of (images [B, 3, size, size], labels [B]) with structure in the images."""

    def make(num_images: int = 40, batch_size: int = 8, *, size: int = 32, seed: int = 0) -> list[Batch]:
        images, labels = structured_images(num_images, size, seed)
        return list(zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True))

    return make


@pytest.fixture
def loader(make_loader: Callable[..., list[Batch]]) -> list[Batch]:
    """40 images in 5 batches."""
    return make_loader()


def structured_images(num_images: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images whose 4 classes differ in the direction and the colour of their waves, and noise on top."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num_images,), generator=generator)
    position = torch.linspace(0, 6.28, size)
    angle = labels * 0.8 + 0.1 * torch.randn(num_images, generator=generator)
    across = angle.cos()[:, None, None] * position[None, :, None]
    along = angle.sin()[:, None, None] * position[None, None, :]
    phase = 6.28 * torch.rand(num_images, 1, 1, generator=generator)
    waves = torch.sin((labels[:, None, None] + 1) * (across + along) + phase)
    colours = torch.nn.functional.one_hot(labels % 3, 3)[:, :, None, None] + 0.3
    noise = 0.2 * torch.randn(num_images, 3, size, size, generator=generator)
    return waves[:, None] * colours + noise, labels
