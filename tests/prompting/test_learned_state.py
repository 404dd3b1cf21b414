"""`learned_state_dict`: prompts and head without the backbone, for other people's trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from spt_fast import PromptedViT
from spt_fast.support.errors import NonFiniteError

MakeTuned = Callable[..., PromptedViT]


@pytest.fixture
def make_tuned(make_vit: Callable[..., VisionTransformer]) -> MakeTuned:
    def make(seed: int = 0, **options: Any) -> PromptedViT:
        model = make_vit(**options)
        torch.manual_seed(seed)
        return PromptedViT(model, 4, num_classes=3).eval()

    return make


def test_it_is_what_save_writes(make_tuned: MakeTuned, tmp_path: Path) -> None:
    tuned = make_tuned()
    tuned.save(tmp_path / "tuned.safetensors")
    state, written = tuned.learned_state_dict(), load_file(tmp_path / "tuned.safetensors")
    assert state.keys() == written.keys() == {"prompts", "head.weight", "head.bias"}
    assert all(torch.equal(state[name], written[name]) for name in state)
    assert not any(tensor.requires_grad for tensor in state.values())
    assert sum(map(torch.numel, state.values())) == sum(map(torch.numel, tuned.trainable_parameters()))


@pytest.mark.parametrize("model_class", [VisionTransformer, VisionTransformerDistilled])
def test_another_one_takes_it(model_class: type[VisionTransformer], make_tuned: MakeTuned) -> None:
    first, second = (make_tuned(seed, model_class=model_class) for seed in (0, 1))
    images = torch.rand(2, 3, 32, 32)
    assert not torch.equal(first(images), second(images))
    parameters = second.trainable_parameters()
    result = second.load_learned_state_dict(first.learned_state_dict())
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert torch.equal(first(images), second(images))
    assert all(one is other for one, other in zip(parameters, second.trainable_parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state: state.pop("head.bias"), ValueError, r"state lacks head\.bias; this model"),
        (
            lambda state: state.update(x=torch.ones(1)),
            ValueError,
            "state holds x, which nothing that this model learns has",
        ),
        (
            lambda state: state.update({f"model.{number}": torch.ones(1) for number in range(9)}),
            ValueError,
            r"state holds model\.0, model\.1, model\.2, 6 more, which",
        ),
        (lambda state: state["prompts"][1, 0, 0].fill_(torch.nan), NonFiniteError, r"prompts\[1\] holds NaN"),
        (lambda state: state.update({"head.bias": torch.ones(4)}), ValueError, r"head.bias of shape \[4\]"),
        (lambda state: state.update({"head.bias": 1.0}), TypeError, "head.bias must be a tensor, got float"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    change: Callable[[dict[str, Any]], object], error: type[Exception], message: str, make_tuned: MakeTuned
) -> None:
    tuned, state = (
        make_tuned(),
        {name: tensor + 1 for name, tensor in make_tuned().learned_state_dict().items()},
    )
    before = {name: tensor.clone() for name, tensor in tuned.learned_state_dict().items()}
    change(state)
    with pytest.raises(error, match=message):
        tuned.load_learned_state_dict(state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.learned_state_dict().items())


def test_a_path_is_no_state(make_tuned: MakeTuned) -> None:
    with pytest.raises(
        TypeError, match="state must be a dict of tensors, as learned_state_dict gives, got str"
    ):
        make_tuned().load_learned_state_dict("last.pt")  # type: ignore[arg-type]


def test_a_parameter_that_it_would_lose_is_named(make_tuned: MakeTuned) -> None:
    tuned = make_tuned()
    tuned.model.norm.requires_grad_(True)  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        tuned.learned_state_dict()
