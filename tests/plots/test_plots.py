"""Figures: what they show, of arrays and of CSV files, and how they refuse what they cannot draw."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch

from spt_fast import plots
from spt_fast.support.tables import csv_bytes, format_table, read_csv
from spt_fast.training.history import History

EPOCHS = np.arange(4)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def png_of(figure) -> bytes:
    """The figure as bytes: also shows that it can be drawn without a warning."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=40)
    return image.getvalue()


def write(path, header, rows):
    path.write_bytes(csv_bytes(header, rows))
    return path


def nmi_rows(values, prefix=()):
    """[S, L] to the rows that NMITracker writes."""
    return [
        (*prefix, step, layer, value)
        for step, row in enumerate(values)
        for layer, value in enumerate(row, start=1)
    ]


def test_nmi_over_epochs_has_a_panel_per_task_and_a_line_per_run():
    runs = {name: (EPOCHS, np.random.rand(4, 6)) for name in ("VPT-Deep", "SPT-Deep")}
    figure = plots.nmi_over_epochs({"birds": runs, "cars": runs, "dogs": runs})
    assert [axes.get_title() for axes in figure.axes] == ["birds", "cars", "dogs"]
    for axes in figure.axes:
        for line, (steps, values) in zip(axes.get_lines(), runs.values(), strict=True):
            np.testing.assert_allclose(line.get_xdata(), steps)
            np.testing.assert_allclose(line.get_ydata(), values.mean(axis=1))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    assert png_of(figure).startswith(b"\x89PNG")


def test_several_seeds_are_drawn_as_mean_and_range():
    values = np.random.rand(3, 4, 2)
    (axes,) = plots.nmi_over_epochs({"": {"SPT": (EPOCHS, torch.from_numpy(values))}}).axes
    (line,), (band,) = axes.get_lines(), axes.collections
    np.testing.assert_allclose(line.get_ydata(), values.mean(axis=(0, 2)))
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(values.mean(axis=2).max())
    assert heights.min() == pytest.approx(values.mean(axis=2).min())


def test_methods_keep_their_colours_in_every_figure():
    def colours(names):
        (axes,) = plots.nmi_per_layer({name: np.ones(3) for name in names}).axes
        return {line.get_label(): line.get_color() for line in axes.get_lines()}

    alone, among = colours(["SPT"]), colours(["mean", "VPT", "SPT", "max", "random", "one more", "and more"])
    assert alone["SPT"] == among["SPT"] == "#D55E00"
    assert among["VPT"] == "#0072B2"
    assert len({among[name] for name in ("mean", "VPT", "SPT", "max", "random")}) == 5


def test_files_of_the_tracker_side_by_side(tmp_path):
    values = np.random.rand(2, 4, 3)
    header = ("step", "block", "nmi")
    files = {
        name: write(tmp_path / f"{name}.csv", header, nmi_rows(part))
        for name, part in zip(("VPT", "SPT"), values, strict=True)
    }
    (axes,) = plots.nmi_over_epochs({"task": files}, xlabel="step").axes
    assert axes.get_xlabel() == "step"
    np.testing.assert_allclose(axes.get_lines()[1].get_ydata(), values[1].mean(axis=1))
    (axes,) = plots.nmi_per_layer(files).axes
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), values[0, -1])


def test_one_file_of_all_runs(tmp_path):
    values = np.random.rand(2, 2, 2, 4, 3)
    rows = [
        row
        for task, tasks in zip("ab", values, strict=True)
        for run, runs in zip(("VPT", "SPT"), tasks, strict=True)
        for seed, seeds in enumerate(runs)
        for row in nmi_rows(seeds, (task, run, seed))
    ]
    path = write(tmp_path / "all.csv", ("task", "run", "seed", "step", "block", "nmi"), rows)
    figure = plots.nmi_over_epochs(path)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    np.testing.assert_allclose(
        figure.axes[1].get_lines()[1].get_ydata(), values[1, 1].mean(axis=(0, 2)), rtol=1e-12
    )
    assert texts(plots.nmi_per_layer(path).axes[0]) == [
        "a, VPT",
        "a, SPT",
        "b, VPT",
        "b, SPT",
        "min to max of 2 seeds",
    ]


def frames(axes) -> list[tuple[int, int]]:
    """Row and column of the framed cells."""
    return [(round(patch.get_y() + 0.46), round(patch.get_x() + 0.46)) for patch in axes.patches]


def test_cka_heatmap_frames_the_clear_maximum_of_a_row():
    values = np.array([[0.1, 0.9, 0.2], [0.31, 0.29, 0.1], [-0.02, 0.1, 0.8]])
    axes = plots.cka_heatmap(values).axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), values)
    # 0.31 and 0.29 are as good as equal.
    assert frames(axes) == [(0, 1), (2, 2)]
    assert [text.get_text() for text in axes.texts] == [f"{v:.2f}" for v in values.flat]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "3"]


