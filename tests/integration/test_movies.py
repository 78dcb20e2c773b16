"""The movies task: splits, pairs, tokens, and folders that appear whole or not at all."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from examples.movies import MIN_MARGIN, SPLITS, Sentence, make, parse, prepare, vader, write_task

OPENINGS = ("The film is", "Nobody here seems", "It's a (very) “odd”", "Écoute: this one,", "Mr. Lee's third")
ENDINGS = (
    "a joy; really, a joy!",
    "so dull that we'd slept",
    "never worth £9.50 & tea",
    "warm -- and funny?!",
    "lost.",
)


@pytest.fixture(scope="module")
def sentences() -> list[Sentence]:
    texts = [f"{opening} {ending} Take {take}." for opening in OPENINGS for ending in ENDINGS for take in range(12)]
    return [
        Sentence(str(i), (i * 7 % 81) / 10 - 4, text) for i, text in enumerate([*texts, "Horrible.", "So very good"])
    ]


@pytest.fixture(scope="module")
def task(sentences: list[Sentence], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("movies")
    write_task(folder, sentences)
    return folder


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_lines_become_sentences() -> None:
    table = "1\t2.5\tLovely &amp; Amazing    moves us.\r\n2\t-1.0\tDull.\r\n3\t-2.0\tDull.\r\n"
    assert parse(table) == [Sentence("1", 2.5, "Lovely & Amazing moves us."), Sentence("2", -1.0, "Dull.")]


def test_first_words_and_rest() -> None:
    assert Sentence("1", 0.0, "A film to keep, always.").halves == ("A film to", " keep, always.")
    assert Sentence("1", 0.0, "Horrible.").halves == ("Horrible.", "")


def test_splits_are_disjoint_and_about_80_10_10(task: Path, sentences: list[Sentence]) -> None:
    texts = {split: {s.text for s in sentences if s.split == split} for split in SPLITS}
    for split in SPLITS:
        demonstrations = {row["prompt"] + row["completion"] for row in rows(task / "sft" / f"{split}.jsonl")}
        paired = {row[side] for row in rows(task / "preferences" / f"{split}.jsonl") for side in ("chosen", "rejected")}
        assert demonstrations <= texts[split]
        assert paired == texts[split]
    sizes = [sum(Sentence(str(i), 0.0, "").split == split for i in range(10_000)) for split in SPLITS]
    assert sizes == pytest.approx([8000, 1000, 1000], abs=120)


def test_the_better_rated_sentence_is_chosen(task: Path, sentences: list[Sentence]) -> None:
    ratings = {s.text: s.rating for s in sentences}
    for split in SPLITS:
        for row in rows(task / "preferences" / f"{split}.jsonl"):
            assert ratings[row["chosen"]] - ratings[row["rejected"]] == pytest.approx(row["margin"])
            assert row["margin"] >= MIN_MARGIN


def test_the_reward_model_learns_on_the_tokens_that_ppo_shows_it(task: Path) -> None:
    """A whole sentence, as in the preferences, has the ids of its first words followed by those of the rest."""
    tokenizer = AutoTokenizer.from_pretrained(task / "tiny")
    for split in SPLITS:
        for row in rows(task / "sft" / f"{split}.jsonl"):
            halves = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
            assert halves == tokenizer(row["prompt"] + row["completion"])["input_ids"]
            assert tokenizer.decode(halves) == (row["prompt"] + row["completion"]).lower()


def test_the_tiny_folder_fits_its_tokenizer(task: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(task / "tiny")
    config = AutoConfig.from_pretrained(task / "tiny")
    assert (config.vocab_size, config.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    assert tokenizer.pad_token_id == config.pad_token_id != tokenizer.eos_token_id


def test_chat_rows_tell_the_same(task: Path) -> None:
    for split in SPLITS:
        plain, chat = rows(task / "sft" / f"{split}.jsonl"), rows(task / "chat" / "sft" / f"{split}.jsonl")
        prompts = rows(task / "chat" / "prompts" / f"{split}.jsonl")
        for one, other, prompt in zip(plain, chat, prompts, strict=True):
            *question, assistant = other["messages"]
            assert question == prompt["messages"]
            assert [message["role"] for message in question] == ["system", "user"]
            assert f"{question[1]['content']} {assistant['content']}" == one["prompt"] + one["completion"]
        turns = {json.dumps(row["messages"]) for row in chat}
        for row in rows(task / "chat" / "preferences" / f"{split}.jsonl"):
            assert {json.dumps(row["chosen"]), json.dumps(row["rejected"])} <= turns


def test_made_twice_it_is_the_same(task: Path, sentences: list[Sentence], tmp_path: Path) -> None:
    write_task(tmp_path, sentences)
    files = [file.relative_to(task) for file in task.rglob("*") if file.is_file()]
    assert len(files) >= 20
    assert all((tmp_path / file).read_bytes() == (task / file).read_bytes() for file in files)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder, calls = tmp_path / "data" / "task", []

    def build(built: Path) -> None:
        calls.append(built)
        (built / "part").touch()
        if len(calls) == 1:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make(folder, folder / "part", build)
    assert list(folder.parent.iterdir()) == []
    make(folder, folder / "part", build)
    make(folder, folder / "part", build)
    assert len(calls) == 2
    assert [file.name for file in folder.iterdir()] == ["part"]


def test_vader_judges_the_answer_alone() -> None:
    good, bad, other = vader(
        ["A horrible"] * 2 + ["A great"], [" and great joy.", " and horrible mess.", " and great joy."]
    )
    assert good == other > 0 > bad


@pytest.mark.slow
def test_the_real_sentences(tmp_path: Path) -> None:
    prepare(tmp_path / "movies")
    demonstrations = [rows(tmp_path / "movies" / "sft" / f"{split}.jsonl") for split in SPLITS]
    assert [len(split) for split in demonstrations] == [8320, 1099, 1009]
    assert demonstrations[2][0]["prompt"] == "The film provides"
    assert demonstrations[2][0]["rating"] > 2
    assert AutoConfig.from_pretrained(tmp_path / "movies" / "tiny").vocab_size == 4000
