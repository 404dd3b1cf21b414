"""What the tests of methods share: the textbook form of a ViT, and what holds for every method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import spt_fast
from spt_fast.methods.base import TunedViT
from spt_fast.training import fit

SIZES = {"B": "vit_base_patch16_224", "L": "vit_large_patch16_224", "H": "vit_huge_patch14_224"}
Block = Callable[[int, nn.Module, Tensor], Tensor]


def plain_block(index: int, block: Any, x: Tensor) -> Tensor:
    """A block as in the textbook, part by part."""
    x = x + block.ls1(attention(block.attn, block.norm1(x)))
    return x + block.ls2(block.mlp(block.norm2(x)))


def attention(attn: Any, x: Tensor, qkv: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, then the projection."""
    batch, length, width = x.shape
    packed = (attn.qkv if qkv is None else qkv)(x)
    q, k, v = packed.reshape(batch, length, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return attn.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))


def textbook(
    plain: Any,
    images: Tensor,
    block: Block = plain_block,
    embed: Callable[[Tensor], Tensor] = lambda x: x,
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Tokens [B, N, D] of a ViT of timm after its final norm."""
    x = plain.norm_pre(plain._pos_embed(embed(plain.patch_embed(images))))
    for index, each in enumerate(plain.blocks):
        x = block(index, each, x)
    return (plain.norm if norm is None else norm)(x)


class Pair:
    """A tuned model, and its model as it was before, with the same head.

    Attributes:
        tuned: in float64, with everything that learns moved away from where it starts.
        plain: the model before, frozen.
        images: some, for both.
    """

    def __init__(self, model: Any, method: str, images: Tensor, **options: Any) -> None:
        model = model.double().eval()
        self.plain = copy.deepcopy(model).requires_grad_(False)
        self.tuned = spt_fast.tune(model, method, num_classes=7, **options)
        self.plain.reset_classifier(7)
        self.images = images.double()
        stir(self.tuned)

    def take_head(self) -> None:
        """Give `plain` the head of `tuned`, the same parameters."""
        for name in ("head", "attn_pool"):
            if isinstance(getattr(self.plain, name, None), nn.Module):
                setattr(self.plain, name, getattr(self.tuned.model, name))

    def check(self, logits: Tensor) -> None:
        """Assert that outputs and all gradients of `tuned` are those of `logits`, from the textbook."""
        found = self.tuned(self.images)
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-9)
        learned = self.tuned.trainable_parameters()
        weights = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(3))
        expected = torch.autograd.grad((logits * weights).sum(), learned)
        gradients = torch.autograd.grad((found * weights).sum(), learned)
        for parameter, gradient, other in zip(learned, gradients, expected, strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-9)
            assert parameter.requires_grad
            assert gradient.abs().max() > 0


@torch.no_grad()
def stir(tuned: TunedViT) -> None:
    """Move all that learns by noise, as training would."""
    generator = torch.Generator().manual_seed(2)
    for parameter in tuned.trainable_parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.add_(0.1 * noise.to(parameter.dtype))


@pytest.fixture
def pair(make_vit: Any, make_images: Any) -> Callable[..., Pair]:
    """Factory of pairs; `flavour` are options of the model, the rest those of the method."""

    def make(method: str, flavour: dict[str, Any] | None = None, **options: Any) -> Pair:
        made = Pair(make_vit(**(flavour or {})), method, make_images(3), **options)
        made.take_head()
        return made

    return make


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def shape_of(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """What a model is made of: each module, its class, its mode and its own attributes."""
    return {
        name: (id(module), type(module), module.training, sorted(vars(module)), "forward" in vars(module))
        for name, module in model.named_modules()
    }


def check_life(make_vit: Any, images: Tensor, path: Path, method: str, **options: Any) -> None:
    """Assert what every method owes: copies, files and the model back, bit for bit."""
    model = make_vit(init_values=0.3)
    model.blocks[1].norm1.bias.requires_grad_(False)
    before, shape, outputs = state_of(model), shape_of(model), model.eval()(images)
    shape = shape_of(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    tuned = spt_fast.tune(model, method, num_classes=7, **options)
    assert tuned.method == method
    assert all(parameter.dtype == torch.float32 for parameter in tuned.trainable_parameters())
    stir(tuned)
    logits = tuned.eval()(images)
    assert not torch.allclose(
        logits, spt_fast.tune(make_vit(init_values=0.3), method, num_classes=7, **options)(images)
    )
    assert torch.equal(copy.deepcopy(tuned)(images), logits)
    copied = copy.deepcopy(tuned)
    stir(copied)
    assert torch.equal(tuned(images), logits)

    tokens = tuned.forward_features(images)
    assert torch.equal(tuned.forward_head(tokens), logits)
    assert torch.equal(tuned.forward_intermediates(images, 1)[0], tokens)
    with pytest.raises(ValueError, match="tokens must be"):
        tuned.forward_head(tokens[..., 1:])

    tuned.class_names = tuple("abcdefg")
    tuned.save(path)
    state = {name: tensor.clone() for name, tensor in tuned.learned_state_dict().items()}
    assert sum(tensor.numel() for tensor in state.values()) == tuned.num_trainable()
    given_back = tuned.release()
    assert given_back is model
    after = state_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert shape_of(model) == shape
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert torch.equal(model(images), outputs)

    loaded = spt_fast.load_tuned(path, model)
    assert loaded.method == method
    assert loaded.options == tuned.options
    assert loaded.class_names == tuple("abcdefg")
    assert torch.equal(loaded.eval()(images), logits)
    other = spt_fast.tune(make_vit(init_values=0.3), method, num_classes=7, **options)
    other.load_learned_state_dict(state)
    assert torch.equal(other.eval()(images), logits)
    # Nothing refers to `loaded` any more: the model is given back.
    del loaded, other
    assert shape_of(model) == shape
    assert torch.equal(model(images), outputs)


def check_merge(make_vit: Any, images: Tensor, method: str, options: dict[str, Any], **flavour: Any) -> None:
    """Assert that merging gives a plain model of timm with the same outputs."""
    model = make_vit(**flavour).eval()
    plain = shape_of(model)
    tuned = spt_fast.tune(model, method, num_classes=7, **options)
    stir(tuned)
    logits = tuned.eval()(images)
    merged = tuned.merge()
    assert merged is model
    assert {name for name in shape_of(merged) if not name.startswith("head")} == {
        name for name in plain if not name.startswith("head")
    }
    torch.testing.assert_close(merged(images), logits, rtol=1e-5, atol=1e-5)


def check_variants(make_vit: Any, make_images: Any, method: str, **options: Any) -> None:
    """Assert that checkpointing and compiling change nothing, and that half precision comes near."""
    images = make_images(2)

    def gradients(prepare: Callable[[TunedViT], Any], **use: Any) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(5)
        tuned = spt_fast.tune(make_vit(), method, num_classes=7, **options, **use)
        stir(tuned)
        prepare(tuned)
        logits = tuned.train()(images)
        learned = tuned.trainable_parameters()
        return logits.detach(), list(torch.autograd.grad(logits.float().square().sum(), learned))

    logits, grads = gradients(lambda tuned: None)
    again, same = gradients(lambda tuned: tuned.model.set_grad_checkpointing())
    assert torch.equal(again, logits)
    assert all(torch.equal(one, other) for one, other in zip(same, grads, strict=True))
    half, rough = gradients(lambda tuned: None, weight_dtype="bf16")
    assert (half - logits).norm() < 0.05 * logits.norm()
    assert all(grad.dtype == torch.float32 for grad in rough)
    small = torch.cat([grad.flatten() for grad in grads])
    assert (torch.cat([grad.flatten() for grad in rough]) - small).norm() < 0.15 * small.norm()

    tuned = spt_fast.tune(make_vit(depth=1), method, num_classes=7, **options)
    compiled = torch.compile(tuned, fullgraph=True, backend="eager")
    assert torch.equal(compiled(images), tuned(images))

    narrow = spt_fast.tune(make_vit().to(torch.bfloat16), method, num_classes=7, **options)
    out = narrow(images)
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    of_head = {id(parameter) for parameter in narrow.model.head.parameters()}
    for parameter in narrow.trainable_parameters():
        assert parameter.dtype == torch.float32 or id(parameter) in of_head


def check_learns(make_vit: Any, make_loader: Any, method: str, **options: Any) -> None:
    """Assert that twenty steps of `fit` lower the loss, and leave the rest of the model alone."""
    loader = make_loader()
    tuned = spt_fast.tune(make_vit(), method, num_classes=4, **options)
    learned = {id(parameter) for parameter in tuned.trainable_parameters()}
    frozen = [(each, each.clone()) for each in tuned.parameters() if id(each) not in learned]
    history = fit(tuned, loader, epochs=4, lr=1e-2, warmup_epochs=0, progress=False)
    assert history.loss[-1] < 0.9 * history.loss[0]
    assert all(torch.equal(each, value) for each, value in frozen)


def check_refused(images: Tensor, model: nn.Module, message: str, method: str, **options: Any) -> None:
    """Assert that a method refuses `model` with such a message, and leaves it as it was."""
    outputs, shape, state = model.eval()(images), shape_of(model), state_of(model)
    with pytest.raises((TypeError, ValueError), match=message):
        spt_fast.tune(model, method, num_classes=7, **options)
    assert shape_of(model) == shape
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert torch.equal(model(images), outputs)


@pytest.fixture(scope="session")
def book() -> SimpleNamespace:
    """The textbook forms."""
    return SimpleNamespace(vit=textbook, block=plain_block, attention=attention)


@pytest.fixture
def check(make_vit: Any, make_images: Any, make_loader: Any, tmp_path: Path) -> SimpleNamespace:
    """Assertions that hold for every method: `check.life("ssf", **options)`."""
    return SimpleNamespace(
        life=partial(check_life, make_vit, make_images(2), tmp_path / "task.safetensors"),
        merge=partial(check_merge, make_vit, make_images(2)),
        variants=partial(check_variants, make_vit, make_images),
        learns=partial(check_learns, make_vit, make_loader),
        refused=partial(check_refused, make_images(2)),
    )


@pytest.fixture(scope="session")
def count() -> Callable[..., dict[str, int]]:
    """What a method learns on ViT-B/16, ViT-L/16 and ViT-H/14, by default without a head; without weights."""
    with torch.device("meta"):
        models = {size: timm.create_model(name, num_classes=0) for size, name in SIZES.items()}

    def numbers(method: str, num_classes: int = 0, **options: Any) -> dict[str, int]:
        found = {}
        for size, model in models.items():
            tuned = spt_fast.tune(model, method, num_classes=num_classes, **options)
            found[size] = tuned.num_trainable()
            tuned.release()
        return found

    return numbers
