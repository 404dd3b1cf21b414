"""Trainer: what a recipe asks of a step, against textbook loops; a run that is stopped and gone on with."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from spt_fast import PromptedViT, Recipe, tune
from spt_fast.data.images import open_labelled_images
from spt_fast.training import Trainer, fit, step
from spt_fast.training.evaluation import evaluate
from spt_fast.training.features import Features
from spt_fast.training.loop import shuffled_loader
from spt_fast.training.step import channels_last


@pytest.fixture
def images() -> tuple[Tensor, Tensor]:
    """22 images of 4 classes, no multiple of a batch of 4."""
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(22) % 4
    pixels = torch.randn(22, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1) / 2
    return pixels, labels


@pytest.fixture
def tuned(make_vit) -> PromptedViT:
    return PromptedViT(make_vit(), torch.full((3, 2, 32), 0.3), num_classes=4)


def textbook(tuned: PromptedViT, batches: list[tuple[Tensor, Tensor]], epochs: int, size: int = 1) -> None:
    """AdamW at a constant rate, a step for every `size` batches, the mean loss over all their images."""
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-2, 1e-1))
    tuned.train()
    for _ in range(epochs):
        for start in range(0, len(batches), size):
            group = batches[start : start + size]
            logits = torch.cat([tuned(pixels) for pixels, _ in group])
            loss = F.cross_entropy(logits, torch.cat([labels for _, labels in group]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def batches_of(images: tuple[Tensor, Tensor], size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(tensor.split(size) for tensor in images), strict=True))


def assert_learned_close(tuned: PromptedViT, expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(tuned.learned_state_dict(), expected, rtol=1e-4, atol=1e-5)


CONSTANT = {"lr": 1e-2, "prompt_lr": 1e-1, "schedule": "constant", "warmup_epochs": 0, "progress": False}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_of_one_step_are_one_batch(tuned, images, size):
    """The last step has fewer batches, and the last batch fewer images; all images weigh the same."""
    expected = copy.deepcopy(tuned)
    batches = batches_of(images, 4)
    textbook(expected, batches, epochs=2, size=size)
    fit(tuned, batches, epochs=2, accumulate=size, **CONSTANT)
    torch.testing.assert_close(
        tuned.learned_state_dict(), expected.learned_state_dict(), rtol=1e-4, atol=1e-5
    )


def test_bf16_is_autocast(tuned, images):
    expected = copy.deepcopy(tuned)
    batches = batches_of(images, 8)
    optimizer = torch.optim.AdamW(expected.parameter_groups(1e-2, 1e-1))
    expected.train()
    for pixels, labels in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(expected(pixels).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plain = copy.deepcopy(tuned)
    fit(tuned, batches, epochs=1, amp="bf16", **CONSTANT)
    fit(plain, batches, epochs=1, **CONSTANT)
    found, other = tuned.learned_state_dict(), plain.learned_state_dict()
    torch.testing.assert_close(found, expected.learned_state_dict(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found["prompts"], other["prompts"], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="amp='fp16' needs a CUDA device, got cpu"):
        fit(tuned, batches, epochs=1, amp="fp16", **CONSTANT)


@pytest.mark.parametrize("narrow", [{"weight_dtype": "bf16"}, {"amp": "bf16"}], ids=str)
def test_a_cpu_without_bfloat16_products_is_warned_of(make_vit, images, monkeypatch, narrow):
    amp = {"amp": narrow.get("amp", "auto")}
    tuned = tune(make_vit(), "linear", num_classes=4, weight_dtype=narrow.get("weight_dtype"))
    batches = batches_of(images, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(step, "_has_bfloat16_products", lambda: True)
        fit(tuned, batches, epochs=1, **amp, **CONSTANT)
        monkeypatch.setattr(step, "_has_bfloat16_products", lambda: False)
        fit(tune(make_vit(), "linear", num_classes=4), batches, epochs=1, amp="off", **CONSTANT)
    with pytest.warns(UserWarning, match="bfloat16 is several times slower than float32 on this CPU"):
        fit(tuned, batches, epochs=1, **amp, **CONSTANT)


def test_gradients_are_clipped(tuned, images):
    expected = copy.deepcopy(tuned)
    batches = batches_of(images, 8)
    optimizer = torch.optim.SGD(expected.trainable_parameters(), lr=0.5)
    expected.train()
    for pixels, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(expected(pixels), labels).backward()
        norm = torch.cat([each.grad.flatten() for each in expected.trainable_parameters()]).norm()
        assert norm > 0.1
        for each in expected.trainable_parameters():
            each.grad.mul_(0.1 / norm)
        optimizer.step()
    options = {**CONSTANT, "lr": 0.5, "prompt_lr": 0.5, "weight_decay": 0.0}
    fit(tuned, batches, epochs=1, optimizer="momentum", momentum=0.0, clip_grad=0.1, **options)
    torch.testing.assert_close(
        tuned.learned_state_dict(), expected.learned_state_dict(), rtol=1e-4, atol=1e-5
    )


def test_a_balanced_loss_weighs_classes_the_same(tuned, images):
    """Class 0 has 6 images, the others 6, 5 and 5; a step over all of them, written out."""
    pixels, labels = images
    expected = copy.deepcopy(tuned)
    losses = F.cross_entropy(expected.train()(pixels), labels, reduction="none")
    loss = torch.stack([losses[labels == each].mean() for each in range(4)]).mean()
    optimizer = torch.optim.SGD(expected.trainable_parameters(), lr=0.5)
    loss.backward()
    optimizer.step()
    options = {**CONSTANT, "lr": 0.5, "prompt_lr": 0.5, "weight_decay": 0.0}
    options |= {"optimizer": "momentum", "momentum": 0.0, "epochs": 1, "balance": "loss"}
    history = fit(tuned, shuffled_loader(*images, batch_size=22, seed=0), **options)
    assert history.loss[0] == pytest.approx(loss.item(), rel=1e-5)
    assert_learned_close(tuned, expected.learned_state_dict())
    with pytest.raises(ValueError, match=r"balance=.loss. needs .* knows its labels.* got list"):
        fit(tuned, batches_of(images, 8), **options)
    with pytest.raises(ValueError, match=r"balance='sampler' needs a loader that draws .* got ImageLoader"):
        fit(tuned, shuffled_loader(*images, batch_size=8, seed=0), **{**options, "balance": "sampler"})


def test_the_moving_average_is_evaluated_beside_the_weights(tuned, images):
    """The average of the weights after each step, written out; the run itself is as without it."""
    batches = batches_of(images, 8)
    plain = copy.deepcopy(tuned)
    expected = {name: value.clone() for name, value in tuned.learned_state_dict().items()}
    trainer = Trainer(tuned, batches, batches, Recipe(epochs=3, ema=0.6, seed=1), progress=False)
    seen: list[dict[str, Tensor]] = []

    def note(*_: Any) -> None:
        seen.append({name: value.clone() for name, value in tuned.learned_state_dict().items()})

    history = trainer.run(on_epoch=note, on_step=note)
    assert len(seen) == 9
    for values in seen:
        expected = {name: 0.6 * expected[name] + 0.4 * value for name, value in values.items()}
    last = tuned.learned_state_dict()["prompts"].clone()
    with trainer.averaged():
        torch.testing.assert_close(tuned.learned_state_dict(), expected, rtol=1e-4, atol=1e-5)
        assert evaluate(tuned, batches) == history.ema_accuracy[-1]
    assert torch.equal(tuned.learned_state_dict()["prompts"], last)
    assert evaluate(tuned, batches) == history.val_accuracy[-1]
    alone = fit(plain, batches, batches, epochs=3, seed=1, progress=False)
    assert alone.loss == history.loss
    assert alone.ema_accuracy == []
    header, row = (line.split(",") for line in history.to_csv().decode().splitlines()[:2])
    assert float(row[header.index("ema_accuracy")]) == history.ema_accuracy[0]
    with pytest.raises(ValueError, match="the recipe has no ema"):
        Trainer(plain, batches, progress=False).averaged().__enter__()


@pytest.mark.parametrize(
    "options",
    [{"mixup": 0.5, "cutmix": 1.0}, {"drop_path": 0.5}, {"channels_last": True}, {"optimizer": "lamb"}],
    ids=str,
)
def test_other_choices_learn_too_and_leave_images_and_model_alone(make_vit, images, options):
    model = make_vit()
    state = copy.deepcopy(model.state_dict())
    tuned = PromptedViT(model, 2, num_classes=4)
    batches = batches_of(images, 6)
    before = [pixels.clone() for pixels, _ in batches]
    history = fit(tuned, batches, epochs=8, lr=1e-2, seed=3, progress=False, **options)
    assert history.loss[-1] < history.loss[0]
    assert all(torch.equal(pixels, kept) for (pixels, _), kept in zip(batches, before, strict=True))
    assert all(parameter.is_contiguous() for parameter in tuned.parameters())
    released = tuned.release().state_dict()
    assert all(torch.equal(value, state[name]) for name, value in released.items())


class TestFeatures:
    """A head alone sees features that were computed once."""

    def net(self, make_vit: Any, **options: Any) -> PromptedViT:
        torch.manual_seed(4)
        start = torch.randn(3, 2, 32)
        return PromptedViT(make_vit(**options), start, num_classes=4, freeze_prompts=True)

    def forwards(self, tuned: PromptedViT) -> list[int]:
        """Grows by the number of images of each forward pass of the backbone."""
        seen: list[int] = []
        tuned.model.patch_embed.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
        return seen

    def test_features_of_a_class_token_do_not_keep_the_others(self, make_vit, images, monkeypatch):
        sizes: list[tuple[int, int]] = []
        cat = torch.cat

        def noted(tensors: Any, *args: Any, **options: Any) -> Tensor:
            tensors = list(tensors)
            if tensors[0].ndim == 2 and tensors[0].shape[1] == 32:
                sizes.extend((each.untyped_storage().nbytes(), each.nbytes) for each in tensors)
            return cat(tensors, *args, **options)

        loader = shuffled_loader(*images, batch_size=4, seed=7)
        tuned = self.net(make_vit)
        monkeypatch.setattr(torch, "cat", noted)
        assert Features.of(tuned, loader) is not None
        assert len(sizes) == len(loader)
        assert all(held == needed for held, needed in sizes)

    @pytest.mark.parametrize("options", [{}, {"weight_dtype": "bf16"}, {"amp": "bf16"}], ids=str)
    def test_the_curve_is_that_of_the_plain_loop(self, make_vit, images, options):
        amp = {"amp": options.get("amp", "auto")}
        build = {name: value for name, value in options.items() if name != "amp"}
        torch.manual_seed(4)
        start = torch.randn(3, 2, 32)
        curves = []
        for kind in ("features", "plain"):
            torch.manual_seed(5)
            tuned = PromptedViT(make_vit(), start, num_classes=4, freeze_prompts=True, **build)
            seen = self.forwards(tuned)
            train = shuffled_loader(*images, batch_size=4, seed=7)
            val = shuffled_loader(*images, batch_size=5, seed=8)
            if kind == "plain":
                train.is_random = val.is_random = True
            recipe = Recipe(epochs=6, ema=0.9, seed=1, **amp)
            trainer = Trainer(tuned, train, val, recipe, progress=False)
            history = trainer.run()
            curves.append((history, tuned.learned_state_dict(), sum(seen)))
        (fast, learned, once), (slow, expected, often) = curves
        assert once == 2 * 22
        assert often == 6 * 22 * 3
        exact = not options
        assert fast.loss == pytest.approx(slow.loss, rel=1e-5 if exact else 2e-2)
        assert fast.val_accuracy == pytest.approx(slow.val_accuracy, abs=0 if exact else 0.1)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if exact else {"rtol": 0.1, "atol": 5e-2}
        torch.testing.assert_close(learned, expected, **tolerance)

    def test_it_is_only_for_what_does_not_change(self, make_vit, images):
        from spt_fast.training.features import trains_head_only

        assert trains_head_only(self.net(make_vit))
        learning = PromptedViT(make_vit(), 2, num_classes=4)
        assert not trains_head_only(learning)
        assert not trains_head_only(self.net(make_vit, drop_rate=0.1)), "dropout before the head is random"
        unfrozen = self.net(make_vit)
        unfrozen.model.norm.weight.requires_grad_(True)
        assert not trains_head_only(unfrozen)
        for options in ({"mixup": 0.5}, {"cutmix": 0.5}, {"drop_path": 0.1}):
            tuned = self.net(make_vit)
            seen = self.forwards(tuned)
            fit(tuned, shuffled_loader(*images, batch_size=8, seed=0), epochs=2, progress=False, **options)
            assert sum(seen) >= 2 * 22

    def test_a_head_that_is_not_all_that_follows_is_no_such(self, make_vit, images):
        """Logits that are divided by a temperature after the head."""

        class Warm(nn.Module):
            def __init__(self, model: nn.Module) -> None:
                super().__init__()
                self.model, self.head, self.num_features = model, nn.Linear(32, 4), 32
                model.requires_grad_(False)

            def forward(self, pixels: Tensor) -> Tensor:
                return self.head(self.model(pixels)) / 2

        net = Warm(make_vit(num_classes=0))
        expected = copy.deepcopy(net)
        history = fit(net, shuffled_loader(*images, batch_size=8, seed=0), epochs=2, progress=False)
        loader = shuffled_loader(*images, batch_size=8, seed=0)
        loader.is_random = True
        assert history.loss == fit(expected, loader, epochs=2, progress=False).loss


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def assert_same(found: Any, expected: Any) -> None:
    """`assert_equal`, for whatever a state holds."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for each, other in zip(found, expected, strict=True):
            assert_same(each, other)
    else:
        assert torch.equal(found, expected) if isinstance(expected, Tensor) else found == expected


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


