"""What is done to images: sizes, crops and scales, in words and in files; and what is taken by default."""

from __future__ import annotations

import pytest
import torch
import torchvision
from PIL import Image
from timm.data import transforms
from torchvision.transforms import functional as F

from spt_fast.data import shipped
from spt_fast.data.transforms import Preprocessing, choose, default_augment, split_transform

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class Sized(torch.nn.Module):
    """What timm reads of a model to find its image size, scale and interpolation."""

    def __init__(self, size: tuple[int, int, int] = (3, 224, 224), **config: object) -> None:
        super().__init__()
        self.pretrained_cfg = {
            "input_size": size,
            "mean": (0.5,) * size[0],
            "std": (0.25,) * size[0],
            "interpolation": "bicubic",
            **config,
        }


@pytest.fixture
def image() -> Image.Image:
    """300 wide, 400 high; smooth, and each place has its own colour."""
    gradient = Image.linear_gradient("L")
    channels = [gradient, gradient.rotate(90), gradient.rotate(180)]
    return Image.merge("RGB", [each.resize((300, 400)) for each in channels])


def normalised(image: Image.Image, mean: object, std: object) -> torch.Tensor:
    return F.normalize(F.to_tensor(image), mean, std)


BICUBIC = F.InterpolationMode.BICUBIC


def test_fgvc_is_256_and_the_centres_224(image):
    """As SPT's authors have it: Resize(256), CenterCrop(224)."""
    expected = F.center_crop(F.resize(image, 256, BICUBIC), [224, 224])
    found = Preprocessing("fgvc", "imagenet").transform(Sized())(image)
    torch.testing.assert_close(found, normalised(expected, *IMAGENET), rtol=0, atol=0)


def test_vtab_goes_straight_to_the_square(image):
    expected = F.resize(image, [224, 224], BICUBIC)
    found = Preprocessing("vtab", "imagenet").transform(Sized())(image)
    torch.testing.assert_close(found, normalised(expected, *IMAGENET), rtol=0, atol=0)


def test_short_is_the_short_side_and_the_centre(image):
    expected = F.center_crop(F.resize(image, 224, BICUBIC), [224, 224])
    found = Preprocessing("short", "model").transform(Sized())(image)
    torch.testing.assert_close(found, normalised(expected, [0.5] * 3, [0.25] * 3), rtol=0, atol=0)


def test_model_is_timms_transform_for_it(image):
    """Of a model that wants a crop of 0.9."""
    expected = F.center_crop(F.resize(image, 248, BICUBIC), [224, 224])
    found = Preprocessing().transform(Sized(crop_pct=0.9))(image)
    torch.testing.assert_close(found, normalised(expected, [0.5] * 3, [0.25] * 3), rtol=0, atol=0)


@pytest.mark.parametrize("resize", ["model", "fgvc", "vtab", "short"])
@pytest.mark.parametrize("size", [(3, 32, 32), (3, 48, 32)])
def test_images_have_the_size_of_the_model(resize, size, image):
    model = Sized(size)
    for augment in ("none", "crop", "resized-crop"):
        assert Preprocessing(resize).transform(model, augment)(image).shape == size


def test_crops_and_flips_are_drawn(image):
    transform = Preprocessing("fgvc").transform(Sized(), "crop")
    resized = normalised(F.resize(image, 256, BICUBIC), [0.5] * 3, [0.25] * 3)
    drawn = [transform(image) for _ in range(8)]
    assert len({float(each.sum()) for each in drawn}) > 4
    # Each is a window of the resized image, turned over or not.
    windows = resized.unfold(1, 224, 1)[:, :, 0, :]
    for each in drawn[:2]:
        whole = [
            torch.equal(resized[:, top : top + 224, left : left + 224], turned)
            for turned in (each, each.flip(2))
            for top in range(windows.shape[1])
            for left in range(resized.shape[2] - 223)
            if bool((resized[:, top, left] == turned[:, 0, 0]).all())
        ]
        assert any(whole)


def test_imagenet_is_for_colour_and_grey():
    grey = Preprocessing(mean_std="imagenet").transform(Sized((1, 224, 224)))
    found = grey(Image.new("L", (224, 224), 255))
    assert float(found[0, 0, 0]) == pytest.approx((1 - sum(IMAGENET[0]) / 3) / (sum(IMAGENET[1]) / 3))
    with pytest.raises(ValueError, match="is for 1 or 3 channels, but the model has 4"):
        Preprocessing(mean_std="imagenet").transform(Sized((4, 224, 224)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"resize": "square"}, "resize must be one of 'model', 'fgvc', 'vtab', 'short', got 'square'"),
        ({"mean_std": "inception"}, "mean_std must be one of 'model', 'imagenet', got 'inception'"),
    ],
)
def test_names_must_be_known(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        Preprocessing(**arguments)
    with pytest.raises(ValueError, match="augment must be one of"):
        Preprocessing().transform(Sized(), "flip")


def test_words_name_the_options():
    model = shipped.load_backbone()
    assert Preprocessing("vtab", "imagenet").describe(model) == (
        "transform: --resize vtab (straight to 64 x 64, bilinear), no augmentation, --mean-std imagenet"
    )
    assert Preprocessing("fgvc").describe(model, "resized-crop") == (
        "transform: random resized crops to 64 x 64 (bilinear) and flips, --mean-std model"
    )


def test_what_is_asked_for_comes_before_the_file_and_the_benchmark():
    made = Preprocessing("short", "imagenet")
    assert choose("vtab") == Preprocessing("vtab", "model")
    assert choose("fgvc") == Preprocessing("fgvc", "model")
    assert choose("folder") == Preprocessing("model", "model")
    assert choose("vtab", tuned=made) == made
    assert choose("vtab", "fgvc", tuned=made) == Preprocessing("fgvc", "imagenet")
    assert [default_augment(kind) for kind in ("vtab", "fgvc", "folder")] == [
        "none",
        "resized-crop",
        "resized-crop",
    ]


def test_files_keep_it():
    made = Preprocessing("short", "imagenet")
    assert Preprocessing.from_json(made.to_json()) == made
    for text in ("{", '{"resize": "other"}', '{"size": 3}', "[]"):
        with pytest.raises(ValueError, match="preprocessing must be resize and mean_std in JSON"):
            Preprocessing.from_json(text)


def test_mean_and_std_are_those_of_the_transform():
    assert Preprocessing().mean_and_std(Sized()) == ((0.5,) * 3, (0.25,) * 3)
    assert Preprocessing(mean_std="imagenet").mean_and_std(Sized()) == (
        tuple(IMAGENET[0]),
        tuple(IMAGENET[1]),
    )
    grey = Preprocessing(mean_std="imagenet").mean_and_std(Sized((1, 224, 224)))
    assert grey == ((pytest.approx(sum(IMAGENET[0]) / 3),), (pytest.approx(sum(IMAGENET[1]) / 3),))


def test_resizing_by_ratio_is_the_same_every_time_unless_it_is_random():
    plain, drawn = (transforms.ResizeKeepRatio((48, 32), random_scale_prob=chance) for chance in (0, 0.5))
    step = torchvision.transforms.ToTensor()
    assert split_transform(torchvision.transforms.Compose([plain, step])) == ([plain], [step])
    assert split_transform(torchvision.transforms.Compose([drawn, step])) == ([], [drawn, step])
