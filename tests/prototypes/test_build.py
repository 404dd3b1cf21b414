"""`build_prototypes`: every strategy against its definition, and every bad input refused in plain words."""

from __future__ import annotations

import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast.backbones.token_extractor import TokenExtractor
from spt_fast.clustering import KMeans, StreamingKMeans
from spt_fast.prototypes.backbone_pass import BackbonePass
from spt_fast.prototypes.build import build_prototypes
from spt_fast.prototypes.result import Prototypes
from spt_fast.prototypes.side_stream import SideStream
from spt_fast.support.distributed import ALONE
from spt_fast.support.errors import NonFiniteError

Loader = list[tuple[Tensor, Tensor]]
MakeLoader = Callable[..., Loader]
MakeViT = Callable[..., VisionTransformer]


@pytest.fixture
def vit(make_vit: MakeViT) -> VisionTransformer:
    """Two blocks: the time of a test goes with the number of layers."""
    return make_vit(depth=2)


def build(model: nn.Module, loader: Any, **options: Any) -> Prototypes:
    return build_prototypes(model, loader, **{"num_prompts": 6, "progress": False, **options})


def collect(model: nn.Module, loader: Any, **options: Any) -> list[Tensor]:
    """All tokens [M, D] of each layer."""
    taken: list[list[Tensor]] = []

    def keep(layer: int, tokens: Tensor) -> None:
        if layer == len(taken):
            taken.append([])
        taken[layer].append(tokens.reshape(-1, tokens.shape[-1]).clone())

    with TokenExtractor(model, keep, **options) as tap:
        for images, _ in loader:
            tap.run(images)
    return [torch.cat(layer) for layer in taken]


def coloured_images(batch_size: int = 10) -> Loader:
    """60 images, sorted, each in one of 6 colours but for a little noise: tokens in 6 clear clusters."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) // 10
    colours = 4 * torch.randn(6, 3, 1, 1, generator=generator)
    images = colours[labels] + 0.05 * torch.randn(60, 3, 32, 32, generator=generator)
    return list(zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True))


def true_inertia(tokens: Tensor, prompts: Tensor) -> float:
    return float(torch.cdist(tokens.double(), prompts.double()).amin(1).square().sum())


class Unsized:
    """A loader that does not know its length."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.read = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            self.read += 1
            yield batch


