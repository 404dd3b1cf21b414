"""`spt-fast prototypes`: what it writes, which options reach it, and what it refuses."""

from __future__ import annotations

import shutil

import pytest
import torch

from spt_fast.commands import main as cli
from spt_fast.data import shipped
from spt_fast.prototypes.result import Prototypes


def prototypes(*arguments: object) -> int:
    return cli.main(["prototypes", *map(str, arguments)])


def of_digits(out: object, *arguments: object) -> int:
    """Prototypes of shipped digits for the shipped backbone."""
    return prototypes("--model", "shipped", "--data", "digits", "--out", out, *arguments)


def test_prototypes_of_a_folder(folders, tmp_path, capsys):
    out = tmp_path / "prototypes.safetensors"
    code = prototypes(
        *("--model", "shipped", "--data", folders / "train", "--out", out, "--num-prompts", 3),
        *("--batch-size", 5, "--workers", 0, "--seed", 5),
    )
    assert code == 0
    built = Prototypes.load(out)
    depth, width = (shipped.backbone_facts()["architecture"][key] for key in ("depth", "embed_dim"))
    assert built.prompts.shape == (depth, 3, width)
    assert built.num_images == 24
    printed = capsys.readouterr().out
    assert printed.startswith(f"images: {folders / 'train'}: 24 images in 2 folders, ")
    assert "images: transform: --resize model (" in printed
    assert f"\n{out}: {depth} x 3 prompts of width {width}\n24 images in " in printed
    assert "images/s" in printed
    for block, distance in enumerate(built.mean_squared_distance.tolist(), start=1):
        assert f"block {block:2d}: mean squared distance per token {distance:.4g}\n" in printed


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (("--strategy", "mean"), {"strategy": "mean"}),
        (("--metric", "cosine"), {"strategy": "kmeans", "metric": "cosine"}),
        (("--strategy", "random", "--seed", 3), {"strategy": "random", "seed": "3"}),
        (("--mode", "exact"), {"mode": "exact"}),
        (("--depth", "shallow"), {"prompt_depth": "shallow"}),
        (("--capacity", 600), {"mode": "stream", "capacity": "600"}),
        (("--mode", "exact", "--init", "uniform", "--n-init", 2), {"init": "uniform", "n_init": "2"}),
        (("--strategy", "mean", "--sampling", "all"), {"sampling": "all"}),
        (("--no-position-embedding",), {"position_embedding": "False"}),
        (("--block", 2), {"layer": "1"}),
        (("--last-output",), {"layer": "last_output"}),
    ],
    ids=lambda options: "-".join(map(str, options)).strip("-") if isinstance(options, tuple) else "",
)
def test_options_reach_the_file(options, facts, tmp_path):
    out = tmp_path / "prototypes.safetensors"
    assert of_digits(out, "--num-prompts", 4, "--batch-size", 10, "--max-images", 12, *options) == 0
    built = Prototypes.load(out)
    assert built.metadata.items() >= facts.items()
    assert built.prompts.shape[:2] == (1 if "shallow" in options else 6, 4)
    assert built.num_images == 12 or built.metadata["strategy"] != "kmeans"


def test_several_lengths_come_from_one_pass(tmp_path, capsys):
    base = ("--max-images", 12, "--batch-size", 6)
    assert of_digits(tmp_path / "p.safetensors", "--num-prompts", 1, 6, 3, *base) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {f"p-{n}.safetensors" for n in (1, 3, 6)}
    built = {n: Prototypes.load(tmp_path / f"p-{n}.safetensors") for n in (1, 3, 6)}
    for length, found in built.items():
        assert found.prompts.shape[:2] == (6, length)
        assert f"p-{length}.safetensors: 6 x {length} prompts" in printed
        assert found.metadata == built[1].metadata
    assert of_digits(tmp_path / "alone.safetensors", "--num-prompts", 6, *base) == 0
    alone = Prototypes.load(tmp_path / "alone.safetensors")
    assert torch.equal(alone.prompts, built[6].prompts)
    assert alone.metadata == built[6].metadata


def test_every_file_of_several_lengths_is_checked_first(tmp_path, only_error):
    (tmp_path / "p-5").write_text("mine")
    code = of_digits(tmp_path / "p", "--num-prompts", 1, 5, "--max-images", 8)
    assert "p-5 exists already" in only_error(code, "prototypes")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"p-5": "mine"}


