"""Where float32 cannot hold data as they are: the point and the power of two that they are measured from.

k-means does not change when all tokens are moved and scaled. Tokens far from zero lose their differences in
float32, and the squares of tiny or huge ones leave its range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spt_fast.clustering.inputs import raise_non_finite
from spt_fast.ops.kmeans import TOKEN_DTYPES

# Data this many times as far from zero as they are wide lose four of float32's 24 bits.
_FAR = 16.0
# Within these, squares of distances keep their digits: float32 ends at 2**-126 and 2**128.
_TINY, _HUGE = 2.0**-40, 2.0**40
_CHUNK_ROWS = 65_536


@dataclass(frozen=True)
class Frame:
    """Tokens x of one group are clustered as (x - center) / scale.

    Attributes:
        center: [D] float64.
        scale: a power of two, by which dividing is exact.
        dtype: of centres and distances in the data's own measure: float64 where the data were wider than
            float32, else float32.
    """

    center: Tensor
    scale: float
    dtype: torch.dtype

    def inside(self, tokens: Tensor) -> Tensor:
        """Tokens or centres [..., D] of any dtype in this frame; float32."""
        center = self.center.to(tokens.device)
        found = torch.empty(tokens.shape, dtype=torch.float32, device=tokens.device)
        rows = zip(_chunks(tokens), _chunks(found), strict=True)
        for given, out in rows:
            out.copy_((given.double() - center) / self.scale)
        return found

    def outside(self, centers: Tensor) -> Tensor:
        """Centres [..., D] of this frame in the data's own measure."""
        own = centers.double() * self.scale + self.center.to(centers.device)
        return own.to(self.dtype)


def find_frame(tokens: Tensor, first_row: int = 0) -> Frame | None:
    """The frame for tokens [..., D] of one group; None where float32 holds them as they are.

    `first_row` is the number that errors give the first of them.

    Raises:
        NonFiniteError: a token is NaN or infinite.
    """
    low, high = _extremes(tokens)
    if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
        raise_non_finite(tokens, first_row)
    is_wide = tokens.dtype not in TOKEN_DTYPES
    center = low / 2 + high / 2
    width = float((high / 2 - low / 2).max())
    size = float(torch.maximum(low.abs(), high.abs()).max())
    # Tokens of float32 and narrower have no more digits than float32 keeps.
    is_far = is_wide and float(center.abs().max()) > _FAR * width
    if is_far:
        size = width
    else:
        center = torch.zeros_like(center)
    fits = size <= _HUGE and (width >= _TINY or width == 0)
    if fits and not is_far:
        return None
    scale = 1.0 if fits else _power_of_two(width or size)
    return Frame(center, scale, torch.float64 if is_wide else torch.float32)


def in_frame(tokens: Tensor, frame: Frame | None) -> Tensor:
    """Tokens [..., D] as kernels read them: without a frame in place where their dtype allows."""
    if frame is not None:
        return frame.inside(tokens)
    return tokens if tokens.dtype in TOKEN_DTYPES else tokens.float()


def in_frames(tokens: Tensor, frames: Sequence[Frame | None]) -> Tensor:
    """The same for tokens [G, M, D] with a frame for each group."""
    if all(frame is None for frame in frames):
        return in_frame(tokens, None)
    return torch.stack([in_frame(group, frame).float() for group, frame in zip(tokens, frames, strict=True)])


def out_of_frames(centers: Tensor, frames: Sequence[Frame | None]) -> Tensor:
    """Centres [G, K, D] in the measure of the data."""
    if all(frame is None for frame in frames):
        return centers
    own = [
        group if frame is None else frame.outside(group) for group, frame in zip(centers, frames, strict=True)
    ]
    widest = torch.float64 if any(each.dtype == torch.float64 for each in own) else torch.float32
    return torch.stack([each.to(widest) for each in own])


def scales(frames: Sequence[Frame | None]) -> Tensor:
    """By which distances are larger outside of each frame, [G] float64 on the CPU."""
    return torch.tensor(
        [1.0 if frame is None else frame.scale for frame in frames], dtype=torch.float64, device="cpu"
    )


def _power_of_two(size: float) -> float:
    """The largest that is not above `size`, or the smallest whose inverse is finite."""
    return 2.0 ** max(math.frexp(size)[1] - 1, -1022) if size > 0 else 1.0


def _extremes(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each feature, [D] float64 on the CPU; NaN where a token is."""
    found = [torch.aminmax(rows.double(), dim=0) for rows in _chunks(tokens)]
    low = torch.stack([each.min for each in found]).amin(0)
    high = torch.stack([each.max for each in found]).amax(0)
    return low.cpu(), high.cpu()


def _chunks(tokens: Tensor) -> Iterator[Tensor]:
    """Rows [n, D] of tokens [..., D]."""
    yield from torch.split(tokens.reshape(-1, tokens.shape[-1]), _CHUNK_ROWS)
