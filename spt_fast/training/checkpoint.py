"""The file from which an interrupted run goes on: written whole or not at all, checked when it is read."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from spt_fast.support.errors import first_line
from spt_fast.support.files import check_input_path, write_bytes
from spt_fast.training.recipe import Recipe

CHECKPOINT_NAME = "checkpoint.pt"
FORMAT_VERSION = 1
_KIND_KEY, _KIND = "kind", "spt_fast run"
_VERSION_KEY = "format_version"


@dataclass(frozen=True)
class Checkpoint:
    """A run between two of its steps.

    Attributes:
        recipe: all fields of the `Recipe`.
        facts: what the run is of beside that: data, model, prompts; the same in every part of the run.
        about: what `run.yaml` says of the process that started the run.
        trainer: of `Trainer.state_dict`.
        nmi: of `NMITracker.state_dict`; None where it is not measured.
        test: `Evaluation.state` by the name of the weights, and "facts" of the images; None before the test.
        finished: whether nothing is left to do but a test.
    """

    recipe: Mapping[str, Any]
    facts: Mapping[str, Any]
    about: Mapping[str, Any]
    trainer: Mapping[str, Any]
    nmi: Mapping[str, Any] | None = None
    test: Mapping[str, Any] | None = None
    finished: bool = False

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write to `path`, also over an older one, completely or not at all.

        Raises:
            OSError: the disk is full or read-only, or the like; an older file is then as it was.
        """
        content = {
            _KIND_KEY: _KIND,
            _VERSION_KEY: FORMAT_VERSION,
            **{each.name: getattr(self, each.name) for each in fields(self)},
        }
        # In memory first: torch's writer turns an error of the file system into one of its own.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_bytes(path, buffer.getbuffer(), overwrite=True)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """The checkpoint in a file of `write`, with its tensors in host memory; no code in it is run.

        Raises:
            FileNotFoundError, IsADirectoryError: there is no such file.
            ValueError: it is damaged, not such a file, or of a newer spt_fast.
        """
        source = check_input_path(path)
        content = _load(source)
        if not isinstance(content, dict) or content.pop(_KIND_KEY, None) != _KIND:
            raise ValueError(f"{source} is no checkpoint that spt_fast wrote")
        version = content.pop(_VERSION_KEY, None)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"{source} has format version {version}, this spt_fast reads up to {FORMAT_VERSION}; "
                "update spt_fast to read it"
            )
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{source} is damaged: {first_line(error)}") from error

    def check_same(self, recipe: Recipe, facts: Mapping[str, Any]) -> None:
        """Refuse to go on with another recipe, other data or another model.

        Raises:
            ValueError: something differs; the message names all that does.
        """
        # Of an older version, which did not have all fields, they are the defaults.
        pairs = [({**asdict(Recipe()), **self.recipe}, asdict(recipe)), (self.facts, facts)]
        lines = [
            f"{name}: {then.get(name)} in the folder, {now.get(name)} now"
            for then, now in pairs
            for name in dict.fromkeys([*then, *now])
            if then.get(name) != now.get(name)
        ]
        if lines:
            raise ValueError(
                "resume goes on with the same recipe, data and model only, but these differ: "
                f"{'; '.join(lines)}; give those of the folder, or another folder"
            )


def _load(source: Path) -> Any:
    try:
        # torch itself does not look at the checksums.
        with zipfile.ZipFile(source) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        raise type(error)(f"cannot read {source}: {error.strerror or error}") from error
    except MemoryError:
        raise
    except Exception as error:
        # Readers of zip files and pickles raise errors of many classes for damaged ones.
        raise ValueError(f"{source} is truncated or no checkpoint ({first_line(error)})") from error
    raise ValueError(f"{source} is damaged: the checksum of {damaged} is another one")