def test_no_frame_where_prompts_resemble_no_block():
    chance = 0.005 * np.random.randn(6, 6)
    assert not frames(plots.cka_heatmap(chance).axes[0])
    assert not frames(plots.cka_heatmap(chance, limits=(-0.02, 0.02)).axes[0])
    assert not frames(plots.cka_heatmap([[0.9]]).axes[0])


@pytest.mark.parametrize(
    ("values", "limits", "expected"),
    [
        ([[0.1, 0.5]] * 2, None, (0, 1)),
        ([[-0.02, 0.5]] * 2, None, (-0.02, 1)),
        (np.eye(2), (0.2, 0.6), (0.2, 0.6)),
    ],
)
def test_scale_of_cka(values, limits, expected):
    figure = plots.cka_heatmap(values, limits=limits)
    assert figure.axes[0].images[0].get_clim() == expected
    assert figure.axes[1].get_ylabel() == "linear CKA"


def test_heatmaps_side_by_side_share_one_scale(tmp_path):
    low, high = np.full((2, 2), -0.1), np.full((2, 2), 0.7)
    rows = [(i + 1, j + 1, low[i, j]) for i in range(2) for j in range(2)]
    path = write(tmp_path / "cka.csv", ("prompt_block", "token_block", "cka"), rows)
    figure = plots.cka_heatmap({"VPT": path, "SPT": high})
    left, right, _ = figure.axes
    np.testing.assert_array_equal(left.images[0].get_array(), low)
    assert left.images[0].get_clim() == right.images[0].get_clim() == (-0.1, 1)
    assert [axes.get_ylabel() for axes in (left, right)] == ["prompts of block", ""]


@pytest.mark.parametrize(
    ("size", "ticks"),
    [(24, ["1", "4", "8", "12", "16", "20", "24"]), (50, ["1", *map(str, range(8, 50, 8))])],
)
def test_large_heatmap_has_no_numbers_and_few_ticks(size, ticks):
    axes = plots.cka_heatmap(np.random.rand(size, size)).axes[0]
    assert not axes.texts
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ticks


def test_numbers_are_in_all_cells_or_in_none():
    positive, negative = np.full((17, 17), 0.5), np.full((17, 17), -0.5)
    assert all(axes.texts for axes in plots.cka_heatmap({"a": positive, "b": positive}).axes[:2])
    assert not any(axes.texts for axes in plots.cka_heatmap({"a": positive, "b": negative}).axes)


def test_analysis_figure_shows_both():
    nmi = np.random.rand(5, 3)
    figure = plots.analysis_figure({"": nmi}, np.eye(3), rows="images", ylim=(0, 2), limits=(0, 3), title="t")
    left, right, _ = figure.axes
    np.testing.assert_allclose(left.get_lines()[0].get_ydata(), nmi.mean(axis=0))
    assert texts(left) == ["min to max of 5 images"]
    assert left.get_ylim() == (0, 2)
    assert right.images[0].get_clim() == (0, 3)
    assert figure.get_suptitle() == "t"
    np.testing.assert_array_equal(right.images[0].get_array(), np.eye(3))


def test_accuracy_against_prompt_length(tmp_path):
    rows = [("SPT", s, n, 0.8 + 0.01 * s) for s in (0, 1) for n in (100, 5, 20)]
    path = write(tmp_path / "lengths.csv", ("run", "seed", "num_prompts", "accuracy"), rows)
    from_file = plots.accuracy_against_prompt_length(path)
    from_arrays = plots.accuracy_against_prompt_length(
        {"SPT": ([5, 20, 100], [[0.8, 0.8, 0.8], [0.81, 0.81, 0.81]])}
    )
    for figure in (from_file, from_arrays):
        (line,) = figure.axes[0].get_lines()
        np.testing.assert_allclose(line.get_xdata(), [5, 20, 100])
        np.testing.assert_allclose(line.get_ydata(), [80.5] * 3)
        assert figure.axes[0].get_xscale() == "log"
        assert png_of(figure)


def test_close_prompt_lengths_do_not_run_into_each_other():
    lengths = [5, 10, 20, 80, 100, 200]
    (axes,) = plots.accuracy_against_prompt_length({"SPT": (lengths, [0.5] * 6)}).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["5", "10", "20", "80", "200"]