class TestExact:
    @pytest.mark.parametrize("memory_budget", [None, "4GiB", 0, 60_000])
    def test_equals_kmeans_on_all_tokens(
        self, vit: VisionTransformer, loader: Loader, memory_budget: int | str | None
    ) -> None:
        protos = build(vit, loader, mode="exact", memory_budget=memory_budget, seed=3)
        for layer, tokens in enumerate(collect(vit, loader)):
            fitted = KMeans(6, seed=3).fit(tokens)
            assert torch.equal(protos.prompts[layer], fitted.cluster_centers_)
            assert torch.equal(protos.counts[layer], fitted.counts_)
            assert float(protos.inertia[layer]) == pytest.approx(float(fitted.inertia_))

    def test_keeps_half_precision_tokens(self, vit: VisionTransformer, loader: Loader) -> None:
        vit.bfloat16()
        on_disk, in_memory = (build(vit, loader, mode="exact", memory_budget=b) for b in (0, "1GiB"))
        assert torch.equal(on_disk.prompts, in_memory.prompts)

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
    def test_full_disk_is_a_clear_error(
        self, vit: VisionTransformer, loader: Loader, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
            with pytest.raises(OSError, match=r"the disk is full; set TMPDIR .* or use mode='stream'"):
                build(vit, loader, mode="exact", memory_budget=0)
        assert vit.training

    def test_options_are_those_of_kmeans(self, vit: VisionTransformer, loader: Loader) -> None:
        few = build(vit, loader, mode="exact", init="uniform", max_iter=2)
        assert few.metadata["n_iter"] == "2 2"
        assert (few.metadata["init"], few.metadata["max_iter"], few.metadata["tol"]) == (
            "uniform",
            "2",
            "0.0001",
        )
        for layer, tokens in enumerate(collect(vit, loader)):
            theirs = KMeans(6, init="uniform", max_iter=2).fit(tokens)
            torch.testing.assert_close(few.prompts[layer], theirs.cluster_centers_, rtol=1e-5, atol=1e-5)
        best = build(vit, loader, mode="exact", n_init=8, tol=0)
        one = build(vit, loader, mode="exact")
        assert bool((best.inertia <= one.inertia * (1 + 1e-6)).all())

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"init": "uniform", "mode": "stream"}, "init is for strategy='kmeans' with mode='exact'"),
            (
                {"n_init": 2, "strategy": "mean", "mode": "stream"},
                "n_init is for strategy='kmeans' with mode",
            ),
            ({"init": "grid"}, "init must be one of 'k-means\\+\\+', 'random', 'uniform', got 'grid'"),
            ({"tol": -1}, "tol must be a finite number >= 0"),
            ({"max_iter": 0}, "max_iter must be an integer >= 1"),
        ],
    )
    def test_bad_options(
        self, vit: VisionTransformer, loader: Loader, option: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            build(vit, loader, **{"mode": "exact", **option})


class TestPositionEmbedding:
    """`position_embedding=False`: tokens of block 1 as the released code takes them."""

    @pytest.mark.parametrize("depth", ["deep", "shallow"])
    def test_first_layer_is_before_it(
        self, make_vit: MakeViT, flavour: dict[str, Any], loader: Loader, depth: str
    ) -> None:
        vit = make_vit(depth=2, **flavour)
        before = [vit.patch_embed(images).flatten(1, -2).detach() for images, _ in loader]
        found: dict[int, list[Tensor]] = {}
        options = {"depth": depth, "position_embedding": False}
        with TokenExtractor(vit, lambda i, x: found.setdefault(i, []).append(x.clone()), **options) as tap:
            for images, _ in loader:
                tap.run(images)
        torch.testing.assert_close(torch.cat(found[0]), torch.cat(before))
        if depth == "deep":
            torch.testing.assert_close(torch.cat(found[1]).flatten(0, 1), collect(vit, loader)[1])

    def test_prototypes_say_so(self, vit: VisionTransformer, loader: Loader) -> None:
        with_it, without = (build(vit, loader, position_embedding=p) for p in (True, False))
        assert "position_embedding" not in with_it.metadata
        assert without.metadata["position_embedding"] == "False"
        assert not torch.allclose(with_it.prompts[0], without.prompts[0])
        torch.testing.assert_close(with_it.prompts[1], without.prompts[1])

    def test_model_without_patch_embed(self, make_vit: MakeViT, loader: Loader) -> None:
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.embed_dim, self.blocks = 32, make_vit(depth=2).blocks

            def forward(self, x: Tensor) -> Tensor:
                return self.blocks(x.flatten(2).mT[:, :, :1].expand(-1, -1, 32))

        with pytest.raises(TypeError, match="needs a model with `patch_embed`, which Plain has not"):
            build(Plain(), loader, position_embedding=False)


class TestStream:
    def test_equals_exact_while_nothing_is_dropped(self, vit: VisionTransformer) -> None:
        loader = coloured_images()
        stream, exact = build(vit, loader), build(vit, loader, mode="exact")
        for layer in range(2):
            gaps, nearest = torch.cdist(stream.prompts[layer], exact.prompts[layer]).min(1)
            assert sorted(nearest.tolist()) == list(range(6))
            assert float(gaps.max()) < 1e-4
            assert torch.equal(stream.counts[layer], exact.counts[layer][nearest])
        # Distances are differences of squares around the mean: float32 rounds them by the tokens' spread.
        spread = max(float(tokens.var(0, correction=0).sum()) for tokens in collect(vit, loader))
        atol = 2 * torch.finfo(torch.float32).eps * spread
        ours, theirs = stream.mean_squared_distance, exact.mean_squared_distance
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=atol)

    def test_is_settled_on_all_tokens_while_nothing_is_dropped(
        self, vit: VisionTransformer, loader: Loader
    ) -> None:
        protos = build(vit, loader)
        for layer, tokens in enumerate(collect(vit, loader)):
            inertia = float(protos.inertia[layer])
            assert inertia == pytest.approx(true_inertia(tokens, protos.prompts[layer]), rel=1e-5)
            settled = KMeans(6, init=protos.prompts[layer], max_iter=5).fit(tokens)
            assert float(settled.inertia_) > 0.999 * inertia
            assert float(protos.counts[layer].sum()) == len(tokens)

    def test_equals_streaming_kmeans_on_the_tokens(self, vit: VisionTransformer, loader: Loader) -> None:
        protos = build(vit, loader, capacity=100, seed=5)
        clusters = StreamingKMeans(6, n_groups=2, capacity=100, seed=5)
        for batch in loader:
            clusters.partial_fit(torch.stack(collect(vit, [batch])))
        assert torch.equal(protos.prompts, clusters.solve().centers)

    def test_is_close_when_most_is_dropped(self, vit: VisionTransformer, make_loader: MakeLoader) -> None:
        loader = make_loader(200, 20)
        protos = build(vit, loader, capacity=400)
        for layer, tokens in enumerate(collect(vit, loader)):
            best = float(KMeans(6, n_init=5).fit(tokens).inertia_)
            assert true_inertia(tokens, protos.prompts[layer]) < 1.06 * best
            assert float(protos.counts[layer].sum()) == pytest.approx(len(tokens))

    @pytest.mark.parametrize("capacity", [None, 300])
    def test_order_and_size_of_batches_do_not_matter(
        self, vit: VisionTransformer, capacity: int | None
    ) -> None:
        expected = build(vit, coloured_images(), capacity=capacity)
        # A sample of 300 tokens, 50 per cluster, places the mean of a cluster well within its spread.
        within = 1e-4 if capacity is None else float(expected.mean_squared_distance.max().sqrt())
        for batch_size in (1, 7, 60):
            protos = build(vit, coloured_images(batch_size)[::-1], capacity=capacity)
            for ours, theirs in zip(protos.prompts, expected.prompts, strict=True):
                gaps, nearest = torch.cdist(ours, theirs).min(1)
                assert sorted(nearest.tolist()) == list(range(6))
                assert float(gaps.max()) < within

    def test_holds_no_tokens_but_its_capacity(self, vit: VisionTransformer, make_loader: MakeLoader) -> None:
        protos = build(vit, make_loader(120, 20), capacity=50)
        with pytest.raises(ValueError, match="num_prompts must be at most 50"):
            protos.select(51)


