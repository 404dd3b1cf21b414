"""Methods that are prompts with one more idea: each is its textbook form, and does what all methods do."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

import spt_fast
from spt_fast import PromptedViT, Recipe
from spt_fast.backbones.anatomy import block_input_hooks
from spt_fast.backbones.open import open_model
from spt_fast.methods.parameter_groups import parameter_groups
from spt_fast.methods.prompt_variant import part_of
from spt_fast.methods.registry import METHODS, load_tuned, options, tune
from spt_fast.methods.release import release
from spt_fast.training import fit
from spt_fast.training.build import build as build_by_recipe
from spt_fast.training.features import trains_head_only

FLAVOURS: dict[str, dict[str, Any]] = {
    "class-token": {},
    "registers-no-class": {"class_token": False, "reg_tokens": 3, "global_pool": "avg"},
    "pre-norm": {"pre_norm": True},
    "attention-pool": {"global_pool": "map", "class_token": False},
    "norms": {"qk_norm": True, "init_values": 0.3},
}
MakeViT = Callable[..., VisionTransformer]
MakeImages = Callable[..., Tensor]
DEPTH, WIDTH, HEADS, NUM_PROMPTS = 3, 32, 2, 5


@pytest.fixture(scope="module")
def images(make_images: MakeImages) -> Tensor:
    return make_images(3)


def attention(
    attn: Any,
    x: Tensor,
    others: Tensor | None = None,
    *,
    temperature: Tensor | float = 1.0,
    keys: Tensor | None = None,
    values: Tensor | None = None,
) -> Tensor:
    """Of tokens x [B, N, D] over `others` [B, M, D], None for themselves, and keys and values [H, m, d]."""

    def heads(tokens: Tensor) -> tuple[Tensor, ...]:
        parts = attn.qkv(tokens).reshape(*tokens.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        return tuple(parts.unbind(0))

    q = attn.q_norm(heads(x)[0])
    _, k, v = heads(x if others is None else others)
    k = attn.k_norm(k)
    if keys is not None and values is not None:
        k = torch.cat([k, torch.stack([keys] * len(x))], dim=2)
        v = torch.cat([v, torch.stack([values] * len(x))], dim=2)
    weights = torch.softmax(q @ k.mT * attn.scale / temperature, dim=-1)
    return attn.proj((weights @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.ls2(block.mlp(block.norm2(x)))  # type: ignore[no-any-return]


def with_prompts(x: Tensor, prompts: Tensor) -> Tensor:
    return torch.cat([x, torch.stack([prompts] * len(x))], dim=1)


def gate_vpt(tuned: Any, blocks: Any, x: Tensor) -> Tensor:
    count = x.shape[1]
    x = with_prompts(x, tuned.prompts[0])
    for i, block in enumerate(blocks):
        before = x[:, count:]
        temperature = tuned.temperatures[i]
        x = mlp(block, x + block.ls1(attention(block.attn, block.norm1(x), temperature=temperature)))
        if i < DEPTH - 1:
            g = tuned.gates[i].sigmoid()
            x = torch.cat([x[:, :count], g * x[:, count:] + (1 - g) * before], dim=1)
    return x[:, :count]


def e2vpt(tuned: Any, blocks: Any, x: Tensor) -> Tensor:
    count = x.shape[1]
    for i, block in enumerate(blocks):
        keys = tuned.kv_prompts[i, 0]
        values = keys if tuned.options["share"] else tuned.kv_prompts[i, 1]
        x = with_prompts(x, tuned.source.prompts[i])
        x = x + block.ls1(attention(block.attn, block.norm1(x), keys=keys, values=values))
        x = mlp(block, x)[:, :count]
    return x


def plain_deep(tuned: Any, blocks: Any, x: Tensor, prompts: Tensor) -> Tensor:
    count = x.shape[1]
    for i, block in enumerate(blocks):
        x = with_prompts(x, prompts[i])
        x = mlp(block, x + block.ls1(attention(block.attn, block.norm1(x))))[:, :count]
    return x


def vfpt(tuned: Any, blocks: Any, x: Tensor) -> Tensor:
    learned = tuned.source.prompts
    count = int(tuned.options["fraction"] * learned.shape[1])

    def dft(n: int) -> Tensor:
        angle = -2 * torch.pi * torch.outer(torch.arange(n), torch.arange(n)).double() / n
        return torch.complex(angle.cos(), angle.sin())

    before = learned[:, :count].to(torch.complex128)
    transformed = (dft(count) @ before @ dft(WIDTH)).real
    return plain_deep(tuned, blocks, x, torch.cat([transformed, learned[:, count:]], dim=1))


def bpt(tuned: Any, blocks: Any, x: Tensor) -> Tensor:
    source = tuned.source
    right = [*source.fixed, *source.right]
    prompts = [source.left[i] @ right[i] for i in range(DEPTH)]
    return plain_deep(tuned, blocks, x, torch.stack(prompts))


def cvpt(tuned: Any, blocks: Any, x: Tensor) -> Tensor:
    for i, block in enumerate(blocks):
        x = x + block.ls1(attention(block.attn, block.norm1(x)))
        prompts = block.norm1(torch.stack([tuned.prompts[i]] * len(x)))
        x = mlp(block, x + block.ls1(attention(block.attn, block.norm1(x), prompts)))
    return x


def heads_of(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normalised, and values [B, H, N, d] of tokens [B, N, D]."""
    parts = attn.qkv(x).reshape(*x.shape[:2], 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    return attn.q_norm(parts[0]), attn.k_norm(parts[1]), parts[2]


def inputs_of(tuned: Any, images: Tensor) -> list[Tensor]:
    """What enters each block."""
    inputs: list[Tensor] = []
    with block_input_hooks(tuned.model.blocks, lambda _, x: inputs.append(x)):
        tuned(images)
    return inputs


class Case(NamedTuple):
    """A method to test.

    Attributes:
        textbook: tokens that leave the blocks, [B, N, D], from those that enter them.
        options: of the method, in the tests; with them every part of it has an effect.
        learned: what it learns beside the head, of width D, L blocks and N prompts, without options.
    """

    textbook: Callable[[Any, Any, Tensor], Tensor]
    options: dict[str, Any]
    learned: Callable[[int, int, int], int]


CASES = {
    "gate-vpt": Case(gate_vpt, {"gate": 0.3}, lambda d, L, n: n * d + 2 * L - 1),
    "e2vpt": Case(e2vpt, {"num_kv": 3}, lambda d, L, n: L * d * (n + 5)),
    "vfpt": Case(vfpt, {"fraction": 0.6}, lambda d, L, n: n * d * L),
    "cvpt": Case(cvpt, {}, lambda d, L, n: n * d * L),
    "bpt": Case(bpt, {"rank": 3, "learned_bases": 2}, lambda d, L, n: L * n * 50 + 4 * 50 * d),
}
FORMS = {
    **{name: (name, case.options) for name, case in CASES.items()},
    "e2vpt-apart": ("e2vpt", {"num_kv": 3, "share": False}),
}
each_method = pytest.mark.parametrize("name", list(CASES))
each_form = pytest.mark.parametrize("form", list(FORMS))


def build(model: nn.Module, form: str, prompts: Any = NUM_PROMPTS, **use: Any) -> Any:
    """The method, everything that it learns moved away from where it starts."""
    name, given = FORMS[form]
    tuned = tune(model, name, prompts=prompts, **given, **use)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.2 * noise)
    return tuned


