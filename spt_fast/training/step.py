"""One step of the optimiser: over a batch, or over several that count as one, and over all processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spt_fast.data.batches import IGNORED_LABEL, count_given, count_labels, labelled_batch
from spt_fast.support.distributed import Processes
from spt_fast.support.waiting import move
from spt_fast.training.evaluation import logits_of
from spt_fast.training.objective import Objective
from spt_fast.training.recipe import Recipe


class Stepper:
    """Takes steps as a recipe says.

    Args:
        optimizer: of what learns, whose rates are set already.
        device: of the model.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        recipe: Recipe,
        objective: Objective,
        device: torch.device,
        processes: Processes,
    ) -> None:
        self._optimizer, self._recipe, self._objective = optimizer, recipe, objective
        self._device, self._processes = device, processes
        self.amp = _amp_dtype(recipe, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp is torch.float16)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the model runs, also where nothing is learned."""
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self.amp)

    def take(self, module: nn.Module, batches: Sequence[Any], first: int) -> tuple[Tensor, int]:
        """One step of `module` over the mean of the losses of all images with a label.

        Args:
            batches: as `labelled_batch` reads them, one at least; None for those without a readable image.
                With several processes, some may be empty here.
            first: the number of the first batch in the epoch, for messages.

        Returns:
            The sum of the losses here, on the device, and the number of images with a label here.

        Raises:
            TypeError, ValueError: as `training.fit`.
        """
        numbered = enumerate(batches, start=first)
        shares = [self._share(batch, number) for number, batch in numbered if batch is not None]
        count = sum(count_given(share.labels) for share in shares)
        scale = self._scale(count, shares[0].where)
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for share in shares:
            with _exchange_at_last(module, share is shares[-1]):
                with self.autocast():
                    loss = self._loss(module, share)
                self.scaler.scale(loss * scale).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self._optimise()
        return total, count

    def _share(self, batch: Any, number: int) -> _Share:
        """Images and labels of a batch; for an empty share, images stand in that count nowhere."""
        where = f"batch {number} of train_loader"
        images, labels = labelled_batch(batch, where, may_be_empty=self._processes.size > 1)
        if len(images) == 0:
            # Two, so that a batch norm before the head can run.
            images, labels = images.new_zeros(2, *images.shape[1:]), labels.new_full((2,), IGNORED_LABEL)
        if self._recipe.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        return _Share(images, labels, where)

    def _scale(self, count: int, where: str) -> float | Tensor:
        """What makes of the sum of losses here a share of the mean over all processes' images."""
        if self._processes.size == 1:
            if count == 0:
                raise ValueError(f"{where} must hold a label other than {IGNORED_LABEL}, got none")
            return 1 / count
        # The backward pass takes the mean over the processes.
        everywhere = self._processes.sum(torch.tensor([float(count)], device=self._device))
        return self._processes.size / everywhere.clamp(min=1)[0]

    def _loss(self, module: nn.Module, share: _Share) -> Tensor:
        """The sum of the losses of a batch."""
        if len(share.images) == 1:
            _check_one_is_enough(module, share.where)
        inputs, targets = self._objective.prepare(move(share.images, self._device), share.labels)
        logits = logits_of(module, inputs)
        count_labels(share.labels, logits.shape[1], share.where)
        return self._objective.loss(logits, move(targets, self._device))

    def _optimise(self) -> None:
        if self._recipe.clip_grad is not None:
            self.scaler.unscale_(self._optimizer)
            parameters = [each for group in self._optimizer.param_groups for each in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self._recipe.clip_grad)
        self.scaler.step(self._optimizer)
        self.scaler.update()


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a batch norm over rows is in training mode where `module` is in it."""
    modes = [(each, each.training) for each in module.modules()]
    if not any(isinstance(each, nn.BatchNorm1d) for each, _ in modes):
        return False
    module.train()
    found = _norms_rows(module)
    for each, mode in modes:
        each.training = mode
    return found


def _norms_rows(module: nn.Module) -> bool:
    return any(isinstance(each, nn.BatchNorm1d) and each.training for each in module.modules())


def _check_one_is_enough(module: nn.Module, where: str) -> None:
    if _norms_rows(module):
        raise ValueError(
            f"{where} must hold two images or more for the batch norm before the head, got 1; leave out a "
            "last batch that is not full (drop_last=True, --drop-last), or take another batch_size"
        )


@contextmanager
def channels_last(tuned: nn.Module, wanted: bool) -> Iterator[None]:
    """Within the context, four-dimensional weights of `tuned` lie in memory channel by channel."""
    if not wanted:
        yield
        return
    weights = [each for each in (*tuned.parameters(), *tuned.buffers()) if each.ndim == 4]
    try:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.contiguous()


def warn_of_slow_products(dtype: torch.dtype | None, device: torch.device) -> None:
    """PyTorch multiplies bfloat16 by plain loops on CPUs before AVX-512: seven times slower than float32."""
    if dtype is torch.bfloat16 and device.type == "cpu" and not _has_bfloat16_products():
        warnings.warn(
            "bfloat16 is several times slower than float32 on this CPU, for which PyTorch has no bfloat16 "
            "products; take amp='off' and no weight_dtype",
            stacklevel=3,
        )


class _Share(NamedTuple):
    images: Tensor
    labels: Tensor
    where: str


def _amp_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """The dtype in which products are computed, where it is another than that of the weights."""
    if recipe.amp == "fp16":
        if device.type != "cuda":
            raise ValueError(f"amp='fp16' needs a CUDA device, got {device}; take 'bf16' or 'off'")
        return torch.float16
    if recipe.amp == "bf16" or (recipe.amp == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return None


def _has_bfloat16_products() -> bool:
    """False where PyTorch says so; of builds without oneDNN, which has these products, nothing is known."""
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return not has_onednn or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _exchange_at_last(module: nn.Module, is_last: bool) -> AbstractContextManager[Any]:
    """Processes exchange gradients once in a step, with its last batch."""
    if is_last or not isinstance(module, nn.parallel.DistributedDataParallel):
        return nullcontext()
    return module.no_sync()