class TestOneBatch:
    @pytest.mark.parametrize("strategy", ["mean", "max"])
    @pytest.mark.parametrize("num_prompts", [1, 5, 6, 100, 128])
    def test_pooling_follows_its_definition(
        self, vit: VisionTransformer, make_loader: MakeLoader, strategy: str, num_prompts: int
    ) -> None:
        loader = make_loader(8, 8)
        protos = build(vit, loader, strategy=strategy, num_prompts=num_prompts)
        window = 8 * 16 // num_prompts
        for layer, tokens in enumerate(collect(vit, loader)):
            for k, prompt in enumerate(protos.prompts[layer]):
                pooled = tokens[k * window : (k + 1) * window]
                torch.testing.assert_close(prompt, pooled.mean(0) if strategy == "mean" else pooled.amax(0))

    def test_random_takes_tokens_each_once(self, vit: VisionTransformer, make_loader: MakeLoader) -> None:
        loader = make_loader(3, 3)
        protos = build(vit, loader, strategy="random", num_prompts=48)
        for layer, tokens in enumerate(collect(vit, loader)):
            distances = torch.cdist(
                protos.prompts[layer], tokens, compute_mode="donot_use_mm_for_euclid_dist"
            )
            assert sorted(distances.argmin(1).tolist()) == list(range(48))
            assert float(distances.amin(1).max()) == 0

    def test_random_draws_anew_in_every_layer(self, vit: VisionTransformer, make_loader: MakeLoader) -> None:
        loader = make_loader(8, 8)
        protos = build(vit, loader, strategy="random")
        chosen = [
            torch.cdist(prompts, tokens).argmin(1).tolist()
            for prompts, tokens in zip(protos.prompts, collect(vit, loader), strict=True)
        ]
        assert chosen[0] != chosen[1]

    @pytest.mark.parametrize("strategy", ["mean", "max", "random"])
    def test_counts_and_inertia_describe_the_batch(
        self, vit: VisionTransformer, make_loader: MakeLoader, strategy: str
    ) -> None:
        loader = make_loader(8, 8)
        protos = build(vit, loader, strategy=strategy)
        assert (protos.num_images, protos.num_tokens) == (8, 128)
        for layer, tokens in enumerate(collect(vit, loader)):
            nearest = torch.cdist(tokens, protos.prompts[layer]).argmin(1)
            assert torch.equal(protos.counts[layer], nearest.bincount(minlength=6).double())
            expected = true_inertia(tokens, protos.prompts[layer])
            assert float(protos.inertia[layer]) == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("loader_is", ["sized", "unsized", "cut"])
    def test_every_batch_has_the_same_chance(
        self, make_vit: MakeViT, make_loader: MakeLoader, loader_is: str
    ) -> None:
        vit, batches = make_vit(), make_loader(10, 2)
        loader = {"sized": batches, "unsized": Unsized(batches), "cut": batches * 20}[loader_is]
        max_images = 10 if loader_is == "cut" else None
        options = {"strategy": "mean", "depth": "shallow", "num_prompts": 1}
        firsts = [build(vit, [batch], **options).prompts for batch in batches]
        hits = [0] * 5
        for seed in range(200):
            prompts = build(vit, loader, max_images=max_images, seed=seed, **options).prompts
            hits[next(i for i, first in enumerate(firsts) if torch.equal(first, prompts))] += 1
        # 40 each on average, with a standard deviation of 5.7.
        assert 18 <= min(hits) <= max(hits) <= 62

    def test_runs_the_model_once_and_reads_no_further(self, vit: VisionTransformer, loader: Loader) -> None:
        class Sized(Unsized):
            def __len__(self) -> int:
                return len(self.loader)

        runs: list[int] = []
        vit.patch_embed.register_forward_hook(lambda *_: runs.append(1))
        read = []
        for seed in range(10):
            sized = Sized(loader)
            build(vit, sized, strategy="random", seed=seed)
            read.append(sized.read)
        assert len(runs) == 10
        assert len(set(read)) > 1

    def test_loader_shorter_than_it_says(self, vit: VisionTransformer, loader: Loader) -> None:
        class Boasting(Unsized):
            def __len__(self) -> int:
                return 1000

        assert build(vit, Boasting(loader), strategy="mean").num_images == 8