def gradients(tuned: Any, logits: Tensor) -> dict[str, Tensor]:
    named = {name: each for name, each in tuned.named_parameters() if each.requires_grad}
    return dict(zip(named, torch.autograd.grad(logits.square().sum(), list(named.values())), strict=True))


def logits_of_textbook(tuned: Any, plain: Any, textbook: Callable[..., Tensor], images: Tensor) -> Tensor:
    """By a copy of the model that was made before it was taken over, with the head that learns."""
    plain.head = tuned.model.head
    x = plain.norm_pre(plain.patch_drop(plain._pos_embed(plain.patch_embed(images))))
    logits: Tensor = plain.forward_head(plain.norm(textbook(tuned, plain.blocks, x)))
    return logits


@each_form
@pytest.mark.parametrize("flavour", list(FLAVOURS))
def test_equals_the_textbook(form: str, flavour: str, make_random: MakeViT, images: Tensor) -> None:
    given = images.double()
    model = make_random(**FLAVOURS[flavour]).double()
    plain = copy.deepcopy(model)
    tuned = build(model, form)
    found = tuned(given)
    expected = logits_of_textbook(tuned, plain, CASES[FORMS[form][0]].textbook, given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = gradients(tuned, found), gradients(tuned, expected)
    for name, gradient in ours.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-8, msg=name)


@each_method
@pytest.mark.parametrize("size", [("base", 16), ("large", 16), ("huge", 14)], ids=lambda size: size[0])
def test_counts_what_it_learns(name: str, size: tuple[str, int]) -> None:
    with torch.device("meta"):
        model = timm.create_model(f"vit_{size[0]}_patch{size[1]}_224", num_classes=0)
    tuned: Any = tune(model, name, num_classes=0)
    width, depth, count = model.embed_dim, len(model.blocks), tuned.prompts.shape[1]
    assert tuned.num_trainable(head=False) == CASES[name].learned(width, depth, count)


@each_form
def test_a_file_gives_it_back(form: str, make_random: MakeViT, images: Tensor, tmp_path: Path) -> None:
    tuned = build(make_random(), form, num_classes=7)
    expected = tuned(images)
    tuned.save(tmp_path / "file")
    again: Any = load_tuned(tmp_path / "file", make_random())
    assert type(again) is type(tuned)
    assert (again.method, again.options) == (tuned.method, tuned.options)
    assert again.engine == tuned.engine
    assert torch.equal(again(images), expected)
    state = again.learned_state_dict()
    assert state.keys() == tuned.learned_state_dict().keys()
    again.load_learned_state_dict({key: value + 1 for key, value in state.items()})
    again.load(tmp_path / "file")
    assert torch.equal(again(images), expected)
    vpt = PromptedViT(make_random(), NUM_PROMPTS, num_classes=7)
    with pytest.raises(ValueError, match="was tuned by"):
        vpt.load(tmp_path / "file")


