"""The script that pretrains a backbone: what is hidden is painted, runs go on exactly, and the file loads."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from spt_fast.data.shipped import load_backbone

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "pretrain_backbone.py"
SMALL = ["--image-size", "16", "--patch-size", "4", "--width", "32", "--depth", "1", "--heads", "2"]
SMALL += ["--decoder-width", "32", "--batch-size", "4", "--warmup-epochs", "0.5", "--device", "cpu"]


@pytest.fixture(scope="module")
def script(load_script) -> ModuleType:
    return load_script(SCRIPT)


@pytest.fixture(autouse=True)
def fused_attention_as_before():
    from timm.layers import set_fused_attn, use_fused_attn

    before = use_fused_attn()
    yield
    set_fused_attn(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten images of 20x14 pixels in two classes."""
    path = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(10):
        (path / f"class{i % 2}").mkdir(exist_ok=True)
        pixels = random.integers(0, 256, (14, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"class{i % 2}" / f"{i}.png")
    return path


def weights(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)["model"]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(script, folder, tmp_path, monkeypatch):
    script.main([str(folder), "--out", str(tmp_path / "whole"), "--epochs", "3", *SMALL])
    stopped = tmp_path / "stopped"
    arguments = [str(folder), "--out", str(stopped), "--epochs", "3", *SMALL]
    one_epoch = script.train_epoch

    def killed(*given):
        if given[4] == 1:
            raise KeyboardInterrupt
        return one_epoch(*given)

    monkeypatch.setattr(script, "train_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        script.main(arguments)
    monkeypatch.undo()
    torch.rand(3)
    script.main([*arguments, "--resume"])
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(value, whole[name]) for name, value in weights(stopped).items())
    rows = [json.loads(line) for line in (stopped / "log.jsonl").read_text().splitlines()]
    assert [row["epochs"] for row in rows] == [1, 2, 3]


def test_a_folder_with_a_run_is_not_written_over(script, folder, tmp_path):
    arguments = [str(folder), "--out", str(tmp_path), "--epochs", "1", *SMALL]
    script.main(arguments)
    with pytest.raises(SystemExit, match="--out must be a folder without a run"):
        script.main(arguments)


def test_the_file_is_a_backbone_and_may_start_another_run(script, folder, tmp_path):
    script.main([str(folder), "--out", str(tmp_path / "a"), "--epochs", "1", *SMALL])
    file = tmp_path / "a" / "backbone.safetensors"
    model = load_backbone(file)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 32)
    args = script.parse_arguments([str(folder), "--out", "b", *SMALL, "--start", str(file)])
    architecture = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    started = script.build_model(architecture, args).encoder
    assert torch.equal(started.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)


def test_the_loss_is_of_the_hidden_patches_alone(script):
    """With everything predicted as zero it is the variance of normalised patches: n - 1 of n values."""
    architecture = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = script.MaskedAutoencoder(architecture, 32, 0.75)
    torch.nn.init.zeros_(model.decoder_head.weight)
    torch.nn.init.zeros_(model.decoder_head.bias)
    loss = model(torch.randn(3, 3, 16, 16))
    assert loss.item() == pytest.approx(47 / 48, abs=1e-4)


def test_patches_are_embedded_as_by_the_convolution(script):
    architecture = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2}
    model = script.MaskedAutoencoder(architecture, 32, 0.75)
    images = torch.randn(2, 3, 16, 16)
    proj = model.encoder.patch_embed.proj
    tokens = torch.nn.functional.linear(script._patchify(images, 4), proj.weight.flatten(1), proj.bias)
    torch.testing.assert_close(tokens, model.encoder.patch_embed(images))


def test_a_crop_of_the_whole_image_is_the_image(script, monkeypatch):
    monkeypatch.setattr(script, "CROP_AREA", (1.0, 1.0))
    monkeypatch.setattr(script, "CROP_RATIO", (1.0, 1.0))
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    found = script.augment(images, torch.Generator().manual_seed(0))
    flipped = [
        not torch.allclose(one, image.float(), atol=1e-2) for one, image in zip(found, images, strict=True)
    ]
    assert 0 < sum(flipped) < 8
    for one, image, flip in zip(found, images, flipped, strict=True):
        torch.testing.assert_close(one, (image.flip(-1) if flip else image).float(), atol=1e-2, rtol=0)


def test_channel_statistics(script):
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    mean, std = script.channel_statistics(images)
    values = images.double().transpose(0, 1).flatten(1) / 255
    assert mean == pytest.approx(values.mean(1).tolist(), abs=6e-5)
    assert std == pytest.approx(values.std(1, unbiased=False).tolist(), abs=6e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--patch-size", "5"], "--image-size must be a multiple"), (["--batch-size", "11"], "at most 10")],
)
def test_sizes_that_do_not_fit_are_refused(script, folder, tmp_path, change, message, capsys):
    with pytest.raises(SystemExit) as error:
        script.main([str(folder), "--out", str(tmp_path), *SMALL, *change])
    assert message in capsys.readouterr().err + str(error.value)
