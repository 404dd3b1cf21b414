"""GateVPT: shallow prompts, a gate behind each block but the last, a temperature in each attention.

Block i makes P_i' of its prompts P_{i-1}, and hands on

    P_i = g_i P_i' + (1 - g_i) P_{i-1},  g_i = sigmoid(gates[i - 1]),  i = 1 .. L - 1,

so that a closed gate hands the prompts on as they came. In its attention, softmax(scale q k^T / t_i) has a
temperature t_i = temperatures[i - 1], clamped to [0.01, 10].

Source: Yoo et al., "Improving Visual Prompt Tuning for Self-supervised Vision Transformers", ICML 2023, and
the released code (MIT), whose defaults these are: 100 prompts, as VPT draws them; gates -10, nearly closed;
temperatures 1. Learned numbers: N_p D + (L - 1) + L; 76,823 for ViT-B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import get_blocks
from spt_fast.methods.base import Blocks
from spt_fast.methods.prompt_variant import PromptUse, PromptVariant
from spt_fast.prompting.engines import kv_attentions, unknown_attention
from spt_fast.prompting.prompted_blocks import PromptedBlocks
from spt_fast.support.arguments import check_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Unpack

    from spt_fast.prototypes.result import Prototypes

_COLDEST, _HOTTEST = 0.01, 10.0


class GateVPT(PromptVariant):
    """`model` with shallow prompts, gates and temperatures.

    Args:
        prompts: what the prompts [1, N_p, D] start from, as in `PromptedViT`.
        gate: what the logits of the gates start from.
        use: options of `PromptedViT`.

    Attributes:
        gates: Parameter [L - 1], logits.
        temperatures: Parameter [L]. Beyond the limits they act as the limit, with the gradient of the limit,
            so that they can come back.

    Raises:
        TypeError, ValueError: as `PromptedViT`; an attention has no place for a temperature.
    """

    method = "gate-vpt"
    gates: nn.Parameter
    temperatures: nn.Parameter

    def __init__(
        self,
        model: nn.Module,
        prompts: Prototypes | Tensor | int,
        *,
        gate: float = -10.0,
        **use: Unpack[PromptUse],
    ) -> None:
        self._own_options = {"gate": check_number("gate", gate)}
        super().__init__(model, prompts, depth="shallow", **use)

    @staticmethod
    def _blocker(block: nn.Module) -> str | None:
        reason = unknown_attention(block)
        if reason is None and not all(hasattr(attention, "q_norm") for _, attention in kv_attentions(block)):
            reason = "its attention has no q_norm, behind which queries are divided by the temperature"
        return reason

    def _learn(self, values: Tensor) -> None:
        super()._learn(values)
        depth = len(get_blocks(self.model))
        gates = values.new_full((depth - 1,), self.options["gate"])
        # A single block has no gate; DDP would wait for a gradient that never comes.
        self.gates = nn.Parameter(gates, requires_grad=depth > 1)
        self.temperatures = nn.Parameter(values.new_ones(depth))

    def _make_blocks(self, **how: Any) -> PromptedBlocks:
        return _GatedBlocks(self._parameters, **how)

    def _install(self, blocks: Blocks) -> None:
        super()._install(blocks)
        for index, block in enumerate(blocks):
            for _, attention in kv_attentions(block):
                norm: Any = attention.q_norm
                self._snapshot.replace_forward(norm, _Tempered(self._parameters, index, norm.forward))


class _GatedBlocks(PromptedBlocks):
    """Hands on a mixture of the prompts that enter a block and those that leave it."""

    def _leave(self, index: int, is_last: bool, entered: Tensor, left: Tensor) -> Tensor:
        if is_last:
            return left
        count = left.shape[1] - len(self._layer(0))
        gate = torch.sigmoid(self._parameters["gates"][index]).to(left.dtype)
        mixed = gate * left[:, count:] + (1 - gate) * entered[:, count:]
        return torch.cat((left[:, :count], mixed), dim=1)


class _Tempered:
    """The forward of a norm of queries, with a temperature behind it."""

    def __init__(self, parameters: dict[str, Any], index: int, original: Callable[[Tensor], Tensor]) -> None:
        self._parameters, self._index, self._original = parameters, index, original

    def __call__(self, queries: Tensor) -> Tensor:
        queries = self._original(queries)
        given: Tensor = self._parameters["temperatures"][self._index]
        # The value of the limit, with the gradient of what is given.
        temperature = given.detach().clamp(_COLDEST, _HOTTEST) + (given - given.detach())
        return queries / temperature.to(queries.dtype)
