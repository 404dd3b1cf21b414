"""Safetensors files: written whole or not at all, and refused when they are not what they should be."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from spt_fast.support.interrupts import held

FORMAT_VERSION = 1
_KIND_KEY = "kind"
_VERSION_KEY = "format_version"
# More than a file system keeps beside a file's name: it needs room on the disk.
_TRIAL_BYTES = 1 << 16
_TEMPORARY = (".spt_fast.", ".part")


def check_output_path(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Return `path` as a `Path` that can be written to, which is tried. Call it before long work, not after.

    Nothing is left there. Whether a large file will fit on the disk is not known beforehand.

    Raises:
        FileExistsError: something is there already and `overwrite` is false.
        FileNotFoundError: the folder does not exist.
        NotADirectoryError: the "folder" is a file.
        IsADirectoryError: `path` itself is a folder.
        ValueError: `path` names a device, a pipe or a socket.
        OSError: the folder or the disk is read-only or full, the name is too long, or the like.
    """
    target = check_name_is_free(path, overwrite)
    with _explained(target), held(), _temporary_file(target.parent) as (file, _):
        file.write(bytes(_TRIAL_BYTES))
        file.flush()
        os.fsync(file.fileno())
    return target


def _as_path(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be the name of a file, a string or a Path, got {path!r}")
    return Path(path)


def check_name_is_free(path: str | os.PathLike[str], overwrite: bool) -> Path:
    """`path`, unless what is there, or is missing, forbids it: `check_output_path` without the try."""
    target = _as_path(path)
    with _explained(target), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        target.lstat()
    if not target.parent.exists():
        raise FileNotFoundError(f"cannot write {target}: the folder {target.parent} does not exist")
    if not target.parent.is_dir():
        raise NotADirectoryError(f"cannot write {target}: {target.parent} is a file, not a folder")
    if target.is_dir():
        raise IsADirectoryError(f"cannot write {target}: it is a folder, a file name is needed")
    if target.exists() and not target.is_file():
        raise ValueError(f"cannot write {target}: it is a device, a pipe or a socket, not a file")
    if not overwrite and os.path.lexists(target):
        raise FileExistsError(
            f"{target} exists already; give another name, or write over it (overwrite=True, --overwrite)"
        )
    return target


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    kind: str,
    overwrite: bool = False,
) -> None:
    """Write `tensors` and `metadata` to `path`, completely or not at all.

    The bytes go to a temporary name in the same folder, are flushed to disk, and only then take the name
    `path`. On any failure nothing is left behind, and a file that was there before is untouched. Without
    `overwrite`, a file that appears at `path` meanwhile is kept and FileExistsError is raised.

    Args:
        tensors: any shape, dtype and device; stored as contiguous CPU copies.
        metadata: strings only; the keys "kind" and "format_version" are set here.
        kind: what the file holds, checked again by `read_safetensors`.
    """
    check_name_is_free(path, overwrite)
    # Copies, because safetensors refuses tensors that share memory.
    stored = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    header = {**check_metadata(metadata), _KIND_KEY: kind, _VERSION_KEY: str(FORMAT_VERSION)}
    write_bytes(path, _reproducible(serialize(stored, header)), overwrite=overwrite)


def check_input_path(path: str | os.PathLike[str], *, argument: str = "") -> Path:
    """Return `path` as a `Path` that can be read; error messages begin with `argument`, if there is one.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        TypeError: it is no name.
    """
    source = _as_path(path)
    prefix = f"{argument}: " if argument else ""
    if not source.exists():
        raise FileNotFoundError(f"{prefix}there is no file {source}")
    if source.is_dir():
        raise IsADirectoryError(f"{prefix}cannot read {source}: it is a folder, a file name is needed")
    return source


@contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """Open any safetensors file, as `safetensors.safe_open` does; its tensors are views of the file.

    Raises:
        FileNotFoundError, IsADirectoryError: as `check_input_path`.
        ValueError: the file is truncated or is not a safetensors file.
    """
    source = check_input_path(path)
    try:
        with safe_open(source, framework="pt") as file:
            yield file
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} is truncated or not a safetensors file ({error})") from error


Contents = tuple[dict[str, Tensor], dict[str, str]]


