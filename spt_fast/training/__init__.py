"""Training of prompts and heads: the recipe, the loop, what is kept of a run, and what comes out."""

from typing import TYPE_CHECKING

from spt_fast.support.console import is_the_command

# As in `spt_fast` itself: the options of a recipe can do without torch.
if TYPE_CHECKING or not is_the_command():
    from spt_fast.training.build import build
    from spt_fast.training.evaluation import Evaluation, evaluate, evaluate_classes
    from spt_fast.training.history import History
    from spt_fast.training.loop import Trainer, fit, shuffled_loader
    from spt_fast.training.optimizer import LearningRates, create_optimizer, warmup_cosine
    from spt_fast.training.predictions import Prediction, predict
    from spt_fast.training.recipe import Recipe
    from spt_fast.training.run import Run, train

__all__ = [
    "Evaluation",
    "History",
    "LearningRates",
    "Prediction",
    "Recipe",
    "Run",
    "Trainer",
    "build",
    "create_optimizer",
    "evaluate",
    "evaluate_classes",
    "fit",
    "predict",
    "shuffled_loader",
    "train",
    "warmup_cosine",
]