def test_construction_time_shows_ours_and_the_papers(tmp_path):
    rows = [("kmeans", 0.1, 1.5, 8640), ("kmeans", 1, 12.0, 2358720), ("ours only", 1, 3.0, "")]
    path = write(tmp_path / "table1.csv", ("strategy", "share", "seconds", "paper_seconds"), rows)
    figure = plots.construction_time(path)
    axes = figure.axes[0]
    assert texts(axes) == ["kmeans", "ours only", "paper"]
    ours, _, paper, _ = axes.get_lines()
    np.testing.assert_allclose(ours.get_xdata(), [10, 100])
    np.testing.assert_allclose(ours.get_ydata(), [1.5, 12])
    np.testing.assert_allclose(paper.get_ydata(), [8640, 2358720])
    assert ours.get_color() == paper.get_color()
    assert axes.get_yscale() == "log"
    assert "1 day" in [tick.get_text() for tick in axes.get_yticklabels()]
    assert png_of(figure)
    arrays = plots.construction_time({"mean": ([1, 0.5], [4, 2])}, {"mean": ([0.5, 1], [20, 40])})
    np.testing.assert_allclose(arrays.axes[0].get_lines()[0].get_ydata(), [2, 4])
    # Of a file, `paper` means the paper's column.
    both = plots.construction_time({"max": ([1], [4])}, path).axes[0]
    np.testing.assert_allclose(both.get_lines()[1].get_ydata(), [8640, 2358720])
    assert texts(both) == ["max", "kmeans, paper"]


def test_demo_figure_shows_each_method_and_both_moments():
    nmi = np.linspace(1e-4, 1e-1, 6)[None].repeat(3, axis=0)
    accuracy = np.tile([0.1, 0.5, 0.9], (3, 1))
    methods = {
        "linear probe": plots.MethodCurves([1, 2, 3], accuracy),
        "VPT-Deep": plots.MethodCurves([1, 2, 3], accuracy, nmi, 2 * nmi),
        "SPT-Deep": plots.MethodCurves([1, 2, 3], accuracy, 3 * nmi, 3 * nmi),
    }
    left, right = plots.demo_figure(methods, subtitle="a task").axes
    assert texts(left) == [*methods, "min to max of 3 seeds"]
    assert right.get_title() == "NMI per block, mean of 3 seeds"
    assert len(right.get_lines()) == 4
    np.testing.assert_allclose(left.get_lines()[0].get_ydata(), [10, 50, 90])
    np.testing.assert_allclose(right.get_lines()[1].get_ydata(), 2 * nmi[0])


def test_demo_figure_of_nothing_is_refused():
    with pytest.raises(ValueError, match="methods must hold at least one"):
        plots.demo_figure({})


@pytest.mark.parametrize(
    ("draw", "given", "error", "message"),
    [
        (plots.nmi_over_epochs, {}, ValueError, "tasks must hold at least one entry, got none"),
        (plots.nmi_over_epochs, [1], TypeError, "tasks must be a CSV file or map tasks to runs, got list"),
        (plots.nmi_over_epochs, {"t": {"r": [1]}}, TypeError, r"tasks\['t'\]\['r'\] must be a CSV file or a"),
        (plots.nmi_over_epochs, {"t": {"r": ([0, 1], [[1]])}}, ValueError, "must hold 2 steps.*got 1"),
        (plots.nmi_over_epochs, {"t": {"r": ([1, 0], [[1], [1]])}}, ValueError, "must ascend"),
        (plots.nmi_over_epochs, {"t": {"r": ([0], [[np.nan]])}}, ValueError, "must be finite"),
        (plots.nmi_per_layer, {"r": np.ones((1, 2, 3))}, ValueError, r"shape \[L\] or \[R, L\].*\(1, 2, 3\)"),
        (plots.nmi_per_layer, {"r": "text"}, FileNotFoundError, "there is no file text"),
        (plots.cka_heatmap, np.ones((2, 3)), ValueError, r"shape \[L, L\], got \(2, 3\)"),
        (plots.cka_heatmap, np.ones((0, 0)), ValueError, "no size of it 0"),
        (plots.cka_heatmap, {"a": object()}, TypeError, r"maps\['a'\] must be numbers \[L, L\], got object"),
        (plots.accuracy_against_prompt_length, {"a": ([1], [80])}, ValueError, r"in \[0, 1\], got 80 to 80"),
        (
            plots.accuracy_against_prompt_length,
            {"a": ([1.5], [0.8])},
            ValueError,
            r"whole numbers, got \[1.5",
        ),
        (plots.accuracy_against_prompt_length, {"a": ([1, 2], [0.8])}, ValueError, "lengths, 2, got 1"),
        (plots.construction_time, {"a": ([10], [1])}, ValueError, r"above 0 and at most 1, got \[10.0\]"),
        (plots.construction_time, {"a": ([1], [0])}, ValueError, "seconds of 'a' must be above 0, got 0"),
        (plots.construction_time, {"a": 3}, TypeError, r"times\['a'\] must be a pair \(shares"),
        (
            plots.nmi_per_layer,
            {1: [0.1, 0.2]},
            TypeError,
            "runs must map .* by names, which are strings, got 1",
        ),
        (plots.training_curves, None, TypeError, "path must be the name of a file, .* got None"),
    ],
)
def test_values_that_cannot_be_drawn_are_named(draw, given, error, message):
    with pytest.raises(error, match=message):
        draw(given)


