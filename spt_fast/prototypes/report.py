"""A few lines on prototypes, for those who have just built them."""

from __future__ import annotations

from spt_fast.prototypes.result import Prototypes


def summary(prototypes: Prototypes, seconds: float) -> str:
    """Shape, number of images and speed, and the mean squared distance of each block; several lines."""
    layers, num_prompts, width = prototypes.prompts.shape
    images = prototypes.num_images
    return "\n".join(
        [
            f"{layers} x {num_prompts} prompts of width {width}",
            f"{images} images in {seconds:.1f} s, {images / seconds:.1f} images/s",
            *(
                f"block {block:2d}: mean squared distance per token {distance:.4g}"
                for block, distance in enumerate(prototypes.mean_squared_distance.tolist(), start=1)
            ),
        ]
    )
