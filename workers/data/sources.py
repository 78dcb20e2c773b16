"""Sources of rows: files, folders and globs of files, folders of datasets.save_to_disk, hub datasets."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from configs.schema import DatasetSettings

Record = tuple[str, Any]
"""Place of a record (for errors), and the record, or the DataError that refuses it."""

_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files that identify a folder of datasets.save_to_disk."""
_SPLITS = ("train", "validation", "valid", "val", "dev", "eval", "test")


class DataError(ValueError):
    """A dataset that cannot be used. The text names the place and what would be valid."""


def records(data: DatasetSettings) -> Iterator[Record]:
    """All records of a dataset, in order, file after file.

    Raises DataError where a file cannot be read at all; a single bad line gives a record that is a DataError.
    """
    return chain.from_iterable(_from_path(path, data) for path in data.paths)


def _from_path(text: str, data: DatasetSettings) -> Iterator[Record]:
    path = Path(text)
    if path.is_dir():
        _refuse_hub_settings(text, data)
        if any((path / name).is_file() for name in _SAVED):
            return _from_saved(path, data)
        return chain.from_iterable(map(_from_file, _shards(path, data.split)))
    if path.is_file():
        _refuse_hub_settings(text, data)
        if data.split is not None:
            raise DataError(f"{path}: split {data.split}: a file has no splits; leave it out")
        return _from_file(path)
    if glob.has_magic(text):
        return chain.from_iterable(map(_from_file, _matches(text)))
    if _reader(path) or path.is_absolute() or text[0] == "." or len(path.parts) > 2:
        raise DataError(f"{text}: no such file or folder")
    return _from_hub(text, data)


def _refuse_hub_settings(path: str, data: DatasetSettings) -> None:
    for name in ("configuration", "revision"):
        if getattr(data, name) is not None:
            raise DataError(f"{path}: {name} {getattr(data, name)}: for hub datasets only; leave it out")


# ---------------------------------------------------------------- files


def _from_file(path: Path) -> Iterator[Record]:
    reader = _reader(path)
    if reader is None:
        raise DataError(
            f"{path}: must be a file that ends in {', '.join(_READERS)} (the first three also with .gz), a folder of such "
            "files, a folder of datasets.save_to_disk or a hub name"
        )
    return reader(path)


def _reader(path: Path) -> Callable[[Path], Iterator[Record]] | None:
    name = path.name.lower()
    ending = Path(name.removesuffix(".gz")).suffix
    return None if ending == ".parquet" and name.endswith(".gz") else _READERS.get(ending)


def _shards(folder: Path, split: str | None) -> list[Path]:
    """The data files below a folder, sorted; those of one split where their names contain splits."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _reader(path) and path.name[0] != ".")
    if not files:
        raise DataError(f"{folder}: a folder without data files ({', '.join(_READERS)}), not of datasets.save_to_disk")
    splits: dict[str, list[Path]] = {}
    for path in files:
        words = re.split(r"[^a-z0-9]+", str(path.relative_to(folder)).lower())
        splits.setdefault(next((word for word in words if word in (*_SPLITS, split)), ""), []).append(path)
    if split is None:
        if len(splits) > 1 or set(splits) - {"", "train"}:
            named = ", ".join(name or "others" for name in splits)
            raise DataError(f"{folder}: split: missing; by their names the files are of {named}")
        return files
    if split not in splits:
        named = ", ".join(filter(None, splits)) or "none"
        raise DataError(f"{folder}: split {split}: no file's name has it; there are {named}")
    return splits[split]


def _matches(pattern: str) -> list[Path]:
    files = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    if not files:
        raise DataError(f"{pattern}: no file matches")
    return files


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _jsonl(path: Path) -> Iterator[Record]:
    with _open(path) as file:  # bytes: in text mode lines would also end at \r
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _from_json(line)
        except (OSError, EOFError) as error:
            raise DataError(f"{path}: cannot be read: {_reason(error)}") from error


def _from_json(line: bytes) -> Any:
    """A line's value; a DataError where it is not valid JSON."""
    try:
        value = json.loads(line.decode("utf-8-sig").rstrip())
        if rb"\ud" in line.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair: valid JSON, but not text
        return value
    except json.JSONDecodeError as error:
        return DataError(f"not JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8: {error.reason} at byte {error.start + 1}")
    except UnicodeEncodeError as error:
        return DataError(f"not text: half a surrogate pair, {error.object[error.start]!a}")
    except RecursionError:
        return DataError("not JSON: nested too deeply")
    except ValueError as error:
        return DataError(f"not JSON: {error}")