class TestAnyStrategy:
    @pytest.fixture(
        params=[{}, {"mode": "exact"}, {"strategy": "mean"}, {"strategy": "max"}, {"strategy": "random"}],
        ids=["stream", "exact", "mean", "max", "random"],
    )
    def how(self, request: pytest.FixtureRequest) -> dict[str, Any]:
        options: dict[str, Any] = request.param
        return options

    def test_works_with_every_flavour(
        self, make_vit: MakeViT, flavour: dict[str, Any], loader: Loader, how: dict[str, Any]
    ) -> None:
        protos = build(make_vit(depth=1, **flavour), loader, **how)
        assert protos.prompts.shape == (1, 6, 32)
        assert protos.num_tokens == protos.num_images * 16

    def test_same_seed_gives_the_same_bits(
        self, vit: VisionTransformer, loader: Loader, how: dict[str, Any]
    ) -> None:
        first, second = (build(vit, loader, seed=7, capacity=None, **how) for _ in range(2))
        assert torch.equal(first.prompts, second.prompts)
        assert torch.equal(first.inertia, second.inertia)
        assert first.metadata == second.metadata

    def test_global_random_state_is_left_alone(
        self, vit: VisionTransformer, loader: Loader, how: dict[str, Any]
    ) -> None:
        before = torch.get_rng_state()
        build(vit, loader, **how)
        assert torch.equal(torch.get_rng_state(), before)

    def test_shallow_is_the_first_layer(
        self, vit: VisionTransformer, loader: Loader, how: dict[str, Any]
    ) -> None:
        deep, shallow = (build(vit, loader, depth=depth, **how) for depth in ("deep", "shallow"))
        assert torch.equal(shallow.prompts, deep.prompts[:1])
        assert shallow.metadata["prompt_depth"] == "shallow"

    def test_last_output_is_one_more_layer(
        self, vit: VisionTransformer, make_loader: MakeLoader, how: dict[str, Any]
    ) -> None:
        loader = make_loader(8, 8)
        plain, more = (build(vit, loader, last_output=last, **how) for last in (False, True))
        assert plain.last_output is None
        assert torch.equal(more.prompts, plain.prompts)
        last = more.last_output
        assert last is not None
        tokens = collect(vit, loader, last_output=True)[2]
        expected = true_inertia(tokens, last.prompts[0])
        assert float(last.inertia[0]) == pytest.approx(expected, rel=1e-5)

    def test_max_images_is_the_same_as_fewer_images(
        self, vit: VisionTransformer, make_loader: MakeLoader, how: dict[str, Any]
    ) -> None:
        images = torch.cat([images for images, _ in make_loader(40, 8)])
        cut = build(vit, Unsized(make_loader(40, 8)), max_images=19, **how)
        fewer = build(vit, iter(images[:19].split(8)), **how)  # type: ignore[no-untyped-call]
        assert torch.equal(cut.prompts, fewer.prompts)
        assert cut.num_images == fewer.num_images

    def test_takes_any_kind_of_batch(
        self, vit: VisionTransformer, loader: Loader, how: dict[str, Any]
    ) -> None:
        kinds: list[Callable[[Tensor, Tensor], Any]] = [
            lambda images, labels: (images, labels),
            lambda images, labels: images,
            lambda images, labels: [images, labels],
            lambda images, labels: {"labels": labels, "pixel_values": images},
            lambda images, labels: {"image": images.double()},
        ]
        mixed = [kind(*batch) for kind, batch in zip(kinds, loader, strict=True)]
        assert torch.equal(build(vit, mixed, **how).prompts, build(vit, loader, **how).prompts)

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_model_comes_back_when_the_loader_fails(
        self, vit: VisionTransformer, loader: Loader, how: dict[str, Any], error: type[BaseException]
    ) -> None:
        def failing() -> Iterator[Any]:
            yield from loader[:2]
            raise error("stop")

        vit.blocks[1].eval()
        before = [module.training for module in vit.modules()]
        with pytest.raises(error, match="stop"):
            build(vit, failing(), **how)
        assert [module.training for module in vit.modules()] == before
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in vit.modules())

    def test_model_comes_back_after_success(
        self, vit: VisionTransformer, loader: Loader, how: dict[str, Any]
    ) -> None:
        weights = {name: value.clone() for name, value in vit.state_dict().items()}
        build(vit, loader, **how)
        assert all(module.training for module in vit.modules())
        assert all(p.requires_grad and p.grad is None for p in vit.parameters())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in vit.modules())
        torch.testing.assert_close(dict(vit.state_dict()), weights, rtol=0, atol=0)

    @pytest.mark.parametrize("empty", [[], iter(())], ids=["list", "iterator"])
    def test_empty_loader_is_refused(self, vit: VisionTransformer, how: dict[str, Any], empty: Any) -> None:
        with pytest.raises(ValueError, match="loader must give at least one batch of images, got none"):
            build(vit, empty, **how)

    def test_fewer_tokens_than_prompts_are_refused(
        self, vit: VisionTransformer, make_loader: MakeLoader, how: dict[str, Any]
    ) -> None:
        with pytest.raises(ValueError, match=r"gave 16 per layer \(from 1 images\) for 17 prompts"):
            build(vit, make_loader(1), num_prompts=17, **how)
        assert build(vit, make_loader(1), num_prompts=16, **how).prompts.shape == (2, 16, 32)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
    def test_bad_tokens_are_named_by_layer_and_image(
        self, vit: VisionTransformer, loader: Loader, how: dict[str, Any], value: float
    ) -> None:
        """The model, not the images, is at fault: its first block spoils the image that is marked."""
        loader[3][0][5, 0, 0, 0] = mark = 77.0
        image = 29
        if "strategy" in how:
            loader, image = loader[3:4], 5
        marked: list[Tensor] = []

        def look(_: nn.Module, args: tuple[Tensor]) -> None:
            marked[:] = [args[0][:, 0, 0, 0] == mark]

        def spoil(_: nn.Module, __: Any, tokens: Tensor) -> None:
            tokens[marked[0], 4] = value

        vit.patch_embed.register_forward_pre_hook(look)
        vit.blocks[0].get_submodule("mlp").register_forward_hook(spoil)
        with pytest.raises(
            NonFiniteError, match=f"input of block 2 holds NaN.* for image {image} "
        ) as raised:
            build(vit, loader, **how)
        assert (raised.value.image, raised.value.layer, raised.value.row) == (image, 1, None)
        assert vit.training