def read_safetensors(path: str | os.PathLike[str], *, kind: str, or_kind: str | None = None) -> Contents:
    """Read what `write_safetensors` wrote: the tensors (CPU, independent of the file) and the metadata.

    The two keys that `write_safetensors` adds are not part of the metadata returned.

    Args:
        kind, or_kind: what the file may hold.

    Raises:
        FileNotFoundError, IsADirectoryError: as `check_input_path`.
        ValueError: the file is truncated, is not a safetensors file, was written by another program, holds
            another kind of thing, or has a newer format version.
    """
    with open_safetensors(path) as file:
        metadata = dict(file.metadata() or {})
        is_other = or_kind is not None and metadata.get(_KIND_KEY) == or_kind
        _check_header(Path(path), metadata, str(or_kind) if is_other else kind)
        # Copied, because tensors of a memory-mapped file change when the file does.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    del metadata[_KIND_KEY], metadata[_VERSION_KEY]
    return tensors, metadata


def read_kind(path: str | os.PathLike[str]) -> str | None:
    """What a safetensors file says that it holds, as `write_safetensors` has noted it; None if nothing.

    Raises:
        FileNotFoundError, IsADirectoryError, ValueError: as `open_safetensors`.
    """
    with open_safetensors(path) as file:
        return dict(file.metadata() or {}).get(_KIND_KEY)


def check_metadata(metadata: Any) -> dict[str, str]:
    """`metadata` as a dict; TypeError unless it is a mapping of strings to strings."""
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata must map strings to strings, got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata must map strings to strings, got {key!r}: {value!r}")
    return dict(metadata)


def _reproducible(content: bytes) -> bytes:
    """The same file with its metadata sorted: safetensors leaves their order, and so the bytes, to chance."""
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The format wants the tensors to start at a multiple of 8.
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def _check_header(source: Path, metadata: Mapping[str, str], kind: str) -> None:
    found = metadata.get(_KIND_KEY)
    version = metadata.get(_VERSION_KEY, "")
    if found is None or not version.isdecimal():
        raise ValueError(
            f"{source} is a safetensors file, but not one that spt_fast wrote; expected {kind!r}"
        )
    if found != kind:
        raise ValueError(f"{source} holds {found!r}, expected {kind!r}")
    if int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{source} has format version {version}, this spt_fast reads up to {FORMAT_VERSION}; "
            "update spt_fast to read it"
        )


def write_bytes(
    path: str | os.PathLike[str], content: bytes | memoryview, *, overwrite: bool = False
) -> None:
    """Write `content` to `path`, completely or not at all, as `write_safetensors` does; same errors."""
    target = check_name_is_free(path, overwrite)
    with _explained(target), held(), _temporary_file(target.parent) as (file, temporary):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        _give_usual_permissions(temporary)
        if overwrite:
            os.replace(temporary, target)
        else:
            _rename_if_free(temporary, target)
        _flush_folder(target.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes were writing into `folder`; nobody else may be writing there now."""
    for path in folder.glob("*".join(_TEMPORARY)):
        path.unlink(missing_ok=True)


@contextmanager
def _temporary_file(folder: Path) -> Iterator[tuple[BinaryIO, str]]:
    """A new file in `folder` and its name, which is gone at the end, if it has not got another by then."""
    # The name does not begin with that of the target, which may be as long as names can be.
    prefix, suffix = _TEMPORARY
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file, name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    """Errors of the operating system with the name of the file that cannot be written."""
    try:
        yield
    except OSError as error:
        # One without a number comes from here and names the file already.
        if error.errno is None:
            raise
        raise type(error)(f"cannot write {target}: {error.strerror}") from error


def _give_usual_permissions(name: str) -> None:
    # mkstemp makes files that only the owner can read; a result should be as readable as any other new file.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(name, 0o666 & ~mask)


def _rename_if_free(temporary: str, target: Path) -> None:
    # A hard link, unlike a rename, fails when the name is taken, and does so in one step.
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise FileExistsError(f"{target} appeared while it was being written; it was left as it is") from None
    except OSError:
        # Some file systems know no hard links: reserve the name first, then replace our own reservation.
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            raise FileExistsError(
                f"{target} appeared while it was being written; it was left as it is"
            ) from None
        os.replace(temporary, target)


def _flush_folder(folder: Path) -> None:
    # Makes the new name itself durable. Folders cannot be opened everywhere, and the content is safe already.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
