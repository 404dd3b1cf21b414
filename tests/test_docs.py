"""What README, CONTRIBUTING and docs/ point at exists: links, anchors, files, names, commands, options."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import spt_fast
from spt_fast.commands.main import main
from spt_fast.data import shipped

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SCRIPTS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")])
CODE = ("spt_fast", "tests", "csrc", "benchmarks", "examples")
INDEX = ROOT / "docs" / "README.md"

FENCE = re.compile(r"^([ \t]*)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"--[a-z][a-z-]*")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
TOP_FOLDERS = ("spt_fast/", "tests/", "docs/", "benchmarks/", "examples/", "csrc/", ".ci/")
STARTS = ("spt-fast", "python", "pytest", "torchrun", "benchmarks/", ".ci/")
# In paths and commands that a reader completes.
PLACEHOLDER = re.compile(r"foo|\.\.\.|NAME|^-m$")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_fences(text: str) -> str:
    return FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    return INLINE.findall(without_fences(text))


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    found: set[str] = set()
    for heading in HEADING.findall(without_fences(path.read_text())):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        numbered = (slug, *(f"{slug}-{i}" for i in range(1, 100)))
        found.add(next(anchor for anchor in numbered if anchor not in found))
    return found


def command_lines(path: Path) -> Iterator[list[str]]:
    """Commands of the project: lines of code blocks, code within lines, and docstrings of scripts."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    code = "\n".join(body for _, language, body in FENCE.findall(text) if language != "python")
    plain = without_fences(text)
    indented = "\n".join(line for line in plain.splitlines() if line.startswith("    "))
    lines = [*f"{code}\n{indented}".replace("\\\n", " ").splitlines(), *INLINE.findall(plain)]
    for line in lines:
        for command in line.split("&&"):
            bare = re.sub(r"^\s*(\w+=\S+ +)*", "", command)
            if bare.startswith(STARTS):
                # Two spaces set a remark off.
                yield shlex.split(re.split(r"  +", bare.replace("[", "").replace("]", ""))[0], comments=True)


def check_command(words: list[str]) -> None:
    """Raise AssertionError where a command names a file, a command or an option that is not there."""
    if words[0] == "torchrun":
        # Not `-m spt_fast`: started in the checkout, that is the checkout's, without its compiled module.
        words = words[words.index("--no-python") + 1 :]
    if words[0] == "spt-fast":
        check_spt_fast([word for word in words[1:] if word != "..."])
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
        check_script(ROOT / f"{words[2].replace('.', '/')}.py", words[3:])
    elif words[0] == "python" and words[1:] and words[1].startswith("examples/"):
        check_script(ROOT / words[1], words[2:])
    elif words[0] == "python":
        # By itself it may be spoken of.
        assert words[1:3] != ["-m", "spt_fast"] or len(words) == 3, f"{words} imports the checkout's spt_fast"
    elif words[0] == "pytest":
        files = [word.partition("::")[0] for word in words if "/" in word]
        assert all((ROOT / file).exists() for file in files), words
    else:
        assert (ROOT / words[0]).exists(), words


def check_spt_fast(arguments: list[str]) -> None:
    """That the command exists, knows every option, and takes the values of those with choices or types."""
    # Options before --help are parsed, and refused where they are wrong; it ends before one is missed.
    code, printed = run_main([*arguments, "--help"])
    assert code == 0, f"{arguments}: {printed}"
    assert options_in(arguments) <= set(OPTION.findall(printed)), f"unknown option in {arguments}"


def run_main(arguments: list[str]) -> tuple[object, str]:
    """Exit code and output of `spt-fast` where argparse ends it."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            return main(arguments), printed.getvalue()
        except SystemExit as end:
            return end.code, printed.getvalue()


def check_script(path: Path, arguments: list[str]) -> None:
    """The same from the text of a script that uses argparse: importing it would import its peers."""
    assert path.is_file(), f"there is no {path}"
    known, required, positional = {"--help"}, set(), False
    for call in ast.walk(ast.parse(path.read_text())):
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument":
            names = {name.value for name in call.args if isinstance(name, ast.Constant)}
            settings = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
            known |= names
            if settings.get("required"):
                required |= names
            positional |= any(name[0] != "-" for name in names) and settings.get("nargs") not in ("*", "?")
    assert options_in(arguments) <= known, f"{path.name} does not know all of {arguments}"
    assert required <= options_in(arguments), f"{path.name} wants {required}"
    assert not positional or (arguments and arguments[0][0] != "-"), f"{path.name} wants a file or a folder"


def options_in(arguments: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in arguments if OPTION.match(word)}


def looks_like_a_path(code: str) -> bool:
    return code.startswith(TOP_FOLDERS) and " " not in code and not PLACEHOLDER.search(code)


def resolves(name: str) -> bool:
    """Whether a dotted name of the package is a module, or something in one."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for target in LINK.findall(without_fences(page.read_text())):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    missing = []
    for code in inline_code(page.read_text()):
        if looks_like_a_path(code) and not list(
            ROOT.glob(code.rstrip("/") + ("" if re.search(r"[.*]", code) else "*"))
        ):
            missing.append(code)
    assert not missing


