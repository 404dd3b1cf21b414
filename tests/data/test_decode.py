"""Files as images: which names, and pixels as a viewer shows them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spt_fast.data.decode import is_image_name, open_image

# Left half black, right half white, and the corners of a 4 x 2 image by colour.
CORNERS = np.array(
    [[[255, 0, 0], [0, 0, 0], [0, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0], [0, 0, 0], [255, 255, 255]]],
    dtype=np.uint8,
)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an image into a file and returns its path."""

    def save(image: Image.Image, name: str = "image.png", **options: object) -> Path:
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


def pixels(path: object) -> np.ndarray:
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.JPEG", "a.webp", "a.bmp", "a.tiff", "a.TIF", "a.gif", "a.ppm", "a.pgm", "a.tga"]
)
def test_formats_that_pillow_reads_are_images(name, saved):
    assert is_image_name(name)
    assert pixels(saved(Image.fromarray(CORNERS), name)).shape == CORNERS.shape


@pytest.mark.parametrize("name", ["notes.txt", "jpg", "a.mat", "a.h5", "a.mpg", "a.pdf", "a.jpg.txt", ""])
def test_other_files_are_none(name):
    assert not is_image_name(name)


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bit_grey_is_scaled(name, saved):
    levels = np.array([[0, 128, 129, 257, 257 * 100, 65535]], dtype=np.uint16)
    path = saved(Image.fromarray(levels), name)
    assert pixels(path)[0].tolist() == [[v] * 3 for v in (0, 0, 1, 1, 100, 255)]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_32_bit_grey_has_no_stated_range(dtype, saved):
    path = saved(Image.fromarray(np.array([[0, 1], [2, 3]], dtype=dtype)), "a.tiff")
    with pytest.raises(ValueError, match=r"^pixels of mode '[FI]' \(32 bits\) have no stated range"):
        open_image(path)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, CORNERS),
        (2, CORNERS[:, ::-1]),
        (3, CORNERS[::-1, ::-1]),
        (4, CORNERS[::-1]),
        (5, CORNERS.transpose(1, 0, 2)),
        (6, np.rot90(CORNERS, -1)),
        (7, CORNERS[::-1, ::-1].transpose(1, 0, 2)),
        (8, np.rot90(CORNERS)),
        (9, CORNERS),
    ],
)
@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_exif_orientation_is_applied_once(name, orientation, turned, saved):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(CORNERS), name, exif=exif)
    assert np.array_equal(pixels(path), turned)


def test_damaged_exif_leaves_an_image_as_it_lies(saved):
    path = saved(Image.fromarray(CORNERS), exif=b"Exif\x00\x00nonsense")
    assert np.array_equal(pixels(path), CORNERS)


def test_what_is_transparent_is_white(saved):
    alpha = np.array([[0, 255, 255, 255], [255, 255, 255, 0]], dtype=np.uint8)
    expected = np.where(alpha[..., None] > 0, CORNERS, 255)
    rgba = Image.fromarray(np.dstack([CORNERS, alpha]))
    assert np.array_equal(pixels(saved(rgba)), expected)
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode="P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert pixels(saved(palette, transparency=0)).tolist() == [[[255] * 3, [40, 50, 60]]]
    grey = Image.fromarray(np.array([[[7, 255], [7, 0]]], dtype=np.uint8), mode="LA")
    assert pixels(saved(grey)).tolist() == [[[7] * 3, [255] * 3]]


def test_other_modes_become_rgb(saved):
    for mode in ("1", "L", "P", "CMYK"):
        path = saved(Image.new("RGB", (3, 2), "white").convert(mode), "a.tiff")
        assert (pixels(path) == 255).all()


def test_too_many_pixels_are_one_line(saved, monkeypatch):
    path = saved(Image.fromarray(CORNERS))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    with pytest.raises(ValueError, match=r"^Image size \(8 pixels\) exceeds limit of 6 pixels"):
        open_image(path)


def test_streams_are_read_too(saved):
    assert np.array_equal(pixels(io.BytesIO(saved(Image.fromarray(CORNERS)).read_bytes())), CORNERS)


def test_very_large_images_are_read_without_a_warning_or_refused(saved, monkeypatch):
    path = saved(Image.new("1", (20, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    assert open_image(path).size == (20, 10)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 90)
    with pytest.raises(ValueError, match=r"^Image size \(200 pixels\) exceeds limit of 180 pixels"):
        open_image(path)
