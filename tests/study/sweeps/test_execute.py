"""One run of a sweep against the library calls that it stands for, and what runs share."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import spt_fast
from spt_fast.data import names, shipped
from spt_fast.data.pool import Pool
from spt_fast.data.task import open_task
from spt_fast.prototypes import Prototypes
from spt_fast.study.sweeps import execute
from spt_fast.study.sweeps.execute import Workshop
from spt_fast.study.sweeps.plan import Plan
from spt_fast.support.errors import NonFiniteError

FEW = 30


@pytest.fixture
def model(make_vit, monkeypatch):
    """A tiny backbone, and few digits; whatever is opened is a copy of it."""

    def opened(*_, **__):
        return make_vit(num_classes=0).eval()

    splits = {split: shipped.load_digits(split) for split in ("train", "val", "test")}
    few = {split: tuple(tensor[:FEW].clone() for tensor in tensors) for split, tensors in splits.items()}
    monkeypatch.setattr(names, "load_digits", few.__getitem__)
    monkeypatch.setattr(execute, "open_model", opened)
    return opened()


def plan_of(arms, **given):
    recipe = {"epochs": 2, "batch_size": 10, "warmup_epochs": 1}
    return Plan.read({"model": "tiny", "data": "digits", "arms": arms, "recipe": recipe, **given})


def workshop(tmp_path):
    return Workshop({"model": "tiny"}, {}, tmp_path, torch.device("cpu"))


def final(plan):
    return [run for group in plan.groups for run in group.final(None)]


def test_a_run_is_what_the_library_does_by_hand(model, tmp_path):
    plan = plan_of({"spt-deep": {"num_prompts": 3, "search": {"lr": [0.1, 0.5]}}}, seeds=[4])
    (group,) = plan.groups
    shop = workshop(tmp_path / "sweep")
    (tmp_path / "sweep" / "runs").mkdir(parents=True)
    search, last = shop.run(group.search[1]), shop.run(group.final(group.search[1])[0])

    images = open_task(model, "digits", val_split="val", test_split="test", training={}, batch_size=10)
    pool = Pool(images, None, 10)
    for row, part, val, test in (
        (search, "train", pool.validation(), None),
        (last, "train+val", None, pool.test),
    ):
        rows = pool.rows(part)
        protos = spt_fast.build_prototypes(
            model, pool.plain(rows, seed=4), num_prompts=3, seed=4, progress=False
        )
        recipe = group.search[1].recipe
        tuned = spt_fast.training.build(model, recipe, protos, class_names=pool.class_names)
        (rate,) = [each["lr"] for each in tuned.parameter_groups(recipe.lr) if each["name"] == "prompts"]
        run = spt_fast.train(
            tuned,
            pool.training(rows, seed=4),
            val,
            recipe,
            out=tmp_path / part,
            test_data=test,
            progress=False,
        )
        tuned.release()
        assert row.loss == run.history.loss[-1]
        assert row.val_accuracy == (None if val is None else run.history.val_accuracy[-1])
        assert row.test_accuracy == (None if test is None else run.test.accuracy)
        assert row.train_images == len(rows)
        assert row.prompt_lr == pytest.approx(rate)
    assert (search.stage, search.strategy, search.source, search.num_prompts) == (
        "search",
        "kmeans",
        "own",
        3,
    )
    assert search.backbone_parameters == sum(each.numel() for each in model.parameters())
    assert (search.learned, search.trainable) == (3 * 3 * 32, 3 * 3 * 32 + 330)
    assert not list(tmp_path.glob("sweep/runs/*/*.png"))


def test_where_prompts_start_from(model, tmp_path):
    arms = {
        name: {"method": "spt-deep", "num_prompts": 2, "prototypes": start, "freeze_prompts": True}
        for name, start in {
            "own": {}, "first": {"source": "first"}, "last": {"source": "last"}, "mean": {"strategy": "mean"},
            "half": {"share": 0.5},
        }.items()
    }  # fmt: skip
    arms["shallow"] = {**arms["last"], "method": "spt-shallow"}
    shop = workshop(tmp_path)
    runs = final(plan_of(arms, images={"share": 0.5}))
    rows = {run.arm.name: shop.run(run) for run in runs}
    assert {name: (row.strategy, row.source) for name, row in rows.items()} == {
        "own": ("kmeans", "own"),
        "first": ("kmeans", "first"),
        "last": ("kmeans", "last"),
        "mean": ("mean", "own"),
        "half": ("kmeans", "own"),
        "shallow": ("kmeans", "last"),
    }
    assert all(
        row.frozen_prompts and row.options == "share=0.5" and row.prompt_lr is None for row in rows.values()
    )
    prompts = {
        run.arm.name: Prototypes.load(tmp_path / "prototypes" / run.prototypes_name).prompts for run in runs
    }
    assert torch.equal(prompts["first"], prompts["own"][:1].expand(3, -1, -1))
    assert torch.equal(prompts["last"][0], prompts["last"][2])
    assert not torch.equal(prompts["last"][0], prompts["own"][2])
    # Of half of the images that the run learns from.
    pool = shop._pool(runs[0].task, runs[0].recipe)
    learned = pool.rows("train+val", share=0.5)
    fewer = pool.drawn(learned, share=0.5)
    assert set(fewer) < set(learned)
    built = spt_fast.build_prototypes(model, pool.plain(fewer, seed=0), num_prompts=2, progress=False)
    assert torch.equal(prompts["half"], built.prompts)
    images = pool.plain(learned, seed=0)
    built = spt_fast.build_prototypes(
        model, images, num_prompts=2, depth="shallow", last_output=True, progress=False
    )
    assert torch.equal(prompts["shallow"], built.repeat_last_output().prompts)


def test_images_that_a_class_has_not_are_found_before_any_run(model, tmp_path):
    plan = plan_of(["linear"], compare={"per_class": [1, 100]})
    with pytest.raises(
        ValueError, match=r"digits-linear.*-perclass100-.*: per_class must be at most \d, the"
    ):
        workshop(tmp_path).check_subsets(final(plan))
    workshop(tmp_path).check_subsets(
        final(plan_of(["linear"], compare={"per_class": [1], "label_smoothing": [0.0, 0.1]}))
    )


def test_options_that_a_method_does_not_take_are_found_before_any_run(model, tmp_path):
    arms = {"linear": {}, "odd": {"method": "spt-deep", "num_prompts": 2, "method_options": {"engine": "x"}}}
    with pytest.raises(ValueError, match=r"^arms: odd: engine must be one of"):
        workshop(tmp_path).check_models(final(plan_of(arms)))
    assert not (tmp_path / "prototypes").exists()


def test_prototypes_of_other_lengths_come_from_the_same_pass_with_the_same_bits(model, tmp_path, monkeypatch):
    calls = []
    build = execute.build_prototypes
    monkeypatch.setattr(execute, "build_prototypes", lambda *a, **o: (calls.append(1), build(*a, **o))[1])
    runs = final(plan_of(["spt-deep"], compare={"num_prompts": [2, 5]}))
    together = workshop(tmp_path / "together")
    for number, run in enumerate(runs):
        together.run(run)
        assert len(calls) == 1
        alone = workshop(tmp_path / str(number))
        alone.run(run)
        calls.pop()
        files = [tmp_path / out / "prototypes" / run.prototypes_name for out in ("together", str(number))]
        first, second = map(Prototypes.load, files)
        assert torch.equal(first.prompts, second.prompts)


def test_prototypes_of_other_images_are_built_anew(model, tmp_path):
    """A task that finished no run may have left prototypes under the short name of another one."""
    (run,) = final(plan_of({"spt-deep": {"num_prompts": 2}}))
    path = tmp_path / "prototypes" / run.prototypes_name
    workshop(tmp_path).run(run)
    right = Prototypes.load(path)
    wrong = replace(right, prompts=right.prompts + 1, metadata={**right.metadata, "images_fingerprint": "0"})
    wrong.save(path, overwrite=True)
    (tmp_path / "runs" / run.name / "checkpoint.pt").unlink()
    workshop(tmp_path).run(run)
    assert torch.equal(Prototypes.load(path).prompts, right.prompts)


def test_seconds_of_prototypes_from_a_pass_before_are_those_of_the_pass_too(model, tmp_path, monkeypatch):
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(execute.time, "perf_counter", lambda: next(clock))
    runs = final(plan_of(["spt-deep"], compare={"num_prompts": [2, 5]}))
    shop = workshop(tmp_path)
    first, second = (shop._built(run).metadata["seconds"] for run in runs)
    assert float(second) > float(first) >= 10


def test_an_arm_that_was_changed_begins_its_run_anew(model, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()

    def planned(**arm):
        (run,) = final(plan_of({"mine": {"method": "spt-deep", "num_prompts": 2, **arm}}))
        return run

    def killed(*_, **__):
        raise KeyboardInterrupt

    before, after = planned(), planned(label_smoothing=0.1)
    assert before.name == after.name
    with monkeypatch.context() as patched:
        patched.setattr("spt_fast.training.outputs.Outputs.end", killed)
        with pytest.raises(KeyboardInterrupt):
            workshop(tmp_path).run(before)
    assert (tmp_path / "runs" / before.name / "checkpoint.pt").exists()
    row = workshop(tmp_path).run(after)
    assert row.loss == workshop(tmp_path / "new").run(after).loss
    # Where the same arm goes on, what is learned is learned once.
    other = planned(prototypes={"strategy": "mean"})
    row = workshop(tmp_path).run(other)
    assert (row.strategy, row.loss) == ("mean", workshop(tmp_path / "third").run(other).loss)


def test_vipamins_start_has_a_name(model, tmp_path):
    (run,) = final(plan_of({"mine": {"method": "spt-deep", "num_prompts": 2, "prompt_init": "vipamin"}}))
    row = workshop(tmp_path).run(run)
    assert (row.strategy, row.source) == ("vipamin", "")


def test_logits_that_are_nan_in_the_test_are_a_row_without_accuracy(model, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise NonFiniteError("logits of test_data must be finite", row=0)

    monkeypatch.setattr("spt_fast.training.outputs.evaluate_classes", fails)
    (run,) = final(plan_of(["linear"]))
    row = workshop(tmp_path).run(run)
    assert math.isnan(row.loss)
    assert row.test_accuracy is None


def test_features_are_computed_once_for_all_rates_and_seeds(model, tmp_path, monkeypatch):
    passes = []
    from spt_fast.training.features import Features

    of = Features.of.__func__

    def noted(cls, tuned, loader, known=()):
        found = of(cls, tuned, loader, known)
        passes.append(any(found is each for each in known))
        return found

    monkeypatch.setattr(Features, "of", classmethod(noted))
    plan = plan_of(["linear"], search={"lr": [0.01, 0.1]}, seeds=[0, 1])
    (group,) = plan.groups
    shop = workshop(tmp_path)
    rows = [shop.run(run) for run in (*group.search, *group.final(group.search[0]))]
    # The pool and the test images; validation, the other rate and the other seed find them there.
    assert passes.count(False) == 2
    assert passes.count(True) == len(passes) - 2 == 6
    alone = workshop(tmp_path / "alone")
    again = alone.run(group.final(group.search[0])[1])
    assert (again.loss, again.test_accuracy) == (rows[3].loss, rows[3].test_accuracy)


def test_a_loss_that_is_nan_is_a_row_without_accuracy_and_the_backbone_comes_back(
    model, tmp_path, monkeypatch
):
    def diverges(*_, **__):
        raise FloatingPointError("loss is NaN")

    plan = plan_of(["vpt-deep"])
    shop = workshop(tmp_path)
    train = execute.train_in
    monkeypatch.setattr(execute, "train_in", diverges)
    row = shop.run(final(plan)[0])
    assert math.isnan(row.loss)
    assert row.val_accuracy is row.test_accuracy is None
    monkeypatch.setattr(execute, "train_in", train)
    assert shop.run(final(plan)[0]).test_accuracy is not None


def test_an_error_names_its_run(model, tmp_path):
    run = final(plan_of(["linear"], images={"per_class": 1000}))[0]
    with pytest.raises(ValueError, match=f"{run.name}: per_class must be at most"):
        workshop(tmp_path).run(run)