@pytest.mark.parametrize("name", [*CASES, "linear"])
def test_a_file_fits_a_model_opened_to_average_prompts(
    name: str, make_images: MakeImages, tmp_path: Path
) -> None:
    """Methods whose prompts are no tokens, or that have none, average the patches there."""
    start: dict[str, Any] = {"prompts": NUM_PROMPTS} if name in CASES else {}
    tuned: Any = tune(open_model("shipped"), name, num_classes=3, **start).eval()
    images = make_images(2, size=64)
    expected = tuned(images)
    others = 0 if name in ("cvpt", "linear") else NUM_PROMPTS
    x = tuned.forward_features(images)
    assert x.shape[1] == 64 + tuned.model.num_prefix_tokens + others
    tuned.save(tmp_path / "file")
    again = load_tuned(tmp_path / "file", tuned.release()).eval()
    assert torch.equal(again(images), expected)


def fingerprint(model: nn.Module, images: Tensor) -> dict[str, Any]:
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "forwards": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "logits": model(images).detach(),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("flags", "modes", "forwards"):
        assert found[name] == expected[name]
    assert torch.equal(found["logits"], expected["logits"])
    assert all(torch.equal(found["state"][name], expected["state"][name]) for name in expected["state"])


@each_form
def test_the_model_comes_back_as_it_was(form: str, make_random: MakeViT, images: Tensor) -> None:
    model = make_random().train()
    before = fingerprint(model, images)
    tuned = build(model, form, num_classes=2)
    tuned(images).square().sum().backward()
    assert tuned.release() is model
    assert_same(fingerprint(model, images), before)
    tuned = build(model, form)
    tuned(images)
    gone = weakref.ref(tuned)
    del tuned
    gc.collect()
    assert gone() is None
    assert_same(fingerprint(model, images), before)


@each_form
def test_autocast_in_bfloat16(form: str, make_random: MakeViT, images: Tensor) -> None:
    tuned = build(make_random(), form)
    logits = tuned(images)
    exact = gradients(tuned, logits)
    with torch.autocast("cpu", torch.bfloat16):
        half = tuned(images)
    assert half.dtype == torch.bfloat16
    assert (half - logits).norm() / logits.norm() < 0.05
    for name, gradient in gradients(tuned, half.float()).items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), exact[name].flatten(), dim=0) > 0.98, name
    narrow = build(make_random(), form, weight_dtype="bf16")
    assert torch.equal(narrow(images), half)


# CVPT's prompts are no tokens, and GateVPT's always are.
OF_TWO_ENGINES = [form for form in FORMS if form not in ("cvpt", "gate-vpt")]


@pytest.mark.parametrize(
    ("form", "engine"), [*((form, "auto") for form in FORMS), *((form, "concat") for form in OF_TWO_ENGINES)]
)
def test_gradient_checkpointing(form: str, engine: str, make_random: MakeViT, images: Tensor) -> None:
    tuned = build(make_random(), form, engine=engine)
    plain = gradients(tuned, tuned(images))
    tuned.model.set_grad_checkpointing()
    saved = gradients(tuned, tuned(images))
    assert all(torch.equal(plain[name], saved[name]) for name in plain)


@pytest.mark.parametrize("form", OF_TWO_ENGINES)
def test_both_engines_agree(form: str, make_random: MakeViT, images: Tensor) -> None:
    of_kv, of_concat = (build(make_random().double(), form, engine=each) for each in ("kv", "concat"))
    one, other = (tuned(images.double()) for tuned in (of_kv, of_concat))
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    theirs = gradients(of_concat, other)
    for name, gradient in gradients(of_kv, one).items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-8)


@each_form
def test_a_copy_is_independent(form: str, make_random: MakeViT, images: Tensor) -> None:
    tuned = build(make_random(), form)
    expected = tuned(images)
    other = copy.deepcopy(tuned)
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            parameter.mul_(-1)
    assert torch.equal(other(images), expected)
    assert not torch.allclose(tuned(images), expected)


@each_form
def test_compiles_without_graph_break(form: str, make_random: MakeViT, images: Tensor) -> None:
    tuned = build(make_random(), form)
    compiled = torch.compile(tuned, backend="eager", fullgraph=True)
    logits, expected = compiled(images), tuned(images)
    torch.testing.assert_close(logits, expected)
    theirs = gradients(tuned, expected)
    for name, gradient in gradients(tuned, logits).items():
        torch.testing.assert_close(gradient, theirs[name])


