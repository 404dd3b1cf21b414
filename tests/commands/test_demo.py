"""The demo: the command in miniature, what its runs hold, its table, its files and its figures."""

from __future__ import annotations

import io
import json
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace

import numpy as np
import pytest
import torch

from spt_fast import plots
from spt_fast.analysis import NMIHistory
from spt_fast.commands import main as cli
from spt_fast.commands.demo import budget, compare
from spt_fast.commands.demo import run as demo_run
from spt_fast.commands.demo.budget import LEARNING_RATES, METHODS, Budget, Rates, Task
from spt_fast.commands.demo.compare import introduction, run_demo
from spt_fast.commands.demo.report import FIGURE_NAME, FILE_NAMES, NMI_NAME, NUMBERS_NAME, DemoReport
from spt_fast.commands.demo.run import run_method

TINY = Budget(
    images_per_class=2, epochs=2, warmup_epochs=1, batch_size=7, num_prompts=3, val_every=1, seeds=(0,)
)


@pytest.fixture(scope="module")
def small_task() -> Task:
    whole = Task.load()
    return replace(whole, val=tuple(t[:20] for t in whole.val), test=tuple(t[:30] for t in whole.test))


@pytest.fixture(scope="module")
def printed_report(small_task, tmp_path_factory) -> tuple[str, DemoReport]:
    """What `spt-fast demo` prints, and the report that it prints, on a small budget and task."""
    out = tmp_path_factory.mktemp("demo")
    reports, printed = [], io.StringIO()

    def run_small_demo(*arguments: object, **options: object) -> DemoReport:
        reports.append(run_demo(*arguments, task=small_task, **options))
        return reports[0]

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(budget, "Budget", lambda: replace(TINY, epochs=4, warmup_epochs=2, seeds=(0, 1)))
        patch.setattr(compare, "run_demo", run_small_demo)
        assert cli.main(["demo", "--out", str(out), "--epochs", "2", "--seeds", "1"]) == 0
    return printed.getvalue(), reports[0]


@pytest.fixture(scope="module")
def report(printed_report) -> DemoReport:
    return printed_report[1]


def test_command_prints_introduction_table_and_files(printed_report):
    printed, report = printed_report
    assert printed.startswith(introduction(TINY))
    assert "masked autoencoding" in printed
    assert printed.endswith(f"{report.summary()}\n")
    for expected in (*METHODS, "test accuracy", FIGURE_NAME, NUMBERS_NAME):
        assert expected in printed
    assert report.budget == TINY


def test_command_keeps_files_that_are_there(report, only_error):
    code = cli.main(["demo", "--out", str(report.files[0].parent)])
    assert "exists already" in only_error(code, "demo")


def test_demo_runs_every_method(report):
    assert [run.method for run in report.runs] == list(METHODS)
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
    class Blind(nullcontext):
        def __init__(self, *_: object, **__: object) -> None:
            super().__init__(self)

        def history(self) -> NMIHistory:
            return NMIHistory(torch.empty(0), torch.empty(0, 6))

    monkeypatch.setattr(demo_run, "NMITracker", Blind)
    blind = run_method("VPT-Deep", small_task, TINY, LEARNING_RATES["VPT-Deep"], seed=0)
    seen = report.of("VPT-Deep")[0]
    assert len(blind.nmi_by_epoch) == 1
    assert blind.val_accuracy == seen.val_accuracy
    assert blind.test_accuracy == seen.test_accuracy


def test_recorded_nmi_can_be_drawn_from_its_file(report):
    path = next(path for path in report.files if path.name == NMI_NAME)
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
    assert len(lines) == 2 + len(METHODS)
    assert len({len(line) for line in lines}) == 1
    for method, line in zip(METHODS, lines[2:], strict=True):
        assert line.startswith(method)
    assert "standard deviation" in report.summary()


