"""PromptedViT: both engines agree on every kind of ViT, only prompts and head learn, the model comes back."""

from __future__ import annotations

import copy
import gc
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Attention,
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from spt_fast import build_prototypes
from spt_fast.backbones.anatomy import embed_dim, get_blocks, num_prefix_tokens
from spt_fast.backbones.identity import describe
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.methods.release import release
from spt_fast.ops.nmi_reference import sigmoid_nmi_reference
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.files import read_safetensors, write_safetensors

WIDTH, DEPTH, NUM_PROMPTS = 32, 3, 7


MakeViT = Callable[..., VisionTransformer]
MakeImages = Callable[..., Tensor]


@pytest.fixture(scope="module")
def images(make_images: MakeImages) -> Tensor:
    return make_images(3)


def make_prompts(layers: int = DEPTH, num_prompts: int = NUM_PROMPTS, width: int = WIDTH) -> Tensor:
    return torch.randn(layers, num_prompts, width, generator=torch.Generator().manual_seed(1))


def logits_and_gradient(
    tuned: PromptedViT, images: Tensor, run: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Of `tuned`, or of what runs it, such as a compiled module."""
    logits = (tuned if run is None else run)(images)
    (gradient,) = torch.autograd.grad(logits.square().sum(), [tuned.prompts])
    return logits.detach(), gradient


def relative_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


FLAVOURS: dict[str, dict[str, Any]] = {
    "class-token": {},
    "no-class-token": {"class_token": False, "global_pool": "avg"},
    "register-tokens": {"reg_tokens": 4},
    "registers-only": {"class_token": False, "reg_tokens": 3, "global_pool": "avg"},
    "qk-norm": {"qk_norm": True},
    "layer-scale": {"init_values": 0.1},
    "norm-pre": {"pre_norm": True},
    "fc-norm": {"global_pool": "avg", "fc_norm": True},
    "no-fc-norm": {"global_pool": "avg", "fc_norm": False},
    "pool-avgmax": {"global_pool": "avgmax"},
    "pool-map": {"global_pool": "map"},
    "pool-map-no-class-token": {"global_pool": "map", "class_token": False},
    "no-embed-class": {"no_embed_class": True, "reg_tokens": 2},
    "dynamic-image-size": {"dynamic_img_size": True},
    "no-qkv-bias": {"qkv_bias": False},
    "scale-norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "drop-path-and-dropout": {
        "drop_path_rate": 0.5,
        "proj_drop_rate": 0.5,
        "attn_drop_rate": 0.5,
        "patch_drop_rate": 0.5,
    },
    "res-post": {"block_fn": ResPostBlock},
    "parallel-things": {"block_fn": ParallelThingsBlock, "init_values": 0.1},
    "distilled": {"model_class": VisionTransformerDistilled},
    "gated": {"attn_layer": "gated"},
}


def gated_attention(*args: Any, **kwargs: Any) -> Attention:
    return Attention(*args, gated=True, **kwargs)


@pytest.fixture
def make_flavour(make_random: MakeViT) -> Callable[[str], VisionTransformer]:
    def make(name: str) -> VisionTransformer:
        options = dict(FLAVOURS[name])
        if "scale_attn_norm" in options and not takes(VisionTransformer, "scale_attn_norm"):
            pytest.skip("this timm has no norm after attention")
        if options.pop("attn_layer", None) is None:
            return make_random(**options)
        if not takes(Attention, "gated"):
            pytest.skip("this timm has no gated attention")
        return make_random(block_fn=make_gated_block, **options)

    return make


def takes(cls: type[nn.Module], option: str) -> bool:
    return option in cls.__init__.__code__.co_varnames


def make_gated_block(**options: Any) -> Block:
    block = Block(**options)
    dim, heads = options["dim"], options["num_heads"]
    block.attn = gated_attention(dim, num_heads=heads, qkv_bias=options["qkv_bias"])
    return block


@pytest.fixture
def tuned(make_random: MakeViT) -> PromptedViT:
    torch.manual_seed(0)
    return PromptedViT(make_random(), make_prompts(), num_classes=4)


class TestEngines:
    @pytest.mark.parametrize("flavour", FLAVOURS)
    def test_kv_equals_concat(
        self, flavour: str, make_flavour: Callable[[str], VisionTransformer], make_images: MakeImages
    ) -> None:
        size = 48 if flavour == "dynamic-image-size" else 32
        model = make_flavour(flavour)
        results = {}
        for engine in ("kv", "concat"):
            tuned = PromptedViT(copy.deepcopy(model), make_prompts(), engine=engine)
            assert tuned.engine == engine
            results[engine] = logits_and_gradient(tuned.train(), make_images(size=size))
        for kv, concat in zip(results["kv"], results["concat"], strict=True):
            assert concat.abs().max() > 0
            assert relative_difference(kv, concat) <= 1e-5

    @pytest.mark.parametrize("flavour", ["class-token", "qk-norm", "layer-scale", "gated"])
    def test_concat_equals_prompts_as_tokens_by_hand(
        self, flavour: str, make_flavour: Callable[[str], VisionTransformer], images: Tensor
    ) -> None:
        """Eq. 6 with the prompts between prefix and patches, as the paper writes it."""
        model, prompts = make_flavour(flavour), make_prompts()
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        for block, layer in zip(model.blocks, prompts, strict=True):
            x = block(torch.cat([x[:, :1], layer.expand(len(x), -1, -1), x[:, 1:]], dim=1))
            x = torch.cat([x[:, :1], x[:, 1 + NUM_PROMPTS :]], dim=1)
        expected = model.forward_head(model.norm(x)).detach()
        got = PromptedViT(model, prompts, engine="concat")(images).detach()
        assert relative_difference(got, expected) <= 1e-5

    def test_shallow_equals_prompts_as_tokens_by_hand(self, make_random: MakeViT, images: Tensor) -> None:
        """Eq. 4 and 5: what becomes of the prompts goes on to the next block."""
        model, prompts = make_random(), make_prompts(1)
        x = model._pos_embed(model.patch_embed(images))
        x = model.blocks(torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1))
        expected = model.forward_head(model.norm(x)).detach()
        tuned = PromptedViT(model, prompts, depth="shallow")
        assert tuned.engine == "concat"
        assert relative_difference(tuned(images).detach(), expected) <= 1e-5
        assert tuned.forward_features(images).shape == (3, 17, WIDTH)

    @pytest.mark.parametrize("depth", ["deep", "shallow"])
    @pytest.mark.parametrize("engine", ["auto", "concat"])
    def test_zero_prompts_equals_timm(
        self, depth: Any, engine: Any, make_random: MakeViT, images: Tensor
    ) -> None:
        model = make_random()
        expected = model(images).detach()
        prompts = make_prompts(DEPTH if depth == "deep" else 1, num_prompts=0)
        tuned = PromptedViT(model, prompts, depth=depth, engine=engine)
        torch.testing.assert_close(tuned(images).detach(), expected, rtol=1e-5, atol=1e-6)
        assert not tuned.prompts.requires_grad

    @pytest.mark.parametrize("block_class", [ParallelScalingBlock, type("OwnBlock", (Block,), {})])
    def test_auto_takes_concat_for_blocks_it_does_not_know(
        self, block_class: type[nn.Module], make_random: MakeViT, images: Tensor
    ) -> None:
        tuned = PromptedViT(make_random(block_fn=block_class), make_prompts())
        assert tuned.engine == "concat"
        assert tuned(images).isfinite().all()

    def test_auto_takes_concat_for_attention_it_does_not_know(self, make_random: MakeViT) -> None:
        class OwnAttention(Attention):
            pass

        model = make_random()
        model.blocks[1].attn.__class__ = OwnAttention
        with pytest.raises(
            ValueError, match="engine='kv' is not exact here: block 2: its attention is OwnAttention"
        ):
            PromptedViT(model, make_prompts(), engine="kv")
        assert PromptedViT(model, make_prompts()).engine == "concat"

    def test_auto_takes_concat_for_hooks_that_prompts_would_pass_or_another_forward(
        self, make_random: MakeViT
    ) -> None:
        model = make_random()
        for part in (model.blocks[0].norm1, model.blocks[0].attn.qkv):
            hook = part.register_forward_hook(lambda *_: None)
            with pytest.raises(ValueError, match=r"block 1: its .* before the keys has hooks"):
                PromptedViT(model, make_prompts(), engine="kv")
            hook.remove()
        model.blocks[2].forward = model.blocks[2].forward
        with pytest.raises(ValueError, match="block 3: the forward of this Block has been replaced"):
            PromptedViT(model, make_prompts(), engine="kv")
        tuned = PromptedViT(model, make_prompts())
        assert tuned.engine == "concat"
        tuned.release()
        assert "forward" in vars(model.blocks[2])

    def test_kv_is_refused_where_prompts_need_outputs(self, make_random: MakeViT) -> None:
        with pytest.raises(ValueError, match="engine='kv' is not exact here: in depth='shallow'"):
            PromptedViT(make_random(), make_prompts(1), depth="shallow", engine="kv")

    def test_kv_takes_a_wrapped_projection(self, make_random: MakeViT, images: Tensor) -> None:
        """Adapters put their own module in the place of qkv."""

        class Doubled(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                return 2 * self.inner(x)

        model = make_random()
        model.blocks[0].attn.qkv = Doubled(model.blocks[0].attn.qkv)
        other = copy.deepcopy(model)
        kv = logits_and_gradient(PromptedViT(model, make_prompts(), engine="kv"), images)
        concat = logits_and_gradient(PromptedViT(other, make_prompts(), engine="concat"), images)
        assert all(relative_difference(a, b) <= 1e-5 for a, b in zip(kv, concat, strict=True))

    def test_hooks_on_blocks_fire_in_both_engines(self, make_random: MakeViT, images: Tensor) -> None:
        for engine in ("kv", "concat"):
            tuned = PromptedViT(make_random(), make_prompts(), engine=engine)
            seen: list[torch.Size] = []
            for block in tuned.model.blocks:
                block.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output.shape))
            tuned(images)
            assert seen == [torch.Size([3, 17, WIDTH])] * DEPTH

    @pytest.mark.parametrize("engine", ["kv", "concat"])
    def test_pooling_with_prompts_averages_their_outputs(
        self, engine: Any, make_random: MakeViT, images: Tensor
    ) -> None:
        model, prompts = make_random(global_pool="avg"), make_prompts()
        plain = PromptedViT(copy.deepcopy(model), prompts, engine="concat")
        last_input: list[Tensor] = []
        plain.model.blocks[-1].register_forward_pre_hook(lambda _, inputs: last_input.append(inputs[0]))
        plain(images)
        x = model.blocks[-1](torch.cat([last_input[0], prompts[-1].expand(3, -1, -1)], dim=1))
        expected = model.head(model.fc_norm(x[:, 1:].mean(1))).detach()
        tuned = PromptedViT(model, prompts, engine=engine, pool_prompts=True)
        assert tuned.engine == engine
        assert relative_difference(tuned(images).detach(), expected) <= 1e-5
        assert tuned.forward_features(images).shape == (3, 17 + NUM_PROMPTS, WIDTH)

    def test_pooling_with_prompts_in_shallow_depth(self, make_random: MakeViT, images: Tensor) -> None:
        model, prompts = make_random(global_pool="avg"), make_prompts(1)
        x = model._pos_embed(model.patch_embed(images))
        x = model.blocks(torch.cat([x, prompts.expand(3, -1, -1)], dim=1))
        expected = model.head(model.fc_norm(x[:, 1:].mean(1))).detach()
        tuned = PromptedViT(model, prompts, depth="shallow", pool_prompts=True)
        assert relative_difference(tuned(images).detach(), expected) <= 1e-5


class TestTraining:
    def test_only_prompts_and_head_learn(self, tuned: PromptedViT, images: Tensor) -> None:
        learned = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
        assert learned == {"prompts", "model.head.weight", "model.head.bias"}
        assert len(tuned.trainable_parameters()) == 3
        before = {name: parameter.clone() for name, parameter in tuned.named_parameters()}
        optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=0.1)
        tuned(images).square().sum().backward()
        optimizer.step()
        changed = {
            name for name, parameter in tuned.named_parameters() if not torch.equal(parameter, before[name])
        }
        assert changed == learned

    def test_frozen_prompts_leave_the_head(self, make_random: MakeViT, images: Tensor) -> None:
        tuned = PromptedViT(make_random(), make_prompts(), num_classes=4, freeze_prompts=True)
        assert [tuple(parameter.shape) for parameter in tuned.trainable_parameters()] == [(4, WIDTH), (4,)]
        features = tuned.forward_features(images)
        assert not features.requires_grad

    @pytest.mark.parametrize("engine", ["kv", "concat"])
    def test_no_graph_before_the_first_prompt(
        self, engine: Any, make_random: MakeViT, images: Tensor
    ) -> None:
        tuned = PromptedViT(make_random(), make_prompts(), engine=engine)
        needs_grad: list[bool] = []
        for block in tuned.model.blocks:
            block.register_forward_pre_hook(lambda _, inputs: needs_grad.append(inputs[0].requires_grad))
        tuned(images)
        assert needs_grad == [False, True, True]

    def test_train_leaves_the_backbone_in_eval_mode(self, make_random: MakeViT) -> None:
        model = make_random(drop_rate=0.5, drop_path_rate=0.5)
        tuned = PromptedViT(model, make_prompts(), num_classes=4).train()
        training = {name for name, module in tuned.named_modules() if module.training}
        assert training == {"", "prompt_dropout", "model.head", "model.head_drop"}
        assert not any(module.training for module in tuned.eval().modules())

    def test_training_mode_is_taken_from_the_model(self, make_random: MakeViT) -> None:
        assert PromptedViT(make_random().train(), make_prompts()).training
        assert not PromptedViT(make_random().eval(), make_prompts()).training

    def test_given_prompts_are_copied(self, make_random: MakeViT) -> None:
        prompts = make_prompts()
        tuned = PromptedViT(make_random(), prompts)
        with torch.no_grad():
            tuned.prompts.zero_()
        assert torch.equal(prompts, make_prompts())

    def test_random_prompts_follow_vpt(self, make_random: MakeViT) -> None:
        tuned = PromptedViT(make_random(), 50)
        bound = math.sqrt(6 / (3 * 8 * 8 + WIDTH))
        assert tuned.prompts.shape == (DEPTH, 50, WIDTH)
        assert tuned.num_prompts == 50
        assert 0.98 * bound < float(tuned.prompts.detach().abs().max()) <= bound
        assert PromptedViT(make_random(), 3, depth="shallow").prompts.shape == (1, 3, WIDTH)

    def test_prototypes_are_taken_by_their_prompts(self, make_random: MakeViT) -> None:
        tuned = PromptedViT(make_random(), SimpleNamespace(prompts=make_prompts()))  # type: ignore[arg-type]
        assert torch.equal(tuned.prompts, make_prompts())

    def test_half_precision_model_keeps_float32_prompts(self, make_random: MakeViT, images: Tensor) -> None:
        tuned = PromptedViT(make_random().bfloat16(), make_prompts(), num_classes=4)
        assert tuned.prompts.dtype == torch.float32
        logits = tuned(images.bfloat16())
        logits.sum().backward()
        assert logits.dtype == torch.bfloat16
        assert tuned.prompts.grad is not None

    @pytest.mark.parametrize("engine", ["kv", "concat"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_images_are_cast_to_the_dtype_of_the_patch_embedding(
        self, dtype: torch.dtype, engine: Any, make_random: MakeViT, images: Tensor
    ) -> None:
        tuned = PromptedViT(make_random().to(dtype), make_prompts(), engine=engine)
        expected = logits_and_gradient(tuned, images.to(dtype))
        assert expected[0].dtype == dtype
        assert tuned.forward_features(images).dtype == dtype
        of_float32 = logits_and_gradient(PromptedViT(make_random(), make_prompts(), engine=engine), images)
        for given in (images, images.double(), images.half()):
            exact = torch.equal(given.to(dtype), images.to(dtype))
            for got, want, near in zip(logits_and_gradient(tuned, given), expected, of_float32, strict=True):
                assert not exact or torch.equal(got, want)
                assert relative_difference(got.float(), near) < 0.15

    @pytest.mark.parametrize("weight_dtype", ["bf16", "fp16"])
    def test_images_of_any_dtype_are_taken_under_weight_dtype(
        self, weight_dtype: Any, make_random: MakeViT, images: Tensor
    ) -> None:
        tuned = PromptedViT(make_random(), make_prompts(), weight_dtype=weight_dtype)
        assert torch.equal(tuned(images.double()), tuned(images))
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(tuned(images.to(dtype)), tuned(images.to(dtype).float()))

    def test_images_keep_their_gradient(self, make_random: MakeViT, images: Tensor) -> None:
        """For saliency maps of a model in half precision."""
        given = images.clone().requires_grad_()
        PromptedViT(make_random().bfloat16(), make_prompts())(given)[:, 1].sum().backward()
        assert given.grad is not None
        assert given.grad.dtype == torch.float32
        assert float(given.grad.abs().max()) > 0

    def test_weight_dtype_for_a_model_in_another_dtype_is_refused(self, make_random: MakeViT) -> None:
        for model in (make_random().half(), make_random().double()):
            with pytest.raises(ValueError, match=r"weight_dtype must be None for a model in torch\.float"):
                PromptedViT(model, make_prompts(), weight_dtype="bf16")
        assert PromptedViT(make_random().bfloat16(), make_prompts(), weight_dtype="bf16").engine == "kv"

    def test_gradient_checkpointing_gives_the_same_gradients(
        self, make_random: MakeViT, images: Tensor
    ) -> None:
        for engine in ("kv", "concat"):
            tuned = PromptedViT(make_random(), make_prompts(), engine=engine)
            plain = logits_and_gradient(tuned, images)
            tuned.model.set_grad_checkpointing()
            recomputed: list[int] = []
            tuned.model.blocks[0].norm2.register_forward_hook(lambda *_, seen=recomputed: seen.append(1))
            saved = logits_and_gradient(tuned, images)
            assert len(recomputed) == 2
            assert all(torch.equal(a, b) for a, b in zip(plain, saved, strict=True))

    # What PyTorch loads for forward mode is compiled by its own deprecated means.
    @pytest.mark.filterwarnings("ignore:.torch.jit.script")
    def test_forward_mode_is_refused(self, make_random: MakeViT, images: Tensor) -> None:
        tuned = PromptedViT(make_random(), make_prompts(), engine="kv")
        with pytest.raises(ValueError, match="qkv must carry no tangent, got one: prompt_attention has no"):
            torch.func.jvp(tuned, (images,), (images,))

    def test_autocast_in_bfloat16_is_close(self, make_random: MakeViT, images: Tensor) -> None:
        for engine in ("kv", "concat"):
            tuned = PromptedViT(make_random(qk_norm=True), make_prompts(), engine=engine)
            logits, gradient = logits_and_gradient(tuned, images)
            with torch.autocast("cpu", torch.bfloat16):
                half, half_gradient = logits_and_gradient(tuned, images)
            assert half.dtype == torch.bfloat16
            assert relative_difference(half.float(), logits) < 0.05
            assert torch.cosine_similarity(half_gradient.flatten(), gradient.flatten(), dim=0) > 0.99

    def test_data_parallel_gives_the_same_gradients(
        self, tuned: PromptedViT, tmp_path: Path, images: Tensor
    ) -> None:
        expected = logits_and_gradient(tuned, images)[1]
        store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            parallel = nn.parallel.DistributedDataParallel(tuned).train()
            assert not tuned.model.blocks.training
            parallel(images).square().sum().backward()
        finally:
            torch.distributed.destroy_process_group()
        torch.testing.assert_close(tuned.prompts.grad, expected)

    def test_deepcopy_is_independent(self, tuned: PromptedViT, images: Tensor) -> None:
        expected = tuned(images).detach()
        other = copy.deepcopy(tuned)
        with torch.no_grad():
            tuned.prompts.copy_(tuned.prompts.flip(-1))
        torch.testing.assert_close(other(images).detach(), expected)
        assert not torch.allclose(tuned(images), expected)


@pytest.mark.parametrize("engine", ["kv", "concat"])
class TestUnusualInputs:
    def test_no_image_gives_no_logits(self, engine: Any, make_random: MakeViT, images: Tensor) -> None:
        tuned = PromptedViT(make_random(), make_prompts(), engine=engine)
        logits, gradient = logits_and_gradient(tuned, images[:0])
        assert logits.shape == (0, 5)
        assert not gradient.any()

    def test_meta_device_gives_shapes(self, engine: Any, make_random: MakeViT, images: Tensor) -> None:
        tuned = PromptedViT(make_random().to("meta"), make_prompts(), engine=engine).eval()
        logits, gradient = logits_and_gradient(tuned, images.to("meta"))
        assert (logits.shape, gradient.shape) == ((3, 5), (DEPTH, NUM_PROMPTS, WIDTH))
        with torch.no_grad(), tuned.fixed_prompts():
            assert tuned(images.to("meta")).is_meta


class TestFacts:
    def test_timm_finds_the_data_config_of_the_backbone(self) -> None:
        sizes = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}
        model = timm.create_model("vit_base_patch16_clip_224", **sizes)
        expected = timm.data.resolve_model_data_config(model)
        assert expected != timm.data.resolve_model_data_config(nn.Identity())
        tuned = PromptedViT(model, make_prompts())
        assert timm.data.resolve_model_data_config(tuned) == expected

    def test_number_of_classes_is_the_head_s(self, make_random: MakeViT) -> None:
        assert PromptedViT(make_random(), 2).num_classes == 5
        assert PromptedViT(make_random(), 2, num_classes=9).num_classes == 9

    def test_what_the_model_does_not_state_is_missing(self, make_random: MakeViT) -> None:
        model = make_random()
        del model.num_classes
        tuned = PromptedViT(model, 2)
        assert not any(hasattr(tuned, name) for name in ("num_classes", "pretrained_cfg"))

    def test_numpy_integers_are_taken(self, make_random: MakeViT, images: Tensor) -> None:
        tuned = PromptedViT(make_random(), np.int64(3), num_classes=np.int32(4))  # type: ignore[arg-type]
        assert (tuned.num_prompts, tuned(images).shape) == (3, (3, 4))


class TestTracing:
    @pytest.mark.parametrize("engine", ["kv", "concat"])
    def test_compiles_without_graph_break(self, engine: Any, make_random: MakeViT, images: Tensor) -> None:
        torch.compiler.reset()
        tuned = PromptedViT(make_random(depth=2), make_prompts(2), engine=engine)
        expected = logits_and_gradient(tuned, images)
        compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
        got = logits_and_gradient(tuned, images, compiled)
        assert all(relative_difference(a, b) <= 1e-5 for a, b in zip(got, expected, strict=True))

    def test_compiles_shallow_under_autocast(self, make_random: MakeViT, images: Tensor) -> None:
        torch.compiler.reset()
        tuned = PromptedViT(make_random(depth=2), make_prompts(1), depth="shallow")
        compiled = torch.compile(tuned, fullgraph=True, backend="eager")
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(compiled(images), tuned(images))

    def test_compiled_model_sees_new_prompts(self, make_random: MakeViT, images: Tensor) -> None:
        torch.compiler.reset()
        tuned = PromptedViT(make_random(depth=2), make_prompts(2)).eval()
        compiled = torch.compile(tuned, fullgraph=True, backend="eager")
        with torch.no_grad():
            first = compiled(images)
            tuned.prompts.mul_(2)
            assert torch.equal(compiled(images), tuned(images))
            assert not torch.equal(first, tuned(images))

    def test_exports_with_dynamic_batch(self, make_random: MakeViT, make_images: MakeImages) -> None:
        tuned = PromptedViT(make_random(depth=2), make_prompts(2)).eval()
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(tuned, (make_images(3),), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(make_images(5)), tuned(make_images(5)))
        assert "prompts" in program.state_dict

    def test_an_exported_file_runs_where_the_package_is_imported(
        self,
        make_random: MakeViT,
        make_images: MakeImages,
        tmp_path: Path,
        run_script: Callable[..., Any],
    ) -> None:
        tuned = PromptedViT(make_random(depth=2), make_prompts(2)).eval()
        torch.export.save(torch.export.export(tuned, (make_images(3),)), tmp_path / "tuned.pt2")
        torch.save((make_images(3), tuned(make_images(3)).detach()), tmp_path / "expected.pt")
        code = """
import torch, spt_fast
images, expected = torch.load("expected.pt")
torch.testing.assert_close(torch.export.load("tuned.pt2").module()(images), expected)
"""
        done = run_script(code, tmp_path)
        assert done.returncode == 0, done.stderr


class TestRelease:
    @pytest.mark.parametrize("num_classes", [None, 5, 9])
    @pytest.mark.parametrize("depth", ["deep", "shallow"])
    def test_gives_the_model_back_as_it_was(
        self, num_classes: int | None, depth: Any, make_random: MakeViT, images: Tensor
    ) -> None:
        model = make_random().train()
        model.blocks[1].eval()
        model.cls_token.requires_grad_(False)
        before = fingerprint(model, images)
        tuned = PromptedViT(
            model, make_prompts(DEPTH if depth == "deep" else 1), depth=depth, num_classes=num_classes
        )
        optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=0.1)
        tuned(images).square().sum().backward()
        optimizer.step()
        tuned.layer_nmi(images)
        assert tuned.release() is model
        assert_same(fingerprint(model, images), before)

    def test_gives_a_distilled_model_back(self, make_random: MakeViT, images: Tensor) -> None:
        model = make_random(model_class=VisionTransformerDistilled)
        before = fingerprint(model, images)
        tuned = PromptedViT(model, make_prompts(), num_classes=2)
        assert [tuple(p.shape) for p in tuned.head.parameters()] == [(2, WIDTH), (2,)] * 2
        assert tuned(images).shape == (3, 2)
        tuned.release()
        assert_same(fingerprint(model, images), before)

    def test_head_set_aside_follows_the_model(self, make_random: MakeViT) -> None:
        tuned = PromptedViT(make_random(), make_prompts(), num_classes=2)
        model = tuned.double().release()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}

    def test_released_object_says_so(self, tuned: PromptedViT, tmp_path: Path, images: Tensor) -> None:
        tuned.release()
        for call in (
            lambda: tuned(images),
            lambda: tuned.forward_features(images),
            lambda: tuned.layer_nmi(images),
            lambda: tuned.save(tmp_path / "x.safetensors"),
            lambda: tuned.load(tmp_path / "x.safetensors"),
            lambda: tuned.head,
            lambda: tuned.prompted_blocks,
            tuned.release,
        ):
            with pytest.raises(RuntimeError, match="has released its model"):
                call()
        assert tuned.train().training

    def test_model_can_be_taken_over_again(self, tuned: PromptedViT) -> None:
        with pytest.raises(ValueError, match="model already belongs to a tuned model"):
            PromptedViT(tuned.model, make_prompts())
        PromptedViT(tuned.release(), make_prompts())

    def test_the_model_is_free_also_where_garbage_is_collected_in_a_transform(
        self, make_random: MakeViT
    ) -> None:
        model = make_random()
        flags = {name: each.requires_grad for name, each in model.named_parameters()}
        holder = [PromptedViT(model, make_prompts(), engine="kv")]

        def drop(x: Tensor) -> Tensor:
            holder.clear()
            return x * x

        torch.func.grad(drop)(torch.ones(()))
        assert {name: each.requires_grad for name, each in model.named_parameters()} == flags
        PromptedViT(model, make_prompts())

    @pytest.mark.parametrize("engine", ["kv", "concat"])
    def test_the_model_is_free_when_nothing_refers_to_its_owner(
        self, engine: Any, make_random: MakeViT, images: Tensor
    ) -> None:
        """At once, without the garbage collector, so that a notebook's cell can be run again."""
        model = make_random()
        expected, head = model(images), model.head
        gc.disable()
        try:
            for _ in range(2):
                tuned = PromptedViT(model, make_prompts(), num_classes=4, engine=engine, weight_dtype="bf16")
                tuned(images).sum().backward()
                del tuned
        finally:
            gc.enable()
        assert model.head is head
        assert torch.equal(model(images), expected)

    def test_a_model_is_released_without_its_owner(self, tuned: PromptedViT, images: Tensor) -> None:
        model = tuned.model
        with pytest.raises(ValueError, match=r"call its release\(\), or spt_fast\.release\(model\), first"):
            PromptedViT(model, make_prompts())
        assert release(model) is model
        with pytest.raises(RuntimeError, match="has released its model"):
            tuned(images)
        other = PromptedViT(model, make_prompts())
        del tuned
        assert other(images).shape == (3, 5)
        assert release(other) is model
        with pytest.raises(ValueError, match="model must belong to a tuned model to be released, got Vision"):
            release(model)
        with pytest.raises(TypeError, match="model must be a Vision Transformer"):
            release(nn.Linear(2, 2))

    def test_a_copy_goes_on_when_the_original_ends(self, make_random: MakeViT, images: Tensor) -> None:
        tuned = PromptedViT(make_random(), make_prompts())
        expected = tuned(images)
        other = copy.deepcopy(tuned)
        del tuned
        assert torch.equal(other(images), expected)
        assert other.release()(images).shape == (3, 5)

    def test_prototypes_of_prompted_tokens_are_refused(self, tuned: PromptedViT, images: Tensor) -> None:
        model = tuned.model
        for given in (model, torch.compile(model)):
            with pytest.raises(
                ValueError, match="model already belongs to a tuned model, so that its tokens"
            ):
                build_prototypes(given, [images], num_prompts=2, progress=False)
        tuned.release()
        assert build_prototypes(model, [images], num_prompts=2, progress=False).prompts.isfinite().all()

    def test_failed_take_over_leaves_the_model_alone(self, make_random: MakeViT, images: Tensor) -> None:
        model = make_random().train()
        before = fingerprint(model, images)
        with pytest.raises(ValueError, match="prompts must have shape"):
            PromptedViT(model, make_prompts(width=8), num_classes=3)
        assert_same(fingerprint(model, images), copy.deepcopy(before))

        def interrupted(num_classes: int) -> None:
            model.head = nn.Linear(1, 1)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "reset_classifier", interrupted)
            with pytest.raises(KeyboardInterrupt):
                PromptedViT(model, make_prompts(), num_classes=3)
        assert_same(fingerprint(model, images), before)


