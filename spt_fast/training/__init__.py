"""Training of what a tuned model leaves trainable."""

from spt_fast.training.loop import History, evaluate, fit, warmup_cosine

__all__ = ["History", "evaluate", "fit", "warmup_cosine"]
