"""What prompts share with patch tokens: NMI while training (Fig. 2), NMI and CKA afterwards (App. B.4)."""

from spt_fast.analysis.nearest import NearestPatches, nearest_patches
from spt_fast.analysis.nmi_tracker import NMIHistory, NMITracker
from spt_fast.analysis.prompts import Analysis, analyse, load_prompts, random_prompts

__all__ = [
    "Analysis",
    "NMIHistory",
    "NMITracker",
    "NearestPatches",
    "analyse",
    "load_prompts",
    "nearest_patches",
    "random_prompts",
]