def fingerprint(model: VisionTransformer, images: Tensor) -> dict[str, Any]:
    """All that a user could see of a model."""
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "grad flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "own forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "num_classes": model.num_classes,
        "logits": copy.deepcopy(model).eval()(images).detach(),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert torch.equal(found.pop("logits"), expected.pop("logits"))
    found_state, expected_state = found.pop("state"), expected.pop("state")
    assert list(found_state) == list(expected_state)
    assert all(torch.equal(found_state[name], expected_state[name]) for name in expected_state)
    assert found == expected


class TestHead:
    def test_new_head_has_the_classes_asked_for(self, tuned: PromptedViT, images: Tensor) -> None:
        assert tuple(tuned.head.weight.shape) == (4, WIDTH)  # type: ignore[arg-type]
        assert tuned(images).shape == (3, 4)
        pooled = tuned.forward_head(tuned.forward_features(images), pre_logits=True)
        torch.testing.assert_close(tuned.head(pooled), tuned(images))

    def test_kept_head_starts_from_the_models_and_learns(self, make_random: MakeViT) -> None:
        model = make_random()
        original = model.head
        tuned = PromptedViT(model, make_prompts())
        assert torch.equal(tuned.head.weight, original.weight)  # type: ignore[arg-type]
        assert tuned.head is not original
        assert all(parameter.requires_grad for parameter in tuned.head.parameters())

    @pytest.mark.parametrize("num_classes", [0, 5])
    def test_features_are_had_by_asking_for_no_classes(
        self, num_classes: int, make_random: MakeViT, images: Tensor, tmp_path: Path
    ) -> None:
        model = make_random(num_classes=num_classes)
        before = model(images)
        tuned = PromptedViT(model, make_prompts(), num_classes=0)
        assert tuned.num_classes == 0
        assert tuned(images).shape == (3, WIDTH)
        assert [id(parameter) for parameter in tuned.trainable_parameters()] == [id(tuned.prompts)]
        tuned.save(tmp_path / "features.safetensors")
        expected = tuned(images)
        assert torch.equal(tuned.release()(images), before)
        again = PromptedViT.from_file(tmp_path / "features.safetensors", make_random())
        assert torch.equal(again(images), expected)

    @pytest.mark.parametrize("remove", ["by timm", "by hand"])
    def test_features_are_not_taken_for_logits(
        self, remove: str, make_random: MakeViT, images: Tensor
    ) -> None:
        model = make_random(num_classes=0 if remove == "by timm" else 5)
        if remove == "by hand":
            model.head = nn.Identity()
        with pytest.raises(ValueError, match="has none and returns features: give num_classes=N"):
            PromptedViT(model, make_prompts())
        assert model(images).shape == (3, WIDTH)
        model.head = nn.Linear(WIDTH, 6)
        assert PromptedViT(model, make_prompts())(images).shape == (3, 6)


