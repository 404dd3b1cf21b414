"""`--pool` and `--norm`: `train` takes the paper's form for MAE, `eval` and `predict` that of the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spt_fast.commands import main as cli
from spt_fast.support.files import read_safetensors, write_safetensors

MODEL = ("--model", "vit_base_patch16_224.mae", "--no-pretrained", "--img-size", "32", "--workers", "0")
SMALL = ("--model-option", "depth=1", "--model-option", "embed_dim=32", "--model-option", "num_heads=2")


def spt_fast(command: str, *arguments: object) -> int:
    return cli.main([command, *MODEL, *SMALL, *map(str, arguments)])


def facts_of(path: Path) -> dict[str, str]:
    facts = read_safetensors(path, kind="prompted_vit")[1]
    return {name: facts.get(name, "") for name in ("global_pool", "pool_prompts", "norm")}


@pytest.fixture(scope="module")
def train(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def run(*form: str) -> Path:
        out = tmp_path_factory.mktemp("tuned")
        data = ("--data", folders / "train", "--epochs", 1, "--num-prompts", 2, "--out", out)
        assert spt_fast("train", *form, *data) == 0
        return out / "tuned.safetensors"

    return run


def test_train_takes_the_papers_form_and_eval_and_predict_that_of_the_file(
    train: Callable[..., Path], folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = train()
    assert facts_of(paper) == {"global_pool": "avg", "pool_prompts": "True", "norm": "own"}
    assert "the paper's for MAE" in capsys.readouterr().err
    vpt = train("--pool", "avg-with-prompts", "--norm", "new")
    assert facts_of(vpt) == {"global_pool": "avg", "pool_prompts": "True", "norm": "new"}
    for tuned in (paper, vpt):
        assert spt_fast("eval", "--tuned", tuned, "--data", folders / "train") == 0
        assert spt_fast("predict", "--tuned", tuned, folders / "odd") == 0


@pytest.mark.parametrize("form", [("--pool", "token"), ("--norm", "new"), ("--pool", "avg")], ids=str)
def test_another_form_is_refused_with_both_named(
    form: tuple[str, str], train: Callable[..., Path], folders: Path, only_error: Callable[..., str]
) -> None:
    tuned = train()
    line = only_error(spt_fast("eval", *form, "--tuned", tuned, "--data", folders / "train"), "eval")
    assert "is for pool='avg-with-prompts', norm='own', but this model was opened with pool=" in line
    assert f"{form[0][2:]}={form[1]!r}" in line


def test_files_of_before_are_opened_as_they_were(
    train: Callable[..., Path], folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They state no norm, and MAE had its class token."""
    tensors, facts = read_safetensors(train("--pool", "token"), kind="prompted_vit")
    del facts["norm"]
    write_safetensors(tmp_path / "old.safetensors", tensors, facts, kind="prompted_vit")
    capsys.readouterr()
    assert spt_fast("eval", "--tuned", tmp_path / "old.safetensors", "--data", folders / "train") == 0
    assert "pooling" not in capsys.readouterr().err
