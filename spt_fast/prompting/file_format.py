"""The file of a `PromptedViT`: prompts and head, and the facts that say which model they fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from spt_fast.backbones.identity import check_facts, describe, describe_norm
from spt_fast.support.files import read_safetensors, write_safetensors

if TYPE_CHECKING:
    import os

_KIND = "prompted_vit"
# Facts that need not agree: the shape of the head tells the number of classes, and their names are read.
_FACTS_OF_THE_HEAD = ("num_classes", "class_names")


@dataclass(frozen=True)
class TunedState:
    """What `PromptedViT.save` writes.

    Attributes:
        tensors: "prompts" [L or 1, N_p, D], and "head." before each name of the head's own state.
        facts: those of `describe` and `describe_norm`, and `prompt_depth`, `pool_prompts`, `global_pool`;
            `num_classes` where the model states it, `class_names` (JSON) where they are set.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        prompts: Tensor,
        head: nn.Module,
        *,
        depth: str,
        pool_prompts: bool,
        class_names: Sequence[str] | None,
    ) -> TunedState:
        """The state of prompts and head on `model`; the tensors are theirs, not copies."""
        of_head = {f"head.{name}": value for name, value in head.state_dict(keep_vars=True).items()}
        facts = {
            **describe(model),
            **describe_norm(model),
            "prompt_depth": depth,
            "pool_prompts": str(pool_prompts),
            "global_pool": str(getattr(model, "global_pool", "")),
        }
        num_classes = getattr(model, "num_classes", None)
        if num_classes is not None:
            facts["num_classes"] = str(num_classes)
        if class_names is not None:
            facts["class_names"] = json.dumps(list(class_names))
        return cls({"prompts": prompts, **of_head}, facts)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> TunedState:
        """What a file holds.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, or no file of a `PromptedViT`.
        """
        return cls(*read_safetensors(path, kind=_KIND))

    def write(self, path: str | os.PathLike[str], *, overwrite: bool) -> None:
        """Write to a safetensors file, completely or not at all."""
        write_safetensors(path, self.tensors, self.facts, kind=_KIND, overwrite=overwrite)

    @property
    def depth(self) -> Literal["deep", "shallow"]:
        return "shallow" if self.facts["prompt_depth"] == "shallow" else "deep"

    @property
    def pool_prompts(self) -> bool:
        return self.facts["pool_prompts"] == "True"

    @property
    def num_classes(self) -> int | None:
        number = self.facts.get("num_classes")
        return None if number is None else int(number)

    def size_of_new_head(self, model: nn.Module) -> int | None:
        """What `num_classes` a `PromptedViT` of this state needs on `model`; None keeps the model's head."""
        if self.num_classes == 0 and not any(name.startswith("head.") for name in self.tensors):
            return 0
        same = self.num_classes is None or self.num_classes == getattr(model, "num_classes", None)
        return None if same else self.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        names = self.facts.get("class_names")
        return None if names is None else tuple(json.loads(names))

    def check_fits(
        self, path: str | os.PathLike[str], own: TunedState, *, allow_other_backbone: bool = False
    ) -> None:
        """ValueError where this state, read from `path`, cannot take the place of a model's `own`."""
        _check_shapes(path, self.tensors, own.tensors)
        expected = {name: fact for name, fact in own.facts.items() if name not in _FACTS_OF_THE_HEAD}
        check_facts(path, self.facts, expected, allow_other_backbone=allow_other_backbone)


def _check_shapes(
    path: str | os.PathLike[str], found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    if found.keys() != expected.keys():
        raise ValueError(f"{Path(path)} holds {sorted(found)}, but this model needs {sorted(expected)}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{Path(path)} holds {name} of shape {list(found[name].shape)}, "
                f"but this model needs {list(tensor.shape)}"
            )
