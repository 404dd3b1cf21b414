"""Files of weights in each layout of docs/weights.md, from random models: equal outputs, or a reason."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast.backbones.checkpoints import load_weights
from spt_fast.backbones.open import open_model

MakeViT = Callable[..., VisionTransformer]
State = dict[str, Tensor]
WIDTH = 32


@pytest.fixture(scope="module")
def images(make_images: Callable[..., Tensor]) -> Tensor:
    return make_images(2)


def randomised(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def other(state: State) -> State:
    return {name: value + 1 for name, value in state.items()}


def extra(*names: str) -> State:
    return {name: torch.ones(3, WIDTH) for name in names}


def mae(state: State) -> Any:
    return {"model": state}


def mae_with_decoder(state: State) -> Any:
    decoder = ("mask_token", "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.0.norm1.weight")
    return {
        "model": {**state, **extra(*decoder)},
        "optimizer": {"state": {}},
        "epoch": 7,
        "args": argparse.Namespace(blr=1e-3, output_dir="."),
    }


def moco(state: State) -> Any:
    heads = extra("module.base_encoder.head.0.weight", "module.predictor.0.weight")
    momentum = prefixed("module.momentum_encoder.", other(state))
    return {"epoch": 300, "state_dict": {**momentum, **prefixed("module.base_encoder.", state), **heads}}


def moco_linear(state: State) -> Any:
    return {"state_dict": {**prefixed("module.", state), **extra("module.head.weight")}}


def dino_training(state: State) -> Any:
    student = {**prefixed("module.backbone.", other(state)), **extra("module.head.mlp.0.weight")}
    teacher = {**prefixed("backbone.", state), **extra("head.mlp.0.weight", "head.last_layer.weight")}
    return {"student": student, "teacher": teacher, "epoch": 1, "args": argparse.Namespace(arch="vit_small")}


def dino_both_in_one(state: State) -> Any:
    return {
        **prefixed("student.backbone.", other(state)),
        **prefixed("teacher.backbone.", state),
        **extra("teacher.dino_head.mlp.0.weight", "student.dino_head.mlp.0.weight"),
    }


def dino_student(state: State) -> Any:
    return {"student": {**prefixed("module.backbone.", state), **extra("module.head.mlp.0.weight")}}


def dinov2(state: State) -> Any:
    return {**state, "mask_token": torch.ones(1, WIDTH)}


def dinov2_in_chunks(state: State) -> Any:
    nested = {name.replace("blocks.", "blocks.0."): value for name, value in state.items()}
    return {"model": {**prefixed("teacher.backbone.", nested), **extra("teacher.backbone.mask_token")}}


def ibot(state: State) -> Any:
    return {"state_dict": {**state, **extra("masked_embed")}}


LAYOUTS: dict[str, tuple[Callable[[State], Any], list[str]]] = {
    "timm": (lambda state: {**state, **extra("head.weight")}, ["timm's names", "dropped head.*"]),
    "timm-ema": (
        lambda state: {"state_dict": other(state), "state_dict_ema": state},
        ["took 'state_dict_ema'", "dropped state_dict"],
    ),
    "compiled": (lambda state: prefixed("_orig_mod.", state), ["timm's names"]),
    "mae": (mae, ["timm's names"]),
    "mae-with-decoder": (
        mae_with_decoder,
        ["MAE with its decoder", "args, epoch, optimizer", "decoder_pos_embed", "mask_token"],
    ),
    "moco-v3": (
        moco,
        ["MoCo-v3", "took 'module.base_encoder.*'", "module.momentum_encoder.*", "head.*"],
    ),
    "moco-v3-linear": (moco_linear, ["dropped head.*"]),
    "dino": (lambda state: state, ["timm's names"]),
    "dino-training": (dino_training, ["took 'teacher'", "args, epoch, student", "head.*"]),
    "dino-both-in-one": (dino_both_in_one, ["took 'teacher.backbone.*'", "student.*"]),
    "dino-student": (dino_student, ["module.head.*"]),
    "dinov2": (dinov2, ["DINOv2", "dropped mask_token"]),
    "dinov2-in-chunks": (dinov2_in_chunks, ["DINOv2", "mask_token"]),
    "ibot": (ibot, ["iBOT", "dropped masked_embed"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_equal_outputs(layout: str, make_vit: MakeViT, images: Tensor, tmp_path: Path) -> None:
    source, target = randomised(make_vit(num_classes=0)), randomised(make_vit(num_classes=0), 1)
    write, words = LAYOUTS[layout]
    torch.save(write(source.state_dict()), tmp_path / "weights.pth")
    report = str(load_weights(target, tmp_path / "weights.pth"))
    assert torch.equal(target(images), source(images))
    for word in words:
        assert word in report


def test_safetensors_and_half_precision(make_vit: MakeViT, images: Tensor, tmp_path: Path) -> None:
    source, target = (randomised(make_vit(num_classes=0), seed) for seed in range(2))
    save_file(source.half().state_dict(), tmp_path / "weights.safetensors")
    load_weights(target, tmp_path / "weights.safetensors")
    assert torch.equal(target(images), source.float()(images))


def test_a_head_of_the_model_is_left_alone(make_vit: MakeViT, images: Tensor, tmp_path: Path) -> None:
    source, target = randomised(make_vit()), randomised(make_vit(), 1)
    head = target.head.weight.clone()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    assert "dropped head.*" in str(load_weights(target, tmp_path / "weights.pth"))
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.forward_features(images), source.forward_features(images))


def test_registers_of_dinov2(make_vit: MakeViT, images: Tensor, tmp_path: Path) -> None:
    """DINOv2 has a position for the class token, timm has it in the token."""
    target = randomised(make_vit(num_classes=0, reg_tokens=2, no_embed_class=True, init_values=1.0), 1)
    source = randomised(make_vit(num_classes=0, reg_tokens=2, no_embed_class=True, init_values=1.0))
    state = source.state_dict()
    position = torch.full((1, 1, WIDTH), 0.25)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    torch.save({**state, **extra("mask_token")}, tmp_path / "weights.pth")
    assert "register_tokens -> reg_token" in str(load_weights(target, tmp_path / "weights.pth"))
    torch.testing.assert_close(target(images), source(images), rtol=1e-5, atol=1e-5)


def test_layer_scale_under_its_older_name(make_vit: MakeViT, images: Tensor, tmp_path: Path) -> None:
    source, target = (randomised(make_vit(num_classes=0, init_values=1.0), seed) for seed in range(2))
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for name, value in source.state_dict().items()
    }
    torch.save(state, tmp_path / "weights.pth")
    assert "gamma_1 -> ls1.gamma" in str(load_weights(target, tmp_path / "weights.pth"))
    assert torch.equal(target(images), source(images))


def test_mae_gives_its_norm_to_an_average(make_vit: MakeViT, images: Tensor, tmp_path: Path) -> None:
    source = randomised(make_vit(num_classes=0))
    target = randomised(make_vit(num_classes=0, global_pool="avg"), 1)
    torch.save(mae(source.state_dict()), tmp_path / "weights.pth")
    assert "norm -> fc_norm" in str(load_weights(target, tmp_path / "weights.pth"))
    tokens = source.forward_intermediates(images, norm=False, intermediates_only=True, output_fmt="NLC")[-1]
    torch.testing.assert_close(target(images), source.norm(tokens.mean(1)))


def test_fine_tuned_mae_needs_an_average(make_vit: MakeViT, images: Tensor, tmp_path: Path) -> None:
    source = randomised(make_vit(global_pool="avg"))
    target = randomised(make_vit(num_classes=0, global_pool="avg"), 1)
    torch.save({"model": source.state_dict()}, tmp_path / "weights.pth")
    assert "dropped head.*" in str(load_weights(target, tmp_path / "weights.pth"))
    source.reset_classifier(0)
    assert torch.equal(target(images), source(images))
    with pytest.raises(ValueError, match=r"missing from the file: norm.*open it with global_pool='avg'"):
        load_weights(make_vit(num_classes=0), tmp_path / "weights.pth")


@pytest.mark.parametrize("per_block", [False, True])
def test_data2vec_shares_its_position_bias(per_block: bool, images: Tensor, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
    options = {**sizes, "num_classes": 0, "use_abs_pos_emb": False, "init_values": 0.1}
    source = randomised(Beit(use_shared_rel_pos_bias=True, **options))
    target = randomised(Beit(use_rel_pos_bias=per_block, use_shared_rel_pos_bias=not per_block, **options), 1)
    # Pretraining has a norm of all tokens, timm's BEiT one of their average.
    state = {name.replace("fc_norm.", "norm."): value for name, value in source.state_dict().items()}
    index = {"rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64)}
    heads = extra("mask_token", "lm_head.weight")
    torch.save({"model": {**state, **index, **heads}}, tmp_path / "checkpoint-799.pth")
    report = str(load_weights(target, tmp_path / "checkpoint-799.pth"))
    assert ("copied to 2 blocks" in report) == per_block
    for word in ("data2vec", "norm -> fc_norm", "lm_head.*, mask_token, rel_pos_bias.*"):
        assert word in report
    torch.testing.assert_close(target(images), source(images), rtol=1e-5, atol=1e-5)


def to_jax(model: VisionTransformer) -> dict[str, np.ndarray[Any, Any]]:
    """The names and shapes of the original ViT release."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    heads = model.blocks[0].attn.num_heads
    file = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": np.ones((WIDTH, 3), np.float32),
        "head/bias": np.ones(3, np.float32),
    }
    for index in range(len(model.blocks)):
        ours, theirs = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        attention = theirs + "MultiHeadDotProductAttention_1/"
        weights = np.split(state[ours + "attn.qkv.weight"], 3)
        biases = np.split(state[ours + "attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            file[f"{attention}{name}/kernel"] = weight.T.reshape(WIDTH, heads, -1)
            file[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        file[f"{attention}out/kernel"] = state[ours + "attn.proj.weight"].T.reshape(heads, -1, WIDTH)
        file[f"{attention}out/bias"] = state[ours + "attn.proj.bias"]
        for norm, number in (("norm1", 0), ("norm2", 2)):
            file[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{norm}.weight"]
            file[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{norm}.bias"]
        for number in range(2):
            dense = f"{theirs}MlpBlock_3/Dense_{number}/"
            file[dense + "kernel"] = state[f"{ours}mlp.fc{number + 1}.weight"].T
            file[dense + "bias"] = state[f"{ours}mlp.fc{number + 1}.bias"]
    return file


class TestJax:
    @pytest.fixture
    def source(self, make_vit: MakeViT) -> Any:
        return randomised(make_vit(num_classes=0))

    @pytest.fixture
    def path(self, source: Any, tmp_path: Path) -> Path:
        np.savez(tmp_path / "weights.npz", **to_jax(source))
        return tmp_path / "weights.npz"

    def test_equal_outputs(self, source: Any, path: Path, make_vit: MakeViT, images: Tensor) -> None:
        target = randomised(make_vit(num_classes=0), 1)
        assert str(load_weights(target, path)) == "JAX; dropped head/*"
        torch.testing.assert_close(target(images), source(images))

    def test_resized_positions_are_reported(self, path: Path, make_vit: MakeViT) -> None:
        report = str(load_weights(make_vit(num_classes=0, img_size=48), path))
        assert "pos_embed resized, [1, 17, 32] -> [1, 37, 32]" in report

    def test_its_norm_goes_to_an_average(
        self, source: Any, path: Path, make_vit: MakeViT, images: Tensor
    ) -> None:
        target = randomised(make_vit(num_classes=0, global_pool="avg"), 1)
        assert "Transformer/encoder_norm -> fc_norm" in str(load_weights(target, path))
        tokens = source.forward_intermediates(images, norm=False, intermediates_only=True, output_fmt="NLC")[
            -1
        ]
        torch.testing.assert_close(target(images), source.norm(tokens.mean(1)))

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"depth": 2}, "blocks: 3 in the file, 2 in the model"),
            ({"depth": 4}, "blocks: 3 in the file, 4 in the model"),
            ({"in_chans": 1}, "channels of an image: 3 in the file, 1 in the model"),
            ({"patch_size": 4}, "patches of: 8x8 in the file, 4x4 in the model"),
            ({"embed_dim": 48}, "width: 32 in the file, 48 in the model"),
            ({"init_values": 1.0}, r"missing from the file: blocks\.\*"),
            ({"reg_tokens": 2}, "does not fit this model"),
            ({"class_token": False, "global_pool": "avg"}, "has a class token, and this model has none"),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, options: dict[str, Any], reason: str, path: Path, make_vit: MakeViT
    ) -> None:
        with pytest.raises(ValueError, match=reason):
            load_weights(make_vit(num_classes=0, **options), path)

    def test_another_archive_is_refused(self, make_vit: MakeViT, tmp_path: Path) -> None:
        np.savez(tmp_path / "weights.npz", images=np.ones(3))
        with pytest.raises(ValueError, match="holds no embedding/kernel"):
            load_weights(make_vit(), tmp_path / "weights.npz")


def test_positions_are_resized_as_timm_does(make_vit: MakeViT, images: Tensor, tmp_path: Path) -> None:
    source = randomised(make_vit(num_classes=0))
    target = randomised(make_vit(num_classes=0, img_size=48), 1)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    report = str(load_weights(target, tmp_path / "weights.pth"))
    assert "pos_embed resized, [1, 17, 32] -> [1, 37, 32]" in report
    source.set_input_size(img_size=48)
    larger = torch.nn.functional.interpolate(images, 48)
    torch.testing.assert_close(target(larger), source(larger))


def with_places(model: Any) -> Any:
    """Each position of a patch is its row and its column, repeated."""
    rows, columns = model.patch_embed.grid_size
    places = torch.stack([torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)])
    with torch.no_grad():
        model.pos_embed[0, 1:] = places.T.repeat(1, model.embed_dim // 2)
    return model


@pytest.mark.parametrize("jax", [False, True])
@pytest.mark.parametrize("grid", [(2, 8), (8, 2), (1, 16)])
def test_positions_of_a_square_grid_are_resized_to_another_with_as_many_patches(
    grid: tuple[int, int], jax: bool, make_vit: MakeViT, tmp_path: Path
) -> None:
    source = with_places(randomised(make_vit(num_classes=0)))
    path = tmp_path / ("weights.npz" if jax else "weights.pth")
    np.savez(path, **to_jax(source)) if jax else torch.save(source.state_dict(), path)
    target = randomised(make_vit(num_classes=0, img_size=tuple(8 * side for side in grid)), 1)
    assert f"pos_embed resized, 4x4 -> {grid[0]}x{grid[1]} patches" in str(load_weights(target, path))
    expected = resample_abs_pos_embed(source.pos_embed.detach(), list(grid), [4, 4])
    torch.testing.assert_close(target.pos_embed.detach(), expected)
    # Its own file states as little of its grid, and is read back bit for bit.
    if min(grid) > 1:
        torch.save(target.state_dict(), tmp_path / "again.pth")
        again = randomised(make_vit(num_classes=0, img_size=tuple(8 * side for side in grid)), 2)
        assert "resized" not in str(load_weights(again, tmp_path / "again.pth"))
        assert torch.equal(again.pos_embed, target.pos_embed)


def test_positions_that_timm_would_resize_by_the_size_of_its_own_weights(tmp_path: Path) -> None:
    """14 x 14 patches are those of timm's weights for 224 x 224 pixels."""
    sizes: dict[str, Any] = {"depth": 1, "embed_dim": 48, "num_heads": 2, "num_classes": 0}
    square, wide, again = (
        randomised(timm.create_model("vit_tiny_patch16_224", img_size=size, **sizes))
        for size in (224, (112, 448), (112, 448))
    )
    torch.save(with_places(square).state_dict(), tmp_path / "square.pth")
    assert "pos_embed resized, 14x14 -> 7x28 patches" in str(load_weights(wide, tmp_path / "square.pth"))
    expected = resample_abs_pos_embed(square.pos_embed.detach(), [7, 28], [14, 14])
    torch.testing.assert_close(wide.pos_embed.detach(), expected)
    torch.save(wide.state_dict(), tmp_path / "wide.pth")
    assert "resized" not in str(load_weights(again, tmp_path / "wide.pth"))
    assert torch.equal(again.pos_embed, wide.pos_embed)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"in_chans": 1}, "channels of an image: 3 in the file, 1 in the model; open it with in_chans=3"),
        ({"patch_size": 4}, "patches of: 8x8 in the file, 4x4 in the model; choose a model with such"),
        ({"embed_dim": 48}, "width: 32 in the file, 48 in the model; choose the model of that size"),
        ({"depth": 4}, "blocks: 3 in the file, 4 in the model; choose the model of that size"),
        ({"reg_tokens": 2}, "1 tensors are missing from the file: reg_token"),
        ({"init_values": 1.0}, r"6 tensors are missing from the file: blocks\.\*"),
        ({"mlp_ratio": 2.0}, r"blocks.0.mlp.fc1.weight is \[128, 32\] in the file, \[64, 32\] in the model"),
        ({"qkv_bias": False}, r"3 tensors are unknown to the model: blocks\.\*"),
        ({"pos_embed": "none"}, "1 tensors are unknown to the model: pos_embed"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], reason: str, make_vit: MakeViT, tmp_path: Path
) -> None:
    torch.save(make_vit().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=reason):
        load_weights(make_vit(num_classes=0, **options), tmp_path / "weights.pth")


