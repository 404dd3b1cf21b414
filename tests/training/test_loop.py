"""The training loop: the paper's schedule, what it trains, what it leaves alone, what it refuses."""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from spt_fast import NMITracker, PromptedViT, build_prototypes
from spt_fast.analysis import analyse
from spt_fast.data.loading import ImageLoader
from spt_fast.methods.parameter_groups import PROMPT_LR_FACTOR
from spt_fast.support.distributed import Processes
from spt_fast.support.errors import NonFiniteError
from spt_fast.training.evaluation import Evaluation, evaluate
from spt_fast.training.loaders import check_two_images
from spt_fast.training.loop import Trainer, fit, shuffled_loader
from spt_fast.training.optimizer import FINAL_LR, warmup_cosine
from spt_fast.training.recipe import Recipe


@pytest.fixture
def blobs() -> tuple[Tensor, Tensor]:
    """Three well separated classes in five dimensions, 41 rows: no multiple of a batch."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(41) % 3
    centers = 4 * torch.eye(5)[:3]
    return centers[labels] + 0.3 * torch.randn(41, 5, generator=generator), labels


def make_net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.1), nn.Linear(8, 3))


def train(net: nn.Module, data: tuple[Tensor, Tensor], seed: int = 0, **options: object) -> object:
    settings = {"epochs": 6, "lr": 3e-2, "weight_decay": 0.0, "warmup_epochs": 1, "progress": False} | options
    return fit(net, shuffled_loader(*data, batch_size=8, seed=seed), seed=seed, **settings)


def test_fit_learns_separable_classes(blobs):
    net = make_net()
    loader = shuffled_loader(*blobs, batch_size=8, seed=0)
    history = train(net, blobs, val_loader=loader, epochs=10)
    assert history.val_accuracy[-1] == 1.0
    assert history.loss[-1] < 0.2 * history.loss[0]
    assert history.epochs == 10
    assert history.val_epochs == list(range(1, 11))
    assert history.train_seconds == sum(history.seconds)


def test_same_seed_gives_the_same_weights(blobs):
    first, second, other = make_net(), make_net(), make_net()
    train(first, blobs, seed=3)
    torch.rand(7)  # the caller's random state must not matter
    train(second, blobs, seed=3)
    train(other, blobs, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_callers_random_state_is_untouched(blobs):
    net = make_net()
    # The loader runs in this process, as transforms that draw from these generators may.
    drawn = []
    net[0].register_forward_hook(lambda *_: drawn.append((random.random(), np.random.rand())))

    def states() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    for _ in range(2):
        # A DataLoader draws its base seed from its own generator, dropout from the fork.
        train(net, blobs, epochs=1, warmup_epochs=None)
        assert states() == before
    steps = len(drawn) // 2
    assert drawn[:steps] == drawn[steps:]


def test_only_what_asks_for_a_gradient_is_trained(blobs):
    net = make_net()
    net[0].requires_grad_(False)
    frozen, tuned = net[0].weight.clone(), net[2].weight.clone()
    train(net, blobs)
    assert torch.equal(net[0].weight, frozen)
    assert not torch.equal(net[2].weight, tuned)


@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (4, 5), (0, 1)])
def test_schedule_is_linear_then_cosine(warmup, total):
    peak = 0.05
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (peak, 3 * peak)]
    optimizer = torch.optim.AdamW(groups)
    schedule = warmup_cosine(optimizer, warmup, total)
    rates, tripled = [], []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        tripled.append(optimizer.param_groups[1]["lr"])
        optimizer.step()
        schedule.step()
    for step in range(warmup):
        assert rates[step] == pytest.approx(peak * (step + 1) / (warmup + 1))
    assert max(rates) == pytest.approx(peak) == pytest.approx(rates[warmup])
    assert tripled == pytest.approx([3 * rate for rate in rates], abs=3 * FINAL_LR)
    for step in range(warmup, total):
        share = (step - warmup) / max(1, total - 1 - warmup)
        assert rates[step] == pytest.approx(
            FINAL_LR + (peak - FINAL_LR) * (1 + math.cos(math.pi * share)) / 2
        )


class Prompted(nn.Module):
    """The smallest thing with a parameter named `prompts`, as PromptedViT has one."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.zeros(2, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images + self.prompts.sum(0))


