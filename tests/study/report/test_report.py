"""The page of a study: what it shows, what it says that it lacks, and what it refuses."""

from __future__ import annotations

import base64
import io
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import spt_fast
from spt_fast.commands.main import BAD_INPUT, main
from spt_fast.study.report import prompts as report_prompts
from spt_fast.study.report.against import lengths_section, shares_section
from spt_fast.study.report.input import StudyFolder, read_classes, read_confusion
from spt_fast.study.report.page import LARGEST_PAGE, looks_of, write_report
from spt_fast.study.report.pictures import patch_picture
from spt_fast.study.runs import read_runs, write_runs
from spt_fast.study.sweeps.plan import Plan
from spt_fast.support.yaml_text import write_yaml


def page_of(study: Path, **options) -> str:
    out = study / "page.html"
    write_report(study, out, overwrite=True, progress=False, **{"patches": False, **options})
    return out.read_text()


def change_rows(study: Path, **values) -> None:
    write_runs(study / "runs.csv", [replace(row, **values) for row in read_runs(study / "runs.csv")])


def sections(text: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', text)


def test_a_page_shows_what_the_study_found(study):
    text = page_of(study)
    expected = ["summary", "results", "values", "search", "curves", "nmi", "confusion", "classes", "cost"]
    assert sections(text) == expected
    assert "2 arms on 1 task, 2 seeds, 10 runs." in text
    assert "79.00 ± 1.41" in text
    assert text.index(">spt-deep</th>") < text.index(">linear</th>")
    assert "torch 2.9" in text
    assert text.count("<svg") >= 6
    assert "NMI (eq. 8) against epoch" in text
    assert "does not show" not in text


def test_a_page_asks_for_nothing_and_is_the_same_every_time(study):
    text = page_of(study)
    assert text == page_of(study)
    assert not re.search(r"https?:|@import|url\(|<script|<link|\bsrc=", text)
    assert str(study.parent) not in text


def test_where_the_data_lay_is_not_in_a_page(study):
    with (study / "sweep.yaml").open("a") as file:
        file.write("root: /home/somebody/data\n")
    text = page_of(study)
    assert "somebody" not in text
    assert "model: tiny" in text


def test_names_are_text_and_no_markup(study, make_row):
    change_rows(study, task="<script>alert(1)</script>", options="<i>=1")
    (study / "sweep.yaml").write_text("model: <script>\n")
    assert "<script" not in page_of(study)


def test_matplotlib_is_not_needed(study, monkeypatch):
    text = page_of(study)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert page_of(study) == text


def test_what_all_runs_have_is_said_once(study, make_row):
    assert "All runs have" not in page_of(study)
    change_rows(study, compared="share=0.1", options="share=0.1")
    text = page_of(study)
    assert re.search("All runs have.{1,40}share=0.1", text)
    assert "spt-deep, share" not in text


def test_a_page_without_tests_says_so(study):
    change_rows(study, test_accuracy=None)
    text = page_of(study)
    assert "No run was tested" in text
    assert "validation images in percent" in text
    assert "80.00" in text


def test_runs_that_were_not_tested_are_named(study):
    rows = read_runs(study / "runs.csv")
    write_runs(study / "runs.csv", [replace(rows[3], test_accuracy=None), *rows[4:]])
    assert f"Without test accuracy, and left out: {rows[3].run}." in page_of(study)


def test_final_runs_alone_and_a_search_alone(study):
    rows = read_runs(study / "runs.csv")
    for stage, absent in (("final", "search"), ("search", "confusion")):
        write_runs(study / "runs.csv", [row for row in rows if row.stage == stage])
        found = sections(page_of(study))
        assert absent not in found
        assert "curves" in found


def test_a_damaged_table_of_a_run_is_left_out_and_named(study):
    (study / "runs" / "linear-final-0" / "train.csv").write_text("epoch,loss,val_accuracy\n1,x,\n")
    (study / "runs" / "linear-final-0" / "test-confusion.csv").write_text("class,wren\nowl,1\n")
    report = write_report(study, patches=False)
    assert len(report.missing) == 2
    text = report.path.read_text()
    for line, name in zip(sorted(report.missing), ("test-confusion.csv", "train.csv"), strict=True):
        assert name in line
        assert name in text
    assert report.size == report.path.stat().st_size


def test_runs_without_folders_have_a_page(study):
    shutil.rmtree(study / "runs")
    (study / "sweep.yaml").unlink()
    report = write_report(study / "runs.csv", patches=False)
    assert report.path == study / "report.html"
    assert sections(report.path.read_text()) == ["summary", "results", "values", "search", "cost"]
    assert report.missing == (
        "sweep.yaml is missing: what was asked for is not known",
        "runs/ is missing: no curves, NMI, confusion and classes of runs",
    )


def test_what_is_refused(study):
    runs = study / "runs.csv"
    whole = runs.read_text()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        write_report(study, study / "nowhere" / "page.html")
    with pytest.raises(ValueError, match="max_images must be an integer >= 1"):
        write_report(study, max_images=0)
    with pytest.raises(TypeError, match="patches must be True or False"):
        write_report(study, patches="no")
    (study / "page.html").write_text("mine")
    with pytest.raises(FileExistsError):
        write_report(study, study / "page.html")
    assert (study / "page.html").read_text() == "mine"
    runs.write_text(whole[:-20])
    with pytest.raises(ValueError, match="was not written whole"):
        write_report(study)
    runs.write_text(whole.splitlines()[0] + "\n")
    with pytest.raises(ValueError, match="holds no run that is finished yet"):
        write_report(study)
    runs.unlink()
    with pytest.raises(FileNotFoundError, match="runs"):
        write_report(study)
    assert not (study / "report.html").exists()


def test_the_command_says_what_a_page_lacks(study, capsys):
    assert main(["report", str(study)]) == 0
    printed = capsys.readouterr()
    assert (
        printed.err
        == "spt-fast report: no thumbnails, no CKA and no NMI before and after tuning of birds: no "
        "final run of SPT has kept its weights\n"
    )
    assert printed.out.startswith(f"wrote {study / 'report.html'} (")
    assert "no final run of SPT has kept its weights" in (study / "report.html").read_text()
    assert main(["report", str(study)]) == BAD_INPUT
    assert "report.html" in capsys.readouterr().err
    assert main(["report", str(study), "--overwrite", "--no-patches"]) == 0
    assert capsys.readouterr().err == ""
    (study / "runs.csv").write_text("run,stage\n")
    assert main(["report", str(study), "--overwrite"]) == BAD_INPUT
    assert "must have the columns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda header: "", "got none"),
        (lambda header: header.replace("run,", "") + ",extra", "but lacks 'run' and has 'extra'"),
        (lambda header: f"{header},run", "in this order and once each"),
    ],
)
def test_wrong_columns_are_named(study, change, found):
    header, *lines = (study / "runs.csv").read_text().splitlines()
    (study / "runs.csv").write_text("\n".join([change(header), *lines, ""]))
    with pytest.raises(ValueError, match=f"must have the columns run, stage, .*, {found}$"):
        read_runs(study / "runs.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("class,a,b\na,1,2\n", "a row and a column"),
        ("class,a\na,x\n", "numbers of images"),
        ("class,a\na\n", "1 numbers in each row"),
    ],
)
def test_a_confusion_that_is_none(tmp_path, text, message):
    path = tmp_path / "confusion.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_confusion(path)


