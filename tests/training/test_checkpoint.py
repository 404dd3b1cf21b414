"""The file that a run goes on from: what comes back, what is refused, and what a full disk leaves."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from spt_fast import Recipe
from spt_fast.training.checkpoint import FORMAT_VERSION, Checkpoint


def checkpoint(**changes: Any) -> Checkpoint:
    trainer = {"epoch": 3, "step": 1, "learned": {"prompts": torch.randn(3, 2, 8)}, "best": {}}
    return Checkpoint(
        **{"recipe": asdict(Recipe()), "facts": {"images": 40}, "about": {}, "trainer": trainer, **changes}
    )


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    nmi = {"step": 4, "steps": [0, 2], "values": torch.randn(2, 3)}
    written = checkpoint(nmi=nmi, test={"facts": {"images": 3}}, finished=True)
    written.write(tmp_path / "c.pt")
    read = Checkpoint.read(tmp_path / "c.pt")
    assert (read.recipe, read.facts, read.test, read.finished) == (
        written.recipe,
        written.facts,
        written.test,
        True,
    )
    assert Recipe(**read.recipe) == Recipe()
    assert torch.equal(read.trainer["learned"]["prompts"], written.trainer["learned"]["prompts"])
    assert torch.equal(read.nmi["values"], nmi["values"])
    assert list(tmp_path.iterdir()) == [tmp_path / "c.pt"]


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    checkpoint().write(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=re.escape(f"{path} is truncated or no checkpoint (")):
        Checkpoint.read(path)


def test_a_changed_number_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    written = checkpoint()
    written.write(path)
    content = path.read_bytes()
    numbers = written.trainer["learned"]["prompts"].numpy().tobytes()
    at = content.index(numbers) + 5
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(ValueError, match=r"is damaged: the checksum of .*data/0 is another one"):
        Checkpoint.read(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        Checkpoint.read(tmp_path / "missing.pt")
    path = tmp_path / "c.pt"
    contents: dict[str, Any] = {
        "is no checkpoint that spt_fast wrote": {"state_dict": {}},
        f"has format version {FORMAT_VERSION + 1}, this spt_fast reads up to {FORMAT_VERSION}; update": {
            "kind": "spt_fast run",
            "format_version": FORMAT_VERSION + 1,
        },
        "is damaged: .*missing": {"kind": "spt_fast run", "format_version": FORMAT_VERSION},
    }
    for message, content in contents.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            Checkpoint.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(ValueError, match="is truncated or no checkpoint"):
        Checkpoint.read(path)


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return (tmp_path / "harm").touch, ()

    torch.save({"kind": Harmful()}, tmp_path / "c.pt")
    assert pickle.dumps(Harmful())
    with pytest.raises(ValueError, match="is truncated or no checkpoint"):
        Checkpoint.read(tmp_path / "c.pt")
    assert not (tmp_path / "harm").exists()


def test_all_that_differs_is_named() -> None:
    then = checkpoint(facts={"images": 40, "data": "birds", "model": "m"})
    then.check_same(Recipe(), {"images": 40, "data": "birds", "model": "m"})
    with pytest.raises(ValueError, match="these differ: ") as raised:
        then.check_same(Recipe(lr=0.02, epochs=7), {"images": 41, "data": "birds", "fingerprint": "x"})
    differ = [
        "epochs: 100 in the folder, 7 now",
        "lr: 0.01 in the folder, 0.02 now",
        "images: 40 in the folder, 41 now",
        "model: m in the folder, None now",
        "fingerprint: None in the folder, x now",
    ]
    assert f"{'; '.join(differ)}; give those of the folder" in str(raised.value)


def test_a_field_that_an_older_version_did_not_have_is_its_default() -> None:
    older = {name: value for name, value in asdict(Recipe()).items() if not name.startswith("prompt_init")}
    then = checkpoint(recipe=older)
    then.check_same(Recipe(), {"images": 40})
    with pytest.raises(ValueError, match="prompt_init: None in the folder, vipamin now"):
        then.check_same(Recipe(prompt_init="vipamin"), {"images": 40})


def test_a_full_disk_leaves_the_last_whole_file(tmp_path: Path, run_script: Callable[..., Any]) -> None:
    script = """
import resource, sys, torch
from spt_fast.training.checkpoint import Checkpoint
small, large = (Checkpoint({}, {}, {}, {"epoch": 1, "values": torch.ones(n)}) for n in (10, 10**6))
small.write("c.pt")
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, resource.RLIM_INFINITY))
try:
    large.write("c.pt")
except OSError as error:
    print(error)
"""
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cannot write c.pt: File too large" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]
    assert len(Checkpoint.read(tmp_path / "c.pt").trainer["values"]) == 10
