"""What the methods share that are prompts with one more idea: their file, and prompts that are computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from spt_fast.methods.base import Blocks, Common
from spt_fast.methods.file_format import TunedState
from spt_fast.methods.prompted_vit import EngineWishes, PromptedViT
from spt_fast.ops.autocast import autocast_dtype
from spt_fast.prompting.prompted_blocks import PromptedBlocks

if TYPE_CHECKING:
    from typing_extensions import Self


def part_of(count: int, share: float) -> int:
    """floor(share * count), with `share` the decimal number that it is written as: 0.29 of 100 are 29."""
    return int(round(share * count, 9))


class PromptUse(Common, total=False):
    """Arguments that every method of prompts has; see `PromptedViT`."""

    freeze_prompts: bool
    pool_prompts: bool | None
    engine: Literal["auto", "kv", "concat"]
    prompt_dropout: float
    allow_other_backbone: bool


class PromptVariant(PromptedViT):
    """Base of these methods. `prompts` are what the blocks take; the file has the options of the method."""

    # Where the file has what the prompts start from.
    _start = "prompts"

    @staticmethod
    def _blocker(block: nn.Module) -> str | None:
        """Why the method cannot take a block, or None."""
        return None

    @classmethod
    def _check_blocks(cls, blocks: Blocks) -> None:
        for number, block in enumerate(blocks, start=1):
            reason = cls._blocker(block)
            if reason is not None:
                raise TypeError(f"model cannot be tuned by {cls.method!r}: block {number}: {reason}")

    @classmethod
    def _choose_engine(
        cls, model: nn.Module, blocks: Blocks, wanted: EngineWishes
    ) -> tuple[Literal["kv", "concat"], str]:
        cls._check_blocks(blocks)
        return super()._choose_engine(model, blocks, wanted)

    def _method_facts(self) -> dict[str, str]:
        return {"method": self.method, "pool_prompts": str(self.pool_prompts)}

    @classmethod
    def _opens(cls, state: TunedState) -> bool:
        return state.method == cls.method

    @classmethod
    def _built_as(cls, state: TunedState, model: nn.Module, **common: Any) -> Self:
        if cls._start not in state.tensors:
            raise ValueError(
                f"a file of {state.method!r} must hold {cls._start}, got {sorted(state.tensors)}"
            )
        start = cls._start_of(state)
        return cls(model, start, pool_prompts=state.pool_prompts, **state.options, **common)

    @classmethod
    def _start_of(cls, state: TunedState) -> Tensor | int:
        """Prompts [L or 1, N_p, D], or their number: an object of them then takes what the file holds."""
        return state.tensors[cls._start]


class ComputedPrompts(PromptVariant):
    """Base of methods whose prompts a module `source` computes, without inputs, from what it learns."""

    source: nn.Module
    _start = "source.prompts"

    def _make_source(self, values: Tensor) -> nn.Module:
        """`values` [L or 1, N_p, D] are what the prompts start from."""
        raise NotImplementedError

    @property
    def prompts(self) -> Tensor:  # type: ignore[override]
        """[L or 1, N_p, D], as blocks take them, at least float32; computed anew each time."""
        found: Tensor = self.source()
        return found

    def prompt_parameters(self) -> list[nn.Parameter]:
        return list(self.source.parameters())

    def _learn(self, values: Tensor) -> None:
        self.source = self._make_source(values)

    def _make_blocks(self, **how: Any) -> PromptedBlocks:
        return PromptedBlocks(self._parameters, source=self.source, **how)


def without_autocast(compute: Callable[[], Tensor], device: torch.device) -> Tensor:
    """`compute()` in the precision of what is learned, also under autocast and with `weight_dtype`."""
    if autocast_dtype(device.type) is None:
        return compute()
    with torch.autocast(device.type, enabled=False):
        return compute()
