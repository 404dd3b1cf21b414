"""Every family in docs/backbones.md: both engines against timm's own blocks with prompts as tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.eva import Eva
from torch import Tensor, nn

from spt_fast import PromptedViT, build_prototypes, nearest_patches, tune
from spt_fast.backbones.anatomy import embed_dim, get_blocks, patch_size
from spt_fast.commands.doctor import report

WIDTH, HEADS, DEPTH, NUM_PROMPTS, SIZE = 48, 2, 2, 5, 64
TINY = {"img_size": SIZE, "embed_dim": WIDTH, "num_heads": HEADS, "depth": DEPTH, "num_classes": 3}
SMALL = {"img_size": SIZE}

# docs/backbones.md names these models.
MODELS = [
    "vit_base_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    "eva_giant_patch14_224",
    "eva02_base_patch16_clip_224",
    "eva02_enormous_patch14_clip_224",
    "vit_mediumd_patch16_rope_reg1_gap_256",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "vit_tiny_r_s16_p8_224",
]
# Older timm lacks these.
NEWER_MODELS = [
    "vit_small_patch16_dinov3",
    "vit_small_plus_patch16_dinov3",
    "vit_small_patch16_rope_mixed_224",
    "vit_pe_core_tiny_patch16_384",
    "aimv2_large_patch14_224",
    "naflexvit_base_patch16_gap",
]
EVA_OPTIONS: dict[str, dict[str, Any]] = {
    "separate-projections": {"qkv_fused": False},
    "no-bias": {"qkv_bias": False},
    "post-norm": {"use_post_norm": True},
    "scale-norms": {"scale_attn_inner": True, "scale_mlp": True, "swiglu_mlp": True},
    "layer-scale": {"init_values": 0.5},
    "qk-norm": {"qk_norm": True},
    "rotate-half": {"rope_rotate_half": True},
    "rope-attention": {"attn_type": "rope"},
    "grouped-queries": {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
    "registers": {"num_reg_tokens": 2, "no_embed_class": True},
}


def randomise(model: nn.Module) -> Any:
    """Every parameter random, so that a branch left out would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def make_model(name: str) -> Any:
    if name in NEWER_MODELS and not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    return randomise(timm.create_model(name, **TINY))


def make_eva(**options: Any) -> Any:
    allowed = Eva.__init__.__code__.co_varnames
    for option in options:
        if option not in allowed:
            pytest.skip(f"this timm's Eva has no {option}")
    return randomise(Eva(patch_size=16, use_rot_pos_emb=True, **options, **TINY))


def make_beit(**options: Any) -> Any:
    return randomise(Beit(patch_size=16, **options, **TINY))


