"""Lloyd's algorithm on one clustering problem, whose tokens are all in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import Assigned, PrunedAssign

LOOK_EVERY = 4  # steps on a device between two looks at it


@dataclass(frozen=True)
class LloydResult:
    """Where Lloyd's algorithm ended."""

    centers: Tensor  # [K, D] float32
    counts: Tensor  # [K] float64: weight of each centre's tokens
    inertia: float  # weighted sum of squared distances to these centres
    n_iter: int  # counted as scikit-learn does, with the one that finds that nothing moves


def lloyd(
    problem: WeightedTokens,
    centers: Tensor,
    *,
    max_iter: int,
    shift_tolerance: float = 0.0,
    gain_tolerance: float = 0.0,
    relaxation: float = 1.0,
    prune: bool = True,
    look_every: int | None = None,
) -> LloydResult:
    """Assign (eq. 9) and move to the mean (eq. 10) until nothing moves.

    Stops early when the centres move by at most `shift_tolerance` (squared distance, summed over
    centres; scikit-learn's rule) or when an iteration lowers the inertia by less than
    `gain_tolerance` times the inertia. Counts and inertia belong to the centres returned.

    With a `relaxation` in (1, 2) each step goes that much further than to the mean, which never raises
    the inertia either and needs fewer iterations in the long tail; the last step is plain.

    `prune` leaves out tokens whose centre cannot have changed, where the kernels can; it does not
    change the labels. `look_every` is the number of iterations between two looks at tensors on a device
    (None: 1 on the CPU, else 4); iterations past the end are computed in between, and change nothing.
    """
    passes = _Passes(problem, prune)
    run = _Run(passes, centers, max_iter, shift_tolerance, gain_tolerance, relaxation)
    if look_every is None:
        look_every = 1 if centers.device.type == "cpu" else LOOK_EVERY
    if look_every == 1:
        while not run.finished:
            run.step()
    else:
        _run_ahead(run, look_every)
    centers, assigned = run.centers, run.assigned
    if relaxation != 1.0:
        centers = move_centers(problem, centers, assigned)
        assigned = passes.assign(centers)
    return LloydResult(centers, assigned.counts[0], float(assigned.inertia[0]), run.n_iter)


class _Passes:
    """Passes over the tokens of a problem, pruned or plain."""

    def __init__(self, problem: WeightedTokens, prune: bool) -> None:
        self.problem = problem
        self._pruned = (
            PrunedAssign(
                problem.tokens[None],
                shift=problem.mean[None],
                weights=None if problem.weights is None else problem.weights[None],
                backend=problem.backend,
            )
            if prune
            else None
        )

    def assign(self, centers: Tensor) -> Assigned:
        return self.problem.assign(centers) if self._pruned is None else self._pruned.assign(centers[None])


class _Run:
    """Where Lloyd's algorithm stands, and one step of it."""

    def __init__(
        self,
        passes: _Passes,
        centers: Tensor,
        max_iter: int,
        shift_tolerance: float,
        gain_tolerance: float,
        relaxation: float,
    ) -> None:
        self.passes, self.max_iter, self.relaxation = passes, max_iter, relaxation
        self.shift_tolerance, self.gain_tolerance = shift_tolerance, gain_tolerance
        self.centers, self.assigned = centers, passes.assign(centers)
        self.previous = math.inf  # inertia of the iteration before
        self.n_iter = 0
        self.stopped = False

    @property
    def finished(self) -> bool:
        return self.stopped or self.n_iter >= self.max_iter

    def step(self) -> None:
        """One iteration, with a look at its outcome."""
        inertia = float(self.assigned.inertia[0])
        if self.previous - inertia < self.gain_tolerance * inertia:
            self.stopped = True
            return
        self.previous = inertia
        moved = move_centers(self.passes.problem, self.centers, self.assigned)
        shift = float(squared_movement(self.centers, moved))
        if shift == 0.0:
            self.stopped = True
            self.n_iter += 1  # it moved nothing, which took an iteration to see
            return
        # A centre that was empty has jumped to a token, and must not jump past it.
        step = 1.0 if bool((self.assigned.counts[0] <= 0).any()) else self.relaxation
        self.centers, self.n_iter = torch.lerp(self.centers, moved, step), self.n_iter + 1
        self.assigned = self.passes.assign(self.centers)
        self.stopped = shift <= self.shift_tolerance


