"""Sections of a report for which model and images are opened: CKA, NMI, and nearest patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from spt_fast.analysis import Analysis, NearestPatches, analyse, load_prompts, nearest_patches
from spt_fast.backbones.anatomy import patch_size
from spt_fast.backbones.open import open_model
from spt_fast.data.cache import ImageCache
from spt_fast.data.images import open_images
from spt_fast.data.loading import ImageLoader
from spt_fast.data.names import takes_root
from spt_fast.data.transforms import Preprocessing, recorded
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.prototypes import Prototypes
from spt_fast.study.report.charts import COLOURS, Axis, Line
from spt_fast.study.report.comparison import Comparison
from spt_fast.study.report.html import (
    Html,
    Section,
    element,
    figure,
    folded,
    grid,
    heat_table,
    markup,
    note,
    paragraph,
)
from spt_fast.study.report.input import StudyFolder
from spt_fast.study.report.pictures import patch_picture
from spt_fast.study.report.training import Looks, task_charts
from spt_fast.study.runs import SWEEP_NAME, Row
from spt_fast.support.errors import one_line
from spt_fast.training.folder import TUNED_NAME

Found = TypeVar("Found")

# What is shown of a block: prompts, and patches nearest to each.
PROMPTS, PATCHES = 6, 4
# How a line begins about what could not be looked at.
_NOTHING = "no thumbnails, no CKA and no NMI before and after tuning"
# A picture is as many pixels wide at least, with whole patches around the one it is of.
_LEAST_PIXELS = 20
_TIMM_OPTIONS = ("img_size", "in_chans")


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How model and images of a study are opened.

    Attributes:
        root: where the data lie; None is where the study found them.
        max_images: of each task.
        device: of the model.
        batch_size, workers: as in `open_images`.
        progress: show bars.
    """

    root: str | Path | None = None
    max_images: int = 512
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    batch_size: int = 64
    workers: int = 4
    progress: bool = True


@dataclass(frozen=True)
class TaskPrompts:
    """What was found of the prompts of one task.

    Attributes:
        arm: the SPT arm that they are of.
        analyses: NMI and CKA by name, such as "spt-deep, before tuning".
        before, after: nearest patches of the prompts that are shown, [L, P, k].
        moved: [L]: how far the prompts moved, as a share of their length.
        mean, std: of the pixels.
    """

    arm: str
    analyses: Mapping[str, Analysis]
    before: NearestPatches
    after: NearestPatches
    moved: list[float]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def look_at_prompts(study: StudyFolder, compared: Comparison, opening: Opening) -> dict[str, TaskPrompts]:
    """{task: what was found}; of tasks that it could not look at, the study's `missing` says why."""
    if compared.measure != "test":
        return {}
    tasks = [task for task in compared.tasks if _has_prompts_of_spt(compared, task)]
    chosen = {task: arms for task in tasks if (arms := _arms(study, compared, task))}
    if lacking := [task for task in tasks if task not in chosen]:
        study.missing.append(f"{_NOTHING} of {', '.join(lacking)}: no final run of SPT has kept its weights")
    if not chosen:
        return {}
    model = _tried(study, _NOTHING, partial(_open_model, study, opening))
    if model is None:
        return {}
    found = {}
    for task, arms in chosen.items():
        looked = _tried(
            study,
            f"{_NOTHING} of {task}",
            partial(_Workbench(study, task, model, opening).look, arms),
        )
        if looked is not None:
            found[task] = looked
    return found


def cka_section(found: Mapping[str, TaskPrompts]) -> Section | None:
    """CKA of prompts and tokens, all blocks against all."""
    parts = []
    for task, prompts in found.items():
        parts.append(element("h3", task))
        parts.append(grid((_cka(name, each) for name, each in prompts.analyses.items()), "maps"))
    told = paragraph(
        "Linear CKA (App. B.4) of the prompts of a block, in rows, and the patch tokens that enter a block, "
        "in columns, in hundredths. 100 means that they spread alike over the channels."
    )
    return Section("cka", "CKA of prompts and tokens", markup(told, parts)) if parts else None


def nmi_by_block(found: Mapping[str, TaskPrompts], looks: Looks) -> Html | None:
    """NMI of the same prompts and images, by block."""
    if not found:
        return None
    lines = {
        task: [_line(name, each) for name, each in prompts.analyses.items()]
        for task, prompts in found.items()
    }
    images = max(each.num_images for prompts in found.values() for each in prompts.analyses.values())
    mine = dict(looks)
    for prompts in found.values():
        for name in prompts.analyses:
            # The same colour as after tuning, dashed.
            mine.setdefault(name, COLOURS + looks.get(prompts.arm, 0))
    return markup(
        element("h3", "By block, before and after tuning"),
        paragraph(f"Measured for this page on up to {images} training images of each task.", class_="quiet"),
        task_charts(lines, mine, Axis("block", whole=True), Axis("NMI (eq. 8)", from_zero=True)),
    )


