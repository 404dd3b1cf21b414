"""`torch.set_default_dtype` and `torch.set_default_device`, which some people set, change no result.

The meta device stands in for a GPU: what is made on it by mistake has no values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast import KMeans, NMITracker, PromptedViT, StreamingKMeans, build_prototypes, nearest_patches, tune
from spt_fast.analysis import analyse
from spt_fast.data.shipped import load_digits
from spt_fast.methods.registry import METHODS
from spt_fast.training import evaluate, fit

Loader = list[tuple[Tensor, Tensor]]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def assert_same(compute: Callable[[], Any]) -> None:
    """Tensors, or numbers, are the same under all defaults, bit for bit."""
    found = []
    for default in (nullcontext(), default_dtype(torch.float64), torch.device("meta")):
        torch.manual_seed(0)
        with default:
            found.append(compute())
    for expected, *others in zip(*found, strict=True):
        for got in others:
            assert type(got) is type(expected)
            if isinstance(expected, Tensor):
                assert (got.dtype, got.device) == (expected.dtype, expected.device)
                assert torch.equal(got, expected)
            else:
                assert got == expected


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("estimator", [KMeans, StreamingKMeans])
def test_clustering(estimator: Any, backend: str) -> None:
    tokens = torch.randn(2, 300, 16, generator=torch.Generator().manual_seed(0))

    def compute() -> list[Tensor]:
        fitted = estimator(4, n_groups=2, backend=backend).fit(tokens, sample_weight=tokens[..., 0].abs())
        results = [fitted.cluster_centers_, fitted.counts_, fitted.inertia_, fitted.labels_]
        return [*results, fitted.transform(tokens), fitted.score(tokens)]

    assert_same(compute)


@pytest.mark.parametrize(
    "options", [{}, {"mode": "exact"}, {"strategy": "mean"}, {"strategy": "max"}, {"strategy": "random"}]
)
def test_prototypes(options: dict[str, Any], vit: VisionTransformer, loader: Loader) -> None:
    def compute() -> list[Tensor]:
        built = build_prototypes(vit, loader, num_prompts=4, progress=False, **options)
        return [built.prompts, built.counts, built.inertia]

    assert_same(compute)


@pytest.mark.parametrize(("depth", "engine"), [("deep", "kv"), ("deep", "concat"), ("shallow", "auto")])
def test_prompting_and_analysis(depth: Any, engine: Any, vit: VisionTransformer, loader: Loader) -> None:
    def compute() -> list[Any]:
        tuned = PromptedViT(copy.deepcopy(vit), 4, depth=depth, engine=engine)
        with NMITracker(tuned) as tracker:
            history = fit(tuned, loader, epochs=1, progress=False)
        measured = analyse(tuned, loader, progress=False)
        values = [tracker.history().values, measured.nmi, measured.cka, tuned.layer_nmi(loader[0][0])]
        return [tuned.prompts.detach(), *values, history.loss[0], evaluate(tuned, loader)]

    assert_same(compute)


def test_shipped_images() -> None:
    assert_same(lambda: load_digits("val"))


def test_nearest_patches(vit: VisionTransformer, loader: Loader) -> None:
    built = build_prototypes(vit, loader, num_prompts=4, progress=False)

    def compute() -> list[Tensor]:
        found = nearest_patches(built, vit, loader, k=3, progress=False)
        return [found.images, found.rows, found.columns, found.distances, found.pictures]

    assert_same(compute)


@pytest.mark.parametrize(
    "method", [name for name, kind in METHODS.items() if kind.prompts in ("random", "any")]
)
def test_drawn_prompts(method: str, vit: VisionTransformer) -> None:
    def compute() -> list[Tensor]:
        tuned = tune(copy.deepcopy(vit), method, prompts=4, num_classes=3)
        return [parameter.detach() for parameter in tuned.prompt_parameters()]

    assert_same(compute)


def test_a_backbone_made_in_float64_is_tuned_in_it(
    make_vit: Callable[..., VisionTransformer], loader: Loader
) -> None:
    with default_dtype(torch.float64):
        model = make_vit()
        built = build_prototypes(model, loader, num_prompts=4, progress=False)
        tuned = PromptedViT(model, built)
        fit(tuned, loader, epochs=1, progress=False)
    assert built.prompts.dtype == torch.float32
    assert tuned.prompts.dtype == torch.float64
    assert tuned(loader[0][0]).dtype == torch.float64
