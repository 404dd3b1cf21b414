"""Train the parameters of a model that require a gradient, on images and labels, as a recipe says."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

from torch import Tensor, nn

from spt_fast.data.identity import labels_of
from spt_fast.data.loading import ImageLoader
from spt_fast.data.loading import shuffled_loader as shuffled_loader
from spt_fast.data.prefetch import ahead
from spt_fast.support.arguments import check_bool
from spt_fast.support.distributed import ALONE, Processes
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.progress import progress_bar
from spt_fast.support.randomness import seed_all, seed_of, seeded
from spt_fast.training.agreement import batch_size_of, check_agreement
from spt_fast.training.drop_path import stochastic_depth
from spt_fast.training.evaluation import (
    Evaluation,
    check_gives_logits,
    device_of,
    evaluate_classes,
)
from spt_fast.training.features import FeatureStore
from spt_fast.training.history import History
from spt_fast.training.learned import Average, frozen_but_saved, learned, put_back, take_back
from spt_fast.training.loaders import (
    check_loaders,
    check_two_images,
    count_batches,
    generators,
    warn_of_one_order,
)
from spt_fast.training.losses import Losses
from spt_fast.training.objective import Objective
from spt_fast.training.optimizer import LearningRates, check_groups, create_optimizer
from spt_fast.training.recipe import Recipe, given_or_default
from spt_fast.training.sources import Source, find_source
from spt_fast.training.step import Stepper, channels_last, has_batch_norm, warn_of_slow_products


class Batches(Iterable[Any], Sized, Protocol):
    """A loader, as `labelled_batch` reads its batches, that is iterated once per epoch and has a length."""


def fit(
    tuned: nn.Module,
    train_loader: Batches,
    val_loader: Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    *,
    progress: bool = True,
    on_epoch: Callable[[int, History], None] | None = None,
    **fields: Any,
) -> History:
    """Train every parameter of `tuned` that requires a gradient, in place; nothing is written.

    >>> fit(tuned, train_loader, val_loader, epochs=20, lr=1e-2)

    Args:
        tuned: maps images to logits, e.g. a `PromptedViT`; trained on the device its parameters are on.
        train_loader: batches of images [B, ...] and labels [B], as `data.batches.labelled_batch` reads them,
            with a length; it decides the order of the images. Images with the label -100 count nowhere.
        val_loader: such batches, evaluated after every `val_every`-th epoch and the last.
        recipe: how to train; None is `Recipe()`, the paper's (Sec. 4.1) where nothing else is said there.
        progress: show a bar on stderr.
        on_epoch: called as `on_epoch(epoch, history)` after every epoch, from 1; it may raise to stop.
        fields: of `Recipe`, instead of those of `recipe`.

    The seed of the recipe decides the random numbers that the model's forward pass draws, as for dropout, and
    those that transforms of images draw in this process. The global random states of Python, NumPy and torch
    are restored at the end. The weights at the end are those that the recipe keeps; the paper's released code
    takes the best on its test images, which `fit` never sees.

    Raises:
        TypeError: `train_loader` has no length, `val_loader` is an iterator, which can be read only once, a
            batch holds something else, a field is unknown, or an argument is of the wrong type.
        ValueError: a field is out of range, or states what `tuned` or `train_loader` can be seen not to be;
            a loader or a batch is empty, labels have another shape or are no classes of the model, no
            parameter requires a gradient, or one that does is float16.
        FloatingPointError: the loss is NaN or infinite; the message holds epoch, step and rate. It is raised
            some steps later, so that no step waits for its loss; the model has taken them. Or the logits of
            a validation image are NaN.
    """
    recipe = given_or_default(recipe).replace(**fields)
    check_gives_logits(tuned)
    check_agreement(recipe, tuned, train_loader, given=fields)
    return Trainer(tuned, train_loader, val_loader, recipe, progress=progress).run(on_epoch=on_epoch)


class Trainer:
    """A run of training that can be stopped after any step and gone on with, also in another process.

    Args:
        tuned, train_loader, val_loader, recipe, progress: as in `fit`.
        processes: those that train together: each has a loader of its own share of every batch, of which some
            may be empty, and of the validation images.
        features: what other runs on the same data sets have left, where nothing but the head learns.

    Attributes:
        history: what the run has seen so far.
        epoch: how many epochs are finished.
        step: how many steps of the next epoch are.
        evaluation: of the last validation, or None.
        average: the moving average of what learns, or None.

    Raises:
        TypeError, ValueError: as `fit`.
    """

    def __init__(
        self,
        tuned: nn.Module,
        train_loader: Batches,
        val_loader: Iterable[Any] | None = None,
        recipe: Recipe | None = None,
        *,
        processes: Processes = ALONE,
        progress: bool = True,
        features: FeatureStore | None = None,
    ) -> None:
        self.tuned, self.recipe = tuned, given_or_default(recipe)
        check_gives_logits(tuned)
        check_agreement(self.recipe, tuned, train_loader, processes=processes)
        if recipe is not None:
            warn_of_one_order(train_loader)
        check_loaders(train_loader, val_loader, self.recipe)
        if has_batch_norm(tuned):
            check_two_images(train_loader)
        self._train_loader, self._val_loader = train_loader, val_loader
        self._processes, self._progress = processes, check_bool("progress", progress)
        self._features = features
        self._batches = count_batches(train_loader)
        self._steps = -(-self._batches // self.recipe.accumulate)
        self._images: int | None = getattr(train_loader, "num_images", None)
        self._device = device_of(tuned)
        self.optimizer = create_optimizer(tuned, _with_batches_of(self.recipe, train_loader, processes))
        objective = _objective(self.recipe, tuned, train_loader)
        self._stepper = Stepper(self.optimizer, self.recipe, objective, self._device, processes)
        warn_of_slow_products(self._stepper.amp or getattr(tuned, "weight_dtype", None), self._device)
        self._rates = LearningRates(self.optimizer, self.recipe, self._steps)
        self.average = None if self.recipe.ema is None else Average(tuned, self.recipe.ema)
        self.history = History(keep=self.recipe.keep)
        self.evaluation: Evaluation | None = None
        self.epoch = self.step = 0
        self._best: dict[str, Tensor] = {}
        self._losses = Losses(1, processes=processes)
        self._seconds = 0.0
        self._orders = generators(train_loader)
        self._order_states = [generator.get_state() for generator in self._orders]

    def run(
        self,
        *,
        on_epoch: Callable[[int, History], None] | None = None,
        on_step: Callable[[Trainer], None] | None = None,
    ) -> History:
        """Train up to the last epoch, from wherever the run is; then put the kept weights into `tuned`.

        Args:
            on_epoch: as in `fit`.
            on_step: called after every step but the last of an epoch; `state_dict` may be taken then.

        Raises:
            As `fit`.
        """
        for name, callback in (("on_epoch", on_epoch), ("on_step", on_step)):
            if callback is not None and not callable(callback):
                raise TypeError(f"{name} must be callable or None, got {callback!r}")
        if not self.is_done:
            with self._prepared() as source, self._bar() as bar:
                while not self.is_done:
                    self._train_epoch(source, bar, on_step)
                    self._validate(source)
                    self._end_epoch()
                    bar.set_postfix(_last_values(self.history))
                    if on_epoch is not None:
                        on_epoch(self.epoch, self.history)
        self.finish()
        return self.history

    @property
    def is_done(self) -> bool:
        """Whether all epochs are done, or none of the last `patience` validations was a better one."""
        patience, seen = self.recipe.patience, self.history.val_accuracy
        if patience is not None and seen:
            since_best = len(seen) - 1 - seen.index(max(seen))
            if since_best >= patience:
                return True
        return self.epoch >= self.recipe.epochs

    def finish(self) -> None:
        """Give `tuned` the weights that the recipe keeps of the epochs so far."""
        if self._best and self.history.kept_epoch != self.epoch:
            take_back(self.tuned, self._best)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context, `tuned` has the moving average of its weights.

        Raises:
            ValueError: the recipe has no `ema`.
        """
        if self.average is None:
            raise ValueError("the recipe has no ema, so there is no moving average")
        with self.average.in_place():
            yield

    def state_dict(self) -> dict[str, Any]:
        """All that a `Trainer` of the same arguments needs to go on from here; waits for the device.

        Copies, as tensors, numbers, strings, lists and dicts: `torch.load(weights_only=True)` reads them.
        """
        total, count = self._losses.totals()
        history = {name: value for name, value in vars(self.history).items() if name != "keep"}
        present = {
            "epoch": self.epoch,
            "step": self.step,
            "frozen": {name: tensor.detach() for name, tensor in self._frozen.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": {} if self.average is None else self.average.values(),
            "scaler": self._stepper.scaler.state_dict(),
            "history": {name: list(value) for name, value in history.items()},
            "best": self._best,
            "running": {"loss": total, "images": count, "seconds": self._seconds},
            "orders": list(self._order_states),
            "evaluation": None if self.evaluation is None else self.evaluation.state(),
        }
        # The run goes on in these very tensors and lists.
        return {"learned": learned(self.tuned), **copy.deepcopy(present)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken.

        Raises:
            KeyError, ValueError: the state is that of another model or recipe, or of a version that groups
                parameters otherwise.
        """
        check_groups(self.optimizer, state["optimizer"])
        # The caller may go on from it again.
        state = copy.deepcopy(state)
        take_back(self.tuned, state["learned"])
        # Older states have none: the run goes on with those of this model.
        put_back(self._frozen, state.get("frozen", {}))
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load(state["average"])
        self._stepper.scaler.load_state_dict(state["scaler"])
        self.history = History(keep=self.recipe.keep, **state["history"])
        self.epoch, self.step = state["epoch"], state["step"]
        self._best = state["best"]
        running = state["running"]
        self._losses = self._losses_of(self.epoch + 1, running["loss"], running["images"])
        self._seconds = running["seconds"]
        self._order_states = state["orders"]
        for generator, of_order in zip(self._orders, self._order_states, strict=True):
            generator.set_state(of_order)
        self.evaluation = None if state["evaluation"] is None else Evaluation.of_state(state["evaluation"])

    @cached_property
    def _frozen(self) -> dict[str, Tensor]:
        return frozen_but_saved(self.tuned)

    @contextmanager
    def _prepared(self) -> Iterator[Source]:
        """What a step needs, for the time of training."""
        recipe = self.recipe
        with ExitStack() as stack:
            stack.enter_context(seeded(recipe.seed, self._device))
            stack.enter_context(stochastic_depth(self.tuned, recipe.drop_path))
            stack.enter_context(channels_last(self.tuned, recipe.channels_last))
            with self._stepper.autocast():
                loaders = self._train_loader, self._val_loader
                source = find_source(self.tuned, *loaders, recipe, self._processes, self._features)
            yield source

    def _train_epoch(self, source: Source, bar: Any, on_step: Callable[[Trainer], None] | None) -> None:
        self.tuned.train()
        source.module.train()
        started = time.perf_counter() - self._seconds
        batches = self._begin_epoch(source)
        while True:
            # Of the epoch and the step alone: a run that goes on in another process draws the same numbers.
            if self.step:
                seed_all(self._seed_of_step(self.step), self._device)
            group = list(islice(batches, self.recipe.accumulate))
            if not group:
                break
            images = self._take_step(source.module, [None if self._is_lost(each) else each for each in group])
            self.step += 1
            self._seconds = time.perf_counter() - started
            bar.update(len(group) if self._images is None else images * self._processes.size)
            if on_step is not None and self.step < self._steps:
                on_step(self)
        self.history.loss.append(self._losses.mean())
        rate, prompt_rate = self._rates.rates()
        self.history.lr.append(rate)
        self.history.prompt_lr.append(prompt_rate)
        self.history.seconds.append(time.perf_counter() - started)

    def _begin_epoch(self, source: Source) -> Iterator[Any]:
        # As at the first step, also where that has been done: a loader may draw its order from these numbers.
        seed_all(self._seed_of_step(0), self._device)
        for generator, state in zip(self._orders, self._order_states, strict=True):
            generator.set_state(state)
        skip = self.step * self.recipe.accumulate
        return ahead(source.batches(self.epoch + 1, skip), self._device)

    def _end_epoch(self) -> None:
        self.epoch, self.step, self._seconds = self.epoch + 1, 0, 0.0
        self._losses = self._losses_of(self.epoch + 1)
        self._order_states = [generator.get_state() for generator in self._orders]
        if self.recipe.keep == "best" and self.history.kept_epoch == self.epoch:
            self._best = learned(self.tuned)

    def _is_lost(self, batch: Any) -> bool:
        """Whether no image of a batch was readable; of several processes, another may have some."""
        ours = isinstance(self._train_loader, ImageLoader) and self._processes.size == 1
        return ours and len(batch[1]) == 0

    def _take_step(self, module: nn.Module, group: Sequence[Any]) -> int:
        """One step, unless all its batches are lost; the number of its images here."""
        self._rates.set(self.epoch * self._steps + self.step)
        if all(batch is None for batch in group):
            return 0
        loss, count = self._stepper.take(module, group, self.step * self.recipe.accumulate)
        if self.average is not None:
            self.average.update()
        self._losses.add(loss, count, self.step + 1, self._rates.rates()[0])
        return count

    def _validate(self, source: Source) -> None:
        epoch = self.epoch + 1
        if source.validation is None or (epoch % self.recipe.val_every and epoch < self.recipe.epochs):
            return
        self.evaluation = self._evaluate(source)
        self.history.val_accuracy.append(self.evaluation.accuracy)
        self.history.val_epochs.append(epoch)
        if self.average is not None:
            with self.average.in_place():
                self.history.ema_accuracy.append(self._evaluate(source).accuracy)

    def _evaluate(self, source: Source) -> Evaluation:
        names = getattr(self.tuned, "class_names", None)
        assert source.validation is not None
        try:
            with self._stepper.autocast():
                return evaluate_classes(
                    source.evaluated,
                    source.validation,
                    names,
                    processes=self._processes,
                    argument="val_loader",
                )
        except NonFiniteError as error:
            raise FloatingPointError(
                f"{error}, in the validation after epoch {self.epoch + 1}; lower lr, if it is not the image"
            ) from error

    def _losses_of(self, epoch: int, total: float = 0.0, count: int = 0) -> Losses:
        return Losses(epoch, total=total, count=count, processes=self._processes)

    def _seed_of_step(self, step: int) -> int:
        return seed_of(self.recipe.seed, self.epoch, step, self._processes.rank)

    def _bar(self) -> Any:
        """Of images, and so of images/s, where the loader knows how many there are; else of batches."""
        epoch = self._batches if self._images is None else self._images
        share = self.step / self._steps
        return progress_bar(
            show=self._progress and self._processes.rank == 0,
            total=self.recipe.epochs * epoch,
            initial=round((self.epoch + share) * epoch),
            unit="batch" if self._images is None else "image",
            desc="train",
        )


def _with_batches_of(recipe: Recipe, loader: Any, processes: Processes) -> Recipe:
    """`recipe`, with rates for the images that a batch really has, where that matters and is known."""
    size = None if recipe.lr_scale == "none" else batch_size_of(loader, processes)
    return recipe if size is None else recipe.replace(batch_size=size)


def _objective(recipe: Recipe, tuned: nn.Module, train_loader: Any) -> Objective:
    num_classes = getattr(tuned, "num_classes", None)
    return Objective(
        label_smoothing=recipe.label_smoothing,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
        num_classes=num_classes,
        class_counts=_class_counts(train_loader, num_classes) if recipe.balance == "loss" else None,
    )


def _class_counts(loader: Any, num_classes: int | None) -> list[int]:
    """The number of images of each class."""
    labels = labels_of(loader.dataset, loader.rows) if isinstance(loader, ImageLoader) else None
    if labels is None or num_classes is None:
        raise ValueError(
            "balance='loss' needs a model that states num_classes and a loader that knows its labels, as "
            f"open_labelled_images and shuffled_loader give one, got {type(loader).__name__}"
        )
    counts = Counter(labels)
    return [counts[label] for label in range(num_classes)]


def _last_values(history: History) -> dict[str, str]:
    values = {"loss": f"{history.loss[-1]:.3f}"}
    if history.val_accuracy:
        values["val"] = f"{history.val_accuracy[-1]:.1%}"
    return values
