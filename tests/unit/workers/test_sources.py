"""Data as published: kinds of files, folders and patterns of shards, and the forms of well-known datasets."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.schema import DatasetSettings
from workers.data import DataError, Row, RowKind, read_rows

RECORDS = [{"prompt": "a", "completion": "b\nc"}, {"prompt": "é", "completion": 'd, "e"'}]
ROWS = [Row(record["prompt"], completion=record["completion"]) for record in RECORDS]
USER, ANSWER, WORSE = (
    {"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("assistant", "no"))
)


def read(path: Any, kind: RowKind = "demonstration", **settings: Any) -> list[Row]:
    paths = [str(each) for each in path] if isinstance(path, list) else str(path)
    return read_rows(DatasetSettings(path=paths, **settings), kind)


def write(path: Path, records: list[dict[str, Any]] = RECORDS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
        return path
    text = "".join(json.dumps(record) + "\n" for record in records)
    if ".json" in path.suffixes:
        text = json.dumps(records)
    if ".csv" in path.suffixes:
        with (path.parent / "table").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(records[0]))
            table.writeheader()
            table.writerows(records)
        text = (path.parent / "table").read_text(encoding="utf-8")
        (path.parent / "table").unlink()
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    assert read(write(tmp_path / name)) == ROWS
    assert read(write(tmp_path / name), limit=1) == ROWS[:1]


def test_json_of_other_shapes(tmp_path: Path) -> None:
    (tmp_path / "lines.json").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    (tmp_path / "inside.json").write_text(json.dumps({"data": RECORDS}))
    assert read(tmp_path / "lines.json") == read(tmp_path / "inside.json") == ROWS


def test_folders_patterns_and_lists_of_files(tmp_path: Path) -> None:
    first, second = (
        write(tmp_path / "data" / "0.jsonl", RECORDS[:1]),
        write(tmp_path / "data" / "1.parquet", RECORDS[1:]),
    )
    (tmp_path / "data" / "README.md").write_text("What this is.")
    assert read(tmp_path / "data") == read([first, second]) == read(tmp_path / "data" / "*.[jp]*") == ROWS
    assert read([second, first]) == ROWS[::-1]


def test_shards_of_several_splits(tmp_path: Path) -> None:
    for k, split in enumerate(("train", "test")):
        write(tmp_path / "data" / f"{split}-00000-of-00001.parquet", RECORDS[k : k + 1])
    assert read(tmp_path / "data", split="test") == ROWS[1:]
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "split: missing; by their names the files are of test, train"),
        ({"split": "validation"}, "split validation: no file's name has it; there are test, train"),
    )
    for settings, message in wrong:
        with pytest.raises(DataError, match=message):
            read(tmp_path / "data", **settings)
    write(tmp_path / "held-out" / "test" / "0.jsonl")
    with pytest.raises(DataError, match="split: missing"):
        read(tmp_path / "held-out")


def test_places_in_errors(tmp_path: Path) -> None:
    broken = [*RECORDS, {"prompt": "a", "completion": ""}]
    for name, place in (
        ("a.jsonl.gz", ":3"),
        ("a.json", ": record 3"),
        ("a.csv", ":5"),  # a cell has a line break
        ("a.parquet", ": row 3"),
    ):
        path = write(tmp_path / name, broken)
        with pytest.raises(DataError) as refused:
            read(path)
        assert str(refused.value).startswith(f"{path}{place}: "), name
    assert [row.place for row in read(write(tmp_path / "a.jsonl"))] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/a.jsonl:2",
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "cells.csv").write_text("prompt,completion\na,b,c\n")
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}' * 99)[:20])
    (tmp_path / "text.json.gz").write_text("[]")
    (tmp_path / "number.json").write_text("3")
    (tmp_path / "half.json").write_text("[{}")
    for name, message in (
        ("cells.csv", "cells.csv:2: must have 2 cells, as the header line has"),
        ("torn.jsonl.gz", "torn.jsonl.gz: cannot be read: Compressed file ended"),
        ("text.json.gz", "text.json.gz: cannot be read: Not a gzipped file"),
        ("number.json", "number.json: must be a list of records"),
        ("half.json", "half.json: not JSON: Expecting"),
        ("*.parquet", "no file matches"),
    ):
        with pytest.raises(DataError, match=message.replace("*", r"\*")):
            read(tmp_path / name, "prompt")


def test_settings_of_hub_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_hub: tuple[dict[str, Any], ...] = ({"configuration": "main"}, {"revision": "main"})
    for setting in only_hub:
        name = next(iter(setting))
        with pytest.raises(DataError, match=f"{name} main: for hub datasets only"):
            read(write(tmp_path / "a.jsonl"), **setting)

    def load(path: str, name: str | None, split: str | None, revision: str | None) -> datasets.Dataset:
        assert (path, name, split, revision) == ("someone/data", "main", "test", "v1")
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("someone/data", configuration="main", split="test", revision="v1") == ROWS


# ---------------------------------------------------------------- forms

HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}
HH = "\n\nHuman: hi\n\nAssistant: yes"
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
PARSED = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}

FORMS: dict[str, tuple[RowKind, dict[str, Any], Row]] = {
    "ShareGPT": (
        "demonstration",
        {"conversations": [HUMAN, GPT, HUMAN, GPT], "id": 7},
        Row([USER, ANSWER, USER], completion="yes", columns={"id": 7}),
    ),
    "ShareGPT with a system prompt": (
        "prompt",
        {"conversations": [HUMAN, GPT], "system": "Be brief."},
        Row([{"role": "system", "content": "Be brief."}, USER]),
    ),
    "ShareGPT's messages in another column": (
        "preference",
        {"chosen": [HUMAN, GPT], "rejected": [HUMAN, {"from": "gpt", "value": "no"}]},
        Row([USER], chosen="yes", rejected="no", rejected_prompt=[USER]),
    ),
    "Alpaca": (
        "demonstration",
        {"instruction": "Add.", "input": "1 and 1", "output": "2"},
        Row("Add.\n\n1 and 1", completion="2"),
    ),
    "Alpaca without input": (
        "demonstration",
        {"instruction": "Hi", "input": "", "output": "Ho"},
        Row("Hi", completion="Ho"),
    ),
    "Alpaca's prompts": ("prompt", {"instruction": "Hi", "output": "Ho"}, Row("Hi", columns={"output": "Ho"})),
    "HH": (
        "preference",
        {"chosen": HH, "rejected": HH.replace("yes", "no")},
        Row([USER], chosen="yes", rejected="no", rejected_prompt=[USER]),
    ),
    "content as parts": (
        "prompt",
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]},
        Row([USER]),
    ),
    "messages as JSON text": ("prompt", {"messages": json.dumps([USER, ANSWER])}, Row([USER])),
    "tool calls and tools": (
        "demonstration",
        {
            "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            "tools": json.dumps([{"type": "function", "function": {"name": "add", "description": None}}]),
        },
        Row(
            [USER],
            completion={"role": "assistant", "content": "", "tool_calls": [PARSED]},
            tools=[{"type": "function", "function": {"name": "add"}}],
        ),
    ),
    "reasoning and a name": (
        "demonstration",
        {"messages": [{**USER, "name": "Ann"}, {**ANSWER, "reasoning_content": "well"}]},
        Row([{**USER, "name": "Ann"}], completion={**ANSWER, "reasoning_content": "well"}),
    ),
    "an answer of several messages": (
        "demonstration",
        {"prompt": "hi", "completion": [ANSWER, USER, WORSE]},
        Row([USER, ANSWER, USER], completion="no", given=1),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, form: str) -> None:
    kind, record, row = FORMS[form]
    assert read(write(tmp_path / "a.jsonl", [record]), kind) == [row]
    others: dict[str, Any] = {name: None for name in ("messages", "prompt", "input", "tools") if name not in record}
    assert read(write(tmp_path / "b.parquet", [record | others]), kind)[0].completion == row.completion


def test_dialogues_as_demonstrations_and_prompts(tmp_path: Path) -> None:
    """Anthropic's HH data has only pairs; all three stages can read them."""
    path = write(tmp_path / "a.jsonl", [{"chosen": HH + HH, "rejected": HH}])
    columns = {"messages": "chosen"}
    assert read(path, columns=columns) == [Row([USER, ANSWER, USER], completion="yes", columns={"rejected": HH})]
    assert read(path, "prompt", columns=columns)[0].prompt == [USER, ANSWER, USER]


NOT_UNDERSTOOD: dict[str, tuple[list[Any], str]] = {
    "another key": (
        [{**USER, "weight": 0}],
        "prompt.0.weight: no such key of a message; there are role, content, name",
    ),
    "a speaker": ([{"from": "narrator", "value": "x"}], 'prompt.0.from: must be system, human, .*, was "narrator"'),
    "a picture": ([{"role": "user", "content": [{"type": "image"}]}], r"prompt.0.content.0: must be a part of text"),
    "calls of a user": ([{**USER, "tool_calls": [CALL]}], "prompt.0.tool_calls: only messages of the assistant"),
    "a call without name": (
        [USER, {"role": "assistant", "tool_calls": [{}]}],
        "prompt.1.tool_calls.0: must have function.name",
    ),
    "arguments": (
        [USER, {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "1"}]}],
        'prompt.1.tool_calls.0.function.arguments: must be a mapping, was "1"',
    ),
}


@pytest.mark.parametrize("what", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_refused(tmp_path: Path, what: str) -> None:
    messages, message = NOT_UNDERSTOOD[what]
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "a.jsonl", [{"prompt": messages}]), "prompt")