def test_comparison_is_paired_by_seed(report):
    _, *pairs = (100 * run.test_accuracy for run in report.runs)
    frozen, tuned = pairs[1] - pairs[0], pairs[3] - pairs[2]
    expected = f"SPT minus VPT, seed by seed, in points: tuned {tuned:+.1f}; frozen {frozen:+.1f}"
    assert report.comparison() == expected


def test_demo_writes_figures_and_numbers(report):
    assert [path.name for path in report.files] == list(FILE_NAMES)
    numbers, _, *figures = report.files
    for figure in figures:
        assert figure.read_bytes().startswith(b"\x89PNG")
    stored = json.loads(numbers.read_text())
    assert [run["test_accuracy"] for run in stored["runs"]] == [run.test_accuracy for run in report.runs]
    assert stored["budget"]["epochs"] == TINY.epochs
    assert sorted(path.name for path in numbers.parent.iterdir()) == sorted(FILE_NAMES)


def test_same_seed_gives_the_same_run(small_task, report):
    again = run_method("SPT-Deep", small_task, TINY, LEARNING_RATES["SPT-Deep"], seed=0)
    first = report.of("SPT-Deep")[0]
    assert again.val_accuracy == first.val_accuracy
    assert again.test_accuracy == first.test_accuracy
    assert again.nmi_end == pytest.approx(first.nmi_end, rel=1e-4)


def test_existing_output_stops_the_demo_before_the_work(tmp_path, monkeypatch):
    (tmp_path / NUMBERS_NAME).write_text("mine")
    monkeypatch.setattr(compare, "run_method", lambda *_, **__: pytest.fail("work was begun"))
    with pytest.raises(FileExistsError, match=NUMBERS_NAME):
        run_demo(tmp_path, budget=TINY, progress=False)
    with pytest.raises(NotADirectoryError, match="out must be a folder"):
        run_demo(tmp_path / NUMBERS_NAME, budget=TINY, progress=False)
    assert (tmp_path / NUMBERS_NAME).read_text() == "mine"


def test_interrupted_demo_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_method", interrupt)
    for folder in (tmp_path, tmp_path / "missing" / "folder"):
        with pytest.raises(KeyboardInterrupt):
            run_demo(folder, budget=TINY, progress=False)
        assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_numbers_are_still_written(small_task, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(compare, "METHODS", ("linear probe",))
    report = run_demo(tmp_path, budget=TINY, task=small_task, progress=False)
    assert report.files == [tmp_path / NUMBERS_NAME, tmp_path / NMI_NAME]
    assert sorted(tmp_path.iterdir()) == sorted(report.files)
    assert "spt_fast[plots]" in introduction(TINY)
    with pytest.raises(ImportError, match=r"spt_fast\[plots\]"):
        plots.demo_figure({"SPT-Deep": plots.MethodCurves([1], np.ones((1, 1)))})


def test_unknown_method_is_refused(small_task):
    with pytest.raises(ValueError, match="method must be one of"):
        run_method("LoRA", small_task, TINY, Rates(1e-2), seed=0)


@pytest.mark.parametrize("name", ["epochs", "seeds"])
def test_scaled_budget_wants_integers_from_one(name):
    with pytest.raises(ValueError, match=f"^{name} must be an integer >= 1, got 0$"):
        Budget().scaled(**{name: 0})
    with pytest.raises(TypeError, match=rf"^{name} must be an integer >= 1, got 2\.5$"):
        Budget().scaled(**{name: 2.5})


def test_budget_refuses_counts_that_are_none():
    with pytest.raises(TypeError, match=r"^batch_size must be an integer >= 1, got 2\.5$"):
        Budget(batch_size=2.5)
    with pytest.raises(ValueError, match=r"^num_prompts must be an integer >= 1, got 0$"):
        Budget(num_prompts=0)


def test_scaled_budget_keeps_the_share_of_warm_up():
    budget = Budget()
    scaled = budget.scaled(epochs=2 * budget.epochs, seeds=5)
    assert scaled.warmup_epochs == 2 * budget.warmup_epochs
    assert scaled.seeds == (0, 1, 2, 3, 4)
    assert budget.scaled() == budget