def make_prompts(layers: int = DEPTH) -> Tensor:
    return torch.randn(layers, NUM_PROMPTS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def images(make_images: Callable[..., Tensor]) -> Tensor:
    return make_images(2, size=SIZE)


def textbook(model: Any, prompts: Tensor, images: Tensor) -> Tensor:
    """Logits by timm's own blocks, which are given more tokens and must leave those alone (eq. 6, 13).

    Blocks that rotate count the prompts as prefix tokens, which have no position; blocks with a bias on
    scores see it as zero wherever a prompt is concerned.
    """
    model = copy.deepcopy(model)
    prefix = model.num_prefix_tokens
    biased = isinstance(model, Beit)
    for block in model.blocks:
        if hasattr(block.attn, "num_prefix_tokens"):
            block.attn.num_prefix_tokens += prompts.shape[1]
        if biased and block.attn.relative_position_bias_table is not None:
            block.attn._get_rel_pos_bias = padded(block.attn._get_rel_pos_bias, prompts.shape[1])

    def with_prompts(index: int, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            tokens = prompts[index].expand(len(x), -1, -1)
            if biased:
                if kwargs.get("shared_rel_pos_bias") is not None:
                    kwargs["shared_rel_pos_bias"] = pad(kwargs["shared_rel_pos_bias"], prompts.shape[1])
                return original(torch.cat([x, tokens], dim=1), *args, **kwargs)[:, : x.shape[1]]
            x = original(torch.cat([x[:, :prefix], tokens, x[:, prefix:]], dim=1), *args, **kwargs)
            return torch.cat([x[:, :prefix], x[:, prefix + prompts.shape[1] :]], dim=1)

        return forward

    for index, block in enumerate(model.blocks):
        block.forward = with_prompts(index, block.forward)
    return model(images)  # type: ignore[no-any-return]


def padded(original: Callable[[], Tensor], count: int) -> Callable[[], Tensor]:
    return lambda: pad(original(), count)


def pad(bias: Tensor, count: int) -> Tensor:
    return F.pad(bias, (0, count, 0, count))


def check_against_textbook(model: Any, engine: Any, images: Tensor) -> None:
    prompts = make_prompts().requires_grad_()
    expected = textbook(model, prompts, images)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), [prompts])
    tuned = PromptedViT(copy.deepcopy(model), prompts, engine=engine)
    assert tuned.engine == engine
    logits = tuned(images)
    (gradient,) = torch.autograd.grad(logits.square().sum(), [tuned.prompts])
    for got, wanted in ((logits, expected), (gradient, expected_gradient)):
        assert wanted.abs().max() > 0
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", [*MODELS, *NEWER_MODELS])
class TestFamilies:
    def test_kv_equals_prompts_as_tokens(self, name: str, images: Tensor) -> None:
        check_against_textbook(make_model(name), "kv", images)

    def test_concat_equals_prompts_as_tokens(self, name: str, images: Tensor) -> None:
        if name.startswith("beit"):
            with pytest.raises(TypeError, match="model cannot take prompts: Block ties positions"):
                PromptedViT(make_model(name), make_prompts(), engine="concat")
        else:
            check_against_textbook(make_model(name), "concat", images)

    def test_prototypes_are_built_and_taken(
        self, name: str, make_images: Callable[..., Tensor], images: Tensor
    ) -> None:
        model = make_model(name)
        patches = model.patch_embed.num_patches if hasattr(model, "patch_embed") else 16
        prototypes = build_prototypes(model, [make_images(6, size=SIZE)] * 2, num_prompts=3, progress=False)
        assert prototypes.prompts.shape == (DEPTH, 3, WIDTH)
        assert prototypes.num_tokens == 12 * patches
        tuned = PromptedViT(model, prototypes, num_classes=2)
        assert tuned.engine == "kv"
        assert tuned(images).isfinite().all()
        assert tuned.release() is model


class TestEva:
    @pytest.mark.parametrize("engine", ["kv", "concat"])
    @pytest.mark.parametrize("flavour", EVA_OPTIONS)
    def test_engines_equal_prompts_as_tokens(self, flavour: str, engine: Any, images: Tensor) -> None:
        check_against_textbook(make_eva(**EVA_OPTIONS[flavour]), engine, images)

    @pytest.mark.parametrize("engine", ["kv", "concat"])
    def test_gate_and_bias_added_separately(self, engine: Any, images: Tensor) -> None:
        model = make_eva()
        for block in model.blocks:
            if not hasattr(block.attn, "gate"):
                pytest.skip("this timm has no gated attention")
            block.attn.gate = randomise(nn.Linear(WIDTH, WIDTH))
            block.attn.qkv_bias_separate = True
        check_against_textbook(model, engine, images)

    def test_shallow_rotates_no_prompt(self, images: Tensor) -> None:
        """Prompts counted as prefix tokens by timm's own blocks."""
        model, prompts = make_eva(global_pool="token"), make_prompts(1)
        other = copy.deepcopy(model)
        for block in other.blocks:
            block.attn.num_prefix_tokens += NUM_PROMPTS
        other.pos_drop.register_forward_hook(
            lambda _, __, x: torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        )
        expected = other(images)
        got = PromptedViT(model, prompts, depth="shallow")(images)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_pooling_with_prompts(self, images: Tensor) -> None:
        """The head sees prompts and patches alike after the last block."""
        model, prompts = make_eva(global_pool="avg"), make_prompts()
        features: list[Tensor] = []
        for engine in ("kv", "concat"):
            tuned = PromptedViT(copy.deepcopy(model), prompts, engine=engine, pool_prompts=True)
            features.append(tuned.forward_features(images))
        assert features[0].shape[1] == 1 + 16 + NUM_PROMPTS
        assert (features[0] - features[1]).abs().max() <= 1e-5 * features[1].abs().max()
        pooled = tuned.forward_head(features[0], pre_logits=True)
        torch.testing.assert_close(pooled, tuned.model.fc_norm(features[0][:, 1:].mean(1)))  # type: ignore[operator]

    @pytest.mark.parametrize("engine", ["kv", "concat"])
    def test_checkpointing_gives_the_same_gradients(self, engine: Any, images: Tensor) -> None:
        tuned = PromptedViT(make_eva(), make_prompts(), engine=engine)
        gradients = []
        for enabled in (False, True):
            tuned.model.set_grad_checkpointing(enabled)  # type: ignore[operator]
            gradients += torch.autograd.grad(tuned(images).square().sum(), [tuned.prompts])
        assert torch.equal(*gradients)