class TestSettings:
    @pytest.mark.parametrize(("depth", "expected"), [("deep", 20), ("shallow", 100)])
    def test_default_prompt_length_is_the_papers(
        self, vit: VisionTransformer, loader: Loader, depth: str, expected: int
    ) -> None:
        assert build(vit, loader, num_prompts=None, depth=depth, mode="exact").prompts.shape[1] == expected

    def test_metadata_tells_how_and_from_what(self, vit: VisionTransformer, make_loader: MakeLoader) -> None:
        metadata = build(vit, make_loader(4), seed=4, num_prompts=50, depth="shallow").metadata
        expected = {"strategy": "kmeans", "mode": "stream", "capacity": "25000", "prompt_depth": "shallow"}
        backbone = {"num_blocks": "2", "width": "32", "num_prefix_tokens": "1"}
        assert metadata.items() >= {**expected, **backbone, "seed": "4"}.items()
        assert metadata["torch_version"] == importlib.metadata.version("torch")
        assert "mode" not in build(vit, make_loader(4), strategy="mean").metadata

    @pytest.mark.parametrize(
        ("options", "error", "reason"),
        [
            ({"num_prompts": 0}, ValueError, "num_prompts must be an integer >= 1, got 0"),
            ({"num_prompts": -1}, ValueError, "num_prompts must be an integer >= 1, got -1"),
            ({"num_prompts": 2.0}, TypeError, r"num_prompts must be an integer >= 1, got 2\.0"),
            ({"num_prompts": True}, TypeError, "num_prompts must be an integer >= 1, got True"),
            ({"last_output": 2}, TypeError, "last_output must be True or False, got 2"),
            ({"progress": "no"}, TypeError, "progress must be True or False, got 'no'"),
            ({"depth": "flat"}, ValueError, "depth must be one of 'deep', 'shallow', got 'flat'"),
            ({"strategy": "median"}, ValueError, "strategy must be one of 'kmeans', .* got 'median'"),
            ({"mode": "fast"}, ValueError, "mode must be one of 'stream', 'exact', got 'fast'"),
            ({"capacity": 5}, ValueError, "capacity must be at least num_prompts = 6, got 5"),
            ({"capacity": 0}, ValueError, "capacity must be an integer >= 1 or None, got 0"),
            (
                {"capacity": 10, "mode": "exact"},
                ValueError,
                "capacity is for strategy='kmeans' with mode='stream'",
            ),
            ({"capacity": 10, "strategy": "max"}, ValueError, "capacity is for strategy='kmeans'"),
            (
                {"memory_budget": "4GiB"},
                ValueError,
                "memory_budget is for strategy='kmeans' with mode='exact', got '4GiB' .* mode='stream'",
            ),
            (
                {"memory_budget": 0, "strategy": "max"},
                ValueError,
                "memory_budget is for .*, got 0 for .*'max'",
            ),
            ({"mode": "exact", "strategy": "max"}, ValueError, "mode='exact' is for strategy='kmeans'"),
            ({"max_images": 0}, ValueError, "max_images must be an integer >= 1, got 0"),
            (
                {"memory_budget": "lots", "mode": "exact"},
                ValueError,
                "memory_budget must be a number with a unit",
            ),
            ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
            ({"seed": 2**63}, ValueError, r"seed must be below 2\*\*63"),
            ({"seed": None}, TypeError, "seed must be an integer >= 0, got None"),
            ({"amp_dtype": torch.float64}, ValueError, "amp_dtype must be"),
        ],
    )
    def test_bad_arguments_are_refused_before_any_work(
        self, vit: VisionTransformer, options: dict[str, Any], error: type[Exception], reason: str
    ) -> None:
        loader = Unsized([])
        with pytest.raises(error, match=reason):
            build(vit, loader, **options)
        assert loader.read == 0

    def test_far_more_prompts_than_tokens_are_refused_in_words(
        self, vit: VisionTransformer, make_loader: MakeLoader
    ) -> None:
        """Their default capacity is more memory than there is."""
        with pytest.raises(ValueError, match="num_prompts must be at most the number of patch tokens"):
            build(vit, make_loader(4), num_prompts=10**9)

    @pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet"])
    def test_models_without_token_blocks_are_refused(self, name: str, loader: Loader) -> None:
        with pytest.raises(TypeError, match="model must be a Vision Transformer"):
            build(timm.create_model(name), loader)

    def test_images_of_the_wrong_size_are_refused(
        self, vit: VisionTransformer, make_loader: MakeLoader
    ) -> None:
        with pytest.raises(
            ValueError, match=r"images of shape \[8, 3, 40, 40\] do not fit VisionTransformer"
        ):
            build(vit, make_loader(8, 8, size=40))

    def test_images_as_bytes_are_refused(self, vit: VisionTransformer) -> None:
        with pytest.raises(TypeError, match="scale to floats and normalise"):
            build(vit, [torch.zeros(2, 3, 32, 32, dtype=torch.uint8)])

    def test_bad_pixels_are_named(self, vit: VisionTransformer, loader: Loader) -> None:
        loader[2][0][3, 1, 7, 7] = torch.nan
        with pytest.raises(NonFiniteError, match=r"image 19 \(counted from 0\) holds NaN") as raised:
            build(vit, loader)
        assert (raised.value.image, raised.value.layer, raised.value.row) == (19, None, None)