def test_classes_without_images_have_no_accuracy(tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text("class,images,correct,accuracy\na,2,1,0.5\nb,0,0,\n")
    assert read_classes(path) == {"a": (2, 0.5), "b": (0, None)}
    path.write_text("class,images\na,2\n")
    with pytest.raises(ValueError, match="columns class, images, accuracy"):
        read_classes(path)


def test_of_many_classes_the_confusions_are_listed(study):
    names = [f"kind {n}" for n in range(15)]
    rows = [
        [name, *(9 if i == j else 3 if (i, j) == (2, 7) else 0 for j in range(15))]
        for i, name in enumerate(names)
    ]
    lines = [",".join(map(str, row)) for row in [["class", *names], *rows]]
    (study / "runs" / "spt-deep-final-0" / "test-confusion.csv").write_text("\n".join(lines) + "\n")
    text = page_of(study)
    assert "<td>3 of 12</td>" in text
    assert "The other arm</summary>" in text
    assert ">kind 2</th>" in text


def study_of(tmp_path, rows) -> StudyFolder:
    return StudyFolder(tmp_path, tuple(rows), {})


def ends(section) -> list[str]:
    return re.findall(r'aria-label="(.*?)"', section.body)


def test_lengths_of_several_arms_are_one_line(tmp_path, make_row):
    rows = [
        make_row(f"{n}-{seed}", arm=f"spt-{n}", num_prompts=n, seed=seed, test_accuracy=0.5 + n / 100)
        for n in (5, 10, 50)
        for seed in (0, 1)
    ]
    # Another share is another line, of one point.
    rows.append(make_row("s", arm="s", num_prompts=100, options="share=0.5", test_accuracy=0.9))
    assert ends(lengths_section(study_of(tmp_path, rows))) == [
        "birds: test accuracy (%) against prompts per block; at the right end: spt-deep 100"
    ]
    assert lengths_section(study_of(tmp_path, rows[:2])) is None


def test_shares_do_not_mix_with_lengths(tmp_path, make_row):
    rows = [
        make_row("a", arm="a", options="share=0.1", test_accuracy=0.3),
        make_row("b", arm="b", test_accuracy=0.5),
        make_row("c", arm="c", num_prompts=50, test_accuracy=0.9),
    ]
    (found,) = ends(shares_section(study_of(tmp_path, rows)))
    assert found == "birds: test accuracy (%) against share; at the right end: spt-deep 50"


def test_arms_with_the_same_length_are_apart(tmp_path, make_row):
    rows = [
        make_row(f"{arm}-{n}", arm=arm, num_prompts=n, compared=f"num_prompts={n}", test_accuracy=accuracy)
        for arm, accuracy in (("plain", 0.5), ("other", 0.7))
        for n in (5, 10)
    ]
    (found,) = ends(lengths_section(study_of(tmp_path, rows)))
    assert found.endswith("plain 50, other 70")


def test_what_else_is_compared_has_lines_of_its_own(tmp_path, make_row):
    rows = [
        make_row(
            f"{n}-{schedule}",
            num_prompts=n,
            compared=f"num_prompts={n};schedule={schedule}",
            options=f"schedule={schedule}",
            test_accuracy=accuracy,
        )
        for n, schedule, accuracy in (
            (5, "cosine", 0.5),
            (20, "cosine", 0.7),
            (5, "constant", 0.6),
            (20, "constant", 0.55),
        )
    ]
    (found,) = ends(lengths_section(study_of(tmp_path, rows)))
    assert found.endswith("spt-deep, schedule cosine 70, spt-deep, schedule constant 55")


@pytest.mark.parametrize("other", [{"epochs": 100}, {"weight_decay": 0.1}, {"options": "schedule=constant"}])
def test_arms_that_differ_in_more_are_no_line(other, tmp_path, make_row):
    rows = [
        make_row("a", arm="a", num_prompts=5, test_accuracy=0.5),
        make_row("b", arm="b", num_prompts=20, test_accuracy=0.7, **other),
    ]
    assert lengths_section(study_of(tmp_path, rows)) is None
    rows[1] = replace(rows[0], run="b", arm="b", num_prompts=20)
    assert lengths_section(study_of(tmp_path, rows)) is not None


def test_a_run_that_diverged_does_not_cut_the_curves_of_others(study):
    whole = page_of(study)
    rows = read_runs(study / "runs.csv")
    lost = next(row for row in rows if row.run == "spt-deep-final-1")
    rows[rows.index(lost)] = replace(lost, loss=float("nan"), test_accuracy=None)
    write_runs(study / "runs.csv", rows)
    history = study / "runs" / lost.run / "train.csv"
    history.write_text("\n".join(history.read_text().splitlines()[:2]) + "\n")
    (study / "runs" / lost.run / "nmi.csv").unlink()
    texts = [
        re.findall(r'aria-label="(birds: training loss[^"]*)"', text) for text in (whole, page_of(study))
    ]
    assert texts[0]
    assert texts[0] == texts[1]


def test_the_validation_accuracy_is_that_of_the_values_that_were_chosen(study):
    rows = []
    for rate, accuracy in ((0.1, 0.9), (1.0, 0.6)):
        for row in read_runs(study / "runs.csv"):
            if row.arm == "spt-deep" and row.stage == "search":
                rows.append(
                    replace(
                        row,
                        run=f"{row.run}-{rate}",
                        options=f"prompt_lr={rate}",
                        prompt_lr=rate,
                        val_accuracy=accuracy if row.lr == 0.01 else 0.1,
                    )
                )
    final = next(row for row in read_runs(study / "runs.csv") if row.run == "spt-deep-final-0")
    rows.append(replace(final, lr=0.01, options="prompt_lr=0.1", prompt_lr=0.1))
    write_runs(study / "runs.csv", rows)
    values = page_of(study).partition('id="values"')[2].partition("</section>")[0]
    assert ">90.00<" in values
    assert ">60.00<" not in values


def test_of_a_searched_length_the_best_rate_counts(tmp_path, make_row):
    rows = [
        make_row(f"{n}-{lr}", stage="search", num_prompts=n, lr=lr, val_accuracy=lr)
        for n in (5, 10)
        for lr in (0.2, 0.4)
    ]
    (found,) = ends(lengths_section(study_of(tmp_path, rows)))
    assert found.startswith("birds: validation accuracy (%)")
    assert found.endswith("spt-deep 40")


def test_arms_keep_their_colours(make_row):
    rows = [make_row("a", arm="x", method="lora"), make_row("b", arm="y"), make_row("c", arm="z")]
    looks = looks_of(rows)
    assert looks["y"] == 0
    assert len({*looks.values()}) == 3
    assert looks_of(rows[1:])["y"] == 0


def test_pictures_are_the_patches_framed():
    """Two prompts, two patches of 1 x 1 within 3 x 3, each of its own colour."""
    pixels = torch.zeros(2, 2, 3, 3, 3)
    pixels[0, 0, 0], pixels[1, 1, 2] = 1, 1
    svg = patch_picture(pixels, 1, names=["1", "2"], mean=(0, 0, 0), std=(1, 1, 1), alt="what")
    kind, content = re.search(r"data:image/(\w+);base64,([^\"]+)", svg).groups()
    image = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (kind, image.size) == ("png", (6, 6))
    assert [image.getpixel(place) for place in ((1, 1), (4, 1), (4, 4))] == [
        (255, 0, 0),
        (0, 0, 0),
        (0, 0, 255),
    ]
    assert 'aria-label="what"' in svg
    # The first patch begins a third of 16 units into its picture.
    assert 'd="M10.3 5.333h5.33v5.33h-5.33z' in svg


def test_large_pictures_are_jpeg():
    pixels = torch.rand(4, 4, 3, 48, 48)
    svg = patch_picture(pixels, 0, names=list("1234"), mean=None, std=None, alt="")
    assert "data:image/jpeg" in svg
    assert "frame" not in svg
    assert len(svg) < 100_000


@pytest.fixture
def with_weights(study, make_random, monkeypatch):
    """The study with tuned prompts of a tiny model, which `open_model` gives, and 8 images."""
    model = make_random(num_classes=0)
    images = torch.randn(8, 3, 32, 32)
    loader = [(images[:4], torch.zeros(4)), (images[4:], torch.ones(4))]
    prototypes = spt_fast.build_prototypes(model, loader, num_prompts=4, progress=False)
    for seed in (0, 1):
        tuned = spt_fast.PromptedViT(model, prototypes, num_classes=2)
        with torch.no_grad():
            tuned.prompts.mul_(1.5)
        folder = study / "runs" / f"spt-deep-final-{seed}"
        tuned.save(folder / "tuned.safetensors")
        prototypes.save(folder / "prototypes.safetensors")
        tuned.release()
    monkeypatch.setattr(report_prompts, "open_model", lambda *names, **options: model)
    monkeypatch.setattr(report_prompts, "open_images", lambda *names, **options: loader)
    return study, prototypes, model


def test_prompts_are_shown_before_and_after_tuning(with_weights):
    study, _, model = with_weights
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = page_of(study, patches=True)
    assert sections(text)[-5:] == ["cka", "confusion", "classes", "patches", "cost"]
    # Three blocks, two moments.
    assert text.count("data:image/png") == 6
    assert "CKA of spt-deep, before tuning" in text
    assert text.count("moved its prompts by 50% of their length") == 3
    assert text == page_of(study, patches=True)
    # The model is as it was.
    assert [*before] == [*model.state_dict()]


def test_without_the_prototypes_of_the_study_there_is_no_before(with_weights):
    study, _, _ = with_weights
    (study / "runs/spt-deep-final-0/prototypes.safetensors").unlink()
    report = write_report(study, progress=False)
    (line,) = report.missing
    assert line.endswith("of birds: the prototypes that spt-deep-final-0 started from are not there")
    assert "patches" not in sections(report.path.read_text())


def test_the_page_stays_small(with_weights, monkeypatch):
    study, _, _ = with_weights
    whole = page_of(study, patches=True)
    room = (whole.index('id="cost"') - whole.index('id="patches"')) // 2
    monkeypatch.setattr("spt_fast.study.report.page._ROOM_FOR_PATCHES", room)
    report = write_report(study, progress=False)
    text = report.path.read_text()
    assert text.count('class="patches"') == 2
    assert "are left out, so that the page stays small" in report.missing[0]
    assert report.size < LARGEST_PAGE


@pytest.mark.parametrize("gone", ["open_model", "open_images"])
def test_model_or_data_that_are_gone(with_weights, monkeypatch, gone):
    study, _, _ = with_weights

    def fail(*names, **options):
        raise FileNotFoundError(f"there is no {gone} <here>")

    monkeypatch.setattr(report_prompts, gone, fail)
    report = write_report(study, progress=False)
    (line,) = report.missing
    assert line.startswith("no thumbnails, no CKA and no NMI before and after tuning")
    assert line.endswith(f"there is no {gone} <here>")
    text = report.path.read_text()
    assert f"there is no {gone} &lt;here&gt;" in text
    assert "patches" not in sections(text)


def test_weights_of_another_model_are_no_reason_to_fail(with_weights, make_random, monkeypatch):
    study, _, _ = with_weights
    other = make_random(num_classes=0, embed_dim=16)
    monkeypatch.setattr(report_prompts, "open_model", lambda *names, **options: other)
    report = write_report(study, progress=False)
    assert report.missing[0].startswith("no thumbnails, no CKA and no NMI before and after tuning of birds:")
    # It was given back.
    assert type(other.blocks[0]).__name__ == "Block"


def test_without_sweep_yaml_the_model_is_not_known(with_weights):
    study, _, _ = with_weights
    (study / "sweep.yaml").write_text("data: [birds]\n")
    report = write_report(study, progress=False)
    assert "sweep.yaml does not say which model it was" in report.missing[0]


def test_shared_prototypes_are_those_that_the_sweep_gave_the_run(study, make_row):
    """Of many files in the folder, the one that the run's own values name."""
    arms = {"spt-deep": {}, "cosine": {"method": "spt-deep", "prototypes": {"metric": "cosine"}}}
    asked = {"model": "tiny", "data": ["digits"], "arms": arms, "compare": {"per_class": [3, 5]}}
    found = {"backbone": {}, "tasks": {}, "versions": {}}
    (study / "sweep.yaml").write_text(write_yaml({**asked, **found}))
    runs = [run for group in Plan.read(asked).groups for run in group.final(None)]
    assert len({run.prototypes_name for run in runs}) == 4
    (study / "prototypes").mkdir()
    for run in runs:
        (study / "prototypes" / run.prototypes_name).touch()
    opened = StudyFolder.open(study)
    for run in runs:
        assert opened.prototypes_file(make_row(run.name)) == study / "prototypes" / run.prototypes_name
    (study / "prototypes" / runs[0].prototypes_name).unlink()
    assert opened.prototypes_file(make_row(runs[0].name)) is None
    assert opened.prototypes_file(make_row("of no plan")) is None
    own = study / "runs" / runs[0].name / "prototypes.safetensors"
    own.parent.mkdir()
    own.touch()
    assert opened.prototypes_file(make_row(runs[0].name)) == own


def test_runs_whose_folder_is_gone_are_named(study):
    shutil.rmtree(study / "runs" / "linear-final-0")
    (line,) = write_report(study, patches=False).missing
    assert line == "no confusion and no classes of linear-final-0: their tables are not there"


def test_of_many_names_there_are_some(study):
    rows = read_runs(study / "runs.csv")
    (final,) = [row for row in rows if row.run == "linear-final-0"]
    for number in range(9):
        rows.append(replace(final, run=f"other{number}-final-0", arm=f"other{number}"))
    write_runs(study / "runs.csv", rows)
    (line,) = write_report(study, patches=False).missing
    assert (
        "of other0-final-0, other1-final-0, other2-final-0, other3-final-0, other4-final-0 and 4 more:"
        in line
    )


def test_data_as_the_study_names_it(study):
    found = StudyFolder(study, (), {"root": "data", "data": ["a", {"data": "b", "split": "half"}]})
    assert (found.root, found.split("a"), found.split("b")) == ("data", None, "half")
    assert StudyFolder(study, (), {}).root is None


def test_runs_that_were_validated_once_have_no_curve(study):
    assert "Validation accuracy</h3>" in page_of(study)
    for path in (study / "runs").glob("*-0.*/train.csv"):
        path.write_text("epoch,loss,val_accuracy\n1,1.0,\n2,0.5,0.7\n")
    assert "Validation accuracy</h3>" not in page_of(study)
