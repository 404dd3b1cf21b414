"""A training run in a folder: started, gone on with after whatever ended it, and evaluated."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, distributed, nn

from spt_fast.backbones.identity import describe, readable
from spt_fast.data.batches import labelled_batch
from spt_fast.data.images import LabelledImages
from spt_fast.data.listing import some_names
from spt_fast.methods.base import TunedViT
from spt_fast.prompting.checks import check_class_names
from spt_fast.prototypes.result import Prototypes
from spt_fast.support.arguments import check_bool, check_int
from spt_fast.support.distributed import find_processes
from spt_fast.training.agreement import check_agreement
from spt_fast.training.evaluation import Evaluation
from spt_fast.training.features import FeatureStore
from spt_fast.training.folder import RunFolder, run_folder
from spt_fast.training.history import History
from spt_fast.training.loop import Batches, Trainer
from spt_fast.training.outputs import ABOUT_RUN, Outputs
from spt_fast.training.recipe import Recipe, given_or_default
from spt_fast.training.tensorboard import check_tensorboard


@dataclass(frozen=True)
class Run:
    """What came out of `train`.

    Attributes:
        history: loss, accuracy, rates and time of each epoch, those before a resume too.
        evaluation: of the last validation; None without validation images.
        test: of the kept weights on the test images; None without them.
        folder: where the files are.
        paths: of the files there, by name.
        tuned: the model, with the weights that the recipe keeps.
    """

    history: History
    evaluation: Evaluation | None
    test: Evaluation | None
    folder: Path
    paths: Mapping[str, Path]
    tuned: TunedViT

    def summary(self) -> str:
        """Lines: that of the history, and accuracy on the test images, if there are any."""
        if self.test is None:
            return self.history.summary()
        test = f"test accuracy {self.test.accuracy:.2%} of {self.test.num_images} images"
        return f"{self.history.summary()}\n{test}"


def train(
    tuned: TunedViT,
    train_data: LabelledImages | Batches,
    val_data: LabelledImages | Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    *,
    out: str | os.PathLike[str],
    resume: bool = False,
    overwrite: bool = False,
    test_data: LabelledImages | Iterable[Any] | None = None,
    nmi: bool = False,
    tensorboard: bool = False,
    facts: Mapping[str, Any] | None = None,
    save_every: int | None = None,
    progress: bool = True,
    process_group: distributed.ProcessGroup | None = None,
) -> Run:
    """Train `tuned` by a recipe, in a folder from which an interrupted run goes on (docs/train.md).

    >>> run = spt_fast.train(tuned, train_data, val_data, recipe, out="runs/birds", resume=True)

    After every epoch the folder holds the weights, tables and a checkpoint, each file whole. On one CPU
    process, a run that was killed at any moment and resumed gives the same bits as one that was not.

    Args:
        tuned: of `training.build.build`, `spt_fast.tune`, or any `PromptedViT`. A resumed run replaces what
            it learns.
        train_data, val_data, test_data: of `data.images.open_labelled_images`, or loaders as `fit` takes.
            Of loaders to test with, batches and images are counted, by which a resumed run knows them.
            Class names and preprocessing that `tuned` does not state are taken from the first. Test images
            are evaluated once, at the end, and choose nothing.
        recipe: None is `Recipe()`.
        out: the folder, made if need be.
        resume: go on with the run in `out`; start if there is none, and return it if it is finished.
        overwrite: start, and replace the results in `out`.
        nmi: measure the NMI of prompts and patch tokens about ten times in an epoch.
        tensorboard: write for TensorBoard too (extra: train).
        facts: more of what the run is of, such as the names of data and model: plain values. They are
            written into run.yaml, beside its own and under other names, and a run is resumed with the same
            ones only.
        save_every: write the checkpoint after every so many steps too; None: after every epoch.
        progress: show a bar on stderr.
        process_group: of the processes that train together; None is the default group, or this process
            alone. Each has its own share of the images (`open_labelled_images(processes=)`); rank 0 writes.

    Raises:
        FileExistsError: `out` holds results, and neither `resume` nor `overwrite` is given.
        ImportError: `tensorboard`, and it is not installed.
        TypeError, FloatingPointError: as `fit`; `test_data` is an iterator.
        ValueError: as `fit`; images of `open_labelled_images` have other classes than `tuned`, or in another
            order; another run writes into `out` now; its checkpoint cannot be read, or is of another recipe,
            data or model.
        OSError: a file cannot be written. The last whole checkpoint stays.
    """
    processes = find_processes(process_group)
    with run_folder(out, resume=resume, overwrite=overwrite, processes=processes) as folder:
        return train_in(
            folder,
            tuned,
            train_data,
            val_data,
            recipe,
            overwrite=overwrite,
            test_data=test_data,
            nmi=nmi,
            tensorboard=tensorboard,
            facts=facts,
            save_every=save_every,
            progress=progress,
        )


def train_in(
    folder: RunFolder,
    tuned: TunedViT,
    train_data: LabelledImages | Batches,
    val_data: LabelledImages | Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    *,
    overwrite: bool = False,
    test_data: LabelledImages | Iterable[Any] | None = None,
    nmi: bool = False,
    tensorboard: bool = False,
    facts: Mapping[str, Any] | None = None,
    save_every: int | None = None,
    progress: bool = True,
    start: Prototypes | Tensor | None = None,
    features: FeatureStore | None = None,
    figures: bool = True,
) -> Run:
    """`train` in a folder that is open already.

    Args:
        start: what prompts start from; kept beside the run, if there is any.
        features: as `Trainer` takes them.
        figures: whether to draw the curves at the end.
    """
    if not isinstance(tuned, TunedViT):
        raise TypeError(f"tuned must be a PromptedViT, or of another method, got {type(tuned).__name__}")
    recipe = given_or_default(recipe)
    check_agreement(recipe, tuned, train_data, argument="train_data", processes=folder.processes)
    if save_every is not None:
        check_int("save_every", save_every, 1, "or None")
    if check_bool("tensorboard", tensorboard):
        folder.processes.on_rank_0(check_tensorboard)
    if isinstance(test_data, Iterator):
        raise TypeError(
            "test_data must be a loader that can be read again, as a list or a DataLoader can, got "
            f"{type(test_data).__name__}"
        )
    _take_names(tuned, train_data)
    _check_classes(tuned, train_data=train_data, val_data=val_data, test_data=test_data)
    # What could not be saved is found now, and not after an epoch.
    tuned.learned_state_dict()
    check_class_names(tuned.class_names, getattr(tuned.model, "num_classes", None))
    trainer = Trainer(
        tuned,
        _loader(train_data),
        None if val_data is None else _loader(val_data),
        recipe,
        processes=folder.processes,
        progress=progress,
        features=features,
    )
    known = run_facts(tuned, train_data, val_data, facts or {})
    outputs = Outputs(
        folder,
        trainer,
        folder.processes.gather(known)[0],
        batches=len(_loader(train_data)),
        nmi=check_bool("nmi", nmi),
        tensorboard=tensorboard,
        figures=figures,
        features=features,
    )
    with _explained(folder):
        outputs.begin(overwrite=overwrite, start=start)
        with outputs.recording():
            trainer.run(on_epoch=outputs.after_epoch, on_step=_every(save_every, outputs))
        outputs.end()
        test = None if test_data is None else outputs.test(_loader(test_data), _test_facts(test_data))
    return Run(trainer.history, trainer.evaluation, test, folder.path, folder.paths(), tuned)


def run_facts(
    tuned: TunedViT, train_data: Any, val_data: Any, given: Mapping[str, Any]
) -> dict[str, str | int | float | bool | None]:
    """What a run is of, beside its recipe: the facts `given`, of the data and of the model."""
    if not isinstance(given, Mapping):
        raise TypeError(f"facts must map names to plain values, got {given!r:.60}")
    for name, value in given.items():
        if not isinstance(name, str) or not isinstance(value, str | int | float | bool | None):
            raise TypeError(f"facts must map names to plain values, got {name!r}: {value!r:.60}")
    found = {
        **_data_facts("", train_data),
        **({} if val_data is None else _data_facts("val_", val_data)),
        **{f"backbone_{name}": fact for name, fact in readable(describe(tuned.model)).items()},
        "tuned_method": tuned.method,
        **{f"tuned_{name}": value for name, value in tuned.options.items()},
        "prompts_per_block": getattr(tuned, "num_prompts", 0),
        "trainable_parameters": tuned.num_trainable(),
    }
    if taken := [name for name in given if name in found or name in ABOUT_RUN]:
        raise ValueError(
            f"facts must have other names than those that run.yaml has already, got {', '.join(taken)}"
        )
    return {**given, **found}


def _data_facts(prefix: str, data: Any) -> dict[str, str | int]:
    """Of a user's own loader it is known how many batches it has, which for evaluation says little."""
    facts: dict[str, str | int] = {}
    if isinstance(data, LabelledImages):
        facts = {"images": data.num_images, "classes": len(data.class_names), "fingerprint": data.fingerprint}
    elif not prefix:
        with suppress(TypeError):
            facts = {"batches": len(data)}
    return {prefix + name: fact for name, fact in facts.items()}


