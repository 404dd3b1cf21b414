"""What a run leaves in its folder: after each epoch, after some steps, and at its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from spt_fast.analysis.nmi_tracker import NMIHistory, NMITracker
from spt_fast.methods.base import TunedViT
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.plots import nmi_over_epochs, training_curves
from spt_fast.prototypes.result import Prototypes
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.files import write_bytes
from spt_fast.support.results import matplotlib_missing, png
from spt_fast.support.tables import csv_bytes
from spt_fast.support.versions import installed_version
from spt_fast.support.yaml_text import write_yaml
from spt_fast.training.checkpoint import Checkpoint
from spt_fast.training.evaluation import Evaluation, device_of, evaluate_classes
from spt_fast.training.features import FeatureStore
from spt_fast.training.folder import (
    EMA_NAME,
    FIGURE_NAME,
    HISTORY_NAME,
    NMI_FIGURE_NAME,
    NMI_NAME,
    RUN_NAME,
    TENSORBOARD_NAME,
    TEST_CLASSES_NAME,
    TEST_CONFUSION_NAME,
    TEST_NAME,
    TUNED_NAME,
    RunFolder,
)
from spt_fast.training.history import History
from spt_fast.training.loop import Trainer
from spt_fast.training.recipe import Recipe
from spt_fast.training.sources import kept_images
from spt_fast.training.tensorboard import Board

TEST_COLUMNS = ("weights", "images", "accuracy", "mean_class_accuracy")
# What `run.yaml` says beside the facts of a run, and the fact that is added here.
ABOUT_RUN = ("recipe", "versions", "device", "processes", "nmi")
# How often NMI is measured in an epoch, where it has as many batches.
_NMI_PER_EPOCH = 10


class Outputs:
    """Writes the files of a run while a `Trainer` works; all ranks make every call.

    Args:
        folder: the open folder; a run goes on from its checkpoint, if it has one.
        trainer: of the same recipe.
        facts: of data and model, as `Checkpoint.facts`.
        batches: of an epoch.
        nmi: whether to measure it.
        tensorboard: whether to write for TensorBoard.
        figures: whether to draw the curves at the end.
        features: of test images, which other runs have left.

    Raises:
        ValueError: the folder's run is of another recipe, data or model.
    """

    def __init__(
        self,
        folder: RunFolder,
        trainer: Trainer,
        facts: Mapping[str, Any],
        *,
        batches: int,
        nmi: bool,
        tensorboard: bool,
        figures: bool = True,
        features: FeatureStore | None = None,
    ) -> None:
        self._folder, self._trainer = folder, trainer
        self._processes = folder.processes
        assert isinstance(trainer.tuned, TunedViT)
        self._tuned = trainer.tuned
        self._tracker = _tracker(self._tuned, batches) if nmi else None
        self._tensorboard, self._figures, self._features = tensorboard, figures, features
        self._board: Board | None = None
        self._about = about(trainer.recipe, facts, self._tuned, self._processes.size)
        self._facts = {**facts, "nmi": nmi}
        if folder.checkpoint is not None:
            self._go_on_from(folder.checkpoint)

    def begin(self, *, overwrite: bool, start: Prototypes | Tensor | None = None) -> None:
        """What is written before the first step of a run; nothing where it goes on; see `train_in`."""
        if self._folder.checkpoint is not None:
            return
        self._folder.start(overwrite=overwrite)
        if start is not None:
            self._folder.write_start(start)
        self._folder.write({RUN_NAME: write_yaml(self._about).encode()})
        self.save()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the context NMI is measured, and TensorBoard's file is open."""
        if self._trainer.is_done:
            yield
            return
        with self._tracker or nullcontext(), self._open_board():
            yield

    def after_epoch(self, epoch: int, history: History) -> None:
        """Weights, tables, and then the checkpoint, which is never newer than they are."""
        if history.kept_epoch == epoch:
            self._save_weights()
        if self._trainer.average is not None:
            self._save_average()
        evaluation = self._trainer.evaluation
        tables = {} if evaluation is None else evaluation.files()
        nmi = None if self._tracker is None else self._tracker.state_dict()
        if nmi is not None:
            tables[NMI_NAME] = _nmi_history(nmi).to_csv()
        self._folder.write({HISTORY_NAME: history.to_csv(), **tables})
        if self._board is not None:
            self._board.add(epoch, history, _last_nmi(nmi))
        self._write_checkpoint(nmi)

    def save(self) -> None:
        """The checkpoint alone."""
        self._write_checkpoint(None if self._tracker is None else self._tracker.state_dict())

    def end(self) -> None:
        """The weights that were kept, the figures, and the note that the run is finished."""
        checkpoint = self._folder.checkpoint
        assert checkpoint is not None
        if checkpoint.finished:
            return
        self._save_weights()
        if self._figures:
            self._processes.on_rank_0(self._draw)
        self._folder.write_checkpoint(replace(checkpoint, finished=True))

    def test(self, images: Iterable[Any], facts: Mapping[str, Any]) -> Evaluation:
        """The kept weights on test images, once: a run that was tested gives what it found then.

        Where nothing is known of the images, they are tested again.

        Raises:
            ValueError: it was tested on other images.
        """
        checkpoint = self._folder.checkpoint
        assert checkpoint is not None
        facts = self._processes.gather(facts)[0]
        # Of loaders of which nothing is known, these may be other images.
        if checkpoint.test is not None and (then := checkpoint.test["facts"]):
            # Older versions noted less of a loader.
            if {name: facts.get(name) for name in then} != then:
                raise ValueError(
                    f"out: {self._folder.path} holds a test on {then}, and a run is "
                    f"tested once; got {dict(facts)}: use `spt-fast eval` for other images"
                )
            return Evaluation.of_state(checkpoint.test["kept"])
        found = {"kept": self._evaluate(images)}
        if self._trainer.average is not None:
            with self._trainer.averaged():
                found["ema"] = self._evaluate(images)
        rows = [
            (name, each.num_images, each.accuracy, each.mean_class_accuracy) for name, each in found.items()
        ]
        classes, confusion = found["kept"].files().values()
        contents = {
            TEST_CLASSES_NAME: classes,
            TEST_CONFUSION_NAME: confusion,
            TEST_NAME: csv_bytes(TEST_COLUMNS, rows),
        }
        self._folder.write(contents)
        state = {"facts": dict(facts), **{name: each.state() for name, each in found.items()}}
        self._folder.write_checkpoint(replace(checkpoint, test=state))
        return found["kept"]

    def _go_on_from(self, checkpoint: Checkpoint) -> None:
        checkpoint.check_same(self._trainer.recipe, self._facts)
        self._about = dict(checkpoint.about)
        self._trainer.load_state_dict(dict(checkpoint.trainer))
        if self._tracker is not None and checkpoint.nmi is not None:
            self._tracker.load_state_dict(checkpoint.nmi)

    def _write_checkpoint(self, nmi: Mapping[str, Any] | None) -> None:
        trainer = self._trainer
        checkpoint = Checkpoint(
            recipe=asdict(trainer.recipe),
            facts=self._facts,
            about=self._about,
            trainer=trainer.state_dict(),
            nmi=nmi,
        )
        self._folder.write_checkpoint(checkpoint)

    def _save_weights(self) -> None:
        path = self._folder[TUNED_NAME]
        self._processes.on_rank_0(lambda: self._tuned.save(path, overwrite=True))

    def _save_average(self) -> None:
        path = self._folder[EMA_NAME]
        with self._trainer.averaged():
            self._processes.on_rank_0(lambda: self._tuned.save(path, overwrite=True))

    def _evaluate(self, images: Iterable[Any]) -> Evaluation:
        module, batches = kept_images(self._tuned, images, self._features)
        names = self._tuned.class_names
        try:
            return evaluate_classes(module, batches, names, processes=self._processes, argument="test_data")
        except NonFiniteError as error:
            # As in a validation: the last steps may have spoilt the weights.
            raise FloatingPointError(f"{error}, in the test; lower lr, if it is not the image") from error

    def _draw(self) -> None:
        """The figures, by rank 0 alone."""
        folder, checkpoint = self._folder, self._folder.checkpoint
        if matplotlib_missing() or checkpoint is None:
            return
        contents = {FIGURE_NAME: png(training_curves(folder[HISTORY_NAME], title=folder.path.name))}
        if checkpoint.nmi is not None:
            steps = checkpoint.nmi["step"] / self._trainer.epoch
            runs = {"": {folder.path.name: folder[NMI_NAME]}}
            contents[NMI_FIGURE_NAME] = png(nmi_over_epochs(runs, steps_per_epoch=steps))
        for name, content in contents.items():
            write_bytes(folder[name], content, overwrite=True)

    @contextmanager
    def _open_board(self) -> Iterator[None]:
        if not self._tensorboard or self._processes.rank:
            yield
            return
        self._board = Board(self._folder[TENSORBOARD_NAME], self._trainer.epoch)
        try:
            yield
        finally:
            self._board.close()


