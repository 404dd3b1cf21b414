"""What the tests of all commands share: images in folders, and the one line of an error."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spt_fast.commands.main import BAD_INPUT
from spt_fast.data.shipped import load_digits


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Even and odd digits as PNG files: 24 in "train", of both classes; "odd" and "foreign" have one class.

    The last two hold the same images, none of "train". "flat" has an image and no folder; "stray" has one
    beside "even" and "odd", and others in a hidden folder.
    """
    from torchvision.utils import save_image

    root = tmp_path_factory.mktemp("images")
    images, labels = load_digits("train")
    for index in range(48):
        name = ("even", "odd")[int(labels[index]) % 2]
        others = [("odd", "odd"), ("foreign", "prime")] if name == "odd" else []
        for place, label in [("train", name)] if index < 24 else others:
            folder = root / place / label
            folder.mkdir(parents=True, exist_ok=True)
            save_image(images[index], folder / f"{index}.png", normalize=True)
    for place in ("flat", "stray", "stray/even", "stray/odd", "stray/.ipynb_checkpoints"):
        (root / place).mkdir()
        save_image(images[0], root / place / "0.png", normalize=True)
    return root


@pytest.fixture
def only_error(capsys: pytest.CaptureFixture[str]) -> Callable[[int, str], str]:
    """Given the exit code of a command that failed: the one line, after any progress bar, on stderr."""

    def line(code: int, command: str) -> str:
        errors = capsys.readouterr().err
        assert code == BAD_INPUT
        assert "Traceback" not in errors
        assert errors.count("error:") == 1
        last = errors.strip().splitlines()[-1]
        assert last.startswith(f"spt-fast {command}: error: ")
        return last

    return line


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
