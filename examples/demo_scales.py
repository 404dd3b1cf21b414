"""Which matters in `spt-fast demo`, the direction or the length of the first prompts? Prints a table.

    python examples/demo_scales.py            accuracies, each start at both lengths
    python examples/demo_scales.py --scores   what eq. 7 makes of the two starts, block by block

Prototypes and VPT's random values differ in both: a block normalises what enters it, so it sees directions
only, but the longer a prompt is, the less a step of one length turns it. Here each start is also tried at
the other one's length (the root mean square over the prompts of a block), with the demo's budget, on the
validation split and other draws of training images than the demo's.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from spt_fast import PromptedViT, build_prototypes, sigmoid_nmi
from spt_fast.backbones.token_extractor import TokenExtractor
from spt_fast.commands.demo.budget import Budget
from spt_fast.commands.demo.run import classifier
from spt_fast.data.shipped import few_per_class, load_backbone, load_digits
from spt_fast.training.loop import fit, shuffled_loader

HEAD_RATE = 3e-3


def random_prompts(num_prompts: int, seed: int) -> Tensor:
    """Random prompts [L, N_p, D], as VPT starts from."""
    torch.manual_seed(seed)
    return PromptedViT(load_backbone(), num_prompts, num_classes=0).prompts.detach()


def root_mean_square(prompts: Tensor) -> Tensor:
    """Per block, [L, 1, 1]."""
    return prompts.square().mean(dim=(1, 2), keepdim=True).sqrt()


def starts(images: Tensor, num_prompts: int, seed: int) -> dict[str, Tensor]:
    """Prompts [L, N_p, D] of both directions at both lengths, by the name of the start."""
    loader = [(batch,) for batch in images.split(100)]
    prototypes = build_prototypes(
        load_backbone(), loader, num_prompts=num_prompts, seed=seed, progress=False
    ).prompts
    random = random_prompts(num_prompts, seed)
    ratio = root_mean_square(prototypes) / root_mean_square(random)
    return {
        "random, short (VPT)": random,
        "random, long": random * ratio,
        "prototypes, short": prototypes / ratio,
        "prototypes, long (SPT)": prototypes,
    }


def accuracy(
    prompts: Tensor, images: Tensor, labels: Tensor, rate: float, budget: Budget, seed: int
) -> float:
    model = load_backbone()
    model.head = classifier(model.num_features, seed=seed)
    validation = DataLoader(TensorDataset(*load_digits("val")), batch_size=100)
    history = fit(
        PromptedViT(model, prompts),
        shuffled_loader(images, labels, batch_size=budget.batch_size, seed=seed),
        validation,
        epochs=budget.epochs,
        lr=HEAD_RATE,
        prompt_lr=rate,
        weight_decay=budget.weight_decay,
        warmup_epochs=budget.warmup_epochs,
        seed=seed,
        val_every=budget.epochs,
        progress=False,
    )
    return 100 * history.val_accuracy[-1]


def print_scores(budget: Budget, seed: int) -> None:
    """Length of each start, mean score p . e, share of scores above 4, where the sigmoid exceeds 0.98.

    Beside the NMI of eq. 8, the same with scores divided by sqrt(D), as attention scales them: not the
    paper's equation.
    """
    pool, labels = load_digits("train")
    images = pool[few_per_class(labels, budget.images_per_class, seed=seed)]
    both = starts(images, budget.num_prompts, seed)
    tokens: list[Tensor] = []
    with TokenExtractor(load_backbone(), lambda _, entering: tokens.append(entering.clone())) as extractor:
        extractor.run(images)
    for name in ("random, short (VPT)", "prototypes, long (SPT)"):
        for block, (entering, prompts) in enumerate(zip(tokens, both[name], strict=True), start=1):
            scores = entering @ prompts.T
            length, share = prompts.square().mean().sqrt(), (scores > 4).float().mean()
            nmi, scaled = (
                sigmoid_nmi(start, entering).mean() for start in (prompts, prompts / prompts.shape[1] ** 0.5)
            )
            print(
                f"{name}, block {block}: rms {length:.2f}, mean {scores.mean():.1f}, above 4: {share:.0%}, "
                f"NMI {nmi:.2g}, with scores / sqrt(D) {scaled:.2g}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", type=float, nargs="+", default=(0.02, 0.1, 0.2))
    parser.add_argument("--seeds", type=int, nargs="+", default=(100, 101, 102))
    parser.add_argument("--scores", action="store_true")
    args = parser.parse_args()
    if args.scores:
        return print_scores(Budget(), args.seeds[0])
    budget, (pool, pool_labels) = Budget(), load_digits("train")
    results: dict[tuple[str, float], list[float]] = {}
    for seed in args.seeds:
        rows = few_per_class(pool_labels, budget.images_per_class, seed=seed)
        images, labels = pool[rows], pool_labels[rows]
        for name, prompts in starts(images, budget.num_prompts, seed).items():
            for rate in args.rates:
                value = accuracy(prompts, images, labels, rate, budget, seed)
                results.setdefault((name, rate), []).append(value)
                print(f"seed {seed}, {name}, rate {rate:g}: {value:.1f}", flush=True)
    names = dict.fromkeys(name for name, _ in results)
    print("\n| start | " + " | ".join(f"{rate:g}" for rate in args.rates) + " |")
    print("| --- |" + " ---: |" * len(args.rates))
    for name in names:
        cells = [results[name, rate] for rate in args.rates]
        shown = [f"{statistics.fmean(v):.1f} ± {statistics.stdev(v) if len(v) > 1 else 0:.1f}" for v in cells]
        print(f"| {name} | " + " | ".join(shown) + " |")


if __name__ == "__main__":
    main()
