"""NMITracker: what it records is `layer_nmi` of each training step, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import csv
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from spt_fast import NMITracker, NonFiniteError, PromptedViT

MakeViT = Callable[..., nn.Module]
MakeImages = Callable[..., Tensor]
Train = Callable[[nn.Module, PromptedViT, int], Tensor]


@pytest.fixture
def tuned(make_vit: MakeViT) -> PromptedViT:
    return PromptedViT(make_vit(), 4, num_classes=3).train()


def train_step(module: nn.Module, prompts: nn.Parameter, images: Tensor) -> None:
    prompts.grad = None
    torch.autograd.backward(module(images).square().mean())
    with torch.no_grad():
        prompts -= prompts.grad  # type: ignore[operator]


@pytest.fixture
def train_and_expect(make_images: MakeImages) -> Train:
    """Train for some steps, and return the [S, L] values that the tracker should have."""

    def train(module: nn.Module, tuned: PromptedViT, steps: int) -> Tensor:
        rows = []
        for step in range(steps):
            rows.append(tuned.eval().layer_nmi(make_images(seed=step)).mean(dim=1))
            tuned.train()
            train_step(module, tuned.prompts, make_images(seed=step))
        return torch.stack(rows)

    return train


def num_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("engine", ["auto", "concat"])
def test_records_the_nmi_of_each_training_step(
    make_vit: MakeViT, depth: Any, engine: Any, train_and_expect: Train
) -> None:
    tuned = PromptedViT(make_vit(reg_tokens=2), 4, num_classes=3, depth=depth, engine=engine).train()
    with NMITracker(tuned) as tracker:
        expected = train_and_expect(tuned, tuned, 3)
    steps, values = tracker.history()
    assert steps == [0, 1, 2]
    assert values.shape == (3, 3)
    assert not values.requires_grad
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)
    assert len(values.unique()) == 9


def test_every_n_steps_and_only_in_training_mode(tuned: PromptedViT, make_images: MakeImages) -> None:
    with NMITracker(tuned, every=3) as tracker:
        for step in range(7):
            tuned(make_images(seed=step))
            tuned.eval()(make_images())
            tuned.train()
    assert tracker.history().steps == [0, 3, 6]


def test_max_images_measures_the_first_ones(tuned: PromptedViT, make_images: MakeImages) -> None:
    with NMITracker(tuned, max_images=2) as tracker:
        tuned(make_images())
    torch.testing.assert_close(tracker.history().values[0], tuned.layer_nmi(make_images())[:, :2].mean(1))


def test_training_is_not_changed(make_vit: MakeViT, make_images: MakeImages) -> None:
    def train(tracked: bool) -> Tensor:
        tuned = PromptedViT(make_vit(), torch.ones(3, 4, 32), num_classes=3)
        tracker = NMITracker(tuned)
        if tracked:
            tracker.attach()
        nn.init.ones_(tuned.head.weight)  # type: ignore[arg-type]
        for step in range(2):
            train_step(tuned.train(), tuned.prompts, make_images(seed=step))
        return tuned.prompts.detach()

    assert torch.equal(train(True), train(False))


def test_leaves_no_hook_and_no_registration_behind(tuned: PromptedViT, make_images: MakeImages) -> None:
    before = num_hooks(tuned)
    tracker = NMITracker(tuned)
    with contextlib.suppress(ZeroDivisionError), tracker:
        assert num_hooks(tuned) > before
        tuned(make_images())
        raise ZeroDivisionError
    assert num_hooks(tuned) == before
    tuned(make_images())
    assert tracker.history().steps == [0]
    alive = weakref.ref(tracker)
    del tracker
    gc.collect()
    assert alive() is None


def test_goes_on_counting_when_attached_again(tuned: PromptedViT, make_images: MakeImages) -> None:
    tracker = NMITracker(tuned)
    for _ in range(2):
        with tracker:
            tuned(make_images())
    assert tracker.history().steps == [0, 1]
    with tracker, pytest.raises(RuntimeError, match="attached already"):
        tracker.attach()


def test_goes_on_from_its_state_in_another_process(
    tuned: PromptedViT, make_vit: MakeViT, train_and_expect: Train
) -> None:
    with NMITracker(tuned, every=2) as whole:
        with NMITracker(tuned, every=2) as first:
            train_and_expect(tuned, tuned, 3)
        state = pickle.loads(pickle.dumps(first.state_dict()))
        second = NMITracker(tuned, every=2)
        second.load_state_dict(state)
        with second:
            train_and_expect(tuned, tuned, 2)
            with pytest.raises(RuntimeError, match="before you attach it"):
                second.load_state_dict(state)
    assert second.history().steps == whole.history().steps == [0, 2, 4]
    assert torch.equal(second.history().values, whole.history().values)
    other = NMITracker(PromptedViT(make_vit(depth=2), 4, num_classes=3))
    with pytest.raises(ValueError, match=r"state must hold values \[2, 2\], got \[2, 3\]"):
        other.load_state_dict(state)


def test_a_forward_that_fails_is_not_recorded(tuned: PromptedViT, make_images: MakeImages) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with NMITracker(tuned) as tracker:
        handle = tuned.model.blocks[1].register_forward_hook(fail)  # type: ignore[index, union-attr]
        with pytest.raises(ZeroDivisionError):
            tuned(make_images())
        handle.remove()
        tuned(make_images())
    assert tracker.history().steps == [1]


def test_recomputing_for_checkpointing_is_no_step(tuned: PromptedViT, train_and_expect: Train) -> None:
    tuned.model.set_grad_checkpointing()  # type: ignore[operator]
    with NMITracker(tuned) as tracker:
        expected = train_and_expect(tuned, tuned, 3)
    assert tracker.history().steps == [0, 1, 2]
    torch.testing.assert_close(tracker.history().values, expected, rtol=1e-6, atol=0)


def test_works_in_a_compiled_module_without_graph_break_or_recompilation(
    make_vit: MakeViT, make_images: MakeImages
) -> None:
    """Two trackers, one given the module inside, one the compiled module."""
    torch.compiler.reset()
    tuned = PromptedViT(make_vit(depth=2), 4, num_classes=3).train()
    compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    expected = []
    with (
        torch._dynamo.config.patch(error_on_recompile=True),  # type: ignore[no-untyped-call]
        NMITracker(tuned) as inner,
        NMITracker(compiled, every=2) as outer,
    ):
        for step in range(5):
            images = make_images(seed=step)
            expected.append(copy.deepcopy(tuned).eval().layer_nmi(images).mean(dim=1))
            train_step(compiled, tuned.prompts, images)
    compiled(make_images())
    assert inner.history().steps == [0, 1, 2, 3, 4]
    assert outer.history().steps == [0, 2, 4]
    torch.testing.assert_close(inner.history().values, torch.stack(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(outer.history().values, torch.stack(expected)[::2], rtol=1e-5, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_of_the_module_take_no_steps(
    tuned: PromptedViT,
    duplicate: Callable[[PromptedViT], PromptedViT],
    make_images: MakeImages,
    train_and_expect: Train,
) -> None:
    with NMITracker(tuned) as tracker:
        average = duplicate(tuned)
        expected = train_and_expect(tuned, tuned, 1)
        for mode in (False, True):
            average.train(mode)(make_images())
        with NMITracker(average) as other:
            average(make_images())
        tuned(make_images(seed=1))
    assert tracker.history().steps == [0, 1]
    torch.testing.assert_close(tracker.history().values[:1], expected, rtol=1e-6, atol=0)
    assert other.history().steps == [0]


def test_numpy_integers_are_taken(tuned: PromptedViT, make_images: MakeImages) -> None:
    with NMITracker(tuned, every=np.int64(2), max_images=np.int32(1)) as tracker:  # type: ignore[arg-type]
        for _ in range(3):
            tuned(make_images())
    assert tracker.history().steps == [0, 2]


def test_moving_average_takes_no_steps(tuned: PromptedViT, make_images: MakeImages) -> None:
    with NMITracker(tuned) as tracker:
        average = ModelEmaV3(tuned)
        for step in range(2):
            tuned(make_images(seed=step))
            average.update(tuned)
            average(make_images(seed=step))
    assert tracker.history().steps == [0, 1]


def test_callback_gets_the_values_of_each_step(tuned: PromptedViT, make_images: MakeImages) -> None:
    calls: list[tuple[int, dict[str, float]]] = []
    with NMITracker(
        tuned, every=2, callback=lambda step, values: calls.append((step, dict(values)))
    ) as tracker:
        for step in range(3):
            tuned(make_images(seed=step))
            assert len(calls) == step // 2 + 1
    assert [step for step, _ in calls] == [0, 2]
    row = tracker.history().values[1]
    assert list(calls[1][1]) == ["nmi/block_1", "nmi/block_2", "nmi/block_3", "nmi/mean"]
    assert calls[1][1]["nmi/block_2"] == float(row[1])
    assert calls[1][1]["nmi/mean"] == pytest.approx(float(row.mean()), rel=1e-6)


@pytest.mark.parametrize("run", [None, "SPT, seed 1"])
def test_csv_holds_all_records(
    tuned: PromptedViT, tmp_path: Path, run: str | None, make_images: MakeImages
) -> None:
    with NMITracker(tuned) as tracker:
        for step in range(2):
            tuned(make_images(seed=step))
    path = tmp_path / "nmi.csv"
    tracker.to_csv(path, run=run)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "block", "nmi"] + (["run"] if run else [])
    assert [(row["step"], row["block"]) for row in rows] == [(s, b) for s in "01" for b in "123"]
    values = torch.tensor([float(row["nmi"]) for row in rows])
    assert torch.equal(values.reshape(2, 3), tracker.history().values)
    assert run is None or {row["run"] for row in rows} == {run}
    with pytest.raises(FileExistsError):
        tracker.to_csv(path)


def test_tensorboard_gets_all_records(tuned: PromptedViT, make_images: MakeImages) -> None:
    class Writer:
        def __init__(self) -> None:
            self.calls: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.calls.append((tag, value, step))

    with NMITracker(tuned) as tracker:
        for step in range(2):
            tuned(make_images(seed=step))
    writer = Writer()
    tracker.to_tensorboard(writer)
    assert len(writer.calls) == 8
    assert writer.calls[5] == ("nmi/block_2", float(tracker.history().values[1, 1]), 1)
    with pytest.raises(TypeError, match="writer must have `add_scalar`"):
        tracker.to_tensorboard("runs")


def test_memory_does_not_grow_beyond_the_records(make_vit: MakeViT, make_images: MakeImages) -> None:
    tuned = PromptedViT(make_vit(depth=1), 2, num_classes=2).train()
    images = make_images(1)
    with torch.no_grad(), NMITracker(tuned) as tracker:
        for _ in range(20):
            tuned(images)
        before = live_tensors()
        for _ in range(200):
            tuned(images)
        assert live_tensors() <= before
    steps, values = tracker.history()
    assert len(steps) == len(values) == 220


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_non_finite_values_are_refused_by_block_and_step(tuned: PromptedViT, make_images: MakeImages) -> None:
    with NMITracker(tuned) as tracker:
        tuned(make_images())
        with torch.no_grad():
            tuned.prompts[1, 2] = torch.nan
        tuned(make_images())
    with pytest.raises(
        NonFiniteError, match=r"block 2: its prompts or tokens held NaN .* at step 1"
    ) as raised:
        tracker.history()
    assert (raised.value.step, raised.value.layer, raised.value.image) == (1, 1, None)
    values = tracker.history(allow_nonfinite=True).values
    assert values.isnan().tolist() == [[False] * 3, [False, True, True]]
    with pytest.raises(
        NonFiniteError, match="block 2: its prompts or the tokens of image 0 hold NaN"
    ) as raised:
        tuned.layer_nmi(make_images())
    assert (raised.value.image, raised.value.layer, raised.value.step) == (0, 1, None)


def test_bad_arguments_are_refused(tuned: PromptedViT, make_vit: MakeViT) -> None:
    with pytest.raises(TypeError, match="module must be a PromptedViT, got Linear"):
        NMITracker(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="module must have prompts to track"):
        NMITracker(PromptedViT(make_vit(), 0))
    with pytest.raises(ValueError, match="every must be an integer >= 1, got 0"):
        NMITracker(tuned, every=0)
    with pytest.raises(TypeError, match=r"max_images must be an integer >= 1 or None, got 2\.5"):
        NMITracker(tuned, max_images=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callback must be callable or None, got str"):
        NMITracker(tuned, callback="log")  # type: ignore[arg-type]
    tracker = NMITracker(tuned)
    tuned.release()
    with pytest.raises(RuntimeError, match="has released its model"):
        tracker.attach()


def test_processes_are_averaged(tmp_path: Path, run_two_ranks: Callable[[str], None]) -> None:
    run_two_ranks(_TWO_RANKS)
    mean, first, second = (torch.load(tmp_path / name) for name in ("mean.pt", "0.pt", "1.pt"))
    assert not torch.equal(first, second)
    torch.testing.assert_close(mean, (first + second) / 2)
    assert len((tmp_path / "nmi.csv").read_text().splitlines()) == 1 + 2 * 2


_TWO_RANKS = """
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.parallel import DistributedDataParallel
from spt_fast import NMITracker, PromptedViT


