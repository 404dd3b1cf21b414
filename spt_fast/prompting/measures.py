"""What prompts and tokens have to do with each other in a forward pass, block by block: NMI, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import block_input_hooks, get_blocks
from spt_fast.prompting.attention_maps import attention_maps_of, check_attention
from spt_fast.prompting.checks import check_block_input, check_layers
from spt_fast.prompting.engines import KeysValues
from spt_fast.prompting.nmi import check_finite_nmi, nmi_per_image
from spt_fast.prompting.timm_methods import TimmMethods
from spt_fast.support.arguments import check_int
from spt_fast.support.modes import evaluation_mode


class Measures(TimmMethods):
    """Base of `PromptedViT`: what is measured while it runs."""

    prompts: nn.Parameter
    _num_blocks: int

    @property
    def num_prompts(self) -> int:
        """N_p, the number of prompts per layer."""
        return self.prompts.shape[1]

    @property
    def prompted_blocks(self) -> nn.ModuleList | nn.Sequential:
        """The model's blocks in their order, which run with prompts.

        Raises:
            RuntimeError: the model has been released.
        """
        self._check_not_released()
        return get_blocks(self.model)

    @torch.no_grad()
    def layer_nmi(self, images: Tensor) -> Tensor:
        """Sigmoid NMI (eq. 7, 8) of each block's prompts and the patch tokens entering it; [L, B].

        Shallow: from block 2 on, the prompts are outputs of the block before, others for each image. Runs
        without gradients and in evaluation mode, so that neither dropout nor a batch norm before the head
        takes part.

        Raises:
            NonFiniteError: a prompt or a token of some block is NaN or infinite; names block and image.
        """
        per_layer: list[Tensor] = []

        def measure(layer: int, x: Tensor) -> None:
            per_layer.append(nmi_per_image(*self.prompts_and_tokens(layer, x)))

        with evaluation_mode(self), block_input_hooks(self.prompted_blocks, measure):
            self.forward(images)
        values = torch.stack(per_layer)
        check_finite_nmi(values)
        return values

    def attention_maps(self, images: Tensor, layers: Iterable[int] | None = None) -> list[Tensor]:
        """How much each token of an image attends to each token and each prompt, block by block.

        Args:
            images: [B, C, height, width].
            layers: which, from 0, or from the end, such as -1; layer i is block i + 1. None is all of them.

        Returns:
            For each of `layers` the softmax weights [B, H, N, N + N_p] of its H heads. Rows and the first N
            columns are the tokens of the image in timm's order, prefix tokens first; the last N_p columns are
            the prompts, in a shallow model what the blocks before have made of them. Rows add up to 1.
            Gradients flow through the weights, so that `torch.no_grad()` saves memory.

        Raises:
            TypeError: a block's attention is none that engine "kv" knows; `layers` are no integers.
            ValueError: there is no such layer, or `images` are none that the model takes.
        """
        every = self.prompted_blocks
        wanted = check_layers("layers", layers, len(every))
        check_attention(every[index] for index in wanted)
        return self._maps_of(wanted, lambda: self.forward_features(images))

    def prompts_and_tokens(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The prompts that a block attends to, and the patch tokens that enter it.

        Args:
            layer: of the block, from 0; layer i is block i + 1.
            x: [B, N, D], what enters the block: prefix tokens, patch tokens and, in a shallow model from the
                second block on, prompts.

        Returns:
            Prompts [1, N_p, D], in their own dtype and the same for each image; or, where x holds them,
            [B, N_p, D]. Patch tokens [B, N_e, D]. All are views, through which gradients flow.

        Raises:
            TypeError, ValueError: there is no such layer, or `x` is no such tensor.
        """
        if check_int("layer", layer, 0) >= self._num_blocks:
            raise ValueError(f"layer must be below {self._num_blocks}, the number of blocks, got {layer}")
        num_prompts = self.num_prompts if self.depth == "shallow" and layer > 0 else 0
        num_patches = check_block_input(x, self.prompts.shape[2], self._num_prefix_tokens, num_prompts)
        tokens = x[:, self._num_prefix_tokens :]
        if self.depth == "deep" or layer == 0:
            return self.prompts[layer : layer + 1], tokens
        return tokens[:, num_patches:], tokens[:, :num_patches]

    def _maps_of(self, wanted: list[int], run: Callable[[], object]) -> list[Tensor]:
        """`attention_maps` of these blocks in a forward pass that `run` makes."""
        return attention_maps_of(self.prompted_blocks, wanted, self._split_input, run, self._more_keys)

    def _more_keys(self, layer: int, of_prompts: KeysValues) -> KeysValues:
        """What the attention of a block takes beside tokens."""
        return of_prompts

    def _split_input(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The prompts [N_p, D] or [B, N_p, D] that a block attends to, and all tokens of the image in `x`."""
        if self.depth == "deep" or layer == 0:
            return self.prompts[layer], x
        count = x.shape[1] - self.num_prompts
        return x[:, count:], x[:, :count]
