"""Training of prompts and heads: the loop, its schedule, what is kept of a run, and what comes out."""

from spt_fast.training.evaluation import Evaluation, evaluate, evaluate_classes
from spt_fast.training.history import History
from spt_fast.training.loop import Trainer, fit
from spt_fast.training.optimizer import warmup_cosine
from spt_fast.training.predictions import Prediction, predict

__all__ = [
    "Evaluation",
    "History",
    "Prediction",
    "Trainer",
    "evaluate",
    "evaluate_classes",
    "fit",
    "predict",
    "warmup_cosine",
]
