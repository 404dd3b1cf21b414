"""A frozen Vision Transformer with learnable prompts in its blocks and a new head (Sec. 3.1, 3.3)."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import describe, embed_dim, get_blocks, num_prefix_tokens, patch_size, unwrap
from spt_fast.backbones.snapshot import Loan, classifiers, placement, separate_head
from spt_fast.ops.nmi import sigmoid_nmi
from spt_fast.prompting.engines import (
    KeysValues,
    KeysValuesCache,
    append_prompts,
    concat_blocker,
    concat_extras,
    drop_prompts,
    fit_extras,
    kv_blocker,
    kv_extras,
    kv_forward,
    prompt_keys_values,
)
from spt_fast.support.arguments import check_int
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.files import read_safetensors, write_safetensors
from spt_fast.support.randomness import seeded

if TYPE_CHECKING:
    import os

    from spt_fast.prototypes.result import Prototypes

_FILE_KIND = "prompted_vit"
# Facts that must agree between a file and the model that loads it, besides the shapes.
_CHECKED_METADATA = (
    "architecture",
    "depth",
    "num_prefix_tokens",
    "prompt_depth",
    "pool_prompts",
    "global_pool",
)

_WEIGHT_DTYPES = {
    None: None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16,
}

_BlockForward = Callable[..., Tensor]


class PromptedViT(nn.Module):
    """A Vision Transformer that attends to learnable prompts; only the prompts and the head are trained.

    The model is taken over, not copied: its parameters are frozen, it stays in evaluation mode, and each of
    its blocks runs with prompts until `release()` gives it back as it was. The trained head is a new one, or
    a copy of the model's own. All the rest is the model's own forward, so hooks, gradient checkpointing
    (`tuned.model.set_grad_checkpointing()`), dynamic image sizes and any pooling work as they do in timm.

    Deep (eq. 6, 13): block i sees its own prompts P_{i-1}, and their outputs are discarded.
    Shallow (eq. 4-5, 11-12): block 1 sees P_0, and later blocks see what became of them.

    Args:
        model: a timm Vision Transformer, or a module whose `.blocks` map [B, N, D] to [B, N, D]; by itself,
            for `torch.compile` and data-parallel wrappers go around the `PromptedViT`.
        prompts: `Prototypes`; a floating-point tensor [L, N_p, D] (deep) or [1, N_p, D] (shallow), which is
            copied; or an int, that many prompts from VPT's uniform initialisation by torch's global random
            generator. N_p = 0 is the model without prompts.
        depth: "deep" or "shallow".
        num_classes: size of a new head; None keeps the model's head, which is then trained on as it is.
        freeze_prompts: train the head only (Table 4a).
        engine: "kv" adds the prompts to keys and values, computed once per step for the whole batch (deep
            only, in the blocks of docs/backbones.md); "concat" is the textbook form; "auto" takes "kv" where
            it is exact. Outputs and gradients are equal up to rounding.
        pool_prompts: average the last block's outputs of prompts and patches alike, not those of patches
            alone; for models with `global_pool="avg"`.
        weight_dtype: torch.bfloat16 ("bf16") or torch.float16 ("fp16"): run in this dtype by autocast, with
            the frozen weights cast once instead of in every step. Results are those of autocast, bit for bit.
            Until `release()` the originals are kept beside the copies: half as much memory again for the
            weights, which autocast by itself takes too, from forward to backward.

    Attributes:
        prompts: Parameter [L or 1, N_p, D], at least float32 also where the model is narrower.
        engine: "kv" or "concat", as chosen.
        engine_reason: why "kv" could not be chosen, or why it was; one sentence.
        depth: "deep" or "shallow".
        model: the model taken over.
        class_names: what the logits stand for, in their order, or None; yours to set, saved with the head.

    Raises:
        TypeError: `model` has no blocks to prompt or is wrapped, or an argument is of the wrong type.
        ValueError: prompts of another depth or width, an unknown option, or one this model cannot honour.
    """

    prompts: nn.Parameter
    model: nn.Module
    class_names: Sequence[str] | None

    def __init__(
        self,
        model: nn.Module,
        prompts: Prototypes | Tensor | int,
        *,
        depth: Literal["deep", "shallow"] = "deep",
        num_classes: int | None = None,
        freeze_prompts: bool = False,
        engine: Literal["auto", "kv", "concat"] = "auto",
        pool_prompts: bool = False,
        weight_dtype: torch.dtype | Literal["bf16", "fp16"] | None = None,
    ) -> None:
        super().__init__()
        _check_choice("depth", depth, ("deep", "shallow"))
        _check_choice("engine", engine, ("auto", "kv", "concat"))
        _check_not_wrapped(model)
        blocks = get_blocks(model)
        _check_not_taken(blocks)
        num_classes = _check_num_classes(model, num_classes)
        if pool_prompts:
            _check_pools_patches(model, blocks)
        self.weight_dtype = _check_weight_dtype(weight_dtype)
        self.engine, self.engine_reason = _choose_engine(model, blocks, depth, engine)
        values = _initial_prompts(model, prompts, depth)

        self.depth = depth
        self.pool_prompts = bool(pool_prompts)
        self.class_names = None
        self._num_blocks = len(blocks)
        self._num_prefix_tokens = num_prefix_tokens(model)
        was_training = model.training
        # Views of the prompts, layer by layer, while a forward pass runs.
        self._layers: tuple[Tensor, ...] | None = None
        self._cache: KeysValuesCache | None = None
        self._loan: Loan | None = Loan(model)
        self.model = model
        try:
            self._take_over(blocks, num_classes)
        except BaseException:
            self._loan.give_back(model)
            raise
        # Without prompts there is nothing to learn; DDP would wait for a gradient that never comes.
        learn_prompts = not freeze_prompts and values.numel() > 0
        self.prompts = nn.Parameter(values, requires_grad=learn_prompts)
        self.train(was_training)

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        engine: Literal["auto", "kv", "concat"] = "auto",
        weight_dtype: torch.dtype | Literal["bf16", "fp16"] | None = None,
    ) -> PromptedViT:
        """`model` with the prompts and the head of a file that `save` wrote, built as they were.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError: as the constructor and `load`; the model is then left as it was.
        """
        tensors, facts = read_safetensors(path, kind=_FILE_KIND)
        # A head of the size that the model has already is read into a copy of the model's own.
        saved, own = facts.get("num_classes"), getattr(model, "num_classes", None)
        # What a new head is drawn from does not matter, and the caller's random state shall not notice.
        with seeded(0):
            tuned = cls(
                model,
                tensors["prompts"],
                depth="shallow" if facts["prompt_depth"] == "shallow" else "deep",
                num_classes=None if saved is None or saved == str(own) else int(saved),
                engine=engine,
                pool_prompts=facts["pool_prompts"] == "True",
                weight_dtype=weight_dtype,
            )
        try:
            tuned._take_values(path, tensors, facts)
        except ValueError:
            tuned.release()
            raise
        return tuned

    @property
    def head(self) -> nn.Module:
        """The trainable classifier; a ModuleList of both where the model has two (distilled DeiT)."""
        self._check_held()
        found = classifiers(self.model)
        return found[0] if len(found) == 1 else nn.ModuleList(found)

    @property
    def num_prompts(self) -> int:
        """N_p, the number of prompts per layer."""
        return self.prompts.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of logits, where the model states it; 0 where it gives features."""
        return self.model.num_classes  # type: ignore[return-value]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The model's own, so that `timm.data.resolve_model_data_config` finds its image size and mean."""
        return self.model.pretrained_cfg  # type: ignore[return-value]

    @property
    def default_cfg(self) -> dict[str, Any]:
        """What older timm calls `pretrained_cfg`."""
        return self.model.default_cfg  # type: ignore[return-value]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, height, width]."""
        self._check_images(images)
        return self._run(self.model, images)

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens [B, N, D] after the last block and the final norm; with `pool_prompts`, [B, N + N_p, D]."""
        self._check_images(images)
        return self._run(self.model.forward_features, images)  # type: ignore[arg-type]

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what `forward_features` returned; with `pre_logits`, the classifier's inputs."""
        self._check_held()
        model: Any = self.model
        return self._run(functools.partial(model.forward_head, pre_logits=pre_logits), tokens)

    @contextmanager
    def fixed_prompts(self) -> Iterator[None]:
        """Within `with tuned.fixed_prompts():`, keys and values of the prompts are computed once and kept.

        For inference: it takes effect where no gradient for the prompts is asked for (and not in code made
        by `torch.compile`). Prompts and backbone must not change meanwhile. A change of the prompts is
        noticed all the same and computed anew, unless it was written through `.data`.
        """
        outer = self._cache
        self._cache = KeysValuesCache() if outer is None else outer
        try:
            yield
        finally:
            self._cache = outer

    @torch.no_grad()
    def layer_nmi(self, images: Tensor) -> Tensor:
        """Sigmoid NMI (eq. 7, 8) of each block's prompts and the patch tokens entering it; [L, B].

        Shallow: from block 2 on, the prompts are what the block before made of them for each image. Runs
        without gradients; the backbone is in evaluation mode as always.

        Raises:
            NonFiniteError: a prompt or a token of some block is NaN or infinite; names block and image.
        """
        per_layer: list[Tensor] = []

        def measure(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            per_layer.append(self._nmi_at(len(per_layer), inputs[0]))

        self._check_held()
        hooks = [block.register_forward_pre_hook(measure) for block in get_blocks(self.model)]
        try:
            self.forward(images)
        finally:
            for hook in hooks:
                hook.remove()
        values = torch.stack(per_layer)
        _check_finite_nmi(values)
        return values

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimiser should be given: the prompts, unless frozen, and the head."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> PromptedViT:
        """Set the mode of the head and of the dropout before it; the backbone stays in evaluation mode."""
        super().train(mode)
        if self._loan is not None:
            self.model.eval()
            for module in (*classifiers(self.model), getattr(self.model, "head_drop", None)):
                if module is not None:
                    module.train(mode)
        return self

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write prompts and head, and nothing else of the model, to a safetensors file; see `from_file`.

        Raises:
            ValueError: `class_names` is set, but not one name for each logit.
            FileExistsError: there is such a file, and not `overwrite`.
            FileNotFoundError: the folder does not exist.
        """
        self._check_held()
        _check_class_names(self.class_names, getattr(self.model, "num_classes", None))
        write_safetensors(path, self._tuned_tensors(), self._metadata(), kind=_FILE_KIND, overwrite=overwrite)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read back what `save` wrote, into a PromptedViT built the same way; a misfit changes nothing.

        Raises:
            ValueError: another backbone, depth or pooling; prompts or head of another shape (both shapes are
                named); or a file that is truncated or of another kind.
            FileNotFoundError: there is no such file.
        """
        self._check_held()
        self._take_values(path, *read_safetensors(path, kind=_FILE_KIND))

    def release(self) -> nn.Module:
        """Give the model back as it was taken over: head, grad flags, training modes, forward of the blocks.

        The learned head goes with this object, which cannot be used any more; `save` before.
        """
        self._check_held()
        assert self._loan is not None
        model = self.model
        del self.model
        self._loan.give_back(model)
        self._loan = None
        return model

    def extra_repr(self) -> str:
        layers, num_prompts, width = self.prompts.shape
        return f"prompts=[{layers}, {num_prompts}, {width}], depth={self.depth!r}, engine={self.engine!r}"

    def _take_values(
        self, path: str | os.PathLike[str], tensors: dict[str, Tensor], facts: dict[str, str]
    ) -> None:
        """Prompts, head and names of a file; nothing changes where they do not fit."""
        mine = self._tuned_tensors()
        _check_shapes(path, tensors, mine)
        _check_metadata(path, facts, self._metadata())
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])
        names = facts.get("class_names")
        self.class_names = None if names is None else tuple(json.loads(names))

    def _take_over(self, blocks: nn.ModuleList | nn.Sequential, num_classes: int | None) -> None:
        self.model.requires_grad_(False)
        separate_head(self.model)
        if num_classes is not None:
            self.model.reset_classifier(num_classes)  # type: ignore[operator]
        for classifier in classifiers(self.model):
            if num_classes is not None:
                # Older timm makes the new head in float32 on the CPU.
                classifier.to(*placement(self.model))
            classifier.requires_grad_(True)
        if self.weight_dtype is not None:
            assert self._loan is not None
            self._loan.cast_frozen_weights(self.model, self.weight_dtype)
        for index, block in enumerate(blocks):
            run = self._run_with_kv if self._runs_kv(index) else self._run_with_tokens
            # Shadowing `forward` on the instance leaves the module tree, its names and its hooks alone.
            setattr(block, "forward", functools.partial(run, index, block, block.forward))  # noqa: B010

    def _runs_kv(self, index: int) -> bool:
        """Pooling needs outputs at the prompts' positions, so the last block then takes them as tokens."""
        return self.engine == "kv" and not (self.pool_prompts and index == self._num_blocks - 1)

    def _run(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        # Unbound once: the way back then writes the gradient of all layers once, not once per layer.
        self._layers = self.prompts.unbind(0)
        try:
            if self.weight_dtype is None:
                return function(inputs)
            with torch.autocast(inputs.device.type, dtype=self.weight_dtype):
                return function(inputs)
        finally:
            self._layers = None

    def _run_with_kv(
        self, index: int, block: nn.Module, original: _BlockForward, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        _check_block_call(block, x, args, kwargs, kv_extras(block))
        return kv_forward(block, x, self._keys_values(index, block, x.dtype), **kwargs)

    def _run_with_tokens(
        self, index: int, block: nn.Module, original: _BlockForward, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        _check_block_call(block, x, args, kwargs, concat_extras(block))
        if self.depth == "deep" or index == 0:
            x = append_prompts(x, self._layer(index).to(x.dtype))
        x = original(x, **fit_extras(kwargs, self.num_prompts))
        is_last = index == self._num_blocks - 1
        keep = self.pool_prompts if is_last else self.depth == "shallow"
        return x if keep else drop_prompts(x, self.num_prompts)

    def _layer(self, index: int) -> Tensor:
        """Prompts [N_p, D] of a block, also where it runs by itself, as when it is recomputed."""
        return self.prompts[index] if self._layers is None else self._layers[index]

    def _keys_values(self, index: int, block: nn.Module, dtype: torch.dtype) -> tuple[KeysValues, ...]:
        def compute() -> tuple[KeysValues, ...]:
            return prompt_keys_values(block, self._layer(index).to(dtype))

        learning = torch.is_grad_enabled() and self.prompts.requires_grad
        if self._cache is None or learning or torch.compiler.is_compiling():
            return compute()
        return self._cache.get(index, self.prompts, dtype, compute)

    def _nmi_at(self, index: int, x: Tensor) -> Tensor:
        """NMI [B] of the prompts of block `index` and the patch tokens of x [B, N, D], which enters it."""
        if self.depth == "deep" or index == 0:
            prompts = self.prompts[min(index, self.prompts.shape[0] - 1)].to(x.dtype)
            return sigmoid_nmi(prompts, x[:, self._num_prefix_tokens :])
        first_prompt = x.shape[1] - self.num_prompts
        per_image = [
            sigmoid_nmi(image[first_prompt:], image[None, self._num_prefix_tokens : first_prompt])
            for image in x
        ]
        return torch.cat(per_image)

    def _tuned_tensors(self) -> dict[str, Tensor]:
        return {
            "prompts": self.prompts,
            **{f"head.{k}": v for k, v in self.head.state_dict(keep_vars=True).items()},
        }

    def _metadata(self) -> dict[str, str]:
        facts = {"num_classes": getattr(self.model, "num_classes", None)}
        if self.class_names is not None:
            facts["class_names"] = json.dumps(list(self.class_names))
        return {
            **{name: str(fact) for name, fact in facts.items() if fact is not None},
            **describe(self.model),
            "prompt_depth": self.depth,
            "pool_prompts": str(self.pool_prompts),
            "global_pool": str(getattr(self.model, "global_pool", "")),
        }

    def _check_held(self) -> None:
        if self._loan is None:
            raise RuntimeError(
                "this PromptedViT has released its model; build a new one to use prompts again"
            )

    def _check_images(self, images: Tensor) -> None:
        self._check_held()
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        if not images.is_floating_point():
            raise TypeError(
                f"images must be a floating-point tensor, got {images.dtype}; scale and normalise them first"
            )
        if images.ndim != 4:
            raise ValueError(f"images must have shape [B, C, height, width], got {tuple(images.shape)}")
        patch_embed = getattr(self.model, "patch_embed", None)
        size = getattr(patch_embed, "img_size", None)
        if (
            size is not None
            and getattr(patch_embed, "strict_img_size", False)
            and images.shape[-2:] != tuple(size)
        ):
            raise ValueError(
                f"images must be {size[0]} x {size[1]} for this model, got {tuple(images.shape)}"
            )


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_not_taken(blocks: nn.ModuleList | nn.Sequential) -> None:
    for block in blocks:
        forward = vars(block).get("forward")
        if isinstance(forward, functools.partial) and isinstance(
            getattr(forward.func, "__self__", None), PromptedViT
        ):
            raise ValueError("model already belongs to a PromptedViT; call its release() first")


def _check_not_wrapped(model: nn.Module) -> None:
    # A compiled module answers for the one inside, but runs that one: a new head on it would never be called.
    inner = unwrap(model)
    if inner is not model:
        raise TypeError(
            f"model must be the {type(inner).__name__} itself, got it inside {type(model).__name__}; "
            "compile or distribute the PromptedViT instead"
        )


def _check_num_classes(model: nn.Module, num_classes: int | None) -> int | None:
    if num_classes is None:
        return None
    num_classes = check_int("num_classes", num_classes, 1, "or None")
    if not callable(getattr(model, "reset_classifier", None)):
        raise TypeError(
            f"num_classes needs a model with timm's `reset_classifier`, got {type(model).__name__}; "
            "leave it None to keep the model's own head"
        )
    return num_classes


def _check_weight_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(given, (torch.dtype, str, type(None))) or given not in _WEIGHT_DTYPES:
        raise ValueError(f"weight_dtype must be None, torch.bfloat16 or torch.float16, got {given!r}")
    return _WEIGHT_DTYPES[given]


def _check_pools_patches(model: nn.Module, blocks: nn.ModuleList | nn.Sequential) -> None:
    pool = getattr(model, "global_pool", None)
    if pool != "avg":
        raise ValueError(f"pool_prompts needs a model with global_pool='avg', got {pool!r}")
    reason = concat_blocker([blocks[-1]], model)
    if reason is not None:
        raise ValueError(f"pool_prompts needs prompts as tokens of the last block, but {reason}")


def _choose_engine(
    model: nn.Module,
    blocks: nn.ModuleList | nn.Sequential,
    depth: str,
    engine: Literal["auto", "kv", "concat"],
) -> tuple[Literal["kv", "concat"], str]:
    """The engine, and why."""
    blocker = _kv_obstacle(blocks, depth)
    if engine == "kv" and blocker is not None:
        raise ValueError(f"engine='kv' is not exact here: {blocker}; use 'auto' or 'concat'")
    if engine != "concat" and blocker is None:
        return "kv", "outputs at the prompts are discarded, so keys and values are all that prompts need"
    reason = concat_blocker(blocks, model)
    if reason is not None:
        raise TypeError(f"model cannot take prompts: {reason}")
    return "concat", "asked for" if engine == "concat" else f"'kv' is not exact here: {blocker}"


def _kv_obstacle(blocks: nn.ModuleList | nn.Sequential, depth: str) -> str | None:
    if depth == "shallow":
        return "in depth='shallow' each block needs what the one before made of the prompts"
    for index, block in enumerate(blocks):
        reason = kv_blocker(block)
        if reason is not None:
            return f"block {index + 1}: {reason}"
    return None


def _initial_prompts(model: nn.Module, prompts: Prototypes | Tensor | int, depth: str) -> Tensor:
    """A new tensor [L or 1, N_p, D] on the model's device, at least float32."""
    layers = len(get_blocks(model)) if depth == "deep" else 1
    values = getattr(prompts, "prompts", prompts)
    if isinstance(values, int | np.integer) and not isinstance(values, bool):
        values = _random_prompts(model, layers, check_int("prompts", values, 0))
    if not isinstance(values, Tensor):
        raise TypeError(f"prompts must be Prototypes, a tensor or an integer, got {type(prompts).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"prompts must be a floating-point tensor, got {values.dtype}")
    tensor = "prompts.prompts" if hasattr(prompts, "prompts") else "prompts"
    _check_prompt_shape(values, layers, embed_dim(model), depth, tensor)
    finite = torch.isfinite(values).all(dim=-1).flatten()
    if not values.is_meta and not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise NonFiniteError(f"prompts must be finite, but row {row} holds NaN or infinity", row=row)
    device, dtype = placement(model)
    # Steps of learning are too small for half precision; blocks cast prompts to their own dtype.
    return values.detach().to(device, torch.promote_types(dtype, torch.float32), copy=True)


def _check_prompt_shape(values: Tensor, layers: int, width: int, depth: str, tensor: str) -> None:
    """ValueError unless `values` are [layers, N_p, width]; `tensor` is what the caller would call them."""
    given = tuple(values.shape)
    if values.ndim == 3 and given[0] == layers and given[2] == width:
        return
    hint = ""
    if values.ndim == 3 and given[2] == width:
        if depth == "shallow":
            hint = f"; build them with depth='shallow', or give the first layer, {tensor}[:1]"
        elif given[0] == 1:
            hint = (
                "; build them with depth='deep', or repeat the one layer for all, "
                f"{tensor}.expand({layers}, -1, -1)"
            )
    raise ValueError(
        f"prompts must have shape [{layers}, N_p, {width}] for depth={depth!r}, got {list(given)}{hint}"
    )


def _random_prompts(model: nn.Module, layers: int, num_prompts: int) -> Tensor:
    """VPT's uniform initialisation: U(-v, v) with v = sqrt(6 / (3 * patch height * patch width + D))."""
    height, width = patch_size(model)
    bound = math.sqrt(6 / (3 * height * width + embed_dim(model)))
    return torch.empty(layers, num_prompts, embed_dim(model)).uniform_(-bound, bound)


def _check_block_call(
    block: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], known: tuple[str, ...]
) -> None:
    if not isinstance(x, Tensor) or x.ndim != 3:
        found = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{type(block).__name__} must take tokens [B, N, D] to be prompted, got {found}")
    # Masks, grids and positions speak of the image's tokens only.
    extra = [f"argument {i + 2}" for i, value in enumerate(args) if value is not None and value is not False]
    extra += [
        name
        for name, value in kwargs.items()
        if name not in known and value is not None and value is not False
    ]
    if extra:
        raise TypeError(f"{type(block).__name__} cannot be prompted when it is also given {', '.join(extra)}")


def _check_class_names(names: Sequence[str] | None, num_classes: int | None) -> None:
    if names is None:
        return
    is_sequence = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_sequence or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names must be a sequence of strings or None, got {names!r}")
    if num_classes is not None and len(names) != num_classes:
        raise ValueError(
            f"class_names must hold one name for each of {num_classes} classes, got {len(names)}"
        )


def _check_finite_nmi(values: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad) > 0:
        layer, image = bad[0].tolist()
        raise NonFiniteError(
            f"block {layer + 1}: its prompts or the tokens of image {image} hold NaN or infinity",
            image=image,
            layer=layer,
        )


def _check_metadata(path: str | os.PathLike[str], found: dict[str, str], expected: dict[str, str]) -> None:
    for key in _CHECKED_METADATA:
        if key in found and key in expected and found[key] != expected[key]:
            raise ValueError(
                f"{Path(path)} was saved with {key} {found[key]!r}, but this model has {expected[key]!r}"
            )


def _check_shapes(
    path: str | os.PathLike[str], found: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    if found.keys() != expected.keys():
        raise ValueError(f"{Path(path)} holds {sorted(found)}, but this model needs {sorted(expected)}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{Path(path)} holds {name} of shape {list(found[name].shape)}, "
                f"but this model needs {list(tensor.shape)}"
            )
