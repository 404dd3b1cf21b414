"""Training of prompts and heads: the loop, its schedule, and what is kept of a run."""

from spt_fast.training.loop import History, evaluate, fit, warmup_cosine

__all__ = ["History", "evaluate", "fit", "warmup_cosine"]
