"""`spt-fast table` and what it is made of, on rows made up for the tests."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spt_fast.commands.main import main
from spt_fast.study.runs import Row, write_runs
from spt_fast.study.tables.arms import arms_of, published_backbone, read_studies
from spt_fast.study.tables.cells import Cell, Section, Table, TableRow, mean_of_tasks
from spt_fast.study.tables.formats import format_tables, shown
from spt_fast.study.tables.make import TABLES, make_tables

MAE = "vit_base_patch16_224.mae"
SUPERVISED = "vit_base_patch16_224.augreg_in21k"
NATURAL = ("caltech101", "cifar", "dtd", "oxford_flowers102", "oxford_iiit_pet", "svhn", "sun397")


def run(arm: str, task: str, accuracy: float | None, seed: int = 0, **values: Any) -> Row:
    """A final run of a ViT-B; its name is made of the rest."""
    method = values.pop("method", arm)
    of_spt = {"strategy": "kmeans", "source": "own"} if method.startswith("spt") else {}
    facts: dict[str, Any] = {
        "stage": "final",
        "backbone": MAE,
        "method": method,
        **of_spt,
        "lr": 0.01,
        "weight_decay": 1e-4,
        "epochs": 20,
        "train_images": 1000,
        "learned": 184_320,
        "trainable": 192_010,
        "backbone_parameters": 85_798_656,
        "loss": 0.1,
        "seconds": 12.0,
        **values,
    }
    name = f"{facts['stage']}-{facts['backbone']}-{arm}-{task}-{seed}".replace("/", "-")
    return Row(run=name, arm=arm, task=task, seed=seed, test_accuracy=accuracy, **facts)


def seeds(arm: str, task: str, accuracies: Sequence[float], **values: Any) -> list[Row]:
    return [run(arm, task, accuracy, seed, **values) for seed, accuracy in enumerate(accuracies)]


def lines_of(table: Table, section: int = 0) -> dict[str, dict[str, str]]:
    """{label: {column: text}} of a section."""
    found = table.sections[section]
    return {row.label: dict(zip(found.columns, map(shown, row.cells), strict=True)) for row in found.rows}


def cell_of(table: Table, label: str, column: str, section: int = 0) -> Cell:
    found = table.sections[section]
    (row,) = [row for row in found.rows if row.label == label]
    return row.cells[found.columns.index(column)]


TWO_ARMS = [
    *seeds("vpt-deep", "vtab/flowers17", [0.50, 0.60]),
    *seeds("vpt-deep", "digits", [0.70, 0.90]),
    *seeds("spt-deep", "vtab/flowers17", [0.60, 0.80], lr=0.1),
    *seeds("spt-deep", "digits", [0.80, 0.80]),
]


def test_one_arm_is_compared_with_none() -> None:
    (table,) = make_tables(seeds("linear", "digits", [0.5, 0.6]))
    assert list(lines_of(table)["linear"])[:2] == ["digits", "lr"]


def test_lengths_of_prompts_and_shares_of_the_data_that_are_compared_are_rows_of_their_own() -> None:
    rows = [
        *(
            run("spt-deep", "digits", 0.5, num_prompts=number, compared=f"num_prompts={number};share={share}")
            for number, share in ((5, 0.1), (5, 1.0), (10, 1.0))
        ),
        run("linear", "digits", 0.5),
        # Columns of their own are compared likewise.
        *(run("full", "digits", 0.5, epochs=epochs, compared=f"epochs={epochs}") for epochs in (10, 20)),
    ]
    rows = [replace(row, run=str(number)) for number, row in enumerate(rows)]
    (table,) = make_tables(rows)
    assert list(lines_of(table)) == [
        "spt-deep, 5 prompts, share=0.1",
        "spt-deep, 5 prompts, share=1.0",
        "spt-deep, 10 prompts, share=1.0",
        "linear",
        "full, epochs=10",
        "full, epochs=20",
    ]


def test_some_tasks_alone() -> None:
    (table,) = make_tables(TWO_ARMS, tasks=["digits"])
    assert table == make_tables([row for row in TWO_ARMS if row.task == "digits"])[0]
    with pytest.raises(ValueError, match=r"tasks must be one of .*'digits', got 'cars'"):
        make_tables(TWO_ARMS, tasks=["digits", "cars"])


def test_comparison_has_means_spreads_and_differences() -> None:
    (table,) = make_tables(TWO_ARMS)
    found = lines_of(table)
    assert list(found) == ["vpt-deep", "spt-deep"]
    assert found["spt-deep"] == {
        "vtab/flowers17": "70.00 ± 14.14",
        "digits": "80.00 ± 0.00",
        "mean of 2 tasks": "75.00 ± 7.07",
        # Differences of the tasks are 15 and 0; 12.706 * 15 / 2 on both sides of 7.5.
        "against vpt-deep": "+7.50 [-87.80, +102.80] (2 tasks)",
        "lr": "0.01, 0.1",
        "learned (M)": "0.184",
        "with head (M)": "0.192",
        "learned (%)": "0.215",
        "seconds": "12.0",
    }
    assert found["vpt-deep"]["against vpt-deep"] == ""


def test_what_an_arm_lacks_is_not_run() -> None:
    rows = [*TWO_ARMS, *seeds("ssf", "digits", [0.8]), run("lora", "vtab/kitti", 0.5)]
    (table,) = make_tables(rows)
    found = lines_of(table)
    assert found["ssf"]["vtab/flowers17"] == "not run"
    assert found["ssf"]["digits"] == "80.00"
    assert found["ssf"]["mean of 3 tasks"] == "80.00 (1 of 3 tasks)"
    assert found["ssf"]["against vpt-deep"] == "+10.00 (1 seed)"
    assert found["lora"]["against vpt-deep"] == "no pairs"
    assert table.sections[0].notes == ("1 to 2 seeds of each task.",)


def test_what_all_runs_have_is_said_below_a_table() -> None:
    tenth = [replace(row, compared="num_prompts=4;share=0.1") for row in TWO_ARMS]
    (table,) = make_tables(tenth)
    assert table.sections[0].notes[1:] == ("All runs have 4 prompts and share=0.1.",)
    assert set(lines_of(table)) == {"spt-deep", "vpt-deep"}
    whole = replace(tenth[0], run="whole", compared="num_prompts=4;share=1")
    (table,) = make_tables([*tenth, whole])
    assert table.sections[0].notes[1:] == ("All runs have 4 prompts.",)
    assert set(lines_of(table)) == {"spt-deep, share=0.1", "vpt-deep, share=0.1", f"{whole.arm}, share=1"}


def test_a_mean_over_tasks_has_the_spread_of_its_seeds() -> None:
    """Every run counts in the mean; the spread is over the seeds that all tasks have, if there are two."""
    rows = [*seeds("ssf", "a", [0.1, 0.3, 0.9]), *seeds("ssf", "b", [0.3, 0.5])]
    (arm,) = arms_of(rows)
    assert arm.means(["a", "b"]) == pytest.approx([20, 40])
    cell = mean_of_tasks(arm, ["a", "b"])
    assert (cell.value, cell.spread) == (pytest.approx((130 / 3 + 40) / 2), pytest.approx(200**0.5))
    (arm,) = arms_of([run("ssf", "a", 0.2, 0), run("ssf", "b", 0.4, 1)])
    cell = mean_of_tasks(arm, ["a", "b"])
    assert (cell.value, cell.spread) == (pytest.approx(30), None)


def test_final_runs_that_diverged_are_named_below_the_table() -> None:
    lost = replace(run("bad", "digits", 0.5), test_accuracy=None, run="of-bad")
    (table,) = make_tables([*TWO_ARMS, lost])
    assert "bad" not in lines_of(table)
    assert table.notes[-1] == "Final runs without a test accuracy are left out: of-bad."
    assert not any("left out" in note for note in make_tables(TWO_ARMS)[0].notes)


def test_a_table_that_no_run_is_for_says_so() -> None:
    (table,) = make_tables(seeds("ssf", "birds", [0.1, 0.3]), ["2"])
    assert table.notes[-1] == "None of the runs is for this table; theirs are the tasks birds."
    (table,) = make_tables(seeds("ssf", "vtab/pets", [0.1, 0.3]), ["s3"])
    assert "None of the runs" not in table.notes[-1]


@pytest.mark.parametrize("accuracy", ["-0.1", "21.3", "nan"])
def test_an_accuracy_that_is_no_share_is_refused(accuracy: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    write_runs(path, [run("ssf", "a", 0.375)])
    path.write_text(path.read_text().replace("0.375", accuracy))
    with pytest.raises(ValueError, match=rf"line 2: test_accuracy must be in \[0, 1\], got '{accuracy}'"):
        read_studies([path])


def test_the_reference_can_be_named() -> None:
    (table,) = make_tables(TWO_ARMS, against="spt-deep")
    assert lines_of(table)["vpt-deep"]["against spt-deep"].startswith("-7.50 [")
    (table,) = make_tables(seeds("ssf", "digits", [0.5, 0.6]) + seeds("lora", "digits", [0.6, 0.6]))
    assert lines_of(table)["lora"]["against ssf"] == "+5.00 [-58.53, +68.53] (2 seeds)"


def test_backbones_are_compared_apart() -> None:
    rows = [*TWO_ARMS, run("ssf", "digits", 0.9, backbone="shipped")]
    (table,) = make_tables(rows, against="vpt-deep")
    assert [section.title for section in table.sections] == [f"Backbone {MAE}", "Backbone shipped"]
    assert "No run of vpt-deep has this backbone." in table.sections[1].notes
    assert "against vpt-deep" not in table.sections[1].columns


def test_runs_of_a_search_do_not_count() -> None:
    (table,) = make_tables([*TWO_ARMS, run("spt-deep", "digits", None, stage="search", lr=9.0)])
    assert table == make_tables(TWO_ARMS)[0]


def test_ours_stand_below_the_published_row_of_the_method() -> None:
    rows = [
        row
        for number, task in enumerate(NATURAL)
        for row in seeds("spt-deep", f"vtab/{task}", [0.1 * number, 0.1 * number + 0.02])
    ]
    rows += [run("a", "vtab/pcam", 0.8, method="spt-deep"), run("mine", "fgvc/cub", 0.7, method="ssf")]
    (table,) = make_tables(rows, ["2"])
    labels = list(lines_of(table))
    where = labels.index("SPT-Deep, published")
    assert labels[where + 1 : where + 3] == ["SPT-Deep, ours (spt-deep)", "SPT-Deep, ours (a)"]
    found = lines_of(table)
    assert found["SPT-Deep, published"]["Natural (7)"] == "67.19"
    assert found["SPT-Deep, ours (spt-deep)"]["Natural (7)"] == "31.00 ± 1.41"
    assert found["SPT-Deep, ours (spt-deep)"]["Specialized (4)"] == "not run"
    assert found["SPT-Deep, ours (a)"]["Specialized (4)"] == "80.00 (1 of 4 tasks)"
    assert set(found["Full, ours"].values()) == {"not run"}
    # No published table has SSF under MAE.
    assert labels[-1] == "mine"
    assert found["mine"]["CUB-200-2011"] == "70.00"
    assert "ours (" not in "".join(lines_of(table, 1))


def test_rows_of_later_papers_are_marked() -> None:
    (table,) = make_tables(TWO_ARMS, ["2"])
    found = {row.label: row for row in table.sections[0].rows}
    assert found["SNELL-8, other papers"].kind == "other papers"
    assert shown(found["SNELL-8, other papers"].cells[-1]) == "63.5"
    assert "SNELL (NeurIPS 2024), Table 2" in "".join(table.sections[0].notes)
    # LoRA-16 and LoRA-8 are one method of ours.
    assert [label for label in found if label.startswith("lora, ours")] == ["lora, ours"]


def test_published_rows_can_be_left_out() -> None:
    for name in TABLES:
        (table,) = make_tables(TWO_ARMS, [name], published=False)
        assert {row.kind for section in table.sections for row in section.rows} == {"ours"}
        assert "published" not in format_tables([table]).replace("published table", "")


def test_tables_of_fgvc_and_vtab_count_parameters_with_the_head() -> None:
    rows = [
        run("ssf", "fgvc/cub", 0.8, backbone=SUPERVISED, trainable=1_000_000),
        run("ssf", "fgvc/dogs", 0.6, backbone=SUPERVISED, trainable=3_000_000),
        run("ssf", "vtab/kitti", 0.6, backbone=SUPERVISED, trainable=250_000),
    ]
    three, s3, s4 = make_tables(rows, ["3", "S3", "s4"])
    assert lines_of(three)["SSF, ours (ssf)"]["FGVC params (M)"] == "2.00 (2 of 5 tasks)"
    assert lines_of(three)["SSF, ours (ssf)"]["FGVC mean"] == "70.00 (2 of 5 tasks)"
    assert lines_of(s4)["SSF, ours (ssf)"]["VTAB params (M)"] == "0.25 (1 of 19 tasks)"
    assert lines_of(s4)["LoRA, published"]["FGVC mean"] == ""
    assert lines_of(s3, 2)["ssf"]["KITTI/distance"] == "60.00"


def test_runs_of_other_backbones_stand_by_themselves() -> None:
    (table,) = make_tables([run("ssf", "vtab/kitti", 0.6, backbone="shipped")], ["s3"])
    assert [section.title for section in table.sections][3:] == [
        "Backbone shipped, which the published table does not have"
    ]
    assert lines_of(table, 3)["ssf"]["KITTI/distance"] == "60.00"
    (table,) = make_tables([run("ssf", "vtab/kitti", 0.6, backbone="shipped")], ["s3"], backbone="moco")
    assert len(table.sections) == 3
    assert lines_of(table, 1)["ssf"]["KITTI/distance"] == "60.00"


@pytest.mark.parametrize(
    ("name", "parameters", "backbone"),
    [
        (MAE, 85_798_656, "mae"),
        ("mae_pretrain_vit_base.pth", 85_798_656, "mae"),
        ("hf-hub:nyu-visionx/moco-v3-vit-b", 85_798_656, "moco"),
        (SUPERVISED, 85_798_656, "supervised"),
        ("vit_base_patch16_224.orig_in21k", 85_798_656, "supervised"),
        ("vit_base_patch16_384.mae", 86_090_496, "mae"),
        ("vit_base_patch16_224.augreg_in21k_ft_in1k", 85_798_656, None),
        ("vit_large_patch16_224.mae", 303_301_632, None),
        ("maeve", 85_798_656, None),
        ("shipped", 85_798_656, None),
    ],
)
def test_a_backbone_is_known_by_its_name(name: str, parameters: int, backbone: str | None) -> None:
    assert published_backbone(name, parameters) == backbone


def test_table_4_has_strategies_and_frozen_prompts() -> None:
    rows = [
        *seeds("vpt-frozen", "fgvc/cub", [0.25, 0.31], method="vpt-deep", frozen_prompts=True),
        *seeds(
            "mean-frozen", "fgvc/cub", [0.3, 0.4], method="spt-deep", strategy="mean", frozen_prompts=True
        ),
        run("max", "digits", 0.5, method="spt-deep", strategy="max"),
        run("vpt-deep", "digits", 0.4),
        run("first", "fgvc/cub", 0.9, method="spt-deep", source="first"),
        run("spt-shallow", "fgvc/cub", 0.9),
        run("vipamin", "digits", 0.9, method="spt-deep", strategy="vipamin", source=""),
    ]
    (table,) = make_tables(rows, ["4"])
    assert [section.title for section in table.sections] == [
        "(a) prompts stay as they start; the paper's tasks",
        "(b) prompts learn; the paper's tasks",
        f"(b) prompts learn; backbone {MAE}",
    ]
    column = "ViT-B, MAE, ImageNet-1K: CUB-200-2011"
    frozen, learned, own = (lines_of(table, section) for section in range(3))
    assert frozen["Mean pooling, published"][column] == "37.7 (+12.4)"
    assert frozen["Mean pooling, ours (mean-frozen)"][column] == "35.00 ± 7.07 (+7.00 [-18.41, +32.41])"
    assert set(frozen["Max pooling, ours"].values()) == {"not run"}
    assert {text for line in learned.values() for text in line.values()} == {"not run"}
    assert "missing" in table.sections[1].notes[0]
    assert own["Max pooling, ours (max)"] == {"digits": "50.00 (+10.00)"}


def test_table_s2_pairs_shallow_and_deep_arms() -> None:
    rows = [
        run("spt-deep", "fgvc/cub", 0.8),
        run("spt-shallow", "fgvc/cub", 0.7),
        run("spt-deep-mean", "fgvc/cub", 0.6, method="spt-deep", strategy="mean"),
        run("spt-deep-50", "fgvc/cub", 0.9, method="spt-deep", num_prompts=50),
        run("last", "fgvc/cub", 0.5, method="spt-deep", source="last"),
        run("vpt-deep", "fgvc/cub", 0.4),
        run("frozen", "fgvc/cub", 0.1, method="spt-deep", frozen_prompts=True),
        run("spt-shallow", "digits", 0.2, backbone="shipped"),
        run("vipamin", "fgvc/cub", 0.9, method="spt-deep", strategy="vipamin", source=""),
    ]
    (table,) = make_tables(rows, ["S2"])
    found = lines_of(table)
    shallow, deep = (f"ViT-B, MAE, ImageNet-1K: {depth}" for depth in ("Shallow", "Deep"))
    ours = [label for label in found if label.startswith("(c)") and "ours" in label]
    names = ("spt-shallow, spt-deep", "spt-deep-mean", "spt-deep-50")
    assert ours == [f"(c) SPT (self-prompt), ours ({arms})" for arms in names]
    assert (found[ours[0]][shallow], found[ours[0]][deep]) == ("70.00", "80.00 (+40.00)")
    assert found["(b) last P_L, ours (last)"][deep] == "50.00 (+10.00)"
    assert found["(b) first P_0, published"][shallow] == "71.1 (+28.9)"
    assert not any("frozen" in label or "vipamin" in label for label in found)
    assert lines_of(table, 1)["(c) SPT (self-prompt), ours (spt-shallow)"] == {
        "digits shallow": "20.00",
        "digits deep": "not run",
    }


def test_table_1_has_times_of_runs_that_built_prototypes() -> None:
    rows = [
        run("spt-deep", "digits", None, stage="search", prototype_seconds=2.0, num_prompts=20, lr=0.1),
        run("spt-deep", "digits", 0.5, prototype_seconds=4.0, num_prompts=20),
        run("spt-deep", "digits", 0.5, seed=1),
        run("shallow", "digits", 0.5, method="spt-shallow", prototype_seconds=9.0),
        run("first", "digits", 0.5, method="spt-deep", source="first", prototype_seconds=9.0),
        run("tenth", "digits", 0.5, method="spt-deep", prototype_seconds=0.5, num_prompts=20),
    ]
    # Without a test too: times need none.
    for given, seconds in ((rows, "3.00 ± 1.41 s"), (rows[:1], "2.00 s")):
        (table,) = make_tables(given, ["1"])
        found = lines_of(table)
        label = f"K-means, ours (spt-deep, digits, 1000 images, 20 prompts, {MAE})"
        others = [label.replace("spt-deep", "tenth")] if given is rows else []
        assert list(found)[:3] == ["K-means, published", label, *others, "Mean pooling, published"][:3]
        assert found["K-means, published"]["100 %"] == "27.30 d"
        assert (found[label]["10 %"], found[label]["100 %"]) == ("not run", seconds)
        assert found["Mean pooling, ours"]["100 %"] == "not run"


def test_frozen_prompts_and_prompts_of_one_block_are_not_the_papers_method() -> None:
    rows = [
        run("frozen", "fgvc/cub", 0.1, method="spt-deep", frozen_prompts=True),
        run("last", "fgvc/cub", 0.1, method="spt-deep", source="last"),
    ]
    (table,) = make_tables(rows, ["2"])
    assert not any("ours (" in label for label in lines_of(table))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([run("ssf", "a", None, stage="search")], {}, "got 1 of stage 'search' without one .arms ssf."),
        ([run("ssf", "a", None)], {}, "final runs with a test accuracy, got 1 of stage 'final' without"),
        ([], {}, "got no runs at all"),
        (TWO_ARMS, {"names": ["5"]}, "table must be one of comparison, 1, 2, 3, 4, s2, s3, s4, got '5'"),
        (TWO_ARMS, {"names": ["compare"]}, "got 'compare'; did you mean comparison"),
        (TWO_ARMS, {"names": ["S"]}, "did you mean s2 or s3 or s4"),
        (
            TWO_ARMS,
            {"against": "spt"},
            "one of the arms vpt-deep, spt-deep, got 'spt'; did you mean spt-deep",
        ),
        (TWO_ARMS, {"against": "spt-deep", "names": ["2"]}, "against is for the table comparison"),
        (TWO_ARMS, {"backbone": "dino"}, "backbone must be one of 'mae', 'moco', 'supervised', got 'dino'"),
        (
            [*TWO_ARMS, run("ssf", "a", 0.1, backbone="shipped")],
            {"backbone": "mae"},
            "left out of runs of several backbones",
        ),
        (TWO_ARMS + TWO_ARMS[:1], {}, "arm vpt-deep have vtab/flowers17, seed 0 twice"),
        (
            [run("spt", "vtab/pets", 0.1), run("spt", "vtab/oxford_iiit_pet", 0.2)],
            {},
            "have vtab/oxford_iiit_pet, seed 0 twice",
        ),
        (
            [run("spt", "a", 0.1, method="spt-deep"), run("spt", "b", 0.1, method="ssf")],
            {},
            "arm spt differ in method: 'spt-deep'",
        ),
    ],
)
def test_bad_input_is_refused(rows: list[Row], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_tables(rows, **options)


def test_markdown_is_a_table_that_can_be_read() -> None:
    text = format_tables(make_tables(TWO_ARMS))
    assert text.startswith("## Arms of the study\n\n### Backbone vit_base")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert len({line.count("|") for line in lines}) == 1
    assert set(lines[1]) == set("|-: ")


AWKWARD = Table(
    name="comparison",
    title="50 % & more",
    sections=(
        Section(
            title="a_b",
            columns=("x|y", "#1"),
            rows=(
                TableRow(
                    label="[arm] {1}",
                    kind="ours",
                    source="~/^\\",
                    cells=(
                        Cell(value=-1.5, interval=(-2, 3), signed=True, note="2 tasks"),
                        Cell(text="$1-2"),
                    ),
                ),
            ),
            notes=("100 %",),
        ),
    ),
)


def test_latex_escapes_and_balances() -> None:
    text = format_tables([AWKWARD], "latex")
    assert r"50 \% \& more. a\_b." in text
    assert r"{}[arm] \{1\} & $-$1.50 [$-$2.00, +3.00] (2 tasks) & \$1-2 \\" in text
    check_latex(text)
    check_latex(format_tables(make_tables(TWO_ARMS, TABLES), "latex"))
    # LaTeX puts a number of its own before a caption.
    assert r"\caption{Methods under self-supervised backbones (Table 2 of the paper). ViT-B, MAE" in (
        format_tables(make_tables(TWO_ARMS, ["2"]), "latex")
    )


def check_latex(text: str) -> None:
    """That groups and environments close, and that every line of a table has its columns."""
    code = re.sub(r"(?<!\\)%.*", "", text)
    assert code.isascii()
    bare = re.sub(r"\\[{}&]", "", code)
    assert bare.count("{") == bare.count("}")
    assert len(re.sub(r"\\\$", "", code).split("$")) % 2 == 1
    tables = re.findall(r"\\begin\{tabular\}\{(lr*)\}(.*?)\\end\{tabular\}", bare, re.DOTALL)
    assert len(tables) == bare.count(r"\begin{table}") == bare.count(r"\end{table}") > 0
    for columns, body in tables:
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {line.count("&") + 1 for line in lines} == {len(columns)}
        assert [rule for rule in ("top", "mid", "bottom") if body.count(rf"\{rule}rule") != 1] == []


def test_csv_has_a_line_for_each_cell_with_numbers_in_full() -> None:
    tables = make_tables(TWO_ARMS, ["comparison", "2"])
    lines = list(csv.DictReader(io.StringIO(format_tables(tables, "csv"))))
    cells = [cell for table in tables for part in table.sections for row in part.rows for cell in row.cells]
    assert len(lines) == len(cells)
    (difference,) = [
        line for line in lines if (line["row"], line["column"]) == ("spt-deep", "against vpt-deep")
    ]
    cell = cell_of(tables[0], "spt-deep", "against vpt-deep")
    assert (float(difference["value"]), float(difference["low"])) == (cell.value, cell.interval[0])
    assert (difference["note"], difference["kind"]) == ("2 tasks", "ours")
    published = next(line for line in lines if line["row"] == "SPT-Deep, published")
    assert (published["value"], published["source"], published["kind"]) == (
        "83.26",
        "paper, Table 2",
        "published",
    )
    assert {line["text"] for line in lines if line["row"] == "Full, ours"} == {"not run"}


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form must be one of 'markdown', 'latex', 'csv', got 'html'"):
        format_tables([AWKWARD], "html")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    folder.mkdir()
    write_runs(folder / "runs.csv", TWO_ARMS)
    return folder


def test_the_command_prints_and_writes(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", str(study)]) == 0
    printed = capsys.readouterr().out
    assert printed == format_tables(make_tables(TWO_ARMS))
    out = tmp_path / "tables.tex"
    wanted = ["table", str(study / "runs.csv"), "--table", "2", "S3", "--format", "latex", "--out", str(out)]
    assert main(wanted) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert out.read_text() == format_tables(make_tables(TWO_ARMS, ["2", "s3"]), "latex")
    assert main(wanted) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*wanted, "--overwrite", "--no-published"]) == 0
    assert "published" not in out.read_text()


def test_the_command_takes_several_studies(study: Path, tmp_path: Path) -> None:
    other = tmp_path / "more.csv"
    write_runs(other, [run("ssf", "digits", 0.9)])
    rows = read_studies([study, other])
    assert [row.arm for row in rows] == [*(row.arm for row in TWO_ARMS), "ssf"]
    with pytest.raises(ValueError, match=r"must be different studies, got .* twice"):
        read_studies([study, study / "runs.csv"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--table", "tabel"], "table must be one of"),
        (["--overwrite"], "no file is given"),
        (["--out", "missing/folder.md"], "does not exist"),
    ],
)
def test_the_command_says_what_is_wrong(
    study: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["table", str(study), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_half_written_file_is_refused(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = study / "runs.csv"
    path.write_text(path.read_text()[:-20])
    assert main(["table", str(study)]) == 2
    assert "was not written whole" in capsys.readouterr().err


def test_the_choices_of_the_command_are_those_of_the_library() -> None:
    from spt_fast.commands import table
    from spt_fast.study.tables.arms import BACKBONES
    from spt_fast.study.tables.formats import FORMATS

    assert tuple(FORMATS) == table._FORMATS
    assert table._BACKBONES == BACKBONES
