"""One training step of a prompted ViT: ours, prompts as tokens, no prompts, linear probe, full fine-tuning.

`pytest benchmarks/bench_prompted_step.py --benchmark-only` times each side by itself. The ratios to quote are
those of `python -m benchmarks.bench_prompted_step`, which alternates the sides within one process, so that
other work of the machine slows all of them alike. A step is forward and backward, without the optimiser,
which costs the same on all sides that learn prompts. `--memory` prints what a step keeps per image;
`--inference` times a forward pass with and without `fixed_prompts()`; `--prompt-keys` times what a step does
for the prompts alone.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks.timing import alternate, finished, medians
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.prompting.engines import prompt_keys_values

IMAGE_SIZE, NUM_CLASSES = 224, 200
MODEL = "vit_base_patch16_224"
# Images per step on the CPU, so that a step of each takes about as long.
BATCHES = {"vit_small_patch16_224": 8, MODEL: 4, "vit_large_patch16_224": 2, "vit_huge_patch14_224": 1}
PROMPT_COUNTS = (20, 100)

Step = Callable[[], None]


class TextbookSPT(nn.Module):
    """Eq. 6 and 13 as written: each block's prompts stand between class token and patches as tokens."""

    def __init__(self, model: Any, prompts: Tensor) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
        self.prompts = nn.Parameter(prompts)

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        after = model.num_prefix_tokens
        for block, layer in zip(model.blocks, self.prompts, strict=True):
            prefix, patches = x[:, : model.num_prefix_tokens], x[:, after:]
            x = block(torch.cat((prefix, layer.expand(len(x), -1, -1), patches), dim=1))
            after = model.num_prefix_tokens + layer.shape[0]
        x = torch.cat((x[:, : model.num_prefix_tokens], x[:, after:]), dim=1)
        return model.forward_head(model.norm(x))  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=1)
def _first_model(name: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=NUM_CLASSES).eval()


def make_model(name: str) -> Any:
    """A new model with the same weights each time; initialising them takes longer than several steps."""
    return copy.deepcopy(_first_model(name))