@pytest.mark.parametrize("option", [("--block", 2), ("--last-output",)], ids=str)
def test_several_lengths_of_one_layer(option, tmp_path):
    assert of_digits(tmp_path / "p", "--num-prompts", 2, 4, "--max-images", 8, *option) == 0
    for length in (2, 4):
        prompts = Prototypes.load(tmp_path / f"p-{length}").prompts
        assert prompts.shape[:2] == (6, length)
        assert torch.equal(prompts, prompts[:1].expand_as(prompts))


def test_a_file_with_the_sample_gives_other_lengths(tmp_path):
    base = ("--num-prompts", 2, "--max-images", 8)
    assert of_digits(tmp_path / "with", *base, "--with-sample") == 0
    assert of_digits(tmp_path / "without", *base) == 0
    assert Prototypes.load(tmp_path / "with").select(5).prompts.shape[:2] == (6, 5)
    with pytest.raises(ValueError, match="save with with_sample=True"):
        Prototypes.load(tmp_path / "without").select(5)


def test_memory_budget_of_exact_mode_changes_no_result(tmp_path):
    """Without any memory for tokens, all of them go through the temporary file."""
    base = ("--mode", "exact", "--num-prompts", 2, "--max-images", 4)
    assert of_digits(tmp_path / "in_memory", *base) == 0
    assert of_digits(tmp_path / "in_a_file", *base, "--memory-budget", "0 kB") == 0
    first, second = (Prototypes.load(tmp_path / name) for name in ("in_memory", "in_a_file"))
    torch.testing.assert_close(first.prompts, second.prompts)


def test_unreadable_images_are_an_error_or_left_out(folders, tmp_path, only_error, capsys):
    data, out = shutil.copytree(folders / "odd", tmp_path / "data"), tmp_path / "p.safetensors"
    first, *rest = sorted((data / "odd").iterdir())
    # A name that is no UTF-8.
    broken = first.rename(data / "odd" / "\udcff.png")
    broken.write_bytes(b"nothing")
    base = ("--model", "shipped", "--data", data, "--out", out, "--num-prompts", 2, "--workers", 0)
    assert "odd/\\udcff.png cannot be read (cannot identify" in only_error(prototypes(*base), "prototypes")
    assert prototypes(*base, "--bad-images", "skip") == 0
    assert Prototypes.load(out).num_images == len(rest)
    listed = f"left out 1 images that cannot be read:\n  {data}/odd/\\udcff.png (cannot"
    assert listed in capsys.readouterr().out


def test_prototypes_of_a_timm_model_with_random_weights(folders, tmp_path):
    out = tmp_path / "p.safetensors"
    base = ("--data", folders / "odd", "--out", out, "--num-prompts", 2, "--workers", 0, "--max-images", 2)
    assert prototypes("--model", "test_vit", "--no-pretrained", *base) == 0
    assert "test_vit" in " ".join(Prototypes.load(out).metadata.values())


def test_prototypes_with_a_checkpoint(folders, tmp_path):
    import timm

    checkpoint, out = tmp_path / "weights.pth", tmp_path / "p.safetensors"
    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), checkpoint)
    base = ("--data", folders / "odd", "--out", out, "--num-prompts", 2, "--workers", 0, "--max-images", 2)
    assert prototypes("--model", "test_vit", "--checkpoint", checkpoint, *base) == 0


def test_checkpoint_of_another_model_is_refused(tmp_path, only_error):
    import timm

    checkpoint = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_vit2").state_dict(), checkpoint)
    code = of_digits(tmp_path / "p", "--model", "test_vit", "--checkpoint", checkpoint)
    assert "weights.pth does not fit this model" in only_error(code, "prototypes")


