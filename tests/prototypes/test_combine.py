"""Prototypes of several data sets together, and the sample that files may hold for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast.data.transforms import PREPROCESSING, Preprocessing
from spt_fast.prototypes import Prototypes, build_prototypes, concatenate, merge
from spt_fast.support.files import read_safetensors, write_safetensors

Loader = list[tuple[Tensor, Tensor]]


def build(model: VisionTransformer, loader: Any, **options: Any) -> Prototypes:
    return build_prototypes(model, loader, **{"num_prompts": 6, "progress": False, **options})


@pytest.fixture(scope="module")
def vit(make_vit: Callable[..., VisionTransformer]) -> VisionTransformer:
    return make_vit(depth=2)


@pytest.fixture(scope="module")
def loaders(make_loader: Callable[..., Loader]) -> list[Loader]:
    """Two data sets of different size and content."""
    small = [(images + 2, labels) for images, labels in make_loader(12, 6, seed=1)]
    return [make_loader(40, 8), small]


@pytest.fixture(scope="module")
def sets(vit: VisionTransformer, loaders: list[Loader]) -> list[Prototypes]:
    return [build(vit, loader, last_output=True) for loader in loaders]


def assert_close(ours: Prototypes, theirs: Prototypes, rtol: float) -> None:
    torch.testing.assert_close(ours.counts.sum(1), theirs.counts.sum(1))
    torch.testing.assert_close(ours.inertia, theirs.inertia, rtol=rtol, atol=0)
    assert (ours.num_images, ours.num_tokens) == (theirs.num_images, theirs.num_tokens)


class TestMerge:
    def test_is_as_good_as_one_pass_over_both(
        self, vit: VisionTransformer, loaders: list[Loader], sets: list[Prototypes]
    ) -> None:
        """All tokens are in the samples, so both are k-means on the same tokens, in another order."""
        merged = merge(sets)
        together = build(vit, [*loaders[0], *loaders[1]], last_output=True)
        assert_close(merged, together, rtol=0.05)
        assert merged.last_output is not None
        assert together.last_output is not None
        assert_close(merged.last_output, together.last_output, rtol=0.05)
        assert merged.metadata["sets"] == "2"
        assert merged.metadata["fingerprint"] == together.metadata["fingerprint"]

    def test_counts_each_token_once_where_samples_are_smaller(
        self, vit: VisionTransformer, loaders: list[Loader]
    ) -> None:
        """The larger set keeps 1 in 8 tokens, and must still weigh as all of them."""
        small = [
            build(vit, loader, capacity=capacity) for loader, capacity in zip(loaders, (80, 300), strict=True)
        ]
        merged = merge(small, 2)
        torch.testing.assert_close(merged.counts.sum(1), torch.full((2,), 52.0 * 16, dtype=torch.float64))
        # The sets are far apart, so that each gets a prompt of its own.
        assert sorted(merged.counts[0].round().tolist()) == pytest.approx([192, 640], rel=0.02)

    def test_can_select(self, sets: list[Prototypes]) -> None:
        assert merge(sets, 3).select(9).prompts.shape == (2, 9, 32)

    def test_one_set_is_itself(self, sets: list[Prototypes]) -> None:
        torch.testing.assert_close(merge(sets[:1]).inertia, sets[0].inertia, rtol=1e-6, atol=0)

    def test_from_files(self, sets: list[Prototypes], tmp_path: Path) -> None:
        for index, each in enumerate(sets):
            each.save(tmp_path / f"{index}", with_sample=True)
        loaded = [Prototypes.load(tmp_path / f"{index}") for index in range(2)]
        assert torch.equal(merge(loaded).prompts, merge(sets).prompts)

    def test_calls_back_for_each_layer(self, sets: list[Prototypes]) -> None:
        called: list[int] = []
        merge(sets, 2, on_layer=lambda: called.append(1))
        assert len(called) == 3

    def test_bad_input(
        self,
        sets: list[Prototypes],
        loaders: list[Loader],
        vit: VisionTransformer,
        make_vit: Callable[..., VisionTransformer],
    ) -> None:
        exact = build(vit, loaders[0], mode="exact", last_output=True)
        with pytest.raises(ValueError, match=r"merge needs the sample of each pass, and mode='exact' makes"):
            merge([sets[0], exact])
        with pytest.raises(ValueError, match="all be with last_output or all without"):
            merge([sets[0], build(vit, loaders[0])])
        with pytest.raises(ValueError, match=r"prototypes must be of one number of layers and one width"):
            merge([sets[0], build(make_vit(depth=3), loaders[0])])
        with pytest.raises(ValueError, match="at most 832, got 833"):
            merge(sets, 833)
        with pytest.raises(ValueError, match="at least one set"):
            merge([])
        with pytest.raises(TypeError, match="must be Prototypes, got Tensor as number 1"):
            merge([sets[0], sets[1].prompts])  # type: ignore[list-item]

    def test_sets_of_other_weights_are_refused(
        self, sets: list[Prototypes], loaders: list[Loader], make_vit: Callable[..., VisionTransformer]
    ) -> None:
        other = make_vit(depth=2)
        for parameter in other.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        for together in (merge, concatenate):
            with pytest.raises(ValueError, match=r"prototypes\[1\] is for other weights"):
                together([sets[0], build(other, loaders[0], last_output=True)])


class TestConcatenate:
    def test_puts_prompts_side_by_side(self, sets: list[Prototypes]) -> None:
        joined = concatenate([*sets, sets[0]])
        assert torch.equal(joined.prompts[:, 6:12], sets[1].prompts)
        assert torch.equal(joined.counts[:, 12:], sets[0].counts)
        torch.testing.assert_close(joined.inertia, 2 * sets[0].inertia + sets[1].inertia)
        assert joined.num_images == 92
        assert joined.last_output is not None
        assert joined.last_output.prompts.shape == (1, 18, 32)

    def test_needs_no_sample(self, sets: list[Prototypes], tmp_path: Path) -> None:
        sets[0].save(tmp_path / "p")
        assert concatenate([Prototypes.load(tmp_path / "p"), sets[1]]).prompts.shape == (2, 12, 32)

    def test_leaves_last_output_out_where_one_has_none(self, sets: list[Prototypes]) -> None:
        without = dataclasses.replace(sets[1], last_output=None)
        assert concatenate([sets[0], without]).last_output is None


class TestSampleInFile:
    @pytest.mark.parametrize("capacity", [None, 100])
    @pytest.mark.parametrize("token_dtype", [torch.float32, torch.bfloat16])
    def test_select_gives_the_same_bits(
        self,
        vit: VisionTransformer,
        loaders: list[Loader],
        tmp_path: Path,
        capacity: int | None,
        token_dtype: torch.dtype,
    ) -> None:
        built = build(vit, loaders[0], capacity=capacity, token_dtype=token_dtype, last_output=True)
        built.save(tmp_path / "p", with_sample=True)
        ours, theirs = Prototypes.load(tmp_path / "p").select(9), built.select(9)
        assert torch.equal(ours.prompts, theirs.prompts)
        assert torch.equal(ours.inertia, theirs.inertia)
        assert ours.last_output is not None
        assert theirs.last_output is not None
        assert torch.equal(ours.last_output.prompts, theirs.last_output.prompts)

    def test_is_left_out_unless_asked_for(self, sets: list[Prototypes], tmp_path: Path) -> None:
        sets[0].save(tmp_path / "without")
        sets[0].save(tmp_path / "with", with_sample=True)
        assert (tmp_path / "with").stat().st_size > 5 * (tmp_path / "without").stat().st_size

    def test_none_to_save(self, vit: VisionTransformer, loaders: list[Loader], tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="with_sample needs the sample of the pass, and mode='exact'"):
            build(vit, loaders[0], mode="exact").save(tmp_path / "p", with_sample=True)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        "damage",
        [
            {"sample.1.tokens": None},
            {"sample.0.mean": torch.ones(31)},
            {"sample.0.tokens": torch.ones(4, 32, dtype=torch.float64)},
            {"sample.seed": None},
            {"sample.totals": None},
        ],
    )
    def test_damaged(self, sets: list[Prototypes], tmp_path: Path, damage: dict[str, Tensor | None]) -> None:
        sets[0].save(tmp_path / "p", with_sample=True)
        tensors, metadata = read_safetensors(tmp_path / "p", kind="prototypes")
        kept = {name: tensor for name, tensor in {**tensors, **damage}.items() if tensor is not None}
        write_safetensors(tmp_path / "p", kept, metadata, kind="prototypes", overwrite=True)
        with pytest.raises(ValueError, match="does not hold valid prototypes"):
            Prototypes.load(tmp_path / "p")


@pytest.mark.parametrize("combine", [merge, concatenate])
def test_tokens_with_and_without_position_embedding_do_not_mix(
    combine: Callable[..., Prototypes], vit: VisionTransformer, loaders: list[Loader], sets: list[Prototypes]
) -> None:
    without = build(vit, loaders[1], position_embedding=False, last_output=True)
    assert combine([without, without]).metadata["position_embedding"] == "False"
    with pytest.raises(ValueError, match=r"got position_embedding = True, False"):
        combine([sets[0], without])


@pytest.mark.parametrize("combine", [merge, concatenate])
def test_what_was_done_to_images_is_kept_where_it_is_the_same(
    combine: Callable[..., Prototypes], sets: list[Prototypes]
) -> None:
    def made_with(each: Prototypes, *options: str) -> Prototypes:
        text = Preprocessing(*options).to_json()
        return dataclasses.replace(each, metadata={**each.metadata, PREPROCESSING: text})

    squashed = [made_with(each, "vtab", "imagenet") for each in sets]
    assert combine(squashed).metadata[PREPROCESSING] == squashed[0].metadata[PREPROCESSING]
    assert PREPROCESSING not in combine([squashed[0], sets[1]]).metadata
    message = "--resize vtab --mean-std imagenet; --resize model --mean-std imagenet"
    with pytest.warns(UserWarning, match=message) as warned:
        mixed = combine([squashed[0], made_with(sets[1], "model", "imagenet"), squashed[1]])
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert PREPROCESSING not in mixed.metadata


@pytest.mark.parametrize("combine", [merge, concatenate])
def test_sets_come_in_a_list(combine: Callable[..., Prototypes], sets: list[Prototypes]) -> None:
    with pytest.raises(TypeError, match="prototypes must be a list of Prototypes, got Prototypes"):
        combine(sets[0])


def test_a_concatenation_says_why_it_has_no_sample(sets: list[Prototypes], tmp_path: Path) -> None:
    both = concatenate(sets)
    reason = "which a concatenation does not keep: select from each set before concatenate"
    with pytest.raises(ValueError, match=reason):
        both.select(3)
    with pytest.raises(ValueError, match=reason):
        both.save(tmp_path / "both.safetensors", with_sample=True)
    both.save(tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match=reason):
        Prototypes.load(tmp_path / "both.safetensors").select(3)