def test_data_parallel_gives_the_same_gradients(make_random: MakeViT, images: Tensor, tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for form in FORMS:
            tuned = build(make_random(), form)
            expected = gradients(tuned, tuned(images))
            nn.parallel.DistributedDataParallel(tuned)(images).square().sum().backward()
            named = dict(tuned.named_parameters())
            for name, gradient in expected.items():
                torch.testing.assert_close(named[name].grad, gradient)
    finally:
        torch.distributed.destroy_process_group()


@each_form
def test_fixed_prompts_change_nothing(form: str, make_random: MakeViT, images: Tensor) -> None:
    tuned = build(make_random(), form)
    with torch.no_grad(), tuned.fixed_prompts():
        first, second = tuned(images), tuned(images)
        for parameter in tuned.trainable_parameters():
            parameter.add_(0.1)
        moved = tuned(images)
    assert torch.equal(first, second)
    assert torch.equal(moved, tuned(images))
    assert not torch.equal(moved, first)


@each_method
def test_twenty_steps_lower_the_loss(name: str, make_random: MakeViT, make_loader: Any) -> None:
    tuned = tune(make_random(), name, prompts=4, num_classes=4)
    start = [each.detach().clone() for each in tuned.trainable_parameters()]
    losses = fit(tuned, make_loader(32), epochs=5, lr=1e-2, warmup_epochs=0, progress=False).loss
    assert losses[-1] < 0.8 * losses[0]
    moved = tuned.trainable_parameters()
    assert all((old != new).any() for old, new in zip(start, moved, strict=True))


@each_method
def test_starts_from_prototypes(name: str, make_vit: MakeViT, make_loader: Any, images: Tensor) -> None:
    model = make_vit().eval()
    depth = options(name).get("depth", METHODS[name].depth)
    prototypes = spt_fast.build_prototypes(model, make_loader(16), num_prompts=6, depth=depth, progress=False)
    tuned: Any = tune(model, name, prompts=prototypes)
    assert tuned.prompts.shape == prototypes.prompts.shape
    assert tuned(images).isfinite().all()
    assert tuned.layer_nmi(images).shape == (DEPTH, 3)


class Counted(nn.Module):
    """A block that ties a layer to the number of its tokens, so that prompts would be too many."""

    def __init__(self, dim: int, *_: Any, **__: Any) -> None:
        super().__init__()
        self.norm1, self.mlp_tokens = nn.LayerNorm(dim), nn.Linear(17, 17)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp_tokens(self.norm1(x).mT).mT  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[type[nn.Module], ...]] = {
    "gate-vpt": (Counted, ParallelScalingBlock),
    "e2vpt": (Counted, ParallelScalingBlock, ParallelThingsBlock),
    "cvpt": (Counted, ParallelScalingBlock, ResPostBlock),
}


@each_method
def test_what_it_cannot_take_is_refused(name: str, make_vit: MakeViT, images: Tensor) -> None:
    for block in REFUSED.get(name, (Counted,)):
        model = make_vit(block_fn=block).eval()
        before = fingerprint(model, images)
        with pytest.raises(
            TypeError, match=r"model cannot (take prompts|be tuned by '[a-z0-9-]*': block 1): "
        ):
            tune(model, name, prompts=3)
        assert_same(fingerprint(model, images), before)
    for wrong in ("3", 2.5, True):
        with pytest.raises(TypeError, match="prompts must be"):
            tune(make_vit(), name, prompts=wrong)


@pytest.mark.parametrize("name", ["gate-vpt", "cvpt"])
def test_beit_is_refused_where_prompts_have_no_place(name: str) -> None:
    model = Beit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    with pytest.raises(TypeError, match=f"model cannot be tuned by '{name}': block 1: .*Block|has no q_norm"):
        tune(model, name, prompts=3)
    tune(model, "linear").release()


class TestGateVPT:
    def test_closed_gates_hand_the_prompts_on(self, make_random: MakeViT, images: Tensor) -> None:
        tuned: Any = tune(make_random(), "gate-vpt", prompts=NUM_PROMPTS, gate=-1e4)
        prompts = tuned.prompts.detach()
        deep = PromptedViT(make_random(), prompts.expand(DEPTH, -1, -1), engine="kv")
        torch.testing.assert_close(tuned(images), deep(images))

    def test_starts_nearly_closed_and_without_temperature(self, make_random: MakeViT) -> None:
        tuned: Any = tune(make_random(), "gate-vpt")
        assert tuned.prompts.shape == (1, 100, WIDTH)
        assert tuned.gates.tolist() == [-10.0] * (DEPTH - 1)
        assert tuned.temperatures.tolist() == [1.0] * DEPTH
        assert "depth='shallow'" in tuned.engine_reason

    @pytest.mark.parametrize(("given", "limit"), [(-3.0, 0.01), (0.001, 0.01), (30.0, 10.0)])
    def test_temperatures_have_limits(
        self, given: float, limit: float, make_random: MakeViT, images: Tensor
    ) -> None:
        found = []
        for value in (given, limit):
            tuned: Any = tune(make_random(), "gate-vpt", prompts=2)
            with torch.no_grad():
                tuned.temperatures.fill_(value)
            logits = tuned(images)
            found.append((logits, gradients(tuned, logits)["temperatures"]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)

    def test_dropped_elements_are_handed_on(self, make_random: MakeViT, images: Tensor) -> None:
        seen: list[Tensor] = []
        tuned = tune(make_random(), "gate-vpt", prompts=8, gate=-1e4, prompt_dropout=0.5).train()
        for block in tuned.model.blocks:
            block.norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -8:]))
        tuned(images)
        assert (seen[0] == 0).any()
        assert torch.equal(seen[0], seen[1])

    def test_pools_with_prompts(self, make_random: MakeViT, images: Tensor) -> None:
        model = make_random(global_pool="avg")
        plain = tune(copy.deepcopy(model), "gate-vpt", prompts=NUM_PROMPTS)
        tuned = tune(model, "gate-vpt", prompts=plain.prompts.detach(), pool_prompts=True)
        assert tuned.forward_features(images).shape == (3, 17 + NUM_PROMPTS, WIDTH)
        assert not torch.allclose(tuned(images), plain(images))

    def test_a_single_block_has_no_gate(self, make_vit: MakeViT, images: Tensor) -> None:
        tuned: Any = tune(make_vit(depth=1), "gate-vpt", prompts=2)
        tuned(images).sum().backward()
        assert all(each.grad is not None for each in tuned.trainable_parameters())

    @pytest.mark.parametrize("gate", ["0", None, float("nan")])
    def test_bad_options_are_refused(self, gate: Any, make_vit: MakeViT) -> None:
        with pytest.raises((TypeError, ValueError), match="gate must be"):
            tune(make_vit(), "gate-vpt", gate=gate)
        with pytest.raises(ValueError, match="'kv' is not exact here"):
            tune(make_vit(), "gate-vpt", engine="kv")


