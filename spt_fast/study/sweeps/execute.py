"""One run of a sweep after the other: model, images, prototypes and features are opened once and shared."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spt_fast.backbones.identity import describe
from spt_fast.backbones.open import open_model
from spt_fast.data.cache import ImageCache
from spt_fast.data.pool import Part, Pool
from spt_fast.data.task import open_task
from spt_fast.methods.base import TunedViT
from spt_fast.methods.vipamin import vipamin_prompts
from spt_fast.prototypes.build import build_prototypes
from spt_fast.prototypes.options import choose_capacity
from spt_fast.prototypes.result import Prototypes
from spt_fast.study.runs import PROTOTYPES_FOLDER, RUNS_FOLDER, Row
from spt_fast.study.sweeps.plan import PlannedRun
from spt_fast.study.sweeps.tasks import Task
from spt_fast.support.yaml_text import read_yaml
from spt_fast.training.build import build, check_buildable
from spt_fast.training.checkpoint import CHECKPOINT_NAME
from spt_fast.training.features import FeatureStore
from spt_fast.training.folder import RUN_NAME, TUNED_NAME, run_folder
from spt_fast.training.recipe import Recipe
from spt_fast.training.run import Run, train_in

# In the metadata of shared prototypes: how long the pass took, and which images it read.
_SECONDS, _IMAGES = "seconds", "images_fingerprint"
# In the facts of a run: the file of what its prompts start from.
_START = "prototypes"
_TRAINED_ON: Mapping[str, Part] = {"search": "train", "final": "train+val"}


class Workshop:
    """Does runs, and keeps between them what they share; one for each process.

    Args:
        model: options of `open_model`, with its name as "model".
        images: of `IMAGE_OPTIONS`.
        out: the folder of the study.
        device: of the model.
        sharing: how many processes share the memory of this machine.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        images: Mapping[str, Any],
        out: Path,
        device: torch.device,
        sharing: int = 1,
    ) -> None:
        self._model, self._images, self._out = dict(model), dict(images), out
        self._device, self._sharing = device, sharing
        self._models: dict[tuple[Any, ...], nn.Module] = {}
        self._pools: dict[tuple[Any, ...], Pool] = {}
        self._features = FeatureStore()
        self._task: Task | None = None
        self._cache: ImageCache | None = None
        # The last pass, which gives other prompt lengths too, and its seconds.
        self._pass: tuple[tuple[Any, ...], Prototypes, float] | None = None

    def run(self, planned: PlannedRun) -> Row:
        """Do a run, or go on with it where a process that ended has left it.

        Returns:
            Its row. The loss of a run that diverged is NaN, and it has no accuracy.

        Raises:
            OSError, RuntimeError, TypeError, ValueError: what prevents it; the run is named.
        """
        if planned.task != self._task:
            self._begin_task(planned.task)
        try:
            return self._run(planned)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, NotImplementedError) or len(error.args) != 1:
                raise
            raise type(error)(f"{planned.name}: {error}") from error

    def facts(self, task: Task, recipe: Recipe) -> dict[str, Any]:
        """What a task is of: images, classes and fingerprint of each of its sets."""
        images = self._pool(task, recipe).images
        sets = {"train": images.train, "val": images.val, "test": images.test}
        return {
            name: {
                "images": each.num_images,
                "classes": len(each.class_names),
                "fingerprint": each.fingerprint,
            }
            for name, each in sets.items()
            if each is not None
        }

    def check_subsets(self, runs: Iterable[PlannedRun]) -> None:
        """That the images of these runs can be drawn.

        Raises:
            ValueError: a class has not so many; the first such run is named.
        """
        seen: set[tuple[Any, ...]] = set()
        for planned in runs:
            key = (planned.task, planned.stage, *planned.subset.items())
            if not planned.subset or key in seen:
                continue
            seen.add(key)
            try:
                _rows(self._pool(planned.task, planned.recipe), planned)
            except ValueError as error:
                raise ValueError(f"{planned.name}: {error}") from error

    def check_models(self, runs: Iterable[PlannedRun]) -> None:
        """That each arm's method takes the backbone and its options, which no run should be waited for.

        Raises:
            TypeError, ValueError: it does not; the arm is named.
        """
        seen: set[tuple[Any, ...]] = set()
        for planned in runs:
            key = (planned.arm.name, planned.recipe.num_prompts, planned.options)
            if key in seen:
                continue
            seen.add(key)
            try:
                # How many classes a head has makes no difference.
                check_buildable(self._opened(planned.recipe), planned.recipe, ["0", "1"])
            except (TypeError, ValueError) as error:
                raise type(error)(f"arms: {planned.arm.name}: {error}") from error

    def description(self, task: Task, recipe: Recipe) -> tuple[str, ...]:
        """Lines that say what is read."""
        return self._pool(task, recipe).images.description

    def backbone(self, recipe: Recipe) -> dict[str, str]:
        """Facts of the backbone, as `describe` gives them."""
        return describe(self._opened(recipe))

    def _begin_task(self, task: Task) -> None:
        """Let go of the images of the task before."""
        self._task, self._pass = task, None
        self._pools.clear()
        self._features = FeatureStore()
        self._cache = None

    def _run(self, planned: PlannedRun) -> Row:
        recipe = planned.recipe
        pool = self._pool(planned.task, recipe)
        rows = _rows(pool, planned)
        train = pool.training(rows, seed=recipe.seed, drop_last=recipe.drop_last, balance=recipe.balance)
        start, seconds = self._start(planned)
        model = self._opened(recipe)
        backbone = sum(parameter.numel() for parameter in model.parameters())
        tuned = build(model, recipe, start, class_names=pool.class_names)
        try:
            tuned.preprocessing = train.loader.preprocessing
            known = _known(planned, tuned, model)
            started = time.perf_counter()
            try:
                outcome = _outcome(self._trained(planned, tuned, train, pool))
            except FloatingPointError:
                outcome = {"loss": math.nan, "seconds": time.perf_counter() - started}
        finally:
            tuned.release()
        return Row(
            **known,
            **outcome,
            train_images=train.num_images,
            backbone_parameters=backbone,
            prototype_seconds=seconds,
        )

    def _trained(self, planned: PlannedRun, tuned: TunedViT, train: Any, pool: Pool) -> Run:
        folder = self._out / RUNS_FOLDER / planned.name
        start = planned.prototypes_name or ""
        begun = (folder / CHECKPOINT_NAME).exists() and _is_of(folder, planned.recipe, start)
        is_final = planned.stage == "final"
        with run_folder(folder, resume=begun, overwrite=not begun) as opened:
            return train_in(
                opened,
                tuned,
                train,
                None if is_final else pool.validation(),
                planned.recipe,
                overwrite=not begun,
                test_data=pool.test if is_final else None,
                nmi=planned.nmi,
                facts={
                    "data": planned.task.data,
                    "arm": planned.arm.name,
                    "stage": planned.stage,
                    _START: start,
                },
                progress=False,
                features=self._features,
                figures=False,
            )

    def _opened(self, recipe: Recipe) -> nn.Module:
        """The backbone in the form that a recipe wants."""
        form = (recipe.pool or "auto", recipe.norm or "own")
        if form not in self._models:
            options = {name: value for name, value in self._model.items() if name != "model"}
            model = open_model(self._model["model"], pool=form[0], norm=form[1], **options)
            self._models[form] = model.to(self._device)
        return self._models[form]

    def _pool(self, task: Task, recipe: Recipe) -> Pool:
        reading = {name: getattr(recipe, name) for name in ("batch_size", "resize", "mean_std")}
        key = (task, recipe.augment, *reading.values())
        if key not in self._pools:
            given = {
                name: value
                for name, value in self._images.items()
                if task.takes(name) and name not in ("cache", "cache_budget")
            }
            images = open_task(
                self._opened(recipe),
                **task.names(),  # type: ignore[arg-type]
                training={"augment": recipe.augment},
                chooses=task.val_data is not None or task.val_split is not None,
                **{"workers": 4, **given},
                **reading,
            )
            self._pools[key] = Pool(
                images,
                self._opened_cache(),
                recipe.batch_size,
                workers=given.get("workers", 4),
                bad_images=given.get("bad_images", "error"),
            )
        return self._pools[key]

    def _opened_cache(self) -> ImageCache | None:
        where = self._images.get("cache", "auto")
        if where == "off":
            return None
        if self._cache is None:
            budget = self._images.get("cache_budget")
            self._cache = ImageCache(where, budget, device=self._device, sharing=self._sharing)
        return self._cache

    def _start(self, planned: PlannedRun) -> tuple[Prototypes | Tensor | None, float | None]:
        """What the prompts of a run start from, and how long the pass for prototypes took."""
        if planned.recipe.prompts_from == "vipamin":
            return self._vipamin(planned), None
        if planned.prototypes_name is None:
            return None, None
        return self._prototypes(planned, planned.prototypes_name)

    def _vipamin(self, planned: PlannedRun) -> Tensor:
        """Of a few images, and so made anew for every run."""
        recipe, number = planned.recipe, planned.recipe.prompts_per_block
        assert number is not None
        pool = self._pool(planned.task, recipe)
        images = pool.plain(_rows(pool, planned), seed=recipe.seed)
        options = {**recipe.prompt_init_options, "depth": recipe.depth}
        return vipamin_prompts(self._opened(recipe), images, number, seed=recipe.seed, **options)

    def _prototypes(self, planned: PlannedRun, name: str) -> tuple[Prototypes, float]:
        """Shared prototypes; built by the first run of all that needs them."""
        path = self._out / PROTOTYPES_FOLDER / name
        pool = self._pool(planned.arm.prototypes.task or planned.task, planned.recipe)
        sets = (pool.images.train, pool.images.val)
        images = "-".join(each.fingerprint for each in sets if each is not None)
        found = Prototypes.load(path) if path.exists() else None
        # A task that was there before, and finished no run, may have had this name.
        if found is None or found.metadata.get(_IMAGES) != images:
            path.parent.mkdir(parents=True, exist_ok=True)
            found = self._built(planned)
            found.metadata[_IMAGES] = images
            found.save(path, overwrite=True)
        return found, float(found.metadata.get(_SECONDS, "nan"))

    def _built(self, planned: PlannedRun) -> Prototypes:
        start, recipe = planned.arm.prototypes, planned.recipe
        number = recipe.prompts_per_block
        assert number is not None
        pool = self._pool(start.task or planned.task, recipe)
        rows = _rows(pool, planned)
        if start.share < 1:
            rows = pool.drawn(rows, share=start.share, seed=recipe.seed)
        options = {
            "depth": recipe.depth,
            "seed": recipe.seed,
            "last_output": start.source == "last",
            "capacity": choose_capacity(None, number, start.strategy, start.build.get("mode", "stream")),
            **start.build,
        }
        started = time.perf_counter()
        made_from = (id(pool), tuple(rows), *sorted(options.items()))
        if self._pass is not None and self._pass[0] == made_from and options["capacity"] is not None:
            found, seconds = self._pass[1].select(number), self._pass[2]
            seconds += time.perf_counter() - started
        else:
            images = pool.plain(rows, seed=recipe.seed)
            found = build_prototypes(
                self._opened(recipe), images, num_prompts=number, progress=False, **options
            )
            seconds = time.perf_counter() - started
            self._pass = (made_from, found, seconds)
        found.metadata[_SECONDS] = f"{seconds:.3f}"
        if start.source == "own":
            return found
        return found.repeat_layer(0) if start.source == "first" else found.repeat_last_output()


