"""Lloyd's algorithm, from one or several starts at once, over whatever can make a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from spt_fast.clustering.chunks import OneChunk
from spt_fast.clustering.passes import Step, TokenPasses, center_means, squared_movement, take_runs
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import PassResult

# scikit-learn's defaults, with k-means++ starts.
N_INIT = 1
MAX_ITER = 300
TOL = 1e-4  # times the mean variance of a feature
LOOK_EVERY = 4  # steps on a device between two looks at it


@dataclass(frozen=True)
class LloydResult:
    """Where Lloyd's algorithm ended."""

    centers: Tensor  # [K, D] float32
    counts: Tensor  # [K] float64: weight of each centre's tokens
    inertia: float  # weighted sum of squared distances to these centres
    n_iter: int  # counted as scikit-learn does, with the one that finds that nothing moves


@dataclass(frozen=True)
class Until:
    """When a run ends, if its centres still move."""

    max_iter: int
    shift_tolerance: float = 0.0  # they moved by at most this: squared distance, summed (scikit-learn's rule)
    gain_tolerance: float | None = None  # an iteration lowered the inertia by less than this share of it


class Steps(Protocol):
    """What makes the steps: `TokenPasses`, or faiss."""

    def assign(self, runs: Sequence[int], centers: Tensor) -> None:
        """Assign the tokens (eq. 9) to the centres [len(runs), K, D] that these runs have moved to."""
        ...

    def step(self, runs: Sequence[int], centers: Tensor) -> Step:
        """Where these runs, which are at `centers`, go next (eq. 10)."""
        ...


class Lloyd:
    """Runs of Lloyd's algorithm from R starts, a step of all of them at a time.

    `run` may be called again with another end: it goes on from where the runs are, and ends exactly where a
    single call with the later end would have (on CUDA, with several starts, to the rounding of the sums).

    With a `relaxation` in (1, 2) each step goes that much further than to the mean, which never raises the
    inertia either and needs fewer iterations in the long tail.
    """

    def __init__(self, steps: Steps, starts: Tensor, relaxation: float = 1.0) -> None:
        self._steps, self._relaxation = steps, relaxation
        self._runs = range(len(starts))
        self.centers = starts  # [R, K, D] float32
        self.n_iter = [0 for _ in starts]
        self._shift = [math.inf for _ in starts]  # squared movement in the last iteration
        self._inertia = [math.inf for _ in starts]  # before the last iteration
        self._has_relocated = False  # whether a centre was without tokens in the last iteration looked at
        steps.assign(self._runs, starts)

    def run(self, until: Until) -> None:
        """Iterate each run to its end."""
        stalled: set[int] = set()
        while runs := self._unfinished(stalled, until):
            stalled |= self._iterate(runs, until)

    def run_ahead(self, until: Until, passes: TokenPasses, look_every: int) -> None:
        """The same for a single run on a device, read back from it only every `look_every` iterations.

        The iterations in between are made in any case, and undone from the first that ends the run, or in
        which a centre is without tokens; the next one is then looked at too, because such centres come in a
        row. The result is that of looking at each, where passes over the same tokens and centres give the
        same bits.
        """
        stalled: set[int] = set()
        while runs := self._unfinished(stalled, until):
            if self._has_relocated:
                stalled |= self._iterate(runs, until)
                continue
            number = min(look_every, until.max_iter - self.n_iter[0])
            steps = [self._step_blindly(passes) for _ in range(number)]
            for index, (inertia, least_count, shift) in enumerate(_look_at(steps)):
                step = steps[index]
                is_due = bool(self._unfinished(stalled, until))
                if not is_due or least_count <= 0 or self._gains_too_little(0, inertia, until):
                    self.centers = step.before
                    passes.restore(step.totals, undone=number - index)
                    if is_due:
                        stalled |= self._iterate(runs, until)
                    break
                self._note(0, inertia, shift)

    def move_to_means(self) -> None:
        """One more step of all runs, without relaxation, that `n_iter` does not count."""
        self.centers = self._steps.step(self._runs, self.centers).centers
        self._steps.assign(self._runs, self.centers)

    def best(self, totals: PassResult) -> LloydResult:
        """The run of lowest inertia, as it is now, with what belongs to its centres."""
        best = int(totals.inertia.cpu().numpy().argmin())
        return LloydResult(
            self.centers[best].clone(),
            totals.counts[best].clone(),
            float(totals.inertia[best]),
            self.n_iter[best],
        )

    def _unfinished(self, stalled: set[int], until: Until) -> list[int]:
        return [
            run
            for run in self._runs
            if self._shift[run] > until.shift_tolerance
            and self.n_iter[run] < until.max_iter
            and run not in stalled
        ]

    def _iterate(self, runs: list[int], until: Until) -> set[int]:
        """One iteration of these runs; those that gain too little by it stay and are returned."""
        before = take_runs(self.centers, runs)
        step = self._steps.step(runs, before)
        self._has_relocated = any(step.relocated)
        stalled: set[int] = set()
        moved = []
        facts = zip(runs, step.inertia, step.movement, strict=True)
        for position, (run, inertia, shift) in enumerate(facts):
            if self._gains_too_little(run, inertia, until):
                stalled.add(run)
                continue
            self._note(run, inertia, shift)
            # A step that moves nothing needs no pass.
            if shift > 0:
                moved.append(position)
        if moved:
            self._move([runs[position] for position in moved], take_runs(self._relaxed(before, step), moved))
        return stalled

    def _gains_too_little(self, run: int, inertia: float, until: Until) -> bool:
        gain = self._inertia[run] - inertia
        return until.gain_tolerance is not None and gain < until.gain_tolerance * inertia

    def _note(self, run: int, inertia: float, shift: float) -> None:
        self._inertia[run], self._shift[run] = inertia, shift
        self.n_iter[run] += 1

    def _relaxed(self, before: Tensor, step: Step) -> Tensor:
        if self._relaxation == 1.0:
            return step.centers
        # A centre that was empty has jumped to a token, and must not jump past it.
        rates = [1.0 if relocated else self._relaxation for relocated in step.relocated]
        return torch.stack([torch.lerp(*run) for run in zip(before, step.centers, rates, strict=True)])

    def _move(self, runs: list[int], centers: Tensor) -> None:
        if len(runs) == len(self._runs):
            self.centers = centers
        else:
            self.centers = self.centers.index_copy(0, torch.tensor(runs, device=centers.device), centers)
        self._steps.assign(runs, centers)

    def _step_blindly(self, passes: TokenPasses) -> _BlindStep:
        """One iteration of a single run, of which the host knows nothing yet."""
        before, totals = self.centers, passes.totals
        means = center_means(before, totals.sums, totals.counts)
        movement = squared_movement(before, means)
        self.centers = means if self._relaxation == 1.0 else torch.lerp(before, means, self._relaxation)
        passes.assign(self._runs, self.centers)
        return _BlindStep(before, totals, movement)


