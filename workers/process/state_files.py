"""Small trees of files as bytes, so that they can lie in the object store."""

from __future__ import annotations

from pathlib import Path

import numpy as np

Files = dict[str, np.ndarray]
"""Name relative to a folder -> its bytes, uint8."""


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
    """The same, in the object store of the node that this runs on."""
    return files
