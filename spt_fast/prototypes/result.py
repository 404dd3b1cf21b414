"""The result of a pass: prompts made from patch tokens, one set per layer, with what is known about them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spt_fast.support.arguments import check_int
from spt_fast.support.files import read_safetensors, write_safetensors

if TYPE_CHECKING:
    from spt_fast.clustering import Summary

_FILE_KIND = "prototypes"
_LAST = "last_output."


@dataclass(frozen=True, eq=False, repr=False)
class Prototypes:
    """Token prototypes, ready to be the initial prompts of a `PromptedViT` (C_i of eq. 9-13).

    Attributes:
        prompts: [L, N_p, D] (deep) or [1, N_p, D] (shallow), float32, CPU. `prompts[i]` is for block i + 1.
        counts: [L, N_p], float64: number of tokens nearest to each prototype (an estimate in stream mode).
        inertia: [L], float64: mean squared distance of a token to its nearest prototype (eq. 9 per token).
        num_images: number of images whose tokens were used.
        num_tokens: number of patch tokens used, per layer.
        metadata: how, with what, and from which backbone they were built.
        last_output: prototypes [1, N_p, D] of the last block's output, for `layer(-1)`; usually None.

    Raises:
        TypeError, ValueError: a field has another type, dtype, device or shape, or is not finite.
    """

    prompts: Tensor
    counts: Tensor
    inertia: Tensor
    num_images: int
    num_tokens: int
    metadata: dict[str, str] = field(default_factory=dict)
    last_output: Prototypes | None = None
    _summary: Summary | None = None

    def __post_init__(self) -> None:
        _check_tensor("prompts", self.prompts, torch.float32, ndim=3)
        layers, num_prompts, width = self.prompts.shape
        _check_tensor("counts", self.counts, torch.float64, shape=(layers, num_prompts))
        _check_tensor("inertia", self.inertia, torch.float64, shape=(layers,))
        check_int("num_images", self.num_images, 1)
        check_int("num_tokens", self.num_tokens, 1)
        _check_metadata(self.metadata)
        if self.last_output is not None and self.last_output.prompts.shape != (1, num_prompts, width):
            raise ValueError(
                f"last_output must hold prompts [1, {num_prompts}, {width}], "
                f"got {list(self.last_output.prompts.shape)}"
            )

    def __repr__(self) -> str:
        how = "".join(f"{key}={self.metadata[key]}, " for key in ("strategy", "mode") if key in self.metadata)
        low, high = float(self.inertia.min()), float(self.inertia.max())
        inertia = f"{low:.4g}" if len(self.inertia) == 1 else f"{low:.4g}..{high:.4g}"
        last = "" if self.last_output is None else ", with last_output"
        return (
            f"Prototypes(prompts={list(self.prompts.shape)}, {how}inertia={inertia}, "
            f"num_images={self.num_images}, num_tokens={self.num_tokens}{last})"
        )

    def select(self, num_prompts: int) -> Prototypes:
        """Prototypes of another prompt length, from the summary of the same pass, without the images.

        Each length is as good as one built directly, and the result can be asked for yet another.

        Raises:
            ValueError: `num_prompts` < 1 or more than the summary can give, or there is no summary: only
                k-means in stream mode has one, it is not saved to files, and `layer` drops it.
        """
        check_int("num_prompts", num_prompts, 1)
        summary = self._summary
        if summary is None:
            raise ValueError(f"select needs the summary of the pass, {self._why_no_summary()}")
        if num_prompts > summary.max_clusters:
            raise ValueError(
                f"num_prompts must be at most {summary.max_clusters}, which the summary can give, "
                f"got {num_prompts}; build with a larger capacity or more images"
            )
        solved = summary.solve(num_prompts)
        return from_layers(
            solved.centers,
            solved.counts,
            solved.mean_squared_distance,
            num_images=self.num_images,
            num_tokens=self.num_tokens,
            metadata=self.metadata,
            with_last_output=self.last_output is not None,
            summary=summary,
        )

    def layer(self, index: int) -> Prototypes:
        """One layer's prompts repeated for all layers (Table S2 b).

        `layer(0)` is "first P_0". `layer(-1)` is "last P_L": prototypes of the last block's output, there
        only if they were built with `last_output=True`.

        Raises:
            ValueError: no such layer.
        """
        layers = len(self.prompts)
        index = check_int("index", index, -1)
        if index == -1:
            source, row = self._last_output_or_raise(), 0
        elif 0 <= index < layers:
            source, row = self, index
        else:
            raise ValueError(
                f"index must be 0 to {layers - 1}, or -1 for the last block's output, got {index}"
            )

        def repeated(values: Tensor) -> Tensor:
            return values[row].expand(layers, *values.shape[1:]).clone()

        return replace(
            self,
            prompts=repeated(source.prompts),
            counts=repeated(source.counts),
            inertia=repeated(source.inertia),
            metadata={**self.metadata, "layer": str(index)},
            last_output=None,
            _summary=None,
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write to a safetensors file, completely or not at all. The summary for `select` is not saved.

        Raises:
            FileExistsError: the file exists and `overwrite` is false.
            FileNotFoundError: its folder does not exist.
        """
        tensors = {
            **self._tensors(),
            "num_images": torch.tensor(self.num_images),
            "num_tokens": torch.tensor(self.num_tokens),
        }
        if self.last_output is not None:
            tensors |= {_LAST + name: tensor for name, tensor in self.last_output._tensors().items()}
        write_safetensors(path, tensors, self.metadata, kind=_FILE_KIND, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prototypes:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, or does not hold prototypes.
        """
        tensors, metadata = read_safetensors(path, kind=_FILE_KIND)
        try:
            num_images, num_tokens = int(tensors["num_images"]), int(tensors["num_tokens"])

            def read(prefix: str = "", last_output: Prototypes | None = None) -> Prototypes:
                prompts, counts, inertia = (tensors[prefix + n] for n in ("prompts", "counts", "inertia"))
                return cls(prompts, counts, inertia, num_images, num_tokens, dict(metadata), last_output)

            return read(last_output=read(_LAST) if _LAST + "prompts" in tensors else None)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{os.fspath(path)} does not hold valid prototypes ({error})") from error

    def _tensors(self) -> dict[str, Tensor]:
        return {"prompts": self.prompts, "counts": self.counts, "inertia": self.inertia}

    def _last_output_or_raise(self) -> Prototypes:
        if self.last_output is None:
            raise ValueError(
                "layer(-1) needs prototypes of the last block's output: build with last_output=True "
                f"(index may be 0 to {len(self.prompts) - 1} here)"
            )
        return self.last_output

    def _why_no_summary(self) -> str:
        strategy, mode = self.metadata.get("strategy", "kmeans"), self.metadata.get("mode", "stream")
        if "layer" in self.metadata:
            return "which does not go with a single layer: call select(num_prompts).layer(index) instead"
        if strategy != "kmeans":
            return f"which strategy={strategy!r} has none of: build again with the new num_prompts"
        if mode != "stream":
            return f"which mode={mode!r} has none of: build again, with mode='stream' or the new num_prompts"
        return "which is not saved to files: select and save every length you want where they are built"


def from_layers(
    prompts: Tensor,  # [G, N_p, D] with G = L, or L + 1 if the last block's output is among them
    counts: Tensor,  # [G, N_p]
    inertia: Tensor,  # [G]
    *,
    num_images: int,
    num_tokens: int,
    metadata: dict[str, str],
    with_last_output: bool,
    summary: Summary | None = None,
) -> Prototypes:
    """Prototypes from tensors of any device and dtype, the last block's output being one more layer."""
    prompts = prompts.detach().to("cpu", torch.float32)
    counts, inertia = (values.detach().to("cpu", torch.float64) for values in (counts, inertia))

    def part(layers: slice, last_output: Prototypes | None, summary: Summary | None) -> Prototypes:
        return Prototypes(
            prompts[layers].contiguous(),
            counts[layers].contiguous(),
            inertia[layers].contiguous(),
            num_images,
            num_tokens,
            dict(metadata),
            last_output,
            summary,
        )

    if not with_last_output:
        return part(slice(None), None, summary)
    return part(slice(None, -1), part(slice(-1, None), None, None), summary)


def _check_tensor(
    name: str,
    value: object,
    dtype: torch.dtype,
    *,
    ndim: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != dtype or value.device.type != "cpu":
        raise ValueError(f"{name} must be {dtype} on the CPU, got {value.dtype} on {value.device}")
    if ndim is not None and (value.ndim != ndim or 0 in value.shape):
        raise ValueError(f"{name} must be [L, N_p, D] and not empty, got shape {list(value.shape)}")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)} to fit prompts, got {list(value.shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict):
        raise TypeError(f"metadata must be a dict of strings, got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {key!r}: {value!r}")