class TestBeit:
    @pytest.mark.parametrize(
        "options",
        [
            {"use_rel_pos_bias": True},
            {"use_shared_rel_pos_bias": True},
            {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True},
            {"use_rel_pos_bias": False},
            {"use_rel_pos_bias": True, "qkv_bias": False, "init_values": 0.5},
        ],
    )
    def test_kv_gives_prompts_no_bias(self, options: dict[str, Any], images: Tensor) -> None:
        check_against_textbook(make_beit(**options), "kv", images)

    def test_autocast_in_bfloat16_is_close(self, images: Tensor) -> None:
        tuned = PromptedViT(make_beit(use_rel_pos_bias=True), make_prompts())
        logits = tuned(images)
        with torch.autocast("cpu", torch.bfloat16):
            half = tuned(images)
        assert (half.float() - logits).abs().max() <= 0.05 * logits.abs().max()

    def test_what_needs_prompts_as_tokens_is_refused(self) -> None:
        model = make_beit(use_rel_pos_bias=True)
        with pytest.raises(TypeError, match="model cannot take prompts: Block ties positions"):
            PromptedViT(model, make_prompts(1), depth="shallow")
        with pytest.raises(ValueError, match="pool_prompts needs prompts as tokens of the last block"):
            PromptedViT(model, make_prompts(), pool_prompts=True)
        model = make_beit(use_shared_rel_pos_bias=True)
        with pytest.raises(TypeError, match=r"Beit ties positions to its tokens \(`rel_pos_bias`\)"):
            PromptedViT(model, make_prompts(1), depth="shallow")
        with pytest.raises(ValueError, match="tokens of the last block, but Beit ties positions"):
            PromptedViT(model, make_prompts(), pool_prompts=True)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("samvit_base_patch16", TINY, r"Block ties positions to its tokens \(`attn.rel_pos_h`\)"),
        ("vit_relpos_small_patch16_224", TINY, r"RelPosBlock ties positions to its tokens"),
        ("vit_srelpos_small_patch16_224", TINY, r"VisionTransformerRelPos ties .* \(`shared_rel_pos`\)"),
        ("convit_tiny", SMALL, r"Block ties positions to its tokens \(`attn.pos_proj`\)"),
        ("mixer_s16_224", SMALL, r"MixerBlock has a layer as wide as an image has tokens \(`mlp_tokens`\)"),
        ("gmixer_12_224", SMALL, r"MixerBlock has a layer as wide as an image has tokens \(`mlp_tokens`\)"),
        ("resmlp_12_224", SMALL, r"ResBlock has a layer as wide .* \(`linear_tokens`\)"),
        ("gmlp_ti16_224", SMALL, r"SpatialGatingBlock has a layer as wide .* \(`mlp_channels.gate.proj`\)"),
    ],
)
def test_blocks_without_place_for_prompts_are_refused(
    name: str, options: dict[str, Any], reason: str
) -> None:
    model = timm.create_model(name, **options)
    with pytest.raises(TypeError, match=f"model cannot take prompts: {reason}"):
        PromptedViT(model, 3)


