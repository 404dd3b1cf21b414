"""What timm's models have, for code that is written for them: facts, logits, features, classifier."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from spt_fast.backbones.anatomy import embed_dim
from spt_fast.prompting.checks import check_layers
from spt_fast.support.arguments import check_bool, check_choice, check_int, check_tensor


class TimmMethods(nn.Module):
    """Base of tuned models, whose `_run` runs the parts of `model` with what they learn.

    Those with prompts say how these go through the blocks.
    """

    model: nn.Module
    depth: str = "deep"
    pool_prompts: bool = False
    _num_blocks: int
    _num_prefix_tokens: int
    _fitting: Callable[[Tensor], Tensor]
    _run: Callable[..., Any]
    _check_not_released: Callable[[], None]

    @property
    def num_classes(self) -> int:
        """Number of logits, where the model states it; 0 where it returns features."""
        self._check_not_released()
        return self.model.num_classes  # type: ignore[return-value]

    @property
    def num_features(self) -> int:
        """Width of the classifier's inputs, where the model states it."""
        self._check_not_released()
        return self.model.num_features  # type: ignore[return-value]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The model's own, in which `timm.data.resolve_model_data_config` finds image size and mean."""
        self._check_not_released()
        return self.model.pretrained_cfg  # type: ignore[return-value]

    def get_classifier(self) -> Any:
        """The classifier as the model's own `get_classifier` returns it; a tuple where it has two."""
        return self._timms("get_classifier")()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes], or features [B, D] without a head, of images [B, C, height, width].

        Images of any floating-point dtype are cast to that of the model's patch embedding.
        """
        images = self._fitting(images)
        return self._run(self.model, images)  # type: ignore[no-any-return]

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens [B, N, D] after the last block and the final norm; with `pool_prompts`, [B, N + N_p, D]."""
        images = self._fitting(images)
        return self._run(self._timms("forward_features"), images)  # type: ignore[no-any-return]

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what `forward_features` returned; with `pre_logits`, the classifier's inputs."""
        run = functools.partial(self._timms("forward_head"), pre_logits=check_bool("pre_logits", pre_logits))
        width = embed_dim(self.model)
        if check_tensor("tokens", tokens).ndim != 3 or tokens.shape[2] != width:
            raise ValueError(f"tokens must be [B, N, {width}], got {list(tokens.shape)}")
        return self._run(run, tokens)  # type: ignore[no-any-return]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """What leaves the blocks, as timm's method of this name returns it: without the prompts.

        Args:
            x: images [B, C, height, width].
            indices: layers, from 0, or from the end; an int is that many last ones, None all.
            return_prefix_tokens: also class and register tokens, [B, N_prefix, D], beside each.
            norm: pass each through the final norm.
            stop_early: leave out the blocks after the last one asked for.
            output_fmt: "NCHW", [B, D, height / patch, width / patch]; or "NLC", [B, N_e, D].
            intermediates_only: leave out the features.
            output_dict: a dict "image_features", "image_intermediates", ..., where timm's model has that.

        Returns:
            (features, intermediates): what `forward_features` returns, and a list.

        Raises:
            TypeError: the model has no such method, or not all of these arguments; `indices` are no integers,
                or another argument has the wrong type.
            ValueError: there is no such layer, or no such format.
        """
        images = self._fitting(x)
        method = self._timms("forward_intermediates")
        check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        options: dict[str, Any] = {
            "indices": self._check_indices(indices),
            "return_prefix_tokens": check_bool("return_prefix_tokens", return_prefix_tokens),
            "norm": check_bool("norm", norm),
            "stop_early": check_bool("stop_early", stop_early),
            "intermediates_only": check_bool("intermediates_only", intermediates_only),
            # Not all of timm's models have it.
            **({"output_dict": True} if check_bool("output_dict", output_dict) else {}),
        }
        if self.depth == "deep" and not self.pool_prompts:
            return self._run(functools.partial(method, output_fmt=output_fmt, **options), images)
        # Prompts are among the tokens here, which make no grid.
        found = self._run(functools.partial(method, output_fmt="NLC", **options), images)
        grid = self.model.patch_embed.dynamic_feat_size(images.shape[-2:])  # type: ignore[union-attr, operator]
        return self._without_prompts(found, tuple(grid), output_fmt, intermediates_only)

    def _timms(self, name: str) -> Callable[..., Any]:
        """A method of the model; TypeError where it is no model of timm that has it."""
        self._check_not_released()
        method: Any = getattr(self.model, name, None)
        if not callable(method):
            raise TypeError(f"model must have timm's `{name}`, which {type(self.model).__name__} lacks")
        return method  # type: ignore[no-any-return]

    def _check_indices(self, indices: int | Sequence[int] | None) -> list[int] | None:
        """The layers, from 0, that `indices` name; None where they name all."""
        count = self._num_blocks
        if isinstance(indices, int | np.integer):
            if check_int("indices", indices, 1, "(as many last blocks), a list or None") > count:
                raise ValueError(f"indices must be at most {count}, the number of blocks, got {indices}")
            return list(range(count - int(indices), count))
        if indices is None:
            return None
        layers = check_layers("indices", indices, count)
        if not layers:
            raise ValueError(f"indices must name at least one block, got {indices!r}")
        return layers

    def _without_prompts(
        self, found: Any, grid: tuple[int, int], output_fmt: str, intermediates_only: bool
    ) -> Any:
        patches = grid[0] * grid[1]

        def trim(each: Any) -> Any:
            if isinstance(each, tuple):
                return trim(each[0]), each[1]
            tokens = each[:, :patches]
            return tokens if output_fmt == "NLC" else tokens.mT.unflatten(-1, grid).contiguous()

        def trim_features(features: Tensor) -> Tensor:
            return features if self.pool_prompts else features[:, : self._num_prefix_tokens + patches]

        if isinstance(found, dict):
            trimmed: dict[str, Any] = {
                "image_intermediates": [trim(each) for each in found["image_intermediates"]]
            }
            if "image_features" in found:
                trimmed["image_features"] = trim_features(found["image_features"])
            return {**found, **trimmed}
        if intermediates_only:
            return [trim(each) for each in found]
        features, intermediates = found
        return trim_features(features), [trim(each) for each in intermediates]
