"""Small trees of files as bytes, so that the object store can hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

Files = dict[str, np.ndarray]
"""Path relative to a folder -> content, uint8."""


def read_files(folder: Path) -> Files:
    return {
        str(path.relative_to(folder)): np.fromfile(path, np.uint8)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_files(folder: Path, files: Files) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content.tofile(folder / name)


def copy_files(files: Files) -> Files:
    """The same files; as a Ray task, it puts them into the object store of its node."""
    return files