class TestFiles:
    def test_round_trip(
        self, tuned: PromptedViT, tmp_path: Path, make_random: MakeViT, images: Tensor
    ) -> None:
        path = tmp_path / "tuned.safetensors"
        expected = tuned(images).detach()
        tuned.save(path)
        other = PromptedViT(make_random(), 7, num_classes=4, engine="concat")
        learned = [id(parameter) for parameter in other.trainable_parameters()]
        assert relative_difference(other(images).detach(), expected) > 1e-2
        other.load(path)
        assert relative_difference(other(images).detach(), expected) <= 1e-5
        assert [id(parameter) for parameter in other.trainable_parameters()] == learned

    @pytest.mark.parametrize(
        ("options", "prompts"),
        [
            ({"num_classes": 4}, 3),
            ({}, 3),
            ({"num_classes": 4, "depth": "shallow"}, 1),
            ({"num_classes": 4, "pool_prompts": True}, 3),
        ],
    )
    def test_from_file_builds_what_was_saved(
        self, options: dict[str, Any], prompts: int, tmp_path: Path, make_random: MakeViT, images: Tensor
    ) -> None:
        def make_model() -> nn.Module:
            return make_random(global_pool="avg" if "pool_prompts" in options else "token")

        tuned = PromptedViT(make_model(), make_prompts(prompts), **options)
        tuned.class_names = [f"class {index}" for index in range(tuned.model.num_classes)]
        with torch.no_grad():
            tuned.head.weight.mul_(1.5)
        tuned.save(tmp_path / "tuned.safetensors")
        found = PromptedViT.from_file(tmp_path / "tuned.safetensors", make_model())
        assert torch.equal(found(images), tuned(images))
        assert found.class_names == tuple(tuned.class_names)
        assert found.head.weight.requires_grad

    def test_from_file_refuses_another_model_and_leaves_it_alone(
        self, tuned: PromptedViT, tmp_path: Path, make_random: MakeViT, images: Tensor
    ) -> None:
        path = tmp_path / "tuned.safetensors"
        tuned.save(path)
        other = make_random(reg_tokens=1)
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match="is for num_prefix_tokens '1'"):
            PromptedViT.from_file(path, other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
        assert all(parameter.requires_grad for parameter in other.parameters())
        assert other(images).shape == (3, other.num_classes)

    def test_from_file_leaves_the_random_state_alone(
        self, tuned: PromptedViT, tmp_path: Path, make_random: MakeViT
    ) -> None:
        path = tmp_path / "tuned.safetensors"
        tuned.save(path)
        other = make_random(num_classes=tuned.num_classes + 1)
        before = torch.get_rng_state()
        PromptedViT.from_file(path, other)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("names", ["abcd", ["a", "b"], ["a", "b", "c", 4], 5])
    def test_class_names_that_do_not_fit_are_refused(
        self, names: Any, tuned: PromptedViT, tmp_path: Path
    ) -> None:
        tuned.class_names = names
        with pytest.raises(ValueError, match="class_names must"):
            tuned.save(tmp_path / "tuned.safetensors")
        assert list(tmp_path.iterdir()) == []

    def test_file_holds_prompts_and_head_only(self, tuned: PromptedViT, tmp_path: Path) -> None:
        tuned.save(tmp_path / "tuned.safetensors")
        numbers = sum(parameter.numel() for parameter in tuned.trainable_parameters())
        assert (tmp_path / "tuned.safetensors").stat().st_size <= 4 * numbers + 2000

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (
                lambda make: PromptedViT(make(depth=2), make_prompts(2), num_classes=4),
                r"prompts of shape \[3, 7, 32\].*needs \[2, 7, 32\]",
            ),
            (
                lambda make: PromptedViT(make(embed_dim=48), make_prompts(width=48), num_classes=4),
                r"\[3, 7, 32\].*\[3, 7, 48\]",
            ),
            (
                lambda make: PromptedViT(make(), make_prompts(num_prompts=5), num_classes=4),
                r"\[3, 7, 32\].*\[3, 5, 32\]",
            ),
            (
                lambda make: PromptedViT(make(), make_prompts(), num_classes=6),
                r"head.weight of shape \[4, 32\].*needs \[6, 32\]",
            ),
            (lambda make: PromptedViT(make(), make_prompts(), num_classes=0), "this model needs"),
            (
                lambda make: PromptedViT(make(), make_prompts(1), num_classes=4, depth="shallow"),
                r"\[3, 7, 32\].*\[1, 7, 32\]",
            ),
            (
                lambda make: PromptedViT(make(global_pool="avg"), make_prompts(), num_classes=4),
                "is for global_pool 'token'",
            ),
            (
                lambda make: PromptedViT(make(reg_tokens=1), make_prompts(), num_classes=4),
                "is for num_prefix_tokens '1'",
            ),
        ],
    )
    def test_misfit_is_refused_and_changes_nothing(
        self,
        tuned: PromptedViT,
        tmp_path: Path,
        build: Callable[[MakeViT], PromptedViT],
        message: str,
        make_random: MakeViT,
    ) -> None:
        path = tmp_path / "tuned.safetensors"
        tuned.save(path)
        other = build(make_random)
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            other.load(path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())

    @pytest.mark.parametrize("part", ["pos_embed", "blocks.1.attn.qkv.weight", "norm.weight"])
    @pytest.mark.parametrize("way", ["load", "from_file"])
    def test_other_weights_are_refused_unless_allowed(
        self, part: str, way: str, tuned: PromptedViT, tmp_path: Path, make_random: MakeViT, images: Tensor
    ) -> None:
        path = tmp_path / "tuned.safetensors"
        tuned.model.pretrained_cfg = {"architecture": "vit_toy", "tag": "mae"}
        tuned.save(path)
        other = make_random()
        other.pretrained_cfg = {"architecture": "vit_toy", "tag": "augreg"}
        expected = PromptedViT.from_file(path, other)(images).detach()
        other = make_random()
        other.pretrained_cfg = {"architecture": "vit_toy", "tag": "augreg"}
        with torch.no_grad():
            other.get_parameter(part).mul_(1.02)

        def read(**options: Any) -> PromptedViT:
            if way == "from_file":
                return PromptedViT.from_file(path, other, **options)
            loaded = PromptedViT(other, 7, num_classes=4)
            try:
                loaded.load(path, **options)
            except ValueError:
                loaded.release()
                raise
            return loaded

        with pytest.raises(
            ValueError,
            match=r"is for other weights \(vit_toy\.mae, \w*fingerprint \w{8}\) than this model has "
            r"\(vit_toy\.augreg, \w*fingerprint \w{8}\); .* allow_other_backbone=True",
        ):
            read()
        found = read(allow_other_backbone=True)(images).detach()
        assert 0 < relative_difference(found, expected) < 0.5

    def test_another_image_size_is_refused_unless_allowed(
        self, tuned: PromptedViT, tmp_path: Path, make_random: MakeViT
    ) -> None:
        path = tmp_path / "tuned.safetensors"
        tuned.save(path)
        other = make_random(img_size=48)
        with pytest.raises(ValueError, match="is for image_size '32x32', but this model has '48x48'"):
            PromptedViT.from_file(path, other)
        assert PromptedViT.from_file(path, other, allow_other_backbone=True).num_classes == 4

    @pytest.mark.parametrize("options", [{"weight_dtype": "bf16"}, {"weight_dtype": "fp16"}, {}])
    def test_narrower_weights_are_the_same_weights(
        self, options: dict[str, Any], tuned: PromptedViT, tmp_path: Path, make_random: MakeViT
    ) -> None:
        path = tmp_path / "tuned.safetensors"
        tuned.save(path)
        narrow = PromptedViT.from_file(path, make_random(), **options)
        if not options:
            narrow.half()
        narrow.save(tmp_path / "narrow.safetensors")
        narrow.load(path)
        tuned.load(tmp_path / "narrow.safetensors")

    def test_prototypes_of_other_weights_are_refused_unless_allowed(
        self, make_random: MakeViT, make_images: MakeImages
    ) -> None:
        prototypes = build_prototypes(make_random(), [make_images(4)], num_prompts=2, progress=False)
        PromptedViT(make_random().half(), prototypes)
        other = make_random()
        with torch.no_grad():
            other.blocks[2].mlp.fc1.weight.mul_(1.02)
        with pytest.raises(ValueError, match=r"prompts\.metadata is for other weights .* \(--allow-other"):
            PromptedViT(other, prototypes)
        assert PromptedViT(other, prototypes, allow_other_backbone=True).num_prompts == 2

    def test_truncated_and_foreign_files_are_refused(self, tuned: PromptedViT, tmp_path: Path) -> None:
        whole, cut, foreign = (tmp_path / name for name in ("whole", "cut", "foreign"))
        tuned.save(whole)
        cut.write_bytes(whole.read_bytes()[:-50])
        write_safetensors(foreign, {"prompts": make_prompts()}, {}, kind="something_else")
        for path in (cut, foreign):
            with pytest.raises(ValueError, match=str(path)):
                tuned.load(path)
        with pytest.raises(FileNotFoundError):
            tuned.load(tmp_path / "absent")

    def test_a_preprocessing_that_is_none_is_refused(self, tuned: PromptedViT, tmp_path: Path) -> None:
        tuned.preprocessing = "vtab"  # type: ignore[assignment]
        with pytest.raises(TypeError, match=r"preprocessing must be a Preprocessing .* or None, got 'vtab'"):
            tuned.save(tmp_path / "tuned.safetensors")

    @pytest.mark.parametrize(
        ("changed", "reason"),
        [
            ({"prompts": None}, "it holds no prompts"),
            ({"prompt_depth": None}, "it holds no prompt_depth"),
            ({"pool_prompts": None}, "it holds no pool_prompts"),
            ({"prompt_depth": "middle"}, "prompt_depth must be one of 'deep', 'shallow', got 'middle'"),
            ({"pool_prompts": "yes"}, "pool_prompts must be one of 'True', 'False', got 'yes'"),
            ({"num_classes": "x"}, "num_classes must be an integer >= 0, got 'x'"),
            ({"preprocessing": "{}x"}, "preprocessing must be resize and mean_std in JSON, got '{}x'"),
            ({"class_names": "["}, "Expecting value"),
            ({"class_names": "5"}, "class_names must be a JSON list of strings, got '5'"),
            ({"class_names": "null"}, "class_names must be a JSON list of strings, got 'null'"),
            ({"class_names": "[1, 2, 3, 4]"}, "class_names must be a sequence of strings"),
            ({"class_names": '["a"]'}, "class_names must hold one name for each of 4 classes, got 1"),
            (
                {"class_names": '["a"]', "num_classes": None},
                "class_names must hold one name for each of 4 classes, got 1",
            ),
            (
                {"prompts": torch.full((DEPTH, NUM_PROMPTS, WIDTH), math.nan)},
                "prompts[0] holds NaN or infinity",
            ),
            ({"prompts": torch.ones(NUM_PROMPTS, WIDTH)}, "prompts must be [L or 1, N_p, D], got [7, 32]"),
            ({"prompts": torch.ones(DEPTH, NUM_PROMPTS, WIDTH).int()}, "prompts must be a floating-point"),
            ({"head.bias": torch.full((4,), math.inf)}, "head.bias holds NaN or infinity"),
            ({"head.bias": torch.ones(4).long()}, "head.bias is torch.int64, this model needs torch.float32"),
        ],
    )
    @pytest.mark.parametrize("way", ["load", "from_file"])
    def test_files_that_are_not_valid_are_refused_and_change_nothing(
        self,
        way: str,
        changed: dict[str, Any],
        reason: str,
        tuned: PromptedViT,
        tmp_path: Path,
        make_random: MakeViT,
        images: Tensor,
    ) -> None:
        path = tmp_path / "tuned.safetensors"
        tuned.save(path)
        tensors, facts = read_safetensors(path, kind="prompted_vit")
        for name, value in changed.items():
            part: dict[str, Any] = tensors if name == "prompts" or name.startswith("head.") else facts
            part.pop(name, None)
            if value is not None:
                part[name] = value
        write_safetensors(path, tensors, facts, kind="prompted_vit", overwrite=True)
        with torch.no_grad():
            tuned.prompts.add_(1)
        model = make_random(num_classes=4) if way == "from_file" else tuned
        before = fingerprint(model, images)
        message = f"{path} does not hold a valid tuned model ({reason}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            tuned.load(path) if way == "load" else PromptedViT.from_file(path, model)
        assert_same(fingerprint(model, images), before)
        if way == "from_file":
            assert PromptedViT(model, 3).num_prompts == 3

    def test_from_file_gives_the_model_back_after_any_error(
        self, tuned: PromptedViT, tmp_path: Path, make_random: MakeViT, images: Tensor
    ) -> None:
        path = tmp_path / "tuned.safetensors"
        tuned.save(path)
        model = make_random()
        before = fingerprint(model, images)
        with pytest.raises(TypeError, match="allow_other_backbone must be True or False, got 'no'"):
            PromptedViT.from_file(path, model, allow_other_backbone="no")
        assert_same(fingerprint(model, images), before)
        assert PromptedViT(model, 3).num_prompts == 3

    def test_what_the_user_has_unfrozen_is_not_lost(self, tuned: PromptedViT, tmp_path: Path) -> None:
        tuned.model.blocks[1].norm1.requires_grad_(True)
        with pytest.raises(
            ValueError, match=r"2 other parameters learn \(model\.blocks\.1\.norm1\.weight, model\.blocks\.1"
        ):
            tuned.save(tmp_path / "tuned.safetensors")
        assert not list(tmp_path.iterdir())
        tuned.model.blocks[1].norm1.requires_grad_(False)
        tuned.save(tmp_path / "tuned.safetensors")

    def test_existing_files_and_missing_folders_are_refused(self, tuned: PromptedViT, tmp_path: Path) -> None:
        path = tmp_path / "tuned.safetensors"
        path.write_text("mine")
        with pytest.raises(FileExistsError):
            tuned.save(path)
        with pytest.raises(TypeError, match="overwrite must be True or False, got 'no'"):
            tuned.save(path, overwrite="no")
        assert path.read_text() == "mine"
        tuned.save(path, overwrite=True)
        tuned.load(path)
        with pytest.raises(FileNotFoundError):
            tuned.save(tmp_path / "absent" / "tuned.safetensors")