class TestE2VPT:
    def test_serves_other_blocks_that_the_engine_knows(self, make_random: MakeViT, images: Tensor) -> None:
        for model in (
            make_random(block_fn=ResPostBlock),
            Beit(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval(),
        ):
            tuned: Any = tune(model, "e2vpt", prompts=2)
            assert tuned.engine == "kv"
            found = tuned(images)
            with torch.no_grad():
                tuned.kv_prompts.fill_(0)
            assert found.isfinite().all()
            assert not torch.allclose(tuned(images), found)

    def test_blocks_of_different_heads_are_refused(self, make_vit: MakeViT) -> None:
        model = make_vit()
        model.blocks[1].attn.num_heads = 4
        with pytest.raises(TypeError, match="model cannot be tuned by 'e2vpt': its blocks differ"):
            tune(model, "e2vpt")
        tune(model, "linear").release()

    def test_pools_with_prompts(self, make_random: MakeViT, images: Tensor) -> None:
        of_kv, of_concat = (
            build(make_random(global_pool="avg"), "e2vpt", pool_prompts=True, engine=engine)
            for engine in ("kv", "concat")
        )
        torch.testing.assert_close(of_kv(images), of_concat(images))
        assert of_kv.forward_features(images).shape == (3, 17 + NUM_PROMPTS, WIDTH)

    def test_starts_as_the_released_code(self, make_random: MakeViT) -> None:
        tuned: Any = tune(make_random(), "e2vpt")
        assert tuned.prompts.shape == (DEPTH, 10, WIDTH)
        assert tuned.kv_prompts.shape == (DEPTH, 1, HEADS, 5, WIDTH // HEADS)
        bound = (6 / (5 * WIDTH // HEADS)) ** 0.5
        assert 0.95 * bound < tuned.kv_prompts.abs().max() <= bound
        apart: Any = tune(make_random(), "e2vpt", share=False)
        assert apart.num_trainable(head=False) == DEPTH * WIDTH * (10 + 2 * 5)

    @pytest.mark.parametrize("given", [{"num_kv": 0}, {"num_kv": 1.5}, {"share": 1}])
    def test_bad_options_are_refused(self, given: dict[str, Any], make_vit: MakeViT) -> None:
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(given))} must be"):
            tune(make_vit(), "e2vpt", **given)

    @pytest.mark.parametrize("form", ["e2vpt", "e2vpt-apart"])
    @pytest.mark.parametrize("engine", ["kv", "concat"])
    def test_attention_maps_have_keys_that_are_no_prompts(
        self, form: str, engine: Any, make_random: MakeViT, images: Tensor
    ) -> None:
        tuned = build(make_random(qk_norm=True), form, engine=engine)
        inputs = inputs_of(tuned, images)
        for index, (weights, x) in enumerate(zip(tuned.attention_maps(images), inputs, strict=True)):
            block: Any = tuned.model.blocks[index]
            q, k, _ = heads_of(block.attn, block.norm1(with_prompts(x, tuned.source.prompts[index])))
            keys = torch.cat([k, torch.stack([tuned.kv_prompts[index, 0]] * len(x))], dim=2)
            expected = (q @ keys.mT * block.attn.scale).softmax(-1)[:, :, : x.shape[1]]
            assert weights.shape == (3, HEADS, 17, 17 + NUM_PROMPTS + 3)
            torch.testing.assert_close(weights, expected)


@each_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_was_cast_gives_about_the_same(
    form: str, dtype: torch.dtype, make_random: MakeViT, images: Tensor
) -> None:
    tuned = build(make_random(), form).eval()
    with torch.no_grad():
        expected = tuned(images)
        found = tuned.to(dtype)(images.to(dtype))
    assert found.dtype == dtype
    assert float((found.float() - expected).abs().max()) < 0.1 * float(expected.abs().max())


class TestVFPT:
    @pytest.mark.parametrize(("fraction", "transformed"), [(0, 0), (0.39, 1), (0.5, 2), (1, 5)])
    def test_the_fraction_is_rounded_down(
        self, fraction: float, transformed: int, make_random: MakeViT, images: Tensor
    ) -> None:
        tuned: Any = tune(make_random(), "vfpt", prompts=NUM_PROMPTS, fraction=fraction)
        same = (tuned.prompts == tuned.source.prompts).all(dim=-1)
        assert same.tolist() == [[i >= transformed for i in range(NUM_PROMPTS)]] * DEPTH
        vpt = PromptedViT(make_random(), tuned.prompts.detach())
        torch.testing.assert_close(tuned(images), vpt(images))

    def test_shallow(self, make_random: MakeViT, images: Tensor) -> None:
        tuned: Any = tune(make_random(), "vfpt", prompts=NUM_PROMPTS, depth="shallow")
        vpt = PromptedViT(make_random(), tuned.prompts.detach(), depth="shallow")
        torch.testing.assert_close(tuned(images), vpt(images))

    @pytest.mark.parametrize(
        "given", [{"fraction": 1.1}, {"fraction": -0.1}, {"fraction": "1"}, {"depth": "x"}]
    )
    def test_bad_options_are_refused(self, given: dict[str, Any], make_vit: MakeViT) -> None:
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(given))} must be"):
            tune(make_vit(), "vfpt", **given)


