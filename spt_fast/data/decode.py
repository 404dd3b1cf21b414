"""Which files are images, and one of them opened as a viewer shows it: upright, in 8-bit RGB."""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

# Formats that Pillow identifies, but cannot decode without a program or a handler of someone else.
_WITHOUT_DECODER = {"BUFR", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow gives their 16-bit grey as 32-bit integers (PNG before version 11).
_SIXTEEN_BITS_AS_INTEGERS = ("PNG", "PPM")


@cache
def image_suffixes() -> frozenset[str]:
    """Suffixes, in lower case and with their dot, of the formats that Pillow can decode here."""
    registered = Image.registered_extensions()
    return frozenset(
        suffix for suffix, name in registered.items() if name in Image.OPEN and name not in _WITHOUT_DECODER
    )


def is_image_name(name: str) -> bool:
    """Whether a file of this name holds an image."""
    return os.path.splitext(name)[1].lower() in image_suffixes()


def open_image(source: str | os.PathLike[str] | BinaryIO) -> Image.Image:
    """The image in a file, in RGB: turned by its EXIF orientation, 16-bit grey scaled to 8 bits.

    Transparent pixels lie on white. Of several frames it is the first.

    Raises:
        ValueError: more pixels than Pillow allows, or pixels of 32 bits, whose range nothing states.
        Exception: of any other class, as Pillow's decoders raise them for damaged files.
    """
    try:
        # Pillow warns of half the number of pixels that it refuses.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(source)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
    with image:
        image.load()
        turn = _TURNS.get(_orientation(image))
        rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB, as `open_image` gives it, but not turned."""
    wide = image.mode == "I" and image.format in _SIXTEEN_BITS_AS_INTEGERS
    if wide or image.mode.startswith("I;16"):
        # 65,535 is 255 times 257.
        levels = (np.asarray(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of mode {image.mode!r} (32 bits) have no stated range; convert to 8 or 16 bits"
        )
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> Any:
    try:
        return image.getexif().get(_ORIENTATION)
    except Exception:
        # A viewer shows an image whose EXIF data are damaged as it lies.
        return None
