"""What one training step keeps and computes: saved activations, weights cast once, compilation, processes."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

from spt_fast import PromptedViT
from spt_fast.training.evaluation import evaluate

# Those of `make_vit`, but for the prompts.
WIDTH, DEPTH, HEADS, NUM_PROMPTS, TOKENS = 32, 3, 2, 7, 17


MakeViT = Callable[..., VisionTransformer]
MakeTuned = Callable[..., PromptedViT]
MakeImages = Callable[..., Tensor]


@pytest.fixture
def make_tuned(make_vit: MakeViT) -> MakeTuned:
    """Factory of models with the same prompts each; `vit` holds options of `make_vit`, the rest are ours."""

    def make(depth: Any = "deep", engine: Any = "auto", **options: Any) -> PromptedViT:
        model = make_vit(**options.pop("vit", {})).eval()
        generator = torch.Generator().manual_seed(0)
        layers = len(model.blocks) if depth == "deep" else 1
        prompts = torch.randn(layers, NUM_PROMPTS, WIDTH, generator=generator)
        return PromptedViT(model, prompts, depth=depth, engine=engine, num_classes=4, **options)

    return make


def gradients(
    tuned: PromptedViT, images: Tensor, run: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    loss = (tuned if run is None else run)(images).float().square().sum()
    return list(torch.autograd.grad(loss, tuned.trainable_parameters()))


def saved_bytes_per_block(tuned: PromptedViT, images: Tensor) -> list[int]:
    """Bytes that autograd keeps for each block, each storage once, parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in tuned.parameters()}
    alive: list[Tensor] = []
    sizes = [0] * (DEPTH + 1)
    current = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(tensor)
            sizes[current] += storage.nbytes()
        return tensor

    def enter(index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal current
            current = index

        return hook

    for index, block in enumerate(tuned.model.blocks):  # type: ignore[arg-type]
        block.register_forward_pre_hook(enter(index))
    tuned.model.norm.register_forward_pre_hook(enter(DEPTH))  # type: ignore[union-attr]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        tuned(images)
    return sizes[:DEPTH]


class TestSavedActivations:
    def test_each_block_keeps_ten_widths_of_each_token(
        self, make_tuned: MakeTuned, make_images: MakeImages
    ) -> None:
        """Inputs of two norms (2 D), one projection (3 D), what attention gave (D), what GELU takes (4 D).

        Two scalars per norm and a logarithm per head and token are the small rest; prompts are not counted.
        Slopes over the batch, so that what is kept once per step falls out.
        """
        small, large = (saved_bytes_per_block(make_tuned(), make_images(batch)) for batch in (2, 6))
        per_image = [(b - a) / 4 for a, b in zip(small, large, strict=True)]
        token = TOKENS * 4
        for block in per_image[1:]:
            assert block <= token * (10 * WIDTH + 4 + HEADS)
        # In block 1 no gradient goes on to the image tokens, nor through its first norm and residual.
        assert per_image[0] <= token * (9 * WIDTH + 2 + HEADS)

    def test_frozen_prompts_keep_nothing(self, make_tuned: MakeTuned, make_images: MakeImages) -> None:
        tuned = make_tuned(freeze_prompts=True)
        assert saved_bytes_per_block(tuned, make_images(2)) == [0] * DEPTH

    def test_checkpointing_keeps_the_inputs_of_blocks_only(
        self, make_tuned: MakeTuned, make_images: MakeImages
    ) -> None:
        tuned = make_tuned()
        tuned.model.set_grad_checkpointing()  # type: ignore[operator]
        assert sum(saved_bytes_per_block(tuned, make_images(2))) == 2 * TOKENS * WIDTH * 4 * DEPTH

    def test_gradient_of_the_prompts_is_written_once(
        self, make_tuned: MakeTuned, make_images: MakeImages
    ) -> None:
        """Its node in the graph has one input; a selection per layer would write zeros for all others."""
        tuned = make_tuned()
        pending, seen, inputs = [tuned(make_images()).grad_fn], set(), 0
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            following = [after for after, _ in node.next_functions]
            inputs += sum(getattr(after, "variable", None) is tuned.prompts for after in following)
            pending += following
        assert inputs == 1


class TestWeightDtype:
    @pytest.mark.parametrize("vit", [{}, {"block_fn": ResPostBlock}, {"qk_norm": True}])
    @pytest.mark.parametrize("engine", ["kv", "concat"])
    def test_equals_autocast_bitwise(
        self, engine: Any, vit: dict[str, Any], make_tuned: MakeTuned, make_images: MakeImages
    ) -> None:
        plain = make_tuned(engine=engine, vit=vit)
        cast = make_tuned(engine=engine, vit=vit, weight_dtype="bf16")
        with torch.autocast("cpu", torch.bfloat16):
            expected, expected_gradients = plain(make_images()), gradients(plain, make_images())
        assert torch.equal(cast(make_images()), expected)
        for got, wanted in zip(gradients(cast, make_images()), expected_gradients, strict=True):
            assert torch.equal(got, wanted)
        assert cast.forward_head(cast.forward_features(make_images())).shape == (4, 4)

    def test_only_frozen_weights_of_products_are_cast(self, make_tuned: MakeTuned) -> None:
        tuned = make_tuned(weight_dtype=torch.bfloat16)
        dtypes = {name: parameter.dtype for name, parameter in tuned.named_parameters()}
        assert dtypes["model.blocks.0.attn.qkv.weight"] == torch.bfloat16
        assert dtypes["model.blocks.2.mlp.fc2.bias"] == torch.bfloat16
        assert dtypes["model.patch_embed.proj.weight"] == torch.bfloat16
        for name in ("prompts", "model.head.weight", "model.blocks.0.norm1.weight", "model.pos_embed"):
            assert dtypes[name] == torch.float32

    def test_release_gives_the_very_weights_back(self, make_vit: MakeViT, make_images: MakeImages) -> None:
        model = make_vit()
        before = {name: (id(p), p.clone(), p.requires_grad) for name, p in model.named_parameters()}
        tuned = PromptedViT(model, 2, weight_dtype="bf16")
        tuned(make_images()).sum().backward()
        tuned.release()
        for name, parameter in model.named_parameters():
            identity, values, flag = before[name]
            assert id(parameter) == identity
            assert torch.equal(parameter, values)
            assert parameter.requires_grad == flag

    def test_weights_set_aside_follow_a_move(self, make_vit: MakeViT) -> None:
        model = PromptedViT(make_vit(), 2, weight_dtype="bf16").double().release()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}

    def test_compiles_and_checkpoints(self, make_tuned: MakeTuned, make_images: MakeImages) -> None:
        torch.compiler.reset()
        tuned = make_tuned(weight_dtype="bf16", vit={"depth": 2})
        expected = gradients(tuned, make_images())
        got = gradients(tuned, make_images(), torch.compile(tuned, fullgraph=True, backend="aot_eager"))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        tuned.model.set_grad_checkpointing()  # type: ignore[operator]
        assert all(torch.equal(a, b) for a, b in zip(gradients(tuned, make_images()), expected, strict=True))

    @pytest.mark.parametrize("given", ["float8", torch.float32, torch.int8, ["bf16"]])
    def test_others_are_refused(self, given: Any, make_vit: MakeViT) -> None:
        with pytest.raises(ValueError, match="weight_dtype must be None, torch"):
            PromptedViT(make_vit(), 2, weight_dtype=given)