class TestLayerNMI:
    def test_matches_reference_on_the_block_inputs(self, tuned: PromptedViT, images: Tensor) -> None:
        inputs: list[Tensor] = []
        for block in tuned.model.blocks:
            block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        tuned(images)
        expected = torch.stack(
            [sigmoid_nmi_reference(p, x[:, 1:]) for p, x in zip(tuned.prompts.detach(), inputs, strict=True)]
        )
        got = tuned.layer_nmi(images)
        assert got.shape == (DEPTH, 3)
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
        assert not got.requires_grad

    def test_shallow_measures_what_became_of_the_prompts(self, make_random: MakeViT, images: Tensor) -> None:
        tuned = PromptedViT(make_random(reg_tokens=2), make_prompts(1), depth="shallow")
        inputs: list[Tensor] = []
        for block in tuned.model.blocks:
            block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
        got = tuned.layer_nmi(images)
        assert inputs[1].shape == (3, 3 + 16 + NUM_PROMPTS, WIDTH)
        expected = sigmoid_nmi_reference(inputs[1][2, -NUM_PROMPTS:], inputs[1][2:, 3:-NUM_PROMPTS])
        assert got.shape == (DEPTH, 3)
        torch.testing.assert_close(got[1, 2:].double(), expected, rtol=1e-5, atol=0)

    def test_leaves_no_hooks_and_keeps_the_mode(
        self, tuned: PromptedViT, make_images: MakeImages, images: Tensor
    ) -> None:
        tuned.train()
        before = fingerprint_of_modes(tuned)
        tuned.layer_nmi(images)
        with pytest.raises(ValueError, match="images must be 32 x 32"):
            tuned.layer_nmi(make_images(size=16))
        assert fingerprint_of_modes(tuned) == before


