"""Files and folders that lie on disk whole or not at all, and checksums that show it."""

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
"""In a sealed folder: relative name of a file -> [bytes, SHA-256]."""

_DISK_FAULTS = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EROFS", "EACCES", "EPERM")}
_FULL = 2**20
"""With fewer bytes free a disk counts as full: libraries that fail to write do not always say why."""


class DiskError(RuntimeError):
    """Something could not be written: says what, why, and how much space is left. What was there before is unharmed."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of a failed write in the block that it was `path` that could not be written. Raises DiskError."""
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        free = _free(path)
        if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
            reason = str(error.strerror)
        elif free < _FULL:
            reason = "the disk is full"
        else:
            raise
        raise DiskError(f"{path}: cannot be written: {reason} ({free / 2**20:,.1f} MiB are free there)") from error


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A folder to write in, which gets its name only when the block ends well and all of it is on disk.

    What has the name already, a link too, gives way to it. Where the block fails, what it wrote is removed.
    Raises DiskError where the disk is full or fails.
    """
    partial, old = _beside(path, ".partial"), _beside(path, ".old")
    made = [folder for folder in path.parents if not folder.exists()]
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
            for folder in {path.parent, *(new.parent for new in made)}:
                sync(folder)
            _remove(old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # the space may be what is missing
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises DiskError where the disk is full or fails."""
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
    """As write_text."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def discard(path: Path) -> None:
    """Remove a folder such that a process killed meanwhile leaves no half of it under its name."""
    partial = _beside(path, ".partial")
    _remove(partial)
    os.rename(path, partial)
    _remove(partial)


def clear_leftovers(folder: Path) -> None:
    """Tidy up after a process that was killed while it wrote files or folders in this folder."""
    for old in folder.glob("*.old"):
        if not os.path.lexists(old.with_suffix("")):
            os.rename(old, old.with_suffix(""))  # killed between the two renames of whole_folder
        _remove(old)
    for partial in folder.glob("*.partial"):
        _remove(partial)


# ---------------------------------------------------------------- checksums


def write_checksums(folder: Path) -> None:
    """Note sizes and checksums of all files of a folder in it."""
    names = sorted(str(path.relative_to(folder)) for path in _files(folder))
    sums = _on_all(lambda name: _fingerprint(folder / name), names)
    write_json(folder / CHECKSUMS, dict(zip(names, sums, strict=True)))


def verify(folder: Path) -> list[str]:
    """What is wrong with a sealed folder, a line for each file; empty where it is as it was sealed."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        listed = [(name, int(size), str(digest)) for name, (size, digest) in sums.items()]
    except FileNotFoundError:
        return [f"{CHECKSUMS} is missing"]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return [f"{CHECKSUMS} cannot be read: {error}"]
    faults = _on_all(lambda entry: _fault(folder / entry[0], *entry[1:]), listed)
    return [f"{name} {fault}" for (name, _, _), fault in zip(listed, faults, strict=True) if fault]


def _fault(path: Path, size: int, digest: str) -> str | None:
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found:,} bytes, had {size:,} when it was saved"
        return None if _fingerprint(path)[1] == digest else "has another content than when it was saved"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _fingerprint(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256): with the instructions that CPUs have for it, the fastest of hashlib's sound ones."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- disk


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    _on_all(sync, [*_files(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder])


def _on_all(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    """A function of each item, several at a time: reading and hashing leave Python's lock to others."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _remove(path: Path) -> None:
    """A file, a folder, a link (not what it leads to), or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _free(path: Path) -> int:
    """Bytes free on the disk of a path that need not be there yet."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free
