"""Files and folders that are on disk whole or not at all, and checksums that prove it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKSUMS = "checksums.json"
"""In a folder with checksums: relative name of a file -> [bytes, SHA-256]."""

_DISK_ERRORS = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM")}
_FULL_BELOW = 2**20
"""With fewer free bytes a disk counts as full: some libraries do not report why a write failed."""


class DiskError(RuntimeError):
    """A write failed: names the path, the reason and the free space. Existing files stay intact."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write in the block into a DiskError that names `path`."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        free = _free(path)
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            reason = str(error.strerror)
        elif free < _FULL_BELOW:
            reason = "the disk is full"
        else:
            raise
        raise DiskError(f"{path}: cannot be written: {reason} ({free / 2**20:,.1f} MiB free)") from error


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder to write in, which gets its name only after the block has succeeded and all files are on disk.

    Replaces an existing folder, file or link of that name. If the block fails, its files are removed.
    Raises DiskError if the disk is full or fails.
    """
    partial, old = _beside(path, ".partial"), _beside(path, ".old")
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        with writing(path):
            _remove(partial)
            partial.mkdir(parents=True)
            yield partial
            _sync_tree(partial)
            if os.path.lexists(path):
                _remove(old)
                os.rename(path, old)
            os.rename(partial, path)
            for folder in {path.parent, *(new.parent for new in missing)}:
                sync(folder)
            _remove(old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # the disk may be full
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises DiskError if the disk is full or fails."""
    partial = _beside(path, ".partial")
    try:
        with writing(path):
            partial.write_text(text, encoding="utf-8")
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all. Errors: see write_text."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def discard(path: Path) -> None:
    """Remove a folder; a process that is killed meanwhile leaves no partial folder under its name."""
    partial = _beside(path, ".partial")
    _remove(partial)
    os.rename(path, partial)
    _remove(partial)


def clear_leftovers(folder: Path) -> None:
    """Remove partial files and folders that a killed process left in this folder."""
    for old in folder.glob("*.old"):
        if not os.path.lexists(old.with_suffix("")):
            os.rename(old, old.with_suffix(""))  # killed between the two renames of atomic_directory
        _remove(old)
    for partial in folder.glob("*.partial"):
        _remove(partial)


# ---------------------------------------------------------------- checksums


def write_checksums(folder: Path) -> None:
    """Write sizes and checksums of all files of a folder to its checksums.json."""
    names = sorted(str(path.relative_to(folder)) for path in _files(folder))
    sums = _map_parallel(lambda name: _checksum(folder / name), names)
    write_json(folder / CHECKSUMS, dict(zip(names, sums, strict=True)))


def verify(folder: Path) -> list[str]:
    """Problems of a folder with checksums, a line for each file; empty if it is intact."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        listed = [(name, int(size), str(digest)) for name, (size, digest) in sums.items()]
    except FileNotFoundError:
        return [f"{CHECKSUMS} is missing"]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [f"{CHECKSUMS} cannot be read: {error}"]
    problems = _map_parallel(lambda entry: _problem(folder / entry[0], *entry[1:]), listed)
    return [f"{name} {problem}" for (name, _, _), problem in zip(listed, problems, strict=True) if problem]


def _problem(path: Path, size: int, digest: str) -> str | None:
    try:
        actual = path.stat().st_size
        if actual != size:
            return f"has {actual:,} bytes, had {size:,} when it was saved"
        return None if _checksum(path)[1] == digest else "has changed since it was saved"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _checksum(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256). CPUs have instructions for SHA-256: it is the fastest secure hash of hashlib."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- disk


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    _map_parallel(sync, [*_files(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder])


def _map_parallel(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """Apply a function to each item in threads: reading and hashing release Python's lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _remove(path: Path) -> None:
    """Remove a file, a folder or a link (not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _free(path: Path) -> int:
    """Free bytes on the disk of a path that may not exist yet."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free