def test_heads_of_mocos_small_vit(make_vit: MakeViT, tmp_path: Path) -> None:
    sizes = {"embed_dim": 384, "depth": 1, "num_classes": 0}
    torch.save(moco(make_vit(**sizes, num_heads=12).state_dict()), tmp_path / "vit-s-300ep.pth.tar")
    with pytest.raises(ValueError, match=r"heads .*: 12 in the file, 6 in the model; open it with num_heads"):
        load_weights(make_vit(**sizes, num_heads=6), tmp_path / "vit-s-300ep.pth.tar")
    load_weights(make_vit(**sizes, num_heads=12), tmp_path / "vit-s-300ep.pth.tar")


class Foreign:
    """Of a module that reading a file must not import."""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"model": {}, "ema": Foreign()},
            "holds a .*Foreign beside its weights, .* if you trust it",
        ),
        ([1, 2], "holds a list, not weights by name"),
        ({"epoch": 3}, "holds no weights by name, but epoch"),
        ({}, "holds no weights by name, but nothing"),
        (
            {**extra("a.patch_embed.proj.weight"), **extra("b.patch_embed.proj.weight")},
            "holds several backbones, under 'a.', 'b.'",
        ),
    ],
)
def test_files_without_weights_are_refused(
    content: Any, reason: str, make_vit: MakeViT, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=reason) as raised:
        load_weights(make_vit(), tmp_path / "weights.pth")
    assert str(tmp_path / "weights.pth") in str(raised.value)