@pytest.mark.gpu
class TestGPU:
    def test_gives_what_the_cpu_gives(self, make_vit: MakeViT) -> None:
        loader = coloured_images()
        for options in ({}, {"mode": "exact"}, {"strategy": "mean"}):
            ours = build(make_vit().cuda(), loader, amp_dtype=torch.float32, **options)
            theirs = build(make_vit(), loader, **options)
            assert ours.prompts.device.type == "cpu"
            for layer in range(3):
                gaps = torch.cdist(ours.prompts[layer], theirs.prompts[layer]).amin(1)
                assert float(gaps.max()) < 1e-2

    def test_runs_under_bfloat16_autocast(self, vit: VisionTransformer, loader: Loader) -> None:
        dtypes = set()
        linear = vit.blocks[0].get_submodule("mlp.fc1")
        linear.register_forward_hook(lambda _, __, output: dtypes.add(output.dtype))
        assert build(vit.cuda(), loader).prompts.dtype == torch.float32
        assert dtypes == {torch.bfloat16}


class TestTokenDtype:
    """Rounding tokens before they are clustered; the default on CUDA."""

    def test_clusters_rounded_tokens(self, vit: VisionTransformer, loader: Loader) -> None:
        protos = build(vit, loader, token_dtype=torch.bfloat16)
        rounded = [tokens.bfloat16().float() for tokens in collect(vit, loader)]
        expected = KMeans(6, n_init=5, seed=0)
        for layer, tokens in enumerate(rounded):
            best = float(expected.fit(tokens).inertia_)
            assert float(protos.inertia[layer]) <= 1.05 * best
        assert protos.metadata["token_dtype"] == "bfloat16"
        assert protos.prompts.dtype == torch.float32
        assert protos._summary is not None
        assert {group.tokens.dtype for group in protos._summary.groups} == {torch.bfloat16}

    @pytest.mark.parametrize("mode", ["stream", "exact"])
    def test_equals_a_model_that_gives_rounded_tokens(
        self, vit: VisionTransformer, loader: Loader, mode: str
    ) -> None:
        class Rounding(nn.Module):
            """A block whose output needs no rounding, so that only the first layer is compared."""

            def forward(self, x: Tensor) -> Tensor:
                return x.bfloat16().float()

        expected = build(vit, loader, depth="shallow", mode=mode, token_dtype=torch.bfloat16)
        vit.norm_pre = Rounding()
        found = build(vit, loader, depth="shallow", mode=mode)
        assert "token_dtype" not in found.metadata
        assert torch.allclose(found.prompts, expected.prompts, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.counts, expected.counts)

    def test_late_tokens_are_rounded_too(self, vit: VisionTransformer, loader: Loader) -> None:
        for side_stream in (None, SideStream(torch.device("cpu"))):
            seen: list[Tensor] = []
            backbone = BackbonePass(vit, loader, ALONE, max_images=None, progress=False)
            backbone.run(lambda _, tokens, to=seen: to.append(tokens), side_stream, torch.bfloat16)
            assert {tokens.dtype for tokens in seen} == {torch.bfloat16}

    def test_is_refused_where_it_says_nothing(self, vit: VisionTransformer, loader: Loader) -> None:
        with pytest.raises(ValueError, match="token_dtype is for strategy='kmeans'"):
            build(vit, loader, strategy="mean", token_dtype=torch.bfloat16)
        for wrong in (torch.float64, torch.int32, "bfloat16"):
            with pytest.raises(ValueError, match=r"token_dtype must be one of torch\.float32, "):
                build(vit, loader, token_dtype=wrong)


