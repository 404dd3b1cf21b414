"""`python -m benchmarks.report`: a hand-made JSON file of pytest-benchmark to tables, plots and ratios."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "report.py"


@pytest.fixture(scope="module")
def report():
    # By its path: the folder is not installed with the package.
    spec = importlib.util.spec_from_file_location("benchmarks_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def benchmark(group, side, median, **extra):
    return {
        "group": group,
        "name": f"test_it[{side}-20]",
        "params": {"side": side, "clusters": 20},
        "extra_info": {"threads": 2, **extra},
        "stats": {"median": median, "iqr": median / 10, "rounds": 7},
    }


@pytest.fixture
def results(tmp_path):
    content = {
        "machine_info": {"cpu": {"brand_raw": "a fast one"}, "python_version": "3.11.9"},
        "datetime": "2026-11-23T10:00:00",
        "benchmarks": [
            benchmark("pass, K=20", "spt_fast", 0.004, peak="1 MiB"),
            benchmark("pass, K=20", "pytorch", 0.010, peak="9 MiB"),
            benchmark("no ours", "a", 3.0),
            benchmark("no ours", "b", 2.0),
            {**benchmark(None, "alone", 5e-6), "params": None},
        ],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(content))
    return path


def test_tables_hold_medians_and_ratios(report, results, capsys):
    assert report.main([str(results)]) == 0
    printed = capsys.readouterr().out
    assert "a fast one, Python 3.11.9, 2026-11-23T10:00:00" in printed
    for line in (
        "## pass, K=20",
        "threads 2",
        "| side | median ms | ± ms | time / spt_fast | rounds | peak |",
        "| spt_fast | 4 | 0.2 | 1.00 | 7 | 1 MiB |",
        "| pytorch | 10 | 0.5 | 2.50 | 7 | 9 MiB |",
        "| side | median s | ± s | time / b | rounds |",
        "| a | 3 | 0.15 | 1.50 | 7 |",
        "| test_it[alone-20] | 5 | 0.25 | 1.00 | 7 |",
    ):
        assert line in printed.splitlines()


def test_another_baseline(report, results, capsys):
    assert report.main([str(results), "--baseline", "pytorch"]) == 0
    printed = capsys.readouterr().out
    assert "| spt_fast | 4 | 0.2 | 0.40 | 7 | 1 MiB |" in printed
    assert "time / b" in printed


def test_folder_gets_the_report_and_a_plot_per_group(report, results, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert report.main([str(results), "--out", str(out)]) == 0
    names = ["no_group.png", "no_ours.png", "pass_k_20.png", "report.md"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "pass_k_20.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "report.md").read_text() in capsys.readouterr().out
    assert report.main([str(results), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert report.main([str(results), "--out", str(out), "--overwrite"]) == 0


def test_several_files_keep_their_groups_apart(report, results, tmp_path, capsys):
    other = tmp_path / "gpu.json"
    other.write_text(results.read_text())
    out = tmp_path / "out"
    out.mkdir()
    assert report.main([str(results), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("## pass, K=20") == 2
    assert (out / "gpu_pass_k_20.png").exists()
    assert (out / "bench_pass_k_20.png").exists()


def test_titles_that_make_one_file_name_are_numbered(report, results, tmp_path):
    content = json.loads(results.read_text())
    content["benchmarks"].append(benchmark("Pass, K=20!", "spt_fast", 0.004))
    results.write_text(json.dumps(content))
    out = tmp_path / "out"
    out.mkdir()
    assert report.main([str(results), "--out", str(out)]) == 0
    assert {"pass_k_20.png", "pass_k_20_2.png"} <= {path.name for path in out.iterdir()}


def test_without_matplotlib_the_tables_are_still_written(report, results, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "out"
    out.mkdir()
    assert report.main([str(results), "--out", str(out)]) == 0
    assert [path.name for path in out.iterdir()] == ["report.md"]
    assert "spt_fast[plots]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("not json", "was not written by pytest-benchmark"),
        ("[]", "was not written by pytest-benchmark"),
        ('{"benchmarks": [{"name": "x"}]}', "was not written by pytest-benchmark"),
        ('{"benchmarks": []}', "holds no benchmark"),
    ],
)
def test_unusable_file_is_one_line(report, content, message, tmp_path, capsys):
    path = tmp_path / "bench.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.report: error: ")
    assert message in error
    assert len(error.splitlines()) == 1
