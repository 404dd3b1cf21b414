"""What all figures have in common: the caller's Axes, limits, legends, styles, steps and epochs, fonts."""

from __future__ import annotations

import io
import pickle
import re
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure

from spt_fast import plots
from spt_fast.support.tables import csv_bytes
from spt_fast.training.history import History

VALUES = np.linspace(0.1, 0.4, 12).reshape(2, 3, 2)  # two seeds, three steps, two layers
LENGTHS = ([5, 10], [0.7, 0.8])
FOUND = SimpleNamespace(pictures=torch.rand(1, 2, 3, 3, 4, 4), context=0)
METHODS = {"SPT-Deep": plots.MethodCurves([1, 2], np.full((2, 2), 0.5), np.ones((2, 3)), np.ones((2, 3)))}


@pytest.fixture
def history(tmp_path):
    """train.csv of two epochs, with validation accuracies."""
    path = tmp_path / "train.csv"
    path.write_bytes(History([2.0, 1.5], [0.5, 0.75], [1, 2], [1e-3] * 2, [1.0] * 2).to_csv())
    return path


def axes_of(count: int):
    return list(Figure().subplots(1, count, squeeze=False).flat)


def texts(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def drawing(history=None):
    """Each figure function with its data, by number of panels."""
    return {
        plots.nmi_over_epochs: (({"task": {"SPT": ([0, 1, 2], VALUES)}},), 1),
        plots.nmi_per_layer: (({"SPT": VALUES[0]},), 1),
        plots.cka_heatmap: ((np.eye(3),), 1),
        plots.accuracy_against_prompt_length: (({"SPT": LENGTHS},), 1),
        plots.construction_time: (({"mean": ([0.5, 1], [2, 4])},), 1),
        plots.nearest_patches: ((FOUND,), 1),
        plots.analysis_figure: (({"SPT": VALUES[0]}, np.eye(3)), 2),
        plots.demo_figure: ((METHODS,), 2),
        plots.training_curves: ((history,), 2),
    }


@pytest.mark.parametrize("draw", drawing(), ids=lambda draw: draw.__name__)
class TestAxes:
    def test_caller_axes_are_drawn_into(self, draw, history):
        given, panels = drawing(history)[draw]
        mine = axes_of(panels)
        figure = draw(*given, ax=mine[0] if panels == 1 else mine)
        assert figure is mine[0].figure
        own = draw(*given)
        for axes, other in zip(mine, own.axes, strict=False):
            assert axes.get_xlabel() == other.get_xlabel()
            assert len(axes.lines) == len(other.lines)
            assert len(axes.images) == len(other.images)
            assert axes.has_data()

    def test_title_is_that_of_the_axes(self, draw, history):
        given, panels = drawing(history)[draw]
        mine = axes_of(panels)
        name = "subtitle" if draw is plots.demo_figure else "title"
        figure = draw(*given, ax=mine, **{name: "mine"})
        assert (mine[0].get_title() if panels == 1 else figure.get_suptitle()) == "mine"

    def test_other_numbers_of_axes_are_refused(self, draw, history):
        given, panels = drawing(history)[draw]
        wanted = "ax must be one Axes" if panels == 1 else "ax must be 2 Axes, one for each panel"
        with pytest.raises(ValueError, match=f"{wanted}, got {3 - panels}"):
            draw(*given, ax=axes_of(3 - panels))
        with pytest.raises(TypeError, match=f"{wanted}, got str"):
            draw(*given, ax="left")
        with pytest.raises(TypeError, match=f"{wanted}, got Figure"):
            draw(*given, ax=Figure())


@pytest.mark.parametrize(
    ("draw", "name", "panel"),
    [
        (plots.nmi_over_epochs, "ylim", 0),
        (plots.nmi_per_layer, "ylim", 0),
        (plots.accuracy_against_prompt_length, "ylim", 0),
        (plots.construction_time, "ylim", 0),
        (plots.analysis_figure, "ylim", 0),
        (plots.demo_figure, "accuracy_ylim", 0),
        (plots.demo_figure, "nmi_ylim", 1),
        (plots.training_curves, "loss_ylim", 0),
        (plots.training_curves, "accuracy_ylim", 1),
    ],
)
def test_limits_of_the_y_axis(draw, name, panel, history):
    given, _ = drawing(history)[draw]
    assert draw(*given, **{name: (0.5, 20)}).axes[panel].get_ylim() == (0.5, 20)
    with pytest.raises(
        ValueError, match=rf"{name} must be a pair \(low, high\) with low < high, got \(2, 1\)"
    ):
        draw(*given, **{name: (2, 1)})
    with pytest.raises(ValueError, match=rf"{name}\[1\] must be a finite number, got nan"):
        draw(*given, **{name: (0, np.nan)})
    for wrong in (3, "ab", (1, 2, 3)):
        with pytest.raises(TypeError, match=rf"{name} must be a pair \(low, high\) or None, got"):
            draw(*given, **{name: wrong})


def test_limits_of_a_logarithmic_axis_are_positive():
    with pytest.raises(ValueError, match="ylim must be above 0"):
        plots.construction_time({"mean": ([1], [4])}, ylim=(0, 1))


def test_panels_of_a_figure_share_the_y_axis():
    tasks = {"low": {"SPT": ([0, 1], [[0.1], [0.2]])}, "high": {"SPT": ([0, 1], [[0.3], [0.9]])}}
    for figure in (plots.nmi_over_epochs(tasks), plots.nmi_over_epochs(tasks, ax=axes_of(2))):
        low, high = figure.axes
        assert low.get_ylim() == high.get_ylim()
        assert low.get_ylim()[0] == 0
        assert low.get_ylim()[1] >= 0.9
        assert (low.get_ylabel(), high.get_ylabel()) == ("NMI (eq. 8)", "")


def test_values_below_zero_are_not_cut_off():
    tasks = {"low": {"SPT": ([0, 1], [[-0.1], [0.2]])}, "high": {"SPT": ([0, 1], [[0.3], [0.9]])}}
    assert all(axes.get_ylim()[0] <= -0.1 for axes in plots.nmi_over_epochs(tasks).axes)


def test_a_second_run_joins_the_first_in_the_same_axes():
    (axes,) = axes_of(1)
    plots.nmi_per_layer({"VPT": [0.1, 0.2]}, ax=axes)
    plots.nmi_per_layer({"SPT": [[0.5, 0.8], [0.7, 0.9]]}, ax=axes)
    assert texts(axes.get_legend()) == ["VPT", "SPT", "min to max of 2 seeds"]
    assert axes.get_ylim()[1] >= 0.9


class TestLegend:
    def test_says_what_a_band_spans(self):
        (axes,) = plots.nmi_per_layer({"SPT": VALUES[0], "VPT": VALUES[0, 0]}, rows="images").axes
        assert texts(axes.get_legend()) == ["SPT", "VPT", "min to max of 3 images"]

    def test_without_a_band_there_is_no_such_entry(self):
        (axes,) = plots.accuracy_against_prompt_length({"SPT": LENGTHS}).axes
        assert texts(axes.get_legend()) == ["SPT"]

    @pytest.mark.parametrize("names", [["SPT", "VPT"], [f"run {i}" for i in range(9)], ["a long name " * 6]])
    def test_is_outside_where_it_is_long(self, names):
        (axes,) = plots.nmi_per_layer({name: [0.1, 0.2] for name in names}).axes
        figure, legend = axes.figure, axes.get_legend()
        figure.draw_without_rendering()
        box, inner = legend.get_window_extent(), axes.get_window_extent()
        if names == ["SPT", "VPT"]:
            assert inner.y0 < box.y0
            assert box.y1 < inner.y1
        else:
            labels = [axes.xaxis.label, *axes.get_xticklabels()]
            assert box.y1 < min(label.get_window_extent().y0 for label in labels)
            assert box.x0 >= 0
            assert box.x1 <= figure.bbox.x1
            assert box.y0 >= 0
            assert inner.height > 0.4 * figure.get_figwidth() * figure.dpi
        assert [text.replace("\n", " ") for text in texts(legend)] == [name.strip() for name in names]

    def test_hides_no_line(self):
        """Lines all over the panel leave no place inside."""
        runs = {f"run {i}": ([1, 5, 20, 50, 100], [0.1 * i] * 5) for i in range(5)}
        (axes,) = plots.accuracy_against_prompt_length(runs).axes
        axes.figure.draw_without_rendering()
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0

    def test_names_runs_of_all_panels(self):
        run = ([0, 1], [[0.1], [0.2]])
        figure = plots.nmi_over_epochs({"a": {"SPT": run}, "b": {"VPT": run, "SPT": run}})
        (legend,) = figure.legends
        assert texts(legend) == ["SPT", "VPT"]


class TestStyles:
    def test_twelve_more_runs_can_be_told_apart(self):
        names = ["SPT", "VPT", *(f"run {i}" for i in range(12))]
        (axes,) = plots.nmi_per_layer({name: [0.1, 0.2] for name in names}).axes
        looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
        assert len(looks) == len(names)

    def test_nobody_else_gets_the_colour_of_vpt(self):
        names = [f"SPT, {i} prompts" for i in range(8)]
        (axes,) = plots.nmi_per_layer({name: [0.1, 0.2] for name in names}).axes
        colours = [line.get_color() for line in axes.lines]
        assert colours.count("#D55E00") == 1
        assert "#0072B2" not in colours


class TestStepsAndEpochs:
    RUN = (np.arange(0, 30, 10), VALUES[0])

    def test_steps_are_called_steps(self):
        (axes,) = plots.nmi_over_epochs({"": {"SPT": self.RUN}}).axes
        assert axes.get_xlabel() == "step"
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), [0, 10, 20])

    def test_steps_become_epochs_where_their_number_is_given(self):
        tasks = {"a": {"SPT": self.RUN}, "b": {"SPT": self.RUN}}
        figure = plots.nmi_over_epochs(tasks, steps_per_epoch={"a": 10, "b": 4})
        assert [axes.get_xlabel() for axes in figure.axes] == ["epoch", "epoch"]
        np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), [0, 1, 2])
        np.testing.assert_array_equal(figure.axes[1].lines[0].get_xdata(), [0, 2.5, 5])

    def test_files_say_which_they_hold(self, tmp_path):
        files = {}
        for column in ("step", "epoch"):
            files[column] = tmp_path / f"{column}.csv"
            rows = [(10 * i, 1, 0.1) for i in range(3)]
            files[column].write_bytes(csv_bytes((column, "block", "nmi"), rows))
            assert plots.nmi_over_epochs(files[column]).axes[0].get_xlabel() == column
        with pytest.raises(ValueError, match=r"steps_per_epoch must be given.*by epoch and others by step"):
            plots.nmi_over_epochs({"": files})
        (axes,) = plots.nmi_over_epochs({"": files}, steps_per_epoch=10).axes
        by_step, by_epoch = (line.get_xdata().tolist() for line in axes.lines)
        assert (by_step, by_epoch) == ([0, 1, 2], [0, 10, 20])

    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            (0, ValueError, "steps_per_epoch of 'a' must be a finite number > 0, got 0"),
            ("ten", TypeError, "steps_per_epoch of 'a' must be a finite number > 0, got 'ten'"),
            ({"b": 3}, ValueError, "steps_per_epoch must hold a number for each task, got none for 'a'"),
        ],
    )
    def test_bad_numbers_of_steps(self, given, error, message):
        with pytest.raises(error, match=message):
            plots.nmi_over_epochs({"a": {"SPT": self.RUN}}, steps_per_epoch=given)

    def test_ticks_are_whole_epochs(self, history):
        figures = [
            plots.nmi_over_epochs({"": {"SPT": ([0, 1, 2], VALUES)}}, xlabel="epoch"),
            plots.training_curves(history),
            plots.demo_figure(METHODS),
        ]
        for figure in figures:
            for axes in figure.axes:
                ticks = axes.get_xticks()
                np.testing.assert_array_equal(ticks, np.round(ticks))

    def test_label_says_that_the_mean_of_blocks_is_drawn(self):
        (axes,) = plots.nmi_over_epochs({"": {"SPT": self.RUN}}).axes
        assert axes.get_ylabel() == "NMI, mean of blocks"