def about(recipe: Recipe, facts: Mapping[str, Any], tuned: nn.Module, processes: int) -> dict[str, Any]:
    """What `run.yaml` says: recipe, facts, versions and device; no path, no time."""
    device = device_of(tuned)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "recipe": asdict(recipe),
        **facts,
        "versions": {name: installed_version(name) or "unknown" for name in ("spt_fast", "torch", "timm")},
        "device": device.type if name is None else f"{device.type} ({name})",
        "processes": processes,
    }


def check_prompts_learn(learn: bool) -> None:
    """ValueError where NMI is to be measured and no prompts learn."""
    if not learn:
        raise ValueError("nmi=True (--nmi) follows prompts while they learn, but here no prompts learn")


def _tracker(tuned: TunedViT, batches: int) -> NMITracker:
    made_of = tuned.prompt_parameters() if isinstance(tuned, PromptedViT) else []
    check_prompts_learn(any(parameter.requires_grad for parameter in made_of))
    return NMITracker(tuned, every=max(1, batches // _NMI_PER_EPOCH))


def _nmi_history(state: Mapping[str, Any]) -> NMIHistory:
    return NMIHistory(state["steps"], state["values"])


def _last_nmi(state: Mapping[str, Any] | None) -> dict[str, float]:
    if state is None or not state["steps"]:
        return {}
    row = state["values"][-1].tolist()
    named = {f"nmi/block_{block}": value for block, value in enumerate(row, start=1)}
    return {**named, "nmi/mean": sum(row) / len(row)}
