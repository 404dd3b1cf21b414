"""Train, prune, rewind, and train again: the second stage of E2VPT."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from spt_fast.methods.e2vpt import E2VPT
from spt_fast.methods.e2vpt_pruning import check_shares, importance, prune
from spt_fast.training.history import History
from spt_fast.training.loop import Batches, fit
from spt_fast.training.recipe import Recipe


def fit_pruned(
    tuned: E2VPT,
    train_loader: Batches,
    val_loader: Iterable[Any] | None = None,
    recipe: Recipe | None = None,
    *,
    tokens: float = 0.5,
    pieces: float = 0.5,
    progress: bool = True,
    **fields: Any,
) -> tuple[History, History]:
    """`fit`, then `prune` by the importance on the training images, then from the first values `fit` again.

    The paper tries 81 pairs of shares, 10 to 90 %, and chooses on validation: one call for each, on a new
    object of the same seed.

    Args:
        tuned, train_loader, val_loader, recipe, progress, fields: as in `fit`.
        tokens, pieces: the shares that go; see `spt_fast.methods.e2vpt_pruning.prune`.

    Returns:
        What the two runs have seen.

    Raises:
        TypeError, ValueError: as `fit` and `prune`; shares are checked before the first run.
    """
    check_shares(tuned, tokens, pieces)
    start = {name: tensor.clone() for name, tensor in tuned.learned_state_dict().items()}
    first = fit(tuned, train_loader, val_loader, recipe, progress=progress, **fields)
    kept = prune(tuned, importance(tuned, train_loader), tokens, pieces)
    start["source.mask"] = tuned.learned_state_dict()["source.mask"]
    start["source.prompts"] = start["source.prompts"][:, kept] * start["source.mask"]
    tuned.load_learned_state_dict(start)
    # Fewer prompts are left than a recipe may state.
    fields["num_prompts"] = None
    return first, fit(tuned, train_loader, val_loader, recipe, progress=progress, **fields)
