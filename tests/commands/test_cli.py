"""The command line as a user calls it: results, one-line errors with exit code 2, Ctrl-C with 130."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import spt_fast
from spt_fast.commands import demo
from spt_fast.commands import main as cli
from spt_fast.data import shipped as samples
from spt_fast.data.images import open_images
from spt_fast.ops import kmeans_native
from spt_fast.prototypes.result import Prototypes
from spt_fast.support.tables import read_csv

# timm leaves closing the files it reads to the garbage collector.
timm_leaves_files_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture
def image_folder(tmp_path):
    """Fourteen shipped digits as PNG files in two sub-folders; a batch of four does not divide them."""
    from torchvision.utils import save_image

    images, labels = samples.load_digits("train")
    for index in range(14):
        folder = tmp_path / "images" / str(int(labels[index]) % 2)
        folder.mkdir(parents=True, exist_ok=True)
        save_image(images[index], folder / f"{index}.png", normalize=True)
    return tmp_path / "images"


def prototypes(*arguments: object) -> int:
    return cli.main(["prototypes", *map(str, arguments)])


def only_error(capsys, code: int, command: str = "prototypes") -> str:
    """The one line, after any progress bar, on stderr of a command that failed with exit code 2."""
    errors = capsys.readouterr().err
    assert code == cli.BAD_INPUT
    assert "Traceback" not in errors
    assert errors.count("error:") == 1
    line = errors.strip().splitlines()[-1]
    assert line.startswith(f"spt-fast {command}: error: ")
    return line


@timm_leaves_files_open
def test_prototypes_of_a_folder(image_folder, tmp_path, capsys):
    out = tmp_path / "prototypes.safetensors"
    code = prototypes(
        *("--model", "shipped", "--data", image_folder, "--out", out, "--num-prompts", 3),
        *("--batch-size", 4, "--workers", 0, "--seed", 5),
    )
    assert code == 0
    built = Prototypes.load(out)
    depth, width = (samples.backbone_facts()["architecture"][key] for key in ("depth", "embed_dim"))
    assert built.prompts.shape == (depth, 3, width)
    assert built.num_images == 14
    printed = capsys.readouterr().out
    assert "14 images in" in printed
    assert "images/s" in printed
    assert printed.count("mean squared distance per token") == depth


@pytest.mark.parametrize(
    "options",
    [
        ("--strategy", "mean"),
        ("--strategy", "random"),
        ("--mode", "exact"),
        ("--depth", "shallow"),
        ("--capacity", 600, "--max-images", 12),
    ],
    ids=lambda options: "-".join(map(str, options)).strip("-"),
)
def test_prototypes_options_reach_the_file(options, tmp_path):
    out = tmp_path / "prototypes.safetensors"
    base = ("--model", "shipped", "--data", "digits", "--out", out, "--num-prompts", 4, "--batch-size", 10)
    assert prototypes(*base, *(() if "--max-images" in options else ("--max-images", 20)), *options) == 0
    built = Prototypes.load(out)
    assert built.prompts.shape[1] == 4
    assert (
        built.num_images == (12 if "--capacity" in options else 20) or built.metadata["strategy"] != "kmeans"
    )
    assert built.prompts.shape[0] == (1 if "shallow" in options else 6)


@timm_leaves_files_open
def test_prototypes_of_a_timm_model_with_random_weights(image_folder, tmp_path):
    out = tmp_path / "prototypes.safetensors"
    base = ("--data", image_folder, "--out", out, "--num-prompts", 2, "--workers", 0, "--max-images", 2)
    assert prototypes("--model", "test_vit", "--no-pretrained", *base) == 0
    assert "test_vit" in " ".join(Prototypes.load(out).metadata.values())


@timm_leaves_files_open
def test_prototypes_with_a_checkpoint(image_folder, tmp_path):
    import timm

    checkpoint = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_vit", num_classes=7).state_dict(), checkpoint)
    out = tmp_path / "prototypes.safetensors"
    base = ("--data", image_folder, "--out", out, "--num-prompts", 2, "--workers", 0, "--max-images", 2)
    assert prototypes("--model", "test_vit", "--checkpoint", checkpoint, *base) == 0


def test_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    import timm

    checkpoint = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_vit2").state_dict(), checkpoint)
    code = prototypes(
        *(
            "--model",
            "test_vit",
            "--checkpoint",
            checkpoint,
            "--data",
            "digits",
            "--out",
            tmp_path / "p.safetensors",
        )
    )
    assert "weights.pth" in only_error(capsys, code)


def test_damaged_checkpoint_is_refused(tmp_path, capsys):
    checkpoint = tmp_path / "weights.safetensors"
    checkpoint.write_bytes(b"not weights")
    code = prototypes(
        *(
            "--model",
            "test_vit",
            "--checkpoint",
            checkpoint,
            "--data",
            "digits",
            "--out",
            tmp_path / "p.safetensors",
        )
    )
    assert "cannot be read" in only_error(capsys, code)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--data": "no_such_folder"}, "there is no folder no_such_folder"),
        ({"--data": "{tmp}"}, "Found 0 images"),
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
        ({"--max-images": "1", "--num-prompts": "65"}, "64 per layer"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(changes, expected, tmp_path, capsys):
    (tmp_path / "taken.txt").write_text("mine")
    options = {"--model": "shipped", "--data": "digits", "--out": "{tmp}/p.safetensors"} | changes
    arguments = [part for pair in options.items() for part in pair]
    code = prototypes(*(part.replace("{tmp}", str(tmp_path)) for part in arguments))
    assert expected in only_error(capsys, code)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.txt"]
    assert (tmp_path / "taken.txt").read_text() == "mine"


def test_weights_that_cannot_be_fetched_name_the_ways_out(tmp_path, capsys, monkeypatch):
    import timm

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("name resolution failed\nand a long story")

    monkeypatch.setattr(timm, "create_model", no_network)
    error = only_error(
        capsys, prototypes("--model", "test_vit", "--data", "digits", "--out", tmp_path / "p.safetensors")
    )
    assert "pretrained weights of test_vit could not be had (name resolution failed)" in error
    assert "--checkpoint" in error
    assert "--no-pretrained" in error


def test_model_without_blocks_is_refused(tmp_path, capsys):
    code = prototypes(
        *(
            "--model",
            "test_convnext",
            "--no-pretrained",
            "--data",
            "digits",
            "--out",
            tmp_path / "p.safetensors",
        )
    )
    assert "`.blocks`" in only_error(capsys, code)


def test_overwrite_is_honoured(tmp_path):
    out = tmp_path / "p.safetensors"
    out.write_text("old")
    base = ("--model", "shipped", "--data", "digits", "--out", out, "--num-prompts", 2, "--max-images", 4)
    assert prototypes(*base) == cli.BAD_INPUT
    assert out.read_text() == "old"
    assert prototypes(*base, "--overwrite") == 0
    assert Prototypes.load(out).prompts.shape[1] == 2


def test_traceback_is_shown_on_request(tmp_path):
    (tmp_path / "taken.txt").write_text("mine")
    with pytest.raises(NotADirectoryError):
        cli.main(["--traceback", "demo", "--out", str(tmp_path / "taken.txt")])


def test_demo_prints_table_and_files(tmp_path, capsys, monkeypatch):
    small = demo.Budget(images_per_class=1, warmup_epochs=0, num_prompts=2, epochs=2, val_every=2)
    whole = demo.Task.load()
    task = demo.Task(whole.train, tuple(t[:10] for t in whole.val), tuple(t[:10] for t in whole.test))
    monkeypatch.setattr(demo, "Budget", lambda: small)
    monkeypatch.setattr(demo.Task, "load", classmethod(lambda _: task))
    assert cli.main(["demo", "--out", str(tmp_path), "--epochs", "1", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        *demo.METHODS,
        "test accuracy",
        demo.FIGURE_NAME,
        demo.NUMBERS_NAME,
        "masked autoencoding",
    ):
        assert expected in printed
    assert cli.main(["demo", "--out", str(tmp_path)]) == cli.BAD_INPUT
    assert "exists already" in capsys.readouterr().err


def nmi(*arguments: object) -> int:
    return cli.main(["nmi", "--model", "shipped", "--data", "digits", *map(str, arguments)])


@pytest.fixture(scope="module")
def prompt_files(tmp_path_factory):
    """Prompts for the shipped backbone, as each command or method writes them."""
    folder = tmp_path_factory.mktemp("prompts")
    model = samples.load_backbone()
    batches = [samples.load_digits("train")[0][:20]]
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
    stored = read_csv(tmp_path / "nmi.csv", ("step", "layer", "nmi"))
    assert [row[:2] for _, row in stored] == [(0, layer) for layer in range(1, 7)]
    model = samples.load_backbone()
    depth = kind.split()[0]
    prompts = Prototypes.load(prompt_files[f"{depth} prototypes"])
    images = torch.cat([batch[0] for batch in open_images("digits", model, batch_size=4)])[:10]
    tuned = spt_fast.PromptedViT(model, prompts, depth=depth)
    # A float32 forward pass in other batches; NMI itself is float64 inside.
    expected = tuned.layer_nmi(images).double().mean(dim=1)
    measured = torch.tensor([row[2] for _, row in stored], dtype=torch.float64)
    torch.testing.assert_close(measured, expected, rtol=1e-3, atol=1e-7)


def test_nmi_writes_cka_with_the_largest_on_the_diagonal(prompt_files, tmp_path, capsys):
    base = ("--prompts", prompt_files["deep prototypes"], "--out", tmp_path, "--max-images", 12)
    assert nmi(*base) == 0
    stored = read_csv(tmp_path / "cka.csv", ("prompt_layer", "token_layer", "cka"))
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
def test_bad_input_of_nmi_is_one_line(changes, expected, tmp_path, capsys):
    (tmp_path / "taken.txt").write_text("mine")
    options = {"--model": "shipped", "--data": "digits", "--out": "{tmp}"} | changes
    arguments = [part.replace("{tmp}", str(tmp_path)) for pair in options.items() for part in pair]
    assert expected in only_error(capsys, cli.main(["nmi", *arguments]), "nmi")
    assert [path.name for path in tmp_path.iterdir()] == ["taken.txt"]


@pytest.mark.parametrize("kind", ["deep prototypes", "shallow tuned"])
def test_prompts_of_another_backbone_are_refused(kind, prompt_files, tmp_path, capsys):
    options = ("--model", "test_vit", "--no-pretrained", "--out", tmp_path)
    code = nmi(*options, "--prompts", prompt_files[kind])
    assert "but this model has 'test_vit" in only_error(capsys, code, "nmi")
    assert list(tmp_path.iterdir()) == []


def test_nmi_without_matplotlib_writes_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert nmi("--random", 2, "--max-images", 2, "--out", tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cka.csv", "nmi.csv"]


def test_doctor_says_what_is_here(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        version("torch"),
        version("timm"),
        "triton",
        "numpy",
        "faiss",
        "matplotlib",
        "k-means on cpu",
    ):
        assert expected in printed
    assert str(samples.backbone_facts()["epochs"]) in printed


def test_doctor_names_the_instruction_set(capsys):
    pytest.importorskip("spt_fast._kmeans")
    cli.main(["doctor"])
    assert kmeans_native.build_info()["isa"] in capsys.readouterr().out


def test_doctor_works_without_the_extension(capsys, monkeypatch):
    monkeypatch.setattr(kmeans_native, "_load", lambda: (None, "it was never built"))
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "no: it was never built" in printed
    assert "reference: it was never built" in printed


@pytest.mark.parametrize("arguments", [[], ["bake"], ["prototypes", "--depth", "medium"]])
def test_unusable_arguments_leave_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == cli.BAD_INPUT
    assert "usage: spt-fast" in capsys.readouterr().err


def test_module_runs_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "spt_fast", "--help"],
        cwd=tmp_path,
        env=package_under_test(),
        capture_output=True,
        text=True,
        check=True,
    )
    for command in ("demo", "prototypes", "nmi", "doctor"):
        assert command in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_leaves_with_130_and_no_file(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "spt_fast", "demo", "--out", str(out)],
        cwd=tmp_path,
        env=package_under_test(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and hand that down to what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        # The introduction is printed right before the work starts.
        assert process.stdout is not None
        assert process.stdout.readline().startswith("backbone")
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == cli.INTERRUPTED
    assert "spt-fast: interrupted" in errors
    assert "Traceback" not in errors
    assert list(out.iterdir()) == []


def package_under_test():
    """Environment in which a fresh interpreter, in a folder of its own, imports the package imported here."""
    return {**os.environ, "PYTHONPATH": str(Path(spt_fast.__file__).resolve().parents[1])}