class TestBPT:
    def test_starts_from_the_nearest_prompts_of_its_rank(self, make_random: MakeViT) -> None:
        given = torch.randn(DEPTH, 7, WIDTH)
        tuned: Any = tune(make_random(), "bpt", prompts=given)
        torch.testing.assert_close(tuned.prompts, given, rtol=1e-4, atol=1e-5)
        tuned = tune(make_random(), "bpt", prompts=given, rank=3)
        rest = torch.linalg.svdvals(given)[:, 3:].square().sum(-1)
        torch.testing.assert_close((tuned.prompts - given).square().sum((1, 2)), rest, rtol=1e-4, atol=1e-5)

    def test_ranks_and_bases_of_the_released_code(self, make_vit: MakeViT) -> None:
        def shapes(**given: Any) -> list[list[int]]:
            source = tune(make_vit(embed_dim=96, depth=6), "bpt", **given).source  # type: ignore[union-attr]
            return [list(each.shape) for each in (source.left, source.right, source.fixed)]

        assert shapes() == [[6, 50, 50], [4, 50, 96], [2, 50, 96]]
        assert shapes(depth="shallow", prompts=100) == [[1, 100, 75], [1, 75, 96], [0, 75, 96]]
        assert shapes(rank=2, learned_bases=9) == [[6, 50, 2], [6, 2, 96], [0, 2, 96]]

    def test_shallow(self, make_random: MakeViT, images: Tensor) -> None:
        tuned: Any = tune(make_random(), "bpt", prompts=NUM_PROMPTS, depth="shallow")
        vpt = PromptedViT(make_random(), tuned.prompts.detach(), depth="shallow")
        torch.testing.assert_close(tuned(images), vpt(images))

    @pytest.mark.parametrize("given", [{"rank": 6}, {"rank": 0}, {"rank": 2.5}, {"learned_bases": 0}])
    def test_bad_options_are_refused(self, given: dict[str, Any], make_vit: MakeViT) -> None:
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(given))} must be"):
            tune(make_vit(), "bpt", prompts=5, **given)

    def test_reentrant_checkpointing(self, make_random: MakeViT, images: Tensor, monkeypatch: Any) -> None:
        tuned = build(make_random(), "bpt")
        plain = gradients(tuned, tuned(images))
        tuned.model.set_grad_checkpointing()
        monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: True)
        tuned(images.requires_grad_()).square().sum().backward()
        images.requires_grad_(False)
        named = dict(tuned.named_parameters())
        for name, gradient in plain.items():
            torch.testing.assert_close(named[name].grad, gradient)


