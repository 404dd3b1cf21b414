"""NMI of prompts and patch tokens per block, recorded while a `PromptedViT` trains (Fig. 2).

Limits: a step is a call of the module in training mode; with `torch.compile`, attach before the first call.
"""

from __future__ import annotations

import functools
import itertools
import os
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import block_input_hooks
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.prompting.nmi import nmi_per_image
from spt_fast.support.arguments import check_bool, check_int, check_number
from spt_fast.support.distributed import Processes, find_processes
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.files import check_output_path, write_bytes
from spt_fast.support.tables import csv_bytes
from spt_fast.support.waiting import OnTheWay

Callback = Callable[[int, Mapping[str, float]], None]

# Attached trackers, by the number that their hooks pass to the op. An op, unlike a Python call, can be part
# of a compiled graph. It looks up its tracker whenever it runs, so no step leads to another compilation.
_ATTACHED: dict[int, NMITracker] = {}
_KEYS = itertools.count()
_BEGIN = -1


class NMIHistory(NamedTuple):
    """What an `NMITracker` has recorded: S steps of L blocks."""

    steps: list[int]
    values: Tensor  # [S, L] float32, on the CPU: mean over the images

    def to_csv(self, run: str | None = None) -> bytes:
        """One line per step and block (from 1): step,block,nmi, and `run` in a fourth column if given."""
        label = [] if run is None else [run]
        rows = [
            (step, block, f"{value:.9g}", *label)
            for step, row in zip(self.steps, self.values.tolist(), strict=True)
            for block, value in enumerate(row, start=1)
        ]
        return csv_bytes(["step", "block", "nmi", *(["run"] if label else [])], rows)


