"""What the columns of the paper's tables are: tasks, and groups of tasks, by one name each."""

from __future__ import annotations

from collections.abc import Mapping

from spt_fast.data.fgvc import SETS
from spt_fast.data.places import same_name
from spt_fast.data.vtab import TASKS

_VTAB = tuple(f"vtab/{task}" for task in TASKS)
# In the order of Table S1, which is that of `TASKS`.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "fgvc": tuple(f"fgvc/{name}" for name in SETS),
    "natural": _VTAB[:7],
    "specialized": _VTAB[7:11],
    "structured": _VTAB[11:],
    "vtab": _VTAB,
}
PARAMETERS = {"fgvc_params": "fgvc", "vtab_params": "vtab"}
_TITLES = {
    "fgvc": "FGVC mean",
    "natural": "Natural (7)",
    "specialized": "Specialized (4)",
    "structured": "Structured (8)",
    "fgvc_params": "FGVC params (M)",
    "vtab_params": "VTAB params (M)",
    "fgvc/cub": "CUB-200-2011",
    "fgvc/nabirds": "NABirds",
    "fgvc/flowers": "Oxford Flowers",
    "fgvc/dogs": "Stanford Dogs",
    "fgvc/cars": "Stanford Cars",
    "vtab/caltech101": "Caltech101",
    "vtab/cifar": "CIFAR-100",
    "vtab/dtd": "DTD",
    "vtab/oxford_flowers102": "Flowers102",
    "vtab/oxford_iiit_pet": "Pets",
    "vtab/svhn": "SVHN",
    "vtab/sun397": "Sun397",
    "vtab/patch_camelyon": "Patch Camelyon",
    "vtab/eurosat": "EuroSAT",
    "vtab/resisc45": "Resisc45",
    "vtab/diabetic_retinopathy": "Retinopathy",
    "vtab/clevr_count": "Clevr/count",
    "vtab/clevr_dist": "Clevr/distance",
    "vtab/dmlab": "DMLab",
    "vtab/kitti": "KITTI/distance",
    "vtab/dsprites_loc": "dSprites/loc",
    "vtab/dsprites_ori": "dSprites/ori",
    "vtab/smallnorb_azi": "SmallNORB/azi",
    "vtab/smallnorb_ele": "SmallNORB/ele",
    "shallow": "Shallow",
    "deep": "Deep",
}


def title(column: str) -> str:
    """What a column is called in a table; the name itself of one that the paper does not have."""
    return _TITLES.get(column, column)


def one_name(task: str) -> str:
    """The name of a task that all its other names stand for ("vtab/pets"); others stay as they are."""
    kind, _, name = task.partition("/")
    known = {
        "vtab": {key: facts.also for key, facts in TASKS.items()},
        "fgvc": {key: facts.also for key, facts in SETS.items()},
    }.get(kind, {})
    for key, also in known.items():
        if same_name(name) in map(same_name, (key, *also)):
            return f"{kind}/{key}"
    return task