def work(rank):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=1, num_classes=2)
    model = DistributedDataParallel(PromptedViT(vit, 3).train())
    with NMITracker(model) as tracker:
        for step in range(2):
            images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2 * step + rank))
            model(images).sum().backward()
        torch.save(tracker.history(local=True).values, f"{rank}.pt")
        mean = tracker.history().values
        tracker.to_csv("nmi.csv")
        if rank == 0:
            torch.save(mean, "mean.pt")
            model.module(images)
        try:
            tracker.history()
        except ValueError as error:
            assert "processes have recorded different steps" in str(error)
        else:
            raise AssertionError("different numbers of steps were averaged")
"""


def test_a_model_left_in_evaluation_mode_is_a_warning(tuned: PromptedViT, make_images: MakeImages) -> None:
    tracker = NMITracker(tuned.eval()).attach()
    train_step(tuned, tuned.prompts, make_images())
    tuned(make_images())
    with pytest.warns(UserWarning, match="called 2 times in evaluation mode.*tuned.train()"):
        tracker.detach()
    assert tracker.history().steps == []


@pytest.mark.parametrize("modes", [[], [True], [False, True, False]])
def test_no_warning_where_there_was_a_step_or_no_call(
    modes: list[bool], tuned: PromptedViT, make_images: MakeImages, recwarn: pytest.WarningsRecorder
) -> None:
    with NMITracker(tuned):
        for mode in modes:
            tuned.train(mode)(make_images())
    assert not recwarn.list


def test_repr_says_what_was_recorded(tuned: PromptedViT, make_images: MakeImages) -> None:
    tracker = NMITracker(tuned, every=2)
    assert repr(tracker) == "NMITracker(blocks=3, every=2, detached, steps=0, recorded=0)"
    with tracker:
        for _ in range(3):
            tuned(make_images())
        assert repr(tracker) == "NMITracker(blocks=3, every=2, attached, steps=3, recorded=2)"