class TestSideStream:
    """On CUDA the tokens come one batch late; the same is done here without a device."""

    def test_late_tokens_give_the_same_bits(self, vit: VisionTransformer, loader: Loader) -> None:
        summaries = []
        for side_stream in (None, SideStream(torch.device("cpu"))):
            clusters = StreamingKMeans(6, n_groups=2, capacity=100)
            backbone = BackbonePass(vit, loader, ALONE, max_images=None, progress=False)
            backbone.run(
                lambda layer, tokens, to=clusters: to.partial_fit_unchecked(tokens, layer), side_stream
            )
            assert (backbone.num_images, backbone.num_tokens) == (40, 640)
            summaries.append(clusters.summary())
        for ours, theirs in zip(summaries[0].groups, summaries[1].groups, strict=True):
            assert torch.equal(ours.tokens, theirs.tokens)
            assert ours.weights is not None
            assert torch.equal(ours.weights, theirs.weights)

    def test_late_error_names_its_own_image(self, vit: VisionTransformer, loader: Loader) -> None:
        loader[2][0][3] = 3e38  # finite pixels whose tokens are not
        clusters = StreamingKMeans(6, n_groups=2)
        backbone = BackbonePass(vit, loader, ALONE, max_images=None, progress=False)
        with pytest.raises(NonFiniteError, match="for image 19 ") as raised:
            backbone.run(
                lambda layer, tokens: clusters.partial_fit_unchecked(tokens, layer),
                SideStream(torch.device("cpu")),
            )
        assert (raised.value.image, raised.value.layer) == (19, 0)
        assert vit.training