def _is_of(folder: Path, recipe: Recipe, start: str) -> bool:
    """Whether the run in a folder is this one: an arm may have been changed before a run of it was done."""
    path = folder / RUN_NAME
    try:
        facts = read_yaml(path.read_text(encoding="utf-8"), str(path))
        return Recipe.from_yaml(path) == recipe and facts.get(_START) == start
    except (OSError, TypeError, ValueError):
        return False


def tidy(out: Path, planned: PlannedRun) -> None:
    """Once its row is written, remove what a run does not need: its checkpoint, the weights of a search."""
    folder = out / RUNS_FOLDER / planned.name
    for name in (CHECKPOINT_NAME, *([TUNED_NAME] if planned.stage == "search" else [])):
        with suppress(FileNotFoundError):
            (folder / name).unlink()


def _rows(pool: Pool, planned: PlannedRun) -> Sequence[int]:
    """The images that a run learns from."""
    part: Part = "train" if pool.images.val is None else _TRAINED_ON[planned.stage]
    return pool.rows(part, seed=planned.recipe.seed, **planned.subset)


def _known(planned: PlannedRun, tuned: TunedViT, model: nn.Module) -> dict[str, Any]:
    """What a row says before anything is learned."""
    recipe, start = planned.recipe, planned.arm.prototypes
    has_start = recipe.needs_prototypes
    other_start = "vipamin" if recipe.prompts_from == "vipamin" else ""
    return {
        "run": planned.name,
        "stage": planned.stage,
        "backbone": describe(model).get("architecture", ""),
        "task": planned.task.data,
        "arm": planned.arm.name,
        "method": planned.arm.method,
        "strategy": start.strategy if has_start else other_start,
        "source": start.source if has_start else "",
        "frozen_prompts": recipe.freeze_prompts,
        "num_prompts": getattr(tuned, "num_prompts", None) or None,
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "epochs": recipe.epochs,
        "prompt_lr": _prompt_rate(tuned, recipe),
        "options": planned.options,
        "compared": planned.compared,
        "seed": recipe.seed,
        "learned": tuned.num_trainable(head=False),
        "trainable": tuned.num_trainable(),
    }


def _prompt_rate(tuned: TunedViT, recipe: Recipe) -> float | None:
    groups = tuned.parameter_groups(recipe.peak_lr, recipe.peak_prompt_lr)
    return next((float(group["lr"]) for group in groups if group["name"] == "prompts"), None)


def _outcome(run: Run) -> dict[str, Any]:
    history = run.history
    return {
        "loss": history.loss[-1],
        "val_accuracy": history.val_accuracy[-1] if history.val_accuracy else None,
        "test_accuracy": None if run.test is None else run.test.accuracy,
        "seconds": history.train_seconds,
    }
