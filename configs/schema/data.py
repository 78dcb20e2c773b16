"""Datasets."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from configs.schema.base import FilePath, Settings


class DatasetSettings(Settings):
    """One dataset: files (.jsonl, .json, .csv, each also with .gz, .parquet), a folder of such files, a pattern such as
    `data/*.parquet`, a folder written by datasets.save_to_disk, or a hub name."""

    path: FilePath | Annotated[list[FilePath], Field(min_length=1)]
    """File, folder, pattern or hub name; the entries of a list are read one after another."""
    split: str | None = None
    """Split, where the dataset has several."""
    configuration: str | None = None
    """Configuration of a hub dataset, where it has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    columns: dict[str, str] = {}
    """Troupe's column -> the dataset's column. Troupe's: prompt, completion, messages, chosen, rejected, margin, input, tools.
    For prompts also any other name -> a column that reward functions get under that name."""
    limit: PositiveInt | None = None
    """Use only the first `limit` rows."""

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def name(self) -> str:
        """For errors and reports: the first path, and the number of others."""
        first, *others = self.paths
        return f"{first} and {len(others)} more" if others else first