def make_prompts(model: Any, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 0.1 * torch.randn(len(model.blocks), count, model.embed_dim, generator=generator)


def make_images(batch: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(device)


def ours(model: Any, prompts: Tensor, **options: Any) -> nn.Module:
    return PromptedViT(model, prompts, num_classes=None, **options).train()


def textbook(model: Any, prompts: Tensor) -> nn.Module:
    return TextbookSPT(model, prompts.to(model.pos_embed.device))


def plain(model: Any, prompts: Tensor) -> nn.Module:
    """The model without prompts; backward goes as far, to a gradient for the tokens that enter block 1."""
    model.requires_grad_(False).get_classifier().requires_grad_(True)
    # Added, not set on an input: `torch.compile` takes that.
    model.start = nn.Parameter(torch.zeros(model.embed_dim, device=model.pos_embed.device))
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: inputs[0] + model.start)
    return model  # type: ignore[no-any-return]


def linear_probe(model: Any, prompts: Tensor) -> nn.Module:
    model.requires_grad_(False).get_classifier().requires_grad_(True)
    return model  # type: ignore[no-any-return]


def full(model: Any, prompts: Tensor) -> nn.Module:
    return model.requires_grad_(True)  # type: ignore[no-any-return]


SIDES: dict[str, Callable[[Any, Tensor], nn.Module]] = {
    "ours": ours,
    "concat": textbook,
    "plain": plain,
    "linear-probe": linear_probe,
    "full": full,
}
# Not among the defaults: under `--dtype bf16`, frozen weights cast once instead of in every step.
EXTRA_SIDES: dict[str, Callable[[Any, Tensor], nn.Module]] = {
    "ours-cast": functools.partial(ours, weight_dtype="bf16"),
}


def build(side: str, name: str, num_prompts: int, device: str) -> nn.Module:
    model = make_model(name).to(device)
    return {**SIDES, **EXTRA_SIDES}[side](model, make_prompts(model, num_prompts))


def autocast(device: str, dtype: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if dtype == "bf16" else contextlib.nullcontext()


def step_of(model: nn.Module, images: Tensor, *, dtype: str = "fp32", compiled: bool = False) -> Step:
    """Forward and backward; gradients start at None each time, as after `zero_grad()`."""
    run = torch.compile(model, fullgraph=True) if compiled else model
    device = images.device.type

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            loss = run(images).float().square().mean()
        loss.backward()

    return step


def check_sides_agree(name: str, num_prompts: int, device: str) -> None:
    """Nothing is timed before ours and the textbook give the same logits and gradients."""
    results = []
    for side in ("ours", "concat"):
        model: Any = build(side, name, num_prompts, device)
        logits = model(make_images(1, device))
        results.append((logits, *torch.autograd.grad(logits.square().mean(), [model.prompts])))
    for got, expected in zip(*results, strict=True):
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def saved_bytes(model: nn.Module, images: Tensor, dtype: str = "fp32") -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, parameters left out."""
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive: list[Tensor] = []
    total = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            alive.append(tensor)
            total += storage.nbytes()
        return tensor

    with (
        autocast(images.device.type, dtype),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept),
    ):
        model(images)
    return total


def memory_of(model: nn.Module, images: Tensor, step: Step, dtype: str) -> int:
    """Peak of a step above what lives before it on a GPU; what autograd keeps on the CPU."""
    if images.device.type == "cpu":
        return saved_bytes(model, images, dtype)
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("num_prompts", PROMPT_COUNTS)
def test_prompted_step(benchmark: Any, side: str, num_prompts: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = BATCHES[MODEL]
    benchmark.group = f"prompted step {MODEL} B{batch} P{num_prompts} {device}"
    benchmark.extra_info |= {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    if side == "ours":
        check_sides_agree(MODEL, num_prompts, device)
    step = step_of(build(side, MODEL, num_prompts, device), make_images(batch, device))
    benchmark.pedantic(finished(step, device), rounds=5, warmup_rounds=1)


def report_steps(options: argparse.Namespace) -> None:
    batch = options.batch or BATCHES[options.model]
    images = make_images(batch, options.device)
    mode = f"{options.dtype}, {'compiled' if options.compile else 'eager'}"
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}"
    print(f"{options.model}, batch {batch}, {mode}, {options.device}, {threads}")
    for num_prompts in options.prompts:
        if {"ours", "concat"} <= set(options.sides):
            check_sides_agree(options.model, num_prompts, options.device)
        models = {side: build(side, options.model, num_prompts, options.device) for side in options.sides}
        steps = {
            side: step_of(model, images, dtype=options.dtype, compiled=options.compile)
            for side, model in models.items()
        }
        memory = {
            side: memory_of(model, images, steps[side], options.dtype) for side, model in models.items()
        }
        timed = alternate(steps, options.rounds, device=options.device, warmup=2 if options.compile else 1)
        base = timed[options.sides[0]].median
        for side, seconds in timed.items():
            median = seconds.median
            host = "" if options.device == "cpu" else f"  host {1e3 * seconds.host_median:.1f} ms"
            print(
                f"N_p={num_prompts:<4d} {side:13s} {1e3 * median:9.1f} ms {batch / median:8.2f} images/s "
                f"{memory[side] / 2**20:9.1f} MiB   {median / base:6.3f} x {options.sides[0]}{host}",
                flush=True,
            )


def saved_per_image(model: nn.Module, dtype: str) -> int:
    """Slope between one image and two: what does not grow with the batch falls out."""
    one, two = (saved_bytes(model, make_images(batch, "cpu"), dtype) for batch in (1, 2))
    return two - one


def memory_by_form(name: str, depth: int, num_prompts: int, dtype: str) -> dict[str, int]:
    """Bytes kept per image by the first `depth` blocks of a model, embedding and head included."""
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=NUM_CLASSES, depth=depth)
    # Values do not matter here, and drawing those of a ViT-H takes longer than the measurement.
    model = model.to_empty(device="cpu").eval()
    prompts = torch.zeros(depth, num_prompts, model.embed_dim)
    tuned: Any = ours(model, prompts)
    found = {"ours": saved_per_image(tuned, dtype)}
    tuned.model.set_grad_checkpointing()
    found["ours, checkpointed"] = saved_per_image(tuned, dtype)
    tuned.model.set_grad_checkpointing(False)
    found["prompts as tokens"] = saved_per_image(textbook(tuned.release(), prompts), dtype)
    found["full fine-tuning"] = saved_per_image(full(model, prompts), dtype)
    return found


def report_memory(options: argparse.Namespace) -> None:
    """From two and three blocks to all of them: each further block keeps as much as the third."""
    with torch.device("meta"):
        depth = len(timm.create_model(options.model).blocks)
    print(f"{options.model}, MiB kept per image from forward to backward")
    for dtype in ("fp32", "bf16"):
        for num_prompts in options.prompts:
            two, three = (memory_by_form(options.model, blocks, num_prompts, dtype) for blocks in (2, 3))
            for form, size in two.items():
                total = size + (depth - 2) * (three[form] - size)
                print(f"{dtype} N_p={num_prompts:<4d} {form:20s} {total / 2**20:8.1f} MiB", flush=True)


def report_inference(options: argparse.Namespace) -> None:
    batch = options.batch or 1
    images = make_images(batch, options.device)
    print(f"{options.model}, batch {batch}, one forward pass, fp32, {options.device}")
    for num_prompts in options.prompts:
        tuned: Any = build("ours", options.model, num_prompts, options.device).eval()

        def each(tuned: Any = tuned) -> None:
            with torch.no_grad():
                tuned(images)

        with contextlib.ExitStack() as scope:
            other: Any = build("ours", options.model, num_prompts, options.device).eval()
            scope.enter_context(other.fixed_prompts())
            sides = {"each pass": each, "fixed_prompts": functools.partial(each, other)}
            timed = medians(alternate(sides, options.rounds, device=options.device))
        for side, median in timed.items():
            ratio = median / timed["each pass"]
            print(f"N_p={num_prompts:<4d} {side:14s} {1e3 * median:9.1f} ms   {ratio:6.3f} x each pass")


def report_prompt_keys(options: argparse.Namespace) -> None:
    """Norm, keys and values of all layers' prompts, forward and backward: layer by layer, and as one product.

    The one product needs a copy of the weights of all layers in one tensor, made beforehand.
    """
    model = make_model(options.model).requires_grad_(False)
    width, eps = model.embed_dim, model.blocks[0].norm1.eps
    weights = torch.stack([block.attn.qkv.weight[width:] for block in model.blocks])
    biases = torch.stack([block.attn.qkv.bias[width:] for block in model.blocks])[:, None]
    scales = torch.stack([block.norm1.weight for block in model.blocks])[:, None]
    shifts = torch.stack([block.norm1.bias for block in model.blocks])[:, None]
    copied = f"{weights.nbytes / 2**20:.0f} MiB"
    print(f"{options.model}, the prompts' keys and values, forward and backward; copied weights {copied}")

    def layers(prompts: Tensor) -> Tensor:
        pairs = zip(model.blocks, prompts.unbind(0), strict=True)
        found = [prompt_keys_values(block.norm1, block.attn, layer) for block, layer in pairs]
        return torch.stack([torch.cat(both).transpose(0, 1).flatten(1) for both in found])

    def batched(prompts: Tensor) -> Tensor:
        normed = nn.functional.layer_norm(prompts, (width,), eps=eps)
        return torch.baddbmm(biases, normed * scales + shifts, weights.mT)

    def there_and_back(function: Callable[[Tensor], Tensor], prompts: Tensor, grad: Tensor) -> None:
        torch.autograd.grad(function(prompts), [prompts], grad)

    for num_prompts in options.prompts:
        prompts = make_prompts(model, num_prompts).requires_grad_()
        torch.testing.assert_close(layers(prompts), batched(prompts), rtol=1e-4, atol=1e-5)
        grad = torch.randn(len(model.blocks), num_prompts, 2 * width)
        steps: dict[str, Step] = {
            "layer by layer": functools.partial(there_and_back, layers, prompts, grad),
            "one product": functools.partial(there_and_back, batched, prompts, grad),
        }
        for side, median in medians(alternate(steps, options.rounds)).items():
            print(f"N_p={num_prompts:<4d} {side:16s} {1e3 * median:9.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(BATCHES), default=MODEL)
    parser.add_argument("--batch", type=int, default=None, help="default: one that suits a CPU")
    parser.add_argument("--rounds", type=int, default=11, help="counted steps of each side (default: 11)")
    sides = [*SIDES, *EXTRA_SIDES]
    parser.add_argument("--sides", nargs="+", choices=sides, default=list(SIDES), metavar="SIDE")
    parser.add_argument("--prompts", nargs="+", type=int, default=list(PROMPT_COUNTS), metavar="N")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast")
    parser.add_argument("--compile", action="store_true", help="each side under torch.compile")
    parser.add_argument("--memory", action="store_true", help="print memory per image instead of times")
    parser.add_argument("--inference", action="store_true", help="time forward passes instead of steps")
    parser.add_argument("--prompt-keys", action="store_true", help="time the prompts' keys and values alone")
    options = parser.parse_args()
    if options.memory:
        report_memory(options)
    elif options.inference:
        report_inference(options)
    elif options.prompt_keys:
        report_prompt_keys(options)
    else:
        report_steps(options)


if __name__ == "__main__":
    main()