def test_damaged_checkpoint_is_refused(tmp_path, only_error):
    checkpoint = tmp_path / "weights.safetensors"
    checkpoint.write_bytes(b"not weights")
    code = of_digits(tmp_path / "p", "--model", "test_vit", "--checkpoint", checkpoint)
    assert "cannot be read" in only_error(code, "prototypes")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--data": "no_such_folder"}, "there is no folder no_such_folder"),
        ({"--data": "{tmp}"}, "holds no image (files that are not named as images (1): taken.txt)"),
        ({"--num-prompts": "99999999"}, "at most the number of patch tokens, 57408 per layer (897 images"),
        (
            {"--num-prompts": "700", "--strategy": "max", "--batch-size": "10"},
            "at most the number of patch tokens, 640 per layer (10 images in a batch with 64 patches each)",
        ),
        (
            {"--num-prompts": "700", "--strategy": "random", "--sampling": "all", "--max-images": "10"},
            "at most the number of patch tokens, 640 per layer (10 images with 64 patches each)",
        ),
        (
            {"--num-prompts": "66", "--strategy": "mean", "--sampling": "all", "--max-images": "10"},
            "num_prompts must be at most 65 for windows of single images, which have 64 patch tokens, got 66",
        ),
        (
            {"--num-prompts": "700", "--max-images": "10"},
            "at most the number of patch tokens, 640 per layer (10 images with 64 patches each)",
        ),
        (
            {"--model": "vit_bse_patch16_224"},
            "timm has no model named 'vit_bse_patch16_224'; close names: vit_base",
        ),
        ({"--model": "no/such/file.safetensors"}, "there is no file no/such/file.safetensors"),
        ({"--checkpoint": "no_such_file.pth"}, "there is no file no_such_file.pth"),
        ({"--out": "{tmp}/missing/p.safetensors"}, "missing does not exist"),
        (
            {"--out": "{tmp}/taken.txt"},
            "or write over it (overwrite=True, --overwrite)",
        ),
        ({"--batch-size": "0"}, "batch_size must be an integer >= 1, got 0"),
        ({"--workers": "-1"}, "workers must be an integer >= 0, got -1"),
        ({"--num-prompts": "0"}, "num_prompts must be"),
        ({"--max-images": "0"}, "max_images must be"),
        ({"--block": "7"}, "--block must be a block with prompts, 1 to 6, got 7"),
        ({"--max-images": "1", "--num-prompts": "65"}, "64 per layer"),
        ({"--max-images": "1", "--num-prompts": "2 65"}, "64 per layer"),
        ({"--num-prompts": "0 5"}, "num_prompts must be an integer >= 1, got 0"),
        ({"--num-prompts": "5 3 5"}, "--num-prompts must be different lengths, got 5 3 5"),
        ({"--num-prompts": "1 5", "--mode": "exact"}, "several --num-prompts must come from the sample"),
        ({"--num-prompts": "1 5", "--strategy": "mean"}, "got --strategy mean --mode stream"),
        ({"--with-sample": "", "--mode": "exact"}, "--with-sample must come from the sample"),
        ({"--with-sample": "", "--block": "1"}, "--with-sample must come without --block"),
        ({"--mode": "exact", "--memory-budget": "lots"}, "memory_budget must be a number with a unit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(changes, expected, tmp_path, only_error):
    (tmp_path / "taken.txt").write_text("mine")
    options = {"--model": "shipped", "--data": "digits", "--out": "{tmp}/p.safetensors"} | changes
    arguments = [part for option, values in options.items() for part in (option, *values.split())]
    code = prototypes(*(part.replace("{tmp}", str(tmp_path)) for part in arguments))
    assert expected in only_error(code, "prototypes")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.txt"]
    assert (tmp_path / "taken.txt").read_text() == "mine"


@pytest.mark.parametrize(("strategy", "length"), [("random", 400), ("mean", 65)])
def test_prompts_from_all_images_may_be_more_than_a_batch_has(strategy, length, tmp_path):
    """A batch of five images has 320 tokens; one of one image has 64."""
    batch = "5" if strategy == "random" else "1"
    options = ("--strategy", strategy, "--sampling", "all", "--num-prompts", length, "--batch-size", batch)
    assert of_digits(tmp_path / "p.safetensors", *options, "--max-images", "10") == 0
    assert Prototypes.load(tmp_path / "p.safetensors").prompts.shape[1] == length


def test_weights_that_cannot_be_fetched_name_the_ways_out(tmp_path, only_error, monkeypatch):
    import timm

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("name resolution failed\nand a long story")

    monkeypatch.setattr(timm, "create_model", no_network)
    error = only_error(of_digits(tmp_path / "p", "--model", "test_vit"), "prototypes")
    assert "pretrained weights of test_vit could not be had (name resolution failed)" in error
    assert "--checkpoint" in error
    assert "--no-pretrained" in error


def test_model_without_blocks_is_refused(tmp_path, only_error):
    code = of_digits(tmp_path / "p", "--model", "test_convnext", "--no-pretrained")
    assert "`.blocks`" in only_error(code, "prototypes")


def test_overwrite_is_honoured(tmp_path):
    out = tmp_path / "p.safetensors"
    out.write_text("old")
    base = (out, "--num-prompts", 2, "--max-images", 4)
    assert of_digits(*base) == cli.BAD_INPUT
    assert out.read_text() == "old"
    assert of_digits(*base, "--overwrite") == 0
    assert Prototypes.load(out).prompts.shape[1] == 2