class NMITracker:
    """Records the NMI (eq. 7, 8) of each block's prompts and the patch tokens entering it, while training.

    >>> with spt_fast.NMITracker(tuned, every=10) as tracker:
    ...     train(tuned)
    >>> steps, values = tracker.history()  # values [S, L]

    It measures the tokens of the training forward itself, without gradients, and never waits for a GPU:
    values are copied to the host asynchronously. Calls in evaluation mode, calls of copies of the module
    (such as moving averages) and the recomputations of gradient checkpointing are not steps. With
    `torch.compile` the measuring is an op of the compiled graph: attach before the first compiled call (or
    call `torch.compiler.reset()`).

    A record takes 4 L + 8 bytes of host memory, and no device memory once it is on the host.

    Args:
        module: a `PromptedViT`, also one inside `DistributedDataParallel` or a compiled module.
        every: record the steps 0, every, 2 * every, ...; step 0 is the first call, before any update.
        callback: called as `callback(step, values)` with the values of this process once they are on the
            host, at the latest by `detach()`; keys "nmi/block_1", ..., and "nmi/mean". On the CPU that is at
            the end of the step's forward, on a GPU usually during the next one.
        max_images: measure the first `max_images` images of each batch; None measures all.
        scale, normalize: of the scores, as in `sigmoid_nmi`; by default they are eq. 7's.

    Raises:
        TypeError: `module` is no `PromptedViT`, or another argument is of the wrong type.
        ValueError: the module has no prompts, or `every` or `max_images` is below 1.
        RuntimeError: the `PromptedViT` has released its model.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        every: int = 1,
        callback: Callback | None = None,
        max_images: int | None = None,
        scale: float = 1.0,
        normalize: bool = False,
    ) -> None:
        self._tuned = _prompted_vit(module)
        self._every = check_int("every", every, 1)
        self._max_images = None if max_images is None else check_int("max_images", max_images, 1, "or None")
        self._scores = {
            "scale": check_number("scale", scale, above=0),
            "normalize": check_bool("normalize", normalize),
        }
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be callable or None, got {type(callback).__name__}")
        self._callback = callback
        self._num_blocks = len(self._tuned.prompted_blocks)
        self._key = next(_KEYS)
        self._hooks: ExitStack | None = None  # while attached
        self._step = 0
        self._first_step = 0  # of this attachment
        self._calls_in_evaluation = 0  # likewise
        self._row: list[Tensor] | None = None  # of the forward now running, where it is to be recorded
        self._travelling: deque[tuple[int, OnTheWay]] = deque()
        self._steps = array("q")
        self._values = array("f")

    def attach(self) -> NMITracker:
        """Start recording; returns itself.

        Raises:
            RuntimeError: attached already, or the `PromptedViT` has released its model.
        """
        if self._hooks is not None:
            raise RuntimeError("this NMITracker is attached already")
        blocks = self._tuned.prompted_blocks
        # On the host, whatever the default device is: the op reads them. Mutated by it, so that a compiler
        # neither drops nor reorders its calls.
        order = torch.zeros(1, dtype=torch.int64, device="cpu")
        # Tensors: a compiler makes another graph for every number.
        begin, *inside, end = (
            torch.tensor([self._key, layer], device="cpu") for layer in range(_BEGIN, len(blocks) + 1)
        )
        with ExitStack() as stack:
            stack.callback(self._tuned.register_forward_pre_hook(_Hook(_mark, order, begin)).remove)
            stack.enter_context(block_input_hooks(blocks, _Hook(_observe_input, order, inside)))
            stack.callback(self._tuned.register_forward_hook(_Hook(_mark, order, end)).remove)
            self._hooks = stack.pop_all()
        self._first_step, self._calls_in_evaluation = self._step, 0
        _ATTACHED[self._key] = self
        return self

    def detach(self) -> None:
        """Stop recording, remove all hooks, wait for the last values and hand them to the callback.

        Warns where the module was called in evaluation mode only, so that there is nothing to record.
        """
        if self._hooks is not None:
            self._hooks.close()
            self._warn_if_never_training()
        self._hooks = None
        self._row = None
        _ATTACHED.pop(self._key, None)
        self._receive(wait=True)

    def __enter__(self) -> NMITracker:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def history(self, *, local: bool = False, allow_nonfinite: bool = False) -> NMIHistory:
        """All records so far; waits for values that are still on their way to the host.

        Where `torch.distributed` is initialised, the values are averaged over all processes with equal
        weights. That is a collective: every process must call it, after equally many steps. With `local` it
        is not, and the values are those of this process.

        Raises:
            NonFiniteError: prompts or tokens of a block were NaN or infinite, unless `allow_nonfinite`.
            ValueError: processes have recorded different steps.
        """
        self._receive(wait=True)
        # A copy: an array whose memory is shared cannot grow.
        values = torch.tensor(self._values, dtype=torch.float32, device="cpu").reshape(-1, self._num_blocks)
        steps = list(self._steps)
        if not local:
            values = _average_over_processes(find_processes(None), steps, values)
        if not allow_nonfinite:
            _check_finite(steps, values)
        return NMIHistory(steps, values)

    def state_dict(self) -> dict[str, Any]:
        """The records so far and the number of steps, to go on from in another process: a collective.

        Returns:
            A dict of numbers, lists and tensors.
        """
        steps, values = self.history(allow_nonfinite=True)
        return {"step": self._step, "steps": steps, "values": values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, as if its steps had been made here; what is here is dropped.

        Raises:
            ValueError: the records are of another number of blocks.
            RuntimeError: the tracker is attached.
        """
        if self._hooks is not None:
            raise RuntimeError("load the state of an NMITracker before you attach it")
        steps, values = state["steps"], state["values"]
        if tuple(values.shape) != (len(steps), self._num_blocks):
            raise ValueError(
                f"state must hold values [{len(steps)}, {self._num_blocks}], got {list(values.shape)}"
            )
        self._step = int(state["step"])
        self._steps = array("q", steps)
        self._values = array("f", values.flatten().tolist())

    def to_csv(
        self, path: str | os.PathLike[str], *, run: str | None = None, overwrite: bool = False
    ) -> None:
        """Write `NMIHistory.to_csv`.

        A collective like `history`, with its errors; process 0 writes. An error there is raised by all.

        Raises:
            FileExistsError: there is such a file, and not `overwrite`.
            FileNotFoundError: the folder does not exist.
        """
        processes = find_processes(None)
        writes = processes.rank == 0
        with processes.together():
            if writes:
                check_output_path(path, overwrite=overwrite)
        history = self.history()
        if writes:
            write_bytes(path, history.to_csv(run), overwrite=overwrite)

    def to_tensorboard(self, writer: Any) -> None:
        """Add all records to a `torch.utils.tensorboard.SummaryWriter` (extra: train), or one like it.

        A collective like `history`, with its errors; process 0 writes, others may pass None. To watch while
        training, give `callback` a function that calls `writer.add_scalar`.
        """
        processes = find_processes(None)
        writes = processes.rank == 0
        with processes.together():
            if writes and not callable(getattr(writer, "add_scalar", None)):
                raise TypeError(
                    f"writer must have `add_scalar`, as a SummaryWriter has, got {type(writer).__name__}"
                )
        steps, values = self.history()
        if writes:
            for step, row in zip(steps, values.tolist(), strict=True):
                for name, value in _named(row).items():
                    writer.add_scalar(name, value, step)

    def __repr__(self) -> str:
        state = "detached" if self._hooks is None else "attached"
        return (
            f"NMITracker(blocks={self._num_blocks}, every={self._every}, {state}, steps={self._step}, "
            f"recorded={len(self._steps)})"
        )

    def _warn_if_never_training(self) -> None:
        if self._step > self._first_step or self._calls_in_evaluation == 0:
            return
        warnings.warn(
            f"NMITracker recorded nothing: the module was called {self._calls_in_evaluation} times in "
            "evaluation mode and never in training mode; call tuned.train() before training (Lightning keeps "
            "the mode in which it finds a model)",
            stacklevel=3,
        )

    def _observe(self, layer: int, x: Tensor | None) -> None:
        if layer == _BEGIN:
            self._begin()
        elif layer == self._num_blocks:
            self._end()
        elif self._row is not None and x is not None:
            prompts, tokens = self._tuned.prompts_and_tokens(layer, x[: self._max_images])
            self._row.append(nmi_per_image(prompts, tokens, **self._scores).mean())

    def _begin(self) -> None:
        self._row = None
        if not self._tuned.training:
            self._calls_in_evaluation += 1
            return
        if self._step % self._every == 0:
            self._row = []
        self._step += 1

    def _end(self) -> None:
        if self._row is not None:
            self._travelling.append((self._step - 1, OnTheWay(torch.stack(self._row))))
            self._row = None
        self._receive(wait=False)

    def _receive(self, *, wait: bool) -> None:
        """Store the records that are on the host, or all of them, in order."""
        while self._travelling and (wait or self._travelling[0][1].has_arrived()):
            step, values = self._travelling.popleft()
            row = values.read()
            self._steps.append(step)
            self._values.extend(row)
            if self._callback is not None:
                self._callback(step, _named(row))


