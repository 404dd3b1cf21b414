"""Tokens tapped are those that enter the blocks; the last block never works; the model stays as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast import PromptedViT
from spt_fast.backbones.anatomy import block_input_hooks
from spt_fast.backbones.token_extractor import TokenExtractor
from spt_fast.data.batches import image_batches, images_of

MakeViT = Callable[..., VisionTransformer]


def tap(model: nn.Module, images: Tensor, **options: Any) -> list[Tensor]:
    """Copies of the tokens of each layer."""
    taken: list[Tensor] = []

    def keep(layer: int, tokens: Tensor) -> None:
        assert layer == len(taken)
        taken.append(tokens.clone())

    with TokenExtractor(model, keep, **options) as opened:
        opened.run(images)
        assert len(taken) == opened.n_outputs
    return taken


def by_hand(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Patch tokens before, between and after the blocks, by timm's own steps."""
    with torch.no_grad():
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        steps = [x] + [x := block(x) for block in model.blocks]
    return [tokens[:, model.num_prefix_tokens :] for tokens in steps]


@pytest.fixture
def images(make_loader: Callable[..., list[tuple[Tensor, Tensor]]]) -> Tensor:
    return make_loader(5, 5)[0][0]


class TestTokens:
    def test_are_the_inputs_of_the_blocks(
        self, make_vit: MakeViT, flavour: dict[str, Any], images: Tensor
    ) -> None:
        model = make_vit(**flavour).eval()
        tapped = tap(model, images)
        assert [t.shape for t in tapped] == [(5, 16, 32)] * 3
        torch.testing.assert_close(tapped, by_hand(model, images)[:3], rtol=0, atol=0)

    def test_last_output_is_one_more_layer(
        self, make_vit: MakeViT, flavour: dict[str, Any], images: Tensor
    ) -> None:
        model = make_vit(**flavour).eval()
        torch.testing.assert_close(
            tap(model, images, last_output=True), by_hand(model, images), rtol=0, atol=0
        )

    def test_shallow_is_the_input_of_the_first_block(self, vit: VisionTransformer, images: Tensor) -> None:
        expected = by_hand(vit.eval(), images)
        torch.testing.assert_close(tap(vit, images, depth="shallow"), expected[:1], rtol=0, atol=0)
        both = tap(vit, images, depth="shallow", last_output=True)
        torch.testing.assert_close(both, [expected[0], expected[3]], rtol=0, atol=0)

    def test_are_those_of_eval_mode(self, make_vit: MakeViT, images: Tensor) -> None:
        model = make_vit(proj_drop_rate=0.5, drop_path_rate=0.5, patch_drop_rate=0.5, pos_drop_rate=0.5)
        model.train()
        tapped = tap(model, images)
        torch.testing.assert_close(tapped, by_hand(model.eval(), images)[:3], rtol=0, atol=0)

    def test_are_views_of_the_block_inputs(self, make_vit: MakeViT, images: Tensor) -> None:
        model = make_vit(reg_tokens=4)
        inputs: list[Tensor] = []
        views: list[Tensor] = []
        model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with TokenExtractor(model, lambda _, tokens: views.append(tokens), depth="shallow") as opened:
            opened.run(images)
        assert views[0].data_ptr() == inputs[0][:, 5:].data_ptr()
        assert not views[0].is_contiguous()

    def test_carry_no_gradient_and_no_autocast(self, vit: VisionTransformer, images: Tensor) -> None:
        def check(_: int, tokens: Tensor) -> None:
            assert not tokens.requires_grad
            assert (tokens @ tokens.mT).dtype == tokens.dtype == torch.float32

        with (
            torch.autocast("cpu", torch.bfloat16),
            TokenExtractor(vit, check, amp_dtype=torch.float16) as opened,
        ):
            opened.run(images)

    def test_do_not_depend_on_the_autocast_around(self, vit: VisionTransformer, images: Tensor) -> None:
        expected = tap(vit, images)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(tap(vit, images), expected, rtol=0, atol=0)
            torch.testing.assert_close(tap(vit, images, amp_dtype=torch.float32), expected, rtol=0, atol=0)

    def test_follow_autocast_when_asked(self, vit: VisionTransformer, images: Tensor) -> None:
        full, half = tap(vit, images), tap(vit, images, amp_dtype=torch.bfloat16)
        assert not torch.equal(full[2], half[2])
        torch.testing.assert_close(half[2].float(), full[2], rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_have_the_dtype_of_the_model(
        self, vit: VisionTransformer, images: Tensor, dtype: torch.dtype
    ) -> None:
        assert {t.dtype for t in tap(vit.to(dtype), images)} == {dtype}

    def test_need_no_timm_model(self, images: Tensor) -> None:
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.patch = nn.Conv2d(3, 16, 8, 8)
                self.blocks = nn.ModuleList(
                    nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)
                )

            def forward(self, images: Tensor) -> Tensor:
                x: Tensor = self.patch(images).flatten(2).mT
                for block in self.blocks:
                    x = block(src=x)
                return x

        assert [t.shape for t in tap(Plain(), images)] == [(5, 16, 16)] * 2