@pytest.mark.parametrize("name", ["deepseek_vit_412m_enc", "gemma4_vit_167m_enc"])
def test_rotations_that_blocks_cannot_leave_out_are_refused(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TypeError, match=r"model cannot take prompts: \w+ ties positions to its tokens"):
        PromptedViT(model, 3)


@pytest.mark.parametrize(
    ("name", "part"), [("xcit_nano_12_p16_224", "cls_attn_blocks"), ("cait_xxs24_224", "blocks_token_only")]
)
def test_class_tokens_that_join_after_the_blocks_are_refused(name: str, part: str) -> None:
    """timm counts them as prefix tokens, where the first of the tokens in the blocks is a patch."""
    model = timm.create_model(name, img_size=SIZE) if "cait" in name else timm.create_model(name)
    reason = f"got {type(model).__name__}: its class token .* joins after the blocks, in `{part}`"
    uses: list[Callable[[], object]] = [
        lambda: build_prototypes(model, [torch.zeros(2, 3, SIZE, SIZE)], num_prompts=2, progress=False),
        lambda: nearest_patches(torch.zeros(1, 2, embed_dim(model)), model, []),
        lambda: PromptedViT(model, 3, depth="shallow"),
        lambda: tune(model, "linear", num_classes=2),
    ]
    for use in uses:
        with pytest.raises(TypeError, match=reason):
            use()
    model.prune_intermediate_layers(prune_head=True)  # takes class token and class attention away
    assert get_blocks(model) is model.blocks


def test_lists_of_blocks_are_refused() -> None:
    with pytest.raises(TypeError, match=r"got Twins: its `\.blocks` are lists of blocks, stage by stage"):
        PromptedViT(timm.create_model("twins_svt_small"), 3)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crossvit_9_240", r"MultiScaleBlock must take tokens \[B, N, D\] to be prompted, got list"),
        ("tnt_s_patch16_224", "Block cannot be prompted when it is also given argument 2"),
    ],
)
def test_blocks_that_need_more_than_tokens_are_refused(name: str, reason: str) -> None:
    model = timm.create_model(name)
    layers, size = len(model.blocks), model.default_cfg["input_size"][1:]
    tuned = PromptedViT(model, torch.zeros(layers, 3, embed_dim(model)))
    with pytest.raises(TypeError, match=reason):
        tuned(torch.zeros(1, 3, *size))


def test_count_of_prompts_is_enough_for_naflexvit(images: Tensor) -> None:
    tuned = PromptedViT(make_model("naflexvit_base_patch16_gap"), 200)
    bound = (6 / (3 * 16 * 16 + WIDTH)) ** 0.5
    assert 0.98 * bound < float(tuned.prompts.detach().abs().max()) <= bound
    assert tuned(images).isfinite().all()


def test_patches_of_a_hybrid_are_counted_in_pixels(images: Tensor) -> None:
    """Its `patch_size` is 8 x 8 places of a feature map, each of 4 x 4 pixels."""
    model = make_model("vit_tiny_r_s16_p8_224")
    assert patch_size(model) == (32, 32)
    found = nearest_patches(make_prompts(), model, [images], k=1, context=0, progress=False)
    assert found.pictures.shape == (DEPTH, NUM_PROMPTS, 1, 3, 32, 32)
    bound = (6 / (3 * 32 * 32 + WIDTH)) ** 0.5
    assert 0.98 * bound < float(PromptedViT(model, 200).prompts.detach().abs().max()) <= bound


def test_engine_says_why() -> None:
    assert "discarded" in PromptedViT(make_model("vit_base_patch16_224"), make_prompts()).engine_reason
    shallow = PromptedViT(make_model("vit_base_patch16_224"), make_prompts(1), depth="shallow")
    assert "in depth='shallow' each block needs" in shallow.engine_reason
    asked = PromptedViT(make_model("vit_base_patch16_224"), make_prompts(), engine="concat")
    assert asked.engine_reason == "asked for"


def test_doctor_lists_the_engines() -> None:
    engines = report().partition("engines of PromptedViT")[2]
    assert "eva.EvaBlock" in engines
    assert "concat" in engines