def _json(path: Path) -> Iterator[Record]:
    """An array of records, an object with one such array, or JSON lines, which many files of the hub named .json hold."""
    with _open(path) as file:
        try:
            content = file.read()
        except (OSError, EOFError) as error:
            raise DataError(f"{path}: cannot be read: {_reason(error)}") from error
    value = _from_json(content)
    if isinstance(value, DataError):
        if len(content.strip().splitlines()) > 1 and content.lstrip(b"\xef\xbb\xbf \r\n\t")[:1] == b"{":
            yield from _jsonl(path)
            return
        raise DataError(f"{path}: {value}")
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        value = lists[0] if len(lists) == 1 and len(value) == 1 else [value]
    if not isinstance(value, list):
        raise DataError(f"{path}: must be a list of records, was a single value")
    for number, record in enumerate(value, start=1):
        yield f"{path}: record {number}", record


def _csv(path: Path) -> Iterator[Record]:
    """Records of a table with a header line; an empty cell is None."""
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        try:
            table = csv.DictReader(text, strict=True)
            for record in table:
                place = f"{path}:{table.line_num}"
                if None in record or None in record.values():
                    columns = len(table.fieldnames or ())
                    yield place, DataError(f"must have {columns} cells, as the header line has")
                else:
                    yield place, {name: cell or None for name, cell in record.items()}
        except (csv.Error, OSError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as CSV: {_reason(error)}") from error


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        rows = (record for batch in table.iter_batches() for record in batch.to_pylist())
        for number, record in enumerate(rows, start=1):
            yield f"{path}: row {number}", record
    except Exception as error:  # the library raises many types of errors for damaged bytes
        raise DataError(f"{path}: cannot be read as Parquet: {_reason(error)}") from error


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


# ---------------------------------------------------------------- datasets


def _from_saved(path: Path, data: DatasetSettings) -> Iterator[Record]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many types of errors for damaged bytes
        raise DataError(f"{path}: a damaged dataset: {_reason(error)}") from error
    return _from_loaded(str(path), data, loaded)


def _from_hub(name: str, data: DatasetSettings) -> Iterator[Record]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, data.configuration, split=data.split, revision=data.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: no file or folder here, and it cannot be loaded from the hub: {_reason(error)}"
        ) from error
    return _from_loaded(name, data, loaded)


def _from_loaded(name: str, data: DatasetSettings, loaded: Any) -> Iterator[Record]:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        names = ", ".join(loaded)
        if data.split is None and len(loaded) != 1:
            raise DataError(f"{name}: split: missing; there are {names}")
        if data.split is not None and data.split not in loaded:
            raise DataError(f"{name}: split {data.split}: no such split; there are {names}")
        loaded = loaded[data.split] if data.split else next(iter(loaded.values()))
    elif data.split is not None and Path(name).is_dir():
        raise DataError(f"{name}: split {data.split}: this folder holds a single dataset; leave it out")
    where = f"{name} {data.split}" if data.split else name
    try:
        # Arrow does not check offsets when it loads: wrong ones would crash the process.
        loaded.data.table.validate(full=True)
        for number, record in enumerate(loaded, start=1):
            yield f"{where}: row {number}", record
    except Exception as error:  # the library raises many types of errors for damaged bytes
        raise DataError(f"{where}: a damaged dataset: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
