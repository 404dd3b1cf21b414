"""Self-Prompt Tuning (SPT) for frozen Vision Transformers: prototypes in one pass, prompts at no cost.

>>> protos = spt_fast.build_prototypes(model, loader)
>>> tuned = spt_fast.PromptedViT(model, protos, num_classes=200)
"""

from typing import TYPE_CHECKING

from spt_fast.support.console import is_the_command

# The command line imports what a command needs: torch takes seconds, which `spt-fast --help` can do without.
if TYPE_CHECKING or not is_the_command():
    from spt_fast import analysis, methods, plots, study, training
    from spt_fast.analysis import NMITracker, nearest_patches
    from spt_fast.clustering import KMeans, StreamingKMeans
    from spt_fast.methods.prompted_vit import PromptedViT
    from spt_fast.methods.registry import load_tuned, tune
    from spt_fast.methods.release import release
    from spt_fast.ops.cka import cka
    from spt_fast.ops.nmi import sigmoid_nmi
    from spt_fast.ops.prompt_attention import prompt_attention
    from spt_fast.prototypes import Prototypes, build_prototypes
    from spt_fast.support.errors import NonFiniteError, NotFittedError
    from spt_fast.training.recipe import Recipe
    from spt_fast.training.run import train

__version__ = "0.1.0"

__all__ = [
    "KMeans",
    "NMITracker",
    "NonFiniteError",
    "NotFittedError",
    "PromptedViT",
    "Prototypes",
    "Recipe",
    "StreamingKMeans",
    "analysis",
    "build_prototypes",
    "cka",
    "load_tuned",
    "methods",
    "nearest_patches",
    "plots",
    "prompt_attention",
    "release",
    "sigmoid_nmi",
    "study",
    "train",
    "training",
    "tune",
]