class TestWork:
    @pytest.mark.parametrize(("depth", "worked"), [("deep", [True, True, False]), ("shallow", [False] * 3)])
    def test_stops_before_the_last_block(
        self, vit: VisionTransformer, images: Tensor, depth: str, worked: list[bool]
    ) -> None:
        calls: list[nn.Module] = []
        norms = [block.get_submodule("norm1") for block in vit.blocks]
        for module in (*norms, vit.norm, vit.head):
            module.register_forward_hook(lambda module, *_: calls.append(module))
        tap(vit, images, depth=depth)
        assert [norm in calls for norm in norms] == worked
        assert vit.norm not in calls
        assert vit.head not in calls

    def test_last_output_runs_no_head(self, vit: VisionTransformer, images: Tensor) -> None:
        calls: list[nn.Module] = []
        for module in (vit.blocks[-1], vit.norm, vit.head):
            module.register_forward_hook(lambda module, *_: calls.append(module))
        tap(vit, images, last_output=True)
        assert calls == [vit.blocks[-1]]

    def test_gradient_checkpointing_changes_nothing(self, vit: VisionTransformer, images: Tensor) -> None:
        expected = tap(vit, images)
        vit.set_grad_checkpointing()
        torch.testing.assert_close(tap(vit, images), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
    def test_wrappers_are_seen_through(
        self, vit: VisionTransformer, images: Tensor, wrap: Callable[[nn.Module], nn.Module]
    ) -> None:
        torch.testing.assert_close(tap(wrap(vit), images), tap(vit, images), rtol=0, atol=0)

    def test_model_compiled_in_place_is_tapped(self, vit: VisionTransformer, images: Tensor) -> None:
        expected = tap(vit, images)
        vit.compile(backend="eager")
        vit.eval()(images)
        torch.testing.assert_close(tap(vit, images), expected, rtol=0, atol=0)


class CallbackError(Exception):
    """Raised by a callback."""


@pytest.fixture
def model(vit: VisionTransformer) -> VisionTransformer:
    """A model in a mixed state: some parts in training mode, some frozen, one with a hook."""
    vit.train()
    vit.blocks[1].eval()
    vit.head.requires_grad_(False)
    vit.blocks[2].register_forward_pre_hook(lambda *_: None)
    return vit


class TestModelComesBack:
    @pytest.mark.parametrize("error", [None, CallbackError, KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("last_output", [False, True])
    def test_as_it_was(
        self,
        model: VisionTransformer,
        images: Tensor,
        error: type[BaseException] | None,
        last_output: bool,
    ) -> None:
        before, weights = state_of(model), copy.deepcopy(model.state_dict())

        def fail(layer: int, _: Tensor) -> None:
            if error is not None and layer == 1:
                raise error

        if error is None:
            with TokenExtractor(model, fail, last_output=last_output) as opened:
                opened.run(images)
        else:
            with pytest.raises(error), TokenExtractor(model, fail, last_output=last_output) as opened:
                opened.run(images)
        assert state_of(model) == before
        torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)

    def test_after_images_that_do_not_fit(self, model: VisionTransformer, images: Tensor) -> None:
        before = state_of(model)
        with pytest.raises(ValueError, match="do not fit"):
            tap(model, images[..., :24])
        assert state_of(model) == before

    def test_other_channels_are_named(self, model: VisionTransformer, images: Tensor) -> None:
        with pytest.raises(ValueError, match=r"^images must have 3 channels for this model, got \["):
            tap(model, images[:, :1])

    def test_is_in_eval_mode_inside_only(self, model: VisionTransformer, images: Tensor) -> None:
        with TokenExtractor(model, lambda *_: None) as opened:
            assert not any(module.training for module in model.modules())
        with pytest.raises(RuntimeError, match=r"inside `with extractor:` only"):
            opened.run(images)

    def test_callbacks_error_is_not_taken_for_the_models(
        self, vit: VisionTransformer, images: Tensor
    ) -> None:
        def fail(_: int, __: Tensor) -> None:
            raise RuntimeError("mine")

        with pytest.raises(RuntimeError, match=r"^mine$"), TokenExtractor(vit, fail) as opened:
            opened.run(images)


class TestBlockInputHooks:
    def test_each_block_hands_out_its_first_argument(self) -> None:
        blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))
        seen: list[tuple[int, Tensor]] = []
        first, second = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        with block_input_hooks(blocks[1:], lambda index, tokens: seen.append((index, tokens))):
            blocks[0](first)
            blocks[2](src=second)
            blocks[1](first)
        blocks[1](first)
        assert [index for index, _ in seen] == [1, 0]
        assert seen[0][1] is second
        assert seen[1][1] is first

    def test_are_removed_after_an_error(self, model: VisionTransformer, images: Tensor) -> None:
        before = state_of(model)

        def fail(index: int, _: Tensor) -> None:
            if index == 1:
                raise CallbackError

        with pytest.raises(CallbackError), block_input_hooks(model.blocks, fail):
            model(images)
        assert state_of(model) == before


