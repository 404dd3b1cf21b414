"""Patches as one picture within a page: pixels in a data URI, frames and labels drawn over them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from spt_fast.plots.patches import as_colours
from spt_fast.study.report.html import Html, element

# Units of the drawing: a picture, and the column of labels.
_SIDE, _LABELS = 16.0, 5.0
# Small pictures stay exact; of larger ones JPEG takes a tenth.
_LARGEST_PNG = 24_000


def patch_picture(
    pictures: Tensor,
    context: int,
    *,
    names: Sequence[str],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    alt: str,
) -> Html:
    """A row for each prompt: the patches nearest to it, each framed within its surroundings.

    Args:
        pictures: [P, k, C, H, W], as `NearestPatches.pictures` has them of a layer.
        context: patches around each, on every side.
        names: of the P rows; short.
        mean, std: what the images were normalised with.
        alt: what a screen reader says.
    """
    colours = as_colours(pictures.numpy(), mean, std)
    rows, k, height, width = colours.shape[:4]
    mosaic = np.ascontiguousarray(colours.transpose(0, 2, 1, 3, 4)).reshape(rows * height, k * width, 3)
    tall = _SIDE * height / width
    image = element(
        "image",
        href=_data_uri(mosaic),
        x=_LABELS,
        width=_SIDE * k,
        height=f"{tall * rows:g}",
        preserveAspectRatio="none",
    )
    parts = [image, _gaps(rows, k, tall), _frames(rows, k, tall, context)]
    parts += [
        element("text", name, x=_LABELS - 1, y=f"{tall * (row + 0.5):g}", dy="0.35em", class_="end")
        for row, name in enumerate(names)
    ]
    box = f"0 0 {_LABELS + _SIDE * k:g} {tall * rows:g}"
    return element("svg", parts, viewBox=box, class_="patches", role="img", aria_label=alt)


def _frames(rows: int, k: int, tall: float, context: int) -> Html:
    """White within black, which shows on any colour; none where a picture is the patch alone."""
    if not context:
        return Html()
    share = 1 / (2 * context + 1)
    width, height = _SIDE * share, tall * share
    # One path for all of them.
    path = " ".join(
        f"M{_LABELS + (column + context * share) * _SIDE:.3g} {(row + context * share) * tall:.4g}"
        f"h{width:.3g}v{height:.3g}h-{width:.3g}z"
        for row in range(rows)
        for column in range(k)
    )
    return Html(element("path", d=path, class_="frame") + element("path", d=path, class_="frame inner"))


def _gaps(rows: int, k: int, tall: float) -> Html:
    """Lines in the colour of the page between the pictures."""
    across = [f"M{_LABELS + _SIDE * column:g} 0V{tall * rows:g}" for column in range(1, k)]
    down = [f"M{_LABELS:g} {tall * row:g}h{_SIDE * k:g}" for row in range(1, rows)]
    return element("path", d=" ".join([*across, *down]), class_="gap")


def _data_uri(pixels: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    """[H, W, 3] in [0, 1] as a PNG, or as a JPEG where that is large."""
    picture = Image.fromarray((pixels * 255 + 0.5).astype(np.uint8))
    content, kind = _encoded(picture, "PNG", optimize=True), "png"
    if len(content) > _LARGEST_PNG:
        content, kind = _encoded(picture, "JPEG", quality=85, subsampling=0, optimize=True), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(picture: Image.Image, kind: str, **options: object) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()
