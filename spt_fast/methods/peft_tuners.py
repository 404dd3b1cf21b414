"""Any tuner of Hugging Face's peft, on layers of the blocks; `lora` is one of them.

What a tuner computes, how it starts and how many numbers it learns: https://huggingface.co/docs/peft. Its
layers take the place of the layers that they are named after, and hold these. peft is installed with
`pip install 'spt_fast[peft]'`, and loaded by these methods only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spt_fast.methods.added_modules import check_calls, learned_like
from spt_fast.methods.base import Blocks, Common, TunedViT
from spt_fast.methods.peft_config import check_config, check_target, config_of, load_peft
from spt_fast.support.errors import first_line

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class PeftTuner(TunedViT):
    """A tuner of peft on layers of the blocks, and the head.

    Args:
        type: of the tuner, as peft calls it: "lora", "loha", "lokr", "ia3", "oft", "hra", ...
        target: name of the layers in a block, such as "qkv", "proj", "fc1", "fc2"; several as a list, or with
            commas between them.
        config: more arguments of peft's class of that type (`LoraConfig`), as a dict or as JSON.

    Raises:
        ImportError: peft is not installed.
        TypeError: the model has no such layers, or peft cannot tune them.
        ValueError: there is no such type, or peft does not take the arguments.
    """

    method = "peft"
    merges = True

    def __init__(
        self,
        model: nn.Module,
        *,
        type: str = "lora",
        target: str | Sequence[str] = "qkv",
        config: Mapping[str, Any] | str | None = None,
        **common: Unpack[Common],
    ) -> None:
        options = {"type": type, "target": check_target(target), "config": check_config(config)}
        self._tune(model, options, options, common)

    def _tune(
        self, model: nn.Module, options: Mapping[str, Any], tuner: Mapping[str, Any], common: Common
    ) -> None:
        """Take `model` over with the tuner that "type", "target" and "config" of `tuner` say."""
        super().__init__(model, options, **common)
        self._config = config_of(tuner["type"], tuner["target"], tuner["config"])
        self._take_over()

    def _install(self, blocks: Blocks) -> None:
        own = {id(tensor) for tensor in _tensors(self.model).values()}
        self._snapshot.keep_tree(self.model)
        _inject(self._config, blocks)
        for name, _ in self._layers():
            _, index, inside = name.split(".", 2)
            check_calls(self.method, blocks[int(index)], inside)
        added = {name: each for name, each in _tensors(self.model).items() if id(each) not in own}
        for tensor in added.values():
            if tensor.requires_grad:
                tensor.data = tensor.data.to(**learned_like(self.model))
        self._added = list(added)

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        """peft's layers, by their names in the model."""
        kind = load_peft("tuners.tuners_utils").BaseTunerLayer
        for name, module in self.model.named_modules():
            if isinstance(module, kind):
                yield name, module

    def _learned(self) -> dict[str, Tensor]:
        tensors = _tensors(self.model)
        return {f"model.{name}": tensors[name] for name in self._added}

    def train(self, mode: bool = True) -> Self:
        """Set the mode of peft's parts too, which may have dropout."""
        super().train(mode)
        if not self._snapshot.is_restored:
            for _, layer in self._layers():
                layer.training = mode
                for name, child in layer.named_children():
                    child.train(mode and name != "base_layer")
        return self

    def _folded(self) -> dict[str, Tensor]:
        folded: dict[str, Tensor] = {}
        for name, layer in self._layers():
            merged: Any = copy.deepcopy(layer)
            try:
                merged.merge()
            except (AttributeError, NotImplementedError) as error:
                kind = self._config.peft_type.value
                raise ValueError(f"merge is not what peft's {kind} can do ({first_line(error)})") from error
            folded |= {f"{name}.{each}": value for each, value in merged.get_base_layer().named_parameters()}
        return folded


@torch.no_grad()
def _inject(config: Any, blocks: Blocks) -> None:
    """Let peft put its layers into `blocks`, and keep the weights that are there as they are."""
    before = [(parameter, parameter.detach().clone()) for parameter in blocks.parameters()]
    try:
        load_peft("mapping").inject_adapter_in_model(config, blocks)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise TypeError(f"peft cannot tune the blocks of this model ({first_line(error)})") from error
    finally:
        vars(blocks).pop("peft_config", None)
        changed = [pair for pair in before if not pair[0].is_meta and not torch.equal(*pair)]
        for parameter, value in changed:
            parameter.data = value
    if changed:
        raise ValueError("config must not let peft change the weights of the model, as pissa and olora do")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return model.state_dict(keep_vars=True)