@pytest.mark.parametrize(
    ("draw", "content", "message"),
    [
        (
            plots.nmi_over_epochs,
            "step,block\n1,2\n",
            "must have the columns step, block, nmi, got step, block",
        ),
        (plots.nmi_over_epochs, "", "must have the columns step, block, nmi, got none"),
        (plots.nmi_over_epochs, "step,block,nmi\n", "has no rows"),
        (plots.nmi_over_epochs, "step,block,nmi\n0,1,x\n", "line 2: nmi must be a number, got 'x'"),
        (plots.nmi_over_epochs, "step,block,nmi\n0,1,\n", "empty cell"),
        (plots.nmi_over_epochs, "step,block,nmi\n0,1,.1\n0,1,.1\n", "step 0, block 1 twice"),
        (plots.nmi_over_epochs, "step,block,nmi\n0,1,.1\n1,2,.1\n", "lacks step 0, block 2"),
        (plots.cka_heatmap, "prompt_block,token_block,cka\n1,1,1\n1,2,1\n", "each pair of its 2 blocks once"),
        (plots.accuracy_against_prompt_length, "num_prompts,accuracy\n5,.1\n5,.1\n", "at 5 twice"),
        (
            plots.accuracy_against_prompt_length,
            "seed,num_prompts,accuracy\n0,5,.1\n1,6,.1\n",
            "at the same values for each seed",
        ),
        (plots.construction_time, "strategy,share,seconds,paper_seconds\na,1,,\n", "empty cell"),
    ],
)
def test_files_that_cannot_be_drawn_are_named(draw, content, message, tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        draw(path)
    assert "numbers.csv" in str(raised.value)


def test_file_of_several_runs_is_not_one_run(tmp_path):
    rows = [("a", 0, 1, 0.1), ("b", 0, 1, 0.1)]
    path = write(tmp_path / "two.csv", ("run", "step", "block", "nmi"), rows)
    with pytest.raises(ValueError, match="must be a file of one run, got 2: a, b"):
        plots.nmi_over_epochs({"task": {"SPT": path}})


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "spt_fast[plots]" in plots.matplotlib_missing()
    for draw, given in (
        (plots.nmi_per_layer, {"SPT": np.ones(3)}),
        (plots.cka_heatmap, np.eye(3)),
        (plots.demo_figure, {"SPT-Deep": plots.MethodCurves([1], np.ones((1, 1)))}),
    ):
        with pytest.raises(ImportError, match=r"spt_fast\[plots\]"):
            draw(given)


def test_tables_align_and_come_back_from_csv(tmp_path):
    assert format_table([("a", "b"), ("long", "1")]) == "a     b\n----  -\nlong  1"
    path = write(tmp_path / "t.csv", ("name", "x"), [("a, b", 0.1), ("", 1e-30)])
    assert read_csv(path, ("x",), ("name", "absent")) == [(("a, b", ""), (0.1,)), (("", ""), (1e-30,))]


def test_training_curves_show_what_the_trainer_wrote(tmp_path):
    history = History([2.0, 1.5, 1.25], [0.5, 0.75], [2, 3], [1e-3, 2e-3, 1e-3], [1.0, 1.0, 1.0])
    path = tmp_path / "train.csv"
    path.write_bytes(history.to_csv())
    figure = plots.training_curves(path, title="digits")
    loss, accuracy = (axes.lines[0].get_xydata() for axes in figure.axes)
    np.testing.assert_array_equal(loss, [[1, 2.0], [2, 1.5], [3, 1.25]])
    np.testing.assert_array_equal(accuracy, [[2, 50.0], [3, 75.0]])
    assert png_of(figure).startswith(b"\x89PNG")


def test_training_curves_without_validation_have_one_panel(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(History([2.0], [], [], [1e-3], [1.0]).to_csv())
    assert len(plots.training_curves(path).axes) == 1
    path.write_text("epoch,loss\n1,2\n")
    with pytest.raises(ValueError, match="must have the columns epoch, loss, val_accuracy"):
        plots.training_curves(path)


def test_names_that_are_no_text_keep_their_bytes_in_a_table(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    path = tmp_path / "classes.csv"
    path.write_bytes(csv_bytes(("class", "images"), [(name, 3)]))
    assert b"caf\xe9,3" in path.read_bytes()
    assert read_csv(path, ["images"], ["class"]) == [((name,), (3.0,))]