class _BlindStep(NamedTuple):
    """Where an iteration began, and what decides whether it should have been made."""

    before: Tensor  # [1, K, D]: the centres
    totals: PassResult  # of these centres
    movement: Tensor  # [1] float64: squared, of the step without relaxation


def _look_at(steps: list[_BlindStep]) -> list[tuple[float, float, float]]:
    """Inertia, smallest count and movement of each step; one copy from the device."""
    found = [
        values for step in steps for values in (step.totals.inertia, step.movement, step.totals.counts[0])
    ]
    rows = torch.cat(found).view(len(steps), -1).tolist()
    return [(inertia, min(counts), movement) for inertia, movement, *counts in rows]


def lloyd(
    problem: WeightedTokens,
    centers: Tensor,  # [K, D] float32
    *,
    max_iter: int,
    shift_tolerance: float = 0.0,
    gain_tolerance: float = 0.0,
    relaxation: float = 1.0,
    prune: bool = True,
    look_every: int | None = None,
    exact_inertia: bool = False,
) -> LloydResult:
    """Assign (eq. 9) and move to the mean (eq. 10) until nothing moves, for one start and tokens in memory.

    Stops early when the centres move by at most `shift_tolerance` (squared distance, summed over
    centres; scikit-learn's rule) or when an iteration lowers the inertia by less than
    `gain_tolerance` times the inertia. Counts and inertia belong to the centres returned.

    `relaxation` is that of `Lloyd`; where it is not 1 a last step to the means follows. `prune` leaves out
    tokens whose centre cannot have changed, where the kernels can; it does not change the labels.
    `look_every` is the number of iterations between two looks at tensors on a device (None: 1 on the CPU,
    else 4); iterations past the end are made in between, and undone. `exact_inertia` measures the inertia of
    the result anew, from differences: that of a pass is rounded by the tokens' distances to the mean.
    """
    passes = TokenPasses(
        OneChunk(problem.tokens), problem.mean, problem.weights, backend=problem.backend, prune=prune
    )
    run = Lloyd(passes, centers[None], relaxation)
    until = Until(max_iter, shift_tolerance, gain_tolerance)
    if look_every is None:
        look_every = 1 if centers.device.type == "cpu" else LOOK_EVERY
    if look_every == 1:
        run.run(until)
    else:
        run.run_ahead(until, passes, look_every)
    if relaxation != 1.0:
        run.move_to_means()
    found = run.best(passes.totals)
    if exact_inertia:
        found = replace(found, inertia=problem.inertia(found.centers, passes.labels(run.centers)))
    return found
