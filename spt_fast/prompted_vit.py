"""A frozen Vision Transformer with learnable prompts in its blocks and a new head (Sec. 3.1, 3.3)."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from spt_fast.backbone import describe, embed_dim, get_blocks, num_prefix_tokens
from spt_fast.engines import append_prompts, concat_blocker, drop_prompts, kv_blocker, kv_forward
from spt_fast.errors import NonFiniteError
from spt_fast.files import read_safetensors, write_safetensors
from spt_fast.ops.nmi import sigmoid_nmi

if TYPE_CHECKING:
    import os

    from spt_fast.prototypes import Prototypes

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
        model: a timm Vision Transformer, or a module whose `.blocks` map [B, N, D] to [B, N, D].
        prompts: `Prototypes`; a floating-point tensor [L, N_p, D] (deep) or [1, N_p, D] (shallow), which is
            copied; or an int, that many prompts from VPT's uniform initialisation by torch's global random
            generator. N_p = 0 is the model without prompts.
        depth: "deep" or "shallow".
        num_classes: size of a new head; None keeps the model's head, which is then trained on as it is.
        freeze_prompts: train the head only (Table 4a).
        engine: "kv" adds the prompts to keys and values, computed once per step for the whole batch (deep,
            with timm's standard attention only); "concat" is the textbook form; "auto" takes "kv" where it is
            exact. Outputs and gradients are equal up to rounding.
        pool_prompts: average the last block's outputs of prompts and patches alike, not those of patches
            alone; for models with `global_pool="avg"`.

    Attributes:
        prompts: Parameter [L or 1, N_p, D], at least float32 also where the model is narrower.
        engine: "kv" or "concat", as chosen.
        depth: "deep" or "shallow".
        model: the model taken over.

    Raises:
        TypeError: `model` has no blocks to prompt, or an argument is of the wrong type.
        ValueError: prompts of another depth or width, an unknown option, or one this model cannot honour.
    """

    prompts: nn.Parameter
    model: nn.Module

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
    ) -> None:
        super().__init__()
        _check_choice("depth", depth, ("deep", "shallow"))
        _check_choice("engine", engine, ("auto", "kv", "concat"))
        blocks = get_blocks(model)
        _check_not_taken(blocks)
        _check_num_classes(model, num_classes)
        if pool_prompts:
            _check_pools_patches(model)
        values = _initial_prompts(model, prompts, depth)

        self.depth = depth
        self.engine = _choose_engine(blocks, depth, engine)
        self.pool_prompts = bool(pool_prompts)
        self._num_blocks = len(blocks)
        self._num_prefix_tokens = num_prefix_tokens(model)
        was_training = model.training
        self._loan: _Loan | None = _Loan(model)
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

    @property
    def head(self) -> nn.Module:
        """The trainable classifier; a ModuleList of both where the model has two (distilled DeiT)."""
        self._check_held()
        classifiers = _classifiers(self.model)
        return classifiers[0] if len(classifiers) == 1 else nn.ModuleList(classifiers)

    @property
    def num_prompts(self) -> int:
        """N_p, the number of prompts per layer."""
        return self.prompts.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, C, height, width]."""
        self._check_images(images)
        return self.model(images)  # type: ignore[no-any-return]

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens [B, N, D] after the last block and the final norm; with `pool_prompts`, [B, N + N_p, D]."""
        self._check_images(images)
        return self.model.forward_features(images)  # type: ignore[no-any-return, operator]

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what `forward_features` returned; with `pre_logits`, the classifier's inputs."""
        self._check_held()
        return self.model.forward_head(tokens, pre_logits=pre_logits)  # type: ignore[no-any-return, operator]

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
            for module in (*_classifiers(self.model), getattr(self.model, "head_drop", None)):
                if module is not None:
                    module.train(mode)
        return self

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write prompts and head, nothing else, to a safetensors file.

        Raises:
            FileExistsError: there is such a file, and not `overwrite`.
            FileNotFoundError: the folder does not exist.
        """
        self._check_held()
        write_safetensors(path, self._tuned_tensors(), self._metadata(), kind=_FILE_KIND, overwrite=overwrite)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read back what `save` wrote, into a PromptedViT built the same way; a misfit changes nothing.

        Raises:
            ValueError: another backbone, depth or pooling; prompts or head of another shape (both shapes are
                named); or a file that is truncated or of another kind.
            FileNotFoundError: there is no such file.
        """
        self._check_held()
        tensors, metadata = read_safetensors(path, kind=_FILE_KIND)
        mine = self._tuned_tensors()
        _check_shapes(path, tensors, mine)
        _check_metadata(path, metadata, self._metadata())
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])

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

    def _take_over(self, blocks: nn.ModuleList | nn.Sequential, num_classes: int | None) -> None:
        self.model.requires_grad_(False)
        _separate_head(self.model)
        if num_classes is not None:
            self.model.reset_classifier(num_classes)  # type: ignore[operator]
        for classifier in _classifiers(self.model):
            if num_classes is not None:
                # Older timm makes the new head in float32 on the CPU.
                classifier.to(*_placement(self.model))
            classifier.requires_grad_(True)
        for index, block in enumerate(blocks):
            run = self._run_with_kv if self._runs_kv(index) else self._run_with_tokens
            # Shadowing `forward` on the instance leaves the module tree, its names and its hooks alone.
            setattr(block, "forward", functools.partial(run, index, block, block.forward))  # noqa: B010

    def _runs_kv(self, index: int) -> bool:
        """Pooling needs outputs at the prompts' positions, so the last block then takes them as tokens."""
        return self.engine == "kv" and not (self.pool_prompts and index == self._num_blocks - 1)

    def _run_with_kv(
        self, index: int, block: nn.Module, original: _BlockForward, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        _check_block_call(block, x, args, kwargs)
        return kv_forward(block, x, self.prompts[index].to(x.dtype))

    def _run_with_tokens(
        self, index: int, block: nn.Module, original: _BlockForward, x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        _check_block_call(block, x, args, kwargs)
        if self.depth == "deep" or index == 0:
            x = append_prompts(x, self.prompts[index].to(x.dtype))
        x = original(x)
        is_last = index == self._num_blocks - 1
        keep = self.pool_prompts if is_last else self.depth == "shallow"
        return x if keep else drop_prompts(x, self.num_prompts)

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
        return {
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


class _Loan:
    """What is needed to give a model back as it was taken over."""

    def __init__(self, model: nn.Module) -> None:
        self._grad_flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._training = {name: module.training for name, module in model.named_modules()}
        self._children = dict(model._modules)
        self._attributes = dict(vars(model))
        self._forwards = [vars(block).get("forward") for block in get_blocks(model)]
        self._placement = _placement(model)

    def give_back(self, model: nn.Module) -> None:
        for block, forward in zip(get_blocks(model), self._forwards, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                setattr(block, "forward", forward)  # noqa: B010
        model._modules.clear()
        model._modules.update(self._children)
        vars(model).update(self._attributes)
        self._follow_moves(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._grad_flags[name])
        for name, module in model.named_modules():
            module.training = self._training[name]

    def _follow_moves(self, model: nn.Module) -> None:
        """Bring the modules that were set aside to where the model has been moved meanwhile."""
        placement = _placement(model)
        if placement != self._placement:
            for classifier in _classifiers(model):
                classifier.to(*placement)


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    for parameter in get_blocks(model).parameters():
        return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def _classifiers(model: nn.Module) -> list[nn.Module]:
    """The model's classifier or classifiers; empty where it has none."""
    get_classifier = getattr(model, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else getattr(model, "head", None)
    candidates = found if isinstance(found, (tuple, list)) else (found,)
    return [module for module in candidates if isinstance(module, nn.Module)]


def _separate_head(model: nn.Module) -> None:
    """Put a copy in the place of each child that holds a classifier: the original is never trained."""
    for classifier in _classifiers(model):
        for name, child in list(model.named_children()):
            if any(module is classifier for module in child.modules()):
                setattr(model, name, copy.deepcopy(child))


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


def _check_num_classes(model: nn.Module, num_classes: int | None) -> None:
    if num_classes is None:
        return
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes must be an integer or None, got {type(num_classes).__name__}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be an integer >= 1, got {num_classes}")
    if not callable(getattr(model, "reset_classifier", None)):
        raise TypeError(
            f"num_classes needs a model with timm's `reset_classifier`, got {type(model).__name__}; "
            "leave it None to keep the model's own head"
        )


def _check_pools_patches(model: nn.Module) -> None:
    pool = getattr(model, "global_pool", None)
    if pool != "avg":
        raise ValueError(f"pool_prompts needs a model with global_pool='avg', got {pool!r}")


def _choose_engine(
    blocks: nn.ModuleList | nn.Sequential, depth: str, engine: Literal["auto", "kv", "concat"]
) -> Literal["kv", "concat"]:
    blocker = _kv_obstacle(blocks, depth)
    if engine == "kv" and blocker is not None:
        raise ValueError(f"engine='kv' is not exact here: {blocker}; use 'auto' or 'concat'")
    if engine != "concat" and blocker is None:
        return "kv"
    for block in blocks:
        reason = concat_blocker(block)
        if reason is not None:
            raise TypeError(f"model cannot take prompts: {reason}")
    return "concat"


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
    if isinstance(values, int) and not isinstance(values, bool):
        values = _random_prompts(model, layers, values)
    if not isinstance(values, Tensor):
        raise TypeError(f"prompts must be Prototypes, a tensor or an integer, got {type(prompts).__name__}")
    if not values.is_floating_point():
        raise TypeError(f"prompts must be a floating-point tensor, got {values.dtype}")
    _check_prompt_shape(values, layers, embed_dim(model), depth)
    finite = torch.isfinite(values).all(dim=-1).flatten()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise NonFiniteError(f"prompts must be finite, but row {row} holds NaN or infinity", row)
    device, dtype = _placement(model)
    # Steps of learning are too small for half precision; blocks cast prompts to their own dtype.
    return values.detach().to(device, torch.promote_types(dtype, torch.float32), copy=True)


def _check_prompt_shape(values: Tensor, layers: int, width: int, depth: str) -> None:
    given = tuple(values.shape)
    if values.ndim == 3 and given[0] == layers and given[2] == width:
        return
    hint = ""
    if values.ndim == 3 and given[2] == width:
        hint = (
            "; build them with depth='shallow', or give the first layer, prompts[:1]"
            if depth == "shallow"
            else "; build them with depth='deep', or repeat one layer's for all, as Prototypes.layer(0) does"
        )
    raise ValueError(
        f"prompts must have shape [{layers}, N_p, {width}] for depth={depth!r}, got {list(given)}{hint}"
    )


def _random_prompts(model: nn.Module, layers: int, num_prompts: int) -> Tensor:
    """VPT's uniform initialisation: U(-v, v) with v = sqrt(6 / (3 * patch height * patch width + D))."""
    if num_prompts < 0:
        raise ValueError(f"prompts must be an integer >= 0, got {num_prompts}")
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is None:
        raise TypeError("prompts given as an integer need a model that states `.patch_embed.patch_size`")
    height, width = (patch, patch) if isinstance(patch, int) else patch
    bound = math.sqrt(6 / (3 * height * width + embed_dim(model)))
    return torch.empty(layers, num_prompts, embed_dim(model)).uniform_(-bound, bound)


def _check_block_call(block: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if x.ndim != 3:
        raise TypeError(
            f"{type(block).__name__} must take tokens [B, N, D] to be prompted, got shape {tuple(x.shape)}"
        )
    # Masks, grids and positions speak of the image's tokens only.
    extra = [f"argument {i + 2}" for i, value in enumerate(args) if value is not None and value is not False]
    extra += [name for name, value in kwargs.items() if value is not None and value is not False]
    if extra:
        raise TypeError(f"{type(block).__name__} cannot be prompted when it is also given {', '.join(extra)}")


def _check_finite_nmi(values: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad) > 0:
        layer, image = bad[0].tolist()
        raise NonFiniteError(
            f"block {layer + 1}: its prompts or the tokens of image {image} hold NaN or infinity",
            image,
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
