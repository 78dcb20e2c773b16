"""Whatever a config or a data file holds: a clear error or a result, never a traceback from inside a library, never a hang."""

from __future__ import annotations

import copy
import json
import struct
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs import ConfigError, load_config
from configs.reference import describe
from configs.schema import DatasetSettings
from placement import Cluster, PlanError, make_plan
from placement.stages import STAGES
from workers.data import DataError, Row, read_rows

fuzz = settings(
    deadline=timedelta(seconds=3),
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# ---------------------------------------------------------------- configs

VALID: dict[str, Any] = {
    "name": "run",
    "model": {"path": "some/model", "lora": {"rank": 4, "targets": ["q", "v"]}},
    "sft": {
        "train": {"path": "a.jsonl", "columns": {"prompt": "question"}},
        "optimizer": {"lr": 1e-4, "betas": [0.9, 0.9]},
    },
    "rm": {"train": {"path": "b.jsonl"}, "optimizer": {"lr": 1e-4}},
    "ppo": {
        "prompts": {"path": "c.jsonl", "limit": 10},
        "steps": 3,
        "prompts_per_step": 8,
        "mini_batches": 2,
        "rewards": [{"kind": "model"}, {"kind": "function", "name": "short", "function": "rewards:short"}],
        "kl": {"controller": {"kind": "adaptive", "target": 0.1}},
        "actor_optimizer": {"lr": 1e-4},
        "critic_optimizer": "${ppo.actor_optimizer}",
        "evaluation": {"prompts": {"path": "c.jsonl"}, "judges": [{"name": "j", "function": "rewards:judge"}]},
    },
    "strategies": {"actor": "zero2"},
    "placement": {
        "groups": [{"roles": ["actor", "reference", "critic", "reward"]}, {"roles": ["rollout"], "devices": 2}]
    },
}
CLUSTERS = [Cluster.parse(text) for text in ("1x16cpu", "2x8xA100-80GB")]

odd_texts = st.text(max_size=30) | st.sampled_from(
    [
        "",
        " ",
        "\x00",
        "�",
        "${",
        "${}",
        "${name}",
        "${ppo}",
        "${ppo.steps}",
        "${oc.env:HOME}",
        "${oc.decode:'[1,'}",
        "${oc.select:x}",
        "${oc.create:${ppo}}",
        "${oc.dict.keys:${ppo}}",
        "${oc.deprecated:name}",
        "???",
        "../../etc/passwd",
        "${a:b}",
        r"\${x}",
        "1e400",
        "0x10",
        "1_000",
        "2024-01-01",
        "!!python/object:x",
        "null",
        "~",
        "é" * 200,
    ]
)
numbers = st.integers() | st.floats() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**30, 10**400, 5e-324, -0.0])
odd_values = st.recursive(
    st.none() | st.booleans() | numbers | odd_texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_texts | st.integers(), inner, max_size=4),
    max_leaves=8,
)
NAMES = sorted({setting.path.rpartition(".")[2].removesuffix("[]") for setting in describe()})


def places(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [place for key in keys for place in [(tree, key), *places(tree[key])]]


@st.composite
def configs(draw: st.DrawFn) -> dict[Any, Any]:
    tree = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        if not (there := places(tree)):
            break
        container, key = draw(st.sampled_from(there))
        match draw(st.sampled_from(["replace", "remove", "add", "copy"])):
            case "replace":
                container[key] = draw(odd_values)
            case "remove":
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.sampled_from(NAMES) | odd_texts)] = draw(odd_values)
            case "copy":
                container[key] = copy.deepcopy(draw(st.sampled_from([c[k] for c, k in there])))
    return tree


def settle(path: Path, overrides: list[str]) -> None:
    """Load and plan: success, or an error of ours that names a setting."""
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        problems = list(error.problems)
        assert problems and all(len(problem) > 8 and ": " in problem for problem in problems), problems
        assert "\n".join(problems).encode()
        return
    for stage in STAGES:
        for cluster in CLUSTERS:
            with suppress(PlanError):
                make_plan(config, stage, cluster)


@fuzz
@given(tree=configs())
def test_configs(tmp_path: Path, tree: dict[Any, Any]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    settle(path, [])


@fuzz
@given(
    key=st.sampled_from([setting.path.replace("[]", ".0") for setting in describe()]) | odd_texts,
    value=odd_values.map(lambda value: yaml.safe_dump(value, default_flow_style=True)) | odd_texts,
)
def test_overrides(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(VALID))
    settle(path, [f"{key}={value}"])


@fuzz
@given(data=st.binary(max_size=200) | st.text("{}[]:-,&*!|>'\"#%@`?~ \n\tab1.$<", max_size=60).map(str.encode))
def test_config_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(data)
    settle(path, [])


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12)
)
DOUBLING = "a0: {x: 1}\n" + "".join(f"a{k}: {{x: '${{a{k - 1}}}', y: '${{a{k - 1}}}'}}\n" for k in range(1, 25))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: " + "[" * 5000 + "]" * 5000,
        "{a: " * 3000 + "1" + "}" * 3000,
        BOMB,
        DOUBLING,
        "a: &a [*a]\n",
        "a: &a {b: *a}\n",
        "name: !!python/object/apply:os.system ['true']\n",
        "a: ${b}\nb: ${a}\n",
        "a: " + "9" * 5000 + "\n",
        "? [a, b]\n: 1\n",
        "? {a: b}\n: 1\n",
        "a: !!binary x\n",
        "<<: 3\n",
        "a: 99999-99-99\n",
        "name: a\nmodel: {path: m}\nseed: 0x" + "f" * 5000 + "\n",
        "name: a\nmodel: {path: m}\nseed: 0" + "7" * 5000 + "\n",
        "a0: &a0 {x: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [{', '.join([f'*a{k - 1}'] * 9)}]}}\n" for k in range(1, 12)),
        "a: &a {<<: *a}\n",
    ],
)
def test_config_files_that_are_traps(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value)