def _run_ahead(run: _Run, look_every: int) -> None:
    """`run.step()` until it is finished, but only every `look_every` steps is the device waited for.

    The conditions of `step` are computed where the tensors are. A step that must not be made leaves
    everything as it is, and so do those after it: the result is that of looking at each step. A centre
    without tokens halts the run likewise, because where it goes is for the host to find out.
    """
    while not run.finished:
        flags = torch.zeros(3, dtype=torch.int64, device=run.centers.device)  # steps, stopped, halted
        previous = torch.tensor(run.previous, dtype=torch.float64, device=run.centers.device)
        for _ in range(min(look_every, run.max_iter - run.n_iter)):
            previous, flags = _step_unseen(run, previous, flags)
        steps, stopped, halted = flags.tolist()
        run.previous, run.n_iter, run.stopped = float(previous), run.n_iter + steps, bool(stopped)
        if halted:
            run.step()


def _step_unseen(run: _Run, previous: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
    """One step whose outcome stays on the device."""
    steps, stopped, halted = flags.unbind()
    inertia, counts = run.assigned.inertia[0], run.assigned.counts[0]
    stalled = previous - inertia < run.gain_tolerance * inertia
    running = (stopped == 0) & (halted == 0)
    empty = running & ~stalled & (counts <= 0).any()
    moved = center_means(run.centers, run.assigned.sums[0], counts)
    shift = (moved - run.centers).double().square().sum()
    stepping = running & ~stalled & ~empty
    going = stepping & (shift != 0)
    ended = (running & ~empty & ~going) | (going & (shift <= run.shift_tolerance))
    run.centers = torch.where(going, torch.lerp(run.centers, moved, run.relaxation), run.centers)
    run.assigned = run.passes.assign(run.centers)
    return torch.where(going, inertia, previous), torch.stack(
        [steps + stepping, stopped + ended, halted + empty]
    )


def move_centers(problem: WeightedTokens, centers: Tensor, assigned: Assigned) -> Tensor:
    """New centres [K, D]: means of their tokens; centres without tokens move to the farthest ones."""
    sums, counts = assigned.sums[0], assigned.counts[0]
    empty = counts <= 0
    if bool(empty.any()):
        sums, counts = _relocate_empty(problem, centers, sums, counts, empty)
    return center_means(centers, sums, counts)


def center_means(centers: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """Means [..., K, D] of the tokens of each centre; centres without tokens stay."""
    means = (sums / counts.clamp_min(torch.finfo(torch.float64).tiny)[..., None]).float()
    return torch.where((counts > 0)[..., None], means, centers)


def squared_movement(before: Tensor, after: Tensor) -> np.ndarray:
    """Squared distances between centres [..., K, D], summed over each set of centres."""
    # Summed by NumPy, in one thread: when to stop must not depend on the number of threads.
    return np.asarray(np.square((after - before).double().cpu().numpy()).sum((-2, -1)))


def _relocate_empty(
    problem: WeightedTokens, centers: Tensor, sums: Tensor, counts: Tensor, empty: Tensor
) -> tuple[Tensor, Tensor]:
    """Give each empty centre the token farthest from its own centre, as scikit-learn does.

    Tokens that lie on their centre are left there: moving them would gain nothing and never end.
    """
    assigned = problem.assign(centers, with_labels=True, with_distances=True)
    assert assigned.labels is not None
    assert assigned.distances is not None
    weights = torch.ones(len(problem), device=sums.device) if problem.weights is None else problem.weights
    gains = torch.where(weights > 0, assigned.distances[0], 0)
    slots = empty.nonzero()[:, 0]
    gain, farthest = gains.topk(min(len(slots), len(problem)))
    farthest = farthest[gain > 0]
    slots = slots[: len(farthest)]
    owners = assigned.labels[0][farthest].long()
    taken = weights[farthest].double()
    rows = problem.tokens[farthest].double() * taken[:, None]
    sums = sums.index_add(0, owners, rows, alpha=-1).index_copy(0, slots, rows)
    counts = counts.index_add(0, owners, taken, alpha=-1).index_copy(0, slots, taken)
    return sums, counts