def test_prompts_have_their_own_rate(blobs):
    net = Prompted()
    head = net.head.weight.clone()
    # AdamW's first step has the length of its rate, whatever the gradient.
    train(net, blobs, lr=1e-5, prompt_lr=0.5, epochs=1, warmup_epochs=0)
    assert net.prompts.abs().max() > 0.1
    assert (net.head.weight - head).abs().max() < 1e-3


def test_prompts_have_a_rate_of_their_length_by_default(vit, make_loader):
    start = torch.full((3, 2, 32), 0.5)
    tuned = PromptedViT(vit, start, num_classes=4)
    options = {"epochs": 2, "lr": 1e-3, "weight_decay": 0.0, "warmup_epochs": 1, "progress": False}
    history = fit(tuned, make_loader(8, 4), **options)
    # The rates that the first epoch ends with, in the second of its two steps of warm-up.
    assert history.lr[0] == pytest.approx(1e-3 * 2 / 3)
    assert history.prompt_lr[0] == pytest.approx(PROMPT_LR_FACTOR * 0.5 * 1e-3 * 2 / 3)
    assert history.lr[1] == pytest.approx(FINAL_LR) == history.prompt_lr[1]
    moved = (tuned.prompts.detach() - start).abs().max()
    assert 0.02 < moved < 0.2

    again = PromptedViT(tuned.release(), start, num_classes=4)
    given = fit(again, make_loader(8, 4), prompt_lr=PROMPT_LR_FACTOR * 0.5 * 1e-3, **options)
    assert given.prompt_lr == pytest.approx(history.prompt_lr)


def test_history_has_both_rates_in_columns_of_their_own(vit, make_loader, blobs):
    options = {"epochs": 1, "lr": 1e-3, "warmup_epochs": 0, "progress": False}
    tuned = PromptedViT(vit, 2, num_classes=4)
    history = fit(tuned, make_loader(4, 2), prompt_lr=0.25, **{**options, "epochs": 2})
    header, first, _ = history.to_csv().decode().splitlines()
    assert header == "epoch,loss,val_accuracy,ema_accuracy,lr,prompt_lr,seconds,kept"
    assert [float(cell) for cell in first.split(",")[4:6]] == [history.lr[0], history.prompt_lr[0]]
    without = train(make_net(), blobs, epochs=1, warmup_epochs=0)
    assert without.prompt_lr == [None]
    assert without.to_csv().decode().splitlines()[1].split(",")[5] == ""
    features = PromptedViT(tuned.release(), 2, num_classes=4)
    features.head.requires_grad_(False)
    alone = fit(features, make_loader(4, 2), prompt_lr=0.25, **options)
    assert alone.lr == alone.prompt_lr


def test_last_step_runs_at_the_final_rate(blobs):
    history = train(make_net(), blobs)
    assert history.lr[-1] == pytest.approx(FINAL_LR)
    assert max(history.lr) <= 3e-2


def test_weight_decay_spares_biases(blobs):
    net = make_net()
    # Constant logits leave the gradient at zero for the first layer, so that only decay can move it.
    nn.init.zeros_(net[2].weight)
    net[2].requires_grad_(False)
    weight, bias = net[0].weight.clone(), net[0].bias.clone()
    train(net, blobs, weight_decay=0.5, epochs=2)
    assert (net[0].weight.abs() < weight.abs()).all()
    assert torch.equal(net[0].bias, bias)


@pytest.mark.parametrize("name", ["paper-mae-cub", "paper-supervised-dogs"])
def test_the_head_has_a_decay_of_its_own(blobs, name):
    """Against the three groups of the released code, written out; both of its published recipes."""
    published = {"paper-mae-cub": (5e-2, 1e-2, 0.5), "paper-supervised-dogs": (1e-3, 1e-2, 3.0)}
    lr, decay, head_decay = published[name]
    batches = [(images, labels) for images, labels in zip(*(each.split(8) for each in blobs), strict=True)]
    torch.manual_seed(0)
    net = Prompted()
    nn.init.normal_(net.prompts)
    expected = copy.deepcopy(net)
    fit(net, batches, recipe=Recipe.named(name, epochs=3, warmup_epochs=1), progress=False)

    optimizer = torch.optim.AdamW(
        [
            {"params": [expected.head.bias], "weight_decay": 0.0},
            {"params": [expected.prompts], "weight_decay": decay},
            {"params": [expected.head.weight], "weight_decay": head_decay},
        ],
        lr=lr,
    )
    schedule = warmup_cosine(optimizer, len(batches), 3 * len(batches))
    for _ in range(3):
        for images, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(expected(images), labels).backward()
            optimizer.step()
            schedule.step()
    for found, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_decay_of_the_head_wants_a_head(blobs):
    with pytest.raises(ValueError, match="head_weight_decay needs a part `head`, which Sequential has not"):
        train(make_net(), blobs, head_weight_decay=0.5)


