"""`--img-size`, `--in-chans`, `--model-option` reach timm; images follow, and files say what they are for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spt_fast.backbones.open import open_model
from spt_fast.commands import main as cli
from spt_fast.data.images import open_images, open_labelled_images
from spt_fast.support.files import read_safetensors

MODEL = ("--model", "test_vit", "--no-pretrained", "--workers", "0")
SHAPE = ("--img-size", "48x32", "--in-chans", "1")
OPTIONS = ("--model-option", "depth=2", "--model-option", "global_pool=avg")


def spt_fast(command: str, *arguments: object) -> int:
    return cli.main([command, *MODEL, *map(str, arguments)])


@pytest.fixture(scope="module")
def tuned(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for one-channel images of 48 x 32."""
    out = tmp_path_factory.mktemp("tuned")
    recipe = ("--epochs", 1, "--num-prompts", 3, "--out", out)
    assert spt_fast("train", *SHAPE, *OPTIONS, "--data", folders / "train", *recipe) == 0
    return out / "tuned.safetensors"


def test_what_is_trained_with_options_is_evaluated_with_them(
    tuned: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = read_safetensors(tuned, kind="prompted_vit")[1]
    assert (facts["image_size"], facts["in_chans"], facts["global_pool"]) == ("48x32", "1", "avg")
    assert facts["num_blocks"] == "2"
    assert spt_fast("eval", *SHAPE, *OPTIONS, "--data", folders / "train", "--tuned", tuned) == 0
    assert "of 24 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ("--in-chans", "1", *OPTIONS),
            "is for image_size '48x32', but this model has '160x160' (open it with --img-size 48x32)",
        ),
        (
            ("--img-size", "48x32", *OPTIONS),
            "is for in_chans '1', but this model has '3' (open it with --in-chans 1)",
        ),
        ((*SHAPE, "--model-option", "depth=2"), "is for global_pool 'avg', but this model has 'token'"),
    ],
)
def test_eval_names_both_where_another_model_is_opened(
    given: tuple[str, ...],
    message: str,
    tuned: Path,
    folders: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert spt_fast("eval", *given, "--data", folders / "train", "--tuned", tuned) == 2
    assert message in capsys.readouterr().err


def test_the_shipped_digits_come_in_one_channel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--img-size", 32, "--in-chans", 1, "--data", "digits", "--max-images", 20)
    file = tmp_path / "p.safetensors"
    assert spt_fast("prototypes", *options, "--num-prompts", 3, "--out", file) == 0
    assert spt_fast("nmi", *options, "--prompts", file, "--out", tmp_path) == 0
    assert "20 images" in capsys.readouterr().out


@pytest.mark.parametrize("training", [False, True])
def test_images_of_a_folder_are_made_grey(training: bool, folders: Path) -> None:
    options = {"img_size": 32, "in_chans": 1}
    model = open_model("test_vit", pretrained=False, model_options=options)
    opened = open_labelled_images(str(folders / "train"), model, workers=0, training=training)
    images = next(iter(opened.loader))[0]
    assert images.shape[1:] == (1, 32, 32)
    mean, std = (torch.tensor(model.pretrained_cfg[key]) for key in ("mean", "std"))
    assert mean.shape == std.shape == (1,)
    pixels = images * std + mean
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    if not training:
        in_colour = open_model("test_vit", pretrained=False, model_options={"img_size": 32})
        colour = torch.cat([batch[0] for batch in open_images(str(folders / "train"), in_colour, workers=0)])
        grey = torch.cat([batch[0] for batch in open_images(str(folders / "train"), model, workers=0)])
        assert in_colour.pretrained_cfg["input_size"] == (3, 32, 32)
        of_colour = [torch.tensor(in_colour.pretrained_cfg[key])[:, None, None] for key in ("mean", "std")]
        weights = torch.tensor([0.299, 0.587, 0.114])
        expected = torch.einsum("c,bchw->bhw", weights, colour * of_colour[1] + of_colour[0])[:, None]
        # Pillow rounds to 8 bits before it resizes, and after.
        torch.testing.assert_close(grey * std + mean, expected, rtol=0, atol=2.5 / 255)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--in-chans", "4"), "images are read in 3 channels (RGB) or in 1 (grey), but the model takes 4"),
        (("--model-option", "foo=1"), "model_options {'foo': 1} do not fit test_vit: "),
        (
            ("--model-option", "num_classes=3"),
            "model_options must not set num_classes, which open_model sets",
        ),
        (
            ("--img-size", "32", "--model-option", "img_size=16"),
            "model_option must give each option once, got img_size more than once",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(
    given: tuple[str, ...], message: str, tmp_path: Path, only_error: Callable[[int, str], str]
) -> None:
    code = spt_fast("nmi", *given, "--data", "digits", "--random", 3, "--out", tmp_path)
    assert message in only_error(code, "nmi")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--img-size", "3x"), "argument --img-size: must be a size such as 384 or 384x288, got '3x'"),
        (("--img-size", "0"), "argument --img-size: must be a size such as 384 or 384x288, got '0'"),
        (("--model-option", "avg"), "must be KEY=VALUE, such as global_pool=avg, got 'avg'"),
    ],
)
def test_options_that_cannot_be_read_are_refused(
    given: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        spt_fast("nmi", *given, "--data", "digits", "--random", 3)
    assert message in capsys.readouterr().err


def test_values_of_options_are_read_as_python_has_them() -> None:
    from spt_fast.commands.options import model_options

    values = {"a": "1", "b": "1e-5", "c": "true", "d": "None", "e": "avg", "f": "(2, 3)", "g": "x=y"}
    given = [each for name, value in values.items() for each in ("--model-option", f"{name}={value}")]
    args = cli.build_parser().parse_args(["nmi", *MODEL, "--data", "digits", "--random", "3", *given])
    expected = {"a": 1, "b": 1e-5, "c": True, "d": None, "e": "avg", "f": (2, 3), "g": "x=y"}
    assert model_options(args) == expected


def test_position_embeddings_of_a_checkpoint_are_resized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_model("test_vit", pretrained=False, model_options={"img_size": 64})
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = open_model("test_vit", checkpoint=tmp_path / "weights.pth", model_options={"img_size": 32})
    assert "pos_embed resized" in capsys.readouterr().err
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()
    with pytest.raises(ValueError, match="channels of an image: 3 in the file, 1 in the model"):
        open_model("test_vit", checkpoint=tmp_path / "weights.pth", model_options={"in_chans": 1})
