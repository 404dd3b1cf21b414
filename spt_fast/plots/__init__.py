"""Figures of the paper's analyses, from arrays or from the CSV files that the commands write.

Needs matplotlib, the extra `plots`; it is imported when a figure is asked for, not before.
"""

from spt_fast.plots.figures import (
    accuracy_against_prompt_length,
    analysis_figure,
    cka_heatmap,
    construction_time,
    nmi_over_epochs,
    nmi_per_layer,
)
from spt_fast.plots.patches import nearest_patches
from spt_fast.plots.training_figures import MethodCurves, demo_figure, training_curves
from spt_fast.support.results import matplotlib_missing

__all__ = [
    "MethodCurves",
    "accuracy_against_prompt_length",
    "analysis_figure",
    "cka_heatmap",
    "construction_time",
    "demo_figure",
    "matplotlib_missing",
    "nearest_patches",
    "nmi_over_epochs",
    "nmi_per_layer",
    "training_curves",
]