@pytest.mark.parametrize("name", ["weights.pth", "weights.npz", "weights.safetensors"])
def test_damaged_files_are_refused(name: str, make_vit: MakeViT, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(ValueError, match=name):
        load_weights(make_vit(), tmp_path / name)


def test_open_model_says_what_it_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"img_size": 32, "depth": 1, "global_pool": "avg"}
    source = open_model("test_vit", pretrained=False, model_options={"depth": 1, "img_size": 32})
    path = tmp_path / "mae.pth"
    torch.save(mae_with_decoder(randomised(source).state_dict()), path)
    assert capsys.readouterr().err == ""
    model = open_model("test_vit", checkpoint=path, model_options=sizes)
    assert torch.equal(model.fc_norm.weight, source.norm.weight)
    assert model.pretrained_cfg["tag"] == "mae.pth"
    error = capsys.readouterr().err
    assert error.startswith(f"weights of {path}: MAE with its decoder; ")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=r"model_options are for models of timm, got .* for shipped"):
        open_model("shipped", model_options=sizes)


def test_timms_own_weights_keep_their_norm_with_an_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = randomised(open_model("test_vit", pretrained=False, model_options={"depth": 1}))
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    # timm then takes its pretrained weights from the file.
    options = {"depth": 1, "pretrained_cfg_overlay": {"file": str(tmp_path / "weights.safetensors")}}
    model = open_model("test_vit", model_options={**options, "global_pool": "avg"})
    assert torch.equal(model.fc_norm.weight, source.norm.weight)
    assert "weights of test_vit: timm's names; norm -> fc_norm\n" in capsys.readouterr().err
    assert torch.equal(open_model("test_vit", model_options=options).norm.weight, source.norm.weight)
    assert capsys.readouterr().err == ""