class TestCVPT:
    def test_prompts_that_are_alike_count_once(self, make_random: MakeViT, images: Tensor) -> None:
        """All prompts alike give their value to every token, whatever it asks for."""
        prompt = torch.randn(DEPTH, 1, WIDTH)
        one, many = (tune(make_random(), "cvpt", prompts=prompt.repeat(1, n, 1)) for n in (1, 9))
        torch.testing.assert_close(one(images), many(images))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"prompts": 0}, "prompts must be at least one"),
            ({"engine": "concat"}, "engine must be 'auto' or 'kv'"),
            ({"prompt_dropout": 0.1}, "prompt_dropout must be 0"),
            ({"pool_prompts": True}, "pool_prompts must be False"),
        ],
    )
    def test_what_needs_tokens_is_refused(
        self, given: dict[str, Any], message: str, make_vit: MakeViT
    ) -> None:
        model = make_vit(global_pool="avg")
        with pytest.raises(ValueError, match=message):
            tune(model, "cvpt", **given)
        tune(model, "linear").release()

    def test_attention_maps_are_those_of_the_cross_attention(
        self, make_random: MakeViT, images: Tensor
    ) -> None:
        tuned = build(make_random(qk_norm=True, init_values=0.3), "cvpt")
        assert "cross-attention" in tuned.engine_reason
        inputs = inputs_of(tuned, images)
        for layer, weights in zip((2, 0), tuned.attention_maps(images, [-1, 0]), strict=True):
            block: Any = tuned.model.blocks[layer]
            x = inputs[layer] + block.ls1(attention(block.attn, block.norm1(inputs[layer])))
            q = heads_of(block.attn, block.norm1(x))[0]
            k = heads_of(block.attn, block.norm1(tuned.prompts[layer][None]))[1]
            assert weights.shape == (3, HEADS, 17, NUM_PROMPTS)
            torch.testing.assert_close(weights, (q @ k.mT * block.attn.scale).softmax(-1))

    def test_a_recipe_may_average_prompts_that_are_no_tokens(self, images: Tensor) -> None:
        recipe = Recipe(method="cvpt", pool="avg-with-prompts", num_prompts=2)
        model = open_model("shipped", pool="avg-with-prompts")
        tuned: Any = build_by_recipe(model, recipe, class_names=("a", "b"))
        assert not tuned.pool_prompts


@pytest.mark.parametrize("depth", ["deep", "shallow"])
class TestProjectedVPT:
    def made(self, model: nn.Module, depth: str, **use: Any) -> Any:
        tuned = tune(model, f"vpt-{depth}", prompts=NUM_PROMPTS, project=6, **use)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in tuned.trainable_parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        return tuned

    def test_equals_the_textbook(self, depth: str, make_random: MakeViT, images: Tensor) -> None:
        model, given = make_random().double(), images.double()
        plain = copy.deepcopy(model)
        tuned = self.made(model, depth, num_classes=7)

        def blocks(tuned: Any, blocks: Any, x: Tensor) -> Tensor:
            layer = tuned.source.projection
            prompts = torch.stack([each @ layer.weight.T + layer.bias for each in tuned.source.prompts])
            if depth == "deep":
                return plain_deep(tuned, blocks, x, prompts)
            count, x = x.shape[1], with_prompts(x, prompts[0])
            for block in blocks:
                x = mlp(block, x + block.ls1(attention(block.attn, block.norm1(x))))
            return x[:, :count]

        found, expected = tuned(given), logits_of_textbook(tuned, plain, blocks, given)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        theirs = gradients(tuned, expected)
        for name, gradient in gradients(tuned, found).items():
            assert gradient.any(), name
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-8, atol=1e-8)

    def test_starts_and_counts_as_vpts_code(self, depth: str, make_random: MakeViT) -> None:
        tuned: Any = tune(make_random(), f"vpt-{depth}", prompts=400, project=6)
        layers = DEPTH if depth == "deep" else 1
        assert tuned.method == f"vpt-{depth}"
        assert tuned.prompts.shape == (layers, 400, WIDTH)
        assert tuned.num_trainable(head=False) == layers * 400 * 6 + 7 * WIDTH
        bound = (6 / (3 * 8 * 8 + 6)) ** 0.5
        assert 0.99 * bound < tuned.source.prompts.abs().max() <= bound
        assert tuned.source.projection.weight.std().item() == pytest.approx((2 / WIDTH) ** 0.5, rel=0.15)

    def test_a_file_gives_it_back(
        self, depth: str, make_random: MakeViT, images: Tensor, tmp_path: Path
    ) -> None:
        model = make_random()
        before = model(images)
        tuned = self.made(model, depth, num_classes=7)
        expected, prompts = tuned(images), tuned.prompts.detach()
        tuned.save(tmp_path / "file")
        assert torch.equal(tuned.release()(images), before)
        again: Any = load_tuned(tmp_path / "file", model)
        assert (again.method, again.options) == (f"vpt-{depth}", {"depth": depth, "project": 6})
        assert torch.equal(again(images), expected)
        with pytest.raises(ValueError, match="merge is for methods that end in plain weights"):
            again.merge()
        again.release()
        plain = tune(model, f"vpt-{depth}", num_classes=7)
        with pytest.raises(ValueError, match=r"was tuned by 'vpt-\w+' \(depth='\w+', project=6\), but"):
            plain.load(tmp_path / "file")
        plain.release()
        with pytest.raises(ValueError, match=r"project=6\), which is no PromptedViT; spt_fast.load_tuned"):
            PromptedViT.from_file(tmp_path / "file", model)
        # Without the layer, from what left it.
        spt = tune(model, f"spt-{depth}", prompts=prompts)
        assert torch.equal(spt.prompts, prompts)  # type: ignore[arg-type]

    def test_stays_in_float32_under_autocast(self, depth: str, make_random: MakeViT, images: Tensor) -> None:
        tuned = self.made(make_random(), depth)
        exact = tuned.prompts
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(tuned.prompts, exact)
            half = tuned(images)
        assert torch.equal(self.made(make_random(), depth, weight_dtype="bf16")(images), half)

    def test_freezes_and_needs_a_width(self, depth: str, make_random: MakeViT) -> None:
        frozen = tune(make_random(), f"vpt-{depth}", project=6, freeze_prompts=True)
        assert frozen.num_trainable(head=False) == 0
        assert type(tune(make_random(), f"vpt-{depth}", project=None)) is PromptedViT
        for wrong in (0, 2.5, "6", True):
            with pytest.raises((TypeError, ValueError), match="project must be an integer >= 1 or None"):
                tune(make_random(), f"vpt-{depth}", project=wrong)
        with pytest.raises(ValueError, match=r"'project' is no option of method .*; vpt-deep, vpt-shallow"):
            tune(make_random(), f"spt-{depth}", project=6)
        with pytest.raises(ValueError, match=r"'num_prompts' is no option .*; prompts takes prompts, or how"):
            tune(make_random(), f"vpt-{depth}", num_prompts=6)


