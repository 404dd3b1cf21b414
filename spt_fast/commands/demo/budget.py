"""What each method of the demo is given: images, epochs, prompts and learning rates."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from spt_fast.data.shipped import few_per_class, load_digits
from spt_fast.support.arguments import check_int

Split = tuple[Tensor, Tensor]  # images (or features) [M, ...] and labels [M]


@dataclass(frozen=True)
class Rates:
    """Highest learning rates of the head and of the prompts (None where no prompt is trained)."""

    head: float
    prompts: float | None = None


# Chosen on the validation split by examples/tune_demo.py; the whole sweep is in docs/demo.md.
LEARNING_RATES = {
    "linear probe": Rates(head=3e-3),
    "VPT-Deep, frozen": Rates(head=3e-3),
    "SPT-Deep, frozen": Rates(head=3e-3),
    "VPT-Deep": Rates(head=3e-3, prompts=1.0),
    "SPT-Deep": Rates(head=3e-3, prompts=1.0),
}
METHODS = tuple(LEARNING_RATES)


@dataclass(frozen=True)
class Budget:
    """What each method gets: the same images, in the same order, for the same number of epochs.

    Raises:
        TypeError: a count is not an integer.
        ValueError: a count is below 1.
    """

    images_per_class: int = 10
    epochs: int = 25
    warmup_epochs: float = 2.5
    batch_size: int = 20
    num_prompts: int = 20
    weight_decay: float = 1e-4
    val_every: int = 5
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        for name in ("images_per_class", "epochs", "batch_size", "num_prompts", "val_every"):
            check_int(name, getattr(self, name), 1)

    def scaled(self, *, epochs: int | None = None, seeds: int | None = None) -> Budget:
        """Another number of epochs (warm-up keeps its share) or of seeds; None leaves it.

        Raises:
            TypeError: a number is not an integer.
            ValueError: a number is below 1.
        """
        epochs = self.epochs if epochs is None else check_int("epochs", epochs, 1)
        return replace(
            self,
            epochs=epochs,
            warmup_epochs=self.warmup_epochs * epochs / self.epochs,
            seeds=self.seeds if seeds is None else tuple(range(check_int("seeds", seeds, 1))),
        )


@dataclass(frozen=True)
class Task:
    """The shipped digits in memory; tests cut `val` and `test` short to save time."""

    train: Split
    val: Split
    test: Split

    @classmethod
    def load(cls) -> Task:
        """All of them."""
        return cls(load_digits("train"), load_digits("val"), load_digits("test"))

    def few(self, per_class: int, seed: int) -> Split:
        """The training images of one seed."""
        images, labels = self.train
        rows = few_per_class(labels, per_class, seed=seed)
        return images[rows], labels[rows]