def _test_facts(data: Any) -> dict[str, str | int]:
    """Also of a user's own loader the number of images, where it can be told without reading them."""
    facts = _data_facts("", data)
    if isinstance(data, LabelledImages):
        return facts
    # What is wrong with a batch is for the test to say.
    with suppress(TypeError, ValueError):
        if isinstance(data, list | tuple):
            facts["images"] = sum(len(labelled_batch(batch)[1]) for batch in data)
        elif hasattr(data, "dataset"):
            facts["images"] = len(data.dataset)
    return facts


def _loader(data: Any) -> Any:
    return data.loader if isinstance(data, LabelledImages) else data


def _take_names(tuned: TunedViT, data: Any) -> None:
    if isinstance(data, LabelledImages):
        if tuned.class_names is None:
            tuned.class_names = data.class_names
        if tuned.preprocessing is None:
            tuned.preprocessing = data.loader.preprocessing


def _check_classes(tuned: TunedViT, **data: Any) -> None:
    """ValueError where labels do not count the classes of the head: an accuracy would be of other classes."""
    for argument, images in data.items():
        if not isinstance(images, LabelledImages) or tuned.class_names is None:
            continue
        if tuple(images.class_names) != tuple(tuned.class_names):
            raise ValueError(
                f"{argument} must have the classes of tuned in their order, {some_names(tuned.class_names)}, "
                f"got {some_names(images.class_names)}; open_labelled_images(..., "
                "class_names=tuned.class_names) numbers them so"
            )


def _every(steps: int | None, outputs: Outputs) -> Any:
    """A callback that saves after every so many steps, counted from where the run starts or goes on."""
    if steps is None:
        return None
    taken = 0

    def save(_: nn.Module) -> None:
        nonlocal taken
        taken += 1
        if taken % steps == 0:
            outputs.save()

    return save


@contextmanager
def _explained(folder: RunFolder) -> Iterator[None]:
    """Errors that end a run, with what is left of it and how it goes on."""
    try:
        yield
    except (FloatingPointError, OSError) as error:
        kept = folder.what_is_kept()
        if not kept:
            raise
        if isinstance(error, FloatingPointError):
            kept += "; to resume it would lead here again: start another run"
        else:
            kept += "; go on from there with resume=True (--resume)"
        raise type(error)(f"{error}; {kept}") from error