def given_accuracy(monkeypatch: pytest.MonkeyPatch, accuracy: list[float]) -> None:
    """Let validation find these accuracies, in steps of a tenth, one after the other."""
    counts = [{(0, 0): round(10 * share), (0, 1): round(10 - 10 * share)} for share in accuracy]
    found = iter([Evaluation(("a", "b"), each) for each in counts])
    monkeypatch.setattr("spt_fast.training.loop.evaluate_classes", lambda *_, **__: next(found))


def test_the_best_epoch_by_validation_is_kept(blobs, monkeypatch):
    """Every epoch's weights written down, and accuracies that rise and fall; the first best is left."""
    accuracy = [0.2, 0.6, 0.4, 0.6, 0.5]
    given_accuracy(monkeypatch, accuracy)
    weights, kept = [], []

    def note(epoch, history):
        weights.append([each.detach().clone() for each in net.parameters()])
        kept.append(history.kept_epoch)

    net = make_net()
    loader = shuffled_loader(*blobs, batch_size=8, seed=0)
    history = train(net, blobs, val_loader=loader, keep="best", epochs=5, on_epoch=note)
    assert history.val_accuracy == accuracy
    assert kept == [1, 2, 2, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(net.parameters(), weights[4], strict=True))
    rows = history.to_csv().decode().splitlines()
    assert [row.rpartition(",")[2] for row in rows] == ["kept", "0", "1", "0", "0", "0"]
    assert "kept epoch 2, best by validation: 60.00%" in history.summary()


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (2, 6), (3, 7), (5, 9), (6, 9)])
def test_patience_ends_training_without_a_better_epoch(blobs, monkeypatch, patience, epochs):
    given_accuracy(monkeypatch, [0.2, 0.6, 0.4, 0.7, 0.7, 0.5, 0.6, 0.1, 0.1])
    loader = shuffled_loader(*blobs, batch_size=8, seed=0)
    history = train(make_net(), blobs, val_loader=loader, epochs=9, patience=patience)
    assert history.epochs == epochs
    with pytest.raises(ValueError, match="patience=2 is chosen by validation images, but there is no val"):
        train(make_net(), blobs, patience=2)


def test_patience_counts_validations_and_not_epochs(blobs, monkeypatch):
    given_accuracy(monkeypatch, [0.2, 0.6, 0.4, 0.5, 0.3])
    loader = shuffled_loader(*blobs, batch_size=8, seed=0)
    history = train(make_net(), blobs, val_loader=loader, epochs=15, patience=2, val_every=3)
    assert history.val_epochs == [3, 6, 9, 12]
    assert history.epochs == 12


def test_the_best_epoch_wants_validation_images(blobs):
    with pytest.raises(ValueError, match="keep='best' is chosen by validation images"):
        train(make_net(), blobs, keep="best")


def test_val_every_evaluates_every_nth_epoch_and_the_last(blobs):
    loader = shuffled_loader(*blobs, batch_size=50, seed=0)
    history = train(make_net(), blobs, val_loader=loader, epochs=5, val_every=2)
    assert history.val_epochs == [2, 4, 5]
    assert len(history.val_accuracy) == 3


def test_on_epoch_sees_every_epoch_and_may_stop(blobs):
    seen = []

    def stop_after_two(epoch, history):
        seen.append((epoch, history.epochs))
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_net(), blobs, on_epoch=stop_after_two)
    assert seen == [(1, 1), (2, 2)]