class TestWaiting:
    """Nothing waits for a device batch by batch; the same is refused here without one."""

    def test_no_batch_of_the_stream_waits(
        self, vit: VisionTransformer, loader: Loader, like_on_a_device: Callable[[], AbstractContextManager]
    ) -> None:
        summaries = []
        for context in (nullcontext, like_on_a_device):
            clusters = StreamingKMeans(6, n_groups=2, capacity=100, backend="reference")
            backbone = BackbonePass(vit, loader, ALONE, max_images=None, progress=False)
            with context():
                backbone.run(lambda layer, tokens, to=clusters: to.partial_fit_unchecked(tokens, layer))
            summaries.append(clusters.summary())
        here, there = summaries
        assert here.totals == there.totals
        for ours, theirs in zip(here.groups, there.groups, strict=True):
            assert len(ours) == 100
            assert torch.equal(ours.tokens, theirs.tokens)
            assert torch.equal(ours.weights, theirs.weights)

    def test_no_batch_of_the_exact_mode_waits(
        self, vit: VisionTransformer, loader: Loader, like_on_a_device: Callable[[], AbstractContextManager]
    ) -> None:
        def lazily() -> Iterator[Any]:
            with like_on_a_device():
                yield from loader

        expected = build(vit, loader, mode="exact").prompts
        assert torch.equal(build(vit, lazily(), mode="exact").prompts, expected)

    @pytest.mark.gpu
    def test_no_batch_of_the_stream_waits_for_a_gpu(
        self, waiting_refused: Callable[[], AbstractContextManager[None]]
    ) -> None:
        clusters = StreamingKMeans(6, capacity=100)
        batches = torch.randn(4, 2, 40, 16, device="cuda")
        clusters.partial_fit_unchecked(batches[0], 0)
        with waiting_refused():
            rows = [clusters.partial_fit_unchecked(batch, 0) for batch in batches[1:]]
        assert [int(row) for row in rows] == [-1, -1, -1]

    @pytest.mark.parametrize("late", [False, True])
    def test_the_first_of_several_bad_images_is_named(
        self, vit: VisionTransformer, loader: Loader, late: bool
    ) -> None:
        """In whichever layer and batch others are."""
        for batch, image in ((4, 0), (2, 6), (2, 3)):
            loader[batch][0][image] = 3e38
        clusters = StreamingKMeans(6, n_groups=2)
        backbone = BackbonePass(vit, loader, ALONE, max_images=None, progress=False)
        with pytest.raises(NonFiniteError) as raised:
            backbone.run(
                lambda layer, tokens: clusters.partial_fit_unchecked(tokens, layer),
                SideStream(torch.device("cpu")) if late else None,
            )
        assert (raised.value.image, raised.value.layer) == (19, 0)


class TestBar:
    def test_shows_images_per_second(
        self,
        vit: VisionTransformer,
        loader: Loader,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("TQDM_DISABLE", "")
        build(vit, loader, progress=True)
        shown = capsys.readouterr().err
        assert "40/40" in shown
        assert "images/s" in shown
        assert "2/2" in shown

    def test_stays_away_when_not_wanted(
        self, vit: VisionTransformer, loader: Loader, capsys: pytest.CaptureFixture[str]
    ) -> None:
        build(vit, loader, progress=False)
        assert capsys.readouterr() == ("", "")


def test_interrupted_run_leaves_no_file(vit: VisionTransformer, loader: Loader, tmp_path: Path) -> None:
    def interrupted() -> Iterator[Any]:
        yield loader[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(vit, interrupted()).save(tmp_path / "p")
    assert os.listdir(tmp_path) == []