def fingerprint_of_modes(tuned: PromptedViT) -> list[tuple[bool, int]]:
    return [(module.training, len(module._forward_pre_hooks)) for module in tuned.modules()]


class TestPromptsAndTokens:
    def test_deep_blocks_have_prompts_of_their_own(self, make_random: MakeViT) -> None:
        tuned, x = PromptedViT(make_random(reg_tokens=2), make_prompts()), torch.randn(4, 19, WIDTH)
        for layer in range(DEPTH):
            prompts, tokens = tuned.prompts_and_tokens(layer, x)
            assert torch.equal(prompts, tuned.prompts[layer : layer + 1])
            assert torch.equal(tokens, x[:, 3:])
        (gradient,) = torch.autograd.grad(prompts.sum(), [tuned.prompts])
        assert gradient.sum(dim=(1, 2)).tolist() == [0, 0, NUM_PROMPTS * WIDTH]

    def test_shallow_blocks_find_prompts_behind_the_patches(self, make_random: MakeViT) -> None:
        tuned = PromptedViT(make_random(), make_prompts(1), depth="shallow")
        x = torch.randn(4, 17, WIDTH)
        prompts, tokens = tuned.prompts_and_tokens(0, x)
        assert torch.equal(prompts, tuned.prompts)
        assert torch.equal(tokens, x[:, 1:])
        outputs = torch.randn(4, NUM_PROMPTS, WIDTH)
        prompts, tokens = tuned.prompts_and_tokens(1, torch.cat((x, outputs), dim=1))
        assert torch.equal(prompts, outputs)
        assert torch.equal(tokens, x[:, 1:])

    @pytest.mark.parametrize(
        ("layer", "x", "error", "message"),
        [
            (3, torch.ones(1, 17, WIDTH), ValueError, "layer must be below 3, the number of blocks, got 3"),
            (-1, torch.ones(1, 17, WIDTH), ValueError, "layer must be an integer >= 0, got -1"),
            (0.0, torch.ones(1, 17, WIDTH), TypeError, "layer must be an integer >= 0"),
            (0, torch.ones(17, WIDTH), ValueError, r"x must be \[B, N, 32\], got \[17, 32\]"),
            (0, torch.ones(1, 17, 8), ValueError, r"x must be \[B, N, 32\], got \[1, 17, 8\]"),
            (0, [1.0], TypeError, "x must be a tensor, got list"),
            (0, torch.ones(1, 1, WIDTH), ValueError, "1 prefix tokens and 0 prompts, .* at least 2, got 1"),
        ],
    )
    def test_others_are_refused(
        self, tuned: PromptedViT, layer: Any, x: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            tuned.prompts_and_tokens(layer, x)

    @pytest.mark.parametrize("length", [2, 3, 4])
    def test_shallow_inputs_without_patches_are_refused(self, length: int, make_random: MakeViT) -> None:
        tuned = PromptedViT(make_random(), 3, depth="shallow")
        with pytest.raises(
            ValueError, match=f"1 prefix tokens and 3 prompts, so N must be at least 5, got {length}"
        ):
            tuned.prompts_and_tokens(1, torch.ones(1, length, WIDTH))
        prompts, tokens = tuned.prompts_and_tokens(1, torch.ones(1, 5, WIDTH))
        assert (prompts.shape[1], tokens.shape[1]) == (3, 1)


class PlainViT(nn.Module):
    """A ViT that knows nothing of timm, as research code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.blocks = nn.ModuleList(Block(WIDTH, 4) for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class TestOtherModels:
    def test_model_that_is_not_timms(self, images: Tensor) -> None:
        torch.manual_seed(0)
        tuned = PromptedViT(PlainViT(), make_prompts(2))  # type: ignore[arg-type]
        assert {name for name, p in tuned.named_parameters() if p.requires_grad} == {
            "prompts",
            "model.head.weight",
            "model.head.bias",
        }
        assert tuned(images).shape == (3, 5)
        assert tuned.layer_nmi(images).shape == (2, 3)
        with pytest.raises(
            TypeError, match="num_classes needs a model with timm's `reset_classifier`, got PlainViT"
        ):
            PromptedViT(PlainViT(), make_prompts(2), num_classes=3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="model must state the size of its patches"):
            PromptedViT(PlainViT(), 3)  # type: ignore[arg-type]

    def test_blocks_that_are_given_more_than_tokens_are_refused(self, make_random: MakeViT) -> None:
        tuned = PromptedViT(make_random(), make_prompts())
        with pytest.raises(TypeError, match="Block cannot be prompted when it is also given attn_mask"):
            tuned.model.blocks[0](torch.ones(1, 17, WIDTH), attn_mask=torch.ones(17, 17))

    @pytest.mark.parametrize(
        ("name", "options", "reason"),
        [
            (
                "swin_tiny_patch4_window7_224",
                {"embed_dim": 24, "depths": (1, 1)},
                "no `.blocks`, but stages in `.layers`",
            ),
            (
                "convnext_tiny",
                {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
                "no `.blocks`, but stages in `.stages`",
            ),
            ("resnet10t", {}, "no `.blocks`, but stages in `.layer1`"),
            ("efficientnet_b0", {}, "convolution stages over feature maps"),
        ],
    )
    def test_backbones_that_are_no_vit_are_refused(
        self, name: str, options: dict[str, Any], reason: str
    ) -> None:
        model = timm.create_model(name, **options)
        with pytest.raises(TypeError, match=reason):
            PromptedViT(model, 2)

    def test_wrappers_are_told_which_part_to_give(self, vit: VisionTransformer) -> None:
        wrapper = nn.Sequential(nn.Identity(), nn.ModuleDict({"net": vit}))
        with pytest.raises(
            TypeError, match=r"its part `1\.net` is a VisionTransformer, which has them: give that part"
        ):
            PromptedViT(wrapper, 2)

    def test_hugging_face_models_are_called_so(self) -> None:
        class ViTModel(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layers = nn.ModuleList([nn.Linear(2, 2)])

        ViTModel.__module__ = "transformers.models.vit.modeling_vit"
        with pytest.raises(TypeError, match=r"got ViTModel: .* Hugging Face model, .* same weights in timm"):
            PromptedViT(ViTModel(), 2)

    def test_hierarchical_and_empty_models_are_refused(self, make_random: MakeViT) -> None:
        model = make_random()
        model.blocks[1] = Block(16, 4)
        with pytest.raises(TypeError, match="width of its blocks changes from 16 to 32"):
            get_blocks(model)
        with pytest.raises(TypeError, match=r"its `\.blocks` is empty"):
            get_blocks(make_random(depth=0))
        with pytest.raises(
            TypeError, match=r"backbone must be a Vision Transformer .* got Linear: it has no `\.blocks`"
        ):
            get_blocks(nn.Linear(2, 2), "backbone")
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
            get_blocks("vit_base")  # type: ignore[arg-type]

    def test_description_of_a_backbone(self, make_random: MakeViT) -> None:
        model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", depth=1, num_classes=0)
        facts = describe(model)
        assert facts.pop("fingerprint")
        assert facts == {
            "architecture": "vit_tiny_patch16_224.augreg_in21k",
            "num_blocks": "1",
            "width": "192",
            "num_prefix_tokens": "1",
            "num_heads": "3",
            "patch_size": "16x16",
            "image_size": "224x224",
            "in_chans": "3",
        }
        assert (
            describe(PlainViT()).items()
            >= {"num_blocks": "2", "width": "32", "num_prefix_tokens": "0"}.items()
        )
        assert embed_dim(PlainViT()) == WIDTH
        assert num_prefix_tokens(make_random(reg_tokens=4)) == 5


class TestBadInput:
    @pytest.mark.parametrize(("depth", "other"), [("deep", "shallow"), ("shallow", "deep")])
    def test_hint_for_prototypes_of_the_other_depth_works(
        self, depth: Any, other: str, make_random: MakeViT, make_images: MakeImages, images: Tensor
    ) -> None:
        prompts = build_prototypes(
            make_random(), [make_images(8)], num_prompts=2, depth=other, progress=False
        )
        with pytest.raises(ValueError, match="prompts must have shape") as raised:
            PromptedViT(make_random(), prompts, depth=depth)
        hint = str(raised.value).rpartition("layer, " if depth == "shallow" else "all, ")[2]
        repaired = eval(hint, {"prompts": prompts})
        assert PromptedViT(make_random(), repaired, depth=depth)(images).isfinite().all()

    @pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), nn.DataParallel])
    def test_wrapped_model_is_refused(
        self, wrap: Callable[[nn.Module], nn.Module], make_random: MakeViT
    ) -> None:
        model = make_random()
        wrapped = wrap(model)
        name = type(wrapped).__name__
        with pytest.raises(TypeError, match=f"model must be the VisionTransformer itself, got .* {name}"):
            PromptedViT(wrapped, make_prompts(), num_classes=3)
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_blocks_and_head_in_one_child_are_refused(self, make_random: MakeViT, images: Tensor) -> None:
        class Wrapper(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def __getattr__(self, name: str) -> Any:
                return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

            def forward(self, images: Tensor) -> Tensor:
                return self.inner(images)

        model = Wrapper(make_random())
        before = fingerprint(model, images)
        with pytest.raises(TypeError, match="got Wrapper with both in `inner`; give that child instead"):
            PromptedViT(model, make_prompts(), num_classes=3)
        assert_same(fingerprint(model, images), before)

    @pytest.mark.parametrize(
        ("prompts", "options", "error", "message"),
        [
            (
                make_prompts(width=16),
                {},
                ValueError,
                r"prompts must have shape \[3, N_p, 32\] for depth='deep', got \[3, 7, 16\]",
            ),
            (make_prompts(2), {}, ValueError, r"for depth='deep', got \[2, 7, 32\]$"),
            (
                make_prompts(1),
                {},
                ValueError,
                r"got \[1, 7, 32\]; build .* depth='deep', or repeat .*, prompts\.expand\(3, -1, -1\)",
            ),
            (
                make_prompts(),
                {"depth": "shallow"},
                ValueError,
                r"\[1, N_p, 32\] .* got \[3, 7, 32\]; .* depth='shallow'",
            ),
            (make_prompts()[0], {}, ValueError, r"got \[7, 32\]"),
            (make_prompts().int(), {}, TypeError, "prompts must be a floating-point tensor, got torch.int32"),
            (
                make_prompts().numpy(),
                {},
                TypeError,
                "prompts must be Prototypes, a tensor or an integer, got ndarray",
            ),
            (True, {}, TypeError, "prompts must be Prototypes, a tensor or an integer, got bool"),
            (None, {}, TypeError, "got NoneType"),
            (-1, {}, ValueError, "prompts must be an integer >= 0, got -1"),
            (2, {"depth": "middle"}, ValueError, "depth must be one of 'deep', 'shallow', got 'middle'"),
            (2, {"engine": "fast"}, ValueError, "engine must be one of 'auto', 'kv', 'concat', got 'fast'"),
            (2, {"num_classes": -1}, ValueError, "num_classes must be an integer >= 0 or None, got -1"),
            (2, {"num_classes": 2.0}, TypeError, r"num_classes must be an integer >= 0 or None, got 2\.0"),
            *(
                (2, {name: "False"}, TypeError, f"{name} must be True or False, got 'False'")
                for name in ("freeze_prompts", "pool_prompts", "allow_other_backbone")
            ),
            (
                2,
                {"pool_prompts": True},
                ValueError,
                "pool_prompts needs a model with global_pool='avg', got 'token'",
            ),
        ],
    )
    def test_bad_arguments_are_refused(
        self,
        prompts: Any,
        options: dict[str, Any],
        error: type[Exception],
        message: str,
        make_random: MakeViT,
    ) -> None:
        with pytest.raises(error, match=message):
            PromptedViT(make_random(), prompts, **options)

    def test_images_of_other_channels_are_refused(self, make_random: MakeViT) -> None:
        tuned = PromptedViT(make_random(), 2)
        with pytest.raises(ValueError, match=r"^images must have 3 channels for this model, got"):
            tuned(torch.ones(2, 1, 32, 32))

    @pytest.mark.parametrize(("name", "layer"), [("prompts", 1), ("head.bias", None)])
    def test_non_finite_tensors_are_not_saved(
        self, name: str, layer: int | None, make_random: MakeViT, tmp_path: Path
    ) -> None:
        tuned = PromptedViT(make_random(), 2)
        with torch.no_grad():
            (tuned.prompts[1] if layer else tuned.head.bias)[-1] = math.nan
        with pytest.raises(NonFiniteError, match=rf"^{name}.* holds NaN or infinity, all") as found:
            tuned.save(tmp_path / "t.safetensors")
        assert found.value.layer == layer
        assert list(tmp_path.iterdir()) == []

    def test_non_finite_prompts_are_refused(self, make_random: MakeViT) -> None:
        prompts = make_prompts()
        prompts[1, 2, 3] = math.nan
        with pytest.raises(NonFiniteError, match="prompts must be finite, but row 9 holds NaN"):
            PromptedViT(make_random(), prompts)

    @pytest.mark.parametrize(
        ("images", "error", "message"),
        [
            ([1.0], TypeError, "images must be a tensor, got list"),
            (
                torch.ones(2, 3, 32, 32, dtype=torch.uint8),
                TypeError,
                "images must be a floating-point tensor, got torch.uint8",
            ),
            (
                torch.ones(3, 32, 32),
                ValueError,
                r"images must be \[B, C, height, width\], got \[3, 32, 32\]",
            ),
            (
                torch.ones(2, 3, 32, 40),
                ValueError,
                r"images must be 32 x 32 for this model, got \[2, 3, 32, 40\]",
            ),
        ],
    )
    def test_bad_images_are_refused(
        self, tuned: PromptedViT, images: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            tuned(images)


def test_nmi_changes_nothing_in_a_model_that_trains(make_vit: Any, make_images: Any) -> None:
    tuned = PromptedViT(make_vit(), 3, num_classes=2, head_norm="batch", prompt_dropout=0.5).train()
    tuned.model.head[0].eval()
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    modes = [module.training for module in tuned.modules()]
    images = make_images()
    found = tuned.layer_nmi(images)
    assert [module.training for module in tuned.modules()] == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
    assert torch.equal(found, tuned.eval().layer_nmi(images))
    # One image is enough.
    assert tuned.train().layer_nmi(images[:1]).shape == (3, 1)