class TestFonts:
    def fonts(self, pdf: bytes) -> set[bytes]:
        return set(re.findall(rb"/Subtype /(Type3|CIDFontType2|TrueType)\b", pdf))

    @pytest.mark.parametrize("draw", drawing(), ids=lambda draw: draw.__name__)
    def test_pdfs_hold_truetype_fonts_and_settings_stay(self, draw, history):
        given, _ = drawing(history)[draw]
        before = dict(mpl.rcParams)
        pdf = io.BytesIO()
        draw(*given).savefig(pdf, format="pdf")
        found = self.fonts(pdf.getvalue())
        assert found
        assert found <= {b"CIDFontType2", b"TrueType"}
        assert dict(mpl.rcParams) == before

    def test_pages_keep_the_fonts_that_they_are_closed_with(self):
        pdf = io.BytesIO()
        with PdfPages(pdf) as pages:
            pages.savefig(plots.nmi_per_layer({"SPT": [0.1, 0.2]}))
        assert self.fonts(pdf.getvalue()) == {b"Type3"}

    def test_figures_can_be_pickled(self):
        figure = pickle.loads(pickle.dumps(plots.nmi_per_layer({"SPT": [0.1, 0.2]})))
        assert texts(figure.axes[0].get_legend()) == ["SPT"]


@pytest.mark.parametrize("size", [(3.3, 1.9), (3.3, 3.0), (6.9, 2.6)])
def test_numbers_in_cells_do_not_run_into_each_other(size):
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subplots(1, 2)
    values = np.full((6, 6), 0.25)
    plots.analysis_figure({"SPT": VALUES[0]}, values, ax=[left, right])
    figure.draw_without_rendering()
    cell = right.get_window_extent().width / 6
    assert all(text.get_window_extent().width < cell for text in right.texts)
    assert bool(right.texts) == (size[0] > 5)


def test_long_titles_are_wrapped(history):
    figure = plots.training_curves(history, title="photos of birds from many places " * 5)
    assert figure.get_suptitle().count("\n") >= 1
    figure.draw_without_rendering()
    box = figure._suptitle.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
