"""Run a backbone over images and hand out the patch tokens that enter its blocks, without changing it.

Limits: no gradients; block inputs must be [B, N, D] with the same N and D in every block.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import (
    block_input_hooks,
    check_channels,
    get_blocks,
    image_dtype,
    num_prefix_tokens,
    unwrap,
)
from spt_fast.backbones.snapshot import check_free
from spt_fast.support.arguments import check_choice
from spt_fast.support.waiting import move

DEPTHS = ("deep", "shallow")

TokenCallback = Callable[[int, Tensor], None]


class _ForwardDone(BaseException):
    """Ends a forward pass after the last tokens. No `Exception`, so that no model catches it."""


class TokenExtractor:
    """Context manager that hands the patch tokens of each block's input to a callback.

    `callback(layer, tokens)` gets `tokens` [B, N_e, D], a view of the block's input without its prefix tokens
    (class, registers); copy what is needed after the call. Layer i is the input of block i + 1 (E_i of
    eq. 2). The forward pass ends with the last layer wanted: the last block, the final norm and the head
    never run, and for "shallow" no block does. With `last_output` all blocks run, and one more layer,
    numbered `n_layers`, is the output of the last block.

    Within the context the model is in evaluation mode. After it, also after an exception, the training flags
    of all modules are what they were and the hooks are removed. Parameters and buffers are never changed.

    Args:
        model: a timm Vision Transformer, or any module that calls its `.blocks` in order, each once, on
            tokens [B, N, D]; it may be inside `torch.compile` or DistributedDataParallel.
        position_embedding: False hands out, for layer 0, what `model.patch_embed` returns.
        callback: called without autocast and without gradients, in order of layers.
        depth: "deep", the input of every block, or "shallow", of the first block only.
        amp_dtype: autocast dtype; None is bfloat16 on CUDA and no autocast elsewhere, torch.float32 none.

    Raises:
        TypeError: `model` has no blocks, or its blocks do not work on tokens [B, N, D].
        ValueError: `depth` or `amp_dtype` is none of the allowed, or `model` belongs to a tuned model.
    """

    def __init__(
        self,
        model: nn.Module,
        callback: TokenCallback,
        *,
        depth: str = "deep",
        position_embedding: bool = True,
        last_output: bool = False,
        amp_dtype: torch.dtype | None = None,
    ) -> None:
        check_choice("depth", depth, DEPTHS)
        self._model = unwrap(model)
        self._blocks = get_blocks(self._model)
        check_free(self._model)
        self._prefix = num_prefix_tokens(self._model)
        self._patch_embed = None if position_embedding else _patch_embed_of(self._model)
        self._patches: Any = None  # what it returned
        self._callback = callback
        self._last_output = last_output
        self.n_layers = len(self._blocks) if depth == "deep" else 1
        self.device, self._dtype = _device_of(self._model), image_dtype(self._model)
        self._amp_dtype = _choose_amp_dtype(amp_dtype, self.device)
        self._cleanup = ExitStack()
        self._entered = False
        self._start_batch(0)

    @property
    def n_outputs(self) -> int:
        """Number of layers handed to the callback: `n_layers`, and one more with `last_output`."""
        return self.n_layers + int(self._last_output)

    def name(self, layer: int) -> str:
        """What `layer` is, in words, for messages."""
        return "the output of the last block" if layer == self.n_layers else f"the input of block {layer + 1}"

    def __enter__(self) -> TokenExtractor:
        with ExitStack() as stack:
            # Flags are set one by one: a module's own `train` may do more, which nothing would undo.
            for module in self._model.modules():
                stack.callback(setattr, module, "training", module.training)
                module.training = False
            if self._patch_embed is not None:
                stack.callback(self._patch_embed.register_forward_hook(self._keep_patches).remove)
            projection = getattr(getattr(self._model, "patch_embed", None), "proj", None)
            if isinstance(projection, nn.Module):
                stack.callback(projection.register_forward_hook(self._count_patches).remove)
            stack.enter_context(block_input_hooks(self._blocks[: self.n_layers], self._take_input))
            if self._last_output:
                stack.callback(self._blocks[-1].register_forward_hook(self._output_hook).remove)
            self._cleanup = stack.pop_all()
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._entered = False
        self._cleanup.close()

    def run(self, images: Tensor) -> None:
        """Run the model on `images` [B, C, H, W] of any floating-point dtype and device.

        Raises:
            ValueError: the model refuses the images, for their size or their channels.
            TypeError: the blocks are not called in order on tokens [B, N, D].
        """
        if not self._entered:
            raise RuntimeError("TokenExtractor.run works inside `with extractor:` only")
        check_channels(images, self._model)
        self._start_batch(len(images))
        try:
            with torch.no_grad(), _without_compilation(self._model), self._autocast():
                self._model(move(images, self.device, self._dtype))
        except _ForwardDone:
            return
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            # No block has run, so the embedding of the images has failed.
            if self._shape is not None or isinstance(error, torch.OutOfMemoryError):
                raise
            raise ValueError(
                f"images of shape {list(images.shape)} do not fit {type(self._model).__name__}: {error}"
            ) from error
        raise TypeError(
            f"model must call each of its `.blocks`, but {type(self._model).__name__} returned "
            f"without calling block {self._next + 1}"
        )

    def _start_batch(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._next = 0
        self._shape: torch.Size | None = None
        self._num_patches: int | None = None

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None)

    def _take_input(self, layer: int, tokens: Any) -> None:
        self._hand_out(layer, tokens)
        if layer == self.n_outputs - 1:
            raise _ForwardDone

    def _output_hook(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> NoReturn:
        self._hand_out(self.n_layers, output[0] if isinstance(output, (tuple, list)) else output)
        raise _ForwardDone

    def _hand_out(self, layer: int, tokens: Any) -> None:
        self._check_tokens(layer, tokens)
        self._next = layer + 1
        patches = tokens[:, self._prefix :]
        if layer == 0 and self._patch_embed is not None:
            patches = self._take_patches(patches.shape)
        with torch.autocast(self.device.type, enabled=False):
            self._callback(layer, patches)

    def _count_patches(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4:
            self._num_patches = output.shape[2] * output.shape[3]

    def _keep_patches(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        self._patches = output

    def _take_patches(self, shape: torch.Size) -> Tensor:
        """What `patch_embed` returned, as patch tokens of `shape` [B, N_e, D]."""
        patches, self._patches = self._patches, None
        if isinstance(patches, Tensor) and patches.ndim == 4:
            patches = patches.flatten(1, 2)  # [B, H, W, D] where a model takes images of any size
        if not isinstance(patches, Tensor) or patches.shape != shape:
            found = list(patches.shape) if isinstance(patches, Tensor) else type(patches).__name__
            raise TypeError(
                f"position_embedding=False needs a model whose `patch_embed` returns its patch tokens "
                f"{list(shape)}, got {found}"
            )
        return patches

    def _check_tokens(self, layer: int, tokens: Any) -> None:
        first_shape, self._shape = self._shape, getattr(tokens, "shape", torch.Size())
        if layer != self._next:
            raise TypeError(
                f"model must call its `.blocks` in order and each once, got {self.name(layer)} "
                f"where {self.name(self._next)} was due"
            )
        found = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        if not isinstance(tokens, Tensor) or tokens.ndim != 3 or len(tokens) != self._batch_size:
            raise TypeError(
                f"model must have `.blocks` that map tokens [B, N, D] to [B, N, D], "
                f"but for B = {self._batch_size} {self.name(layer)} is {found}"
            )
        if tokens.shape[1] <= self._prefix:
            raise TypeError(
                f"{self.name(layer)} must hold patch tokens after {self._prefix} prefix tokens, got {found}"
            )
        if layer == 0 and self._prefix > 0 and tokens.shape[1] == self._num_patches:
            raise TypeError(
                f"model must have its {self._prefix} prefix tokens before the patches in every block, "
                f"but {type(self._model).__name__} gives block 1 its {self._num_patches} patches alone: "
                "its class token joins later"
            )
        if first_shape is not None and tokens.shape != first_shape:
            raise TypeError(
                f"model must keep the shape of its tokens from block to block, "
                f"but {self.name(layer)} is {found} after {list(first_shape)}"
            )


def _patch_embed_of(model: nn.Module) -> nn.Module:
    patch_embed = getattr(model, "patch_embed", None)
    if not isinstance(patch_embed, nn.Module):
        raise TypeError(
            f"position_embedding=False needs a model with `patch_embed`, which {type(model).__name__} has not"
        )
    return patch_embed


def _device_of(model: nn.Module) -> torch.device:
    floating = (p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point())
    anchor = next(floating, None)
    return torch.device("cpu") if anchor is None else anchor.device


def _choose_amp_dtype(given: torch.dtype | None, device: torch.device) -> torch.dtype | None:
    if given is None:
        return torch.bfloat16 if device.type == "cuda" else None
    if given not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"amp_dtype must be torch.bfloat16, torch.float16 or torch.float32, got {given}")
    return None if given == torch.float32 else given


def _without_compilation(model: nn.Module) -> AbstractContextManager[Any]:
    # `model.compile()` leaves no wrapper to remove. The compiler, which loads slowly, is needed only then.
    if any(module._compiled_call_impl is not None for module in model.modules()):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()
