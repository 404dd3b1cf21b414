"""The result of a pass: prompts made from patch tokens, one set per layer, with what is known about them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from spt_fast.clustering.summary import Summary
from spt_fast.prototypes.directions import at_mean_length
from spt_fast.support.arguments import check_bool, check_int, check_tensor
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.files import check_metadata, read_safetensors, write_safetensors
from spt_fast.support.progress import progress_bar

_FILE_KIND = "prototypes"
_LAST = "last_output."
_SAMPLE = "sample."
# Not "inertia": under that name, files of development versions hold the mean per token.
_INERTIA_IN_FILES = "inertia_sum"


@dataclass(frozen=True, eq=False, repr=False)
class Prototypes:
    """Token prototypes, ready to be the initial prompts of a `PromptedViT` (C_i of eq. 9-13).

    Attributes:
        prompts: [L, N_p, D] (deep) or [1, N_p, D] (shallow), float32, CPU. `prompts[i]` is for block i + 1.
        counts: [L, N_p], float64: number of tokens nearest to each prototype (an estimate in stream mode).
        inertia: [L], float64: sum of the squared distances of tokens to their nearest prototypes (eq. 9; an
            estimate in stream mode); with `metric="cosine"`, of tokens at length 1 to the centres of these.
        num_images: number of images whose tokens were used.
        num_tokens: number of patch tokens used, per layer.
        metadata: how, with what, and from which backbone they were built.
        last_output: prototypes [1, N_p, D] of the last block's output, for `repeat_last_output`; or None.

    Raises:
        TypeError: a field has another type or dtype.
        ValueError: a tensor is on another device or has another shape, counts or inertia are negative, or a
            number is less than 1.
        NonFiniteError: a tensor holds NaN or infinity; `layer` is set.
    """

    prompts: Tensor
    counts: Tensor
    inertia: Tensor
    num_images: int
    num_tokens: int
    metadata: dict[str, str] = field(default_factory=dict)
    last_output: Prototypes | None = None
    _summary: Summary | None = None
    # What `select` has solved, by length; shared by all that come from one pass.
    _selected: dict[int, Prototypes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_values("prompts", self.prompts, ("L", "N_p", "D"), torch.float32)
        layers, num_prompts, width = self.prompts.shape
        _check_values("counts", self.counts, (layers, num_prompts), torch.float64)
        _check_values("inertia", self.inertia, (layers,), torch.float64)
        _check_not_negative("counts", self.counts)
        _check_not_negative("inertia", self.inertia)
        check_int("num_images", self.num_images, 1)
        check_int("num_tokens", self.num_tokens, 1)
        check_metadata(self.metadata)
        if self.last_output is None:
            return
        if not isinstance(self.last_output, Prototypes):
            raise TypeError(f"last_output must be Prototypes or None, got {self.last_output!r}")
        if self.last_output.prompts.shape != (1, num_prompts, width):
            raise ValueError(
                f"last_output must hold prompts [1, {num_prompts}, {width}], "
                f"got {list(self.last_output.prompts.shape)}"
            )

    def __repr__(self) -> str:
        how = "".join(f"{key}={self.metadata[key]}, " for key in ("strategy", "mode") if key in self.metadata)
        low, high = (float(extreme) for extreme in self.mean_squared_distance.aminmax())
        distance = f"{low:.4g}" if len(self.inertia) == 1 else f"{low:.4g}..{high:.4g}"
        last = "" if self.last_output is None else ", with last_output"
        return (
            f"Prototypes(prompts={list(self.prompts.shape)}, {how}mean_squared_distance={distance}, "
            f"num_images={self.num_images}, num_tokens={self.num_tokens}{last})"
        )

    @property
    def mean_squared_distance(self) -> Tensor:
        """Of a token to its nearest prototype, [L], float64: `inertia / num_tokens`."""
        return self.inertia / self.num_tokens

    def select(self, num_prompts: int, *, progress: bool = False) -> Prototypes:
        """Prototypes of another prompt length, from the sample of the same pass, without the images.

        Each length is as good as one built directly, and the result can be asked for yet another. A length is
        solved once.

        Args:
            progress: show a bar.

        Raises:
            ValueError: `num_prompts` < 1 or more than the sample gives, or there is no sample. Only k-means
                in stream mode has one; files hold it where `save` was told so, repeated layers never.
        """
        check_int("num_prompts", num_prompts, 1)
        progress = check_bool("progress", progress)
        summary = self._summary
        if summary is None:
            raise ValueError(f"select needs the sample of the pass, {self._why_no_summary()}")
        if num_prompts == self.prompts.shape[1]:
            return self
        if num_prompts in self._selected:
            return self._selected[num_prompts]
        if num_prompts > summary.max_clusters:
            raise ValueError(
                f"num_prompts must be at most {summary.max_clusters}, which the sample can give, "
                f"got {num_prompts}; build with a larger capacity or more images"
            )
        with layer_bar(summary.n_groups, progress) as bar:
            solved = summary.solve(num_prompts, on_group=bar.update)
        selected = from_layers(
            solved.centers,
            solved.counts,
            solved.inertia,
            num_images=self.num_images,
            num_tokens=self.num_tokens,
            metadata=self.metadata,
            with_last_output=self.last_output is not None,
            summary=summary,
        )
        selected = replace(selected, _selected=self._selected)
        self._selected.setdefault(self.prompts.shape[1], self)
        self._selected[num_prompts] = selected
        return selected

    def repeat_layer(self, index: int) -> Prototypes:
        """The prompts of one layer for all layers: `repeat_layer(0)` is "first P_0" of Table S2 b.

        Args:
            index: a layer, 0 to L - 1; `prompts[index]` is what all layers get.

        Raises:
            TypeError: `index` is no integer.
            ValueError: there is no such layer.
        """
        last = len(self.prompts) - 1
        index = check_int("index", index, 0, "(for the last block's output: repeat_last_output)")
        if index > last:
            raise ValueError(f"index must be 0 to {last}, got {index}")
        return self._repeat(self, index, str(index))

    def repeat_last_output(self) -> Prototypes:
        """The prompts of the last block's output for all layers: "last P_L" of Table S2 b.

        Raises:
            ValueError: they were not built with `last_output=True`.
        """
        if self.last_output is None:
            raise ValueError(
                "repeat_last_output needs prototypes of the last block's output: "
                "call build_prototypes with last_output=True"
            )
        return self._repeat(self.last_output, 0, "last_output")

    def _repeat(self, source: Prototypes, index: int, name: str) -> Prototypes:
        layers = len(self.prompts)

        def repeat(values: Tensor) -> Tensor:
            return values[index].expand(layers, *values.shape[1:]).clone()

        return replace(
            self,
            prompts=repeat(source.prompts),
            counts=repeat(source.counts),
            inertia=repeat(source.inertia),
            metadata={**self.metadata, "layer": name},
            last_output=None,
            _summary=None,
            _selected={},
        )

    def save(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, with_sample: bool = False
    ) -> None:
        """Write to a safetensors file, completely or not at all.

        Args:
            with_sample: also the sample of the pass, so that `select` and `merge` work on what is loaded. It
                takes L * capacity * D numbers of the tokens' dtype.

        Raises:
            FileExistsError: the file exists and `overwrite` is false.
            FileNotFoundError: its folder does not exist.
            TypeError: `overwrite` or `with_sample` is no bool.
            ValueError: there is no sample to save.
        """
        check_bool("overwrite", overwrite)
        if check_bool("with_sample", with_sample) and self._summary is None:
            raise ValueError(f"with_sample needs the sample of the pass, {self._why_no_summary()}")
        tensors = {
            **self._tensors(),
            "num_images": torch.tensor(self.num_images, device="cpu"),
            "num_tokens": torch.tensor(self.num_tokens, device="cpu"),
        }
        if self.last_output is not None:
            tensors |= {_LAST + name: tensor for name, tensor in self.last_output._tensors().items()}
        if with_sample and self._summary is not None:
            tensors |= {_SAMPLE + name: tensor for name, tensor in self._summary.tensors().items()}
        write_safetensors(path, tensors, self.metadata, kind=_FILE_KIND, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prototypes:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, or does not hold prototypes.
        """
        tensors, metadata = read_safetensors(path, kind=_FILE_KIND)
        if "inertia" in tensors and _INERTIA_IN_FILES not in tensors:
            raise ValueError(
                f"{os.fspath(path)} is from a development version of spt_fast, whose inertia was the mean "
                "per token and not the sum; build the prototypes again"
            )
        try:
            num_images, num_tokens = (
                check_int(name, tensors[name].item(), 1) for name in ("num_images", "num_tokens")
            )

            def read(prefix: str = "", last_output: Prototypes | None = None) -> Prototypes:
                names = ("prompts", "counts", _INERTIA_IN_FILES)
                prompts, counts, inertia = (tensors[prefix + name] for name in names)
                return cls(prompts, counts, inertia, num_images, num_tokens, dict(metadata), last_output)

            loaded = read(last_output=read(_LAST) if _LAST + "prompts" in tensors else None)
            sample = {
                name.removeprefix(_SAMPLE): tensor
                for name, tensor in tensors.items()
                if name.startswith(_SAMPLE)
            }
            return replace(loaded, _summary=Summary.from_tensors(sample)) if sample else loaded
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{os.fspath(path)} does not hold valid prototypes ({error})") from error

    def _tensors(self) -> dict[str, Tensor]:
        return {"prompts": self.prompts, "counts": self.counts, _INERTIA_IN_FILES: self.inertia}

    def _why_no_summary(self) -> str:
        strategy, mode = self.metadata.get("strategy", "kmeans"), self.metadata.get("mode", "stream")
        if "layer" in self.metadata:
            return (
                "which a repeated layer does not keep: call select before repeat_layer or repeat_last_output"
            )
        if "concatenated" in self.metadata:
            return (
                "which a concatenation does not keep: select from each set before concatenate, or merge them"
            )
        if strategy != "kmeans":
            return f"and strategy={strategy!r} makes none: build again with the new num_prompts"
        if mode != "stream":
            return f"and mode={mode!r} makes none: build again, with mode='stream' or the new num_prompts"
        return "which this file does not hold: save with with_sample=True"


