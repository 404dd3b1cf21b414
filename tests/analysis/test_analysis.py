"""NMI and CKA per layer over a loader: against their definitions image by image, and clear errors."""

from __future__ import annotations

import pytest
import torch

from spt_fast.analysis.prompts import analyse, load_prompts
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.ops.cka_reference import hsic_reference
from spt_fast.ops.nmi_reference import sigmoid_nmi_reference
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.files import read_safetensors, write_safetensors


def prompts_for(layers: int, width: int = 32) -> torch.Tensor:
    return torch.randn(layers, 3, width)


def ratio_of_sums(prompts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """CKA of [M, N_p, D] and [M, N_e, D] over M images, channels as examples, from n x n kernels."""
    k, l = (features.double().mT @ features.double() for features in (prompts, tokens))  # noqa: E741
    cross, own_k, own_l = (
        sum(hsic_reference(*pair) for pair in zip(*kernels, strict=True))
        for kernels in ((k, l), (k, k), (l, l))
    )
    return cross / (own_k * own_l).sqrt()


def block_inputs(tuned: PromptedViT, images: torch.Tensor) -> list[torch.Tensor]:
    """What enters each block, prefix tokens left out and prompts of a shallow model left in."""
    seen: list[torch.Tensor] = []
    hooks = [
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
        for block in tuned.model.blocks
    ]
    try:
        tuned(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [tokens[:, tuned.model.num_prefix_tokens :] for tokens in seen]


@pytest.mark.parametrize("engine", ["kv", "concat"])
def test_deep_matches_definitions_image_by_image(flavour, engine, make_vit, make_loader):
    tuned = PromptedViT(make_vit(**flavour), prompts_for(3), engine=engine)
    loader = make_loader(7, 3)
    images = torch.cat([batch[0] for batch in loader])
    found = analyse(tuned, loader, progress=False)
    tokens = block_inputs(tuned, images)
    assert found.num_images == 7
    for layer in range(3):
        expected = sigmoid_nmi_reference(tuned.prompts[layer].detach(), tokens[layer])
        torch.testing.assert_close(found.nmi[:, layer].double(), expected, rtol=1e-3, atol=1e-6)
        for row in range(3):
            prompts = tuned.prompts[row].detach().expand(7, -1, -1)
            # Float32 forward passes in batches of another size.
            torch.testing.assert_close(
                found.cka[row, layer], ratio_of_sums(prompts, tokens[layer]), rtol=1e-4, atol=1e-5
            )


def test_shallow_takes_what_became_of_the_prompts(make_vit, make_loader):
    tuned = PromptedViT(make_vit(), prompts_for(1), depth="shallow")
    loader = make_loader(7, 3)
    images = torch.cat([batch[0] for batch in loader])
    found = analyse(tuned, loader, progress=False)
    first, *later = block_inputs(tuned, images)
    prompts = [tuned.prompts[0].detach().expand(7, -1, -1), *(tokens[:, -3:] for tokens in later)]
    tokens = [first, *(tokens[:, :-3] for tokens in later)]
    for layer in range(3):
        expected = [
            sigmoid_nmi_reference(p, t[None])[0] for p, t in zip(prompts[layer], tokens[layer], strict=True)
        ]
        torch.testing.assert_close(found.nmi[:, layer].double(), torch.stack(expected), rtol=1e-3, atol=1e-6)
        for row in range(3):
            expected = ratio_of_sums(prompts[row], tokens[layer])
            torch.testing.assert_close(found.cka[row, layer], expected, rtol=1e-4, atol=1e-5)


def test_size_of_batches_changes_nothing(vit, make_loader):
    tuned = PromptedViT(vit, prompts_for(3))
    one, many = (analyse(tuned, make_loader(10, size), progress=False) for size in (10, 4))
    torch.testing.assert_close(one.nmi, many.nmi, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(one.cka, many.cka, rtol=1e-4, atol=1e-5)


def test_max_images_stops_reading(vit, make_loader):
    tuned = PromptedViT(vit, prompts_for(3))
    batches = make_loader(40, 4)
    reader = iter(batches)
    found = analyse(tuned, reader, max_images=10, progress=False)
    assert found.num_images == 10
    assert len(list(reader)) == len(batches) - 3


def test_model_is_left_as_it_was(vit, make_loader):
    tuned = PromptedViT(vit, prompts_for(3)).train()
    before = tuned.prompts.detach().clone()
    analyse(tuned, make_loader(4, 4), progress=False)
    assert tuned.training
    assert tuned.prompts.requires_grad
    assert torch.equal(tuned.prompts, before)
    assert not any(block._forward_pre_hooks for block in vit.blocks)


def test_a_model_in_training_mode_is_measured_without_its_dropout(vit, make_loader):
    tuned = PromptedViT(vit, prompts_for(3), prompt_dropout=0.5, num_classes=2)
    expected = analyse(tuned.eval(), make_loader())
    found = analyse(tuned.train(), make_loader())
    assert tuned.training
    assert torch.equal(found.nmi, expected.nmi)
    assert torch.equal(found.cka, expected.cka)


def test_table_names_the_tokens_most_like_each_prompt(vit, make_loader):
    found = analyse(PromptedViT(vit, prompts_for(3)), make_loader(4, 4), progress=False)
    rows = [line.split() for line in found.table().splitlines()[2:]]
    assert [int(row[0]) for row in rows] == [1, 2, 3]
    assert [int(row[-1]) - 1 for row in rows] == found.cka.argmax(dim=1).tolist()


def test_tokens_that_are_not_finite_are_named_by_block(vit, make_loader):
    tuned = PromptedViT(vit, prompts_for(3))
    with torch.no_grad():
        vit.blocks[1].mlp.fc2.bias.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="tokens entering block 3 must be finite, but image 0") as raised:
        analyse(tuned, make_loader(4, 4), progress=False)
    assert (raised.value.image, raised.value.layer) == (0, 2)


def test_nothing_to_measure_is_refused(vit, make_loader):
    with pytest.raises(TypeError, match="tuned must be a PromptedViT, got VisionTransformer"):
        analyse(vit, make_loader(4, 2))
    with pytest.raises(ValueError, match="at least one batch of images, got none"):
        analyse(PromptedViT(vit, prompts_for(3)), [], progress=False)


def test_file_of_another_kind_is_refused(vit, tmp_path):
    path = tmp_path / "p.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_prompts(path, vit)


def test_the_reason_why_a_tuned_file_is_invalid_is_told(vit, tmp_path):
    path = tmp_path / "t.safetensors"
    PromptedViT(vit, 2).save(path)
    tensors, facts = read_safetensors(path, kind="prompted_vit")
    tensors["prompts"][0] = torch.inf
    write_safetensors(path, tensors, facts, kind="prompted_vit", overwrite=True)
    with pytest.raises(ValueError, match=r"valid tuned model \(prompts\[0\] holds NaN"):
        load_prompts(path, vit)
