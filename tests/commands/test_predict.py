"""`spt-fast predict`, and the tables of `eval`: what they write, where, and what they refuse."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spt_fast
from spt_fast.commands import main as cli
from spt_fast.data import shipped
from spt_fast.data.images import open_files
from spt_fast.support import files
from spt_fast.training import predict


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned model of three classes that nothing was learned for."""
    torch.manual_seed(0)
    model = spt_fast.PromptedViT(shipped.load_backbone(), 2, num_classes=3)
    model.class_names = ("even", "odd", "prime")
    path = tmp_path_factory.mktemp("tuned") / "t.safetensors"
    model.save(path)
    return path


def run(command: str, tuned: Path, *arguments: object) -> int:
    base = [command, "--model", "shipped", "--tuned", tuned, "--workers", 0, *arguments]
    return cli.main([str(argument) for argument in base])


def test_predictions_go_to_standard_output_and_nothing_else_does(tuned, folders, capsys):
    data = [folders / "odd", folders / "flat" / "0.png"]
    assert run("predict", tuned, "--top-k", 2, "--batch-size", 5, *data) == 0
    printed = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    model = spt_fast.PromptedViT.from_file(tuned, shipped.load_backbone())
    expected = list(predict(model, open_files(data, model.model, workers=0), top_k=2))
    assert [row["file"] for row in rows] == [item.file for item in expected]
    assert [(row["class"], row["class_2"]) for row in rows] == [item.classes for item in expected]
    found = [float(row[name]) for row in rows for name in ("probability", "probability_2")]
    assert found == pytest.approx([value for item in expected for value in item.probabilities], rel=1e-4)
    assert f"images: {len(rows)} images\n" in printed.err


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_the_tuned_file_is_opened_once(command, tuned, folders, monkeypatch):
    """A file on a network is not read again for its pooling or its preprocessing."""
    opened = []
    safe_open = files.safe_open
    monkeypatch.setattr(
        files, "safe_open", lambda *given, **how: opened.append(given) or safe_open(*given, **how)
    )
    data = ("--data", folders / "odd") if command == "eval" else (folders / "odd",)
    assert run(command, tuned, *data) == 0
    assert opened.count((tuned,)) == 1


def test_predictions_go_to_a_file(tuned, folders, tmp_path, capsys, only_error):
    out = tmp_path / "p.jsonl"
    assert run("predict", tuned, folders / "odd", "--out", out) == 0
    assert capsys.readouterr().out == ""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == len(list((folders / "odd" / "odd").iterdir()))
    assert f"{out} exists already" in only_error(
        run("predict", tuned, folders / "odd", "--out", out), "predict"
    )
    again = ("--out", out, "--overwrite", "--format", "csv")
    assert run("predict", tuned, folders / "odd", *again) == 0
    assert out.read_text().startswith("file,class,probability\n")


def test_a_file_is_written_whole_or_not_at_all(tuned, folders, tmp_path, capsys, only_error):
    broken = tmp_path / "broken.png"
    broken.write_bytes((folders / "flat" / "0.png").read_bytes()[:70])
    arguments = (folders / "flat", broken, "--batch-size", 1, "--out", tmp_path / "p.csv")
    assert "broken.png cannot be read" in only_error(run("predict", tuned, *arguments), "predict")
    assert list(tmp_path.iterdir()) == [broken]
    assert run("predict", tuned, *arguments, "--bad-images", "skip") == 0
    assert f"  {broken} (" in capsys.readouterr().err
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 2


def test_output_of_a_pipe_is_clean(tuned, folders, child_environment):
    """Without a terminal, without standard input, and where nothing but ASCII can be printed."""
    command = [sys.executable, "-m", "spt_fast", "predict", "--model", "shipped", "--tuned", str(tuned)]
    done = subprocess.run(
        [*command, "--workers", "0", str(folders / "flat")],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=folders,
        env={**child_environment, "PYTHONIOENCODING": "ascii"},
        check=True,
    )
    header, line, end = done.stdout.split(b"\n")
    assert (header, end) == (b"file,class,probability", b"")
    assert line.startswith(os.fsencode(folders / "flat" / "0.png") + b",")


def test_classes_without_names_are_numbers(folders, tmp_path, capsys):
    torch.manual_seed(0)
    spt_fast.PromptedViT(shipped.load_backbone(), 2, num_classes=3).save(tmp_path / "t.safetensors")
    assert run("predict", tmp_path / "t.safetensors", folders / "flat") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[1].split(",")[1] in ("0", "1", "2")
    assert "does not name its classes; they are given by number" in printed.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("no_such_file",), "there is no file or folder no_such_file"),
        (("{flat}", "--top-k", "0"), "top_k must be an integer >= 1, got 0"),
        (("{flat}", "--top-k", "4"), "top_k must be at most 3, the number of classes, got 4"),
        (("{flat}", "--overwrite"), "overwrite is for a file, but out is standard output"),
        (("{flat}", "--out", "{missing}"), "missing does not exist"),
    ],
    ids=" ".join,
)
def test_bad_input_of_predict_is_one_line(arguments, expected, tuned, folders, tmp_path, only_error, capsys):
    places = {"{flat}": folders / "flat", "{missing}": tmp_path / "missing" / "p.csv"}
    given = [places.get(argument, argument) for argument in arguments]
    code = run("predict", tuned, *given)
    printed = capsys.readouterr()
    assert printed.out == ""
    sys.stderr.write(printed.err)
    assert expected in only_error(code, "predict")


def table(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a CSV file by their class."""
    return {row["class"]: row for row in csv.DictReader(io.StringIO(path.read_text()))}


def test_eval_names_classes_of_which_no_image_can_be_read(tuned, folders, tmp_path, capsys):
    shutil.copytree(folders / "train", tmp_path / "train")
    (tmp_path / "train" / "prime").mkdir()
    shutil.copy(folders / "flat" / "0.png", tmp_path / "train" / "prime" / "good.png")
    for path in (tmp_path / "train" / "odd").iterdir():
        path.write_bytes(path.read_bytes()[:40])
    assert run("eval", tuned, "--data", tmp_path / "train", "--bad-images", "skip") == 0
    assert "classes without readable images (1): odd\n" in capsys.readouterr().out


def test_eval_writes_tables_and_names_classes_without_images(tuned, folders, tmp_path, capsys, only_error):
    out = tmp_path / "out"
    assert run("eval", tuned, "--data", folders / "train", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "classes without images (1): prime\n" in printed
    assert f"wrote {out / 'classes.csv'}\nwrote {out / 'confusion.csv'}\n" in printed
    classes = table(out / "classes.csv")
    assert classes["prime"] == {"class": "prime", "images": "0", "correct": "0", "accuracy": ""}
    # By `predict`: which images of which folder it takes for which class.
    assert run("predict", tuned, folders / "train") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    pairs = [(Path(row["file"]).parent.name, row["class"]) for row in rows]
    matrix = table(out / "confusion.csv")
    for label in ("even", "odd", "prime"):
        counted = {name: int(count) for name, count in matrix[label].items() if name != "class"}
        assert counted == {name: pairs.count((label, name)) for name in classes}
        assert int(classes[label]["correct"]) == pairs.count((label, label))
    error = only_error(run("eval", tuned, "--data", folders / "train", "--out", out), "eval")
    assert "classes.csv exists already" in error
    error = only_error(run("eval", tuned, "--data", folders / "train", "--overwrite"), "eval")
    assert "overwrite is for the files of out, but no folder is given" in error