def state_of(model: nn.Module) -> list[Any]:
    """Everything of a model that tapping might change, except values of parameters and buffers."""
    modules = [
        (
            m.training,
            list(m._forward_pre_hooks),
            list(m._forward_hooks),
            list(m._forward_pre_hooks_with_kwargs),
        )
        for m in model.modules()
    ]
    parameters = [(p.requires_grad, p.grad, p.device, p.data_ptr()) for p in model.parameters()]
    return [modules, parameters]


class TestRefusedModels:
    def test_class_token_that_may_be_a_patch(self, images: Tensor) -> None:
        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
                self.embed, self.blocks = nn.Conv2d(3, 4, 8, 8), nn.ModuleList([nn.Identity()])

            def forward(self, x: Tensor) -> Tensor:
                x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x).flatten(2).mT], 1)
                return self.blocks[0](x)

        model = Own()
        with pytest.raises(TypeError, match="model has `cls_token` but no `num_prefix_tokens`"):
            tap(model, images)
        model.num_prefix_tokens = 1
        assert [t.shape for t in tap(model, images)] == [(5, 16, 4)]

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("test_efficientnet", "not over tokens"),
            ("test_convnext", r"stages in `\.stages`"),
            ("resnet10t", r"stages in `\.layer1`"),
        ],
    )
    def test_model_without_token_blocks(self, name: str, reason: str) -> None:
        with pytest.raises(TypeError, match=reason):
            TokenExtractor(timm.create_model(name), lambda *_: None)

    def test_class_token_that_joins_between_blocks(self) -> None:
        """ConViT's class token joins before its last two blocks, so that block 1 gets patches alone."""
        model = timm.create_model("convit_tiny", img_size=32)
        with pytest.raises(TypeError, match=r"but ConVit gives block 1 its 4 patches alone: its class token"):
            tap(model, torch.zeros(2, 3, 32, 32), depth="shallow")

    def test_model_that_belongs_to_a_tuned_one(self, vit: VisionTransformer) -> None:
        tuned = PromptedViT(vit, 2)
        with pytest.raises(ValueError, match="model already belongs to a tuned model"):
            TokenExtractor(vit, lambda *_: None)
        TokenExtractor(tuned.release(), lambda *_: None)

    def test_blocks_over_maps(self, images: Tensor) -> None:
        self._refuse(
            lambda x: x.reshape(len(x), 4, 4, -1), images, r"the input of block 1 is \[5, 4, 4, 32\]"
        )

    def test_blocks_over_windows(self, images: Tensor) -> None:
        self._refuse(lambda x: x.reshape(len(x) * 2, 8, -1), images, r"the input of block 1 is \[10, 8, 32\]")

    def test_blocks_that_merge_tokens(self, vit: VisionTransformer, images: Tensor) -> None:
        vit.blocks[0].register_forward_hook(lambda _, __, out: out[:, :9])
        with pytest.raises(TypeError, match=r"the input of block 2 is \[5, 9, 32\] after \[5, 17, 32\]"):
            tap(vit, images)

    def test_only_prefix_tokens(self, vit: VisionTransformer, images: Tensor) -> None:
        vit.blocks[0].register_forward_pre_hook(lambda _, args: args[0][:, :1])
        with pytest.raises(TypeError, match=r"patch tokens after 1 prefix tokens, got \[5, 1, 32\]"):
            tap(vit, images)

    def test_blocks_out_of_order(self, vit: VisionTransformer, images: Tensor) -> None:
        vit.forward = lambda _: vit.blocks[1](torch.zeros(5, 17, 32))  # type: ignore
        with pytest.raises(TypeError, match="got the input of block 2 where the input of block 1 was due"):
            tap(vit, images)

    def test_blocks_never_called(self, vit: VisionTransformer, images: Tensor) -> None:
        vit.forward = lambda images: images  # type: ignore
        with pytest.raises(TypeError, match="returned without calling block 1"):
            tap(vit, images)

    def _refuse(self, reshape: Callable[[Tensor], Tensor], images: Tensor, reason: str) -> None:
        class Reshaping(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.patch = nn.Conv2d(3, 32, 8, 8)
                self.blocks = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

            def forward(self, images: Tensor) -> Tensor:
                x = reshape(self.patch(images).flatten(2).mT)
                for block in self.blocks:
                    x = block(x)
                return x

        with pytest.raises(TypeError, match=reason):
            tap(Reshaping(), images)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"depth": "middle"}, "depth must be one of 'deep', 'shallow', got 'middle'"),
            ({"amp_dtype": torch.int8}, "amp_dtype must be .*, got torch.int8"),
        ],
    )
    def test_bad_arguments(self, vit: VisionTransformer, options: dict[str, Any], reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            TokenExtractor(vit, lambda *_: None, **options)


class TestBatches:
    def test_every_kind_of_batch_gives_its_images(self) -> None:
        images, labels = torch.zeros(2, 3, 4, 4), torch.zeros(2)
        for batch in (
            images,
            (images, labels),
            [images, labels],
            {"pixel_values": images, "labels": labels},
            {"label": labels, "image": images},
            {"images": images},
        ):
            assert images_of(batch) is images

    @pytest.mark.parametrize(
        ("batch", "found"),
        [
            ("text", "got str"),
            (None, "got NoneType"),
            ((), r"got a tuple of \[\]"),
            ([1, torch.zeros(2)], r"got a list of \['int', 'Tensor'\]"),
            ({"pixels": torch.zeros(2, 3, 4, 4)}, r"got a dict with the keys \['pixels'\]"),
            ({"image": [1, 2]}, r"got a dict with the keys \['image'\]"),
        ],
    )
    def test_batch_without_images(self, batch: object, found: str) -> None:
        with pytest.raises(TypeError, match=r"batch 1 of loader must be an image tensor.*" + found):
            list(image_batches([torch.zeros(2, 3, 4, 4), batch]))

    @pytest.mark.parametrize("shape", [(3, 4, 4), (2, 3, 4), (1, 2, 3, 4, 4), (0, 3, 4, 4), (2, 3, 0, 4)])
    def test_images_of_the_wrong_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"batch 0 of loader must hold images \[B, C, H, W\]"):
            list(image_batches([torch.zeros(shape)]))

    def test_bytes_come_with_a_hint(self) -> None:
        with pytest.raises(TypeError, match=r"got torch\.uint8; scale to floats and normalise"):
            list(image_batches([torch.zeros(2, 3, 4, 4, dtype=torch.uint8)]))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_images_of_the_wrong_dtype(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=f"floating-point dtype, got {dtype}"):
            list(image_batches([torch.zeros(2, 3, 4, 4, dtype=dtype)]))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_bad_pixels_are_named_by_image(self, value: float, dtype: torch.dtype) -> None:
        batches = [torch.zeros(4, 3, 4, 4, dtype=dtype) for _ in range(3)]
        batches[1][2, 1, 3, 0] = value
        with pytest.raises(ValueError, match=r"image 6 \(counted from 0\) holds NaN or infinity"):
            list(image_batches(batches))

    def test_loader_that_is_none(self) -> None:
        with pytest.raises(TypeError, match="loader must be an iterable of image batches, got int"):
            list(image_batches(3))  # type: ignore[arg-type]

    @pytest.mark.parametrize("max_images", [1, 4, 6, 8, 11, 12, 100])
    def test_max_images_cuts_the_last_batch(self, max_images: int) -> None:
        read = 0

        def reading() -> Iterator[Tensor]:
            nonlocal read
            for _ in range(3):
                read += 1
                yield torch.zeros(4, 3, 4, 4)

        assert sum(map(len, image_batches(reading(), max_images))) == min(max_images, 12)
        assert read == min(-(-max_images // 4), 3)


def test_random_state_is_left_alone(vit: VisionTransformer, images: Tensor) -> None:
    before, python_before = torch.get_rng_state(), random.getstate()
    tap(vit, images)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
