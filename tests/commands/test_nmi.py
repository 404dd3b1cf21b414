"""`spt-fast nmi`: what it writes, against the library, and what it refuses."""

from __future__ import annotations

import sys

import pytest
import torch

import spt_fast
from spt_fast.commands import main as cli
from spt_fast.data import shipped
from spt_fast.data.images import open_images
from spt_fast.prototypes.result import Prototypes
from spt_fast.support.tables import read_csv


def nmi(*arguments: object) -> int:
    return cli.main(["nmi", "--model", "shipped", "--data", "digits", *map(str, arguments)])


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory):
    """Prompts for the shipped backbone, as each command or method writes them."""
    folder = tmp_path_factory.mktemp("prompts")
    model = shipped.load_backbone()
    batches = [shipped.load_digits("train")[0][:20]]
    files = {}
    for depth in ("deep", "shallow"):
        built = spt_fast.build_prototypes(model, batches, num_prompts=4, depth=depth, progress=False)
        files[f"{depth} prototypes"] = folder / f"{depth}.safetensors"
        built.save(files[f"{depth} prototypes"])
        tuned = spt_fast.PromptedViT(model, built, depth=depth, num_classes=10)
        files[f"{depth} tuned"] = folder / f"{depth}_tuned.safetensors"
        tuned.save(files[f"{depth} tuned"])
        tuned.release()
    return files


@pytest.mark.parametrize("kind", ["deep prototypes", "deep tuned", "shallow prototypes", "shallow tuned"])
def test_nmi_of_a_file_is_that_of_its_prompts(kind, prompt_files, tmp_path, capsys):
    assert nmi("--prompts", prompt_files[kind], "--max-images", 10, "--batch-size", 4, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "10 images" in printed
    assert (tmp_path / "nmi.png").read_bytes().startswith(b"\x89PNG")
    stored = read_csv(tmp_path / "nmi.csv", ("step", "block", "nmi"))
    assert [row[:2] for _, row in stored] == [(0, layer) for layer in range(1, 7)]
    model = shipped.load_backbone()
    depth = kind.split()[0]
    prompts = Prototypes.load(prompt_files[f"{depth} prototypes"])
    images = torch.cat([batch[0] for batch in open_images("digits", model, batch_size=4)])[:10]
    tuned = spt_fast.PromptedViT(model, prompts, depth=depth, num_classes=0)
    # A float32 forward pass in other batches; NMI itself is float64 inside.
    expected = tuned.layer_nmi(images).double().mean(dim=1)
    measured = torch.tensor([row[2] for _, row in stored], dtype=torch.float64)
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-7)


def test_nmi_writes_cka_with_the_largest_on_the_diagonal(prompt_files, tmp_path, capsys):
    base = ("--prompts", prompt_files["deep prototypes"], "--out", tmp_path, "--max-images", 12)
    assert nmi(*base) == 0
    stored = read_csv(tmp_path / "cka.csv", ("prompt_block", "token_block", "cka"))
    assert [row[:2] for _, row in stored] == [(i, j) for i in range(1, 7) for j in range(1, 7)]
    values = torch.tensor([row[2] for _, row in stored]).reshape(6, 6)
    assert values.argmax(dim=1).tolist() == list(range(6))
    row = f"{values[2, 2]:.3f}"
    assert row in capsys.readouterr().out
    assert nmi(*base) == cli.BAD_INPUT
    assert "nmi.csv exists already" in capsys.readouterr().err
    assert nmi(*base, "--overwrite") == 0


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_nmi_of_random_prompts_follows_the_seed(depth, tmp_path):
    found = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        base = ("--random", 5, "--depth", depth, "--max-images", 4, "--out", tmp_path / name)
        assert nmi(*base, "--seed", seed, "--batch-size", 4) == 0
        found.append((tmp_path / name / "nmi.csv").read_text())
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--prompts": "no_such_file"}, "there is no file no_such_file"),
        ({"--prompts": "{tmp}/taken.txt"}, "not a safetensors file"),
        ({"--random": "0"}, "at least one prompt per block"),
        ({"--random": "-1"}, "prompts must be an integer >= 0, got -1"),
        ({"--random": "3", "--max-images": "0"}, "max_images must be"),
        ({"--random": "0", "--out": "{tmp}/missing/folder"}, "at least one prompt per block"),
        ({"--random": "3", "--out": "{tmp}/taken.txt/folder"}, "out must be a folder"),
        ({"--random": "3", "--out": "{tmp}/taken.txt"}, "out must be a folder"),
        ({"--random": "3", "--data": "no_such_folder"}, "there is no folder no_such_folder"),
        ({"--random": "3", "--model": "vit_bse"}, "timm has no model named 'vit_bse'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(changes, expected, tmp_path, only_error):
    (tmp_path / "taken.txt").write_text("mine")
    options = {"--model": "shipped", "--data": "digits", "--out": "{tmp}"} | changes
    arguments = [part.replace("{tmp}", str(tmp_path)) for pair in options.items() for part in pair]
    assert expected in only_error(cli.main(["nmi", *arguments]), "nmi")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.txt"]


@pytest.mark.parametrize("kind", ["deep prototypes", "shallow tuned"])
def test_prompts_of_another_backbone_are_refused(kind, prompt_files, tmp_path, only_error):
    options = ("--model", "test_vit", "--no-pretrained", "--out", tmp_path)
    code = nmi(*options, "--prompts", prompt_files[kind])
    assert "is for width '" in only_error(code, "nmi")
    assert list(tmp_path.iterdir()) == []


def test_nmi_without_matplotlib_writes_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert nmi("--random", 2, "--max-images", 2, "--out", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cka.csv", "nmi.csv"]