def test_evaluate_counts_right_answers_and_keeps_the_mode(blobs):
    images, labels = blobs
    net = make_net()
    net.train()
    loader = shuffled_loader(images, labels, batch_size=6, seed=0)
    measured = evaluate(net, loader)
    assert net.training
    with torch.no_grad():
        expected = (net.eval()(images).argmax(1) == labels).double().mean().item()
    assert measured == pytest.approx(expected)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"prompt_lr": -1.0}, "prompt_lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"warmup_epochs": 6}, "warmup_epochs"),
        ({"warmup_epochs": -1}, "warmup_epochs"),
        ({"val_every": 0}, "val_every"),
        ({"warmup_epochs": None, "epochs": 0}, "epochs"),
    ],
)
def test_bad_numbers_are_named(blobs, options, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        train(make_net(), blobs, **options)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epochs": 2.5}, "epochs must be an integer >= 1, got 2.5"),
        ({"val_every": 1.0}, "val_every must be an integer >= 1, got 1.0"),
        ({"lr": "0.1"}, "lr must be a finite number > 0, got '0.1'"),
        ({"warmup_epochs": True}, "warmup_epochs must be a finite number >= 0, got True"),
        ({"seed": 1.5}, "seed must be an integer >= 0, got 1.5"),
    ],
    ids=str,
)
def test_arguments_of_another_type_are_named(options, expected):
    """Before the first batch is asked for."""
    with pytest.raises(TypeError, match=f"^{re.escape(expected)}$"):
        fit(make_net(), [()], **{"epochs": 2, "warmup_epochs": 0, "progress": False, **options})


def test_a_shuffled_loader_wants_a_batch_size(blobs):
    with pytest.raises(ValueError, match=r"^batch_size must be an integer >= 1, got 0$"):
        shuffled_loader(*blobs, batch_size=0, seed=0)


def test_empty_loaders_are_refused(blobs):
    with pytest.raises(ValueError, match="train_loader must give at least one batch, got none"):
        fit(make_net(), [], epochs=2, warmup_epochs=0, progress=False)
    with pytest.raises(ValueError, match=r"^loader must give at least one image with a label, got no images"):
        evaluate(make_net(), [])


