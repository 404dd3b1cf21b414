"""A study as one HTML page that holds all it needs: which sections it has, and what they are made of.

Figures are SVG that is drawn here from the study's tables, so that matplotlib is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from spt_fast.study.names import arm_names
from spt_fast.study.report.against import lengths_section, shares_section
from spt_fast.study.report.charts import COLOURS
from spt_fast.study.report.comparison import Comparison, comparison
from spt_fast.study.report.confusion import classes_section, confusion_section
from spt_fast.study.report.html import Html, Section, element, markup, page, paragraph
from spt_fast.study.report.input import StudyFolder
from spt_fast.study.report.prompts import (
    Opening,
    TaskPrompts,
    cka_section,
    look_at_prompts,
    nmi_by_block,
    patches_section,
)
from spt_fast.study.report.results import chosen_values, costs, results, summary
from spt_fast.study.report.training import curves_section, nmi_charts, search_section
from spt_fast.study.runs import Row, runs_path
from spt_fast.support.arguments import check_bool, check_device, check_int
from spt_fast.support.files import check_output_path, write_bytes

REPORT_NAME = "report.html"
# Of a page, in bytes; thumbnails get what other sections leave of it, and not more than most of it.
LARGEST_PAGE = 5_000_000
_ROOM_FOR_PATCHES = 3_500_000
# Methods that have the same colour in every page, as in the figures of `plots`.
_OWN_COLOURS = {"spt-deep": 0, "vpt-deep": 1, "linear": COLOURS - 1}


@dataclass(frozen=True)
class Report:
    """What `write_report` has written.

    Attributes:
        path: of the page.
        size: in bytes.
        missing: lines, each about something that the page does not show, and why.
    """

    path: Path
    size: int
    missing: tuple[str, ...]


def write_report(
    runs: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    overwrite: bool = False,
    patches: bool = True,
    root: str | os.PathLike[str] | None = None,
    max_images: int = 512,
    device: str | torch.device = "cpu",
    workers: int = 4,
    progress: bool = True,
) -> Report:
    """One HTML page about a study, which asks for nothing else: no scripts, no files, no network.

    The same study gives the same page. What cannot be shown is said in the page, and in `missing`.

    Args:
        runs: the folder of a study, as `spt-fast sweep` writes it, or its runs.csv.
        out: the page; None is report.html in the study's folder.
        overwrite: write over `out`.
        patches: open model and images, for CKA and for the patches that are nearest to prompts.
        root: where the data lie; None is where the study found them.
        max_images: training images of each task that are looked at for that.
        device: of the model.
        workers: that read images.
        progress: show bars.

    Raises:
        FileNotFoundError: there is no runs.csv, or no folder for `out`.
        FileExistsError: `out` is there and not `overwrite`.
        TypeError: an argument is of the wrong type.
        ValueError: runs.csv was not written whole or is empty, sweep.yaml is no YAML, `max_images` is less
            than 1, or there is no such device.
        OSError: `out` cannot be written.
    """
    opening = Opening(
        root=None if root is None else Path(root),
        max_images=check_int("max_images", max_images, 1),
        device=check_device("device", device),
        workers=check_int("workers", workers, 0),
        progress=check_bool("progress", progress),
    )
    check_bool("patches", patches)
    target = runs_path(runs).parent / REPORT_NAME if out is None else Path(out)
    check_output_path(target, overwrite=overwrite)
    study = StudyFolder.open(runs)
    content = _page(study, opening if patches else None).encode()
    write_bytes(target, content, overwrite=overwrite)
    return Report(target, len(content), tuple(dict.fromkeys(study.missing)))


def _page(study: StudyFolder, opening: Opening | None) -> str:
    compared = comparison(study.rows)
    looks = looks_of(study.rows)
    prompts: dict[str, TaskPrompts] = {}
    if opening is not None:
        prompts = look_at_prompts(study, compared, opening)
    sections = [
        summary(study, compared),
        results(compared),
        chosen_values(compared, study.rows),
        search_section(study, looks),
        curves_section(study, looks),
        lengths_section(study),
        shares_section(study),
        _nmi_section(study, looks, prompts),
        cka_section(prompts),
        confusion_section(study, compared),
        classes_section(study, compared),
    ]
    there = [section for section in sections if section is not None]
    room = min(_ROOM_FOR_PATCHES, LARGEST_PAGE - sum(len(section.body) for section in there) - 100_000)
    patches = patches_section(study, prompts, max(room, 0))
    if patches is not None:
        there.append(patches)
    there.append(costs(study.rows))
    return page(_title(study), _lead(study, compared, asked=opening is not None), there)


def looks_of(rows: Sequence[Row]) -> dict[str, int]:
    """A colour for each arm, by the place that `charts` counts; configurations of one arm have their own."""
    names = list(dict.fromkeys([*(row.arm for row in rows), *arm_names(rows).values()]))
    methods = {row.arm: row.method for row in rows}
    looks: dict[str, int] = {}
    for name in names:
        own = _OWN_COLOURS.get(methods.get(name, ""))
        if own is not None and own not in looks.values():
            looks[name] = own
    free = (place for place in range(len(names) + COLOURS) if place not in looks.values())
    return {name: looks[name] if name in looks else next(free) for name in names}


def _nmi_section(
    study: StudyFolder, looks: Mapping[str, int], prompts: Mapping[str, TaskPrompts]
) -> Section | None:
    parts = [part for part in (nmi_charts(study, looks), nmi_by_block(prompts, looks)) if part is not None]
    told = paragraph(
        "What prompts share with the patch tokens that enter the same block: normalised mutual information "
        "(eq. 7, 8)."
    )
    return Section("nmi", "NMI of prompts and tokens", markup(told, parts)) if parts else None


def _title(study: StudyFolder) -> str:
    return f"Study {study.path.resolve().name}"


def _lead(study: StudyFolder, compared: Comparison, *, asked: bool) -> Html:
    rows = study.rows
    arms, seeds = len({row.arm for row in rows}), len({row.seed for row in rows})
    parts = [
        paragraph(
            f"{_count(arms, 'arm')} on {_count(len(compared.tasks), 'task')}, {_count(seeds, 'seed')}, "
            f"{_count(len(rows), 'run')}."
        )
    ]
    if not asked:
        parts.append(paragraph("CKA and nearest patches were not asked for."))
    if study.missing:
        told = [element("li", line) for line in dict.fromkeys(study.missing)]
        parts.append(
            element("div", element("p", "What this page does not show:"), element("ul", told), class_="note")
        )
    return markup(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