def patches_section(study: StudyFolder, found: Mapping[str, TaskPrompts], room: int) -> Section | None:
    """The nearest patches of each task in pictures, in at most `room` bytes."""
    parts: list[Html] = []
    for task, prompts in found.items():
        parts += [element("h3", task), *_blocks(study, task, prompts, room // len(found))]
    if not parts:
        return None
    told = [
        paragraph(
            f"What prompts look at: for up to {PROMPTS} prompts of a block, in rows, the {PATCHES} patches "
            "of the task's own training images whose tokens are nearest to it, nearest first, and at most "
            "one of an image. The patch is framed; around it is what lies around it in the image."
        ),
        paragraph(
            "Before tuning, prompts are prototypes of these tokens. Tuning moves them to where they help to "
            "tell classes apart, which need not be near any patch, and with them the tokens of later blocks."
        ),
    ]
    return Section("patches", "Nearest patches", markup(told, parts))


def _has_prompts_of_spt(compared: Comparison, task: str) -> bool:
    rows = [row for cells in compared.cells.values() if task in cells for row in cells[task].rows]
    return any(row.method.startswith("spt-") and not row.frozen_prompts for row in rows)


def _arms(study: StudyFolder, compared: Comparison, task: str) -> dict[str, Row]:
    """The best arm of SPT with weights there, and the best of VPT, if any; of each the first seed."""
    chosen: dict[str, Row] = {}
    for method in ("spt-", "vpt-"):
        first = {arm: cells[task].rows[0] for arm, cells in compared.cells.items() if task in cells}
        there = {
            arm: row
            for arm, row in first.items()
            if row.method.startswith(method) and not row.frozen_prompts and study.run_file(row, TUNED_NAME)
        }
        best = compared.best(task, there) or next(iter(there), None)
        if best is None:
            return chosen
        chosen[best] = there[best]
    return chosen


def _tried(study: StudyFolder, what: str, action: Callable[[], Found]) -> Found | None:
    """What `action` gives; None after an error of files, data or models, which is noted."""
    try:
        return action()
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        study.missing.append(f"{what}: {one_line(error)}")
        return None


def _open_model(study: StudyFolder, opening: Opening) -> nn.Module:
    """The backbone that sweep.yaml names.

    Raises:
        ValueError: it names none.
    """
    sweep = study.sweep
    if "model" not in sweep:
        raise ValueError(f"{SWEEP_NAME} does not say which model it was")
    options = {name: sweep[name] for name in _TIMM_OPTIONS if sweep.get(name) is not None}
    given = sweep.get("model_options") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{SWEEP_NAME}: model_options must map names to values, got {given!r}")
    # What is measured enters the blocks; the pooling is no matter.
    return open_model(
        str(sweep["model"]),
        pretrained=bool(sweep.get("pretrained", True)),
        checkpoint=sweep.get("checkpoint"),
        model_options={**options, **given},
        pool=None,
    ).to(opening.device)


class _Workbench:
    """One task's images, and what is done with them; the model comes back as it was after each step."""

    def __init__(self, study: StudyFolder, task: str, model: nn.Module, opening: Opening) -> None:
        self._study, self._task, self._model, self._opening = study, task, model, opening
        self._cache = ImageCache("auto", device=opening.device)

    def look(self, arms: Mapping[str, Row]) -> TaskPrompts:
        """What there is to see of the prompts of the first of `arms`, and CKA and NMI of the others."""
        (arm, row), *others = arms.items()
        path = self._weights(row)
        made = recorded(path)
        images = self._images(made)
        with self._prompted(path) as tuned:
            tuned_prompts = tuned.prompts.detach().cpu().float()
            # First of all, since passes over the images are for nothing where they are gone.
            prototypes = self._prototypes(row, tuned_prompts)
            after = self._nearest(tuned_prompts, tuned, images)
            analysed = self._analyse(tuned, images)
        before = self._nearest(prototypes, self._model, images)
        with self._started_from(prototypes) as tuned:
            analyses = {f"{arm}, before tuning": self._analyse(tuned, images), arm: analysed}
        for other, its_row in others:
            with self._prompted(self._weights(its_row)) as tuned:
                analyses[other] = self._analyse(tuned, images)
        length = prototypes.norm(dim=(1, 2)).clamp_min(1e-12)
        moved = (tuned_prompts - prototypes).norm(dim=(1, 2)) / length
        mean, std = (made or Preprocessing()).mean_and_std(self._model)
        return TaskPrompts(arm, analyses, before, after, moved.tolist(), mean, std)

    def _weights(self, row: Row) -> Path:
        path = self._study.run_file(row, TUNED_NAME)
        if path is None:
            raise FileNotFoundError(f"{row.run} has no {TUNED_NAME}")
        return path

    def _images(self, made: Preprocessing | None) -> ImageLoader:
        opening = self._opening
        root = opening.root if opening.root is not None else self._study.root
        return open_images(
            self._task,
            self._model,
            root=root if takes_root(self._task) else None,
            split=self._study.split(self._task),
            batch_size=opening.batch_size,
            workers=opening.workers,
            bad_images="skip",
            tuned=made,
            max_images=opening.max_images,
            in_classes=True,
            cache=self._cache,
        )

    @contextmanager
    def _prompted(self, path: Path) -> Iterator[PromptedViT]:
        tuned = load_prompts(path, self._model)
        try:
            yield tuned
        finally:
            tuned.release()

    @contextmanager
    def _started_from(self, prototypes: Tensor) -> Iterator[PromptedViT]:
        depth: Literal["deep", "shallow"] = "deep" if len(prototypes) > 1 else "shallow"
        tuned = PromptedViT(self._model, prototypes, depth=depth, num_classes=0, pool_prompts=False)
        try:
            yield tuned
        finally:
            tuned.release()

    def _analyse(self, tuned: PromptedViT, images: ImageLoader) -> Analysis:
        return analyse(tuned, images, max_images=None, progress=self._opening.progress)

    def _nearest(self, prompts: Tensor, model: nn.Module, images: ImageLoader) -> NearestPatches:
        """Of the prompts that are shown."""
        inner = model.model if isinstance(model, PromptedViT) else model
        patch = min(patch_size(inner))
        context = next(n for n in range(1, _LEAST_PIXELS + 1) if (2 * n + 1) * patch >= _LEAST_PIXELS)
        return nearest_patches(
            prompts[:, :PROMPTS],
            model,
            images,
            k=PATCHES,
            context=context,
            one_per_image=True,
            progress=self._opening.progress,
        )

    def _prototypes(self, row: Row, like: Tensor) -> Tensor:
        """What the prompts started from, [L, N_p, D].

        Raises:
            FileNotFoundError: the study has not kept it.
            ValueError: they are not as many as the prompts.
        """
        path = self._study.prototypes_file(row)
        if path is None:
            raise FileNotFoundError(f"the prototypes that {row.run} started from are not there")
        values = Prototypes.load(path).prompts
        if values.shape != like.shape:
            raise ValueError(f"prototypes are {list(values.shape)}, but prompts {list(like.shape)}")
        return values


def _cka(name: str, found: Analysis) -> Html:
    values = found.cka.tolist()
    blocks = [str(block) for block in range(1, len(values) + 1)]
    labels = [[str(round(100 * value)) for value in row] for row in values]
    table = heat_table(f"CKA of {name}", (blocks, blocks), values, labels, corner="block")
    return figure(element("b", name), table)


def _line(name: str, found: Analysis) -> Line:
    means = found.nmi.mean(dim=0).tolist()
    return Line(name, list(range(1, len(means) + 1)), [means])


def _blocks(study: StudyFolder, task: str, prompts: TaskPrompts, room: int) -> list[Html]:
    """First, middle and last block, the others folded, as many as there is room for."""
    depth = len(prompts.moved)
    shown = sorted({0, depth // 2, depth - 1})
    drawn: dict[int, Html] = {}
    for layer in [*shown, *(layer for layer in range(depth) if layer not in shown)]:
        block = _block(task, prompts, layer)
        room -= len(block)
        if room < 0:
            break
        drawn[layer] = block
    parts = [paragraph(f"Prompts of {prompts.arm}, first seed.")]
    parts.append(grid((drawn[layer] for layer in shown if layer in drawn), "blocks"))
    others = [drawn[layer] for layer in sorted(drawn) if layer not in shown]
    if others:
        parts.append(folded(f"The other {len(others)} blocks", grid(others, "blocks")))
    if left := [str(layer + 1) for layer in range(depth) if layer not in drawn]:
        why = f"Blocks {', '.join(left)} of {task} are left out, so that the page stays small."
        parts.append(note(why))
        study.missing.append(why)
    return parts


def _block(task: str, prompts: TaskPrompts, layer: int) -> Html:
    pair = []
    for moment, found in (("before tuning", prompts.before), ("after tuning", prompts.after)):
        distance = found.distances[layer].mean()
        picture = patch_picture(
            found.pictures[layer],
            found.context,
            names=[str(prompt) for prompt in range(1, found.pictures.shape[1] + 1)],
            mean=prompts.mean,
            std=prompts.std,
            alt=f"{task}, block {layer + 1}: patches nearest to {found.pictures.shape[1]} prompts, {moment}",
        )
        pair.append(figure(f"{moment}: mean distance {distance:.3g}", picture))
    caption = [
        element("b", f"Block {layer + 1}"),
        f": tuning moved its prompts by {prompts.moved[layer]:.0%} of their length",
    ]
    return figure(caption, element("div", pair, class_="pair"))