class Unsized(IterableDataset):
    """Rows of two tensors, one after the other."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        yield from zip(*self.tensors, strict=True)


def test_fit_needs_a_length_and_evaluate_does_not(blobs):
    net = make_net()
    for unsized in (iter([blobs]), DataLoader(Unsized(*blobs), batch_size=8)):
        with pytest.raises(TypeError, match=r"^train_loader must have a length, as .*: the learning rate"):
            fit(net, unsized, epochs=2, warmup_epochs=0, progress=False)
        assert evaluate(net, unsized) == evaluate(net, [blobs])


def test_val_loader_that_can_be_read_once_is_refused(blobs):
    with pytest.raises(TypeError, match=r"^val_loader must start anew .*, got list_iterator$"):
        train(make_net(), blobs, val_loader=iter([blobs]))


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: [x, y],
        lambda x, y: (x, y, torch.arange(len(x)), ["name"] * len(x)),
        lambda x, y: {"pixel_values": x, "labels": y},
        lambda x, y: {"label": y, "image": x, "index": torch.arange(len(x))},
        lambda x, y: (x, y.int()),
        lambda x, y: (x, y.to(torch.uint8)),
        lambda x, y: (x.double(), y),
        lambda x, y: (x.half(), y),
        lambda x, y: (x.bfloat16(), y.short()),
    ],
    ids=["list", "with-more", "labels", "label", "int32", "uint8", "float64", "float16", "bfloat16-int16"],
)
def test_every_kind_of_batch_trains_and_is_measured(blobs: tuple[Tensor, Tensor], change: Callable) -> None:
    images, labels = blobs
    images = images.bfloat16().float()  # numbers that every dtype here holds exactly
    options = {"epochs": 2, "warmup_epochs": 0, "progress": False}
    nets = make_net(), make_net()
    for net, batch in zip(nets, (change(images, labels), (images, labels)), strict=True):
        fit(net, [batch], **options)
    given, plain = nets
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), plain.parameters(), strict=True))
    assert evaluate(given, [change(images, labels)]) == evaluate(plain, [(images, labels)])


def test_images_take_the_dtype_of_the_model(blobs):
    net = make_net().double()
    assert evaluate(net, [blobs]) == evaluate(net, [(blobs[0].double(), blobs[1])])
    train(net, blobs, epochs=1, warmup_epochs=0)


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        (
            lambda x, y: (x, y[:, None]),
            ValueError,
            "must hold labels [41], one for each image, got shape [41, 1]",
        ),
        (lambda x, y: (x, y[:1]), ValueError, "must hold labels [41], one for each image, got shape [1]"),
        (lambda x, y: (x, y[0]), ValueError, "must hold labels [41], one for each image, got shape []"),
        (
            lambda x, y: (x, y + 1),
            ValueError,
            "must hold labels from 0 to 2, the classes of the model, or -100",
        ),
        (
            lambda x, y: (x, y - 1),
            ValueError,
            "must hold labels from 0 to 2, the classes of the model, or -100",
        ),
        (lambda x, y: (x, y.float()), TypeError, "must hold labels of an integer dtype, got torch.float32"),
        (lambda x, y: (x, y > 0), TypeError, "must hold labels of an integer dtype, got torch.bool"),
        (lambda x, y: (x.byte(), y), TypeError, "floating-point dtype, got torch.uint8; scale to floats"),
        (
            lambda x, y: (x[:0], y[:0]),
            ValueError,
            "must hold images [B, ...], at least one, got shape [0, 5]",
        ),
        (
            lambda x, y: x,
            TypeError,
            "must be a tuple or list that begins with images [B, ...] and labels [B]",
        ),
        (lambda x, y: (x,), TypeError, "got a tuple of ['Tensor']"),
        (lambda x, y: {"image": x, "target": y}, TypeError, "got a dict with the keys ['image', 'target']"),
        (lambda x, y: (x, y.tolist()), TypeError, "got a tuple of ['Tensor', 'list']"),
    ],
)
def test_a_batch_that_holds_something_else_is_named(blobs, change, error, expected):
    batches, net = [blobs, change(*blobs)], make_net()
    with pytest.raises(error, match=f"^batch 1 of loader .*{re.escape(expected)}"):
        evaluate(net, batches)
    with pytest.raises(error, match=f"^batch 1 of train_loader .*{re.escape(expected)}"):
        fit(net, batches, epochs=1, warmup_epochs=0, progress=False)


def test_ignored_labels_count_nowhere(blobs):
    images, labels = blobs
    some = torch.where(labels == 1, -100, labels)
    net, same = make_net(), make_net()
    kept = labels != 1
    assert evaluate(net, [(images, some)]) == evaluate(net, [(images[kept], labels[kept])])
    net[1].p = same[1].p = 0.0  # dropout draws for every image
    losses = [
        fit(model, [batch], epochs=1, warmup_epochs=0, progress=False).loss[0]
        for model, batch in ((net, (images, some)), (same, (images[kept], labels[kept])))
    ]
    assert losses[0] == pytest.approx(losses[1])
    none = (images, torch.full_like(labels, -100))
    with pytest.raises(ValueError, match="batch 0 of train_loader must hold a label other than -100"):
        fit(net, [none], epochs=1, warmup_epochs=0, progress=False)
    with pytest.raises(ValueError, match="at least one image with a label, got no labels other than -100"):
        evaluate(net, [none])


def test_nan_logits_are_no_answers(blobs):
    images, labels = blobs
    broken = images.clone()
    broken[3] = math.nan
    with pytest.raises(NonFiniteError, match=r"but image 44 \(counted from 0\) gave NaN") as caught:
        evaluate(make_net(), [blobs, (broken, labels)])
    assert caught.value.image == 44


def test_a_model_without_logits_is_refused(blobs):
    with pytest.raises(ValueError, match=r"^tuned must give logits \[41, classes\], got \[41, 5, 1\]$"):
        evaluate(nn.Unflatten(1, (5, 1)), [blobs])


def test_a_model_that_gives_features_is_refused(vit, loader):
    tuned = PromptedViT(vit, 2, num_classes=0)
    for call in (lambda: fit(tuned, loader, epochs=1), lambda: evaluate(tuned, loader)):
        with pytest.raises(ValueError, match=r"this PromptedViT has no head \(num_classes=0\)"):
            call()


def test_nothing_trainable_is_refused(blobs):
    with pytest.raises(ValueError, match="must have a parameter that requires a gradient, got none"):
        train(make_net().requires_grad_(False), blobs)


def test_infinite_loss_is_reported_with_epoch_and_step(blobs):
    images, labels = blobs
    images = images.clone()
    images[5] = math.inf
    with pytest.raises(FloatingPointError, match="epoch 1, step"):
        train(make_net(), (images, labels))


@pytest.mark.parametrize("step", [1, 4, 6])
def test_a_loss_that_is_nan_stops_training_and_names_its_step(step: int) -> None:
    """Also the last one of an epoch, after which nothing more would show it."""
    batches = [(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])) for _ in range(6)]
    batches[step - 1][0][2, 3] = math.nan
    seen: list[int] = []

    def watched() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(batches, start=1):
            seen.append(number)
            yield batch

    class Watched(list[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return watched()

    with pytest.raises(FloatingPointError, match=rf"loss is nan at epoch 1, step {step}, learning rate"):
        fit(make_net(), Watched(batches), epochs=2, progress=False)
    assert len(seen) <= step + 1


class TestWaiting:
    """No step waits for a device; the same is refused here without one."""

    def test_no_step_of_training_or_evaluation_waits(
        self,
        make_vit: Callable[..., nn.Module],
        make_loader: Callable[..., list[tuple[Tensor, Tensor]]],
        like_on_a_device: Callable[[], AbstractContextManager[None]],
    ) -> None:
        loader = make_loader(12, 4)
        runs = []
        for context in (nullcontext, like_on_a_device):
            tuned = PromptedViT(make_vit(), torch.ones(3, 3, 32), num_classes=4)
            with context():
                history = fit(tuned, loader, loader, epochs=2, progress=False)
            runs.append((history.loss, history.val_accuracy))
        assert runs[0] == runs[1]

    @pytest.mark.gpu
    def test_no_step_of_training_waits_for_a_gpu(
        self, make_vit: Callable[..., nn.Module], waiting_refused: Callable[[], AbstractContextManager[None]]
    ) -> None:
        images, labels = torch.randn(4, 3, 32, 32).pin_memory(), torch.arange(4).pin_memory()
        tuned = PromptedViT(make_vit(), torch.ones(3, 3, 32), num_classes=4).cuda()
        steps = 0

        with ExitStack() as stack:

            def begin(*_: object) -> None:
                """Refuses to wait from the second step, as the first loads kernels, to the last."""
                nonlocal steps
                steps += 1
                if steps == 2:
                    stack.enter_context(waiting_refused())
                if steps == 6:
                    stack.close()

            tuned.register_forward_pre_hook(begin)
            fit(tuned, [(images, labels)] * 6, epochs=1, progress=False)
        assert steps == 6


@pytest.mark.parametrize("engine", ["kv", "concat"])
def test_a_backbone_in_bfloat16_takes_the_same_images_everywhere(
    engine: str, make_vit: Callable[..., nn.Module], make_loader: Callable[..., list[tuple[Tensor, Tensor]]]
) -> None:
    model, loader = make_vit().bfloat16(), make_loader(16)
    prototypes = build_prototypes(model, loader, num_prompts=3, progress=False)
    tuned = PromptedViT(model, prototypes, num_classes=4, engine=engine)
    with NMITracker(tuned) as tracker:
        history = fit(tuned, loader, loader, epochs=1, progress=False)
    assert math.isfinite(history.loss[0])
    assert history.val_accuracy == [evaluate(tuned, loader)]
    measured = [tracker.history().values[0], analyse(tuned, loader, progress=False).nmi.mean(0)]
    measured.append(tuned.layer_nmi(loader[0][0]).mean(1))
    assert all(bool(values.isfinite().all()) and len(values) == 3 for values in measured)


def test_parameters_in_float16_are_refused(
    make_vit: Callable[..., nn.Module], make_loader: Callable[..., list[tuple[Tensor, Tensor]]]
) -> None:
    """AdamW's epsilon is zero in float16."""
    tuned = PromptedViT(make_vit().half(), 3, num_classes=4)
    with pytest.raises(ValueError, match=r"model\.head\.weight is float16, in which AdamW"):
        fit(tuned, make_loader(8), epochs=1, progress=False)
    assert 0 <= evaluate(tuned, make_loader(8)) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "paper"}, "recipe must be a Recipe, as .* got 'paper'"),
        ({"recipe": {"epochs": 1}}, "recipe must be a Recipe, as .* got {'epochs': 1}"),
        ({"progress": "no"}, "progress must be True or False, got 'no'"),
        ({"on_epoch": 3}, "on_epoch must be callable or None, got 3"),
    ],
)
def test_recipes_and_callbacks_of_another_type_are_named(blobs, options, message):
    loader = shuffled_loader(*blobs, batch_size=8, seed=0)
    with pytest.raises(TypeError, match=message):
        fit(make_net(), loader, **{"progress": False, **options})