def test_pages_that_the_code_names_exist() -> None:
    sources = [ROOT / "setup.py", *(path for folder in CODE for path in (ROOT / folder).rglob("*.*"))]
    named = {
        (name_of(path), page)
        for path in sources
        if path.suffix in (".py", ".pyi", ".cpp", ".h", ".cu", ".cuh", ".sh")
        for page in re.findall(r"\bdocs/[\w/-]+\.md\b", path.read_text())
    }
    assert len(named) > 5
    assert not {(path, page) for path, page in named if not (ROOT / page).is_file()}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_of_the_package_exist(page: Path) -> None:
    names = set(re.findall(r"\bspt_fast(?:\.[A-Za-z_]\w*)+", page.read_text()))
    assert not sorted(name for name in names if not resolves(name) and not name.endswith((".so", ".json")))


@pytest.mark.parametrize("page", [*PAGES, *SCRIPTS], ids=name_of)
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in command_lines(page):
        if not PLACEHOLDER.search(words[-1]):
            check_command(words)


@pytest.mark.parametrize(
    "wrong",
    [
        "spt-fast tune",
        "spt-fast nmi --model shipped --data digits --prompt p.safetensors",
        "spt-fast prototypes --depth flat",
        "python -m benchmarks.bench_builds",
        "python -m benchmarks.bench_build --pictures 32",
        "python -m benchmarks.bench_stream_quality photos --seed 3",
        "python -m spt_fast doctor",
        "torchrun --nproc-per-node 2 -m spt_fast prototypes",
        "pytest tests/test_nothing.py",
    ],
)
def test_a_wrong_command_is_found(wrong: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"To do it:\n\n```bash\nA=1 {wrong}    # a remark\n```\n")
    (words,) = command_lines(page)
    with pytest.raises((AssertionError, ValueError)):
        check_command(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_docs_parses(page: Path) -> None:
    for _, language, body in FENCE.findall(page.read_text()):
        if language == "python":
            ast.parse(body)


def test_the_index_lists_every_page() -> None:
    targets = (target.partition("#")[0] for target in LINK.findall(INDEX.read_text()))
    assert {page for page in PAGES if page != INDEX} <= {
        (INDEX.parent / target).resolve() for target in targets
    }


def python_of(page: str) -> list[str]:
    return [body for _, language, body in FENCE.findall((ROOT / page).read_text()) if language == "python"]


def readme_python() -> list[str]:
    return python_of("README.md")


def test_readme_shows_the_first_example() -> None:
    example = (ROOT / "examples" / "first_steps.py").read_text()
    assert example.partition('"""\n\n')[2] == readme_python()[0]


def test_the_first_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = shipped.load_digits("val")
    monkeypatch.setattr(shipped, "load_digits", lambda split: (images[:32], labels[:32]))
    monkeypatch.chdir(tmp_path)
    exec(readme_python()[0], {})
    assert "test accuracy" in capsys.readouterr().out
    assert (tmp_path / "digits.safetensors").is_file()


def test_what_readme_calls_equivalent_is(vit: VisionTransformer) -> None:
    tokens = torch.randn(200, 32)
    values = {name: torch.randn(2, 4, 9, 8) for name in "qkv"}
    prompts = {name: torch.randn(4, 5, 8) for name in ("prompt_k", "prompt_v")}
    attended = spt_fast.prompt_attention(**values, **prompts)
    given = {"torch": torch, "KMeans": spt_fast.KMeans, "block": vit.blocks[1], "x": torch.randn(2, 17, 32)}
    names = {**given, **values, **prompts, "patch_tokens_that_enter_the_block": tokens}
    exec(readme_python()[1], names)
    torch.testing.assert_close(attended, names["out"])
    tuned = spt_fast.PromptedViT(vit, names["prompts"].expand(3, -1, -1))
    assert tuned.engine == "kv"
    torch.testing.assert_close(tuned.model.blocks[1](names["x"]), names["y"])


@pytest.fixture(scope="module")
def own_loop_ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The names and the folder that docs/own-loop.md leaves behind, on few digits; Lightning is a stub."""
    splits = {split: shipped.load_digits(split) for split in ("train", "val")}
    lightning = types.SimpleNamespace(LightningModule=torch.nn.Module)
    folder = tmp_path_factory.mktemp("own_loop")
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shipped, "load_digits", lambda split: tuple(tensor[:64] for tensor in splits[split]))
        patch.setitem(sys.modules, "lightning", lightning)
        patch.chdir(folder)
        for block in python_of("docs/own-loop.md"):
            exec(block, names)
    return names, folder


@pytest.fixture
def own_loop(own_loop_ran: tuple[dict[str, Any], Path]) -> Iterator[dict[str, Any]]:
    """The names, and what has learned as the page leaves it."""
    names, _ = own_loop_ran
    learned = {name: value.clone() for name, value in names["tuned"].learned_state_dict().items()}
    yield names
    names["tuned"].load_learned_state_dict(learned)


def test_the_own_loop_trains_resumes_and_saves(own_loop_ran: tuple[dict[str, Any], Path]) -> None:
    """What the page's own assertions leave open."""
    own_loop, folder = own_loop_ran
    learned, state = own_loop["tuned"].learned_state_dict(), torch.load(folder / "last.pt")
    assert state["tuned"].keys() == state["ema"].keys() == learned.keys()
    changes = [float((state["tuned"][name] - learned[name]).abs().max()) for name in ("prompts", "head.bias")]
    assert min(changes) > 1e-3
    assert own_loop["optimizer"].param_groups[0]["lr"] < 1e-6
    saved = spt_fast.PromptedViT.from_file(folder / "digits.safetensors", shipped.load_backbone())
    assert torch.equal(saved.prompts, state["ema"]["prompts"])


def test_the_modules_for_trainers_carry_what_learned(own_loop: dict[str, Any]) -> None:
    tuned, tuning = own_loop["tuned"], own_loop["tuning"]
    classifier = own_loop["Classifier"](tuned)
    images, labels = (tensor[:16] for tensor in shipped.load_digits("val"))
    optimizer = tuning.configure_optimizers()
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    assert {*map(id, parameters)} == {*map(id, tuned.trainable_parameters())}
    assert torch.equal(tuning.training_step((images, labels), 0), classifier(images, labels)["loss"])
    assert torch.equal(classifier(images)["logits"], tuned(images))
    for module in (tuning, classifier):
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        assert before.keys() == tuned.learned_state_dict().keys()
        with torch.no_grad():
            tuned.prompts.zero_()
        assert module.load_state_dict(before, strict=False).missing_keys == []
        assert torch.equal(tuned.prompts, before["prompts"])


def test_the_loop_in_mixed_precision_steps_as_in_float32(
    own_loop: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16 the scaler works; nothing of its scale is left in a step."""
    images, labels = (tensor[:64] for tensor in shipped.load_digits("val"))
    monkeypatch.setitem(own_loop, "train_loader", [(images, labels)])
    tuned = own_loop["tuned"].train()
    for dtype in (torch.bfloat16, torch.float16):
        tuned.zero_grad()
        torch.nn.functional.cross_entropy(tuned(images), labels).backward()
        before = {each: (each.detach().clone(), each.grad) for each in tuned.trainable_parameters()}
        # Its usual first scale is too high for these gradients: it would skip the step, and be halved.
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == torch.float16)
        own_loop["train_mixed"](tuned, torch.optim.SGD(list(before), lr=1.0), scaler, dtype)
        for parameter, (start, gradient) in before.items():
            assert parameter.dtype == torch.float32
            error = (start - parameter.detach() - gradient).norm() / gradient.norm()
            # Two roundings, of attention and MLP, in each of six blocks.
            assert 0 < float(error) < 12 * torch.finfo(dtype).eps
