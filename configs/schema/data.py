"""Datasets."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from configs.schema.base import FilePath, Settings


class DatasetSettings(Settings):
    """One dataset: files (.jsonl, .json, .csv, each also with .gz, .parquet), a folder of such files, a pattern such as
    `data/*.parquet`, a folder written by datasets.save_to_disk, or a hub name."""

    path: FilePath | Annotated[list[FilePath], Field(min_length=1)]
    """File, folder, pattern or hub name; a list of them is read one after the other."""
    split: str | None = None
    """Split, where the dataset has several."""
    configuration: str | None = None
    """Configuration of a hub dataset, where it has several."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset."""
    columns: dict[str, str] = {}
    """Our column -> the dataset's column. Ours: prompt, completion, messages, chosen, rejected, margin, input, tools. Of prompts
    also a name of one's own -> another column, which reward functions then get under that name."""
    limit: PositiveInt | None = None
    """Use the first so many rows only."""

    @property
    def paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def name(self) -> str:
        """For errors and reports: the path, and how many more there are."""
        first, *others = self.paths
        return f"{first} and {len(others)} more" if others else first
