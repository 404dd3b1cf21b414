"""Prompts from the patch tokens of a data set, in one pass of a frozen backbone (Sec. 3.3, 3.4)."""

from spt_fast.prototypes.build import build_prototypes
from spt_fast.prototypes.combine import concatenate, merge
from spt_fast.prototypes.result import Prototypes

__all__ = ["Prototypes", "build_prototypes", "concatenate", "merge"]
