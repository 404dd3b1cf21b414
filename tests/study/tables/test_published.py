"""The published figures: that they are whole, that they add up, and which do not."""

from __future__ import annotations

import pytest

from spt_fast.data.vtab import TASKS
from spt_fast.methods import names
from spt_fast.study.tables import published_checks
from spt_fast.study.tables.columns import GROUPS, PARAMETERS, one_name
from spt_fast.study.tables.published import FILES, Figure, PublishedRow, _figure, published, table_title
from spt_fast.study.tables.published_checks import mismatches

# Printed parameters that are not what the methods learn of ViT-B/16; several are cut, not rounded.
DO_NOT_ADD_UP = {
    "Table 3, supervised, MP, fgvc_params",
    "Table 3, supervised, VPT-Shallow, fgvc_params",
    "Table 3, supervised, SPT-Shallow, fgvc_params",
    "Table S4, supervised, LoRA, vtab_params",
    "Table S4, supervised, SNF, vtab_params",
    "Table S4, supervised, VPT-Shallow, fgvc_params",
    "Table S4, supervised, SPT-Shallow, fgvc_params",
}


def row_of(table: str, backbone: str | None, name: str) -> PublishedRow:
    (found,) = [
        row
        for block in published(table)
        if block.backbone == backbone
        for row in block.rows
        if row.name == name and row.of_paper
    ]
    return found


@pytest.mark.parametrize(
    ("table", "backbone", "name", "column", "figure"),
    [
        ("1", None, "K-means", "100 %", Figure(27.30, 2, "d")),
        ("2", "mae", "SPT-Deep", "fgvc", Figure(83.26, 2)),
        ("2", "moco", "VPT-Deep", "structured", Figure(42.38, 2)),
        ("3", "supervised", "Bias", "fgvc/dogs", Figure(91.2, 1)),
        ("4", "mae", "K-means", "fgvc/cub", Figure(39.2, 1, gain=13.8)),
        ("s2", "mae", "(b) last P_L", "shallow", Figure(64.6, 1, gain=22.4)),
        ("s3", "supervised", "SPT-Deep", "vtab/smallnorb_ele", Figure(41.5, 1)),
        ("s4", "supervised", "SNF", "natural", Figure(83.78, 2)),
    ],
)
def test_figures_are_the_papers(table, backbone, name, column, figure) -> None:
    assert row_of(table, backbone, name).figures[column] == figure


@pytest.mark.parametrize(
    ("table", "rows"), [("1", 4), ("2", 12), ("3", 12), ("4", 10), ("s2", 8), ("s3", 9), ("s4", 12)]
)
def test_tables_have_all_rows_of_the_paper(table: str, rows: int) -> None:
    found = [row for block in published(table) for row in block.rows if row.of_paper]
    assert len(found) == rows
    columns = {column for block in published(table) for column in block.columns}
    blank = {(row.name, column) for row in found for column in columns - row.figures.keys()}
    assert blank == ({("LoRA", "fgvc"), ("LoRA", "fgvc_params")} if table == "s4" else set())
    assert table_title(table)


def test_every_row_has_a_source_and_a_known_method() -> None:
    rows = [row for table in FILES for block in published(table) for row in block.rows]
    assert all(row.source for row in rows)
    assert {row.method for row in rows} - {None} <= set(names())
    assert all(row.source.startswith("paper, Table ") for row in rows if row.of_paper)
    assert not any(row.source.startswith("paper") for row in rows if not row.of_paper)


def test_columns_are_tasks_groups_or_parameters() -> None:
    for table in ("2", "3", "4", "s3", "s4"):
        for column in {column for block in published(table) for column in block.columns}:
            assert column in GROUPS or column in PARAMETERS or column in (*GROUPS["vtab"], *GROUPS["fgvc"])


def test_groups_have_the_tasks_of_table_s1() -> None:
    sizes = {group: len(tasks) for group, tasks in GROUPS.items()}
    assert sizes == {"fgvc": 5, "natural": 7, "specialized": 4, "structured": 8, "vtab": 19}
    assert GROUPS["vtab"] == tuple(f"vtab/{task}" for task in TASKS)
    assert GROUPS["specialized"][0] == "vtab/patch_camelyon"
    assert GROUPS["structured"][0] == "vtab/clevr_count"


@pytest.mark.parametrize(
    ("name", "one"),
    [
        ("vtab/Pets", "vtab/oxford_iiit_pet"),
        ("vtab/cifar-100", "vtab/cifar"),
        ("vtab/dtd", "vtab/dtd"),
        ("fgvc/CUB_200_2011", "fgvc/cub"),
        ("fgvc/flowers", "fgvc/flowers"),
        ("vtab/flowers", "vtab/oxford_flowers102"),
        ("vtab/flowers17", "vtab/flowers17"),
        ("digits", "digits"),
        ("cub", "cub"),
    ],
)
def test_a_task_has_one_name(name: str, one: str) -> None:
    assert one_name(name) == one


def test_what_does_not_add_up_is_known() -> None:
    """Means of tasks, gains and figures in two tables all do; seven counts of parameters do not."""
    assert {each.where for each in mismatches()} == DO_NOT_ADD_UP
    assert "printed 1.2, but 1.251 by what it learns of ViT-B/16" in str(mismatches()[0])


def test_everything_that_can_be_checked_is_checked() -> None:
    kinds = (
        published_checks._means,
        published_checks._gains,
        published_checks._in_two_tables,
        published_checks._parameters,
    )
    # Means: FGVC of Tables 2 (12) and 3 (12) and of BPT, groups of Tables 2 (6 rows x 3) and S4 (3 x 3).
    assert [len(list(kind())) for kind in kinds] == [52, 28, 30, 29]


def test_a_wrong_mean_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (*_, row) = [row for block in published("2")[:1] for row in block.rows]
    # By two units of the last decimal: one is what rounding may do.
    row.figures["fgvc"], before = Figure(83.28, 2), row.figures["fgvc"]  # type: ignore[index]
    try:
        assert "Table 2, mae, SPT-Deep, fgvc" in {each.where for each in mismatches()}
    finally:
        row.figures["fgvc"] = before  # type: ignore[index]
    assert len(mismatches()) == len(DO_NOT_ADD_UP)


def test_a_figure_that_is_no_number_is_refused() -> None:
    assert _figure("-") is None
    with pytest.raises(ValueError, match=r"must be a number such as .*, got '8O\.1'"):
        _figure("8O.1")