def layer_bar(layers: int, progress: bool) -> tqdm[Any]:
    """A bar of the layers that are solved."""
    return progress_bar(show=progress, total=layers, desc="clustering", unit=" layers")


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
    """Prototypes from centres of any device and dtype, the last block's output being one more layer."""
    prompts = at_mean_length(prompts.detach().to("cpu", torch.float32), metadata)
    counts, inertia = (values.detach().to("cpu", torch.float64) for values in (counts, inertia))

    def of(layers: slice, last_output: Prototypes | None, summary: Summary | None) -> Prototypes:
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
        return of(slice(None), None, summary)
    return of(slice(None, -1), of(slice(-1, None), None, None), summary)


def _check_values(name: str, value: object, shape: tuple[int | str, ...], dtype: torch.dtype) -> None:
    """A tensor [L, ...] in host memory, finite in every layer."""
    tensor = check_tensor(name, value, shape, dtype=dtype, device=torch.device("cpu"))
    good = tensor.isfinite().flatten(1).all(1) if tensor.ndim > 1 else tensor.isfinite()
    if not bool(good.all()):
        layer = int((~good).nonzero()[0])
        raise NonFiniteError(f"{name} must be finite, but {name}[{layer}] holds NaN or infinity", layer=layer)


def _check_not_negative(name: str, values: Tensor) -> None:
    """ValueError unless all of a tensor [L, ...] is at least 0."""
    negative = values < 0
    if bool(negative.any()):
        layer, value = int(negative.nonzero()[0, 0]), float(values[negative][0])
        raise ValueError(f"{name} must be >= 0, but {name}[{layer}] holds {value:g}")
