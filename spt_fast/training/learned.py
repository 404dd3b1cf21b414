"""What training changes in a model: copies of it, its values put back, and its moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from timm.utils import ModelEmaV3  # type: ignore[attr-defined]
from torch import Tensor, nn

from spt_fast.backbones.anatomy import unwrap
from spt_fast.methods.base import TunedViT


def learned(tuned: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that require a gradient and of all buffers, by their names."""
    return {name: tensor.detach().clone() for name, tensor in _changing(tuned)}


def take_back(tuned: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give `tuned` the values that `learned` copied.

    Raises:
        ValueError: names or shapes are not those of what `tuned` learns; nothing has changed then.
    """
    own = dict(_changing(tuned))
    if own.keys() != values.keys():
        other = sorted(own.keys() ^ values.keys())
        raise ValueError(f"the values must be of what the model learns, but differ in {', '.join(other[:4])}")
    put_back(own, values)


def put_back(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give tensors the values of these names; errors as `take_back`."""
    for name, value in values.items():
        if name not in own or own[name].shape != value.shape:
            wanted = list(own[name].shape) if name in own else "absent"
            raise ValueError(f"{name} must be {wanted}, got {list(value.shape)}")
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def frozen_but_saved(tuned: nn.Module) -> dict[str, Tensor]:
    """What the file of `tuned` holds beside what `learned` copies, such as frozen prompts; no copies."""
    inner = unwrap(tuned)
    if not isinstance(inner, TunedViT):
        return {}
    changing = {id(tensor) for _, tensor in _changing(inner)}
    return {name: tensor for name, tensor in inner.saved_tensors().items() if id(tensor) not in changing}


class Average:
    """The exponential moving average of what `tuned` learns; its frozen part is not copied."""

    def __init__(self, tuned: nn.Module, decay: float) -> None:
        self._tuned = tuned
        self._source = _Learned(tuned)
        self._average = ModelEmaV3(self._source, decay=decay)

    def update(self) -> None:
        """Move towards the present values by a share of 1 - decay."""
        self._average.update(self._source)

    def values(self) -> dict[str, Tensor]:
        """The averages, by the names of `learned`; no copies."""
        averages = self._average.module.state_dict().values()
        return dict(zip((name for name, _ in _changing(self._tuned)), averages, strict=True))

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Go on from the averages that `values` gave."""
        with torch.no_grad():
            for name, tensor in self.values().items():
                tensor.copy_(values[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the context, `tuned` has the averages."""
        present = learned(self._tuned)
        take_back(self._tuned, self.values())
        try:
            yield
        finally:
            take_back(self._tuned, present)


class _Learned(nn.Module):
    """A module that holds nothing but what `tuned` learns: the same tensors, in the same order."""

    def __init__(self, tuned: nn.Module) -> None:
        super().__init__()
        for index, (_, tensor) in enumerate(_changing(tuned)):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(str(index), tensor)
            else:
                self.register_buffer(str(index), tensor)


def _changing(tuned: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, each) for name, each in tuned.named_parameters() if each.requires_grad)
    yield from tuned.named_buffers()