class _Hook(functools.partial[None]):
    """A hook that does nothing in a copy of its module, pickled or not: a moving average takes no steps."""

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (_ignore,)


def _ignore(*_: object) -> None:
    pass


@torch.library.custom_op("spt_fast::observe_nmi", mutates_args=("order",))
def _observe_nmi(x: Tensor | None, order: Tensor, where: Tensor) -> None:
    order.add_(1)
    key, layer = where.tolist()
    attached = _ATTACHED.get(key)
    # None: a compiled graph outlives `detach`.
    if attached is not None:
        with torch.no_grad():
            attached._observe(layer, x)


@_observe_nmi.register_fake
def _(x: Tensor | None, order: Tensor, where: Tensor) -> None:
    return None


def _observe_input(order: Tensor, where: list[Tensor], layer: int, x: Tensor) -> None:
    torch.ops.spt_fast.observe_nmi(x.detach(), order, where[layer])


def _mark(order: Tensor, where: Tensor, *_: object) -> None:
    torch.ops.spt_fast.observe_nmi(None, order, where)


def _named(row: list[float]) -> dict[str, float]:
    named = {f"nmi/block_{block}": value for block, value in enumerate(row, start=1)}
    return {**named, "nmi/mean": sum(row) / len(row)}


def _average_over_processes(processes: Processes, steps: list[int], values: Tensor) -> Tensor:
    gathered = processes.gather((steps, values))
    for rank, (theirs, _) in enumerate(gathered):
        if theirs != steps:
            raise ValueError(
                f"processes have recorded different steps: {len(steps)} in process {processes.rank}, "
                f"{len(theirs)} in process {rank}"
            )
    return torch.stack([theirs for _, theirs in gathered]).mean(dim=0)


def _check_finite(steps: list[int], values: Tensor) -> None:
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad) > 0:
        row, layer = bad[0].tolist()
        raise NonFiniteError(
            f"block {layer + 1}: its prompts or tokens held NaN or infinity at step {steps[row]}; "
            "history(allow_nonfinite=True) returns the records as they are",
            layer=layer,
            step=steps[row],
        )


def _prompted_vit(module: nn.Module) -> PromptedViT:
    inner = module
    # What torch.compile and DistributedDataParallel wrap.
    while not isinstance(inner, PromptedViT):
        wrapped = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if not isinstance(wrapped, nn.Module):
            raise TypeError(f"module must be a PromptedViT, got {type(module).__name__}")
        inner = wrapped
    if inner.num_prompts == 0:
        raise ValueError("module must have prompts to track, got a PromptedViT with none")
    return inner
