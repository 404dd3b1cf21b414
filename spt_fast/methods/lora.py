"""LoRA: products of low rank beside layers of the blocks (Hu et al. 2022), by Hugging Face's peft.

W x + (alpha / r) B A x, on timm's fused `attn.qkv` (W [3 D, D]): A [r, D] starts from Kaiming's uniform
distribution with a = sqrt(5), B [3 D, r] from zero, so that the start is the model. Queries, keys and values
share A, as in NOAH's code (Zhang et al. 2022), which does not scale: alpha is r unless it is given.

Numbers on `qkv` (width D, L blocks): 4 r D L, as many as two pairs of matrices for queries and values have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from spt_fast.methods.base import Common
from spt_fast.methods.peft_config import check_target
from spt_fast.methods.peft_tuners import PeftTuner
from spt_fast.support.arguments import check_int, check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LoRA(PeftTuner):
    """LoRA on layers of the blocks, and the head.

    Args:
        rank: r.
        alpha: the product is scaled by alpha / r; None is r.
        dropout: probability with which training drops an element of what enters A (NOAH: 0.1).
        target: as in `PeftTuner`.

    Raises:
        ImportError, TypeError, ValueError: as `PeftTuner`.
    """

    method = "lora"

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        target: str | Sequence[str] = "qkv",
        **common: Unpack[Common],
    ) -> None:
        options: dict[str, Any] = {
            "rank": check_int("rank", rank, 1),
            "alpha": None if alpha is None else check_number("alpha", alpha, above=0, otherwise="or None"),
            "dropout": check_number("dropout", dropout, 0, below=1),
            "target": check_target(target),
        }
        config = {
            "r": options["rank"],
            "lora_alpha": options["rank"] if alpha is None else options["alpha"],
            "lora_dropout": options["dropout"],
        }
        self._tune(model, options, {"type": "lora", "target": options["target"], "config": config}, common)
