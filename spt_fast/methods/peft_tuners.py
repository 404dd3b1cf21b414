"""Any tuner of Hugging Face's peft, on layers of the blocks; `lora` is one of them.

What a tuner computes, how it starts and how many numbers it learns: https://huggingface.co/docs/peft. Its
layers take the place of the layers that they are named after, and hold these. peft is installed with
`pip install 'spt_fast[peft]'`, and loaded by these methods only.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spt_fast.methods.added_modules import check_calls, learned_like
from spt_fast.methods.base import Blocks, Common, TunedViT
from spt_fast.support.arguments import check_choice
from spt_fast.support.errors import first_line

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

# These would train weights of the model itself, change how many layers it has, or train nothing.
_REFUSED = (
    "bias",
    "inference_mode",
    "layer_replication",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
# These need a loop, tokens or tasks of their own.
_NOT_HERE = ("adalora", "adaption_prompt", "poly", "shadow", "trainable_tokens")


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
        options = {"type": type, "target": check_target(target), "config": _check_config(config)}
        self._tune(model, options, options, common)

    def _tune(
        self, model: nn.Module, options: Mapping[str, Any], tuner: Mapping[str, Any], common: Common
    ) -> None:
        """Take `model` over with the tuner that "type", "target" and "config" of `tuner` say."""
        super().__init__(model, options, **common)
        self._config = _config_of(tuner["type"], tuner["target"], tuner["config"])
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
        kind = _peft("tuners.tuners_utils").BaseTunerLayer
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


def check_target(target: str | Sequence[str]) -> list[str]:
    """Names of layers, as a list; ValueError where there are none."""
    names = target.split(",") if isinstance(target, str) else target
    if not isinstance(names, Sequence) or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"target must be names of layers, such as 'qkv' or 'qkv,proj', got {target!r}")
    return [name.strip() for name in names]


def _check_config(config: Mapping[str, Any] | str | None) -> dict[str, Any]:
    try:
        found = json.loads(
            config if isinstance(config, str) else json.dumps({} if config is None else config)
        )
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"config must be a dict of what JSON knows, or the JSON of one, got {config!r}")
    for name in (name for name in found if name in _REFUSED):
        raise ValueError(f"config must say nothing of {name!r}: only what is added learns")
    return found


def _config_of(kind: str, target: list[str], arguments: Mapping[str, Any]) -> Any:
    """peft's object that says what to add."""
    mapping = _peft("mapping")
    configs = _by_name(mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    known = [
        name
        for name, tuner in _by_name(mapping.PEFT_TYPE_TO_TUNER_MAPPING).items()
        if "target_modules" in configs[name].__dataclass_fields__
        and not getattr(tuner, "uses_shared_state", False)
        and name not in _NOT_HERE
    ]
    config = configs[check_choice("type", kind, sorted(known))]
    try:
        return config(target_modules=target, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config must be arguments of peft's {config.__name__} ({first_line(error)})"
        ) from error


def _by_name(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(each.value).lower(): found for each, found in mapping.items()}


def _peft(module: str) -> Any:
    try:
        return import_module(f"peft.{module}")
    except ImportError as error:
        raise ImportError("the methods lora and peft need peft: pip install 'spt_fast[peft]'") from error


@torch.no_grad()
def _inject(config: Any, blocks: Blocks) -> None:
    """Let peft put its layers into `blocks`, and keep the weights that are there as they are."""
    before = [(parameter, parameter.detach().clone()) for parameter in blocks.parameters()]
    try:
        _peft("mapping").inject_adapter_in_model(config, blocks)
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