RECIPE = Recipe(epochs=4, keep="best", ema=0.9, lr=3e-2, prompt_dropout=0.2, seed=5, accumulate=2)


class TestResume:
    """A run that is stopped after any step, and gone on with by another process."""

    def loaders(self, images: tuple[Tensor, Tensor], kind: str) -> tuple[Any, Any]:
        val = DataLoader(TensorDataset(*images), batch_size=7)
        if kind == "ours":
            return shuffled_loader(*images, batch_size=4, seed=3), val
        if kind == "batch sampler":
            order = RandomSampler(images[1], generator=torch.Generator().manual_seed(3))
            return DataLoader(TensorDataset(*images), batch_sampler=BatchSampler(order, 4, False)), val
        generator = torch.Generator().manual_seed(3) if kind == "generator" else None
        return DataLoader(TensorDataset(*images), batch_size=4, shuffle=True, generator=generator), val

    def trainer(self, make_vit: Any, images: tuple[Tensor, Tensor], kind: str, **options: Any) -> Trainer:
        torch.manual_seed(9)
        tuned = PromptedViT(
            make_vit(), torch.full((3, 2, 32), 0.3), num_classes=4, prompt_dropout=0.2, **options
        )
        return Trainer(tuned, *self.loaders(images, kind), RECIPE, progress=False)

    @pytest.mark.parametrize(
        ("kind", "stop"),
        [
            *(("ours", stop) for stop in (1, 3, 5, 8, 12)),
            ("generator", 2),
            ("generator", 6),
            ("global", 5),
            ("batch sampler", 8),
        ],
    )
    def test_it_ends_bitwise_as_an_unbroken_run(self, make_vit, images, kind, stop):
        whole = self.trainer(make_vit, images, kind)
        unbroken = whole.run()

        broken = self.trainer(make_vit, images, kind)
        states: list[dict[str, Any]] = []

        def note(*_: Any) -> None:
            states.append(through_a_file(broken.state_dict()))
            if len(states) == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            broken.run(on_epoch=note, on_step=note)
        torch.manual_seed(1234)  # another process has other random numbers
        again = self.trainer(make_vit, images, kind)
        with torch.no_grad():
            again.tuned.prompts.fill_(7.0)
        again.load_state_dict(states[-1])
        resumed = again.run()
        for name in ("loss", "val_accuracy", "ema_accuracy", "lr", "prompt_lr", "val_epochs"):
            assert getattr(resumed, name) == getattr(unbroken, name), name
        expected = whole.tuned.learned_state_dict()
        assert all(
            torch.equal(value, expected[name]) for name, value in again.tuned.learned_state_dict().items()
        )
        averages = whole.average.values()
        assert all(torch.equal(value, averages[name]) for name, value in again.average.values().items())
        assert again.evaluation == whole.evaluation

    def test_frozen_prompts_are_those_of_the_state(self, make_vit, images):
        def make(value: float) -> Trainer:
            start = torch.full((3, 2, 32), value)
            tuned = PromptedViT(make_vit(), start, num_classes=4, freeze_prompts=True)
            return Trainer(tuned, *self.loaders(images, "ours"), Recipe(epochs=2), progress=False)

        state = make(0.3).state_dict()
        assert [*state["frozen"]] == ["prompts"]
        again = make(0.7)
        again.load_state_dict(through_a_file(state))
        assert torch.equal(again.tuned.prompts, torch.full((3, 2, 32), 0.3))
        # As older versions wrote it.
        del state["frozen"]
        older = make(0.7)
        older.load_state_dict(state)
        assert torch.equal(older.tuned.prompts, torch.full((3, 2, 32), 0.7))

    def test_a_state_stays_as_it_was_taken(self, make_vit, images):
        """Whatever the run does that it was taken of, and those that go on from it, which may be several."""
        first = self.trainer(make_vit, images, "ours")
        taken: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def take(trainer: Any) -> None:
            if (trainer.epoch, trainer.step) == (2, 1):
                state = trainer.state_dict()
                taken.append((state, through_a_file(state)))

        history = first.run(on_step=take)
        ((state, then),) = taken
        for _ in range(2):
            again = self.trainer(make_vit, images, "ours")
            again.load_state_dict(state)
            assert again.history.epochs == 2
            assert again.run().loss == history.loss
        assert_same(state, then)

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_batches_without_a_readable_image_are_counted(self, make_vit, tmp_path, accumulate):
        for number in range(8):
            path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (30 * number, 99, 255 - 30 * number)).save(path)
        (tmp_path / "images" / "a" / "2.png").write_bytes(b"no image")
        model = make_vit()
        model.pretrained_cfg = {"input_size": (3, 32, 32)}

        def make() -> Trainer:
            options = {"training": True, "batch_size": 1, "workers": 0, "bad_images": "skip", "seed": 0}
            loader = open_labelled_images(str(tmp_path / "images"), model, **options).loader
            torch.manual_seed(0)
            tuned = tune(make_vit(), "linear", num_classes=2)
            recipe = Recipe(epochs=2, lr=0.05, accumulate=accumulate)
            return Trainer(tuned, loader, recipe=recipe, progress=False)

        whole = make()
        states: list[dict[str, Any]] = []
        unbroken = whole.run(on_step=lambda trainer: states.append(trainer.state_dict()))
        assert len(states) == 2 * (8 // accumulate - 1)
        assert unbroken.lr[-1] == pytest.approx(1e-8), "the lost image has its step, and the last rate comes"
        for state in states:
            again = make()
            again.load_state_dict(state)
            assert again.run().loss == unbroken.loss
            assert_equal(again.tuned.learned_state_dict(), whole.tuned.learned_state_dict())

    def test_a_finished_run_is_not_trained_again(self, make_vit, images):
        whole = self.trainer(make_vit, images, "ours")
        history = whole.run()
        again = self.trainer(make_vit, images, "ours")
        again.load_state_dict(through_a_file(whole.state_dict()))
        assert again.is_done
        assert again.run() == history
        assert_equal(again.tuned.learned_state_dict(), whole.tuned.learned_state_dict())

    def test_the_state_of_another_model_is_refused(self, make_vit, images):
        state = self.trainer(make_vit, images, "ours").state_dict()
        other = PromptedViT(make_vit(), torch.ones(3, 4, 32), num_classes=4, prompt_dropout=0.2)
        trainer = Trainer(other, *self.loaders(images, "ours"), RECIPE, progress=False)
        with pytest.raises(ValueError, match=r"prompts must be \[3, 4, 32\], got \[3, 2, 32\]"):
            trainer.load_state_dict(state)


@pytest.mark.parametrize(("own", "unit", "total"), [(True, "image", 44), (False, "batch", 12)])
def test_the_bar_counts_images_where_they_are_known(tuned, images, monkeypatch, capsys, own, unit, total):
    monkeypatch.setenv("TQDM_DISABLE", "")
    loader = shuffled_loader(*images, batch_size=4, seed=0) if own else batches_of(images, 4)
    options = {name: value for name, value in CONSTANT.items() if name != "progress"}
    fit(tuned, loader, epochs=2, accumulate=3, **options)
    last = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    assert f"{total}/{total}" in last
    assert f"{unit}/s" in last or f"s/{unit}" in last


def test_a_compiled_run_is_the_run(tuned, images, monkeypatch):
    """With the compiler's own capture and without its code for machines, which takes long."""
    compiled: list[nn.Module] = []
    plain_compile = torch.compile

    def compile_eagerly(module: nn.Module) -> Any:
        compiled.append(module)
        return plain_compile(module, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    expected = copy.deepcopy(tuned)
    batches = batches_of(images, 11)
    history = fit(tuned, batches, batches, epochs=2, ema=0.5, compile=True, progress=False)
    assert compiled == [tuned]
    wanted = fit(expected, batches, batches, epochs=2, ema=0.5, progress=False)
    assert history.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert_learned_close(tuned, expected.learned_state_dict())


def test_channels_last_is_for_weights_of_four_dimensions(make_vit):
    """E2VPT's keys and values have five."""
    tuned = tune(make_vit(), "e2vpt", prompts=2, num_classes=4)
    weight = tuned.model.patch_embed.proj.weight
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    with channels_last(tuned, True):
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.is_contiguous()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.state_dict().items())