# ---------------------------------------------------------------- data

KINDS = ("demonstration", "preference", "prompt")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": json_values})
    | json_values,
    max_size=3,
)
records = st.dictionaries(
    st.sampled_from(["prompt", "completion", "messages", "chosen", "rejected", "margin", "x"]),
    st.text(max_size=5) | messages | json_values,
    max_size=5,
)


def refused_or_read(path: Path, kind: Any) -> None:
    try:
        rows = read_rows(DatasetSettings(path=str(path)), kind)
    except DataError as error:
        text = str(error)
        assert str(path) in text and text.encode()
    else:
        assert rows and all(isinstance(row, Row) for row in rows)
        for row in rows:
            repr(row).encode()
            json.dumps([row.prompt, row.completion, row.chosen, row.rejected], ensure_ascii=False).encode()


@fuzz
@given(
    lines=st.lists(records.map(lambda record: json.dumps(record).encode()) | st.binary(max_size=40), max_size=5),
    kind=st.sampled_from(KINDS),
    suffix=st.sampled_from([".jsonl", ".jsonl", ".jsonl", ".parquet", ".csv"]),
)
def test_data_files(tmp_path: Path, lines: list[bytes], kind: str, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(b"\n".join(lines))
    refused_or_read(path, kind)


GOOD = b'{"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}'


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\x00",
        b"\xff\xfe",
        b"null",
        b"[" * 100000,
        b'{"prompt": ' + b"[" * 50000 + b"]" * 50000 + b"}",
        b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"prompt": ' + b"9" * 5000 + b"}",
        GOOD[:20],
        GOOD + GOOD,
        GOOD[:-1] + b', "margin": 1e999}',
        GOOD[:-1] + b', "margin": ' + b"9" * 400 + b"}",
        GOOD.decode().encode("utf-16"),
        b'{"prompt": "\\ud800", "completion": "\\udfff", "chosen": "\\ud800", "rejected": "c"}',
        b"prompt,completion\na,b",
        b'{"x\\ud800": 1}',
        b'{"prompt": {"\\ud800": 1}}',
    ],
)
def test_lines_that_are_traps(tmp_path: Path, line: bytes, kind: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    refused_or_read(path, kind)
    path.write_bytes(line)
    refused_or_read(path, kind)
    path = path.rename(tmp_path / "rows.parquet")
    refused_or_read(path, kind)


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("parquet") / "rows.parquet"
    rows = [{"prompt": f"question {k}", "completion": "b" * k, "chosen": "b", "rejected": "c"} for k in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    return path.read_bytes()


@fuzz
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_damaged_parquet(tmp_path: Path, parquet: bytes, data: st.DataObject, kind: str) -> None:
    damaged = bytearray(parquet[: data.draw(st.integers(0, len(parquet)))])
    if data.draw(st.booleans()):
        damaged = bytearray(parquet)
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(parquet) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "rows.parquet"
    path.write_bytes(damaged)
    refused_or_read(path, kind)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"\xff\xfe"]),
        pa.array([2**62], pa.timestamp("ns")),
        pa.array([2**62], pa.timestamp("us")),
        pa.array([b"\xff\xfe"]).cast(pa.string(), safe=False),
        pa.array([2**31 - 1], pa.date32()),
        pa.array([[]]),
        pa.array([[("a", 1), ("a", 2)]], pa.map_(pa.string(), pa.int64())),
        pa.nulls(1),
        pa.array([2**62], pa.duration("s")),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_of_odd_types(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "rows.parquet"
    text = pa.array(["a"])
    for names in (["prompt", "completion", "x"], ["x", "completion", "prompt"]):
        pq.write_table(pa.table(dict(zip(names, [text, text, column], strict=True))), path)
        for kind in KINDS:
            refused_or_read(path, kind)


@settings(fuzz, max_examples=25)
@given(data=st.data())
def test_damaged_saved_datasets(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "saved"
    if not folder.exists():
        datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}] * 20).save_to_disk(str(folder))
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        damaged = damaged[: data.draw(st.integers(0, len(whole)))]
    else:
        damaged[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        refused_or_read(folder, "demonstration")
    finally:
        path.write_bytes(whole)


def test_a_saved_dataset_whose_offsets_lead_out_of_it(tmp_path: Path) -> None:
    """Arrow would follow them: the process would end with a segmentation fault."""
    folder = tmp_path / "saved"
    datasets.Dataset.from_list([{"prompt": "a" * 1234, "completion": "b"}]).save_to_disk(str(folder))
    file = next(folder.glob("*.arrow"))
    right, wrong = struct.pack("<2i", 0, 1234), struct.pack("<2i", 0, 2**30)
    head, _, rest = file.read_bytes().rpartition(right)  # the first stand in the header
    file.write_bytes(head + wrong + rest)
    with pytest.raises(DataError, match=r"a damaged dataset: .* offset"):
        read_rows(DatasetSettings(path=str(folder)), "demonstration")