def test_errors_in_validation_images_name_their_loader(blobs):
    images, labels = blobs
    loader = shuffled_loader(*blobs, batch_size=8, seed=0)
    with pytest.raises(ValueError, match="batch 0 of val_loader must hold labels from 0"):
        fit(make_net(), loader, [(images, labels + 100)], epochs=1, progress=False)
    with pytest.raises(ValueError, match="val_loader must give at least one image"):
        fit(make_net(), loader, [], epochs=1, progress=False)


def test_weights_that_the_last_step_of_an_epoch_broke_are_a_loss_that_is_nan(blobs):
    loader = [blobs]
    with pytest.raises(FloatingPointError, match="gave NaN, in the validation after epoch 1; lower lr"):
        fit(
            make_net(),
            loader,
            loader,
            epochs=2,
            optimizer="sgd",
            lr=1e38,
            schedule="constant",
            warmup_epochs=0,
            progress=False,
        )


def test_a_first_loss_that_is_nan_is_not_put_down_to_the_rate(blobs):
    images, labels = blobs
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 1, .*; nothing was learned before: look at"):
        fit(make_net(), [(images * float("nan"), labels)], epochs=1, progress=False)


def test_a_batch_of_one_image_is_named_where_a_batch_norm_needs_two(blobs):
    images, labels = blobs
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(images[0].numel()), nn.Linear(images[0].numel(), 3))
    loader = [(images[:8], labels[:8]), (images[:1], labels[:1])]
    with pytest.raises(
        ValueError, match=r"batch 1 of train_loader must hold two images .* got 1; .*--drop-last"
    ):
        fit(net, loader, epochs=1, progress=False)