def test_attention_pooling_is_dropped_by_a_model_that_averages(
    make_vit: MakeViT, images: Tensor, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"num_classes": 0, "class_token": False}
    source = randomised(make_vit(global_pool="map", **options))
    target = randomised(make_vit(global_pool="avg", fc_norm=False, **options), 1)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    assert "dropped attn_pool.*" in str(load_weights(target, tmp_path / "weights.pth"))
    torch.testing.assert_close(target(images), source.forward_features(images).mean(1))


@pytest.mark.parametrize(
    ("beside", "dropped"),
    [
        ({"epoch": 3, "rng_state": torch.get_rng_state()}, "epoch, rng_state"),
        ({"mean": torch.zeros(3), "losses": torch.zeros(10)}, "losses, mean"),
        ({"model_ema": {}}, "model_ema"),
        ({"model_ema": {"decay": 0.99}}, "model_ema"),
        ({"teacher": {"decay": torch.ones(1)}}, "teacher"),
    ],
)
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_tensors_beside_the_weights_are_dropped(
    name: str, beside: dict[str, Any], dropped: str, tmp_path: Path
) -> None:
    options = {"depth": 1} if name == "test_vit" else {}
    source, model = (timm.create_model(name, num_classes=0, **options) for _ in range(2))
    torch.save({"model": source.state_dict(), **beside}, tmp_path / "weights.pth")
    report = load_weights(model, tmp_path / "weights.pth")
    assert str(report).endswith(f"took 'model'; dropped {dropped}")
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())