@pytest.mark.parametrize("form", list(FORMS))
def test_frozen_prompts_leave_the_head_to_learn(form: str, make_random: MakeViT, images: Tensor) -> None:
    name, given = FORMS[form]
    tuned: Any = tune(make_random(), name, prompts=4, num_classes=3, freeze_prompts=True, **given)
    assert tuned.num_trainable(head=False) == 0
    assert trains_head_only(tuned)
    tuned(images).sum().backward()
    assert [parameter.grad is None for parameter in tuned.trainable_parameters()] == [False, False]


def test_all_that_prompts_are_made_of_has_their_rate(make_random: MakeViT) -> None:
    """By default each tensor has the rate of its own length; a rate that is given is that of all."""
    cases: dict[str, tuple[dict[str, Any], list[str]]] = {
        "bpt": ({"rank": 3}, ["source.left", "source.right"]),
        "e2vpt": ({}, ["kv_prompts", "source.prompts"]),
        "vpt-deep": ({"project": 6}, ["source.prompts", "source.projection.weight"]),
        "vfpt": ({}, ["source.prompts"]),
        "gate-vpt": ({}, ["prompts"]),
    }
    for name, (given, names) in cases.items():
        tuned = tune(make_random(), name, prompts=NUM_PROMPTS, num_classes=3, **given)
        parameters = dict(tuned.named_parameters())
        groups = [
            group for group in parameter_groups(nn.Sequential(tuned), 0.01) if group["name"] == "prompts"
        ]
        for group, key in zip(groups, names, strict=True):
            [parameter] = group["params"]
            assert parameter is parameters[key]
            rms = parameter.detach().square().mean().sqrt().item()
            assert group["lr"] == pytest.approx(0.3 * rms, rel=1e-5)
        groups = tuned.parameter_groups(0.01, 0.5)
        assert [group["name"] for group in groups] == ["head", "no_decay", "prompts"]
        assert [len(group["params"]) for group in groups][-1] == len(names)
        assert groups[-1]["lr"] == 0.5


@pytest.mark.parametrize(
    ("count", "share", "part"), [(100, 0.29, 29), (50, 0.58, 29), (90, 0.7, 63), (7, 0.5, 3)]
)
def test_shares_are_the_decimal_numbers_that_they_are_written_as(count: int, share: float, part: int) -> None:
    assert part_of(count, share) == part


def test_a_number_of_prompts_may_be_numpys(make_random: MakeViT) -> None:
    assert PromptedViT(make_random(), np.int64(4)).method == "vpt-deep"
    assert tune(make_random(), "vpt-deep", prompts=np.int64(4)).num_prompts == 4


def test_shallow_prompts_of_low_rank_are_a_hundred(make_random: MakeViT) -> None:
    shallow = tune(make_random(embed_dim=128, num_heads=2), "bpt", depth="shallow")
    assert list(shallow.source.left.shape) == [1, 100, 75]
    assert Recipe(method="bpt", method_options={"depth": "shallow"}).prompts_per_block == 100
    assert Recipe(method="bpt").prompts_per_block == 50


@pytest.mark.parametrize("method", ["linear", "bias", "ssf"])
def test_a_merged_model_has_its_batch_norm_in_its_head(
    method: str, make_random: MakeViT, images: Tensor
) -> None:
    model = make_random().train()
    tuned = tune(model, method, num_classes=3, head_norm="batch").train()
    tuned(images)
    tuned.eval()
    expected = tuned(images)
    merged = tuned.merge()
    plain = make_random(num_classes=3)
    plain.load_state_dict(merged.state_dict())
    for each in (merged, plain):
        torch.testing.assert_close(each.eval()(images), expected, rtol=1e-5, atol=1e-5)


def test_what_is_left_of_a_released_model_leaves_it_alone(make_random: MakeViT) -> None:
    model = make_random().eval()
    tuned = tune(model, "vpt-deep", prompts=2, num_classes=3)
    release(model)
    tuned.train()
    assert tuned.training
    assert not any(module.training for module in model.modules())