def test_a_last_batch_of_one_image_is_found_before_training(blobs, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("a step was made"))
    net = nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3))
    net[0].eval()
    message = (
        r"^train_loader must hold two .*, but of 41 images in batches of 8 the last has 1; .*--drop-last"
    )
    dataset = TensorDataset(*blobs)
    for loader in (shuffled_loader(*blobs, batch_size=8, seed=0), DataLoader(dataset, 8, shuffle=True)):
        with pytest.raises(ValueError, match=message):
            Trainer(net, loader)
        assert not net[0].training
        Trainer(make_net(), loader)
    for loader in (
        ImageLoader(dataset, num_images=41, batch_size=8, shuffle=True, drop_last=True),
        ImageLoader(dataset, num_images=41, batch_size=8, shuffle=True, bad_images="skip"),
        DataLoader(dataset, 8, drop_last=True),
        DataLoader(dataset, 8, collate_fn=list),
        DataLoader(dataset, 7),
    ):
        Trainer(net, loader)
    # Two processes share the last two of 42.
    processes = Processes()
    processes.size = 2
    share = {"processes": processes, "in_step": True, "shuffle": True}
    shared = ImageLoader(
        TensorDataset(*(torch.cat([each, each[:1]]) for each in blobs)), num_images=42, batch_size=8, **share
    )
    with pytest.raises(ValueError, match="the last has 2, shared by 2 processes"):
        check_two_images(shared)


@pytest.mark.parametrize(("kind", "peak"), [("ours", 0.5), ("torch", 0.5), ("list", 0.125)])
def test_rates_grow_with_the_batches_of_the_loader(kind, peak):
    """The recipe's batch size, of 32, is asked where nothing else is known."""
    images, labels = torch.randn(256, 5), torch.arange(256) % 3
    if kind == "list":
        loader = [(images[:128], labels[:128])]
    elif kind == "torch":
        loader = DataLoader(TensorDataset(images, labels), batch_size=128, shuffle=True)
    else:
        loader = shuffled_loader(images, labels, batch_size=128, seed=0)
    recipe = Recipe(lr_scale="batch", lr=1.0, epochs=1, warmup_epochs=0, schedule="constant")
    assert fit(make_net(), loader, recipe=recipe, progress=False).lr == [peak]
    assert fit(make_net(), loader, recipe=recipe, progress=False, accumulate=2).lr == [2 * peak]