def test_a_model_that_is_no_vit_is_read_too(tmp_path: Path) -> None:
    source = open_model("test_resnet", pretrained=False)
    torch.save({"state_dict": prefixed("module.", source.state_dict())}, tmp_path / "weights.pth")
    found = open_model("test_resnet", checkpoint=tmp_path / "weights.pth").state_dict()
    assert all(torch.equal(found[name], value) for name, value in source.state_dict().items())


@pytest.mark.parametrize(
    ("name", "expected"), [("mae_vit.pth", (0.485, 0.456, 0.406)), ("mine.pth", (0.5, 0.5, 0.5))]
)
def test_pixels_are_those_that_the_weights_were_trained_on(
    name: str, expected: tuple[float, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_model("vit_tiny_patch16_224", pretrained=False, model_options={"depth": 1})
    torch.save(source.state_dict(), tmp_path / name)
    model = open_model("vit_tiny_patch16_224", checkpoint=tmp_path / name, model_options={"depth": 1})
    assert tuple(model.pretrained_cfg["mean"]) == expected
    whose = "as MAE was trained" if "mae" in name else "as timm's vit_tiny_patch16_224"
    assert f"pixels with mean {' '.join(map(str, expected))}, std " in (told := capsys.readouterr().err)
    assert f"({whose}; --mean-std)" in told


@pytest.mark.parametrize("given", [{"pretrained": False}, {"checkpoint": "file.pth"}])
def test_the_shipped_backbone_has_weights_of_its_own(given: dict[str, Any], tmp_path: Path) -> None:
    if "checkpoint" in given:
        given = {"checkpoint": tmp_path / "file.pth"}
        given["checkpoint"].touch()
    with pytest.raises(ValueError, match=r"checkpoint and pretrained are for .*, got .* for shipped"):
        open_model("shipped", **given)