class TestFixedPrompts:
    @staticmethod
    def count_projections(tuned: PromptedViT) -> list[int]:
        """Grows by one whenever a block normalises its prompts, which calls no hooks."""
        calls: list[int] = []

        def counted(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            if x.shape[-2] == NUM_PROMPTS:
                calls.append(1)
            return forward(x)

        for block in tuned.model.blocks:  # type: ignore[union-attr]
            block.norm1.forward = functools.partial(counted, block.norm1.forward)
        return calls

    def test_keys_and_values_are_computed_once(self, make_tuned: MakeTuned, make_images: MakeImages) -> None:
        tuned = make_tuned()
        calls = self.count_projections(tuned)
        with torch.no_grad():
            expected = tuned(make_images())
            with tuned.fixed_prompts():
                for _ in range(3):
                    assert torch.equal(tuned(make_images()), expected)
            assert len(calls) == 2 * DEPTH
            tuned(make_images())
        assert len(calls) == 3 * DEPTH

    @pytest.mark.parametrize(
        "change",
        [
            lambda tuned: tuned.prompts.copy_(tuned.prompts * 2),
            lambda tuned: tuned.load_state_dict(
                {**tuned.state_dict(), "prompts": torch.ones_like(tuned.prompts)}
            ),
            lambda tuned: setattr(tuned.prompts, "data", tuned.prompts.data * 2),
            lambda tuned: setattr(tuned, "prompts", nn.Parameter(tuned.prompts * 2)),
            lambda tuned: tuned.double(),
        ],
    )
    def test_changes_are_noticed(
        self, change: Callable[[PromptedViT], Any], make_tuned: MakeTuned, make_images: MakeImages
    ) -> None:
        tuned = make_tuned()
        with torch.no_grad(), tuned.fixed_prompts():
            tuned(make_images())
            change(tuned)
            images = make_images().to(tuned.prompts.dtype)
            assert torch.equal(tuned(images), copy.deepcopy(tuned)(images))

    def test_autocast_and_inference_mode_are_told_apart(
        self, make_tuned: MakeTuned, make_images: MakeImages
    ) -> None:
        tuned = make_tuned()
        with torch.no_grad(), tuned.fixed_prompts():
            plain = tuned(make_images())
            with torch.autocast("cpu", torch.bfloat16):
                assert tuned(make_images()).dtype == torch.bfloat16
            with torch.inference_mode():
                assert torch.equal(tuned(make_images()), plain)

    def test_learning_is_not_disturbed(self, make_tuned: MakeTuned, make_images: MakeImages) -> None:
        tuned = make_tuned()
        expected = gradients(tuned, make_images())
        with tuned.fixed_prompts(), tuned.fixed_prompts():
            with torch.no_grad():
                tuned(make_images())
            assert all(
                torch.equal(a, b) for a, b in zip(gradients(tuned, make_images()), expected, strict=True)
            )

    def test_an_unfrozen_backbone_is_not_cut_off(
        self, make_tuned: MakeTuned, make_images: MakeImages
    ) -> None:
        tuned = make_tuned(freeze_prompts=True)
        tuned.model.requires_grad_(True)
        weight = tuned.model.blocks[0].attn.qkv.weight  # type: ignore[index, union-attr]
        with tuned.fixed_prompts():
            found = [torch.autograd.grad(tuned(make_images()).sum(), [weight])[0] for _ in range(2)]
        assert torch.equal(*found)

    def test_evaluation_uses_it(self, make_tuned: MakeTuned, make_images: MakeImages) -> None:
        tuned = make_tuned()
        calls = self.count_projections(tuned)
        evaluate(tuned, [(make_images(seed=seed), torch.zeros(4, dtype=torch.long)) for seed in range(3)])
        assert len(calls) == DEPTH


class TestLeanShallow:
    @pytest.mark.parametrize(
        ("depth", "pool", "expected"), [("shallow", "token", 1), ("deep", "token", DEPTH)]
    )
    def test_tokens_are_concatenated_once(
        self,
        depth: Any,
        pool: str,
        expected: int,
        make_vit: MakeViT,
        make_tuned: MakeTuned,
        make_images: MakeImages,
    ) -> None:
        """Shallow: once before block 1. Deep by the concat engine: once per block."""
        tuned = make_tuned(depth, "concat")
        with torch.no_grad(), torch.profiler.profile() as profile:
            tuned(make_images())
        counted = sum(event.count for event in profile.key_averages() if event.key == "aten::cat")
        with torch.no_grad(), torch.profiler.profile() as profile:
            make_vit().eval()(make_images())
        of_timm = sum(event.count for event in profile.key_averages() if event.key == "aten::cat")
        assert counted - of_timm == expected


def test_compiled_model_trains_as_eager_does(make_tuned: MakeTuned, make_images: MakeImages) -> None:
    def losses(run: Callable[[Tensor], Tensor], tuned: PromptedViT) -> list[float]:
        optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2)
        labels = torch.tensor([0, 1, 2, 3])
        found = []
        for step in range(20):
            loss = nn.functional.cross_entropy(run(make_images(seed=step % 3)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    torch.compiler.reset()
    eager, other = (make_tuned(vit={"depth": 2}) for _ in range(2))
    expected, got = losses(eager, eager), losses(torch.compile(other, fullgraph=True), other)
    assert expected[-1] < expected[0] - 0.1
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) <= 1e-4


def test_compiled_bf16_gradients_are_eagers() -> None:
    """At a real ViT's width and number of tokens: Inductor has been seen to give NaN there on a CPU."""
    sizes = {"img_size": 224, "embed_dim": 192, "num_heads": 3, "depth": 2, "num_classes": 10}
    tuned = PromptedViT(VisionTransformer(**sizes), 20, weight_dtype="bf16")
    images, labels = torch.randn(2, 3, 224, 224), torch.tensor([0, 1])
    found = []
    torch.compiler.reset()
    for run in (tuned, torch.compile(tuned, fullgraph=True)):
        tuned.prompts.grad = None
        nn.functional.cross_entropy(run(images).float(), labels).backward()
        found.append(tuned.prompts.grad)
    assert bool(found[1].isfinite().all())
    assert float((found[1] - found[0]).norm() / found[0].norm()) < 0.05


def test_two_processes_learn_what_one_does(run_two_ranks: Callable[[str], None]) -> None:
    """DistributedDataParallel and FSDP2, with `weight_dtype` too, half of the images each."""
    run_two_ranks(_TWO_RANKS)


_TWO_RANKS = """
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from spt_fast import PromptedViT


def make_tuned(**options):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=5)
    return PromptedViT(vit.eval(), torch.randn(2, 7, 32), num_classes=4, **options)


def learn(run, images):
    optimizer = torch.optim.SGD([p for p in run.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        run(images).square().mean().backward()
        optimizer.step()


def shard(tuned):
    mesh = init_device_mesh("cpu", (2,))
    for block in tuned.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(tuned, mesh=mesh)


def work(rank):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    half = images[2 * rank : 2 * rank + 2]
    alone, parallel, sharded = (make_tuned() for _ in range(3))
    learn(alone, images)
    assert not torch.equal(alone.prompts, make_tuned().prompts)
    learn(nn.parallel.DistributedDataParallel(parallel), half)
    torch.testing.assert_close(parallel.prompts, alone.prompts, rtol=1e-4, atol=1e-6)
    rates = [group["lr"] for group in sharded.parameter_groups(0.1)]
    shard(sharded)
    torch.testing.assert_close([group["lr"] for group in sharded.parameter_groups(0.1)], rates)
    learn(sharded, half)
    torch.testing.assert_close(sharded.prompts.full_tensor(), alone.prompts, rtol=1e-4, atol=1e-6)
    cast_alone, cast_sharded = (make_tuned(weight_dtype="bf16") for _ in range(2))
    start = cast_alone.prompts.detach().clone()
    learn(cast_alone, images)
    shard(cast_sharded)
    learn(cast_sharded, half)
    # Prompts' gradients are bfloat16 before they are averaged: compared with how far the prompts have moved.
    moved = cast_alone.prompts - start
    error = (cast_sharded.prompts.full_tensor() - cast_alone.prompts).abs().max()
    assert error <= 0.02 * moved.abs().max(), (error, moved.abs().max())
"""
