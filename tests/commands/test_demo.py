"""The demo's shipped data, its backbone, its runs in miniature, and its figure."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from spt_fast import NMITracker, plots
from spt_fast.commands import demo
from spt_fast.data import shipped as samples

TINY = demo.Budget(
    images_per_class=2, epochs=2, warmup_epochs=1, batch_size=7, num_prompts=3, val_every=1, seeds=(0,)
)


@pytest.fixture(scope="module")
def small_task() -> demo.Task:
    whole = demo.Task.load()
    return replace(whole, val=tuple(t[:40] for t in whole.val), test=tuple(t[:50] for t in whole.test))


@pytest.fixture(scope="module")
def report(small_task, tmp_path_factory) -> demo.DemoReport:
    out = tmp_path_factory.mktemp("demo")
    return demo.run_demo(out, budget=TINY, task=small_task, progress=False)


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    labels = torch.cat([samples.load_digits(split)[1] for split in ("train", "val", "test")])
    assert np.array_equal(labels.numpy(), original.target)
    # Each corner pixel of a bilinear upsampling by four is the corner pixel itself.
    images, _ = samples.load_digits("val")
    facts = samples.backbone_facts()
    grey = images[:, 0] * facts["std"][0] + facts["mean"][0]
    first, last = samples.DIGITS_SPLITS["val"]
    np.testing.assert_allclose(grey[:, 0, 0], original.images[first:last, 0, 0] / 16, atol=1e-6)
    np.testing.assert_allclose(grey[:, -1, -1], original.images[first:last, -1, -1] / 16, atol=1e-6)


def test_splits_are_disjoint_and_cover_all():
    ranges = [samples.DIGITS_SPLITS[split] for split in ("train", "val", "test")]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 1797
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_each_split_holds_every_digit(split):
    images, labels = samples.load_digits(split)
    assert images.shape == (len(labels), 3, 32, 32)
    assert images.dtype == torch.float32
    assert torch.bincount(labels, minlength=10).min() >= 25


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        samples.load_digits("holdout")


def test_few_per_class_is_balanced_and_follows_the_seed():
    labels = samples.load_digits("train")[1]
    rows = samples.few_per_class(labels, 4, seed=1)
    assert torch.equal(torch.bincount(labels[rows]), torch.full((10,), 4))
    assert len(set(rows.tolist())) == 40
    assert torch.equal(rows, samples.few_per_class(labels, 4, seed=1))
    assert not torch.equal(rows, samples.few_per_class(labels, 4, seed=2))


@pytest.mark.parametrize("per_class", [0, 500])
def test_few_per_class_refuses_numbers_it_cannot_give(per_class):
    with pytest.raises(ValueError, match="per_class must be"):
        samples.few_per_class(samples.load_digits("train")[1], per_class, seed=0)


def test_backbone_is_ready_for_use_with_timm():
    from timm.data import resolve_model_data_config

    model = samples.load_backbone()
    config = resolve_model_data_config(model)
    facts = samples.backbone_facts()
    assert not model.training
    assert config["input_size"] == (3, 32, 32)
    assert list(config["mean"]) == facts["mean"]
    assert list(config["std"]) == facts["std"]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        assert model(samples.load_digits("val")[0][:3]).shape == (3, facts["architecture"]["embed_dim"])


def test_backbone_file_is_small_and_trained():
    facts = samples.backbone_facts()
    file = samples._asset("backbone.safetensors")
    assert file.stat().st_size <= 6 * 2**20
    # An untrained decoder's loss on patches of unit variance is 1 or above.
    assert facts["loss"] < 0.7


def test_truncated_backbone_is_refused(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(samples._asset("backbone.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a complete safetensors file"):
        samples.load_backbone(broken)


def test_foreign_safetensors_is_no_backbone():
    with pytest.raises(ValueError, match=r"was not written by examples/pretrain_backbone\.py"):
        samples.load_backbone(samples._asset("digits.safetensors"))


def test_demo_runs_every_method(report):
    assert [run.method for run in report.runs] == list(demo.METHODS)
    for run in report.runs:
        assert run.val_epochs == [1, 2]
        assert all(0 <= value <= 1 for value in [*run.val_accuracy, run.test_accuracy])
        assert run.train_seconds > 0


def test_demo_counts_trainable_parameters(report):
    shape = report.backbone["architecture"]
    head = 10 * (shape["embed_dim"] + 1)
    prompts = shape["depth"] * TINY.num_prompts * shape["embed_dim"]
    counts = [run.trainable_parameters for run in report.runs]
    assert counts == [head, head, head, head + prompts, head + prompts]


def test_demo_measures_nmi_of_prompted_methods_only(report):
    depth = report.backbone["architecture"]["depth"]
    probe, *frozen, vpt, spt = report.runs
    assert probe.nmi_start is None
    assert [run.nmi_end for run in (probe, *frozen)] == [None] * 3
    for run, tuned in zip(frozen, (vpt, spt), strict=True):
        # The same numbers, by another forward pass.
        assert run.nmi_start == pytest.approx(tuned.nmi_start, rel=1e-4, abs=1e-7)
    for run in (vpt, spt):
        for values in (run.nmi_start, run.nmi_end):
            assert len(values) == depth
            assert all(0 <= value <= 1 for value in values)


def test_demo_records_nmi_while_prompts_are_tuned(report):
    depth = report.backbone["architecture"]["depth"]
    probe, *frozen, vpt, spt = report.runs
    assert [run.nmi_by_epoch for run in (probe, *frozen)] == [None] * 3
    for run in (vpt, spt):
        assert np.shape(run.nmi_by_epoch) == (1 + TINY.epochs, depth)
        assert run.nmi_by_epoch[-1] == run.nmi_end
        # Seven of the twenty images that `nmi_start` is the mean of.
        assert run.nmi_by_epoch[0] == pytest.approx(run.nmi_start, rel=0.5, abs=1e-3)


def test_recording_nmi_does_not_change_the_run(report, small_task, monkeypatch):
    monkeypatch.setattr(NMITracker, "_observe", lambda *_: None)
    blind = demo.run_method("VPT-Deep", small_task, TINY, demo.LEARNING_RATES["VPT-Deep"], seed=0)
    seen = report.of("VPT-Deep")[0]
    assert len(blind.nmi_by_epoch) == 1
    assert blind.val_accuracy == seen.val_accuracy
    assert blind.test_accuracy == seen.test_accuracy


def test_recorded_nmi_can_be_drawn_from_its_file(report):
    path = next(path for path in report.files if path.name == demo.NMI_NAME)
    (axes,) = plots.nmi_over_epochs(path).axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["VPT-Deep", "SPT-Deep"]
    expected = np.mean(report.of("SPT-Deep")[0].nmi_by_epoch, axis=1)
    np.testing.assert_allclose(axes.get_lines()[1].get_ydata(), expected, rtol=1e-5)
    panels = report.nmi_panels()
    assert list(panels)[:2] == ["mean of the blocks", "block 1"]
    np.testing.assert_array_equal(
        panels["block 2"]["VPT-Deep"][1][0, :, 0], [v[1] for v in report.of("VPT-Deep")[0].nmi_by_epoch]
    )


def test_only_spt_spends_time_on_prototypes(report):
    for run in report.runs:
        assert (run.prototype_seconds > 0) == run.method.startswith("SPT")


def test_table_has_a_row_per_method(report):
    lines = report.table().splitlines()
    assert len(lines) == 2 + len(demo.METHODS)
    assert len({len(line) for line in lines}) == 1
    for method, line in zip(demo.METHODS, lines[2:], strict=True):
        assert line.startswith(method)
    assert "standard deviation" in report.summary()


def test_comparison_is_paired_by_seed(report):
    _, *pairs = (100 * run.test_accuracy for run in report.runs)
    frozen, tuned = pairs[1] - pairs[0], pairs[3] - pairs[2]
    expected = f"SPT minus VPT, seed by seed, in points: tuned {tuned:+.1f}; frozen {frozen:+.1f}"
    assert report.comparison() == expected


def test_demo_writes_figures_and_numbers(report):
    assert [path.name for path in report.files] == list(demo.FILE_NAMES)
    numbers, _, *figures = report.files
    for figure in figures:
        assert figure.read_bytes().startswith(b"\x89PNG")
    stored = json.loads(numbers.read_text())
    assert [run["test_accuracy"] for run in stored["runs"]] == [run.test_accuracy for run in report.runs]
    assert stored["budget"]["epochs"] == TINY.epochs
    assert sorted(path.name for path in numbers.parent.iterdir()) == sorted(demo.FILE_NAMES)


def test_same_seed_gives_the_same_run(small_task, report):
    again = demo.run_method("SPT-Deep", small_task, TINY, demo.LEARNING_RATES["SPT-Deep"], seed=0)
    first = report.of("SPT-Deep")[0]
    assert again.val_accuracy == first.val_accuracy
    assert again.test_accuracy == first.test_accuracy
    assert again.nmi_end == pytest.approx(first.nmi_end, rel=1e-4)


def test_existing_output_stops_the_demo_before_the_work(tmp_path, monkeypatch):
    (tmp_path / demo.NUMBERS_NAME).write_text("mine")
    monkeypatch.setattr(demo, "run_method", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(FileExistsError, match=demo.NUMBERS_NAME):
        demo.run_demo(tmp_path, budget=TINY, progress=False)
    with pytest.raises(NotADirectoryError, match="out must be a folder"):
        demo.run_demo(tmp_path / demo.NUMBERS_NAME, budget=TINY, progress=False)
    assert (tmp_path / demo.NUMBERS_NAME).read_text() == "mine"


def test_interrupted_demo_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_method", interrupt)
    for folder in (tmp_path, tmp_path / "missing" / "folder"):
        with pytest.raises(KeyboardInterrupt):
            demo.run_demo(folder, budget=TINY, progress=False)
        assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_numbers_are_still_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    paths = demo.output_paths(tmp_path, overwrite=False)
    assert paths == {name: tmp_path / name for name in (demo.NUMBERS_NAME, demo.NMI_NAME)}
    assert "spt_fast[plots]" in demo.introduction(TINY)
    with pytest.raises(ImportError, match=r"spt_fast\[plots\]"):
        plots.demo_figure({"SPT-Deep": plots.MethodCurves([1], np.ones((1, 1)))})


def test_unknown_method_is_refused(small_task):
    with pytest.raises(ValueError, match="method must be one of"):
        demo.run_method("LoRA", small_task, TINY, demo.Rates(1e-2), seed=0)


@pytest.mark.parametrize("options", [{"epochs": 0}, {"seeds": 0}])
def test_scaled_budget_refuses_less_than_one(options):
    with pytest.raises(ValueError, match="must be an integer >= 1, got 0"):
        demo.Budget().scaled(**options)


def test_scaled_budget_keeps_the_share_of_warm_up():
    budget = demo.Budget()
    scaled = budget.scaled(epochs=2 * budget.epochs, seeds=5)
    assert scaled.warmup_epochs == 2 * budget.warmup_epochs
    assert scaled.seeds == (0, 1, 2, 3, 4)
    assert budget.scaled() == budget
