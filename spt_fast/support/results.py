"""Files that a command writes into a folder: names checked before the work, contents written after it.

Figures are PNG files, left out where matplotlib is missing.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from spt_fast.support.files import check_name_is_free, check_output_path, write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def matplotlib_missing() -> str | None:
    """Why no figure can be drawn here, in one line; None where one can."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return 'matplotlib is not installed: no figure; pip install "spt_fast[plots]" adds it'
    return None


def result_paths(
    out: str | os.PathLike[str], names: Sequence[str], *, overwrite: bool = False
) -> dict[str, Path]:
    """Where each of `names` will go in the folder `out`; without matplotlib, figures (*.png) are left out.

    Raises:
        FileExistsError: one of them is there already, and not `overwrite`.
        NotADirectoryError: `out`, or a folder that it lies in, is a file.
        OSError: `out` is there, but cannot be written into.
    """
    folder = Path(out)
    # Not Path.exists, which raises where a name is too long.
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"out must be a folder, but {there} is a file")
    wanted = [name for name in names if not (name.endswith(".png") and matplotlib_missing())]
    if there == folder:
        for name in wanted:
            check_name_is_free(folder / name, overwrite)
        # They are all written in the same way, so one of them is tried.
        for name in wanted[:1]:
            check_output_path(folder / name, overwrite=overwrite)
    return {name: folder / name for name in wanted}


@contextmanager
def result_folder(
    out: str | os.PathLike[str], names: Sequence[str], *, overwrite: bool = False
) -> Iterator[dict[str, Path]]:
    """`result_paths`, with the folder `out` made for the time of the context, and for good if it is filled.

    Folders made here that are still empty at the end, as after an error, are removed.

    Raises:
        OSError: as `result_paths`; the folder cannot be made; or a file cannot be written into it.
    """
    folder = Path(out)
    made: list[Path] = []
    try:
        result_paths(out, names, overwrite=overwrite)
        made += [path for path in (folder, *folder.parents) if not os.path.exists(path)]
        _make(folder)
        # Once more, now that there is a folder in which it can be tried.
        yield result_paths(out, names, overwrite=overwrite)
    finally:
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise type(error)(f"cannot make the folder {folder}: {error.strerror}") from error


def write_results(
    paths: Mapping[str, Path], contents: Mapping[str, bytes], *, overwrite: bool = False
) -> list[Path]:
    """Write each content to the path of its name, completely or not at all; the paths written."""
    for name, content in contents.items():
        write_bytes(paths[name], content, overwrite=overwrite)
    return [paths[name] for name in contents]


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    image = io.BytesIO()
    figure.savefig(image, format="png")
    return image.getvalue()
